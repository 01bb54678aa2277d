"""The metrics of an arm, from what the steps return to lines for the writers; NaN stops the run here."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kdjax import cluster
from kdjax.checkpoint import Checkpoints
from kdjax.clock import Clock
from kdjax.errors import UserError
from kdjax.step import HPARAMS
from kdjax.writers import JsonlWriter, Progress, TensorBoardWriter, WandbWriter

if TYPE_CHECKING:
    from kdjax.train import Arm, Every

Writer = JsonlWriter | TensorBoardWriter | WandbWriter
_NOT_SHOWN = ("grad_norm", "update_norm", "skipped")  # in the terminal's one line
_NOT_TERMS = ("loss", "grad_norm", "update_norm")


def due(done: int, every: int, last: int) -> bool:
    """Whether something is to be done after a step: each so many steps (0: never), and after the last."""
    return done == last or (every > 0 and done % every == 0)


class Log(contextlib.AbstractContextManager):
    """Gathers the metrics of an arm's steps into one line every ``every.log`` steps, and stops the run at a NaN."""

    def __init__(
        self,
        arm: "Arm",
        every: "Every",
        writers: Sequence[Writer],
        clock: Clock,
        checkpoints: Checkpoints | None,
    ):
        self._arm, self._every, self._writers, self._clock = arm, every, writers, clock
        self._checkpoints = checkpoints
        self._window: list[np.ndarray] = []
        self._last = arm.stages[-1].stop
        self._skipped = 0  # in a row
        self._began = 0

    def begin(self, done: int) -> None:
        """The arm goes on from a step: lines of later ones are dropped."""
        self._began = done
        stream = None if cluster.is_first() else io.StringIO()
        self._progress = Progress(self._arm.name, self._last, done, stream=stream).__enter__()
        reached = [writer.truncate(self._arm.name, done) for writer in self._writers]
        if 0 < done < self._last:
            redone = max((step for step in reached if step), default=done) - done
            self._write({"step": done, "event": "resumed", "redone_steps": redone})

    def __exit__(self, *exception: Any) -> None:
        self._progress.__exit__(*exception)

    def take(self, number: int, packed: jax.Array, names: list[str], last: int) -> None:
        """The sums and counts of a step; ``last`` is the last step of its stage.

        Raises:
          UserError: something is not finite, or too many steps in a row were skipped for that.
        """
        pairs = jax.device_get(packed)
        broken = [name for name, value in zip(names, pairs[0], strict=True) if not np.isfinite(value).all()]
        if broken and self._every.stop_on_nan:
            raise self._not_finite(number, [name for name in broken if name not in _NOT_TERMS] or broken)
        if "skipped" in names:
            skipped = bool(pairs[0][names.index("skipped")].any())
            self._skipped = self._skipped + 1 if skipped else 0
            if self._skipped > self._every.skip_nan:
                raise self._not_finite(number, [f"loss or gradient, {self._skipped} steps in a row"])
        self._window.append(pairs)
        if due(number, self._every.log, last):  # stages have their own metrics, so a window ends with its stage
            self._flush(number, names)

    def evaluated(self, number: int, accuracy: float) -> None:
        """The test accuracy after a step."""
        self._write({"step": number, "eval_accuracy": accuracy})

    def _flush(self, number: int, names: list[str]) -> None:
        sums, counts = np.asarray(self._window, np.float64).sum(axis=0)
        means = np.where(counts > 0, sums / np.maximum(counts, 1e-30), math.nan)
        values: dict[str, float] = {}
        hparams: dict[str, float] = {}
        for index, name in enumerate(names):
            if name.startswith(HPARAMS):  # as it was at this step, not the window's mean
                hparams[name.removeprefix(HPARAMS)] = float(self._window[-1][0][index].mean())
            elif name == "skipped":
                values[name] = int(sums[index].sum())
            else:
                values[name] = float(means[index].mean())
        members = {}
        if self._arm.members:
            members = {"members": {name: means[names.index(name)].tolist() for name in ("loss", "accuracy")}}
        rate = (number - self._began) * self._arm.batch_size / max(self._clock.training(), 1e-9)
        self._window = []
        self._progress.update(number, {k: v for k, v in values.items() if k not in _NOT_SHOWN}, rate)
        about = {"hparams": hparams, "examples_per_s": rate, "seconds": self._clock.take()}
        self._write({"step": number, "total_steps": self._last, **values, **about, **members})

    def _write(self, record: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write({"arm": self._arm.name, **record})

    def _not_finite(self, number: int, where: list[str]) -> UserError:
        remedy = "no checkpoint was written before"
        if self._checkpoints and self._checkpoints.latest_step():
            remedy = f"the last good checkpoint is step {self._checkpoints.latest_step()} in {self._checkpoints.folder}"
        return UserError(
            f"{self._arm.name} is not finite at step {number} (in {', '.join(where)}); {remedy}: lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or look at the data of that step."
        )

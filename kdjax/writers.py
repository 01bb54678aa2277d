"""Where a run's numbers go while it runs: ``metrics.jsonl``, TensorBoard event files, W&B, and the terminal."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from kdjax.errors import UserError, first_line
from kdjax.untrusted import parse_json


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all (a temporary file beside it, synced, then renamed over it).

    Raises:
        UserError: no permission, no space, no such folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, oldest first; a last line without its newline (a killed run) is left out.

    Raises:
        UserError: the file is missing, or a line other than the last is not JSON.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions.") from error
    return [record for _, record in _lines(path, data)]


class JsonlWriter:
    """Appends one JSON object a line to a file and flushes each; usable as a context manager.

    A line that an earlier, killed run left unfinished is cut off on opening. NaN and infinities, which JSON does not
    have, are written as null; NumPy and JAX scalars as numbers.

    Raises:
        UserError: the file cannot be written, or is not JSON lines.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record, such as ``{"arm": "teacher", "step": 20, "loss": 0.3}``."""
        try:
            self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def truncate(self, arm: str, step: int) -> int:
        """Drops the lines of an arm that are later than a step, since a resumed run writes those again; returns the
        last step that it had come to."""
        self._file.close()
        found = list(_lines(self.path, self.path.read_bytes()))
        reached = max((record["step"] for _, record in found if _later(record, arm, step)), default=step)
        kept = [line for line, record in found if not _later(record, arm, step)]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        self._file = self._open()
        return reached

    def close(self) -> None:
        """Closes the file; nothing can be written after."""
        self._file.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> TextIO:
        try:
            with open(self.path, "ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            return open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self.path, error) from error


class TensorBoardWriter:
    """Writes the same records as ``JsonlWriter`` to TensorBoard event files, one run per arm below ``logdir``.

    Nested keys become tags (``hparams/kl.weight``); what is not a number is left out.

    Raises:
        UserError: the extra is not installed.
    """

    def __init__(self, logdir: str | os.PathLike[str]):
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "TensorBoard event files need tensorboardX: install it with `pip install 'kdjax[tensorboard]'`."
            ) from error
        self._open = lambda arm, purge: tensorboardX.SummaryWriter(
            str(Path(logdir) / arm),
            purge_step=purge,
            filename_suffix=f".{time.time_ns()}",  # names go by the second: one opened soon after would overwrite
        )
        self._runs: dict[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds the numbers of one record, which has an ``arm`` and a ``step``."""
        run = self._runs.get(record["arm"]) or self._start(record["arm"], None)
        for tag, value in _numbers(_plain(record)):
            run.add_scalar(tag, value, record["step"])

    def truncate(self, arm: str, step: int) -> None:
        """Marks the events of an arm that are later than a step as void."""
        if arm in self._runs:
            self._runs[arm].close()
        self._start(arm, step + 1)

    def close(self) -> None:
        """Flushes and closes all event files."""
        for run in self._runs.values():
            run.close()

    def _start(self, arm: str, purge: int | None) -> Any:
        self._runs[arm] = self._open(arm, purge)
        return self._runs[arm]


class WandbWriter:
    """Writes the same records to Weights & Biases: a run per arm, in a group per workdir, below ``folder/wandb``.

    The x axis is the record's ``step``, which W&B takes as one more number: its own steps can only go up. So nothing is
    taken back where a run resumes: lines after its checkpoint are written again, with the numbers that were there,
    since a resume is bit for bit. A workdir keeps what its runs are called in ``wandb-id``, so that a resumed arm goes
    on in its own run, also after the folder was moved. W&B's own variables count, such as ``WANDB_MODE=offline``; a
    failure after the start is a warning, since the numbers are in ``metrics.jsonl`` too.

    Args:
        project: W&B's project.
        folder: the workdir.
        config: as resolved; shown beside the runs.

    Raises:
        UserError: the extra is not installed, or W&B does not start (no key, no network).
    """

    def __init__(self, project: str, folder: str | os.PathLike[str], config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "log.wandb needs wandb: install it with `pip install 'kdjax[wandb]'`, or set log.wandb to ''."
            ) from error
        self._wandb, self._project, self._folder, self._config = wandb, project, Path(folder), _plain(config)
        self._runs: dict[str, Any] = {}
        self._broken = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds the numbers of one record, which has an ``arm`` and a ``step``; events are left out."""
        if self._broken or "event" in record:
            return
        run = self._runs.get(record["arm"]) or self._start(record["arm"])
        try:
            run.log({"step": record["step"], **dict(_numbers(_plain(record)))})
        except Exception as error:  # its process may be gone, and training goes on
            self._broken = True
            warnings.warn(f"W&B takes no more lines ({error}); metrics.jsonl has them.", stacklevel=2)

    def truncate(self, arm: str, step: int) -> None:
        """Begins an arm's run where it is new, so that a missing key is known at once; takes nothing back."""
        if not step:
            self._start(arm)

    def close(self) -> None:
        """Ends all runs, when what was logged is sent."""
        for run in self._runs.values():
            with contextlib.suppress(Exception):
                run.finish()

    def _start(self, arm: str) -> Any:
        if arm not in self._runs:
            identity = self._identity()
            try:
                self._runs[arm] = run = self._wandb.init(
                    project=self._project,
                    group=f"{self._folder.resolve().name}-{identity}",
                    id=f"{identity}-{hashlib.sha256(arm.encode()).hexdigest()[:8]}",  # a name may have any characters
                    name=arm,
                    dir=str(self._folder),
                    config=self._config,
                    resume="allow",
                    reinit="create_new",
                    # Our own display is no log; and a network that is gone must not keep a run from ending.
                    settings=self._wandb.Settings(console="off", quiet=True, finish_timeout=_WANDB_FINISH_S),
                )
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
            except Exception as error:  # it has dozens of its own kinds
                reason = first_line(error)
                remedy = "run `wandb login`, set WANDB_MODE=offline, or set log.wandb to ''"
                raise UserError(f"W&B does not start ({reason}): {remedy}.") from error
        return self._runs[arm]

    def _identity(self) -> str:
        place = self._folder / "wandb-id"
        if not place.exists():
            write_atomic(place, secrets.token_hex(5) + "\n")
        return place.read_text(encoding="utf-8").strip()


_WANDB_FINISH_S = 120  # what is not sent by then stays in folder/wandb, for `wandb sync`


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""
        raise


class Progress:
    """The live state of one arm: a bar on a terminal, a plain line now and then anywhere else. Writes to stderr.

    ``with Progress("teacher", 600, 0) as progress: progress.update(step, {"loss": 0.3, "kl": 0.2}, 5100.0)``.
    Calls are cheap (most return at once) and never raise: a broken or odd terminal only ends the display.

    Args:
        arm: what is being trained.
        total_steps: updates in the whole arm.
        start_step: updates that were made before (a resumed run).
        stream: where to write; stderr if None.
        every_s: seconds between two plain lines.
    """

    def __init__(
        self, arm: str, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None, every_s: float = 10.0
    ):
        self._arm, self._total, self._start_step = arm, total_steps, start_step
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}", markup=False),
            TimeRemainingColumn(compact=True),
            expand=True,
        )
        self._task = self._bar.add_task(arm, total=total_steps, completed=start_step)
        self._live: Live | None = None
        self._began: tuple[float, int] | None = None  # time and step of the first update: compiling is not progress
        self._next = 0.0  # when the display is due again
        self._last: tuple[int, dict[str, float], float] | None = None
        self._shown_step = -1
        self._broken = False

    def __enter__(self) -> "Progress":
        self._guard(self._open)
        return self

    def __exit__(self, *exception: object) -> None:
        self._guard(self._close)

    def update(self, step: int, metrics: Mapping[str, float], examples_per_s: float) -> None:
        """Tells the display where the run is: updates made, host floats by name, training throughput."""
        self._last = (step, dict(metrics), examples_per_s)
        now = time.monotonic()
        self._began = self._began or (now, step)
        if not self._broken and (now >= self._next or step >= self._total):
            self._next = now + (0.2 if self._live else self._every_s)
            self._guard(self._show)

    def _guard(self, action: Any) -> None:
        if not self._broken:
            try:
                action()
            except Exception:  # whatever a terminal does, training goes on
                self._broken = True
                with contextlib.suppress(Exception):  # gives stdout and stderr back
                    self._stop()

    def _open(self) -> None:
        console = _Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            # No thread beside the training loop: update() paints.
            self._live = Live(self._screen("compiling"), console=console, auto_refresh=False)
            self._live.start(refresh=True)
        else:
            resumed = f", from {self._start_step:,}" if self._start_step else ""
            print(f"{self._arm}: {self._total:,} steps{resumed}", file=self._stream, flush=True)

    def _show(self) -> None:
        if self._last is None:
            return
        step, metrics, examples_per_s = self._last
        parts = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        note = f"{examples_per_s:,.0f} examples/s  {parts}" if examples_per_s else parts  # 0: not measured yet
        if self._live:
            self._bar.update(self._task, completed=step)
            self._live.update(self._screen(note), refresh=True)
        elif step != self._shown_step:
            print(
                f"{self._arm}: step {step:,}/{self._total:,}  {note}  {self._eta(step)}", file=self._stream, flush=True
            )
        self._shown_step = step

    def _eta(self, step: int) -> str:
        began, first_step = self._began or (0.0, step)
        if step <= first_step:
            return "ETA unknown"
        left = (time.monotonic() - began) / (step - first_step) * max(self._total - step, 0)
        return f"ETA {time.strftime('%H:%M:%S', time.gmtime(left))}" if left < 86400 else "ETA over a day"

    def _close(self) -> None:
        try:
            self._show()
        finally:
            self._stop()

    def _screen(self, note: str) -> Group:
        return Group(self._bar, Text(note, style="dim", no_wrap=True, overflow="ellipsis"))

    def _stop(self) -> None:
        if self._live:
            self._live.stop()


def _plain(value: Any) -> Any:
    """The same value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """A record's numbers by tag; not its step, and not what is the same in every line."""
    for key, value in record.items():
        if not prefix and key in ("step", "total_steps"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


def _lines(path: str | os.PathLike[str], data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Complete lines with what they say; what follows the last newline is an unfinished write."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            text = line.decode("utf-8")
            record = parse_json(text)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: the file is damaged; remove that line.") from error
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not a JSON object: the file is damaged; remove that line.")
        yield text, record


def _later(record: Mapping[str, Any], arm: str, step: int) -> bool:
    return record.get("arm") == arm and record.get("step", -1) > step


def _cannot_write(path: Path, error: OSError) -> UserError:
    remedy = "free some space, fix the permissions or choose another --workdir"
    return UserError(f"cannot write {path}: {error.strerror or error}; {remedy}.")

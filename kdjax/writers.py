"""Where a run's numbers go while it runs: ``metrics.jsonl``, TensorBoard event files, and the terminal."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from kdjax.errors import UserError


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

    def truncate(self, arm: str, step: int) -> None:
        """Drops the lines of an arm that are later than a step: a resumed run writes those again."""
        self._file.close()
        kept = [line for line, record in _lines(self.path, self.path.read_bytes()) if not _later(record, arm, step)]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        self._file = self._open()

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
            if tag != "step":
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
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


def _lines(path: str | os.PathLike[str], data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Complete lines with what they say; what follows the last newline is an unfinished write."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
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

"""How far a run is and where its time goes, read from the files of its workdir alone.

Nothing is locked, loaded or computed on a device, so that a run in progress does not notice. What is read may be half
of a line, of an older version, or absent.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.errors import UserError
from kdjax.untrusted import parse_json

# Where an arm's seconds go, by the keys of a record's ``seconds``; ``redone`` follows from the events of resumes.
CAUSES = {
    "step": "steps",
    "input": "input wait",
    "compile": "compiling",
    "evaluate": "evaluating",
    "save": "saving",
    "restore": "restoring",
    "redone": "done again",
}
_REPEATED = ("step", "input", "evaluate", "save")  # what the steps that are left will take too
_FILES = ("metrics.jsonl", "compress/metrics.jsonl")

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # key -> steps, values
History = Sequence[Mapping[str, Any]]  # the records of metrics.jsonl


class Arm(NamedTuple):
    """One arm as it stands.

    Attributes:
        name: of the arm.
        step: updates made at the last line; 0 if there is none.
        total: updates of the whole arm; 0 for a model that was given, None where no file says.
        last: the newest value of each metric.
        seconds: by cause, see ``seconds``; empty where the run did not write them.
        left_s: seconds that the steps left will take at the pace so far; None if not known.
    """

    name: str
    step: int
    total: int | None
    last: Mapping[str, float]
    seconds: Mapping[str, float]
    left_s: float | None


class Run(NamedTuple):
    """What a workdir says of its run.

    Attributes:
        workdir: its folder.
        config: as resolved.
        history: the records of its metrics, oldest first.
        damaged: how many lines could not be read.
        written: when the last line was written, in seconds since the epoch; None without a line.
        running: whether a process on this machine holds the workdir; None where the system does not tell.
        arms: in the order of training.
    """

    workdir: Path
    config: Mapping[str, Any]
    history: History
    damaged: int
    written: float | None
    running: bool | None
    arms: list[Arm]

    @property
    def finished(self) -> bool:
        """Whether every arm has made its last step."""
        return all(arm.total is not None and arm.step >= arm.total for arm in self.arms)


def read(workdir: str | os.PathLike[str]) -> Run:
    """Reads a workdir of any verb that trains, at any moment of its run.

    Raises:
        UserError: it is no workdir, or one that cannot be read.
    """
    workdir = Path(workdir)
    config = _section(_object(workdir / "config.json"), "config")
    if not config:
        raise UserError(f"{workdir} is not a workdir of kdjax: it has no config.json that can be read.")
    files = [workdir / name for name in _FILES if (workdir / name).is_file()]
    lines = [line for file in files for line in _read(file).split(b"\n")[:-1]]  # what has no newline yet is unfinished
    history = [record for record in map(_record, lines) if record is not None]
    arms = series(history)
    names = dict.fromkeys([*_planned(workdir, config), *arms])
    return Run(
        workdir=workdir,
        config=config,
        history=history,
        damaged=len(lines) - len(history),
        written=max((file.stat().st_mtime for file in files if history), default=None),
        running=_is_held(workdir / ".lock"),
        arms=[_arm(name, arms.get(name, {}), _total(workdir, config, name), config) for name in names],
    )


def series(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Each arm's numbers over its steps: ``arm -> key -> (steps, values)``.

    Keys of nested numbers are joined: ``hparams/kl.weight``, ``seconds/save``. A null, which stands for a NaN, becomes
    NaN. Of a population's members there are the lowest and the highest: ``members/loss/low``, ``members/loss/high``.
    """
    arms: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in history:
        arm = arms.setdefault(record["arm"], {})
        for key, value in _numbers(record):
            steps, values = arm.setdefault(key, ([], []))
            steps.append(record["step"])
            values.append(value)
    return arms


def seconds(arm: Series) -> dict[str, float]:
    """An arm's seconds by cause, in the order of ``CAUSES``; empty where the run did not write them.

    The lines of steps that a kill undid are gone from the file: such steps count with the mean time of those kept.
    """
    found = {cause: _sum(arm, f"seconds/{cause}") for cause in CAUSES}
    found["redone"] = _sum(arm, "redone_steps") * found["step"] / max(_timed_steps(arm), 1)
    return {cause: value for cause, value in found.items() if value > 0}


def goodput(by_cause: Mapping[str, float]) -> float | None:
    """Seconds in steps that were kept over all seconds; None where there are none."""
    total = sum(by_cause.values())
    return by_cause.get("step", 0.0) / total if total else None


def last(arm: Series, key: str) -> float:
    """The newest value of a number; NaN if there is none."""
    return arm[key][1][-1] if key in arm else math.nan


def duration(value: float | None) -> str:
    """Seconds for a person: ``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``; a dash for None."""
    if value is None:
        return "–"
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 10 and not float(value).is_integer() else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def state(run: Run, now: float | None = None) -> str:
    """One sentence on whether the run is going on."""
    ended = run.finished or (run.workdir / "results.json").is_file()
    if run.running:
        doing = "A process is in the workdir"
    elif ended and run.finished:
        return "The run is finished."
    elif run.running is False:
        doing = "No process on this machine is in the workdir: the same command as before goes on with the run"
    else:
        doing = "Whether a process is in the workdir cannot be told here"
    if run.written is None:
        return f"{doing}; no line is written yet."
    age = duration(max((time.time() if now is None else now) - run.written, 0.0))
    return f"{doing}; the last line was written {age} ago."


# ------------------------------------------------------------------------------------------------------------- arms


def _arm(name: str, numbers: Series, total: int | None, config: Mapping[str, Any]) -> Arm:
    known = last(numbers, "total_steps")
    total = total if math.isnan(known) else int(known)
    step = max((steps[-1] for steps, _ in numbers.values()), default=0)
    by_cause = seconds(numbers)
    size, rate = _whole(_section(config, "data").get("batch_size")), last(numbers, "examples_per_s")
    pace = None  # seconds of a step
    if _timed_steps(numbers) > 0:
        pace = sum(by_cause.get(cause, 0.0) for cause in _REPEATED) / _timed_steps(numbers)
    elif size and rate > 0:
        pace = size / rate
    left = None if total is None or pace is None else max(total - step, 0) * pace
    return Arm(name, step, total, {key: last(numbers, key) for key in numbers}, by_cause, left)


def _timed_steps(arm: Series) -> int:
    """How many steps the lines with ``seconds`` cover: each those since the line before."""
    timed = arm.get("seconds/step", ([], []))[0]
    if not timed:
        return 0
    return timed[-1] - max((step for step in arm.get("loss", ([], []))[0] if step < timed[0]), default=0)


def _sum(arm: Series, key: str) -> float:
    return float(np.nansum(arm[key][1])) if key in arm else 0.0


def _planned(workdir: Path, config: Mapping[str, Any]) -> list[str]:
    """The arms that a run of this config trains, in order; of a population, a comparison or a compression, whose
    students have names of their own, the teachers."""
    teachers = ["teacher", *_section(config, "more_teachers")]
    if any((workdir / name).exists() for name in ("members.json", "cells", "compress")):
        return teachers
    links = [f"assistant_{name}" for name in sorted(_section(config, "assistants"))]
    links += [f"generation_{number}" for number in range(1, _whole(config.get("generations")) or 1)]
    return [*teachers, *links, "student_alone", "student_distilled"]


def _total(workdir: Path, config: Mapping[str, Any], name: str) -> int | None:
    """The updates of an arm as results or config say; None where they do not (epochs are of data not read here)."""
    results = _object(workdir / "results.json")
    more_teachers = _section(config, "more_teachers")
    links = results["chain"] if isinstance(results.get("chain"), list) else []
    measured = {str(link.get("name")): link for link in links if isinstance(link, dict)} | _section(results, "arms")
    if name in measured and not (name == "teacher" and more_teachers):  # there it stands for all of them
        return _whole(_section(measured, name).get("steps"))
    step = name.removesuffix("_alone")
    if step in _section(config, "compress"):
        made = _object(workdir / "compress" / f"{step}.json").get("steps")
        return _whole(made or _section(config, "compress", step).get("steps")) or None
    of_teacher = name == "teacher" or name in more_teachers
    given = [_section(config, "teacher")] if name == "teacher" else [_section(more_teachers, name)]
    given.append(_section(config, "assistants", name.removeprefix("assistant_")))
    if any(section.get("init") for section in given):
        return 0
    return _whole(_section(config, "teacher" if of_teacher else "train").get("steps")) or None


# ------------------------------------------------------------------------------------------------------------ files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions.") from error


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, or none that can be read."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(found: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What a file holds at these keys; empty where that is no section."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else {}  # type: ignore[assignment]
    return dict(found) if isinstance(found, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    named = isinstance(record, dict) and isinstance(record.get("arm"), str)
    return record if named and _whole(record.get("step")) is not None else None


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            members = [number for number in map(_number, value) if number is not None and math.isfinite(number)]
            if members:
                yield f"{prefix}{key}/low", min(members)
                yield f"{prefix}{key}/high", max(members)
        elif (tag := prefix + key) != "step" and (number := _number(value)) is not None:
            yield tag, number


def _number(value: Any) -> float | None:
    """NaN for null and what no float can hold; None for what is no number."""
    if value is not None and not isinstance(value, int | float):
        return None
    return float(value) if value is not None and abs(value) < 1e300 else math.nan


def _is_held(lock: Path) -> bool | None:
    """Whether a process of this machine holds a file's lock, without touching the lock: a run that starts at this
    moment would be refused."""
    try:
        inode = lock.stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:
        return None
    return any(f":{inode} " in line and " FLOCK " in line and "->" not in line for line in held.splitlines())

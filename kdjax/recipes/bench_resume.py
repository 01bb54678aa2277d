"""``kdjax bench resume``: what saving costs a run while it goes on, and what resuming costs it when it comes back."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import build, train
from kdjax import config as configs
from kdjax.checkpoint import Checkpoints
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED
from kdjax.model import parameter_count
from kdjax.recipes import bench_process, bench_step
from kdjax.recipes.bench_step import Bench
from kdjax.state import TrainState

SAVES = 7
QUIET = 20  # steps between two saves
MEANING = {
    "saving_over_otherwise": "step while a save is in flight / step otherwise, medians (goal: 1.10)",
    "saving_over_otherwise_mean": "the same of means, in which a step that was held up counts",
    "blocked_ms": "of the loop by the call that begins a save, median",
    "copy_ms": "of one copy of the state from the device to the host",
    "blocked_over_copy": "the first / the second (goal: 1)",
    "longest_step_ms": "while a save was in flight",
    "step_ms": "otherwise, each waited for",
    "steps_saving": "how many were made while saves were in flight",
    "save_s": "from beginning a save to having it on the disk, nothing else done",
    "first_step_s": "from starting the process to the metrics of the first step after a resume",
    "first_step_cached_s": "the same with a persistent compilation cache that knows the step",
    "prepare_s": "of that: until the config is read, the data are loaded and the models shaped",
    "checkpoint_bytes": "on the disk, after one step",
    "state_bytes": "of what it holds, in memory",
    "checkpoint_over_state": "their ratio",
    "checkpoint_over_small_teacher": "the same student's under this teacher / under one as small as it (goal: 1)",
    "teacher_params": "of this teacher and of the small one",
    **bench_step.ENVIRONMENT,
}


class Saved(NamedTuple):
    """Seconds of steps made while a save was in flight and otherwise, and of the calls that began the saves."""

    saving: list[float]
    otherwise: list[float]
    blocked: list[float]


def measure(config: ConfigDict) -> dict[str, Any]:
    """Saves and resumes a run of a few steps in a temporary folder, whose disk is what is measured.

    Weights are fresh. Takes about a minute.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        resumed = resumes(config, folder / "resumed")  # first, while no device is this process's
        bench = bench_step.prepare(config)
        steps = saves(bench, folder / "saves")
        values = {
            "benchmark": "resume",
            "saving_over_otherwise": statistics.median(steps.saving) / statistics.median(steps.otherwise),
            "saving_over_otherwise_mean": statistics.mean(steps.saving) / statistics.mean(steps.otherwise),
            "blocked_ms": 1e3 * statistics.median(steps.blocked),
            **_copies(bench.state(), steps.blocked),
            "longest_step_ms": 1e3 * max(steps.saving),
            "step_ms": 1e3 * statistics.median(steps.otherwise),
            "steps_saving": len(steps.saving),
            "save_s": synchronous(bench, folder / "synchronous"),
            **resumed,
            **sizes(bench, folder),
        }
        return values | bench_step.environment(bench.experiment)


def saves(bench: Bench, folder: Path, count: int = SAVES) -> Saved:
    """Steps with and without a save in flight; a save is in flight until its folder has its final name.

    Each step is waited for, so that what holds one up is seen there. At least one step is made after a save has begun,
    and the first save, which compiles the checksums, does not count.
    """
    found = Saved([], [], [])
    state = bench.state()

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, packed = bench.program.compiled(state, bench.teachers, bench.batch, bench.hparams)
        jax.block_until_ready((state, packed))
        return time.perf_counter() - start

    with Checkpoints(folder, keep=1, keep_best=False) as checkpoints:
        for number in range(count + 1):
            otherwise = [step() for _ in range(QUIET)]
            start = time.perf_counter()
            checkpoints.save(number, state, {}, None)
            blocked, saving = time.perf_counter() - start, [step()]
            while not (folder / str(number)).exists():
                saving.append(step())
            checkpoints.wait()  # until older ones are deleted, too
            if number:
                found.saving.extend(saving)
                found.otherwise.extend(otherwise)
                found.blocked.append(blocked)
    return found


def synchronous(bench: Bench, folder: Path, count: int = 3) -> float:
    """Median seconds of saving a state and waiting for it."""
    taken, state = [], bench.state()
    with Checkpoints(folder, keep=1, keep_best=False) as checkpoints:
        for number in range(count):
            start = time.perf_counter()
            checkpoints.save(number, state, {}, None)
            checkpoints.wait()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _copies(state: TrainState, blocked: list[float]) -> dict[str, float]:
    def copy() -> float:
        start = time.perf_counter()
        for leaf in _leaves(state):
            np.array(leaf)  # a copy, also where host and device share their memory
        return time.perf_counter() - start

    copy_s = statistics.median(copy() for _ in range(7))
    return {"copy_ms": 1e3 * copy_s, "blocked_over_copy": statistics.median(blocked) / copy_s}


# ------------------------------------------------------------------------------------------------------------ resuming


def resumes(config: ConfigDict, folder: Path) -> dict[str, float]:
    """Seconds from the start of a process to its first step after a resume, without and with a compilation cache.

    A first process leaves a checkpoint and fills the cache.
    """
    env = bench_process.cached_in(str(folder / "compiled"))

    def process(stop: int, env: dict[str, str] | None) -> dict[str, float]:
        return bench_process.ask("first_step", config, env=env, folder=str(folder), stop=stop, began=time.time())

    process(2, env)
    plain, cached = process(4, None), process(6, env)
    assert plain["step"] == 3 and cached["step"] == 5, "it resumed"
    return {
        "first_step_s": plain["first_step_s"],
        "first_step_cached_s": cached["first_step_s"],
        "prepare_s": plain["prepare_s"],
    }


class _First:
    """A writer that notes when the first metrics came."""

    def __init__(self, began: float):
        self.began, self.found = began, dict[str, float]()

    def truncate(self, arm: str, last_step: int) -> None:
        """Keeps no lines."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes a line of metrics."""
        if not self.found and "loss" in record:
            self.found = {"step": record["step"], "first_step_s": time.time() - self.began}


def first_step(config: ConfigDict, *, folder: str, stop: int, began: float) -> dict[str, float]:
    """Trains the distilled student up to step ``stop``, from the checkpoint in ``folder`` where there is one, and says
    how long after ``began`` (seconds of the epoch) its first metrics were there."""
    experiment = build.prepare(config)
    prepared = time.time() - began
    teachers = bench_step.fresh_teachers(experiment)
    experiment, arm = bench_step.with_arm(experiment, teachers)
    arm = arm._replace(stages=[arm.stages[0]._replace(start=0, stop=stop)], teacher_variables=teachers)
    writer: Any = _First(began)
    with Checkpoints(Path(folder) / DISTILLED, keep=1, keep_best=False) as checkpoints:
        train.run(arm, experiment.mesh, every=train.Every(log=1), checkpoints=checkpoints, writers=[writer])
    return writer.found | {"prepare_s": prepared}


# --------------------------------------------------------------------------------------------------------------- bytes


def sizes(bench: Bench, folder: Path) -> dict[str, Any]:
    """Bytes of a checkpoint after one step, with the config's teacher and with one of the student's own size."""
    own, state = _written(bench, folder / "own")
    held = sum(leaf.nbytes for leaf in _leaves(state))
    found: dict[str, Any] = {"checkpoint_bytes": own, "state_bytes": held, "checkpoint_over_state": own / held}
    try:
        other = bench_step.prepare(with_small_teacher(bench.experiment.config))
    except UserError:  # a term that speaks of this teacher's own layers, for example
        return found
    counts = [sum(parameter_count(one["params"]) for one in each.teachers.values()) for each in (bench, other)]
    return found | {
        "checkpoint_over_small_teacher": own / _written(other, folder / "other")[0],
        "teacher_params": {"own": counts[0], "small": counts[1]},
    }


def with_small_teacher(config: ConfigDict) -> ConfigDict:
    """The config with a single teacher that is what the student is."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    options = changed.student.options.to_dict() if changed.student.options else {}
    changed.teacher.update(name=changed.student.name, init="", cache="")
    changed.teacher.options = options
    changed.more_teachers, changed.assistants, changed.generations = {}, {}, 1
    changed.student.init = ""
    return configs.resolve(changed)


def _written(bench: Bench, folder: Path) -> tuple[int, TrainState]:
    state, _ = bench.program.compiled(bench.state(), bench.teachers, bench.batch, bench.hparams)
    with Checkpoints(folder, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(1, state, {}, None)
        checkpoints.wait()
    return sum(path.stat().st_size for path in (folder / "1").rglob("*") if path.is_file()), state


def _leaves(state: TrainState) -> Iterator[Any]:
    """The arrays of a state; a random key as its words."""
    for leaf in jax.tree.leaves(state):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        yield jax.random.key_data(leaf) if is_key else leaf

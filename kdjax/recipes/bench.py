"""``kdjax bench``: measurements that anyone can repeat: the compiled step, several seeds, a class that was never seen."""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from kdjax import experiment as experiments, results, sharding, train
from kdjax.errors import UserError, unknown
from kdjax.experiment import MAIN, STUDENTS, Experiment
from kdjax.model import Model, Outputs, Variables
from kdjax.recipes import distill, program
from kdjax.step import make_predict
from kdjax.tasks import classification
from kdjax.writers import write_atomic

ALONE, DISTILLED = STUDENTS
SECONDS = 20.0  # of each timed comparison, unless the fewest rounds take longer
FEWEST, MOST = 15, 300  # rounds
BLOCK = 20  # steps of a run that are timed as one
STEPS = 20  # of each stage, in the run whose compilations are counted: more than can be in flight
COMPILED = "/jax/core/compile/backend_compile_duration"


class Found(NamedTuple):
    """What a benchmark measured: for JSON, and as a table for people."""

    values: dict[str, Any]
    table: Table


def run(name: str, config: ConfigDict, *, workdir: Path, seeds: int = 5, json_output: bool = False) -> dict[str, Any]:
    """Runs the benchmark ``name`` of :data:`BENCHMARKS`, prints a table or one JSON object, and returns the latter.

    Raises:
      UserError: an unknown name, or whatever is wrong with the config.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    with contextlib.redirect_stdout(sys.stderr):  # what the runs say, so that stdout holds the result alone
        found = BENCHMARKS[name](config, Path(workdir), seeds)
    if json_output:
        print(json.dumps(found.values, indent=2, allow_nan=False))
    else:
        Console().print(found.table)
    return found.values


# ------------------------------------------------------------------------------------------------------------ the step


class Bench(NamedTuple):
    """The compiled step of the distilled student's first stage and fresh values of all its arguments, on the devices."""

    experiment: Experiment
    arm: train.Arm
    program: program.Program
    teachers: dict[str, Variables]
    batch: dict[str, jax.Array]
    hparams: Any

    def state(self) -> Any:
        """A fresh state; the step donates the one that it is given."""
        return train.fresh_state(self.arm, self.experiment.mesh)


def step(config: ConfigDict, workdir: Path, seeds: int) -> Found:
    """The first stage's step against its parts, its FLOPs, its compilations and transfers, and the input pipeline.

    Weights are fresh: their values change no time. Gradient accumulation is switched off. Takes about a minute.
    """
    del workdir, seeds
    bench = _bench(config)
    experiment, arm = bench.experiment, bench.arm
    times = fused_and_parts(bench)
    compiles, transfers, complaint = compiles_and_transfers(arm, experiment.mesh)
    constant_s, input_s = _constant_and_input(bench)
    minimum = _forward_flops(bench, experiment.teachers) + 3 * _forward_flops(bench, {"student": experiment.student})
    values = {
        "fused_over_parts": times["fused"] / (times["teacher"] + times["student"]),
        "flops_over_minimum": bench.program.flops / minimum,
        "compiles": compiles,
        "host_transfers": transfers,
        "input_over_constant": input_s / constant_s,
        "temp_bytes": bench.program.temp_bytes,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "fused_ms": times["fused"] * 1e3,
        "teacher_forward_ms": times["teacher"] * 1e3,
        "student_update_ms": times["student"] * 1e3,
        "constant_step_ms": constant_s * 1e3,
        "input_step_ms": input_s * 1e3,
        "examples_per_s": arm.batch_size / input_s,
        "flops": bench.program.flops,
        "flops_minimum": minimum,
        "batch_size": arm.batch_size,
        "teacher": [experiments.member(experiment.config, name).name for name in experiment.teachers],
        "student": experiment.config.student.name,
        "dtype": experiment.config.train.dtype,
        "data": experiment.dataset.name,
        "devices": experiment.mesh.size,
        "nproc": os.cpu_count(),
    }
    if complaint:
        values["host_transfer"] = complaint
    return Found(values, _step_table(values))


def fused_and_parts(bench: Bench, *, fewest: int = FEWEST, seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of the fused step, the teachers' forward pass alone, and the student's update alone.

    The parts do together what the step does: the teachers take the batch as the student sees it (normalised and
    augmented beforehand), and the student's update, which does the same preprocessing as the fused step, takes the
    teachers' logits as an argument. All three take turns in one process, and each is waited for.
    """
    experiment = bench.experiment
    preprocess = classification.make_preprocess(experiment.dataset, experiment.config.data.augment.to_dict())
    seen = jax.jit(preprocess)(bench.batch, bench.state().key)
    forward = jax.jit(_forward(experiment.teachers))
    logits = forward(bench.teachers, seen)
    told = experiment._replace(teachers={name: _already_said(model) for name, model in experiment.teachers.items()})
    student = _compile(told, experiments.make_arm(told, DISTILLED), logits, bench.batch, bench.hparams)
    states = {"fused": bench.state(), "student": bench.state()}

    def update(name: str, compiled: Any, teachers: Any) -> None:
        states[name], packed = compiled(states[name], teachers, bench.batch, bench.hparams)
        jax.block_until_ready((states[name], packed))

    calls: dict[str, Callable[[], Any]] = {
        "fused": lambda: update("fused", bench.program.compiled, bench.teachers),
        "teacher": lambda: jax.block_until_ready(forward(bench.teachers, seen)),
        "student": lambda: update("student", student, logits),
    }
    return _medians(calls, fewest, seconds)


def compiles_and_transfers(arm: train.Arm, mesh: Mesh, steps: int = STEPS) -> tuple[float, int, str]:
    """Compilations per stage and implicit transfers in the loop, in a real run of a few steps of every stage.

    Counts what the compiler reports from the first compilation of a step to the end of the run, so a compilation inside
    the loop is seen whatever it is of. The loop runs under ``transfer_guard("disallow")``, which stops it at the first
    implicit transfer: the count is 0 or 1, and 1 comes with what the guard said.
    """
    names: list[str] = []

    def listen(event: str, _: float, **kind: Any) -> None:
        if event == COMPILED:
            names.append(str(kind.get("fun_name")))

    short = [s._replace(start=i * steps, stop=(i + 1) * steps) for i, s in enumerate(arm.stages)]
    complaint = ""
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.run(arm._replace(stages=short), mesh, every=train.Every(log=steps, stop_on_nan=False))
    except jax.errors.JaxRuntimeError as error:
        if "transfer" not in str(error):
            raise
        complaint = str(error).splitlines()[0]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    first = next((place for place, name in enumerate(names) if "packed" in name), len(names))
    return (len(names) - first) / len(short), int(bool(complaint)), complaint


def input_over_constant(bench: Bench) -> float:
    """The time of a step with the real input pipeline over that of one on a batch that is on the devices already."""
    constant, real = _constant_and_input(bench)
    return real / constant

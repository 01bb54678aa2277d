"""``kdjax bench step``: the step against its parts, its FLOPs, its compilations and transfers, and its input."""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import advance, build, sharding, train
from kdjax import experiment as experiments
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, Experiment
from kdjax.model import Array, Model, Outputs, Variables, logits_of
from kdjax.objective import Batch
from kdjax.recipes import bench_host, bench_limits, difficulty, program
from kdjax.state import TrainState, inference_variables

SECONDS = 20.0  # of each timed comparison, unless the fewest rounds take longer
FEWEST, MOST = 7, 300  # rounds
STEPS = 20  # of each stage, in the run whose compilations are counted: more than can be in flight
COMPILED = "/jax/core/compile/backend_compile_duration"
ENVIRONMENT = {  # what each key of environment() is
    "batch_size": "over all devices",
    "teacher": "",
    "student": "",
    "dtype": "of the computation",
    "data": "",
    "device": "",
    "devices": "in the mesh",
    "nproc": "processors of the host",
    "jax": "version",
}
MEANING = {
    "fused_over_parts": "fused step / (teacher forward + student update, each jitted alone) (goal: 1.05, text 1.10)",
    "flops_over_minimum": "compiled FLOPs of the step / (teacher forward + 3 x student forward) (goal: 1.05)",
    "compiles": "compilations of and during a stage's loop, in a short run (goal: 1)",
    "host_transfers": "implicit transfers in its loop (goal: 0)",
    "input_over_constant": "step with the real input pipeline / step on a batch that is there already (goal: 1.05)",
    "products_over_minimum": "the same of matrix products and convolutions, each loop counted as often as it runs",
    "peak_fraction": "products of the step / seconds on the device / this machine's own best square product",
    "peak_gflops_per_s": "that best, of all devices of the mesh, by dtype",
    "bytes_over_minimum": "compiled bytes accessed / (state read and written, teachers and batch read), on one device",
    "temp_bytes": "intermediate values of the step on one device, bytes",
    "step_bytes": "all that the step needs at once on one device, as compiled",
    "peak_bytes": "that one device had in use at most, from making the weights to the first steps, where it says so",
    "host_share": "of a step of the training loop: host time that the device waits for (goal: 0.01 of a 20 ms step)",
    "host_share_range": "lowest, highest round",
    "loop_ms": "step of the training loop itself, its input, progress and logging in it",
    "device_ms": "step without the host: call after call on one batch, several in flight",
    "split_ms": "where the host is in a step: makes the batch, puts it, calls the step, waits for the device",
    "fused_ms": "step, each waited for",
    "teacher_forward_ms": "teachers' forward pass alone",
    "student_update_ms": "student's update alone, the teachers' logits given",
    "constant_step_ms": "step on a constant batch, several in flight",
    "input_step_ms": "step with the real input pipeline, several in flight",
    "examples_per_s": "with the real input pipeline",
    "tokens_per_s": "the same of text",
    "flops": "of one step on all devices, as compiled: the body of a loop once",
    "products": "FLOPs of its matrix products and convolutions, loops as often as they run",
    "bytes_accessed": "as compiled, on one device: the body of a loop once",
    **ENVIRONMENT,
}


class Bench(NamedTuple):
    """The compiled step of the distilled student's first stage and values of its arguments, on the devices."""

    experiment: Experiment
    arm: train.Arm
    program: program.Program
    teachers: dict[str, Variables]
    batch: dict[str, jax.Array]
    hparams: Any

    def state(self) -> TrainState:
        """A fresh state; the step donates the one that it is given."""
        return train.fresh_state(self.arm, self.experiment.mesh)


def measure(config: ConfigDict, seconds: float) -> dict[str, Any]:
    """The first stage's step against its parts, its FLOPs, its compilations and transfers, and the input pipeline.

    Weights are fresh: their values change no time. Gradient accumulation is switched off. Takes about two minutes, of
    which each of three comparisons takes ``seconds``, unless its fewest rounds take longer.

    Raises:
      UserError: a cache stands for the teacher.
    """
    bench = prepare(config)
    experiment, arm = bench.experiment, bench.arm
    if experiment.signals:
        raise UserError(
            "kdjax bench step compares with the teacher, which teacher.cache stands for: use bench signals."
        )
    steps = bench_host.block(partial(bench_host.device, bench))
    peak_bytes = (experiment.mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    host = bench_host.measure(bench, steps, seconds)
    constant_s, input_s = constant_and_input(bench, steps, seconds=seconds)
    times = fused_and_parts(bench, seconds=seconds)
    compiles, transfers, complaint = compiles_and_transfers(arm, experiment.mesh)
    fresh = {"student": inference_variables(bench.state())}
    minimum, products_minimum = (
        count(bench, experiment.teachers, bench.teachers) + 3 * count(bench, {"student": experiment.distilled}, fresh)
        for count in (_forward_flops, _forward_products)
    )
    products = program.products(arm.stages[0].step, bench.state(), bench.teachers, bench.batch, bench.hparams)
    peaks = {dtype: bench_limits.peak(experiment.mesh, dtype) for dtype in experiments.DTYPES}
    accessed = program.bytes_accessed(bench.program.compiled)
    values = {
        "fused_over_parts": times["fused"] / (times["teacher"] + times["student"]),
        "flops_over_minimum": bench.program.flops / minimum,
        "compiles": int(compiles) if compiles.is_integer() else compiles,
        "host_transfers": transfers,
        "products_over_minimum": products / products_minimum,
        "peak_fraction": 1e3 * products / host["device_ms"] / peaks[experiment.config.train.dtype],
        "peak_gflops_per_s": {dtype: rate / 1e9 for dtype, rate in peaks.items()},
        "bytes_over_minimum": accessed / bench_limits.fewest_bytes(bench.state(), bench.teachers, bench.batch),
        **host,
        "input_over_constant": input_s / constant_s,
        "temp_bytes": bench.program.temp_bytes,
        "step_bytes": bench.program.bytes,
        "fused_ms": times["fused"] * 1e3,
        "teacher_forward_ms": times["teacher"] * 1e3,
        "student_update_ms": times["student"] * 1e3,
        "constant_step_ms": constant_s * 1e3,
        "input_step_ms": input_s * 1e3,
        "examples_per_s": arm.batch_size / input_s,
        "flops": bench.program.flops,
        "flops_minimum": minimum,
        "products": products,
        "products_minimum": products_minimum,
        "bytes_accessed": accessed,
        **environment(experiment),
    }
    if "tokens" in bench.batch:
        values["tokens_per_s"] = arm.batch_size * experiment.dataset.context / input_s
    if peak_bytes:
        values["peak_bytes"] = peak_bytes
    if complaint:
        values["host_transfer"] = complaint
    return values


def fused_and_parts(bench: Bench, *, fewest: int = FEWEST, seconds: float | None = None) -> dict[str, float]:
    """Median seconds of the fused step, the teachers' forward pass alone, and the student's update alone.

    All three take turns in one process, on the same batch, and each is waited for.
    """
    forward, student, seen = parts(bench)
    logits = forward(bench.teachers, seen)
    states = {"fused": bench.state(), "student": bench.state()}

    def update(name: str, compiled: Any, teachers: Any) -> None:
        states[name], packed = compiled(states[name], teachers, bench.batch, bench.hparams)
        jax.block_until_ready((states[name], packed))

    calls: dict[str, Callable[[], Any]] = {
        "fused": lambda: update("fused", bench.program.compiled, bench.teachers),
        "teacher": lambda: jax.block_until_ready(forward(bench.teachers, seen)),
        "student": lambda: update("student", student, logits),
    }
    return medians(calls, fewest, seconds)


def parts(bench: Bench) -> tuple[Any, Any, Batch]:
    """What the fused step is made of: ``(forward, student, seen)``.

    ``forward(teachers, seen)`` gives the teachers' outputs for the batch as the student sees it, normalised and
    augmented beforehand; ``student(state, outputs, batch, hparams)`` is the compiled step with these for teachers, and
    does the preprocessing. Together they do what the fused step does, no more and no less.
    """
    experiment = bench.experiment
    preprocess = experiment.task.make_preprocess(experiment.dataset, experiment.config.data.augment.to_dict())
    state = bench.state()
    seen = jax.jit(preprocess)(bench.batch, state.view_key)
    goal = bench.arm.stages[0].objective
    forward = jax.jit(_forward(experiment.teachers, goal.teacher_taps if goal else ()))
    outputs = forward(bench.teachers, seen)

    # A "teacher" whose variables are its outputs: the student's update is then the same code as in the fused step.
    def told(said: Outputs) -> Model:
        blank = jax.tree.map(jnp.zeros_like, said)
        return Model(init=lambda key: blank, apply=lambda said, inputs, **_: (Outputs(*said), {}))

    stand_ins = {name: told(said) for name, said in outputs.items()}
    arm = build.make_arm(experiment._replace(teachers=stand_ins), DISTILLED)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    args = (state, outputs, bench.batch, bench.hparams)
    student, _ = advance.compile_step(arm.stages[0].step, experiment.mesh, shardings, *args)
    return forward, student, seen


def compiles_and_transfers(arm: train.Arm, mesh: Mesh, steps: int = STEPS) -> tuple[float, int, str]:
    """Compilations per stage and implicit transfers in the loop, in a real run of a few steps of every stage.

    Counts what the compiler reports from the first compilation of a step to the end of the run, so a compilation inside
    the loop is seen whatever it is of. The loop runs under ``transfer_guard("disallow")``, which stops it at the first
    implicit transfer: the count is 0 or 1, and 1 comes with what the guard said.
    """
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            names.append(str(kwargs.get("fun_name")))

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


def constant_and_input(
    bench: Bench, steps: int, *, fewest: int = FEWEST, seconds: float | None = None
) -> tuple[float, float]:
    """Median seconds per step on one batch that stays on the devices, and with the real input pipeline.

    Blocks of ``steps`` take turns. Within a block the loop is that of training: a bounded number of steps in flight,
    metrics fetched late.
    """
    mesh = bench.experiment.mesh
    current = bench.state()
    real = bench.arm.batches(0)

    def block(next_batch: Callable[[], dict[str, Array]]) -> None:
        nonlocal current
        pending: deque[Array] = deque()
        for _ in range(steps):
            current, packed = bench.program.compiled(current, bench.teachers, next_batch(), bench.hparams)
            pending.append(packed)
            while len(pending) > train.MAX_IN_FLIGHT:
                jax.device_get(pending.popleft())
        jax.block_until_ready((current, pending))

    found = medians(
        {
            "constant": lambda: block(lambda: bench.batch),
            "input": lambda: block(lambda: sharding.put_batch(next(real), mesh)),
        },
        fewest,
        seconds,
    )
    return found["constant"] / steps, found["input"] / steps


def medians(calls: Mapping[str, Callable[[], Any]], fewest: int, seconds: float | None = None) -> dict[str, float]:
    """The median seconds of each call, which take turns."""
    seconds = SECONDS if seconds is None else seconds
    for call in calls.values():  # compiled and in the caches before the first round counts
        call()
    measures = {name: partial(_seconds, call) for name, call in calls.items()}
    times = bench_host.turns(measures, fewest, seconds, MOST)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _forward(
    models: Mapping[str, Model], taps: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Variables], Batch], dict[str, Outputs]]:
    """The models' outputs of a batch; ``taps`` are those of the first one."""
    tapped = dict.fromkeys(models, ()) | {name: taps for name in list(models)[:1]}
    return lambda variables, batch: {
        name: model.apply(variables[name], batch["inputs"], train=False, taps=tapped[name])[0]
        for name, model in models.items()
    }


def _forward_flops(bench: Bench, models: Mapping[str, Model], variables: Mapping[str, Variables]) -> float:
    """FLOPs over all devices of a batch's forward pass, at inference: the least that it can take."""
    normalise = bench.experiment.task.make_normalise(bench.experiment.dataset)
    forward = jax.jit(_forward(models))
    compiled = forward.lower(variables, jax.jit(normalise)(bench.batch)).compile()
    return program.flops(compiled) * bench.experiment.mesh.size


def _forward_products(bench: Bench, models: Mapping[str, Model], variables: Mapping[str, Variables]) -> float:
    """FLOPs of the products of a batch's forward pass up to the scores, which a head makes of hidden states."""
    normalise = bench.experiment.task.make_normalise(bench.experiment.dataset)

    def scores(variables: Mapping[str, Variables], batch: Batch) -> Any:
        return {name: logits_of(said) for name, said in _forward(models)(variables, normalise(batch)).items()}

    return program.products(scores, variables, bench.batch)


def prepare(config: ConfigDict) -> Bench:
    """Compiles the first stage's step and puts a real batch and fresh weights on the devices.

    It is the plain step, also where the config has the teachers run a batch ahead.
    """
    experiment = program.in_one_part(build.prepare(config))
    mesh = experiment.mesh
    teachers = fresh_teachers(experiment)
    experiment, arm = with_arm(experiment, teachers)
    arm = arm._replace(teacher_mesh=None, stages=[stage._replace(ahead=False) for stage in arm.stages])
    return Bench(
        experiment=experiment,
        arm=arm,
        program=program.compile_stage(experiment, arm, arm.stages[0], arm.batch_size),
        teachers=teachers,
        batch=sharding.put_batch(next(arm.batches(0)), mesh),
        hparams=jax.device_put(arm.stages[0].hparams, sharding.replicated(mesh)),
    )


def fresh_teachers(experiment: Experiment) -> dict[str, Variables]:
    """Random weights of all teachers, on the devices; nothing of one whose cache answers in its place."""
    fresh = {name: jax.jit(model.init)(jax.random.key(0)) for name, model in experiments.asked(experiment).items()}
    return train.put_teachers(fresh, experiment.mesh, experiment.config.sharding.teacher)


def with_arm(experiment: Experiment, teachers: dict[str, Variables]) -> tuple[Experiment, train.Arm]:
    """The distilled student's arm, and the experiment with what the teachers make of a curriculum's examples."""
    experiment = difficulty.scored(experiment, teachers)
    return experiment, build.make_arm(experiment, DISTILLED, teachers)


def environment(experiment: Experiment) -> dict[str, Any]:
    """What was measured, and where."""
    config = experiment.config
    return {
        "batch_size": config.data.batch_size,
        "teacher": [experiments.member(config, name).name for name in experiment.teachers],
        "student": config.student.name,
        "dtype": config.train.dtype,
        "data": experiment.dataset.name,
        "device": jax.devices()[0].device_kind,
        "devices": experiment.mesh.size,
        "nproc": os.cpu_count(),
        "jax": jax.__version__,
    }


def table(values: Mapping[str, Any], meaning: Mapping[str, str] = MEANING) -> Table:
    """A benchmark's measurements for people, with what each one is."""
    found = Table("measured", "value", "what it is")
    for name, text in meaning.items():
        if name in values:  # only text has tokens, for example
            found.add_row(name, shown(values[name]), text)
    return found


def shown(value: Any) -> str:
    """A measured value for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(one)}" for key, one in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


def table_of(header: list[str], rows: list[list[str]], caption: str) -> Table:
    """Rows of cells as a table for people."""
    shown = Table(*header, caption=caption)
    for row in rows:
        shown.add_row(*row)
    return shown

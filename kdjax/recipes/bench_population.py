"""``kdjax bench population``: students beside one teacher forward against as many runs of their own."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import build, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, Experiment
from kdjax.model import Model, Params, Variables, parameter_count
from kdjax.recipes import bench_step, population, program
from kdjax.recipes.bench_step import COMPILED, environment
from kdjax.recipes.population import Members

MEMBERS = 16
STEPS = 300
RATE = "optimizer.learning_rate"
RATES = (0.1, 0.05)  # of plain SGD; half of the members each
REPEATS = 3  # of the population's run, spread among the separate ones
ENOUGH = 120.0  # seconds of separate runs after which the rest is taken to last as long as these
MEANING = {
    "over_separate": "population / separate runs, total seconds, choosing the chunk included (goal: 0.5)",
    "over_separate_chunk_given": "the same with population.chunk in the config: nothing is chosen",
    "over_separate_without_compile": "the same, training alone",
    "flops_over_separate": "FLOPs of the population's step / of a separate step x members, as compiled",
    "recompiles": "compilations in a run over a second grid (goal: 0)",
    "params_differ_by": "largest difference of a final parameter from the member's separate run",
    "params_differ_by_one_by_one": "the same of the population as a loop over its members",
    "params_largest": "largest final parameter",
    "members": "",
    "steps": "of each",
    "chunk": "members at a time, as measured at the start of a population",
    "choosing_s": "that measurement",
    "population_s": "a run of the population with that chunk, median",
    "population_s_range": "its repetitions",
    "all_at_once_s": "a run of the population as one vmap",
    "one_by_one_s": "a run of the population as a loop over its members",
    "separate_s": "all separate runs, each with a compilation of its own",
    "separate_run_s_range": "one of them",
    "separate_runs_measured": "where fewer than members, the others are taken to last as long",
    "population_training_s": "without compiling, median",
    "separate_training_s": "without compiling, all of them",
    "step_ms_by_chunk": "the population's step by members at a time",
    "teacher_over_student_params": "",
    "teacher_over_student_flops": "of a forward pass",
    "flops": "of the population's step",
    "flops_separate": "of a separate step",
    **bench_step.ENVIRONMENT,
}


class Run(NamedTuple):
    """A finished run: seconds from building the arm to the last step, those of training alone, and what it left."""

    arm: train.Arm
    seconds: float
    training: float
    flops: float  # of a step over all devices, as the compiler counts: the body of a loop once
    params: Params  # on the host
    programs: dict[Any, Any]


def measure(config: ConfigDict, members: int = MEMBERS) -> dict[str, Any]:
    """A population of that many students against a separate run of each, both from fresh teachers' weights.

    Members are seeds, half of them at another learning rate; the optimiser is plain SGD, so that rounding stays
    rounding (Adam divides by the gradients' size, however small). Config and data are prepared beforehand, once for the
    population and once for each separate run, and not timed, which favours the separate runs. Takes a few minutes.

    Raises:
      UserError: fewer than 2 members, or losses that ask no teacher.
    """
    if members < 2:
        raise UserError(f"a population of {members} shares its teacher with nobody: give --seeds of 2 or more.")
    many = _members(plain(config), members, RATES if members % 2 == 0 else RATES[:1])
    experiment = build.prepare(many.template)
    experiments.refuse_language(experiment, "kdjax bench population")
    goal = build.make_arm(experiment, DISTILLED).stages[0].objective
    if goal is None or not goal.uses_teacher:
        raise UserError("a population shares its teacher and no loss asks one: set a weight, such as losses.kl.weight.")
    teachers = {
        name: jax.device_get(jax.jit(model.init)(jax.random.key(0))) for name, model in experiment.teachers.items()
    }
    start = time.perf_counter()
    by_chunk = population.measure_chunks(experiment, many, teachers, [members, 1])  # as a population chooses
    choosing = time.perf_counter() - start
    chunk = min(by_chunk, key=lambda chunk: by_chunk[chunk])
    together, alone = in_turns(experiment, many, teachers, chunk)
    first = together[0]
    other = {c: run_once(experiment, teachers, many.configs, c) for c in (members, 1) if c != chunk}
    by_chunk |= population.measure_chunks(experiment, many, teachers, _between(members))

    seconds = statistics.median(run.seconds for run in together)
    training = statistics.median(run.training for run in together)
    separate = members * statistics.mean(run.seconds for run in alone)
    separate_training = members * statistics.mean(run.training for run in alone)
    teacher_flops = sum(forward_flops(experiment, model) for model in experiment.teachers.values())
    flops = step_flops(first, teacher_flops, members // chunk)
    return {
        "benchmark": "population",
        "over_separate": (choosing + seconds) / separate,
        "over_separate_chunk_given": seconds / separate,
        "over_separate_without_compile": training / separate_training,
        "flops_over_separate": flops / (members * alone[0].flops),
        "recompiles": len(compiled_over_grid(experiment, teachers, first, members)),
        "params_differ_by": _differ_by(first, alone),
        "params_differ_by_one_by_one": _differ_by(other.get(1, first), alone),
        "params_largest": _largest(first.params),
        "members": members,
        "steps": experiment.config.train.steps,
        "chunk": chunk,
        "choosing_s": choosing,
        "population_s": seconds,
        "population_s_range": _range(run.seconds for run in together),
        "all_at_once_s": other[members].seconds if members in other else seconds,
        "one_by_one_s": other[1].seconds if 1 in other else seconds,
        "separate_s": separate,
        "separate_run_s_range": _range(run.seconds for run in alone),
        "separate_runs_measured": len(alone),
        "population_training_s": training,
        "separate_training_s": separate_training,
        "step_ms_by_chunk": {str(c): by_chunk[c] * 1e3 for c in sorted(by_chunk)},
        **_ratios(experiment, teachers, teacher_flops),
        "flops": flops,
        "flops_separate": alone[0].flops,
        **environment(experiment),
    }


def run_once(
    experiment: Experiment, teachers: Mapping[str, Variables], members: Sequence[ConfigDict] = (), chunk: int = 0
) -> Run:
    """Builds, compiles and trains the distilled student, or a population of it, and times that."""
    programs: dict[Any, Any] = {}
    start = time.perf_counter()
    arm = build.make_arm(experiment, DISTILLED, dict(teachers), members=members, chunk=chunk)
    every = train.Every(log=arm.stages[-1].stop)
    done = train.run(arm, experiment.mesh, every=every, programs=programs)
    jax.block_until_ready(done.state)
    seconds = time.perf_counter() - start
    assert done.examples_per_s, "a fresh run trains"
    compiled, _ = programs[arm.stages[0].step]
    return Run(
        arm=arm,
        seconds=seconds,
        training=arm.stages[-1].stop * arm.batch_size / done.examples_per_s,
        flops=program.flops(compiled) * experiment.mesh.size,
        params=jax.device_get(done.state.params),
        programs=programs,
    )


def step_flops(run: Run, teacher_flops: float, loops: int) -> float:
    """FLOPs of a population's step, where the compiler counts the body of the loop over chunks once."""
    return teacher_flops + loops * (run.flops - teacher_flops)


def in_turns(
    experiment: Experiment, members: Members, teachers: Mapping[str, Variables], chunk: int
) -> tuple[list[Run], list[Run]]:
    """The population's run, repeated among the separate runs of its members, so that both meet the same machine."""
    together: list[Run] = []
    alone: list[Run] = []
    pause = -(-len(members.configs) // REPEATS)
    for index, config in enumerate(members.configs):
        if sum(run.seconds for run in alone) > ENOUGH:
            break
        if index % pause == 0:
            together.append(run_once(experiment, teachers, members.configs, chunk))
        alone.append(run_once(build.prepare(config, experiment.source), teachers))
    return together, alone


def compiled_over_grid(
    experiment: Experiment, teachers: Mapping[str, Variables], first: Run, members: int
) -> list[str]:
    """What is compiled when another grid, in which every traced number differs, runs in a finished run's program."""
    config, stage = experiment.config, first.arm.stages[0]
    assert stage.objective is not None, "build.make_arm sets it"
    numbers = {f"losses.{name}": value for name, value in stage.objective.hparams.items()}
    grid = {
        key: [0.9 * value]
        for key, value in numbers.items()
        if isinstance(value, int | float) and key.split(".")[1] in config.losses
    }
    others = population.make_members(config, members, {**grid, RATE: [0.3 * RATES[0]]})
    with compilations() as names:
        # Only the numbers of this arm are used; its step, never compiled, would be the same.
        arm = build.make_arm(experiment, DISTILLED, dict(teachers), members=others.configs)
        stage = stage._replace(hparams=arm.stages[0].hparams, stop=min(stage.stop, 5))
        train.run(first.arm._replace(stages=[stage]), experiment.mesh, programs=first.programs)
    return names


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the name of whatever the compiler compiles within."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# ------------------------------------------------------------------------------------------------------- its parts


def plain(config: ConfigDict) -> ConfigDict:
    """The config as one stage of plain SGD, in one part, without models between teacher and student."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.stages, changed.assistants, changed.generations = {}, {}, 1
    changed.train.update(steps=changed.train.steps or STEPS, accumulate=1)
    changed.optimizer = {**configs.default().optimizer.to_dict(), "name": "sgd", "learning_rate": RATES[0]}
    return configs.resolve(changed)


def _members(config: ConfigDict, count: int, rates: Sequence[float]) -> Members:
    return population.make_members(config, count // len(rates), {RATE: list(rates)})


def _between(members: int) -> list[int]:
    """The divisors between 1 and the number of members, the largest first."""
    return [chunk for chunk in range(members - 1, 1, -1) if members % chunk == 0]


def forward_flops(experiment: Experiment, model: Model) -> float:
    """FLOPs of a batch's forward pass, at inference."""
    shape = (experiment.config.data.batch_size, *experiment.dataset.train.inputs.shape[1:])
    variables = jax.eval_shape(model.init, jax.random.key(0))
    forward = jax.jit(lambda variables, inputs: model.apply(variables, inputs, train=False)[0].logits)
    return program.flops(forward.lower(variables, jax.ShapeDtypeStruct(shape, np.float32)).compile())


def _ratios(experiment: Experiment, teachers: Mapping[str, Variables], teacher_flops: float) -> dict[str, float]:
    student = jax.eval_shape(experiment.distilled.init, jax.random.key(0))["params"]
    params = sum(parameter_count(variables["params"]) for variables in teachers.values())
    return {
        "teacher_over_student_params": params / parameter_count(student),
        "teacher_over_student_flops": teacher_flops / forward_flops(experiment, experiment.distilled),
    }


def _differ_by(together: Run, alone: Sequence[Run]) -> float:
    differences = [
        jax.tree.map(lambda stacked, own, i=i: stacked[i] - own, together.params, run.params)
        for i, run in enumerate(alone)
    ]
    return max(map(_largest, differences))


def _largest(params: Params) -> float:
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(params))


def _range(values: Iterator[float]) -> list[float]:
    found = list(values)
    return [min(found), max(found)]

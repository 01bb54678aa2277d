"""``kdjax bench signals``: the step that learns from a cache, against the step of the student alone."""

from typing import Any

import jax
from ml_collections import ConfigDict

from kdjax import advance, build, sharding, train
from kdjax.data import cache
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, MAIN, Experiment
from kdjax.recipes import bench_step, program
from kdjax.tasks import language

BLOCK = 20  # steps that are timed as one
MEANING = {
    "cached_over_alone": "step from the cache / step of the student alone, medians of several in flight (goal: 1.10)",
    "cached_flops_over_alone": "compiled FLOPs of the two",
    "cached_ms": "step from the cache, its files read with the batch",
    "alone_ms": "step of the student alone",
    "bytes_per_token": "of the cache on the disk",
    "form": "of the signals",
    **bench_step.ENVIRONMENT,
}


def measure(config: ConfigDict) -> dict[str, Any]:
    """Times blocks of both steps in turn, each with its own input pipeline, as training runs them.

    Raises:
      UserError: the config names no cache.
    """
    experiment = program.in_one_part(build.prepare(config))
    if experiment.signals is None:
        raise UserError("kdjax bench signals needs a cache: set teacher.cache to one that kdjax cache made.")
    arms = {
        "cached": build.make_arm(experiment, DISTILLED, {MAIN: language.NO_WEIGHTS}),
        "alone": build.make_arm(experiment, ALONE),
    }
    programs = {name: _compile(experiment, arm) for name, arm in arms.items()}
    states = {name: train.fresh_state(arm, experiment.mesh) for name, arm in arms.items()}
    batches = {name: arm.batches(0) for name, arm in arms.items()}

    def block(name: str) -> None:
        step, teachers, hparams = programs[name]
        for _ in range(BLOCK):
            batch = sharding.put_batch(next(batches[name]), experiment.mesh)
            states[name], packed = step(states[name], teachers, batch, hparams)
        jax.block_until_ready((states[name], packed))

    calls: dict[str, Any] = {name: lambda name=name: block(name) for name in arms}
    seconds = {name: taken / BLOCK for name, taken in bench_step.medians(calls, 5).items()}
    flops = {name: program.flops(step) for name, (step, _, _) in programs.items()}
    return {
        "cached_over_alone": seconds["cached"] / seconds["alone"],
        "cached_flops_over_alone": flops["cached"] / flops["alone"],
        "cached_ms": 1e3 * seconds["cached"],
        "alone_ms": 1e3 * seconds["alone"],
        "bytes_per_token": cache.size(experiment.signals.folder),
        "form": experiment.signals.manifest.form,
        **bench_step.environment(experiment),
    }


def _compile(experiment: Experiment, arm: train.Arm) -> tuple[Any, Any, Any]:
    """The first stage's compiled step with the teachers and hyperparameters that it takes."""
    mesh, stage = experiment.mesh, arm.stages[0]
    state = train.fresh_state(arm, mesh)
    teachers = train.put_teachers(arm.teacher_variables, mesh, arm.teacher_rules)
    batch = sharding.put_batch(next(arm.batches(0)), mesh)
    hparams = jax.device_put(stage.hparams, sharding.replicated(mesh))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step, _ = advance.compile_step(stage.step, mesh, shardings, state, teachers, batch, hparams)
    return step, teachers, hparams

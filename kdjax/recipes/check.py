"""``kdjax check``: does a config do what it should, and does it fit, before any device time is spent on it?

Everything runs on the config's own models, terms, mesh and data, a few dozen examples of it.
"""

import json
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from kdjax import build, checkpoint, memory, sharding, train
from kdjax import experiment as experiments
from kdjax.data.sources import Dataset
from kdjax.data.text import TextDataset
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN, Experiment
from kdjax.memory import bytes_text
from kdjax.model import Model, Variables
from kdjax.recipes import check_cache, check_identities, check_models, difficulty, program
from kdjax.recipes.check_identities import Check


def run(config: ConfigDict, *, json_output: bool = False, dataset: Dataset | TextDataset | None = None) -> list[Check]:
    """Checks a config, prints what was found, as a table or one JSON object, and returns it.

    Args:
      config: the experiment; see ``config.default``.
      json_output: print ``{"ok", "device", "jax", "checks": [{"name", "ok", "value", "meaning"}]}``.
      dataset: data in memory, instead of ``config.data.name``.

    Raises:
      UserError: the config cannot be built at all, or a check failed (after all are printed).
    """
    experiment = experiments.within(build.prepare(config, dataset), DISTILLED)
    found = [check_models.fits_together(experiment)]
    if experiment.signals:
        found.append(check_cache.is_whole(experiment.signals))
    if all(check.ok for check in found):
        found += _of_models(experiment) + _of_program(experiment)
    failed = [check.name for check in found if check.ok is False]
    if json_output:
        shown = {"ok": not failed, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print(json.dumps(shown | {"checks": [check._asdict() for check in found]}, indent=2))
    else:
        Console().print(_table(found))
    if failed:
        raise UserError(f"{len(failed)} of {len(found)} checks failed ({'; '.join(failed)}): see what they mean above.")
    return found


def _of_models(experiment: Experiment) -> list[Check]:
    mesh, rules = experiment.mesh, experiment.config.sharding.teacher
    loaded = {name: experiments.load_teacher(experiment, name) for name in experiment.teachers}
    given = train.put_teachers({name: one for name, one in loaded.items() if one is not None}, mesh, rules)
    asked = experiments.asked(experiment)
    fresh = _fresh({name: asked[name] for name in asked if experiment.signals or name not in given}, mesh, rules)
    teachers = {name: fresh.get(name) or given[name] for name in asked}
    experiment = difficulty.scored(experiment, teachers)
    arm = build.make_arm(experiment, DISTILLED, teachers)
    student = check_identities.start(arm, mesh)
    found = check_identities.of_terms(experiment, arm, student)
    if experiment.config.task == "language":
        found.append(check_models.starts_at_chance(experiment, student))
    found += [check_models.teacher_knows(experiment, name, given.get(name)) for name in experiment.teachers]
    if experiment.signals:
        found.append(check_cache.is_of_this_run(experiment, loaded[MAIN]))
        found.append(check_cache.agrees(experiment, given.get(MAIN)))
    return found


def _fresh(models: Mapping[str, Model], mesh: Mesh, rules: sharding.Rules) -> dict[str, Variables]:
    """Random weights of some teachers, born on their shardings."""

    def init() -> dict[str, Variables]:
        return {name: model.init(jax.random.key(number + 1)) for number, (name, model) in enumerate(models.items())}

    return jax.jit(init, out_shardings=sharding.by_rules(jax.eval_shape(init), mesh, rules))()


# ------------------------------------------------------------------------------------------------ the compiled program


def _of_program(experiment: Experiment) -> list[Check]:
    config, mesh = experiment.config, experiment.mesh
    size = config.data.batch_size
    arm = build.make_arm(experiment, DISTILLED)
    steps = [(program.compile_stage(experiment, arm, stage, size), stage) for stage in arm.stages]
    heaviest, stage = max(steps, key=lambda pair: pair[0].bytes)
    double = program.compile_stage(experiment, arm, stage, 2 * size)
    limit, where = memory.limit_of(jax.local_devices()[0])
    fits = heaviest.bytes <= limit
    per_example = max(double.bytes - heaviest.bytes, 1) / size
    unit = mesh.size * config.train.accumulate
    largest = max(int((limit - heaviest.bytes) / per_example + size) // unit * unit, 0)
    state, teachers = train.abstract_state(arm, mesh), program.abstract_teachers(experiment)
    sizes = {"teacher": teachers, "student": (state.params, state.model_state, state.ema), "optimiser": state.opt_state}
    weights = ", ".join(f"{name} {bytes_text(memory.per_device(tree))}" for name, tree in sizes.items())
    parts = f"arguments {bytes_text(heaviest.argument_bytes)}, temporaries {bytes_text(heaviest.temp_bytes)}"
    of = f"bytes per device, of {bytes_text(limit)} ({where}): {parts}"
    return [
        _teacher_unchanged(experiment, arm, steps, fits),
        Check("memory of a step fits", fits, heaviest.bytes, of),
        Check("largest batch", None, largest, "what would fit, by the memory of this batch and of twice as many"),
        Check("weights per device", None, weights, f"on a mesh of {mesh.size}"),
        _flops_per_step(experiment, steps),
    ]


def _teacher_unchanged(
    experiment: Experiment, arm: train.Arm, steps: list[tuple[program.Program, train.Stage]], fits: bool
) -> Check:
    title = "teacher unchanged by a step"
    if not fits:
        return Check(title, None, None, "not checked: the step does not fit")
    if experiment.signals:
        return Check(title, None, None, "not checked: teacher.cache stands for the teacher, which does not run")
    mesh = experiment.mesh
    teachers = _fresh(experiment.teachers, mesh, experiment.config.sharding.teacher)
    before = checkpoint.digest(teachers)
    state = train.fresh_state(arm, mesh)
    batch = sharding.put_batch(next(arm.batches(0)), mesh)
    for step, stage in steps:
        state, _ = step.compiled(state, teachers, batch, jax.device_put(stage.hparams, sharding.replicated(mesh)))
    jax.block_until_ready(state)
    after = checkpoint.digest(teachers)
    meaning = "fingerprint of the teachers' weights after a real step of each stage, bit for bit as before"
    return Check(title, before == after, after[:16], meaning)


def _flops_per_step(experiment: Experiment, steps: list[tuple[program.Program, train.Stage]]) -> Check:
    config = experiment.config
    flops = [step.flops for step, _ in steps]
    if config.train.accumulate > 1:
        whole = program.in_one_part(experiment)
        arm = build.make_arm(whole, DISTILLED)
        flops = [program.compile_stage(whole, arm, stage, arm.batch_size).flops for stage in arm.stages]
    meaning = f"compiled operations on all devices, {max(flops) / config.data.batch_size:.3g} per example"
    if config.task == "language":
        meaning += "; too few, since the compiler counts one layer and one chunk of tokens, however many there are"
    return Check("FLOPs of a step", None, max(flops), meaning)


# ------------------------------------------------------------------------------------------------------- what is shown


def _table(found: list[Check]) -> Table:
    table = Table("check", "", "value", "what it means")
    marks = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "-"}
    for check in found:
        table.add_row(check.name, marks[check.ok], _shown(check), check.meaning)
    return table


def _shown(check: Check) -> str:
    if isinstance(check.value, float):
        return f"{check.value:.3g}"
    if check.name.startswith("memory"):
        return bytes_text(int(check.value or 0))
    return "" if check.value is None else str(check.value)

"""``kdjax check``: does a config do what it should, and does it fit, before any device time is spent on it?

Everything runs on the config's own models, terms, mesh and data, a few dozen examples of it. Identities are measured
against a yardstick, so that their tolerances mean the same for every temperature and weight: "zero" is small next to
what the same term gives for another teacher.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from kdjax import build, checkpoint, metrics, objective, sharding, train
from kdjax import experiment as experiments
from kdjax.catalogue import TERMS
from kdjax.data import pipeline
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN, Experiment
from kdjax.model import Array, Model, Outputs, Params, Variables
from kdjax.objective import Batch, Hparams, Objective
from kdjax.recipes import difficulty, program
from kdjax.results import bytes_text
from kdjax.state import TrainState, trainable
from kdjax.step import HPARAMS, make_train_step
from kdjax.tasks import classification

EXAMPLES = 32  # in the batch of the identities
TEACHER_EXAMPLES = 512  # of the test set, to score a teacher on
# Relative to the yardstick. Rounding alone gives less than 1e-5 in float32; a wrong formula gives about 1. bfloat16
# keeps 8 bits, so two roundings of one logit may differ by 2^-8.
ZERO = {"float32": 1e-3, "bfloat16": 1e-2}
EQUAL = {"float32": 1e-3, "bfloat16": 3e-2}
FAR_ABOVE_CHANCE = 0.25  # of the way from guessing the commonest class to knowing all


class Check(NamedTuple):
    """What was checked, whether it holds (``None``: not checked), the measured value and what it means."""

    name: str
    ok: bool | None
    value: float | int | str | None
    meaning: str


def run(config: ConfigDict, *, json_output: bool = False, dataset: Dataset | None = None) -> list[Check]:
    """Checks a config, prints what was found, as a table or one JSON object, and returns it.

    Args:
      config: the experiment; see ``config.default``.
      json_output: print ``{"ok", "device", "jax", "checks": [{"name", "ok", "value", "meaning"}]}``.
      dataset: data in memory, instead of ``config.data.name``.

    Raises:
      UserError: the config cannot be built at all, or a check failed (after all are printed).
    """
    experiment = experiments.within(build.prepare(config, dataset), DISTILLED)
    found = [fits_together(experiment)]
    if found[0].ok:
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


# ---------------------------------------------------------------------------------------------- the models and terms


def fits_together(experiment: Experiment) -> Check:
    """Teachers, student and data agree on the shape of an image and the number of classes."""
    inputs = jax.ShapeDtypeStruct((2, *experiment.dataset.train.inputs.shape[1:]), jnp.float32)
    said = {}
    for name, model in {**experiment.teachers, "student": experiment.distilled}.items():
        variables = jax.eval_shape(model.init, jax.random.key(0))
        outputs = jax.eval_shape(lambda v, x, model=model: model.apply(v, x, train=False)[0], variables, inputs)
        said[name] = outputs.logits.shape
    ok = all(shape == (2, experiment.classes) for shape in said.values())
    scores = ", ".join(f"{name} {list(shape[1:])}" for name, shape in said.items())
    value = f"images {list(inputs.shape[1:])}, classes {experiment.classes}, scores of {scores}"
    return Check("classes and shapes agree", ok, value, "each model scores every class of the data, for each image")


def _of_models(experiment: Experiment) -> list[Check]:
    mesh, student = experiment.mesh, experiment.distilled
    loaded = {name: experiments.load_teacher(experiment, name) for name in experiment.teachers}
    teachers = {
        name: loaded[name] or jax.jit(model.init)(jax.random.key(number + 1))
        for number, (name, model) in enumerate(experiment.teachers.items())
    }
    placed = train.put_teachers(teachers, mesh, experiment.config.sharding.teacher)
    experiment = difficulty.scored(experiment, teachers)
    arm = build.make_arm(experiment, DISTILLED, placed)
    state = train.fresh_state(arm, mesh)
    other = train.fresh_state(
        arm._replace(keys=arm.keys._replace(student=jax.random.fold_in(arm.keys.student, 1))), mesh
    )
    batch = _small_batch(experiment, arm)
    equal = EQUAL[experiment.config.train.dtype]
    frozen = student._replace(
        apply=lambda variables, inputs, taps=(), **_: student.apply(variables, inputs, train=False, taps=taps)
    )

    found, seen = [], set()
    for number, stage in enumerate(arm.stages):
        hparams = _hparams_of(stage, arm, state, mesh)
        where = f" (stage {number + 1})" if len(arm.stages) > 1 else ""
        goal = stage.objective
        assert goal is not None, "make_arm gives every stage its objective"
        for name, options in goal.terms.items():
            term = TERMS[name]
            alone = dict(options) | {key: hparams[f"{name}.{key}"] for key in options if f"{name}.{key}" in hparams}
            alone["weight"] = 1.0
            if term.reads != "logits" or (name, str(alone)) in seen:
                continue
            seen.add((name, str(alone)))
            for dtype in ZERO:
                single = objective.make_objective({name: alone})
                check = zero_when_equal(single, frozen, _variables(state), _variables(other), batch, dtype)
                found.append(check._replace(name=f"{name}{where}: {check.name}"))
        # A term whose weight starts at 0 takes part with weight 1.
        weights = {key: hparams[key] or 1.0 for key in goal.hparams if key.endswith(".weight")}
        goal = goal._replace(hparams={key: hparams[key] for key in goal.hparams} | weights)
        relations = {f"{name}.weight": 0.0 for name in goal.terms if TERMS[name].over == "batch" or TERMS[name].random}
        by_parts = goal._replace(hparams=goal.hparams | relations)
        invariances = [(unmoved_by_padding, goal)]
        # A balance weighs the losses of whole batches, and refuses accumulation.
        if len(relations) < len(goal.terms) and experiment.config.balance == "fixed":
            invariances.insert(0, (unmoved_by_splitting, by_parts))
        for invariance, of in invariances:
            check = invariance(of, frozen, experiment.teachers, _variables(state), placed, batch, equal)
            found.append(check._replace(name=check.name + where))
    if state.model_state:
        note = "; in inference mode, since batch statistics do see the parts"
        found = [c._replace(meaning=c.meaning + note) if c.name.startswith("two parts") else c for c in found]
    return found + [teacher_knows(experiment, name, variables) for name, variables in loaded.items()]


def zero_when_equal(
    goal: Objective, student: Model, variables: Variables, others: Variables, batch: Batch, dtype: str = "float32"
) -> Check:
    """A student that equals its teacher has no loss and no gradient, under jit, with logits in ``dtype``.

    Args:
      goal: terms that compare with the teacher.
      student: a model that does the same in training and at inference.
      variables: its weights, which are the teacher's too.
      others: other weights of the same model: the teacher that gives the yardstick.
      batch: normalised ``inputs`` and ``labels``.
      dtype: what both models' logits are rounded to.
    """

    def apply(variables: Variables, inputs: Array, **options: Any) -> tuple[Outputs, Any]:
        outputs, state = student.apply(variables, inputs, **options)
        return outputs._replace(logits=outputs.logits.astype(dtype)), state

    rounded = student._replace(apply=apply)

    @jax.jit
    def measure(variables: Variables, teacher: Variables, hparams: Hparams) -> tuple[Array, Array]:
        loss, gradient = _loss_and_gradient(goal, rounded, {MAIN: rounded}, variables, {MAIN: teacher}, batch, hparams)
        return loss, optax.tree.norm(gradient)

    # The student's weights come in twice, so that the compiler cannot see that both are one.
    same, apart = (jax.device_get(measure(variables, teacher, goal.hparams)) for teacher in (variables, others))
    loss, gradient = (abs(float(a)) / max(abs(float(b)), 1e-30) for a, b in zip(same, apart, strict=True))
    value = max(loss, gradient)
    return Check(
        f"student = teacher gives 0 in {dtype}",
        value <= ZERO[dtype],
        value,
        f"loss and gradient of a student that is its teacher, over those for another teacher (at most {ZERO[dtype]:g})",
    )


def unmoved_by_splitting(
    goal: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
    equal: float = EQUAL["float32"],
) -> Check:
    """Two accumulated parts of a batch give the loss and the gradient of the whole, with labels hidden unevenly."""
    place = jnp.arange(len(batch["labels"]))
    hidden = (place % 2 == 0) & (place > 0)  # the first part keeps one label, the second all
    batch = {**batch, "labels": jnp.where(hidden, -1, batch["labels"])}

    @jax.jit
    def measure(variables, teacher_variables, batch, hparams):
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, batch, hparams, accumulate)
            for accumulate in (1, 2)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch, goal.hparams))
    meaning = f"change of loss and gradient when the batch is walked over in two parts, relative (at most {equal:g})"
    return Check("two parts give the loss of the whole", value <= equal, value, meaning)


def unmoved_by_padding(
    goal: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
    equal: float = EQUAL["float32"],
) -> Check:
    """Masked examples, whatever is in them, change neither the loss nor the gradient."""

    @jax.jit
    def measure(variables, teacher_variables, batch, hparams):
        rubbish = {**batch, "inputs": 3.0 - batch["inputs"], "labels": jnp.roll(batch["labels"], 1)}
        padded = {name: jnp.concatenate([batch[name], rubbish[name]]) for name in batch}
        padded["mask"] = jnp.concatenate([jnp.ones(len(batch["labels"])), jnp.zeros(len(batch["labels"]))])
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, each, hparams)
            for each in (batch, padded)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch, goal.hparams))
    meaning = f"change of loss and gradient when as many masked examples are added, relative (at most {equal:g})"
    return Check("padding changes nothing", value <= equal, value, meaning)


def teacher_knows(experiment: Experiment, name: str, variables: Variables | None) -> Check:
    """A teacher that was given is far above chance on some test images: it saw such images, prepared in this way."""
    title = f"{name} is far above chance"
    if variables is None:
        return Check(title, None, None, "not checked: the teacher is trained in this run")
    dataset, test = experiment.dataset, experiment.dataset.test
    labelled = np.flatnonzero(test.labels >= 0)
    if not len(labelled):
        return Check(title, None, None, "not checked: the test split has no labels")
    chosen = np.random.default_rng(0).permutation(labelled)[:TEACHER_EXAMPLES]
    some = Split(test.inputs[chosen], test.labels[chosen])
    batch_size = experiment.config.data.eval_batch_size
    logits = classification.make_score(experiment.teachers[name], dataset, experiment.mesh, batch_size)(variables, some)
    if not np.isfinite(logits).all():
        return Check(title, False, "not finite", f"{name}'s scores are NaN or Inf: its checkpoint is broken")
    accuracy = metrics.classification(logits, some.labels)["accuracy"]
    chance = float(np.bincount(some.labels).max() / len(some.labels))
    wanted = chance + FAR_ABOVE_CHANCE * (1.0 - chance)
    meaning = (
        f"accuracy on {len(chosen)} test examples, where guessing gives {chance:.3f} (at least {wanted:.3f}); "
        "if it fails, the teacher learnt other images, other classes or another preprocessing"
    )
    return Check(title, accuracy >= wanted, accuracy, meaning)


def _loss_and_gradient(
    goal: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
    hparams: Hparams,
    accumulate: int = 1,
) -> tuple[Array, Params]:
    """Of the very step that trains: its optimiser is one that keeps the gradient as its state and moves nothing."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    keep = optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))
    params, zero = variables["params"], jnp.zeros((), jnp.int32)
    learned = goal.init(jax.random.key(0))
    everything = trainable(params, learned["params"])
    key, decay = jax.random.key(0), 0.5 * goal.uses_ema
    average = jax.tree.map(lambda x: 0.9 * x, params) if goal.uses_ema else {}
    state = TrainState(zero, params, variables["state"], learned, keep.init(everything), key, key, average)
    step = make_train_step(student, teachers, goal, keep, accumulate=accumulate, ema_decay=decay)
    after, found = step(state, teacher_variables, batch, hparams)
    return found["loss"][0], after.opt_state


def _difference(one: tuple[Array, Params], other: tuple[Array, Params]) -> Array:
    """The larger of the relative differences of loss and gradient."""
    smallest = jnp.finfo(jnp.float32).tiny
    losses = jnp.abs(one[0] - other[0]) / jnp.maximum(jnp.abs(one[0]), smallest)
    apart = optax.tree.norm(optax.tree.sub(one[1], other[1])) / jnp.maximum(optax.tree.norm(one[1]), smallest)
    return jnp.maximum(losses, apart)


def _variables(state: TrainState) -> Variables:
    return {"params": state.params, "state": state.model_state}


def _small_batch(experiment: Experiment, arm: train.Arm) -> Batch:
    """Some examples, normalised and not augmented: as many as two parts on each device divide."""
    unit = 2 * experiment.mesh.size
    size = max(min(arm.batch_size, EXAMPLES) // unit, 1) * unit
    split = experiment.student_train
    ids = (np.arange(size) % len(split.labels)).astype(np.int32)
    raw = pipeline.gather(split, ids, np.zeros_like(ids))
    return jax.jit(classification.make_normalise(experiment.dataset))(sharding.put_batch(raw, experiment.mesh))


def _hparams_of(stage: train.Stage, arm: train.Arm, state: TrainState, mesh: Mesh) -> dict[str, float]:
    """The hyperparameters as used at a stage's first step; the compiler drops all else that the step would compute."""

    @jax.jit
    def values(state, teachers, batch, hparams):
        found = stage.step(state, teachers, batch, hparams)[1]
        return {name.removeprefix(HPARAMS): pair[0] for name, pair in found.items() if name.startswith(HPARAMS)}

    batch = sharding.put_batch(next(arm.batches(0)), mesh)
    at_start = state._replace(step=jnp.full_like(state.step, stage.start))
    return {key: float(value) for key, value in values(at_start, arm.teacher_variables, batch, stage.hparams).items()}


# ------------------------------------------------------------------------------------------------ the compiled program


def _of_program(experiment: Experiment) -> list[Check]:
    config, mesh = experiment.config, experiment.mesh
    size = config.data.batch_size
    arm = build.make_arm(experiment, DISTILLED)
    steps = [(program.compile_stage(experiment, arm, stage, size), stage) for stage in arm.stages]
    heaviest, stage = max(steps, key=lambda pair: pair[0].bytes)
    double = program.compile_stage(experiment, arm, stage, 2 * size)
    limit, where = program.memory_limit(jax.local_devices()[0])
    fits = heaviest.bytes <= limit
    per_example = max(double.bytes - heaviest.bytes, 1) / size
    unit = mesh.size * config.train.accumulate
    largest = max(int((limit - heaviest.bytes) / per_example + size) // unit * unit, 0)
    state, teachers = train.abstract_state(arm, mesh), program.abstract_teachers(experiment)
    sizes = {"teacher": teachers, "student": (state.params, state.model_state, state.ema), "optimiser": state.opt_state}
    weights = ", ".join(f"{name} {bytes_text(program.bytes_per_device(tree))}" for name, tree in sizes.items())
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
    mesh = experiment.mesh
    fresh = {name: jax.jit(model.init)(jax.random.key(0)) for name, model in experiment.teachers.items()}
    teachers = train.put_teachers(fresh, mesh, experiment.config.sharding.teacher)
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

"""``kdjax check``: does a config do what it should, and does it fit, before any device time is spent on it?

Everything runs on the config's own models, terms, mesh and data, a few dozen examples of it. Identities are measured
against a yardstick, so that their tolerances mean the same for every temperature and weight: "zero" is small next to
what the same term gives for another teacher.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from kdjax import checkpoint, experiment as experiments, metrics, objective, sharding, train
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError
from kdjax.experiment import MAIN, Experiment
from kdjax.model import Array, Model, Outputs, Params, Variables
from kdjax.objective import Batch, Hparams, Objective
from kdjax.state import TrainState
from kdjax.step import make_train_step
from kdjax.tasks import classification

DISTILLED = "student_distilled"
EXAMPLES = 32  # in the batch of the identities
TEACHER_EXAMPLES = 512  # of the test set, to score a teacher on
# Relative to the yardstick. Rounding alone gives less than 1e-5 in float32; a wrong formula gives about 1. bfloat16
# keeps 8 bits, so two roundings of one logit may differ by 2^-8.
ZERO = {"float32": 1e-3, "bfloat16": 1e-2}
EQUAL = 1e-3
FAR_ABOVE_CHANCE = 0.25  # of the way from guessing the commonest class to knowing all


class Check(NamedTuple):
    """What was checked, whether it holds (``None``: not checked), the measured value and what it means."""

    name: str
    ok: bool | None
    value: float | int | str | None
    meaning: str


class Program(NamedTuple):
    """A compiled step as its compiler describes it; bytes are those of one device."""

    compiled: Any  # jax.stages.Compiled; returns (state, metrics as one array)
    flops: float  # of one step over all devices, each body of a loop counted once
    argument_bytes: int
    output_bytes: int  # without what takes the place of an argument
    temp_bytes: int

    @property
    def bytes(self) -> int:
        """All that the step needs at once on one device."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def run(config: ConfigDict, *, json_output: bool = False, dataset: Dataset | None = None) -> list[Check]:
    """Checks a config, prints what was found, as a table or one JSON object, and returns it.

    Args:
      config: the experiment; see ``config.default``.
      json_output: print ``{"ok", "device", "jax", "checks": [{"name", "ok", "value", "meaning"}]}``.
      dataset: data in memory, instead of ``config.data.name``.

    Raises:
      UserError: the config cannot be built at all, or a check failed (after all are printed).
    """
    experiment = experiments.prepare(config, dataset)
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
    for name, model in {**experiment.teachers, "student": experiment.student}.items():
        variables = jax.eval_shape(model.init, jax.random.key(0))
        outputs = jax.eval_shape(lambda v, x, model=model: model.apply(v, x, train=False)[0], variables, inputs)
        said[name] = outputs.logits.shape
    ok = all(shape == (2, experiment.classes) for shape in said.values())
    scores = ", ".join(f"{name} {list(shape[1:])}" for name, shape in said.items())
    value = f"images {list(inputs.shape[1:])}, classes {experiment.classes}, scores of {scores}"
    return Check("classes and shapes agree", ok, value, "each model scores every class of the data, for each image")


def _of_models(experiment: Experiment) -> list[Check]:
    mesh, student = experiment.mesh, experiment.student
    loaded = {name: experiments.load_teacher(experiment, name) for name in experiment.teachers}
    teachers = {
        name: loaded[name] or jax.jit(model.init)(jax.random.key(number + 1))
        for number, (name, model) in enumerate(experiment.teachers.items())
    }
    arm = experiments.make_arm(experiment, DISTILLED, train.put_teachers(teachers, mesh, experiment.config.sharding.teacher))
    state = train.fresh_state(arm, mesh)
    other = train.fresh_state(arm._replace(key=jax.random.fold_in(arm.key, 1)), mesh)
    batch = _small_batch(experiment, arm)
    frozen = student._replace(apply=lambda variables, inputs, **_: student.apply(variables, inputs, train=False))

    found, seen = [], set()
    for number, stage in enumerate(arm.stages):
        hparams = _hparams_of(stage, state._replace(step=jnp.asarray(stage.start)), arm.teacher_variables, batch)
        where = f" (stage {number + 1})" if len(arm.stages) > 1 else ""
        terms = _terms(hparams)
        for name, options in terms.items():
            if objective.TERMS[name].on_labels or (name, str(options)) in seen:
                continue
            seen.add((name, str(options)))
            alone = {key: value for key, value in options.items() if key != "weight"}
            goal = objective.make_objective({name: alone})
            for dtype in ZERO:
                check = zero_when_equal(goal, frozen, _variables(state), _variables(other), batch, dtype)
                found.append(check._replace(name=f"{name}{where}: {check.name}"))
        weights = {name: experiments.member(experiment.config, name).weight for name in experiment.teachers}
        # A term whose weight starts at 0 takes part with weight 1.
        whole = {name: {**options, "weight": options["weight"] or 1.0} for name, options in terms.items()}
        goal = objective.make_objective(whole, weights, experiment.config.teacher.combine)
        for check in (unmoved_by_splitting, unmoved_by_padding):
            result = check(goal, frozen, experiment.teachers, _variables(state), arm.teacher_variables, batch)
            found.append(result._replace(name=result.name + where))
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
    def measure(variables: Variables, teacher: Variables) -> tuple[Array, Array]:
        loss, gradient = _loss_and_gradient(goal, rounded, {MAIN: rounded}, variables, {MAIN: teacher}, batch)
        return loss, optax.tree.norm(gradient)

    # The student's weights come in twice, so that the compiler cannot see that both are one.
    equal, apart = jax.device_get((measure(variables, variables), measure(variables, others)))
    loss, gradient = (abs(float(a)) / max(abs(float(b)), 1e-30) for a, b in zip(equal, apart, strict=True))
    value = max(loss, gradient)
    return Check(
        f"student = teacher gives 0 in {dtype}",
        value <= ZERO[dtype],
        value,
        f"loss and gradient of a student that is its teacher, over those with another teacher (at most {ZERO[dtype]:g})",
    )


def unmoved_by_splitting(
    goal: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
) -> Check:
    """Two accumulated parts of a batch give the loss and the gradient of the whole, with labels hidden unevenly."""
    hidden = jnp.arange(len(batch["labels"])) % 4 == 0  # all of them in the first part
    batch = {**batch, "labels": jnp.where(hidden, -1, batch["labels"])}

    @jax.jit
    def measure(variables, teacher_variables, batch):
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, batch, accumulate)
            for accumulate in (1, 2)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch))
    meaning = f"change of loss and gradient when the batch is walked over in two parts, relative (at most {EQUAL:g})"
    return Check("two parts give the loss of the whole", value <= EQUAL, value, meaning)


def unmoved_by_padding(
    goal: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
) -> Check:
    """Masked examples, whatever is in them, change neither the loss nor the gradient."""

    @jax.jit
    def measure(variables, teacher_variables, batch):
        rubbish = {**batch, "inputs": 3.0 - batch["inputs"], "labels": jnp.roll(batch["labels"], 1)}
        padded = {name: jnp.concatenate([batch[name], rubbish[name]]) for name in batch}
        padded["mask"] = jnp.concatenate([jnp.ones(len(batch["labels"])), jnp.zeros(len(batch["labels"]))])
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, each) for each in (batch, padded)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch))
    meaning = f"change of loss and gradient when as many masked examples are added, relative (at most {EQUAL:g})"
    return Check("padding changes nothing", value <= EQUAL, value, meaning)


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
    accumulate: int = 1,
) -> tuple[Array, Params]:
    """Of the very step that trains: its optimiser is one that keeps the gradient as its state and moves nothing."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    keep = optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))
    state = TrainState(
        jnp.zeros((), jnp.int32), variables["params"], variables["state"], keep.init(variables["params"]), jax.random.key(0), {}
    )
    step = make_train_step(student, teachers, goal, keep, accumulate=accumulate)
    after, found = step(state, teacher_variables, batch, goal.hparams)
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
    """The first examples of the run, normalised, without augmentation: a number that two parts of each device divide."""
    unit = 2 * experiment.mesh.size
    size = max(min(arm.batch_size, EXAMPLES) // unit, 1) * unit
    split = experiment.student_train
    ids = np.arange(size) % len(split.labels)
    raw = {"inputs": split.inputs[ids], "labels": split.labels[ids], "id": ids.astype(np.int32), "epoch": 0 * ids.astype(np.int32)}
    return jax.jit(classification.make_normalise(experiment.dataset))(sharding.put_batch(raw, experiment.mesh))


def _hparams_of(stage: train.Stage, state: TrainState, teachers: Mapping[str, Variables], batch: Batch) -> dict[str, float]:
    """The hyperparameters as used at a stage's first step; the compiler drops all else that the step would compute."""

    @jax.jit
    def values(state, teachers, batch, hparams):
        found = stage.step(state, teachers, batch, hparams)[1]
        return {name.removeprefix("hparams/"): pair[0] for name, pair in found.items() if name.startswith("hparams/")}

    return {name: float(value) for name, value in values(state, teachers, batch, stage.hparams).items()}


def _terms(hparams: Hparams) -> dict[str, dict[str, float]]:
    """``{"kl.weight": 0.9, ...}`` as ``{"kl": {"weight": 0.9, ...}}``, terms only."""
    terms: dict[str, dict[str, float]] = {}
    for key, value in hparams.items():
        name, _, option = key.partition(".")
        if name in objective.TERMS:
            terms.setdefault(name, {})[option] = value
    return terms

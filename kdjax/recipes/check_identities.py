"""Identities that a config's own objective must hold, whatever its models know: they are what ``kdjax check`` measures.

They are measured against a yardstick, so that their tolerances mean the same for every temperature and weight: "zero"
is small next to what the same term gives for another teacher. All of them take the loss and the gradient of the very
step that trains.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import build, objective, sharding, train
from kdjax import experiment as experiments
from kdjax.catalogue import TERMS
from kdjax.data import pipeline
from kdjax.experiment import DISTILLED, MAIN, Experiment
from kdjax.model import Array, Model, Outputs, Params, Variables
from kdjax.objective import Batch, Hparams, Objective
from kdjax.state import TrainState, trainable
from kdjax.step import HPARAMS, make_train_step
from kdjax.tasks import classification, language

EXAMPLES, TOKENS = 32, 256  # of the batch: at most so many, and of each sequence its beginning
CHUNKS = 4  # at least, of the walk that is compared with the dense loss
# Relative to the yardstick. Rounding alone gives less than 1e-5 in float32; a wrong formula gives about 1. bfloat16
# keeps 8 bits, so two roundings of one logit may differ by 2^-8.
ZERO = {"float32": 1e-3, "bfloat16": 1e-2}
EQUAL = {"float32": 1e-3, "bfloat16": 3e-2}


class Check(NamedTuple):
    """What was checked, whether it holds (``None``: not checked), the measured value and what it means."""

    name: str
    ok: bool | None
    value: float | int | str | None
    meaning: str


def of_terms(experiment: Experiment, arm: train.Arm, variables: Variables) -> list[Check]:
    """The identities of every stage's objective, for the distilled student with these weights and the arm's teachers;
    a batch of the training split's first examples."""
    mesh, student, config = experiment.mesh, experiment.distilled, experiment.config
    teachers, taught = experiments.asked(experiment), arm.teacher_variables
    others = start(arm._replace(keys=arm.keys._replace(student=jax.random.fold_in(arm.keys.student, 1))), mesh)
    batch = _small_batch(experiment, arm)
    setting = objective.Setting(classes=experiment.classes, **experiment.task.setting(config, mesh))
    equal = EQUAL[config.train.dtype]
    frozen = student._replace(
        apply=lambda variables, inputs, taps=(), **_: student.apply(variables, inputs, train=False, taps=taps)
    )

    found, seen = [], set()
    for number, stage in enumerate(arm.stages):
        hparams = _hparams_of(stage, arm, mesh)
        where = f" (stage {number + 1})" if len(arm.stages) > 1 else ""
        goal = stage.objective
        assert goal is not None, "make_arm gives every stage its objective"
        for name, options in goal.terms.items():
            term = TERMS[name]
            alone = dict(options) | {key: hparams[f"{name}.{key}"] for key in options if f"{name}.{key}" in hparams}
            alone["weight"] = 1.0
            if term.reads not in ("logits", "signal") or (name, str(alone)) in seen:
                continue
            seen.add((name, str(alone)))
            for dtype in ZERO:
                single = objective.make_objective({name: alone}, setting=setting)
                check = zero_when_equal(single, frozen, variables, others, batch, dtype)
                found.append(check._replace(name=f"{name}{where}: {check.name}"))
        # A term whose weight starts at 0 takes part with weight 1.
        weights = {key: hparams[key] or 1.0 for key in goal.hparams if key.endswith(".weight")}
        goal = goal._replace(hparams={key: hparams[key] for key in goal.hparams} | weights)
        given = (frozen, teachers, variables, taught, batch)
        relations = {f"{name}.weight": 0.0 for name in goal.terms if TERMS[name].over == "batch" or TERMS[name].random}
        unmoved = []
        # A balance weighs the losses of whole batches, and refuses accumulation.
        if len(relations) < len(goal.terms) and config.balance == "fixed":
            check = unmoved_by_splitting(goal._replace(hparams=goal.hparams | relations), *given, equal)
            note = "; in inference mode, since batch statistics do see the parts" if variables["state"] else ""
            unmoved.append(check._replace(meaning=check.meaning + note))
        unmoved.append(unmoved_by_padding(goal, *given, equal, padded=experiment.task.padded))
        if setting.sequences:
            dense, chunked = _dense_and_chunked(experiment, number, batch)
            unmoved.append(unmoved_by_chunks(dense._replace(hparams=goal.hparams), chunked, *given, equal))
        found += [check._replace(name=check.name + where) for check in unmoved]
    return found


def zero_when_equal(
    goal: Objective, student: Model, variables: Variables, others: Variables, batch: Batch, dtype: str = "float32"
) -> Check:
    """A student that equals its teacher has no loss and no gradient, under jit, with outputs in ``dtype``.

    Args:
      goal: terms that compare with the teacher.
      student: a model that does the same in training and at inference.
      variables: its weights, which are the teacher's too.
      others: other weights of the same model: the teacher that gives the yardstick.
      batch: normalised ``inputs`` and ``labels``.
      dtype: what both models' logits, or hidden states and heads, are rounded to.
    """

    def apply(variables: Variables, inputs: Any, **options: Any) -> tuple[Outputs, Any]:
        outputs, state = student.apply(variables, inputs, **options)
        if outputs.head is None:
            return outputs._replace(logits=outputs.logits.astype(dtype)), state
        head = dataclasses.replace(outputs.head, dtype=jnp.dtype(dtype))
        return outputs._replace(hidden=outputs.hidden.astype(dtype), head=head), state

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
    """Two accumulated parts of a batch give the loss and the gradient of the whole, with labels, and of sequences
    targets, hidden unevenly."""
    place = jnp.arange(len(batch["labels"]))
    hidden = (place % 2 == 0) & (place > 0)  # the first part keeps one label, the second all
    hidden = hidden.reshape(-1, *(1,) * (batch["labels"].ndim - 1))
    batch = {**batch, "labels": jnp.where(hidden, -1, batch["labels"])}
    if "mask" in batch:
        batch["mask"] = jnp.where(hidden, 0.0, batch["mask"])

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
    *,
    padded: Callable[[Batch], tuple[Batch, Batch]] = classification.padded,
) -> Check:
    """Padding changes neither the loss nor the gradient, whatever is in it: ``padded`` is that of a module of
    ``kdjax.tasks``, which gives two batches that differ in padding alone."""

    @jax.jit
    def measure(variables, teacher_variables, batch, hparams):
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, each, hparams)
            for each in padded(batch)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch, goal.hparams))
    meaning = f"change of loss and gradient when more and other padding is added, relative (at most {equal:g})"
    return Check("padding changes nothing", value <= equal, value, meaning)


def unmoved_by_chunks(
    dense: Objective,
    chunked: Objective,
    student: Model,
    teachers: Mapping[str, Model],
    variables: Variables,
    teacher_variables: Mapping[str, Variables],
    batch: Batch,
    equal: float = EQUAL["float32"],
) -> Check:
    """A loss whose logits are made chunk by chunk has the value and the gradient of the one that makes them at once."""

    @jax.jit
    def measure(variables, teacher_variables, batch, hparams):
        parts = [
            _loss_and_gradient(goal, student, teachers, variables, teacher_variables, batch, hparams)
            for goal in (dense, chunked)
        ]
        return _difference(*parts)

    value = float(measure(variables, teacher_variables, batch, dense.hparams))
    meaning = f"change of loss and gradient between one chunk of tokens and {CHUNKS}, relative (at most {equal:g})"
    return Check("chunks give the dense loss", value <= equal, value, meaning)


def start(arm: train.Arm, mesh: Mesh) -> Variables:
    """The random weights of an arm's model, on their shardings; what else belongs to its state takes no memory."""
    state = train.abstract_state(arm, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, _variables(state))
    return jax.jit(lambda keys: _variables(arm.create(keys)), out_shardings=shardings)(arm.keys)


# ------------------------------------------------------------------------------------------------ what is compared


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
    """Some examples, normalised and not augmented: as many as two parts on each device divide; of each sequence its
    beginning."""
    unit = 2 * sharding.batch_ways(experiment.mesh)
    size = max(min(arm.batch_size, EXAMPLES) // unit, 1) * unit
    split = experiment.student_train
    ids = (np.arange(size) % pipeline.length(split)).astype(np.int32)
    raw = pipeline.gather(split, ids, np.zeros_like(ids))
    if experiment.signals:
        raw = next(language.with_signals(iter([raw]), experiment.signals))
    normalise = experiment.task.make_normalise(experiment.dataset)

    @jax.jit
    def prepared(raw: Any) -> Any:
        batch = normalise(raw)
        if batch["labels"].ndim == 1:
            return batch
        return jax.tree.map(lambda x: x[:, :TOKENS] if x.ndim > 1 else x, batch)

    return prepared(sharding.put_batch(raw, experiment.mesh))


def _dense_and_chunked(experiment: Experiment, number: int, batch: Batch) -> list[Objective]:
    """The objective of a stage with all tokens of the batch in one chunk, and in several."""
    tokens = batch["labels"].size
    found = []
    for most in (tokens, max(tokens // sharding.batch_ways(experiment.mesh) // CHUNKS, 1)):
        config = ConfigDict(experiment.config.to_dict(), type_safe=False)
        config.train.tokens_per_chunk = most
        goal = build.make_arm(experiment._replace(config=config), DISTILLED).stages[number].objective
        assert goal is not None, "make_arm gives every stage its objective"
        found.append(goal)
    return found


def _hparams_of(stage: train.Stage, arm: train.Arm, mesh: Mesh) -> dict[str, float]:
    """The hyperparameters as used at a stage's first step; the compiler drops all else that the step would compute."""

    @jax.jit
    def values(keys, teachers, batch, hparams):
        state = arm.create(keys)
        state = state._replace(step=jnp.full_like(state.step, stage.start))
        found = stage.step(state, teachers, batch, hparams)[1]
        return {name.removeprefix(HPARAMS): pair[0] for name, pair in found.items() if name.startswith(HPARAMS)}

    batch = sharding.put_batch(next(arm.batches(0)), mesh)
    return {key: float(value) for key, value in values(arm.keys, arm.teacher_variables, batch, stage.hparams).items()}

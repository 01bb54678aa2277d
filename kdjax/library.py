"""The library call: your models, your data, a few lines."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from kdjax import objective as objectives
from kdjax import schedules, sharding, state, train
from kdjax.data import pipeline, sources
from kdjax.errors import UserError
from kdjax.model import Model, Variables, as_model, tap_shapes, update_nnx
from kdjax.objective import Batch
from kdjax.step import make_predict, make_train_step
from kdjax.taps import Network

DEFAULT_LOSSES = {"kl": {"weight": 0.9, "temperature": 4.0}, "ce": {"weight": 0.1}}


class Distilled(NamedTuple):
    """What :func:`distill` returns.

    Attributes:
      variables: the student's ``{"params": ..., "state": ...}``, plain nested dicts.
      predict: ``predict(inputs) -> logits`` [batch, classes] float32, compiled.
      steps: the number of updates done.
    """

    variables: Variables
    predict: Callable[[Any], jax.Array]
    steps: int


def distill(
    teacher: Any,
    student: Any,
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    losses: Mapping[str, Mapping[str, Any]] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    preprocess: Callable[[Batch, jax.Array], Batch] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Distilled:
    """Distils a teacher into a student.

    Args:
      teacher: a Flax NNX module with its weights, or ``(module, variables)`` for a Linen module or a ``kdjax.Model``;
        for Linen the variables may be those of ``module.init`` or ``{"params": ..., "state": ...}``.
      student: a Flax NNX module (its weights are updated in place too), a Linen module, or a ``kdjax.Model``.
      data: ``(inputs, labels)`` arrays; inputs alone, for soft terms only; or an iterable of batches, each ``(inputs,
        labels)`` or a dict with ``inputs`` and ``labels``. A label of -1 means unlabelled.
      epochs: how often to walk over the arrays; for an iterable leave it out, it is walked over once.
      steps: the number of updates, instead of epochs.
      batch_size: examples per update, over all devices; an iterable brings its own.
      losses: the terms, as in a config: ``{"kl": {"weight": 0.9, "temperature": 4.0}, "ce": {"weight": 0.1}}`` by
        default. With no labels at all, leave out ``ce``.
      optimizer: any optax transformation; ``optax.adamw(1e-3)`` by default.
      preprocess: ``preprocess(batch, key) -> batch`` on the device, such as augmentation; the teacher sees the same
        view.
      seed: of the student's initial weights (where the module has none), the data order and dropout.
      mesh: the devices; all by default, the batch split over them.

    Returns:
      The trained student.

    Raises:
      UserError: shapes or classes that do not fit, labels out of range, a NaN.
    """
    mesh = mesh or sharding.make_mesh({"data": -1})
    split = _as_split(data)
    if split is not None:
        batches, total = _array_batches(split, epochs, steps, batch_size, seed)
    else:
        batches, total = _iterable_batches(data, epochs, steps)
    first = next(batches)
    batch_size = len(first["labels"])
    sharding.check_batch(batch_size, mesh, what="batch_size")
    example = jax.ShapeDtypeStruct(first["inputs"].shape, first["inputs"].dtype)
    teacher_model, teacher_variables = _with_variables(teacher, example)
    model = as_model(student, example)
    classes = _common_classes(teacher_model, teacher_variables, model, example)
    sources.check_split(split or sources.Split(first["inputs"], first["labels"]), classes, "data")
    setting = objectives.Setting(
        student=Network(tap_shapes(model, example)),
        teacher=Network(tap_shapes(teacher_model, example)),
        classes=classes,
        examples=len(split.labels) if split is not None else total * batch_size,
        epoch_steps=max(round(total / (epochs or 1)), 1),
    )
    objective = objectives.make_objective(losses or DEFAULT_LOSSES, setting=setting)
    optimizer = optimizer or optax.adamw(1e-3)
    per_epoch = total / (epochs or 1)
    terms = {
        name: schedules.make(spec, total_steps=total, steps_per_epoch=per_epoch, name=name)
        for name, spec in objective.hparams.items()
    }
    step = make_train_step(
        model,
        {"teacher": teacher_model},
        objective,
        optimizer,
        preprocess=preprocess,
        hparams_at=partial(schedules.at, terms),
    )
    arm = train.Arm(
        name="student",
        create=lambda keys: state.create_state(model, optimizer, keys.student, init_objective=objective.init),
        keys=train.Keys(jax.random.key(seed), jax.random.key(seed)),
        stages=[train.Stage(0, total, step, schedules.values(terms))],
        batches=lambda _: itertools.chain([first], batches),
        batch_size=batch_size,
        teacher_variables={"teacher": teacher_variables} if objective.uses_teacher else {},
    )
    done = train.run(arm, mesh)
    variables = state.inference_variables(done.state)
    if isinstance(student, nnx.Module):
        update_nnx(student, variables)
    predict = jax.jit(make_predict(model))
    return Distilled(variables, lambda inputs: predict(variables, {"inputs": inputs}), total)


def _as_split(data: Any) -> sources.Split | None:
    """Arrays as a split; ``None`` for an iterable of batches."""
    if hasattr(data, "shape"):
        return sources.as_split(data)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        return sources.as_split(*data)
    return None


def _array_batches(split, epochs, steps, batch_size, seed) -> tuple[Iterator[pipeline.Batch], int]:
    if (epochs is None) == (steps is None):
        raise UserError("say how long to train, either with epochs=... or with steps=....")
    total = steps or max(round((epochs or 0) * len(split.labels) / batch_size), 1)
    return pipeline.train_batches(split, batch_size=batch_size, seed=seed), total


def _iterable_batches(data, epochs, steps) -> tuple[Iterator[pipeline.Batch], int]:
    if not isinstance(data, Iterable):
        kind = type(data).__name__
        raise UserError(f"data is a {kind}: give (inputs, labels), inputs alone, or an iterable of batches.")
    if epochs is not None and steps is not None:
        raise UserError("epochs and steps are both given: choose one.")
    length = len(data) if isinstance(data, Sized) else None
    if steps is None and length is None:
        raise UserError("the iterable of batches has no length: say how many to take with steps=....")
    total = steps or (epochs or 1) * (length or 1)
    return pipeline.from_iterable(data, repeat=length is not None), total


def _with_variables(teacher: Any, example: jax.ShapeDtypeStruct) -> tuple[Model, Variables]:
    if isinstance(teacher, nnx.Module):
        model = as_model(teacher, example)
        return model, model.init(jax.random.key(0))
    if not (isinstance(teacher, tuple) and len(teacher) == 2 and not isinstance(teacher, Model)):
        raise UserError("the teacher has no weights: pass an NNX module, or (module, variables).")
    module, variables = teacher
    variables = dict(variables)
    if "state" not in variables:
        variables = {"params": variables.pop("params"), "state": variables}
    return as_model(module, example), variables


def _common_classes(teacher: Model, teacher_variables: Variables, student: Model, example: Any) -> int:
    logits = lambda model: lambda variables, x: model.apply(variables, x, train=False)[0].logits
    taught = jax.eval_shape(logits(teacher), teacher_variables, example).shape
    learned = jax.eval_shape(logits(student), jax.eval_shape(student.init, jax.random.key(0)), example).shape
    if taught != learned:
        raise UserError(
            f"teacher logits are {taught} and student logits {learned}: both must score the same classes, in order."
        )
    return learned[-1]

"""Image classification: how a batch becomes what a model takes, and how a model is scored on a whole split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import metrics, models, sharding
from kdjax.data import augment, pipeline, sources
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError
from kdjax.model import Array, Model, Variables, from_nnx
from kdjax.objective import Batch
from kdjax.step import make_predict


def load(config: ConfigDict, dataset: Dataset | None = None) -> Dataset:
    """The data set of a config, or the one that is given, checked."""
    if config.student.init:
        raise UserError(
            "student.init is for language models: leave it empty (a classifier begins with random weights)."
        )
    dataset = dataset or sources.load(config.data)
    sources.validate(dataset)
    if config.teacher.combine == "routed":
        sources.check_routes(dataset, ["teacher", *config.more_teachers])
    return dataset


def teacher_view(dataset: Dataset, config: ConfigDict) -> Dataset:
    """The data as the teacher sees it: some labels hidden."""
    return _relabelled(dataset, config.teacher.labels, config.seed)


def student_view(dataset: Dataset, config: ConfigDict) -> Split:
    """The training split as the student sees it: some labels hidden, a class left out."""
    split = _relabelled(dataset, config.data.labels, config.seed).train
    omitted = config.data.omit_class
    if omitted == -1:
        return split
    if not 0 <= omitted < len(dataset.class_names):
        raise UserError(
            f"data.omit_class={omitted} is not a class: there are {len(dataset.class_names)}, counted from 0."
        )
    kept = np.flatnonzero(dataset.train.labels != omitted)
    return sources.take(split, kept)


def _relabelled(dataset: Dataset, share: float, seed: int) -> Dataset:
    if not 0.0 <= share <= 1.0:
        raise UserError(f"a share of labels is between 0 and 1, not {share}.")
    labels = dataset.train.labels if share == 1.0 else sources.hide_labels(dataset.train.labels, share, seed)
    return dataset._replace(train=dataset.train._replace(labels=labels))


def classes(config: ConfigDict, dataset: Dataset) -> int:
    """The number of classes."""
    return len(dataset.class_names)


def make_model(config: ConfigDict, part: ConfigDict, dataset: Dataset, count: int) -> Model:
    """The bundled model that a part of the config names, for the images of the data set and so many classes."""
    return from_nnx(make_factory(config, part, dataset, count))


def make_factory(
    config: ConfigDict, part: ConfigDict, dataset: Dataset, count: int
) -> Callable[[nnx.Rngs], nnx.Module]:
    """What makes the module of ``make_model``."""
    shape, options = tuple(dataset.train.inputs.shape[1:]), part.options.to_dict()
    dtype = jnp.dtype(config.train.dtype)
    return lambda rngs: models.build(part.name, classes=count, input_shape=shape, rngs=rngs, dtype=dtype, **options)


def heads(config: ConfigDict, part: ConfigDict, dataset: Dataset) -> int:
    """How many attention heads the model of a part of the config has; 0 where it has no attention."""
    return models.heads(part.name, part.options)


def inputs(dataset: Dataset, batch_size: int) -> Any:
    """The shape and dtype of a batch of what a model takes."""
    return jax.ShapeDtypeStruct((batch_size, *dataset.train.inputs.shape[1:]), jnp.float32)


def setting(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What the objective must know besides (``objective.Setting``)."""
    return {}


def has_labels(split: Split) -> bool:
    """Whether any example has a label."""
    return bool((split.labels >= 0).any())


def make_preprocess(dataset: Dataset, config_augment: Mapping[str, Any]) -> Callable[[Batch, Array], Batch]:
    """``preprocess(batch, key) -> batch`` for training: normalised, then augmented on the device."""
    transform = augment.make(config_augment, dataset.train.inputs.shape[1:], dataset.mean, dataset.std)
    normalise = make_normalise(dataset)
    return lambda batch, key: transform(normalise(batch), key)


def make_normalise(dataset: Dataset) -> Callable[[Batch], dict[str, Array]]:
    """``normalise(batch) -> batch``: float32 inputs, by the training split's mean and deviation of each channel."""
    return lambda batch: {**batch, "inputs": augment.normalise(batch["inputs"], dataset.mean, dataset.std)}


def padded(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches that differ in padding alone: a normalised one, and the same with as many masked examples of other
    content."""
    size = len(batch["labels"])
    other = {**batch, "inputs": 3.0 - batch["inputs"], "labels": jnp.roll(batch["labels"], 1)}
    both = {name: jnp.concatenate([batch[name], other[name]]) for name in batch}
    return batch, {**both, "mask": (jnp.arange(2 * size) < size).astype(jnp.float32)}


def make_score(model: Model, dataset: Dataset, mesh: Mesh, batch_size: int) -> Callable[[Variables, Split], np.ndarray]:
    """``score(variables, split) -> logits`` [examples, classes] float32 on the host, in the split's order.

    The last partial batch is padded, and the padding is cut off again: no example is dropped.
    """
    predict = make_predict(model, make_normalise(dataset))
    # Replicated, so that every process holds the whole batch's scores.
    jitted = jax.jit(
        lambda variables, batch: (predict(variables, batch), batch["id"], batch["mask"]),
        out_shardings=sharding.replicated(mesh),
    )

    def score(variables: Variables, split: Split) -> np.ndarray:
        logits: np.ndarray | None = None
        batches = pipeline.eval_batches(
            split, batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        )
        for batch in batches:
            part, ids, mask = jax.device_get(jitted(variables, sharding.put_batch(batch, mesh)))
            if logits is None:
                logits = np.zeros((len(split.labels), part.shape[-1]), np.float32)
            logits[ids[mask > 0]] = part[mask > 0]
        assert logits is not None, "a split is never empty: sources.validate saw to it"
        return logits

    return score


def make_accuracy(model: Model, dataset: Dataset, mesh: Mesh, batch_size: int) -> Callable[[Variables], float]:
    """Makes ``accuracy(variables)`` on the test split."""
    score, test = make_score(model, dataset, mesh, batch_size), dataset.test
    return lambda variables: metrics.classification(score(variables, test), test.labels)["accuracy"]

"""Image classification: how a batch becomes what a model takes, and how a model is scored on a whole split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax import sharding
from kdjax.data import augment, pipeline
from kdjax.data.sources import Dataset, Split
from kdjax.model import Array, Model, Variables
from kdjax.objective import Batch
from kdjax.step import make_predict


def make_preprocess(dataset: Dataset, config_augment: Mapping[str, Any]) -> Callable[[Batch, Array], Batch]:
    """``preprocess(batch, key) -> batch`` for training: normalised, then augmented on the device."""
    transform = augment.make(config_augment, dataset.train.inputs.shape[1:], dataset.mean, dataset.std)
    normalise = make_normalise(dataset)
    return lambda batch, key: transform(normalise(batch), key)


def make_normalise(dataset: Dataset) -> Callable[[Batch], dict[str, Array]]:
    """``normalise(batch) -> batch``: float32 inputs, by the training split's mean and deviation of each channel."""
    return lambda batch: {**batch, "inputs": augment.normalise(batch["inputs"], dataset.mean, dataset.std)}


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

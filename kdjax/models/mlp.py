"""A multilayer perceptron on flattened images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.models.layers import classifier, dropout_layer

Array = jax.Array


class MLP(nnx.Module):
    """Dense layers with ReLU and dropout; ``blocks.i`` is the i-th hidden dense layer, before its ReLU."""

    def __init__(
        self,
        *,
        classes: int,
        input_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
    ):
        height, width, channels = input_shape
        sizes = (height * width * channels, *hidden)
        self.dropout = dropout_layer(dropout, rngs)
        self.blocks = nnx.List(
            nnx.Linear(a, b, kernel_init=nnx.initializers.he_normal(), dtype=dtype, rngs=rngs)
            for a, b in pairwise(sizes)
        )
        self.head = classifier(sizes[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] to float32 logits [b, classes]."""
        x = x.reshape(x.shape[0], -1)
        for block in self.blocks:
            x = nnx.relu(block(x))
            x = self.dropout(x) if self.dropout else x
        return self.head(x)

"""A small convolutional network, cheap enough to train on a CPU."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import UserError, unknown
from kdjax.models.layers import BatchNorm, check_image, classifier, conv, dropout_layer

Array = jax.Array
POOLS = ("stride", "max", "mean")


class ConvBlock(nnx.Module):
    """Convolution 3 x 3, normalisation, ReLU; the image shrinks by the convolution's stride or by a pooling window."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, pool: str, norm: bool, dtype: Any, rngs: nnx.Rngs):
        self.pool = {"max": nnx.max_pool, "mean": nnx.avg_pool}.get(pool) if stride > 1 else None
        self.window = (stride, stride)
        self.conv = conv(inputs, outputs, stride=1 if self.pool else stride, bias=not norm, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, rngs=rngs) if norm else None

    def __call__(self, x: Array) -> Array:
        """[b, h, w, inputs] to [b, h / stride, w / stride, outputs]."""
        x = self.conv(x)
        x = nnx.relu(self.norm(x) if self.norm else x)
        return self.pool(x, window_shape=self.window, strides=self.window) if self.pool else x


class CNN(nnx.Module):
    """Convolution blocks, then either the mean over the image or one hidden dense layer, then the classifier.

    Options: ``widths`` and ``strides``, one per block; ``pool``, how a block with a stride shrinks the image ("stride",
    "max" or "mean"); ``norm``, batch normalisation; ``dense``, units of the hidden layer on the flattened image (0:
    the mean over the image instead); ``dropout`` before the classifier.
    """

    def __init__(
        self,
        *,
        classes: int,
        input_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        widths: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (1, 2, 2),
        pool: str = "stride",
        norm: bool = True,
        dense: int = 0,
        dropout: float = 0.0,
    ):
        if len(widths) != len(strides):
            raise UserError(
                f"cnn has {len(widths)} widths and {len(strides)} strides: give one of each for every block."
            )
        if pool not in POOLS:
            raise unknown("pool of cnn", pool, POOLS)
        height, width, channels = input_shape
        check_image("cnn", input_shape, math.prod(strides))
        self.dropout = dropout_layer(dropout, rngs)
        self.blocks: nnx.List[ConvBlock] = nnx.List()
        for outputs, stride in zip(widths, strides, strict=True):
            self.blocks.append(
                ConvBlock(channels, outputs, stride=stride, pool=pool, norm=norm, dtype=dtype, rngs=rngs)
            )
            channels = outputs
            # a stride rounds up (padded convolution), a pooling window down (no padding)
            height, width = (-(-n // stride) if pool == "stride" else n // stride for n in (height, width))
        features = height * width * channels if dense else channels
        self.dense = nnx.Linear(features, dense, dtype=dtype, rngs=rngs) if dense else None
        self.head = classifier(dense or channels, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] to float32 logits [b, classes]."""
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1))) if self.dense else x.mean(axis=(1, 2))
        x = self.dropout(x) if self.dropout else x
        return self.head(x)

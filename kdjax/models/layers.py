"""Building blocks shared by the bundled models.

Shapes: b batch, h w image, c channels, t tokens, n heads, d width of one head. Parameters are float32; a layer computes
in its ``dtype`` and normalises in float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import UserError

Array = jax.Array

kaiming = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, equation 14
narrow = nnx.initializers.truncated_normal(0.02)  # ViT: every dense layer and embedding


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, in float32 whatever the input's dtype, which the output keeps.

    Decay 0.9 and epsilon 1e-5 are those of PyTorch. The running variance is the biased one, as everywhere in JAX.
    """

    def __init__(self, features: int, *, scale_init: Any = nnx.initializers.ones, rngs: nnx.Rngs):
        super().__init__(features, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, scale_init=scale_init, rngs=rngs)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Normalise [..., c] by the batch's moments when training, else by the running ones."""
        return super().__call__(x, *args, **kwargs).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32 whatever the input's dtype, which the output keeps."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        """Normalise [..., features] to mean 0 and variance 1 over the last axis, then scale and shift."""
        shape = (1,) * (x.ndim - 1) + (-1,)
        return _layer_norm(x, self.scale[...].reshape(shape), self.bias[...].reshape(shape))


@partial(jax.checkpoint, prevent_cse=False)  # else XLA keeps 1 / deviation for the gradient, broadcast to all of x
def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)  # first, because E[x^2] - E[x]^2 cancels where the mean is large
    rate = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6)
    return (y * rate * scale + bias).astype(x.dtype)


def conv(
    inputs: int, outputs: int, *, size: int = 3, stride: int = 1, bias: bool = False, dtype: Any, rngs: nnx.Rngs
) -> nnx.Conv:
    """A square convolution padded by (size - 1) / 2 on every side: PyTorch's geometry, also at stride 2."""
    pad = (size - 1) // 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        kernel_init=kaiming,
        dtype=dtype,
        rngs=rngs,
    )


def dense(inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer of a transformer, on [..., inputs]."""
    return nnx.Linear(inputs, outputs, kernel_init=narrow, dtype=dtype, dot_general=_flat_dot, rngs=rngs)


def _flat_dot(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """x @ kernel as a product of two matrices, because XLA's CPU gradient of a batched one is a third slower."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def classifier(features: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """The last dense layer; float32 in every precision, because the losses read small differences of logits."""
    return nnx.Linear(features, classes, dtype=jnp.float32, rngs=rngs)


def dropout_layer(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """A dropout layer, or None at rate 0 so that a model without dropout holds no random state."""
    if not 0 <= rate < 1:
        raise UserError(f"dropout is {rate}: it must be at least 0 and less than 1.")
    return nnx.Dropout(rate, rngs=rngs) if rate else None


@partial(jax.checkpoint, prevent_cse=False)  # the gradient needs x alone
def gelu(x: Array) -> Array:
    """The exact GELU, x Phi(x) (Hendrycks & Gimpel 2016), by erf: ``jax.nn.gelu`` takes erfc, twice as slow on CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def attention(qkv: Array, heads: int) -> Array:
    """Softmax self-attention [b, t, n d] of projections [b, t, (q, k, v) n d]; the softmax is in float32.

    Heads are moved before tokens once, for all three: with heads last XLA copies every operand of every product.
    """
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum("bnqd,bnkd->bnqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v).transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


def check_image(model: str, input_shape: Sequence[int], stride: int) -> None:
    """Raise UserError when the image [h, w, c] is smaller than the model's total stride."""
    if min(input_shape[:2]) < stride:
        height, width = input_shape[:2]
        raise UserError(
            f"{model} reduces an image {stride} times, so it cannot take one of {height} x {width} pixels: "
            f"give images of at least {stride} x {stride} or a model with fewer strides."
        )

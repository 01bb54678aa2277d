"""The layers that are written for speed, against the plain form: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax.models import layers


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def plain_dense(x):
    kernel = normal(12, 5)
    return jnp.einsum("btd,dn->btn", x, kernel)


def flat_dense(x):
    layer = layers.dense(12, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.kernel[...] = normal(12, 5)
    return layer(x)


def plain_attention(x):
    q, k, v = jnp.split(x.reshape(*x.shape[:2], 3 * 2, -1), 3, axis=2)
    return jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (layers.gelu, lambda x: jax.nn.gelu(x, approximate=False)),
        (lambda x: layers.LayerNorm(12)(x), lambda x: nnx.LayerNorm(12, rngs=nnx.Rngs(0))(x)),
        (lambda x: layers.attention(x, heads=2), plain_attention),
        (flat_dense, plain_dense),
    ],
    ids=["gelu", "layer norm", "attention", "dense"],
)
def test_fast_layers_have_the_plain_value_and_gradient(fast, plain):
    x = 2 * normal(3, 7, 12)
    weigh = jnp.cos(jnp.arange(plain(x).size, dtype=jnp.float32)).reshape(plain(x).shape)
    np.testing.assert_allclose(jax.jit(fast)(x), plain(x), atol=5e-6)
    gradient = jax.jit(jax.grad(lambda x: (fast(x) * weigh).sum()))(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: (plain(x) * weigh).sum())(x), atol=1e-5)


def test_layer_norm_survives_a_large_mean():
    x = normal(4, 64)
    np.testing.assert_allclose(layers.LayerNorm(64)(x + 1000), layers.LayerNorm(64)(x), atol=1e-3)


@pytest.mark.parametrize("layer", [layers.LayerNorm(8), layers.BatchNorm(8, rngs=nnx.Rngs(0)), layers.gelu])
def test_bfloat16_stays_bfloat16(layer):
    assert layer(normal(4, 8).astype(jnp.bfloat16)).dtype == jnp.bfloat16

"""Projectors against float64 NumPy; pooling and resizing against PyTorch's values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import projectors

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "feature.npz")


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_biases(params, seed):
    """The same parameters with biases that are not 0, so that a forgotten one shows."""
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [leaf + 0.1 * some(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def dense64(params, x):
    return np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"])


def conv64(params, x):
    x, kernel = np.asarray(x, np.float64), np.asarray(params["kernel"], np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + np.asarray(params["bias"])
    for dy in range(3):
        for dx in range(3):
            out += padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]] @ kernel[dy, dx]
    return out


WANT = {
    "linear": dense64,
    "conv3": conv64,
    "mlp": lambda params, x: dense64(params["out"], np.maximum(dense64(params["in"], x), 0)),
}


@pytest.mark.parametrize("kind", WANT)
@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (2, 7, 3), (2, 3)])
def test_projectors_are_their_formulas(kind, shape):
    if kind == "conv3" and len(shape) != 4:
        return
    params = with_biases(projectors.init(jax.random.key(0), kind, 3, 6), 1)
    x = some(2, *shape)
    got = jax.jit(projectors.apply, static_argnums=1)(params, kind, x)
    assert got.shape == (*shape[:-1], 6) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, WANT[kind](params, x), rtol=1e-5, atol=1e-6)


def test_linear_by_hand():
    params = {"kernel": jnp.array([[1.0], [10.0]]), "bias": jnp.array([0.5])}
    np.testing.assert_array_equal(projectors.apply(params, "linear", jnp.array([[2.0, 3.0]])), [[32.5]])


def test_none_is_the_identity_in_float32():
    assert projectors.init(jax.random.key(0), "none", 3, 3) == {}
    x = jnp.asarray(some(3, 2, 3), jnp.bfloat16)
    got = projectors.apply({}, "none", x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, x.astype(jnp.float32))


def test_initial_scale_keeps_the_variance():
    """LeCun: outputs as large as inputs; He before a ReLU: the mean square survives it."""
    x = jnp.asarray(some(4, 500, 64))
    spread = lambda kind: jnp.std(projectors.apply(projectors.init(jax.random.key(1), kind, 64, 128), kind, x))
    assert 0.9 < spread("linear") < 1.1 and 0.8 < spread("mlp") < 1.2
    images = jnp.asarray(some(5, 4, 8, 8, 64))
    conv = projectors.apply(projectors.init(jax.random.key(1), "conv3", 64, 128), "conv3", images)
    assert 0.9 < jnp.std(conv[:, 1:-1, 1:-1]) < 1.1


def test_hidden_width_and_dtypes():
    params = projectors.init(jax.random.key(0), "mlp", 3, 6, hidden=11)
    assert params["in"]["kernel"].shape == (3, 11) and params["out"]["kernel"].shape == (11, 6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_projectors_map_over_a_population():
    keys = jax.random.split(jax.random.key(2), 3)
    x = some(6, 2, 4, 4, 3)
    for kind in ("linear", "conv3", "mlp"):
        params = jax.vmap(lambda key, kind=kind: projectors.init(key, kind, 3, 5))(keys)
        got = jax.vmap(lambda p, kind=kind: projectors.apply(p, kind, x))(params)
        for i in range(3):
            one = projectors.apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), kind, x)
            np.testing.assert_allclose(got[i], one, rtol=1e-5, atol=1e-6)


def test_pooling_and_resizing_are_pytorchs():
    x = GOLDEN["student"]
    np.testing.assert_allclose(projectors.average_pool(x, 5, 5), GOLDEN["pool_5x5"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(projectors.average_pool(x, 4, 3), GOLDEN["pool_4x3"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(projectors.nearest(x, 9, 4), GOLDEN["nearest_9x4"])


def test_average_pool_by_hand():
    """Three inputs to two outputs: the bins share the middle one."""
    x = jnp.array([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(projectors.average_pool(x, 2, 1)[0, :, 0, 0], [1.5, 4.0])


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 6), (4, 3)), ((3, 8), (7, 5)), ((4, 4), (4, 4)), ((8, 8), (1, 1))]
)
def test_the_larger_side_is_pooled(student, teacher):
    s, t = some(7, 2, *student, 3), some(8, 2, *teacher, 5)
    got = jax.jit(projectors.match_size)(s, t)
    height, width = min(student[0], teacher[0]), min(student[1], teacher[1])
    for x, matched in zip((s, t), got, strict=True):
        assert matched.shape == (2, height, width, x.shape[-1])
        for i in range(height):
            for j in range(width):
                rows = slice(i * x.shape[1] // height, -(-(i + 1) * x.shape[1] // height))
                columns = slice(j * x.shape[2] // width, -(-(j + 1) * x.shape[2] // width))
                want = x[:, rows, columns].astype(np.float64).mean((1, 2))
                np.testing.assert_allclose(matched[:, i, j], want, rtol=1e-5, atol=1e-6)


def test_equal_sizes_pass_unchanged_in_float32():
    for shape in ((2, 4, 4, 3), (2, 5, 3), (2, 3)):
        x = jnp.asarray(some(9, *shape), jnp.bfloat16)
        for got in projectors.match_size(x, x):
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, x.astype(jnp.float32))


def test_pool_is_the_mean_over_positions():
    for shape in ((2, 4, 5, 3), (2, 5, 3), (2, 3)):
        x = some(10, *shape)
        want = x.astype(np.float64).mean(tuple(range(1, x.ndim - 1)))
        np.testing.assert_allclose(projectors.pool(x), want, rtol=1e-5, atol=1e-6)


def test_bad_input_is_one_sentence():
    key = jax.random.key(0)
    with pytest.raises(UserError, match="projector='linear' maps 32 channels to 64"):
        projectors.init(key, "none", 32, 64)
    with pytest.raises(UserError, match="did you mean 'linear'"):
        projectors.init(key, "liner", 3, 4)
    with pytest.raises(UserError, match="unknown projector"):
        projectors.apply({}, "conv5", jnp.zeros((2, 3)))
    with pytest.raises(UserError, match="needs images"):
        projectors.apply(projectors.init(key, "conv3", 3, 4), "conv3", jnp.zeros((2, 5, 3)))
    with pytest.raises(UserError, match="made for 3 channels"):
        projectors.apply(projectors.init(key, "linear", 3, 4), "linear", jnp.zeros((2, 5)))
    match = lambda *shapes: projectors.match_size(*(jnp.zeros(shape) for shape in shapes))
    with pytest.raises(UserError, match="number of tokens"):
        match((2, 5, 3), (2, 6, 3))
    with pytest.raises(UserError, match="layers of the same kind"):
        match((2, 4, 4, 3), (2, 16, 3))
    with pytest.raises(UserError, match="the same batch"):
        match((2, 3), (3, 3))
    with pytest.raises(UserError, match="no channels"):
        projectors.pool(jnp.zeros(3))

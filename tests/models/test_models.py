"""The bundled models: published sizes, shapes, modes, precisions, taps' paths and bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax.errors import UserError
from kdjax.models import MODELS, build

# Parameters as published: torchvision (resnet18/34/50), timm (vit_*_patch16_224); the CIFAR networks' are those of
# RepDistiller's own modules for 100 classes.
PUBLISHED = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vit_ti": 5_717_416,
    "vit_s": 22_050_664,
    "vit_b": 86_567_656,
}
SMALL = {
    "mlp": {"hidden": (8,)},
    "cnn": {"widths": (4, 8), "strides": (1, 2)},
    "resnet8": {},
    "wrn_16_1": {},
    "resnet18": {"stages": (1, 1), "widths": (4, 4, 8)},
    "resnet50": {"stages": (1, 1), "widths": (4, 4, 8)},
    "vit_ti": {"patch": 8, "width": 12, "depth": 2, "heads": 3},
}


def make(name, *, classes=10, input_shape=(16, 16, 3), dtype=jnp.float32, **options):
    return build(
        name, classes=classes, input_shape=input_shape, rngs=nnx.Rngs(0), dtype=dtype, **SMALL.get(name, {}) | options
    )


def images(shape=(4, 16, 16, 3)):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_every_sized_model_has_a_published_count():
    assert set(MODELS) - set(PUBLISHED) == {"mlp", "cnn"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    size, classes = (224, 1000) if name in ("resnet18", "resnet34", "resnet50") or "vit" in name else (32, 100)
    shapes = nnx.eval_shape(lambda: build(name, classes=classes, input_shape=(size, size, 3), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == PUBLISHED[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_float32_and_bfloat16_is_close(name):
    exact, half = make(name), make(name, dtype=jnp.bfloat16)
    exact.eval(), half.eval()
    logits = jax.jit(lambda x: exact(x))(images())
    rough = jax.jit(lambda x: half(x))(images())
    assert logits.shape == (4, 10) and logits.dtype == rough.dtype == jnp.float32
    assert 0 < jnp.abs(logits - rough).max() < 0.1 * jnp.abs(logits).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_gradient(name):
    model = make(name)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.square(nnx.merge(graph, params, rest, copy=True)(images()) - 1).mean()

    for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn_16_1"])
def test_batch_statistics_move_in_training_only(name):
    model = make(name)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    model.eval()
    alone, together = model(images()[:1]), model(images())[:1]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    after_eval = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after_eval)
    model.train()
    model(images())
    moved = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(moved), strict=True))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit_ti"])
def test_dropout_acts_in_training_only(name):
    model = make(name, dropout=0.5)
    model.train()
    assert np.any(model(images()) != model(images()))
    model.eval()
    np.testing.assert_array_equal(model(images()), model(images()))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"dense": 16}, 15),
        ({"dense": 16, "pool": "max"}, 15),
        ({"pool": "mean", "norm": False}, 9),
        ({"widths": (4,), "strides": (1,), "dropout": 0.1}, 5),
    ],
)
def test_cnn_options(options, size):
    model = make("cnn", input_shape=(size, size, 1), **options)
    assert model(images((2, size, size, 1))).shape == (2, 10)


def test_zero_init_starts_blocks_as_the_identity():
    model = make("resnet8", zero_init=True)
    x = nnx.relu(images((2, 8, 8, 16)))
    np.testing.assert_allclose(model.blocks[0](x), x, atol=1e-6)


def test_bundled_patches_are_row_major():
    from kdjax.models.vit import patches

    image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    cut = patches(jnp.asarray(image), 2)
    assert cut.shape == (1, 6, 8)
    np.testing.assert_array_equal(cut[0, 4], image[0, 2:4, 2:4].reshape(-1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21': did you mean 'resnet"),
        ("vit_ti", {"patches": 4}, "did you mean 'patch'"),
        ("mlp", {"depth": 4}, "unknown option of model 'mlp' 'depth'"),
        ("vit_ti", {"patch": 5}, "patches of 5 x 5 cannot take images of 16 x 16"),
        ("vit_ti", {"heads": 5}, "cannot have 5 heads"),
        ("cnn", {"strides": (4, 8)}, "cannot take one of 16 x 16 pixels"),
        ("cnn", {"strides": (1,)}, "2 widths and 1 strides"),
        ("cnn", {"pool": "maximum"}, "unknown pool of cnn"),
        ("cnn", {"dropout": 1.0}, "dropout is 1.0"),
        ("resnet8", {"input_shape": (2, 2, 3)}, "cannot take one of 2 x 2 pixels"),
        ("resnet8", {"widths": (4, 4)}, "needs 4 widths"),
        ("resnet18", {"stages": (1,) * 4, "widths": (4,) * 5}, "reduces an image 32 times"),
        ("wrn_16_1", {"depth": 17}, "cannot have depth 17"),
        ("wrn_16_1", {"input_shape": (3, 9, 3)}, "cannot take one of 3 x 9 pixels"),
        ("mlp", {"input_shape": (16, 16)}, "takes images [height, width, channels]"),
        ("mlp", {"classes": 1}, "at least 2 classes"),
    ],
)
def test_bad_input_is_refused(name, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(name, **options)

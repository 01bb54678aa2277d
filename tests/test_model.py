"""Adapters: the same numbers as the Flax module itself, taps by path, batch statistics and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from kdjax.errors import UserError
from kdjax.model import first_mismatch, from_linen, from_nnx, update_nnx
from tests.helpers import Small, batch, small


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(16, name="hidden")(x.reshape(x.shape[0], -1))
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(10, name="head")(x)


class Nested(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.List([Small(8, rngs=rngs, features=12, classes=12) for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_nnx_adapter_gives_the_modules_own_logits():
    module = Small(16, rngs=nnx.Rngs(3), norm=True)
    model = from_nnx(module)
    variables = model.init(jax.random.key(0))
    x = batch(8)["inputs"]
    logits = model.apply(variables, x, train=False)[0].logits
    module.eval()
    np.testing.assert_allclose(logits, module(x), rtol=1e-6)
    assert isinstance(variables["params"]["hidden"]["kernel"], jax.Array)
    assert set(variables["state"]["norm"]) == {"mean", "var"}


def test_nnx_factory_initialises_from_the_key():
    model = small()
    first, again, other = (model.init(jax.random.key(k))["params"]["head"]["kernel"] for k in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_linen_adapter_gives_the_modules_own_logits_and_updates_statistics():
    x = batch(8)["inputs"]
    net = LinenNet()
    model = from_linen(net, x)
    variables = model.init(jax.random.key(0))
    logits, state = model.apply(variables, x, train=False)
    own = net.apply({"params": variables["params"], **variables["state"]}, x, False)
    np.testing.assert_array_equal(logits.logits, own)
    assert np.array_equal(state["batch_stats"]["norm"]["mean"], variables["state"]["batch_stats"]["norm"]["mean"])
    _, state = model.apply(variables, x, train=True, key=jax.random.key(1))
    assert not np.array_equal(state["batch_stats"]["norm"]["mean"], variables["state"]["batch_stats"]["norm"]["mean"])


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_batch_statistics_move_only_in_training_and_dropout_follows_the_key(kind):
    x = batch(8)["inputs"]
    model = small(norm=True, dropout=0.5) if kind == "nnx" else from_linen(LinenNet(), x)
    variables = model.init(jax.random.key(0))
    apply = jax.jit(lambda key, train: model.apply(variables, x, train=train, key=key), static_argnums=1)
    (_, evaluated), (a, trained) = apply(jax.random.key(1), False), apply(jax.random.key(1), True)
    assert jax.tree.all(jax.tree.map(np.array_equal, evaluated, variables["state"]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, trained, variables["state"]))
    b, c = apply(jax.random.key(1), True)[0], apply(jax.random.key(2), True)[0]
    assert np.array_equal(a.logits, b.logits)
    assert not np.array_equal(a.logits, c.logits)


def test_taps_by_module_path():
    model = from_nnx(lambda rngs: Nested(rngs=rngs))
    variables = model.init(jax.random.key(0))
    x = np.ones((2, 12), np.float32)
    outputs, state = model.apply(variables, x, train=False, taps=("blocks.1", "blocks.2.hidden"))
    module = Nested(rngs=nnx.Rngs(jax.random.key(0)))
    update_nnx(module, variables)
    expected = module.blocks[1](module.blocks[0](x))
    np.testing.assert_allclose(outputs.taps["blocks.1"], expected, rtol=1e-6)
    assert outputs.taps["blocks.2.hidden"].shape == (2, 8)
    assert state == variables["state"]
    linen_model = from_linen(LinenNet(), batch(4)["inputs"])
    linen_variables = linen_model.init(jax.random.key(0))
    taps = linen_model.apply(linen_variables, batch(4)["inputs"], train=False, taps=("hidden",))[0].taps
    assert taps["hidden"].shape == (4, 16)


def test_unknown_tap_names_the_nearest():
    model = from_nnx(lambda rngs: Nested(rngs=rngs))
    with pytest.raises(UserError, match=r"blocks\.3.*did you mean 'blocks\.\d'"):
        model.apply(model.init(jax.random.key(0)), np.ones((2, 12), np.float32), train=False, taps=("blocks.3",))


def test_first_mismatch_names_the_parameter():
    shapes = lambda width: jax.eval_shape(small(width).init, jax.random.key(0))
    assert first_mismatch(shapes(16), shapes(16)) is None
    assert first_mismatch(shapes(16), shapes(8)) == "parameter params/head/kernel is (8, 10) and should be (16, 10)"
    assert "is missing" in first_mismatch({"a": jnp.ones(2)}, {})
    assert "is not part of" in first_mismatch({}, {"a": jnp.ones(2)})

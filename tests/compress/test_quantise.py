"""Fake quantisation against qwix's own provider, NumPy, and the model on the integers that an export writes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import models
from kdjax.compress import quantise
from kdjax.errors import UserError
from kdjax.model import first_mismatch, flatten_paths, from_nnx, logits_of, path_name, tap_shapes
from kdjax.models.decoder import DecoderConfig, make_decoder
from tests.compress.trained import accuracy, factory, fit, logits, trained
from tests.helpers import equal_trees

pytest.importorskip("qwix", reason="qwix is not installed")
BOUND = {"int8": 127.5, "int4": 7.5, "int2": 1.5}
CONFIG = DecoderConfig(
    vocabulary=33, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24, context=16, qkv_bias=True
)


def dequantised(params, rule):
    """The parameters with weights made of their integers, in NumPy."""
    arrays = {path: q.astype(np.float32) * scale for path, (q, scale) in quantise.integers(params, rule).items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(path_name(path), leaf), params)


def provider_logits(params, x, weights, activations):
    """qwix's own way, outside jit: its provider intercepts the products of a module that holds these parameters."""
    import qwix

    module = factory(nnx.Rngs(0))
    module.eval()
    static = {"act_qtype": activations, "act_static_scale": True} if activations else {}
    rule = qwix.QtRule(module_path=".*", weight_qtype=weights, **static)
    module = qwix.quantize_model(module, qwix.QtProvider([rule]), x)
    _, state, _ = nnx.split(module, nnx.Param, ...)
    flat = flatten_paths(params)
    leaves = {path: leaf.replace(flat["/".join(map(str, path))]) for path, leaf in nnx.to_flat_state(state)}
    nnx.update(module, nnx.State.from_flat_path(leaves))
    first = module(x)
    module.set_attributes(disable_quant_stats_update=True)
    stats = nnx.to_flat_state(nnx.split(module, qwix.QuantStat, ...)[1])
    seen = {path[:-1]: value.get_value()["sum_of_absmax"] / value.get_value()["count"] for path, value in stats}
    seen = {"/".join(map(str, (*path, "input_absmax"))): value.reshape(()) for path, value in seen.items()}
    return first, module(2 * x), seen


@pytest.mark.parametrize("kind", BOUND)
def test_integers_against_numpy(kind):
    params = trained().variables["params"]
    for path, (q, scale) in quantise.integers(params, {"weights": kind, "skip": ["^head/"]}).items():
        weight = np.asarray(flatten_paths(params)[path], np.float64)
        wanted = np.abs(weight).max(axis=tuple(range(weight.ndim - 1)), keepdims=True) / BOUND[kind]
        np.testing.assert_allclose(scale, wanted, rtol=1e-6)
        top = int(BOUND[kind])
        rounded = np.clip(np.round(weight / wanted), -top - 1, top)
        assert (np.abs(q.astype(int) - rounded) <= (np.abs(weight / wanted % 1 - 0.5) < 1e-4)).all()  # but for ties
        assert not path.startswith("head/")


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_the_model_is_the_one_on_its_integers_bit_for_bit(kind):
    model, variables, _, (x, _) = trained()
    rule = {"weights": kind, "skip": ["^blocks/0/"]}
    fake = logits(quantise.fake_quantised(model, rule), variables, x)
    params = dequantised(variables["params"], rule)
    assert np.array_equal(fake, logits(model, {**variables, "params": params}, x))
    assert not np.array_equal(fake, logits(model, variables, x))
    assert np.array_equal(params["blocks"]["0"]["conv"]["kernel"], variables["params"]["blocks"]["0"]["conv"]["kernel"])


@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8"), ("int4", None)])
def test_logits_are_those_of_qwix(weights, activations):
    rule = {"weights": weights, "activations": activations}
    model = quantise.fake_quantised(from_nnx(quantise.quantised_inputs(factory, rule)), rule)
    variables, x = jax.jit(model.init)(jax.random.key(0)), trained().test[0][:16]
    kinds = (quantise._qtype(kind) if kind else None for kind in (weights, activations))
    fresh, frozen, seen = provider_logits(variables["params"], x, *kinds)
    # Where nothing was seen yet, ranges are the batch's own; qwix's are that of one batch, which then stay.
    np.testing.assert_allclose(logits(model, variables, x), fresh, rtol=1e-5, atol=1e-4)
    assert bool(seen) == bool(activations)
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: seen.get(path_name(path), leaf), variables["state"])
    np.testing.assert_allclose(logits(model, {**variables, "state": state}, 2 * x), frozen, rtol=1e-5, atol=1e-4)
    assert not seen or not np.allclose(logits(model, variables, 2 * x), frozen, rtol=1e-2)


def test_running_ranges_move_in_training_alone():
    rule = {"weights": "int8", "activations": "int8", "skip": ["^head/"]}
    make = lambda rngs: models.build(
        "vit_ti", classes=10, input_shape=(8, 8, 1), rngs=rngs, patch=4, width=16, depth=1, heads=2
    )
    model = quantise.fake_quantised(from_nnx(quantise.quantised_inputs(make, rule)), rule)
    variables, x = jax.jit(model.init)(jax.random.key(0)), jnp.asarray(trained().train[0])
    plain = from_nnx(make)
    assert first_mismatch(jax.eval_shape(plain.init, jax.random.key(0))["params"], variables["params"]) is None
    layers = {"embed", *(f"blocks/0/{layer}" for layer in ("attention/qkv", "attention/out"))}
    layers |= {f"blocks/0/feedforward/{layer}" for layer in ("up", "down")}
    assert set(flatten_paths(variables["state"])) == {f"{layer}/input_absmax" for layer in layers}

    apply = jax.jit(partial(model.apply, train=True))
    states, absmax = [variables["state"]], 0.0
    for start in (0, 32, 64):
        batch = x[start : start + 32]
        _, state = apply({**variables, "state": states[-1]}, batch)
        states.append(state)
        largest = np.abs(np.asarray(batch).reshape(32, -1)).max(axis=1).mean()
        absmax = 0.99 * absmax + 0.01 * largest if absmax else largest
    np.testing.assert_allclose(states[-1]["embed"]["input_absmax"], absmax, rtol=1e-6)
    resumed = apply({**variables, "state": jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), states[2])}, x[64:96])
    assert equal_trees(resumed[1], states[3])
    after = jax.jit(partial(model.apply, train=False))({**variables, "state": states[-1]}, 3 * x[:8])[1]
    assert equal_trees(after, states[-1])
    assert "blocks.0" in tap_shapes(model, x[:2])


def test_the_gradient_passes_straight_through():
    model, variables, (x, y), _ = trained()
    rule = {"weights": "int4"}

    def gradient(model, params):
        def loss(params):
            outputs, _ = model.apply({**variables, "params": params}, x[:64], train=False)
            return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, y[:64]).mean()

        return jax.jit(jax.grad(loss))(params)

    found = gradient(quantise.fake_quantised(model, rule), variables["params"])
    wanted = gradient(model, dequantised(variables["params"], rule))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)


def test_what_bits_cost_and_training_recovers():
    model, variables, train, test = trained()
    predictions = logits(model, variables, test[0]).argmax(-1)
    changed = {}
    for kind in BOUND:
        student = quantise.fake_quantised(model, {"weights": kind})
        changed[kind] = (logits(student, variables, test[0]).argmax(-1) != predictions).mean()
    assert changed["int8"] < 0.01 and changed["int8"] <= changed["int4"] < changed["int2"]
    student = quantise.fake_quantised(model, {"weights": "int2"})
    learned, _ = fit(student, variables, optax.adam(1e-3), train, steps=60)
    assert accuracy(student, learned, test) > accuracy(student, variables, test)


def test_a_decoder_has_scales_by_layer_and_channel():
    model, rule = make_decoder(CONFIG), {"weights": "int4"}
    variables = jax.jit(model.init)(jax.random.key(0))
    params = variables["params"]
    tokens = np.random.default_rng(0).integers(0, 33, (3, 12)).astype(np.int32)
    arrays = quantise.integers(params, rule)
    scales = {path: scale.shape for path, (_, scale) in arrays.items()}
    assert scales["blocks/attention/q/kernel"] == (2, 1, 16)
    assert scales["blocks/mlp/down/kernel"] == (2, 1, 16)
    assert scales["embed/embedding"] == scales["head/kernel"] == (33, 1)
    bias_free = {path for path, leaf in flatten_paths(params).items() if path.endswith(("kernel", "embedding"))}
    assert set(arrays) == bias_free

    @partial(jax.jit, static_argnums=0)
    def apply(model, params):
        return logits_of(model.apply({**variables, "params": params}, tokens, train=False)[0])

    fake = apply(quantise.fake_quantised(model, rule), params)
    np.testing.assert_allclose(fake, apply(model, dequantised(params, rule)), atol=1e-6)
    with pytest.raises(UserError, match="a decoder's activations stay float"):
        quantise.check_rule({"weights": "int8", "activations": "int8"}, params)


def test_bytes_are_those_of_the_packed_arrays():
    _, variables, _, _ = trained()
    params, state = variables["params"], variables["state"]
    floats = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves((params, state)))
    assert quantise.weights_bytes(params, state) == floats
    rule = {"weights": "int4", "skip": ["^head/"]}
    packed = floats
    for path, (q, scale) in quantise.integers(params, rule).items():
        assert q.size % 2 == 0
        packed += q.size // 2 + scale.nbytes - flatten_paths(params)[path].nbytes
    assert quantise.weights_bytes(params, state, rule) == packed
    assert packed < floats / 6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"weights": "int5"}, "unknown quantisation of weights 'int5': did you mean 'int"),
        ({}, "unknown quantisation of weights None"),
        ({"weights": "int8", "activations": "int4"}, "activations cannot be int4: choose int8 or fp8"),
        ({"weights": "int8", "activations": "half"}, "unknown quantisation of activations 'half'"),
        ({"weights": "int8", "activations": "fp8"}, "cannot be multiplied"),
        ({"weights": "int8", "skp": []}, "unknown key of a quantisation 'skp': did you mean 'skip'"),
        ({"weights": "int8", "skip": ["("]}, "is not a regex"),
        ({"weights": "int8", "skip": "head"}, "give a list of regexes"),
        ({"weights": "int8", "skip": ["tail"]}, "'tail' matches no weight"),
        ({"weights": "int8", "skip": [".*"]}, "leaves no weight"),
    ],
)
def test_impossible_rules(rule, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        quantise.check_rule(rule, trained().variables["params"])

"""Factorised layers against NumPy's SVD, the whole model at full rank, and onnxruntime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import huggingface
from kdjax.compress import low_rank, quantise
from kdjax.errors import UserError
from kdjax.model import first_mismatch, flatten_paths, from_nnx, logits_of, parameter_count, tap_shapes
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.models.layers import dense
from tests.compress.trained import accuracy, factory, logits, trained

CONFIG = DecoderConfig(
    vocabulary=33, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24, context=16, qkv_bias=True
)
FULL = {"blocks.0.conv": 9, "blocks.1.conv": 32, "dense": 64, "head": 10}


def with_ranks(ranks):
    """The trained network with some layers factorised: (model, variables)."""
    variables = trained().variables
    model = from_nnx(low_rank.with_ranks(factory, ranks))
    return model, {**variables, "params": low_rank.factorised(variables["params"], ranks)}


@pytest.mark.parametrize("shape", [(24, 10), (3, 3, 5, 12)])
def test_the_error_is_what_the_dropped_singular_values_say(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix = kernel.reshape(-1, shape[-1]).astype(np.float64)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 4, len(values)):
        first, second = (np.asarray(x, np.float64) for x in low_rank.factorise(jnp.asarray(kernel), rank))
        assert first.shape == (*shape[:-1], rank) and second.shape == (*(1,) * (len(shape) - 2), rank, shape[-1])
        first, second = first.reshape(-1, rank), second.reshape(rank, -1)
        error = np.linalg.norm(first @ second - matrix)
        np.testing.assert_allclose(error, np.sqrt(np.square(values[rank:]).sum()), atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(first, axis=0), np.linalg.norm(second, axis=1), rtol=1e-4)


def test_full_rank_changes_nothing_and_structure_agrees():
    model, variables = with_ranks(FULL)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert first_mismatch(fresh, variables) is None
    whole, x = trained(), trained().test[0]
    np.testing.assert_allclose(logits(model, variables, x), logits(whole.model, whole.variables, x), atol=1e-4)
    taps, old = tap_shapes(model, x[:2]), tap_shapes(whole.model, x[:2])
    assert {name: taps[name] for name in old} == old

    # Fresh factors multiply to the fresh kernels that the same key gives the whole model.
    key = jax.random.key(3)
    pair, whole = (jax.jit(m.init)(key)["params"]["dense"] for m in (model, whole.model))
    np.testing.assert_allclose(pair["first"]["kernel"] @ pair["second"]["kernel"], whole["kernel"], atol=1e-5)


def test_layers_keep_their_options():
    def make(rngs):
        odd = {"strides": (2, 1), "padding": "CIRCULAR", "kernel_dilation": (1, 2), "use_bias": False}
        half = nnx.Conv(6, 5, (1, 1), dtype=jnp.bfloat16, rngs=rngs)
        flat = lambda x: x.reshape(2, -1, 5)
        return nnx.Sequential(nnx.Conv(3, 6, (5, 3), **odd, rngs=rngs), half, flat, dense(5, 7, dtype=None, rngs=rngs))

    model = from_nnx(low_rank.with_ranks(make, {"layers.0": 6, "layers.1": 5, "layers.3": 5}))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0))
    wanted = logits(from_nnx(make), jax.jit(from_nnx(make).init)(jax.random.key(0)), x)
    np.testing.assert_allclose(logits(model, variables, x), wanted, atol=0.02 * np.abs(wanted).max())  # bfloat16
    assert "layers.0" in tap_shapes(model, x) and variables["params"]["layers"]["1"]["second"]["bias"].shape == (5,)


def test_ranks_by_energy_and_by_budget():
    values = np.array([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    assert [low_rank.by_energy(values, share) for share in (0.5, 0.6, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert low_rank.by_energy(np.zeros(3), 0.9) == 1
    # Of 100 + 100 parameters (20 and 29 a direction) 120 may stay: 1 + 1, then a, b, a. Of 90: a, not b, a.
    shapes, spectra = {"a": (10, 10), "b": (4, 25)}, {"a": np.sqrt([5, 4, 1, 0.5]), "b": np.sqrt([5, 3, 1, 1])}
    assert low_rank.by_budget(shapes, spectra, 0.6) == {"a": 3, "b": 2}
    assert low_rank.by_budget(shapes, spectra, 0.45) == {"a": 3, "b": 1}
    assert low_rank.by_budget(shapes, spectra, 1.0) == {"a": 4}  # all of a, as a product; b is smaller whole
    with pytest.raises(UserError, match=r"rank 1 everywhere takes 0\.245"):
        low_rank.by_budget(shapes, spectra, 0.2)


def test_chosen_ranks_of_a_trained_network():
    params = trained().variables["params"]
    ranks = low_rank.choose(params, energy=0.9, skip=["^head/"])
    for layer, rank in ranks.items():
        kernel = np.asarray(flatten_paths(params)[f"{layer.replace('.', '/')}/kernel"], np.float64)
        matrix = kernel.reshape(-1, kernel.shape[-1])
        squares = np.square(np.linalg.svd(matrix, compute_uv=False))
        assert squares[:rank].sum() >= 0.9 * squares.sum() > squares[: rank - 1].sum()
        assert rank * sum(matrix.shape) < matrix.size
    assert "dense" in ranks and "head" not in ranks
    model, variables = with_ranks(ranks)
    assert parameter_count(variables["params"]) < parameter_count(params)
    assert accuracy(model, variables, trained().test) > 0.95

    kernels = lambda params: sum(leaf.size for path, leaf in flatten_paths(params).items() if path.endswith("kernel"))
    smaller = low_rank.factorised(params, low_rank.choose(params, budget=0.5))
    assert 0.4 * kernels(params) < kernels(smaller) <= 0.5 * kernels(params)


def test_a_decoder_of_factors(tmp_path):
    model = make_decoder(CONFIG)
    variables = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 33, (3, 12)).astype(np.int32)
    apply = jax.jit(lambda variables: logits_of(model.apply(variables, tokens, train=False)[0]))
    full = {"blocks/attention/q": 16, "blocks/attention/k": 8, "blocks/mlp/gate": 16, "blocks/mlp/down": 16}
    pairs = {**variables, "params": low_rank.factorised(variables["params"], full)}
    np.testing.assert_allclose(apply(pairs), apply(variables), atol=1e-5)

    ranks = low_rank.choose(variables["params"], energy=0.5)
    assert ranks and all(name.startswith("blocks/") for name in ranks)
    for name, rank in ranks.items():
        kernels = np.asarray(flatten_paths(variables["params"])[f"{name}/kernel"], np.float64)
        assert rank == max(low_rank.by_energy(np.linalg.svd(k, compute_uv=False), 0.5) for k in kernels)
    small = low_rank.decoder_with_ranks(model, ranks)
    fresh = jax.jit(small.init)(jax.random.key(0))
    factors = low_rank.factorised(variables["params"], ranks)
    assert first_mismatch(fresh["params"], factors) is None
    assert parameter_count(factors) < parameter_count(variables["params"])
    np.testing.assert_allclose(apply(fresh), apply({**variables, "params": factors}), atol=1e-5)
    q = factors["blocks"]["attention"]["q"]
    assert q["first"]["kernel"].shape == (2, 16, ranks["blocks/attention/q"]) and q["second"]["bias"].shape == (2, 16)
    scales = quantise.integers(factors, {"weights": "int8"})["blocks/attention/q/first/kernel"][1]
    assert scales.shape == (2, 1, ranks["blocks/attention/q"])
    with pytest.raises(UserError, match=r"parameter blocks/attention/\S+ is absent"):
        huggingface.save(tmp_path / "model", {**variables, "params": factors}, CONFIG)


def test_onnx_of_a_factorised_network(tmp_path):
    jax2onnx = pytest.importorskip("jax2onnx", reason="the packages of kdjax[export] are not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the packages of kdjax[export] are not installed")
    model, variables = with_ranks({"blocks.1.conv": 8, "dense": 16})
    x = trained().test[0]
    function = lambda x: model.apply(variables, x, train=False)[0].logits
    path = str(tmp_path / "model.onnx")
    jax2onnx.to_onnx(function, [("B", 8, 8, 1)], return_mode="file", output_path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, logits(model, variables, x), atol=1e-4)


def test_impossible_ranks():
    params = trained().variables["params"]
    make = lambda ranks: low_rank.with_ranks(factory, ranks)(nnx.Rngs(0))
    for call in (make, lambda ranks: low_rank.factorised(params, ranks)):
        with pytest.raises(
            UserError, match=r"unknown layer to factorise 'blocks\.1\.con': did you mean 'blocks\.1\.conv'"
        ):
            call({"blocks.1.con": 2})
        with pytest.raises(UserError, match=r"head, a matrix of 64 x 10, cannot have rank 11: choose 1 to 10\."):
            call({"head": 11})
    for options in ({}, {"energy": 0.9, "budget": 0.5}):
        with pytest.raises(UserError, match="give one of the two"):
            low_rank.choose(params, **options)
    with pytest.raises(UserError, match=r"energy is 1\.5"):
        low_rank.choose(params, energy=1.5)
    grouped = lambda rngs: nnx.Sequential(nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs))
    with pytest.raises(UserError, match="grouped"):
        low_rank.with_ranks(grouped, {"layers.0": 2})(nnx.Rngs(0))

"""ONNX files in onnxruntime against JAX on real digits and real text, and their integers against qwix's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import experiment as experiments
from kdjax.compress import quantise
from kdjax.errors import UserError
from kdjax.export import onnx as writer
from kdjax.export.serving import make_serving
from kdjax.model import from_nnx
from tests.compress import trained as shared
from tests.helpers import digits, tiny_config, tiny_language_config

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")

NETS = {
    "mlp": {"hidden": (32,)},
    "vit_ti": {"patch": 4, "width": 16, "depth": 1, "heads": 2},
    "resnet18": {"stages": (1, 1), "widths": (8, 8, 16)},
}
DECODERS = {
    "plain": {},
    "tied": {"tied": True, "kv_heads": 1, "qk_norm": True, "qkv_bias": True, "layers": 2},
}


def vision(name="cnn", options=None):
    config = tiny_config()
    config.student.name, config.student.options = name, options or {}
    return experiments.load(config)


@functools.cache
def cnn():
    """A small convolutional network with batch normalisation that has learned the digits."""
    options = {name: shared.FACTORY.keywords[name] for name in ("widths", "strides", "dense")}
    experiment = vision("cnn", options)
    variables = jax.device_get(shared.trained().variables)
    return experiment, variables


def serve_cnn(rule=None, change=lambda x: x):
    experiment, variables = cnn()
    variables = {**variables, "params": jax.tree.map(change, variables["params"])}
    return make_serving(experiment, experiment.student, variables, experiment.config.student, rule)


def noisy(variables):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + random.normal(0, 0.1, x.shape).astype(np.float32), variables)


@functools.cache
def text(name):
    config = tiny_language_config()
    config.student.options = {**config.student.options.to_dict(), **DECODERS[name]}
    experiment = experiments.load(config)
    return experiment, noisy(experiment.student.init(jax.random.key(0)))


def serve_text(name, rule=None):
    experiment, variables = text(name)
    return make_serving(experiment, experiment.student, variables, experiment.config.student, rule)


def written(folder, one, **options):
    """The graph, the function in onnxruntime, and what ``write`` returned."""
    path = folder / "model.onnx"
    facts = writer.write(one, path, **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, made.name) == (one.input_name, "logits")
    assert (tuple(given.shape), tuple(made.shape)) == (one.input_shape, one.output_shape)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx.ml"}
    assert all(not node.domain for node in model.graph.node)
    return model.graph, lambda raw: session.run(["logits"], {one.input_name: raw})[0], facts


def in_jax(function, raw):
    return np.asarray(jax.jit(function)(raw))


def operations(graph):
    return {node.op_type for node in graph.node}


def agreement(a, b):
    return float((a.argmax(-1) == b.argmax(-1)).mean())


# ------------------------------------------------------------------------------------------------------- float32


def test_a_trained_cnn_answers_as_in_jax_on_the_whole_test_set(tmp_path):
    one, images = serve_cnn(), digits().test.inputs
    graph, call, facts = written(tmp_path, one)
    expected = in_jax(one.function, images)
    np.testing.assert_allclose(call(images), expected, atol=1e-4)
    np.testing.assert_allclose(call(images[:1]), expected[:1], atol=1e-4)
    assert np.array_equal(call(images).argmax(-1), expected.argmax(-1))
    state = sum(x.size for x in jax.tree.leaves(cnn()[1]["state"]))
    weights = 4 * (sum(x.size for x in one.params.values()) + state)
    assert weights <= facts["weights_bytes"] < weights + 100 and not graph.value_info
    content = (tmp_path / "model.onnx").read_bytes().lower()
    assert b"teacher" not in content and b"projector" not in content


@pytest.mark.parametrize("name", NETS)
def test_every_family_answers_as_in_jax_on_the_whole_test_set(name, tmp_path):
    experiment = vision(name, NETS[name])
    variables = noisy(jax.jit(experiment.student.init)(jax.random.key(0)))
    variables["state"] = jax.tree.map(jnp.abs, variables["state"])  # of which some are variances
    one = make_serving(experiment, experiment.student, variables, experiment.config.student)
    _, call, _ = written(tmp_path, one)
    images = digits().test.inputs
    np.testing.assert_allclose(call(images), in_jax(one.function, images), atol=1e-4)
    np.testing.assert_allclose(call(images[:1]), call(images)[:1], atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_takes_any_batch_and_length(name, tmp_path):
    one = serve_text(name)
    graph, call, facts = written(tmp_path, one)
    tokens = text(name)[0].dataset.test.tokens.astype(np.int32)
    for batch, length in ((1, 1), (1, 32), (3, 17), (2, 32)):
        part = tokens[:batch, :length]
        np.testing.assert_allclose(call(part), in_jax(one.function, part), atol=1e-4)
    assert not {"Einsum", "Loop", "Scan"} & operations(graph)
    weights = 4 * sum(x.size for x in one.params.values())
    assert weights <= facts["weights_bytes"] < weights + 200, "a tied table is in the file once"


def test_weights_with_many_zeros_are_stored_as_values_and_places(tmp_path):
    def thinned(x):
        return np.where(np.abs(x) < np.quantile(np.abs(x), 0.8), 0, x) if x.ndim > 1 else x

    one, images = serve_cnn(change=thinned), digits().test.inputs
    graph, call, facts = written(tmp_path, one)
    np.testing.assert_allclose(call(images), in_jax(one.function, images), atol=1e-4)
    (tmp_path / "dense").mkdir()
    _, _, dense = written(tmp_path / "dense", serve_cnn())
    stored = sum(s.values.dims[0] for s in graph.sparse_initializer)
    kernels = [x for path, x in one.params.items() if path.endswith("kernel")]
    assert stored == sum(np.count_nonzero(x) for x in kernels)
    assert facts["weights_bytes"] == dense["weights_bytes"] - 4 * sum(x.size for x in kernels) + 12 * stored


# ---------------------------------------------------------------------------------------------- weights in few bits


@pytest.mark.parametrize(("precision", "kind"), [("int8-weights", "int8"), ("int4", "int4"), ("fp8", "fp8")])
def test_weights_alone_lie_on_the_grid_of_qwix(precision, kind, tmp_path):
    pytest.importorskip("qwix", reason="qwix is not installed")
    rule = {"weights": kind, "activations": None, "skip": []}
    for number, (one, reference, raw) in enumerate(
        (
            (serve_cnn(), serve_cnn(rule).reference, digits().test.inputs),
            (serve_text("tied"), serve_text("tied", rule).reference, text("tied")[0].dataset.test.tokens[:3, :17]),
        )
    ):
        raw = raw.astype(one.input_dtype)
        (tmp_path / str(number)).mkdir()
        graph, call, facts = written(tmp_path / str(number), one, precision=precision)
        np.testing.assert_allclose(call(raw), in_jax(reference, raw), atol=1e-4)
        variables = (cnn, functools.partial(text, "tied"))[number]()[1]
        expected = quantise.integers(variables["params"], rule)
        stored = [t for t in graph.initializer if t.name.endswith(f"_{kind}")]
        content = lambda arrays: np.sort(np.concatenate([x.astype(np.float32).ravel() for x in arrays]))
        np.testing.assert_array_equal(
            content(onnx.numpy_helper.to_array(t) for t in stored), content(values for values, _ in expected.values())
        )
        wanted = quantise.weights_bytes(variables["params"], variables["state"], rule)
        assert wanted <= facts["weights_bytes"] < wanted + 200


def test_a_student_trained_with_a_rule_is_written_as_it_was_trained(tmp_path):
    pytest.importorskip("qwix", reason="qwix is not installed")
    images = digits().test.inputs
    one = serve_cnn({"weights": "int4", "activations": None, "skip": ["^head/"]})
    graph, call, _ = written(tmp_path, one)
    np.testing.assert_allclose(call(images), in_jax(one.reference, images), atol=1e-4)
    integers = [np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
    kernels = {path: x.size for path, x in one.params.items() if path.endswith("kernel")}
    assert sorted([*integers, kernels["head/kernel"]]) == sorted(kernels.values())
    rounds = serve_cnn({"weights": "int8", "activations": "int8", "skip": ["^head/"]})
    with pytest.raises(UserError, match="needs calibration"):
        writer.write(rounds, tmp_path / "model.onnx")
    graph, call, _ = written(tmp_path, rounds, calibration=digits().train.inputs[:200])
    assert "QuantizeLinear" in operations(graph) and agreement(call(images), in_jax(rounds.function, images)) > 0.99
    assert [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and list(t.dims) == [64, 10]]


# --------------------------------------------------------------------------------------------- activations as well


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_int8_agrees_with_float_and_takes_a_quarter(precision, tmp_path):
    one, images = serve_cnn(), digits().test.inputs
    expected = in_jax(one.function, images)
    graph, call, facts = written(tmp_path, one, precision=precision, calibration=digits().train.inputs[:300])
    assert agreement(call(images), expected) >= 0.99
    assert facts["weights_bytes"] < 0.3 * 4 * sum(x.size for x in one.params.values())
    large = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert all(np.prod(t.dims) == 1 for t in large), "every kernel is of integers"


def test_int8_of_a_decoder_stays_near_at_any_length(tmp_path):
    one = serve_text("tied")
    tokens = text("tied")[0].dataset.train.tokens[:64, :32].astype(np.int32)
    graph, call, _ = written(tmp_path, one, precision="int8", calibration=tokens)
    assert not [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 257]
    for part in (tokens[:1, :1], tokens[:2]):
        expected = in_jax(one.function, part)
        assert np.abs(call(part) - expected).max() < 0.1 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs calibration"),
        (np.zeros((5, 8, 8), np.uint8), r"shape \[5, 8, 8\]"),
        (np.zeros((5, 8, 9, 1), np.uint8), r"give images \[batch, 8, 8, 1\] of uint8"),
        (np.zeros((0, 8, 8, 1), np.uint8), r"shape \[0, 8, 8, 1\]"),
        (np.zeros((5, 8, 8, 1), np.float32), "dtype float32"),
    ],
)
def test_calibration_of_another_shape_or_dtype_is_refused(calibration, message, tmp_path):
    with pytest.raises(UserError, match=message):
        writer.write(serve_cnn(), tmp_path / "model.onnx", precision="int8", calibration=calibration)
    assert not list(tmp_path.iterdir())


class Odd(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x).reshape(-1, 64))


def test_an_operation_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    experiment, model = cnn()[0], from_nnx(Odd)
    one = make_serving(experiment, model, model.init(jax.random.key(0)), experiment.config.student)
    with pytest.raises(UserError, match=r"the operation 'pure_callback' .*test_onnx_export.py.*Odd.__call__"):
        writer.write(one, tmp_path / "model.onnx")


def test_unknown_precisions_and_models_beyond_a_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'int8'"):
        writer.write(serve_cnn(), tmp_path / "model.onnx", precision="int88")
    huge = np.broadcast_to(np.float32(0), (2**30,))
    with pytest.raises(UserError, match="2 GiB"):
        writer.write(serve_cnn()._replace(params={"head/kernel": huge}), tmp_path / "model.onnx")

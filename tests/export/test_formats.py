"""StableHLO, safetensors and LiteRT against the model as it is trained and scored, on real digits and real text."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from kdjax import experiment as experiments
from kdjax.errors import UserError
from kdjax.export import litert, safetensors, serving, stablehlo
from kdjax.model import from_nnx, logits_of
from kdjax.step import make_predict
from kdjax.tasks import classification
from tests.helpers import digits, equal_trees, tiny_config, tiny_language_config

HAS_LITERT = all(importlib.util.find_spec(name) for name in ("tensorflow", "ai_edge_litert"))
needs_litert = pytest.mark.skipif(not HAS_LITERT, reason="tensorflow-cpu and ai-edge-litert are not installed")


def noisy(variables):
    """Weights as if trained: fresh ones have zeros as biases and ones as deviations, which would hide a mistake."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + random.uniform(0, 0.1, x.shape).astype(np.float32), variables)


@functools.cache
def vision():
    config = tiny_config()
    config.student.name, config.student.options = "cnn", {"widths": (8, 16), "strides": (1, 2)}
    experiment = experiments.load(config)
    variables = noisy(jax.jit(experiment.student.init)(jax.random.key(0)))
    one = serving.make_serving(experiment, experiment.student, variables, experiment.config.student)
    predict = jax.jit(make_predict(experiment.student, classification.make_normalise(experiment.dataset)))
    return one, variables, lambda raw: np.asarray(predict(variables, {"inputs": raw}))


@functools.cache
def text():
    experiment = experiments.load(tiny_language_config())
    variables = noisy(jax.jit(experiment.student.init)(jax.random.key(0)))
    one = serving.make_serving(experiment, experiment.student, variables, experiment.config.student)
    apply = jax.jit(lambda tokens: logits_of(experiment.student.apply(variables, tokens, train=False)[0]))
    return one, experiment.dataset.test.tokens[:, :-1].astype(np.int32), lambda raw: np.asarray(apply(raw))


# ----------------------------------------------------------------------------------------------------- StableHLO


def test_stablehlo_of_a_classifier_takes_any_batch_on_any_platform(tmp_path):
    one, _, expected = vision()
    stablehlo.write(one, tmp_path / "model.stablehlo")
    read = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    assert set(read.platforms) == {"cpu", "cuda", "tpu"}
    for size in (1, 5):
        images = digits().test.inputs[:size]
        np.testing.assert_allclose(read.call(images), expected(images), atol=1e-5)


def test_stablehlo_of_a_decoder_takes_any_batch_and_length(tmp_path):
    one, tokens, expected = text()
    stablehlo.write(one, tmp_path / "model.stablehlo")
    read = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    for part in (tokens[:1, :7], tokens[:3]):
        np.testing.assert_allclose(read.call(part), expected(part), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_gives_back_every_bit(tmp_path):
    _, variables, _ = vision()
    odd = {"scalar": np.float32(0.1), "nothing": {}, "counts": np.arange(3, dtype=np.int32)}
    whole = {**variables, "state": {**variables["state"], "odd": odd}}
    path = tmp_path / "model.safetensors"
    safetensors.write(whole, path, name="cnn", options={"widths": (8, 16)})
    found = safetensors.load(path)
    assert equal_trees(found, whole)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), whole)
    assert path.stat().st_mode & 0o044  # readable like any other file


def test_safetensors_says_what_the_model_is_by_paths_that_others_can_read(tmp_path):
    import safetensors as library

    _, variables, _ = vision()
    safetensors.write(variables, tmp_path / "model.safetensors", name="cnn", options={"widths": (8, 16)})
    with library.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata()["model"] == "cnn" and file.metadata()["options"] == '{"widths": [8, 16]}'
        kernel = file.get_tensor("params/blocks/0/conv/kernel")
    np.testing.assert_array_equal(kernel, variables["params"]["blocks"]["0"]["conv"]["kernel"])


def test_safetensors_refuses_what_is_not_its_own(tmp_path):
    import safetensors.numpy as library

    library.save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not in kdjax's own layout"):
        safetensors.load(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:20])
    for name in ("torn.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match=f"{name} cannot be read as safetensors"):
            safetensors.load(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- LiteRT


def interpreted(path, inputs):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    logits = []
    for example in inputs:
        interpreter.set_tensor(given["index"], example[None])
        interpreter.invoke()
        logits.append(interpreter.get_tensor(made["index"])[0])
    return np.stack(logits)


@needs_litert
def test_litert_of_a_classifier(tmp_path):
    one, variables, expected = vision()
    facts = litert.write(one, tmp_path / "model.tflite")
    images = digits().test.inputs[:100]
    np.testing.assert_allclose(interpreted(tmp_path / "model.tflite", images), expected(images), atol=1e-5)
    floats = sum(x.nbytes for x in jax.tree.leaves(variables))
    assert 0.8 * floats < facts["weights_bytes"] < 1.2 * floats  # batch statistics are folded into the kernels


@needs_litert
def test_litert_int8_of_a_classifier(tmp_path):
    one, _, expected = vision()
    plain = litert.write(one, tmp_path / "model.tflite")
    facts = litert.write(one, tmp_path / "int8.tflite", calibration=digits().train.inputs[:128])
    images = digits().test.inputs[:100]
    found, wanted = interpreted(tmp_path / "int8.tflite", images), expected(images)
    assert np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)
    assert np.abs(found - wanted).max() > 1e-4  # it is rounded indeed
    assert facts["weights_bytes"] < 0.5 * plain["weights_bytes"]


@needs_litert
def test_litert_of_a_decoder_takes_its_context(tmp_path):
    one, tokens, expected = text()
    litert.write(one, tmp_path / "model.tflite", length=tokens.shape[1])
    found = interpreted(tmp_path / "model.tflite", tokens[:4])
    np.testing.assert_allclose(found, expected(tokens[:4]), atol=1e-5)


@pytest.mark.parametrize(
    "calibration",
    [np.zeros((4, 8, 9, 1), np.uint8), np.zeros((4, 8, 8, 1), np.float32), np.zeros((0, 8, 8, 1), np.uint8)],
)
def test_litert_refuses_calibration_of_another_shape_or_dtype(tmp_path, calibration):
    with pytest.raises(UserError, match=r"calibration is .* and the model takes uint8"):
        litert.write(vision()[0], tmp_path / "model.tflite", calibration=calibration)


@needs_litert
def test_litert_names_the_operation_that_it_lacks_and_its_line(tmp_path):
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return jnp.fft.fft(self.head(x)).real

    model = from_nnx(Odd)
    weights = model.init(jax.random.key(0))
    function = lambda x: model.apply(weights, x, train=False)[0].logits
    one = serving.Serving(function, function, "images", ("batch", 4), "float32", ("batch", 4), {}, None)
    with pytest.raises(UserError, match=r"cannot hold the operation vhlo.fft_v1 of .*test_formats.py:\d+: choose"):
        litert.write(one, tmp_path / "model.tflite")


@pytest.mark.skipif(HAS_LITERT, reason="tensorflow and ai-edge-litert are installed")
def test_litert_that_is_not_installed_names_its_extra(tmp_path):
    with pytest.raises(UserError, match=r"pip install 'kdjax\[litert\]'"):
        litert.write(vision()[0], tmp_path / "model.tflite")

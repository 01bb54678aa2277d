"""What is exported: the numbers of training and scoring, from raw inputs, whichever way a model is written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import experiment as experiments
from kdjax.compress import quantise
from kdjax.data import sources
from kdjax.export.serving import _make_normalise, make_serving
from kdjax.model import flatten_paths, logits_of
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.models.resnet import ResNet
from kdjax.step import make_predict
from kdjax.tasks import classification
from tests.helpers import digits, tiny_config, tiny_language_config


def noisy(variables, seed=0):
    """Weights as if trained: fresh ones have zeros and ones that would hide a mistake."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + random.uniform(0, 0.1, x.shape).astype(np.float32), variables)


@functools.cache
def classifier():
    experiment = experiments.load(tiny_config())
    return experiment, noisy(experiment.student.init(jax.random.key(0)))


def test_a_classifier_is_served_as_it_is_scored():
    experiment, variables = classifier()
    one = make_serving(experiment, experiment.student, variables, experiment.config.student)
    assert (one.input_name, one.input_shape, one.input_dtype) == ("images", ("batch", 8, 8, 1), "uint8")
    assert one.output_shape == ("batch", 10) and one.reference is one.function and one.quantise is None
    images = digits().test.inputs
    predict = make_predict(experiment.student, classification.make_normalise(experiment.dataset))
    expected = jax.jit(predict)(variables, {"inputs": jnp.asarray(images)})
    np.testing.assert_allclose(jax.jit(one.function)(images), expected, atol=1e-5)
    assert {path: array.shape for path, array in one.params.items()} == {
        path: leaf.shape for path, leaf in flatten_paths(variables["params"]).items()
    }
    assert all(type(array) is np.ndarray for array in one.params.values())


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_normalisation_is_that_of_training_in_two_operations(dtype):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3)).astype(dtype)
    labels = np.arange(20) % 2
    dataset = sources.from_arrays((images, labels), (images, labels))
    expected = classification.make_normalise(dataset)({"inputs": jnp.asarray(images)})["inputs"]
    np.testing.assert_allclose(_make_normalise(dataset)(jnp.asarray(images)), expected, atol=2e-6)


def test_a_quantised_student_is_held_against_its_rounded_weights():
    pytest.importorskip("qwix", reason="qwix is not installed")
    experiment, variables = classifier()
    rule = {"weights": "int4", "activations": None, "skip": ["^head/"]}
    one = make_serving(experiment, experiment.student, variables, experiment.config.student, rule)
    plain = make_serving(experiment, experiment.student, variables, experiment.config.student)
    rounded = flatten_paths(variables["params"]) | {
        path: values.astype(np.float32) * scale
        for path, (values, scale) in quantise.integers(variables["params"], rule).items()
    }
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: rounded[jax.tree_util.keystr(path, simple=True, separator="/")], variables["params"]
    )
    images = digits().test.inputs
    by_hand = make_serving(experiment, experiment.student, {**variables, "params": tree}, experiment.config.student)
    reference, function, exact, unrounded = (
        jax.jit(f)(images) for f in (one.reference, one.function, by_hand.function, plain.function)
    )
    np.testing.assert_allclose(reference, exact, atol=1e-5)
    np.testing.assert_array_equal(function, unrounded)
    assert np.abs(reference - function).max() > 0.01


def test_a_decoder_is_served_without_the_rows_that_pad_its_tables():
    config = tiny_language_config()
    config.student.options.vocabulary = 300
    experiment = experiments.load(config)
    variables = noisy(experiment.student.init(jax.random.key(0)))
    one = make_serving(experiment, experiment.student, variables, experiment.config.student)
    assert (one.input_name, one.input_shape, one.input_dtype) == ("tokens", ("batch", "length"), "int32")
    assert one.output_shape == ("batch", "length", 257)
    assert one.params["embed/embedding"].shape == one.params["head/kernel"].shape == (257, 16)
    tokens = experiment.dataset.test.tokens[:2, :17].astype(np.int32)
    expected = jax.jit(lambda tokens: logits_of(experiment.student.apply(variables, tokens, train=False)[0]))(tokens)
    np.testing.assert_allclose(jax.jit(one.function)(tokens), expected, atol=1e-5)


def test_an_unrolled_decoder_gives_the_numbers_of_the_scanned_one():
    config = DecoderConfig(
        vocabulary=23, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp_width=24, context=16, qk_norm=True,
        qkv_bias=True, tied=True,
    )  # fmt: skip
    variables = noisy(make_decoder(config).init(jax.random.key(0)))
    random = np.random.default_rng(0)
    segments = np.sort(random.integers(0, 3, (2, 9)), axis=1).astype(np.int32)  # with padding, 0, and two documents
    inputs = {"tokens": random.integers(0, 23, (2, 9)).astype(np.int32), "segments": segments}
    taps = ("blocks.0", "blocks.2", "blocks.1.attention.qkv")
    scanned, unrolled = (make_decoder(config, unrolled=unrolled) for unrolled in (False, True))
    outputs = [
        jax.jit(lambda v, x, model=model: model.apply(v, x, train=False, taps=taps)[0])(variables, inputs)
        for model in (scanned, unrolled)
    ]
    np.testing.assert_allclose(logits_of(outputs[0]), logits_of(outputs[1]), atol=1e-5)
    for tap in taps:
        np.testing.assert_allclose(outputs[0].taps[tap], outputs[1].taps[tap], atol=1e-5)


def test_the_stem_that_is_padded_by_hand_pools_as_before():
    net = ResNet(
        classes=3, input_shape=(10, 14, 3), stages=(1,), widths=(4, 4), large_stem=True, rngs=nnx.Rngs(0)
    )  # an odd number of rows before the pool
    net.eval()
    x = jax.random.normal(jax.random.key(1), (2, 10, 14, 3))

    def by_its_own_padding(net, x):
        y = nnx.relu(net.stem_norm(net.stem(x)))
        y = nnx.max_pool(y, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return net.head(net.blocks[0](y).mean(axis=(1, 2)))

    np.testing.assert_allclose(nnx.jit(lambda net, x: net(x))(net, x), nnx.jit(by_its_own_padding)(net, x), atol=1e-6)

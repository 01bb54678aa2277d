"""What is measured and on what: words, arrays as a file wants them, and text as a deployed model sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import config as configs
from kdjax import sharding
from kdjax.data.packing import TextSplit
from kdjax.errors import UserError
from kdjax.measure import candidates, examples, results, worker
from kdjax.model import logits_of
from kdjax.tasks import classification, language
from tests import deployed
from tests.helpers import digits, tiny_language_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("words")
    deployed.write_artefact(place / "teacher", "onnx", "onnxruntime", "model.onnx", b"content")
    for name in ("net.onnx", "net.pt", "net.pth", "a:b=c.onnx"):
        (place / name).write_bytes(b"content")
    return place


def test_words_name_files_ways_and_rows(folder):
    words = ["teacher", "teacher", "big=teacher", "net.onnx:nchw,scaled", "x=net.pt:normalised", "a:b=c.onnx"]
    prefix = [word.rpartition("=") if word.startswith(("big", "x=")) else ("", "", word) for word in words]
    found = candidates.read([f"{name}{sign}{folder}/{rest}" for name, sign, rest in prefix])
    assert [one.name for one in found] == ["teacher onnx", "teacher onnx (2)", "big", "net", "x", "a:b=c"]
    assert [one.ways for one in found[3:]] == [("nchw", "scaled"), ("normalised",), ()]
    assert [one.runtime for one in found] == ["onnxruntime"] * 4 + ["torch", "onnxruntime"]
    assert candidates.weigh(found[0]) == (2600, 7) and candidates.weigh(found[4]) == (None, 7)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("none.onnx", "there is no model at"),
        ("net.pth", "pickled"),
        ("net.onnx:nhcw", "did you mean 'nchw'"),
        ("net.onnx:scaled,normalised", "either scaled or normalised"),
        ("teacher:nchw", "prepares its inputs itself"),
        ("teacher/model.onnx/x", "there is no model at"),
    ],
)
def test_words_that_are_wrong(folder, word, message):
    with pytest.raises(UserError, match=message):
        candidates.read([f"{folder}/{word}"])


def test_no_words_changed_artefacts_and_weights_alone(tmp_path):
    with pytest.raises(UserError, match="nothing to measure"):
        candidates.read([])
    changed = deployed.write_artefact(tmp_path / "changed", "onnx", "onnxruntime", "model.onnx", b"content")
    (changed / "model.onnx").write_bytes(b"Content")
    with pytest.raises(UserError, match="was changed after export"):
        candidates.read([str(changed)])
    weights = deployed.write_artefact(tmp_path / "weights", "safetensors", None, "model.safetensors", b"content")
    with pytest.raises(UserError, match="no runtime runs"):
        candidates.read([str(weights)])


def test_weights_of_an_onnx_file_are_weighed(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load_from_string(deployed.onnx_bytes())
    four_bits = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, [3], [1, -2, 3])
    model.graph.initializer.append(four_bits)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.zeros(5, np.int8)))
    model.graph.node.append(constant)
    onnx.save(model, tmp_path / "net.onnx")
    (found,) = candidates.read([str(tmp_path / "net.onnx")])
    assert candidates.weigh(found) == (4 * 650 + 2 + 5, (tmp_path / "net.onnx").stat().st_size)
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="data", size_threshold=1024)
    beside = (tmp_path / "net.onnx").stat().st_size + (tmp_path / "data").stat().st_size
    assert candidates.weigh(found) == (4 * 650 + 2 + 5, beside)


def test_images_are_prepared_as_a_file_wants_them():
    split = examples.load(configs.default(), digits())
    np.testing.assert_array_equal(examples.prepared(split.test, split, (), "uint8"), digits().test.inputs)
    normalised = examples.prepared(split.test, split, ("normalised",), "float32")
    expected = classification.make_normalise(digits())({"inputs": jnp.asarray(digits().test.inputs)})["inputs"]
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    turned = examples.prepared(colours, split, ("nchw", "scaled"), "")
    np.testing.assert_allclose(turned[1, 2, 3, 4], colours[1, 3, 4, 2] / 255, rtol=1e-6)
    assert turned.dtype == np.float32 and turned.flags.c_contiguous
    floats = colours.astype(np.float32)
    with pytest.raises(UserError, match="leave out :scaled"):
        examples.prepared(floats, split, ("scaled",), "float32")
    with pytest.raises(UserError, match="the file takes uint8"):
        examples.prepared(floats, split, (), "uint8")


def test_shapes_that_do_not_fit_name_the_remedy():
    split = examples.load(configs.default(), digits())
    examples.check_shape(split, split.test, ("batch", 8, "width", 1))
    examples.check_shape(split, split.test, None)
    with pytest.raises(UserError, match=r"takes \[1, 8, 8\] .* has \[8, 8, 1\]: add :nchw"):
        examples.check_shape(split, split.test, ("batch", 1, 8, 8))
    with pytest.raises(UserError, match=r"takes \[28, 28, 1\].*the data that it was made for"):
        examples.check_shape(split, split.test, ("batch", 28, 28, 1))
    with pytest.raises(UserError, match="batches of 4 alone"):
        examples.check_shape(split, split.test, (4, 8, 8, 1))
    with pytest.raises(UserError, match=r"gives \[1, 1000\] and \[1, 10\]"):
        examples.check_logits(split, split.test, (1, 1000))


def test_windows_are_taken_apart_into_documents():
    tokens = np.array([[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]])
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 0, 0, 0]])
    in_loss, sizes = np.ones((2, 5), bool), np.arange(10).reshape(2, 5)
    in_loss[0, 3] = False
    inputs, labels, covered = examples.rows_of(TextSplit(tokens, segments, in_loss, sizes))
    np.testing.assert_array_equal(inputs, [[5, 6, 0, 0], [7, 8, 0, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(labels, [[6, -1, -1, -1], [-1, 9, -1, -1], [2, -1, -1, -1]])
    np.testing.assert_array_equal(covered, [1, 4, 6])


def test_text_is_scored_as_the_trainer_scores_it(tmp_path):
    config = configs.resolve(tiny_language_config())
    dataset = language.load(config)
    split = examples.load(config, dataset)
    assert (np.diff(np.sort(dataset.test.segments, axis=1), axis=1) > 0).any(), "some window has two documents"
    model = language.make_model(config, config.student, dataset, language.classes(config, dataset))
    variables = model.init(jax.random.key(0))
    variables = jax.tree.map(lambda x: 3.0 * x, variables)  # far from uniform
    score = jax.jit(lambda tokens: logits_of(model.apply(variables, {"tokens": tokens}, train=False)[0]))
    worker.score(
        lambda x: np.asarray(score(x)), split.test, split.labels, np.arange(len(split.test)), tmp_path / "s.npz"
    )
    with np.load(tmp_path / "s.npz") as said:
        found = results.quality(said, said, split)
    expected = language.make_evaluate(model, dataset, sharding.make_mesh({"data": 1, "fsdp": 1}), 64)(variables)
    for key in ("nll", "accuracy", "bits_per_byte"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4)
    assert found["agreement"] == 1.0 and int((split.labels >= 0).sum()) == expected["tokens"]


def test_the_data_of_a_manifest_are_those_of_its_config():
    config = tiny_language_config()
    again = examples.config_of({"task": config.task, **config.data.to_dict()})
    assert again.data.to_dict() == configs.resolve(config).data.to_dict() and again.task == "language"
    with pytest.raises(UserError, match="unknown config key"):
        examples.config_of({"task": "classification", "nmae": "digits"})

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from kdjax.data import sources
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError
from tests.helpers import digits


def _arrays(n=20, dtype=np.uint8, classes=4):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (n, 5, 6, 3)).astype(dtype), np.arange(n) % classes


def test_digits_are_all_of_scikit_learns_scans_once_and_stratified():
    from sklearn.datasets import load_digits

    dataset = sources.load({"name": "digits"})
    bundled = load_digits()
    both = np.concatenate([dataset.train.inputs, dataset.test.inputs])
    assert both.shape == (1797, 8, 8, 1) and both.dtype == np.uint8
    pixels = np.rint(both[..., 0] * (16 / 255))  # the scaling loses nothing
    as_rows = lambda images, labels: sorted(
        (*row, label) for row, label in zip(images.reshape(1797, -1).tolist(), labels.tolist(), strict=True)
    )
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert as_rows(pixels, labels) == as_rows(bundled.images, bundled.target)
    share = np.bincount(dataset.test.labels) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.005
    assert dataset.class_names == tuple("0123456789")


def test_statistics_are_those_of_the_scaled_training_split():
    dataset = sources.load({"name": "digits"})
    scaled = dataset.train.inputs / 255.0
    np.testing.assert_allclose(dataset.mean, [scaled.mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [scaled.std()], rtol=1e-12)
    images, labels = _arrays(3000, np.float64)  # more than one chunk, float inputs as they are
    dataset = sources.from_arrays((images, labels), (images[:9], labels[:9]))
    np.testing.assert_allclose(dataset.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, images.std((0, 1, 2)), rtol=1e-6)
    assert dataset.train.inputs.dtype == np.float32 and len(dataset.mean) == 3


def test_synthetic_is_deterministic_and_can_be_learnt():
    options = {"shape": (12, 10, 3), "classes": 5, "examples": 200}
    first, again = (sources.load({"name": "synthetic", "options": options}) for _ in range(2))
    other = sources.load({"name": "synthetic", "options": {**options, "seed": 1}})
    assert first.train.inputs.shape == (200, 12, 10, 3) and len(first.test.labels) == 50
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    assert (first.train.inputs != other.train.inputs).any()
    centres = np.stack([first.train.inputs[first.train.labels == k].mean(0) for k in range(5)])
    distances = ((first.test.inputs[:, None] - centres[None]) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == first.test.labels).mean() > 0.95
    sources.validate(first)


def test_synthetic_examples_come_from_their_domains():
    options = {"shape": (12, 10, 3), "classes": 5, "examples": 300, "domains": 3}
    dataset = sources.load({"name": "synthetic", "options": options})
    sources.validate(dataset)
    train, test = dataset.train, dataset.test
    assert train.domain.dtype == train.labels.dtype == np.int32
    assert np.bincount(train.domain * 5 + train.labels).tolist() == [20] * 15 and len(test.domain) == 75
    centre = lambda domain, label: train.inputs[(train.domain == domain) & (train.labels == label)].mean(0)
    centres = np.stack([centre(domain, label) for domain in range(3) for label in range(5)])
    nearest = ((test.inputs[:, None] - centres[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == test.domain * 5 + test.labels).mean() > 0.95  # each domain has patterns of its own
    assert sources.load({"name": "synthetic"}).train.domain is None


READ_FASHION_MNIST = """
import sys
import numpy as np
from kdjax.data import sources

dataset = sources.load({"name": "tfds:fashion_mnist", "data_dir": sys.argv[1]})
sources.validate(dataset)
assert dataset.train.inputs.shape == (60000, 28, 28, 1) and dataset.train.inputs.dtype == np.uint8
assert dataset.test.inputs.shape == (10000, 28, 28, 1)
assert (np.bincount(dataset.train.labels) == 6000).all() and (np.bincount(dataset.test.labels) == 1000).all()
assert dataset.class_names[0] == "T-shirt/top" and len(dataset.class_names) == 10
np.testing.assert_allclose((dataset.mean, dataset.std), ([0.2860], [0.3530]), atol=1e-4)  # as published
assert not {"tensorflow", "sklearn"} & set(sys.modules), "reading imports what it does not need"

import tensorflow_datasets as tfds

source = tfds.data_source("fashion_mnist", split="test", data_dir=sys.argv[1])
for index in (0, 1, 1023, 1024, 9999):  # around the border of two chunks
    np.testing.assert_array_equal(dataset.test.inputs[index], source[index]["image"])
    assert dataset.test.labels[index] == source[index]["label"]
"""


def test_fashion_mnist_is_read_whole_in_order_and_without_tensorflow(fashion_mnist_dir):
    # In a process of its own, since other tests may have imported what this must not.
    command = [sys.executable, "-c", READ_FASHION_MNIST, str(fashion_mnist_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class KdjaxTestShapes(tfds.core.GeneratorBasedBuilder):
    """Images of two sizes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for index in range(2):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4 + index)).save(picture, "png")
            picture.seek(0)
            yield index, {"image": picture, "label": index}


def test_tfds_refuses_what_is_not_there_or_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"cifar10 is not prepared.*kdjax\[tfds\].*array_record"):
        sources.load({"name": "tfds:cifar10", "data_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"unknown data set tfds:no_such_set"):
        sources.load({"name": "tfds:no_such_set", "data_dir": str(tmp_path)})
    KdjaxTestShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match="kdjax_test_shapes vary in size"):
        sources.load({"name": "tfds:kdjax_test_shapes", "data_dir": str(tmp_path)})


class KdjaxTestDomains(tfds.core.GeneratorBasedBuilder):
    """Images that tell which camera took them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
            "camera": tfds.features.Scalar(np.int64),
            "weight": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(9), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for index in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (index * 10,) * 3).save(picture, "png")
            picture.seek(0)
            yield index, {"image": picture, "label": index % 2, "camera": index % 3, "weight": 0.5}


def test_tfds_gives_the_feature_that_is_named_as_domain(tmp_path):
    KdjaxTestDomains(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    load = lambda **options: sources.load(
        {"name": "tfds:kdjax_test_domains", "data_dir": str(tmp_path), "options": options}
    )
    dataset = load(domain="camera")
    sources.validate(dataset)
    for split in (dataset.train, dataset.test):
        number = split.inputs[:, 0, 0, 0] // 10
        np.testing.assert_array_equal(split.domain, number % 3)
        np.testing.assert_array_equal(split.labels, number % 2)
        assert split.domain.dtype == np.int32
    assert load().train.domain is None
    with pytest.raises(UserError, match=r"unknown feature of tfds:kdjax_test_domains .*did you mean 'camera'"):
        load(domain="camra")
    with pytest.raises(UserError, match=r"weight.*is float32 of shape .*a domain is one integer"):
        load(domain="weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": "synthetic", "options": {"clases": 3}}, "did you mean 'classes'"),
        ({"name": "synthetic", "options": {"shape": (8, 8)}}, "height, width, channels"),
        ({"name": "digits", "options": {"shape": (8, 8, 1)}}, "takes no options"),
        ({"name": "synthetic", "options": {"domains": 0}}, "domains=0"),
        (
            {"name": "tfds:fashion_mnist", "options": {"shape": (8, 8, 1)}},
            "unknown option of the data set tfds:fashion_mnist 'shape'.*domain",
        ),
    ],
)
def test_load_refuses_unknown_names(config, message):
    with pytest.raises(UserError, match=message):
        sources.load(config)


class KdjaxTestDigits(tfds.core.GeneratorBasedBuilder):
    """Some of scikit-learn's digits as pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(digits().train, 40), "test": self._generate_examples(digits().test, 9)}

    def _generate_examples(self, split, count):
        for index in range(count):
            picture = io.BytesIO()
            Image.fromarray(split.inputs[index, ..., 0]).save(picture, "png")
            picture.seek(0)
            yield index, {"image": picture, "label": int(split.labels[index])}


def _rewritten(path, changes):
    """An ArrayRecord file in which some records are others."""
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for index, record in enumerate(records):
        writer.write(changes[index](record) if index in changes else record)
    writer.close()


def _other_picture(record):
    """The same record with a picture of another shape in the place of its own, of as many bytes."""
    begin, end = record.index(b"\x89PNG"), record.index(b"IEND") + 8
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "png")
    return record[:begin] + picture.getvalue().ljust(end - begin, b"\0") + record[end:]


def test_a_corrupt_record_is_named_or_left_out_and_counted(tmp_path, capsys):
    KdjaxTestDigits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = {"name": "tfds:kdjax_test_digits", "data_dir": str(tmp_path)}
    capsys.readouterr()
    whole = sources.load({**config, "corrupt": "skip"})
    assert len(whole.train.labels) == 40 and capsys.readouterr().err == ""
    (path,) = tmp_path.glob("**/*train*")
    torn = lambda record: record[: record.index(b"IDAT") + 8] + b"\0" * 20 + record[record.index(b"IDAT") + 28 :]
    _rewritten(path, {7: torn, 11: _other_picture, 30: torn, 31: lambda record: b"nonsense"})
    with pytest.raises(UserError) as caught:
        sources.load(config)
    said = str(caught.value)
    assert "example 7 of tfds:kdjax_test_digits train (record 7 of kdjax_test_digits-train.array_record-0" in said
    assert "cannot be decoded" in said and "set data.corrupt to skip" in said and said.count(". ") == 0
    left = sources.load({**config, "corrupt": "skip"})
    said = capsys.readouterr().err
    assert said.startswith("kdjax: data.corrupt=skip left out 4 of the 40 records of tfds:kdjax_test_digits train: ")
    assert (
        "example 11 of" in said and "is of shape (4, 4, 1)" in said and said.count("\n") == 1 and "(and 1 more)" in said
    )
    kept = [index for index in range(40) if index not in (7, 11, 30, 31)]
    np.testing.assert_array_equal(left.train.inputs, whole.train.inputs[kept])
    np.testing.assert_array_equal(left.train.labels, whole.train.labels[kept])
    np.testing.assert_array_equal(left.test.inputs, whole.test.inputs)
    with pytest.raises(UserError, match=r"unknown data\.corrupt 'skipp': did you mean 'skip'"):
        sources.load({**config, "corrupt": "skipp"})


def test_a_broken_file_of_a_set_is_named(tmp_path, capsys):
    KdjaxTestDigits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = {"name": "tfds:kdjax_test_digits", "data_dir": str(tmp_path)}
    (path,) = tmp_path.glob("**/*train*")
    _rewritten(path, {})
    content = bytearray(path.read_bytes())
    place = -1
    for _ in range(20):
        place = content.index(b"IDAT", place + 1)
    content[place] ^= 1  # the checksum of ArrayRecord no longer fits
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"example 19 of tfds:kdjax_test_digits train \(record 19 of .*decoded"):
        sources.load(config)
    assert len(sources.load({**config, "corrupt": "skip"}).train.labels) == 39
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="kdjax_test_digits"):
        sources.load(config)
    with pytest.raises(UserError, match="train split of tfds:kdjax_test_digits is empty"):
        sources.validate(sources.load({**config, "corrupt": "skip"}))


def _broken(change):
    images, labels = _arrays()
    split = Split(images, labels.astype(np.int32))
    return change(Dataset("mine", split, split, ("a", "b", "c", "d"), (0.0,) * 3, (1.0,) * 3))


def _with_train(inputs=None, labels=None):
    def change(dataset):
        split = dataset.train
        return dataset._replace(
            train=Split(
                split.inputs if inputs is None else inputs(split.inputs),
                labels(split.labels) if labels else split.labels,
            )
        )

    return change


def _with_domain(domain):
    return lambda dataset: dataset._replace(train=dataset.train._replace(domain=domain.astype(np.int32)))


def _poison(value):
    def change(inputs):
        floats = inputs.astype(np.float32)
        floats[7, 1, 2, 0] = value
        return floats

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_train(lambda x: x[:0], lambda y: y[:0]), "train split of mine is empty"),
        (lambda d: d._replace(test=Split(d.test.inputs[:0], d.test.labels[:0])), "test split of mine is empty"),
        (_with_train(labels=lambda y: np.where(np.arange(20) == 5, 4, y)), "label 4 of example 5.*numbered 0 to 3"),
        (_with_train(labels=lambda y: np.where(np.arange(20) == 6, -2, y)), "label -2 of example 6"),
        (_with_train(labels=lambda y: y[:-1]), "20 inputs, but labels of shape .19,"),
        (_with_train(_poison(np.nan)), "example 7 in the train split of mine holds NaN or Inf"),
        (_with_train(_poison(-np.inf)), "example 7 in the train split of mine holds NaN or Inf"),
        (_with_train(lambda x: x.astype(np.int64)), "int64, not uint8 or float32"),
        (_with_train(lambda x: x[:, :4]), r"train inputs of shape \(4, 6, 3\) and test inputs of shape \(5, 6, 3\)"),
        (lambda d: d._replace(class_names=("only",)), "at least 2"),
        (_with_domain(np.arange(19)), r"20 inputs, but domains of shape \(19,\)"),
        (_with_domain(3 - np.arange(20)), "domain -16 of example 19 in the train split of mine"),
    ],
)
def test_validate_says_what_is_wrong(change, message):
    sources.validate(_broken(lambda dataset: dataset))
    with pytest.raises(UserError, match=message):
        sources.validate(_broken(change))


def test_from_arrays():
    images, labels = _arrays()
    dataset = sources.from_arrays((images, np.where(labels == 1, -1, labels)), (images[:6], labels[:6]))
    assert dataset.train.inputs is images and dataset.class_names == ("0", "1", "2", "3")
    assert dataset.train.labels.dtype == np.int32
    with pytest.raises(UserError, match="float64: give integers"):
        sources.from_arrays((images, labels / 2), (images, labels))
    with pytest.raises(UserError, match="int64: give uint8"):
        sources.from_arrays((images.astype(int), labels), (images, labels))
    with pytest.raises(UserError, match="label 3 of example 3"):
        sources.from_arrays((images, labels), (images, labels), ("a", "b", "c"))
    with_domains = sources.from_arrays((images, labels, labels // 2), (images[:6], labels[:6]))
    assert with_domains.train.domain.dtype == np.int32 and with_domains.test.domain is None
    taken = sources.take(with_domains.train, np.array([5, 3]))
    assert taken.labels.tolist() == [1, 3] and taken.domain.tolist() == [0, 1]
    with pytest.raises(UserError, match="test domains are float64: give integers"):
        sources.from_arrays((images, labels), (images, labels, labels / 2))
    with pytest.raises(UserError, match="train holds 1 arrays"):
        sources.from_arrays((images,), (images, labels))


def test_hidden_labels_are_stratified_nested_and_repeatable():
    labels = np.repeat(np.arange(4, dtype=np.int32), (100, 50, 3, 1))
    few, more = sources.hide_labels(labels, 0.1, seed=3), sources.hide_labels(labels, 0.4, seed=3)
    assert np.bincount(few[few >= 0]).tolist() == [10, 5, 1, 1]
    kept = few >= 0
    np.testing.assert_array_equal(few[kept], labels[kept])
    assert (more[kept] >= 0).all()
    np.testing.assert_array_equal(few, sources.hide_labels(labels, 0.1, seed=3))
    assert (few != sources.hide_labels(labels, 0.1, seed=4)).any()
    np.testing.assert_array_equal(sources.hide_labels(labels, 1.0, seed=3), labels)
    assert (sources.hide_labels(labels, 0.0, seed=3) == -1).all()
    assert (sources.hide_labels(np.full(9, -1, np.int32), 0.5, seed=0) == -1).all()
    with pytest.raises(UserError, match="between 0 and 1"):
        sources.hide_labels(labels, 1.5, seed=0)

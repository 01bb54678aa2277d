"""Data sets in memory: scikit-learn's digits, synthetic images, image sets of TFDS, the user's own arrays."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdjax.data import corrupt
from kdjax.errors import UserError, first_line, unknown
from kdjax.untrusted import parse_json

UNLABELLED = -1
_TFDS = "tfds:"
_CHUNK = 1024  # examples that are worked on at once, so that no second copy of a data set is ever in memory


class Split(NamedTuple):
    """Examples; the id of an example is its index here."""

    inputs: NDArray[Any]  # [n, h, w, c] uint8 or float32
    labels: NDArray[np.int32]  # [n], -1: unlabelled
    domain: NDArray[np.int32] | None = None  # [n], from 0 on: where each example comes from; or its task


class Dataset(NamedTuple):
    """A data set for classification.

    ``mean`` and ``std`` are those of ``train``, per channel (the last axis), with uint8 inputs scaled to [0, 1] and
    float inputs as they are.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(config_data: Mapping[str, Any]) -> Dataset:
    """Loads the data set that ``name`` says: one of ``SOURCES``, or ``tfds:NAME``.

    Args:
      config_data: ``config.data``: ``name``, ``data_dir`` (of TFDS; empty: its default), ``options`` of the source, and
        ``corrupt``: what is done with records that cannot be read (see ``data.corrupt``).

    Raises:
      UserError: an unknown name or option, a TFDS data set that is not prepared, or a corrupt record.
    """
    name, choice = config_data["name"], config_data.get("corrupt", "stop")
    corrupt.check(choice)
    options = dict(config_data.get("options") or {})
    if name.startswith(_TFDS):
        for option in options:
            if option != "domain":
                raise unknown(f"option of the data set {name}", option, ["domain"])
        return _tfds(name, config_data.get("data_dir") or None, choice, **options)
    if name not in SOURCES:
        raise unknown("data set", name, [*SOURCES, f"{_TFDS}NAME"])
    source = SOURCES[name]
    valid = source.__kwdefaults__ or {}
    for option in options:
        if option not in valid:
            raise (
                unknown(f"option of the data set {name}", option, valid)
                if valid
                else UserError(f"data.options.{option}: the data set {name} takes no options, remove it.")
            )
    return source(**options)


def from_arrays(
    train: Sequence[ArrayLike],
    test: Sequence[ArrayLike],
    class_names: Sequence[str] | None = None,
    *,
    name: str = "arrays",
) -> Dataset:
    """A data set of the user's own arrays.

    Args:
      train: (inputs [n, h, w, c], labels [n]), or with the number of each example's domain [n] as a third; uint8 inputs
        are not copied, floating ones become float32. Other shapes than images work with models that take them. Label
        -1: unlabelled.
      test: the same, for evaluation.
      class_names: one name per class; numbers up to the largest label where not given.
      name: what reports call the data set.

    Raises:
      UserError: whatever ``validate`` finds.
    """
    splits = []
    for where, arrays in (("train", train), ("test", test)):
        if len(arrays) not in (2, 3):
            raise UserError(f"{where} holds {len(arrays)} arrays: give (inputs, labels) or (inputs, labels, domain).")
        splits.append(as_split(*arrays, where=where))
    if class_names is None:
        highest = max((int(split.labels.max()) for split in splits if split.labels.size), default=-1)
        class_names = [str(label) for label in range(highest + 1)]
    dataset = _with_statistics(name, splits[0], splits[1], tuple(class_names))
    validate(dataset)
    return dataset


def as_split(
    inputs: ArrayLike, labels: ArrayLike | None = None, domain: ArrayLike | None = None, *, where: str = "train"
) -> Split:
    """The user's arrays as a split, which messages call ``where``; without labels, every example is unlabelled."""
    x = _as_inputs(inputs, where)
    y = np.full(len(x), UNLABELLED, np.int32) if labels is None else _as_labels(labels, where)
    return Split(x, y, None if domain is None else _as_domain(domain, where))


def take(split: Split, ids: NDArray[Any]) -> Split:
    """The examples of these ids, in this order."""
    return Split(split.inputs[ids], split.labels[ids], None if split.domain is None else split.domain[ids])


def validate(dataset: Dataset) -> None:
    """Refuses what training would choke on.

    Raises:
      UserError: an empty split, shapes that do not fit together, a label out of range, or NaN or Inf in the inputs.
    """
    classes = len(dataset.class_names)
    if classes < 2:
        raise UserError(f"data set {dataset.name} has {classes} class(es): classification needs at least 2.")
    for where, split in (("train", dataset.train), ("test", dataset.test)):
        check_split(split, classes, f"the {where} split of {dataset.name}")
    shapes = dataset.train.inputs.shape[1:], dataset.test.inputs.shape[1:]
    if shapes[0] != shapes[1]:
        raise UserError(f"{dataset.name} has train inputs of shape {shapes[0]} and test inputs of shape {shapes[1]}.")


def check_split(split: Split, classes: int, what: str) -> None:
    """What ``validate`` checks of one split, which messages call ``what``."""
    inputs, labels, domain = split
    if not len(inputs):
        raise UserError(f"{what} is empty: it needs at least one example.")
    if inputs.ndim < 2 or 0 in inputs.shape:
        raise UserError(f"inputs of {what} have shape {inputs.shape}, not [n, h, w, c].")
    if inputs.dtype not in (np.uint8, np.float32):
        raise UserError(f"inputs of {what} are {inputs.dtype}, not uint8 or float32.")
    if labels.shape != inputs.shape[:1]:
        raise UserError(f"{what} has {len(inputs)} inputs, but labels of shape {labels.shape}: give one per example.")
    wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= classes))
    if wrong.size:
        raise UserError(
            f"label {labels[wrong[0]]} of example {wrong[0]} in {what} is out of range: {classes} classes are numbered "
            f"0 to {classes - 1}, and {UNLABELLED} means unlabelled."
        )
    if domain is not None:
        if domain.shape != inputs.shape[:1]:
            raise UserError(f"{what} has {len(inputs)} inputs, but domains of shape {domain.shape}: give one each.")
        if domain.min() < 0:
            raise UserError(
                f"domain {domain.min()} of example {domain.argmin()} in {what}: domains are numbered from 0."
            )
    _check_finite(inputs, what)


def check_routes(dataset: Dataset, teachers: Sequence[str]) -> None:
    """Refuses data whose domains do not say which of these teachers to ask about each example.

    Raises:
      UserError: a split without domains, or a domain that has no teacher.
    """
    for where, split in (("train", dataset.train), ("test", dataset.test)):
        if split.domain is None:
            raise UserError(
                f'teacher.combine="routed" asks the teacher of each example\'s domain, and the {where} split of '
                f"{dataset.name} has no domains: give them with the data (data.options), or combine otherwise."
            )
        if split.domain.max() >= len(teachers):
            raise UserError(
                f"domain {split.domain.max()} of example {split.domain.argmax()} in the {where} split of "
                f"{dataset.name} has no teacher: there are {len(teachers)} ({', '.join(teachers)}), counted from 0."
            )


def hide_labels(labels: NDArray[np.int32], share: float, seed: int) -> NDArray[np.int32]:
    """Keeps ``share`` of each class's labels (rounded, at least one of each class) and makes the rest -1.

    With the same seed, a smaller share keeps a subset of what a larger one keeps. A share of 0 hides all.

    Args:
      labels: [n] int32.
      share: in [0, 1].
      seed: chooses which; the same arguments always give the same result.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"a share of labels is between 0 and 1, not {share}.")
    hidden = np.full_like(labels, UNLABELLED)
    if share == 0.0:
        return hidden
    for label in np.unique(labels[labels != UNLABELLED]):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        hidden[order[: max(round(share * len(members)), 1)]] = label
    return hidden


def _digits() -> Dataset:
    """The 1,797 scans of 8 x 8 pixels of scikit-learn; 4/5 of each class for training, the same for all seeds."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

    images, labels = load_digits(return_X_y=True)
    # Values 0 ... 16 as uint8 over its whole range, as other image sets have them; 17 values stay 17 values.
    inputs = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    in_test = hide_labels(labels, 0.2, seed=0) != UNLABELLED
    train, test = Split(inputs[~in_test], labels[~in_test]), Split(inputs[in_test], labels[in_test])
    return _with_statistics("digits", train, test, tuple(str(digit) for digit in range(10)))


def _synthetic(
    *, shape: Sequence[int] = (32, 32, 3), classes: int = 10, examples: int = 512, domains: int = 1, seed: int = 0
) -> Dataset:
    """Images of any size that can be learnt: a coarse pattern per class, under noise. A quarter as many to test.

    With several domains, each class has a pattern in each of them, and an example tells its domain."""
    if len(shape) != 3 or min(shape) < 1 or classes < 2 or examples < 1 or domains < 1:
        raise UserError(
            f"data.options of synthetic: shape={tuple(shape)}, classes={classes}, examples={examples}, "
            f"domains={domains}, but shape is (height, width, channels), with at least 2 classes, 1 example, 1 domain."
        )
    height, width, channels = shape
    rng = np.random.default_rng(seed)
    patterns = rng.normal(128.0, 48.0, (domains * classes, 4, 4, channels)).astype(np.float32)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width

    def make(count: int) -> Split:
        kinds = rng.permutation(np.arange(count, dtype=np.int32) % (domains * classes))
        inputs = np.empty((count, height, width, channels), np.uint8)
        for first in range(0, count, 64):
            clean = patterns[kinds[first : first + 64]][:, rows][:, :, columns]
            noisy = clean + 32.0 * rng.standard_normal(clean.shape, np.float32)
            inputs[first : first + 64] = noisy.clip(0, 255)
        return Split(inputs, kinds % classes, kinds // classes if domains > 1 else None)

    names = tuple(str(label) for label in range(classes))
    return _with_statistics("synthetic", make(examples), make(max(examples // 4, 1)), names)


def _tfds(name: str, data_dir: str | None, choice: str, domain: str = "") -> Dataset:
    """An image classification set that TFDS has prepared as ArrayRecord files: read without TensorFlow.

    ``domain`` names the feature that says where an example comes from; none where it is empty."""
    builder = prepared(name, data_dir)
    image, label = _image_and_label(name, builder.info)
    if domain:
        _check_domain_feature(name, builder.info, domain)
    shape, classes = builder.info.features[image].shape, builder.info.features[label].num_classes
    train, test = (
        _read(source, image, label, domain, shape, classes, f"{name} {where}", choice)
        for where, source in zip(("train", "test"), opened(name, builder), strict=True)
    )
    return _with_statistics(name, train, test, tuple(builder.info.features[label].names))


def prepared(name: str, data_dir: str | None) -> Any:
    """The builder of the data set ``tfds:NAME``, which TFDS has prepared.

    Raises:
      UserError: there is none of that name, or it is not prepared.
    """
    import tensorflow_datasets as tfds  # slow to import, and only these sources need it

    short = name.removeprefix(_TFDS)
    where = _place(data_dir)
    if not _NAME.fullmatch(short):  # a namespace before it would fetch code of that community and run it
        raise UserError(f"{name} is no name of a data set: write {_TFDS}NAME, {_TFDS}NAME/CONFIG or NAME:VERSION.")
    _refuse_foreign_features(name, short, data_dir)
    try:
        builder = tfds.builder(short, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"unknown data set {name}: neither tensorflow-datasets nor {where} has {short!r}.") from None
    except Exception as error:  # its files of JSON are read here
        reason = first_line(error)[:160]
        raise UserError(f"data set {name} in {where} cannot be opened ({reason}); {_remedy(short)}.") from error
    # Asked first, since reading an absent data set would try to download it.
    if not builder.info.splits:
        raise UserError(f"data set {name} is not prepared in {where}; {_remedy(short)}.")
    return builder


def _refuse_foreign_features(name: str, short: str, data_dir: str | None) -> None:
    """Refuses a prepared set with features of other packages: TFDS would import whatever its files name."""
    from tensorflow_datasets.core.utils import file_utils

    for place in file_utils.list_data_dirs(given_data_dir=data_dir):
        for path in (Path(place) / re.split("[/:]", short)[0]).glob("**/features.json"):
            try:
                named = _classes(parse_json(path.read_bytes()))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}): prepare {name} again.") from error
            for kind in named:
                if not kind.startswith("tensorflow_datasets.core.features."):
                    raise UserError(f"{path} asks for the class {kind} to be run: prepare {name} again.")


def _classes(features: Any) -> list[str]:
    """Every class that a ``features.json`` names, at any depth."""
    inner = features.values() if isinstance(features, dict) else features if isinstance(features, list) else ()
    own = (
        [features[key] for key in _CLASS_KEYS if isinstance(features.get(key), str)]
        if isinstance(features, dict)
        else []
    )
    return own + [kind for value in inner for kind in _classes(value)]


_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_NAME = re.compile(r"[A-Za-z_]\w*(/(?!\.)[\w.+-]+)?(:[\d*]+(\.[\d*]+)*)?")


def opened(name: str, builder: Any) -> list[Any]:
    """The examples of its splits train and test (or validation), read without TensorFlow.

    Raises:
      UserError: it has no such splits, or is not in the ArrayRecord format.
    """
    test = next((split for split in ("test", "validation") if split in builder.info.splits), None)
    if "train" not in builder.info.splits or test is None:
        raise UserError(f"data set {name} has the splits {', '.join(builder.info.splits)}: train and test are needed.")
    try:
        return [builder.as_data_source(split=split) for split in ("train", test)]
    except NotImplementedError:
        short = name.removeprefix(_TFDS)
        where = builder.data_dir
        raise UserError(f"data set {name} in {where} is not in the ArrayRecord format; {_remedy(short)}.") from None


def _place(data_dir: str | None) -> str:
    return f"data_dir={data_dir}" if data_dir else "the default data_dir (set data.data_dir if it lies elsewhere)"


def _remedy(short: str) -> str:
    return (
        "prepare it once: pip install 'kdjax[tfds]', then in Python tensorflow_datasets.builder("
        f"{short!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    )


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    keys = info.supervised_keys or ("image", "label")
    kinds = [type(info.features[key]) if isinstance(key, str) and key in info.features else None for key in keys]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
        raise UserError(f"{name} is not a set of images with one class label each: it has {', '.join(info.features)}.")
    image = info.features[keys[0]]
    if None in image.shape:
        raise UserError(f"images of {name} vary in size (shape {image.shape}): prepare a set with all of one size.")
    if image.np_dtype != np.uint8:
        raise UserError(f"images of {name} are {image.np_dtype}: only uint8 images can be read.")
    return keys


def _check_domain_feature(name: str, info: Any, domain: str) -> None:
    if domain not in info.features:
        raise unknown(f"feature of {name} (data.options.domain)", domain, info.features)
    feature = info.features[domain]
    if feature.shape != () or not np.issubdtype(feature.np_dtype, np.integer):
        raise UserError(
            f"data.options.domain={domain!r}: that feature of {name} is {np.dtype(feature.np_dtype)} of shape "
            f"{feature.shape}, and a domain is one integer."
        )


def place_of(source: Any, index: int) -> str:
    """The file of a TFDS split that an example is in, and its place there; for messages."""
    for part in source.dataset_info.splits[source.split].file_instructions:
        if index < part.take:
            return f"record {part.skip + index} of {Path(part.filename).name}"
        index -= part.take
    return "beyond its files"


def decoded(source: Any, index: int, what: str) -> Any:
    """An example of a TFDS split, which messages call ``what``.

    Raises:
      UserError: its record cannot be read or decoded.
    """
    try:
        return source[index]
    except Exception as error:  # of ArrayRecord, protocol buffers, TFDS or the decoder of pictures
        reason = first_line(error)[:160]
        raise UserError(
            f"example {index} of {what} ({place_of(source, index)}) cannot be decoded ({reason}): {REMEDY}."
        ) from error


REMEDY = "prepare the data set again, or set data.corrupt to skip"


def _read(
    source: Any, image: str, label: str, domain: str, shape: tuple[int, ...], classes: int, what: str, choice: str
) -> Split:
    """Decodes a whole split into memory; decoding releases Python's lock, so that threads share the work."""
    count = len(source)
    inputs = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    domains = np.empty(count, np.int32) if domain else None

    def put(index: int, example: Any) -> None:
        found, number = example[image], example[label]
        if found.shape != shape or not UNLABELLED <= number < classes:
            wrong = f"has label {number} of {classes} classes" if found.shape == shape else f"is of shape {found.shape}"
            where = f"example {index} of {what} ({place_of(source, index)})"
            raise UserError(f"{where} {wrong}, and its images are {shape}: {REMEDY}.")
        inputs[index], labels[index] = found, number
        if domains is not None:
            domains[index] = example[domain]

    def read(first: int) -> dict[int, str]:
        """Reads a chunk, and says what is wrong with which of its examples."""
        ids = range(first, min(first + _CHUNK, count))
        try:
            for index, example in zip(ids, source.__getitems__(list(ids)), strict=True):
                put(index, example)
            return {}
        except Exception:  # one by one, to find which
            faults = {}
            for index in ids:
                try:
                    put(index, decoded(source, index, what))
                except UserError as error:
                    if choice != "skip":
                        raise
                    faults[index] = str(error)
            return faults

    faults: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        for found in pool.map(read, range(0, count, _CHUNK)):
            faults |= found
    corrupt.tell([*faults.values()], count, what)
    split = Split(inputs, labels, domains)
    return take(split, np.setdiff1d(np.arange(count), [*faults])) if faults else split


def _with_statistics(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    mean, std = _statistics(train.inputs)
    return Dataset(name, train, test, class_names, mean, std)


def _statistics(inputs: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, in float64; a constant channel gets deviation 1, to divide by."""
    channels = inputs.shape[-1]
    scale = 255.0 if inputs.dtype == np.uint8 else 1.0
    total, count = np.zeros(channels), max(inputs.size // max(channels, 1), 1)
    squares = np.zeros(channels)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are reported by validate
        for first in range(0, len(inputs), _CHUNK):
            total += (inputs[first : first + _CHUNK].reshape(-1, channels) / scale).sum(axis=0, dtype=np.float64)
        mean = total / count
        for first in range(0, len(inputs), _CHUNK):
            centred = inputs[first : first + _CHUNK].reshape(-1, channels) / scale - mean
            squares += np.square(centred).sum(axis=0)
        std = np.sqrt(squares / count)
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def _as_inputs(values: ArrayLike, where: str) -> NDArray[Any]:
    inputs = np.asarray(values)
    if inputs.dtype == np.uint8:
        return inputs
    if np.issubdtype(inputs.dtype, np.floating):
        return inputs.astype(np.float32, copy=False)
    raise UserError(f"{where} inputs are {inputs.dtype}: give uint8 (0 to 255) or floating-point values.")


def _as_labels(values: ArrayLike, where: str) -> NDArray[np.int32]:
    labels = np.asarray(values)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where} labels are {labels.dtype}: give integers from 0 on, {UNLABELLED} for unlabelled.")
    return labels.astype(np.int32, copy=False)


def _as_domain(values: ArrayLike, where: str) -> NDArray[np.int32]:
    domain = np.asarray(values)
    if not np.issubdtype(domain.dtype, np.integer):
        raise UserError(f"{where} domains are {domain.dtype}: give integers from 0 on.")
    return domain.astype(np.int32, copy=False)


def _check_finite(inputs: NDArray[Any], what: str) -> None:
    if inputs.dtype == np.uint8:
        return
    for first in range(0, len(inputs), _CHUNK):
        part = inputs[first : first + _CHUNK].reshape(len(inputs[first : first + _CHUNK]), -1)
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if bad.size:
            raise UserError(f"example {first + bad[0]} in {what} holds NaN or Inf: remove or mend it.")


SOURCES: dict[str, Callable[..., Dataset]] = {"digits": _digits, "synthetic": _synthetic}

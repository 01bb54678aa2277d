"""The test split as the models are given it: real examples to time, and all of them to score.

Dimensions: n examples, t tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.data.packing import TextSplit, target_mask
from kdjax.errors import UserError, unknown
from kdjax.experiment import TASKS


class Examples(NamedTuple):
    """The test split of a task."""

    task: str
    name: str  # of the data set
    classes: int  # or the size of the vocabulary
    timed: np.ndarray  # [n, ...], the data set's own values
    test: np.ndarray  # [n, ...], what is scored
    labels: np.ndarray  # [n] or [n, t] int32, -1: none
    bytes: np.ndarray | None = None  # [n] of text, UTF-8 bytes that the labels of each row cover
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


def config_of(data: Mapping[str, Any]) -> ConfigDict:
    """A config for the data that a manifest names under ``data``: the task, and the values of ``config.data``."""
    config = configs.default()
    config.task = data["task"]
    with config.data.unlocked():
        config.data.update({key: value for key, value in data.items() if key != "task"})
    return configs.resolve(config)


def load(config: ConfigDict, dataset: Any = None) -> Examples:
    """The test split of a config's data, or of a data set in memory.

    Raises:
      UserError: an unknown task, or whatever loading the data raises.
    """
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    dataset = TASKS[config.task].load(config, dataset)
    if config.task == "language":
        inputs, labels, covered = rows_of(dataset.test)
        timed = np.asarray(dataset.test.tokens[:, :-1], np.int32)
        return Examples("language", config.data.name, dataset.tokenizer.size, timed, inputs, labels, covered)
    test = dataset.test
    return Examples(
        config.task, dataset.name, len(dataset.class_names), test.inputs, test.inputs,
        np.asarray(test.labels, np.int32), None, dataset.mean, dataset.std,
    )  # fmt: skip


def rows_of(split: TextSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows taken apart into their documents: inputs and labels [n, t] int32, filled up with 0 and -1 at the end, and
    the UTF-8 bytes [n] int64 that the labels of a row cover.

    A deployed model takes tokens alone, and a window of several documents would show it one beside the next. A row of
    its own shows a document as ``tasks.language.make_evaluate`` does: itself, from position 0. Rows without a target
    are left out.
    """
    labels = np.where(target_mask(split), split.tokens[:, 1:].astype(np.int32), -1)
    covered = np.where(labels >= 0, split.bytes[:, 1:], 0)
    inputs_n, labels_n, bytes_n = [], [], []
    for tokens, targets, sizes, documents in zip(
        split.tokens[:, :-1], labels, covered, split.segments[:, :-1], strict=True
    ):
        for number in np.unique(documents[documents > 0]):
            inside = documents == number
            if (targets[inside] >= 0).any():
                rest = len(tokens) - int(inside.sum())
                inputs_n.append(np.pad(tokens[inside].astype(np.int32), (0, rest)))
                labels_n.append(np.pad(targets[inside], (0, rest), constant_values=-1))
                bytes_n.append(int(sizes[inside].sum()))
    return np.stack(inputs_n), np.stack(labels_n), np.array(bytes_n)


def prepared(values: np.ndarray, examples: Examples, ways: Sequence[str], dtype: str) -> np.ndarray:
    """The data set's values as a file wants them: pixels scaled to [0, 1] or normalised by the training split's mean
    and deviation, channels first, in its dtype."""
    if examples.task == "language":
        if ways:
            raise UserError(f"tokens are taken as they are: leave out :{','.join(ways)}.")
        return values.astype(dtype or "int64", copy=False)
    if {"scaled", "normalised"} & set(ways) and values.dtype == np.uint8:
        values = values.astype(np.float32) / np.float32(255)
    elif "scaled" in ways:
        raise UserError(f"the images of {examples.name} are {values.dtype} and not 0 to 255: leave out :scaled.")
    if "normalised" in ways:
        mean, std = (np.asarray(part, np.float32) for part in (examples.mean, examples.std))
        values = (values.astype(np.float32) - mean) / std
    if "nchw" in ways:
        values = np.moveaxis(values, -1, 1)
    dtype = dtype or "float32"
    if values.dtype.kind == "f" and np.dtype(dtype).kind != "f":
        raise UserError(f"the images of {examples.name} are {values.dtype} here and the file takes {dtype}.")
    return np.ascontiguousarray(values, dtype)


def check_shape(examples: Examples, inputs: np.ndarray, shape: Sequence[str | int] | None) -> None:
    """Raises a UserError where a file's inputs are of another shape than the data's; names stand for any size."""
    given = inputs.shape[1:]
    if not shape:
        return
    own = tuple(shape[1:])
    if len(own) != len(given) or any(isinstance(a, int) and a != b for a, b in zip(own, given, strict=True)):
        turned = len(own) == 3 and examples.task != "language" and own == (given[-1], *given[:-1])
        remedy = "add :nchw to its name" if turned else "measure it on the data that it was made for"
        raise UserError(
            f"it takes {_text(own)} of each example and the data {examples.name} has {_text(given)}: {remedy}."
        )
    if isinstance(shape[0], int) and shape[0] != 1:
        raise UserError(f"it takes batches of {shape[0]} alone: export it for any batch, or for a batch of 1.")


def check_logits(examples: Examples, inputs: np.ndarray, shape: Sequence[int]) -> None:
    """Raises a UserError where the logits of a batch of 1 are not one per class, for every place that has a label."""
    places = (1, inputs.shape[1]) if examples.task == "language" else (1,)
    if tuple(shape[:-1]) != places or (examples.task != "language" and shape[-1] != examples.classes):
        raise UserError(
            f"it gives {_text(shape)} and {_text((*places, examples.classes))} are the logits of one example of "
            f"{examples.name}: measure it on the data that it was made for."
        )


def _text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

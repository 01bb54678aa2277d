"""The order of examples: a batch depends on the seed, its step and the batch size alone, so any step can be begun at.

All arrays are NumPy's, on the host. With several processes each gets its block of the global batch, in the order in
which ``jax.make_array_from_process_local_data`` joins blocks: the global batch is the same for any number of processes.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from grain.experimental import index_shuffle
from numpy.typing import NDArray

from kdjax.data.packing import TextSplit
from kdjax.data.sources import UNLABELLED, Split
from kdjax.errors import UserError, unknown

Batch = dict[str, NDArray[Any]]
_KEYS = ("inputs", "labels", "id", "epoch", "domain", "mask")


def train_batches(
    split: Split | TextSplit,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless batches of ever reshuffled epochs, from step ``start_step`` on.

    The j-th example of step s is the (s * batch_size + j)-th of the run; a batch runs on over the end of an epoch, so
    that no example is dropped, and a batch may be larger than the split.

    Args:
      split: the examples.
      batch_size: of the global batch, over all processes.
      seed: of the order; at least 0.
      start_step: the first step to give; to resume, the step of the checkpoint.
      process_index: which block of each batch to give.
      process_count: into how many equal blocks a batch is cut.

    Returns:
      Batches of the split's arrays by their names (``inputs`` [b, ...], ``labels`` and, where there is one, ``domain``,
      int32 [b]; those of ``TextSplit`` for text), ``id`` (index in the split) and ``epoch``, int32 [b].

    Raises:
      UserError: an empty split, or a batch size that the process count does not divide.
    """
    block = block_of(split, batch_size, process_index, process_count)
    if seed < 0:
        raise UserError(f"seed={seed}: give a seed of at least 0.")

    def batches() -> Iterator[Batch]:
        step = start_step
        while True:
            ids, epochs = order(length(split), seed, step * batch_size + block.start, block.stop - block.start)
            yield gather(split, ids, epochs)
            step += 1

    return batches()


def order(examples: int, seed: int, first: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids and epochs, int32 [count] each, of the elements ``first``, ``first + 1``, ... of a run over ``examples``.

    They are the elements of ``grain.MapDataset.range(examples).shuffle(seed=s).repeat()``, with s drawn from the seed
    so that the epochs of neighbouring seeds are unrelated. Grain's permutation is computed for one index at a time, so
    nothing is stored and any place can be begun at; called directly it takes a third of the time of ``MapDataset``.
    """
    base = int(np.random.SeedSequence(seed).generate_state(1)[0])
    epochs, places = np.divmod(np.arange(first, first + count), examples)
    seeds = (base + epochs) % 2**32
    pairs = zip(places.tolist(), seeds.tolist(), strict=True)
    ids = [index_shuffle(place, examples - 1, epoch_seed, 4) for place, epoch_seed in pairs]  # 4 rounds, as MapDataset
    return np.array(ids, np.int32), epochs.astype(np.int32)


def eval_batches(
    split: Split | TextSplit, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The examples once, in order. The last batch is filled up with copies of example 0 whose ``mask`` is 0.

    Args and errors are those of ``train_batches``.

    Returns:
      Batches as those of ``train_batches`` (epoch 0), and ``mask``, float32 [b]: 1 for a real example, 0 for padding.
    """
    block = block_of(split, batch_size, process_index, process_count)
    examples = length(split)

    def batches() -> Iterator[Batch]:
        for first in range(0, examples, batch_size):
            places = np.arange(first + block.start, first + block.stop)
            mask = places < examples
            ids = np.where(mask, places, 0).astype(np.int32)
            yield {**gather(split, ids, np.zeros_like(ids)), "mask": mask.astype(np.float32)}

    return batches()


def from_iterable(iterable: Iterable[Any], *, repeat: bool = False) -> Iterator[Batch]:
    """Batches from whatever the user iterates over, such as a list or another library's loader.

    Args:
      iterable: of ``(inputs, labels)`` pairs or of dicts with ``inputs`` and any of ``labels`` (absent: -1,
        unlabelled), ``id`` (absent: counted from 0 through each pass), ``epoch`` (absent: the number of the pass),
        ``domain`` and ``mask``; the last two in all batches or in none.
        Give ``id`` where the order changes from pass to pass and anything is keyed by example.
      repeat: begin anew at the end; the iterable must then be one that can be walked over repeatedly.

    Returns:
      Batches as those of ``train_batches``.

    Raises:
      UserError: on reaching a batch that is neither pair nor dict, or whose shapes or types do not fit.
    """
    shape: tuple[int, ...] | None = None
    keys: list[str] | None = None
    epoch = 0
    while True:
        seen = 0
        for number, raw in enumerate(iterable):
            batch = _normalised(raw, number, seen, epoch)
            found = batch["inputs"].shape[1:]
            shape = shape or found
            if found != shape:
                raise UserError(f"batch {number} has inputs of shape {found}, and those before it have {shape}.")
            keys = keys or [*batch]
            if [*batch] != keys:
                raise UserError(f"batch {number} has {', '.join(batch)}, and those before it {', '.join(keys)}.")
            seen += len(batch["labels"])
            yield batch
        if not seen:
            again = ": it can be walked over only once, so give a list or a loader" if epoch else ""
            raise UserError(f"the iterable of batches gave nothing in pass {epoch}{again}.")
        if not repeat:
            return
        epoch += 1


def length(split: Split | TextSplit) -> int:
    """The number of examples."""
    return len(split[0])


def block_of(split: Split | TextSplit, batch_size: int, process_index: int, process_count: int) -> slice:
    """The places in a global batch that a process has; errors are those of ``train_batches``."""
    if not length(split):
        raise UserError("there are no examples to make batches of: the split is empty.")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch size {batch_size} is not divisible by {process_count} process(es): choose a multiple.")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def gather(split: Split | TextSplit, ids: NDArray[np.int32], epochs: NDArray[np.int32]) -> Batch:
    """The examples of these ids as a batch; ``ids`` and ``epochs`` are int32 [b]."""
    found = {name: array[ids] for name, array in split._asdict().items() if array is not None}
    return {**found, "id": ids, "epoch": epochs}


def _normalised(raw: Any, number: int, seen: int, epoch: int) -> Batch:
    if isinstance(raw, tuple | list) and len(raw) == 2:
        raw = {"inputs": raw[0], "labels": raw[1]}
    if not isinstance(raw, Mapping) or "inputs" not in raw:
        raise UserError(f"batch {number} is a {type(raw).__name__}: give (inputs, labels) or a dict of the two.")
    for key in raw:
        if key not in _KEYS:
            raise unknown("batch key", key, _KEYS)
    inputs = np.asarray(raw["inputs"])
    if inputs.ndim < 2 or not len(inputs):
        raise UserError(f"batch {number} has inputs of shape {inputs.shape}: give [batch, ...], not empty.")
    if inputs.dtype != np.uint8:
        if not np.issubdtype(inputs.dtype, np.floating):
            raise UserError(f"batch {number} has {inputs.dtype} inputs: give uint8 (0 to 255) or floats.")
        inputs = inputs.astype(np.float32, copy=False)
    size = len(inputs)
    ids = np.arange(seen, seen + size)
    given = {"labels": np.full(size, UNLABELLED), "id": ids, "epoch": np.full(size, epoch), **raw, "inputs": inputs}
    batch = {"inputs": inputs}
    for key in _KEYS[1:]:
        if key not in given:
            continue
        value = np.asarray(given[key])
        if value.shape != (size,):
            raise UserError(f"batch {number} has {size} inputs, but {key} of shape {value.shape}: give one each.")
        if key != "mask" and not np.issubdtype(value.dtype, np.integer):
            raise UserError(f"batch {number} has {key} of type {value.dtype}: give integers.")
        batch[key] = value.astype(np.float32 if key == "mask" else np.int32, copy=False)
    return batch

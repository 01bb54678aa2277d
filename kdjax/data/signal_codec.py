"""A teacher's signals of one window as bytes, and back; ``data.cache`` keeps them in files and says how they lie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdjax.errors import UserError

COUNT_BITS = 6  # of how often a class was drawn, beside its id
MOST_DRAWS = 2**COUNT_BITS - 1

Signals = dict[str, NDArray[Any]]


def encode_top_k(
    ids: ArrayLike, log_probs: ArrayLike, log_rest: ArrayLike, log_sum: ArrayLike, *, vocabulary: int
) -> bytes:
    """The payload of one example of the form ``top_k``.

    Args:
      ids: int [t, k], classes.
      log_probs: float [t, k]; stored as float16, so within 2^-11 of themselves (relative), -inf below -65,504.
      log_rest: float [t], of all other classes together.
      log_sum: float [t], log-sum-exp of the raw logits: log_probs + log_sum are logits again.
      vocabulary: the number of classes.
    """
    with np.errstate(over="ignore"):
        half = np.asarray(log_probs, "<f4").astype("<f2")
    rest = [np.asarray(x, "<f4").tobytes() for x in (log_rest, log_sum)]
    return b"".join([_packed(ids, bytes_of_id(vocabulary)), half.tobytes(), *rest])


def decode_top_k(payloads: Sequence[bytes], *, positions: int, k: int, vocabulary: int) -> Signals:
    """The signals of some examples of the form ``top_k``.

    Returns:
      ``ids`` int32 [b, t, k], ``log_probs`` float32 [b, t, k], ``log_rest`` and ``log_sum`` float32 [b, t].
    """
    batch, places, width = len(payloads), positions * k, bytes_of_id(vocabulary)
    raw = np.frombuffer(b"".join(payloads), np.uint8).reshape(batch, -1)
    sizes = [places * width, places * 2, positions * 4]
    ids, half, log_rest, log_sum = (np.ascontiguousarray(x) for x in np.split(raw, np.cumsum(sizes), axis=1))
    return {
        "ids": _unpacked(ids, width).astype(np.int32).reshape(batch, positions, k),
        "log_probs": half.view("<f2").astype(np.float32).reshape(batch, positions, k),
        "log_rest": log_rest.view("<f4").astype(np.float32),
        "log_sum": log_sum.view("<f4").astype(np.float32),
    }


def encode_sample(ids: ArrayLike, log_probs: ArrayLike, *, samples: int, vocabulary: int) -> bytes:
    """The payload of one example of the form ``sample``.

    Args:
      ids: int [t, s], the distinct classes drawn.
      log_probs: float [t, s], log(count / samples); -inf where a place is empty.
      samples: how many were drawn, at most 63.
      vocabulary: the number of classes.
    """
    counts = np.rint(np.exp(np.asarray(log_probs, np.float64)) * samples).astype(np.uint32)
    there = counts > 0
    entries = np.asarray(ids).astype(np.uint32)[there] << COUNT_BITS | counts[there]
    return there.sum(-1).astype(np.uint8).tobytes() + _packed(entries, bytes_of_entry(vocabulary))


def decode_sample(payloads: Sequence[bytes], *, positions: int, samples: int, vocabulary: int) -> Signals:
    """The signals of some examples of the form ``sample``; places beyond the distinct classes are id 0 and -inf.

    Returns:
      ``ids`` int32 [b, t, samples], ``log_probs`` float32 [b, t, samples], ``log_rest`` float32 [b, t], all -inf.
    """
    heads = b"".join(payload[:positions] for payload in payloads)
    distinct = np.frombuffer(heads, np.uint8).reshape(len(payloads), positions)
    tails = b"".join(payload[positions:] for payload in payloads)
    entries = _unpacked(np.frombuffer(tails, np.uint8), bytes_of_entry(vocabulary))
    there = np.arange(samples) < distinct[..., None]
    log_counts = np.log(np.maximum(np.arange(MOST_DRAWS + 1), 1) / samples).astype(np.float32)
    ids = np.zeros(there.shape, np.int32)
    log_probs = np.full(there.shape, -np.inf, np.float32)
    ids[there] = entries >> COUNT_BITS
    log_probs[there] = log_counts[entries & MOST_DRAWS]
    return {"ids": ids, "log_probs": log_probs, "log_rest": np.full(distinct.shape, -np.inf, np.float32)}


def samples_within(log_probs: ArrayLike, bytes_per_token: float = 40.0, most: int = 50) -> int:
    """The largest number of draws N whose payloads keep to a budget, for a teacher's distributions at some positions.

    The expected number of distinct classes among N draws is Σ_i 1 - (1 - p_i)^N, so the expected size of a token is
    1 + 3 (or 4) times the mean of that over the positions. The framing of the files comes on top.

    Args:
      log_probs: float [..., classes], of all classes.
      bytes_per_token: the budget.
      most: the largest answer, at most 63.

    Raises:
      UserError: not even one draw fits, or ``most`` is not in 1..63.
    """
    if not 1 <= most <= MOST_DRAWS:
        raise UserError(
            f"a sample has at most {MOST_DRAWS} draws and at least 1, not {most}: choose a number of those."
        )
    p = np.clip(np.exp(np.asarray(log_probs, np.float64)), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        log_missed = np.log1p(-p)
    positions, size = math.prod(p.shape[:-1]), bytes_of_entry(p.shape[-1])
    # The size grows with N: the last N within the budget is found by bisection.
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        draws = (fits + too_many) // 2
        distinct = -np.expm1(draws * log_missed).sum() / positions
        within = 1 + size * distinct <= bytes_per_token * (1 + 1e-6)  # the probabilities are rounded
        fits, too_many = (draws, too_many) if within else (fits, draws)
    if not fits:
        raise UserError(f"{bytes_per_token} bytes a token do not hold one draw: give at least {1 + size}.")
    return fits


def bytes_of_id(vocabulary: int) -> int:
    """Of an id of ``top_k``."""
    return 2 if vocabulary <= 2**16 else 3


def bytes_of_entry(vocabulary: int) -> int:
    """Of an id of ``sample`` with its count."""
    return 3 if vocabulary <= 2 ** (24 - COUNT_BITS) else 4


def _packed(numbers: ArrayLike, width: int) -> bytes:
    """The low bytes of unsigned numbers."""
    return np.ascontiguousarray(numbers, "<u4")[..., None].view(np.uint8)[..., :width].tobytes()


def _unpacked(raw: NDArray[np.uint8], width: int) -> NDArray[np.uint32]:
    """The numbers, in one row, of which `_packed` made the bytes."""
    if width in (2, 4):
        return raw.reshape(-1).view(f"<u{width}").astype(np.uint32, copy=False)
    numbers = np.zeros((raw.size // width, 4), np.uint8)
    numbers[:, :width] = raw.reshape(-1, width)
    return numbers.reshape(-1).view("<u4")

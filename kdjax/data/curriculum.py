"""A curriculum: batches from the easiest examples alone, then from ever more, then from all of them.

Bengio et al. 2009, "Curriculum learning"; Hacohen & Weinshall 2019, "On the power of curriculum learning in training
deep networks", algorithm 1: examples are ranked once by a scoring function, and a pacing function says how many of them
a step may draw from. As in ``pipeline``, a batch is a pure function of the seed, its step and the scores, so any step
can be begun at.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdjax.data import pipeline
from kdjax.data.sources import Split
from kdjax.errors import UserError, unknown

PACINGS = ("none", "linear", "root", "step")
ORDERS = ("easy_first", "hard_first", "random")
_DRAW, _RANK = 1, 2  # what keeps the random numbers of batches and of the random order apart


def check(section: Mapping[str, Any]) -> None:
    """Refuses what a curriculum cannot be made of.

    Args:
      section: ``config.data.curriculum``: ``pacing``, ``start``, ``full_percent`` and ``order``.

    Raises:
      UserError: an unknown name, or a number out of range.
    """
    if section["pacing"] not in PACINGS:
        raise unknown("data.curriculum.pacing", section["pacing"], PACINGS)
    if section["order"] not in ORDERS:
        raise unknown("data.curriculum.order", section["order"], ORDERS)
    if not 0 < section["start"] <= 1:
        raise UserError(
            f"data.curriculum.start={section['start']} is the share of the examples at step 0: give a number above 0, "
            "at most 1."
        )
    if not 0 < section["full_percent"] <= 100:
        raise UserError(
            f"data.curriculum.full_percent={section['full_percent']} is the percent of the run at which all examples "
            "are in: give a number above 0, at most 100."
        )


def pool_size(
    kind: str, step: int, total_steps: int, examples: int, *, start: float = 0.3, full_percent: float = 50.0
) -> int:
    """From how many examples a step draws: ``start`` of all at step 0, all from ``full_percent`` of the run on.

    With p = step / (full_percent % of ``total_steps``), the share of the examples is

    - "linear": start + (1 - start) p;
    - "root": √(start² + (1 - start²) p): the larger the pool, the more slowly it grows, so that every newcomer has the
      same time (Platanios et al. 2019, "Competence-based curriculum learning for neural machine translation", eq. 7);
    - "step": start, doubled at even intervals until it is 1 (Hacohen & Weinshall 2019, "fixed exponential pacing" with
      an increase of 2);
    - "none": 1.

    Returns:
      The size, from 1 to ``examples``; never smaller than at an earlier step.

    Raises:
      UserError: an unknown ``kind``.
    """
    if kind not in PACINGS:
        raise unknown("data.curriculum.pacing", kind, PACINGS)
    progress = 100.0 * step / (full_percent * total_steps)
    if kind == "none" or progress >= 1:
        return examples
    if kind == "linear":
        share = start + (1.0 - start) * progress
    elif kind == "root":
        share = math.sqrt(start**2 + (1.0 - start**2) * progress)
    else:
        doublings = math.ceil(-math.log2(start))
        share = start * 2 ** int(progress * doublings)
    return min(max(round(share * examples), 1), examples)


def ranking(scores: ArrayLike, order: str, seed: int) -> NDArray[np.int64]:
    """The ids of the examples in the order in which they come into the pool.

    Args:
      scores: [n], the difficulty of each example; equal ones are in the order of their ids.
      order: "easy_first", "hard_first" (anti-curriculum), or "random" (drawn by ``seed``; the control in which pools
        grow alike and difficulty says nothing).
      seed: of the random order.
    """
    scores = np.asarray(scores)
    if order == "easy_first":
        return np.argsort(scores, kind="stable")
    if order == "hard_first":
        return np.argsort(-scores, kind="stable")
    if order == "random":
        return np.random.default_rng([seed, _RANK]).permutation(len(scores))
    raise unknown("data.curriculum.order", order, ORDERS)


def batches(
    split: Split,
    scores: ArrayLike,
    *,
    total_steps: int,
    pacing: str,
    start: float,
    full_percent: float,
    order: str,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[pipeline.Batch]:
    """Endless batches from a growing pool; once it holds all examples, those of ``pipeline.train_batches``.

    A batch holds different examples of the pool, drawn anew at each step; one that is larger than the pool holds each
    of the pool's equally often, up to one.

    Args:
      split: the examples.
      scores: [n], the difficulty of each.
      total_steps: of the run.
      pacing: with ``start`` and ``full_percent``, see ``pool_size``.
      start: the share of the examples at step 0.
      full_percent: the percent of the run at which all examples are in.
      order: see ``ranking``.
      batch_size: this and the rest as in ``pipeline.train_batches``.
      seed: of the draws.
      start_step: the first step to give.
      process_index: which block of each batch to give.
      process_count: into how many equal blocks a batch is cut.

    Returns:
      Batches as those of ``pipeline.train_batches``. As long as the pool grows, ``epoch`` is step * batch_size //
      examples: how many passes over the whole split as many examples would have been.

    Raises:
      UserError: what ``check`` or ``pipeline.train_batches`` refuse, or scores that do not fit the split.
    """
    check({"pacing": pacing, "start": start, "full_percent": full_percent, "order": order})
    blocks = {"batch_size": batch_size, "process_index": process_index, "process_count": process_count}
    mine = pipeline.block_of(split, **blocks)
    pipeline.train_batches(split, seed=seed, **blocks)  # refuses what it would refuse later
    examples = len(split.labels)
    scores = np.asarray(scores)
    if scores.shape != (examples,) or np.isnan(scores).any():
        raise UserError(
            f"difficulty scores of shape {scores.shape} for {examples} examples: give one number (not NaN) each."
        )
    ranked = ranking(scores, order, seed)

    def grown() -> Iterator[pipeline.Batch]:
        for step in itertools.count(start_step):
            size = pool_size(pacing, step, total_steps, examples, start=start, full_percent=full_percent)
            if size == examples:
                break
            ids = ranked[_draw(size, batch_size, seed, step)[mine]].astype(np.int32)
            yield pipeline.gather(split, ids, np.full(len(ids), step * batch_size // examples, np.int32))
        yield from pipeline.train_batches(split, seed=seed, start_step=step, **blocks)

    return grown()


def _draw(pool: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    """``count`` places in the pool, in random order: different ones as far as there are."""
    rng = np.random.default_rng([seed, step, _DRAW])
    whole, rest = divmod(count, pool)
    full = [rng.permutation(pool) for _ in range(whole)]
    return np.concatenate([*full, rng.choice(pool, rest, replace=False)])

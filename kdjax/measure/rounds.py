"""The measurement itself: every model warmed, then timed in turns, then scored on the whole test split.

In a round each model in turn does a slice of its calls while the others wait, and every second round goes the other way
round: whatever the machine does meanwhile, it does to all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.measure import machine
from kdjax.measure.processes import Worker, ask

BATCHES = (1, 8, 32)
ROUNDS = 40
SLICE_S = 0.1  # of calls at a larger batch, in a round: enough for a rate, unless one call is longer
THROUGHPUT_S = 60.0  # for all rounds of a larger batch of one model; slow ones get fewer rounds, at least so many:
ROUNDS_LEAST = 5
SCORE_S = 300.0  # for the test split of a language model, of the slowest one; longer ones are sampled
Say = Callable[[str], None]


class Timed(NamedTuple):
    """The calls of one model at one batch size."""

    ms: list[np.ndarray]  # of each call, by round
    cpu_s: float
    joules: float | None


class Warm(NamedTuple):
    """A model at one batch size, before it is timed."""

    call_s: float
    peak_bytes: int  # so far, over what the process held before the model was opened
    shape: tuple[int, ...]  # of the logits


def warm(worker: Worker) -> dict[int, Warm]:
    """Calls a model until it is warm, at each batch size, the smallest first."""
    found = {}
    for batch in BATCHES:
        answer = ask(worker, "warm", batch=batch)
        found[batch] = Warm(answer["call_s"], answer["peak_bytes"], tuple(answer["shape"]))
    return found


class Plan(NamedTuple):
    """How the calls of one model at one batch size are spread over the rounds."""

    calls: int  # of a slice
    rounds: int  # that have a slice


def plan(call_s: float, batch: int, calls: int) -> Plan:
    """So many calls in all at batch 1; at a larger one as many as ``SLICE_S`` holds, but no more than at batch 1."""
    rounds = min(ROUNDS, max(1, calls // 10))  # a slice is of 10 calls at least
    each = -(-calls // rounds)
    if batch == 1:
        return Plan(each, rounds)
    each = int(np.clip(SLICE_S / max(call_s, 1e-9), 1, each))
    return Plan(each, int(np.clip(THROUGHPUT_S / max(each * call_s, 1e-9), min(ROUNDS_LEAST, rounds), rounds)))


def time_all(
    workers: Sequence[Worker], warmed: Sequence[dict[int, Warm]], calls: int, say: Say = print
) -> list[dict[int, Timed]]:
    """Times all models in turns; one entry per worker, by batch size."""
    plans = [{batch: plan(warmed_one[batch].call_s, batch, calls) for batch in BATCHES} for warmed_one in warmed]
    seconds = sum(
        plans[i][batch].calls * plans[i][batch].rounds * warmed[i][batch].call_s
        for i in range(len(workers))
        for batch in BATCHES
    )
    rounds = max(one[1].rounds for one in plans)
    say(f"timing {len(workers)} in turns, {rounds} rounds: about {max(seconds, 1.0):.0f} s")
    counters = machine.energy_counters()
    answers: list[dict[int, list[dict[str, Any]]]] = [{batch: [] for batch in BATCHES} for _ in workers]
    for number in range(rounds):
        order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
        for i in order:
            for batch, part in plans[i].items():
                if _has_slice(number, part.rounds, rounds):
                    before = machine.read_energy(counters)
                    first = number * part.calls * batch
                    answer = ask(workers[i], "time", batch=batch, calls=part.calls, first=first)
                    answer["joules"] = machine.joules(counters, before, machine.read_energy(counters))
                    answers[i][batch].append(answer)
    return [{batch: _together(slices, bool(counters)) for batch, slices in one.items()} for one in answers]


def score_all(
    workers: Sequence[Worker], warmed: Sequence[dict[int, Warm]], rows: int, folder: Path, limit: bool, say: Say = print
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Scores all models on the same rows of the test split.

    Args:
      workers: the models.
      warmed: what ``warm`` returned of each.
      rows: how many the split has.
      folder: for the arrays.
      limit: take rows at even distances where all would take the slowest model longer than ``SCORE_S``.
      say: progress.

    Returns:
      The rows, int64 [n], and of each model ``first`` and ``log_p`` of them (``worker.score``).
    """
    largest = BATCHES[-1]
    slowest = max(one[largest].call_s for one in warmed) / largest
    used = int(np.clip(SCORE_S / max(slowest, 1e-9), min(largest, rows), rows)) if limit else rows
    chosen = np.linspace(0, rows - 1, used).round().astype(np.int64)
    seconds = used * sum(one[largest].call_s for one in warmed) / largest
    say(f"scoring {used:,} of {rows:,} test examples: about {max(seconds, 1.0):.0f} s")
    np.save(folder / "rows.npy", chosen)
    found = []
    for worker in workers:
        out = folder / "scores.npz"
        ask(worker, "score", rows=str(folder / "rows.npy"), out=str(out))
        with np.load(out) as arrays:
            found.append(dict(arrays))
    return chosen, found


def _has_slice(number: int, of: int, rounds: int) -> bool:
    """Whether the round of that number is among ``of`` that lie evenly in all ``rounds``."""
    return number * of // rounds != (number - 1) * of // rounds


def _together(slices: Sequence[dict[str, Any]], with_energy: bool) -> Timed:
    return Timed(
        [np.array(one["ms"]) for one in slices],
        sum(one["cpu_s"] for one in slices),
        sum(one["joules"] for one in slices) if with_energy else None,
    )

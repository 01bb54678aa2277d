"""Sides that do the same work, each in a process of its own: they take turns, and their losses and times are compared.

While one side runs, the others idle, so that whatever else the machine does falls on all of them.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdjax import host


class Side(NamedTuple):
    """Something that trains.

    Attributes:
      step: does the next step, waits for it, and gives its loss.
      weights: what the sides that are compared with this one start from.
    """

    step: Callable[[], float]
    weights: Any = None


Make = Callable[..., Side]  # pickled by name, and called where the side lives


def run(side: Side, steps: int):
    """The loss of each step and its seconds [steps, (wall, processor)].

    The processor's are blind to other work on the machine, but count waiting threads too.
    """
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])
    losses, seconds = [], []
    for _ in range(steps):
        start = clocks()
        losses.append(side.step())
        seconds.append(clocks() - start)
    return np.array(losses), np.array(seconds)


def _serve(pipe, make, arguments, threads, keep_memory):
    os.sched_setaffinity(0, range(threads))  # JAX has as many threads as it has cores
    if keep_memory:
        host.keep_freed_memory()
    side = make(*arguments)
    pipe.send(side.weights)
    while steps := pipe.recv():
        pipe.send(run(side, steps))


class Worker:
    """A side in a fresh process, with its ``weights``; called with a number of steps; ``close`` ends it."""

    def __init__(self, make, *arguments, threads, keep_memory):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, arguments, threads, keep_memory), daemon=True)
        self.process.start()
        other.close()
        self.weights = self.pipe.recv()

    def __call__(self, steps):
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self):
        self.pipe.send(0)
        self.process.join()


def compare(
    ours: Make,
    peers: Mapping[str, Mapping[str, Make]],
    pair: Any,
    *,
    rounds: int,
    chunk: int,
    threads: int,
    keep_memory: bool,
) -> dict[str, Any]:
    """Alternates the sides; the first round warms up and is checked, not timed.

    Args:
      ours: makes kdjax's side of the pair.
      peers: by name, the ways to run each, of which the fastest counts; makes a side of the pair and kdjax's weights.
      pair: what is trained.
      rounds: that are timed.
      chunk: steps of one side before the next one's turn.
      threads: of every side.
      keep_memory: whether every side keeps freed memory, as the kdjax command does.
    """
    settings = {"threads": threads, "keep_memory": keep_memory}
    kdjax = Worker(ours, pair, **settings)
    sides = {("kdjax", ""): kdjax}
    for peer, ways in peers.items():
        sides |= {(peer, way): Worker(make, pair, kdjax.weights, **settings) for way, make in ways.items()}
    first = {side: worker(chunk)[0] for side, worker in sides.items()}
    turns = [{side: worker(chunk)[1] for side, worker in sides.items()} for _ in range(rounds)]
    for worker in sides.values():
        worker.close()

    title = lambda side: " ".join(filter(None, side))
    apart = lambda side: float(np.abs(first[side] / first["kdjax", ""] - 1).max())
    result: dict[str, Any] = {
        "losses": {title(side): values.round(5).tolist() for side, values in first.items()},
        "losses_differ_by": {peer: max(apart((peer, way)) for way in ways) for peer, ways in peers.items()},
    }
    for column, clock in enumerate(("wall", "processor")):
        taken = {side: np.array([turn[side][:, column] for turn in turns]) for side in sides}  # [rounds, chunk] seconds
        medians = {side: float(np.median(seconds)) for side, seconds in taken.items()}
        result[clock] = {"median_ms": {title(side): round(1e3 * value, 1) for side, value in medians.items()}}
        for peer, ways in peers.items():
            fastest = min(((peer, way) for way in ways), key=medians.__getitem__)
            ratios = np.median(taken[fastest], axis=1) / np.median(taken["kdjax", ""], axis=1)
            result[clock][f"kdjax's speed over {title(fastest)}'s"] = {
                "ratio": round(medians[fastest] / medians["kdjax", ""], 3),
                "rounds": [round(float(np.quantile(ratios, q)), 3) for q in (0, 0.5, 1)],  # lowest, median, highest
            }
    return result

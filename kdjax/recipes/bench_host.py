"""What the host does in a step, and how much of it the device has to wait for."""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from kdjax import sharding, train
from kdjax.writers import JsonlWriter

if TYPE_CHECKING:
    from kdjax.recipes.bench_step import Bench

ROUND = 1.0  # seconds of a block of steps
FEWEST_STEPS, MOST_STEPS = 5, 300  # of a block
ROUNDS, MOST = 7, 60
PARTS = ("input", "put", "dispatch", "wait")


def measure(bench: "Bench", steps: int, seconds: float) -> dict[str, Any]:
    """The training loop against the device alone, and where the loop's time goes; milliseconds of a step.

    ``loop_ms`` is ``train.run`` itself, with its input, its logging to a file and its progress, without its start.
    ``device_ms`` is the same compiled step, call after call, on one batch that is on the device, so that all that the
    host does is to call it. Both run in blocks of ``steps`` that take turns. Their difference is the host's time that
    the device waits for: what is hidden behind the device is not in it. On a CPU the host takes its time from the
    device's own cores, and that is in it.
    """
    pairs = turns({"loop": lambda: loop(bench, steps), "device": lambda: device(bench, steps)}, ROUNDS, seconds)
    whole, alone = (statistics.median(pairs[name]) for name in ("loop", "device"))
    shares = [1.0 - own / all_of_it for all_of_it, own in zip(pairs["loop"], pairs["device"], strict=True)]
    return {
        "host_share": statistics.median(shares),
        "host_share_range": [min(shares), max(shares)],
        "loop_ms": 1e3 * whole,
        "device_ms": 1e3 * alone,
        "split_ms": {name: 1e3 * taken for name, taken in split(bench, steps).items()},
    }


def block(steps: Callable[[int], float]) -> int:
    """How many steps take about as long as a round; ``steps(count)`` makes so many and says the seconds of one."""
    steps(FEWEST_STEPS)
    return min(max(round(ROUND / steps(FEWEST_STEPS)), FEWEST_STEPS), MOST_STEPS)


def loop(bench: "Bench", steps: int) -> float:
    """Seconds of a step of a real run, without compiling, saving or evaluating."""
    stage = bench.arm.stages[0]
    arm = bench.arm._replace(stages=[stage._replace(start=0, stop=steps)], teacher_variables=bench.teachers)
    every = train.Every(log=bench.experiment.config.log.every)
    programs: dict[Any, Any] = {stage.step: (bench.program.compiled, list(bench.program.names))}
    with tempfile.TemporaryDirectory() as folder, JsonlWriter(Path(folder) / "metrics.jsonl") as writer:
        done = train.run(arm, bench.experiment.mesh, every=every, writers=[writer], programs=programs)
    assert done.examples_per_s, "a fresh run trains"
    return bench.arm.batch_size / done.examples_per_s


def device(bench: "Bench", steps: int) -> float:
    """Seconds of a step on a batch that is on the device, with as many in flight as training has."""
    state, pending = bench.state(), deque[jax.Array]()
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, packed = bench.program.compiled(state, bench.teachers, bench.batch, bench.hparams)
        pending.append(packed)
        if len(pending) > train.MAX_IN_FLIGHT:
            jax.block_until_ready(pending.popleft())
    jax.block_until_ready((state, pending))
    return (time.perf_counter() - start) / steps


def split(bench: "Bench", steps: int) -> dict[str, float]:
    """Where the host is while it trains, in seconds of a step.

    ``input``: makes a batch; ``put``: hands it to the devices; ``dispatch``: calls the compiled step; ``wait``: waits
    for the metrics of an earlier step, so the device is the slower one. A host that never waits holds the device up.
    """
    mesh, batches, state = bench.experiment.mesh, bench.arm.batches(0), bench.state()
    pending = deque[jax.Array]()
    taken = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, call: Callable, *args: Any) -> Any:
        start = time.perf_counter()
        found = call(*args)
        taken[name] += time.perf_counter() - start
        return found

    jax.block_until_ready(state)
    for _ in range(steps):
        raw = timed("input", next, batches)
        batch = timed("put", sharding.put_batch, raw, mesh)
        state, packed = timed("dispatch", bench.program.compiled, state, bench.teachers, batch, bench.hparams)
        pending.append(packed)
        if len(pending) > train.MAX_IN_FLIGHT:
            timed("wait", jax.device_get, pending.popleft())
    timed("wait", jax.block_until_ready, (state, pending))
    return {name: seconds / steps for name, seconds in taken.items()}


def turns(
    measures: Mapping[str, Callable[[], float]], fewest: int, seconds: float, most: int = MOST
) -> dict[str, list[float]]:
    """What each of several measures says, round after round, each round beginning with the next one, so that none
    profits from its place."""
    names, found = list(measures), {name: list[float]() for name in measures}
    began = time.perf_counter()
    for number in range(most):
        if number >= fewest and time.perf_counter() - began > seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(measures[name]())
    return found

"""``kdjax bench input``: the input pipeline alone, against what the step consumes."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from kdjax import build, sharding, train
from kdjax.data import pipeline
from kdjax.experiment import ALONE
from kdjax.recipes import bench_host, bench_limits, bench_step
from kdjax.recipes.bench_step import Bench

ROUNDS = 7
BLOCK = 20  # batches that are timed as one
MEANING = {
    "examples_per_s": "that the host makes, by source: the distilled student's, and where they differ the student's "
    "alone and those of an evaluation",
    "put_examples_per_s": "that it hands to the devices, a batch that is there already",
    "step_examples_per_s": "that the step consumes, on a batch that is on the device",
    "input_over_step": "(make and put a batch) / step on the device: below 1 it can be hidden behind the device",
    "tokens_per_s": "of text, that the host makes",
    "batch_bytes": "on the host",
    "batch_bytes_per_device": "once put",
    "in_flight_bytes_per_device": "of as many batches as may be in flight",
    **bench_step.ENVIRONMENT,
}


def measure(config: ConfigDict) -> dict[str, Any]:
    """Times the making of batches of each kind that the config has, their transfer, and the step, in turns."""
    bench = bench_step.prepare(config)
    made = sources(bench)
    whole = next(bench.arm.batches(0))

    def put() -> None:
        jax.block_until_ready(sharding.put_batch(whole, bench.experiment.mesh))

    measures: dict[str, Callable[[], float]] = {name: _timed(take, BLOCK) for name, take in made.items()}
    measures |= {"put": _timed(put, BLOCK), "step": lambda: bench_host.device(bench, BLOCK)}
    for call in measures.values():  # so that no first round pays for what is set up
        call()
    found = bench_host.turns(measures, ROUNDS, bench_step.SECONDS)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    size, config = bench.arm.batch_size, bench.experiment.config
    rate = {name: size / seconds[name] for name in (*made, "put", "step")}
    rate["evaluation"] = config.data.eval_batch_size / seconds["evaluation"]
    per_device = bench_limits.bytes_of(bench.batch)
    values = {
        "benchmark": "input",
        "examples_per_s": {name: rate[name] for name in made},
        "put_examples_per_s": rate["put"],
        "step_examples_per_s": rate["step"],
        "input_over_step": (seconds["training"] + seconds["put"]) / seconds["step"],
        "batch_bytes": sum(array.nbytes for array in whole.values()),
        "batch_bytes_per_device": per_device,
        "in_flight_bytes_per_device": train.MAX_IN_FLIGHT * per_device,
    }
    if "tokens" in whole:
        values["tokens_per_s"] = rate["training"] * bench.experiment.dataset.context
    return values | bench_step.environment(bench.experiment)


def sources(bench: Bench) -> dict[str, Callable[[], Any]]:
    """What makes the next batch, for each kind: ``training`` (a curriculum's, or with the signals of a cache, where the
    config has one), ``plain`` (without these, where it has), and ``evaluation``."""
    experiment = bench.experiment
    config, size = experiment.config, experiment.config.data.eval_batch_size
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    kinds = {"training": bench.arm.batches(0)}
    if experiment.signals or config.data.curriculum.pacing != "none":
        kinds["plain"] = build.make_arm(experiment, ALONE).batches(0)

    def endless() -> Any:
        while True:
            yield from pipeline.eval_batches(experiment.dataset.test, batch_size=size, **share)

    kinds["evaluation"] = endless()
    return {name: partial(next, batches) for name, batches in kinds.items()}


def _timed(call: Callable[[], Any], times: int) -> Callable[[], float]:
    """Seconds of one of several calls."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    return measure

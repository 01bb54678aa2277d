"""``measure.json``: what a measurement found, as a contract (schema 1; ``docs/measure.md`` explains every key)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax import results
from kdjax.errors import UserError
from kdjax.measure.examples import Examples
from kdjax.measure.rounds import BATCHES, Timed, Warm
from kdjax.results import check_keys, check_number, wrong
from kdjax.writers import write_atomic

SCHEMA = 1
KIND = "measure"
FILE = "measure.json"
PERCENTILES = ("p50", "p90", "p99")
JOULES_LEAST_S = 1.0  # of timed calls: the counters move every millisecond or so, and slices are short
_DEVICE = ("backend", "device_kind", "device_count", "process_count")  # of JAX, which need not have run here


def environment() -> dict[str, Any]:
    """Where this was measured; the version of each runtime stands with its models."""
    return {key: value for key, value in results.environment().items() if key not in _DEVICE}


# -------------------------------------------------------------------------------------------------------- statistics


def latency(rounds: Sequence[np.ndarray]) -> dict[str, Any]:
    """Percentiles over all calls, in ms, and the median of each round."""
    values = np.percentile(np.concatenate(rounds), [int(name[1:]) for name in PERCENTILES])
    return {
        **dict(zip(PERCENTILES, values.tolist(), strict=True)),
        "calls": sum(map(len, rounds)),
        "rounds": [float(np.median(calls)) for calls in rounds],
    }


def items_per_s(rounds: Sequence[np.ndarray], batch: int) -> float:
    """The median over the rounds of a round's rate."""
    return float(np.median([1e3 * batch * len(calls) / calls.sum() for calls in rounds]))


def per_1000(total: float, rounds: Sequence[np.ndarray], batch: int) -> float:
    """A total over all calls, such as CPU seconds, for every 1,000 items."""
    return 1e3 * total / (batch * sum(map(len, rounds)))


def timed(found: Mapping[int, Timed], warmed: Mapping[int, Warm], tokens: int | None) -> dict[str, Any]:
    """Latency, rates, CPU seconds, joules and memory of one model; ``tokens`` of a window, ``None`` for images."""
    joules = {
        str(batch): per_1000(one.joules, one.ms, batch)
        for batch, one in found.items()
        if one.joules is not None and sum(calls.sum() for calls in one.ms) > 1e3 * JOULES_LEAST_S
    }
    rates = {str(batch): items_per_s(one.ms, batch) for batch, one in found.items()}
    return {
        "latency_ms": latency(found[1].ms),
        "items_per_s": rates,
        "tokens_per_s": {batch: tokens * rate for batch, rate in rates.items()} if tokens else None,
        "cpu_s_per_1000": {str(batch): per_1000(one.cpu_s, one.ms, batch) for batch, one in found.items()},
        "joules_per_1000": joules or None,
        "peak_bytes": {str(batch): one.peak_bytes for batch, one in warmed.items()},
    }


def quality(said: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], examples: Examples) -> dict[str, Any]:
    """Accuracy, nats and agreement of one model, from what it said of the rows of ``examples`` (``worker.score``).

    ``agreement`` is the share on which it and the reference have the same first choice: of all test examples or, of
    text, of all targets. ``bits_per_byte`` is of text: the bits of all targets over the bytes that they cover.
    """
    known = examples.labels >= 0
    counted = known if examples.task == "language" else np.ones_like(known)
    nats = -said["log_p"][known]
    covered = 0 if examples.bytes is None else int(examples.bytes.sum())
    return {
        "accuracy": float((said["first"] == examples.labels)[known].mean()),
        "nll": float(nats.mean()),
        "bits_per_byte": float(nats.sum() / math.log(2.0) / covered) if covered else None,
        "agreement": float((said["first"] == reference["first"])[counted].mean()),
    }


RATIOS = ("weights_bytes", "file_bytes", "p50", "items_per_s_8", "items_per_s_32", "accuracy")


def ratios(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float | None]:
    """How many times smaller or quicker a model is than the reference (at least 1 is better), and its share of the
    reference's accuracy."""
    over = lambda a, b: float(a / b) if a and b else None
    rate = lambda one, batch: one["items_per_s"][batch]
    values = (
        over(reference["weights_bytes"], entry["weights_bytes"]),
        over(reference["file_bytes"], entry["file_bytes"]),
        over(reference["latency_ms"]["p50"], entry["latency_ms"]["p50"]),
        over(rate(entry, "8"), rate(reference, "8")),
        over(rate(entry, "32"), rate(reference, "32")),
        over(entry["test"]["accuracy"], reference["test"]["accuracy"]),
    )
    return dict(zip(RATIOS, values, strict=True))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of those (cost, value) that no other one beats: none costs less or as little and is worth more, nor
    costs less and is worth as much. By cost, the cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


# ------------------------------------------------------------------------------------------------------ the contract

_TOP = ("schema", "kind", "environment", "data", "settings", "machine", "reference", "models")
_MODEL = (
    "path", "format", "runtime", "version", "inputs", "params", "weights_bytes", "file_bytes", "latency_ms",
    "items_per_s", "tokens_per_s", "cpu_s_per_1000", "joules_per_1000", "peak_bytes", "test", "ratios",
)  # fmt: skip


def write(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
    """Checks the contract, then writes the file whole or not at all."""
    validate(found)
    write_atomic(path, json.dumps(found, indent=2, allow_nan=False) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a ``measure.json``; UserError if it is missing, torn, or not of this schema."""
    found = results.read_json(path, "make one with `kdjax measure`", "measure again")
    validate(found)
    return found


def validate(found: Any) -> None:
    """Raises a UserError that names the first key of ``found`` that breaks the contract."""
    check_keys("measure", found, set(_TOP))
    if found["kind"] != KIND:
        raise wrong("measure.kind", repr(KIND), found["kind"])
    if found["schema"] != SCHEMA:
        raise UserError(
            f"measure.schema is {found['schema']!r}, this kdjax reads {SCHEMA}: use the kdjax that wrote it."
        )
    check_keys("measure.environment", found["environment"], {"python", "platform", "cpu", "packages"}, open_ended=True)
    data, settings, machine = found["data"], found["settings"], found["machine"]
    check_keys("measure.data", data, {"task", "name", "examples", "of", "positions"})
    for key in ("examples", "of", "positions"):
        check_number(f"measure.data.{key}", data[key], whole=True)
    check_keys("measure.settings", settings, {"threads", "cores", "calls", "rounds", "batches"})
    for key in ("threads", "calls", "rounds"):
        check_number(f"measure.settings.{key}", settings[key], whole=True)
    check_keys(
        "measure.machine",
        machine,
        {"quiet", "causes", "others", "elsewhere", "steal", "busy_before", "load_before", "spread"},
    )
    if not isinstance(machine["quiet"], bool) or machine["quiet"] != (not machine["causes"]):
        raise wrong("measure.machine.quiet", "true without causes and false with some", machine["quiet"])
    for key in ("others", "elsewhere", "steal", "busy_before"):
        _check_or_none(f"measure.machine.{key}", machine[key], 1.0)
    models, reference = found["models"], found["reference"]
    if not isinstance(models, dict) or not isinstance(reference, str) or reference not in models:
        raise wrong("measure.models", "an object that holds measure.reference", models)
    for name, entry in models.items():
        _check_model(f"measure.models.{name}", entry, name == reference)


def _check_model(path: str, entry: Any, is_reference: bool) -> None:
    check_keys(path, entry, set(_MODEL))
    check_number(f"{path}.file_bytes", entry["file_bytes"], whole=True)
    for key in ("params", "weights_bytes"):
        _check_or_none(f"{path}.{key}", entry[key])
    check_keys(f"{path}.latency_ms", entry["latency_ms"], {*PERCENTILES, "calls", "rounds"})
    for key in (*PERCENTILES, "calls"):
        check_number(f"{path}.latency_ms.{key}", entry["latency_ms"][key])
    sizes = {str(batch) for batch in BATCHES}
    for key in ("items_per_s", "cpu_s_per_1000", "peak_bytes"):
        check_keys(f"{path}.{key}", entry[key], sizes)
        for batch, value in entry[key].items():
            check_number(f"{path}.{key}.{batch}", value)
    check_keys(f"{path}.test", entry["test"], {"accuracy", "nll", "bits_per_byte", "agreement"})
    for key, most in {"accuracy": 1.0, "agreement": 1.0, "nll": math.inf}.items():
        check_number(f"{path}.test.{key}", entry["test"][key], most)
    _check_or_none(f"{path}.test.bits_per_byte", entry["test"]["bits_per_byte"])
    if is_reference:
        if entry["ratios"] is not None:
            raise wrong(f"{path}.ratios", "null, for it is the reference", entry["ratios"])
        return
    check_keys(f"{path}.ratios", entry["ratios"], set(RATIOS))
    for key, value in entry["ratios"].items():
        _check_or_none(f"{path}.ratios.{key}", value)


def _check_or_none(path: str, value: Any, high: float = math.inf) -> None:
    if value is not None:
        check_number(path, value, high)

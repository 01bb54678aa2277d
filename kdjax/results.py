"""``results.json``: what a run measured, as a contract (schema 1; ``docs/results-format.md`` explains every key)."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from kdjax import metrics
from kdjax.errors import UserError, unknown
from kdjax.untrusted import parse_json, terminal
from kdjax.writers import write_atomic

SCHEMA = 1
ARMS = {"teacher": "teacher", "student_alone": "student alone", "student_distilled": "student distilled"}  # shown as
CLASSIFICATION = "classification"  # the task of results that name none
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "kdjax")


class Kind(NamedTuple):
    """What is in the results of one task, beside what every run has, and how a person is told.

    Attributes:
        required: keys at the top, beside those of every run.
        optional: keys at the top that may be absent.
        check_arm: ``(path, arm)``; raises a UserError that names the first wrong key of an arm.
        check_rest: ``(results)``; the same of the keys at the top that only this task has.
        headline: ``(results) -> str``.
        caveat: ``(results, test examples or None) -> str``.
        columns: label of a row of the table -> ``(arm) -> str``.
    """

    required: frozenset[str]
    optional: frozenset[str]
    check_arm: Callable[[str, Any], None]
    check_rest: Callable[[Mapping[str, Any]], None]
    headline: Callable[[Mapping[str, Any]], str]
    caveat: Callable[[Mapping[str, Any], int | None], str]
    columns: Mapping[str, Callable[[Any], str]]


def _kind(results: Mapping[str, Any]) -> Kind:
    """The kind of the task that the results are of; the only place that asks which one it is."""
    from kdjax import results_classification, results_language  # here, for they stand on the checks of this module

    kinds = {CLASSIFICATION: results_classification.KIND, results_language.TASK: results_language.KIND}
    task = results.get("task", CLASSIFICATION)
    if not isinstance(task, str) or task not in kinds:
        raise unknown("task in results", task, kinds)
    return kinds[task]


def environment() -> dict[str, Any]:
    """Where this process runs: software versions, processor, devices, commit, UTC date. Never fails."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count() or 1,
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def arm_result(
    *,
    variables: Mapping[str, Any],
    steps: int,
    examples_per_s: float | None,
    logits: Any,
    teacher_logits: Any,
    labels: Any,
    latency_ms: Mapping[str, float],
    params_sha256: str,
) -> dict[str, Any]:
    """One arm's entry of ``results.json``.

    Args:
        variables: ``{"params": ..., "state": ...}``; parameters are counted, the bytes of both are weighed.
        steps: updates made.
        examples_per_s: training throughput; None for an arm that was loaded, not trained.
        logits: [examples, classes] of this arm on the test set.
        teacher_logits: the same of the teacher (for the teacher itself: its own).
        labels: [examples] integers, -1 is left out of ``test`` and kept in ``fidelity``.
        latency_ms: what ``latency`` returned.
        params_sha256: hex digest of the parameters.
    """
    return {
        "params": count(variables),
        "weights_bytes": weigh(variables),
        "steps": int(steps),
        "examples_per_s": None if examples_per_s is None else float(examples_per_s),
        "test": metrics.classification(logits, labels),
        "fidelity": metrics.fidelity(logits, teacher_logits),
        "latency_ms": {key: float(value) for key, value in latency_ms.items()},
        "params_sha256": params_sha256,
    }


def link_result(
    *, name: str, variables: Mapping[str, Any], steps: int, logits: Any, teacher_logits: Any, labels: Any
) -> dict[str, Any]:
    """One link's entry of the ``chain`` of ``results.json``: ``name`` is that of its arm, the rest as in an arm's."""
    return {
        "name": name,
        "params": count(variables),
        "steps": int(steps),
        "test": metrics.classification(logits, labels),
        "fidelity": metrics.fidelity(logits, teacher_logits),
    }


def count(variables: Mapping[str, Any]) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def weigh(variables: Mapping[str, Any]) -> int:
    """The bytes of parameters and state, as held in memory."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(dict(variables)))


def build(
    *,
    config_sha256: str,
    seed: int,
    arms: Mapping[str, Mapping[str, Any]],
    chain: Sequence[Mapping[str, Any]] = (),
    task: str = CLASSIFICATION,
    prompt: str | None = None,
    signals: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole of ``results.json`` for arms named as in ``ARMS``, with the environment of this process.

    ``chain`` has the links between teacher and student in their order (see ``link_result``). Of a language run,
    ``prompt`` is what the samples go on from, ``signals`` the cache that the student learned from. What is left out is
    no key.
    """
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "config_sha256": config_sha256,
        "seed": int(seed),
        "environment": environment(),
        "arms": {name: dict(arms[name]) for name in ARMS if name in arms} | dict(arms),  # in the order of the tables
    }
    if task != CLASSIFICATION:
        results["task"] = task
    if chain:
        results["chain"] = [dict(link) for link in chain]
    if prompt is not None:
        results["prompt"] = prompt
    if signals is not None:
        results["signals"] = dict(signals)
    validate(results)
    return results


def write(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Checks the contract, then writes the file whole or not at all."""
    validate(results)
    write_atomic(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a ``results.json``; UserError if it is missing, torn, or not of this schema."""
    results = read_json(path, "finish a run with `kdjax distill --workdir ...` first", "run the evaluation again")
    validate(results)
    return results


def read_json(path: str | os.PathLike[str], if_missing: str, if_damaged: str) -> Any:
    """What a JSON file of results holds; a UserError with the remedy where it cannot be read."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no results at {path}: {if_missing}.") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions.") from error
    except ValueError as error:  # a JSON or an encoding error
        raise UserError(f"{path} is not JSON ({error}): it is damaged; {if_damaged}.") from error


def validate(results: Any) -> None:
    """Raises a UserError that names the first key of ``results`` that breaks the contract."""
    if not isinstance(results, dict):
        raise wrong("results", "an object", results)
    kind = _kind(results)
    always = {"schema", "config_sha256", "seed", "environment", "arms"}
    check_keys("results", results, always | kind.required | (kind.optional & set(results)))
    if results["schema"] != SCHEMA:
        raise UserError(
            f"results.schema is {results['schema']!r}, this kdjax reads {SCHEMA}: use the kdjax that wrote it."
        )
    check_sha256("results.config_sha256", results["config_sha256"])
    check_number("results.seed", results["seed"], whole=True)
    check_environment("results.environment", results["environment"])
    arms = results["arms"]
    if not isinstance(arms, dict) or not arms:
        raise wrong("results.arms", "an object with at least one arm", arms)
    for name, arm in arms.items():
        if name not in ARMS:
            raise unknown("arm in results.arms", name, ARMS)
        kind.check_arm(f"results.arms.{name}", arm)
    kind.check_rest(results)


def latency(apply_fn: Callable[[Any], Any], example: Any, calls: int = 200) -> dict[str, float]:
    """Times single calls of a compiled model, waiting for each: ``{"p50", "p99"}`` in milliseconds.

    Args:
        apply_fn: a jitted ``inputs -> anything`` that holds its weights on the device.
        example: one batch of one, already on the device: a transfer is not part of the figure.
        calls: how many are timed, after a twentieth as many (at least 3) to compile and warm up.
    """
    for _ in range(max(3, calls // 20)):
        jax.block_until_ready(apply_fn(example))
    seconds = np.empty(calls)
    for i in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(apply_fn(example))
        seconds[i] = time.perf_counter() - start
    p50, p99 = np.percentile(seconds * 1e3, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


# ---------------------------------------------------------------------------------------------- shown to a person


def speed_text(per_second: float | None) -> str:
    """A training throughput for a person: "loaded" for an arm that was not trained here."""
    return "loaded" if per_second is None else f"{per_second:,.0f}"


def noise_points(accuracies: list[float], examples: int) -> float:
    """Two binomial standard errors of the difference of two accuracies, in points.

    The two are treated as independent; predictions on one test set agree more than that, so this errs on the safe side.
    """
    return 200 * math.sqrt(sum(p * (1 - p) for p in accuracies) / examples)


def headline(results: Mapping[str, Any]) -> str:
    """What the run came to, in one plain sentence (one per arm if nothing was distilled)."""
    return _kind(results).headline(results)


def caveat(results: Mapping[str, Any], test_examples: int | None = None) -> str:
    """How small a difference between the two students says nothing; empty without both of them.

    ``test_examples`` is how many examples a classification run was scored on; without it nothing is said of one.
    """
    return _kind(results).caveat(results, test_examples)


def chain_sentence(results: Mapping[str, Any]) -> str:
    """Which models taught each other between the teacher and the student; empty where it learned from the teacher."""
    links = [
        f"{link_label(link)} ({link['params']:,} parameters, {100 * link['test']['accuracy']:.1f} %)"
        for link in results.get("chain", [])
    ]
    return f"From the teacher by way of {', then '.join(links)}." if links else ""


def link_label(link: Mapping[str, Any]) -> str:
    """A link's name for a person: "assistant_middle" -> "assistant middle"."""
    return link["name"].replace("_", " ", 1)


def verdict(results: Mapping[str, Any], test_examples: int | None = None) -> str:
    """The headline, the chain if there is one, and the caveat."""
    sentences = [headline(results), chain_sentence(results), caveat(results, test_examples)]
    return " ".join(filter(None, sentences))


def rows(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The table of a run: one row per quantity, one text per arm in the order of ``results["arms"]``."""
    arms = list(results["arms"].values())
    return [(label, [text(arm) for arm in arms]) for label, text in _kind(results).columns.items()]


def table(results: Mapping[str, Any], test_examples: int | None = None) -> Table:
    """The run as one table for a terminal, with the verdict below it."""
    shown = Table(caption=terminal(verdict(results, test_examples), "table.caption"), caption_justify="left")
    shown.add_column("")
    for name in results["arms"]:
        shown.add_column(ARMS[name], justify="right", style="bold" if name == "student_distilled" else "")
    for label, texts in rows(results):
        shown.add_row(label, *texts)
    return shown


def share_text(part: int, whole: int) -> str:
    """A count as a share of another for a person: (100, 1200) -> "1/12 of"; "1.1 times" where it is no fraction."""
    ratio = whole / max(part, 1)
    return f"1/{ratio:.0f} of" if ratio >= 1.5 else f"{part / max(whole, 1):.2g} times"


# --------------------------------------------------------------------------------------------------- the contract

FIDELITY = {"agreement": 1.0, "kl": math.inf}  # parts of every arm: key -> the highest value that it can have
LATENCY = {"p50": math.inf, "p99": math.inf}


def wrong(path: str, expected: str, value: Any) -> UserError:
    """The error for a value that breaks the contract."""
    shown = repr(value)
    return UserError(f"{path} must be {expected}, got {shown if len(shown) < 80 else shown[:77] + '...'}.")


def check_keys(path: str, value: Any, keys: set[str], open_ended: bool = False) -> None:
    """An object with all of ``keys`` and, unless it is open-ended, no other."""
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    for key in sorted(keys - set(value)):
        raise UserError(f"{path}.{key} is missing: results follow schema {SCHEMA} (docs/results-format.md).")
    for key in value:
        if key not in keys and not open_ended:
            raise unknown(f"key in {path}", key, keys)


def check_number(path: str, value: Any, high: float = math.inf, *, whole: bool = False) -> None:
    """A finite number from 0 to ``high``; bool, which Python counts as an int, is not a number here."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not (0 <= value <= high and math.isfinite(value)):
        limit = "of at least 0" if high == math.inf else f"in [0, {high:g}]"
        raise wrong(path, f"a {'whole' if whole else 'finite'} number {limit}", value)


def check_sha256(path: str, value: Any) -> None:
    """A digest in lower-case hex."""
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise wrong(path, "a SHA-256 digest of 64 lower-case hex digits", value)


def check_environment(path: str, value: Any) -> None:
    """What ``environment`` returned, here or with another version of kdjax."""
    texts = {"python", "platform", "cpu", "backend", "device_kind", "date"}
    counts = {"cpu_count", "device_count", "process_count"}
    check_keys(path, value, texts | counts | {"packages", "commit"}, open_ended=True)
    for key in sorted(texts):
        if not isinstance(value[key], str):
            raise wrong(f"{path}.{key}", "a string", value[key])
    for key in sorted(counts):
        check_number(f"{path}.{key}", value[key], whole=True)
    if not isinstance(value["packages"], dict):
        raise wrong(f"{path}.packages", "an object of versions", value["packages"])


def check_measured(
    path: str, entry: Mapping[str, Any], counts: Iterable[str], parts: Mapping[str, Mapping[str, float]]
) -> None:
    """Whole numbers under the keys ``counts``, and objects of numbers: ``parts`` has their keys, each with a limit."""
    for key in counts:
        check_number(f"{path}.{key}", entry[key], whole=True)
    for part, limits in parts.items():
        check_keys(f"{path}.{part}", entry[part], set(limits))
        for key, high in limits.items():
            check_number(f"{path}.{part}.{key}", entry[part][key], high)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def commit() -> str | None:
    """The commit of the checkout that kdjax runs from ("-dirty" if changed since); None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # a package in site-packages below somebody else's repository is not a checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None

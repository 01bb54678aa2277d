"""``kdjax measure``: models as they are deployed, side by side on this machine: speed, size, memory and accuracy."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from kdjax.errors import UserError
from kdjax.measure import candidates, examples, machine, processes, report, rounds, runtimes
from kdjax.measure import results as contract
from kdjax.measure.candidates import Candidate
from kdjax.measure.examples import Examples
from kdjax.measure.processes import Worker, ask

PAGE = "measure.html"
Say = Callable[[str], None]


def run(
    words: Sequence[str],
    *,
    workdir: str | Path,
    config: ConfigDict | None = None,
    dataset: Any = None,
    threads: int = 1,
    calls: int = 2000,
    say: Say = print,
) -> dict[str, Any]:
    """Measures models in turns, and writes ``measure.json`` and ``measure.html``.

    Args:
      words: the models (``candidates.read``), the reference first: agreement and ratios are to it.
      workdir: where the two files go; they replace those of a measurement before.
      config: whose test split is used; by default that of the first artefact among the words.
      dataset: the data in memory, instead of the config's.
      threads: with which each runtime computes, on as many cores.
      calls: timed calls of each model at batch 1.
      say: progress.

    Returns:
      The content of ``measure.json``.

    Raises:
      UserError: a word that names no model, an artefact that was changed, a runtime that is not installed, a model for
        other inputs than the data has, no data to measure on, too many threads, or no calls.
    """
    if calls < 1:
        raise UserError(f"{calls} timed calls: give at least 1, and 1,000 for percentiles that mean something.")
    cores = processes.choose_cores(threads)
    load_before, busy_before = machine.load_average(), machine.busy_now(cores)
    named = candidates.read(words)
    for candidate in named:
        runtimes.require(candidate.runtime)
    split = examples.load(config or _config_of(named), dataset)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    say(f"{len(named)} model{'s' if len(named) > 1 else ''} on the test split of {split.name}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        processes.started([candidate.name for candidate in named], cores, threads) as workers,
    ):
        folder = Path(scratch)
        opened = [
            _open(worker, candidate, split, threads, folder) for worker, candidate in zip(workers, named, strict=True)
        ]
        warmed = [_warm(worker, split) for worker in workers]
        before, ours = machine.snapshot(), _cpu_seconds(workers)
        found = rounds.time_all(workers, warmed, calls, say)
        after, ours = machine.snapshot(), _cpu_seconds(workers) - ours
        rows, said = rounds.score_all(workers, warmed, len(split.test), folder, split.task == "language", say)
    scored = split._replace(labels=split.labels[rows], bytes=None if split.bytes is None else split.bytes[rows])
    tokens = split.timed.shape[1] if split.task == "language" else None
    entries = {
        candidate.name: {
            **_about(candidate, answer),
            **contract.timed(found[i], warmed[i], tokens),
            "test": contract.quality(said[i], said[0], scored),
        }
        for i, (candidate, answer) in enumerate(zip(named, opened, strict=True))
    }
    first = named[0].name
    for name, entry in entries.items():
        entry["ratios"] = None if name == first else contract.ratios(entry, entries[first])
    seen = machine.shares(before, after, cores, ours) if before and after else None
    spreads = {name: machine.spread(entry["latency_ms"]["rounds"]) for name, entry in entries.items()}
    measured = {
        "schema": contract.SCHEMA,
        "kind": contract.KIND,
        "environment": contract.environment(),
        "data": {
            "task": split.task,
            "name": split.name,
            "examples": len(rows),
            "of": len(split.test),
            "positions": int((scored.labels >= 0).sum()),
        },
        "settings": {
            "threads": threads,
            "cores": cores,
            "calls": entries[first]["latency_ms"]["calls"],
            "rounds": len(entries[first]["latency_ms"]["rounds"]),
            "batches": list(rounds.BATCHES),
        },
        "machine": {**machine.judge(seen, busy_before, spreads), "load_before": load_before},
        "reference": first,
        "models": entries,
    }
    contract.write(workdir / contract.FILE, measured)
    report.write_report(workdir / PAGE, measured)
    return measured


def table(found: dict[str, Any]) -> Table:
    """What ``run`` returned, for a terminal."""
    return report.table(found)


def _config_of(named: Sequence[Candidate]) -> ConfigDict:
    manifests = [candidate.manifest for candidate in named if candidate.manifest]
    if not manifests:
        raise UserError(
            "none of these models was exported by kdjax, so that no data to measure on are known: name them with "
            "--config FILE, whose test split is then used."
        )
    return examples.config_of(manifests[0]["data"])


def _open(worker: Worker, candidate: Candidate, split: Examples, threads: int, folder: Path) -> dict[str, Any]:
    """Opens a model in its process and hands it the data as it wants them."""
    answer = ask(worker, "open", path=str(candidate.model), runtime=candidate.runtime, threads=threads)
    try:
        paths = {kind: _array(split, kind, candidate.ways, answer["input_dtype"], folder) for kind in ("timed", "test")}
        examples.check_shape(split, np.load(paths["test"], mmap_mode="r"), answer["input_shape"])
    except UserError as error:
        raise UserError(f"{candidate.path}: {error}") from error
    labels = folder / "labels.npy"
    if not labels.exists():
        np.save(labels, split.labels)
    ask(worker, "load", labels=str(labels), **paths)
    return answer


def _array(split: Examples, kind: str, ways: Sequence[str], dtype: str, folder: Path) -> str:
    """A file of inputs, made once for all models that want the same."""
    if split.timed is split.test:
        kind = "test"
    path = folder / f"{kind}-{'-'.join(sorted(ways))}-{dtype}.npy"
    if not path.exists():
        np.save(path, examples.prepared(getattr(split, kind), split, ways, dtype))
    return str(path)


def _warm(worker: Worker, split: Examples) -> dict[int, rounds.Warm]:
    found = rounds.warm(worker)
    try:
        examples.check_logits(split, split.timed, found[1].shape)
    except UserError as error:
        raise UserError(f"{worker.name}: {error}") from error
    return found


def _cpu_seconds(workers: Sequence[Worker]) -> float:
    return sum(ask(worker, "usage")["cpu_s"] for worker in workers)


def _about(candidate: Candidate, answer: dict[str, Any]) -> dict[str, Any]:
    """What a model is: where it came from, what runs it, and its size."""
    weights, size = candidates.weigh(candidate)
    manifest = candidate.manifest or {}
    return {
        "path": candidate.path,
        "format": manifest.get("format", candidate.model.suffix.lstrip(".")),
        "runtime": candidate.runtime,
        "version": answer["version"],
        "inputs": list(candidate.ways),
        "params": manifest.get("params"),
        "weights_bytes": weights or answer["weights_bytes"] or None,
        "file_bytes": size,
    }

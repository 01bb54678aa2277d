"""What the model card of an artefact is made of: the facts of a run that are the same in every format."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kdjax import experiment as experiments
from kdjax import metrics, results
from kdjax.compress import report
from kdjax.experiment import ALONE, Experiment


def facts(
    workdir: Path, experiment: Experiment, part: ConfigDict, arm: str, licences: Mapping[str, str]
) -> dict[str, Any]:
    """What is said of every artefact of an arm, whatever the format; see ``card.make``."""
    config, dataset = experiment.config, experiment.dataset
    is_text = config.task == "language"
    size = lambda split: len(split.tokens if is_text else split.labels)
    name = config.data.name
    return {
        "model": {"name": part.name, "options": part.options.to_dict()},
        "teachers": [_teacher(config, one, licences["teacher"]) for one in _taught_by(experiment, arm)],
        "data": {
            "name": name,
            "train": size(dataset.train),
            "test": size(dataset.test),
            "licence": licences["data"],
        },
        "results": _results(workdir, size(dataset.test)),
        "compression": _compression(workdir, arm),
        "traces": [name.removeprefix("jsonl:")] if name.startswith("jsonl:") else [],
        "versions": versions(("kdjax", "jax", "flax", "numpy")),
    }


def _taught_by(experiment: Experiment, arm: str) -> list[str]:
    """The teachers whose licence matters to an arm: those it learned from, or its own weights' where they came from
    elsewhere."""
    if arm == ALONE:
        return []
    if arm in experiment.teachers:
        return [arm] if experiments.init_of(experiment.config, arm) else []
    return list(experiment.teachers)


def _teacher(config: ConfigDict, name: str, licence: str) -> dict[str, str]:
    member = experiments.member(config, name)
    return {"name": name, "model": member.name, "init": member.init, "licence": licence}


def _results(workdir: Path, test_examples: int) -> dict[str, Any] | None:
    path = Path(workdir) / "results.json"
    if not path.is_file():
        return None
    found = results.load(path)
    keys = ("params", "weights_bytes", "test", "fidelity")
    return {
        "arms": {name: {key: entry[key] for key in keys} for name, entry in found["arms"].items()},
        "headline": results.headline(found),
        "caveat": results.caveat(found, test_examples),
    }


def _compression(workdir: Path, arm: str) -> list[dict[str, Any]]:
    """The steps of ``kdjax compress`` that led to an arm, first to last; none of an arm that is no such step."""
    path = Path(workdir) / "compress.json"
    steps = {row["name"]: row for row in report.load(path)["steps"]} if path.is_file() else {}
    chain: list[dict[str, Any]] = []
    while arm in steps:
        row = steps[arm]
        chain.insert(0, {key: row[key] for key in ("name", "method", "of", "params", "made", "alone", "distilled")})
        arm = row["of"]
    return chain


def by_class(dataset: Any, logits: np.ndarray, teacher: np.ndarray | None) -> list[dict[str, Any]]:
    """Each class of the test set, from logits [examples, classes] of a model and of its teachers together, if any."""
    labels = dataset.test.labels
    share = lambda value: None if np.isnan(value) else float(value)
    ours = metrics.per_class_accuracy(logits, labels)
    theirs = np.full(len(ours), np.nan) if teacher is None else metrics.per_class_accuracy(teacher, labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(ours))
    return [
        {"label": label, "examples": int(counts[i]), "accuracy": share(ours[i]), "teacher": share(theirs[i])}
        for i, label in enumerate(dataset.class_names)
    ]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, of the packages of these modules."""
    found = importlib.metadata.packages_distributions()
    names = [found.get(package, [package])[0] for package in packages]
    return {name: importlib.metadata.version(name) for name in names}

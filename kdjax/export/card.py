"""The model card of an artefact: what it is, where it comes from, and what it is worth, as JSON and as Markdown.

Pure functions of facts; whatever a user wrote is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdjax import memory
from kdjax import results as contract
from kdjax.untrusted import markdown as _text

SCHEMA = 1
_LABELS_SHOWN = 20
# So that the hub of Hugging Face knows what a folder in its layout is.
FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
---

"""


def make(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The card as JSON: the facts, and what is missing among them as ``warnings``.

    Args:
      facts: ``artefact`` (the manifest, without its files), ``model`` ({"name", "options"}), ``teachers`` (a list of
        {"name", "model", "init", "licence"}, of those who taught the arm), ``data`` ({"name", "train", "test",
        "licence"}, with the examples of each split), ``results`` ({"arms", "headline", "caveat"}, the first by name
        as in results.json; or None: the run was not scored), ``compression`` (a list of {"name", "method", "of",
        "params", "made", "alone", "distilled"}, the steps of compress.json that led to the arm), ``classes`` (a list
        of {"label", "examples", "accuracy", "teacher"}, accuracies on the test set, or None), ``traces`` (the files of
        text that the student learned from, as the config names them), ``versions`` (package -> version).
    """
    teachers = {f"the teacher (as {one['name']})": one["licence"] for one in facts["teachers"]}
    licences = teachers | {f"the data ({facts['data']['name']})": facts["data"]["licence"]}
    warnings = [
        f"no licence note for {what}: find out what it permits before this model is passed on."
        for what, licence in licences.items()
        if not licence.strip()
    ]
    if facts["results"] is None and not facts["compression"]:
        warnings.append("no results, for the run was not scored: run kdjax evaluate and export it again.")
    classes = facts["classes"] and sorted(facts["classes"], key=_loss)
    return {"schema": SCHEMA, **facts, "classes": classes, "warnings": warnings}


def _loss(row: Mapping[str, Any]) -> float:
    """What a class is sorted by: accuracy beside the teacher's, or by itself; a class that was not tested is last."""
    if row["accuracy"] is None:
        return float("inf")
    return row["accuracy"] - (row["teacher"] or 0.0)


def markdown(card: Mapping[str, Any]) -> str:
    """The card as Markdown, from what ``make`` returned."""
    about, model = card["artefact"], card["model"]
    parts = [f"# {_text(contract.ARMS.get(about['arm'], about['arm']))} ({_text(model['name'])}), {about['format']}"]
    parts += [f"> **Warning:** {_text(warning)}" for warning in card["warnings"]]
    parts += ["## Model", _table(("", ""), _model(about, model))]
    parts += ["## Teacher", _teachers(card["teachers"])]
    data = card["data"]
    sizes = f"{data['train']:,} training and {data['test']:,} test examples"
    parts += ["## Data", f"{_text(data['name'])}: {sizes}. Licence: {_licence(data['licence'])}."]
    parts += ["## Traces", _traces(card["traces"])]
    parts += ["## Results", *_results(card["results"], card["compression"])]
    parts += ["## Known losses", *_losses(card)]
    parts += ["## Parity", _parity(about["parity"])]
    parts += ["## Software", ", ".join(f"{_text(name)} {_text(v)}" for name, v in card["versions"].items()) + "."]
    return "\n\n".join(parts) + "\n"


def _model(about: Mapping[str, Any], model: Mapping[str, Any]) -> list[Sequence[str]]:
    port = lambda one: f"{one['name']}: {one['dtype']} [{', '.join(map(str, one['shape']))}]"
    done = about["preprocessing"]
    rows = {
        "options": ", ".join(f"{key}={value}" for key, value in model["options"].items()) or "none",
        "parameters": f"{about['params']:,}",
        "weights": f"{memory.bytes_text(about['weights_bytes'])} (file: {memory.bytes_text(about['file_bytes'])})",
        "opened by": f"{about['runtime'] or 'any reader of safetensors'}, as {about['model']}",
        "input": port(about["input"]),
        "output": port(about["output"]),
        "longest sequence": about["context"] and f"{about['context']:,} tokens",
        "preprocessing": done
        and f"inside the model: (input × {done['scale']:.6g} − {_numbers(done['mean'])}) / {_numbers(done['std'])}",
        "labels": about["labels"] and _labels(about["labels"]),
        "config SHA-256": about["config_sha256"],
        "parameters SHA-256": about["params_sha256"],
    }
    return [(key, _text(value)) for key, value in rows.items() if value is not None]


def _labels(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= _LABELS_SHOWN else f"{len(labels):,}, in manifest.json"


def _teachers(teachers: Sequence[Mapping[str, Any]]) -> str:
    if not teachers:
        return "None: this model learned from labels alone."
    rows = [
        (_text(one["name"]), _text(one["model"]), _text(one["init"] or "trained in this run"), _licence(one["licence"]))
        for one in teachers
    ]
    return _table(("name", "model", "weights", "licence"), rows)


def _traces(traces: Sequence[str]) -> str:
    if not traces:
        return "None: no text that a teacher wrote was given to this run as such."
    return f"Learned from {_text(', '.join(traces))}; who wrote that text is not known to kdjax."


def _results(results: Mapping[str, Any] | None, compression: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = [_compression(compression)] if compression else []
    if results is None:
        return steps or ["None: see the warning above."]
    arms = results["arms"]
    rows: list[Sequence[str]] = [("parameters", *(f"{arm['params']:,}" for arm in arms.values()))]
    for key in next(iter(arms.values()))["test"]:
        rows.append((key, *(f"{arm['test'][key]:,.5g}" for arm in arms.values())))
    names = [contract.ARMS.get(name, name) for name in arms]
    said = " ".join(filter(None, (results["headline"], results["caveat"])))
    return ["In JAX, on the test set:", _table(("", *names), rows), _text(said), *steps]


def _compression(steps: Sequence[Mapping[str, Any]]) -> str:
    accuracy = lambda score: _percent(score and score["accuracy"])
    rows = [
        (
            *(_text(step["name"]), _text(step["method"]), _text(contract.ARMS.get(step["of"], step["of"]))),
            f"{step['params']:,}",
            *(accuracy(step[when]) for when in ("made", "alone", "distilled")),
        )
        for step in steps
    ]
    head = ("step", "method", "made of", "parameters", "accuracy % as made", "trained alone %", "distilled %")
    return "How it was made smaller; alone is the control, trained without a teacher:\n\n" + _table(head, rows)


def _losses(card: Mapping[str, Any]) -> list[str]:
    if card["classes"]:
        rows = [
            (_text(row["label"]), f"{row['examples']:,}", _percent(row["accuracy"]), _percent(row["teacher"]))
            for row in card["classes"]
        ]
        caption = "Accuracy of this file by class on the test set, the largest loss first:"
        return [caption, _table(("class", "examples", "this model %", "teacher %"), rows)]
    arms = (card["results"] or {"arms": {}})["arms"]
    if {card["artefact"]["arm"], "teacher"} <= set(arms) and card["artefact"]["task"] == "language":
        ours, theirs = (arms[name]["test"] for name in (card["artefact"]["arm"], "teacher"))
        return [
            f"{ours['bits_per_byte']:.4f} bits per byte (teacher: {theirs['bits_per_byte']:.4f}), perplexity "
            f"{ours['perplexity']:.4g} (teacher: {theirs['perplexity']:.4g})."
        ]
    return ["Not measured."]


def _parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "Not compared: the file holds weights and is run by whoever loads them."
    return (
        f"Against JAX on {parity['examples']:,} test examples: the largest difference of a logit is "
        f"{parity['max_abs_difference']:.2g}, the same first choice on {_percent(parity['agreement'])} %, accuracy of "
        f"this file {_percent(parity['accuracy'])} %."
    )


def _licence(note: str) -> str:
    return _text(note) if note.strip() else "**not given**"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

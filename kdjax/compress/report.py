"""What a chain of compression steps cost and gained: ``compress.json`` as a contract (schema 1), and told to people."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any, NamedTuple

from rich.table import Table

from kdjax import memory
from kdjax import report_html as ui
from kdjax import results as contract
from kdjax.compress import quantise, sparsify
from kdjax.errors import UserError
from kdjax.measure import report as measured
from kdjax.model import Variables
from kdjax.untrusted import terminal
from kdjax.writers import write_atomic

SCHEMA = 1
SCORE = {"accuracy": 1.0, "nll": math.inf, "agreement": 1.0, "kl": math.inf}  # key -> the highest value
SIZE = ("params", "nonzero", "weights_bytes")


class Measure(NamedTuple):
    """The one number by which a task's models are compared in the table."""

    key: str
    label: str
    unit: str
    text: str  # a format of the value
    change: str  # of a difference
    factor: float
    better: int  # 1: more is better; -1: less


MEASURES = {
    "classification": Measure("accuracy", "accuracy %", "% accuracy", ".2f", "+.2f", 100.0, 1),
    "language": Measure("bits_per_byte", "bits per byte", "bits per byte", ".3f", "+.3f", 1.0, -1),
}


def sizes(spec: Mapping[str, Any], variables: Variables) -> dict[str, int]:
    """Parameters, those that are not zero, and the bytes of all weights as an export stores them."""
    rule = spec.get("quantise")
    return {
        "params": contract.count(variables),
        "nonzero": sparsify.sparsity(variables["params"])["nonzero"],
        "weights_bytes": quantise.weights_bytes(variables["params"], variables["state"], rule),
    }


def build(
    *,
    config_sha256: str,
    seed: int,
    task: str,
    models: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole of ``compress.json``, with the environment of this process."""
    found = {
        "schema": SCHEMA,
        "config_sha256": config_sha256,
        "seed": int(seed),
        "task": task,
        "environment": contract.environment(),
        "models": {name: dict(model) for name, model in models.items()},
        "steps": [dict(step) for step in steps],
    }
    found = json.loads(json.dumps(found))  # tuples of a spec as the file has them
    validate(found)
    return found


def write(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
    """Checks the contract, then writes the file whole or not at all."""
    validate(found)
    write_atomic(path, json.dumps(found, indent=2, allow_nan=False) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a ``compress.json``; UserError if it is missing, torn, or not of this schema."""
    found = contract.read_json(path, "finish `kdjax compress --workdir ...` first", "run it again")
    validate(found)
    return found


def validate(found: Any) -> None:
    """Raises a UserError that names the first key that breaks the contract."""
    contract.check_keys(
        "compress", found, {"schema", "config_sha256", "seed", "task", "environment", "models", "steps"}
    )
    if found["schema"] != SCHEMA:
        raise UserError(f"compress.json is of schema {found['schema']!r}, this reads schema {SCHEMA}: run it again.")
    contract.check_sha256("compress.config_sha256", found["config_sha256"])
    contract.check_environment("compress.environment", found["environment"])
    if not isinstance(found["task"], str) or found["task"] not in MEASURES:
        raise contract.wrong("compress.task", f"one of {', '.join(MEASURES)}", found["task"])
    for key, kind in (("models", dict), ("steps", list)):
        if not isinstance(found[key], kind):
            raise contract.wrong(f"compress.{key}", f"a {kind.__name__}", found[key])
    for name, model in found["models"].items():
        path = f"compress.models.{name}"
        contract.check_keys(path, model, {"spec", "score", *SIZE})
        _score(f"{path}.score", model["score"])
        contract.check_measured(path, model, SIZE, {})
    for number, step in enumerate(found["steps"]):
        path = f"compress.steps.{number}"
        texts = {"name", "method", "of", "teacher"}
        scores = {"before", "made", "alone", "distilled"}
        contract.check_keys(path, step, texts | scores | {"options", "spec", "updates", "seconds", *SIZE})
        for key in sorted(texts):
            if not isinstance(step[key], str):
                raise contract.wrong(f"{path}.{key}", "a string", step[key])
        for key in sorted(scores):
            if step[key] is not None or key in ("before", "made"):
                _score(f"{path}.{key}", step[key])
        contract.check_measured(path, step, ("updates", *SIZE), {})
        if step["seconds"] is not None:
            contract.check_number(f"{path}.seconds", step["seconds"])


def _score(path: str, score: Any) -> None:
    contract.check_keys(path, score, set(SCORE), open_ended=True)
    for key, high in SCORE.items():
        contract.check_number(f"{path}.{key}", score[key], high)


# ------------------------------------------------------------------------------------------------ shown to a person


def table(found: Mapping[str, Any]) -> Table:
    """The chain as one table for a terminal: a column per model, as in the table of a run."""
    title = f"Test {MEASURES[found['task']].label}"
    shown = Table(title=title, title_justify="left", caption=caption(found), caption_justify="left")
    head, rows = cells(found)
    shown.add_column("")
    for row in rows:
        shown.add_column(terminal(row[0]), justify="right")
    for number, label in enumerate(head[1:], 1):
        shown.add_row(label, *(terminal(row[number]) for row in rows))
    return shown


def cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as texts."""
    measure = MEASURES[found["task"]]

    def value(score: Mapping[str, Any] | None) -> str:
        return "" if score is None else format(measure.factor * score[measure.key], measure.text)

    size = lambda row: [f"{row['nonzero']:,}" if _is_sparse(row) else f"{row['params']:,}", _bytes(row)]
    head = ["", "method", "made of", "parameters", "weights", "as made", "trained alone", "distilled"]
    head += ["change", "agrees with teacher %", "updates", "seconds"]
    rows: list[list[str]] = []

    def label(name: str) -> str:
        return contract.ARMS.get(name, name)

    for name, model in found["models"].items():
        agrees = f"{100 * model['score']['agreement']:.2f}"
        rows.append([label(name), "", "", *size(model), value(model["score"]), "", "", "", agrees, "", ""])
    for step in found["steps"]:
        last = step["distilled"] or step["made"]
        change = measure.factor * (last[measure.key] - step["before"][measure.key])
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.0f}"
        rows.append(
            [
                *(step["name"], step["method"], label(step["of"]), *size(step)),
                *(value(step[key]) for key in ("made", "alone", "distilled")),
                *(format(change, measure.change), f"{100 * last['agreement']:.2f}"),
                *(f"{step['updates']:,}" if step["updates"] else "", seconds),
            ]
        )
    return head, rows


def caption(found: Mapping[str, Any]) -> str:
    """What the columns say, and what one seed does not."""
    sparse = " Of a thinned-out model, the parameters that are not 0." if any(map(_is_sparse, found["steps"])) else ""
    return (
        "Trained alone: after the step, without a teacher, with as many updates. Change: against the model that it is "
        f"made of.{sparse} One seed: small differences are noise (kdjax bench compress --seeds 5)."
    )


def write_html(path: str | os.PathLike[str], found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The chain as a page: the table, and what was run."""
    head, rows = cells(found)
    body = [[escape(cell) for cell in column] for column in zip(head, *rows, strict=True)]
    facts = [config["data"]["name"], f"seed {found['seed']}", found["environment"]["date"][:10]]
    top = (
        f'<header><p class="eyebrow"><b>kdjax</b> compression</p><h1>{escape(headline(found))}</h1>'
        f'<p class="facts">{escape(" · ".join(facts))}</p></header>'
    )
    models = [(name, model["score"], model) for name, model in found["models"].items()]
    models += [(step["name"], step["distilled"] or step["made"], step) for step in found["steps"]]
    points = [
        (contract.ARMS.get(name, name), float(sizes["weights_bytes"]), score["accuracy"], color)
        for (name, score, sizes), color in zip(models, cycle(measured.COLORS), strict=False)
    ]
    keys = "".join(measured.key(name, color) for name, _, _, color in points)
    drawn = measured.front(points, title="Accuracy against size", label="weights, bytes")
    specs = json.dumps({step["name"]: step["spec"] for step in found["steps"]}, indent=2)
    sections = [
        (
            f"Test {MEASURES[found['task']].label}, step by step",
            ui.table(body[0], body[1:]) + ui.note(caption(found)),
        ),
        ("Accuracy against size", ui.grid(ui.figure("Left is smaller", f'<p class="legend">{keys}</p>{drawn}'))),
        (
            "What was run",
            ui.fold("Models", f"<pre>{escape(specs)}</pre>")
            + ui.fold("Config", f"<pre>{escape(json.dumps(config, indent=2, default=str))}</pre>")
            + ui.environment(found["environment"]),
        ),
    ]
    write_atomic(path, ui.document(f"kdjax compression: {facts[0]}", top, sections))


def headline(found: Mapping[str, Any]) -> str:
    """What the last step came to, against the teacher."""
    measure, teacher, last = MEASURES[found["task"]], found["models"]["teacher"], found["steps"][-1]
    score = last["distilled"] or last["made"]
    text = lambda score: format(measure.factor * score[measure.key], measure.text)
    smaller = teacher["weights_bytes"] / max(last["weights_bytes"], 1)
    return (
        f"{last['name']} has weights {smaller:.1f} times smaller than the teacher's and {text(score)} {measure.unit} "
        f"(the teacher: {text(teacher['score'])})."
    )


def _is_sparse(row: Mapping[str, Any]) -> bool:
    return row["nonzero"] < 0.9 * row["params"]  # a few zeros are everywhere, such as in fresh biases


def _bytes(row: Mapping[str, Any]) -> str:
    return memory.bytes_text(row["weights_bytes"])

"""What the reports of all tasks have: the header, the learning curves, the cost, the schedules, the environment."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import numpy as np

from kdjax import report_html as ui
from kdjax import report_plots
from kdjax.results import ARMS, bytes_text, headline

TERM_COLORS = ("s1", "s2", "s3", "s4", "s5")
Curve = tuple[str, str, Sequence[float], Sequence[float]]  # label, colour name, steps, values
History = Sequence[Mapping[str, Any]]  # the records of metrics.jsonl


def title(config: Mapping[str, Any]) -> str:
    """The name of the page."""
    return f"kdjax report: {config.get('data', {}).get('name', 'distillation')}"


def header(results: Mapping[str, Any], config: Mapping[str, Any], *, note: str, cards: str) -> str:
    """The headline, a remark on it unless that is empty, what ran, and the cards (ready HTML)."""
    environment = results["environment"]
    facts = [
        config.get("data", {}).get("name"),
        f"seed {results['seed']}",
        f"{environment['device_count']} × {environment['device_kind']}",
        f"config {results['config_sha256'][:10]}",
        environment["date"][:10],
    ]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    return (
        f'<header><p class="eyebrow"><b>kdjax</b> distillation report</p><h1>{escape(headline(results))}</h1>'
        f'{f"<p class=lead>{escape(note)}</p>" if note else ""}<p class="facts">{line}</p>{cards}</header>'
    )


def curves(history: History, arms: Sequence[str], *, accuracy: str, log: bool) -> str:
    """Loss, accuracy on the test set and terms of the loss of each arm over its steps.

    ``accuracy`` is the title of its plot. ``log`` is for losses that go down by powers of ten; an axis of less than one
    has no labels.
    """
    loss = [_curve(history, arm, "loss", ARMS[arm], arm) for arm in arms]
    right = [_curve(history, arm, "eval_accuracy", ARMS[arm], arm) for arm in arms]
    plots = _plot(loss, "Training loss", log=log) + _plot(right, accuracy, percent=True)
    for arm in arms:
        named = zip(_terms(history, arm), cycle(TERM_COLORS))
        terms = [_curve(history, arm, term, term, color) for term, color in named]
        if len(terms) > 1:
            plots += _plot(terms, f"Terms of the loss before their weights, {ARMS[arm]}", log=log)
    note = "Losses of different arms are sums of different terms: compare shapes, not heights."
    return plots and ui.grid(plots) + ui.note(note)


def cost(arms: Mapping[str, Mapping[str, Any]], *, of: str) -> str:
    """Sizes and latencies of the arms as bars; ``of`` is the word for what one forward pass takes."""
    time = lambda value: f"{value:.3g} ms"
    quantities: dict[str, tuple[Callable[[Any], float], Callable[[float], str]]] = {
        "Parameters": (lambda arm: arm["params"], lambda value: f"{value:,}"),
        "Weights": (lambda arm: arm["weights_bytes"], bytes_text),
        f"Latency of one {of}, median": (lambda arm: arm["latency_ms"]["p50"], time),
        f"Latency of one {of}, 99th percentile": (lambda arm: arm["latency_ms"]["p99"], time),
    }
    figures = [
        ui.figure(title, ui.bars({name: pick(arm) for name, arm in arms.items()}, text))
        for title, (pick, text) in quantities.items()
    ]
    return ui.grid("".join(figures))


def schedules(history: History, arms: Sequence[str]) -> str:
    """The learning rate of every arm and the other scheduled numbers of the last one, over the steps."""
    main = arms[-1]
    rate = [_curve(history, arm, "learning_rate", ARMS[arm], arm) for arm in arms]
    plots = _plot(rate, "Learning rate")
    hparams = dict.fromkeys(
        name for record in history if record.get("arm") == main for name in record.get("hparams") or {}
    )
    hparams.pop("learning_rate", None)
    colors = dict(zip(dict.fromkeys(name.rpartition(".")[0] for name in hparams), cycle(TERM_COLORS)))
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in hparams):
        drawn = []
        for name in hparams:
            term, _, last = name.rpartition(".")
            if last == kind:
                drawn.append(_curve(history, main, name, term or name, colors[term]))
        plots += _plot(drawn, f"{kind.replace('_', ' ').capitalize()}, {ARMS[main]}")
    return plots and ui.grid(plots)


def details(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The environment, the digests of the parameters and the config, each of which unfolds."""
    sums = [[ui.arm_label(name), f"<code>{arm['params_sha256']}</code>"] for name, arm in results["arms"].items()]
    shown = json.dumps(config, indent=2, default=str, ensure_ascii=False)
    digest = f"<p>SHA-256 <code>{escape(results['config_sha256'])}</code></p>"
    return (
        ui.environment(results["environment"])
        + ui.fold("Digests of the parameters", ui.table(["", "SHA-256"], sums, texts=2))
        + ui.fold("Config", f"{digest}<pre>{escape(shown)}</pre>")
    )


def _curve(history: History, arm: str, key: str, label: str, color: str) -> Curve:
    """A metric or hyperparameter of one arm over its steps; null (a NaN that was written) becomes NaN again."""
    steps, values = [], []
    for record in history:
        source = {**(record.get("hparams") or {}), **record}
        if record.get("arm") == arm and key in source:
            steps.append(record["step"])
            values.append(math.nan if source[key] is None else source[key])
    return label, color, steps, values


def _terms(history: History, arm: str) -> list[str]:
    """The terms of an arm's loss, in the order of the history: what has a weight and was logged."""
    records = [record for record in history if record.get("arm") == arm]
    weights = dict.fromkeys(
        name for record in records for name in record.get("hparams") or {} if name.endswith(".weight")
    )
    terms = [name.removesuffix(".weight") for name in weights]
    return [term for term in terms if any(term in record for record in records)]


def _plot(curves: Iterable[Curve], title: str, *, percent: bool = False, log: bool = False) -> str:
    drawn = [curve for curve in curves if np.isfinite(curve[3]).any()]
    return ui.figure(title, report_plots.lines(drawn, title=title, percent=percent, log=log)) if drawn else ""

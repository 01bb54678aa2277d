"""What the reports of all tasks have: the header, the learning curves, the cost, the schedules, the environment."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import numpy as np

from kdjax import progress, report_plots
from kdjax import report_html as ui
from kdjax.memory import bytes_text
from kdjax.progress import History, Series, series
from kdjax.results import ARMS, headline

SERIES_COLORS = ("s1", "s2", "s3", "s4", "s5")
CAUSE_COLORS = dict(zip(progress.CAUSES, ("s1", "s2", "s3", "s5", "s4", "muted", "bad"), strict=True))
HPARAMS = "hparams/"  # what their keys in a series begin with
Curve = tuple[str, str, Sequence[float], Sequence[float]]  # label, colour name, steps, values


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
    """Loss, accuracy on the test set, agreement with the teacher and terms of the loss of each arm over its steps.

    ``accuracy`` is the title of its plot. ``log`` is for losses that go down by powers of ten; an axis of less than one
    has no labels.
    """
    found, colors = series(history), colors_of(arms)
    each = lambda key: [_curve(found, arm, key, ui.label(arm), colors[arm]) for arm in arms]
    plots = _plot(each("loss"), "Training loss", log=log) + _plot(each("eval_accuracy"), accuracy, percent=True)
    plots += _plot(each("agreement"), "Agreement with the teacher, training batches", percent=True)
    for arm in arms:
        terms = list(zip(_terms(found, arm), cycle(SERIES_COLORS)))
        if len(terms) > 1:
            plain = [_curve(found, arm, term, term, color) for term, color in terms]
            weighted = [_weighted(found, arm, term, color) for term, color in terms]
            plots += _plot(plain, f"Terms of the loss before their weights, {ui.label(arm)}", log=log)
            plots += _plot(weighted, f"Terms of the loss times their weights, {ui.label(arm)}", log=log)
        plots += _of_members(found, arm)
    note = "Losses of different arms are sums of different terms: compare shapes, not heights."
    return plots and ui.grid(plots) + ui.note(note)


def updates(history: History, arms: Sequence[str]) -> str:
    """Norms of the gradients and updates of each arm, and the steps that it skipped, over its steps."""
    found, colors = series(history), colors_of(arms)
    each = lambda key: [_curve(found, arm, key, ui.label(arm), colors[arm]) for arm in arms]
    plots = _plot(each("grad_norm"), "Norm of the gradient", log=True)
    plots += _plot(each("update_norm"), "Norm of the update", log=True)
    skipped = [curve for curve in each("skipped") if any(curve[3])]
    plots += _plot(skipped, "Steps skipped since the line before")
    return plots and ui.grid(plots)


def speed(history: History, arms: Sequence[str]) -> str:
    """Training throughput over the steps, and what each arm's seconds went to."""
    found, colors = series(history), colors_of(arms)
    rates = [_curve(found, arm, "examples_per_s", ui.label(arm), colors[arm]) for arm in arms]
    plots = _plot(rates, "Examples per second")
    spent = {arm: by_cause for arm in arms if (by_cause := progress.seconds(found.get(arm, {})))}
    if not spent:
        return plots and ui.grid(plots)
    bars, body = "", []
    shown = [cause for cause in CAUSE_COLORS if any(cause in by_cause for by_cause in spent.values())]
    for arm, by_cause in spent.items():
        total = sum(by_cause.values())
        shares = [(progress.CAUSES[c], by_cause[c] / total, CAUSE_COLORS[c]) for c in shown if c in by_cause]
        bars += ui.stack(ui.label(arm), shares)
        times = (progress.duration(by_cause[cause]) if cause in by_cause else "–" for cause in shown)
        good = ui.percent(progress.goodput(by_cause) or 0.0)
        body.append([ui.arm_label(arm, colors[arm]), progress.duration(total), good, *times])
    head = ["", "in all", "goodput", *(progress.CAUSES[cause] for cause in shown)]
    note = (
        "Goodput is the time in steps that were kept over all the time that the training took. Steps done again after "
        "a kill count with the mean time of a step; the time in which no process ran does not count."
    )
    return ui.grid(plots + ui.figure("Where the time went", bars)) + ui.note(note) + ui.table(head, body)


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
    if not arms:
        return ""
    found, colors, main = series(history), colors_of(arms), arms[-1]
    rate = [_curve(found, arm, f"{HPARAMS}learning_rate", ui.label(arm), colors[arm]) for arm in arms]
    plots = _plot(rate, "Learning rate")
    names = [key.removeprefix(HPARAMS) for key in found.get(main, {}) if key.startswith(HPARAMS)]
    names = [name for name in names if name != "learning_rate"]
    of_term = dict(zip(dict.fromkeys(name.rpartition(".")[0] for name in names), cycle(SERIES_COLORS)))
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in names):
        drawn = []
        for name in names:
            term, _, last = name.rpartition(".")
            if last == kind:
                drawn.append(_curve(found, main, HPARAMS + name, term or name, of_term[term]))
        plots += _plot(drawn, f"{kind.replace('_', ' ').capitalize()}, {ui.label(main)}")
    return plots and ui.grid(plots)


def details(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The environment, the digests of the parameters and the config, each of which unfolds."""
    sums = [
        [ui.arm_label(name), f"<code>{escape(arm['params_sha256'])}</code>"] for name, arm in results["arms"].items()
    ]
    shown = json.dumps(config, indent=2, default=str, ensure_ascii=False)
    digest = f"<p>SHA-256 <code>{escape(results['config_sha256'])}</code></p>"
    return (
        ui.environment(results["environment"])
        + ui.fold("Digests of the parameters", ui.table(["", "SHA-256"], sums, texts=2))
        + ui.fold("Config", f"{digest}<pre>{escape(shown)}</pre>")
    )


def colors_of(arms: Sequence[str]) -> dict[str, str]:
    """The colour of each arm in plots: its own, where it has one."""
    others = zip((arm for arm in arms if arm not in ARMS), cycle(SERIES_COLORS))
    return {arm: arm for arm in arms if arm in ARMS} | dict(others)


def _curve(found: Mapping[str, Series], arm: str, key: str, label: str, color: str) -> Curve:
    """A number of one arm over its steps."""
    return label, color, *found.get(arm, {}).get(key, ([], []))


def _weighted(found: Mapping[str, Series], arm: str, term: str, color: str) -> Curve:
    """A term times its weight, where both were logged."""
    steps, values = found[arm][term]
    weights = dict(zip(*found[arm][f"{HPARAMS}{term}.weight"], strict=True))
    return term, color, steps, [value * weights.get(step, math.nan) for step, value in zip(steps, values, strict=True)]


def _of_members(found: Mapping[str, Series], arm: str) -> str:
    """The loss and accuracy of a population: the mean, and the range over its members."""
    plots = ""
    for key, title in (("loss", "Loss"), ("accuracy", "Training accuracy")):
        names = {"lowest": f"members/{key}/low", "mean": key, "highest": f"members/{key}/high"}
        if names["lowest"] in found.get(arm, {}):
            drawn = zip(names, ("s5", "s1", "s2"), strict=True)
            ranges = [_curve(found, arm, names[name], name, color) for name, color in drawn]
            plots += _plot(ranges, f"{title} of the members, {ui.label(arm)}", percent=key == "accuracy")
    return plots


def _terms(found: Mapping[str, Series], arm: str) -> list[str]:
    """The terms of an arm's loss, in the order of the history: what has a weight and was logged."""
    numbers = found.get(arm, {})
    weights = (key for key in numbers if key.startswith(HPARAMS) and key.endswith(".weight"))
    terms = [key.removeprefix(HPARAMS).removesuffix(".weight") for key in weights]
    return [term for term in terms if term in numbers]


def _plot(curves: Iterable[Curve], title: str, *, percent: bool = False, log: bool = False) -> str:
    drawn = [curve for curve in curves if np.isfinite(curve[3]).any()]
    return ui.figure(title, report_plots.lines(drawn, title=title, percent=percent, log=log)) if drawn else ""

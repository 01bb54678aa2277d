"""A measurement for a person: the table of the terminal, and ``measure.html``, one page without a script or a request.

``report_html.py`` has the look and ``report_plots.py`` the style of the plots.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import numpy as np
from rich.table import Table

from kdjax import report_html as ui
from kdjax.measure import machine
from kdjax.measure import results as contract
from kdjax.memory import bytes_text
from kdjax.report_plots import HEX, draw_svg
from kdjax.untrusted import terminal
from kdjax.writers import write_atomic

COLORS = ("teacher", "student_distilled", "student_alone", "s3", "s4", "s5")  # of the reference, then of the others
CALLS_LEAST = 1000  # for the 99th percentile: with fewer it stands on less than ten calls
CSS = """
td em { display: block; font-style: normal; font-size: 12.5px; color: var(--muted); }
td em.up { color: var(--student_distilled); } td em.down { color: var(--bad); }
th .key { white-space: normal; } .note + .grid { margin-top: 14px; }
"""
SIZE, TIME, RATE, NONE = ("smaller", "larger"), ("quicker", "slower"), ("more", "less"), ("", "")  # better, worse
Entry = Mapping[str, Any]
Text = Callable[[Entry], str | None]


def write_report(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
    """Checks the contract (``results.validate``), then writes the page whole or not at all."""
    contract.validate(found)
    write_atomic(path, page(found))


def table(found: Mapping[str, Any]) -> Table:
    """One row per quantity, one column per model, with its ratio to the reference below; the verdicts beneath."""
    caption = terminal("\n".join([headline(found), *remarks(found)]), "table.caption")
    shown = Table(caption=caption, caption_justify="left")
    shown.add_column("")
    for name in found["models"]:
        shown.add_column(terminal(name), justify="right")
    for label, cells in rows(found):
        shown.add_row(label, *(f"{text}\n[dim]{ratio}[/dim]" if ratio else text for text, ratio in cells))
    return shown


def page(found: Mapping[str, Any]) -> str:
    """The whole HTML document."""
    sections = [
        ("Accuracy against cost", _fronts(found)),
        ("All figures", _figures(found)),
        ("The machine while it was measured", _machine(found)),
        ("How this was measured", _how(found)),
    ]
    return ui.document(f"kdjax measurement on {found['data']['name']}", _header(found), sections, CSS)


# ------------------------------------------------------------------------------------------------------------- words


def headline(found: Mapping[str, Any]) -> str:
    """What the measurement came to, in one sentence: the first model that is not the reference, against it."""
    names = list(found["models"])
    entry = found["models"][names[min(1, len(names) - 1)]]
    accuracy = _percent(entry["test"]["accuracy"])
    if len(names) == 1:
        return f"{names[0]} has {accuracy} accuracy at {_ms(entry['latency_ms']['p50'])} for one {_item(found)}."
    against = entry["ratios"]
    size = _ratio(against["weights_bytes"] or against["file_bytes"], SIZE)
    return (
        f"{names[1]} is {size} and {_ratio(against['p50'], TIME)} than {names[0]}, and has {accuracy} "
        f"accuracy for {_percent(found['models'][names[0]]['test']['accuracy'])}."
    )


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Whether to trust the figures, and what they stand on where that is less than usual."""
    data, calls = found["data"], found["settings"]["calls"]
    said = [machine.sentence(found["machine"])]
    if data["examples"] < data["of"]:
        said.append(
            f"Accuracy and agreement are of {data['examples']:,} of the {data['of']:,} windows of the test split, at "
            "even distances: all would have taken too long."
        )
    if calls < CALLS_LEAST:
        said.append(f"{calls:,} timed calls of each: percentiles beyond the median are rough below {CALLS_LEAST:,}.")
    return said


def rows(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """One row per quantity that any model has: its label and, of each model, a text and its ratio ("" for none)."""
    item, models = _item(found), list(found["models"].values())
    at = lambda key, batch: lambda entry: entry[key][batch]
    share = lambda key: lambda entry: _percent(entry["test"][key])
    rate = lambda batch: lambda entry: f"{_rounded(entry['items_per_s'][batch])}"
    tokens: Text = lambda entry: entry["tokens_per_s"] and _rounded(entry["tokens_per_s"]["32"])
    bits: Text = lambda entry: entry["test"]["bits_per_byte"] and f"{entry['test']['bits_per_byte']:.3f}"
    time = lambda key: lambda entry: _ms(entry["latency_ms"][key])
    cpu = lambda batch: lambda entry: f"{at('cpu_s_per_1000', batch)(entry):.3g} s"
    joules = lambda batch: (
        lambda entry: f"{entry['joules_per_1000'][batch]:.3g} J" if batch in (entry["joules_per_1000"] or {}) else None
    )
    size = lambda key: lambda entry: None if entry[key] is None else bytes_text(entry[key])
    memory = lambda batch: lambda entry: bytes_text(at("peak_bytes", batch)(entry))
    quantities: list[tuple[str, Text, str, tuple[str, str]]] = [
        ("accuracy", share("accuracy"), "accuracy", NONE),
        ("agreement with the first", share("agreement"), "", NONE),
        ("bits per byte", bits, "", NONE),
        ("latency p50, batch 1", time("p50"), "p50", TIME),
        ("latency p90", time("p90"), "", NONE),
        ("latency p99", time("p99"), "", NONE),
        (f"{item}s/s, batch 8", rate("8"), "items_per_s_8", RATE),
        (f"{item}s/s, batch 32", rate("32"), "items_per_s_32", RATE),
        ("tokens/s, batch 32", tokens, "", NONE),
        ("parameters", lambda entry: None if entry["params"] is None else f"{entry['params']:,}", "", NONE),
        ("weights", size("weights_bytes"), "weights_bytes", SIZE),
        ("file", size("file_bytes"), "file_bytes", SIZE),
        ("peak memory over imports, batch 1", memory("1"), "", NONE),
        ("peak memory over imports, batch 32", memory("32"), "", NONE),
        (f"CPU time of 1,000 {item}s, batch 1", cpu("1"), "", NONE),
        (f"CPU time of 1,000 {item}s, batch 32", cpu("32"), "", NONE),
        (f"energy of 1,000 {item}s, batch 1", joules("1"), "", NONE),
        (f"energy of 1,000 {item}s, batch 32", joules("32"), "", NONE),
    ]
    lines = []
    for label, text, key, words in quantities:
        texts = [text(entry) for entry in models]
        if any(texts):
            against = [_against(entry, key, words) for entry in models]
            lines.append((label, list(zip((one or "–" for one in texts), against, strict=True))))
    return lines


def _against(entry: Entry, key: str, words: tuple[str, str]) -> str:
    value = (entry["ratios"] or {}).get(key)
    if not value:
        return ""
    return f"{_percent(value)} of it" if key == "accuracy" else _ratio(value, words)


def _ratio(value: float, words: tuple[str, str]) -> str:
    """0.5 as "2.0 × slower"."""
    factor, word = (value, words[0]) if value >= 1 else (1 / value, words[1])
    return f"{factor:,.0f} × {word}" if factor >= 100 else f"{factor:.1f} × {word}"


def _item(found: Mapping[str, Any]) -> str:
    return "window" if found["data"]["task"] == "language" else "image"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _rounded(value: float) -> str:
    """Three significant digits: 12,300."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------- sections


def _header(found: Mapping[str, Any]) -> str:
    environment, settings = found["environment"], found["settings"]
    facts = [
        found["data"]["name"],
        f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}",
        environment["cpu"],
        environment["date"][:10],
    ]
    lead = "".join(f'<p class="lead">{escape(text)}</p>' for text in remarks(found))
    line = " · ".join(escape(str(fact)) for fact in facts)
    return (
        f'<header><p class="eyebrow"><b>kdjax</b> measurement</p><h1>{escape(headline(found))}</h1>{lead}'
        f'<p class="facts">{line}</p></header>'
    )


def _fronts(found: Mapping[str, Any]) -> str:
    costs: dict[str, tuple[str, Callable[[Entry], float | None]]] = {
        "Accuracy against latency": (f"median latency of one {_item(found)}, ms", lambda e: e["latency_ms"]["p50"]),
        "Accuracy against size": ("weights, bytes", lambda entry: entry["weights_bytes"]),
    }
    figures = ""
    for title, (label, cost) in costs.items():
        kept = {name: cost(entry) for name, entry in found["models"].items()}
        points = [
            (name, value, found["models"][name]["test"]["accuracy"], color)
            for (name, value), color in zip(kept.items(), cycle(COLORS))
            if value
        ]
        if points:
            svg = front(points, title=title, label=label)
            legend = "".join(key(name, color) for name, *_, color in points)
            figures += ui.figure(title, f'<p class="legend">{legend}</p>{svg}')
    return ui.grid(figures) + ui.note(
        "The line joins the models that no other one beats: none is both cheaper and better. Left is cheaper."
    )


def front(points: Sequence[tuple[str, float, float, str]], *, title: str, label: str) -> str:
    """Accuracy in percent over a cost on a logarithmic axis, and the Pareto front as a line of steps.

    ``points`` are (name, cost, accuracy as a fraction, colour name).
    """

    def draw(axes: Any) -> None:
        x, y = np.array([point[1] for point in points]), 100 * np.array([point[2] for point in points])
        best = contract.pareto(list(zip(x.tolist(), y.tolist(), strict=True)))
        margin = 0.15 * max(np.ptp(y), 0.5)
        axes.set(xscale="log", xlim=(x.min() / 1.6, x.max() * 1.6), ylim=(y.min() - margin, y.max() + margin))
        ends = [x.max() * 1.6], [y[best[-1]]]  # the best is worth no less where more may be spent
        axes.plot(
            [*x[best], *ends[0]], [*y[best], *ends[1]], color=HEX["muted"], linewidth=1.1, linestyle=(0, (4, 3)),
            drawstyle="steps-post", zorder=1,
        )  # fmt: skip
        for one, value, (*_, color) in zip(x, y, points, strict=True):
            axes.scatter(one, value, s=46, color=HEX[color], zorder=3, linewidths=0)
        _decades(axes.xaxis)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy %")

    return draw_svg(4.5, 3.1, title, draw)


def _decades(axis: Any) -> None:
    """Labels at 1, 2 and 5 of each decade of a logarithmic axis."""
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(lambda value, _: f"{value:,g}" if f"{value:.0e}"[0] in "25" else "")


def _figures(found: Mapping[str, Any]) -> str:
    head = ["", *(key(name, color) for name, color in zip(found["models"], cycle(COLORS)))]
    cell = lambda text, ratio: escape(text) + (f'<em class="{_kind(ratio)}">{escape(ratio)}</em>' if ratio else "")
    body = [[escape(label), *(cell(*one) for one in cells)] for label, cells in rows(found)]
    return ui.table(head, body)


def _machine(found: Mapping[str, Any]) -> str:
    def draw(axes: Any) -> None:
        for (name, entry), color in zip(found["models"].items(), cycle(COLORS)):
            medians = entry["latency_ms"]["rounds"]
            axes.plot(range(1, len(medians) + 1), medians, color=HEX[color], marker="o", markersize=2.6, label=name)
        axes.set_yscale("log")
        _decades(axes.yaxis)
        axes.set_xlabel("round")
        axes.set_ylabel("median latency, ms")
        axes.locator_params(axis="x", nbins=8, integer=True)

    title = "Median latency of each round"
    legend = "".join(key(name, color) for name, color in zip(found["models"], cycle(COLORS)))
    said = found["machine"]
    share = lambda key: "unknown" if said[key] is None else f"{100 * said[key]:.1f}<small> %</small>"
    facts = [
        ["other processes, of the cores that were used", share("others")],
        ["the machine's other cores", share("elsewhere")],
        ["time that the hypervisor gave away", share("steal")],
        ["those cores, before the measurement", share("busy_before")],
        ["load average before", "unknown" if said["load_before"] is None else f"{said['load_before']:.2f}"],
        *(
            [f"spread of the rounds, {escape(name)}", f"{100 * value:.1f}<small> %</small>"]
            for name, value in said["spread"].items()
        ),
    ]
    figure = ui.figure(title, f'<p class="legend">{legend}</p>{draw_svg(4.5, 3.1, title, draw)}')
    return f'<p class="note">{escape(machine.sentence(said))}</p>' + ui.grid(figure + ui.table(["busy", ""], facts))


def _how(found: Mapping[str, Any]) -> str:
    settings, data = found["settings"], found["data"]
    cores = settings["cores"]
    where = f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}" if cores else "any core"
    notes = [
        f"Each model ran in a process of its own, on {where}, with {settings['threads']} thread"
        f"{'s' if settings['threads'] > 1 else ''}; they took turns in {settings['rounds']} rounds, every second one "
        "the other way round. A call is timed from an array in memory to an array in memory; what a file of another "
        "maker wants done to its inputs before is not.",
        f"Latency: {settings['calls']:,} calls of one {_item(found)} each, of real test examples. Rates: the median of "
        "the rounds. Memory: the most that the process ever held, over what it held once its runtime was imported.",
        f"Accuracy and agreement are computed from what the files themselves answer for {data['examples']:,} test "
        f"{'rows' if data['task'] == 'language' else 'images'} ({data['positions']:,} labels).",
    ]
    versions = {entry["runtime"]: entry["version"] for entry in found["models"].values()}
    environment = dict(found["environment"])
    environment["packages"] = {**environment["packages"], **versions}
    files = [
        [
            key(name, color),
            f"<code>{escape(entry['path'])}</code>",
            escape(f"{entry['format']}, {entry['runtime']} {entry['version']}"),
        ]
        for (name, entry), color in zip(found["models"].items(), cycle(COLORS))
    ]
    return (
        "".join(map(ui.note, notes))
        + ui.fold("Files", ui.table(["", "", ""], files, texts=3))
        + ui.environment(environment)
    )


def key(name: str, color: str) -> str:
    """The name of a model with its colour."""
    return f'<span class="key" style="--c:var(--{color})">{escape(name)}</span>'


def _kind(ratio: str) -> str:
    """The class of a ratio's colour; none for what rounds to the same."""
    if ratio.startswith("1.0 ×"):
        return ""
    if ratio.endswith((SIZE[0], TIME[0], RATE[0])):
        return "up"
    return "down" if ratio.endswith((SIZE[1], TIME[1], RATE[1])) else ""

"""``report.html`` of a comparison: one self-contained page, without a script or a request to anywhere.

``plots.py`` draws, ``summary.py`` has the figures and the sentences, ``report_html.py`` the look.
"""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kdjax import report_html as ui
from kdjax import statistics
from kdjax.compare import plots
from kdjax.compare import results as contract
from kdjax.compare.summary import (
    BETTER,
    TIED,
    WORSE,
    cell,
    columns,
    least_sd,
    legend,
    markdown,
    sentence,
    sentences,
    summarise,
    table,
)  # fmt: skip
from kdjax.writers import write_atomic

__all__ = ["markdown", "page", "sentence", "summarise", "table", "write_report"]

COLORS = {BETTER: "student_distilled", WORSE: "bad", TIED: "muted"}
CONTROL, BASELINE = "student_alone", "s3"  # colours
CSS = """
.board th, .board td { padding: 7px 9px; } .board table { font-size: 14px; }
.board th { white-space: normal; vertical-align: bottom; min-width: 44px; } .board .t { white-space: nowrap; }
h1 + .lead { margin-top: 0; }
"""
Row = Mapping[str, Any]


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Checks the contract (``contract.validate``), then writes the page whole or not at all."""
    contract.validate(results)
    write_atomic(path, page(results))


def page(results: Mapping[str, Any]) -> str:
    """The whole HTML document."""
    rows = summarise(results)
    sections: list[tuple[str, Callable[[Mapping[str, Any], Sequence[Row]], str]]] = [
        ("Accuracy", _means),
        ("Differences, paired over the seeds", _differences),
        ("All figures", _board),
        ("Fidelity to the teacher", _fidelity),
        ("Cost of a step", _cost),
        ("Grid", _grid),
        ("Tuning", _tuning),
        ("What ran", _details),
    ]
    bodies = [(heading, section(results, rows)) for heading, section in sections]
    return ui.document(f"kdjax comparison of {len(rows)} methods", _header(results), bodies, CSS)


# --------------------------------------------------------------------------------------------------------- sections


def _header(results: Mapping[str, Any]) -> str:
    first, *others = sentences(results)
    environment, teacher = results["environment"], results["teacher"]
    seeds = len(results["seeds"])
    facts = [
        f"{len(results['methods'])} methods × {seeds} seed{'s' if seeds > 1 else ''}",
        f"teacher {100 * teacher['accuracy']:.2f} %, {teacher['params']:,} parameters",
        f"student {results['student']['params']:,} parameters",
        f"{environment['device_count']} × {environment['device_kind']}",
        f"config {results['config_sha256'][:10]}",
        environment["date"][:10],
    ]
    lead = "".join(f'<p class="lead">{escape(text)}</p>' for text in others)
    line = " · ".join(escape(str(fact)) for fact in facts)
    return (
        f'<header><p class="eyebrow"><b>kdjax</b> comparison of methods</p><h1>{escape(first)}</h1>{lead}'
        f'<p class="facts">{line}</p></header>'
    )


def _means(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    cells = {name: [cell["accuracy"] for cell in method["cells"]] for name, method in results["methods"].items()}
    means = {row["method"]: row["accuracy"]["mean"] for row in rows}
    estimates = [_estimate(row["method"], row["accuracy"], _color(results, row), cells[row["method"]]) for row in rows]
    references = [(f"{results['control']}: the student alone", 100 * means[results["control"]], CONTROL)]
    if results["baseline"] is not None:
        references.append((f"{results['baseline']}: plain KD", 100 * means[results["baseline"]], BASELINE))
    title = "Mean test accuracy"
    svg = plots.intervals(estimates, references=references, title=title, label="accuracy %", width=plots.WIDE)
    return ui.figure(f"{title}, 95 % interval, and the single seeds", svg) + ui.note(_colors_text(results))


def _differences(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    figures = ""
    for key, reference in (("to_control", results["control"]), ("to_baseline", results["baseline"])):
        shown = sorted((row for row in rows if row[key]), key=lambda row: -row[key]["mean"])
        if shown:
            estimates = [_estimate(row["method"], row[key], COLORS[row[key]["verdict"]]) for row in shown]
            title = f"Minus {reference}"
            zero = [("", 0.0, CONTROL if key == "to_control" else BASELINE)]
            svg = plots.intervals(estimates, references=zero, title=title, label="points of accuracy", width=4.5)
            figures += ui.figure(title, svg)
    return figures and ui.grid(figures) + ui.note(
        "Mean difference and its 95 % interval; colours as above, by the test against the one that is subtracted. An "
        "interval that leaves 0 out is not enough among so many comparisons: Holm's correction decides."
    )


def _board(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    head = ["method"]
    for label, key in columns(results).items():
        head += [escape(label), "p"] if key.startswith("to_") else [escape(label)]
    body = []
    for row in rows:
        cells = [_name(results, row["method"])]
        for key in columns(results).values():
            cells.append(_shown(row, key))
            if key.startswith("to_"):
                cells.append(_p_text(row[key]))
        body.append(cells)
    return f'<div class="board">{ui.table(head, body)}</div>' + ui.note(f"{legend(results)} p after the correction.")


def _fidelity(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    x, y = ([100 * row["agreement"] for row in rows], [100 * row["accuracy"]["mean"] for row in rows])
    (left, right), (low, high) = plots.fence(x), plots.fence(y)
    inside, far = [], []
    for row, x_one, y_one in zip(rows, x, y, strict=True):
        if left <= x_one <= right and low <= y_one <= high:
            inside.append((row["method"], x_one, y_one, _color(results, row)))
        else:
            far.append(f"{row['method']} ({x_one:.1f} %, {y_one:.1f} %)")
    title = "Agreement with the teacher and accuracy, means of the seeds"
    svg = plots.scatter(inside, title=title, labels=("agrees with the teacher %", "accuracy %"))
    remark = f"Far outside of the plot: {', '.join(far)}. " if far else ""
    crowded = "Names that found no room are in the table." if len(inside) > 10 else ""
    return ui.figure(title, svg) + (ui.note(remark + crowded) if remark or crowded else "")


def _cost(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    shown = sorted((row for row in rows if row["flops_ratio"] and row["ms_ratio"]), key=lambda row: row["ms_ratio"])
    if not shown:
        return ""
    reference = results["baseline"] if results["baseline"] is not None else results["control"]
    values = {
        "FLOPs": ("s2", [row["flops_ratio"] for row in shown]),
        "time": ("s1", [row["ms_ratio"] for row in shown]),
    }
    title = f"A training step relative to {reference}"
    svg = plots.ratios([row["method"] for row in shown], values, title=title, label=f"times the step of {reference}")
    methods = results["methods"]
    body = [
        [_name(results, row["method"]), f"{methods[row['method']]['ms_per_step']:.3g}",
         f"{methods[row['method']]['flops_per_step'] / 1e6:,.3f}"] for row in shown
    ]  # fmt: skip
    numbers = ui.table(["method", "ms per step", "MFLOPs per step"], body)
    return ui.figure(title, svg) + ui.fold("Time and arithmetic of a step", numbers)


def _grid(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    grid = results["grid"]
    if grid is None:
        return ""
    runs: dict[tuple[float, ...], list[float]] = {}
    for one in grid["cells"]:
        runs.setdefault(tuple(one["values"]), []).append(one["accuracy"])
    found = {place: statistics.mean_interval(accuracies, least_sd(results)) for place, accuracies in runs.items()}
    best = max(found, key=lambda place: found[place]["mean"])
    at = ", ".join(f"{key} = {value:g}" for key, value in zip(grid["keys"], best, strict=True))
    seeds = len(runs[best])
    remark = (
        f"Highest mean: {100 * found[best]['mean']:.2f} % at {at}. It is the best of {len(found)} on the test set "
        f"itself, so expect less elsewhere. Accuracy in %{', ± half the 95 % interval' if seeds > 1 else ''}, {seeds} "
        f"seed{'s' if seeds > 1 else ''}."
    )
    if len(grid["keys"]) == 1:
        places = [(value,) for value in grid["values"][0]]
        estimates = [_estimate("", found[place], "student_distilled", runs[place]) for place in places]
        control = next(row for row in rows if row["method"] == results["control"])["accuracy"]["mean"]
        title = f"Accuracy over {grid['keys'][0]}"
        svg = plots.line(
            estimates, grid["values"][0], reference=100 * control, title=title, label=grid["keys"][0]
        )  # fmt: skip
        return ui.grid(ui.figure(title, svg)) + ui.note(remark)
    return ui.grid(_heat_maps(grid, found, best)) + ui.note(remark)


def _heat_maps(grid: Mapping[str, Any], found: Mapping[Any, Mapping[str, Any]], best: tuple[float, ...]) -> str:
    """One panel per combination of the third and later keys, all shaded on one scale."""
    first, second, *rest = grid["values"]
    means = [one["mean"] for one in found.values()]
    figures = ""
    for further in itertools.product(*rest):
        cells = [[found[row, column, *further] for column in second] for row in first]
        framed = (first.index(best[0]), second.index(best[1])) if best[2:] == further else None
        fixed = ", ".join(f"{key} = {value:g}" for key, value in zip(grid["keys"][2:], further, strict=True))
        title = "Accuracy" + (f" at {fixed}" if fixed else "")
        svg = plots.heat(
            np.array([[one["mean"] for one in line] for line in cells]),
            [[_heat_text(one) for one in line] for line in cells],
            values=(first, second), keys=grid["keys"][:2], span=(min(means), max(means)), best=framed, title=title,
        )  # fmt: skip
        figures += ui.figure(title, svg)
    return figures


def _heat_text(found: Mapping[str, Any]) -> str:
    ends = found["interval_95"]
    return f"{100 * found['mean']:.2f}" + (f"\n± {50 * (ends[1] - ends[0]):.2f}" if ends else "")


def _tuning(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    curves = []
    for row in rows:
        tuned = results["methods"][row["method"]]["tuned"]
        if tuned:
            accuracy = [100 * value for value in tuned["accuracy"]]
            curves.append((row["method"], tuned["key"], tuned["tried"], accuracy, tuned["chosen"]))
    if not curves:
        return ""
    title = "Accuracy on held-out training examples for each value tried; the chosen one in colour"
    edge = [name for name, _, tried, _, chosen in curves if len(tried) > 2 and chosen in (min(tried), max(tried))]
    remark = f"The best value lies at the edge of what was tried for {', '.join(edge)}: more may be found beyond."
    svg = plots.tuning(curves, title=title, label="held-out accuracy %")
    return ui.figure(title, svg) + (ui.note(remark) if edge else "")


def _details(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    methods = results["methods"]
    trained = [
        [_name(results, name), f"<code>{escape(json.dumps(method['losses'], ensure_ascii=False))}</code>"]
        for name, method in methods.items()
    ]
    cells = [
        [escape(row["method"]), str(one["seed"]), f"{100 * one['accuracy']:.2f}", f"{100 * one['agreement']:.2f}",
         *(f"{one[key]:.4f}" for key in ("kl", "nll", "ece")), f"<code>{one['params_sha256'][:16]}</code>"]
        for row in rows for one in methods[row["method"]]["cells"]
    ]  # fmt: skip
    head = ["method", "seed", "accuracy %", "agrees %", "KL", "NLL", "ECE", "parameters (SHA-256)"]
    return (
        ui.fold("The losses of each method", ui.table(["method", "losses"], trained, texts=2))
        + ui.fold("Every run", ui.table(head, cells))
        + ui.environment({**results["environment"], "config_sha256": results["config_sha256"]})
    )


# ----------------------------------------------------------------------------------------------------------- pieces


def _estimate(name: str, found: Mapping[str, Any], color: str, runs: Sequence[float] = ()) -> plots.Estimate:
    """In percent."""
    ends = found["interval_95"]
    interval = (100 * ends[0], 100 * ends[1]) if ends else None
    return plots.Estimate(name, 100 * found["mean"], interval, color, [100 * run for run in runs])


def _color(results: Mapping[str, Any], row: Row) -> str:
    """By the verdict against the control; the control and the baseline have their own."""
    if row["method"] in (results["control"], results["baseline"]):
        return CONTROL if row["method"] == results["control"] else BASELINE
    return COLORS[row["to_control"]["verdict"]]


def _colors_text(results: Mapping[str, Any]) -> str:
    own = "orange is the control" + (", violet plain KD" if results["baseline"] is not None else "")
    return f"Green is better than the control, red worse, grey not told apart from it; {own}."


def _name(results: Mapping[str, Any], name: str) -> str:
    colors = {results["control"]: CONTROL, results["baseline"]: BASELINE}
    if name in colors:
        return f'<span class="key" style="--c:var(--{colors[name]})">{escape(name)}</span>'
    return escape(name)


def _shown(row: Row, key: str) -> str:
    text = escape(cell(row, key))
    if not key.startswith("to_") or row[key] is None:
        return text
    kind = {BETTER: "up", WORSE: "down", TIED: "same"}[row[key]["verdict"]]
    return f'<span class="{kind}">{text}</span>'


def _p_text(compared: Mapping[str, Any] | None) -> str:
    if compared is None or compared["holm_p"] is None:
        return "–"
    return "&lt;0.001" if compared["holm_p"] < 0.001 else f"{compared['holm_p']:.3f}"

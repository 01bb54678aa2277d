"""The plots of a comparison's report as inline SVG strings; the look and the colours are those of ``report_plots``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.report_plots import HEX, draw_svg, short

ROW = 0.215  # inches per method
WIDE = 9.6  # inches: the width of the page; half of it is 4.5
TUNING_COLUMNS = 5


class Estimate(NamedTuple):
    """One method's mean with its interval, in the unit of the axis."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    color: str
    runs: Sequence[float] = ()  # the single seeds


def intervals(
    estimates: Sequence[Estimate], *, references: Sequence[tuple[str, float, str]], title: str, label: str, width: float
) -> str:
    """One row per estimate, the first on top: the mean, its interval, and the seeds as ticks.

    Args:
        estimates: what to draw.
        references: vertical lines (label, value, colour name); the label is left out if empty.
        title: what the plot shows, for those who cannot see it.
        label: of the axis, with its unit.
        width: in inches.
    """

    def draw(axes: Any) -> None:
        low, high = _limits(estimates, [value for _, value, _ in references])
        for text, value, color in references:
            axes.axvline(value, color=HEX[color], linewidth=1.1, linestyle=(0, (4, 3)), label=text, zorder=1)
        for row, (_, mean, interval, color, runs) in enumerate(estimates):
            axes.scatter(runs, np.full(len(runs), row), s=28, marker="|", color=HEX[color], alpha=0.5, linewidths=0.9)
            if interval:
                axes.plot(interval, (row, row), color=HEX[color], linewidth=2.2, alpha=0.55, clip_on=True)
            if low <= mean <= high:
                axes.scatter(mean, row, s=26, color=HEX[color], zorder=3, linewidths=0)
            else:  # one failed method must not flatten all others
                number = f"{mean:.1f}".replace("-", "−")
                text, edge, side = (f"◂ {number}", 0.0, "left") if mean < low else (f"{number} ▸", 1.0, "right")
                place = axes.get_yaxis_transform()
                axes.text(edge, row, text, transform=place, ha=side, va="center", fontsize=7.5, color=HEX[color])
        axes.set_xlim(low, high)
        axes.set_xlabel(label)
        _method_rows(axes, [estimate.name for estimate in estimates])
        if any(text for text, *_ in references):
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=7.5, labelcolor=HEX["ink"])

    return draw_svg(width, 0.95 + ROW * len(estimates), title, draw)


def ratios(names: Sequence[str], values: Mapping[str, tuple[str, Sequence[float]]], *, title: str, label: str) -> str:
    """One row per method, one dot per kind of ratio; ``values``: kind -> (colour name, one ratio per method)."""

    def draw(axes: Any) -> None:
        rows = np.arange(len(names))
        table = np.array([ratio for _, ratio in values.values()], float)
        axes.hlines(rows, table.min(0), table.max(0), color=HEX["rule"], linewidth=2.5)
        axes.axvline(1.0, color=HEX["muted"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        for (kind, (color, _)), x in zip(values.items(), table, strict=True):
            axes.scatter(x, rows, s=26, color=HEX[color], label=kind, zorder=3, linewidths=0)
        if table.min() > 0 and table.max() / table.min() > 10:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel(label)
        _method_rows(axes, names)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=7.5, labelcolor=HEX["ink"])

    return draw_svg(WIDE, 0.95 + ROW * len(names), title, draw)


def fence(values: Sequence[float]) -> tuple[float, float]:
    """From where to where values lie with the others: four interquartile ranges beyond the quartiles."""
    first, third = np.quantile(values, [0.25, 0.75])
    reach = 4 * (third - first) or np.inf
    return float(first - reach), float(third + reach)


def scatter(points: Sequence[tuple[str, float, float, str]], *, title: str, labels: tuple[str, str]) -> str:
    """Named points (name, x, y, colour name) in percent; a name that finds no free place is left out."""

    def draw(axes: Any) -> None:
        x, y = (np.array([point[i] for point in points]) for i in (1, 2))
        axes.scatter(x, y, s=24, c=[HEX[color] for *_, color in points], zorder=3, linewidths=0)
        for set_limits, values in ((axes.set_xlim, x), (axes.set_ylim, y)):
            margin = 0.08 * (np.ptp(values) or 1.0)
            set_limits(values.min() - margin, values.max() + margin)
        for set_label, text in zip((axes.set_xlabel, axes.set_ylabel), labels, strict=True):
            set_label(text)
        axes.figure.draw_without_rendering()  # fixes the layout, so that places on the page are known
        pixels = axes.transData.transform(np.column_stack([x, y]))
        point_size = axes.figure.dpi / 72
        names = [short(name) for name, *_ in points]
        for i, (dx, dy) in _label_places(pixels / point_size, names).items():
            axes.annotate(
                names[i], (x[i], y[i]), (dx, dy), textcoords="offset points", fontsize=7, color=HEX["ink"], va="center"
            )  # fmt: skip

    return draw_svg(WIDE, 4.6, title, draw)


def tuning(
    curves: Sequence[tuple[str, str, Sequence[float], Sequence[float], float]], *, title: str, label: str
) -> str:
    """One small panel per method: (name, key, tried, percentages, chosen)."""
    columns = min(TUNING_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(rows, columns, squeeze=False)
        figure.supylabel(label, color=HEX["muted"], fontsize=8.5)
        for panel in panels.flat[len(curves) :]:
            panel.remove()
        for panel, (name, key, tried, accuracy, chosen) in zip(panels.flat, curves, strict=False):
            order = np.argsort(tried)
            x, y = np.asarray(tried, float)[order], np.asarray(accuracy, float)[order]
            panel.plot(x, y, color=HEX["muted"], linewidth=1.2, marker="o", markersize=2.6)
            panel.scatter(chosen, y[x == chosen], s=34, color=HEX["student_distilled"], zorder=3, linewidths=0)
            _scale(panel, x)
            middle, half = (y.max() + y.min()) / 2, max(0.58 * np.ptp(y), 0.5)  # noise of 0.1 points should look small
            panel.set_ylim(middle - half, middle + half)
            panel.locator_params(axis="y", nbins=4)
            panel.set_title(short(name, 22), fontsize=8, loc="left", color=HEX["ink"])
            panel.set_xlabel(short(key.removeprefix("losses."), 24), fontsize=7.5)
            panel.tick_params(labelsize=7)
            panel.patch.set_visible(False)

    return draw_svg(1.0 + (WIDE - 1.0) * columns / TUNING_COLUMNS, 0.3 + 1.55 * rows, title, draw)


def line(estimates: Sequence[Estimate], values: Sequence[float], *, reference: float, title: str, label: str) -> str:
    """Percentages over the values of one key, with intervals, and the control as a dashed line."""

    def draw(axes: Any) -> None:
        order = np.argsort(values)
        x, y = np.asarray(values, float)[order], np.array([estimate.mean for estimate in estimates])[order]
        color = HEX["student_distilled"]
        axes.axhline(reference, color=HEX["student_alone"], linewidth=1.1, linestyle=(0, (4, 3)), label="control")
        for value, estimate in zip(values, estimates, strict=True):
            if estimate.interval:
                axes.plot((value, value), estimate.interval, color=color, linewidth=2.2, alpha=0.5)
            axes.scatter(np.full(len(estimate.runs), value), estimate.runs, s=24, marker="_", color=color, alpha=0.5)
        axes.plot(x, y, color=color, marker="o", markersize=4, label="mean of the seeds")
        _scale(axes, x)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy %")
        axes.legend(loc="best", fontsize=7.5, labelcolor=HEX["ink"])

    return draw_svg(4.5, 3.2, title, draw)


def heat(
    means_rc: np.ndarray, texts: Sequence[Sequence[str]], *, values: Sequence[Sequence[float]], keys: Sequence[str],
    span: tuple[float, float], best: tuple[int, int] | None, title: str,
) -> str:  # fmt: skip
    """A heat map with its numbers: rows are values of the first key, columns of the second.

    Args:
        means_rc: [rows, columns] what is shaded.
        texts: what is written into the cells, laid out likewise.
        values: of the two keys.
        keys: their names.
        span: the (lowest, highest) mean of all panels, so that shades of several can be compared.
        best: the cell (row, column) to frame, if it is in this panel.
        title: what the map shows, for those who cannot see it.
    """
    rows, columns = means_rc.shape
    shade = (means_rc - span[0]) / ((span[1] - span[0]) or 1.0)

    def draw(axes: Any) -> None:
        for row, column in np.ndindex(rows, columns):
            framed = (row, column) == best
            axes.bar(
                column, 0.94, bottom=row - 0.47, width=0.94, color=HEX["student_distilled"],
                alpha=0.08 + 0.62 * shade[row, column],
            )  # fmt: skip
            if framed:
                axes.bar(column, 0.94, bottom=row - 0.47, width=0.94, fill=False, edgecolor=HEX["ink"], linewidth=1.3)
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=7.5, color=HEX["ink"])
        axes.set_xticks(range(columns), [f"{value:g}" for value in values[1]])
        axes.set_yticks(range(rows), [f"{value:g}" for value in values[0]])
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=keys[1], ylabel=keys[0])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return draw_svg(4.5, 0.75 + 0.42 * rows, title, draw)


# ---------------------------------------------------------------------------------------------------------- helpers


def _method_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names], color=HEX["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=7)


def _scale(axes: Any, values: np.ndarray) -> None:
    """A logarithmic axis for values that span more than a factor of 8, with a tick at each if they are few."""
    if values.min() > 0 and values.max() / values.min() > 8:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if len(values) <= 6:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)


def _limits(estimates: Sequence[Estimate], references: Sequence[float]) -> tuple[float, float]:
    """The axis: all means, seeds and intervals of the methods that are not far outside of the others."""
    low, high = fence([estimate.mean for estimate in estimates])
    low, high = min(low, *references), max(high, *references)
    shown = [estimate for estimate in estimates if low <= estimate.mean <= high]
    ends = [end for estimate in shown for end in (*(estimate.interval or ()), *estimate.runs, estimate.mean)]
    least, most = max(low, min(*ends, *references)), min(high, max(*ends, *references))
    margin = 0.03 * (most - least) or 1.0
    return least - margin, most + margin


def _label_places(points: np.ndarray, names: Sequence[str]) -> dict[int, tuple[float, float]]:
    """Greedy: for each point the first side where its name meets no point and no other name; offsets in points.

    A name is taken to be 3.9 points wide per character and 8 high, which is what 7-point type needs.
    """
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    overlaps: Callable[[Any, Any], bool] = lambda a, b: a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    places: dict[int, tuple[float, float]] = {}
    for i, ((x, y), name) in enumerate(zip(points, names, strict=True)):
        width = 3.9 * len(name)
        for dx, dy in ((5, 0), (-5 - width, 0), (-width / 2, 8), (-width / 2, -8), (4, 7), (4, -7)):
            box = (x + dx, y + dy - 4, x + dx + width, y + dy + 4)
            if not any(overlaps(box, other) for other in taken):
                taken.append(box)
                places[i] = (dx, dy)
                break
    return places

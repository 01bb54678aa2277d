"""The plots of ``report.html`` as inline SVG strings.

matplotlib draws with placeholder colours; the placeholders then become CSS variables, so that one SVG follows the light
or dark theme of the page. Text stays text, in the font of the page.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kdjax.metrics import Reliability

COLORS = ("ink", "muted", "rule", "teacher", "student_alone", "student_distilled", "bad", "s1", "s2", "s3", "s4", "s5")
HEX = {name: f"#{i:02x}{i:02x}f{i:x}" for i, name in enumerate(COLORS, start=1)}  # placeholder -> var(--name)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the layout is the same everywhere
    "font.size": 8.5,
    "text.color": HEX["ink"],
    "text.parse_math": False,  # a class may be called "$5"
    "axes.edgecolor": HEX["rule"],
    "axes.labelcolor": HEX["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": HEX["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": HEX["muted"],
    "ytick.color": HEX["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
MAX_POINTS = 400  # per curve: more than a screen shows, and a long run would make the file huge


def lines(
    curves: Sequence[tuple[str, str, Sequence[float], Sequence[float]]],
    *,
    title: str,
    percent: bool = False,
    log: bool = False,
) -> str:
    """Curves (label, colour name, steps, values) over the step; a NaN leaves a gap.

    ``percent`` shows fractions as percentages, ``log`` takes a logarithmic axis if all values are above 0 and span a
    power of ten, without which it would have no labels.
    """

    def draw(axes: Any) -> None:
        for label, color, steps, values in curves:
            x, y = _thin(np.asarray(steps, float), np.asarray(values, float) * (100 if percent else 1))
            marker = "o" if len(x) <= 30 else None
            axes.plot(x, y, color=HEX[color], label=label, marker=marker, markersize=2.6)
        drawn = np.concatenate([np.asarray(values, float) for *_, values in curves])
        span = np.nanmax(drawn) / np.nanmin(drawn) if log and np.nanmin(drawn) > 0 else 1.0
        if span >= 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            # Between powers of ten only where these are few.
            axes.yaxis.set_minor_formatter(
                lambda value, _: f"{value:g}" if span < 100 and f"{value:e}"[0] in "25" else ""
            )
        elif np.nanmin(drawn) >= 0 and not percent:
            axes.set_ylim(bottom=0, top=None if np.nanmax(drawn) > 0 else 1)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 10_000 else f"{value / 1000:g}k")
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.legend(loc="best", fontsize=7.5, labelcolor=HEX["ink"], handlelength=1.2)

    return draw_svg(4.5, 2.9, title, draw)


def dots(names: Sequence[str], values: Mapping[str, Any], *, title: str) -> str:
    """One row per class, one dot per arm at its percentage; ``values`` maps the arm to fractions, NaN where unknown."""

    def draw(axes: Any) -> None:
        rows = np.arange(len(names))
        table = 100 * np.array([np.asarray(v, float) for v in values.values()])
        axes.hlines(rows, table.min(0), table.max(0), color=HEX["rule"], linewidth=2.5)
        shifts = 0.13 * (np.arange(len(values)) - (len(values) - 1) / 2)  # equal values stay visible
        for arm, x, shift in zip(values, table, shifts, strict=True):
            axes.scatter(x, rows + shift, s=26, color=HEX[arm], zorder=2, linewidths=0)
        axes.set_yticks(rows, [short(name) for name in names], color=HEX["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")

    return draw_svg(4.5, 0.75 + 0.235 * len(names), title, draw)


def confusion(counts_cc: np.ndarray, names: Sequence[str], *, title: str, signed: bool = False) -> str:
    """A confusion matrix (rows true): right in the student's colour, wrong in red, shaded by share of the true class.

    ``signed`` draws a difference of two matrices instead: more in red off the diagonal, better in the student's colour.
    """
    classes = len(names)

    def draw(axes: Any) -> None:
        right = np.eye(classes, dtype=bool) if not signed else np.where(np.eye(classes), counts_cc > 0, counts_cc < 0)
        scale = np.abs(counts_cc).max() if signed else counts_cc.sum(1, keepdims=True)
        alpha = np.sqrt(np.abs(counts_cc) / np.maximum(scale, 1))  # the root keeps single errors visible
        for row, column in zip(*np.nonzero(counts_cc), strict=True):
            color = HEX["student_distilled" if right[row, column] else "bad"]
            axes.bar(column, 0.92, bottom=row - 0.46, width=0.92, color=color, alpha=0.85 * alpha[row, column])
            if classes <= 15:
                text = f"{counts_cc[row, column]:{'+d' if signed else 'd'}}".replace("-", "−")
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=HEX["ink"])
        shown = [short(name, 12) for name in names]
        axes.set_xticks(range(classes), shown, rotation=90 if max(map(len, shown)) > 2 else 0, fontsize=7)
        axes.set_yticks(range(classes), shown, fontsize=7)
        axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), aspect="equal")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return draw_svg(4.4, 4.3, title, draw)


def reliability(parts: Reliability, color: str, *, title: str) -> str:
    """Accuracy per bin of confidence as bars, the gap to the mean confidence in red, the ideal as a diagonal."""

    def draw(axes: Any) -> None:
        bins = len(parts.counts)
        center = (np.arange(bins) + 0.5) / bins
        share = parts.counts / parts.counts.sum()
        full = parts.counts > 0
        for x, accuracy, confidence, weight in zip(
            center[full], parts.accuracy[full], parts.confidence[full], share[full], strict=True
        ):
            strength = 0.25 + 0.75 * min(1.0, 4 * weight)  # a bin of one example should not shout
            axes.bar(x, accuracy, width=0.92 / bins, color=HEX[color], alpha=strength)
            bottom, height = min(accuracy, confidence), abs(accuracy - confidence)
            axes.bar(x, height, bottom=bottom, width=0.92 / bins, color=HEX["bad"], alpha=0.35)
        axes.plot([0, 1], [0, 1], color=HEX["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])

    return draw_svg(3.5, 3.0, title, draw)


def draw_svg(width: float, height: float, title: str, draw: Callable[[Any], None]) -> str:
    """Runs ``draw`` on new axes of so many inches; the SVG scales to the width of its place on the page."""
    import matplotlib  # 0.9 s to import: only where a report is written
    from matplotlib.figure import Figure

    # The salt makes ids differ between plots, not between runs. Glyphs come from the reader's fonts, not from ours.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.patch.set_visible(False)
        figure.axes[0].patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, color in HEX.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = svg.replace("'DejaVu Sans'", "system-ui")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg {view.group()} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} role="img" aria-label="{escape(title)}">{svg[svg.index(">") + 1 :]}'


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: the means of equal runs of them."""
    if len(x) <= MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def short(name: str, length: int = 18) -> str:
    """A name of at most ``length`` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"

"""The pieces of ``report.html``: small functions from values to HTML, and the CSS for light, dark, phone and paper.

Arguments named ``title``, ``label`` or ``text`` are escaped here; cells and contents are ready HTML.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kdjax.errors import visible
from kdjax.results import ARMS

CSS = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1b1f24; --muted: #667079; --rule: #e3e0d8;
  --teacher: #51606f; --student_alone: #d9822b; --student_distilled: #0f8a80; --good: #b9d8cf; --bad: #cf3f36;
  --s1: #0f8a80; --s2: #d9822b; --s3: #6b5bd2; --s4: #c2417c; --s5: #3b82c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e23; --ink: #ebe9e3; --muted: #98a1ab; --rule: #30353d;
    --teacher: #a9b5c2; --student_alone: #f0a04b; --student_distilled: #2fc4b4; --good: #24544c; --bad: #f0726a;
    --s1: #2fc4b4; --s2: #f0a04b; --s3: #a395f5; --s4: #ee7fb0; --s5: #74b3ea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 56px 28px 80px; }
header { margin-bottom: 56px; }
.eyebrow { margin: 0 0 18px; color: var(--muted); font-size: 14px; letter-spacing: .02em; }
.eyebrow b { color: var(--student_distilled); font-weight: 700; margin-right: 4px; }
h1, h2 { font-family: ui-serif, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; text-wrap: balance; }
h1 { font-size: clamp(25px, 3.7vw, 38px); line-height: 1.2; font-weight: 600; letter-spacing: -.01em; margin: 0 0 1rem }
h2 { font-size: 24px; line-height: 1.25; font-weight: 600; margin: 0 0 20px; }
.lead { font-size: 17px; color: var(--muted); margin: 0 0 12px; max-width: 68ch; }
.facts { color: var(--muted); font-size: 14px; margin: 0 0 30px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; }
.card, figure, details, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.card { padding: 16px 18px; display: flex; flex-direction: column; }
.card span { font-size: 13px; color: var(--muted); }
.card strong { font-size: 31px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; }
.card em { font-style: normal; font-size: 13px; color: var(--muted); line-height: 1.35; }
small { font-size: .62em; font-weight: 500; color: var(--muted); letter-spacing: 0; }
td small, p small, .key small { font-size: inherit; color: inherit; font-weight: inherit; }
section { border-top: 1px solid var(--rule); padding-top: 30px; margin-top: 44px; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px; align-items: start; }
.grid.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
figure { margin: 0; padding: 16px 18px 12px; break-inside: avoid; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 8px; }
figure svg { display: block; width: 100%; height: auto; }
.legend { margin: 0 0 8px; font-size: 13px; color: var(--muted); }
.legend .key { margin-right: 14px; }
.key { white-space: nowrap; }
.key::before {
  content: ""; display: inline-block; width: .62em; height: .62em; border-radius: 50%;
  background: var(--c); margin-right: .45em;
}
a { color: var(--student_distilled); }
.note { color: var(--muted); font-size: 14px; margin: 14px 0 0; max-width: 80ch; }
.scroll { overflow-x: auto; } .note + .scroll { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 18px; text-align: right; white-space: nowrap; }
th { font-size: 13px; font-weight: 600; border-bottom: 1px solid var(--rule); }
tbody tr + tr td { border-top: 1px solid color-mix(in srgb, var(--rule) 55%, transparent); }
.t { text-align: left; white-space: normal; overflow-wrap: break-word; }
td.t:first-child { color: var(--muted); }
.up { color: var(--student_distilled); } .down { color: var(--bad); } .same { color: var(--muted); }
.bar { display: grid; grid-template-columns: 118px 1fr 92px; gap: 10px; align-items: center; }
.bar { font-size: 14px; margin: 7px 0; }
.bar span { color: var(--muted); }
.bar output { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar i { height: 12px; } .bar b { display: block; height: 100%; min-width: 2px; border-radius: 3px; }
.stack { margin: 0 0 18px; font-size: 14px; }
.stack i { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin: 6px 0 8px; }
.stack b { display: block; } .stack span { font-weight: 600; } .stack .key { font-weight: 400; }
details { margin-top: 14px; }
summary { cursor: pointer; padding: 12px 18px; font-size: 15px; font-weight: 600; }
details > :not(summary) { margin: 0 18px 16px; }
details > .scroll { border: 0; border-radius: 0; margin: 0 0 8px; }
pre { overflow-x: auto; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  main { padding: 30px 16px 56px; }
  header { margin-bottom: 36px; }
  .grid, .grid.three { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .card { padding: 13px 14px; } .card strong { font-size: 26px; }
  th, td { padding: 8px 6px; } th:first-child, td:first-child { padding-left: 12px; }
  th:last-child, td:last-child { padding-right: 12px; }
  table { font-size: 13.5px; } th, th .key { font-size: 12.5px; white-space: normal; vertical-align: bottom; }
  figure { padding: 14px 12px 10px; }
  th .key::before { display: block; margin: 0 0 3px auto; }
  .bar { grid-template-columns: 112px 1fr 78px; font-size: 13px; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #ccc;
    --teacher: #51606f; --student_alone: #c06a14; --student_distilled: #0b746b; --good: #b9d8cf; --bad: #b3261e;
    --s1: #0b746b; --s2: #c06a14; --s3: #5546b8; --s4: #a82f66; --s5: #2b6ca8; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  details::details-content { content-visibility: visible; height: auto; }
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .grid.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .cards { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .card { padding: 10px; } .card strong { font-size: 20px; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; }
  h2, figcaption { break-after: avoid; } tr, .card { break-inside: avoid; }
}
"""


def document(title: str, header: str, sections: Iterable[tuple[str, str]], css: str = "") -> str:
    """A whole page: the header, then each section (heading, content) that is not empty. It can fetch nothing."""
    parts = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{CSS}{css}</style></head>'
        f"<body><main>{header}{parts}</main></body></html>\n"
    )


def environment(values: Mapping[str, Any]) -> str:
    """What ``results.environment`` returned, and whatever stands beside it, as a table that unfolds."""
    flat = {**{key: value for key, value in values.items() if key != "packages"}, **values["packages"]}
    body = [[escape(key), escape("none" if value is None else str(value))] for key, value in flat.items()]
    return fold("Environment", table(["", ""], body, texts=2))


def figure(title: str, content: str, legend: Iterable[str] = ()) -> str:
    """A card with a caption and, for plots whose dots are arms, the arms' colours."""
    keys = "".join(arm_label(arm) for arm in legend)
    keys = f'<p class="legend">{keys}</p>' if keys else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{keys}{content}</figure>"


def grid(content: str, kind: str = "") -> str:
    """Figures side by side, below each other on a phone; ``kind`` "three" for three in a row."""
    return f'<div class="grid {kind}">{content}</div>'


def fold(title: str, content: str) -> str:
    """A part of the page that opens on a click (and is open on paper)."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def note(text: str) -> str:
    """A remark in small type."""
    return f'<p class="note">{escape(text)}</p>'


def card(label: str, value: str, text: str) -> str:
    """One figure of the run in large type; ``value`` is ready HTML."""
    return f'<div class="card"><span>{escape(label)}</span><strong>{value}</strong><em>{escape(text)}</em></div>'


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """The figures of a run side by side; each is what ``card`` takes."""
    return '<div class="cards">' + "".join(card(*parts) for parts in figures) + "</div>"


def table(head: Sequence[str], body: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table of ready HTML cells; the first ``texts`` columns are left-aligned."""
    kinds = lambda i: ' class="t"' if i < texts else ""
    top = "".join(f"<th{kinds(i)}>{cell}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{kinds(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in body
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def bars(values: Mapping[str, float], text: Callable[[float], str]) -> str:
    """One horizontal bar per arm, the longest filling the width."""
    highest = max(values.values()) or 1
    return "".join(
        f'<div class="bar"><span>{ARMS[arm]}</span><i><b style="width:{100 * value / highest:.2f}%;'
        f'background:var(--{arm})"></b></i><output>{escape(text(value))}</output></div>'
        for arm, value in values.items()
    )


def stack(label: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar cut in shares (label, fraction, colour name), with its legend."""
    cuts = "".join(f'<b style="width:{100 * share:.3f}%;background:var(--{color})"></b>' for _, share, color in parts)
    keys = "".join(
        f'<span class="key" style="--c:var(--{color})">{escape(name)} {percent(share)}</span>'
        for name, share, color in parts
    )
    return f'<div class="stack"><span>{escape(label)}</span><i>{cuts}</i><p class="legend">{keys}</p></div>'


def arm_label(arm: str, color: str = "") -> str:
    """The name of an arm with its colour, of the name that plots have for it; the arm's own without one."""
    return f'<span class="key" style="--c:var(--{color or arm})">{escape(label(arm))}</span>'


def label(arm: str) -> str:
    """An arm's name for a person: "assistant_middle" -> "assistant middle"."""
    return ARMS.get(arm, visible(arm.replace("_", " ")))


def percent(share: float) -> str:
    """A fraction as a percentage; a dash for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}<small> %</small>"


def points(difference: float) -> str:
    """A difference of fractions in points, coloured by its sign; a dash for NaN."""
    if math.isnan(difference):
        return "–"
    kind = "up" if difference > 0 else "down" if difference < 0 else "same"
    return f'<span class="{kind}">{signed(100 * difference, 1) if difference else "0.0"}</span>'


def signed(value: float, digits: int) -> str:
    """A number with its sign, the minus of the same width as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def ratio(teacher: float, student: float, better: str, worse: str) -> tuple[str, str]:
    """How many times smaller the student's number is: the word for it, and the factor (at least 1) as HTML."""
    factor = teacher / student if student else math.inf
    word, factor = (better, factor) if factor >= 1 else (worse, 1 / factor if factor else math.inf)
    return word, f"{factor:.0f}<small>×</small>" if factor >= 10 else f"{factor:.1f}<small>×</small>"

"""``kdjax report``: how far a run is, as a table and as ``progress.html``, at any moment and without disturbing it."""

import json
import math
import time
from collections.abc import Callable
from html import escape
from pathlib import Path

from rich.table import Table

from kdjax import progress
from kdjax import report_html as ui
from kdjax import report_parts as parts
from kdjax.progress import Arm, Run, duration
from kdjax.untrusted import terminal
from kdjax.writers import write_atomic

PAGE = "progress.html"
_RESULTS = ("report.html", "compress.html")  # what a finished run has
_MAX_ARMS = 5  # in one plot: a comparison has dozens
_HEAD = ("", "step", "loss", "test %", "agrees %", "examples per s", "time left", "goodput %")
_NONE = "–"


def run(workdir: Path) -> Run:
    """Reads a workdir and writes ``progress.html`` into it.

    Raises:
      UserError: it is no workdir, or cannot be read or written.
    """
    found = progress.read(workdir)
    write_atomic(Path(workdir) / PAGE, page(found))
    return found


def table(found: Run) -> Table:
    """The arms for a terminal."""
    head, *body = _rows(found)
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    for name, *cells in zip(head, *body, strict=True):
        width = max(map(len, [*name.split(), *cells]))
        shown.add_column(name, justify="right" if name else "left", width=width)
    for row in body:
        shown.add_row(*map(terminal, row))
    return shown


def summary(found: Run) -> str:
    """How the run stands, and where the pages are."""
    finished = [f"report: {found.workdir / name}" for name in _results(found)]
    state = " ".join([progress.state(found), *_notes(found)])
    return "\n".join([state, f"progress: {found.workdir / PAGE}", *finished])


def page(found: Run, now: float | None = None) -> str:
    """The whole HTML document; ``now`` is the time of writing, in seconds since the epoch."""
    drawn = [arm.name for arm in found.arms if arm.step][-_MAX_ARMS:]
    accuracy = "Next-token accuracy, test text" if found.config.get("task") == "language" else "Test accuracy"
    history = [record for record in found.history if record["arm"] in drawn]
    sections = [
        ("Arms", _arms(found, drawn)),
        ("Learning curves", parts.curves(history, drawn, accuracy=accuracy, log=accuracy == "Test accuracy")),
        ("Gradients and updates", parts.updates(history, drawn)),
        ("Speed of training", parts.speed(history, drawn)),
        ("Schedules as run", parts.schedules(history, drawn)),
        ("Config", ui.fold("Config", f"<pre>{escape(json.dumps(found.config, indent=2, ensure_ascii=False))}</pre>")),
    ]
    return ui.document(f"{found.workdir.name}: progress", _header(found, now or time.time()), sections)


def _header(found: Run, now: float) -> str:
    section = found.config.get("data")
    facts = [
        section.get("name") if isinstance(section, dict) else None,
        f"seed {found.config.get('seed')}",
        found.workdir.name,
        time.strftime("as of %Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
    ]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    links = [f'<a href="{name}">{name}</a>' for name in _results(found)]
    results = f" What it measured is in {' and '.join(links)}." if links else ""
    lead = escape(" ".join([progress.state(found, now), *_notes(found)]))
    return (
        f'<header><p class="eyebrow"><b>kdjax</b> progress of a run</p><h1>{escape(_headline(found))}</h1>'
        f'<p class="lead">{lead}{results}</p><p class="facts">{line}</p>{_cards(found)}</header>'
    )


def _headline(found: Run) -> str:
    if found.finished:
        return "All arms are at their last step."
    started = [arm for arm in found.arms if arm.step]
    if not started:
        return "No step is logged yet."
    newest = max(started, key=lambda arm: arm.step != arm.total)
    return f"{ui.label(newest.name).capitalize()}: step {_steps(newest)}"


def _cards(found: Run) -> str:
    started = [arm for arm in found.arms if arm.step]
    if not started:
        return ""
    newest = started[-1]
    cards = [("Steps", f"{sum(arm.step for arm in started):,}", "logged, of all arms")]
    if not found.finished and newest.left_s:
        cards.append(("Time left", escape(duration(newest.left_s)), f"of the {ui.label(newest.name)}"))
    measured = [arm for arm in started if not math.isnan(arm.last.get("eval_accuracy", math.nan))]
    if measured:
        accuracy = measured[-1].last["eval_accuracy"]
        cards.append(("Test accuracy", ui.percent(accuracy), f"{ui.label(measured[-1].name)}, last evaluation"))
    rate = newest.last.get("examples_per_s", math.nan)
    if not math.isnan(rate):
        cards.append(("Examples per second", f"{rate:,.0f}", ui.label(newest.name)))
    total: dict[str, float] = {}
    for arm in started:
        for cause, value in arm.seconds.items():
            total[cause] = total.get(cause, 0.0) + value
    good = progress.goodput(total)
    if good is not None:
        cards.append(("Goodput", ui.percent(good), f"of {duration(sum(total.values()))} went into kept steps"))
    return ui.cards(cards)


def _arms(found: Run, drawn: list[str]) -> str:
    colors = parts.colors_of(drawn)
    head, *body = _rows(found)
    names = [ui.arm_label(arm.name, colors.get(arm.name, "paper")) for arm in found.arms]
    cells = [[name, *map(escape, row[1:])] for name, row in zip(names, body, strict=True)]
    started = sum(arm.step > 0 for arm in found.arms)
    note = f"The plots below show the last {len(drawn)} of {started} arms." if started > len(drawn) else ""
    return ui.table(head, cells) + (ui.note(note) if note else "")


def _rows(found: Run) -> list[tuple[str, ...]]:
    """The table: its head, and a row for each arm; without the columns in which nothing is known."""
    columns = zip(_HEAD, *((ui.label(arm.name), *_cells(arm)) for arm in found.arms), strict=True)
    return list(zip(*(column for column in columns if set(column[1:]) != {_NONE}), strict=True))


def _cells(arm: Arm) -> list[str]:
    of: Callable[[str, Callable[[float], str]], str] = lambda key, text: (
        _NONE if math.isnan(value := arm.last.get(key, math.nan)) else text(value)
    )
    hundredths = lambda value: f"{100 * value:.1f}"
    good = progress.goodput(arm.seconds)
    return [
        _steps(arm),
        of("loss", lambda value: f"{value:.4g}"),
        of("eval_accuracy", hundredths),
        of("agreement", hundredths),
        of("examples_per_s", lambda value: f"{value:,.0f}"),
        _NONE if arm.step == arm.total else duration(arm.left_s),
        _NONE if good is None else hundredths(good),
    ]


def _steps(arm: Arm) -> str:
    if arm.total == 0:
        return "given"
    if not arm.step:
        return "not started"
    return f"{arm.step:,}" if arm.total is None else f"{arm.step:,}/{arm.total:,}"


def _notes(found: Run) -> list[str]:
    if not found.damaged:
        return []
    lines = "one line" if found.damaged == 1 else f"{found.damaged:,} lines"
    return [f"{lines.capitalize()} of metrics.jsonl could not be read."]


def _results(found: Run) -> list[str]:
    return [name for name in _RESULTS if (found.workdir / name).is_file()]

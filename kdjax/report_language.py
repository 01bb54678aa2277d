"""``report.html`` of a language run: one self-contained page, in the look and by the rules of ``report.py``."""

import os
from collections.abc import Mapping
from html import escape
from typing import Any

from kdjax import report_html as ui
from kdjax import report_parts as parts
from kdjax.errors import visible
from kdjax.report_parts import History
from kdjax.results import ARMS, caveat, rows
from kdjax.writers import write_atomic

_CSS = """
.sample { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0; }
figure + .grid { margin-top: 18px; }
"""


def write(
    path: str | os.PathLike[str], *, results: Mapping[str, Any], config: Mapping[str, Any], history: History
) -> None:
    """Writes the report of a language run.

    Args:
        path: the HTML file.
        results: as in ``results.json`` (see ``results.build``).
        config: the resolved config, nested plain values.
        history: the records of ``metrics.jsonl``.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomic(path, page(results, config, history))


def page(results: Mapping[str, Any], config: Mapping[str, Any], history: History) -> str:
    """The whole HTML document."""
    results = {**results, "arms": {name: results["arms"][name] for name in ARMS if name in results["arms"]}}
    arms = list(results["arms"])
    sections = [
        ("Results", _results(results)),
        ("Learning curves", parts.curves(history, arms, accuracy="Next-token accuracy, test text", log=False)),
        ("Gradients and updates", parts.updates(history, arms)),
        ("Text samples", _samples(results)),
        ("Fidelity to the teacher", _fidelity(results)),
        ("Cost", parts.cost(results["arms"], of="window")),
        ("Schedules as run", parts.schedules(history, arms)),
        ("Speed of training", parts.speed(history, arms)),
        ("Environment and config", parts.details(results, config)),
    ]
    header = parts.header(results, config, note=caveat(results), cards=_cards(results))
    return ui.document(parts.title(config), header, sections, _CSS)


# -------------------------------------------------------------------------------------------------------- sections


def _cards(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    name = list(arms)[-1]
    main = arms[name]
    bits = main["test"]["bits_per_byte"]
    figures = [("Bits per byte", f"{bits:.3f}", f"{ARMS[name]}; lower is better")]
    if name == "student_distilled" and "student_alone" in arms:
        gain = ui.signed(arms["student_alone"]["test"]["bits_per_byte"] - bits, 3)
        figures.append(("Gain by distilling", gain, "bits per byte saved over the same student alone"))
    if name != "teacher" and "teacher" in arms:
        teacher = arms["teacher"]
        size = ui.ratio(teacher["params"], main["params"], "Smaller", "Larger")
        time = ui.ratio(teacher["latency_ms"]["p50"], main["latency_ms"]["p50"], "Faster", "Slower")
        figures.append(("Agreement", ui.percent(main["fidelity"]["agreement"]), "of first choices are the teacher's"))
        figures.append((*size, "than the teacher, in parameters"))
        figures.append((*time, "than the teacher, one window at a time"))
    return ui.cards(figures)


def _results(results: Mapping[str, Any]) -> str:
    head = ["", *(ui.arm_label(name) for name in results["arms"])]
    body = [[escape(label), *map(escape, texts)] for label, texts in rows(results)]
    test = next(iter(results["arms"].values()))["test"]
    note = (
        f"Test text, last step: no step was chosen by its test accuracy. {test['tokens']:,} tokens that cover "
        f"{test['bytes']:,} bytes were predicted, each from the tokens before it in its window. KL in nats per token."
    )
    return ui.table(head, body) + ui.note(note)


def _samples(results: Mapping[str, Any]) -> str:
    """What each arm wrote after the same prompt."""
    arms = results["arms"]
    prompt = _text(results["prompt"]) if results["prompt"] else ui.note("Empty: each began a text.")
    written = "".join(
        f"<figure><figcaption>{ui.arm_label(name)}</figcaption>"
        f"{_text(arm['sample']) if arm['sample'] else ui.note('Nothing: it ended the text at once.')}</figure>"
        for name, arm in arms.items()
    )
    note = "One continuation of each arm, as drawn: an impression, not a measurement."
    return ui.figure("Prompt", prompt) + ui.grid(written, "three" if len(arms) == 3 else "") + ui.note(note)


def _text(text: str) -> str:
    # A line break that follows the tag itself is dropped by browsers; one that follows the span is not.
    return f'<pre class="sample"><span>{escape(visible(text))}</span></pre>'


def _fidelity(results: Mapping[str, Any]) -> str:
    students = {name: arm for name, arm in results["arms"].items() if name != "teacher"}
    if "teacher" not in results["arms"] or not students:
        return ""
    shares = "".join(
        ui.stack(ARMS[name], [("same first choice", agreed, name), ("another", 1 - agreed, "rule")])
        for name, agreed in ((name, arm["fidelity"]["agreement"]) for name, arm in students.items())
    )
    kl = ui.bars({name: arm["fidelity"]["kl"] for name, arm in students.items()}, lambda value: f"{value:.4f}")
    figures = ui.figure("Next token: the teacher's first choice and the student's", shares)
    figures += ui.figure("KL(teacher ‖ student), nats per token", kl)
    return ui.grid(figures) + _signals(results)


def _signals(results: Mapping[str, Any]) -> str:
    """What of the teacher the distilled student saw, where it learned from a cache."""
    if "signals" not in results:
        return ""
    signals = results["signals"]
    kept = (
        f"the {signals['k']:,} most probable tokens at each position"
        if signals["form"] == "top_k"
        else f"{signals['samples']:,} draws from the teacher's distribution at each position"
    )
    return ui.note(
        f"The distilled student learned from a cache of {kept}, {signals['bytes_per_token']:.1f} bytes per token; "
        "fidelity is to the whole distribution."
    )

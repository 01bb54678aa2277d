"""``report.html``: one self-contained page on teacher, student alone and distilled student.

No script, no request to anywhere (the page's own policy forbids both); every text from a config or a data set is
escaped. ``report_plots.py`` draws, ``report_html.py`` has the pieces and the look, ``report_parts.py`` what reports of
other tasks have too.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from kdjax import metrics, report_plots
from kdjax import report_html as ui
from kdjax import report_parts as parts
from kdjax.errors import UserError
from kdjax.results import ARMS, caveat, link_label, rows
from kdjax.writers import write_atomic

MAX_CLASSES = 30  # above that, plots of all classes become lists of the worst
PAIRS = 20  # rows of such a list


class Run(NamedTuple):
    """What the sections of the report read."""

    results: Mapping[str, Any]
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    logits: Mapping[str, np.ndarray]  # arm -> [examples, classes], in the order of ARMS
    labels: np.ndarray  # [examples], -1 unlabelled
    names: Sequence[str]  # of the classes

    @property
    def main(self) -> str:
        """The arm that the report is about: the distilled student if there is one."""
        return list(self.logits)[-1]


def write(
    path: str | os.PathLike[str],
    *,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
    labels: Any,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        results: as in ``results.json`` (see ``results.build``).
        config: the resolved config, nested plain values.
        history: the records of ``metrics.jsonl``.
        predictions: arm -> logits [examples, classes] on the test set.
        labels: [examples] integers, -1 for unlabelled.
        class_names: one name per class; their numbers if None.

    Raises:
        UserError: shapes disagree, a logit is not finite, or the file cannot be written.
    """
    logits = {name: np.asarray(predictions[name], np.float64) for name in ARMS if name in predictions}
    if not logits:
        raise UserError(f"a report needs the predictions of at least one of {', '.join(ARMS)}.")
    shapes = {values.shape for values in logits.values()}
    if len(shapes) > 1:
        raise UserError(f"the arms' predictions differ in shape {sorted(shapes)}: give all on one test set.")
    classes = shapes.pop()[-1]
    names = [str(i) for i in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != classes:
        raise UserError(f"{len(names)} class names do not go with logits of {classes} classes.")
    write_atomic(path, page(Run(results, config, history, logits, np.asarray(labels), names)))


def page(run: Run) -> str:
    """The whole HTML document."""
    sections: list[tuple[str, Callable[[Run], str]]] = [
        ("Results", _results),
        (
            "Learning curves",
            lambda run: parts.curves(run.history, list(run.logits), accuracy="Test accuracy", log=True),
        ),
        ("Gradients and updates", lambda run: parts.updates(run.history, list(run.logits))),
        ("Classes", _classes),
        ("Confusion", _confusion),
        ("Calibration", _calibration),
        ("Fidelity to the teacher", _fidelity),
        ("Cost", lambda run: parts.cost(run.results["arms"], of="example")),
        ("Schedules as run", lambda run: parts.schedules(run.history, list(run.logits))),
        ("Speed of training", lambda run: parts.speed(run.history, list(run.logits))),
        ("Environment and config", lambda run: parts.details(run.results, run.config)),
    ]
    return ui.document(
        parts.title(run.config), _header(run), [(heading, section(run)) for heading, section in sections]
    )


# -------------------------------------------------------------------------------------------------------- sections


def _header(run: Run) -> str:
    labelled = int((run.labels != -1).sum())
    return parts.header(run.results, run.config, note=caveat(run.results, labelled), cards=_cards(run))


def _cards(run: Run) -> str:
    arms = run.results["arms"]
    main = arms[run.main]
    cards = [("Accuracy", ui.percent(main["test"]["accuracy"]), ARMS[run.main])]
    if run.main == "student_distilled" and "student_alone" in arms:
        gain = ui.signed(100 * (main["test"]["accuracy"] - arms["student_alone"]["test"]["accuracy"]), 1)
        cards.append(("Gain by distilling", f"{gain}<small> points</small>", "over the same student alone"))
    if run.main != "teacher" and "teacher" in arms:
        teacher = arms["teacher"]
        size = ui.ratio(teacher["params"], main["params"], "Smaller", "Larger")
        time = ui.ratio(teacher["latency_ms"]["p50"], main["latency_ms"]["p50"], "Faster", "Slower")
        cards.append(("Agreement", ui.percent(main["fidelity"]["agreement"]), "of predictions are the teacher's"))
        cards.append((*size, "than the teacher, in parameters"))
        cards.append((*time, "than the teacher, one example at a time"))
    return ui.cards(cards)


def _results(run: Run) -> str:
    head = ["", *(ui.arm_label(name) for name in run.results["arms"])]
    body = [[escape(label), *map(escape, texts)] for label, texts in rows(run.results)]
    note = "Test set, last step: no step was chosen by its test accuracy. NLL and KL in nats."
    return ui.table(head, body) + ui.note(note) + _paired(run) + _chain(run)


def _chain(run: Run) -> str:
    """The links between the teacher and the distilled student, each of which taught the next."""
    links = run.results.get("chain", [])
    if not links:
        return ""
    head = ["taught the next", "parameters", "accuracy", "agrees with teacher", "KL(teacher ‖ link)", "updates"]
    body = []
    for link in links:
        test, fidelity = link["test"], link["fidelity"]
        shares = (ui.percent(share) for share in (test["accuracy"], fidelity["agreement"]))
        numbers = (f"{fidelity['kl']:.4f}", f"{link['steps']:,}")
        body.append([escape(link_label(link)), f"{link['params']:,}", *shares, *numbers])
    note = "From the teacher to the distilled student by way of these, in this order; fidelity is to the first teacher."
    return ui.note(note) + ui.table(head, body)


def _paired(run: Run) -> str:
    """The two students on the same examples: who wins where, and the paired 95 % interval of the difference."""
    if not {"student_alone", "student_distilled"} <= set(run.logits):
        return ""
    known = run.labels != -1
    right = {arm: (run.logits[arm].argmax(-1) == run.labels)[known] for arm in run.logits}
    won = int((right["student_distilled"] & ~right["student_alone"]).sum())
    lost = int((right["student_alone"] & ~right["student_distilled"]).sum())
    n = int(known.sum())
    error = math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return ui.note(
        f"Paired on the same {n:,} examples: distilling wins {won:,} and loses {lost:,} of them, "
        f"a difference of {ui.signed(100 * (won - lost) / n, 2)} ± {196 * error:.2f} points (95 %, of one seed)."
    )


def _classes(run: Run) -> str:
    accuracy = {arm: metrics.per_class_accuracy(logits, run.labels) for arm, logits in run.logits.items()}
    support = metrics.confusion(run.logits[run.main], run.labels).sum(1)
    agreement = _class_agreement(run)
    reference = accuracy.get("teacher", np.ones(len(run.names)))
    lost = np.where(support > 0, reference - accuracy[run.main], -np.inf)
    order = np.lexsort((accuracy[run.main], -lost))  # most lost first, the less accurate first among equals
    worst = order[:MAX_CLASSES]
    names = [run.names[i] for i in worst]
    plots = ui.figure(
        "Accuracy per class" + ("" if len(worst) == len(order) else f", worst {len(worst)} of {len(order)}"),
        report_plots.dots(names, {arm: a[worst] for arm, a in accuracy.items()}, title="Accuracy per class"),
        run.logits,
    )
    if agreement:
        title, shown = "Agreement with the teacher per true class", {arm: a[worst] for arm, a in agreement.items()}
        plots += ui.figure(title, report_plots.dots(names, shown, title=title), shown)
    head = ["class", "examples", *map(ui.arm_label, accuracy)]
    head += ["against teacher", "against alone"] if len(accuracy) == 3 else []
    body = []
    for i in order:
        cells = [escape(run.names[i]), f"{support[i]:,}", *(ui.percent(a[i]) for a in accuracy.values())]
        if len(accuracy) == 3:
            cells += [ui.points(accuracy[run.main][i] - accuracy[arm][i]) for arm in ("teacher", "student_alone")]
        body.append(cells)
    title = "Sorted by what the student lost against the teacher" if "teacher" in accuracy else "All classes"
    return ui.grid(plots) + ui.fold(f"{title}: all {len(order):,} classes", ui.table(head, body))


def _confusion(run: Run) -> str:
    main = metrics.confusion(run.logits[run.main], run.labels)
    teacher = metrics.confusion(run.logits["teacher"], run.labels) if "teacher" in run.logits else None
    if len(run.names) <= MAX_CLASSES:
        title = f"Confusion, {ARMS[run.main]}"
        plots = ui.figure(title, report_plots.confusion(main, run.names, title=title))
        if teacher is not None and run.main != "teacher":
            title = f"Difference, {ARMS[run.main]} minus teacher: red is worse"
            plots += ui.figure(title, report_plots.confusion(main - teacher, run.names, title=title, signed=True))
        return ui.grid(plots)
    wrong = main * (1 - np.eye(len(run.names), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(i), len(run.names)) for i in order if wrong.flat[i]]
    counts = {run.main: main} | ({} if teacher is None else {"teacher": teacher})
    head = ["true class", "predicted as", *map(ui.arm_label, counts)]
    body = [
        [escape(run.names[t]), escape(run.names[p]), *(f"{counts_cc[t, p]:,}" for counts_cc in counts.values())]
        for t, p in pairs
    ]
    note = f"The {len(pairs)} most frequent confusions of {len(run.names):,} classes."
    return ui.note(note) + ui.table(head, body, texts=2)


def _calibration(run: Run) -> str:
    plots = ""
    for arm, logits in run.logits.items():
        title = f"{ARMS[arm].capitalize()}: ECE {metrics.classification(logits, run.labels)['ece']:.3f}"
        plots += ui.figure(title, report_plots.reliability(metrics.reliability(logits, run.labels), arm, title=title))
    return ui.grid(plots, "three") + ui.note(
        f"Accuracy in {metrics.BINS} equal bins of confidence; red is the gap to the mean confidence of a bin, "
        "paler bars hold fewer examples, on the dashed line confidence is deserved."
    )


def _fidelity(run: Run) -> str:
    students = [arm for arm in run.logits if arm != "teacher"]
    if "teacher" not in run.logits or not students:
        return ""
    known = run.labels != -1
    labels, teacher = run.labels[known], run.logits["teacher"].argmax(-1)[known]
    bars, body = "", []
    for arm in students:
        predicted = run.logits[arm].argmax(-1)[known]
        same, teacher_right, student_right = predicted == teacher, teacher == labels, predicted == labels
        cases = {
            "agree, right": (same & teacher_right, "good"),
            "agree, wrong": (same & ~teacher_right, "muted"),
            "only the student right": (~same & student_right, arm),
            "only the teacher right": (~same & teacher_right, "bad"),
            "differ, both wrong": (~same & ~student_right & ~teacher_right, "rule"),
        }
        bars += ui.stack(ARMS[arm], [(label, float(mask.mean()), color) for label, (mask, color) in cases.items()])
        body.append([ui.arm_label(arm), *(f"{int(mask.sum()):,}" for mask, _ in cases.values())])
    head = ["", *cases]
    share = metrics.fidelity(run.logits[run.main], run.logits["teacher"])
    student = "distilled student" if run.main == "student_distilled" else "student"
    text = (
        f"The {student} predicts the teacher's class for {ui.percent(share['agreement'])} of the test set; "
        f"KL(teacher ‖ student) is {share['kl']:.3f} nats per example. Where they part, who is right:"
    )
    return f"<p>{text}</p>{bars}{ui.table(head, body)}"


def _class_agreement(run: Run) -> dict[str, np.ndarray]:
    """Per true class the share of a student's predictions that are the teacher's: arm -> [classes], NaN if unknown."""
    if "teacher" not in run.logits:
        return {}
    known = run.labels != -1
    labels, teacher = run.labels[known], run.logits["teacher"].argmax(-1)[known]
    support = np.bincount(labels, minlength=len(run.names))
    shares = {}
    for arm in run.logits:
        if arm != "teacher":
            same = np.bincount(labels, run.logits[arm].argmax(-1)[known] == teacher, minlength=len(run.names))
            shares[arm] = np.where(support > 0, same / np.maximum(support, 1), np.nan)
    return shares

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from kdjax import metrics, report, report_plots, results
from kdjax.errors import UserError

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The text, tags and links of a page; fails on a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def digits():
    """Three real classifiers of digits: all pixels (teacher), every 4th pixel (alone), blurred pixels (distilled)."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    views = {
        "teacher": images,
        "student_alone": images[:, ::4],
        "student_distilled": images.reshape(-1, 32, 2).mean(2),
    }
    predictions, arms = {}, {}
    for name, view in views.items():
        model = LogisticRegression(C=0.1, tol=0.01, max_iter=200).fit(view[::2], labels[::2])
        predictions[name] = model.decision_function(view[1::2])
        variables = {"params": {"w": model.coef_.astype(np.float32)}, "state": {}}
        arms[name] = results.arm_result(
            variables=variables, steps=200, examples_per_s=1000.0, logits=predictions[name],
            teacher_logits=predictions["teacher"], labels=labels[1::2], latency_ms={"p50": 0.1, "p99": 0.2},
            params_sha256="0" * 64,
        )  # fmt: skip
    return predictions, labels[1::2], results.build(config_sha256="1" * 64, seed=0, arms=arms)


def history_of(arms, steps=range(10, 201, 10)):
    lines = []
    for arm in arms:
        for step in steps:
            hparams = {"learning_rate": 1e-3 * (1 - step / 200), "ce.weight": 1.0}
            if arm == "student_distilled":
                hparams |= {"kl.weight": 0.7, "kl.temperature": 8 - step / 40}
            parts = {"loss": 20 / step, "ce": 15 / step, "kl": None if step == 50 else 5 / step}
            lines.append({"arm": arm, "step": step, **parts, "hparams": hparams})
            lines.append({"arm": arm, "step": step, "eval_accuracy": 1 - 5 / step})
    return lines


def write(tmp_path, digits, **changes):
    predictions, labels, found = digits
    arguments = {
        "results": found,
        "config": {"seed": 0, "data": {"name": "digits"}, "losses": {"kl": {"weight": 0.7}}},
        "history": history_of(predictions),
        "predictions": predictions,
        "labels": labels,
        "class_names": None,
    }
    report.write(tmp_path / "report.html", **(arguments | changes))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_nothing_of_anybody(tmp_path, digits):
    html = write(tmp_path, digits)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in html
    assert len(html) < 500_000
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_page_shows_what_was_measured(tmp_path, digits):
    predictions, labels, found = digits
    text = Page(write(tmp_path, digits)).text
    assert results.headline(found) in text
    assert results.caveat(found, len(labels)) in text
    for label, values in results.rows(found):
        assert label in text and all(value in text for value in values)
    for heading in (
        "Learning curves",
        "Classes",
        "Confusion",
        "Calibration",
        "Fidelity",
        "Cost",
        "Schedules",
        "config",
    ):
        assert heading in text
    teacher, student = (predictions[name].argmax(1) for name in ("teacher", "student_distilled"))
    differ = student != teacher
    counts = [
        (~differ & (teacher == labels)).sum(),
        (~differ & (teacher != labels)).sum(),
        (differ & (student == labels)).sum(),
        (differ & (teacher == labels)).sum(),
        (differ & (teacher != labels) & (student != labels)).sum(),
    ]
    assert sum(counts) == len(labels) and counts[2] > 0 and counts[3] > 0
    assert " ".join(["student distilled", *map(str, counts)]) in text
    assert f"ECE {metrics.classification(predictions['teacher'], labels)['ece']:.3f}" in text
    won = ((student == labels) & (predictions["student_alone"].argmax(1) != labels)).sum()
    assert f"distilling wins {won} and loses" in text


def test_classes_are_sorted_by_what_the_student_lost(tmp_path, digits):
    predictions, labels, _ = digits
    names = [f"class-{i}" for i in range(10)]
    text = Page(write(tmp_path, digits, class_names=names)).text
    rows = re.search(r"against alone (.*?) Confusion", text).group(1)
    shown = [int(i) for i in re.findall(r"class-(\d)", rows)]
    lost = metrics.per_class_accuracy(predictions["teacher"], labels)
    lost = lost - metrics.per_class_accuracy(predictions["student_distilled"], labels)
    assert sorted(shown) == list(range(10))
    assert (np.diff(lost[shown]) <= 1e-12).all()


def test_text_from_outside_is_escaped(tmp_path, digits):
    evil = "<script>alert('$1')</script>"
    names = [evil, "a&b", "$5", "_x^y", '"', "naïve", "7", "8", "<b>", "９"]
    config = {"data": {"name": evil, "data_dir": "</pre><img src=http://x>"}}
    html = write(tmp_path, digits, class_names=names, config=config)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.text and "</pre><img src=http://x>" in page.text and "a&b" in page.text
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_many_classes_become_lists_of_the_worst(tmp_path, digits):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, 2000)
    predictions = {name: rng.normal(size=(2000, 100)) + 3 * np.eye(100)[labels] for name in results.ARMS}
    labels[:5] = -1
    html = write(tmp_path, digits, predictions=predictions, labels=labels, history=[])
    text = Page(html).text
    assert "worst 30 of 100" in text and "20 most frequent confusions of 100 classes" in text
    counts = metrics.confusion(predictions["student_distilled"], labels)
    np.fill_diagonal(counts, 0)
    true, predicted = np.unravel_index(counts.argmax(), counts.shape)
    assert f"{true} {predicted} {counts.max()}" in text
    assert "Learning curves" not in text  # no history, no empty plots
    assert len(html) < 500_000


@pytest.mark.parametrize("names", [["teacher"], ["student_alone"], ["teacher", "student_distilled"]])
def test_a_run_with_fewer_arms_still_reports(tmp_path, digits, names):
    predictions, _, found = digits
    fewer = {**found, "arms": {name: found["arms"][name] for name in names}}
    html = write(tmp_path, digits, predictions={name: predictions[name] for name in names}, results=fewer)
    text = Page(html).text
    assert results.headline(fewer) in text
    assert ("Fidelity" in text) == (names == ["teacher", "student_distilled"])


def test_wrong_arguments_are_one_sentence(tmp_path, digits):
    predictions, _, _ = digits
    with pytest.raises(UserError, match="3 class names do not go with logits of 10"):
        write(tmp_path, digits, class_names=["a", "b", "c"])
    with pytest.raises(UserError, match="differ in shape"):
        write(tmp_path, digits, predictions={**predictions, "teacher": predictions["teacher"][:5]})
    with pytest.raises(UserError, match="at least one of teacher"):
        write(tmp_path, digits, predictions={})
    assert not (tmp_path / "report.html").exists()


def test_the_same_run_gives_the_same_page(tmp_path, digits):
    assert write(tmp_path, digits) == write(tmp_path, digits)


def test_plots_follow_the_theme_and_thin_long_runs():
    steps = np.arange(100_000)
    noisy = np.random.default_rng(0).uniform(1, 2, len(steps))
    svg = report_plots.lines([("loss", "teacher", steps, noisy)], title="loss <1>", log=True)
    assert "var(--teacher)" in svg and "var(--rule)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)  # a fixed colour would vanish on a dark page
    assert len(svg) < 60_000
    assert 'aria-label="loss &lt;1&gt;"' in svg

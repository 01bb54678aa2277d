import copy
import hashlib
import io
import itertools
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from kdjax import results
from kdjax.compare import plots as compare_plots
from kdjax.compare import report as compare_report
from kdjax.compare import results as compare_results
from kdjax.compare import summary as compare_summary
from kdjax.errors import UserError

EXAMPLES = 10_000
NOISE = (-0.002, -0.001, 0.0, 0.001, 0.002)
EFFECTS = {"control": 0.0, "kl": 0.01, "dkd": 0.02, "nst": -0.03, "at": 0.0005}
VOID = {"meta"}


def method(name, effect, seeds, rng):
    """A made-up method: the seeds' common noise, the effect, and a little of its own."""
    own = rng.normal(0, 0.0005, len(seeds)) if name != "control" else np.zeros(len(seeds))
    accuracy = [round((0.9 + NOISE[i % 5] + effect + own[i]) * EXAMPLES) / EXAMPLES for i in range(len(seeds))]
    cells = [
        {
            "seed": seed, "accuracy": accuracy[i], "nll": 0.3 - effect, "ece": 0.02, "agreement": 0.92 + effect,
            "kl": 0.2 - effect, "params_sha256": hashlib.sha256(f"{name} {seed}".encode()).hexdigest(),
        }
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    losses = {"ce": {"weight": 1.0}} | ({} if name == "control" else {name: {"weight": 0.9}})
    tuned = {"key": f"losses.{name}.weight", "tried": [0.1, 1.0, 10.0], "accuracy": [0.8, 0.9, 0.85], "chosen": 1.0}
    return {
        "losses": losses, "tuned": None if name == "control" else tuned, "flops_per_step": 2e9 + 1e9 * (name == "dkd"),
        "ms_per_step": 10.0 + 2.0 * (name == "dkd"), "cells": cells,
    }  # fmt: skip


def grid_of(axes, seeds):
    keys = ["losses.kl.temperature", "losses.kl.weight", "losses.kl.bias"][: len(axes)]
    cells = [
        {"values": list(values), "seed": seed, "accuracy": 0.8 + 0.01 * sum(values) + 0.001 * seed}
        for values, seed in itertools.product(itertools.product(*axes), seeds)
    ]
    return {"keys": keys, "values": [list(axis) for axis in axes], "cells": cells}


def comparison(effects=None, seeds=5, axes=None):
    effects, seeds, rng = effects or EFFECTS, list(range(seeds)), np.random.default_rng(0)
    return {
        "schema": 1,
        "kind": "compare",
        "config_sha256": "ab" * 32,
        "environment": results.environment(),
        "seeds": seeds,
        "test_examples": EXAMPLES,
        "updates": 2000,
        "teacher": {"accuracy": 0.95, "params": 90_000},
        "student": {"params": 4_000},
        "control": "control",
        "baseline": "kl" if "kl" in effects else None,
        "tuning": {"trials": 3, "holdout_examples": 1_000},
        "methods": {name: method(name, effect, seeds, rng) for name, effect in effects.items()},
        "grid": grid_of(axes, seeds) if axes else None,
    }


@pytest.fixture
def run():
    return comparison()


def by_method(run):
    return {row["method"]: row for row in compare_report.summarise(run)}


class Page(HTMLParser):
    """The text and tags of a page; fails on a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def page(run):
    html = compare_report.page(run)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    return html, Page(html)


# ----------------------------------------------------------------------------------------------------- the contract


def test_write_and_load_give_the_same_back(run, tmp_path):
    path = tmp_path / "results.json"
    compare_results.write(path, run)
    assert compare_results.load(path) == run
    broken = copy.deepcopy(run)
    broken["methods"]["kl"]["cells"][1]["nll"] = float("nan")
    with pytest.raises(UserError, match=r"results\.methods\.kl\.cells\[1\]\.nll must be a finite number .* got nan"):
        compare_results.write(path, broken)
    assert compare_results.load(path) == run and os.listdir(tmp_path) == ["results.json"]


def test_load_names_what_is_wrong(run, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="finish `kdjax compare"):
        compare_results.load(path)
    path.write_text(json.dumps(run)[:100])
    with pytest.raises(UserError, match="is not JSON"):
        compare_results.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="results must be an object"):
        compare_results.load(path)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("schema",), 2, "of schema 2 and kind 'compare', this reads schema 1"),
        (("kind",), "distill", "kind 'distill'"),
        (("seeds",), [], "results.seeds must be a list of at least one seed"),
        (("seeds",), [0, 1, 2, 3, 3], "a list of different seeds"),
        (("seeds", 1), -1, r"results.seeds\[1\] must be a whole number"),
        (("test_examples",), 0, "results.test_examples must be at least 1"),
        (("teacher", "accuracy"), 95.0, r"results.teacher.accuracy must be .* in \[0, 1\]"),
        (("student", "parameters"), 1, "did you mean 'params'"),
        (("control",), "contrl", "unknown method in results.control 'contrl': did you mean 'control'"),
        (("baseline",), "kd", "unknown method in results.baseline 'kd'"),
        (("baseline",), "control", "results.baseline must be another method"),
        (("tuning", "trials"), 2.5, "results.tuning.trials must be a whole number"),
        (("methods",), {}, "at least one method"),
        (("methods", "\x00"), {}, "must be printable text"),
        (("methods", "kl", "losses", "ce"), 1.0, "results.methods.kl.losses must be an object of terms"),
        (("methods", "kl", "cells"), [], "results.methods.kl.cells must be a list of 5 cells, one per seed, got 0"),
        (("methods", "kl", "cells", 2, "seed"), 7, r"cells\[2\].seed must be 2, as in results.seeds, got 7"),
        (("methods", "kl", "cells", 0, "agreement"), 1.5, r"cells\[0\].agreement must be"),
        (("methods", "kl", "ms_per_step"), None, "results.methods.kl.ms_per_step must be"),
        (("methods", "kl", "tuned", "chosen"), 5.0, "tuned.chosen must be one of"),
        (("methods", "kl", "tuned", "accuracy"), [0.5], "tuned.accuracy must be a list of 3 numbers"),
        (("methods", "kl", "tuned", "tried"), [1.0, 1.0], "tuned.tried must be a list of different numbers"),
        (("grid", "values"), [[1.0]], "results.grid.values must be a list of 2 lists"),
        (("grid", "cells", 0, "seed"), 9, r"results.grid.cells\[0\] must be another point of the grid"),
        (("grid", "cells", 1, "seed"), 0, r"results.grid.cells\[1\] must be another point"),
        (("grid", "cells", 0, "values"), [1.0, [2.0]], r"results.grid.cells\[0\] must be another point"),
        (("grid", "cells"), [], r"results.grid.cells lacks 20 cells, such as \[1.0, 0.5\] with seed 0"),
    ],
)
def test_validate_names_the_first_wrong_key(keys, value, says):
    run = comparison(axes=[(1.0, 2.0), (0.5, 0.9)])
    compare_results.validate(run)
    place = run
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(UserError, match=says):
        compare_results.validate(run)


@pytest.mark.parametrize("path", ["grid", "environment.cpu", "methods.kl.tuned", "teacher.params"])
def test_validate_names_a_missing_key(run, path):
    *parents, last = path.split(".")
    place = run
    for key in parents:
        place = place[key]
    del place[last]
    with pytest.raises(UserError, match=f"results.{path} is missing"):
        compare_results.validate(run)


# ------------------------------------------------------------------------------------------------------ the figures


def test_rows_are_sorted_and_compared(run):
    rows = compare_report.summarise(run)
    assert [row["method"] for row in rows] == ["dkd", "kl", "at", "control", "nst"]
    found = by_method(run)
    verdicts = {name: row["to_control"] and row["to_control"]["verdict"] for name, row in found.items()}
    assert verdicts == {"control": None, "kl": "better", "dkd": "better", "nst": "worse", "at": "not told apart"}
    assert found["control"]["to_baseline"] is None and found["kl"]["to_baseline"] is None
    assert found["at"]["to_baseline"]["verdict"] == "worse"
    kl = [cell["accuracy"] for cell in run["methods"]["kl"]["cells"]]
    dkd = [cell["accuracy"] for cell in run["methods"]["dkd"]["cells"]]
    assert found["dkd"]["to_baseline"]["mean"] == pytest.approx(np.mean(dkd) - np.mean(kl))
    assert found["dkd"]["agreement"] == pytest.approx(0.94)
    assert (found["dkd"]["flops_ratio"], found["dkd"]["ms_ratio"]) == (1.5, 1.2)


def test_each_reference_is_a_family_of_its_own(run):
    found = by_method(run)
    for key, size in (("to_control", 4), ("to_baseline", 3)):
        family = [row[key] for row in found.values() if row[key]]
        assert len(family) == size
        least = min(family, key=lambda one: one["p"])
        assert least["holm_p"] == pytest.approx(size * least["p"])


def test_many_comparisons_make_a_verdict_harder():
    few = comparison({"control": 0.0, "at": 0.001})
    accuracy = [0.898, 0.899, 0.9, 0.901, 0.902]
    for cell, base, gain in zip(few["methods"]["at"]["cells"], accuracy, (0, 2, 3, 1, 2), strict=True):
        cell["accuracy"] = base + gain / 1000
    assert by_method(few)["at"]["to_control"]["verdict"] == "better"
    many = comparison({"control": 0.0, "at": 0.001, **{f"other{i}": 0.0 for i in range(10)}})
    many["methods"]["at"] = few["methods"]["at"]
    found = by_method(many)["at"]["to_control"]
    assert found["verdict"] == "not told apart" and found["interval_95"][0] > 0


def test_seeds_that_agree_to_the_last_example_prove_little():
    run = comparison({"control": 0.0, "at": 0.0}, seeds=2)
    for cell, control in zip(run["methods"]["at"]["cells"], run["methods"]["control"]["cells"], strict=True):
        cell["accuracy"] = control["accuracy"] + 1 / EXAMPLES
    assert by_method(run)["at"]["to_control"]["verdict"] == "not told apart"


def test_without_a_baseline_the_cost_is_relative_to_the_control():
    run = comparison({"control": 0.0, "dkd": 0.02})
    found = by_method(run)
    assert found["dkd"]["to_baseline"] is None and found["dkd"]["ms_ratio"] == 1.2
    run["methods"]["control"]["ms_per_step"] = 0.0
    assert by_method(run)["dkd"]["ms_ratio"] is None
    assert "ms / control" in compare_report.markdown(run)


# ---------------------------------------------------------------------------------------------------- the sentences


def test_the_sentence_says_what_is_real_and_what_is_not(run):
    said = compare_report.sentence(run)
    assert said.startswith(
        "Of 4 methods, 2 are better than the same student alone, 1 is worse, and 1 is not told apart from it. "
    )
    means = {row["method"]: row["to_control"]["mean"] for row in by_method(run).values() if row["to_control"]}
    shown = {name: f"{100 * mean:+.2f}".replace("-", "−") for name, mean in means.items()}
    assert f"Better: dkd {shown['dkd']}, kl {shown['kl']}. Worse: nst {shown['nst']}. " in said
    assert f"No real difference seen: at {shown['at']}." in said
    assert "Of 3 methods, 1 is better than plain KD (kl), 2 are worse, and none is not told apart from it" in said
    assert "from it (better: dkd +" in said
    assert "The highest mean is that of dkd" in said and "told apart from all others" in said
    sd = np.median([row["to_control"]["sd"] for row in by_method(run).values() if row["to_control"]])
    least = 100 * sd / np.sqrt(5) * 4.3147  # t with 4 degrees of freedom at 1 - 0.05 / 8
    visible = float(re.search(r"must typically be ([\d.]+) points", said).group(1))
    assert visible == pytest.approx(least, rel=0.05)


def test_methods_that_do_not_help_are_said_not_to():
    said = compare_report.sentence(comparison({"control": 0.0, "kl": 0.0002, "at": -0.0002}))
    assert said.startswith("Of 2 methods, none is better than the same student alone")
    assert "Better" not in said and "not told apart from any other" in said
    assert "at is not told apart from plain KD (kl)." in said


def test_one_seed_gives_no_verdict():
    run = comparison(seeds=1)
    said = compare_report.sentence(run)
    assert said.startswith("One seed: no difference between methods can be told from chance.")
    assert "run at least 5 seeds" in said and "better" not in said
    assert all(row["to_control"]["verdict"] == "not told apart" for row in by_method(run).values() if row["to_control"])
    assert "±" not in compare_report.markdown(run).split("\n\n")[0]


def test_only_the_control():
    run = comparison({"control": 0.0})
    assert compare_report.sentence(run) == "Only the control ran: it is right on 90.00 % of the test set."
    page(run)


def test_a_method_without_effect_is_named(run):
    assert "No effect at all" not in compare_report.sentence(run)
    run["methods"]["at"]["cells"] = copy.deepcopy(run["methods"]["control"]["cells"])
    assert "No effect at all: at gave exactly the parameters of control." in compare_report.sentence(run)


# -------------------------------------------------------------------------------------------------------- the tables


def printed(run):
    console = Console(file=io.StringIO(), width=80)
    console.print(compare_report.table(run))
    return console.file.getvalue()


def test_the_table_fits_a_terminal(run):
    text = printed(run)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert compare_report.sentence(run) in " ".join(text.split())
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["dkd"].count("▲") == 2 and "1.20" in lines["dkd"]
    assert lines["nst"].count("▼") == 2 and "▼" not in lines["kl"]


def test_the_table_folds_long_names_and_cuts_nothing(run):
    run["baseline"] = "a_long_name_of_a_method"
    run["methods"][run["baseline"]] = run["methods"].pop("kl")
    text = printed(run)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.split("Of 4 methods")[0].count("▲") == 3 and text.count("▼") == 3


def test_markdown_is_a_table(run):
    run["methods"]["a|b"] = run["methods"].pop("at")
    lines = compare_report.markdown(run).split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {11}
    assert lines[2].startswith("| dkd | ") and lines[2].count("**") == 4
    assert "▲" in lines[2] and "1.50 | 1.20 |" in lines[2]
    assert any(line.startswith(r"| a\|b | ") for line in lines)


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_asks_nothing_of_anybody(tmp_path):
    run = comparison(axes=[(1.0, 2.0, 4.0), (0.5, 0.9)])
    path = tmp_path / "report.html"
    compare_report.write_report(path, run)
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert not {"script", "link", "img", "image", "iframe", "object"} & set(found.tags)
    assert "default-src 'none'" in html and not re.search(r"url\((?!#)|@import", html)
    assert not re.search(r"#[0-9a-f]{6}", html.split("</style>", 1)[1])  # a fixed colour would vanish on a dark page
    for part in compare_summary.sentences(run):
        assert part in found.text
    for row in compare_report.summarise(run):
        for key in compare_summary.columns(run).values():
            assert compare_summary.cell(row, key) in found.text
    for heading in ("Accuracy", "Differences", "Fidelity", "Cost", "Grid", "Tuning", "Every run", "Environment"):
        assert heading in found.text
    assert html == compare_report.page(run)


def test_thirty_methods_stay_readable():
    effects = {"control": 0.0, "kl": 0.01, **{f"method_number_{i}": 0.001 * (i - 10) for i in range(28)}}
    html, found = page(comparison(effects))
    assert all(name in found.text for name in effects)
    assert len(html) < 700_000


def test_text_from_outside_is_escaped(run):
    evil = "<script>alert('$1')</script>"
    run["methods"][evil] = run["methods"].pop("at")
    run["methods"][evil]["losses"] = {evil: {evil: evil}}
    run["methods"][evil]["tuned"]["key"] = evil
    run["control"] = "<i>$5_x^y</i>"
    run["methods"]["<i>$5_x^y</i>"] = run["methods"].pop("control")
    run["environment"]["cpu"] = evil
    _, found = page(run)
    assert not {"script", "i"} & set(found.tags)
    assert found.text.count(evil) > 3


def test_the_plots_show_the_verdicts(run):
    def colors(run, title):
        svg = re.search(rf'<svg[^>]*aria-label="{title}".*?</svg>', page(run)[0], re.DOTALL).group()
        return {name for name in ("student_distilled", "bad") if f"var(--{name})" in svg}

    assert colors(run, "Minus control") == colors(run, "Mean test accuracy") == {"student_distilled", "bad"}
    same = comparison({"control": 0.0, "kl": 0.0002, "at": -0.0002})
    assert colors(same, "Minus control") == colors(same, "Minus kl") == colors(same, "Mean test accuracy") == set()


def test_a_grid_shows_every_mean_and_its_best():
    run = comparison(axes=[(1.0, 2.0, 4.0), (0.5, 0.9), (3.0, 5.0)])
    _, found = page(run)
    assert "Accuracy at losses.kl.bias = 3" in found.text and "Accuracy at losses.kl.bias = 5" in found.text
    for values in itertools.product(*run["grid"]["values"]):
        assert f"{100 * (0.8 + 0.01 * sum(values) + 0.002):.2f}" in found.text
    best = "losses.kl.temperature = 4, losses.kl.weight = 0.9, losses.kl.bias = 5"
    assert f"Highest mean: 90.10 % at {best}. It is the best of 12 on the test set itself" in found.text


def test_a_grid_of_one_key_is_a_line():
    _, found = page(comparison(axes=[(1.0, 2.0, 4.0)]))
    assert "Accuracy over losses.kl.temperature" in found.text and "mean of the seeds" in found.text


def test_the_edge_of_the_tuning_is_named(run):
    assert "at the edge" not in page(run)[1].text
    run["methods"]["dkd"]["tuned"]["chosen"] = 10.0
    assert "at the edge of what was tried for dkd:" in page(run)[1].text


def test_a_failed_method_does_not_flatten_the_others():
    effects = {"control": 0.0, "kl": 0.01, "dkd": 0.02, "at": 0.005, "nst": -0.5, "vid": 0.012}
    run = comparison(effects)
    estimates = [
        compare_plots.Estimate(row["method"], 100 * row["accuracy"]["mean"], None, "muted")
        for row in compare_report.summarise(run)
    ]
    low, high = compare_plots._limits(estimates, [90.0])
    assert 89 < low < 90 and 92 < high < 93
    _, found = page(run)
    assert "◂ 40.0" in found.text and "Far outside of the plot: nst (42.0 %, 40.0 %)" in found.text


def test_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    points, names = rng.uniform(0, 300, (40, 2)), [f"method{i}" for i in range(40)]
    places = compare_plots._label_places(points, names)
    assert len(places) > 20
    boxes = [(*(points[i] + offset), 3.9 * len(names[i])) for i, offset in places.items()]
    for (x, y, width), (other_x, other_y, other_width) in itertools.combinations(boxes, 2):
        assert x >= other_x + other_width or other_x >= x + width or abs(y - other_y) >= 8

import copy
import itertools
import json

import numpy as np
import pytest
from scipy.special import log_softmax

from kdjax.errors import UserError
from kdjax.measure import report, results, rounds
from kdjax.measure.examples import Examples
from kdjax.measure.rounds import Timed, Warm

RNG = np.random.default_rng(0)


def calls(scale, batch=1):
    return [scale * batch * (1 + RNG.exponential(0.2, 25)) for _ in range(8)]


def entry(scale, accuracy, weights, reference=None):
    timed = {batch: Timed(calls(scale, batch), 0.5 * scale, None) for batch in rounds.BATCHES}
    warmed = {batch: Warm(1e-3, 1000 * batch, (batch, 10)) for batch in rounds.BATCHES}
    found = {
        "path": "p", "format": "onnx", "runtime": "onnxruntime", "version": "1", "inputs": [], "params": 10,
        "weights_bytes": weights, "file_bytes": 2 * weights, **results.timed(timed, warmed, None),
        "test": {"accuracy": accuracy, "nll": 0.1, "bits_per_byte": None, "agreement": accuracy}, "ratios": None,
    }  # fmt: skip
    return found if reference is None else {**found, "ratios": results.ratios(found, reference)}


def measured():
    teacher = entry(1.0, 0.98, 40_000)
    models = {"teacher <b>": teacher, "student": entry(0.1, 0.96, 1000, teacher)}
    return {
        "schema": 1, "kind": "measure",
        "environment": {"python": "3", "platform": "x", "cpu": "y", "packages": {}, "date": "2026-01-01T00:00:00"},
        "data": {"task": "classification", "name": "digits", "examples": 359, "of": 359, "positions": 359},
        "settings": {"threads": 1, "cores": [1], "calls": 200, "rounds": 8, "batches": [1, 8, 32]},
        "machine": {"quiet": False, "causes": ["other processes took 40.0 % of the cores"], "others": 0.4,
                    "elsewhere": 0.0, "steal": 0.0, "busy_before": 0.0, "load_before": 1.0,
                    "spread": {"teacher <b>": 0.01, "student": 0.01}},
        "reference": "teacher <b>", "models": models,
    }  # fmt: skip


def test_percentiles_rates_and_totals_are_those_of_numpy():
    ms = [np.array([1.0, 2.0, 9.0]), np.array([4.0, 4.0, 4.0]), np.array([3.0, 1.0, 2.0])]
    found = results.latency(ms)
    flat = np.concatenate(ms)
    np.testing.assert_allclose([found[p] for p in ("p50", "p90", "p99")], np.quantile(flat, [0.5, 0.9, 0.99]))
    assert (found["calls"], found["rounds"]) == (9, [2.0, 4.0, 2.0])
    np.testing.assert_allclose(results.items_per_s(ms, 8), 8 * 3 / 0.012)  # 12, 12 and 6 ms: the median is 12
    np.testing.assert_allclose(results.per_1000(0.9, ms, 8), 0.9 / 72 * 1000)


def test_joules_of_too_short_a_time_are_left_out():
    timed = {1: Timed([np.full(10, 1.0)], 0.1, 3.0), 8: Timed([np.full(10, 200.0)], 0.1, 3.0)}
    found = results.timed(timed, {1: Warm(0, 0, ()), 8: Warm(0, 0, ())}, 32)
    assert found["joules_per_1000"] == {"8": pytest.approx(3.0 / 80 * 1000)}
    assert found["tokens_per_s"]["8"] == pytest.approx(32 * 40)


def test_quality_of_text_counts_targets_alone():
    logits = RNG.normal(size=(3, 4, 5))
    labels = np.array([[0, 1, -1, -1], [2, 2, 2, -1], [4, -1, -1, -1]])
    log_p = np.where(labels >= 0, np.take_along_axis(log_softmax(logits, -1), labels[..., None] % 5, -1)[..., 0], 0.0)
    said = {"first": logits.argmax(-1), "log_p": log_p}
    other = {"first": np.where(labels >= 0, said["first"], 99)}
    other["first"][1, 0] = 98
    split = Examples("language", "x", 5, labels, labels, labels, np.array([3, 4, 5]))
    found = results.quality(said, other, split)
    known = labels >= 0
    np.testing.assert_allclose(found["nll"], -log_p.sum() / 6)
    np.testing.assert_allclose(found["bits_per_byte"], -log_p.sum() / np.log(2) / 12)
    np.testing.assert_allclose(found["accuracy"], (logits.argmax(-1) == labels)[known].mean())
    np.testing.assert_allclose(found["agreement"], 5 / 6)


def test_agreement_of_images_counts_the_unlabelled():
    labels = np.array([1, -1])
    said, other = ({"first": np.array(first), "log_p": np.zeros(2)} for first in ([1, 2], [1, 3]))
    found = results.quality(said, other, Examples("classification", "x", 5, labels, labels, labels))
    assert (found["accuracy"], found["agreement"], found["bits_per_byte"]) == (1.0, 0.5, None)


def test_pareto_front_of_hand_made_points():
    points = [(3, 0.9), (1, 0.5), (2, 0.7), (2, 0.6), (4, 0.9), (5, 0.95), (2.5, 0.65), (2, 0.7)]
    assert [points[i] for i in results.pareto(points)] == [(1, 0.5), (2, 0.7), (2, 0.7), (3, 0.9), (5, 0.95)]
    assert results.pareto([(1, 1)]) == [0]


def test_pareto_front_is_what_dominance_leaves():
    points = [tuple(point) for point in RNG.integers(0, 6, (40, 2)).tolist()]
    beats = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    expected = {i for i, one in enumerate(points) if not any(beats(other, one) for other in points)}
    assert set(results.pareto(points)) == expected


def test_ratios_say_how_much_better():
    found = measured()["models"]["student"]["ratios"]
    assert found["weights_bytes"] == 40 and 8 < found["p50"] < 12 and 8 < found["items_per_s_32"] < 12
    assert found["accuracy"] == pytest.approx(0.96 / 0.98)


def test_slices_lie_evenly_and_are_as_many_as_planned():
    for of, total in itertools.product((1, 3, 7, 40), (40, 41)):
        places = [i for i in range(total) if rounds._has_slice(i, of, total)]
        assert len(places) == of and (of == 1 or np.ptp(np.diff(places)) <= 1)


@pytest.mark.parametrize("call_s", [1e-6, 1e-3, 0.5, 20.0])
def test_plan_holds_the_calls_and_the_budget(call_s):
    one = rounds.plan(call_s, 1, 2000)
    assert one.calls * one.rounds == 2000
    large = rounds.plan(call_s, 32, 2000)
    assert 1 <= large.calls <= one.calls and large.rounds >= rounds.ROUNDS_LEAST
    least = rounds.ROUNDS_LEAST * call_s
    assert large.calls * large.rounds * call_s <= max(1.01 * rounds.THROUGHPUT_S, least)
    assert rounds.plan(call_s, 1, 3) == (3, 1)


def test_the_contract_holds_and_goes_through_a_file(tmp_path):
    results.write(tmp_path / "m.json", measured())
    assert set(results.load(tmp_path / "m.json")["models"]) == {"teacher <b>", "student"}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("schema",), 2, "schema"),
        (("kind",), "x", "kind"),
        (("reference",), "nobody", "models"),
        (("machine", "quiet"), True, "quiet"),
        (("models", "student", "test", "accuracy"), 1.5, "test.accuracy"),
        (("models", "student", "latency_ms", "p99"), None, "p99"),
        (("models", "student", "ratios"), None, "ratios"),
        (("models", "student", "more"), 1, "more"),
    ],
)
def test_a_broken_contract_names_its_key(path, value, named):
    found = copy.deepcopy(measured())
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match=named):
        results.validate(found)


def test_the_page_is_one_file_that_fetches_nothing_and_says_that_the_machine_was_not_quiet(tmp_path):
    report.write_report(tmp_path / "m.html", measured())
    page = (tmp_path / "m.html").read_text()
    assert not any(word in page.replace("http://www.w3.org", "") for word in ("<script", "http:", "https:"))
    assert "teacher &lt;b&gt;" in page and "<b>&quot;" not in page and "teacher <b>" not in page
    assert "The machine was not quiet: other processes took 40.0 %" in page
    assert "40.0 × smaller" in page and page.count("<svg") == 3
    assert "rough below 1,000" in page


def test_one_model_has_no_ratios():
    found = measured()
    del found["models"]["student"], found["machine"]["spread"]["student"]
    results.validate(found)
    assert "×" not in json.dumps([cells for _, cells in report.rows(found)], ensure_ascii=False)
    assert "accuracy at" in report.headline(found)
    assert "×" not in report.page(found)

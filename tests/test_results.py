import copy
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kdjax import memory, results
from kdjax.errors import UserError

SHA = "ab" * 32


def arm(accuracy=0.9, params=100, **changes):
    entry = {
        "params": params,
        "weights_bytes": 4 * params,
        "steps": 600,
        "examples_per_s": 5000.0,
        "test": {"accuracy": accuracy, "macro_f1": accuracy, "nll": 0.3, "ece": 0.02},
        "fidelity": {"agreement": 0.95, "kl": 0.1},
        "latency_ms": {"p50": 0.2, "p99": 0.4},
        "params_sha256": SHA,
    }
    return entry | changes


@pytest.fixture
def run():
    arms = {
        "student_distilled": arm(0.958),
        "student_alone": arm(0.95),
        "teacher": arm(0.99, 1200, examples_per_s=None),
    }
    return results.build(config_sha256=SHA, seed=3, arms=arms)


def test_build_has_the_documented_shape(run):
    assert list(run) == ["schema", "config_sha256", "seed", "environment", "arms"]
    assert list(run["arms"]) == ["teacher", "student_alone", "student_distilled"]
    assert (run["schema"], run["seed"]) == (1, 3)


def test_write_and_load_give_the_same_back(run, tmp_path):
    path = tmp_path / "results.json"
    results.write(path, run)
    assert results.load(path) == run
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_refused_write_leaves_the_old_file(run, tmp_path):
    path = tmp_path / "results.json"
    results.write(path, run)
    broken = copy.deepcopy(run)
    broken["arms"]["teacher"]["test"]["nll"] = float("nan")
    with pytest.raises(UserError, match=r"results\.arms\.teacher\.test\.nll must be a finite number .* got nan"):
        results.write(path, broken)
    assert results.load(path) == run


def test_load_names_what_is_wrong(run, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="no results at"):
        results.load(path)
    path.write_text(json.dumps(run)[:100])
    with pytest.raises(UserError, match="is not JSON"):
        results.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="results must be an object"):
        results.load(path)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("schema",), 2, "results.schema is 2, this kdjax reads 1"),
        (("config_sha256",), "xyz", "results.config_sha256 must be a SHA-256"),
        (("seed",), 1.0, "results.seed must be a whole number"),
        (("seed",), True, "results.seed must be a whole number"),
        (("environment", "python"), 3, "results.environment.python must be a string"),
        (("environment", "device_count"), "1", "results.environment.device_count must be a whole number"),
        (("arms",), {}, "results.arms must be an object with at least one arm"),
        (("arms", "student"), {}, "unknown arm in results.arms 'student'"),
        (("arms", "teacher", "params"), -1, "results.arms.teacher.params must be a whole number of at least 0"),
        (("arms", "teacher", "test", "accuracy"), 99.0, r"results.arms.teacher.test.accuracy must be .* in \[0, 1\]"),
        (("arms", "teacher", "test", "acuracy"), 0.5, "did you mean 'accuracy'"),
        (("arms", "teacher", "latency_ms"), None, "results.arms.teacher.latency_ms must be an object"),
        (("arms", "teacher", "params_sha256"), SHA.upper(), "results.arms.teacher.params_sha256 must be"),
    ],
)
def test_validate_names_the_first_wrong_key(run, keys, value, says):
    place = run
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(UserError, match=says):
        results.validate(run)


@pytest.mark.parametrize("path", ["seed", "environment.cpu", "arms.teacher.fidelity", "arms.teacher.latency_ms.p99"])
def test_validate_names_a_missing_key(run, path):
    *parents, last = path.split(".")
    place = run
    for key in parents:
        place = place[key]
    del place[last]
    with pytest.raises(UserError, match=f"results.{path} is missing"):
        results.validate(run)


def test_environment_says_what_ran():
    found = results.environment()
    assert found["packages"]["jax"] == jax.__version__
    assert (found["backend"], found["device_count"]) == (jax.default_backend(), jax.device_count())
    assert found["date"].endswith("+00:00")
    json.dumps(found, allow_nan=False)


def test_environment_never_fails_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.environment()["commit"] is None


def test_arm_result_counts_and_measures():
    variables = {
        "params": {"w": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.zeros((4,))},
        "state": {"mean": jnp.zeros((4,))},
    }
    logits = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = results.arm_result(
        variables=variables,
        steps=np.int64(7),
        examples_per_s=np.float32(2.5),
        logits=logits,
        teacher_logits=-logits,
        labels=np.array([0, 0, -1]),
        latency_ms={"p50": np.float64(0.1), "p99": 0.2},
        params_sha256=SHA,
    )
    assert (found["params"], found["weights_bytes"], found["steps"]) == (16, 12 * 2 + 4 * 4 + 4 * 4, 7)
    assert found["test"]["accuracy"] == 0.5 and found["fidelity"]["agreement"] == 0.0
    results.validate(results.build(config_sha256=SHA, seed=0, arms={"teacher": found}))
    json.dumps(found)


def test_latency_waits_for_the_result():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: y @ x, x))
    fast = jax.jit(lambda x: x + 1)
    x = jnp.eye(64)
    found = {name: results.latency(fn, x, calls=20) for name, fn in {"slow": slow, "fast": fast}.items()}
    assert found["slow"]["p50"] > 4 * found["fast"]["p50"]  # without waiting both would take a dispatch
    assert 0 < found["fast"]["p50"] <= found["fast"]["p99"]


def test_the_verdict_says_it_plainly(run):
    assert results.verdict(run) == (
        "The distilled student is 0.8 points above the same student alone and keeps 96.8 % of the teacher's accuracy "
        "with 1/12 of its parameters."
    )
    # Two standard errors: 200 * sqrt((0.958 * 0.042 + 0.95 * 0.05) / 360) = 3.1 points.
    assert results.verdict(run, 360).endswith(
        "One seed, 360 test examples: differences below about 3.1 points (two binomial standard errors) are noise, "
        "as this one is."
    )
    assert results.caveat(run, 1_000_000).endswith("are noise.")


def test_the_verdict_of_other_runs(run):
    run["arms"]["student_alone"]["test"]["accuracy"] = 0.97
    assert "is 1.2 points below the same student alone" in results.verdict(run)
    run["arms"]["student_alone"]["test"]["accuracy"] = 0.958
    assert "is level with the same student alone" in results.verdict(run)
    del run["arms"]["student_alone"], run["arms"]["teacher"]
    assert results.verdict(run, 360) == "The distilled student is right on 95.8 % of the test set."
    only = {**run, "arms": {"teacher": arm(0.5)}}
    assert results.verdict(only, 360) == "The teacher is right on 50.0 % of the test set."
    run["arms"]["teacher"] = arm(0.0)  # a teacher that is never right must not divide by zero
    results.verdict(run, 360)


def test_the_table_fits_a_terminal_and_shows_every_quantity(run):
    console = Console(file=io.StringIO(), width=80)
    console.print(results.table(run, 360))
    text = console.file.getvalue()
    for shown in (
        "teacher",
        "student alone",
        "student distilled",
        "1,200",
        "4.7 KiB",
        "95.80",
        "loaded",
        "5,000",
        "0.4",
    ):
        assert shown in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "0.8 points above" in " ".join(text.split())


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_bytes_text(count, text):
    assert memory.bytes_text(count) == text

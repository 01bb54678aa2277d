import copy
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kdjax import results, results_language
from kdjax.errors import UserError

SHA = "ab" * 32
TOKENS, BYTES = 11_424, 45_000


def arm(bits=2.0, params=100, **changes):
    nll = bits * math.log(2) * BYTES / TOKENS
    entry = {
        "params": params,
        "weights_bytes": 4 * params,
        "steps": 600,
        "examples_per_s": 20.0,
        "tokens_per_s": 20_480.0,
        "test": {
            "nll": nll,
            "bits_per_byte": bits,
            "perplexity": math.exp(nll),
            "accuracy": 0.41,
            "tokens": TOKENS,
            "bytes": BYTES,
        },
        "fidelity": {"agreement": 0.75, "kl": 0.1},
        "latency_ms": {"p50": 0.2, "p99": 0.4},
        "params_sha256": SHA,
        "sample": "and so on",
    }
    return entry | changes


def run_of(teacher=1.5, alone=2.0, distilled=1.9, **more):
    bits = {"student_distilled": distilled, "student_alone": alone, "teacher": teacher}
    arms = {name: arm(value, 1200 if name == "teacher" else 100) for name, value in bits.items() if value is not None}
    return results.build(config_sha256=SHA, seed=3, arms=arms, task="language", prompt="Once", **more)


@pytest.fixture
def run():
    return run_of(signals={"form": "top_k", "k": 32, "bytes_per_token": 130.5})


def test_build_has_the_documented_shape_and_comes_back_from_disk(run, tmp_path):
    assert list(run) == ["schema", "config_sha256", "seed", "environment", "arms", "task", "prompt", "signals"]
    assert list(run["arms"]) == ["teacher", "student_alone", "student_distilled"]
    assert (run["schema"], run["task"]) == (1, "language")
    run["arms"]["teacher"]["sample"] = 'a "\x00\ud800 \u202e ‖ 语'  # half a surrogate pair, too, is JSON
    results.write(tmp_path / "results.json", run)
    assert results.load(tmp_path / "results.json") == run


def test_arm_result_counts_and_takes_the_scores():
    params = {"w": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.zeros((4,))}
    scores = {"nll": np.float64(2.5), "bits_per_byte": 0.9, "perplexity": math.exp(2.5), "accuracy": 0.4}
    scores |= {"tokens": 100.0, "bytes": 401.0, "kl": -1e-9, "agreement": 0.75}
    given = {"steps": np.int64(7), "latency_ms": {"p50": np.float64(0.1), "p99": 0.2}, "params_sha256": SHA}
    given |= {"variables": {"params": params, "state": {}}, "scores": scores, "tokens_per_example": 128, "sample": "x"}
    found = results_language.arm_result(examples_per_s=np.float32(2.5), **given)
    assert (found["params"], found["weights_bytes"], found["steps"]) == (16, 12 * 2 + 4 * 4, 7)
    assert (found["examples_per_s"], found["tokens_per_s"]) == (2.5, 320.0)
    assert found["test"] == {"nll": 2.5, "bits_per_byte": 0.9, "perplexity": math.exp(2.5), "accuracy": 0.4} | {
        "tokens": 100,
        "bytes": 401,
    }
    assert found["fidelity"] == {"agreement": 0.75, "kl": 0.0}  # a KL below 0 by rounding is none
    loaded = results_language.arm_result(examples_per_s=None, **given)
    assert loaded["examples_per_s"] is None and loaded["tokens_per_s"] is None
    results.build(config_sha256=SHA, seed=0, arms={"teacher": found}, task="language", prompt="")
    json.dumps([found, loaded], allow_nan=False)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("task",), "langauge", "unknown task in results 'langauge': did you mean 'language'"),
        (("task",), ["language"], "unknown task in results"),
        (("prompt",), None, "results.prompt must be a string"),
        (("promt",), "x", "unknown key in results 'promt': did you mean 'prompt'"),
        (("chain",), [], "unknown key in results 'chain'"),
        (("arms", "teacher", "sample"), b"x", "results.arms.teacher.sample must be a string"),
        (("arms", "teacher", "tokens_per_s"), -1.0, "results.arms.teacher.tokens_per_s must be a finite number"),
        (("arms", "teacher", "examples_per_s"), "2", "results.arms.teacher.examples_per_s must be a finite number"),
        (("arms", "teacher", "test", "nll"), math.nan, "results.arms.teacher.test.nll must be a finite number"),
        (("arms", "teacher", "test", "perplexity"), math.inf, "results.arms.teacher.test.perplexity must be"),
        (("arms", "teacher", "test", "accuracy"), 41.0, r"results.arms.teacher.test.accuracy must be .* in \[0, 1\]"),
        (("arms", "teacher", "test", "tokens"), 10.0, "results.arms.teacher.test.tokens must be a whole number"),
        (("arms", "teacher", "test", "ece"), 0.1, "unknown key in results.arms.teacher.test 'ece'"),
        (("arms", "teacher", "fidelity", "kl"), -0.1, "results.arms.teacher.fidelity.kl must be a finite number"),
        (("arms", "teacher", "params_sha256"), "x", "results.arms.teacher.params_sha256 must be a SHA-256"),
        (("signals",), [], "results.signals.form must be one of top_k, sample, got None"),
        (("signals", "form"), "topk", "results.signals.form must be one of top_k, sample, got 'topk'"),
        (("signals", "form"), "sample", "results.signals.samples is missing"),
        (("signals", "k"), 0.5, "results.signals.k must be a whole number"),
        (("signals", "bytes_per_token"), None, "results.signals.bytes_per_token must be a finite number"),
    ],
)
def test_validate_names_the_first_wrong_key(run, keys, value, says):
    place = run
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(UserError, match=says):
        results.validate(run)


@pytest.mark.parametrize(
    "path", ["prompt", "arms.teacher.sample", "arms.teacher.tokens_per_s", "arms.teacher.test.bytes", "signals.k"]
)
def test_validate_names_a_missing_key(run, path):
    *parents, last = path.split(".")
    place = run
    for key in parents:
        place = place[key]
    del place[last]
    with pytest.raises(UserError, match=f"results.{path} is missing"):
        results.validate(run)


def test_results_without_a_task_are_of_a_classification(run):
    del run["task"]
    with pytest.raises(UserError, match="results"):
        results.validate(run)
    classified = arm(test={"accuracy": 0.9, "macro_f1": 0.9, "nll": 0.3, "ece": 0.02})
    del classified["tokens_per_s"], classified["sample"]
    built = results.build(config_sha256=SHA, seed=0, arms={"teacher": classified})
    assert list(built) == ["schema", "config_sha256", "seed", "environment", "arms"]
    assert results.rows(built)[2] == ("accuracy %", ["90.00"])
    results.validate({**built, "task": "classification"})
    with pytest.raises(UserError, match="unknown key in results 'prompt'"):
        results.validate({**built, "prompt": "Once"})


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (
            {},
            "The distilled student needs 0.100 fewer bits per byte than the same student alone and closes 20 % of the "
            "gap to the teacher, with 1/12 of the teacher's parameters.",
        ),
        (
            {"distilled": 2.05},
            "The distilled student needs 0.050 more bits per byte than the same student alone and widens the gap to "
            "the teacher by 10 %, with 1/12 of the teacher's parameters.",
        ),
        (
            {"distilled": 2.0001},
            "The distilled student needs as many bits per byte as the same student alone and closes 0 % of the gap to "
            "the teacher, with 1/12 of the teacher's parameters.",
        ),
        (
            {"distilled": 1.4},
            "The distilled student needs 0.600 fewer bits per byte than the same student alone and is better than the "
            "teacher, with 1/12 of the teacher's parameters.",
        ),
        (
            {"teacher": 2.0},
            "The distilled student needs 0.100 fewer bits per byte than the same student alone, with 1/12 of the "
            "teacher's parameters; the teacher is no better than the student alone.",
        ),
        (
            {"teacher": None},
            "The distilled student needs 0.100 fewer bits per byte than the same student alone.",
        ),
        (
            {"alone": None},
            "The distilled student needs 0.400 more bits per byte than the teacher, with 1/12 of the teacher's "
            "parameters.",
        ),
        ({"alone": None, "teacher": None}, "The distilled student needs 1.900 bits per byte of text."),
        ({"teacher": None, "distilled": None}, "The student alone needs 2.000 bits per byte of text."),
    ],
)
def test_the_headline_says_it_plainly(bits, says):
    found = run_of(**bits)
    assert results.headline(found) == says
    caveat = results.caveat(found)
    assert bool(caveat) == ({"student_alone", "student_distilled"} <= set(found["arms"]))
    assert results.verdict(found) == " ".join(filter(None, [says, caveat]))


def test_the_caveat_gives_the_tokens_and_no_interval(run):
    assert results.caveat(run) == (
        "One seed, 11,424 test tokens that are not independent of each other: repeat with other seeds before believing "
        "a small difference."
    )
    assert results.caveat(run, 5) == results.caveat(run)  # the tokens are in the results themselves


def test_the_table_fits_a_terminal_and_shows_every_quantity(run):
    run = copy.deepcopy(run)
    run["arms"]["teacher"] |= {"params": 1_235_814_400, "examples_per_s": None, "tokens_per_s": None}
    console = Console(file=io.StringIO(), width=80)
    console.print(results.table(run, TOKENS))
    text = console.file.getvalue()
    nll = 1.9 * math.log(2) * BYTES / TOKENS
    for shown in ("1,235,814,400", "400 B", "1.9000", f"{nll:.4f}", f"{math.exp(nll):.4g}", "41.00", "75.00", "0.1000"):
        assert shown in text
    for shown in ("loaded", "20,480", "600", "0.2", "0.4", "bits per byte", "perplexity", "KL(teacher ‖ arm)"):
        assert shown in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "0.100 fewer bits per byte" in " ".join(text.split())

"""The benchmarks measure what they say: each figure moves when what it measures is broken."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.recipes import bench, bench_host, bench_limits, bench_step

FAST = ["teacher.steps=6", "train.steps=6", "checkpoint.every=0", "log.eval_every=0"]
MLP = ["teacher.name=mlp", "student.name=mlp", "student.options={'hidden':(16,)}"]


def _config(*words):
    return configs.override(configs.default(), [f"--config.{word}" for word in (*FAST, *MLP, *words)])


@pytest.fixture(scope="module")
def prepared():
    return bench_step.prepare(_config())


# ------------------------------------------------------------------------------------------------------------ the step


def test_step_prints_one_json_object_with_the_promised_keys(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_host, "ROUNDS", 1)
    monkeypatch.setattr(bench_host, "ROUND", 0.0)
    monkeypatch.setattr(bench_limits, "SIZES", (64,))
    bench.run("step", _config(), workdir=tmp_path, json_output=True, seconds=0.0)
    found = json.loads(capsys.readouterr().out)
    promised = "fused_over_parts flops_over_minimum compiles host_transfers input_over_constant temp_bytes device jax"
    assert set(promised.split()) <= set(found)
    assert set(bench_step.MEANING) - {"tokens_per_s", "peak_bytes"} <= set(found)  # a CPU does not say its peak
    assert found["compiles"] == 1 and found["host_transfers"] == 0
    assert found["temp_bytes"] > 0 and found["batch_size"] == 64
    assert all(found[key] > 0 for key in found if key.endswith("_ms") and key != "split_ms")
    # Eight devices each do the optimiser's work, which weighs in so small a student.
    assert 1.0 <= found["flops_over_minimum"] < 1.6
    assert not list(tmp_path.iterdir())

    # Forward, and for the student backward: two more products a layer, but for the gradient of the images.
    teacher, hidden, head = 64 * 256 + 256 * 256 + 256 * 10, 64 * 16, 16 * 10
    assert found["products"] == 2 * 64 * (teacher + 2 * hidden + 3 * head)
    assert found["products_minimum"] == 2 * 64 * (teacher + 3 * (hidden + head))
    assert set(found["split_ms"]) == {"input", "put", "dispatch", "wait"}
    assert min(found["host_share_range"]) <= found["host_share"] <= max(found["host_share_range"]) < 1.0
    assert found["bytes_over_minimum"] > 1.0 and set(found["peak_gflops_per_s"]) == {"float32", "bfloat16"}


def test_the_parts_do_what_the_fused_step_does(prepared):
    """Else their times could not be compared: the same loss from the teacher's logits as from the teacher."""
    forward, student, seen = bench_step.parts(prepared)
    logits = forward(prepared.teachers, seen)
    after, packed = student(prepared.state(), logits, prepared.batch, prepared.hparams)
    fused_after, fused_packed = prepared.program.compiled(
        prepared.state(), prepared.teachers, prepared.batch, prepared.hparams
    )
    np.testing.assert_allclose(packed, fused_packed, rtol=1e-5)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(after.params["head"][name], fused_after.params["head"][name], atol=1e-6)


def test_a_compilation_in_the_loop_is_counted(prepared):
    mesh = prepared.experiment.mesh
    assert bench_step.compiles_and_transfers(prepared.arm, mesh, steps=3) == (1.0, 0, "")

    there_already = jnp.ones(3)

    def compiling(first):
        for batch in prepared.arm.batches(first):
            jax.jit(lambda x: jnp.sin(x))(there_already)  # another function at each step
            yield batch

    found = bench_step.compiles_and_transfers(prepared.arm._replace(batches=compiling), mesh, steps=3)
    assert found == (3.0, 0, "")  # the step, and what the fetching of the second and third batch compiles


def test_every_stage_counts_as_one(prepared):
    first = prepared.arm.stages[0]
    second = first._replace(start=3, step=lambda *args: first.step(*args))  # another step: a run compiles each once
    arm = prepared.arm._replace(stages=[first._replace(stop=3), second])
    assert bench_step.compiles_and_transfers(arm, prepared.experiment.mesh, steps=2)[0] == 1.0


def test_an_implicit_transfer_in_the_loop_is_counted(prepared):
    def transferring(first):
        for number, batch in enumerate(prepared.arm.batches(first)):
            if number:
                jnp.add(jnp.ones(3), np.ones(3, np.float32))
            yield batch

    arm = prepared.arm._replace(batches=transferring)
    _, transfers, complaint = bench_step.compiles_and_transfers(arm, prepared.experiment.mesh, steps=3)
    assert transfers == 1 and "host-to-device" in complaint


def test_a_slow_input_pipeline_shows(prepared):
    def slow(first):
        for batch in prepared.arm.batches(first):
            time.sleep(0.03)
            yield batch

    slowed = prepared._replace(arm=prepared.arm._replace(batches=slow))
    constant, real = bench_step.constant_and_input(slowed, 20, fewest=2, seconds=0.0)
    assert real > 0.03 and real > 1.3 * constant


def test_medians_take_turns_and_are_medians():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds if len(order) != 3 else 0.2)  # an outlier in the first round

    found = bench_step.medians({"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.01)}, fewest=4, seconds=0.0)
    assert order == list("ab" + "ab" + "ba" + "ab" + "ba")
    assert 0.002 <= found["a"] < 0.1 and 0.01 <= found["b"] < 0.1 and found["a"] < found["b"]


# ---------------------------------------------------------------------------------------------------- seeds and omitted


def test_seeds_runs_every_seed_once(tmp_path, capsys):
    found = bench.run("seeds", _config("data.labels=0.5"), workdir=tmp_path, seeds=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "distilled - alone, paired: 95 % interval [" in out
    assert json.loads((tmp_path / "seeds.json").read_text()) == found
    assert [row["seed"] for row in found["seeds"]] == [0, 1]
    for row in found["seeds"]:
        arms = json.loads((tmp_path / f"seed-{row['seed']}" / "results.json").read_text())["arms"]
        assert row["student_distilled"] == arms["student_distilled"]["test"]["accuracy"]
        assert row["difference"] == row["student_distilled"] - row["student_alone"]
    saved = json.loads((tmp_path / "seed-1" / "config.json").read_text())["config"]
    assert saved["seed"] == 1 and saved["data"]["labels"] == 0.5
    before = (tmp_path / "seed-0" / "metrics.jsonl").read_text()
    again = bench.run("seeds", _config("data.labels=0.5"), workdir=tmp_path, seeds=2)
    assert again["seeds"] == found["seeds"]
    assert (tmp_path / "seed-0" / "metrics.jsonl").read_text() == before  # loaded, not trained again


def test_omitted_trains_without_the_class_and_reports_before_and_after(tmp_path):
    found = bench.run("omitted", _config(), workdir=tmp_path, seeds=1)
    saved = json.loads((tmp_path / "omitted-0" / "config.json").read_text())["config"]
    assert saved["data"]["omit_class"] == found["omit_class"] == 3
    assert {name for name, term in saved["losses"].items() if term["weight"]} == {"kl"}
    (row,) = found["seeds"]
    assert set(row) == {"seed", "test_examples", "teacher", "before", "bias", "after"} and row["test_examples"] == 37
    assert not (tmp_path / "omitted-0" / "checkpoints" / "student_alone").exists()
    assert found["after"]["all"]["mean"] >= found["before"]["all"]["mean"] - 0.05


def test_a_config_that_omits_a_class_itself_is_kept():
    config = configs.resolve(_config("data.omit_class=7", "losses.kl.temperature=2.5"))
    assert bench.without_class(config).to_dict() == config.to_dict()


def test_the_best_bias_is_the_best_of_all():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 4)) + 2.0 * np.eye(4)[labels] - 3.0 * np.eye(4)[[2]]
    accuracy = lambda bias: ((logits + bias * np.eye(4)[[2]]).argmax(1) == labels).mean()
    bias = bench.best_bias(logits, labels, 2)
    assert accuracy(bias) == max(accuracy(b) for b in np.linspace(-10, 10, 4001))
    assert 1.5 < bias < 4.5  # what was taken off


def test_the_best_bias_is_the_middle_of_its_stretch():
    logits = np.array([[0.0, -4.0], [0.0, -10.0], [0.0, -30.0]])
    assert bench.best_bias(logits, np.array([1, 0, -1]), 1) == 7.0
    with pytest.raises(UserError, match="class 1 needs labelled"):
        bench.best_bias(logits, np.array([0, 0, 0]), 1)


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        bench.run("seed", _config(), workdir=tmp_path)

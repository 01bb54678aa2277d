"""A chain of compression: every step is made, trained beside its control, resumed and found again."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from kdjax import build, checkpoint, cli
from kdjax import config as configs
from kdjax.compress import report, steps
from kdjax.errors import UserError
from kdjax.model import parameter_count
from kdjax.recipes import bench_compress, compress, export
from kdjax.train import Interrupted
from tests.helpers import tiny_config, tiny_language_config

QUIET = lambda sentence: None
NO_CONTROL = {"control": False}
CHAIN = {
    "1_prune": {"method": "prune", "options": {"keep": {"channels": 0.5}}, "steps": 6},
    "2_int8": {"method": "quantise", "options": {"weights": "int8", "activations": "int8"}, "steps": 4, **NO_CONTROL},
    "3_factors": {"method": "low_rank", "of": "teacher", "options": {"budget": 0.4}, "steps": 4, **NO_CONTROL},
    "4_sparse": {"method": "sparsify", "of": "student_distilled", "options": {"final": 0.5}, "steps": 8, **NO_CONTROL},
    "5_int4": {"method": "quantise", "of": "1_prune", "options": {"weights": "int4", "skip": ["^head/"]}},
}


def config(sections=CHAIN):
    found = tiny_config(steps=10)
    found.teacher.name, found.teacher.options, found.teacher.steps = "cnn", {"widths": (8, 12), "strides": (2, 2)}, 20
    found.student = {"name": "cnn", "options": {"widths": (6, 8), "strides": (2, 2)}}
    found.compress = sections
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished chain: ``(workdir, results)``."""
    workdir = tmp_path_factory.mktemp("compress")
    return workdir, compress.run(config(), workdir, say=QUIET)


def test_every_step_is_smaller_and_scored_as_made_alone_and_distilled(whole):
    workdir, found = whole
    assert report.load(workdir / "compress.json") == found
    assert list(found["models"]) == ["teacher", "student_distilled"]
    rows = {step["name"]: step for step in found["steps"]}
    assert list(rows) == list(CHAIN)
    student, teacher = found["models"]["student_distilled"], found["models"]["teacher"]
    assert rows["1_prune"]["spec"]["options"]["widths"] == [3, 4] and rows["1_prune"]["params"] < student["params"] / 2
    # The chain goes on from the trained model of the step before.
    assert rows["2_int8"]["before"] == rows["1_prune"]["distilled"] == rows["5_int4"]["before"]
    assert rows["2_int8"]["params"] == rows["1_prune"]["params"]
    assert rows["2_int8"]["weights_bytes"] < rows["1_prune"]["weights_bytes"]
    assert rows["5_int4"]["distilled"] is None and rows["5_int4"]["updates"] == 0
    assert rows["3_factors"]["params"] < teacher["params"] and rows["3_factors"]["alone"] is None
    sparse = rows["4_sparse"]
    weights = 6 * 9 + 6 * 8 * 9 + 8 * 10  # of two convolutions and the head
    assert sparse["nonzero"] <= sparse["params"] - weights / 2 + 1
    assert rows["1_prune"]["alone"] is not None and rows["2_int8"]["alone"] is None
    assert (rows["1_prune"]["teacher"], rows["2_int8"]["teacher"]) == ("teacher", "before")
    page = (workdir / "compress.html").read_text()
    assert "1_prune" in page and "<script" not in page


def test_a_step_is_exported_as_it_was_trained(whole, tmp_path):
    workdir, found = whole
    rows = {step["name"]: step for step in found["steps"]}
    for name in ("2_int8", "3_factors", "4_sparse"):
        (made,) = export.run(workdir, formats=["onnx"], arm=name, out=tmp_path / name, say=QUIET)
        about = made.manifest
        assert about["params"] == rows[name]["params"]
        assert about["parity"]["accuracy"] == pytest.approx(rows[name]["distilled"]["accuracy"], abs=0.03)
        assert name.replace("_", "\\_") in (made.folder / "card.md").read_text()
        if name == "2_int8":  # true integers: a quarter and the scales
            assert about["weights_bytes"] < 0.75 * rows["1_prune"]["weights_bytes"]
            assert about["parity"]["agreement"] > 0.9  # of a model of 199 parameters that has hardly learned anything
        else:
            assert about["parity"]["max_abs_difference"] < 1e-3


def test_the_control_has_the_same_start_and_length_and_no_teacher(whole):
    workdir, _ = whole
    lines = [json.loads(line) for line in (workdir / "compress" / "metrics.jsonl").read_text().splitlines()]
    of = lambda arm: [line for line in lines if line["arm"] == arm and "loss" in line]
    assert {line["step"] for line in of("1_prune")} == {line["step"] for line in of("1_prune_alone")}
    assert any("kl" in line for line in of("1_prune")) and not any("kl" in line for line in of("1_prune_alone"))
    # Quantise-aware: the teacher is the model that it was made of, so the first KL is small and no label is asked.
    assert of("2_int8")[0]["kl"] < 0.1


def test_a_finished_chain_is_loaded_and_its_models_are_found(whole):
    workdir, found = whole
    said = []
    again = compress.run(config(), workdir, say=said.append)
    assert [step["distilled"] for step in again["steps"]] == [step["distilled"] for step in found["steps"]]
    assert not any("resuming" in sentence for sentence in said)
    experiment = build.prepare(config())
    load = lambda name: compress.load(experiment, workdir, name)
    for name in ("2_int8", "4_sparse", "3_factors"):
        loaded = load(name)
        row = next(step for step in found["steps"] if step["name"] == name)
        assert parameter_count(loaded.variables["params"]) == row["params"]
    kernels = [leaf for leaf in jax.tree.leaves(load("4_sparse").variables["params"]) if leaf.ndim > 1]
    assert np.mean([np.mean(kernel == 0) for kernel in kernels]) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(UserError, match=r"5_int4 in .* was not trained"):
        load("5_int4")
    with pytest.raises(UserError, match="did you mean '2_int8'"):
        load("2_int")


def test_a_step_that_is_interrupted_goes_on_to_the_same_weights(whole, tmp_path):
    for name in ("config.json", "checkpoints"):  # the arms are there; only the step is to be trained
        copy = shutil.copytree if (whole[0] / name).is_dir() else shutil.copyfile
        copy(whole[0] / name, tmp_path / name)
    interrupted = config({"1_prune": {**CHAIN["1_prune"], **NO_CONTROL}})
    interrupted.checkpoint.every = 2
    real, stopped = checkpoint.Checkpoints.save, []

    def save(self, step, *rest):
        real(self, step, *rest)
        if self.folder.name == "1_prune" and not stopped:
            stopped.append(step)
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save)
        with pytest.raises(Interrupted):
            compress.run(interrupted, tmp_path, say=QUIET)
    compress.run(interrupted, tmp_path, say=QUIET)
    experiment = build.prepare(interrupted)
    digest = lambda workdir: checkpoint.digest(compress.load(experiment, workdir, "1_prune").variables)
    assert stopped == [2] and digest(tmp_path) == digest(whole[0])


def test_a_changed_step_is_refused_where_its_checkpoint_is(whole):
    workdir, _ = whole
    changed = {**CHAIN, "1_prune": {**CHAIN["1_prune"], "learning_rate": 0.5}}
    with pytest.raises(UserError, match=r"checkpoint of 1_prune.*has another config_sha256"):
        compress.run(config(changed), workdir, say=QUIET)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"compress.a.method '': valid names are low_rank, prune"),
        ({"method": "prun"}, "did you mean 'prune'"),
        (
            {"method": "prune", "optoins": {}},
            "unknown config key 'compress.a.optoins': did you mean 'compress.a.options'",
        ),
        ({"method": "prune", "control": 1}, r"compress.a.control is 1 \(int\) and should be bool"),
        ({"method": "prune", "options": {"kep": {}}}, "unknown option of compress.a 'kep': did you mean 'keep'"),
        ({"method": "prune"}, "compress.a.options has no keep"),
        ({"method": "prune", "options": {"keep": 0.5}}, "keep is 0.5: name parts"),
        ({"method": "quantise", "options": {"weights": "int5"}}, "unknown quantisation of weights 'int5'"),
        ({"method": "low_rank", "of": "b"}, "unknown compress.a.of 'b'"),
        ({"method": "low_rank", "teacher": "me"}, "unknown compress.a.teacher 'me'"),
        ({"method": "prune", "losses": {"kll": {}}}, "did you mean 'compress.a.losses.kl'"),
    ],
)
def test_a_step_that_says_no_sense_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        steps.plan(configs.resolve(config({"a": section})))


def test_a_config_without_steps_says_where_to_look(tmp_path, capsys):
    assert cli.run(["compress", "--workdir", str(tmp_path / "new")]) == 2
    assert "set compress, as configs/compress.py does" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_language_models_are_cut_factorised_and_quantised(tmp_path):
    found = tiny_language_config()
    found.compress = {
        "1_prune": {
            "method": "prune",
            "of": "teacher",
            "options": {"keep": {"layers": 1, "mlp_width": 0.5}},
            "steps": 2,
        },
        "2_factors": {"method": "low_rank", "options": {"energy": 0.5}},
        "3_int4": {"method": "quantise", "options": {"weights": "int4"}, "steps": 2, "control": False},
    }
    rows = compress.run(found, tmp_path, say=QUIET)["steps"]
    assert rows[0]["spec"]["options"]["layers"] == 1 and rows[0]["spec"]["options"]["mlp_width"] == 16
    assert rows[1]["params"] < rows[0]["params"] and rows[2]["weights_bytes"] < rows[1]["weights_bytes"] / 4
    assert all(row["made"]["bits_per_byte"] > 0 for row in rows)
    loaded = compress.load(build.prepare(found), tmp_path, "3_int4")
    assert loaded.spec["ranks"] == rows[1]["spec"]["ranks"]


def test_seeds_are_paired_and_the_share_recovered_is_of_the_means(whole):
    scores = {"before": (0.98, 0.96), "made": (0.90, 0.84), "alone": (0.93, 0.91), "distilled": (0.97, 0.94)}
    found = [json.loads(json.dumps(whole[1])) for _ in range(2)]
    for seed, one in enumerate(found):
        for key, values in scores.items():
            one["steps"][0][key]["accuracy"] = values[seed]
    values = bench_compress.summary(found)
    step = values["steps"]["1_prune"]
    assert step["distilled"]["seeds"] == [0.97, 0.94]
    # Student's t with one degree of freedom: 12.706 standard errors, which are half the difference of the two.
    assert step["difference"]["mean"] == pytest.approx(0.035)
    half = 12.706 * 0.005
    np.testing.assert_allclose(step["difference"]["interval_95"], [0.035 - half, 0.035 + half], 1e-3)
    assert step["recovered"] == pytest.approx((0.955 - 0.87) / (0.97 - 0.87))
    assert "difference" not in values["steps"]["3_factors"] and "distilled" not in values["steps"]["5_int4"]
    assert bench_compress.table(values).row_count == len(CHAIN)

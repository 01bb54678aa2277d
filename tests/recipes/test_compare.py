"""A comparison: its cells are ordinary runs, nothing finished is run again, and what cannot work is refused first."""

import json
import os
import signal

import numpy as np
import pytest

from kdjax import build, cli, train
from kdjax.compare import results as contract
from kdjax.errors import UserError
from kdjax.recipes import compare, distill, methods
from tests.helpers import tiny_config

QUIET = lambda sentence: None
GRID = {"losses.kl.temperature": [1.0, 4.0], "losses.kl.weight": [0.0, 0.9]}


def config():
    found = tiny_config(steps=12)
    found.teacher.name, found.teacher.options, found.teacher.steps = "cnn", {"widths": (6, 8), "strides": (2, 2)}, 10
    found.student = {"name": "cnn", "options": {"widths": (4, 4), "strides": (2, 2)}}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished comparison: ``(workdir, results)``."""
    workdir = tmp_path_factory.mktemp("compare")
    return workdir, compare.run(config(), workdir, names=["kl", "fitnets"], seeds=2, trials=2, grid=GRID, say=QUIET)


def test_results_and_report_hold_every_cell(whole):
    workdir, found = whole
    assert contract.load(workdir / "results.json") == found
    assert list(found["methods"]) == ["control", "kl", "fitnets"]
    assert all([cell["seed"] for cell in method["cells"]] == [0, 1] for method in found["methods"].values())
    assert found["methods"]["control"]["tuned"] is None
    tuned = found["methods"]["fitnets"]["tuned"]
    assert tuned["tried"] == [10.0, 1.0] and len(tuned["accuracy"]) == 2
    assert found["methods"]["fitnets"]["losses"]["fitnets"]["weight"] == tuned["chosen"]
    assert found["methods"]["fitnets"]["flops_per_step"] > found["methods"]["control"]["flops_per_step"] > 0
    assert len(found["grid"]["cells"]) == 8
    assert "<svg" in (workdir / "report.html").read_text()
    assert not list((workdir / "cells" / "kl").glob("seed-*/"))  # checkpoints go once the results stand


def test_cells_are_the_runs_of_kdjax_distill(whole, tmp_path):
    _, found = whole
    single = config()
    chosen = found["methods"]["kl"]["losses"]
    single.losses.kl.update(chosen["kl"])
    single.losses.ce.update(chosen["ce"])
    arms = distill.run(single, tmp_path, say=QUIET).results["arms"]
    of = lambda method: found["methods"][method]["cells"][0]["params_sha256"]
    assert of("control") == arms["student_alone"]["params_sha256"]
    assert of("kl") == arms["student_distilled"]["params_sha256"]


def test_finished_cells_are_not_run_again(whole):
    workdir, found = whole
    said = []
    more = ["kl", "fitnets", "rkd"]
    again = compare.run(config(), workdir, names=more, seeds=2, trials=2, grid=GRID, say=said.append)
    assert all(again["methods"][name] == found["methods"][name] for name in found["methods"])
    assert again["grid"] == found["grid"]
    trained = [path.name for path in (workdir / "cells" / "rkd").iterdir()]
    assert sorted(trained) == ["seed-0.json", "seed-1.json", "tuned.json"]
    with pytest.raises(UserError, match="chose among 2 weights: give --tune=2"):
        compare.run(config(), workdir, names=["kl"], seeds=2, trials=3, say=QUIET)
    with pytest.raises(UserError, match="holds another grid"):
        other = {"losses.kl.temperature": [3.0]}
        compare.run(config(), workdir, names=["kl"], seeds=2, trials=2, grid=other, say=QUIET)


def test_an_interrupted_cell_goes_on_from_its_checkpoint(whole, tmp_path, monkeypatch):
    _, found = whole
    original = train.run

    def stopped(arm, *args, **kwargs):
        if arm.name != "control/seed-1":
            return original(arm, *args, **kwargs)

        def batches(first):
            for number, one in enumerate(arm.batches(first)):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield one

        return original(arm._replace(batches=batches), *args, **kwargs)

    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(train.Interrupted):
        compare.run(config(), tmp_path, names=["control"], seeds=2, say=QUIET)
    assert (tmp_path / "cells" / "control" / "seed-0.json").exists()
    monkeypatch.setattr(train, "run", original)
    said = []
    resumed = compare.run(config(), tmp_path, names=["control"], seeds=2, say=said.append)
    assert any("control/seed-1: resuming from step" in sentence for sentence in said)
    assert not any("control/seed-0" in sentence for sentence in said)
    digests = lambda one: [cell["params_sha256"] for cell in one["methods"]["control"]["cells"]]
    assert digests(resumed) == digests(found)


def test_a_torn_cell_is_run_again(whole):
    workdir, found = whole
    place = workdir / "cells" / "control" / "seed-0.json"
    good = place.read_text()
    place.write_text(good[: len(good) // 2])
    again = compare.run(config(), workdir, names=["kl", "fitnets"], seeds=2, trials=2, grid=GRID, say=QUIET)
    assert again["methods"]["control"]["cells"] == found["methods"]["control"]["cells"]
    assert json.loads(place.read_text())["params_sha256"] == json.loads(good)["params_sha256"]


def test_a_method_hides_from_the_student_what_the_config_hides_and_no_more():
    scarce = config()
    scarce.teacher.labels, scarce.data.labels = 0.5, 0.8
    experiment = build.prepare(scarce)
    other = compare._of_method(experiment, "fitnets")
    assert np.array_equal(other.student_train.labels, experiment.student_train.labels)
    assert np.array_equal(other.dataset.train.labels, experiment.dataset.train.labels)


def test_every_method_names_terms_and_options_that_exist():
    for name in methods.METHODS:
        section = methods.with_method(config().losses.to_dict(), name, 2.0)
        used = {term for term, options in section.items() if options["weight"]}
        assert used == set(methods.losses_of(name))
        assert all(set(section[term]) >= set(options) for term, options in methods.losses_of(name).items())
    both = methods.losses_of("kl+rkd")
    assert set(both) == {"ce", "kl", "rkd_distance", "rkd_angle"} and methods.tuned_term("kl+rkd") == "rkd_angle"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "dkdd"], "unknown method 'dkdd': did you mean 'dkd'"),
        (["--methods", "kl,kl"], "names kl twice"),
        (["--methods", "minilm"], "method minilm: losses.minilm finds no module like"),
        (["--methods", "dkd", "--config.data.labels=0"], "needs labels"),
        (["--grid", "data.batch_size=1,2"], "part of the compiled program"),
        (["--grid", "losses.kl.temperature=1", "losses.kl.weight"], "is no part of a grid"),
        (["--tune", "99"], "1 to 7 weights"),
        (["--seeds", "0"], "positive"),
    ],
)
def test_what_cannot_work_is_one_sentence(capsys, tmp_path, words, message):
    tiny = ("--config.teacher.name=mlp", "--config.student.name=mlp", "--config.mesh.data=1")
    assert cli.run(["compare", "--workdir", str(tmp_path), *words, *tiny]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1

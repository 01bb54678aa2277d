"""Chains: each link is taught by the one before it, is an arm that resumes, and stands in the results."""

import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from kdjax import build, chain, checkpoint, results, train
from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, MAIN, STUDENTS
from kdjax.recipes import distill as recipe
from tests.helpers import digits, tiny_config

QUIET = lambda sentence: None
LINKS = ["assistant_1_large", "assistant_2_small", "generation_1", "student_distilled"]


def config(steps=8, **changes):
    found = tiny_config(steps=steps)
    found.teacher.steps = 8
    found.assistants = {
        "2_small": {"name": "mlp", "options": {"hidden": (12,)}},
        "1_large": {"name": "mlp", "options": {"hidden": (16,)}},
    }
    found.generations = 2
    found.checkpoint.every = 0
    for key, value in changes.items():
        found[key] = value
    return found


def meta(workdir, arm):
    folder = workdir / "checkpoints" / arm
    newest = max((child for child in folder.iterdir() if child.name.isdigit()), key=lambda child: int(child.name))
    return json.loads((newest / "meta" / "metadata").read_text())


def without(workdir, copy, *arms):
    """A copy of a workdir without what these arms left in it."""
    shutil.copytree(workdir, copy)
    for arm in arms:
        shutil.rmtree(copy / "checkpoints" / arm)
    return copy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("chain")
    return workdir, recipe.run(config(), workdir, say=QUIET).results


def test_each_link_is_taught_by_the_one_before_it(run):
    workdir, _ = run
    experiment = build.prepare(config(), digits())
    assert list(experiment.links) == LINKS
    weights = {}
    for name in (MAIN, *LINKS):
        with checkpoint.Checkpoints(workdir / "checkpoints" / name) as checkpoints:
            arm = build.make_arm(experiment, name)
            state, _ = checkpoints.restore_newest(train.abstract_state(arm, experiment.mesh), QUIET)
        weights[name] = checkpoint.digest(train.state.inference_variables(state))
    assert len(set(weights.values())) == len(weights)
    for before, name in itertools.pairwise((MAIN, *LINKS)):
        assert meta(workdir, name)["teacher_sha256"] == {MAIN: weights[before]}, name
        assert meta(workdir, name)["arm"] == name
    assert "teacher_sha256" not in meta(workdir, ALONE)


def test_the_chain_shrinks_to_the_student_and_generations_start_anew():
    experiment = build.prepare(config(generations=3), digits())
    hidden = [link.config.student.options["hidden"] for link in experiment.links.values()]
    assert [tuple(widths) for widths in hidden] == [(16,), (12,), (8,), (8,), (8,)]
    taught = [link.config.teacher.options["hidden"] for link in experiment.links.values()]
    assert [tuple(widths) for widths in taught] == [(32,), (16,), (12,), (8,), (8,)]
    starts = {
        name: train.fresh_state(build.make_arm(experiment, name), experiment.mesh).params
        for name in ("generation_1", "generation_2", *STUDENTS)
    }
    kernel = {name: np.asarray(params["head"]["kernel"]) for name, params in starts.items()}
    assert np.array_equal(kernel[DISTILLED], kernel[ALONE])  # what is compared starts from the same weights
    for one, other in itertools.combinations(("generation_1", "generation_2", DISTILLED), 2):
        assert not np.allclose(kernel[one], kernel[other])


def test_several_teachers_teach_the_first_link_only():
    several = config(more_teachers={"second": {"options": {"hidden": (20,)}}})
    experiment = build.prepare(several, digits())
    assert [list(link.teachers) for link in experiment.links.values()] == [[MAIN, "second"], *[[MAIN]] * 3]
    assert experiment.arms == (MAIN, "second", *LINKS[:-1], *STUDENTS)


def test_results_have_the_chain_in_order(run):
    workdir, found = run
    assert [link["name"] for link in found["chain"]] == LINKS[:-1]
    assert [link["params"] for link in found["chain"]] == [64 * n + n + 10 * n + 10 for n in (16, 12, 8)]
    assert {link["steps"] for link in found["chain"]} == {8}
    assert results.load(workdir / "results.json") == found
    page = (workdir / "report.html").read_text()
    assert "assistant 1_large" in page and "generation 1" in page
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(results.table(found, 359))
    shown = " ".join(console.export_text().split())
    assert "by way of assistant 1_large (1,210 parameters, " in shown and "then generation 1 (610 parameters" in shown
    assert results.chain_sentence({**found, "chain": []}) == ""


def test_evaluate_gives_the_same_and_trains_nothing(run):
    workdir, found = run
    before = (workdir / "metrics.jsonl").read_text()
    again = recipe.evaluate(config(), workdir, say=QUIET).results
    assert again["chain"] == found["chain"]
    assert (workdir / "metrics.jsonl").read_text() == before


def test_evaluate_names_the_link_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"teacher in .* has no checkpoint"):
        recipe.evaluate(config(), tmp_path, say=QUIET)
    for arm in (MAIN, LINKS[0]):
        recipe.run_one(config(), tmp_path, arm, say=QUIET)
    with pytest.raises(UserError, match=r"assistant_2_small in .* has no checkpoint"):
        recipe.evaluate(config(), tmp_path, say=QUIET)


def test_one_arm_trains_what_teaches_it_and_no_more(run, tmp_path):
    workdir, _ = run
    done = recipe.run_one(config(), tmp_path, LINKS[1], say=QUIET)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted([MAIN, *LINKS[:2]])
    assert meta(tmp_path, LINKS[1])["teacher_sha256"] == meta(workdir, LINKS[1])["teacher_sha256"]
    assert done.steps == 8
    copied = without(workdir, tmp_path / "copy", DISTILLED)
    recipe.run_one(config(), copied, DISTILLED, say=QUIET)
    assert meta(copied, DISTILLED) == {**meta(workdir, DISTILLED), "seconds": meta(copied, DISTILLED)["seconds"]}
    with pytest.raises(UserError, match=r"unknown arm 'generation_2'.*generation_1"):
        recipe.run_one(config(), tmp_path, "generation_2", say=QUIET)


def test_a_signal_within_a_link_is_resumed_to_the_same_bits(run, tmp_path, monkeypatch):
    whole, found = run
    workdir = without(whole, tmp_path / "copy", *LINKS[1:])
    make_arm = build.make_arm

    def interrupted(experiment, name, *args, **kwargs):
        """The second link's batches send a signal at step 4, once."""
        arm = make_arm(experiment, name, *args, **kwargs)
        if name != LINKS[1] or not args:
            return arm

        def batches(first):
            for step, batch in enumerate(arm.batches(first), first):
                if step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return arm._replace(batches=batches)

    with monkeypatch.context() as patched:
        patched.setattr(build, "make_arm", interrupted)
        with pytest.raises(train.Interrupted, match="assistant_2_small stopped by a signal"):
            recipe.run(config(), workdir, say=QUIET)
    assert sorted(os.listdir(workdir / "checkpoints")) == sorted([MAIN, ALONE, *LINKS[:2]])
    heard = []
    again = recipe.run(config(), workdir, say=heard.append).results
    assert any("assistant_2_small: resuming from step" in sentence for sentence in heard)
    digests = [{name: arm["params_sha256"] for name, arm in one["arms"].items()} for one in (found, again)]
    assert digests[0] == digests[1]
    assert again["chain"] == found["chain"]


def test_an_assistant_may_come_from_another_run(run, tmp_path):
    workdir, _ = run
    taken = config(generations=1)
    taken.teacher.init = str(workdir)
    del taken.assistants["1_large"]
    taken.assistants["2_small"].init = str(workdir / "checkpoints" / LINKS[1])
    found = recipe.run(taken, tmp_path, say=QUIET).results
    assert not (tmp_path / "checkpoints" / LINKS[1]).exists()
    assert found["chain"][0]["steps"] == 0 and found["chain"][0]["name"] == LINKS[1]
    assert found["chain"][0]["test"] == results.load(workdir / "results.json")["chain"][1]["test"]
    taken.assistants["2_small"].options = {"hidden": (13,)}
    with pytest.raises(UserError, match="another architecture"):
        recipe.run(taken, tmp_path / "other", say=QUIET)
    assert not (tmp_path / "other" / "checkpoints").exists()  # refused before the teacher was trained


def test_the_disk_check_counts_links(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"will need .* and the disk has") as short:
        recipe.run(config(), tmp_path, say=QUIET)
    with pytest.raises(UserError, match=r"will need .* and the disk has") as plain:
        recipe.run(config(assistants={}, generations=1), tmp_path / "plain", say=QUIET)
    needs = [float(str(error.value).split("will need ")[1].split()[0]) for error in (short, plain)]
    assert needs[0] > needs[1] + 10  # KiB


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generations": 0}, "generations=0 and should be 1 or more"),
        ({"assistants": {"a": {"options": {}}}}, "assistants.a has no model"),
        ({"assistants": {"a": {"name": "mpl"}}}, "unknown model 'mpl'.*did you mean 'mlp'"),
        ({"assistants": {"a": {"name": "mlp", "weight": 1.0}}}, "unknown config key 'assistants.a.weight'"),
        ({"more_teachers": {"assistant_1_large": {}}}, "assistant_1_large is the name of two arms"),
        ({"more_teachers": {"generation_1": {}}}, "generation_1 is the name of two arms"),
    ],
)
def test_chains_that_cannot_be_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        build.prepare(config(**changes), digits())


@pytest.mark.parametrize("changes", [{"generations": 1}, {"assistants": {}}])
def test_a_chain_without_a_term_that_asks_the_teacher_is_refused(changes):
    labels = config(**changes)
    labels.losses.kl.weight = 0.0
    with pytest.raises(UserError, match=r"no loss term asks it.*losses\.kl\.weight"):
        build.prepare(labels, digits())


def test_later_generations_cannot_reuse_a_classifier():
    both = config()
    both.student.reuse_classifier = True
    with pytest.raises(UserError, match="set generations=1"):
        build.prepare(both, digits())
    both.generations = 1
    experiment = build.prepare(both, digits())  # but the classifier may be an assistant's
    shapes = train.abstract_state(build.make_arm(experiment, DISTILLED), experiment.mesh)
    assert shapes.model_state["classifier"]["kernel"].shape == (12, 10)


def test_without_a_chain_there_are_no_links():
    plain = configs.resolve(tiny_config())
    assert chain.configs_of(plain, (MAIN, *STUDENTS), DISTILLED) == {}
    assert build.prepare(tiny_config(), digits()).arms == (MAIN, *STUDENTS)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ((), {}, "results.chain must be a list"),
        ((0, "name"), 3, "results.chain.0.name must be a string"),
        ((1, "params"), -1, "results.chain.1.params must be a whole number"),
        ((1, "test", "accuracy"), 2.0, r"results.chain.1.test.accuracy must be .* in \[0, 1\]"),
        ((1, "speed"), 2.0, "unknown key in results.chain.1 'speed'"),
    ],
)
def test_the_contract_covers_the_chain(run, place, value, says):
    found = json.loads(json.dumps(run[1]))
    *parents, last = ("chain", *place)
    parent = found
    for key in parents:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(UserError, match=says):
        results.validate(found)

"""configs/strategies.py: every variant can be prepared as it is, and, made small, does what it says."""

import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import build, checkpoint, state, train, weighting
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, MAIN
from kdjax.model import parameter_count
from kdjax.recipes import distill
from tests.helpers import digits

PLACE = Path(__file__).parents[1] / "configs" / "strategies.py"
VARIANTS = [
    *("assistant", "born_again", "simkd", "ema_teacher", "exits", "past_predictions", "curriculum_temperature"),
    *("mutual", "responsive", "uncertainty", "dwa", "features_then_logits"),
]
QUIET = lambda sentence: None


def config(variant, steps=0, **data):
    """A variant, with minute networks, a constant rate and large batches where steps are given."""
    found = configs.from_file(f"{PLACE}:{variant}" if variant else str(PLACE))
    found.mesh.data = 1
    if not steps:
        return found
    found.data.update(batch_size=256, **data)
    found.teacher.options = {"widths": (8, 8, 12), "strides": (2, 2, 1)}
    found.student.options = {"widths": (4, 4, 6), "strides": (2, 2, 1)}
    if variant == "assistant":
        found.assistants.middle.options = {"widths": (6, 6, 8), "strides": (2, 2, 1)}
    found.teacher.steps = found.train.steps = steps
    found.optimizer.learning_rate = 0.01
    found.checkpoint.every = 0
    return found


@functools.cache
def prepared(variant):
    return build.prepare(config(variant), digits())


@functools.cache
def teacher():
    """A teacher that has learned a little, so that what it says differs from example to example."""
    experiment = build.prepare(config("", 40), digits())
    arm = build.make_arm(experiment, MAIN)
    return state.inference_variables(train.run(arm, experiment.mesh, every=train.Every(), say=QUIET).state)


class Lines(list):
    """A writer that keeps the lines of a run."""

    def write(self, record):
        self.append(record)

    def truncate(self, arm, step):
        pass


def trained(found):
    """The distilled student of a config: (experiment, arm, state at the end, a line of metrics for each step)."""
    experiment, lines = build.prepare(found, digits()), Lines()
    arm = build.make_arm(experiment, DISTILLED, {MAIN: teacher()})
    done = train.run(arm, experiment.mesh, every=train.Every(log=1), writers=[lines], say=QUIET)
    return experiment, arm, done.state, lines


def terms(arm):
    return [list(stage.objective.terms) for stage in arm.stages]


def test_mutual_students_draw_near_each_other_and_peers_need_the_term():
    _, arm, done, lines = trained(config("mutual", 40))
    assert terms(arm) == [["ce", "mutual"]]
    assert lines[-1]["mutual"] < lines[0]["mutual"] and lines[-1]["ce"] < lines[0]["ce"]
    assert jax.tree.map(np.shape, done.learned["params"]["mutual"]["0"]) == jax.tree.map(np.shape, done.params)
    alone = config("mutual", 40)
    alone.losses.mutual.weight = 0.0
    with pytest.raises(UserError, match=r"peers learn by losses\.mutual"):
        build.prepare(alone, digits())


def test_every_variant_is_here_and_an_unknown_one_is_refused():
    with pytest.raises(UserError, match=r"unknown variant of strategies\.py 'distil'") as caught:
        config("distil")
    assert sorted(str(caught.value).split("valid names are ")[1].rstrip(".").split(", ")) == sorted(VARIANTS)


@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_it_can_be_prepared_and_its_control_is_that_of_digits(variant):
    experiment = prepared(variant)
    assert terms(build.make_arm(experiment, ALONE)) == [["ce"]]
    same = ("data", "teacher", "control", "optimizer")
    assert all(experiment.config[key].to_dict() == configs.default()[key].to_dict() for key in same)
    distilled = build.make_arm(experiment, DISTILLED)
    asks = any(stage.objective.uses_teacher for stage in distilled.stages)
    assert asks == (variant not in ("ema_teacher", "exits", "past_predictions", "mutual"))


def test_the_assistant_stands_between_teacher_and_student_in_size_and_order(tmp_path):
    size = lambda model: parameter_count(jax.eval_shape(model.init, jax.random.key(0))["params"])
    experiment = prepared("assistant")
    assert experiment.arms == (MAIN, "assistant_middle", ALONE, DISTILLED)
    link = experiment.links["assistant_middle"]
    assert size(experiment.teachers[MAIN]) > 1.5 * size(link.distilled) > 4 * size(experiment.student)
    small = config("assistant", 4)
    for part, width in ((small.teacher, 12), (small.assistants.middle, 8), (small.student, 4)):
        part.name, part.options = "mlp", {"hidden": (width,)}  # compiled in a moment
    distill.run_one(small, tmp_path, DISTILLED, say=QUIET)
    chain = (MAIN, "assistant_middle", DISTILLED)
    metas, digests = {}, {}
    tiny = build.prepare(small, digits())
    for arm in chain:
        shapes = jax.eval_shape(experiments.model_of(tiny, arm).init, jax.random.key(0))
        variables, metas[arm] = checkpoint.load_model(tmp_path / "checkpoints" / arm, shapes)
        digests[arm] = checkpoint.digest(variables)
    assert metas["assistant_middle"]["teacher_sha256"] == {MAIN: digests[MAIN]}
    assert metas[DISTILLED]["teacher_sha256"] == {MAIN: digests["assistant_middle"]}
    logged = [json.loads(line)["arm"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(logged)) == list(chain)


def test_born_again_students_are_three_of_one_architecture_from_different_weights():
    experiment = prepared("born_again")
    assert experiment.arms == (MAIN, "generation_1", "generation_2", ALONE, DISTILLED)
    models = [link.config.student.to_dict() for link in experiment.links.values()]
    assert all({**one, "seed": 0} == {**models[-1], "seed": 0} for one in models)
    assert len({one["seed"] for one in models}) == 3
    names = list(experiment.links)
    for before, name in itertools.pairwise(names):
        assert experiment.links[name].teachers == {MAIN: experiment.links[before].distilled}


def test_simkd_learns_the_feature_alone():
    experiment, arm, done, lines = trained(config("simkd", 30))
    assert terms(arm) == [["simkd"]]
    assert lines[-1]["simkd"] < 0.6 * lines[0]["simkd"]
    kernel = done.model_state["classifier"]["kernel"]
    assert np.array_equal(kernel, teacher()["params"]["head"]["kernel"])
    assert experiment.distilled is not experiment.student


def test_the_ema_teacher_is_the_students_average_and_what_is_handed_over():
    _, arm, done, lines = trained(config("ema_teacher", 12))
    assert terms(arm) == [["ce", "ema_kl"]]
    kernel, average = (np.asarray(params["head"]["kernel"]) for params in (done.params, done.ema))
    assert np.abs(kernel - average).max() > 0 and state.inference_variables(done)["params"] is done.ema
    assert lines[-1]["ema_kl"] > 0 and lines[-1]["ce"] < lines[0]["ce"]


def test_exits_learn_and_leave():
    _, arm, done, lines = trained(config("exits", 40))
    assert terms(arm) == [["ce", "exits"]]
    assert lines[-1]["exits"] < 0.9 * lines[0]["exits"] and lines[-1]["ce"] < lines[0]["ce"]
    assert sorted(done.learned["params"]["exits"]) == ["0", "1"]  # of three blocks, all but the last
    assert "exits" not in str(jax.tree.structure(state.inference_variables(done)))


def test_past_predictions_take_over_from_the_labels():
    experiment, arm, done, lines = trained(config("past_predictions", 12))
    assert terms(arm) == [["past_predictions"]]
    shares = [line["hparams"]["past_predictions.share"] for line in lines]
    np.testing.assert_allclose(shares, 0.8 * np.arange(12) / 12, atol=1e-6)
    past = np.asarray(done.learned["state"]["past_predictions"]["predictions"])
    assert past.shape == (len(experiment.student_train.labels), 10)
    sums = past.sum(-1)
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0)) and np.mean(sums > 0) > 0.99  # two epochs have met all


def test_the_temperature_learns_against_the_student_ever_harder():
    found = config("curriculum_temperature", 12)
    assert found.losses.curriculum_kl.reversal.length_epochs == 10
    found.losses.curriculum_kl.reversal.length_epochs = 1.5
    _, arm, done, lines = trained(found)
    assert terms(arm) == [["ce", "curriculum_kl"]]
    reversal = [line["hparams"]["curriculum_kl.reversal"] for line in lines]
    assert reversal[0] == 0 and reversal[-1] == 1 and all(np.diff(reversal) >= 0) and 0.3 < reversal[4] < 0.7
    start = train.fresh_state(arm, build.prepare(found, digits()).mesh)
    moved = float(done.learned["params"]["curriculum_kl"]["temperature"])
    assert moved != float(start.learned["params"]["curriculum_kl"]["temperature"])


def test_responsive_weights_fall_as_the_student_learns():
    found = config("responsive", 40)
    _, arm, _, lines = trained(found)
    assert arm.stages[0].objective.terms["kl"]["examples"] == "responsive"
    found.losses.kl.examples = "all"
    *_, plain = trained(found)
    shares = [one["kl"] / all_["kl"] for one, all_ in zip(lines, plain, strict=True)]
    assert 0 < shares[0] < 1  # the same student, batch and teacher: only the weights differ
    assert lines[-1]["kl"] < lines[0]["kl"]


@pytest.mark.parametrize("variant", ["uncertainty", "dwa"])
def test_the_terms_are_balanced(variant):
    _, arm, done, lines = trained(config(variant, 20))
    assert terms(arm) == [["ce", "kl", "similarity"]]
    if variant == "uncertainty":
        learned = {name: float(value) for name, value in done.learned["params"]["balance"].items()}
        assert set(learned) == {"ce", "kl", "similarity"} and all(value != 0 for value in learned.values())
        assert learned["ce"] > 0  # its loss is above 1 all the time, so its weight has fallen
        return
    # 1,438 examples in batches of 256 are 6 steps an epoch: there are two periods and more.
    assert int(done.learned["state"]["balance"]["steps"]) == 20
    weights = {name: float(value) for name, value in weighting.dwa_weights(done.learned["state"]["balance"]).items()}
    np.testing.assert_allclose(sum(weights.values()), 3.0, rtol=1e-5)
    assert max(weights.values()) - min(weights.values()) > 1e-3
    numbers = {name: line["hparams"][f"{name}.weight"] for line in lines[:1] for name in weights}
    plain = lambda line: sum(numbers[name] * line[name] for name in numbers)
    np.testing.assert_allclose(lines[0]["loss"], plain(lines[0]), rtol=1e-5)  # equal weights at first
    assert abs(lines[-1]["loss"] - plain(lines[-1])) > 1e-4


def test_stages_go_from_features_to_logits_to_the_task():
    _, arm, done, lines = trained(config("features_then_logits", 20))
    assert terms(arm) == [["attention_transfer"], ["kl"], ["ce"]]
    assert [(stage.start, stage.stop) for stage in arm.stages] == [(0, 6), (6, 16), (16, 20)]
    named = [{"attention_transfer", "kl", "ce"} & set(line) for line in lines]
    assert named == [{"attention_transfer"}] * 6 + [{"kl"}] * 10 + [{"ce"}] * 4
    assert [stage.objective.uses_teacher for stage in arm.stages] == [True, True, False]
    assert lines[5]["attention_transfer"] < lines[0]["attention_transfer"] and lines[15]["kl"] < lines[6]["kl"]
    assert int(done.step) == 20

"""The self-test passes a healthy config, and fails each thing that it is there to catch."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import build, losses, memory, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.data import sources
from kdjax.errors import UserError
from kdjax.experiment import MAIN
from kdjax.model import Model, Outputs
from kdjax.objective import Objective, make_objective
from kdjax.recipes import check, check_identities, check_models, distill, program

FAST = [
    "--config.teacher.steps=60",
    "--config.train.steps=6",
    "--config.checkpoint.every=0",
    "--config.log.eval_every=0",
]
MLP = ["--config.teacher.name=mlp", "--config.student.name=mlp", "--config.student.options={'hidden':(16,)}"]


def _config(*words):
    return configs.override(configs.default(), [*FAST, *MLP, *(f"--config.{word}" for word in words)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A workdir with a teacher that knows the digits."""
    workdir = tmp_path_factory.mktemp("teacher")
    distill.run_one(_config(), workdir, "teacher", say=lambda _: None)
    return workdir


@pytest.fixture(scope="module")
def parts():
    """A linear model with two sets of weights, and a batch: (student, variables, others, batch)."""

    def init(key):
        return {"params": {"kernel": jax.random.normal(key, (12, 5))}, "state": {}}

    def apply(variables, inputs, *, train, key=None, taps=()):
        return Outputs(inputs @ variables["params"]["kernel"]), {}

    model = Model(init, apply)
    key = jax.random.key(0)
    batch = {"inputs": jax.random.normal(key, (16, 12)), "labels": jnp.arange(16, dtype=jnp.int32) % 5}
    return model, model.init(key), model.init(jax.random.key(1)), batch


def _replaced(goal: Objective, loss) -> Objective:
    """An objective whose loss is another function, of (student logits, teacher logits, batch, counts)."""

    def broken(student, teachers, batch, hparams, counts, *_):
        total = loss(student.logits, next(iter(teachers.values())).logits, batch, counts)
        return total, ({}, {})

    return goal._replace(loss=broken)


def test_a_healthy_config_passes_with_a_given_teacher(teacher, capsys):
    found = check.run(_config(f"teacher.init={teacher}", "losses.js.weight=1"), json_output=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] and {"device", "jax"} <= set(shown)
    assert [check["name"] for check in shown["checks"]] == [check.name for check in found]
    by_name = {check.name: check for check in found}
    for term in ("kl", "js"):
        for dtype in ("float32", "bfloat16"):
            assert by_name[f"{term}: student = teacher gives 0 in {dtype}"].ok
    knows = by_name["teacher is far above chance"]
    assert knows.ok and knows.value > 0.8
    assert by_name["teacher unchanged by a step"].ok
    assert by_name["FLOPs of a step"].value > 0


def test_stages_are_all_checked_and_a_teacher_trained_here_is_not():
    soft, both = "{'ce': {'weight': 0.0}}", "{'reverse_kl': {'weight': 1.0}}"
    stages = f"{{'a': {{'percent': 50, 'losses': {soft}}}, 'b': {{'percent': 50, 'losses': {both}}}}}"
    found = {c.name: c for c in check.run(_config(f"stages={stages}"))}
    assert found["kl (stage 1): student = teacher gives 0 in float32"].ok
    assert found["reverse_kl (stage 2): student = teacher gives 0 in float32"].ok
    assert found["two parts give the loss of the whole (stage 2)"].ok
    assert found["teacher is far above chance"].ok is None


@pytest.mark.parametrize("kind", ["another preprocessing", "other classes"])
def test_a_teacher_of_other_images_or_classes_fails(teacher, kind):
    right = sources.load(configs.default().data)
    if kind == "another preprocessing":
        change = lambda split: split._replace(inputs=255 - split.inputs)
    else:
        change = lambda split: split._replace(labels=((split.labels + 3) % 10).astype(np.int32))
    wrong = right._replace(train=change(right.train), test=change(right.test))
    experiment = build.prepare(_config(f"teacher.init={teacher}"), wrong)
    found = check_models.teacher_knows(experiment, MAIN, experiments.load_teacher(experiment, MAIN))
    assert found.ok is False and "preprocessing" in found.meaning


def test_an_untrained_teacher_fails(tmp_path):
    config = _config("teacher.steps=1", "teacher.optimizer.learning_rate=1e-9")
    distill.run_one(config, tmp_path, "teacher", say=lambda _: None)
    experiment = build.prepare(_config(f"teacher.init={tmp_path}"))
    found = check_models.teacher_knows(experiment, MAIN, experiments.load_teacher(experiment, MAIN))
    assert found.ok is False and found.value < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "logits_mse"])
def test_every_term_is_zero_at_the_teacher(parts, name, dtype):
    found = check_identities.zero_when_equal(make_objective({name: {"weight": 1.0}}), *parts, dtype)
    assert found.ok, found


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda s, t, batch, counts: jnp.mean(losses.kl(s, t / 4.0)), id="softened on one side"),
        pytest.param(lambda s, t, batch, counts: jnp.mean(losses.kl(s, t[::-1])), id="misaligned examples"),
        pytest.param(lambda s, t, batch, counts: 1.0 + jnp.mean(losses.kl(s, t)), id="an offset"),
        pytest.param(lambda s, t, batch, counts: jnp.mean(s), id="a gradient that pulls on"),
        pytest.param(lambda s, t, batch, counts: jnp.nan * jnp.mean(s), id="NaN"),
    ],
)
def test_a_term_that_is_not_zero_at_the_teacher_fails(parts, loss):
    broken = _replaced(make_objective({"kl": {"weight": 1.0}}), loss)
    assert check_identities.zero_when_equal(broken, *parts).ok is False


def test_a_loss_that_is_the_mean_of_its_parts_fails(parts):
    model, variables, others, batch = parts
    goal = make_objective({"kl": {"weight": 1.0}, "ce": {"weight": 1.0}})
    run = partial(check_identities.unmoved_by_splitting, student=model, teachers={MAIN: model})
    run = partial(run, variables=variables, teacher_variables={MAIN: others}, batch=batch)
    assert run(goal).ok

    def mean_of_parts(s, t, batch, counts):
        labelled = batch["labels"] >= 0
        return 0.5 * jnp.sum(losses.cross_entropy(s, batch["labels"])) / jnp.maximum(jnp.sum(labelled), 1)

    assert run(_replaced(goal, mean_of_parts)).ok is False


def test_a_loss_that_sees_the_padding_fails(parts):
    model, variables, others, batch = parts
    goal = make_objective({"kl": {"weight": 1.0}})
    run = partial(check_identities.unmoved_by_padding, student=model, teachers={MAIN: model})
    run = partial(run, variables=variables, teacher_variables={MAIN: others}, batch=batch)
    assert run(goal).ok
    unmasked = _replaced(goal, lambda s, t, batch, counts: jnp.sum(losses.kl(s, t)) / counts["kl"])
    assert run(unmasked).ok is False


def test_class_counts_that_differ_fail():
    experiment = build.prepare(_config())
    fewer = experiment._replace(dataset=experiment.dataset._replace(class_names=experiment.dataset.class_names[:9]))
    assert check_models.fits_together(experiment).ok
    assert check_models.fits_together(fewer).ok is False


def test_a_step_that_does_not_fit_fails(monkeypatch, capsys):
    monkeypatch.setattr(memory, "limit_of", lambda device: (1000, "a small device"))
    with pytest.raises(UserError, match="memory of a step fits"):
        check.run(_config(), json_output=True)
    by_name = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert by_name["teacher unchanged by a step"]["ok"] is None
    assert by_name["largest batch"]["value"] == 0


def test_flops_and_memory_follow_the_batch():
    experiment = build.prepare(_config())
    arm = build.make_arm(experiment, "student_distilled")
    one, two = (program.compile_stage(experiment, arm, arm.stages[0], size) for size in (64, 128))
    assert one.flops > 64 * 2 * 3 * (64 * 16 + 16 * 10)  # the student alone: 2 FLOPs per weight, 3 times
    assert 1.5 < two.flops / one.flops < 2.1
    assert two.bytes > one.bytes
    parts = build.prepare(_config("train.accumulate=4"))
    whole = program.in_one_part(parts)
    walked, at_once = (
        program.compile_stage(each, arm, arm.stages[0], 64)
        for each in (parts, whole)
        for arm in [build.make_arm(each, "student_distilled")]
    )
    assert at_once.flops == one.flops > 2 * walked.flops
    per_device = memory.per_device(train.abstract_state(arm, experiment.mesh).params)
    assert per_device == 4 * (64 * 16 + 16 + 16 * 10 + 10)

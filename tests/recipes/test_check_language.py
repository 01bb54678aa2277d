"""The self-test of language models passes a healthy config, and fails each thing that it is there to catch."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import build, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.data import cache
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN
from kdjax.model import Model
from kdjax.recipes import check, check_cache, check_identities, check_models, signals

SMALL = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32}


def _config(*words):
    config = configs.default()
    config.task = "language"
    config.seed = 1
    config.mesh = {"data": 2}
    config.data.update(name="stdlib", options={"modules": "g*.py"}, context=32, batch_size=16, eval_batch_size=64)
    for part in (config.teacher, config.student):
        part.name, part.options = "decoder", dict(SMALL)
    config.teacher.options["layers"] = 2
    config.teacher.update(epochs=0, steps=120)
    config.teacher.optimizer.learning_rate = 1e-2
    config.train.update(epochs=0, steps=4)
    config.losses.kl.temperature = 2.0
    config.cache.update(k=8, examples_per_shard=500)
    config.checkpoint.every = 0
    config.log.eval_every = 0
    return configs.override(config, [f"--config.{word}" for word in words])


SIGNALS = ("losses.kl.weight=0", "losses.top_k.weight=0.9")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A workdir with a teacher that knows some Python, and a cache of its likeliest tokens."""
    workdir = tmp_path_factory.mktemp("taught")
    signals.run(_config(), workdir, say=lambda _: None)
    return workdir


@pytest.fixture(scope="module")
def drawn(taught, tmp_path_factory):
    """A workdir with a cache of samples of the same teacher."""
    workdir = tmp_path_factory.mktemp("drawn")
    signals.run(_config(f"teacher.init={taught}", "cache.form=sample"), workdir, say=lambda _: None)
    return workdir


def _with_cache(taught, folder):
    return build.prepare(_config(f"teacher.init={taught}", f"teacher.cache={folder}", *SIGNALS))


@functools.cache
def _random():
    """The weights of a teacher that learnt nothing."""
    return jax.device_get(jax.jit(build.prepare(_config()).teachers[MAIN].init)(jax.random.key(5)))


@pytest.fixture(scope="module")
def parts():
    """Of a run with random weights: (goal, student, teachers, variables, teacher's variables, batch, experiment)."""
    experiment = build.prepare(_config())
    taught = train.put_teachers({MAIN: _random()}, experiment.mesh, experiment.config.sharding.teacher)
    arm = build.make_arm(experiment, DISTILLED, taught)
    batch = check_identities._small_batch(experiment, arm)
    goal = arm.stages[0].objective
    variables = check_identities.start(arm, experiment.mesh)
    return goal, experiment.distilled, experiment.teachers, variables, taught, batch, experiment


def _wrapped(model: Model, change) -> Model:
    """The model with other inputs or outputs: ``change(inputs) -> inputs, outputs -> outputs``."""
    before, after = change

    def apply(variables, inputs, **options):
        outputs, state = model.apply(variables, before(inputs), **options)
        return after(outputs), state

    return model._replace(apply=apply)


def _same(x):
    return x


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_healthy_config_passes_with_a_given_teacher(taught, capsys):
    found = check.run(_config(f"teacher.init={taught}"), json_output=True)
    assert json.loads(capsys.readouterr().out)["ok"]
    by_name = {one.name: one for one in found}
    assert len(by_name) == len(found)
    wanted = [f"kl: student = teacher gives 0 in {dtype}" for dtype in ("float32", "bfloat16")]
    wanted += ["classes and shapes agree", "two parts give the loss of the whole", "padding changes nothing"]
    wanted += ["chunks give the dense loss", "an untrained student guesses", "teacher knows such text"]
    wanted += ["teacher unchanged by a step", "memory of a step fits"]
    assert all(by_name[name].ok for name in wanted)
    assert by_name["FLOPs of a step"].value > 0 and "too few" in by_name["FLOPs of a step"].meaning
    assert by_name["classes and shapes agree"].value == (
        "inputs [32], classes 257, scores of teacher [32, 257], student [32, 257]"
    )


def test_a_healthy_config_passes_with_a_cache(taught, capsys):
    config = _config(f"teacher.init={taught}", f"teacher.cache={taught / 'cache'}", *SIGNALS)
    found = {one.name: one for one in check.run(config, json_output=True)}
    assert json.loads(capsys.readouterr().out)["ok"]
    for name in ("is whole", "is of this run", "agrees with the teacher"):
        assert found[f"the cache {name}"].ok
    assert found["top_k: student = teacher gives 0 in bfloat16"].ok
    assert found["padding changes nothing"].ok and found["chunks give the dense loss"].ok
    assert found["teacher unchanged by a step"].ok is None
    assert found["weights per device"].value.startswith("teacher 0 B")


def test_a_damaged_cache_fails_before_anything_is_computed(taught, tmp_path, capsys):
    folder = tmp_path / "cache"
    shutil.copytree(taught / "cache", folder)
    shard = cache.shard_path(folder, 1)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="the cache is whole"):
        check.run(_config(f"teacher.init={taught}", f"teacher.cache={folder}", *SIGNALS), json_output=True)
    assert "shard-00001" in json.loads(capsys.readouterr().out)["checks"][1]["meaning"]


def test_a_cache_of_other_data_is_refused(taught):
    with pytest.raises(UserError, match="number of examples"):
        check.run(_config(f"teacher.cache={taught / 'cache'}", "data.options={'modules':'f*.py'}", *SIGNALS))


# ----------------------------------------------------------------------------------------------- caches and teachers


def test_a_cache_of_another_teacher_fails(taught, drawn):
    for workdir in (taught, drawn):
        experiment = _with_cache(taught, workdir / "cache")
        right, wrong = experiments.load_teacher(experiment, MAIN), _random()
        assert check_cache.is_of_this_run(experiment, right).ok
        assert check_cache.is_of_this_run(experiment, wrong).ok is False
        assert check_cache.is_of_this_run(experiment, None).ok and "init" in (
            check_cache.is_of_this_run(experiment, None).meaning
        )
        agrees = check_cache.agrees(experiment, right)
        assert agrees.ok, agrees
        disagrees = check_cache.agrees(experiment, wrong)
        assert disagrees.ok is False and disagrees.value > 10 * agrees.value
        assert check_cache.agrees(experiment, None).ok is None


def test_signals_of_neighbouring_windows_fail(taught, drawn):
    for workdir in (taught, drawn):
        experiment = _with_cache(taught, workdir / "cache")
        variables = experiments.load_teacher(experiment, MAIN)
        split = experiment.dataset.train
        moved = split._replace(tokens=np.roll(split.tokens, 1, axis=0))
        other = experiment._replace(dataset=experiment.dataset._replace(train=moved))
        assert check_cache.agrees(other, variables).ok is False


def test_a_teacher_of_another_tokenizer_or_without_training_fails(taught):
    experiment = build.prepare(_config(f"teacher.init={taught}"))
    right = experiments.load_teacher(experiment, MAIN)
    found = check_models.teacher_knows(experiment, MAIN, right)
    assert found.ok and 1.0 < found.value < 3.2
    assert check_models.teacher_knows(experiment, MAIN, None).ok is None
    assert check_models.teacher_knows(experiment, MAIN, _random()).ok is False
    embedding = jnp.roll(right["params"]["embed"]["embedding"], 1, axis=0)
    shifted = {**right, "params": {**right["params"], "embed": {"embedding": embedding}}}
    found = check_models.teacher_knows(experiment, MAIN, shifted)
    assert found.ok is False and "tokenizer" in found.meaning
    broken = jax.tree.map(lambda x: x * jnp.nan, right)
    assert check_models.teacher_knows(experiment, MAIN, broken).value == "not finite"


# ------------------------------------------------------------------------------------------------- models and losses


def test_a_student_that_prefers_some_tokens_at_the_start_fails(parts):
    variables, experiment = parts[3], parts[-1]
    assert check_models.starts_at_chance(experiment, variables).ok
    head = {"kernel": 20.0 * variables["params"]["head"]["kernel"]}
    louder = {**variables, "params": {**variables["params"], "head": head}}
    assert check_models.starts_at_chance(experiment, louder).ok is False


def test_a_student_that_begins_with_weights_is_not_asked_to_guess(taught):
    experiment = build.prepare(_config(f"teacher.init={taught}", "student.init=teacher", "student.options.layers=2"))
    assert check_models.starts_at_chance(experiment, {}).ok is None


def test_a_head_with_rows_that_are_no_tokens_fails():
    experiment = build.prepare(_config("student.options.vocabulary=300"))
    assert check_models.fits_together(experiment).ok
    whole = lambda outputs: outputs._replace(head=dataclasses.replace(outputs.head, classes=0))
    uncut = experiment._replace(distilled=_wrapped(experiment.distilled, (_same, whole)))
    found = check_models.fits_together(uncut)
    assert found.ok is False and "student [32, 300]" in found.value


def test_a_loss_of_tokens_that_are_not_aligned_fails(parts):
    goal, student, _, variables, _, batch, experiment = parts
    others = check_identities.start(
        build.make_arm(experiment, DISTILLED)._replace(keys=train.Keys(jax.random.key(9), jax.random.key(9))),
        experiment.mesh,
    )
    only_kl = goal._replace(hparams=goal.hparams | {"ce.weight": 0.0})

    def shifted(student, teachers, *rest):
        moved = {name: one._replace(hidden=jnp.roll(one.hidden, 1, axis=1)) for name, one in teachers.items()}
        return goal.loss(student, moved, *rest)

    found = check_identities.zero_when_equal(only_kl._replace(loss=shifted), student, variables, others, batch)
    assert found.ok is False and np.isfinite(found.value)


def test_a_loss_divided_by_the_tokens_of_its_part_fails(parts):
    goal, *given, _ = parts

    def mean_of_parts(student, teachers, batch, hparams, counts, *rest):
        local = {name: 2.0 * count for name, count in goal.counts(batch).items()}
        whole = batch["labels"].shape[0] == len(given[-1]["labels"])
        return goal.loss(student, teachers, batch, hparams, counts if whole else local, *rest)

    found = check_identities.unmoved_by_splitting(goal._replace(loss=mean_of_parts), *given)
    assert found.ok is False and np.isfinite(found.value)


@pytest.mark.parametrize("kind", ["attention", "loss"])
def test_what_sees_padding_fails(parts, kind):
    goal, student, teachers, *given, experiment = parts
    if kind == "attention":
        student = _wrapped(student, (lambda inputs: {"tokens": inputs["tokens"]}, _same))
    else:
        loss = goal.loss
        unmasked = lambda student, teachers, batch, *rest: loss(
            student, teachers, {**batch, "mask": jnp.ones_like(batch["mask"])}, *rest
        )
        goal = goal._replace(loss=unmasked)
    padded = experiment.task.padded
    found = check_identities.unmoved_by_padding(goal, student, teachers, *given, padded=padded)
    assert found.ok is False and np.isfinite(found.value)


def test_a_walk_that_misses_a_chunk_fails(parts):
    _, *given, experiment = parts
    dense, chunked = check_identities._dense_and_chunked(experiment, 0, given[-1])

    def short(student, teachers, batch, *rest):
        return chunked.loss(student, teachers, {**batch, "mask": batch["mask"].at[:, 24:].set(0.0)}, *rest)

    found = check_identities.unmoved_by_chunks(dense, chunked._replace(loss=short), *given)
    assert found.ok is False and np.isfinite(found.value)
    walks = ["length=4" in str(jax.make_jaxpr(lambda b, g=g: _loss(g, given, b))(given[-1])) for g in (dense, chunked)]
    assert walks == [False, True]


def _loss(goal, given, batch):
    student, teachers, variables, taught, _ = given
    said = lambda model, weights: model.apply(weights, batch["inputs"], train=False)[0]
    teacher = {MAIN: said(teachers[MAIN], taught[MAIN])}
    return goal.loss(said(student, variables), teacher, batch, goal.hparams, goal.counts(batch))[0]

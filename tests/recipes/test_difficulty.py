"""The teacher scores each example once; the scores are kept, and order what the distilled student sees."""

import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import build, checkpoint, train
from kdjax.data import curriculum, pipeline, sources
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED
from kdjax.recipes import difficulty
from tests.helpers import digits, equal_trees, tiny_config

DATASET = digits()._replace(train=sources.take(digits().train, np.arange(300)))


def prepared(pacing="linear", **changes):
    config = tiny_config()
    config.data.curriculum.pacing = pacing
    config.data.eval_batch_size = 64  # the last batch of 300 is partly padding
    for key, value in changes.items():
        config.update(ConfigDict({key: value}))
    return build.prepare(config, DATASET)


@pytest.fixture(scope="module")
def teachers():
    variables = jax.jit(prepared().teachers["teacher"].init)(jax.random.key(7))
    return {"teacher": jax.tree.map(lambda x: 3 * x, jax.device_get(variables))}


def by_hand(experiment, variables):
    """Every example's difficulty in float64, one dense layer after the other."""
    split, dataset = experiment.student_train, experiment.dataset
    x = ((split.inputs / 255.0 - dataset.mean) / dataset.std).reshape(len(split.labels), -1)
    dense = jax.tree.leaves(variables["params"], is_leaf=lambda node: "kernel" in node)
    dense.sort(key=lambda layer: -layer["kernel"].shape[0])  # 64 pixels, then 32 features
    for number, layer in enumerate(dense):
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        x = np.maximum(x, 0) if number < len(dense) - 1 else x
    log_p = x - x.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(1)
    return np.where(split.labels >= 0, -log_p[np.arange(len(x)), split.labels], entropy)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_scores_are_the_cross_entropy_or_without_a_label_the_entropy(teachers, share):
    experiment = prepared(data={"labels": share})
    found = difficulty.scores(experiment, teachers)
    assert found.dtype == np.float32 and found.shape == (300,)
    np.testing.assert_allclose(found, by_hand(experiment, teachers["teacher"]), rtol=1e-5, atol=1e-6)
    assert (found != difficulty.scores(prepared(), teachers)).any() == (share < 1)


def test_what_a_teacher_rules_out_is_infinitely_hard_and_adds_no_entropy():
    logits = np.array([[0.0, -np.inf, 0.0]] * 3, np.float32)
    found = jax.jit(difficulty.of_logits)(logits, np.array([0, 1, -1]))
    np.testing.assert_allclose(found, [np.log(2), np.inf, np.log(2)], rtol=1e-6)


def test_eight_devices_score_as_one(teachers):
    one, eight = (difficulty.scores(prepared(mesh={"data": devices}), teachers) for devices in (1, 8))
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


def test_scores_are_kept_and_used_again_while_they_fit(teachers, tmp_path, monkeypatch):
    experiment = prepared()
    first = difficulty.scores(experiment, teachers, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [difficulty.FILE]
    with np.load(tmp_path / difficulty.FILE) as file:
        assert str(file["teacher_sha256"]) == checkpoint.digest(teachers["teacher"]) and file["examples"] == 300
        np.testing.assert_array_equal(file["scores"], first)

    scored = []
    score = difficulty._score
    monkeypatch.setattr(difficulty, "_score", lambda *args: scored.append(1) or score(*args))
    np.testing.assert_array_equal(difficulty.scores(experiment, teachers, tmp_path), first)
    assert not scored
    other = {"teacher": jax.tree.map(lambda x: -x, teachers["teacher"])}
    assert (difficulty.scores(experiment, other, tmp_path) != first).any() and len(scored) == 1
    fewer = prepared(data={"omit_class": 3})  # another size of the split
    assert len(difficulty.scores(fewer, other, tmp_path)) < 300 and len(scored) == 2
    difficulty.scores(fewer, other, tmp_path)
    assert len(scored) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: data[:-200] + b"?" * 200])
def test_a_damaged_file_is_scored_again(teachers, tmp_path, damage):
    experiment, path = prepared(), tmp_path / difficulty.FILE
    first = difficulty.scores(experiment, teachers, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(difficulty.scores(experiment, teachers, tmp_path), first)
    assert path.read_bytes() == whole


def test_a_failed_write_leaves_the_old_file(teachers, tmp_path, monkeypatch):
    experiment, path = prepared(), tmp_path / difficulty.FILE
    path.write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(difficulty.np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .*difficulty.npz: No space left on device; free some space"):
        difficulty.scores(experiment, teachers, tmp_path)
    assert path.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1


def test_a_teacher_of_nan_scores_nothing(teachers):
    broken = {"teacher": jax.tree.map(lambda x: x * np.nan, teachers["teacher"])}
    with pytest.raises(UserError, match="training example 0 are NaN"):
        difficulty.scores(prepared(), broken)


# ------------------------------------------------------------------------------------------------- in an experiment


def ids(batches, count):
    return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


def test_only_the_distilled_student_has_a_curriculum(teachers, tmp_path):
    experiment = difficulty.scored(prepared(), teachers, tmp_path)
    plain = ids(pipeline.train_batches(DATASET.train, batch_size=64, seed=0), 9)
    assert ids(build.make_arm(experiment, ALONE).batches(0), 9) == plain
    assert ids(build.make_arm(experiment, "teacher").batches(0), 9) == plain
    arm = build.make_arm(experiment, DISTILLED, teachers)
    total = arm.stages[-1].stop
    assert total == 9
    mine = ids(arm.batches(0), 9)
    assert mine[:4] != plain[:4] and mine[5:] == plain[5:]
    for step in range(9):
        size = curriculum.pool_size("linear", step, total, 300)
        assert set(mine[step]) <= set(np.argsort(experiment.difficulty, kind="stable")[:size].tolist())
    again = build.reseeded(experiment, arm, 5)
    assert ids(again.batches(0), 2) != mine[:2] and ids(again.batches(2), 2) == ids(again.batches(0), 4)[2:]


def test_without_pacing_nothing_is_scored_and_nothing_changes(teachers, tmp_path):
    experiment = prepared("none")
    assert difficulty.scored(experiment, teachers, tmp_path) is experiment and not [*tmp_path.iterdir()]
    mine = build.make_arm(experiment, DISTILLED, teachers).batches(3)
    assert ids(mine, 4) == ids(pipeline.train_batches(DATASET.train, batch_size=64, seed=0, start_step=3), 4)


def test_a_curriculum_without_scores_is_refused(teachers):
    arm = build.make_arm(prepared(), DISTILLED, teachers)
    with pytest.raises(UserError, match=r"data\.curriculum\.pacing=linear needs the difficulty of each example"):
        arm.batches(0)


@pytest.mark.parametrize("section", [{"pacing": "slow"}, {"order": "easy"}, {"start": 0}, {"full_percent": 200}])
def test_prepare_refuses_what_makes_no_curriculum(section):
    with pytest.raises(UserError, match=f"data.curriculum.{next(iter(section))}"):
        prepared(data={"curriculum": section})


def test_an_interrupted_run_ends_as_an_uninterrupted_one(teachers, tmp_path):
    """Training with a curriculum, stopped in the middle of its growth, gives the same weights to the bit."""
    experiment = difficulty.scored(prepared(), teachers, tmp_path)
    arm = build.make_arm(experiment, DISTILLED, teachers)
    quiet = lambda _: None
    whole = train.run(arm, experiment.mesh, say=quiet).state

    class Killed(Exception):
        pass

    def dying(first):
        for number, batch in enumerate(arm.batches(first)):
            if first + number == 4:
                raise Killed
            yield batch

    folder = tmp_path / "checkpoints"
    with pytest.raises(Killed), checkpoint.Checkpoints(folder) as checkpoints:
        every = train.Every(save=2)
        train.run(arm._replace(batches=dying), experiment.mesh, every=every, checkpoints=checkpoints, say=quiet)
    resumed = build.make_arm(difficulty.scored(prepared(), teachers, tmp_path), DISTILLED, teachers)
    with checkpoint.Checkpoints(folder) as checkpoints:
        found = train.run(resumed, experiment.mesh, checkpoints=checkpoints, say=quiet).state
    assert equal_trees(found.params, whole.params)

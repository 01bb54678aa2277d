"""What the objective learns and remembers: saved and resumed to the bit, and no part of the student handed over."""

import jax
import pytest

from kdjax import build, checkpoint, train
from kdjax.experiment import DISTILLED
from tests.helpers import digits, equal_trees, tiny_config

QUIET = lambda sentence: None


def config():
    found = tiny_config(steps=12)
    found.teacher.name, found.teacher.options = "cnn", {"widths": (6, 8), "strides": (2, 2)}
    found.student = {"name": "cnn", "options": {"widths": (4, 4), "strides": (2, 2)}}
    found.losses.kl.weight = 0.5
    found.losses.fitnets.weight = 0.1
    found.losses.infonce.update(weight=0.1, queue=100, width=8)
    found.losses.past_predictions.weight = 0.2
    found.losses.mutual.weight = 0.2
    found.peers = {"one": {}}
    found.balance = "dwa"
    return found


@pytest.fixture(scope="module")
def parts():
    experiment = build.prepare(config(), digits())
    teacher = {"teacher": jax.jit(experiment.teachers["teacher"].init)(jax.random.key(5))}
    return experiment, build.make_arm(experiment, DISTILLED, teacher)


def trained(parts, folder, stop=None):
    experiment, arm = parts
    if stop:
        arm = arm._replace(stages=[arm.stages[0]._replace(stop=stop)])
    with checkpoint.Checkpoints(folder) as checkpoints:
        return train.run(arm, experiment.mesh, checkpoints=checkpoints, say=QUIET).state


def test_resume_is_bit_for_bit_with_projectors_queues_peers_and_past(parts, tmp_path):
    whole = trained(parts, tmp_path / "whole")
    half = trained(parts, tmp_path / "half", stop=5)
    assert not equal_trees(half.learned, whole.learned)
    resumed = trained(parts, tmp_path / "half")
    assert equal_trees(resumed, whole)
    assert set(whole.learned["params"]) == {"fitnets", "infonce", "mutual"}
    assert set(whole.learned["state"]) == {"infonce", "past_predictions", "mutual", "balance"}


def test_the_student_that_is_handed_over_is_the_plain_student(parts, tmp_path):
    experiment, _ = parts
    whole = trained(parts, tmp_path)
    shapes = jax.eval_shape(experiment.student.init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    variables, _ = checkpoint.load_model(tmp_path, like)  # refuses anything that is not the student's
    assert equal_trees(variables["params"], whole.params)


def test_peers_differ_from_the_student_and_from_each_other(parts, tmp_path):
    both = config()
    both.peers = {"one": {}, "two": {}}
    experiment = build.prepare(both, digits())
    teacher = {"teacher": jax.jit(experiment.teachers["teacher"].init)(jax.random.key(5))}
    learned = trained((experiment, build.make_arm(experiment, DISTILLED, teacher)), tmp_path).learned["params"]
    one, two = (learned["mutual"][name]["head"]["kernel"] for name in ("0", "1"))
    assert one.shape == two.shape and (one != two).any()

"""SimKD's student: the teacher's classifier is in it, exact, frozen, handed over; and only where that is possible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import build, checkpoint, models, reuse, state, train
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, MAIN
from kdjax.losses import feature, projectors
from kdjax.model import EVERY, from_nnx
from kdjax.recipes import distill
from kdjax.step import make_predict
from kdjax.tasks import classification
from tests.helpers import batch, digits, equal_trees, small, tiny_config

QUIET = lambda sentence: None
CNN = {"widths": (6, 8), "strides": (2, 2)}


def model(name, **options):
    return from_nnx(lambda rngs: models.build(name, classes=10, input_shape=(8, 8, 1), rngs=rngs, **options))


def outputs(network, variables, inputs, *taps):
    """What a model says, compiled: operation by operation it would take seconds."""
    return jax.jit(lambda v, x: network.apply(v, x, train=False, taps=taps)[0])(variables, inputs)


def images(size=8):
    return jnp.asarray(batch(size)["inputs"])


def config(**train):
    found = tiny_config(**train)
    found.teacher.name, found.teacher.options = "cnn", CNN
    found.student = {"name": "cnn", "options": {"widths": (4, 6), "strides": (2, 2)}, "reuse_classifier": True}
    for term in found.losses.values():
        term.weight = 0.0
    found.losses.simkd.update(weight=1.0, student_taps=("projected",), projector="none")
    return found


@functools.cache
def teacher():
    return jax.jit(model("cnn", **CNN).init)(jax.random.key(5))


@pytest.fixture(scope="module")
def trained():
    experiment = build.prepare(config(steps=40), digits())
    arm = build.make_arm(experiment, DISTILLED, {MAIN: teacher()})
    return experiment, arm, train.run(arm, experiment.mesh, every=train.Every(log=1), say=QUIET).state


@pytest.mark.parametrize(
    ("name", "options"), [("cnn", CNN), ("mlp", {"hidden": (12, 9)}), ("resnet8", {"widths": (4, 4, 6, 8)})]
)
def test_a_student_that_projects_onto_the_teachers_feature_scores_what_the_teacher_does(name, options):
    taught = model(name, **options)
    variables = jax.jit(taught.init)(jax.random.key(2))
    student = reuse.with_classifier(reuse.reuse_classifier(taught, taught, images()), variables)
    own = jax.jit(student.init)(jax.random.key(3))
    # The teacher's backbone, and the hidden layer [1, -1] with a ReLU, which together are the identity.
    width = own["state"]["classifier"]["kernel"].shape[0]
    hidden = own["params"]["projector"]["in"]["kernel"].shape[1]
    assert hidden == width
    backbone = {key: value for key, value in variables["params"].items() if key != "head"}
    shift = 100.0  # keeps every feature above 0 at the ReLU
    projector = {
        "in": {"kernel": jnp.eye(width), "bias": jnp.full(width, shift)},
        "out": {"kernel": jnp.eye(width), "bias": jnp.full(width, -shift)},
    }
    own = {
        "params": {"backbone": backbone, "projector": projector},
        "state": {**own["state"], "backbone": variables["state"]},
    }
    wanted, found = outputs(taught, variables, images(), *EVERY), outputs(student, own, images(), "projected")
    last = sorted(tap for tap in wanted.taps if tap.startswith("blocks.") and tap.count(".") == 1)[-1]
    np.testing.assert_allclose(found.taps["projected"], projectors.pool(wanted.taps[last]), atol=1e-4)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=2e-4)
    assert np.ptp(wanted.logits) > 0.1


def test_the_head_of_the_backbone_is_no_part_of_it():
    student = reuse.reuse_classifier(model("cnn", **CNN), model("mlp", hidden=(20,)), images())
    variables = jax.jit(student.init)(jax.random.key(0))
    assert "head" not in variables["params"]["backbone"] and set(variables["params"]) == {"backbone", "projector"}
    assert variables["state"]["classifier"]["kernel"].shape == (20, 10)
    assert not np.any(variables["state"]["classifier"]["kernel"])  # no teacher, no classifier
    taps = outputs(student, variables, images(), *EVERY).taps
    assert taps["projected"].shape == (8, 20) and "blocks.1" in taps and "head" not in taps


def test_training_moves_the_student_towards_the_teachers_feature_and_leaves_the_classifier(trained):
    experiment, arm, done = trained
    start = train.fresh_state(arm, experiment.mesh)
    assert equal_trees(start.model_state["classifier"], teacher()["params"]["head"])
    assert equal_trees(done.model_state["classifier"], teacher()["params"]["head"])

    some = classification.make_normalise(experiment.dataset)({"inputs": jnp.asarray(digits().test.inputs)})["inputs"]
    taught = outputs(experiment.teachers[MAIN], teacher(), some, "blocks.1").taps["blocks.1"]

    def loss(of):
        projected = outputs(experiment.distilled, state.inference_variables(of), some, "projected").taps["projected"]
        return float(jnp.mean(feature.simkd(projected, projectors.pool(taught))))

    assert loss(done) < 0.7 * loss(start)
    assert not equal_trees(done.params["projector"], start.params["projector"])


def test_what_is_handed_over_is_enough(trained):
    experiment, _, done = trained
    handed = jax.device_get(state.inference_variables(done))
    fresh = build.prepare(config(steps=40), digits())  # its model has never seen this teacher
    score = lambda experiment, variables: np.asarray(
        jax.jit(make_predict(experiment.distilled))(variables, {"inputs": images(16)})
    )
    wanted = score(experiment, state.inference_variables(done))
    np.testing.assert_array_equal(score(fresh, handed), wanted)
    assert np.ptp(wanted) > 0


def test_the_control_is_the_plain_student(trained):
    experiment, arm, _ = trained
    alone = train.fresh_state(build.make_arm(experiment, ALONE), experiment.mesh)
    assert "head" in alone.params and "backbone" not in alone.params
    distilled = train.fresh_state(arm, experiment.mesh)
    without = {key: value for key, value in alone.params.items() if key != "head"}
    assert equal_trees(distilled.params["backbone"], without)  # both start from the same weights


def test_it_is_saved_whole_and_loaded_again(tmp_path):
    first = distill.run_one(config(steps=12), tmp_path, DISTILLED, say=QUIET)
    again = distill.run_one(config(steps=12), tmp_path, DISTILLED, say=QUIET)
    assert (first.steps, again.steps, again.examples_per_s is None) == (12, 12, False)
    assert checkpoint.digest(first.variables) == checkpoint.digest(again.variables)
    shapes = jax.eval_shape(build.prepare(config(steps=12), digits()).distilled.init, jax.random.key(0))
    saved, _ = checkpoint.load_model(tmp_path / "checkpoints" / DISTILLED, shapes)
    assert checkpoint.digest(saved) == checkpoint.digest(first.variables)
    assert np.any(saved["state"]["classifier"]["kernel"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wrn_16_1", {"depth": 10}),
        ("cnn", {**CNN, "dense": 12}),
        ("vit_ti", {"width": 12, "depth": 1, "heads": 2, "patch": 4}),
    ],
)
def test_teachers_whose_classifier_reads_something_else_are_refused(name, options):
    with pytest.raises(UserError, match=r"reads the teacher's pooled last block.*take a cnn"):
        reuse.reuse_classifier(model("cnn", **CNN), model(name, **options), images())


def test_a_config_without_the_reused_classifier_has_no_projected_feature():
    plain = config()
    plain.student.reuse_classifier = False
    with pytest.raises(UserError, match="projected"):
        build.prepare(plain, digits())


def test_models_without_blocks_are_refused():
    with pytest.raises(UserError, match=r"blocks\.<i> in the student"):
        reuse.reuse_classifier(small(), model("cnn", **CNN), images())

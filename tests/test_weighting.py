"""Weights of teachers for each example: by what they know of its label, or by the domain that it comes from."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import build, losses, train, weighting
from kdjax.data import pipeline, sources
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN
from kdjax.model import Outputs
from kdjax.objective import make_objective
from kdjax.state import inference_variables
from kdjax.tasks import classification
from tests.helpers import digits, tiny_config

QUIET = lambda _: None


def some_logits(seed, shape=(12, 5), scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def log_softmax64(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax64(z, temperature=1.0):
    return np.exp(log_softmax64(z, temperature))


# --------------------------------------------------------------------------------- combining with weights per example


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(12, 5), (3, 4, 5)])
def test_probabilities_are_averaged_position_by_position(shape, temperature):
    teachers = [some_logits(seed, shape) for seed in range(3)]
    weights = np.random.default_rng(3).uniform(0, 2, (3, *shape[:-1]))
    weights[1] *= weights[1] > 1  # often 0
    z = jax.jit(losses.combine_logits)(teachers, jnp.asarray(weights, jnp.float32), temperature=temperature)
    shares = np.float32(weights) / np.float32(weights).sum(0, dtype=np.float64)
    want = sum(share[..., None] * softmax64(t, temperature) for share, t in zip(shares, teachers, strict=True))
    np.testing.assert_allclose(softmax64(z, temperature), want, rtol=1e-5, atol=1e-9)


def test_logits_are_averaged_position_by_position():
    teachers = [some_logits(seed) for seed in range(3)]
    weights = np.random.default_rng(3).uniform(0.1, 2, (3, 12)).astype(np.float32)
    z = jax.jit(functools.partial(losses.combine_logits, how="logits"))(teachers, weights)
    shares = weights / weights.sum(0, dtype=np.float64)
    np.testing.assert_allclose(z, np.einsum("nb,nbc->bc", shares, np.float64(teachers)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_equal_weights_everywhere_are_one_weight_per_teacher(how):
    teachers = [some_logits(seed) for seed in range(2)]
    one = losses.combine_logits(teachers, [3.0, 1.0], how=how)
    each = losses.combine_logits(teachers, jnp.tile(jnp.array([[3.0], [1.0]]), 12), how=how)
    np.testing.assert_array_equal(one, each)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
@pytest.mark.parametrize("broken", [-jnp.inf, jnp.nan])
def test_a_teacher_of_no_weight_has_no_say_for_that_example(how, broken):
    good, bad = some_logits(0), some_logits(1).at[:, 2].set(broken)
    weights = jnp.stack([jnp.ones(12), jnp.arange(12) % 2.0])
    z = jax.jit(functools.partial(losses.combine_logits, how=how))([good, bad], weights)
    np.testing.assert_allclose(softmax64(z[::2]), softmax64(good[::2]), rtol=1e-5)
    if broken == -jnp.inf and how == "probabilities":  # where it has a say, it says that class 2 is half as likely
        want = (softmax64(good[1::2]) + softmax64(bad[1::2])) / 2
        np.testing.assert_allclose(softmax64(z[1::2]), want, rtol=1e-5)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_where_no_teacher_has_weight_all_count_alike(how):
    teachers = [some_logits(seed) for seed in range(2)]
    weights = jnp.ones((2, 12)).at[:, 5].set(0.0)
    z = losses.combine_logits(teachers, weights, how=how)
    np.testing.assert_allclose(z, losses.combine_logits(teachers, [1.0, 1.0], how=how), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (1, 12), (3, 12), (12,), ()])
def test_weights_that_fit_neither_teachers_nor_positions_are_refused(shape):
    teachers = [some_logits(seed) for seed in range(2)]
    with pytest.raises(UserError, match="one weight per teacher, or one per teacher and position"):
        losses.combine_logits(teachers, jnp.ones(shape))


# ----------------------------------------------------------------------------------------------------- by confidence


@pytest.mark.parametrize("teachers", [2, 3, 5])
def test_confidence_is_the_formula_of_the_paper(teachers):
    """w_k = (1 - exp(L_k) / sum_j exp(L_j)) / (K - 1), L the cross-entropy with the label, in float64."""
    logits = [some_logits(seed, (40, 5), scale=1.5) for seed in range(teachers)]
    labels = np.random.default_rng(9).integers(-1, 5, 40).astype(np.int32)
    found = jax.jit(weighting.teacher_shares)(logits, labels)
    for example, label in enumerate(labels):
        if label < 0:
            want = np.full(teachers, 1 / teachers)
        else:
            loss = np.array([-log_softmax64(z[example])[label] for z in logits])
            want = (1 - np.exp(loss) / np.exp(loss).sum()) / (teachers - 1)
        np.testing.assert_allclose(found[:, example], want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.sum(0), 1.0, rtol=1e-6)
    assert (labels < 0).any()


def test_who_knows_the_label_is_trusted_and_who_is_sure_of_another_is_not():
    knows, is_sure = jnp.array([[9.0, 0, 0]]), jnp.array([[0, 9.0, 0]])
    shares = weighting.teacher_shares([knows, is_sure], jnp.array([0]))[:, 0]
    assert shares[0] > 0.999 and 0 <= shares[1] < 1e-3
    # Far beyond what float32 can tell from 0, both shares and what they combine stay finite.
    extreme = [40 * knows, 40 * is_sure]
    for labels in (jnp.array([0]), jnp.array([1])):
        z = losses.combine_logits(extreme, weighting.teacher_shares(extreme, labels))
        assert not jnp.isnan(z).any() and jnp.argmax(z) == labels[0]


def test_the_objective_asks_teachers_by_confidence_times_their_weight():
    student, one, two = (some_logits(seed) for seed in range(3))
    labels = np.arange(12, dtype=np.int32) % 6 - 1
    goal = make_objective({"kl": {"temperature": 2.0}}, {"teacher": 2.0, "other": 1.0}, "confidence")
    batch = {"labels": labels}
    found, _ = jax.jit(goal.loss)(
        Outputs(student), {"teacher": Outputs(one), "other": Outputs(two)}, batch, goal.hparams, goal.counts(batch)
    )
    shares = np.array([[2.0], [1.0]]) * np.asarray(weighting.teacher_shares([one, two], labels), np.float64)
    shares /= shares.sum(0)
    target = shares[0][:, None] * softmax64(one, 2.0) + shares[1][:, None] * softmax64(two, 2.0)
    kl = 4.0 * (target * (np.log(target) - log_softmax64(student, 2.0))).sum(-1)
    np.testing.assert_allclose(found, kl.mean(), rtol=1e-5)


# --------------------------------------------------------------------------- by domain: two tasks, each with a teacher


@functools.cache
def two_tasks() -> sources.Dataset:
    """Real digits as two tasks of five classes: 0 to 4 are domain 0, and 5 to 9 are domain 1, relabelled as 0 to 4."""
    parts = [(split.inputs, split.labels % 5, split.labels // 5) for split in (digits().train, digits().test)]
    return sources.from_arrays(*parts, name="two_tasks")


def only(domain: int) -> sources.Dataset:
    data = two_tasks()
    pick = lambda split: sources.take(split, np.flatnonzero(split.domain == domain))
    return data._replace(train=pick(data.train), test=pick(data.test))


def config(combine: str):
    made = tiny_config()
    made.teacher.update(epochs=15, combine=combine)
    made.more_teachers = {"upper": {}}
    made.student.options = {"hidden": (32,)}
    made.losses.kl.update(weight=1.0, temperature=2.0)
    made.losses.ce.weight = 0.0
    made.data.augment.crop_padding = 0
    made.train.epochs = 20
    return made


@functools.cache
def teachers():
    """Two teachers, each trained on one task and none the wiser about the other."""
    plain = config("probabilities")
    plain.more_teachers = {}
    found = {}
    for domain, name in enumerate((MAIN, "upper")):
        experiment = build.prepare(plain, only(domain))
        done = train.run(build.make_arm(experiment, MAIN), experiment.mesh, say=QUIET)
        found[name] = jax.device_get(inference_variables(done.state))
    return found


def scores(experiment, model, variables):
    score = classification.make_score(model, experiment.dataset, experiment.mesh, 256)
    return score(variables, experiment.dataset.test)


def right_teachers(experiment) -> np.ndarray:
    """What the teacher of each test example's domain says."""
    both = np.stack([scores(experiment, experiment.teachers[name], teachers()[name]) for name in (MAIN, "upper")])
    domain = experiment.dataset.test.domain
    return both[domain, np.arange(len(domain))]


def test_each_example_is_taught_by_the_teacher_of_its_domain():
    experiment = build.prepare(config("routed"), two_tasks())
    arm = build.make_arm(experiment, DISTILLED, teachers())
    goal = arm.stages[0].objective
    batch = next(arm.batches(0))
    assert set(batch["domain"].tolist()) == {0, 1}
    inputs = classification.make_normalise(experiment.dataset)(batch)["inputs"]
    said = {
        name: experiment.teachers[name].apply(teachers()[name], inputs, train=False)[0] for name in experiment.teachers
    }
    student = some_logits(0, (64, 5))
    hparams = {"kl.weight": 1.0, "kl.temperature": 2.0, "teacher.teacher": 1.0, "teacher.upper": 1.0}

    @jax.jit
    def one_by_one(student, said, labels, domain):
        def one(z, said, label, domain):
            alone = {"labels": label[None], "domain": domain[None]}
            outputs = {name: Outputs(logits[None]) for name, logits in said.items()}
            return goal.loss(Outputs(z[None]), outputs, alone, hparams, goal.counts(alone))[0]

        return jax.vmap(one)(student, said, labels, domain)

    logits = {name: outputs.logits for name, outputs in said.items()}
    found = one_by_one(student, logits, batch["labels"], batch["domain"])
    for example, domain in enumerate(batch["domain"]):
        target = log_softmax64(logits[(MAIN, "upper")[domain]][example], 2.0)
        kl = 4.0 * (np.exp(target) * (target - log_softmax64(student[example], 2.0))).sum()
        np.testing.assert_allclose(found[example], kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", ["upper", "above"])  # after and before "teacher" in the alphabet
def test_the_step_routes_whatever_the_teachers_are_called(second):
    made = config("routed")
    made.more_teachers = {second: {}}
    experiment = build.prepare(made, two_tasks())
    taught = {MAIN: teachers()[MAIN], second: teachers()["upper"]}
    arm = build.make_arm(experiment, DISTILLED, taught)
    state, batch, stage = train.fresh_state(arm, experiment.mesh), next(arm.batches(0)), arm.stages[0]
    _, metrics = jax.jit(stage.step)(state, taught, batch, stage.hparams)

    inputs = classification.make_normalise(experiment.dataset)(batch)["inputs"]
    logits = lambda model, variables: model.apply(variables, inputs, train=False)[0].logits
    both = np.stack([logits(experiment.teachers[name], taught[name]) for name in (MAIN, second)])
    target = log_softmax64(both[batch["domain"], np.arange(64)], 2.0)
    student = log_softmax64(logits(experiment.student, {"params": state.params, "state": state.model_state}), 2.0)
    kl = 4.0 * (np.exp(target) * (target - student)).sum()
    np.testing.assert_allclose(metrics["kl"][0], kl, rtol=1e-4)


def test_routing_agrees_with_the_right_teacher_more_than_averaging():
    agreement = {}
    for combine in ("routed", "probabilities"):
        experiment = build.prepare(config(combine), two_tasks())
        arm = build.make_arm(experiment, DISTILLED, teachers())
        done = train.run(arm, experiment.mesh, say=QUIET)
        said = scores(experiment, experiment.student, inference_variables(done.state))
        agreement[combine] = np.mean(said.argmax(-1) == right_teachers(experiment).argmax(-1))
    assert agreement["routed"] > 0.9
    assert agreement["routed"] > agreement["probabilities"] + 0.05


def test_domains_follow_their_examples_where_a_class_is_left_out():
    made = config("routed")
    made.data.omit_class = 2
    made.data.labels = 0.5
    experiment = build.prepare(made, two_tasks())
    split, whole = experiment.student_train, two_tasks().train
    kept = np.flatnonzero(whole.labels != 2)
    np.testing.assert_array_equal(split.domain, whole.domain[kept])
    batch = next(pipeline.train_batches(split, batch_size=32, seed=0))
    np.testing.assert_array_equal(batch["domain"], whole.domain[kept[batch["id"]]])
    assert 0.4 < np.mean(split.labels < 0) < 0.6


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (digits, "the train split of digits has no domains: give them with the data"),
        (lambda: two_tasks()._replace(test=digits().test), "the test split of two_tasks has no domains"),
        (
            lambda: two_tasks()._replace(train=two_tasks().train._replace(domain=two_tasks().train.domain + 1)),
            r"domain 2 of example \d+ in the train split of two_tasks has no teacher: there are 2 \(teacher, upper\)",
        ),
    ],
)
def test_routes_that_lead_nowhere_are_refused(dataset, message):
    with pytest.raises(UserError, match=message):
        build.prepare(config("routed"), dataset()._replace(class_names=tuple("0123456789")))
    build.prepare(config("probabilities"), dataset()._replace(class_names=tuple("0123456789")))


def test_synthetic_domains_route_by_config_alone():
    made = config("routed")
    made.data.name, made.data.options = "synthetic", {"shape": (8, 8, 1), "classes": 5, "examples": 96, "domains": 2}
    experiment = build.prepare(made)
    arm = build.make_arm(experiment, DISTILLED, teachers())
    assert all(set(batch["domain"].tolist()) == {0, 1} for batch in itertools.islice(arm.batches(0), 3))

"""The weighted sum: normalised by global counts, blind to padding, to absent labels, and to how it is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.catalogue import TERMS
from kdjax.errors import UserError
from kdjax.model import Outputs
from kdjax.objective import make_objective

# The terms on scores, which need no model; tests/test_terms.py has the others.
SCORES = [
    name
    for name, term in TERMS.items()
    if not term.taps and not term.init and term.reads in ("labels", "logits", "both")
]
SOFT = [name for name in SCORES if TERMS[name].reads == "logits"]


def example(size=12, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    logits = lambda: jnp.asarray(rng.normal(size=(size, classes)) * 3, jnp.float32)
    labels = jnp.asarray(rng.integers(-1, classes, size), jnp.int32)
    return Outputs(logits()), {"teacher": Outputs(logits())}, {"labels": labels, "inputs": jnp.zeros((size, 1))}


def value(objective, student, teachers, batch, **changes):
    hparams = {**objective.hparams, **changes}
    total, (sums, _) = objective.loss(student, teachers, batch, hparams, objective.counts(batch))
    return total, sums


def test_is_the_weighted_sum_of_means_over_valid_examples():
    student, teachers, batch = example()
    objective = make_objective({"kl": {"weight": 0.7, "temperature": 4.0}, "ce": {"weight": 0.3}})
    total, sums = value(objective, student, teachers, batch)
    labelled = np.asarray(batch["labels"]) >= 0
    kl = np.asarray(losses.kl(student.logits, teachers["teacher"].logits, temperature=4.0))
    ce = np.asarray(losses.cross_entropy(student.logits, batch["labels"]))[labelled]
    np.testing.assert_allclose(total, 0.7 * kl.mean() + 0.3 * ce.mean(), rtol=1e-6)
    np.testing.assert_allclose(sums["ce"], ce.sum(), rtol=1e-6)
    right = (np.asarray(student.logits).argmax(-1) == np.asarray(batch["labels"]))[labelled].sum()
    assert sums["accuracy"] == right


@pytest.mark.parametrize("term", SCORES)
def test_padding_never_changes_it(term):
    student, teachers, batch = example()
    objective = make_objective({term: {"weight": 1.0}})
    pad = lambda x: jnp.concatenate([x, jnp.full((4, *x.shape[1:]), 1e30 if x.dtype == jnp.float32 else 0, x.dtype)])
    padded = jax.tree.map(pad, batch) | {"mask": jnp.asarray([1.0] * 12 + [0.0] * 4)}
    grad = lambda s, t, b: jax.value_and_grad(lambda logits: value(objective, Outputs(logits), t, b)[0])(s.logits)
    loss, gradient = grad(student, teachers, batch)
    loss_padded, gradient_padded = grad(*jax.tree.map(pad, (student, teachers)), padded)
    np.testing.assert_allclose(loss_padded, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient_padded[:12], gradient, rtol=1e-5, atol=1e-8)
    assert not np.any(gradient_padded[12:])


@pytest.mark.parametrize("term", [name for name in SCORES if TERMS[name].over == "example"])
def test_parts_add_up_to_the_whole(term):
    student, teachers, batch = example()
    objective = make_objective({term: {"weight": 1.0}})
    counts = objective.counts(batch)
    whole, _ = value(objective, student, teachers, batch)
    parts = 0.0
    for part in (slice(0, 5), slice(5, 12)):  # unequal, and with unequal numbers of labels
        cut = lambda tree, part=part: jax.tree.map(lambda x: x[part], tree)
        parts += objective.loss(cut(student), cut(teachers), cut(batch), objective.hparams, counts)[0]
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


@pytest.mark.parametrize("term", SOFT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient_under_jit(term, dtype):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(8, 1000)) * 8, dtype)
    batch = {"labels": jnp.zeros(8, jnp.int32)}
    objective = make_objective({term: {"weight": 1.0, **({"temperature": 3.0} if term != "logits_mse" else {})}})
    loss = lambda s: value(objective, Outputs(s), {"teacher": Outputs(logits)}, batch)[0]
    total, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert abs(float(total)) < 1e-5  # rounding, times T²
    if term != "total_variation":  # which has a kink there
        assert float(jnp.abs(gradient.astype(jnp.float32)).max()) < 2e-6


def test_all_unlabelled_leaves_the_soft_term_alone():
    student, teachers, batch = example()
    batch["labels"] = jnp.full_like(batch["labels"], -1)
    objective = make_objective({"kl": {"weight": 1.0}, "ce": {"weight": 1.0}})
    total, sums = value(objective, student, teachers, batch)
    np.testing.assert_allclose(total, jnp.mean(losses.kl(student.logits, teachers["teacher"].logits)), rtol=1e-6)
    assert sums["ce"] == 0
    gradient = jax.grad(lambda s: value(objective, Outputs(s), teachers, batch)[0])(student.logits)
    assert np.isfinite(gradient).all()


def test_several_teachers_are_averaged_by_weight():
    student, teachers, batch = example()
    teachers["b"] = Outputs(example(seed=5)[0].logits)
    objective = make_objective({"kl": {"weight": 1.0, "temperature": 2.0}}, {"teacher": 3.0, "b": 1.0})
    total, _ = value(objective, student, teachers, batch)
    mixed = sum(w * jax.nn.softmax(teachers[n].logits / 2.0) for n, w in (("teacher", 0.75), ("b", 0.25)))
    log_student = jax.nn.log_softmax(student.logits / 2.0)
    expected = 4.0 * jnp.mean(jnp.sum(mixed * (jnp.log(mixed) - log_student), -1))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    by_logits = make_objective({"kl": {"weight": 1.0, "temperature": 2.0}}, {"teacher": 3.0, "b": 1.0}, "logits")
    mean = 0.75 * teachers["teacher"].logits + 0.25 * teachers["b"].logits
    expected = jnp.mean(losses.kl(student.logits, mean, temperature=2.0))
    np.testing.assert_allclose(value(by_logits, student, teachers, batch)[0], expected, rtol=1e-5)


def test_mixed_labels_mix_the_losses():
    student, teachers, batch = example()
    batch["labels"] = jnp.abs(batch["labels"])
    batch |= {"mixed_labels": jnp.roll(batch["labels"], 1), "mix": jnp.linspace(0.0, 1.0, 12)}
    total, _ = value(make_objective({"ce": {"weight": 1.0}}), student, teachers, batch)
    one_hot = jax.nn.one_hot(batch["labels"], 5), jax.nn.one_hot(batch["mixed_labels"], 5)
    target = batch["mix"][:, None] * one_hot[0] + (1 - batch["mix"][:, None]) * one_hot[1]
    expected = -jnp.mean(jnp.sum(target * jax.nn.log_softmax(student.logits), -1))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_new_values_do_not_recompile():
    student, teachers, batch = example()
    objective = make_objective({"kl": {"weight": 1.0, "temperature": 2.0}, "ce": {"weight": 0.5}})
    loss = jax.jit(lambda hparams: objective.loss(student, teachers, batch, hparams, objective.counts(batch))[0])
    a = loss(objective.hparams)
    b = loss({**objective.hparams, "kl.temperature": 5.0, "ce.weight": 0.1})
    assert a != b
    assert loss._cache_size() == 1


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"kll": {"weight": 1.0}}, "unknown loss term 'kll': did you mean 'kl'"),
        ({"kl": {"temprature": 1.0}}, "did you mean 'temperature'"),
        ({"kl": {"weight": 0.0}}, "the objective has no term"),
        ({"kl": {"temperature": 0}}, "losses.kl.temperature is 0 and should be above 0"),
        ({"kl": {"temperature": {"schedule": "linear", "init": 4.0, "end": 0.0}}}, "should be above 0"),
        ({"kl": {"temperature": {"schedule": "constant", "init": 4.0, "warmup_percent": 5}}}, "should be above 0"),
        ({"js": {"beta": 1.0}}, "losses.js.beta is 1.0 and should be between 0 and 1"),
        ({"ce": {"label_smoothing": 1.0}}, "from 0 to less than 1"),
        ({"ce": {"weight": -1.0}}, "should be 0 or more"),
    ],
)
def test_bad_terms_are_refused(terms, message):
    with pytest.raises(UserError, match=message):
        make_objective(terms)

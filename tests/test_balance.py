"""Weights of terms among each other and of examples within a term, as functions and in an objective under jit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import weighting
from kdjax.errors import UserError
from kdjax.model import Outputs
from kdjax.objective import Setting, make_objective

B, CLASSES = 8, 5
LABELS = np.array([0, 3, -1, 4, 2, -1, 1, 1], np.int32)


def some(seed, *shape, scale=2.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax64(logits):
    exp = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------------------------ uncertainty


def _uncertainty(losses, learned):
    factors, constant = weighting.balance_factors("uncertainty", list(losses), {"balance": learned}, {})
    return sum(factors[name] * losses[name] for name in losses) + constant


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uncertainty_is_its_formula_with_its_gradients(seed):
    rng = np.random.default_rng(seed)
    values, s = rng.uniform(0.01, 30.0, 3), rng.normal(0.0, 2.0, 3)
    losses, learned = ({name: jnp.float32(x) for name, x in zip("abc", part, strict=True)} for part in (values, s))
    value, (by_loss, by_s) = jax.jit(jax.value_and_grad(_uncertainty, argnums=(0, 1)))(losses, learned)
    np.testing.assert_allclose(value, np.sum(np.exp(-s) * values + s), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([by_loss[name] for name in "abc"], np.exp(-s), rtol=1e-5)
    np.testing.assert_allclose([by_s[name] for name in "abc"], 1.0 - np.exp(-s) * values, rtol=1e-4, atol=1e-6)


def test_uncertainty_starts_at_the_plain_sum_and_ends_at_weights_of_one_over_the_loss():
    losses = {"small": jnp.float32(0.05), "large": jnp.float32(40.0)}
    learned, memory = weighting.init_balance("uncertainty", list(losses))
    assert memory == {}
    np.testing.assert_allclose(_uncertainty(losses, learned), 40.05, rtol=1e-6)

    @jax.jit
    def newton(s):  # each s on its own: f = e^-s L + s, f' = 1 - e^-s L, f'' = e^-s L
        grad = jax.grad(lambda s: _uncertainty(losses, s))(s)
        return {name: s[name] - jnp.clip(grad[name] / (jnp.exp(-s[name]) * losses[name]), -1.0, 1.0) for name in s}

    for _ in range(12):
        learned = newton(learned)
    for name, loss in losses.items():
        np.testing.assert_allclose(jnp.exp(-learned[name]), 1.0 / loss, rtol=1e-5)


# -------------------------------------------------------------------------------------------- dynamic weight average


def test_dwa_follows_the_ratios_of_the_last_two_periods():
    """Two terms over four periods of two steps: all weights 1 until two periods are known, then 2 softmax(r / 2)."""
    history = {"a": [4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.1], "b": [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 8.0, 8.0]}
    # Means by period: a 3, 1.5, 1, 0.3; b 1, 1, 2, 8. So the ratios after the second are (½, 1), the third (⅔, 2) ...
    ratios = {2: (0.5, 1.0), 3: (2 / 3, 2.0), 4: (0.3, 4.0)}
    _, memory = weighting.init_balance("dwa", ["a", "b"])
    remember = jax.jit(functools.partial(weighting.dwa_remember, period=2))
    for step in range(8):
        known = ratios.get(step // 2, (1.0, 1.0))
        exp = np.exp(np.array(known) / 2.0)
        found = jax.jit(weighting.dwa_weights)(memory)
        np.testing.assert_allclose([found["a"], found["b"]], 2 * exp / exp.sum(), rtol=1e-5, err_msg=str(step))
        memory = remember(memory, {name: jnp.float32(values[step]) for name, values in history.items()})
    assert memory["steps"] == 8 and memory["sum"] == {"a": 0.0, "b": 0.0}
    np.testing.assert_allclose([memory["last"]["a"], memory["before"]["a"]], [0.3, 1.0], rtol=1e-6)
    exp = np.exp(np.array(ratios[4]) / 2.0)
    np.testing.assert_allclose(weighting.dwa_weights(memory)["b"], 2 * exp[1] / exp.sum(), rtol=1e-5)


def test_dwa_weights_sum_to_the_number_of_terms_and_flatten_with_the_temperature():
    memory = {when: {n: jnp.float32(x) for n, x in zip("abc", v, strict=True)} for when, v in WHEN.items()}
    sharp, flat = (weighting.dwa_weights(memory, temperature) for temperature in (0.5, 1e4))
    for weights in (sharp, flat):
        assert float(sum(weights.values())) == pytest.approx(3.0, rel=1e-6)
    assert sharp["a"] < sharp["b"] < sharp["c"]  # what falls fastest counts least
    np.testing.assert_allclose(list(flat.values()), 1.0, atol=1e-3)


WHEN = {"last": (1.0, 3.0, 4.0), "before": (4.0, 4.0, 4.0)}


def test_a_term_without_a_positive_mean_counts_as_steady():
    memory = {"last": {"a": 1.0, "b": -2.0}, "before": {"a": 1.0, "b": -1.0}}
    found = weighting.dwa_weights(jax.tree.map(jnp.float32, memory))
    np.testing.assert_allclose(list(found.values()), 1.0, rtol=1e-6)


def test_what_dwa_remembers_has_no_gradient():
    _, memory = weighting.init_balance("dwa", ["a"])
    kept = lambda x: weighting.dwa_remember(memory, {"a": x}, 1)["last"]["a"]
    value, grad = jax.value_and_grad(kept)(jnp.float32(3.0))
    assert value == 3.0 and grad == 0.0


def test_an_unknown_balance_is_refused():
    with pytest.raises(UserError, match="uncertainty"):
        make_objective({"ce": {}}, balance="uncertanty")


# ---------------------------------------------------------------------------------------------------- of an example


def formula(kind, student, teacher, labels):
    """In float64, an example at a time."""
    found = []
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax64(z_s), softmax64(z_t)
        entropy = -np.sum(p_t * np.log(p_t)) / np.log(len(p_t))
        best = int(np.argmax(p_t))
        known = label if label >= 0 else best
        found.append(
            {
                "teacher_entropy": entropy,
                "teacher_confidence": 1.0 - entropy,
                "teacher_correct": float(label < 0 or best == label),
                "student_loss": 1.0 - p_s[known],
                "responsive": p_t[known] * (1.0 - p_s[known]),
            }[kind]
        )
    return np.array(found)


@pytest.mark.parametrize("kind", weighting.EXAMPLE_WEIGHTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_example_weights_are_their_formulas_between_0_and_1_without_gradient(kind, seed):
    student, teacher = some(seed, B, CLASSES), some(seed + 50, B, CLASSES)
    weigh = jax.jit(functools.partial(weighting.of_examples, kind))
    found = weigh(student, teacher, LABELS)
    assert found.shape == (B,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, formula(kind, student, teacher, LABELS), rtol=1e-5, atol=1e-6)
    assert np.all(found >= 0.0) and np.all(found <= 1.0)
    grads = jax.jit(jax.grad(lambda s, t: weigh(s, t, LABELS).sum(), argnums=(0, 1)))(student, teacher)
    assert not any(map(np.any, grads))


def test_example_weights_at_their_ends():
    sure, unsure = jnp.array([[100.0, 0.0, 0.0]]), jnp.zeros((1, 3))
    label = np.array([0], np.int32)
    of = lambda kind, student, teacher, label=label: float(weighting.of_examples(kind, student, teacher, label)[0])
    assert [of("teacher_confidence", unsure, sure), of("teacher_entropy", unsure, sure)] == pytest.approx([1, 0])
    assert [of("teacher_confidence", unsure, unsure), of("teacher_entropy", unsure, unsure)] == pytest.approx(
        [0, 1], abs=1e-6
    )
    assert of("teacher_correct", unsure, sure, np.array([1], np.int32)) == 0.0
    assert [of("student_loss", sure, unsure), of("student_loss", unsure, unsure)] == pytest.approx([0, 2 / 3])
    assert of("responsive", unsure, sure) == pytest.approx(2 / 3)  # the teacher knows, the student does not yet
    assert of("responsive", sure, sure) == pytest.approx(0)  # both know
    assert of("responsive", unsure, sure, np.array([1], np.int32)) == pytest.approx(0)  # the teacher is wrong
    ruled_out = jnp.array([[0.0, 0.0, -jnp.inf]])
    assert of("teacher_entropy", unsure, ruled_out) == pytest.approx(np.log(2) / np.log(3))


# ----------------------------------------------------------------------------------------------------- in an objective


def a_batch():
    mask = np.ones(B, np.float32)
    mask[-1] = 0.0
    return {"labels": LABELS, "mask": mask, "id": np.arange(B, dtype=np.int32)}


def measured(terms, learned=None, seed=0, **options):
    """``(objective, (loss, (sums, state)), gradient by the student's logits)`` of one batch, under jit."""
    goal = make_objective(terms, **options)
    teachers = {"teacher": Outputs(jnp.asarray(some(seed + 50, B, CLASSES)), {})}
    learned = goal.init(jax.random.key(0)) if learned is None else learned

    def loss(logits, hparams, learned):
        data = a_batch()
        return goal.loss(Outputs(logits, {}), teachers, data, hparams, goal.counts(data), learned)

    found, grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(some(seed, B, CLASSES), goal.hparams, learned)
    return goal, found, grad


@pytest.mark.parametrize("kind", weighting.EXAMPLE_WEIGHTS)
def test_a_term_weighs_its_examples_and_divides_by_their_number(kind):
    student, teacher = some(0, B, CLASSES), some(50, B, CLASSES)
    _, (value, (sums, _)), grad = measured({"kl": {"weight": 2.0, "examples": kind}})
    p_t, p_s = softmax64(teacher), softmax64(student)
    weights = formula(kind, student, teacher, LABELS) * a_batch()["mask"]
    each = np.sum(p_t * np.log(p_t / p_s), -1)
    np.testing.assert_allclose(sums["kl"], np.sum(weights * each), rtol=1e-5)
    np.testing.assert_allclose(value, 2.0 * np.sum(weights * each) / (B - 1), rtol=1e-5)
    np.testing.assert_allclose(grad, 2.0 * weights[:, None] * (p_s - p_t) / (B - 1), rtol=1e-4, atol=1e-7)


def test_weights_by_the_teacher_need_the_teacher():
    assert make_objective({"ce": {"examples": "teacher_correct"}}).uses_teacher
    assert not make_objective({"ce": {}}).uses_teacher
    _, (value, _), grad = measured({"ce": {"examples": "teacher_correct"}})
    known = (LABELS >= 0) & (a_batch()["mask"] > 0)
    right = known & (np.argmax(some(50, B, CLASSES), -1) == LABELS)
    nll = -np.log(softmax64(some(0, B, CLASSES))[np.arange(B), LABELS])
    np.testing.assert_allclose(value, np.sum(nll[right]) / np.sum(known), rtol=1e-5)
    np.testing.assert_array_equal(np.any(np.asarray(grad) != 0, -1), right)


TERMS = {"ce": {"weight": 0.5}, "kl": {"weight": 3.0, "temperature": 2.0}}


def test_uncertainty_in_an_objective_learns_a_weight_for_each_term():
    goal, (start, _), _ = measured(TERMS, balance="uncertainty")
    _, (plain, (sums, _)), _ = measured(TERMS)
    np.testing.assert_allclose(start, plain, rtol=1e-6)  # s = 0
    data = a_batch()
    weighted = {name: goal.hparams[f"{name}.weight"] * sums[name] / goal.counts(data)[name] for name in TERMS}
    learned = goal.init(jax.random.key(0))
    assert learned["state"] == {} and set(learned["params"]["balance"]) == set(TERMS)
    s = {"ce": jnp.float32(-0.4), "kl": jnp.float32(1.1)}
    moved = {"params": {"balance": s}, "state": {}}
    _, (value, _), grad = measured(TERMS, moved, balance="uncertainty")
    np.testing.assert_allclose(value, sum(np.exp(-s[n]) * weighted[n] + s[n] for n in TERMS), rtol=1e-5)
    parts = [np.exp(-s[n]) * np.asarray(measured({n: TERMS[n]})[2]) for n in TERMS]
    np.testing.assert_allclose(grad, sum(parts), rtol=1e-4, atol=1e-7)


def test_uncertainty_trains_with_the_student_and_reaches_its_optimum():
    goal = make_objective(TERMS, balance="uncertainty")
    teachers = {"teacher": Outputs(jnp.asarray(some(50, B, CLASSES)), {})}
    data, logits = a_batch(), some(0, B, CLASSES)
    total = lambda params: goal.loss(
        Outputs(logits, {}), teachers, data, goal.hparams, goal.counts(data), {"params": params, "state": {}}
    )
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(params, state):
        grads, (sums, _) = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, sums

    params = goal.init(jax.random.key(0))["params"]
    state = optimizer.init(params)
    for _ in range(300):
        params, state, sums = step(params, state)
    for name in TERMS:
        weighted = goal.hparams[f"{name}.weight"] * sums[name] / goal.counts(data)[name]
        np.testing.assert_allclose(jnp.exp(-params["balance"][name]), 1.0 / weighted, rtol=1e-3)


def test_dwa_in_an_objective_counts_epochs():
    """Three epochs of two steps with a new student each step, against the means worked out by hand."""
    goal = make_objective(TERMS, balance="dwa", setting=Setting(epoch_steps=2))
    teachers = {"teacher": Outputs(jnp.asarray(some(50, B, CLASSES)), {})}
    data = a_batch()

    @jax.jit
    def step(logits, learned):
        total, (sums, state) = goal.loss(Outputs(logits, {}), teachers, data, goal.hparams, goal.counts(data), learned)
        return total, sums, {"params": {}, "state": state}

    learned = goal.init(jax.random.key(0))
    structure = jax.tree.structure(learned)
    counts = {name: float(goal.counts(data)[name]) for name in TERMS}
    seen = []
    for number in range(6):
        total, sums, learned = step(some(number, B, CLASSES, scale=1.0 + number), learned)
        assert jax.tree.structure(learned) == structure
        means = np.array([float(sums[name]) / counts[name] for name in TERMS])
        weights = np.ones(2)
        if number >= 4:
            first, second = (np.mean(seen[start : start + 2], 0) for start in (0, 2))
            weights = 2 * np.exp(second / first / 2) / np.sum(np.exp(second / first / 2))
        np.testing.assert_allclose(total, np.sum(weights * [0.5, 3.0] * means), rtol=1e-5, err_msg=str(number))
        seen.append(means)
    assert learned["state"]["balance"]["steps"] == 6


@pytest.mark.parametrize(("balance", "kind"), itertools.product(weighting.BALANCES, ["all", "responsive"]))
def test_padding_changes_nothing_under_any_balance(balance, kind):
    terms = {name: {**options, "examples": kind} for name, options in TERMS.items()}
    goal = make_objective(terms, balance=balance)
    learned = goal.init(jax.random.key(0))

    @jax.jit
    def loss(student, teacher, data):
        teachers = {"teacher": Outputs(teacher, {})}
        return goal.loss(Outputs(student, {}), teachers, data, goal.hparams, goal.counts(data), learned)[0]

    student, teacher, data = some(0, B, CLASSES), some(50, B, CLASSES), a_batch()
    want = float(loss(student, teacher, data))
    other_student, other_teacher = np.copy(student), np.copy(teacher)
    other_student[-1], other_teacher[-1] = -3e4, 3e4 * np.arange(CLASSES)
    other = {**data, "labels": np.r_[LABELS[:-1], 0].astype(np.int32)}
    np.testing.assert_allclose(loss(other_student, other_teacher, other), want, rtol=1e-6)

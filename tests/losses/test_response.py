"""The response losses against float64 NumPy, against hand-computed values, and on the identities they must keep."""

from functools import partial
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax import losses
from kdjax.errors import UserError
from kdjax.losses.response import dist, standardised_kl, total_variation

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "response.npz")

DIVERGENCES = {
    "kl": losses.kl,
    "reverse_kl": partial(losses.kl, direction="reverse"),
    "js": losses.jensen_shannon,
    "js_0.2": partial(losses.jensen_shannon, beta=0.2),
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": partial(losses.skew_kl, direction="reverse"),
}


# All of them in one program: (student, teacher, temperature) -> {name: value}.
@jax.jit
def every_loss(student, teacher, temperature):
    return {name: divergence(student, teacher, temperature=temperature) for name, divergence in DIVERGENCES.items()}


@jax.jit
def every_gradient(student, teacher, temperature):
    """The gradients of the sum over positions, by student, teacher and temperature."""
    total = lambda divergence: lambda s, t, temperature: divergence(s, t, temperature=temperature).sum()
    grad = lambda divergence: jax.grad(total(divergence), argnums=(0, 1, 2))(student, teacher, temperature)
    return {name: grad(divergence) for name, divergence in DIVERGENCES.items()}


# The papers' formulas, written in probabilities and float64: nothing shared with the implementation.
def softmax64(logits, temperature=1.0):
    exp = np.exp(np.asarray(logits, np.float64) / temperature)
    return exp / exp.sum(-1, keepdims=True)


def kl64(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


def js64(pt, ps, beta):
    m = beta * pt + (1 - beta) * ps
    return beta * kl64(pt, m) + (1 - beta) * kl64(ps, m)


FORMULAS = {
    "kl": lambda pt, ps: kl64(pt, ps),
    "reverse_kl": lambda pt, ps: kl64(ps, pt),
    "js": lambda pt, ps: js64(pt, ps, 0.5),
    "js_0.2": lambda pt, ps: js64(pt, ps, 0.2),
    "skew_kl": lambda pt, ps: kl64(pt, 0.1 * pt + 0.9 * ps),
    "skew_reverse_kl": lambda pt, ps: kl64(ps, 0.1 * ps + 0.9 * pt),
}


def formula(name, student, teacher, temperature=1.0):
    return temperature**2 * FORMULAS[name](softmax64(teacher, temperature), softmax64(student, temperature))


def some_logits(seed, shape=(3, 5, 7), scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numerical_gradient(function, x, eps=1e-5):
    """Central differences of a float64 scalar function."""
    x = np.asarray(x, np.float64)
    grad = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = eps
        grad[i] = (function(x + step) - function(x - step)) / (2 * eps)
    return grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_divergences_are_the_papers_formulas(temperature):
    student, teacher = some_logits(0), some_logits(1)
    for name, loss in every_loss(student, teacher, temperature).items():
        assert loss.shape == (3, 5) and loss.dtype == jnp.float32
        want = formula(name, student, teacher, temperature)
        np.testing.assert_allclose(loss, want, rtol=2e-5, atol=2e-6, err_msg=name)


def test_gradients_are_the_float64_difference_quotients():
    student, teacher = some_logits(2, (2, 6)), some_logits(3, (2, 6))
    for name, (by_student, by_teacher, by_temperature) in every_gradient(student, teacher, 3.0).items():
        value = lambda s, t, temperature=3.0, name=name: formula(name, s, t, temperature).sum()
        want_student = numerical_gradient(lambda s, value=value: value(s, teacher), student)
        want_teacher = numerical_gradient(lambda t, value=value: value(student, t), teacher)
        want_temperature = (value(student, teacher, 3.0 + 1e-5) - value(student, teacher, 3.0 - 1e-5)) / 2e-5
        np.testing.assert_allclose(by_student, want_student, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(by_teacher, want_teacher, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(by_temperature, want_temperature, rtol=1e-3, err_msg=name)


def test_three_classes_by_hand_fix_the_direction():
    teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    other = jnp.log(jnp.array([1 / 3, 1 / 3, 1 / 3]))
    # Symmetric pair: ½ ln 2 - ¼ ln 2 both ways.
    np.testing.assert_allclose(losses.kl(student, teacher), 0.25 * np.log(2), rtol=1e-6)
    # KL(p_T || uniform) = ln 3 - H(p_T) = ln 3 - 1.5 ln 2; KL(uniform || p_T) = -ln 3 + (ln 2 + 2 ln 4) / 3.
    np.testing.assert_allclose(losses.kl(other, teacher), 0.05889151782, rtol=1e-5)
    np.testing.assert_allclose(losses.kl(other, teacher, direction="reverse"), 0.05663301226, rtol=1e-5)


@pytest.mark.parametrize("classes", [3, 50_000])
def test_equal_models_give_no_loss_and_no_gradient_under_jit_in_bfloat16(classes):
    logits = jnp.asarray(some_logits(4, (4, classes), 8.0), jnp.bfloat16)
    for name, loss in every_loss(logits, logits, 2.0).items():
        assert jnp.max(jnp.abs(loss)) < 4 * 1e-6, name
    for name, (by_student, by_teacher, _) in every_gradient(logits, logits, 2.0).items():
        assert jnp.max(jnp.abs(by_student)) < 2e-6, name
        assert jnp.max(jnp.abs(by_teacher)) < 2e-6, name


def test_equal_heads_in_one_program_give_no_loss():
    """Logits that are made in bfloat16 inside the program, where XLA may fuse the two sides differently."""
    hidden = jnp.asarray(some_logits(30, (4, 16)), jnp.bfloat16)
    head = jnp.asarray(some_logits(31, (16, 20_000)), jnp.bfloat16)
    loss = lambda student, teacher: losses.kl(hidden @ student, hidden @ teacher, temperature=2.0).mean()
    value, grad = jax.jit(jax.value_and_grad(loss))(head, head + 0)
    assert abs(value) < 4 * 1e-6 and jnp.max(jnp.abs(grad)) < 1e-5


def test_equal_logits_have_no_regression_error():
    logits = jnp.asarray(some_logits(4, (4, 1000)), jnp.bfloat16)
    value, grad = jax.jit(jax.value_and_grad(lambda s, t: losses.logits_mse(s, t).sum()))(logits, logits)
    assert value == 0 and not jnp.any(grad)


def test_bfloat16_logits_are_compared_in_float32():
    student = jnp.asarray(some_logits(5, (4, 1000)), jnp.bfloat16)
    teacher = jnp.asarray(some_logits(6, (4, 1000)), jnp.bfloat16)
    want = formula("kl", np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    np.testing.assert_allclose(jax.jit(losses.kl)(student, teacher), want, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_forward_kl_has_the_gradient_of_soft_cross_entropy(temperature):
    """T² ∂KL/∂z_s = T (p_S - p_T): Hinton et al. 2015, eq. 2, with the factor T²."""
    student, teacher = some_logits(7, (2, 9)), some_logits(8, (2, 9))
    grad = jax.grad(lambda s: losses.kl(s, teacher, temperature=temperature).sum())(jnp.asarray(student))
    want = temperature * (softmax64(student, temperature) - softmax64(teacher, temperature))
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_high_temperature_gradient_is_logit_matching():
    """As T grows the gradient of every T²-scaled term tends to a share of (z_s - z_t, centred) / classes (eq. 4)."""
    shares = {"kl": 1, "reverse_kl": 1, "js": 0.25, "js_0.2": 0.16, "skew_kl": 0.81, "skew_reverse_kl": 0.81}
    student, teacher = some_logits(9, (2, 10)), some_logits(10, (2, 10))
    error = student.astype(np.float64) - teacher
    matching = (error - error.mean(-1, keepdims=True)) / 10
    for name, (grad, _, _) in every_gradient(student, teacher, 500.0).items():
        np.testing.assert_allclose(grad, shares[name] * matching, rtol=0.03, atol=3e-3, err_msg=name)


def test_temperature_may_be_traced_and_mapped():
    student, teacher = some_logits(11), some_logits(12)
    temperatures = jnp.array([1.0, 2.0, 8.0])
    loss = lambda t: losses.jensen_shannon(student, teacher, temperature=t, beta=t / 10)
    mapped = jax.jit(jax.vmap(loss))(temperatures)
    for t, got in zip([1.0, 2.0, 8.0], mapped, strict=True):
        want = t**2 * js64(softmax64(teacher, t), softmax64(student, t), t / 10)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_classes_that_both_rule_out_change_nothing():
    student, teacher = some_logits(13, (4, 6)), some_logits(14, (4, 6))
    wide = lambda z: np.concatenate([z[:, :2], np.full((4, 3), -np.inf, np.float32), z[:, 2:]], -1)
    loss, wide_loss = every_loss(student, teacher, 2.0), every_loss(wide(student), wide(teacher), 2.0)
    grads, wide_grads = every_gradient(student, teacher, 2.0), every_gradient(wide(student), wide(teacher), 2.0)
    for name in DIVERGENCES:
        np.testing.assert_allclose(wide_loss[name], loss[name], rtol=1e-5, err_msg=name)
        for got, want in zip(wide_grads[name][:2], grads[name][:2], strict=True):
            assert not np.any(got[:, 2:5]), name
            np.testing.assert_allclose(np.delete(got, slice(2, 5), -1), want, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(wide_grads[name][2], grads[name][2], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_class_that_one_side_rules_out():
    whole, cut = jnp.array([1.0, 0.5, 0.0]), jnp.array([1.0, -jnp.inf, 0.0])
    p, q = softmax64(whole), softmax64(cut)
    for student, teacher, ps, pt in ((whole, cut, p, q), (cut, whole, q, p)):
        loss, grads = every_loss(student, teacher, 1.0), every_gradient(student, teacher, 1.0)
        for name in ("js", "skew_kl", "skew_reverse_kl"):
            np.testing.assert_allclose(loss[name], FORMULAS[name](pt, ps), rtol=1e-5, err_msg=name)
            assert all(jnp.all(jnp.isfinite(grad)) for grad in grads[name]), name
        infinite = "kl" if student is cut else "reverse_kl"
        assert loss[infinite] == jnp.inf
    value, grad = jax.value_and_grad(losses.kl)(whole, cut)
    np.testing.assert_allclose(value, kl64(q, p), rtol=1e-5)
    np.testing.assert_allclose(grad, p - q, rtol=1e-5)


def test_a_nan_stays_visible():
    for name, loss in every_loss(jnp.array([0.0, jnp.nan, 1.0]), jnp.array([0.0, 1.0, 1.0]), 1.0).items():
        assert jnp.isnan(loss), name


def test_extreme_logits_stay_finite():
    student, teacher = jnp.array([[3e4, -3e4, 0.0]]), jnp.array([[-3e4, 3e4, 0.0]])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(every_loss(student, teacher, 1.0)))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(every_gradient(student, teacher, 1.0)))


logits_pairs = hnp.arrays(np.float32, (2, 3, 8), elements=st.floats(-30, 30, width=32))


@settings(max_examples=50, deadline=None)
@given(logits_pairs)
def test_divergences_are_bounded_and_shift_invariant(pair):
    student, teacher = jnp.asarray(pair[0]), jnp.asarray(pair[1])
    loss, shifted = every_loss(student, teacher, 1.0), every_loss(student + 5.0, teacher - 3.0, 1.0)
    for name in DIVERGENCES:
        assert jnp.all(loss[name] > -1e-5), name
        np.testing.assert_allclose(shifted[name], loss[name], rtol=1e-3, atol=2e-5, err_msg=name)
    assert jnp.all(loss["js"] < np.log(2) + 1e-5)
    np.testing.assert_allclose(every_loss(teacher, student, 1.0)["js"], loss["js"], atol=1e-6)
    assert jnp.all(loss["skew_kl"] < -np.log(0.1) + 1e-4)


def test_jensen_shannon_swaps_with_its_beta():
    student, teacher = some_logits(15), some_logits(16)
    one = losses.jensen_shannon(student, teacher, beta=0.3)
    np.testing.assert_allclose(one, losses.jensen_shannon(teacher, student, beta=0.7), rtol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_no_skew_is_kl(direction):
    student, teacher = jnp.asarray(some_logits(17, scale=1.0)), some_logits(18, scale=1.0)
    want, want_grad = jax.value_and_grad(lambda s: losses.kl(s, teacher, direction=direction).sum())(student)
    for skew, rtol in ((0.0, 1e-6), (1e-6, 1e-4)):
        skewed = lambda s, skew=skew: losses.skew_kl(s, teacher, skew=skew, direction=direction).sum()
        value, grad = jax.value_and_grad(skewed)(student)
        np.testing.assert_allclose(value, want, rtol=rtol)
        np.testing.assert_allclose(grad, want_grad, rtol=10 * rtol, atol=1e-5)


def test_jensen_shannon_over_beta_tends_to_kl_and_itself_to_zero():
    student, teacher = some_logits(19, scale=1.0), some_logits(20, scale=1.0)
    js = losses.jensen_shannon(student, teacher, beta=1e-3)
    np.testing.assert_allclose(js / 1e-3, losses.kl(student, teacher), rtol=0.02)
    assert jnp.all(js < 0.01)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kl_is_exact_at_every_temperature(temperature):
    """The rounding of the normalisers, times T², would be 5e-5 of it at T = 20."""
    student, teacher = some_logits(30, (64, 100), 2.0), some_logits(31, (64, 100), 2.0)
    got = jax.jit(partial(losses.kl, temperature=temperature))(student, teacher)
    np.testing.assert_allclose(got, formula("kl", student, teacher, temperature), rtol=1e-5)


# Standardised KL, total variation, DIST.

CODE = "logit-standardization-KD"


def z_score64(logits, variant="paper"):
    logits = np.asarray(logits, np.float64)
    centred = logits - logits.mean(-1, keepdims=True)
    if variant == "paper":
        return centred / logits.std(-1, keepdims=True)
    return centred / (logits.std(-1, ddof=1, keepdims=True) + 1e-7)


@pytest.mark.parametrize("variant", ["paper", CODE])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 2), (2, 50)])
def test_standardised_kl_is_the_papers_formula(variant, shape):
    student, teacher = some_logits(32, shape) + 5, some_logits(33, shape, 1e-3)  # so small that the code's 1e-7 shows
    loss = jax.jit(partial(standardised_kl, temperature=3.0, variant=variant))(student, teacher)
    want = formula("kl", z_score64(student, variant), z_score64(teacher, variant), 3.0)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)


def test_standardised_kl_by_hand():
    # z-scores (√(3/2), 0, -√(3/2)) against their negatives.
    loss = standardised_kl(jnp.array([3.0, 2.0, 1.0]), jnp.array([-9.0, 0.0, 9.0]), temperature=1.0)
    e = np.exp(np.sqrt(1.5))
    np.testing.assert_allclose(loss, 2 * np.sqrt(1.5) * (e - 1 / e) / (e + 1 + 1 / e), rtol=1e-5)


@pytest.mark.parametrize("name, temperature", [("standardised_kl_T2", 2.0), ("standardised_kl_T5", 5.0)])
def test_standardised_kl_is_the_public_code(name, temperature):
    mean = lambda s: standardised_kl(s, GOLDEN["teacher"], temperature=temperature, variant=CODE).mean()
    value, grad = jax.jit(jax.value_and_grad(mean))(GOLDEN["student"])
    np.testing.assert_allclose(value, GOLDEN[f"{name}/value"], rtol=1e-5)
    np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], rtol=1e-4, atol=1e-6)


def test_standardised_kl_sees_relations_alone():
    student, teacher = some_logits(34, (4, 6)), some_logits(35, (4, 6))
    value_and_grad = jax.jit(jax.value_and_grad(lambda s, t: standardised_kl(s, t).sum()))
    value, grad = value_and_grad(student, teacher)
    np.testing.assert_allclose(value_and_grad(3 * student - 1, 0.2 * teacher + 4)[0], value, rtol=1e-5)
    np.testing.assert_allclose(np.sum(grad, -1), 0.0, atol=1e-6)  # no gradient along a shift
    np.testing.assert_allclose(np.sum(grad * student, -1), 0.0, atol=1e-5)  # nor along a scale
    same, none = value_and_grad(2 * teacher + 1, teacher)
    assert abs(same) < 1e-10 and np.max(np.abs(none)) < 1e-6
    for flat in (np.zeros((4, 6)), np.full((4, 6), 0.1), np.full((4, 6), 1e4)):
        value, grad = value_and_grad(np.asarray(flat, np.float32), teacher)
        want = formula("kl", np.zeros((4, 6)), z_score64(teacher), 2.0).sum()
        np.testing.assert_allclose(value, want, rtol=1e-5)
        assert not np.any(grad)
    wide = lambda z: np.concatenate([z, np.full((4, 2), -np.inf, np.float32)], -1)
    value, grad = value_and_grad(student, teacher)
    wide_value, wide_grad = value_and_grad(wide(student), wide(teacher))
    np.testing.assert_allclose(wide_value, value, rtol=1e-5)
    np.testing.assert_allclose(wide_grad, np.pad(grad, ((0, 0), (0, 2))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_total_variation_is_its_formula(temperature):
    student, teacher = some_logits(36), some_logits(37)
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    loss = jax.jit(total_variation)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(loss, temperature * 0.5 * np.abs(p - q).sum(-1), rtol=1e-5)
    value = lambda s: temperature * 0.5 * np.abs(p[0] - softmax64(s, temperature)).sum()
    grad = jax.grad(lambda s: total_variation(s, teacher[0], temperature=temperature).sum())(jnp.asarray(student[0]))
    np.testing.assert_allclose(grad, numerical_gradient(value, student[0]), rtol=1e-4, atol=1e-5)


def test_total_variation_by_hand_and_at_its_limits():
    teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    np.testing.assert_allclose(total_variation(student, teacher), 0.25, rtol=1e-6)
    one, other = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
    assert total_variation(one, other) == 1
    value, grad = jax.jit(jax.value_and_grad(total_variation))(teacher, teacher)
    assert value == 0 and not np.any(grad)
    # The factor T keeps the gradient: it tends to a limit as T grows.
    at = lambda t: jax.grad(lambda s: total_variation(s, teacher, temperature=t))(student)
    np.testing.assert_allclose(at(1000.0), at(100.0), rtol=0.02)
    assert np.max(np.abs(at(1000.0))) > 0.1


def dist64(student, teacher, temperature=1.0, inter_weight=1.0, intra_weight=1.0):
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return inter_weight * inter + intra_weight * intra


dist_with_gradient = jax.jit(jax.value_and_grad(dist))


@pytest.mark.parametrize("shape, scale", [((6, 7), 3.0), ((2, 3), 1.0), ((5, 40), 2.0)])
def test_dist_is_the_papers_formula(shape, scale):
    student, teacher = some_logits(38, shape, scale), some_logits(39, shape, scale)
    np.testing.assert_allclose(dist_with_gradient(student, teacher)[0], dist64(student, teacher), rtol=1e-5)
    loss = jax.jit(dist)(student, teacher, temperature=4.0, inter_weight=2.0, intra_weight=0.5)
    np.testing.assert_allclose(loss, dist64(student, teacher, 4.0, 2.0, 0.5), rtol=1e-5)


def test_dist_is_the_public_code():
    student, teacher = GOLDEN["student"], GOLDEN["teacher"]
    code = {"temperature": 4.0, "inter_weight": 2.0, "intra_weight": 0.5, "variant": "image_classification_sota"}
    weights = {"inter_weight": 2.0, "intra_weight": 2.0}
    for name, options in (("dist_T1", {}), ("dist_T4", code), ("dist_segmentation", weights)):
        value, grad = jax.jit(jax.value_and_grad(partial(dist, **options)))(student, teacher)
        np.testing.assert_allclose(value, GOLDEN[f"{name}/value"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], rtol=1e-4, atol=2e-6, err_msg=name)


def test_dist_by_hand():
    # Probabilities (p, 1 - p): opposite within each example, and both classes fall where the teacher's rise.
    student, teacher = jnp.log(jnp.array([[0.8, 0.2], [0.7, 0.3]])), jnp.log(jnp.array([[0.1, 0.9], [0.2, 0.8]]))
    np.testing.assert_allclose(dist(student, teacher, inter_weight=10.0), 10 * 2 + 2, rtol=1e-5)


def test_dist_gradient_is_the_float64_difference_quotient():
    student, teacher = some_logits(40, (6, 7), 1.0), some_logits(41, (6, 7), 1.0)
    want = numerical_gradient(lambda s: dist64(s, teacher), student)
    np.testing.assert_allclose(dist_with_gradient(student, teacher)[1], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dist_of_equal_sides_is_a_fixed_point(dtype):
    x = jnp.asarray(some_logits(42, (6, 7)), dtype)
    value, grad = dist_with_gradient(x, x)
    assert value.dtype == jnp.float32 and abs(value) < 1e-10 and np.max(np.abs(np.asarray(grad, np.float32))) < 1e-6


@pytest.mark.parametrize("padding", [0.0, 1e30, np.nan])
def test_padding_and_order_do_not_change_dist(padding):
    student, teacher, real = some_logits(43, (6, 7)), some_logits(44, (6, 7)), np.array([7, 1, 2, 0, 5, 4])
    mask = np.isin(np.arange(8), real).astype(np.float32)
    padded = [np.full((8, 7), padding, np.float32) for _ in range(2)]
    padded[0][real], padded[1][real] = student, teacher
    value, grad = dist_with_gradient(student, teacher)
    for shape in ((8,), (2, 4)):  # leading positions are examples
        logits = [x.reshape(*shape, 7) for x in padded]
        masked, masked_grad = dist_with_gradient(*logits, mask.reshape(shape))
        masked_grad = masked_grad.reshape(8, 7)
        np.testing.assert_allclose(masked, value, rtol=1e-5)
        np.testing.assert_allclose(masked_grad[real], grad, rtol=1e-4, atol=1e-6)
        assert not np.any(masked_grad[mask == 0])
    for few in (np.zeros(8, np.float32), np.eye(8, dtype=np.float32)[1]):
        value, grad = dist_with_gradient(*padded, few)
        assert value == 0 and not np.any(grad)


def test_degenerate_probabilities_stay_finite():
    zeros, equal, sure = np.zeros((6, 7)), np.full((6, 7), 0.1), 1e4 * np.eye(6, 7)
    faint = some_logits(45, (6, 7)) - 60 * np.eye(7)[0]  # a class of probability 1e-26
    ruled_out = np.where(np.arange(7) == 3, -np.inf, some_logits(46, (6, 7)))
    cases = [np.asarray(x, np.float32) for x in (zeros, equal, sure, faint, ruled_out, some_logits(47, (6, 7)))]
    for student in cases:
        for teacher in cases:
            value, grad = dist_with_gradient(student, teacher)
            assert np.isfinite(value) and np.all(np.isfinite(grad)) and np.max(np.abs(grad)) < 10
    # No correlation with a constant: distance 1 within each example and each class.
    value, grad = dist_with_gradient(cases[1], cases[-1])
    assert value == 2 and not np.any(grad)
    # A faint class counts like any other.
    np.testing.assert_allclose(dist_with_gradient(cases[3], cases[-1])[0], dist64(cases[3], cases[-1]), rtol=1e-5)


def test_bad_input_of_the_new_losses_is_one_sentence():
    z = jnp.zeros((2, 3))
    with pytest.raises(UserError, match=f"did you mean '{CODE}'"):
        standardised_kl(z, z, variant="logit-standardisation-KD")
    with pytest.raises(UserError, match="unknown variant of dist"):
        dist(z, z, variant="sota")
    with pytest.raises(UserError, match="at least 2 examples"):
        dist(z[:1], z[:1])
    with pytest.raises(UserError, match=r"needs a mask of shape \(2,\)"):
        dist(z, z, jnp.ones(3))
    for loss in (standardised_kl, total_variation, dist):
        with pytest.raises(UserError, match="same classes"):
            loss(z, jnp.zeros((2, 4)))


# Cross-entropy.


@jax.jit
def cross_entropy(logits, labels, smoothing):
    return losses.cross_entropy(logits, labels, label_smoothing=smoothing)


cross_entropy_gradient = jax.jit(jax.grad(lambda *args: cross_entropy(*args).sum()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_szegedys_formula(smoothing):
    logits, labels = some_logits(21, (4, 5, 7)), np.random.default_rng(0).integers(0, 7, (4, 5)).astype(np.int32)
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    got = cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(got, -(target * np.log(softmax64(logits))).sum(-1), rtol=1e-5)
    grad = cross_entropy_gradient(logits, labels, smoothing)
    np.testing.assert_allclose(grad, softmax64(logits) - target, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_unlabelled_example_gives_no_loss_and_no_gradient(smoothing):
    logits, labels = some_logits(22, (3, 7)), np.array([2, -1, 0])
    assert cross_entropy(logits, labels, smoothing)[1] == 0
    grad = np.asarray(cross_entropy_gradient(logits, labels, smoothing))
    np.testing.assert_array_equal(np.any(grad != 0, axis=-1), [True, False, True])


def test_smoothing_spreads_over_the_possible_classes_alone():
    logits, labels = np.array([[1.0, -np.inf, 0.0, 2.0]]), np.array([3])
    p, target = softmax64([1.0, 0.0, 2.0]), np.array([0.1, 0.1, 0.8])
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.3), [-(target * np.log(p)).sum()], rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy_gradient(logits, labels, 0.3), [[p[0] - 0.1, 0.0, p[1] - 0.1, p[2] - 0.8]], atol=1e-6
    )


# Logit regression and several teachers.


def test_logits_mse_is_half_the_squared_distance():
    student, teacher = some_logits(23), some_logits(24)
    np.testing.assert_allclose(losses.logits_mse(student, teacher), 0.5 * ((student - teacher) ** 2).sum(-1), rtol=1e-5)
    masked = [jnp.concatenate([z, jnp.full((3, 5, 2), -jnp.inf)], -1) for z in (student, teacher)]
    value, grad = jax.value_and_grad(lambda s: losses.logits_mse(s, masked[1]).sum())(masked[0])
    np.testing.assert_allclose(value, losses.logits_mse(student, teacher).sum(), rtol=1e-6)
    np.testing.assert_allclose(grad[..., :7], student - teacher, rtol=1e-6)
    assert not jnp.any(grad[..., 7:])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_of_probabilities_at_the_losss_temperature(temperature):
    teachers = [some_logits(seed) for seed in (25, 26, 27)]
    z = jax.jit(losses.combine_logits)(teachers, jnp.array([2.0, 1.0, 1.0]), temperature=temperature)
    want = sum(w * softmax64(t, temperature) for w, t in zip((0.5, 0.25, 0.25), teachers, strict=True))
    np.testing.assert_allclose(softmax64(z, temperature), want, rtol=1e-5)


def test_mean_of_logits():
    teachers = [some_logits(28), some_logits(29)]
    z = losses.combine_logits(teachers, (3.0, 1.0), how="logits")
    np.testing.assert_allclose(z, 0.75 * teachers[0] + 0.25 * teachers[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_a_teacher_of_no_weight_has_no_say(how):
    one, other = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[5.0, -jnp.inf, 0.0]])
    z = losses.combine_logits([one, other], [1.0, 0.0], how=how)
    np.testing.assert_allclose(softmax64(z), softmax64(one), rtol=1e-5)
    np.testing.assert_allclose(losses.kl(one, losses.combine_logits([one] * 3, [1, 2, 3], how=how)), 0.0, atol=1e-6)


def test_bad_input_is_one_sentence():
    z = jnp.zeros((2, 3))
    with pytest.raises(UserError, match="did you mean 'reverse'"):
        losses.kl(z, z, direction="revers")
    with pytest.raises(UserError, match="unknown direction"):
        losses.skew_kl(z, z, direction="both")
    with pytest.raises(UserError, match="did you mean 'logits'"):
        losses.combine_logits([z], [1.0], how="logit")
    with pytest.raises(UserError, match="one weight per teacher"):
        losses.combine_logits([z, z], [1.0])
    for loss in (*DIVERGENCES.values(), losses.logits_mse):
        with pytest.raises(UserError, match="same classes"):
            loss(z, jnp.zeros((2, 1)))
    with pytest.raises(UserError, match="one class index per position"):
        losses.cross_entropy(z, jnp.zeros((3,), jnp.int32))

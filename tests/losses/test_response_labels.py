"""The response losses with labels against float64 loops, the public code's output, and hand-computed cases."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import response
from kdjax.losses import response_labels as losses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "response.npz")
CODE = "Teacher-free-Knowledge-Distillation"

# (student, teacher, labels) -> per position.
LOSSES = {
    "dkd": losses.dkd,
    "dkd_weights": partial(losses.dkd, temperature=1.5, target_weight=2.0, other_weight=0.5),
    "nkd": losses.nkd,
    "nkd_T2": partial(losses.nkd, temperature=2.0, other_weight=0.7),
    "weighted_soft_labels": losses.weighted_soft_labels,
    "weighted_soft_labels_T4": partial(losses.weighted_soft_labels, temperature=4.0),
    "teacher_free": lambda s, t, y: losses.teacher_free(s, y),
    "teacher_free_T3": lambda s, t, y: losses.teacher_free(s, y, temperature=3.0, correct=0.8),
    "teacher_free_code": lambda s, t, y: losses.teacher_free(s, y, variant=CODE),
}


# All of them in one program: per loss the values, and the gradients of their sum by student and teacher.
@jax.jit
def losses_and_gradients(student, teacher, labels):
    def one(loss):
        value, back = jax.vjp(lambda s, t: loss(s, t, labels), student, teacher)
        return value, back(jnp.ones_like(value))

    return {name: one(loss) for name, loss in LOSSES.items()}


def every_loss(*args):
    return {name: loss for name, (loss, _) in losses_and_gradients(*args).items()}


def every_gradient(*args):
    return {name: grads for name, (_, grads) in losses_and_gradients(*args).items()}


# The papers' formulas for one position, in probabilities and float64: nothing shared with the implementation.


def softmax64(z, temperature=1.0):
    e = np.exp(np.asarray(z, np.float64) / temperature)
    return e / e.sum()


def kl64(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def others64(p, y):
    rest = np.delete(p, y)
    return rest / rest.sum()


def dkd64(s, t, y, temperature=4.0, target_weight=1.0, other_weight=8.0):
    ps, pt = softmax64(s, temperature), softmax64(t, temperature)
    target = kl64([pt[y], 1 - pt[y]], [ps[y], 1 - ps[y]])
    return temperature**2 * (target_weight * target + other_weight * kl64(others64(pt, y), others64(ps, y)))


def nkd64(s, t, y, temperature=1.0, other_weight=1.5):
    ps, pt = others64(softmax64(s, temperature), y), others64(softmax64(t, temperature), y)
    soft = -sum(a * np.log(b) for a, b in zip(pt, ps, strict=True) if a > 0)
    return -softmax64(t)[y] * np.log(softmax64(s)[y]) + other_weight * temperature**2 * soft


def weight64(s, t, y):
    return 1 - np.exp(-np.log(softmax64(s)[y]) / np.log(softmax64(t)[y]))


def weighted_soft_labels64(s, t, y, temperature=2.0, weight=None):
    weight = weight64(s, t, y) if weight is None else weight
    ps, pt = softmax64(s, temperature), softmax64(t, temperature)
    return weight * temperature**2 * -sum(a * np.log(b) for a, b in zip(pt, ps, strict=True) if a > 0)


def teacher_free64(s, t, y, temperature=20.0, correct=0.99, code=False):
    classes = len(s)
    made = np.full(classes, (1 - correct) / (classes - 1))
    made[y] = correct
    if code:
        return kl64(softmax64(made, temperature), softmax64(s)) / classes
    softened = made ** (1 / temperature)
    return temperature**2 * kl64(softened / softened.sum(), softmax64(s, temperature))


FORMULAS = {
    "dkd": dkd64,
    "dkd_weights": partial(dkd64, temperature=1.5, target_weight=2.0, other_weight=0.5),
    "nkd": nkd64,
    "nkd_T2": partial(nkd64, temperature=2.0, other_weight=0.7),
    "weighted_soft_labels": weighted_soft_labels64,
    "weighted_soft_labels_T4": partial(weighted_soft_labels64, temperature=4.0),
    "teacher_free": teacher_free64,
    "teacher_free_T3": partial(teacher_free64, temperature=3.0, correct=0.8),
    "teacher_free_code": partial(teacher_free64, code=True),
}


def some(seed, shape=(3, 5, 7), scale=3.0):
    rng = np.random.default_rng(seed)
    student, teacher = (scale * rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return student, teacher, rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)


@pytest.mark.parametrize("seed, shape, scale", [(0, (4, 6), 3.0), (1, (2, 3, 2), 1.0), (2, (5, 30), 0.5)])
def test_losses_are_the_papers_formulas(seed, shape, scale):
    student, teacher, labels = some(seed, shape, scale)
    for name, loss in every_loss(student, teacher, labels).items():
        assert loss.shape == shape[:-1] and loss.dtype == jnp.float32
        want = np.zeros(shape[:-1])
        for i in np.ndindex(want.shape):
            want[i] = FORMULAS[name](student[i], teacher[i], labels[i])
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=2e-6, err_msg=name)  # T² is up to 400


def test_gradients_are_the_float64_difference_quotients():
    student, teacher, labels = some(4, (4, 6), 2.0)
    for name, (grad, _) in every_gradient(student, teacher, labels).items():
        formula, want = FORMULAS[name], np.zeros(student.shape)
        for i, k in np.ndindex(student.shape):
            step = np.zeros(6)
            step[k] = 1e-6
            if name.startswith("weighted"):  # the weight is a constant
                formula = partial(FORMULAS[name], weight=weight64(student[i], teacher[i], labels[i]))
            ahead, behind = (formula(student[i] + sign * step, teacher[i], labels[i]) for sign in (1, -1))
            want[i, k] = (ahead - behind) / 2e-6
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5, err_msg=name)


# Ours by the name of the public code's output.
PUBLIC = {name: name for name in LOSSES if not name.startswith("teacher_free")} | {"teacher_free": "teacher_free_code"}


@pytest.mark.parametrize("golden, name", PUBLIC.items())
def test_losses_are_the_public_code(golden, name):
    mean = lambda s: LOSSES[name](s, GOLDEN["teacher"], GOLDEN["labels"]).mean()
    value, grad = jax.jit(jax.value_and_grad(mean))(GOLDEN["student"])
    np.testing.assert_allclose(value, GOLDEN[f"{golden}/value"], rtol=1e-5)
    np.testing.assert_allclose(grad, GOLDEN[f"{golden}/grad"], rtol=1e-4, atol=1e-6)


def test_three_classes_by_hand():
    teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    label = jnp.array(0)
    # TCKD: (½, ½) against (¼, ¾); NCKD: (½, ½) against (1/3, 2/3).
    target, other = 0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.5 * np.log(1.5) + 0.5 * np.log(0.75)
    loss = losses.dkd(student, teacher, label, temperature=1.0, target_weight=3.0, other_weight=5.0)
    np.testing.assert_allclose(loss, 3 * target + 5 * other, rtol=1e-5)
    want = 0.5 * np.log(4) + 1.5 * (0.5 * np.log(3) + 0.5 * np.log(1.5))
    np.testing.assert_allclose(losses.nkd(student, teacher, label), want, rtol=1e-6)
    # L_S / L_T = ln 4 / ln 2 = 2; the cross-entropy is (ln 4)(½ + ¼) + ¼ ln 2.
    want = (1 - np.exp(-2)) * (0.75 * np.log(4) + 0.25 * np.log(2))
    loss = losses.weighted_soft_labels(student, teacher, label, temperature=1.0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    # u = (½, ¼, ¼) is the teacher above.
    loss = losses.teacher_free(student, label, temperature=1.0, correct=0.5)
    np.testing.assert_allclose(loss, 0.25 * np.log(2), rtol=1e-6)


def test_dkd_is_kl_with_the_teachers_own_weight():
    """KL = TCKD + (1 - p_T[label]) NCKD: Zhao et al. 2022, eq. 6."""
    student, teacher, labels = some(5)
    suppressed = 1 - np.take_along_axis(np.asarray(jax.nn.softmax(teacher / 3.0)), labels[..., None], -1)[..., 0]
    loss = losses.dkd(student, teacher, labels, temperature=3.0, other_weight=suppressed)
    np.testing.assert_allclose(loss, response.kl(student, teacher, temperature=3.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_sides_under_jit(dtype):
    student, _, labels = some(6, (4, 6))
    student = jnp.asarray(student, dtype)
    loss, grads = every_loss(student, student, labels), every_gradient(student, student, labels)
    for name in ("dkd", "dkd_weights"):
        np.testing.assert_allclose(loss[name], 0.0, atol=1e-6)
    for name in ("dkd", "dkd_weights", "weighted_soft_labels", "weighted_soft_labels_T4"):
        assert grads[name][0].dtype == dtype
        np.testing.assert_allclose(np.asarray(grads[name][0], np.float32), 0.0, atol=2e-6, err_msg=name)
    # A cross-entropy is an entropy there, and WSLD's weight is 1 - 1/e.
    p = np.array([softmax64(z, 2.0) for z in np.asarray(student, np.float64)])
    want = -(1 - np.exp(-1)) * 4 * np.sum(p * np.log(p), axis=-1)
    np.testing.assert_allclose(loss["weighted_soft_labels"], want, rtol=1e-5)
    # NKD's second part has no gradient; its first is the label's own cross-entropy times p[label].
    total = lambda s: losses.nkd(s, student, labels).sum()
    probabilities = np.array([softmax64(z) for z in np.asarray(student, np.float64)])
    want = np.take_along_axis(probabilities, labels[:, None], -1) * (probabilities - np.eye(6)[labels])
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(jax.grad(total)(student), np.float32), want, rtol=rtol, atol=1e-5)


def test_the_hand_made_teacher_is_a_fixed_point():
    labels = np.array([0, 3])
    made = np.full((2, 5), 0.01 / 4, np.float32)
    made[[0, 1], labels] = 0.99
    value, grad = jax.value_and_grad(lambda z: losses.teacher_free(z, labels).sum())(jnp.log(made) + 3.0)
    np.testing.assert_allclose(value, 0.0, atol=1e-4)  # T² = 400 times float32's rounding
    np.testing.assert_allclose(grad, 0.0, atol=1e-5)
    soft = jax.nn.softmax(made / 20.0)
    code = lambda z: losses.teacher_free(z, labels, variant=CODE).sum()
    np.testing.assert_allclose(jax.grad(code)(jnp.log(soft)), 0.0, atol=1e-6)


def test_weight_falls_as_the_student_masters_the_label():
    teacher, labels = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([0])
    weight = lambda z: (
        losses.weighted_soft_labels(jnp.array([z]), teacher, labels)[0]
        / (4 * -jnp.sum(jax.nn.softmax(teacher[0] / 2) * jax.nn.log_softmax(jnp.array(z) / 2)))
    )
    behind, ahead, sure = weight([-5.0, 0.0, 0.0]), weight([3.0, 0.0, 0.0]), weight([50.0, 0.0, 0.0])
    assert 0.99 < behind <= 1 and 0.1 < ahead < 0.3 and abs(sure) < 1e-6
    certain = losses.weighted_soft_labels(teacher, jnp.array([[200.0, 0.0, 0.0]]), labels)
    assert jnp.isfinite(certain[0]) and certain[0] > 0  # L_T = 0 in float32: weight 1


@pytest.mark.parametrize("missing", [-1, -100, 6, 1000])
def test_an_unlabelled_example_gives_no_loss_and_no_gradient(missing):
    student, teacher, labels = some(7, (4, 6))
    labels[1] = missing
    loss, grads = every_loss(student, teacher, labels), every_gradient(student, teacher, labels)
    for name in LOSSES:
        assert loss[name][1] == 0 and np.all(np.asarray(loss[name])[[0, 2, 3]] > 0), name
        assert not np.any(grads[name][0][1]) and not np.any(grads[name][1][1]), name
        assert np.all(np.any(grads[name][0][np.array([0, 2, 3])] != 0, axis=-1)), name


def test_classes_that_both_rule_out_change_nothing():
    student, teacher, labels = some(8, (4, 6))
    wide = lambda z: np.concatenate([z, np.full((4, 3), -np.inf, np.float32)], -1)
    loss, wide_loss = every_loss(student, teacher, labels), every_loss(wide(student), wide(teacher), labels)
    grads, wide_grads = every_gradient(student, teacher, labels), every_gradient(wide(student), wide(teacher), labels)
    for name in LOSSES:
        np.testing.assert_allclose(wide_loss[name], loss[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.any(wide_grads[name][0][:, 6:]), name
        np.testing.assert_allclose(wide_grads[name][0][:, :6], grads[name][0], rtol=1e-4, atol=1e-5, err_msg=name)


def test_degenerate_logits_stay_finite():
    labels = np.arange(4, dtype=np.int32)
    zeros, sure, wrong = np.zeros((4, 6)), 1e4 * np.eye(4, 6), -1e4 * np.eye(4, 6)
    for student in (zeros, sure, wrong):
        for teacher in (zeros, sure, wrong):
            student, teacher = np.asarray(student, np.float32), np.asarray(teacher, np.float32)
            leaves = every_loss(student, teacher, labels), every_gradient(student, teacher, labels)
            for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
                assert np.all(np.isfinite(leaf)), path


def test_every_number_may_be_traced_and_mapped():
    student, teacher, labels = some(9, (4, 6))
    numbers = jnp.array([0.5, 1.0, 3.0])
    dkd = lambda x: losses.dkd(student, teacher, labels, temperature=x, target_weight=x, other_weight=2 * x)
    mapped = jax.jit(jax.vmap(dkd))
    for x, got in zip((0.5, 1.0, 3.0), mapped(numbers), strict=True):
        want = [dkd64(*row, x, x, 2 * x) for row in zip(student, teacher, labels, strict=True)]
        np.testing.assert_allclose(got, want, rtol=1e-5)
    mapped = jax.jit(jax.vmap(lambda x: losses.teacher_free(student, labels, temperature=x, correct=x / 4)))
    for x, got in zip((0.5, 1.0, 3.0), mapped(numbers), strict=True):
        want = [teacher_free64(s, None, y, x, x / 4) for s, y in zip(student, labels, strict=True)]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bad_input_is_one_sentence():
    z, labels = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    for loss in (losses.dkd, losses.nkd, losses.weighted_soft_labels):
        with pytest.raises(UserError, match="same classes"):
            loss(z, jnp.zeros((2, 4)), labels)
        with pytest.raises(UserError, match="one class index per position"):
            loss(z, z, jnp.zeros(3, jnp.int32))
        with pytest.raises(UserError, match="a single class"):
            loss(z[:, :1], z[:, :1], labels)
    with pytest.raises(UserError, match="one class index per position"):
        losses.teacher_free(z, jnp.zeros(3, jnp.int32))
    with pytest.raises(UserError, match=f"did you mean '{CODE}'"):
        losses.teacher_free(z, labels, variant="teacher-free-knowledge-distillation")

"""Losses of a student's own exits, past and peers against float64 NumPy, and what none of them differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.errors import UserError

B, CLASSES = 6, 5
SHAPES = [(B, 4, 4, 3), (B, 2, 2, 4), (B, 7)]  # images and a vector, as a network has them
LABELS = np.array([0, 3, -1, 4, 2, -1], np.int32)  # two examples without


def some(seed, *shape, scale=2.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# The papers' formulas, in float64 and one example at a time.
def softmax64(logits, temperature=1.0):
    exp = np.exp((np.asarray(logits, np.float64) - np.max(logits)) / temperature)
    return exp / exp.sum()


def kl64(teacher, student, temperature=1.0):
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    return temperature**2 * np.sum(p * np.log(p / q))


def ce64(logits, label):
    return -np.log(softmax64(logits)[label]) if label >= 0 else 0.0


def dense64(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def pooled64(tap):
    return np.asarray(tap, np.float64).reshape(-1, tap.shape[-1]).mean(0)


def exit64(params, tap):
    classifier = params["classifier"]
    return dense64(classifier["out"], np.maximum(dense64(classifier["in"], pooled64(tap)), 0.0))


def exits64(params, taps, logits, labels, temperature, label_weight, soft_weight, hint_weight):
    found = np.zeros(len(labels))
    for i, label in enumerate(labels):
        for number in range(len(taps) - 1):
            own = params[str(number)]
            score = exit64(own, taps[number][i])
            gap = dense64(own["hint"], pooled64(taps[number][i])) - pooled64(taps[-1][i])
            found[i] += label_weight * ce64(score, label) + soft_weight * kl64(logits[i], score, temperature)
            found[i] += hint_weight * np.sum(gap**2)
    return found


def an_exit_setting(seed):
    params = losses.init_exits(jax.random.key(seed), SHAPES, CLASSES, hidden=8)
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases that are not 0
    return params, [some(10 * seed + i, *shape) for i, shape in enumerate(SHAPES)], some(10 * seed + 9, B, CLASSES)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("numbers", [(3.0, 0.7, 0.3, 0.03), (1.0, 0.0, 1.0, 0.5), (8.0, 2.0, 0.1, 0.0)])
def test_exits_are_the_papers_formula(seed, numbers):
    params, taps, logits = an_exit_setting(seed)
    names = ("temperature", "label_weight", "soft_weight", "hint_weight")
    found = jax.jit(losses.exits)(params, taps, logits, LABELS, **dict(zip(names, numbers, strict=True)))
    assert found.shape == (B,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, exits64(params, taps, logits, LABELS, *numbers), rtol=1e-5)


def test_exit_logits_are_those_that_the_loss_trains():
    params, taps, _ = an_exit_setting(0)
    for number, found in enumerate(losses.exit_logits(params, taps)):
        want = [exit64(params[str(number)], taps[number][i]) for i in range(B)]
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_exits_teach_the_earlier_layers_and_never_the_last():
    params, taps, logits = an_exit_setting(3)
    total = lambda params, taps, logits: losses.exits(params, taps, logits, jnp.asarray(LABELS)).sum()
    by_params, by_taps, by_logits = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(params, taps, logits)
    assert not np.any(by_logits) and not np.any(by_taps[-1])
    for tap in by_taps[:-1]:
        assert np.all(np.any(tap, axis=tuple(range(1, tap.ndim))))  # every example, the unlabelled ones too
    assert all(np.any(leaf) for leaf in jax.tree.leaves(by_params))


def test_without_labels_exits_learn_from_the_last_classifier_alone():
    params, taps, logits = an_exit_setting(4)
    nobody = np.full(B, -1, np.int32)
    some_weight, none = (losses.exits(params, taps, logits, nobody, label_weight=weight) for weight in (5.0, 0.0))
    np.testing.assert_array_equal(some_weight, none)
    assert np.all(np.asarray(none) > 0)


def test_an_exit_that_says_and_holds_what_the_last_layer_does_has_nothing_to_learn():
    _, taps, _ = an_exit_setting(5)
    taps = [taps[-1], taps[-1]]
    params = losses.init_exits(jax.random.key(0), [SHAPES[-1]] * 2, CLASSES, projector="none")
    logits = losses.exit_logits(params, taps)[0]
    total = lambda params: losses.exits(params, taps, logits, LABELS, label_weight=0.0, projector="none").sum()
    value, grad = jax.jit(jax.value_and_grad(total))(params)
    assert abs(value) < 1e-6
    assert all(np.max(np.abs(leaf)) < 1e-5 for leaf in jax.tree.leaves(grad))


def test_one_exit_by_hand():
    """A linear student of one channel: the pooled tap is 3, the last feature 5, the hint passes on the tap."""
    taps = [jnp.array([[[[2.0]], [[4.0]]]]), jnp.array([[5.0]])]
    zeros = lambda *shape: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}
    params = {"0": {"classifier": {"in": zeros(1, 2), "out": zeros(2, 2)}, "hint": {}}}
    # The exit says (½, ½): cross-entropy ln 2; and so does the last classifier: no divergence.
    found = losses.exits(params, taps, jnp.zeros((1, 2)), jnp.array([1]), projector="none")
    np.testing.assert_allclose(found, [0.7 * np.log(2) + 0.03 * (5.0 - 3.0) ** 2], rtol=1e-6)


def test_a_hint_that_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="projector='linear' maps 3 channels to 7"):
        losses.init_exits(jax.random.key(0), SHAPES, CLASSES, projector="none")


def past64(logits, labels, past, seen, share):
    found = np.zeros(len(labels))
    for i, label in enumerate(labels):
        target = np.zeros(logits.shape[-1])
        if label >= 0:
            target[label] = 1.0
        if seen[i]:
            target = (1 - share) * target + share * past[i] if label >= 0 else np.asarray(past[i], np.float64)
        found[i] = -np.sum(target * np.log(softmax64(logits[i])))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_past_predictions_are_the_papers_target(seed, share):
    logits, past = some(seed, B, CLASSES), np.stack([softmax64(z) for z in some(seed + 50, B, CLASSES)])
    seen = np.array([True, False, True, True, False, False])
    found = jax.jit(losses.past_predictions)(logits, LABELS, past.astype(np.float32), seen, share=share)
    np.testing.assert_allclose(found, past64(logits, LABELS, past, seen, share), rtol=1e-5, atol=1e-7)
    assert found[5] == 0.0  # neither a label nor a past


def test_past_predictions_end_where_the_target_is_reached():
    """The gradient by the logits is softmax - target: 0 for what the student says already."""
    logits = some(4, B, CLASSES)
    past = jax.nn.softmax(logits)
    seen, unlabelled = np.ones(B, bool), np.full(B, -1, np.int32)
    total = lambda z, past, labels, share: losses.past_predictions(z, labels, past, seen, share=share).sum()
    by_logits, by_past = jax.jit(jax.grad(total, argnums=(0, 1)))(logits, past, unlabelled, 0.8)
    np.testing.assert_allclose(by_logits, 0.0, atol=1e-6)
    assert not np.any(by_past)
    labels = np.arange(B, dtype=np.int32) % CLASSES
    by_logits = jax.grad(total)(jnp.asarray(logits), past, labels, 0.8)
    np.testing.assert_allclose(by_logits, past - (0.2 * np.eye(CLASSES)[labels] + 0.8 * past), atol=1e-6)


def test_a_class_that_past_and_present_rule_out_changes_nothing():
    logits, past = some(6, B, CLASSES), np.asarray(jax.nn.softmax(some(7, B, CLASSES)))
    wide = np.concatenate([logits, np.full((B, 1), -np.inf, np.float32)], -1)
    seen = np.ones(B, bool)
    total = lambda z, past: losses.past_predictions(z, LABELS, past, seen).sum()
    value, grad = jax.value_and_grad(total)(jnp.asarray(wide), np.concatenate([past, np.zeros((B, 1), np.float32)], -1))
    want, want_grad = jax.value_and_grad(total)(jnp.asarray(logits), past)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad[:, :-1], want_grad, rtol=1e-5, atol=1e-7)
    assert not np.any(grad[:, -1])


def mutual64(peers, labels, temperature):
    found = np.zeros(len(labels))
    for i, label in enumerate(labels):
        for k in range(len(peers)):
            others = [kl64(peers[j, i], peers[k, i], temperature) for j in range(len(peers)) if j != k]
            found[i] += np.mean(others) + (ce64(peers[k, i], label) if k else 0.0)
    return found


@pytest.mark.parametrize("students", [2, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mutual_is_the_papers_formula(students, temperature):
    peers = some(students, students, B, CLASSES)
    found = jax.jit(losses.mutual)(peers, LABELS, temperature=temperature)
    assert found.shape == (B,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, mutual64(peers, LABELS, temperature), rtol=1e-5)


def test_each_student_has_the_gradient_of_its_own_loss_alone():
    """∂L_k/∂z_k = p_k - mean of the others + (p_k - onehot), where it has a label and is not the main one (T = 1)."""
    peers = some(8, 3, B, CLASSES)
    grad = jax.jit(jax.grad(lambda peers: losses.mutual(peers, LABELS).sum()))(peers)
    for k in range(3):
        for i, label in enumerate(LABELS):
            said = [softmax64(peer[i]) for peer in peers]
            want = said[k] - np.mean([said[j] for j in range(3) if j != k], axis=0)
            if k and label >= 0:
                want = want + said[k] - np.eye(CLASSES)[label]
            np.testing.assert_allclose(grad[k, i], want, rtol=1e-4, atol=2e-6)


def test_students_that_agree_have_nothing_to_teach():
    peers = np.broadcast_to(some(9, 1, B, CLASSES), (3, B, CLASSES))
    unlabelled = np.full(B, -1, np.int32)
    value, grad = jax.jit(jax.value_and_grad(lambda p: losses.mutual(p, unlabelled, temperature=2.0).sum()))(peers)
    assert abs(value) < 1e-5 and np.max(np.abs(grad)) < 1e-5


def test_the_order_of_the_other_students_does_not_matter():
    peers = some(10, 4, B, CLASSES)
    found, other = (losses.mutual(x, LABELS) for x in (peers, peers[[0, 3, 1, 2]]))
    np.testing.assert_allclose(found, other, rtol=1e-6)


def curriculum64(tau, logits, teacher, lowest, span):
    temperature = lowest + span / (1.0 + np.exp(-np.float64(tau)))
    return np.array([kl64(t, z, temperature) for z, t in zip(logits, teacher, strict=True)])


@pytest.mark.parametrize("tau", [-3.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(("lowest", "span"), [(1.0, 20.0), (2.0, 5.0)])
def test_the_curriculum_is_kl_at_its_temperature(tau, lowest, span):
    logits, teacher = some(11, B, CLASSES), some(12, B, CLASSES)
    loss = lambda tau, z: losses.curriculum_temperature(
        {"temperature": tau}, z, lambda _: teacher, reversal=0.7, lowest=lowest, span=span
    )
    found = jax.jit(loss)(jnp.float32(tau), logits)
    np.testing.assert_allclose(found, curriculum64(tau, logits, teacher, lowest, span), rtol=1e-5)


@pytest.mark.parametrize("reversal", [0.0, 0.4, 1.0])
def test_reversal_turns_the_temperatures_gradient_and_leaves_the_students(reversal):
    logits, teacher, tau = some(13, B, CLASSES), some(14, B, CLASSES), 0.3
    total = lambda tau, z: losses.curriculum_temperature(
        {"temperature": tau}, z, lambda _: teacher, reversal=reversal
    ).sum()
    by_tau, by_logits = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.float32(tau), logits)
    ends = [curriculum64(tau + step, logits, teacher, 1.0, 20.0).sum() for step in (1e-5, -1e-5)]
    true = (ends[0] - ends[1]) / 2e-5
    assert abs(true) > 0.1
    np.testing.assert_allclose(by_tau, -reversal * true, rtol=1e-4, atol=1e-6)
    temperature = 1.0 + 20.0 / (1.0 + np.exp(-tau))
    for i in range(B):
        want = temperature * (softmax64(logits[i], temperature) - softmax64(teacher[i], temperature))
        np.testing.assert_allclose(by_logits[i], want, rtol=1e-4, atol=1e-6)


def test_a_step_against_the_curriculum_makes_it_harder():
    logits, teacher = some(15, B, CLASSES), some(16, B, CLASSES)
    total = lambda tau: losses.curriculum_temperature({"temperature": tau}, logits, lambda _: teacher).sum()
    tau = jnp.float32(0.0)
    assert total(tau - 0.1 * jax.grad(total)(tau)) > total(tau)


def test_the_curriculum_asks_the_teachers_at_its_temperature():
    asked = []
    losses.curriculum_temperature(
        {"temperature": jnp.float32(0.0)}, jnp.zeros((1, 2)), lambda t: asked.append(t) or jnp.ones((1, 2))
    )
    np.testing.assert_allclose(asked, [11.0], rtol=1e-6)


def test_equal_logits_leave_nothing_to_learn_at_any_temperature():
    logits = some(17, B, CLASSES)
    total = lambda tau, z: losses.curriculum_temperature({"temperature": tau}, z, lambda _: logits).sum()
    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.float32(1.0), logits)
    assert abs(value) < 1e-4 and all(np.max(np.abs(grad)) < 1e-4 for grad in grads)


def test_bfloat16_logits_are_compared_in_float32():
    peers, past = jnp.asarray(some(18, 2, B, CLASSES), jnp.bfloat16), jax.nn.softmax(some(19, B, CLASSES))
    wide = peers.astype(jnp.float32)
    seen = np.ones(B, bool)
    np.testing.assert_allclose(losses.mutual(peers, LABELS), losses.mutual(wide, LABELS), rtol=1e-6)
    np.testing.assert_allclose(
        losses.past_predictions(peers[0], LABELS, past, seen),
        losses.past_predictions(wide[0], LABELS, past, seen),
        rtol=1e-6,
    )

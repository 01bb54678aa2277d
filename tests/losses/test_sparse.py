"""The sparse losses against float64 NumPy, against the dense divergence, and on the identities they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import losses
from kdjax.errors import UserError
from kdjax.losses.sparse import _inverted, draw, sparse_kl, top_k


@jax.jit
def value_and_gradient(student, ids, log_probs, log_rest):
    """The loss at each position, and the gradient of their sum."""
    total = lambda z: (lambda loss: (loss.sum(), loss))(sparse_kl(z, ids, log_probs, log_rest))
    gradient, loss = jax.grad(total, has_aux=True)(student)
    return loss, gradient


dense = jax.jit(jax.value_and_grad(lambda student, teacher: losses.kl(student, teacher).sum()))
jit_top_k = jax.jit(top_k, static_argnums=1)
jit_draw = jax.jit(draw, static_argnums=2)


def some_logits(seed, shape=(3, 5, 11), scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax64(logits):
    exp = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def formula(student, ids, log_probs, log_rest):
    """KL over the buckets, one position and one bucket at a time, float64."""
    q = softmax64(student)
    loss = np.zeros(q.shape[:-1])
    for at in np.ndindex(loss.shape):
        pairs = [(np.exp(log_p), q[at][i]) for i, log_p in zip(ids[at], log_probs[at], strict=True) if log_p > -np.inf]
        named = {i for i, log_p in zip(ids[at], log_probs[at], strict=True) if log_p > -np.inf}
        pairs.append((np.exp(log_rest[at]), sum(q[at][j] for j in range(q.shape[-1]) if j not in named)))
        loss[at] = sum(p * np.log(p / share) for p, share in pairs if p > 0)
    return loss


def as64(signal):
    ids, log_probs, log_rest = signal
    return np.asarray(ids), np.asarray(log_probs, np.float64), np.asarray(log_rest, np.float64)


def numerical_gradient(function, x, eps=1e-5):
    x = np.asarray(x, np.float64)
    grad = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = eps
        grad[i] = (function(x + step) - function(x - step)) / (2 * eps)
    return grad


SIGNALS = {
    "top_1": lambda teacher: jit_top_k(teacher, 1),
    "top_4": lambda teacher: jit_top_k(teacher, 4),
    "all": lambda teacher: jit_top_k(teacher, teacher.shape[-1]),
    "drawn": lambda teacher: jit_draw(jax.random.key(7), teacher, 9),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_sparse_kl_is_the_formula_over_buckets(name):
    student, teacher = some_logits(0), some_logits(1)
    signal = SIGNALS[name](teacher)
    loss, gradient = value_and_gradient(student, *signal)
    assert loss.shape == (3, 5) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula(student, *as64(signal)), rtol=1e-5, atol=1e-6)
    student, signal = student[:1, :2], jax.tree.map(lambda x: x[:1, :2], signal)
    want = numerical_gradient(lambda z: formula(z, *as64(signal)).sum(), student)
    np.testing.assert_allclose(gradient[:1, :2], want, rtol=1e-4, atol=1e-6)


def test_three_classes_by_hand():
    teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    ids, log_probs, log_rest = top_k(teacher, 1)
    np.testing.assert_array_equal(ids, [0])
    np.testing.assert_allclose([log_probs[0], log_rest], np.log([0.5, 0.5]), rtol=1e-6)
    # Buckets (½, ½) and (¼, ¾): ½ ln 2 + ½ ln ⅔.
    loss, gradient = value_and_gradient(student, ids, log_probs, log_rest)
    np.testing.assert_allclose(loss, 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
    # q_0 - p_0, and for the others (1 - r / q_r) q_j with r / q_r = ⅔.
    np.testing.assert_allclose(gradient, [-0.25, 0.25 / 3, 0.5 / 3], rtol=1e-6)
    # Four draws, three of class 0 and one of class 2: Σ c ln (c / q), gradient q - c.
    drawn = jnp.array([0, 2, 0, 0]), jnp.log(jnp.array([0.75, 0.25, 0.0, 0.0])), -jnp.inf * jnp.ones(())
    loss, gradient = value_and_gradient(student, *drawn)
    np.testing.assert_allclose(loss, 0.75 * np.log(3) + 0.25 * np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.5, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("classes, k", [(3, 1), (3, 3), (50_000, 20)])
def test_equal_models_give_no_loss_and_no_gradient_under_jit_in_bfloat16(classes, k):
    logits = jnp.asarray(some_logits(4, (4, classes), 8.0), jnp.bfloat16)
    both = jax.jit(lambda student, teacher: value_and_gradient(student, *top_k(teacher, k)))
    for signal in (jit_top_k(logits, k), None):  # made in another program, and in the same
        loss, gradient = both(logits, logits) if signal is None else value_and_gradient(logits, *signal)
        assert gradient.dtype == jnp.bfloat16
        assert jnp.max(jnp.abs(loss)) < 1e-6 and jnp.max(jnp.abs(gradient)) < 2e-6


def test_finer_buckets_never_give_less_and_all_classes_give_the_dense_divergence():
    student, teacher = some_logits(5, (40, 11)), some_logits(6, (40, 11))
    values = np.stack([value_and_gradient(student, *jit_top_k(teacher, k))[0] for k in (1, 3, 7, 10, 11)])
    assert np.all(np.diff(values, axis=0) > -1e-6) and np.all(values >= 0)
    assert np.all(values[-1] > values[0] + 1e-3)  # the chain has something to show
    np.testing.assert_allclose(values[-1], losses.kl(student, teacher), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values[-1], values[-2])  # one other class is a bucket of its own
    gradient = value_and_gradient(student, *jit_top_k(teacher, 11))[1]
    np.testing.assert_allclose(gradient, dense(student, teacher)[1], rtol=1e-4, atol=1e-6)


def test_top_k_is_the_float64_softmax():
    logits = some_logits(7, (4, 300))
    ids, log_probs, log_rest = jit_top_k(logits, 20)
    p = softmax64(logits)
    want = np.argsort(-p, -1)[:, :20]
    np.testing.assert_array_equal(ids, want)
    assert ids.dtype == jnp.int32 and log_probs.dtype == log_rest.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(log_probs), np.take_along_axis(p, want, -1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_rest), np.sort(p, -1)[:, :-20].sum(-1), rtol=1e-5)
    assert np.all(np.isneginf(jit_top_k(logits, 300)[2]))


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 200.0])
def test_a_faint_rest_is_as_exact_as_a_large_one(gap):
    """The classes kept hold all but e^-gap: 1 - Σ q would be 0, or nothing but rounding."""
    teacher = np.where(np.arange(50) < 3, 0.0, -gap).astype(np.float32) + some_logits(8, (2, 50), 1.0)
    student = np.where(np.arange(50) < 3, 0.0, -1.1 * gap).astype(np.float32) + some_logits(9, (2, 50), 1.0)
    signal = jit_top_k(teacher, 3)
    t, s = (np.asarray(x, np.float64) for x in (teacher, student))
    log_r = np.log(np.exp(t[:, 3:]).sum(-1)) - np.log(np.exp(t).sum(-1))
    log_q_r = np.log(np.exp(s[:, 3:]).sum(-1)) - np.log(np.exp(s).sum(-1))
    np.testing.assert_allclose(signal[2], log_r, rtol=1e-5)
    loss, gradient = value_and_gradient(student, *signal)
    np.testing.assert_allclose(loss, formula(student, *as64(signal)), rtol=2e-5, atol=1e-6)
    q = softmax64(student)[:, 3:]
    want = q * (1 - np.exp(log_r - log_q_r))[:, None]
    np.testing.assert_allclose(gradient[:, 3:], want, rtol=1e-4, atol=1e-37)
    # A ratio r / q_r beyond float32, where r q_j / q_r is not.
    even = signal[0], jax.nn.log_softmax(signal[1]) + np.log(0.5), jnp.full((2,), np.log(0.5))
    loss, gradient = value_and_gradient(student, *even)
    assert np.all(np.isfinite(loss))
    np.testing.assert_allclose(gradient[:, 3:].sum(-1), np.exp(log_q_r) - 0.5, rtol=1e-4)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=5e-6)


# Classes that cannot be, and places that say nothing.


def test_ruled_out_classes_are_those_of_the_dense_divergence():
    student, teacher = some_logits(10, (4, 11)), some_logits(11, (4, 11))
    student[:, 3], teacher[:, 3] = -np.inf, -np.inf  # both: nothing
    teacher[:, 5] = -np.inf  # the teacher alone: the student is pushed off it
    for k in (11, 9, 2):
        loss, gradient = value_and_gradient(student, *jit_top_k(teacher, k))
        assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gradient)) and not np.any(gradient[:, 3])
        if k > 2:
            np.testing.assert_allclose(loss, losses.kl(student, teacher), rtol=1e-5)
            np.testing.assert_allclose(gradient, dense(student, teacher)[1], rtol=1e-4, atol=1e-6)
    loss, gradient = value_and_gradient(teacher, *jit_top_k(student, 10))  # now the student alone: infinite
    assert np.all(np.isposinf(loss)) and not np.any(np.isnan(gradient)) and not np.any(gradient[:, 5])
    alone = np.where(np.arange(11) == np.asarray(jit_top_k(teacher, 1)[0]), 0.0, -np.inf).astype(np.float32)
    loss, gradient = value_and_gradient(alone, *jit_top_k(teacher, 1))  # nothing where the teacher has the rest
    assert np.all(np.isposinf(loss)) and not np.any(np.isnan(gradient))


def test_empty_places_say_nothing_wherever_they_are():
    student, (ids, log_probs, log_rest) = some_logits(12), jit_draw(jax.random.key(0), some_logits(13), 6)
    want = value_and_gradient(student, ids, log_probs, log_rest)
    assert np.any(np.isneginf(log_probs))
    for number in (0, 5, 10):
        other = jnp.where(jnp.isneginf(log_probs), number, ids)
        more = jnp.full((3, 5, 2), -jnp.inf)
        padded = jnp.concatenate([other, other[..., :2]], -1), jnp.concatenate([log_probs, more], -1), log_rest
        order = jnp.array([6, 2, 1, 0, 7, 3, 5, 4])
        for signal in (padded, (padded[0][..., order], padded[1][..., order], log_rest)):
            loss, gradient = value_and_gradient(student, *signal)
            np.testing.assert_allclose(loss, want[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-6)
    nothing = value_and_gradient(student, ids, jnp.full_like(log_probs, -jnp.inf), jnp.zeros_like(log_rest))
    np.testing.assert_allclose(nothing[0], 0, atol=1e-6)
    np.testing.assert_allclose(nothing[1], 0, atol=1e-6)


def test_a_signal_rounded_to_float16_never_gives_a_negative_divergence():
    logits = some_logits(14, (500, 40))
    ids, log_probs, log_rest = jit_top_k(logits, 8)
    rounded = log_probs.astype(jnp.float16)
    loss, gradient = value_and_gradient(logits, ids, rounded, log_rest)
    assert np.min(loss) > -2e-7 and np.max(loss) < 1e-5
    assert np.min(formula(logits, *as64((ids, rounded, log_rest)))) < -1e-4  # as the bare sum is
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


# Drawn signals.


def test_a_draw_is_a_distribution_over_distinct_classes():
    logits = some_logits(15, (4, 6, 30))
    logits[..., ::3] = -np.inf
    ids, log_probs, log_rest = (np.asarray(x) for x in jit_draw(jax.random.key(1), logits, 20))
    assert ids.shape == log_probs.shape == (4, 6, 20) and ids.dtype == np.int32 and log_probs.dtype == np.float32
    assert log_rest.shape == (4, 6) and np.all(np.isneginf(log_rest))
    for at in np.ndindex(4, 6):
        there = log_probs[at] > -np.inf
        assert np.all(np.diff(ids[at][there]) > 0) and np.all(ids[at][there] % 3) and not np.any(ids[at][~there])
        assert np.all(np.diff(there.astype(int)) <= 0)  # the empty places are the last
        counts = np.exp(log_probs[at][there]) * 20
        np.testing.assert_allclose(counts, np.round(counts), rtol=1e-5)
        assert np.round(counts).sum() == 20
    again = jit_draw(jax.random.key(1), logits, 20)
    np.testing.assert_array_equal(again[0], ids)
    assert np.any(jit_draw(jax.random.key(2), logits, 20)[0] != ids)
    one = jit_draw(jax.random.key(1), np.zeros((2, 1), np.float32), 5)
    np.testing.assert_array_equal(one[1], [[0] + [-np.inf] * 4] * 2)


@pytest.mark.parametrize("classes", [17, 20_011])
def test_draws_have_the_frequencies_of_the_softmax(classes):
    """Two million draws, in bins of classes of about equal probability; the bins of rare classes among them."""
    rng = np.random.default_rng(16)
    logits = (-1.3 * np.log1p(np.arange(classes)))[rng.permutation(classes)].astype(np.float32)
    logits[rng.permutation(classes)[: classes // 10]] = -np.inf
    samples, batches = 500, 40
    one = jax.jit(jax.vmap(lambda key: draw(key, jnp.asarray(logits), samples)))
    counts = np.zeros(classes)
    for batch in range(batches):
        ids, log_probs, _ = one(jax.random.split(jax.random.key(batch), 100))
        np.add.at(
            counts, np.asarray(ids).ravel(), np.round(np.exp(np.asarray(log_probs, np.float64)) * samples).ravel()
        )
    p, total = softmax64(logits), samples * batches * 100
    assert counts.sum() == total and not np.any(counts[p == 0])
    order = np.argsort(p)
    bins = np.minimum((np.cumsum(p[order]) * 60).astype(int), 59)
    mass, seen = np.bincount(bins, p[order], 60), np.bincount(bins, counts[order], 60)
    mass, seen = mass[(mass > 0) & (mass < 1)], seen[(mass > 0) & (mass < 1)]
    z = (seen - total * mass) / np.sqrt(total * mass * (1 - mass))
    assert np.max(np.abs(z)) < 4, z
    assert np.mean(z**2) < 1 + 5 * np.sqrt(2 / len(z))


def test_the_smallest_and_largest_random_numbers_draw_possible_classes():
    for masses in ([0.0, 1.0, 0.0, 1e-30, 2.7, 0.0], [0.0, 0.1, 0.0, 0.3, 0.7, 0.0], [0.0, *np.full(500, 0.1), 0.0]):
        logits = jnp.log(jnp.array(masses))
        drawn = _inverted(logits[None], jnp.array([0.0, 1.0 - 2.0**-23]))
        np.testing.assert_array_equal(drawn, [1, len(masses) - 2])


def test_the_drawn_gradient_is_that_of_soft_target_cross_entropy():
    student, (ids, log_probs, log_rest) = (
        some_logits(17, (6, 11)),
        jit_draw(jax.random.key(3), some_logits(18, (6, 11)), 5),
    )
    target = np.zeros((6, 11))
    for i, row in enumerate(np.asarray(ids)):
        np.add.at(target[i], row, np.exp(np.asarray(log_probs[i], np.float64)))
    gradient = value_and_gradient(student, ids, log_probs, log_rest)[1]
    np.testing.assert_allclose(gradient, softmax64(student) - target, rtol=1e-4, atol=1e-6)


def test_the_drawn_gradient_is_unbiased_and_that_of_renormalised_top_k_is_not():
    """z-scores of the mean gradient over 4,000 draws: of the size of chance; those of top-k are in the hundreds."""
    student, teacher = some_logits(19, (64,), 1.0), some_logits(20, (64,), 1.5)
    want = np.asarray(dense(student, teacher)[1], np.float64)
    drawn = jax.vmap(lambda key: value_and_gradient(student, *draw(key, jnp.asarray(teacher), 50))[1])
    gradients = np.asarray(jax.jit(drawn)(jax.random.split(jax.random.key(4), 4000)), np.float64)
    error = gradients.std(0, ddof=1) / np.sqrt(len(gradients))
    z = (gradients.mean(0) - want) / error
    assert np.max(np.abs(z)) < 4 and 0.5 < np.mean(z**2) < 1.6, z
    ids, log_probs, _ = top_k(jnp.asarray(teacher), 8)
    renormalised = ids, jax.nn.log_softmax(log_probs), -jnp.inf * jnp.ones(())
    biased = (np.asarray(value_and_gradient(student, *renormalised)[1]) - want) / error
    assert np.mean(np.abs(biased) > 4) > 0.9 and np.max(np.abs(biased)) > 100, biased


# How it runs, and what it refuses.


def test_positions_on_several_devices_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", *[None] * (x.ndim - 1))))
    student, signal = some_logits(21, (8, 3, 40)), jit_top_k(some_logits(22, (8, 3, 40)), 4)
    want = value_and_gradient(student, *signal)
    arguments = [place(x) for x in (student, *signal)]
    for got, expected in zip(value_and_gradient(*arguments), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    program = value_and_gradient.lower(*arguments).compile().as_text()
    assert "all-gather" not in program and "all-to-all" not in program
    made = jax.jit(lambda key, z: (top_k(z, 4), draw(key, z, 9)))
    assert "all-gather" not in made.lower(jax.random.key(0), arguments[0]).compile().as_text()


def test_bad_input_is_one_sentence():
    z = jnp.zeros((2, 3))
    ids, log_probs, log_rest = top_k(z, 2)
    for k in (0, 4):
        with pytest.raises(UserError, match="choose k from 1 to 3"):
            top_k(z, k)
    with pytest.raises(UserError, match="draw at least 1"):
        draw(jax.random.key(0), z, 0)
    for signal in (
        (ids, log_probs[:1], log_rest),
        (ids[0], log_probs[0], log_rest),
        (ids, log_probs, log_rest[:, None]),
    ):
        with pytest.raises(UserError, match=r"logits of shape \(2, 3\) need ids"):
            sparse_kl(z, *signal)

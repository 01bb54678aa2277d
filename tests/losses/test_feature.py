"""Feature losses without parameters: the papers' formulas in float64, the originals' outputs, and their identities."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import feature

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "feature.npz")

ANY_CHANNELS = {
    "at": feature.attention_transfer,
    "at_1": partial(feature.attention_transfer, power=1.0),
    "at_1.5": partial(feature.attention_transfer, power=1.5),
    "at_repdistiller": partial(feature.attention_transfer, variant="repdistiller"),
    "nst_linear": partial(feature.nst, kernel="linear"),
    "nst_polynomial": feature.nst,
    "nst_gaussian": partial(feature.nst, kernel="gaussian"),
    "nst_gaussian_0.5": partial(feature.nst, kernel="gaussian", squared_bandwidth=0.5),
}
EQUAL_CHANNELS = {
    "hint": feature.hint,
    "hint_repdistiller": partial(feature.hint, variant="repdistiller"),
    "simkd": feature.simkd,
    "simkd_simkd": partial(feature.simkd, variant="simkd"),
    "hcl": feature.hierarchical_context,
}
LOSSES = ANY_CHANNELS | EQUAL_CHANNELS
IMAGES_ONLY = ("hcl",)


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The formulas, one example at a time in float64 and loops over channels: nothing shared with the implementation.
def unit64(v):
    length = np.sqrt((v**2).sum())
    return v / length if length > 0 else v


def at64(s, t, power=2.0, mean=False):
    map_s, map_t = (unit64(sum(np.abs(x[..., c]).ravel() ** power for c in range(x.shape[-1]))) for x in (s, t))
    squares = (map_s - map_t) ** 2
    return squares.mean() if mean else np.sqrt(squares.sum())


def nst64(s, t, kernel):
    s, t = ([unit64(x[..., c].ravel()) for c in range(x.shape[-1])] for x in (s, t))
    mean = lambda one, other, k: np.mean([[k(a, b) for b in other] for a in one])
    if kernel == "linear":
        k = lambda a, b: a @ b
    elif kernel == "polynomial":
        k = lambda a, b: (a @ b) ** 2
    else:
        squared = mean(s, t, lambda a, b: ((a - b) ** 2).sum()) if kernel == "gaussian" else kernel
        k = lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * squared))
    return mean(t, t, k) + mean(s, s, k) - 2 * mean(s, t, k)


def hcl64(s, t):
    losses, weights = [((s - t) ** 2).mean()], [1.0]
    for level in (4, 2, 1):
        if level < s.shape[0]:
            losses.append(((pool64(s, level) - pool64(t, level)) ** 2).mean())
            weights.append(0.5 ** len(weights))
    return np.dot(losses, weights) / np.sum(weights)


def pool64(x, n):
    bins = lambda m: [slice(i * m // n, -(-(i + 1) * m // n)) for i in range(n)]
    return np.array([[x[r, c].mean((0, 1)) for c in bins(x.shape[1])] for r in bins(x.shape[0])])


FORMULAS = {
    "at": at64,
    "at_1": partial(at64, power=1.0),
    "at_1.5": partial(at64, power=1.5),
    "at_repdistiller": partial(at64, mean=True),
    "nst_linear": partial(nst64, kernel="linear"),
    "nst_polynomial": partial(nst64, kernel="polynomial"),
    "nst_gaussian": partial(nst64, kernel="gaussian"),
    "nst_gaussian_0.5": partial(nst64, kernel=0.5),
    "hint": lambda s, t: 0.5 * ((s - t) ** 2).sum(),
    "hint_repdistiller": lambda s, t: ((s - t) ** 2).mean(),
    "simkd": lambda s, t: ((s - t) ** 2).sum(),
    "simkd_simkd": lambda s, t: ((s - t) ** 2).mean(),
    "hcl": hcl64,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 9, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_the_papers_formulas(name, shape, seed):
    if name in IMAGES_ONLY and len(shape) == 3:
        return
    channels = 7 if name in ANY_CHANNELS else shape[-1]
    student, teacher = some(seed, *shape), some(seed + 10, *shape[:-1], channels)
    got = jax.jit(LOSSES[name])(student, teacher)
    assert got.shape == shape[:1] and got.dtype == jnp.float32
    want = [FORMULAS[name](s, t) for s, t in zip(student.astype(np.float64), teacher.astype(np.float64), strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


GOLDEN_CASES = {
    "at_repdistiller": ("at_repdistiller", "student", "teacher"),
    "at_repdistiller_small": ("at_repdistiller", "student", "small_teacher"),
    "at_paper": ("at", "student", "teacher"),
    "nst": ("nst_polynomial", "student", "teacher"),
    "nst_small": ("nst_polynomial", "student", "small_teacher"),
    "hint": ("hint_repdistiller", "same", "student"),
    "simkd": ("simkd_simkd", "teacher", "small_teacher"),
    "hcl": ("hcl", "same", "student"),
}


@pytest.mark.parametrize("key", GOLDEN_CASES)
def test_losses_give_the_originals_values(key):
    name, student, teacher = GOLDEN_CASES[key]
    np.testing.assert_allclose(jax.jit(LOSSES[name])(GOLDEN[student], GOLDEN[teacher]), GOLDEN[key], rtol=1e-5)


def test_attention_transfer_power_may_be_traced():
    s, t = GOLDEN["student"], GOLDEN["teacher"]
    loss = jax.jit(partial(feature.attention_transfer, variant="repdistiller"))
    np.testing.assert_allclose(loss(s, t, power=4.0), GOLDEN["at_repdistiller_power4"], rtol=1e-5)
    powers = jnp.array([1.0, 2.0, 4.0])
    mapped = jax.jit(jax.vmap(lambda p: feature.attention_transfer(s, t, power=p)))(powers)
    for power, got in zip((1.0, 2.0, 4.0), mapped, strict=True):
        np.testing.assert_allclose(got, feature.attention_transfer(s, t, power=power), rtol=1e-5)
    assert jnp.all(jnp.isfinite(jax.grad(lambda p: feature.attention_transfer(s, t, power=p).sum())(0.5)))


def test_attention_transfer_by_hand():
    """Maps (3², 4²) -> and (1, 0): the angle's cosine is 9 / √(81 + 256), the distance √(2 - 2 cos)."""
    student, teacher = jnp.array([[[3.0], [-4.0]]]), jnp.array([[[2.0, -1.0], [0.0, 0.0]]])
    distance = np.sqrt(2 - 2 * 9 / np.sqrt(337))
    np.testing.assert_allclose(feature.attention_transfer(student, teacher), [distance], rtol=1e-6)
    mean = feature.attention_transfer(student, teacher, variant="repdistiller")
    np.testing.assert_allclose(mean, [distance**2 / 2], rtol=1e-6)


def test_nst_by_hand():
    """One student channel (1, 0); teacher channels (1, 0) and (0, 1): linear 1 + ½ - 2·½; the squares are the same."""
    student, teacher = jnp.array([[[2.0], [0.0]]]), jnp.array([[[5.0, 0.0], [0.0, 7.0]]])
    np.testing.assert_allclose(feature.nst(student, teacher, kernel="linear"), [0.5], rtol=1e-6)
    np.testing.assert_allclose(feature.nst(student, teacher), [0.5], rtol=1e-6)
    # Gaussian: squared distances are 0 and 2, their mean over student-teacher pairs 1, so k = 1 or 1/e.
    want = 1 + (2 + 2 / np.e) / 4 - 2 * (1 + 1 / np.e) / 2
    np.testing.assert_allclose(feature.nst(student, teacher, kernel="gaussian"), [want], rtol=1e-6)


def test_regression_by_hand():
    student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0]])
    for name, want in {"hint": 6.5, "hint_repdistiller": 6.5, "simkd": 13.0, "simkd_simkd": 6.5}.items():
        np.testing.assert_allclose(LOSSES[name](student, teacher), [want], rtol=1e-6)


def test_hierarchical_context_by_hand():
    """2x2, difference 1 in one pixel: ¼ at full size, (¼)² pooled to 1x1; no other level is smaller."""
    student = jnp.zeros((1, 2, 2, 1)).at[0, 0, 0, 0].set(1.0)
    want = (1 / 4 + 1 / 2 * 1 / 16) / 1.5
    np.testing.assert_allclose(feature.hierarchical_context(student, jnp.zeros((1, 2, 2, 1))), [want], rtol=1e-6)


@jax.jit
def every_gradient(student, teacher):
    total = lambda loss: lambda s, t: loss(s, t).sum()
    return {name: jax.value_and_grad(total(loss), argnums=(0, 1))(student, teacher) for name, loss in LOSSES.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_features_give_no_loss_and_no_gradient(dtype):
    x = jnp.asarray(some(2, 3, 6, 6, 5), dtype)
    for name, (value, grads) in every_gradient(x, x).items():
        assert abs(value) < 2e-6, name
        for grad in grads:
            assert grad.dtype == dtype and jnp.max(jnp.abs(grad)) < 2e-6, name


def test_gradients_are_finite_at_zeros_and_dead_channels():
    x = some(3, 3, 6, 6, 5)
    dead = x.copy()
    dead[..., 1] = 0
    dead[0] = 0
    tiny = (x * 1e-20).astype(np.float32)
    zeros = np.zeros_like(x)
    pairs = ((zeros, x), (x, zeros), (zeros, zeros), (dead, x), (x, dead), (dead, dead), (tiny, x), (x, tiny))
    for pair in pairs:
        for name, (value, grads) in every_gradient(*pair).items():
            assert jnp.isfinite(value), name
            assert all(jnp.all(jnp.isfinite(grad)) for grad in grads), name
    for name, (_, (grad, _)) in every_gradient(dead, x).items():
        assert name.startswith(("hint", "simkd", "hcl")) or not jnp.any(grad[0]), name


def test_gradients_are_those_of_the_formula():
    student, teacher = some(4, 1, 4, 4, 3), some(5, 1, 4, 4, 3)
    grads = every_gradient(student, teacher)
    step = some(6, 4, 4, 3).astype(np.float64)
    for name in sorted(set(LOSSES) - {"nst_gaussian"}):  # whose bandwidth is held constant
        f = lambda h, name=name: FORMULAS[name](student[0] + h * step, teacher[0].astype(np.float64))
        want = (f(1e-5) - f(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.vdot(grads[name][1][0][0], step), want, rtol=1e-4, atol=1e-6, err_msg=name)


def test_examples_do_not_touch_each_other():
    student, teacher = some(7, 4, 6, 6, 5), some(8, 4, 6, 6, 5)
    order = np.array([2, 0, 3, 1])
    for name, loss in LOSSES.items():
        value = jax.jit(loss)(student, teacher)
        np.testing.assert_allclose(jax.jit(loss)(student[order], teacher[order]), value[order], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(jax.jit(loss)(student[:2], teacher[:2]), value[:2], rtol=1e-6, err_msg=name)
        student[3] = np.nan  # of another example, such as a padded one
        np.testing.assert_allclose(jax.jit(loss)(student, teacher)[:3], value[:3], rtol=1e-6, err_msg=name)
        student[3] = some(7, 4, 6, 6, 5)[3]


def test_bfloat16_features_are_compared_in_float32():
    student, teacher = (jnp.asarray(some(seed, 2, 6, 6, 5), jnp.bfloat16) for seed in (9, 10))
    for name, loss in LOSSES.items():
        want = [FORMULAS[name](np.float64(s), np.float64(t)) for s, t in zip(student, teacher, strict=True)]
        np.testing.assert_allclose(jax.jit(loss)(student, teacher), want, rtol=1e-5, err_msg=name)


def test_scale_of_a_feature_does_not_matter_where_it_is_normalised():
    student, teacher = some(11, 2, 5, 5, 4), some(12, 2, 5, 5, 6)
    for name, loss in ANY_CHANNELS.items():
        np.testing.assert_allclose(loss(3 * student, teacher / 7), loss(student, teacher), rtol=2e-5, err_msg=name)


def test_bad_input_is_one_sentence():
    image, wide, vector = jnp.zeros((2, 4, 4, 32)), jnp.zeros((2, 4, 4, 64)), jnp.zeros((2, 32))
    for loss in EQUAL_CHANNELS.values():
        with pytest.raises(UserError, match=r"a projector \('linear'\) maps 32 channels to 64"):
            loss(image, wide)
        with pytest.raises(UserError, match=r"layers of the same kind|needs images"):
            loss(vector, wide)
    for loss in ANY_CHANNELS.values():
        with pytest.raises(UserError, match="a single position"):
            loss(vector, vector)
        with pytest.raises(UserError, match="number of tokens"):
            loss(jnp.zeros((2, 4, 3)), jnp.zeros((2, 5, 3)))
    for loss in (feature.attention_transfer, feature.hint, feature.simkd):
        with pytest.raises(UserError, match="unknown variant 'papr': did you mean 'paper'"):
            loss(image, image, variant="papr")
    with pytest.raises(UserError, match="did you mean 'gaussian'"):
        feature.nst(image, image, kernel="gauss")

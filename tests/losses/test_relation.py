"""The relation losses against float64 loops, the public code's output, hand-computed cases, and their invariances."""

import itertools
from functools import partial
from math import exp, factorial, log, sqrt
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import relation

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "relation.npz")

# Between examples: (student, teacher, mask) -> scalar.
RELATIONS = {
    "rkd_distance": relation.rkd_distance,
    "rkd_distance_repdistiller": partial(relation.rkd_distance, variant="repdistiller"),
    "rkd_angle": relation.rkd_angle,
    "rkd_angle_repdistiller": partial(relation.rkd_angle, variant="repdistiller"),
    "similarity_preserving": relation.similarity_preserving,
    "correlation": relation.correlation_congruence,
    "correlation_3": partial(relation.correlation_congruence, inverse_width=0.7, order=3),
    "pkt": relation.pkt,
    "pkt_repdistiller": partial(relation.pkt, variant="repdistiller"),
    "cka": relation.cka,
}


# All of them in one program.
@jax.jit
def losses_and_gradients(student, teacher, mask=None):
    return {name: jax.value_and_grad(loss)(student, teacher, mask) for name, loss in RELATIONS.items()}


def every_loss(*args):
    return {name: loss for name, (loss, _) in losses_and_gradients(*args).items()}


def every_gradient(*args):
    return {name: grad for name, (_, grad) in losses_and_gradients(*args).items()}


# The papers' formulas as loops in float64 over lists of examples: nothing shared with the implementation.


def unit64(v):
    length = np.sqrt(np.sum(v * v))
    return v / length if length > 0 else v


def huber64(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance64(s, t, denominator=lambda n: n * (n - 1)):
    pairs = list(itertools.permutations(range(len(s)), 2))
    length = lambda x, i, j: np.sqrt(np.sum((x[i] - x[j]) ** 2))
    mean = lambda x: sum(length(x, i, j) for i, j in pairs) / len(pairs)
    mean_s, mean_t = mean(s), mean(t)
    total = sum(huber64(length(s, i, j) / mean_s - length(t, i, j) / mean_t) for i, j in pairs)
    return total / denominator(len(s))


def rkd_angle64(s, t, denominator=lambda n: n * (n - 1) * (n - 2)):
    cosine = lambda x, i, j, k: unit64(x[i] - x[j]) @ unit64(x[k] - x[j])
    triples = itertools.permutations(range(len(s)), 3)
    return sum(huber64(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples) / denominator(len(s))


def similarity_preserving64(s, t):
    gram = lambda x: np.array([unit64(np.array([a @ b for b in x])) for a in x])
    return np.sum((gram(s) - gram(t)) ** 2) / len(s) ** 2


def correlation64(s, t, gamma=0.4, order=2):
    series = lambda c: exp(-2 * gamma) * sum((2 * gamma * c) ** p / factorial(p) for p in range(order + 1))
    kernel = lambda x: np.array([[series(unit64(a) @ unit64(b)) for b in x] for a in x])
    return np.sum((kernel(s) - kernel(t)) ** 2) / len(s) ** 2


def pkt64(s, t, own=False, offset=0.0, power=1):
    n, total = len(s), 0.0
    kernel = lambda x, i, j: 0.5 * (1 + unit64(x[i]) @ unit64(x[j]))
    for i in range(n):
        others = [j for j in range(n) if own or j != i]
        p, q = (np.array([kernel(x, i, j) for j in others]) for x in (t, s))
        p, q = p / p.sum(), q / q.sum()
        total += np.sum(p * np.log((p + offset) / (q + offset)))
    return total / n**power


def cka64(s, t):
    x, y = s - s.mean(0), t - t.mean(0)
    return 1 - np.sum((y.T @ x) ** 2) / np.sqrt(np.sum((x.T @ x) ** 2) * np.sum((y.T @ y) ** 2))


FORMULAS = {
    "rkd_distance": rkd_distance64,
    "rkd_distance_repdistiller": partial(rkd_distance64, denominator=lambda n: n**2),
    "rkd_angle": rkd_angle64,
    "rkd_angle_repdistiller": partial(rkd_angle64, denominator=lambda n: n**3),
    "similarity_preserving": similarity_preserving64,
    "correlation": correlation64,
    "correlation_3": partial(correlation64, gamma=0.7, order=3),
    "pkt": pkt64,
    "pkt_repdistiller": partial(pkt64, own=True, offset=1e-7, power=2),
    "cka": cka64,
}


def flat64(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def some(seed, shape, scale=1.0, shift=0.2):
    return (scale * np.random.default_rng(seed).standard_normal(shape) + shift).astype(np.float32)


SHAPES = [((6, 5), (6, 4)), ((2, 3), (2, 3)), ((9, 5, 2, 4), (9, 2, 2, 6))]


@pytest.mark.parametrize("seed, shapes", enumerate(SHAPES))
def test_relations_are_the_papers_formulas(seed, shapes):
    student, teacher = some(seed, shapes[0], scale=3.0), some(100 + seed, shapes[1], scale=0.5, shift=1.0)
    for name, loss in every_loss(student, teacher).items():
        assert loss.shape == () and loss.dtype == jnp.float32
        if name.startswith("rkd_angle") and len(student) == 2:
            assert loss == 0  # two points span no angle
            continue
        want = FORMULAS[name](flat64(student), flat64(teacher))
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-9, err_msg=name)


def test_gradients_are_the_float64_difference_quotients():
    student, teacher = some(10, (6, 5)), some(11, (6, 4))
    for name, grad in every_gradient(student, teacher).items():
        want = np.zeros(student.shape)
        for i in np.ndindex(student.shape):
            step = np.zeros(student.shape)
            step[i] = 1e-6
            ahead, behind = (FORMULAS[name](flat64(student) + sign * step, flat64(teacher)) for sign in (1, -1))
            want[i] = (ahead - behind) / 2e-6
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6, err_msg=name)


# Ours by the name of the public code's output.
PUBLIC = {
    "rkd_distance": partial(relation.rkd_distance, variant="repdistiller"),
    "rkd_distance_authors": partial(relation.rkd_distance, variant="repdistiller"),
    "rkd_angle": partial(relation.rkd_angle, variant="repdistiller"),
    "rkd_angle_authors": partial(relation.rkd_angle, variant="repdistiller"),
    "similarity_preserving": relation.similarity_preserving,
    "pkt": partial(relation.pkt, variant="repdistiller"),
    # They return the norm, the paper and we its square over n².
    "correlation_g0.4_p2": lambda s, t: 7 * jnp.sqrt(relation.correlation_congruence(s, t)),
    "correlation_g0.7_p3": lambda s, t: 7 * jnp.sqrt(relation.correlation_congruence(s, t, inverse_width=0.7, order=3)),
}


def assert_golden(name, value, *grads):
    np.testing.assert_allclose(value, GOLDEN[f"{name}/value"], rtol=1e-5, err_msg=name)
    names = [f"{name}/grad"] if len(grads) == 1 else [f"{name}/grad{i}" for i in range(len(grads))]
    for grad, of in zip(grads, names, strict=True):
        np.testing.assert_allclose(grad, GOLDEN[of], rtol=1e-4, atol=1e-6, err_msg=of)


@pytest.mark.parametrize("name", PUBLIC)
def test_relations_are_the_public_code(name):
    value, grad = jax.jit(jax.value_and_grad(PUBLIC[name]))(GOLDEN["student"], GOLDEN["teacher"])
    assert_golden(name, value, grad)


def test_relations_of_other_inputs_are_the_public_code():
    value_and_grad = lambda loss, by=0: jax.jit(jax.value_and_grad(loss, argnums=by))
    loss = relation.similarity_preserving
    assert_golden("similarity_preserving_maps", *value_and_grad(loss)(GOLDEN["student_map"], GOLDEN["teacher_map"]))
    loss = partial(relation.correlation_congruence, variant="repdistiller")
    assert_golden("correlation_repdistiller", *value_and_grad(loss)(GOLDEN["student_wide"], GOLDEN["teacher"]))
    first = GOLDEN["student_first"], GOLDEN["teacher_first"]
    for name, divisor in (("ickd", 4), ("ickd_authors", 1)):
        mean = lambda s, t, divisor=divisor: relation.ickd(s, t, variant="torchdistill").mean() / divisor
        assert_golden(name, *value_and_grad(mean)(*first))
    maps = [GOLDEN[name] for name in ("student_first", "student_second", "teacher_first", "teacher_second")]
    mean = lambda *maps: relation.fsp(*maps, variant="repdistiller").mean()
    value, grads = value_and_grad(mean, by=(0, 1))(*maps)
    assert_golden("fsp", value, *grads)


def test_three_points_by_hand():
    column = lambda *values: np.array(values, np.float32)[:, None]
    rkd_distance, cka = jax.jit(relation.rkd_distance), jax.jit(relation.cka)
    # Relative distances (½, 3/2, 1) and (¾, 3/2, ¾).
    loss = rkd_distance(column(0, 1, 3), column(0, 1, 2))
    np.testing.assert_allclose(loss, 2 * 0.5 * 0.25**2 / 3, rtol=1e-6)
    # (0, 3/2, 3/2) and (3/2, 0, 3/2): errors of 3/2 are in Huber's linear part.
    loss = rkd_distance(column(0, 0, 1), column(0, 1, 0))
    np.testing.assert_allclose(loss, 2 * (1.5 - 0.5) / 3, rtol=1e-6)
    # All cosines ½ against (0, √½, √½).
    equilateral, right = np.array([[0, 0], [1, 0], [0.5, sqrt(0.75)]]), np.array([[0.0, 0], [1, 0], [0, 1]])
    want = 0.5 * (0.5**2 + 2 * (sqrt(0.5) - 0.5) ** 2) / 3
    np.testing.assert_allclose(jax.jit(relation.rkd_angle)(equilateral, right), want, rtol=1e-6)
    # Row distributions (2/3, 1/3), (2/3, 1/3), (½, ½) of the student, (½, ½), (1/3, 2/3), (1/3, 2/3) of the teacher.
    a, b = [1.0, 0.0], [0.0, 1.0]
    want = (0.5 * log(9 / 8) + log(2) / 3 + log(32 / 27) / 3) / 3
    np.testing.assert_allclose(jax.jit(relation.pkt)(np.array([a, a, b]), np.array([a, b, b])), want, rtol=1e-6)
    # One column each: CKA is the squared correlation.
    np.testing.assert_allclose(cka(column(1, 0, -1), column(1, -2, 1)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cka(column(1, 0, -1), column(1, 0, 0)), 0.25, rtol=1e-6)


def test_two_points_by_hand():
    apart, together = jnp.eye(2), jnp.ones((2, 1))
    np.testing.assert_allclose(relation.similarity_preserving(apart, together), 1 - sqrt(0.5), rtol=1e-6)
    np.testing.assert_allclose(
        relation.correlation_congruence(apart, together), 2 * (exp(-0.8) * (0.8 + 0.32)) ** 2 / 4, rtol=1e-6
    )


def test_channels_and_layers_by_hand():
    one = lambda *channels: jnp.array(channels, jnp.float32)[None, None, :]
    loss = relation.fsp(one(1, 2), one(3), one(1, 1), one(1))
    np.testing.assert_allclose(loss, [2**2 + 5**2])
    np.testing.assert_allclose(relation.fsp(one(1, 2), one(3), one(1, 1), one(1), variant="repdistiller"), [14.5])
    two = jnp.tile(one(1, 2), (1, 2, 1)), jnp.tile(one(3), (1, 2, 1))
    np.testing.assert_allclose(relation.fsp(*two, one(1, 1), one(1)), loss)  # a mean over positions
    np.testing.assert_allclose(relation.ickd(one(1, 2), one(0, 1)), [(1 + 4 + 4 + 9) / 4])
    want = (1 + 1 / 5 + (1 - 2 / sqrt(5)) ** 2) / 2
    np.testing.assert_allclose(relation.ickd(one(1, 2), one(0, 1), variant="torchdistill"), [want], rtol=1e-6)


def test_fsp_and_ickd_are_the_papers_formulas():
    maps = [some(seed, shape) for seed, shape in enumerate([(3, 4, 2, 5), (3, 4, 2, 3), (3, 2, 2, 5), (3, 2, 2, 3)])]
    flow = lambda x, y, m, n: np.mean(x.astype(np.float64)[..., m] * y.astype(np.float64)[..., n])
    want = [
        sum(
            (flow(maps[0][b], maps[1][b], m, n) - flow(maps[2][b], maps[3][b], m, n)) ** 2
            for m in range(5)
            for n in range(3)
        )
        for b in range(3)
    ]
    np.testing.assert_allclose(jax.jit(relation.fsp)(*maps), want, rtol=1e-5)
    student, teacher = some(4, (3, 4, 2, 5)), some(5, (3, 4, 2, 5))
    product = lambda x, m, n: np.sum(x.astype(np.float64)[..., m] * x.astype(np.float64)[..., n])
    want = [
        sum((product(student[b], m, n) - product(teacher[b], m, n)) ** 2 for m in range(5) for n in range(5)) / 25
        for b in range(3)
    ]
    np.testing.assert_allclose(jax.jit(relation.ickd)(student, teacher), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_sides_are_a_fixed_point(dtype):
    x = jnp.asarray(some(20, (6, 5)), dtype)
    losses, grads = every_loss(x, x), every_gradient(x, x)
    for name in RELATIONS:
        assert losses[name].dtype == jnp.float32 and abs(losses[name]) < 1e-7, name
        assert grads[name].dtype == dtype and jnp.max(jnp.abs(grads[name])) < 1e-6, name
    maps = jnp.asarray(some(21, (2, 3, 3, 4)), dtype)
    for loss in (lambda s: relation.fsp(s, s[..., :2], maps, maps[..., :2]), lambda s: relation.ickd(s, maps)):
        value, grad = jax.jit(jax.value_and_grad(lambda s, loss=loss: loss(s).sum()))(maps)
        assert value < 1e-10 and jnp.max(jnp.abs(grad)) < 1e-5


def test_bfloat16_is_compared_in_float32():
    student, teacher = (jnp.asarray(some(seed, (6, 5)), jnp.bfloat16) for seed in (22, 23))
    for name, loss in every_loss(student, teacher).items():
        want = FORMULAS[name](flat64(student), flat64(teacher))
        np.testing.assert_allclose(loss, want, rtol=1e-5, err_msg=name)


def test_the_order_of_the_batch_does_not_matter():
    student, teacher, order = some(24, (6, 5)), some(25, (6, 4)), np.random.default_rng(0).permutation(6)
    losses, grads = every_loss(student, teacher), every_gradient(student, teacher)
    shuffled, shuffled_grads = (
        every_loss(student[order], teacher[order]),
        every_gradient(student[order], teacher[order]),
    )
    for name in RELATIONS:
        np.testing.assert_allclose(shuffled[name], losses[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(shuffled_grads[name], grads[name][order], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("padding", [0.0, 1e30, np.nan, np.inf])
def test_padding_changes_nothing(padding):
    student, teacher, real = some(26, (6, 5)), some(27, (6, 4)), np.array([0, 2, 3, 5, 6, 8])
    mask = np.zeros(9, np.int32)
    mask[real] = 1
    padded = [np.full((9, *x.shape[1:]), padding, np.float32) for x in (student, teacher)]
    padded[0][real], padded[1][real] = student, teacher
    losses, grads = every_loss(student, teacher), every_gradient(student, teacher)
    masked, masked_grads = every_loss(*padded, mask), every_gradient(*padded, mask)
    for name in RELATIONS:
        np.testing.assert_allclose(masked[name], losses[name], rtol=1e-5, err_msg=name)
        assert not np.any(masked_grads[name][mask == 0]), name
        np.testing.assert_allclose(masked_grads[name][real], grads[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_neighbours_of_the_repdistiller_correlation_are_both_real():
    student, teacher = some(28, (4, 3)), some(29, (4, 3))
    delta = np.abs(student - teacher).astype(np.float64)
    loss = partial(relation.correlation_congruence, variant="repdistiller")
    student[3] = np.nan
    value, grad = jax.value_and_grad(loss)(student, teacher, jnp.array([1, 1, 1, 0]))
    np.testing.assert_allclose(value, (delta[0] @ delta[1] + delta[1] @ delta[2]) / 2, rtol=1e-5)
    assert np.all(np.isfinite(grad)) and not np.any(grad[3])
    assert loss(student, teacher, jnp.array([1, 0, 1, 0])) == 0


@pytest.mark.parametrize("real", [0, 1])
def test_fewer_than_two_real_examples_relate_nothing(real):
    student, teacher = some(30, (9, 5)), some(31, (9, 4))
    student[3] = 0  # alone, a zero vector still differs from any other
    mask = np.zeros(9, np.int32)
    mask[3] = real
    for name, loss in every_loss(student, teacher, mask).items():
        assert loss == 0, name
    for name, grad in every_gradient(student, teacher, mask).items():
        assert not np.any(grad), name


DEGENERATE = {
    "zeros": np.zeros((6, 5)),
    "equal rows": np.full((6, 5), 0.1),
    "two equal rows": some(32, (6, 5))[[0, 0, 1, 2, 3, 4]],
    "opposite rows": np.array([[1], [-1], [2], [-2], [0], [3]]) * some(32, (1, 5)),
    "tiny": some(32, (6, 5), scale=1e-18, shift=0),
    "huge": some(33, (6, 5), scale=1e15, shift=0),
}


@pytest.mark.parametrize("of_student", DEGENERATE)
def test_degenerate_features_stay_finite(of_student):
    student = np.asarray(DEGENERATE[of_student], np.float32)
    for of_teacher in (*DEGENERATE, "random"):
        teacher = np.asarray(DEGENERATE.get(of_teacher, some(34, (6, 5))), np.float32)
        losses, grads = every_loss(student, teacher), every_gradient(student, teacher)
        for name in RELATIONS:
            assert np.isfinite(losses[name]) and np.all(np.isfinite(grads[name])), (name, of_student, of_teacher)
            assert losses[name] > -1e-7, (name, of_student, of_teacher)
            if of_student in ("zeros", "equal rows") and name == "cka":
                assert losses[name] == 1 and not np.any(grads[name])
    maps = jnp.zeros((2, 3, 3, 3))
    grad = jax.grad(lambda s: relation.ickd(s, maps + 1.0, variant="torchdistill").sum())(maps)
    assert np.all(np.isfinite(grad))


def test_what_each_relation_is_blind_to():
    student, teacher = some(35, (6, 5)), some(36, (6, 4))
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0].astype(np.float32)
    lengths = np.random.default_rng(2).uniform(0.5, 3.0, (6, 1)).astype(np.float32)
    changes = {
        "rotate": lambda x: x @ rotation,
        "scale": lambda x: 7 * x,
        "shift": lambda x: x + 3,
        "lengths": lambda x: x * lengths,
    }
    blind = {
        "rkd_distance": ("rotate", "scale", "shift"),
        "rkd_angle": ("rotate", "scale", "shift"),
        "similarity_preserving": ("rotate", "scale"),
        "correlation": ("rotate", "scale", "lengths"),
        "pkt": ("rotate", "scale", "lengths"),
        "cka": ("rotate", "scale", "shift"),
    }
    losses = every_loss(student, teacher)
    for change, apply in changes.items():
        changed = every_loss(apply(student), teacher)
        for name, blind_to in blind.items():
            same = abs(changed[name] / losses[name] - 1) < 1e-4
            assert same == (change in blind_to), (name, change)
    assert relation.cka(7 * student @ rotation + 3, student) < 1e-10


def test_a_population_of_students_beside_one_teacher():
    students, teacher = some(37, (3, 6, 5)), some(38, (6, 4))
    widths = jnp.array([0.2, 0.4, 0.8])
    loss = lambda s, width: relation.correlation_congruence(s, teacher, inverse_width=width)
    for got, student, width in zip(jax.jit(jax.vmap(loss))(students, widths), students, widths, strict=True):
        np.testing.assert_allclose(got, correlation64(flat64(student), flat64(teacher), float(width)), rtol=1e-5)
    mapped = jax.vmap(every_loss, in_axes=(0, None))(students, teacher)
    for i, student in enumerate(students):
        for name, loss in every_loss(student, teacher).items():
            np.testing.assert_allclose(mapped[name][i], loss, rtol=1e-5, err_msg=name)


def test_bad_input_is_one_sentence():
    x, one = jnp.ones((3, 4)), jnp.ones((1, 4))
    for loss in RELATIONS.values():
        with pytest.raises(UserError, match="at least 2 examples"):
            loss(one, one)
        with pytest.raises(UserError, match="of the same examples"):
            loss(x, jnp.ones((2, 4)))
        with pytest.raises(UserError, match=r"one mask value per example, shape \(3,\)"):
            loss(x, x, jnp.ones((4,)))
    for loss in (relation.rkd_distance, relation.rkd_angle, relation.correlation_congruence, relation.pkt):
        with pytest.raises(UserError, match="did you mean 'repdistiller'"):
            loss(x, x, variant="RepDistiller")
    with pytest.raises(UserError, match="order 1 or more"):
        relation.correlation_congruence(x, x, order=0)
    with pytest.raises(UserError, match=r"a projector \('linear'\) maps 4 channels to 5"):
        relation.correlation_congruence(x, jnp.ones((3, 5)), variant="repdistiller")
    maps, wide, small = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 5)), jnp.ones((2, 2, 2, 3))
    with pytest.raises(UserError, match=r"maps 3 channels to 5"):
        relation.fsp(maps, maps, maps, wide)
    with pytest.raises(UserError, match=r"tap two layers .* of one size, or pool the larger"):
        relation.fsp(maps, small, maps, maps)
    with pytest.raises(UserError, match=r"maps 5 channels to 3"):
        relation.ickd(wide, maps)
    with pytest.raises(UserError, match="use variant 'torchdistill'"):
        relation.ickd(maps, small)
    with pytest.raises(UserError, match="lack: tap layers"):
        relation.ickd(x, x)
    assert relation.ickd(maps, small, variant="torchdistill").shape == (2,)

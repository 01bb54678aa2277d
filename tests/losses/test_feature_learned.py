"""Feature losses with parameters: formulas in float64, the originals' outputs, and where gradients go."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.errors import UserError
from kdjax.losses import feature_learned as learned

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "feature.npz")
KEY = jax.random.key(7)

# name -> (init, loss, student shape, teacher shape); review takes stages and has its own shapes.
IMAGES, SMALL = (3, 6, 6, 5), (3, 4, 4, 8)
LOSSES = {
    "fitnets": (learned.init_fitnets, learned.fitnets),
    "fitnets_conv3": (
        partial(learned.init_fitnets, projector="conv3"),
        partial(learned.fitnets, projector="conv3", variant="repdistiller"),
    ),
    "factor": (learned.init_factor_transfer, learned.factor_transfer),
    "factor_2": (learned.init_factor_transfer, partial(learned.factor_transfer, power=2.0)),
    "factor_mmrazor": (learned.init_factor_transfer, partial(learned.factor_transfer, variant="mmrazor")),
    "factor_repdistiller": (learned.init_factor_transfer, partial(learned.factor_transfer, variant="repdistiller")),
    "vid": (learned.init_vid, learned.vid),
    "vid_repdistiller": (partial(learned.init_vid, hidden=7), partial(learned.vid, variant="repdistiller")),
    "mgd": (learned.init_mgd, lambda params, s, t: learned.mgd(params, s, t, KEY)),
}
EACH = ("fitnets", "factor", "vid", "mgd")  # where the variants of a loss share all that a test is about
STAGES = [(3, 8, 8, 4), (3, 4, 4, 6), (3, 7)], [(3, 8, 8, 5), (3, 6, 5, 8), (3, 9)]


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(init, *shapes, seed=0):
    """What `init` returns, filled with NumPy's numbers: nothing to compile, and biases that are not 0."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda key: init(key, *shapes), KEY))
    scale = lambda leaf: 0.3 if leaf.ndim == 1 else float(np.prod(leaf.shape[:-1])) ** -0.5
    return jax.tree.unflatten(tree, [scale(leaf) * some(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def golden_params(prefix, init, *shapes, **options):
    """The original's weights in the structure of ours; where it has no bias, ours is 0."""

    def leaf(path, ours):
        key = "/".join([prefix, *(str(entry.key) for entry in path)])
        assert key in GOLDEN or key.endswith("bias"), key
        value = GOLDEN[key] if key in GOLDEN else np.zeros(ours.shape, np.float32)
        assert value.shape == ours.shape, key
        return value

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda key: init(key, *shapes, **options), KEY))


# The formulas, one example at a time in float64: nothing shared with the implementation.
def conv64(params, x):
    x, kernel = np.asarray(x, np.float64), np.asarray(params["kernel"], np.float64)
    if kernel.ndim == 2:
        return x @ kernel + np.asarray(params.get("bias", 0.0), np.float64)
    padded, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), np.zeros((*x.shape[:2], kernel.shape[-1]))
    for y in range(x.shape[0]):
        for z in range(x.shape[1]):
            out[y, z] = np.einsum("ijk,ijko->o", padded[y : y + 3, z : z + 3], kernel) + np.asarray(params["bias"])
    return out


def pool64(x, height, width):
    bins = lambda m, n: [slice(i * m // n, -(-(i + 1) * m // n)) for i in range(n)]
    return np.array([[x[r, c].mean((0, 1)) for c in bins(x.shape[1], width)] for r in bins(x.shape[0], height)])


def fitted64(s, t):
    height, width = min(s.shape[0], t.shape[0]), min(s.shape[1], t.shape[1])
    return pool64(s, height, width), pool64(t, height, width)


def leaky_stack64(params, x):
    for i in range(3):
        x = conv64(params[str(i)], x)
        x = np.where(x > 0, x, 0.1 * x)
    return x


def fitnets64(params, s, t, mean=False):
    s, t = fitted64(s, t)
    squares = (conv64(params, s) - t) ** 2
    return squares.mean() if mean else squares.sum() / 2


def factor64(params, s, t, power=1, variant="paper"):
    factor = leaky_stack64(params["paraphraser"]["encoder"], t)
    errors = (leaky_stack64(params["paraphraser"]["decoder"], factor) - t) ** 2
    f_s, f_t = fitted64(leaky_stack64(params["translator"], s), factor)
    if variant == "repdistiller":
        f_s, f_t = (f_s**2).mean(-1), (f_t**2).mean(-1)
    difference = np.abs(f_s / np.sqrt((f_s**2).sum()) - f_t / np.sqrt((f_t**2).sum()))
    if variant == "paper":
        return (difference**power).sum() ** (1 / power) + errors.sum()
    return difference.mean() + errors.mean()


def vid64(params, s, t, mean=False):
    s, t = fitted64(s, t)
    for i in range(3):
        s = conv64(params["mean"][str(i)], np.maximum(s, 0) if i else s)
    variance = np.log(1 + np.exp(np.asarray(params["raw_variance"], np.float64))) + 1e-5
    nll = np.array([np.log(np.sqrt(v)) + (t[..., c] - s[..., c]) ** 2 / (2 * v) for c, v in enumerate(variance)])
    return nll.mean() if mean else nll.sum()


def masked64(params, s, t, mask):
    s, t = fitted64(s, t)
    hidden = np.maximum(conv64(params["generator"]["0"], conv64(params["align"], s) * mask), 0)
    return ((conv64(params["generator"]["1"], hidden) - t) ** 2).sum()


FORMULAS = {
    "fitnets": fitnets64,
    "fitnets_conv3": partial(fitnets64, mean=True),
    "factor": factor64,
    "factor_2": partial(factor64, power=2),
    "factor_mmrazor": partial(factor64, variant="mmrazor"),
    "factor_repdistiller": partial(factor64, variant="repdistiller"),
    "vid": vid64,
    "vid_repdistiller": partial(vid64, mean=True),
}


def review64(params, students, teachers):
    image = lambda x: np.asarray(x, np.float64).reshape((1, 1, -1) if x.ndim == 1 else x.shape)
    resize = lambda x, h, w: np.array(
        [[x[y * x.shape[0] // h, z * x.shape[1] // w] for z in range(w)] for y in range(h)]
    )
    total, below = 0.0, None
    for i in (2, 1, 0):
        x, t = conv64(params[str(i)]["in"], image(students[i])), image(teachers[i])
        if below is not None:
            y = resize(below, *x.shape[:2])
            a = 1 / (1 + np.exp(-conv64(params[str(i)]["attention"], np.concatenate([x, y], -1))))
            x = a[..., [0]] * x + a[..., [1]] * y
        below = resize(x, *t.shape[:2])
        out, weights, losses = conv64(params[str(i)]["out"], below), [1.0], []
        losses.append(((out - t) ** 2).mean())
        for size in (4, 2, 1):
            if size < min(t.shape[:2]):
                losses.append(((pool64(out, size, size) - pool64(t, size, size)) ** 2).mean())
                weights.append(weights[-1] / 2)
        total += np.dot(weights, losses) / sum(weights)
    return total


def made(name, student_shape=IMAGES, teacher_shape=SMALL, seed=0):
    init, loss = LOSSES[name]
    params = random_params(init, student_shape, teacher_shape, seed=seed)
    return params, some(seed + 1, *student_shape), some(seed + 2, *teacher_shape), loss


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_the_papers_formulas(name, seed):
    shapes = (IMAGES, SMALL) if seed else ((2, 4, 5, 6), (2, 4, 5, 8))
    params, student, teacher, loss = made(name, *shapes, seed=seed)
    got = jax.jit(loss)(params, student, teacher)
    assert got.shape == (len(student),) and got.dtype == jnp.float32
    want = [FORMULAS[name](params, np.float64(s), np.float64(t)) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mgd_is_the_papers_formula_for_its_mask():
    params, student, teacher, loss = made("mgd")
    mask = some(3, 3, 4, 4, 1) > 0
    got = jax.jit(learned.mgd_with_mask)(params, student, teacher, mask)
    want = [masked64(params, np.float64(s), np.float64(t), m) for s, t, m in zip(student, teacher, mask, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    drawn = jax.random.uniform(KEY, (3, 4, 4, 1)) >= 0.5
    want = learned.mgd_with_mask(params, student, teacher, drawn)
    np.testing.assert_allclose(loss(params, student, teacher), want, rtol=1e-6)


def test_review_is_its_formula():
    params = random_params(learned.init_review, *STAGES)
    students, teachers = ([some(i + j, *shape) for i, shape in enumerate(side)] for j, side in enumerate(STAGES))
    got = jax.jit(learned.review)(params, students, teachers)
    assert got.shape == (3,) and got.dtype == jnp.float32
    want = [review64(params, [s[i] for s in students], [t[i] for t in teachers]) for i in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("teacher", ["teacher", "small_teacher"])
def test_vid_gives_the_originals_values(teacher):
    s, t = GOLDEN["student"], GOLDEN[teacher]
    params = golden_params("vid", learned.init_vid, s.shape, t.shape, hidden=7)
    key = {"teacher": "vid", "small_teacher": "vid_small"}[teacher]
    np.testing.assert_allclose(learned.vid(params, s, t, variant="repdistiller"), GOLDEN[key], rtol=1e-5)


def test_fitnets_gives_the_originals_values():
    s, t = GOLDEN["student"], GOLDEN["teacher"]
    params = golden_params("fitnets", learned.init_fitnets, s.shape, t.shape)
    np.testing.assert_allclose(learned.fitnets(params, s, t, variant="repdistiller"), GOLDEN["fitnets"], rtol=1e-5)


def test_factor_transfer_gives_the_originals_values():
    s, t = GOLDEN["student"], GOLDEN["teacher"]
    params = golden_params("factor", learned.init_factor_transfer, s.shape, t.shape)
    distance = jax.jit(partial(learned.factor_transfer, reconstruction_weight=0.0), static_argnames="variant")
    np.testing.assert_allclose(distance(params, s, t), GOLDEN["factor_torchdistill_p1_sum"], rtol=1e-5)
    np.testing.assert_allclose(distance(params, s, t, power=2.0), GOLDEN["factor_torchdistill_p2"], rtol=1e-5)
    for variant in ("mmrazor", "repdistiller"):
        np.testing.assert_allclose(distance(params, s, t, variant=variant), GOLDEN[f"factor_{variant}"], rtol=1e-5)
    error = learned.factor_transfer(params, s, t, transfer_weight=0.0, variant="mmrazor")
    np.testing.assert_allclose(error, GOLDEN["factor_reconstruction"], rtol=1e-5)
    summed = learned.factor_transfer(params, s, t, transfer_weight=0.0)
    np.testing.assert_allclose(summed, t[0].size * GOLDEN["factor_reconstruction"], rtol=1e-5)


def test_review_gives_the_originals_values():
    students, teachers = ([GOLDEN[f"review_{side}/{i}"] for i in range(3)] for side in ("student", "teacher"))
    shapes = ([x.shape for x in side] for side in (students, teachers))
    got = jax.jit(learned.review)(golden_params("review", learned.init_review, *shapes), students, teachers)
    np.testing.assert_allclose(got, GOLDEN["review"], rtol=1e-5)


def test_mgd_gives_the_originals_values():
    s, t = GOLDEN["student"], GOLDEN["teacher"]
    params = golden_params("mgd", learned.init_mgd, s.shape, t.shape)
    np.testing.assert_allclose(learned.mgd_with_mask(params, s, t, GOLDEN["mgd_mask"]), GOLDEN["mgd"], rtol=1e-5)


def test_vid_by_hand():
    """One channel, μ(s) = relu(relu(s)) = s, σ² = softplus(0) + 0 = ln 2."""
    one = {"kernel": jnp.ones((1, 1))}
    params = {"mean": {"0": one, "1": one, "2": one}, "raw_variance": jnp.zeros(1)}
    student, teacher = jnp.array([[[1.0], [2.0]]]), jnp.array([[[1.0], [5.0]]])
    got = learned.vid(params, student, teacher, minimum_variance=0.0)
    np.testing.assert_allclose(got, [np.log(np.log(2)) + 9 / (2 * np.log(2))], rtol=1e-6)


def test_vid_starts_from_its_variance():
    params = learned.init_vid(KEY, (2, 3), (2, 4), variance=5.0)
    np.testing.assert_allclose(jax.nn.softplus(params["raw_variance"]), 5.0, rtol=1e-6)


def gradients(name):
    params, student, teacher, loss = made(name)
    return jax.jit(jax.grad(lambda *args: loss(*args).sum(), argnums=(0, 1, 2)))(params, student, teacher)


@pytest.mark.parametrize("name", EACH)
def test_gradients_reach_parameters_and_student_but_not_the_teacher(name):
    by_params, by_student, by_teacher = gradients(name)
    for path, grad in jax.tree_util.tree_leaves_with_path(by_params):
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad), jax.tree_util.keystr(path)
    assert jnp.all(jnp.isfinite(by_student)) and jnp.any(by_student)
    assert not jnp.any(by_teacher)


def test_factor_transfer_keeps_its_two_gradients_apart():
    params, student, teacher, _ = made("factor")
    loss = lambda params, student, transfer, reconstruction: learned.factor_transfer(
        params, student, teacher, transfer_weight=transfer, reconstruction_weight=reconstruction
    ).sum()
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    moved = lambda tree: [bool(jnp.any(leaf)) for leaf in jax.tree.leaves(tree)]
    by_params, by_student = grad(params, student, 1.0, 0.0)
    assert not any(moved(by_params["paraphraser"])) and all(moved(by_params["translator"])) and all(moved(by_student))
    by_params, by_student = grad(params, student, 0.0, 1.0)
    assert all(moved(by_params["paraphraser"])) and not any(moved((by_params["translator"], by_student)))


def test_review_teaches_all_deeper_stages():
    params = random_params(learned.init_review, *STAGES)
    students, teachers = ([some(i + j, *shape) for i, shape in enumerate(side)] for j, side in enumerate(STAGES))
    loss = lambda params, s, t: learned.review(params, s, t).sum()
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    by_params, by_students, by_teachers = grad(params, students, teachers)
    for leaf in (*jax.tree.leaves(by_params), *by_students):
        assert jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf)
    assert not any(jnp.any(leaf) for leaf in by_teachers)
    # A change of the shallowest teacher alone changes what the deepest student gets.
    _, other, _ = grad(params, students, [teachers[0] + 1, *teachers[1:]])
    assert not np.allclose(other[2], by_students[2])


@pytest.mark.parametrize("name", ["fitnets", "factor_2", "factor_repdistiller", "vid", "mgd"])
def test_features_of_zeros_and_bfloat16(name):
    params, student, teacher, loss = made(name)
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: loss(*args).sum(), argnums=(0, 1)))
    # Without biases zeros stay zeros, as they do at the start.
    unbiased = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "bias" in str(path[-1]) else x, params)
    for s, t in ((0 * student, teacher), (student, 0 * teacher), (0 * student, 0 * teacher)):
        for p in (params, unbiased):
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(value_and_grad(p, s, t)))
    low = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    (got, _), (want, _) = value_and_grad(params, *low), value_and_grad(params, *(np.float32(x) for x in low))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["fitnets", "factor", "vid"])
def test_examples_do_not_touch_each_other(name):
    params, student, teacher, loss = made(name)
    loss, order = jax.jit(loss), np.array([2, 0, 1])
    value = loss(params, student, teacher)
    np.testing.assert_allclose(loss(params, student[order], teacher[order]), value[order], rtol=1e-5)
    student[2] = np.nan
    np.testing.assert_allclose(loss(params, student, teacher)[:2], value[:2], rtol=1e-5)


def test_mgd_draws_its_mask_from_the_key_alone():
    params, student, teacher, loss = made("mgd")
    value = loss(params, student, teacher)
    np.testing.assert_array_equal(loss(params, student, teacher), value)
    assert np.all(learned.mgd(params, student, teacher, jax.random.key(8)) != value)
    # The other examples' content, and their number, leave an example's mask alone.
    changed = student.copy()
    changed[1:] = np.nan
    np.testing.assert_allclose(loss(params, changed, teacher)[0], value[0], rtol=1e-6)
    np.testing.assert_allclose(loss(params, student[:2], teacher[:2]), value[:2], rtol=1e-6)
    # Two equal examples of one batch are masked differently.
    twins = loss(params, student[[0, 0, 0]], teacher[[0, 0, 0]])
    assert len(np.unique(twins)) == 3


def test_mgd_mask_ratio_is_the_share_that_is_hidden():
    """With an identity for a generator, a teacher of zeros and a student of ones the loss counts what is seen."""
    identity = np.zeros((3, 3, 1, 1), np.float32)
    identity[1, 1] = 1
    generator = {"kernel": jnp.asarray(identity), "bias": jnp.zeros(1)}
    params, ones = {"generator": {"0": generator, "1": generator}}, np.ones((4, 32, 32, 1), np.float32)
    seen = jax.jit(jax.vmap(lambda ratio: learned.mgd(params, ones, 0 * ones, KEY, mask_ratio=ratio)))
    share = seen(jnp.array([0.0, 0.25, 0.65, 1.0])) / 32**2
    np.testing.assert_allclose(share[0], 1.0)
    np.testing.assert_allclose(share[1], 0.75, atol=0.06)
    np.testing.assert_allclose(share[2], 0.35, atol=0.06)
    np.testing.assert_array_equal(share[3], 0.0)


def test_align_is_there_where_channels_differ():
    assert set(random_params(learned.init_mgd, (2, 4, 4, 8), (2, 4, 4, 8))) == {"generator"}
    assert set(random_params(learned.init_mgd, (2, 4, 4, 5), (2, 4, 4, 8))) == {"align", "generator"}


def test_tokens_and_vectors():
    for name in ("fitnets", "vid"):
        init, loss = LOSSES[name]
        for student, teacher in (((3, 9, 5), (3, 9, 8)), ((3, 5), (3, 8))):
            params = random_params(init, student, teacher)
            s, t = some(0, *student), some(1, *teacher)
            image = lambda x: x.reshape(3, -1, 1, x.shape[-1])
            np.testing.assert_allclose(loss(params, s, t), loss(params, image(s), image(t)), rtol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_the_parts_learn(name):
    """Adam on the parameters alone, features fixed: the loss falls."""
    params, student, teacher, loss = made(name)
    optimizer = optax.adam(0.01)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: loss(p, student, teacher).sum())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=40))(params)
    assert values[-1] < 0.97 * values[0]


@pytest.mark.parametrize("name", ["factor", "vid", "mgd"])
def test_parameters_map_over_a_population(name):
    _, student, teacher, loss = made(name)
    params = [random_params(LOSSES[name][0], IMAGES, SMALL, seed=seed) for seed in (0, 1)]
    students = np.stack([student, 2 * student])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    got = jax.jit(jax.vmap(loss, in_axes=(0, 0, None)))(stacked, students, teacher)
    one = jax.jit(loss)
    for i in range(2):
        np.testing.assert_allclose(got[i], one(params[i], students[i], teacher), rtol=1e-5)


def test_initial_parameters_are_float32_and_follow_the_key():
    for init in (learned.init_vid, learned.init_mgd, learned.init_factor_transfer, learned.init_review):
        shapes = STAGES if init is learned.init_review else (IMAGES, SMALL)
        make = jax.jit(lambda seed, init=init, shapes=shapes: init(jax.random.key(seed, impl="unsafe_rbg"), *shapes))
        one, other = make(1), make(2)  # a generator that compiles five times as fast
        for path, leaf in jax.tree_util.tree_leaves_with_path(one):
            assert leaf.dtype == jnp.float32 and jnp.all(jnp.isfinite(leaf))
            assert ("kernel" in str(path[-1])) == bool(np.ptp(leaf) > 0), path
        kernels = [leaf for leaf in jax.tree.leaves(one) if leaf.ndim > 1]
        # No two kernels are alike, so each has its own key, and all follow it.
        assert len({float(leaf.ravel()[0]) for leaf in kernels}) == len(kernels)
        others = [leaf for leaf in jax.tree.leaves(other) if leaf.ndim > 1]
        assert not any(np.array_equal(x, y) for x, y in zip(kernels, others, strict=True))


def test_bad_input_is_one_sentence():
    tokens, images = (2, 9, 5), (2, 4, 4, 5)
    for init in (learned.init_factor_transfer, learned.init_mgd, partial(learned.init_fitnets, projector="conv3")):
        with pytest.raises(UserError, match="need images"):
            init(KEY, tokens, tokens)
    for init in (learned.init_factor_transfer, learned.init_mgd, learned.init_fitnets, learned.init_vid):
        with pytest.raises(UserError, match="layers of the same kind"):
            init(KEY, images, tokens)
    with pytest.raises(UserError, match="projector='linear' maps 5 channels to 8"):
        learned.init_fitnets(KEY, images, (2, 4, 4, 8), projector="none")
    with pytest.raises(UserError, match="made for 5 channels"):
        learned.fitnets(random_params(learned.init_fitnets, images, images), jnp.zeros((2, 4, 4, 6)), jnp.zeros(images))
    with pytest.raises(UserError, match="maps 5 channels to 6"):
        learned.vid(random_params(learned.init_vid, images, images), jnp.zeros(images), jnp.zeros((2, 4, 4, 6)))
    for init, loss in ((learned.init_factor_transfer, learned.factor_transfer), (learned.init_vid, learned.vid)):
        with pytest.raises(UserError, match="did you mean 'repdistiller'"):
            loss(random_params(init, images, images), jnp.zeros(images), jnp.zeros(images), variant="repdistill")
    with pytest.raises(UserError, match="one teacher tap for each student tap"):
        learned.init_review(KEY, [images], [images, images])
    with pytest.raises(UserError, match="needs images"):
        learned.init_review(KEY, [tokens], [tokens])
    with pytest.raises(UserError, match="made for 1 stages, not 2"):
        learned.review(
            random_params(learned.init_review, [images], [images]), [jnp.zeros(images)] * 2, [jnp.zeros(images)] * 2
        )

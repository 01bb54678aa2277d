"""The contrastive losses against float64 NumPy and RepDistiller's output, across devices, and with the queue."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses.contrastive import crd, embed, infonce, init_contrastive, init_queue, push
from kdjax.sharding import make_mesh, over_batch, replicated

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "contrastive.npz"))
LOSSES = {
    "infonce": infonce,
    "crd": partial(crd, examples=50.0),
    "crd_repdistiller": partial(crd, examples=50.0, variant="repdistiller"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@partial(jax.jit, static_argnames="name")
def loss_and_gradients(name, params, student, teacher, mask=None, queue=None, labels=None, weights=None):
    """The per-example loss and the gradients of its weighted sum by parameters, student features and queue floats."""

    def total(params, student, floats):
        past = None if queue is None else {**queue, **floats}
        loss = LOSSES[name](params, student, teacher, mask, queue=past, labels=labels)
        return jnp.sum(loss if weights is None else weights * loss), loss

    floats = {} if queue is None else {"student": queue["student"], "teacher": queue["teacher"]}
    gradients, loss = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, student, floats)
    return loss, gradients


def some_case(seed, batch=6, student=5, teacher=9, width=8):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {
        "student": {"kernel": draw(student, width), "bias": draw(width)},
        "teacher": {"kernel": draw(teacher, width), "bias": draw(width)},
    }
    return params, draw(batch, student), draw(batch, teacher)


def some_queue(seed, size=5, width=8, filled=3):
    rng = np.random.default_rng(seed)
    past = rng.standard_normal((2, filled, width)).astype(np.float32)
    past /= np.linalg.norm(past, axis=-1, keepdims=True)
    labels = rng.integers(0, 3, filled).astype(np.int32)
    return push(init_queue(jax.random.key(seed), size, width), *jnp.asarray(past), jnp.asarray(labels))


# The papers' formulas in float64, pair by pair.
def unit64(head, x):
    y = x.astype(np.float64) @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"], np.float64)
    return y / np.sqrt((y**2).sum(-1, keepdims=True))


def pairs64(anchors, others, past, mask, labels, queue):
    """For every real anchor its positive cosine and the list of its negative ones."""
    pairs = {}
    for i in np.flatnonzero(mask):
        same = lambda other, i=i: labels is not None and labels[i] >= 0 and labels[i] == other
        negatives = [
            anchors[i] @ others[j]
            for j in np.flatnonzero(mask)
            if j != i and not same(None if labels is None else labels[j])
        ]
        if queue is not None:
            negatives += [
                anchors[i] @ np.asarray(past[j], np.float64)
                for j in np.flatnonzero(queue["valid"])
                if not same(queue["labels"][j])
            ]
        pairs[i] = (anchors[i] @ others[i], negatives)
    return pairs


def formula(name, params, student, teacher, mask=None, queue=None, labels=None, z_from=None):
    """The loss [b]; RepDistiller's Z is that of the student features `z_from`, if given."""
    mask = np.ones(len(student)) if mask is None else mask
    s, t = unit64(params["student"], student), unit64(params["teacher"], teacher)
    past = {"student": None, "teacher": None} if queue is None else queue
    loss = np.zeros(len(student))
    if name == "infonce":
        for i, (positive, negatives) in pairs64(s, t, past["teacher"], mask, labels, queue).items():
            exp = [np.exp(x / 0.1) for x in (positive, *negatives)]
            loss[i] = -np.log(exp[0] / sum(exp))
        return loss
    z = s if z_from is None else unit64(params["student"], z_from)
    for side, entries in enumerate((past["teacher"], past["student"])):
        anchors, others = ((s, t), (t, s))[side]
        pairs = pairs64(anchors, others, entries, mask, labels, queue)
        every = pairs64(*((z, t), (t, z))[side], entries, mask, labels, queue)
        mean = np.mean([np.exp(x / 0.07) for p, ns in every.values() for x in (p, *ns)])
        for i, (positive, negatives) in pairs.items():
            noise = len(negatives) * (1 / 50 if name == "crd" else mean)
            h = lambda x, noise=noise: np.exp(x / 0.07) / (np.exp(x / 0.07) + noise)
            # log(1 - h) as the ratio: 1 - h itself would lose digits.
            loss[i] -= np.log(h(positive)) + sum(np.log(noise / (np.exp(x / 0.07) + noise)) for x in negatives)
    return loss


LABELS = np.array([0, 1, 1, -1, -1, 2], np.int32)
MASK = np.array([1, 1, 0, 1, 1, 1], np.float32)


@every_loss
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [(), ("mask",), ("queue",), ("labels",), ("mask", "queue", "labels")])
def test_every_loss_is_its_papers_formula(name, seed, options):
    params, student, teacher = some_case(seed)
    every = {"mask": MASK, "queue": some_queue(seed), "labels": LABELS}
    chosen = {option: every[option] for option in options}
    loss, _ = loss_and_gradients(name, params, student, teacher, **chosen)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula(name, params, student, teacher, **chosen), rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("queued", [False, True])
def test_gradients_are_the_formulas(name, queued):
    params, student, teacher = some_case(3, batch=4)
    queue = some_queue(3) if queued else None
    _, (by_params, by_student, by_queue) = loss_and_gradients(name, params, student, teacher, queue=queue)
    direction = np.random.default_rng(4).standard_normal(student.shape)
    step = lambda eps: formula(name, params, student + eps * direction, teacher, queue=queue, z_from=student).sum()
    np.testing.assert_allclose(np.sum(by_student * direction), (step(1e-4) - step(-1e-4)) / 2e-4, rtol=1e-3)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(by_params))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(by_queue))


# The originals' output.


def golden_case():
    part = lambda who: {"kernel": GOLDEN[f"{who}_kernel"], "bias": GOLDEN[f"{who}_bias"]}
    queue = push(init_queue(jax.random.key(0), 7, 16), GOLDEN["queue_student"], GOLDEN["queue_teacher"])
    options = {"batch": {}, "queue": {"queue": queue}, "labels": {"labels": GOLDEN["labels"]}}
    return {"student": part("student"), "teacher": part("teacher")}, options


def test_embeddings_are_those_of_repdistiller():
    params, _ = golden_case()
    for who in ("student", "teacher"):
        np.testing.assert_allclose(embed(params[who], GOLDEN[who]), GOLDEN[f"{who}_embedding"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("option", ["batch", "queue", "labels"])
def test_crd_is_that_of_repdistiller(option):
    params, options = golden_case()
    loss = partial(crd, params, GOLDEN["student"], GOLDEN["teacher"], examples=GOLDEN["examples"], **options[option])
    np.testing.assert_allclose(loss().mean(), GOLDEN[f"contrast_{option}"], rtol=1e-5)
    np.testing.assert_allclose(loss(variant="repdistiller").mean(), GOLDEN[f"crd_{option}"], rtol=1e-5)


@pytest.mark.parametrize("option", ["batch", "queue"])
def test_infonce_is_torchs_cross_entropy(option):
    params, options = golden_case()
    loss = infonce(params, GOLDEN["student"], GOLDEN["teacher"], **options[option])
    np.testing.assert_allclose(loss, GOLDEN[f"infonce_{option}"], rtol=1e-5)


# Hand-computed: identity heads, two orthogonal examples that the student and the teacher embed alike.


def test_two_orthogonal_examples():
    head = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    params, x = {"student": head, "teacher": head}, jnp.array([[3.0, 0.0], [0.0, 0.5]])
    loss = infonce(params, x, x, temperature=0.5)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-2))] * 2, rtol=1e-6)  # -log e² / (e² + e⁰)
    # x = 2 for the positive, 0 for the one negative, noise 1 / 4: h = e² / (e² + 1/4), 1 - h = (1/4) / (1 + 1/4)
    want = 2 * (np.log1p(np.exp(-2) / 4) + np.log(5))
    np.testing.assert_allclose(crd(params, x, x, temperature=0.5, examples=4), [want] * 2, rtol=1e-6)
    # Z / N = (e² + 1) / 2 over all pairs, which takes the place of 1 / N
    z = (np.exp(2) + 1) / 2
    want = 2 * (np.log1p(np.exp(-2) * z) + np.log1p(1 / z))
    loss = crd(params, x, x, temperature=0.5, examples=4, variant="repdistiller")
    np.testing.assert_allclose(loss, [want] * 2, rtol=1e-6)
    swapped = infonce(params, x, x[::-1], temperature=0.5)
    np.testing.assert_allclose(swapped, [np.log1p(np.exp(2))] * 2, rtol=1e-6)


# Identities.


@every_loss
@pytest.mark.parametrize("junk", [1e30, np.nan])
def test_padding_changes_neither_value_nor_gradient(name, junk):
    params, student, teacher = some_case(5, batch=4)
    pad = lambda x, fill: np.concatenate([x[:1], np.full((2, *x.shape[1:]), fill, x.dtype), x[1:]])
    labels = np.array([0, 0, 1, 2], np.int32)
    mask = np.array([1, 0, 0, 1, 1, 1], np.float32)
    for queue in (None, some_queue(5)):
        want, want_grad = loss_and_gradients(name, params, student, teacher, queue=queue, labels=labels)
        got, got_grad = loss_and_gradients(
            name, params, pad(student, junk), pad(teacher, junk), mask=mask, queue=queue, labels=pad(labels, 0)
        )
        np.testing.assert_allclose(got, pad(np.asarray(want), 0.0), rtol=1e-6)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got_grad[0], want_grad[0])
        np.testing.assert_allclose(got_grad[1], pad(np.asarray(want_grad[1]), 0.0), rtol=1e-4, atol=1e-6)


@every_loss
def test_a_permuted_batch_permutes_the_loss(name):
    params, student, teacher = some_case(6)
    order = np.random.default_rng(6).permutation(6)
    loss, _ = loss_and_gradients(name, params, student, teacher, mask=MASK, labels=LABELS)
    permuted, _ = loss_and_gradients(
        name, params, student[order], teacher[order], mask=MASK[order], labels=LABELS[order]
    )
    np.testing.assert_allclose(permuted, loss[order], rtol=1e-5, atol=1e-6)


@every_loss
def test_negatives_come_from_all_devices(name):
    params, student, teacher = some_case(7, batch=16)
    rng = np.random.default_rng(7)
    rows = (student, teacher, (rng.random(16) > 0.2).astype(np.float32))
    labels, weights = rng.integers(-1, 3, 16).astype(np.int32), rng.random(16).astype(np.float32)
    queue = some_queue(7)
    want, want_grad = loss_and_gradients(name, params, *rows, queue, labels, weights)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    split, whole = partial(jax.device_put, device=over_batch(mesh)), partial(jax.device_put, device=replicated(mesh))
    got, got_grad = loss_and_gradients(
        name, whole(params), *map(split, rows), whole(queue), split(labels), split(weights)
    )
    assert len(got_grad[1].sharding.device_set) == 8
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got_grad, want_grad)
    # The test can fail: a loss that sees the rows of one device alone is another one.
    alone = LOSSES[name](params, student[:2], teacher[:2], rows[2][:2], queue=queue, labels=labels[:2])
    assert not np.allclose(alone, want[:2], rtol=1e-3)


@every_loss
def test_degenerate_inputs_have_finite_gradients(name):
    params, student, teacher = some_case(8)
    fresh = init_contrastive(jax.random.key(0), student.shape, teacher.shape, width=8)
    one_real = np.eye(6, dtype=np.float32)[2]
    for case in (
        dict(params=fresh, student=0 * student, teacher=0 * teacher),  # embeddings of norm 0
        dict(params=params, student=student[[0] * 6], teacher=teacher[[0] * 6]),
        dict(params=params, student=1e4 * student, teacher=1e4 * teacher),
        dict(params=params, student=student, teacher=teacher, mask=one_real),
        dict(params=params, student=student, teacher=teacher, mask=0 * one_real),
        dict(params=params, student=student, teacher=teacher, labels=np.zeros(6, np.int32)),
    ):
        loss, gradients = loss_and_gradients(name, **case)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradients)))
        if "mask" in case or "labels" in case:  # no negatives
            assert not any(np.any(leaf) for leaf in jax.tree.leaves((loss, gradients)))


@every_loss
def test_bf16_features_are_upcast_first(name):
    params, student, teacher = some_case(9)
    student, teacher = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    loss, _ = loss_and_gradients(name, params, student, teacher)
    want, _ = loss_and_gradients(name, params, student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_array_equal(loss, want)


def test_numbers_may_be_traced():
    params, student, teacher = some_case(10)
    both = jax.jit(
        jax.vmap(
            lambda tau, n: (
                infonce(params, student, teacher, temperature=tau)
                + crd(params, student, teacher, temperature=tau, examples=n)
            )
        )
    )(jnp.array([0.1, 0.2]), jnp.array([50.0, 1000.0]))
    for i, (tau, n) in enumerate(((0.1, 50.0), (0.2, 1000.0))):
        want = infonce(params, student, teacher, temperature=tau)
        want += crd(params, student, teacher, temperature=tau, examples=n)
        np.testing.assert_allclose(both[i], want, rtol=1e-5)


@every_loss
def test_training_the_heads_tells_the_examples_apart(name):
    _, student, teacher = some_case(11, batch=8)
    params = init_contrastive(jax.random.key(0), student.shape, teacher.shape, width=8)
    first, _ = loss_and_gradients(name, params, student, teacher)
    for _ in range(200):
        loss, (gradient, *_) = loss_and_gradients(name, params, student, teacher)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert loss.mean() < 0.7 * first.mean()
    cosines = embed(params["student"], student) @ embed(params["teacher"], teacher).T
    np.testing.assert_array_equal(np.argmax(cosines, axis=1), np.arange(8))


# The queue.


@every_loss
def test_an_empty_queue_changes_nothing(name):
    params, student, teacher = some_case(12)
    want, want_grad = loss_and_gradients(name, params, student, teacher, labels=LABELS)
    empty = init_queue(jax.random.key(0), 4, 8)
    got, got_grad = loss_and_gradients(name, params, student, teacher, queue=empty, labels=LABELS)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got_grad[:2], want_grad[:2])


@every_loss
def test_a_filled_queue_gives_a_batch_of_one_its_negatives(name):
    params, student, teacher = some_case(13, batch=1)
    queue = some_queue(13)
    loss, _ = loss_and_gradients(name, params, student, teacher, queue=queue)
    np.testing.assert_allclose(loss, formula(name, params, student, teacher, queue=queue), rtol=1e-5)
    assert loss[0] > 0


@pytest.mark.parametrize("size", [1, 3, 7, 8, 20])
def test_push_is_a_ring_buffer(size):
    rng = np.random.default_rng(14)
    queue, history = init_queue(jax.random.key(0), size, 2), []
    pushed = jax.jit(push)
    for step in range(6):
        student, teacher = rng.standard_normal((2, 8, 2)).astype(np.float32)
        labels = rng.integers(-1, 5, 8).astype(np.int32)
        mask = (rng.random(8) < (0.0 if step == 2 else 0.7)).astype(np.float32)
        student[mask == 0] = np.nan
        queue = pushed(queue, student, teacher, labels, mask)
        history += [(student[i], teacher[i], labels[i]) for i in np.flatnonzero(mask)]
        # Slot j holds the newest of the real rows number j, j + size, j + 2 size, ...
        assert queue["position"] == len(history) % size
        assert queue["valid"].sum() == min(size, len(history))
        for j in range(min(size, len(history))):
            newest = range(j, len(history), size)[-1]
            for name, want in zip(("student", "teacher", "labels"), history[newest], strict=True):
                np.testing.assert_array_equal(queue[name][j], want)


def test_push_defaults_dtypes_and_gradient():
    queue = init_queue(jax.random.key(0), 4, 2)
    rows = jnp.ones((2, 2), jnp.bfloat16)
    after = push(queue, rows, rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), queue)
    np.testing.assert_array_equal(after["valid"], [True, True, False, False])
    np.testing.assert_array_equal(after["labels"], [-1, -1, -1, -1])
    gradient = jax.grad(lambda x: push(queue, x, x)["student"].sum())(jnp.ones((2, 2)))
    assert not gradient.any()


def test_push_over_devices_is_push_on_one():
    rng = np.random.default_rng(15)
    rows = rng.standard_normal((2, 16, 4)).astype(np.float32)
    labels, mask = np.arange(16, dtype=np.int32), (rng.random(16) > 0.3).astype(np.float32)
    queue = init_queue(jax.random.key(0), 10, 4)
    mesh = make_mesh({"data": 8})
    split = partial(jax.device_put, device=over_batch(mesh))
    batch = (split(rows[0]), split(rows[1]), split(labels), split(mask))
    got = jax.jit(push)(jax.device_put(queue, replicated(mesh)), *batch)
    jax.tree.map(np.testing.assert_array_equal, got, push(queue, *jnp.asarray(rows), labels, mask))


def test_fresh_heads():
    params = init_contrastive(jax.random.key(0), (32, 64), (32, 256))
    assert jax.tree.map(jnp.shape, params) == {
        "student": {"kernel": (64, 128), "bias": (128,)},
        "teacher": {"kernel": (256, 128), "bias": (128,)},
    }
    for part, channels in (("student", 64), ("teacher", 256)):
        np.testing.assert_allclose(jnp.std(params[part]["kernel"]) * np.sqrt(channels), 1.0, rtol=0.05)
    norms = jnp.linalg.norm(embed(params["student"], jax.random.normal(jax.random.key(1), (5, 64))), axis=1)
    np.testing.assert_allclose(norms, np.ones(5), rtol=1e-6)


def test_bad_input_is_one_sentence():
    params, student, teacher = some_case(16)
    queue = init_queue(jax.random.key(0), 4, 8)
    for loss in LOSSES.values():
        with pytest.raises(UserError, match="at least 2 examples"):
            loss(params, student[:1], teacher[:1])
        with pytest.raises(UserError, match="pool images"):
            loss(params, student[:, None], teacher)
        with pytest.raises(UserError, match="the same batch"):
            loss(params, student, teacher[:3])
        with pytest.raises(UserError, match="for 5 channels"):
            loss(params, teacher, teacher)
        with pytest.raises(UserError, match="queue of width 3"):
            loss(params, student, teacher, queue=init_queue(jax.random.key(0), 4, 3))
        with pytest.raises(UserError, match="one value per example"):
            loss(params, student, teacher, labels=LABELS[:2])
        with pytest.raises(UserError, match="mask of shape"):
            loss(params, student, teacher, MASK[:2])
    with pytest.raises(UserError, match="did you mean 'repdistiller'"):
        crd(params, student, teacher, examples=10, variant="repdistill")
    with pytest.raises(UserError, match="pool images"):
        init_contrastive(jax.random.key(0), (2, 4, 4, 3), (2, 3))
    with pytest.raises(UserError, match="at least 1"):
        init_contrastive(jax.random.key(0), (2, 3), (2, 3), width=0)
    with pytest.raises(UserError, match="holds nothing"):
        init_queue(jax.random.key(0), 0, 8)
    with pytest.raises(UserError, match="queue of width 8"):
        push(queue, jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(UserError, match="one value per example"):
        push(queue, jnp.zeros((2, 8)), jnp.zeros((2, 8)), jnp.zeros(3, jnp.int32))

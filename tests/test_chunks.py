"""The walk over chunks of tokens: the dense loss and its gradients, whatever the chunks and the devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import chunks, sharding
from kdjax.chunks import Layout
from kdjax.head import Head
from kdjax.model import Outputs, Signal
from kdjax.objective import Setting, make_objective

BATCH, TOKENS, WIDTH, VOCABULARY = 8, 12, 16, 64
TERMS = {
    "ce": {"weight": 0.3, "label_smoothing": 0.1},
    "kl": {"weight": 0.5, "temperature": 2.0, "examples": "teacher_confidence"},
    "reverse_kl": {"weight": 0.2},
    "js": {"weight": 0.4},
    "skew_kl": {"weight": 0.4},
    "skew_reverse_kl": {"weight": 0.1},
    "total_variation": {"weight": 0.7},
}


def make(seed=0, teachers=1):
    """Hidden states and heads of a student and its teachers, and labels of which a third are out of the loss."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    student = {"hidden": normal(BATCH, TOKENS, WIDTH), "kernel": 0.5 * normal(VOCABULARY + 3, WIDTH)}
    taught = [{"hidden": normal(BATCH, TOKENS, 24), "kernel": 0.5 * normal(VOCABULARY, 24)} for _ in range(teachers)]
    labels = jax.random.randint(next(keys), (BATCH, TOKENS), 0, VOCABULARY)
    labels = jnp.where(jax.random.uniform(next(keys), labels.shape) < 0.3, -1, labels)
    return student, taught, {"labels": labels, "mask": (labels >= 0).astype(jnp.float32)}


def outputs_of(one, classes=0):
    return Outputs(hidden=one["hidden"], head=Head(one["kernel"], soft_cap=5.0, classes=classes))


def run(goal, student, taught, batch, learned=None):
    """``(loss, sums, gradients)`` for the student's arrays and what the objective learns, under jit."""

    @jax.jit
    def measure(student, taught, batch, learned, hparams):
        def loss(student, params):
            teachers = {f"t{i}": outputs_of(one) for i, one in enumerate(taught)}
            whole = {"params": params, "state": learned["state"]}
            counts = goal.counts(batch)
            return goal.loss(outputs_of(student, VOCABULARY), teachers, batch, hparams, counts, whole)

        (total, (sums, _)), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(student, learned["params"])
        return total, sums, gradient

    return measure(student, taught, batch, learned or goal.init(jax.random.key(0)), goal.hparams)


def assert_same(one, other, rtol=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


def objective(tokens_per_chunk, terms=TERMS, **setting):
    return dict(terms=terms, setting=Setting(sequences=True, tokens_per_chunk=tokens_per_chunk, **setting))


DENSE = BATCH * TOKENS


@pytest.mark.parametrize("tokens_per_chunk", [BATCH, 3 * BATCH, 48])
def test_chunks_give_the_dense_loss_and_gradients(tokens_per_chunk):
    data = make()
    assert_same(
        run(make_objective(**objective(tokens_per_chunk)), *data), run(make_objective(**objective(DENSE)), *data)
    )


def test_dense_is_the_loss_of_plain_logits():
    student, taught, batch = make()
    goal = make_objective(**objective(DENSE))
    flat = {name: x.reshape(-1) for name, x in batch.items()}
    logits = lambda one, classes=0: outputs_of(one, classes).head(one["hidden"]).reshape(DENSE, -1)
    plain = make_objective(TERMS)
    s, t = Outputs(logits(student, VOCABULARY)), {"t0": Outputs(logits(taught[0]))}
    expected, (sums, _) = plain.loss(s, t, flat, plain.hparams, plain.counts(flat))
    total, found, _ = run(goal, student, taught, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_same(found, sums)


def test_positions_out_of_the_loss_get_no_gradient_and_rows_that_pad_the_head_none():
    student, taught, batch = make()
    _, _, (gradient, _) = run(make_objective(**objective(BATCH)), student, taught, batch)
    assert (np.asarray(gradient["hidden"])[np.asarray(batch["labels"]) < 0] == 0).all()
    assert (np.asarray(gradient["kernel"])[VOCABULARY:] == 0).all()
    assert (np.abs(np.asarray(gradient["kernel"])[:VOCABULARY]).sum(-1) > 0).all()


def test_a_learned_balance_gets_its_gradient_through_the_chunks():
    data = make()
    learned = {"params": {"balance": {name: jnp.float32(0.1 * i) for i, name in enumerate(TERMS)}}, "state": {}}
    one, other = (
        run(make_objective(**objective(size), balance="uncertainty"), *data, learned) for size in (BATCH, DENSE)
    )
    assert_same(one, other)
    assert all(abs(float(x)) > 1e-3 for x in jax.tree.leaves(one[2][1]))


@pytest.mark.parametrize("combine", ["probabilities", "routed"])
def test_teachers_keep_their_order(combine):
    """Names that do not sort as the teachers are given."""
    student, taught, batch = make(teachers=2)
    batch["domain"] = jnp.broadcast_to(jnp.arange(BATCH)[:, None] % 2, batch["labels"].shape)
    weights = {"z": 0.9, "a": 0.1}

    def total(size):
        goal = make_objective(
            {"kl": {"weight": 1.0}}, weights, combine, setting=Setting(sequences=True, tokens_per_chunk=size)
        )
        teachers = {name: outputs_of(one) for name, one in zip(weights, taught, strict=True)}
        return goal.loss(outputs_of(student, VOCABULARY), teachers, batch, goal.hparams, goal.counts(batch))[0]

    np.testing.assert_allclose(total(BATCH), total(DENSE), rtol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}])
def test_over_devices_with_the_vocabulary_split_or_not(axes):
    mesh = sharding.make_mesh(axes)
    batch_axes = tuple(name for name in axes if name != "tensor")
    layout = Layout(mesh, batch_axes)
    student, taught, batch = make()
    expected = run(make_objective(**objective(DENSE)), student, taught, batch)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    rows = "tensor" if "tensor" in axes else None
    student["kernel"] = student["kernel"][:VOCABULARY]  # so that its rows divide

    def place(one):
        return {"hidden": put(one["hidden"], batch_axes), "kernel": put(one["kernel"], rows)}

    goal = make_objective(**objective(max(BATCH // layout.ways, 1) * 3, layout=layout))
    placed = place(student), [place(one) for one in taught], {name: put(x, batch_axes) for name, x in batch.items()}
    total, sums, (gradient, _) = run(goal, *placed)
    assert_same((total, sums), expected[:2])
    np.testing.assert_allclose(gradient["hidden"], expected[2][0]["hidden"], atol=1e-6)
    np.testing.assert_allclose(gradient["kernel"], expected[2][0]["kernel"][:VOCABULARY], atol=1e-6)


def collectives_in_loops(text):
    """The collective operations within the loops of a compiled program, and how many loops there are."""
    computations, name = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and " (" in line:
            name = line.split(" (")[0].removeprefix("ENTRY ").strip()
        computations.setdefault(name, []).append(line)
    bodies = [body for line in text.splitlines() for body in re.findall(r"body=(%[\w.-]+)", line)]
    reached, todo = set(), list(bodies)
    while todo:
        one = todo.pop()
        if one not in reached:
            reached.add(one)
            todo += re.findall(
                r"%[\w.-]+", " ".join(re.findall(r"(?:calls|to_apply|body)=\S+", " ".join(computations[one])))
            )
    kinds = r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    return [found for one in reached for line in computations[one] for found in re.findall(kinds, line)], len(bodies)


@pytest.mark.parametrize("local", [True, False])
def test_a_head_split_over_devices_is_gathered_once_and_its_gradient_summed_up_once(local):
    """Not once for each chunk: no collective stands within a loop, where without the layout some do."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    layout = Layout(mesh, ("data", "fsdp"))
    setting = {"layout": layout} if local else {}
    goal = make_objective(**objective(3 if local else 24, {"kl": {"weight": 1.0}}, **setting))
    student, taught, batch = make()
    student["kernel"] = student["kernel"][:VOCABULARY]
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    place = lambda one: {"hidden": put(one["hidden"], layout.axes), "kernel": put(one["kernel"], "fsdp")}
    batch = {name: put(x, layout.axes) for name, x in batch.items()}

    def loss(student, taught, batch):
        teachers = {"t": outputs_of(taught)}
        return goal.loss(outputs_of(student), teachers, batch, goal.hparams, goal.counts(batch))[0]

    text = jax.jit(jax.grad(loss)).lower(place(student), place(taught[0]), batch).compile().as_text()
    inside, loops = collectives_in_loops(text)
    assert loops > 0 and bool(inside) == (not local)


def test_a_signal_is_walked_over_with_the_student():
    student, _, batch = make()
    keys = jax.random.split(jax.random.key(5), 2)
    ids = jax.lax.top_k(jax.random.uniform(keys[0], (BATCH, TOKENS, VOCABULARY)), 4)[1].astype(jnp.int32)
    log_probs = jax.nn.log_softmax(jax.random.normal(keys[1], (BATCH, TOKENS, 5)))
    signal = Signal(ids, log_probs[..., :4], log_probs[..., 4])

    def total(size):
        goal = make_objective(
            {"top_k": {"weight": 1.0}}, setting=Setting(sequences=True, tokens_per_chunk=size, signals=True)
        )
        loss = lambda one: goal.loss(
            outputs_of(one, VOCABULARY), {"t": Outputs(signal=signal)}, batch, goal.hparams, goal.counts(batch)
        )[0]
        return jax.value_and_grad(loss)(student)

    assert_same(total(BATCH), total(DENSE))


@pytest.mark.parametrize(
    ("batch", "tokens", "classes", "axes", "per_chunk", "expected"),
    [
        (1, 4096, 32768, None, 0, 16),
        (2, 4096, 32768, {"data": 2}, 0, 16),
        (2, 4096, 32768, {"data": 2, "tensor": 4}, 0, 4),
        (1, 4096, 257, None, 0, 1),
        (4, 12, 8, None, 10, 6),
        (1, 7, 8, None, 2, 7),
    ],
)
def test_chunk_count(batch, tokens, classes, axes, per_chunk, expected):
    layout = axes and Layout(sharding.make_mesh(axes), ("data",))
    assert chunks.chunk_count(batch, tokens, classes, layout, per_chunk) == expected

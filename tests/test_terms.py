"""Every term of the catalogue in a real step: it trains, its learned parts train with it, padding does not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import models, state
from kdjax.catalogue import QKV, TERMS
from kdjax.errors import UserError
from kdjax.model import from_nnx, tap_shapes
from kdjax.objective import Setting, make_objective
from kdjax.step import make_train_step
from kdjax.taps import Network
from tests.helpers import batch

SHAPE = (8, 8, 1)
TAPPED = [name for name, term in TERMS.items() if term.reads == "taps"]
OWN = ["ema_kl", "past_predictions", "exits", "curriculum_kl"]


def network(name, **options):
    return from_nnx(lambda rngs: models.build(name, classes=10, input_shape=SHAPE, rngs=rngs, **options))


@functools.cache
def pair(kind):
    """(student, teacher, heads): real models, of different widths and depths."""
    if kind == "vit":
        make = lambda **options: network("vit_ti", patch=4, mlp_ratio=2.0, **options)
        return make(width=8, depth=2, heads=2), make(width=16, depth=4, heads=2), 2
    student = network("cnn", widths=(4, 6, 8), strides=(1, 2, 1))
    return student, network("cnn", widths=(8, 8, 12), strides=(1, 1, 2)), 0


def setting(kind, size=16):
    student, teacher, heads = pair(kind)
    inputs = jax.ShapeDtypeStruct((size, *SHAPE), jnp.float32)
    net = lambda model: Network(tap_shapes(model, inputs), heads)
    return Setting(net(student), net(teacher), classes=10, examples=200)


def kind_of(term):
    return "vit" if TERMS[term].taps == QKV or term in ("tinybert_hidden", "distilbert_cosine") else "cnn"


def options_for(term):
    """What a term cannot do without between these models."""
    return {"projector": "linear"} if "projector" in TERMS[term].options else {}


def run(term, steps=3, **options):
    """``(first state, last state, metrics of each step)`` of a term alone."""
    student, teacher, _ = pair(kind_of(term))
    goal = make_objective({term: {"weight": 1.0, **options_for(term), **options}}, setting=setting(kind_of(term)))
    optimizer = optax.sgd(1e-2)
    decay = 0.9 if goal.uses_ema else 0.0
    step = jax.jit(make_train_step(student, {"teacher": teacher}, goal, optimizer, ema_decay=decay))
    first = state.create_state(student, optimizer, jax.random.key(0), init_objective=goal.init, ema=decay > 0)
    teachers = {"teacher": teacher.init(jax.random.key(1))}
    current, found = first, []
    for _ in range(steps):
        current, metrics = step(current, teachers, batch(16), goal.hparams)
        found.append(metrics)
    return first, current, found


@pytest.mark.parametrize("term", TAPPED + OWN)
def test_a_term_trains_the_student_and_its_own_parts(term):
    first, last, metrics = run(term)
    assert np.isfinite([m["loss"][0] for m in metrics]).all()
    assert np.isfinite([m["grad_norm"][0] for m in metrics]).all()
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.params, last.params)
    assert any(jax.tree.leaves(moved))
    learned = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.learned["params"], last.learned["params"])
    assert all(jax.tree.leaves(learned)), learned
    assert jax.tree.structure(first) == jax.tree.structure(last)


@pytest.mark.parametrize("term", ["fitnets", "similarity", "rkd_angle", "pkt", "vid", "review", "minilm"])
def test_enough_steps_lower_it(term):
    _, _, metrics = run(term, steps=30)
    assert metrics[-1]["loss"][0] < metrics[0]["loss"][0]


@pytest.mark.parametrize("term", [name for name in TAPPED if not TERMS[name].random])
def test_padding_changes_neither_value_nor_gradient(term):
    student, teacher, _ = pair(kind_of(term))
    goal = make_objective({term: {"weight": 1.0, **options_for(term)}}, setting=setting(kind_of(term)))
    variables, taught = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))
    learned = goal.init(jax.random.key(2))
    data = batch(16)
    padded = {name: np.concatenate([value, value[:4]]) for name, value in data.items()}
    padded["inputs"][16:] = 7.0
    padded["mask"] = np.r_[np.ones(16), np.zeros(4)].astype(np.float32)

    @jax.jit
    def measure(params, data):
        def loss(params):
            own = {"params": params, "state": variables["state"]}
            s = student.apply(own, data["inputs"], train=False, taps=goal.student_taps)[0]
            t = teacher.apply(taught, data["inputs"], train=False, taps=goal.teacher_taps)[0]
            return goal.loss(s, {"teacher": t}, data, goal.hparams, goal.counts(data), learned)[0]

        return jax.value_and_grad(loss)(params)

    (loss, grads), (loss_padded, grads_padded) = (
        measure(variables["params"], data),
        measure(variables["params"], padded),
    )
    np.testing.assert_allclose(loss_padded, loss, rtol=1e-5)
    scale = float(optax.tree.norm(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, grads_padded)


def test_a_queue_fills_up_and_changes_the_loss():
    _, last, metrics = run("infonce", queue=24)
    queue = last.learned["state"]["infonce"]["queue"]
    assert queue["valid"].sum() == 24
    _, _, without = run("infonce")
    assert metrics[0]["loss"][0] == pytest.approx(float(without[0]["loss"][0]), rel=1e-5)  # empty at first
    assert metrics[1]["loss"][0] > without[1]["loss"][0]  # more negatives


def test_past_predictions_are_kept_by_example():
    _, last, _ = run("past_predictions", steps=1)
    past = last.learned["state"]["past_predictions"]["predictions"]
    np.testing.assert_allclose(past[:16].sum(-1), 1.0, rtol=1e-5)
    assert not past[16:].any()


def test_learned_layer_weights_move_to_the_nearest_layer():
    _, last, _ = run("similarity", 40, weight=1e3, layers="learned", student_taps=("blocks.0", "blocks.2"))
    weights = jax.nn.softmax(last.learned["params"]["similarity"]["layers"], axis=-1)
    assert weights.shape == (2, 3) and float(jnp.abs(weights - 1 / 3).max()) > 1e-3


def test_attention_terms_learn_a_layer_map_too():
    _, last, _ = run("minilm", 3, weight=10.0, layers="learned")
    assert (
        last.learned["params"]["minilm"]["layers"].shape == (2, 4) and last.learned["params"]["minilm"]["layers"].any()
    )


def test_fixed_layer_weights_are_those_of_the_config():
    _, _, equal = run("similarity", steps=1, layers="uniform")
    _, _, first = run("similarity", steps=1, layers="uniform", layer_weights=(1.0, 0.0, 0.0))
    _, _, alone = run("similarity", steps=1, student_taps=("blocks.0",), teacher_taps=("blocks.0",))
    assert first[0]["loss"][0] == pytest.approx(float(alone[0]["loss"][0]), rel=1e-6)
    assert first[0]["loss"][0] != equal[0]["loss"][0]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"fitnets": {"student_taps": ("block.1",)}}, "no module 'block.1'; near it are blocks.1"),
        ({"fitnets": {"projector": "none"}}, "projector"),
        ({"fitnets": {"layers": "every"}}, "losses.fitnets.layers"),
        ({"similarity": {"layer_weights": (1.0, 2.0)}}, "layer_weights has 2 numbers for 1"),
        ({"minilm": {}}, "finds no module like"),
        ({"vid": {"weigth": 1.0}}, "did you mean 'weight'"),
        ({"kl": {"examples": "hard"}}, "losses.kl.examples"),
        ({"crd": {"layers": "uniform"}}, "compares one pair of layers, not 3"),
        ({"review": {"layers": "learned"}}, "a learned layer map does not fit"),
        ({"mutual": {}}, "name one or more in peers"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(terms, message):
    with pytest.raises(UserError, match=message):
        make_objective(terms, setting=setting("cnn"))


def test_a_relation_of_a_single_example_is_refused():
    with pytest.raises(UserError, match="at least 2 examples"):
        make_objective({"rkd_distance": {"weight": 1.0}}, setting=setting("cnn", 1))


def test_taps_cost_nothing_but_the_terms_arithmetic():
    """FLOPs of a step with a feature term are those without it and of the term itself, as the compiler counts them."""
    # Wide enough for convolutions to be what counts: the compiler duplicates cheap arithmetic as it likes.
    student, teacher = network("cnn", widths=(16, 32, 32)), network("cnn", widths=(32, 64, 64))
    net = lambda model: Network(tap_shapes(model, jax.ShapeDtypeStruct((64, *SHAPE), jnp.float32)))
    about = Setting(net(student), net(teacher), classes=10, examples=200)
    data = jax.tree.map(jnp.asarray, batch(64))
    variables, taught = student.init(jax.random.key(0)), {"teacher": teacher.init(jax.random.key(1))}
    ce_kl = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0}}

    def flops(terms):
        goal = make_objective(terms, setting=about)
        optimizer = optax.sgd(1e-2)
        start = state.create_state(student, optimizer, jax.random.key(0), init_objective=goal.init)
        step = jax.jit(make_train_step(student, {"teacher": teacher}, goal, optimizer))
        return step.lower(start, taught, data, goal.hparams).compile().cost_analysis()["flops"]

    goal = make_objective({"similarity": {"weight": 1.0}}, setting=about)
    taps = {
        side: model.apply(v, data["inputs"], train=False, taps=names)[0]
        for side, model, v, names in (
            ("student", student, variables, goal.student_taps),
            ("teacher", teacher, taught["teacher"], goal.teacher_taps),
        )
    }

    def alone(feature):
        own = taps["student"]._replace(taps={goal.student_taps[0]: feature})
        return goal.loss(own, {"teacher": taps["teacher"]}, data, goal.hparams, goal.counts(data))[0]

    own = jax.jit(jax.value_and_grad(alone)).lower(taps["student"].taps[goal.student_taps[0]]).compile()
    with_term, without = flops({**ce_kl, "similarity": {"weight": 1.0}}), flops(ce_kl)
    assert with_term <= 1.05 * (without + own.cost_analysis()["flops"])

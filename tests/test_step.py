"""The step: exact arithmetic of teacher forward plus student update, whatever the devices and the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, sharding, state
from kdjax.objective import make_objective
from kdjax.step import make_train_step
from tests.helpers import batch, equal_trees, small

TERMS = {"kl": {"weight": 0.9, "temperature": 4.0}, "ce": {"weight": 0.1}}


def setup(terms=TERMS, student=None, optimizer=None, **options):
    student, teacher = student or small(8), small(32, norm=True, dropout=0.5)
    objective = make_objective(terms)
    optimizer = optimizer or optax.sgd(0.1)
    step = make_train_step(student, {"teacher": teacher}, objective, optimizer, **options)
    start = state.create_state(student, optimizer, jax.random.key(0))
    return jax.jit(step), start, {"teacher": teacher.init(jax.random.key(1))}, objective.hparams


def test_equals_the_update_written_out():
    step, start, teachers, hparams = setup()
    data = batch()
    new, metrics = step(start, teachers, data, hparams)
    student, teacher = small(8), small(32, norm=True, dropout=0.5)

    def loss(params):
        logits = student.apply({"params": params, "state": {}}, data["inputs"], train=True)[0].logits
        target = teacher.apply(teachers["teacher"], data["inputs"], train=False)[0].logits
        soft = losses.kl(logits, target, temperature=4.0).mean()
        return 0.9 * soft + 0.1 * losses.cross_entropy(logits, data["labels"]).mean()

    value, grads = jax.value_and_grad(loss)(start.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.params, expected)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(grads), rtol=1e-5)
    assert int(new.step) == 1
    assert metrics["ce"][1] == len(data["labels"])


def test_teacher_runs_in_eval_mode_and_is_unchanged():
    step, start, teachers, hparams = setup()
    before = jax.tree.map(np.array, teachers)
    _, first = step(start, teachers, batch(), hparams)
    _, again = step(start._replace(key=jax.random.key(9)), teachers, batch(), hparams)
    # The teacher has dropout and batch statistics: with either active, another key would give another loss.
    assert first["loss"][0] == again["loss"][0]
    assert equal_trees(before, teachers)


def test_teacher_equal_to_student_gives_no_update():
    student = small(8)
    objective = make_objective({"kl": {"weight": 1.0, "temperature": 2.0}})
    step = jax.jit(make_train_step(student, {"teacher": student}, objective, optax.sgd(1.0)))
    start = state.create_state(student, optax.sgd(1.0), jax.random.key(0))
    new, metrics = step(start, {"teacher": {"params": start.params, "state": {}}}, batch(), objective.hparams)
    assert abs(float(metrics["loss"][0])) < 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.params, start.params)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing_even_with_unequal_label_counts(parts):
    data = batch()
    data["labels"] = np.where(np.arange(32) % 5 == 0, data["labels"], -1).astype(np.int32)
    results = []
    for accumulate in (1, parts):
        step, start, teachers, hparams = setup(accumulate=accumulate)
        results.append(step(start, teachers, data, hparams))
    (whole, metrics), (split, split_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole.params, split.params)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], split_metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("axes", [{"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_equals_one_device(axes, accumulate):
    options = {"student": small(512), "optimizer": optax.sgd(0.1, momentum=0.9), "accumulate": accumulate}
    step, start, teachers, hparams = setup(**options)
    expected, expected_metrics = step(start, teachers, batch(), hparams)
    mesh = sharding.make_mesh(axes)
    place = lambda tree: jax.device_put(tree, sharding.by_rules(tree, mesh, ((".*", "fsdp"),)))
    placed = place(jax.tree.map(lambda x: x, start))
    kernel = placed.params["hidden"]["kernel"]
    assert kernel.addressable_shards[0].data.size * axes["fsdp"] == kernel.size
    assert placed.opt_state[0].trace["hidden"]["kernel"].sharding == kernel.sharding
    new, metrics = step(placed, place(teachers), sharding.put_batch(batch(), mesh), hparams)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new.params, expected.params)
    np.testing.assert_allclose(metrics["loss"][0], expected_metrics["loss"][0], rtol=1e-5)


def test_moving_average_follows_the_parameters():
    student, optimizer = small(8), optax.sgd(0.1)
    objective = make_objective({"ce": {"weight": 1.0}})
    step = jax.jit(make_train_step(student, {}, objective, optimizer, ema_decay=0.9))
    current = state.create_state(student, optimizer, jax.random.key(0), ema=True)
    expected = current.params
    for _ in range(3):
        current, _ = step(current, {}, batch(), objective.hparams)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, current.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), current.ema, expected)
    assert state.inference_variables(current)["params"] is current.ema


def test_bfloat16_compute_keeps_float32_parameters():
    from kdjax import models
    from kdjax.model import from_nnx

    build = lambda dtype: from_nnx(
        lambda rngs: models.build(
            "cnn", classes=10, input_shape=(8, 8, 1), rngs=rngs, dtype=dtype, widths=(8,), strides=(2,)
        )
    )
    data, results = batch(), {}
    data["inputs"] = data["inputs"].reshape(-1, 8, 8, 1)
    for dtype in (jnp.float32, jnp.bfloat16):
        model, objective = build(dtype), make_objective({"ce": {"weight": 1.0}})
        start = state.create_state(model, optax.sgd(0.1), jax.random.key(0))
        new, metrics = jax.jit(make_train_step(model, {}, objective, optax.sgd(0.1)))(
            start, {}, data, objective.hparams
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))
        results[dtype] = float(metrics["loss"][0])
    assert results[jnp.bfloat16] != results[jnp.float32]
    assert results[jnp.bfloat16] == pytest.approx(results[jnp.float32], rel=0.02)

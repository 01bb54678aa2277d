"""Schedules against optax's own at every step, their traced values, and the sentences for bad configs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kdjax import schedules
from kdjax.errors import UserError

STEPS = 50
make = lambda spec, **options: schedules.make(spec, **{"total_steps": STEPS, "steps_per_epoch": 10.0, **options})


def all_values(spec, steps=STEPS + 5):
    schedule = make(spec)
    return np.array(jax.jit(jax.vmap(schedule.at, in_axes=(None, 0)))(schedule.params, jnp.arange(steps)))


OPTAX = [
    (0.3, optax.constant_schedule(0.3)),
    ({"schedule": "constant", "init": 2}, optax.constant_schedule(2.0)),
    ({"schedule": "linear", "init": 4.0, "end": 1.0}, optax.linear_schedule(4.0, 1.0, STEPS)),
    ({"schedule": "linear", "init": 4.0, "end": 1.0, "length_epochs": 2}, optax.linear_schedule(4.0, 1.0, 20)),
    (
        {"schedule": "linear", "init": 4.0, "end": 1.0, "warmup_steps": 10, "warmup_init": 8.0, "length_percent": 50},
        optax.join_schedules([optax.linear_schedule(8.0, 4.0, 10), optax.linear_schedule(4.0, 1.0, 25)], [10]),
    ),
    ({"schedule": "cosine", "init": 0.1}, optax.cosine_decay_schedule(0.1, STEPS)),
    ({"schedule": "cosine", "init": 0.1, "end": 0.01}, optax.cosine_decay_schedule(0.1, STEPS, alpha=0.1)),
    (
        {"schedule": "cosine", "init": 0.1, "end": 0.02, "warmup_percent": 20, "warmup_init": 0.001},
        optax.warmup_cosine_decay_schedule(0.001, 0.1, 10, STEPS, 0.02),
    ),
    (
        {"schedule": "cosine", "init": 0.1, "warmup_epochs": 0.5},
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, STEPS),
    ),
    (
        {"schedule": "step", "init": 0.05, "boundaries_epochs": [1.5, 3, 4.5]},
        optax.piecewise_constant_schedule(0.05, {15: 0.1, 30: 0.1, 45: 0.1}),
    ),
    (
        {"schedule": "step", "init": 1, "factor": 0.5, "boundaries_percent": [20, 60], "warmup_steps": 4},
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 4), optax.piecewise_constant_schedule(1.0, {6: 0.5, 26: 0.5})], [4]
        ),
    ),
    (
        {"schedule": "piecewise", "values": [20.0, 4.0, 5.0], "boundaries_steps": (7, 30)},
        optax.piecewise_constant_schedule(20.0, {7: 0.2, 30: 1.25}),
    ),
    (
        {"schedule": "constant", "init": 0.4, "warmup_steps": 8},
        optax.warmup_constant_schedule(0.0, 0.4, 8),
    ),
]


@pytest.mark.parametrize("spec, expected", OPTAX)
def test_every_step_equals_optax(spec, expected):
    want = [float(expected(step)) for step in range(STEPS + 5)]
    np.testing.assert_allclose(all_values(spec), want, rtol=1e-5, atol=1e-7)


def test_ends_are_as_documented():
    got = all_values({"schedule": "linear", "init": 1.0, "end": 2.0, "warmup_steps": 10})
    assert got[0] == 0.0 and got[10] == 1.0
    assert got[STEPS - 1] == np.float32(2.0 - 1 / 40) and got[STEPS] == 2.0 and got[-1] == 2.0


def test_new_values_do_not_recompile():
    specs = lambda init: {
        "kl.weight": make(init),
        "kl.temperature": make({"schedule": "linear", "init": init, "end": 1.0, "warmup_steps": 3}),
        "rate": make({"schedule": "piecewise", "values": [init, 2.0], "boundaries_steps": [5]}),
    }
    built = specs(4.0)
    evaluate = jax.jit(lambda params, step: schedules.at(built, params, step))
    for init in (4.0, 2.5, 7.0):
        params = schedules.values(specs(init))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        for step in (0, 3, 20):
            got = evaluate(params, jnp.int32(step))
            for name, schedule in specs(init).items():
                assert got[name].dtype == jnp.float32 and got[name].shape == ()
                np.testing.assert_allclose(got[name], schedule.at(schedule.params, step), rtol=1e-6)
    assert evaluate._cache_size() == 1


def test_a_grid_of_values_is_mapped_over():
    built = {
        "rate": make({"schedule": "cosine", "init": 1.0}),
        "steps": make({"schedule": "step", "init": 1.0, "boundaries_steps": [9]}),
    }
    params = jax.tree.map(lambda value: jnp.stack([value, 3 * value]), schedules.values(built))
    got = jax.jit(jax.vmap(lambda p: schedules.at(built, p, jnp.int32(10))))(params)
    np.testing.assert_allclose(
        got["rate"], [optax.cosine_decay_schedule(1.0, STEPS)(10) * x for x in (1, 3)], rtol=1e-6
    )
    np.testing.assert_allclose(got["steps"], [0.1, 3 * 0.3], rtol=1e-6)


def test_values_have_a_gradient():
    """A weight may be learned or searched by gradient through its schedule."""
    schedule = make({"schedule": "linear", "init": 4.0, "end": 1.0})
    grad = jax.grad(lambda p: schedule.at(p, 10))(schedule.params)
    np.testing.assert_allclose([grad["init"], grad["end"]], [0.8, 0.2], rtol=1e-6)


def test_configdict_and_none_are_understood():
    spec = ConfigDict({"schedule": "cosine", "init": 1.0, "warmup_steps": 5})
    with spec.unlocked():
        spec.warmup_epochs = None
    np.testing.assert_array_equal(all_values(spec), all_values({"schedule": "cosine", "init": 1.0, "warmup_steps": 5}))


@pytest.mark.parametrize(
    "name, mapping, expected",
    [
        ("", {"steps": 7}, 7),
        ("", {"epochs": 2.5}, 31),
        ("", {"steps": None, "epochs": 1}, 12),
        ("warmup", {"warmup_percent": 5}, 10),
        ("warmup", {"warmup_epochs": 0.001}, 1),  # a positive length is never rounded away
        ("warmup", {"steps": 3}, None),
    ],
)
def test_steps_of(name, mapping, expected):
    assert schedules.steps_of(name, mapping, 200, 12.4) == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"schedule": "cosin", "init": 1.0}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"schedule": "linear", "init": 1.0, "end": 0.0, "warmup_step": 3}, "did you mean 'warmup_steps'"),
        ({"schedule": "constant", "init": 1.0, "end": 0.0}, "unknown key of rate.*'end'"),
        ({"schedule": "linear", "init": 1.0}, "needs 'end'"),
        ({"schedule": "step", "init": 1.0}, "no boundaries"),
        ({"schedule": "step", "init": 1.0, "boundaries_steps": [5, 5]}, "must increase"),
        ({"schedule": "step", "init": 1.0, "boundaries_steps": [5], "warmup_steps": 5}, "must increase"),
        ({"schedule": "step", "init": 1.0, "boundaries_steps": 5}, "give a list"),
        ({"schedule": "step", "init": 1.0, "boundaries_steps": [-5]}, "must be positive"),
        ({"schedule": "piecewise", "values": [1.0], "boundaries_steps": [5]}, "1 boundaries need 2 values, not 1"),
        ({"schedule": "cosine", "init": 1.0, "warmup_steps": 50}, "leaves nothing of 50"),
        ({"schedule": "cosine", "init": 1.0, "warmup_steps": -1}, "at least 0"),
        ({"schedule": "cosine", "init": 1.0, "length_steps": 0}, "must be positive"),
        ({"schedule": "cosine", "init": 1.0, "warmup_steps": 1, "warmup_epochs": 1}, "in one unit"),
        ({"schedule": "cosine", "init": "1.0"}, "rate.init is '1.0': give a finite number"),
        ("0.1", "rate is '0.1': give a finite number"),
        (True, "give a finite number"),
        (float("nan"), "give a finite number"),
    ],
)
def test_bad_input_is_one_sentence(spec, message):
    with pytest.raises(UserError, match=message):
        make(spec, name="rate")


def test_percent_needs_something_to_be_a_percent_of():
    with pytest.raises(UserError, match="use steps or epochs"):
        schedules.steps_of("", {"percent": 50}, None, 10.0)

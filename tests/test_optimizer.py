"""Optimisers against optax's own aliases and PyTorch over several steps; masks, clipping, freezing, bad configs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from kdjax import optimizer
from kdjax.errors import UserError

RATE = 0.03


def some_params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "stem": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jax.random.normal(keys[1], (4,))},
        "blocks": {"0": {"norm": {"scale": jax.random.normal(keys[2], (4,))}}},
        "head": {"kernel": jax.random.normal(keys[3], (4, 2))},
    }


def loss(params):
    """A smooth function of all parameters with gradients that change from step to step."""
    return sum(jnp.sum(jnp.sin(3.0 * p) + 0.3 * p**2) for p in jax.tree.leaves(params))


def descend(tx, params, steps=6, **extra):
    """The parameters and the optimiser's state after a few jitted steps."""

    @jax.jit
    def step(params, state, extra):
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, extra)
    return params, state


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


SAME_AS_OPTAX = [
    ({"name": "sgd"}, optax.sgd(RATE)),
    ({"name": "sgd", "momentum": 0.9}, optax.sgd(RATE, 0.9)),
    ({"name": "sgd", "momentum": 0.9, "nesterov": True}, optax.sgd(RATE, 0.9, nesterov=True)),
    ({"name": "adam"}, optax.adam(RATE)),
    ({"name": "adam", "b1": 0.8, "b2": 0.99, "eps": 1e-4}, optax.adam(RATE, 0.8, 0.99, 1e-4)),
    ({"name": "adamw"}, optax.adamw(RATE, mask=is_matrix)),
    ({"name": "adamw", "weight_decay": 0.3, "decay_mask": [".*"]}, optax.adamw(RATE, weight_decay=0.3)),
    ({"name": "lion", "weight_decay": 0.1}, optax.lion(RATE, weight_decay=0.1, mask=is_matrix)),
    ({"name": "lamb", "weight_decay": 0.1}, optax.lamb(RATE, weight_decay=0.1, mask=is_matrix)),
    ({"name": "rmsprop"}, optax.rmsprop(RATE)),
    ({"name": "rmsprop", "centered": True, "momentum": 0.9}, optax.rmsprop(RATE, centered=True, momentum=0.9)),
    (
        {"name": "adamw", "clip_norm": 0.5},
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(RATE, mask=is_matrix)),
    ),
]


@pytest.mark.parametrize("config, expected", SAME_AS_OPTAX)
def test_same_steps_as_optax(config, expected):
    params = some_params()
    got, _ = descend(optimizer.make(config, params), params, learning_rate=RATE)
    want, _ = descend(expected, params)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-7), got, want)
    jax.tree.map(lambda g, p: np.testing.assert_array_less(0, np.max(np.abs(g - p))), got, params)  # it moved


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_weight_decay_is_pytorchs(nesterov):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    start = np.asarray(some_params()["stem"]["kernel"])
    config = {"name": "sgd", "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.05}
    got, _ = descend(optimizer.make(config, {"w": start}), {"w": jnp.asarray(start)}, learning_rate=RATE)

    weight = torch.nn.Parameter(torch.tensor(start))
    peer = torch.optim.SGD([weight], lr=RATE, momentum=0.9, nesterov=nesterov, weight_decay=0.05)
    for _ in range(6):
        peer.zero_grad()
        (torch.sin(3.0 * weight) + 0.3 * weight**2).sum().backward()
        peer.step()
    np.testing.assert_allclose(got["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_new_learning_rate_does_not_recompile():
    params = some_params()
    tx = optimizer.make({"name": "sgd", "learning_rate": {"schedule": "cosine", "init": 1.0}}, params)
    update = jax.jit(lambda g, s, p, lr: tx.update(g, s, p, learning_rate=lr)[0])
    grads, state = jax.grad(loss)(params), tx.init(params)
    for rate in (0.1, 0.2, 0.0):
        updates = update(grads, state, params, jnp.float32(rate))
        jax.tree.map(lambda u, g, r=rate: np.testing.assert_allclose(u, -r * g, rtol=1e-6), updates, grads)
    assert update._cache_size() == 1


def test_updates_keep_the_dtype_of_the_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), some_params())
    tx = optimizer.make({"name": "sgd", "momentum": 0.9}, params)
    updates, _ = tx.update(params, tx.init(params), params, learning_rate=jnp.float32(0.1))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_matrices_alone_decay_by_default_and_regexes_choose_others():
    params = some_params()
    zero = jax.tree.map(jnp.zeros_like, params)

    def decayed(**config):
        tx = optimizer.make({"name": "adamw", "weight_decay": 0.5, **config}, params)
        updates, _ = tx.update(zero, tx.init(params), params, learning_rate=1.0)
        flat = jax.tree_util.tree_leaves_with_path(updates)
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, u in flat if jnp.any(u != 0)}

    assert decayed() == {"stem/kernel", "head/kernel"}
    assert decayed(decay_mask=["^stem/", "scale$"]) == {"stem/kernel", "stem/bias", "blocks/0/norm/scale"}
    assert decayed(decay_mask=[]) == set()


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_frozen_parameters_stay_without_state_and_out_of_the_norm(name):
    params = some_params()
    config = {"name": name, "clip_norm": 0.5, "freeze": ["^stem/", "norm"]}
    got, state = descend(optimizer.make(config, params), params, learning_rate=RATE)
    for frozen in ("stem", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, got[frozen], params[frozen])
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {(), (4, 2)}

    alone = {"head": params["head"]}
    want, _ = descend(optimizer.make({"name": name, "clip_norm": 0.5}, alone), alone, learning_rate=RATE)
    np.testing.assert_allclose(got["head"]["kernel"], want["head"]["kernel"], rtol=1e-6)


def test_shapes_are_enough_and_none_is_absent():
    params = some_params()
    shapes = jax.eval_shape(lambda: params)
    config = ConfigDict({"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "clip_norm": None, "freeze": None})
    got, _ = descend(optimizer.make(config, shapes), params, learning_rate=RATE)
    want, _ = descend(optimizer.make({"name": "sgd", "momentum": 0.9}, params), params, learning_rate=RATE)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "adamv"}, "unknown optimizer 'adamv': did you mean 'adam'"),
        ({}, "unknown optimizer None"),
        ({"name": "sgd", "momentun": 0.9}, "did you mean 'momentum'"),
        ({"name": "adam", "momentum": 0.9}, "unknown option of optimizer adam 'momentum'"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight decay.*use adamw"),
        ({"name": "adam", "decay_mask": [".*"]}, "adam has no weight decay"),
        ({"name": "sgd", "momentum": "0.9"}, "optimizer.momentum is '0.9': give a number"),
        ({"name": "sgd", "nesterov": 1}, "give true or false"),
        ({"name": "sgd", "clip_norm": 0}, "positive bound"),
        ({"name": "adamw", "decay_mask": ["kernel", "kernal"]}, "'kernal' matches no parameter"),
        ({"name": "adamw", "decay_mask": "kernel"}, "give a list of regexes"),
        ({"name": "adamw", "freeze": ["("]}, "is not a regex"),
        ({"name": "adamw", "freeze": ["tail"]}, "optimizer.freeze: 'tail' matches no parameter"),
        ({"name": "adamw", "freeze": [""]}, "nothing is left to train"),
    ],
)
def test_bad_input_is_one_sentence(config, message):
    with pytest.raises(UserError, match=message):
        optimizer.make(config, some_params())

"""Magnitude pruning against NumPy, its schedule, and that zeros stay zeros, also over a restart."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import optimizer
from kdjax.compress import sparsify
from kdjax.errors import UserError
from kdjax.model import flatten_paths
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.state import LEARNED
from tests.compress.trained import accuracy, fit, trained
from tests.helpers import equal_trees

CONFIG = DecoderConfig(vocabulary=16, width=8, layers=3, heads=1, kv_heads=1, head_dim=8, mlp_width=12, context=8)


@cache
def parameters():
    return jax.jit(make_decoder(CONFIG).init)(jax.random.key(0))["params"]


def gradients(params, step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def run(transform, params, state, steps, rate=0.01):
    """The parameters after each of the steps, and the last state."""

    @jax.jit
    def update(params, state, grads):
        updates, state = transform.update(grads, state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    walked = []
    for step in steps:
        params, state = update(params, state, gradients(params, step))
        walked.append(params)
    return walked, state


def test_the_schedule_is_equation_one():
    options = {"final": 0.9, "initial": 0.1, "begin": 10, "end": 110}
    steps = np.array([0, 9, 10, 35, 60, 109, 110, 500])
    t = (np.clip(steps, 10, 110) - 10) / 100
    wanted = np.where(steps < 10, 0.0, 0.9 + (0.1 - 0.9) * (1 - t) ** 3)
    np.testing.assert_allclose(sparsify.sparsity_at(steps, **options), wanted, atol=1e-6)
    np.testing.assert_allclose(sparsify.sparsity_at(7, final=0.5, begin=7, end=7), 0.5)


@pytest.mark.parametrize("scope", sparsify.SCOPES)
def test_masks_against_numpy(scope):
    """Gradient descent in NumPy: by magnitude, zeros first, and nothing grows back."""
    params, options = parameters(), {"final": 0.75, "begin": 1, "end": 7, "every": 2}
    inner = optimizer.make({"name": "sgd"}, params)
    transform = sparsify.sparsify(inner, **options, scope=scope, skip=["^head/"], params_example=params)
    walked, state = run(transform, params, transform.init(params), range(10))

    weights = {name: np.asarray(leaf) for name, leaf in flatten_paths(params).items() if leaf.ndim >= 2}
    weights = {name: leaf for name, leaf in weights.items() if name.endswith(("kernel", "embedding"))}
    del weights["head/kernel"]
    alive = {name: np.ones(leaf.shape, bool) for name, leaf in weights.items()}
    for step in range(10):
        grads = flatten_paths(gradients(params, step))
        for name in weights:
            weights[name] = np.where(alive[name], weights[name] - np.float32(0.01) * np.asarray(grads[name]), 0)
        if step in (1, 3, 5, 7):
            share = 0.75 * (1 - (1 - (step - 1) / 6) ** 3)
            groups = [[(name, ...)] for name in weights]
            if scope == "layer":
                groups = [
                    [(name, layer)]
                    for name in weights
                    for layer in (range(CONFIG.layers) if name.startswith("blocks/") else (...,))
                ]
            else:
                groups = [[(name, ...) for name in weights]]
            for group in groups:
                sizes = np.concatenate([np.abs(weights[name][part]).ravel() for name, part in group])
                dropped = round(share * sizes.size)
                edge = np.sort(sizes)[dropped - 1] if dropped else -1.0
                for name, part in group:
                    alive[name][part] &= np.abs(weights[name][part]) > edge
            for name in weights:
                weights[name] = weights[name] * alive[name]
        found = flatten_paths(walked[step])
        for name in weights:
            np.testing.assert_allclose(found[name], weights[name], atol=1e-6)
            assert np.array_equal(np.asarray(found[name]) == 0, ~alive[name])
    assert set(state.masks) == set(weights)
    assert int(state.step) == 10


def test_the_share_is_exact_zeros_stay_and_a_restart_is_exact():
    params = parameters()
    inner = optimizer.make({"name": "adamw", "clip_norm": 1.0}, params)
    transform = sparsify.sparsify(inner, final=0.8, begin=2, end=9, every=3, params_example=params)
    walked, last = run(transform, params, transform.init(params), range(14))
    before = np.zeros((), bool)
    for params_then in walked:
        zeros = np.concatenate([np.asarray(leaf).ravel() == 0 for leaf in flatten_paths(params_then).values()])
        assert not (before & ~zeros).any()
        before = zeros
    for path, leaf in flatten_paths(walked[-1]).items():
        if path.endswith(("kernel", "embedding")):
            rows = np.asarray(leaf).reshape(CONFIG.layers if path.startswith("blocks/") else 1, -1)
            assert ((rows == 0).sum(axis=1) == round(0.8 * rows.shape[1])).all()
        else:
            assert np.count_nonzero(leaf) == leaf.size

    first, state = run(transform, params, transform.init(params), range(6))
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (first[-1], state))
    second, state = run(transform, *stored, range(6, 14))
    assert equal_trees(second[-1], walked[-1]) and equal_trees(state, last)


def test_the_objectives_parameters_are_left_alone_and_members_have_masks_of_their_own():
    params = parameters()
    inner = optimizer.make({"name": "sgd"}, params)
    transform = sparsify.sparsify(inner, final=0.5, end=0, params_example=params)
    everything = {**params, LEARNED: {"projector": {"kernel": jnp.ones((4, 4))}}}
    (walked,), _ = run(transform, everything, transform.init(everything), [0])
    assert np.count_nonzero(walked[LEARNED]["projector"]["kernel"]) == 16

    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[..., ::-1]]), params)
    grads = gradients(members, 0)
    update = lambda p, g: transform.update(g, transform.init(p), p, learning_rate=0.01)[1].masks
    both = jax.jit(jax.vmap(update))(members, grads)
    for number in range(2):
        member = jax.tree.map(lambda leaf: leaf[number], (members, grads))  # noqa: B023
        assert equal_trees(jax.tree.map(lambda leaf: leaf[number], both), jax.jit(update)(*member))  # noqa: B023


def test_nothing_to_prune_is_the_inner_optimiser():
    params = parameters()
    inner = optimizer.make({"name": "adamw"}, params)
    transform = sparsify.sparsify(inner, final=0.0, end=5, params_example=params)
    found, wanted = (run(t, params, t.init(params), range(3)) for t in (transform, inner))
    assert equal_trees(found, wanted)


def test_a_network_learns_with_a_fifth_of_its_weights():
    model, variables, train, test = trained()
    inner = optax.adam(1e-3)
    options = {"final": 0.8, "begin": 5, "end": 40, "every": 5, "scope": "global"}
    transform = sparsify.sparsify(inner, **options, params_example=variables["params"])
    learned, _ = fit(model, variables, transform, train, steps=80)
    found = sparsify.sparsity(learned["params"])
    weights = [np.asarray(leaf) for path, leaf in flatten_paths(learned["params"]).items() if path.endswith("kernel")]
    zeros, size = sum((w == 0).sum() for w in weights), sum(w.size for w in weights)
    assert zeros == round(0.8 * size) and found["share_of_zeros"] == zeros / size
    assert found["nonzero"] == sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(learned["params"]))
    assert accuracy(model, learned, test) > 0.93


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 1.0, "end": 5}, "sparsity cannot go from 0.0 to 1.0"),
        ({"final": 0.5, "initial": 0.6, "end": 5}, "not falling"),
        ({"final": 0.5, "begin": 6, "end": 5}, "cannot begin at step 6 and end at step 5"),
        ({"final": 0.5, "end": 5, "every": 0}, "every 0 steps"),
        ({"final": 0.5, "end": 5, "scope": "layers"}, "unknown scope of pruning 'layers': did you mean 'layer'"),
        ({"final": 0.5, "end": 5, "skip": ["nothing"]}, "'nothing' matches no weight"),
    ],
)
def test_impossible_pruning(options, message):
    with pytest.raises(UserError, match=message):
        sparsify.sparsify(optax.adam(1e-3), **options, params_example=parameters())

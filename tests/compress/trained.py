"""A small convolutional network that has learned the digits, which the tests of compression share."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax import models
from kdjax.model import Model, from_nnx
from tests.helpers import digits

FACTORY = partial(models.build, "cnn", classes=10, input_shape=(8, 8, 1), widths=(16, 32), strides=(1, 2), dense=64)


class Trained(NamedTuple):
    model: Model
    variables: dict
    train: tuple[np.ndarray, np.ndarray]  # normalised inputs, labels
    test: tuple[np.ndarray, np.ndarray]


def factory(rngs):
    return FACTORY(rngs=rngs)


@cache
def trained() -> Trained:
    data = digits()
    normalised = lambda split: (((split.inputs - data.mean) / data.std).astype(np.float32), split.labels)
    train, test = normalised(data.train), normalised(data.test)
    model = from_nnx(factory)
    variables = jax.jit(model.init)(jax.random.key(0))
    variables, _ = fit(model, variables, optax.adam(2e-3), train, steps=200)
    return Trained(model, variables, train, test)


def fit(model, variables, optimizer, train, *, steps, batch=64):
    """The variables after so many steps of cross-entropy, and the optimiser's state."""

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss(params):
            outputs, state = model.apply({**variables, "params": params}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, y).mean(), state

        grads, state = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), "state": state}, opt_state

    opt_state, rng = optimizer.init(variables["params"]), np.random.default_rng(0)
    for _ in range(steps):
        ids = rng.integers(0, len(train[0]), batch)
        variables, opt_state = step(variables, opt_state, train[0][ids], train[1][ids])
    return variables, opt_state


def logits(model, variables, x):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False)[0].logits)(variables, jnp.asarray(x)))


def accuracy(model, variables, test) -> float:
    return float((logits(model, variables, test[0]).argmax(-1) == test[1]).mean())

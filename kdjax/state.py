"""The state of a run: a pytree and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.model import Array, Model, ModelState, Params, Variables


class TrainState(NamedTuple):
    """Everything that a step changes; what is not here is recomputed from the config and the step number.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: the student's parameters.
      model_state: what the student keeps besides, such as running batch statistics.
      opt_state: the optimiser's state.
      key: the run's random key; a step uses ``fold_in(key, step)``, so nothing else is needed to resume randomness.
      ema: the exponential moving average of the parameters; ``{}`` where there is none.
    """

    step: Array
    params: Params
    model_state: ModelState
    opt_state: Any
    key: Array
    ema: Params


def create_state(model: Model, optimizer: optax.GradientTransformation, key: Array, *, ema: bool = False) -> TrainState:
    """A fresh state: pure, so that it can be jitted with the shardings that the arrays shall be born with."""
    variables = model.init(jax.random.fold_in(key, 0))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables["state"],
        opt_state=optimizer.init(params),
        key=jax.random.fold_in(key, 1),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
    )


def inference_variables(state: TrainState) -> Variables:
    """The weights to evaluate and to hand over: the moving average where there is one."""
    return {"params": state.ema or state.params, "state": state.model_state}

"""The state of a run: a pytree and nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.model import Array, Model, ModelState, Params, Variables

LEARNED = "objective"  # where the objective's parameters stand among those that the optimiser sees


class TrainState(NamedTuple):
    """Everything that a step changes; what is not here is recomputed from the config and the step number.

    A population has a leading dimension, the member, in every array but ``step`` and ``view_key``.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: the student's parameters.
      model_state: what the student keeps besides, such as running batch statistics.
      learned: what the objective learns (``params``: projectors and such) and remembers (``state``: queues, past
        predictions); both empty for most. It is saved to resume, and never handed over with the student.
      opt_state: the optimiser's state.
      key: the student's random key; a step uses ``fold_in(key, step)``, so nothing else is needed to resume randomness.
      view_key: the random key of the batch's views, which students that share batches have in common.
      ema: the exponential moving average of the parameters; ``{}`` where there is none.
    """

    step: Array
    params: Params
    model_state: ModelState
    learned: Variables
    opt_state: Any
    key: Array
    view_key: Array
    ema: Params


def create_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: Array,
    view_key: Array | None = None,
    *,
    init_objective: Callable[[Array], Variables] | None = None,
    ema: bool = False,
) -> TrainState:
    """A fresh state: pure, so that it can be jitted with the shardings that the arrays shall be born with.

    Args:
      model: the student.
      optimizer: its optimiser.
      key: of the initial weights and of dropout.
      view_key: of the views; that of the student where there is none.
      init_objective: makes what the objective learns and remembers.
      ema: whether to keep a moving average.
    """
    variables = model.init(jax.random.fold_in(key, 0))
    params = variables["params"]
    learned = init_objective(jax.random.fold_in(key, 2)) if init_objective else {"params": {}, "state": {}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables["state"],
        learned=learned,
        opt_state=optimizer.init(trainable(params, learned["params"])),
        key=jax.random.fold_in(key, 1),
        view_key=jax.random.fold_in(key if view_key is None else view_key, 1),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
    )


def trainable(params: Params, learned: Params) -> Params:
    """All that the optimiser trains: the student's parameters and, under ``objective``, the objective's."""
    return {**params, LEARNED: learned} if learned else params


def parted(everything: Params, learned: Params) -> tuple[Params, Params]:
    """``trainable`` undone: ``(params, learned)``, where ``learned`` says whether the objective has any."""
    if not learned:
        return everything, {}
    return {name: value for name, value in everything.items() if name != LEARNED}, everything[LEARNED]


def inference_variables(state: TrainState) -> Variables:
    """The weights to evaluate and to hand over: the moving average where there is one."""
    return {"params": state.ema or state.params, "state": state.model_state}

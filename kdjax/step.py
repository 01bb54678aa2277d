"""The step: the teachers' forward pass and the student's update, as one pure function for the caller to jit."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax.model import Array, Model, Outputs, Variables
from kdjax.objective import Batch, Hparams, Objective
from kdjax.state import TrainState

HPARAMS = "hparams/"  # what the names of hyperparameters among the metrics begin with
Metrics = dict[str, tuple[Array, Array]]
Step = Callable[[TrainState, Mapping[str, Variables], Batch, Hparams], tuple[TrainState, Metrics]]


def make_train_step(
    student: Model,
    teachers: Mapping[str, Model],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    preprocess: Callable[[Batch, Array], Batch] | None = None,
    hparams_at: Callable[[Hparams, Array], Hparams] | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Step:
    """Makes ``step(state, teacher_variables, batch, hparams) -> (state, metrics)``.

    Jit it and donate the state only. Teachers run with ``train=False`` on the very inputs that the student sees,
    outside the gradient. The update of step n depends on ``state``, ``teacher_variables``, ``batch`` and ``hparams``
    alone.

    Args:
      student: the model that learns.
      teachers: the frozen models by name; may be empty where the objective needs none.
      objective: the loss.
      optimizer: any optax transformation; it is given ``learning_rate=hparams["learning_rate"]`` as an extra argument,
        which plain optax optimisers ignore.
      preprocess: ``preprocess(batch, key) -> batch``, such as normalisation and augmentation. The key is the run's, the
        same at every step: randomness is keyed by epoch and example id.
      hparams_at: ``hparams_at(hparams, step) -> values``, where hparams hold the parameters of schedules.
      accumulate: in how many parts the batch is walked over; the result is that of one part up to rounding (batch
        normalisation excepted, which sees the parts).
      ema_decay: the decay of the parameters' moving average; 0 for none.

    Returns:
      The step. Metrics are float32 (sum, count) pairs: ``loss``, each term, ``accuracy`` (on labelled examples),
      ``grad_norm``, and each hyperparameter as used, under ``hparams/NAME``.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if not objective.uses_teacher:
        teachers = {}

    def grads_of(params, model_state, teacher_variables, batch, key, values, counts):
        taught = {name: _frozen_outputs(model, teacher_variables[name], batch) for name, model in teachers.items()}

        def loss(params):
            variables = {"params": params, "state": model_state}
            outputs, new_state = student.apply(variables, batch["inputs"], train=True, key=key)
            total, sums = objective.loss(outputs, taught, batch, values, counts)
            return total, (new_state, sums)

        (total, (new_state, sums)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, new_state, {"loss": total, **sums}

    def step(state, teacher_variables, batch, hparams):
        values = hparams_at(hparams, state.step) if hparams_at else hparams
        if preprocess:
            batch = preprocess(batch, state.key)
        counts = objective.counts(batch)
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            grads, model_state, sums = grads_of(
                state.params, state.model_state, teacher_variables, batch, key, values, counts
            )
        else:
            grads, model_state, sums = _accumulated(
                grads_of, accumulate, state, teacher_variables, batch, key, values, counts
            )
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=values.get("learning_rate")
        )
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay) if ema_decay else state.ema
        new_state = TrainState(state.step + 1, params, model_state, opt_state, state.key, ema)

        one = jnp.ones((), jnp.float32)
        metrics = {name: (total, counts.get(name, one)) for name, total in sums.items()}
        metrics["grad_norm"] = (optax.tree.norm(grads), one)
        metrics |= {f"{HPARAMS}{name}": (jnp.asarray(value, jnp.float32), one) for name, value in values.items()}
        return new_state, metrics

    return step


def _frozen_outputs(teacher: Model, variables: Variables, batch: Batch) -> Outputs:
    outputs, _ = teacher.apply(variables, batch["inputs"], train=False)
    return jax.lax.stop_gradient(outputs)


def _accumulated(grads_of, parts, state, teacher_variables, batch, key, values, counts) -> tuple[Any, Any, Any]:
    """Walks over the batch in ``parts``, adding up gradients and sums; the model's state goes from part to part."""
    # Strided parts, so that each device of a sharded batch holds a share of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def body(carry, part):
        number, batch = part
        grads, model_state, sums = carry
        new_grads, model_state, new_sums = grads_of(
            state.params, model_state, teacher_variables, batch, jax.random.fold_in(key, number), values, counts
        )
        return (jax.tree.map(jnp.add, grads, new_grads), model_state, jax.tree.map(jnp.add, sums, new_sums)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(grads_of, state.params, state.model_state, teacher_variables, first, key, values, counts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
    (grads, model_state, sums), _ = jax.lax.scan(
        body, (zeros[0], state.model_state, zeros[1]), (jnp.arange(parts), split)
    )
    return grads, model_state, sums


def make_predict(
    model: Model, preprocess: Callable[[Batch], Batch] | None = None
) -> Callable[[Variables, Batch], Array]:
    """Makes the pure ``predict(variables, batch) -> logits`` [batch, ..., classes], float32, with ``train=False``."""

    def predict(variables, batch):
        inputs = (preprocess(batch) if preprocess else batch)["inputs"]
        return model.apply(variables, inputs, train=False)[0].logits.astype(jnp.float32)

    return predict

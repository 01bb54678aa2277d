"""The step: the teachers' forward pass and the students' update, as one pure function for the caller to jit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax.errors import UserError
from kdjax.model import Array, Model, Outputs, Variables, logits_of
from kdjax.objective import Batch, Hparams, Objective
from kdjax.state import TrainState, parted, trainable

HPARAMS = "hparams/"  # what the names of hyperparameters among the metrics begin with
Metrics = dict[str, tuple[Array, Array]]
Lesson = tuple[Batch, dict[str, Outputs]]  # a batch as it is learned from, and what each teacher says of it


@dataclass(frozen=True)
class Step:
    """``step(state, teacher_variables, batch, hparams) -> (state, metrics)``, to be jitted as a function is.

    Attributes:
      whole: that function.
      teach: ``teach(teacher_variables, batch, view_key) -> lesson``, the half that is the teachers', who may so be a
        batch ahead of the student.
      learn: ``learn(state, lesson, hparams) -> (state, metrics)``, the student's, of whole batches: not for a step
        that accumulates.
    """

    whole: Callable[[TrainState, Mapping[str, Variables], Batch, Hparams], tuple[TrainState, Metrics]]
    teach: Callable[[Mapping[str, Variables], Batch, Array], Lesson]
    learn: Callable[[TrainState, Lesson, Hparams], tuple[TrainState, Metrics]]

    def __call__(
        self, state: TrainState, teacher_variables: Mapping[str, Variables], batch: Batch, hparams: Hparams
    ) -> tuple[TrainState, Metrics]:
        """Both halves, one after the other."""
        return self.whole(state, teacher_variables, batch, hparams)


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
    members: int = 0,
    chunk: int = 0,
    skip_nan: bool = False,
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
        normalisation and relations between examples excepted, which see the parts).
      ema_decay: the decay of the parameters' moving average; 0 for none.
      members: how many students learn side by side from one forward pass of the teachers; 0 for a plain run. Their
        states and hparams then have a leading dimension of that size.
      chunk: how many members run at a time, a divisor of ``members``: all of them are one ``vmap``, fewer are a loop
        over smaller ones. 0 for all.
      skip_nan: a step whose loss or gradient is not finite changes nothing but the number of steps, and has no metric
        but ``skipped``; without it such a step is made like any other.

    Returns:
      The step. Metrics are float32 (sum, count) pairs, with a leading dimension in a population: ``loss``, each term,
      ``accuracy`` (on labelled examples), ``agreement`` (how often student and teachers have the same first choice),
      ``grad_norm``, ``update_norm``, with ``skip_nan`` also ``skipped``, and each hyperparameter as used, under
      ``hparams/NAME``.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if not objective.uses_teacher:
        teachers = {}
    if objective.uses_ema and not ema_decay:
        raise UserError("losses.ema_kl follows the student's moving average and there is none: set train.ema, as 0.99.")
    every_member = _over_members(members, chunk)

    def grads_of(state, taught, batch, key, values, counts):
        """The gradients of one student: ``(grads, (model_state, objective_state, sums))``."""

        def loss(everything):
            params, learned = parted(everything, state.learned["params"])
            variables = {"params": params, "state": state.model_state}
            outputs, new_state = student.apply(
                variables, batch["inputs"], train=True, key=key, taps=objective.student_taps
            )
            past = None
            if objective.uses_ema:
                average = {"params": state.ema, "state": state.model_state}
                past = student.apply(average, batch["inputs"], train=False)[0]
            whole = {"params": learned, "state": state.learned["state"]}
            total, (sums, remembered) = objective.loss(outputs, taught, batch, values, counts, whole, key, past)
            return total, (new_state, remembered, {"loss": total, **sums})

        everything = trainable(state.params, state.learned["params"])
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(everything)
        return grads, found

    def update(state, grads, found, values):
        """One student's next state (but for its step and view key, which all share) and metrics."""
        model_state, remembered, sums = found
        everything = trainable(state.params, state.learned["params"])
        rate = values.get("learning_rate")
        updates, opt_state = optimizer.update(grads, state.opt_state, everything, learning_rate=rate)
        params, learned = parted(optax.apply_updates(everything, updates), state.learned["params"])
        new = state._replace(
            params=params,
            model_state=model_state,
            learned={"params": learned, "state": remembered},
            opt_state=opt_state,
            ema=optax.incremental_update(params, state.ema, 1.0 - ema_decay) if ema_decay else state.ema,
        )
        sums = sums | {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        if not skip_nan:
            return new, sums, jnp.ones((), jnp.float32)
        good = jnp.isfinite(sums["loss"]) & jnp.isfinite(sums["grad_norm"])
        keep = lambda new, old: jnp.where(good, new, old)
        # Zeros, since a sum that is not finite would make NaN of the window's mean even with a count of 0.
        sums = {name: keep(total, jnp.zeros_like(total)) for name, total in sums.items()}
        return jax.tree.map(keep, new, state), sums, good.astype(jnp.float32)

    def taught_by(teacher_variables, batch):
        outputs = {}
        for number, (name, model) in enumerate(teachers.items()):
            taps = () if number else objective.teacher_taps  # features come from the first teacher
            outputs[name] = model.apply(teacher_variables[name], batch["inputs"], train=False, taps=taps)[0]
        # One by one: a map over the dict would sort the teachers, and the first one is the one that is tapped.
        return {name: jax.lax.stop_gradient(output) for name, output in outputs.items()}

    def prepared(batch, view_key):
        return preprocess(batch, view_key) if preprocess else batch

    def teach(teacher_variables, batch, view_key):
        batch = prepared(batch, view_key)
        return batch, taught_by(teacher_variables, batch)

    def learn(state, lesson, hparams):
        batch, taught = lesson
        return learn_of(state, batch, lambda _: taught, hparams)

    def step(state, teacher_variables, batch, hparams):
        batch = prepared(batch, state.view_key)
        return learn_of(state, batch, lambda part: taught_by(teacher_variables, part), hparams)

    def learn_of(state, batch, taught_of, hparams):
        """A step on a batch, of each part of which ``taught_of`` says what the teachers say."""
        counts = objective.counts(batch)
        shared = (state.step, state.view_key)
        state = state._replace(step=None, view_key=None)  # what is left has the members' dimension
        per_member = every_member(lambda hparams: hparams_at(hparams, shared[0]) if hparams_at else hparams)
        values = per_member(hparams)

        def part(state, batch, number):
            """All students' gradients on a part of the batch, of which the teachers run once."""
            taught: dict[str, Outputs] = taught_of(batch)

            def one(state, values):
                key = jax.random.fold_in(state.key, shared[0])
                key = key if accumulate == 1 else jax.random.fold_in(key, number)
                return grads_of(state, taught, batch, key, values, counts)

            return every_member(one)(state, values)

        grads, found = part(state, batch, 0) if accumulate == 1 else _accumulated(part, accumulate, state, batch)
        state, sums, good = every_member(update)(state, grads, found, values)
        state = state._replace(step=shared[0] + 1, view_key=shared[1])

        one = jnp.ones_like(good)
        metrics = {name: (total, good * counts.get(name, 1.0)) for name, total in sums.items()}
        metrics |= {"skipped": (one - good, one)} if skip_nan else {}
        metrics |= {f"{HPARAMS}{name}": (jnp.asarray(value, jnp.float32), one) for name, value in values.items()}
        return state, metrics

    return Step(step, teach, learn)


def _over_members(members: int, chunk: int) -> Callable[[Callable], Callable]:
    """What maps a function of one student over a population: nothing, ``vmap``, or a loop over chunks of it."""
    if not members:
        return lambda function: function
    if chunk in (0, members):
        return jax.vmap
    return lambda function: (
        lambda *arguments: jax.lax.map(
            lambda member: function(*member), arguments, batch_size=chunk if chunk > 1 else None
        )
    )


def _accumulated(part: Callable, parts: int, state: TrainState, batch: Batch) -> tuple[Any, Any]:
    """Walks over the batch in ``parts``, adding up gradients and sums; what models and objective keep besides goes from
    part to part."""
    # Strided parts, so that each device of a sharded batch holds a share of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def body(carry, numbered):
        number, batch = numbered
        grads, model_state, remembered, sums = carry
        current = state._replace(model_state=model_state, learned={**state.learned, "state": remembered})
        new_grads, (model_state, remembered, new_sums) = part(current, batch, number)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        return (add(grads, new_grads), model_state, remembered, add(sums, new_sums)), None

    first = jax.tree.map(lambda x: x[0], split)
    grads, (_, _, sums) = jax.eval_shape(part, state, first, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
    start = (zeros[0], state.model_state, state.learned["state"], zeros[1])
    (grads, model_state, remembered, sums), _ = jax.lax.scan(body, start, (jnp.arange(parts), split))
    return grads, (model_state, remembered, sums)


def make_predict(
    model: Model, preprocess: Callable[[Batch], Batch] | None = None
) -> Callable[[Variables, Batch], Array]:
    """Makes the pure ``predict(variables, batch) -> logits`` [batch, ..., classes], float32, with ``train=False``."""

    def predict(variables, batch):
        inputs = (preprocess(batch) if preprocess else batch)["inputs"]
        return logits_of(model.apply(variables, inputs, train=False)[0]).astype(jnp.float32)

    return predict

"""Text out of a language model: greedy or sampled continuation of prompts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.errors import UserError
from kdjax.model import Array, Model, Variables, logits_of


def generate(
    model: Model,
    variables: Variables,
    prompt: ArrayLike,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    key: Array | None = None,
    stop: int | None = None,
) -> Array:
    """Continues prompts by ``new_tokens`` tokens each.

    For samples to look at, and for data sets of a teacher's own text at small scale: every token runs the whole forward
    over the whole buffer, with no cache of keys and values. The head is applied to one position only. It compiles once
    for each model, batch size and total length.

    Args:
      model: a language model, with ``hidden`` and ``head`` in its outputs.
      variables: its variables.
      prompt: int [b, p], token ids, 1 or more of them; prompts of different lengths take different calls.
      new_tokens: how many to add; 1 or more. The model's context must hold ``p + new_tokens``.
      temperature: 0 takes the most probable token, the lowest id among equals; above 0 draws from
        softmax(logits / temperature).
      key: the random key for a temperature above 0.
      stop: an id, such as that of the end of the text; a row that generates it repeats it to the end.

    Returns:
      int32 [b, p + new_tokens], the prompts and what follows.

    Raises:
      UserError: a prompt that is not [b, p], no token asked for, a negative temperature, no key to draw with, or more
        tokens than the model's context.
    """
    # On the host: with weights split over processes, nothing else may lie on the devices of one of them.
    given = np.asarray(prompt, np.int32)
    if given.ndim != 2 or not given.size:
        raise UserError(f"a prompt has the shape {given.shape}: it must be [rows, tokens], with a token or more.")
    if new_tokens < 1:
        raise UserError(f"new_tokens is {new_tokens}: it must be 1 or more.")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}: it must be 0 (the most probable token) or more.")
    if temperature and key is None:
        raise UserError(f"temperature is {temperature} and there is no key: pass key=jax.random.key(0) to draw tokens.")
    buffer = np.pad(given, ((0, 0), (0, new_tokens)))
    drawn_by = np.asarray(jax.random.key_data(key)) if temperature and key is not None else None
    return _continue(model, variables, buffer, given.shape[1], temperature, drawn_by, stop)


@partial(jax.jit, static_argnums=0)
def _continue(
    model: Model,
    variables: Variables,
    buffer: Array,
    start: int,
    temperature: float,
    key_data: Array | None,
    stop: int | None,
) -> Array:
    """Fills the buffer from ``start``; the model is causal, so what still lies beyond a token does not matter."""
    key = None if key_data is None else jax.random.wrap_key_data(key_data)

    def step(i: Array, tokens: Array) -> Array:
        outputs, _ = model.apply(variables, {"tokens": tokens}, train=False)
        last = jax.lax.dynamic_index_in_dim(outputs.hidden, i - 1, axis=1, keepdims=False)
        logits = logits_of(outputs._replace(hidden=last))
        if key is None:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        if stop is not None:
            ended = (i > start) & (tokens[:, i - 1] == stop)
            drawn = jnp.where(ended, stop, drawn)
        return tokens.at[:, i].set(drawn.astype(jnp.int32))

    return jax.lax.fori_loop(start, buffer.shape[1], step, buffer)

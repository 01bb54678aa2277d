"""Several teachers as one, for any loss on scores."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from kdjax.errors import UserError, unknown
from kdjax.losses.response import Array, Scalar, _log_softmax, _require_same_shape

COMBINATIONS = ("probabilities", "logits")


def combine_logits(
    teacher_logits: Sequence[Array],
    weights: Array | Sequence[float],
    *,
    how: str = "probabilities",
    temperature: Scalar = 1.0,
) -> Array:
    """Several teachers as one set of logits, to be used by any loss here.

    probabilities: the z with softmax(z / T) = Σ_i w_i softmax(z_i / T), which is z = T log Σ_i w_i softmax(z_i / T);
    logits: z = Σ_i w_i z_i, whose softmax is the normalised weighted geometric mean. Use the T of the loss, else the
    mixture is taken at one temperature and softened at another.

    Args:
        teacher_logits: n arrays of one shape [..., classes], float.
        weights: [n], or [n, ...] for weights of each position; not negative. They are divided by their sum over the
            teachers; where all are 0, as in padding, the teachers count alike.
        how: "probabilities" or "logits".
        temperature: T > 0; unused by "logits".

    Returns:
        [..., classes] float32.

    Raises:
        UserError: no teacher, shapes or counts that differ, or an unknown `how`.

    Source: Hinton et al. 2015, section 1 (arithmetic or geometric mean of an ensemble's distributions).
    """
    weights_n = jnp.asarray(weights, jnp.float32)
    count = len(teacher_logits)
    if not count or weights_n.shape not in ((count,), (count, *teacher_logits[0].shape[:-1])):
        raise UserError(
            f"{count} teachers need as many weights, not weights of shape {weights_n.shape}: give one weight per "
            "teacher, or one per teacher and position."
        )
    for logits in teacher_logits[1:]:
        _require_same_shape(logits, teacher_logits[0])
    total = jnp.sum(weights_n, axis=0, keepdims=True)
    shares_n = jnp.where(total > 0, weights_n / jnp.where(total > 0, total, 1.0), 1.0 / count)
    weighted = [(w[..., None] if w.ndim else w, z) for w, z in zip(shares_n, teacher_logits, strict=True)]
    # A teacher of weight 0 has no say, not even in what it rules out or cannot tell (0 · -inf and 0 · NaN are NaN).
    if how == "probabilities":
        parts = (jnp.where(w > 0, jnp.log(w) + _log_softmax(z, temperature), -jnp.inf) for w, z in weighted)
        return temperature * functools.reduce(jnp.logaddexp, parts)
    if how == "logits":
        return functools.reduce(jnp.add, (jnp.where(w > 0, w * z.astype(jnp.float32), 0.0) for w, z in weighted))
    raise unknown("combination of teachers", how, COMBINATIONS)

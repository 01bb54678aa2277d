"""Sparse response losses: what a student learns from the few classes that its teacher's signal names.

A signal is `(ids, log_probs, log_rest)`, see `kdjax.model.Signal`: classes, the log of their probabilities, and the log
of what is left for all other classes together. `top_k` keeps the most probable classes and the mass of the others,
`draw` keeps a sample of the distribution; `sparse_kl` compares a student with either. Logits are [..., classes] of any
float dtype, all arithmetic is in float32, and nothing of the shape [..., k, classes] is ever made.

An empty place of a signal has the log-probability -inf: its id says nothing, its class belongs to the others.
"""

import math

import jax
import jax.numpy as jnp

from kdjax.errors import UserError

Array = jax.Array


def top_k(logits: Array, k: int) -> tuple[Array, Array, Array]:
    """The k most probable classes, and the mass of all others.

    The mass of the others is a log-sum-exp of their own logits: 1 - Σ p would be rounding alone where the classes kept
    hold nearly everything.

    Args:
        logits: [..., classes], float.
        k: how many classes to keep.

    Returns:
        ids, int32 [..., k], most probable first; their log-probabilities, float32 [..., k]; the log of the mass of the
        others, float32 [...], which is -inf at k = classes.

    Raises:
        UserError: k is not in 1..classes.

    Source: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (top-k and its
    bias), with the others as one more bucket.
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise UserError(f"k={k} of {classes} classes cannot be kept: choose k from 1 to {classes}.")
    logits = logits.astype(jnp.float32)
    # Exact at this recall, and as fast as lax.top_k, before which XLA gathers the positions of all devices on each.
    kept, ids = jax.lax.approx_max_k(logits, k, recall_target=1.0)
    total = jax.nn.logsumexp(logits, axis=-1)
    log_rest = jax.nn.logsumexp(_replaced(logits, ids, -jnp.inf), axis=-1) - total
    return ids.astype(jnp.int32), kept - total[..., None], log_rest


def draw(key: Array, logits: Array, samples: int) -> tuple[Array, Array, Array]:
    """Random sampling: classes drawn with replacement from softmax(logits), each with its share of the draws.

    The expectation of the drawn distribution is softmax(logits) itself, so the gradient of `sparse_kl` is unbiased,
    which that of renormalised top-k classes is not.

    A draw inverts the distribution function twice: first over blocks of about √classes classes, then within the block.
    One float32 function over all classes would carry a rounding error as large as the probability of the rarest ones;
    over √classes entries it stays near 1e-7 of a block, below the noise of a billion drawn positions. Gumbel noise for
    every class and sample has no such error, and costs samples · classes random numbers per position where this costs
    2 · samples. The memory is samples · √classes per position. A class of probability 0 is never drawn.

    Args:
        key: of the random numbers; one per example, so that what is drawn does not depend on the batch.
        logits: [..., classes], float.
        samples: how many draws.

    Returns:
        ids, int32 [..., samples], ascending, each once; log(count / samples), float32 [..., samples]; the log of what
        is left, float32 [...], always -inf. The places beyond the distinct classes are empty: id 0, -inf.

    Raises:
        UserError: samples is less than 1.

    Source: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs"
    (RS-KD).
    """
    if samples < 1:
        raise UserError(f"samples={samples}: draw at least 1.")
    drawn = jnp.sort(_categorical(key, logits.astype(jnp.float32), samples), axis=-1)
    count = jnp.sum(drawn[..., :, None] == drawn[..., None, :], axis=-1)
    again = jnp.concatenate([jnp.zeros_like(drawn[..., :1], jnp.bool_), drawn[..., 1:] == drawn[..., :-1]], axis=-1)
    order = jnp.where(again, logits.shape[-1], drawn)
    order, count = jax.lax.sort((order, jnp.where(again, 0, count)), num_keys=1)
    ids = jnp.where(count > 0, order, 0)
    return ids, jnp.log(count.astype(jnp.float32) / samples), jnp.full(ids.shape[:-1], -jnp.inf, jnp.float32)


def sparse_kl(student_logits: Array, ids: Array, log_probs: Array, log_rest: Array) -> Array:
    """Kullback-Leibler divergence from a teacher's signal to the student, over the signal's buckets.

    Σ_i p_i (log p_i - log q_i) + r (log r - log q_r) + 1 - Σ_i p_i - r, where q = softmax(student_logits), r is what
    the signal leaves for the others and q_r the student's mass of them. The last part is 0 for probabilities; where a
    cache has rounded them it keeps the divergence at 0 or more. Buckets are coarser than classes, so this is at
    most the dense forward `kl`, and equal to it at k = classes. Where r = 0 (a drawn signal) the gradient is that of
    cross-entropy with p as soft targets.

    q_r is a log-sum-exp of the others' logits. From 1 - Σ q_i it would have an absolute error of 1e-7, so a relative
    one of 1e-4 where the classes kept hold 99.9 % of the student.

    Args:
        student_logits: [..., classes], float.
        ids: int [..., k], each class at most once.
        log_probs: [..., k], float; -inf where a place is empty.
        log_rest: [...], float; -inf where nothing is left.

    Returns:
        [...] float32, in nats; infinite where the student rules out what the teacher does not. A class whose logit is
        -inf gets no gradient, and neither does the signal: it is data.

    Raises:
        UserError: shapes that do not belong together.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2, over buckets.
    """
    positions, k = student_logits.shape[:-1], ids.shape[-1]
    if not (ids.shape == log_probs.shape == (*positions, k) and log_rest.shape == positions):
        raise UserError(
            f"logits of shape {student_logits.shape} need ids and log_probs of shape {(*positions, k)} and log_rest of "
            f"shape {positions}, not {ids.shape}, {log_probs.shape} and {log_rest.shape}."
        )
    return _sparse_kl(student_logits, ids, log_probs.astype(jnp.float32), log_rest.astype(jnp.float32))


# A derivative of its own: it needs the logits and two numbers per position, where the transposed gathers and
# log-sum-exps would keep and walk several more arrays [..., classes].
@jax.custom_vjp
def _sparse_kl(logits: Array, ids: Array, log_probs: Array, log_rest: Array) -> Array:
    return _forward(logits, ids, log_probs, log_rest)[0]


def _forward(logits, ids, log_probs, log_rest):
    total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    others = _replaced(logits, _places(ids, log_probs, logits), -jnp.inf)
    log_q_rest = jax.nn.logsumexp(others.astype(jnp.float32), axis=-1) - total
    log_q = _gathered(logits, ids) - total[..., None]
    loss = jnp.sum(jnp.where(jnp.isneginf(log_probs), 0.0, _summand(log_probs, log_q)), axis=-1)
    return loss + _summand(log_rest, log_q_rest), (logits, ids, log_probs, log_rest, total, log_q_rest)


def _backward(residuals, cotangent):
    """With m = Σ p + r: m q_j - p_j for a class of the signal, (m - r / q_r) q_j for each of the others."""
    logits, ids, log_probs, log_rest, total, log_q_rest = residuals
    mass = jnp.sum(jnp.exp(log_probs), axis=-1) + jnp.exp(log_rest)
    ratio = jnp.where(jnp.isneginf(log_q_rest), -jnp.inf, log_rest - log_q_rest)
    # r / q_r may overflow where r q_j / q_r does not: the factor m - r / q_r is held as its sign and logarithm.
    scale = jnp.maximum(ratio, 0.0)
    factor = mass * jnp.exp(-scale) - jnp.exp(ratio - scale)
    log_factor = jnp.log(jnp.abs(factor)) + scale
    sign = cotangent * jnp.sign(factor)
    of_others = sign[..., None] * jnp.exp(logits.astype(jnp.float32) + (log_factor - total)[..., None])
    z = _gathered(logits, ids)
    of_kept = mass[..., None] * jnp.exp(z - total[..., None]) - jnp.exp(log_probs)
    of_kept = jnp.where(jnp.isneginf(z), 0.0, cotangent[..., None] * of_kept)
    gradient = _replaced(of_others.astype(logits.dtype), _places(ids, log_probs, logits), of_kept.astype(logits.dtype))
    return gradient, None, None, None


_sparse_kl.defvjp(_forward, _backward)


def _summand(log_p: Array, log_q: Array) -> Array:
    """p (log p - log q) - p + q of one bucket: its rounding cancels where p = q; q alone where p = 0."""
    p, outside = jnp.exp(log_p), jnp.isneginf(log_p)
    log_ratio = jnp.where(outside, 0.0, log_p) - jnp.where(outside, 0.0, log_q)
    return p * log_ratio - p + jnp.exp(log_q)


def _places(ids: Array, log_probs: Array, logits: Array) -> Array:
    """The ids to write to: out of bounds, so that nothing is written, where a place is empty."""
    return jnp.where(jnp.isneginf(log_probs), logits.shape[-1], ids)


def _gathered(logits: Array, ids: Array) -> Array:
    return jnp.take_along_axis(logits, ids, axis=-1).astype(jnp.float32)


def _replaced(x: Array, ids: Array, values: Array | float) -> Array:
    """A copy of x [..., classes] with the values [..., k] at ids [..., k]; ids out of bounds are left out."""
    put = lambda row, places, new: row.at[places].set(new, mode="drop")
    # vmap, so that the leading axes are the scatter's batch axes and stay where they are when sharded.
    for _ in range(x.ndim - 1):
        put = jax.vmap(put)
    return put(x, ids, jnp.broadcast_to(jnp.asarray(values, x.dtype), ids.shape))


def _categorical(key: Array, logits: Array, samples: int) -> Array:
    """Independent draws from softmax(logits), int32 [..., samples]: a block of classes, then a class of the block."""
    classes = logits.shape[-1]
    size = math.isqrt(classes - 1) + 1
    blocks = -(-classes // size)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * size - classes)]
    logits = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*logits.shape[:-1], blocks, size)
    uniform = jax.random.uniform(key, (2, *logits.shape[:-2], samples))
    block = _inverted(jax.nn.logsumexp(logits, axis=-1)[..., None, :], uniform[0])
    within = jnp.take_along_axis(logits, block[..., None], axis=-2)
    return block * size + _inverted(within, uniform[1])


def _inverted(logits: Array, uniform: Array) -> Array:
    """The entries at which the distribution functions of logits [..., samples or 1, n] pass uniform [..., samples]."""
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    # Rounding must neither lower the function nor raise it where there is no mass: what has none is never drawn.
    passed = jax.lax.cummax(jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0), axis=logits.ndim - 1)
    goal = uniform[..., None] * passed[..., -1:]
    return jnp.sum(passed <= goal, axis=-1, dtype=jnp.int32)

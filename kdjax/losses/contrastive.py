"""Contrastive losses: student and teacher embeddings of one example attract, those of different examples repel.

Features pass through two learned heads (a dense layer to `width`, then division by the l2 norm) that train with the
student. Notation: s_i and t_j are the unit embeddings of student and teacher, x_ij = s_i · t_j / τ their score, τ the
temperature. The positive of an example is its own row; its negatives are the other real rows of the batch and, if a
queue is given, the queue's entries. With labels, rows and entries of the same class are left out of the negatives; a
label of -1 (unlabelled) equals no other.

The batch is the global one: under `jit` with a sharded batch the product of all embeddings is the all-gather, so that
every device sees the negatives of all the others. The queue is an optional, checkpointed array state of past
embeddings, in place of a memory bank as large as the data set; no gradient flows into it. It keeps no identities: only
labels keep an example's own past embedding out of its negatives.

Every loss returns one float32 value per example, [b], 0 in padded rows, whose content has no effect on the others.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown

Array = jax.Array
Scalar = float | Array
Head = dict[str, Array]
Queue = dict[str, Array]

CRD_VARIANTS = ("paper", "repdistiller")
_NOWHERE = -1e30  # the score of a pair that is left out: finite, so that no gradient meets inf - inf


def init_contrastive(
    key: Array, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], *, width: int = 128
) -> dict[str, Head]:
    """The two heads: {"student": {"kernel" [c_s, width], "bias" [width]}, "teacher": the same for c_t}, float32.

    Kernels are normal with variance 1 / c, biases are 0.

    Args:
        key: a JAX random key.
        student_shape: (b, c_s), the shape of pooled features with the batch.
        teacher_shape: (b, c_t).
        width: of the common space.

    Raises:
        UserError: features that are not [b, c], or a width below 1.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", section 3.1 (g^S, g^T).
    """
    if width < 1:
        raise UserError(f"contrastive heads of width {width} hold nothing: choose a width of at least 1, such as 128.")
    params = {}
    for part, shape in (("student", student_shape), ("teacher", teacher_shape)):
        _require_pooled(part, shape)
        key, part_key = jax.random.split(key)
        kernel = jax.nn.initializers.lecun_normal()(part_key, (shape[1], width), jnp.float32)
        params[part] = {"kernel": kernel, "bias": jnp.zeros(width, jnp.float32)}
    return params


def unit(x: Array) -> Array:
    """x / ||x||₂ over the last axis; a row of zeros stays zero, with a finite gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))


def embed(head: Head, x: Array) -> Array:
    """Features [b, c] of any float dtype to float32 unit embeddings [b, width], such as those that `push` takes.

    Args:
        head: {"kernel" [c, width], "bias" [width]}, one part of what `init_contrastive` makes.
        x: [b, c].

    Raises:
        UserError: features that are not [b, c], or another c than the head was made for.
    """
    _require_pooled("the", x.shape)
    kernel, bias = head["kernel"], head["bias"]
    if x.shape[1] != kernel.shape[0]:
        raise UserError(
            f"a contrastive head for {kernel.shape[0]} channels got features of shape {x.shape}: "
            "make it with init_contrastive from the shapes that it is used on."
        )
    return unit(jnp.matmul(x.astype(jnp.float32), kernel, precision="highest") + bias[None])


def infonce(
    params: dict[str, Head],
    student: Array,
    teacher: Array,
    mask: Array | None = None,
    *,
    temperature: Scalar = 0.1,
    queue: Queue | None = None,
    labels: Array | None = None,
) -> Array:
    """InfoNCE with the student as anchor: L_i = -log [e^{x_ii} / (e^{x_ii} + Σ_{j ∈ negatives(i)} e^{x_ij})].

    Negatives are teacher embeddings. Without a negative the loss is 0.

    Args:
        params: the heads of `init_contrastive`.
        student: [b, c_s], float.
        teacher: [b, c_t], float.
        mask: [b], 1 = real, 0 = padding; None: all real.
        temperature: τ > 0.
        queue: past embeddings, of `init_queue` and `push`.
        labels: [b], integer classes whose members are no negatives of each other; -1 = unlabelled.

    Returns:
        [b] float32, in nats; 0 in padded rows.

    Raises:
        UserError: shapes that do not fit, or a batch of 1 without a queue.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4.
    """
    real = _check("InfoNCE", params, student, teacher, mask, queue, labels)
    s, t = _embeddings(params, student, teacher, real)
    scores = _scores(s, t, queue["teacher"] if queue is not None else None) / temperature
    negatives = _negatives(real, labels, queue)
    others = jax.nn.logsumexp(jnp.where(negatives, scores, _NOWHERE), axis=1)
    # log(1 + e^z) keeps the relative precision of a small loss, which logsumexp(all) - positive loses.
    return jnp.where(real, jax.nn.softplus(others - jnp.diagonal(scores)), 0.0)


def crd(
    params: dict[str, Head],
    student: Array,
    teacher: Array,
    mask: Array | None = None,
    *,
    examples: Scalar,
    temperature: Scalar = 0.07,
    queue: Queue | None = None,
    labels: Array | None = None,
    variant: str = "paper",
) -> Array:
    """Contrastive representation distillation: noise-contrastive estimation of which pairs belong together.

    L_i = Σ over both anchors of [-log h(x_ii) - Σ_{j ∈ negatives(i)} log(1 - h(x_ij))], with the critic
    h(x) = e^x / (e^x + n_i / N), n_i the number of negatives of example i, N the size of the data set. The student as
    anchor has teacher embeddings as negatives, the teacher as anchor has student embeddings. Without a negative the
    loss is 0.

    variant "repdistiller" divides e^x by Z, as the authors' code does: h(x) = (e^x / Z) / (e^x / Z + n_i / N), with
    Z = N · mean e^x over the pairs of this batch, one per anchor and a constant for the gradient. N cancels, and the
    critic starts at 1 / (1 + n): without Z it starts near 1 where n is much smaller than N. Their code takes Z from the
    first batch and keeps it, which is one number more to carry, and adds 1e-7 to the denominator.

    In both variants the negatives differ from that code's: the global batch and the queue here, random entries of a
    memory bank of N slots there, whose slots move by a momentum of 0.5 and take no gradient. Here the rows of the batch
    do take gradients as negatives.

    Args:
        params: the heads of `init_contrastive`.
        student: [b, c_s], float.
        teacher: [b, c_t], float.
        mask: [b], 1 = real, 0 = padding; None: all real.
        examples: N > 0; the chance of a pair under the noise distribution is 1 / N. Unused by "repdistiller".
        temperature: τ > 0.
        queue: past embeddings, of `init_queue` and `push`.
        labels: [b], integer classes whose members are no negatives of each other; -1 = unlabelled.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32, in nats; 0 in padded rows.

    Raises:
        UserError: shapes that do not fit, a batch of 1 without a queue, or an unknown variant.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", eqs. 17-19 (there N counts the negatives and M
    the examples), labels as in its sampling by class.
    """
    if variant not in CRD_VARIANTS:
        raise unknown("CRD variant", variant, CRD_VARIANTS)
    real = _check("CRD", params, student, teacher, mask, queue, labels)
    s, t = _embeddings(params, student, teacher, real)
    negatives = _negatives(real, labels, queue)
    log_noise = -jnp.log(jnp.asarray(examples, jnp.float32))
    loss = jnp.zeros(len(real), jnp.float32)
    for anchors, others, past in ((s, t, "teacher"), (t, s, "student")):
        scores = _scores(anchors, others, queue[past] if queue is not None else None) / temperature
        loss += _nce(scores, negatives, log_noise if variant == "paper" else _log_mean(scores, negatives))
    return jnp.where(real, loss, 0.0)


def init_queue(key: Array, size: int, width: int) -> Queue:
    """An empty queue of past embeddings: a first-in, first-out ring of `size` slots.

    Returns:
        {"student": [size, width] float32, "teacher": the same, "labels": [size] int32 (-1 = unlabelled), "valid":
        [size] bool (whether the slot was written), "position": int32 scalar (the slot to write next)}. Empty slots hold
        random unit vectors, which no loss reads, so that the state is well formed even for a reader that skips "valid".

    Raises:
        UserError: a size or width below 1.

    Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.2.
    """
    if size < 1 or width < 1:
        raise UserError(f"a queue of {size} embeddings of width {width} holds nothing: choose both of at least 1.")
    student_key, teacher_key = jax.random.split(key)
    return {
        "student": unit(jax.random.normal(student_key, (size, width), jnp.float32)),
        "teacher": unit(jax.random.normal(teacher_key, (size, width), jnp.float32)),
        "labels": jnp.full(size, -1, jnp.int32),
        "valid": jnp.zeros(size, jnp.bool_),
        "position": jnp.zeros((), jnp.int32),
    }


def push(
    queue: Queue,
    student_embeddings: Array,
    teacher_embeddings: Array,
    labels: Array | None = None,
    mask: Array | None = None,
) -> Queue:
    """The queue after the real rows of a batch, in order, have replaced its oldest entries.

    Of a batch larger than the queue only the last rows stay. Push after the loss: an example that is already in the
    queue is its own negative.

    Args:
        queue: of `init_queue`.
        student_embeddings: [b, width], of `embed`; a constant for the gradient.
        teacher_embeddings: [b, width].
        labels: [b] integers, -1 = unlabelled; None: all unlabelled.
        mask: [b], 1 = real, 0 = padding (not written); None: all real.

    Returns:
        A new queue of the same shapes and dtypes.

    Raises:
        UserError: shapes that do not fit the queue.
    """
    size, width = queue["student"].shape
    batch = len(student_embeddings)
    for embeddings in (student_embeddings, teacher_embeddings):
        if embeddings.shape != (batch, width):
            raise UserError(
                f"a queue of width {width} cannot take embeddings of shapes {student_embeddings.shape} (student) and "
                f"{teacher_embeddings.shape} (teacher): push what embed returns, of the width of the heads."
            )
    _require_rows("labels", labels, batch)
    _require_rows("mask", mask, batch)
    real = jnp.ones(batch, jnp.bool_) if mask is None else mask.astype(jnp.bool_)
    order = jnp.cumsum(real, dtype=jnp.int32)  # 1, 2, ... over the real rows
    count = order[-1]
    kept = real & (order > count - size)
    # Kept rows have slots of their own, for writes to one slot have no defined order; the others go out of bounds.
    slots = jnp.where(kept, (queue["position"] + order - 1) % size, size)
    rows = {
        "student": jax.lax.stop_gradient(student_embeddings),
        "teacher": jax.lax.stop_gradient(teacher_embeddings),
        "labels": jnp.full(batch, -1) if labels is None else labels,
        "valid": kept,
    }
    written = {
        name: queue[name].at[slots].set(value.astype(queue[name].dtype), mode="drop") for name, value in rows.items()
    }
    return {**written, "position": (queue["position"] + count) % size}


def _embeddings(params: dict[str, Head], student: Array, teacher: Array, real: Array) -> tuple[Array, Array]:
    """The unit embeddings [b, width] of both; padded rows are those of zeros, whatever they held."""
    clean = lambda x: jnp.where(real[:, None], x.astype(jnp.float32), 0.0)
    return embed(params["student"], clean(student)), embed(params["teacher"], clean(teacher))


def _scores(anchors: Array, others: Array, past: Array | None) -> Array:
    """Cosines [b, b + size] of every anchor with every row of the batch, then with every entry of the queue."""
    cosines = jnp.matmul(anchors, others.T, precision="highest")
    if past is None:
        return cosines
    past_cosines = jnp.matmul(anchors, jax.lax.stop_gradient(past).T, precision="highest")
    return jnp.concatenate([cosines, past_cosines], axis=1)


def _negatives(real: Array, labels: Array | None, queue: Queue | None) -> Array:
    """Which pairs [b, b + size] are negatives, bool; no padded row has, or is, a negative."""
    present, classes = real, labels
    if queue is not None:
        present = jnp.concatenate([real, queue["valid"].astype(jnp.bool_)])
        classes = None if labels is None else jnp.concatenate([labels.astype(jnp.int32), queue["labels"]])
    negatives = real[:, None] & present[None] & ~jnp.eye(len(real), len(present), dtype=jnp.bool_)
    if labels is None or classes is None:
        return negatives
    return negatives & ~((labels[:, None] == classes[None]) & (labels[:, None] >= 0))


def _nce(scores: Array, negatives: Array, log_noise: Array) -> Array:
    """-log h(positive) - Σ_negatives log(1 - h), [b], with h(x) = sigmoid(x - log n - log_noise)."""
    count = jnp.sum(negatives, axis=1)
    threshold = jnp.log(jnp.maximum(count, 1).astype(jnp.float32)) + log_noise
    attract = jax.nn.softplus(threshold - jnp.diagonal(scores))
    repel = jnp.sum(jax.nn.softplus(scores - threshold[:, None]), axis=1, where=negatives)
    return jnp.where(count > 0, attract + repel, 0.0)  # no negative: n = 0, so h = 1


def _log_mean(scores: Array, negatives: Array) -> Array:
    """log of the mean e^x over all pairs of this batch: log(Z / N) of RepDistiller, a constant for the gradient."""
    has_negatives = jnp.any(negatives, axis=1)[:, None]
    pairs = negatives | (has_negatives & jnp.eye(scores.shape[0], scores.shape[1], dtype=jnp.bool_))
    total = jax.nn.logsumexp(jnp.where(pairs, scores, _NOWHERE))
    return jax.lax.stop_gradient(total - jnp.log(jnp.maximum(jnp.sum(pairs), 1).astype(jnp.float32)))


def _check(
    method: str,
    params: dict[str, Head],
    student: Array,
    teacher: Array,
    mask: Array | None,
    queue: Queue | None,
    labels: Array | None,
) -> Array:
    """Raises UserError where shapes do not fit; returns which rows are real, bool [b]."""
    _require_pooled("student", student.shape)
    _require_pooled("teacher", teacher.shape)
    batch = student.shape[0]
    if teacher.shape[0] != batch:
        raise UserError(
            f"{method} got {batch} student and {teacher.shape[0]} teacher examples: "
            "give both models the same batch, row by row."
        )
    if batch < 2 and queue is None:
        raise UserError(
            f"{method} needs at least 2 examples in the batch, for it has no negatives otherwise: "
            "use a larger batch or a queue."
        )
    width = params["student"]["kernel"].shape[1]
    if queue is not None and queue["student"].shape[1] != width:
        raise UserError(
            f"{method} with heads of width {width} got a queue of width {queue['student'].shape[1]}: "
            "make both of one width."
        )
    _require_rows("labels", labels, batch)
    _require_rows("mask", mask, batch)
    return jnp.ones(batch, jnp.bool_) if mask is None else mask.astype(jnp.bool_)


def _require_pooled(whose: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise UserError(
            f"contrastive heads take {whose} features of shape [b, c], not {tuple(shape)}: "
            "pool images over height and width, and tokens over time, first."
        )


def _require_rows(name: str, values: Any, batch: int) -> None:
    if values is not None and values.shape != (batch,):
        raise UserError(f"{name} of shape {values.shape} does not fit {batch} examples: give one value per example.")

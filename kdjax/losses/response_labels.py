"""Response losses that treat the labelled class apart, or weigh a position by what it costs on its label.

Every function takes logits [..., classes] of any float dtype and labels [...], integer class indices, and returns one
float32 value per position, [...]. A label outside [0, classes), such as -1 for an unlabelled example, gives 0 and no
gradient: its position is the caller's to leave out of the count. All are what the method adds beside plain
cross-entropy. Notation, temperatures and classes of logit -inf are those of `kdjax.losses.response`.
"""

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown
from kdjax.losses.response import _divergence, _log_softmax, _log_softmax_pair, _require_same_shape, _square

Array = jax.Array
Scalar = float | Array

TEACHER_FREE_VARIANTS = ("paper", "Teacher-free-Knowledge-Distillation")


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
    target_weight: Scalar = 1.0,
    other_weight: Scalar = 8.0,
) -> Array:
    """Decoupled KD, times T²: T² [target_weight · TCKD + other_weight · NCKD].

    TCKD = KL(b_T || b_S) between the binary distributions (p[label], 1 - p[label]); NCKD = KL(p̂_T || p̂_S) between the
    distributions over the other classes, renormalised. Plain KL is TCKD + (1 - p_T[label]) NCKD, so a confident
    teacher's NCKD, which it suppresses, is set free here.

    Args:
        student_logits: [..., classes], float, at least 2 classes.
        teacher_logits: [..., classes], float, of the same shape.
        labels: [...], integer class indices.
        temperature: T > 0.
        target_weight: the weight of TCKD (the paper's α).
        other_weight: the weight of NCKD (the paper's β, 8 for most of its CIFAR-100 pairs).

    Returns:
        [...] float32, in nats; 0 where both distributions are equal.

    Raises:
        UserError: shapes that do not fit, or a single class.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", section 3 (eq. 7); their code's warm-up is the
    schedule's business.
    """
    is_label, labelled = _label_mask(student_logits, teacher_logits, labels)
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, temperature)
    target = _divergence(_binary(log_pt, is_label), _binary(log_ps, is_label))
    others_s, others_t = _others(student_logits, is_label, temperature), _others(teacher_logits, is_label, temperature)
    loss = target_weight * target + other_weight * _divergence(others_t, others_s)
    return jnp.where(labelled, _square(temperature) * loss, 0.0)


def nkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 1.0,
    other_weight: Scalar = 1.5,
) -> Array:
    """Normalised KD: the label's soft target, and a cross-entropy over the renormalised other classes.

    -p_T[label] log p_S[label] - other_weight · T² Σ_{k ≠ label} p̂_T[k] log p̂_S[k]. The first part is at T = 1, p̂ is
    the softmax over the other classes at T. These are the two terms that the authors' loss adds to the cross-entropy
    with the label. Both are cross-entropies: the value at student == teacher is not 0. There the gradient of the second
    part is 0, and the first still pulls p_S[label] up, p_T[label] times as hard as the label itself would.

    Args:
        student_logits: [..., classes], float, at least 2 classes.
        teacher_logits: [..., classes], float, of the same shape.
        labels: [...], integer class indices.
        temperature: T > 0 (the paper's λ) of the second part.
        other_weight: the weight of the second part (the paper's γ).

    Returns:
        [...] float32, in nats.

    Raises:
        UserError: shapes that do not fit, or a single class.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", section 3.1.
    """
    is_label, labelled = _label_mask(student_logits, teacher_logits, labels)
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, 1.0)
    others_s, others_t = _others(student_logits, is_label, temperature), _others(teacher_logits, is_label, temperature)
    target = jnp.exp(_at_label(log_pt, is_label)) * -_at_label(log_ps, is_label)
    loss = target + other_weight * _square(temperature) * _soft_cross_entropy(others_t, others_s)
    return jnp.where(labelled, loss, 0.0)


def weighted_soft_labels(
    student_logits: Array, teacher_logits: Array, labels: Array, *, temperature: Scalar = 2.0
) -> Array:
    """WSLD: soft-target cross-entropy, times T², weighted by how far the student lags behind the teacher.

    w · T² (-Σ_k p_T log p_S) with w = 1 - exp(-L_S / L_T), where L are both sides' cross-entropies with the label at
    T = 1. An example that the student has mastered (L_S -> 0) gets w -> 0: its soft label is regularisation that it no
    longer needs. w is a constant for the gradient, as in the authors' code: else the student could lower the loss by
    lowering the weight. So at student == teacher the gradient is 0 while the value, a cross-entropy, is not.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        labels: [...], integer class indices.
        temperature: T > 0.

    Returns:
        [...] float32, in nats.

    Raises:
        UserError: shapes that do not fit.

    Source: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
    Perspective", section 4. Their code adds 1e-7 to L_T; here only L_T = 0 is guarded.
    """
    is_label, labelled = _label_mask(student_logits, teacher_logits, labels)
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, 1.0)
    student_nll, teacher_nll = -_at_label(log_ps, is_label), -_at_label(log_pt, is_label)
    lag = student_nll / jnp.maximum(teacher_nll, jnp.finfo(jnp.float32).tiny)
    weight = jax.lax.stop_gradient(-jnp.expm1(-lag))
    soft_s, soft_t = _log_softmax_pair(student_logits, teacher_logits, temperature)
    return jnp.where(labelled, weight * _square(temperature) * _soft_cross_entropy(soft_t, soft_s), 0.0)


def teacher_free(
    logits: Array, labels: Array, *, temperature: Scalar = 20.0, correct: Scalar = 0.99, variant: str = "paper"
) -> Array:
    """Tf-KD_reg: KL to a teacher made by hand, which is right with probability `correct` and otherwise uniform.

    With u = correct at the label and (1 - correct) / (K - 1) elsewhere:
    paper: T² KL(u_T || p_T), where u_T = softmax(log u / T) and p_T = softmax(z / T): both sides softened (the
    paper writes no T², which belongs to every softened term here).
    Teacher-free-Knowledge-Distillation (the authors' code): KL(softmax(u / T) || softmax(z)) / K, which takes the
    probabilities u for logits, leaves the student unsoftened, and averages over the classes too; multiply the weight
    by K and by its `multiplier` to have their settings.
    K counts the classes whose logit is not -inf.

    Args:
        logits: [..., classes], float: the student's.
        labels: [...], integer class indices.
        temperature: T > 0.
        correct: the hand-made teacher's probability of the label, between 0 and 1.
        variant: "paper" or "Teacher-free-Knowledge-Distillation".

    Returns:
        [...] float32, in nats; 0 where the student says what the hand-made teacher says.

    Raises:
        UserError: shapes that do not fit, a single class, or an unknown variant.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", eq. 9.
    """
    is_label, labelled = _label_mask(logits, logits, labels)
    possible = ~jnp.isneginf(logits)
    count = jnp.sum(possible, axis=-1, keepdims=True).astype(jnp.float32)
    made = jnp.where(is_label, correct, (1.0 - correct) / jnp.maximum(count - 1.0, 1.0))
    if variant == "paper":
        log_teacher = _log_softmax(jnp.where(possible, jnp.log(made), -jnp.inf), temperature)
        loss = _square(temperature) * _divergence(log_teacher, _log_softmax(logits, temperature))
    elif variant == "Teacher-free-Knowledge-Distillation":
        log_teacher = _log_softmax(jnp.where(possible, made, -jnp.inf), temperature)
        loss = _divergence(log_teacher, _log_softmax(logits, 1.0)) / count[..., 0]
    else:
        raise unknown("variant of teacher_free", variant, TEACHER_FREE_VARIANTS)
    return jnp.where(labelled, loss, 0.0)


def _label_mask(student_logits: Array, teacher_logits: Array, labels: Array) -> tuple[Array, Array]:
    """([..., classes] bool, the label's class; [...] bool, whether there is a label)."""
    _require_same_shape(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    if student_logits.shape[:-1] != labels.shape:
        raise UserError(
            f"logits of shape {student_logits.shape} need labels of shape {student_logits.shape[:-1]}, "
            f"not {labels.shape}: give one class index per position."
        )
    if classes < 2:
        raise UserError(f"logits of shape {student_logits.shape} have a single class: give logits of 2 or more.")
    # A mask instead of a gather: no label reads out of bounds, and without one the arithmetic stays finite.
    is_label = jax.nn.one_hot(labels, classes, dtype=jnp.bool_)
    return is_label, jnp.any(is_label, axis=-1)


def _at_label(values: Array, is_label: Array) -> Array:
    return jnp.sum(jnp.where(is_label, values, 0.0), axis=-1)


def _binary(log_p: Array, is_label: Array) -> Array:
    """(log p[label], log(1 - p[label])), [..., 2]; the second by summing the others, exact where p[label] -> 1."""
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, log_p), axis=-1)
    return jnp.stack([_at_label(log_p, is_label), others], axis=-1)


def _others(logits: Array, is_label: Array, temperature: Scalar) -> Array:
    """Log-probabilities among the classes that are not the label, whose own is -inf."""
    return _log_softmax(jnp.where(is_label, -jnp.inf, logits.astype(jnp.float32)), temperature)


def _soft_cross_entropy(log_p: Array, log_q: Array) -> Array:
    """-Σ p log q over the last axis; classes of p = 0 add 0."""
    return -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, log_q), axis=-1)

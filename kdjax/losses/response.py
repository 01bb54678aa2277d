"""Response losses: what a student learns from class scores, its teacher's or the label's.

Every function takes logits [..., classes] of any float dtype and returns one float32 value per position, [...]: the
sum over classes. The caller masks, weighs and reduces over positions. `dist` alone relates positions to each other: it
takes their mask and returns a scalar. Notation: z are logits, p_T = softmax(z_t / T) the softened teacher,
p_S = softmax(z_s / T) the softened student, T the temperature.

Every softened divergence carries the factor T² (Hinton et al. 2015, section 2): its bare gradient shrinks as 1/T², so
the factor keeps the term's weight comparable when T changes or follows a schedule.

A class whose logit is -inf has probability 0. If student and teacher both rule it out, it adds nothing to the loss
and gets no gradient; a teacher's class that the student rules out makes the forward divergence infinite, as it is. A
position with no class left is NaN. Temperatures and other numbers may be Python floats or traced scalars.
"""

import math

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown

Array = jax.Array
Scalar = float | Array

DIRECTIONS = ("forward", "reverse")
STANDARDISATIONS = ("paper", "logit-standardization-KD")
DIST_VARIANTS = ("paper", "image_classification_sota")

# A vector whose variance is below this share of its mean square is constant up to the rounding of float32.
FLAT = 1e-12


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: Scalar = 0.0) -> Array:
    """Cross-entropy with a smoothed one-hot target: H(q', p), q'(k) = (1 - ε) [k = label] + ε / K.

    K is the number of classes whose logit is not -inf. A label outside [0, classes), such as -1 for an unlabelled
    example, gives 0 and no gradient: its position is the caller's to leave out of the count.

    Args:
        logits: [..., classes], float.
        labels: [...], integer class indices.
        label_smoothing: ε in [0, 1).

    Returns:
        [...] float32, in nats.

    Raises:
        UserError: the leading shape of logits is not the shape of labels.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.
    """
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"logits of shape {logits.shape} need labels of shape {logits.shape[:-1]}, not {labels.shape}: "
            "give one class index per position."
        )
    log_p = _log_softmax(logits, 1.0)
    # A mask instead of a gather: it fuses, it stays local when classes are sharded, and no label reads out of bounds.
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    nll = -jnp.sum(jnp.where(is_label, log_p, 0.0), axis=-1)
    possible = ~jnp.isneginf(log_p)
    uniform = -jnp.mean(log_p, axis=-1, where=possible)
    labelled = jnp.any(is_label, axis=-1)
    return jnp.where(labelled, (1.0 - label_smoothing) * nll + label_smoothing * uniform, 0.0)


def kl(student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 1.0, direction: str = "forward") -> Array:
    """Kullback-Leibler divergence between softened teacher and student, times T².

    forward: T² KL(p_T || p_S) = T² Σ_k p_T (log p_T - log p_S), which spreads the student over all that the teacher
    does; its gradient is that of soft-target cross-entropy. reverse: T² KL(p_S || p_T), which seeks a mode.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        temperature: T > 0.
        direction: "forward" or "reverse".

    Returns:
        [...] float32, in nats; 0 where both distributions are equal.

    Raises:
        UserError: shapes differ, or an unknown direction.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2 (forward); Gu et al. 2024,
    "MiniLLM", section 2.1 (reverse).
    """
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, temperature)
    if direction == "forward":
        divergence = _divergence(log_pt, log_ps)
    elif direction == "reverse":
        divergence = _divergence(log_ps, log_pt)
    else:
        raise unknown("direction", direction, DIRECTIONS)
    return _square(temperature) * divergence


def jensen_shannon(
    student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 1.0, beta: Scalar = 0.5
) -> Array:
    """Generalised Jensen-Shannon divergence, times T²: T² [β KL(p_T || m) + (1 - β) KL(p_S || m)].

    m = β p_T + (1 - β) p_S. It is bounded, symmetric at β = 1/2, and finite even where the supports differ.

    The ends are not KL: the divergence itself goes to 0 as β goes to 0 or 1. Only the ratios go to KL:
    JSD/β -> KL(p_T || p_S) as β -> 0, JSD/(1 - β) -> KL(p_S || p_T) as β -> 1. So β also scales the gradient, and
    an implementation that returns KL at β = 0 and 1 jumps there; here use `kl` for those.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        temperature: T > 0.
        beta: β strictly between 0 and 1.

    Returns:
        [...] float32, in nats.

    Raises:
        UserError: shapes differ.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), section 2.
    """
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_pt, log_ps, beta)
    divergence = beta * _divergence(log_pt, log_m) + (1.0 - beta) * _divergence(log_ps, log_m)
    return _square(temperature) * divergence


def skew_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    skew: Scalar = 0.1,
    direction: str = "forward",
) -> Array:
    """Skew Kullback-Leibler divergence, times T²: KL to a mixture that holds a share of the first distribution.

    forward: T² KL(p_T || λ p_T + (1 - λ) p_S); reverse: T² KL(p_S || λ p_S + (1 - λ) p_T). The mixture bounds the
    density ratio by 1/λ, hence the loss by -log λ and its gradient. λ -> 0 is `kl` of the same direction.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        temperature: T > 0.
        skew: λ in [0, 1).
        direction: "forward" or "reverse".

    Returns:
        [...] float32, in nats.

    Raises:
        UserError: shapes differ, or an unknown direction.

    Source: Ko et al. 2024, "DistiLLM", section 3.1 (α-SKL and α-SRKL).
    """
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, temperature)
    if direction == "forward":
        divergence = _divergence(log_pt, _log_mixture(log_pt, log_ps, skew))
    elif direction == "reverse":
        divergence = _divergence(log_ps, _log_mixture(log_ps, log_pt, skew))
    else:
        raise unknown("direction", direction, DIRECTIONS)
    return _square(temperature) * divergence


def standardised_kl(
    student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 2.0, variant: str = "paper"
) -> Array:
    """KL between softened z-scores of the logits, times T²: only the relations within a logit vector matter.

    T² KL(softmax(Z(z_t) / T) || softmax(Z(z_s) / T)), Z(z) = (z - mean) / σ over the classes, so the loss is blind to
    a shift and to a positive scale of either side. paper: σ² = Σ (z - mean)² / K. logit-standardization-KD (the
    authors' code): σ = sqrt(Σ (z - mean)² / (K - 1)) + 1e-7. K counts the classes whose logit is not -inf. Equal
    logits have no z-score: they count as zeros, without a gradient.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        temperature: T > 0, in units of σ.
        variant: "paper" or "logit-standardization-KD".

    Returns:
        [...] float32, in nats; 0 where the z-scores are equal.

    Raises:
        UserError: shapes differ, or an unknown variant.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", section 4, algorithms 1 and 2.
    """
    if variant not in STANDARDISATIONS:
        raise unknown("variant of standardised_kl", variant, STANDARDISATIONS)
    return kl(_z_score(student_logits, variant), _z_score(teacher_logits, variant), temperature=temperature)


def total_variation(student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 1.0) -> Array:
    """Total variation distance, times T: T ½ Σ_k |p_T - p_S|.

    The factor is T, not T²: as T grows, p_T - p_S tends to (z_t - z_s, centred) / (K T), and the gradient of its
    absolute value shrinks as 1/T alone. The gradient through each class is bounded, whatever the teacher says.

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.
        temperature: T > 0.

    Returns:
        [...] float32, between 0 and T.

    Raises:
        UserError: shapes differ.

    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", section 3 (TVD).
    """
    log_ps, log_pt = _log_softmax_pair(student_logits, teacher_logits, temperature)
    return 0.5 * temperature * jnp.sum(jnp.abs(jnp.exp(log_pt) - jnp.exp(log_ps)), axis=-1)


def dist(
    student_logits: Array,
    teacher_logits: Array,
    mask: Array | None = None,
    *,
    temperature: Scalar = 1.0,
    inter_weight: Scalar = 1.0,
    intra_weight: Scalar = 1.0,
    variant: str = "paper",
) -> Array:
    """DIST: match the correlations of the teacher's probabilities, between classes and between examples.

    inter_weight · mean_i d(p_S[i, :], p_T[i, :]) + intra_weight · mean_k d(p_S[:, k], p_T[:, k]), where d = 1 - ρ is
    Pearson's distance, over the examples i that the mask keeps and over the classes k. It is computed as half the
    squared distance of the unit vectors, which is exact where both agree. A constant vector has no ρ: its distance is
    1, without a gradient (the public code's value).

    ρ is blind to scale, so the gradient does not shrink as T grows: the paper has no factor.
    image_classification_sota (the authors' code) multiplies by T² all the same.

    Args:
        student_logits: [..., classes], float; every leading position is an example.
        teacher_logits: [..., classes], float, of the same shape.
        mask: [...], 1 for a real example and 0 for padding; all are real without it.
        temperature: T > 0.
        inter_weight: the weight of the relation between classes.
        intra_weight: the weight of the relation between examples.
        variant: "paper" or "image_classification_sota".

    Returns:
        A float32 scalar; 0 with fewer than 2 real examples.

    Raises:
        UserError: shapes differ, fewer than 2 examples, or an unknown variant.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", section 3.
    """
    _require_same_shape(student_logits, teacher_logits)
    positions, classes = student_logits.shape[:-1], student_logits.shape[-1]
    if math.prod(positions) < 2:
        raise UserError(f"dist needs at least 2 examples to relate, not logits of shape {student_logits.shape}.")
    if mask is not None and mask.shape != positions:
        raise UserError(f"dist with logits of shape {student_logits.shape} needs a mask of shape {positions}.")
    if variant not in DIST_VARIANTS:
        raise unknown("variant of dist", variant, DIST_VARIANTS)
    real = jnp.ones(math.prod(positions), jnp.bool_) if mask is None else mask.reshape(-1).astype(jnp.bool_)

    def probabilities(logits: Array) -> Array:
        # Padding goes before any arithmetic: not even its NaN may reach the gradient.
        return jnp.exp(_log_softmax(jnp.where(real[:, None], logits.reshape(-1, classes), 0.0), temperature))

    p_s, p_t = probabilities(student_logits), probabilities(teacher_logits)
    count = jnp.sum(real)
    every_class = jnp.ones((1, classes), jnp.bool_)
    inter = jnp.sum(jnp.where(real, _pearson_distance(p_s, p_t, every_class), 0.0)) / jnp.maximum(count, 1)
    intra = jnp.mean(_pearson_distance(p_s.T, p_t.T, real[None, :]))
    loss = inter_weight * inter + intra_weight * intra
    factor = _square(temperature) if variant == "image_classification_sota" else 1.0
    return jnp.where(count >= 2, factor * loss, 0.0)


def logits_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """Regression on logits: ½ ||z_s - z_t||², summed over classes.

    Unlike the softened terms it also fixes the constant that softmax ignores, and it has no temperature (it is the
    limit of `kl` at high T, times the number of classes, for logits of zero mean).

    Args:
        student_logits: [..., classes], float.
        teacher_logits: [..., classes], float, of the same shape.

    Returns:
        [...] float32, in squared logits.

    Raises:
        UserError: shapes differ.

    Source: Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", eq. 1 (there averaged over examples).
    """
    _require_same_shape(student_logits, teacher_logits)
    student, teacher = student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
    both_masked = jnp.isneginf(student) & jnp.isneginf(teacher)
    error = jnp.where(both_masked, 0.0, student) - jnp.where(both_masked, 0.0, teacher)
    return 0.5 * jnp.sum(jnp.square(error), axis=-1)


def _log_softmax(logits: Array, temperature: Scalar) -> Array:
    """log softmax(logits / T) over the last axis in float32; -inf stays -inf and sends no gradient, to T neither."""
    logits = logits.astype(jnp.float32)  # before anything else: bfloat16 softmaxes of equal logits differ under jit
    masked = jnp.isneginf(logits)
    scaled = jnp.where(masked, 0.0, logits) / temperature
    return jax.nn.log_softmax(jnp.where(masked, -jnp.inf, scaled), axis=-1)


def _log_softmax_pair(student_logits: Array, teacher_logits: Array, temperature: Scalar) -> tuple[Array, Array]:
    _require_same_shape(student_logits, teacher_logits)
    return _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)


def _divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) over the last axis; 0 log 0 = 0. The inner `where`s keep NaN out of the gradient.

    q - p sums to 0 but for rounding. With it every summand is 0 to first order where p = q, and the rounding of the
    two normalisers cancels: at T = 20 the relative error falls from 5e-5 to 5e-6.
    """
    p, outside = jnp.exp(log_p), jnp.isneginf(log_p)
    log_ratio = jnp.where(outside, 0.0, log_p) - jnp.where(outside, 0.0, log_q)
    return jnp.sum(p * log_ratio - p + jnp.exp(log_q), axis=-1)


def _z_score(logits: Array, variant: str) -> Array:
    logits = logits.astype(jnp.float32)
    possible = ~jnp.isneginf(logits)
    count = jnp.sum(possible, axis=-1, keepdims=True)
    present = jnp.where(possible, logits, 0.0)
    centred = jnp.where(possible, present - jnp.sum(present, axis=-1, keepdims=True) / count, 0.0)
    square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
    constant = square <= FLAT * jnp.sum(jnp.square(present), axis=-1, keepdims=True)
    square = jnp.where(constant, 1.0, square)
    freedom, offset = (count, 0.0) if variant == "paper" else (jnp.maximum(count - 1, 1), 1e-7)
    deviation = jnp.sqrt(square / freedom) + offset
    return jnp.where(possible, jnp.where(constant, 0.0, centred / deviation), -jnp.inf)


def _pearson_distance(x: Array, y: Array, valid: Array) -> Array:
    """1 - ρ(x, y) over the last axis, [n, m] -> [n], of the entries where valid; 1 where x or y is constant."""

    def unit(vectors: Array) -> tuple[Array, Array]:
        vectors = jnp.where(valid, vectors, 0.0)
        # ρ does not depend on the scale: dividing it out keeps the squares of tiny probabilities above underflow.
        scale = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
        vectors = vectors / jnp.where(scale == 0, 1.0, scale)
        mean = jnp.sum(vectors, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
        centred = jnp.where(valid, vectors - mean, 0.0)
        square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
        constant = square <= FLAT * jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
        return jnp.where(constant, 0.0, centred / jnp.sqrt(jnp.where(constant, 1.0, square))), constant[..., 0]

    (x, x_constant), (y, y_constant) = unit(x), unit(y)
    return jnp.where(x_constant | y_constant, 1.0, 0.5 * jnp.sum(jnp.square(x - y), axis=-1))


def _log_mixture(log_p: Array, log_q: Array, share: Scalar) -> Array:
    """log(share · p + (1 - share) · q), never leaving log space."""
    log_p, log_q = jnp.log(share) + log_p, jnp.log1p(-share) + log_q
    outside = jnp.isneginf(log_p) & jnp.isneginf(log_q)  # where logaddexp has no derivative
    mixture = jnp.logaddexp(jnp.where(outside, 0.0, log_p), jnp.where(outside, 0.0, log_q))
    return jnp.where(outside, -jnp.inf, mixture)


def _square(temperature: Scalar) -> Array:
    return jnp.square(jnp.asarray(temperature, jnp.float32))


def _require_same_shape(one: Array, other: Array) -> None:
    # Broadcasting would hide a difference in classes or batch.
    if one.shape != other.shape:
        raise UserError(
            f"logits of shapes {one.shape} and {other.shape} cannot be compared: "
            "give both the same positions and the same classes."
        )

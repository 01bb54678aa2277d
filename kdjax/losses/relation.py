"""Relation losses: what a student learns from how the teacher relates examples, channels or layers to each other.

Relations between examples take a batch of student and one of teacher features of any float dtype, [b, ...], flattened
to [b, c] (the two widths may differ: only the relations are compared), and return a float32 scalar. Their `mask`, [b],
is 1 for a real example and 0 for padding, which changes neither value nor gradient whatever it holds; fewer than 2 real
examples give 0. Relations inside an example (`fsp`, `ickd`) return one float32 value per example, [b].

The result does not depend on the order of the batch. Papers write some of these as sums over pairs or triples; here
each is a mean over the real ones, so that a term's weight does not depend on the size of the batch.

Products of features run at the highest matmul precision: accelerators' default (bfloat16 or TF32 passes) would be the
largest error here, and these products are small beside the networks'.

Dimensions: b examples, c channels or flattened features, p positions; n is the number of real examples.
"""

import math

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown

Array = jax.Array
Scalar = float | Array

HIGHEST = jax.lax.Precision.HIGHEST


def rkd_distance(student: Array, teacher: Array, mask: Array | None = None, *, variant: str = "paper") -> Array:
    """Relational KD by distances: mean Huber(d_S[i, j] / μ_S - d_T[i, j] / μ_T) over ordered pairs i ≠ j.

    d are Euclidean distances, μ each side's mean distance over the pairs, Huber(x) = ½ x² for |x| <= 1, else |x| - ½.
    Blind to a translation, rotation or scale of either side. paper: the mean over the n (n - 1) pairs. repdistiller
    (and the authors' code): the sum divided by n², as it counts the zeros of i = j. Memory: up to b² c floats.

    Args:
        student, teacher: [b, ...], float.
        mask: [b], 1 for a real example, 0 for padding.
        variant: "paper" or "repdistiller".

    Returns:
        A float32 scalar.

    Raises:
        UserError: batches differ, fewer than 2 examples, or an unknown variant.

    Source: Park et al. 2019, "Relational Knowledge Distillation", section 3.2 (distance-wise loss).
    """
    _require_variant("rkd_distance", variant, "repdistiller")
    student, teacher, real = _examples("rkd_distance", student, teacher, mask)
    pairs = _pairs(real)

    def relative_distance(x: Array) -> Array:
        square = jnp.sum(jnp.square(x[:, None, :] - x[None, :, :]), axis=-1)
        apart = pairs & (square > 0)
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
        mean = _mean(distance, _count(pairs))
        return distance / jnp.where(mean > 0, mean, 1.0)

    n = _count(real)
    error = _huber(relative_distance(student) - relative_distance(teacher))
    return _mean(error, n * (n - 1) if variant == "paper" else n * n)


def rkd_angle(student: Array, teacher: Array, mask: Array | None = None, *, variant: str = "paper") -> Array:
    """Relational KD by angles: mean Huber(cos_S[i, j, k] - cos_T[i, j, k]) over ordered triples of distinct examples.

    cos[i, j, k] is the cosine of the angle at j between i and k. Blind to a translation, rotation or scale of either
    side; 2 examples span no angle and give 0. An example at the place of another has no direction from it: cosine 0,
    without a gradient. paper: the mean over the n (n - 1) (n - 2) triples. repdistiller (and the authors' code): the
    sum divided by n³, as it counts the zeros of triples that are not distinct. Memory: b² c + b³ floats.

    Args:
        student, teacher: [b, ...], float.
        mask: [b], 1 for a real example, 0 for padding.
        variant: "paper" or "repdistiller".

    Returns:
        A float32 scalar.

    Raises:
        UserError: batches differ, fewer than 2 examples, or an unknown variant.

    Source: Park et al. 2019, "Relational Knowledge Distillation", section 3.2 (angle-wise loss).
    """
    _require_variant("rkd_angle", variant, "repdistiller")
    student, teacher, real = _examples("rkd_angle", student, teacher, mask)
    pairs = _pairs(real)
    distinct = pairs[:, :, None] & pairs[:, None, :] & pairs[None, :, :]

    def cosine_jik(x: Array) -> Array:
        direction_jic = _unit(x[None, :, :] - x[:, None, :])
        return jnp.einsum("jic,jkc->jik", direction_jic, direction_jic, precision=HIGHEST)

    n = _count(real)
    error = jnp.where(distinct, _huber(cosine_jik(student) - cosine_jik(teacher)), 0.0)
    return _mean(error, n * (n - 1) * (n - 2) if variant == "paper" else n**3)


def similarity_preserving(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """SP: 1/n² ||G_S - G_T||², where G is the Gram matrix of the flattened features with rows of unit length.

    Blind to a rotation or scale of either side.

    Args:
        student, teacher: [b, ...], float, feature maps or vectors.
        mask: [b], 1 for a real example, 0 for padding.

    Returns:
        A float32 scalar.

    Raises:
        UserError: batches differ, or fewer than 2 examples.

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", section 3, eq. 2-4.
    """
    student, teacher, real = _examples("similarity_preserving", student, teacher, mask)
    # Padding is rows and columns of zeros on both sides: they add nothing.
    error = jnp.square(_unit(_gram(student)) - _unit(_gram(teacher)))
    return _mean_of_examples(error, real, jnp.square(_count(real)))


def correlation_congruence(
    student: Array,
    teacher: Array,
    mask: Array | None = None,
    *,
    inverse_width: Scalar = 0.4,
    order: int = 2,
    variant: str = "paper",
) -> Array:
    """Correlation congruence: 1/n² ||C_S - C_T||² between the examples' kernel matrices.

    paper: C[i, j] = exp(-2γ) Σ_{p=0}^{order} (2γ <f_i, f_j>)^p / p!, the Taylor series of the Gaussian kernel
    exp(-γ ||f_i - f_j||²) of embeddings f of unit length, with γ = inverse_width. repdistiller: another loss, which
    that code base had from the authors: the mean over neighbours in the batch of Σ_c |Δ_i| |Δ_{i+1}|, Δ = student -
    teacher. It depends on the order of the batch, needs equal widths, and ignores the other options.

    Args:
        student, teacher: [b, ...], float.
        mask: [b], 1 for a real example, 0 for padding.
        inverse_width: γ > 0, per squared distance of unit vectors.
        order: the degree of the series, at least 1.
        variant: "paper" or "repdistiller".

    Returns:
        A float32 scalar.

    Raises:
        UserError: batches (or for repdistiller, widths) differ, fewer than 2 examples, an order below 1, or an
            unknown variant.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", section 3.3.
    """
    _require_variant("correlation_congruence", variant, "repdistiller")
    if order < 1:
        raise UserError(f"correlation_congruence needs order 1 or more, not {order}: 0 compares constants.")
    student, teacher, real = _examples("correlation_congruence", student, teacher, mask)
    if variant == "repdistiller":
        _require_channels("correlation_congruence", student, teacher)
        delta = jnp.abs(student - teacher)
        neighbours = real[:-1] & real[1:]
        products = jnp.where(neighbours, jnp.sum(delta[:-1] * delta[1:], axis=-1), 0.0)
        return _mean(products, _count(neighbours))

    def kernel(x: Array) -> Array:
        unit = _unit(x)
        exponent = 2.0 * inverse_width * _gram(unit)
        # The constant of the series (p = 0) is left out: it is the same on both sides, padding's too.
        return sum((exponent**p / math.factorial(p) for p in range(1, order + 1)), jnp.zeros_like(exponent))

    error = jnp.square(jnp.exp(-2.0 * inverse_width) * (kernel(student) - kernel(teacher)))
    return _mean_of_examples(error, real, jnp.square(_count(real)))


def pkt(student: Array, teacher: Array, mask: Array | None = None, *, variant: str = "paper") -> Array:
    """Probabilistic knowledge transfer: the KL between the distributions of an example over its neighbours.

    p[j | i] = K[i, j] / Σ_{k ≠ i} K[i, k], K = (1 + cosine) / 2. paper: mean_i Σ_{j ≠ i} p_T log(p_T / p_S), the
    paper's sum divided by n. repdistiller (and the authors' code): j = i is a neighbour too, 1e-7 is added to both
    probabilities inside the logarithm, and the sum is divided by n². Blind to a rotation of either side and to the
    length of each vector. K is kept above 1e-7, as log p_S of an exactly opposite vector has no gradient.

    Args:
        student, teacher: [b, ...], float.
        mask: [b], 1 for a real example, 0 for padding.
        variant: "paper" or "repdistiller".

    Returns:
        A float32 scalar, in nats.

    Raises:
        UserError: batches differ, fewer than 2 examples, or an unknown variant.

    Source: Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", section 3.
    """
    _require_variant("pkt", variant, "repdistiller")
    student, teacher, real = _examples("pkt", student, teacher, mask)
    pairs = _pairs(real) if variant == "paper" else real[:, None] & real[None, :]
    n = _count(real)

    def conditional(x: Array) -> Array:
        kernel = jnp.where(pairs, jnp.maximum(0.5 * (1.0 + _gram(_unit(x))), 1e-7), 0.0)
        total = jnp.sum(kernel, axis=-1, keepdims=True)
        return kernel / jnp.where(total > 0, total, 1.0)

    p_s, p_t = conditional(student), conditional(teacher)
    offset = 1e-7 if variant == "repdistiller" else 0.0
    log_ratio = jnp.log(jnp.where(pairs, p_t + offset, 1.0)) - jnp.log(jnp.where(pairs, p_s + offset, 1.0))
    # p_S - p_T sums to 0 but for rounding. With it, every summand is 0 to first order where both agree.
    divergence = p_t * log_ratio - p_t + p_s
    return _mean_of_examples(divergence, real, n if variant == "paper" else n * n)


def cka(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """1 - linear CKA: 1 - ||Y'X||² / (||X'X|| ||Y'Y||) of the centred features X, Y, [n, c].

    It is in [0, 1], and 0 where one side is a rotation and scale of the other. It is computed on the n × n Gram
    matrices as half their squared distance at unit length, which is exact where both agree. A side of equal rows has
    no CKA: the loss is 1, without a gradient.

    Args:
        student, teacher: [b, ...], float.
        mask: [b], 1 for a real example, 0 for padding.

    Returns:
        A float32 scalar.

    Raises:
        UserError: batches differ, or fewer than 2 examples.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3 (HSIC, linear).
    """
    student, teacher, real = _examples("cka", student, teacher, mask)

    def unit_gram(x: Array) -> tuple[Array, Array]:
        mean = jnp.sum(x, axis=0, keepdims=True) / jnp.maximum(_count(real), 1.0)
        centred = jnp.where(real[:, None], x - mean, 0.0)
        # Below this share, what is left after centring is the rounding of float32.
        constant = jnp.sum(jnp.square(centred)) <= 1e-12 * jnp.sum(jnp.square(x))
        return _unit(_gram(jnp.where(constant, 0.0, centred)).reshape(-1)), constant

    (gram_s, constant_s), (gram_t, constant_t) = unit_gram(student), unit_gram(teacher)
    loss = 0.5 * jnp.sum(jnp.square(gram_s - gram_t))
    return jnp.where(_count(real) < 2, 0.0, jnp.where(constant_s | constant_t, 1.0, loss))


def fsp(
    student_first: Array, student_second: Array, teacher_first: Array, teacher_second: Array, *, variant: str = "paper"
) -> Array:
    """Flow of the solution procedure: ||G_S - G_T||² per example, G the Gram matrix between two layers' channels.

    G[m, n] = Σ_p first[p, m] second[p, n] / p over the positions of two layers of one network, which must be of one
    size; student and teacher may have different sizes, but need the same channels. paper: the sum of squares.
    repdistiller: their mean.

    Args:
        student_first, teacher_first: [b, ..., m], float.
        student_second, teacher_second: [b, ..., n], float, of the same size in between as their network's first.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32.

    Raises:
        UserError: sizes, batches or channels that do not fit, or an unknown variant.

    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", section 3, eq. 1 and 2.
    """
    _require_variant("fsp", variant, "repdistiller")
    for owner, first, second in (
        ("student", student_first, student_second),
        ("teacher", teacher_first, teacher_second),
    ):
        if first.ndim < 3 or first.shape[:-1] != second.shape[:-1]:
            raise UserError(
                f"fsp cannot relate the {owner}'s layers of shapes {first.shape} and {second.shape}: "
                "tap two layers [batch, height, width, channels] of one size, or pool the larger."
            )
    _require_batch("fsp", student_first, teacher_first)
    _require_channels("fsp", student_first, teacher_first)
    _require_channels("fsp", student_second, teacher_second)

    def flow(first: Array, second: Array) -> Array:
        first_bpm, second_bpn = _positions(first), _positions(second)
        gram = jnp.einsum("bpm,bpn->bmn", first_bpm, second_bpn, precision=HIGHEST)
        return gram / first_bpm.shape[1]

    square = jnp.square(flow(student_first, student_second) - flow(teacher_first, teacher_second))
    return jnp.sum(square, axis=(1, 2)) if variant == "paper" else jnp.mean(square, axis=(1, 2))


def ickd(student: Array, teacher: Array, *, variant: str = "paper") -> Array:
    """Inter-channel correlation: per example, the squared distance of the Gram matrices between channels.

    paper: 1/c² ||G_S - G_T||², G[m, n] = Σ_p f[p, m] f[p, n], which grows with the number of positions: both sides
    need the same. torchdistill (and the authors' code): the rows of G at unit length and 1/c instead of 1/c², so
    that the sizes may differ (torchdistill also divides by the batch twice).

    Args:
        student, teacher: [b, ..., c], float.
        variant: "paper" or "torchdistill".

    Returns:
        [b] float32.

    Raises:
        UserError: batches, channels or (paper) sizes differ, no positions, or an unknown variant.

    Source: Liu et al. 2021, "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
    section 3.2 (ICKD-C).
    """
    _require_variant("ickd", variant, "torchdistill")
    if student.ndim < 3 or teacher.ndim < 3:
        raise UserError(
            f"ickd correlates channels over positions, which features of shapes {student.shape} and {teacher.shape} "
            "lack: tap layers [batch, height, width, channels]."
        )
    _require_batch("ickd", student, teacher)
    _require_channels("ickd", student, teacher)
    student_bpc, teacher_bpc = _positions(student), _positions(teacher)
    if variant == "paper" and student_bpc.shape != teacher_bpc.shape:
        raise UserError(
            f"ickd cannot compare sums over the positions of {student.shape} and {teacher.shape}: "
            "resize one, or use variant 'torchdistill', which normalises them."
        )

    def correlation(x_bpc: Array) -> Array:
        gram = jnp.einsum("bpm,bpn->bmn", x_bpc, x_bpc, precision=HIGHEST)
        return gram if variant == "paper" else _unit(gram)

    square = jnp.sum(jnp.square(correlation(student_bpc) - correlation(teacher_bpc)), axis=(1, 2))
    channels = student.shape[-1]
    return square / (channels**2 if variant == "paper" else channels)


def _examples(name: str, student: Array, teacher: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Both sides as float32 [b, c] with padding set to 0, and [b] bool, which are real."""
    _require_batch(name, student, teacher)
    b = student.shape[0]
    if b < 2:
        raise UserError(f"{name} relates examples to each other and needs at least 2 examples in a batch, not {b}.")
    if mask is not None and mask.shape != (b,):
        raise UserError(f"{name} needs one mask value per example, shape ({b},), not {mask.shape}.")
    real = jnp.ones(b, jnp.bool_) if mask is None else mask.astype(jnp.bool_)

    def rows(x: Array) -> Array:
        # Before any arithmetic: not even padding's NaN may reach the gradient.
        return jnp.where(real[:, None], x.reshape(b, -1).astype(jnp.float32), 0.0)

    return rows(student), rows(teacher), real


def _positions(x: Array) -> Array:
    """[b, ..., c] as float32 [b, p, c]."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)


def _pairs(real: Array) -> Array:
    """[b, b] bool: ordered pairs of different real examples."""
    return real[:, None] & real[None, :] & ~jnp.eye(real.shape[0], dtype=jnp.bool_)


def _count(true: Array) -> Array:
    return jnp.sum(true, dtype=jnp.float32)  # the cube of a large batch overflows an integer


def _gram(x: Array) -> Array:
    return jnp.matmul(x, x.T, precision=HIGHEST)


def _unit(x: Array) -> Array:
    """Vectors of the last axis at unit length; a zero vector stays zero and gets no gradient."""
    # Direction does not depend on scale: dividing it out keeps the squares from overflow and underflow.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(scale == 0, 1.0, scale)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(scale == 0, 1.0, square))


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1.0, 0.5 * jnp.square(x), size - 0.5)


def _mean(values: Array, count: Array) -> Array:
    return jnp.sum(values) / jnp.maximum(count, 1.0)


def _mean_of_examples(values: Array, real: Array, count: Array) -> Array:
    """The sum over count, and 0 with fewer than 2 real examples: one alone would be related to itself."""
    return jnp.where(_count(real) >= 2, _mean(values, count), 0.0)


def _require_variant(name: str, variant: str, code_base: str) -> None:
    if variant not in ("paper", code_base):
        raise unknown(f"variant of {name}", variant, ("paper", code_base))


def _require_batch(name: str, student: Array, teacher: Array) -> None:
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[0] != teacher.shape[0]:
        raise UserError(
            f"{name} cannot relate features of shapes {student.shape} and {teacher.shape}: "
            "give both [batch, ...] of the same examples."
        )


def _require_channels(name: str, student: Array, teacher: Array) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"{name} cannot compare features of shapes {student.shape} and {teacher.shape}: "
            f"a projector ('linear') maps {student.shape[-1]} channels to {teacher.shape[-1]}."
        )

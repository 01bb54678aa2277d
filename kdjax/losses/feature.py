"""Feature losses without learned parts: what a student learns from its teacher's intermediate outputs.

Features are channels last: images [b, h, w, c] or tokens [b, t, c], whose tokens are the positions; some losses also
take vectors [b, c]. Images of different sizes are averaged down to the smaller one (`projectors.match_size`). Every
function computes in float32 and returns one value per example, [b]; the caller masks, weighs and reduces. Loss weights
of the papers (β/2, λ/2 ...) are the caller's weight.

"paper" is the formula as published, most often a sum over elements; the other variant of a loss, named for a code
base, is the one that its published experiments use, most often a mean, hence smaller by the number of elements.
Gradients are finite at features of zeros and at equal features.
"""

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown
from kdjax.losses.projectors import average_pool, match_size

Array = jax.Array
Scalar = float | Array

KERNELS = ("linear", "polynomial", "gaussian")


def attention_transfer(student: Array, teacher: Array, *, power: int = 2, variant: str = "paper") -> Array:
    """Attention transfer: the distance between normalised maps of where the activations are large.

    Q = vec(Σ_c |A_c|^p) over the channels of each, by position; the numbers of channels may differ.
    paper: || Q_S / ||Q_S||₂ - Q_T / ||Q_T||₂ ||₂, a norm, not its square.
    repdistiller: the mean over positions of the squared difference of the same normalised maps.
    A map of zeros stays zeros and gets no gradient.

    Args:
        student: [b, h, w, c] or [b, t, c], float.
        teacher: the same kind of feature; images of any size, tokens of equal number.
        power: p, at least 1.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32, in [0, √2] ("paper").

    Raises:
        UserError: features that cannot be compared or have a single position, or an unknown variant.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", eq. 2 (without β/2).
    """
    student, teacher = (_positions(x) for x in match_size(student, teacher))
    difference = unit(_attention_map(student, power)) - unit(_attention_map(teacher, power))
    if variant == "paper":
        return norm(difference)
    if variant == "repdistiller":
        return jnp.mean(jnp.square(difference), axis=-1)
    raise unknown("variant", variant, ("paper", "repdistiller"))


def nst(
    student: Array, teacher: Array, *, kernel: str = "polynomial", squared_bandwidth: Scalar | None = None
) -> Array:
    """Neuron selectivity transfer: squared maximum mean discrepancy between the channels of both features.

    Each channel is one sample, its activations by position normalised to length 1 (a channel of zeros stays zeros and
    gets no gradient): MMD² = mean k(t, t') + mean k(s, s') - 2 mean k(t, s). The numbers of channels may differ.
    Kernels: linear xᵀy; polynomial (xᵀy)² (degree 2, constant 0); gaussian exp(-||x - y||² / 2σ²).

    Args:
        student: [b, h, w, c] or [b, t, c], float.
        teacher: the same kind of feature; images of any size, tokens of equal number.
        kernel: one of KERNELS.
        squared_bandwidth: σ² > 0 of the gaussian kernel; None takes, as the paper does, the mean squared distance of
            the pairs (here: student with teacher, per example, no gradient through it).

    Returns:
        [b] float32; not negative but for rounding.

    Raises:
        UserError: features that cannot be compared or have a single position, or an unknown kernel.

    Source: Huang & Wang 2017, "Like What You Like", section 4 (MMD² of channels and the kernels, without λ/2).
    """
    student, teacher = (unit(_positions(x), axis=1) for x in match_size(student, teacher))
    # A difference of nearly equal means: short formats for products would be most of it.
    gram = lambda x, y: jnp.einsum("bpi,bpj->bij", x, y, precision="highest")
    dots = {"ss": gram(student, student), "tt": gram(teacher, teacher), "st": gram(student, teacher)}
    if kernel == "linear":
        similarity = dots
    elif kernel == "polynomial":
        similarity = {pair: jnp.square(dot) for pair, dot in dots.items()}
    elif kernel == "gaussian":
        length = {"s": jnp.sum(jnp.square(student), axis=1), "t": jnp.sum(jnp.square(teacher), axis=1)}
        distances = {
            pair: length[pair[0]][:, :, None] + length[pair[1]][:, None, :] - 2 * dot for pair, dot in dots.items()
        }
        if squared_bandwidth is None:
            spread = jax.lax.stop_gradient(jnp.mean(distances["st"], axis=(1, 2), keepdims=True))
            squared_bandwidth = jnp.where(spread > 0, spread, 1.0)
        similarity = {pair: jnp.exp(-distance / (2 * squared_bandwidth)) for pair, distance in distances.items()}
    else:
        raise unknown("kernel", kernel, KERNELS)
    mean = {pair: jnp.mean(values, axis=(1, 2)) for pair, values in similarity.items()}
    return mean["tt"] + mean["ss"] - 2 * mean["st"]


def hint(student: Array, teacher: Array, *, variant: str = "paper") -> Array:
    """Hint regression between features of equal channels.

    paper: ½ ||s - t||², summed over all elements of an example. repdistiller: the mean of their squares.

    Args:
        student: [b, h, w, c], [b, t, c] or [b, c], float; the output of a projector where widths differ.
        teacher: of the same channels; images of any size.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32.

    Raises:
        UserError: features that cannot be compared, or an unknown variant.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3.
    """
    squares = _squared_difference(student, teacher)
    if variant == "paper":
        return 0.5 * jnp.sum(squares, axis=-1)
    if variant == "repdistiller":
        return jnp.mean(squares, axis=-1)
    raise unknown("variant", variant, ("paper", "repdistiller"))


def simkd(student: Array, teacher: Array, *, variant: str = "paper") -> Array:
    """SimKD's alignment: the squared distance of the projected student feature to the one its classifier will get.

    The student is then used with the teacher's own classifier, so the feature is the one before it (the authors align
    the images before their average pooling). paper: ||t - s||², summed over elements. simkd: the mean of the squares.

    Args:
        student: [b, h, w, c], [b, t, c] or [b, c], float: the projected feature.
        teacher: of the same channels; images of any size.
        variant: "paper" or "simkd".

    Returns:
        [b] float32.

    Raises:
        UserError: features that cannot be compared, or an unknown variant.

    Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", section 3.
    """
    squares = _squared_difference(student, teacher)
    if variant == "paper":
        return jnp.sum(squares, axis=-1)
    if variant == "simkd":
        return jnp.mean(squares, axis=-1)
    raise unknown("variant", variant, ("paper", "simkd"))


def hierarchical_context(student: Array, teacher: Array) -> Array:
    """Hierarchical context loss: the mean squared error of images at several scales.

    At full size (weight 1) and after average pooling to 4x4, 2x2 and 1x1, as far as these are smaller, each with half
    the weight of the one before; divided by the sum of the weights. The paper describes it in words; levels, weights
    and means are those of the authors' code.

    Args:
        student: [b, h, w, c], float.
        teacher: of the same channels; of any size, matched first.

    Returns:
        [b] float32.

    Raises:
        UserError: features that are not images, or cannot be compared.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", section 3.3.
    """
    if student.ndim != 4:
        raise UserError(f"hierarchical context needs images [b, h, w, c], not a feature of shape {student.shape}.")
    student, teacher = match_size(student, teacher)
    require_same_channels(student, teacher)
    difference = student - teacher
    mean_square = lambda x: jnp.mean(jnp.square(x), axis=(1, 2, 3))
    error, weight, total = mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(difference.shape[1:3]):
            weight, total = weight / 2, total + weight / 2
            error += weight * mean_square(average_pool(difference, size, size))  # pooling is linear: once for both
    return error / total


def unit(x: Array, *, axis: int = -1) -> Array:
    """x / ||x||₂ along an axis; a vector shorter than 1e-12 becomes zeros, without gradient."""
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    # The bound keeps the gradient finite; dead channels and maps are common behind a ReLU.
    alive = squares > 1e-24
    return jnp.where(alive, x * jax.lax.rsqrt(jnp.where(alive, squares, 1.0)), 0.0)


def norm(x: Array, *, order: Scalar = 2.0) -> Array:
    """The p-norm over the last axis of a difference of unit vectors, [..., n] -> [...].

    Below 1e-6 it is 0, without gradient: two equal vectors made in one program may differ by rounding, and the
    gradient of a norm is of length 1 however small the difference.
    """
    total = jnp.sum(absolute_power(x, order), axis=-1)
    apart = total > jnp.power(1e-6, order)
    return jnp.where(apart, jnp.power(jnp.where(apart, total, 1.0), 1.0 / order), 0.0)


def absolute_power(x: Array, power: Scalar) -> Array:
    """|x|^p for any p > 0, traced or not; its gradient at 0 is 0."""
    if isinstance(power, int | float) and power in (1, 2):
        return jnp.abs(x) if power == 1 else jnp.square(x)  # on whole feature maps `power` costs ten times as much
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.power(jnp.where(zero, 1.0, jnp.abs(x)), power))


def require_same_channels(student: Array, teacher: Array) -> None:
    """Raise a UserError that names the projector if the channels of two features differ."""
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"features of shapes {student.shape} (student) and {teacher.shape} (teacher) differ in channels: "
            f"a projector ('linear') maps {student.shape[-1]} channels to {teacher.shape[-1]}."
        )


def _squared_difference(student: Array, teacher: Array) -> Array:
    """[b, elements] of features that have been brought to one size."""
    student, teacher = match_size(student, teacher)
    require_same_channels(student, teacher)
    return jnp.square(student - teacher).reshape(student.shape[0], -1)


def _positions(x: Array) -> Array:
    """[b, ..., c] -> [b, positions, c]."""
    positions = x.reshape(x.shape[0], -1, x.shape[-1])
    if positions.shape[1] < 2:
        raise UserError(
            f"a feature of shape {x.shape} has a single position, and this loss compares positions: "
            "tap an earlier layer, or use a loss of embeddings, such as 'hint'."
        )
    return positions


def _attention_map(positions: Array, power: Scalar) -> Array:
    """[b, p, c] -> [b, p]."""
    return jnp.sum(absolute_power(positions, power), axis=-1)

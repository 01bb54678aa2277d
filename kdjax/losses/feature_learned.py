"""Feature losses with learned parts: projectors, paraphrasers, regressors and generators that train with the student.

`init_NAME(key, student_shape, teacher_shape, ...)` returns the parameters, a nested dict of float32 arrays, from full
shapes [b, ..., c]; `NAME(params, student, teacher, ...)` returns one float32 value per example, [b]. Gradients reach
the parameters and the student; the teacher's feature gets none from here. Images of different sizes are averaged down
to the smaller one (`projectors.match_size`) unless a loss says otherwise.

None of these parts has batch normalisation, which some of the papers use: it would need running statistics, and mix
the examples of a batch. Where it is left out, the convolution before it has a bias.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, unknown
from kdjax.losses import projectors
from kdjax.losses.feature import absolute_power, hierarchical_context, hint, norm, require_same_channels, unit
from kdjax.losses.projectors import HE, Params, match_size, nearest

Array = jax.Array
Scalar = float | Array
Shape = Sequence[int]

FACTOR_VARIANTS = ("paper", "mmrazor", "repdistiller")


def init_fitnets(
    key: Array, student_shape: Shape, teacher_shape: Shape, *, projector: str = "linear", hidden: int | None = None
) -> Params:
    """Parameters of `fitnets`: a projector from the student's channels to the teacher's.

    Raises:
        UserError: shapes that cannot be compared, or a projector that does not fit them.
    """
    _require_comparable(student_shape, teacher_shape, images=projector == "conv3")
    return projectors.init(key, projector, student_shape[-1], teacher_shape[-1], hidden=hidden)


def fitnets(
    params: Params, student: Array, teacher: Array, *, projector: str = "linear", variant: str = "paper"
) -> Array:
    """FitNets: `feature.hint` of the projected student feature.

    paper: ½ ||r(s) - t||², summed over elements; repdistiller: the mean of the squares. The projector r is applied
    after the sizes are matched. (The paper's regressor also ends in the hint layer's nonlinearity; this one is free.)

    Args:
        params: of `init_fitnets` with the same projector.
        student: [b, h, w, c], [b, t, c] or [b, c], float.
        teacher: the same kind of feature.
        projector: one of `projectors.PROJECTORS`.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32.

    Raises:
        UserError: features that cannot be compared, or an unknown name.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3.
    """
    student, teacher = match_size(student, jax.lax.stop_gradient(teacher))
    return hint(projectors.apply(params, projector, student), teacher, variant=variant)


def init_factor_transfer(key: Array, student_shape: Shape, teacher_shape: Shape, *, rate: float = 0.5) -> Params:
    """Parameters of `factor_transfer`; a factor has `rate` times as many channels as the teacher, at least one.

    "paraphraser": encoder (three 3x3 convolutions on the teacher's feature) and decoder (three back); "translator":
    three 3x3 convolutions on the student's.

    Raises:
        UserError: features that are not images, or of different batches.
    """
    _require_comparable(student_shape, teacher_shape, images=True)
    student, teacher = student_shape[-1], teacher_shape[-1]
    factor = max(1, int(teacher * rate))
    encoder, decoder, translator = jax.random.split(key, 3)
    return {
        "paraphraser": {
            "encoder": _init_stack(encoder, (teacher, teacher, factor, factor)),
            "decoder": _init_stack(decoder, (factor, factor, teacher, teacher)),
        },
        "translator": _init_stack(translator, (student, student, factor, factor)),
    }


def factor_transfer(
    params: Params,
    student: Array,
    teacher: Array,
    *,
    power: int = 1,
    transfer_weight: Scalar = 1.0,
    reconstruction_weight: Scalar = 1.0,
    variant: str = "paper",
) -> Array:
    """Factor transfer: the student's translator learns the factors that an autoencoder finds in the teacher's feature.

    transfer_weight · distance(F_S, F_T) + reconstruction_weight · error(t, decoder(encoder(t))), where F_T is the
    encoder's output as a constant and F_S the translator's. So the reconstruction trains the paraphraser alone and
    the distance trains the student and the translator alone. The paper trains the paraphraser first: a schedule or a
    stage with transfer_weight 0 does so; with both weights 1 they train together.

    paper: || F_T / ||F_T||₂ - F_S / ||F_S||₂ ||_p, factors as vectors; error: ||t - t'||², summed (large: under a
    common gradient clipping or for plain SGD take a small reconstruction_weight).
    mmrazor: the mean over elements of |difference|^p; error: the mean of the squares.
    repdistiller: as mmrazor, of the normalised maps Σ_c F_c² by position instead of the factors.

    Args:
        params: of `init_factor_transfer`.
        student: [b, h, w, c], float.
        teacher: [b, h, w, c], float; the factors, not the features, are pooled to the smaller size.
        power: p of the distance, at least 1.
        transfer_weight: weight of the distance.
        reconstruction_weight: weight of the paraphraser's error.
        variant: one of FACTOR_VARIANTS.

    Returns:
        [b] float32.

    Raises:
        UserError: features that are not images or for which the parameters were not made, or an unknown variant.

    Source: Kim et al. 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer", eq. 1-3.
    """
    if variant not in FACTOR_VARIANTS:
        raise unknown("variant", variant, FACTOR_VARIANTS)
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    teacher_factor = _stack(params["paraphraser"]["encoder"], teacher)
    reconstruction = _stack(params["paraphraser"]["decoder"], teacher_factor)
    errors = _flat(jnp.square(teacher - reconstruction))
    factors = match_size(_stack(params["translator"], student), jax.lax.stop_gradient(teacher_factor))
    if variant == "repdistiller":
        student_factor, teacher_factor = (unit(_flat(jnp.sum(jnp.square(x), axis=-1))) for x in factors)
    else:
        student_factor, teacher_factor = (unit(_flat(x)) for x in factors)
    difference = student_factor - teacher_factor
    if variant == "paper":
        distance, error = norm(difference, order=power), jnp.sum(errors, axis=-1)
    else:
        distance, error = jnp.mean(absolute_power(difference, power), axis=-1), jnp.mean(errors, axis=-1)
    return transfer_weight * distance + reconstruction_weight * error


def init_vid(
    key: Array, student_shape: Shape, teacher_shape: Shape, *, hidden: int | None = None, variance: float = 5.0
) -> Params:
    """Parameters of `vid`: three 1x1 convolutions without bias, ReLU between, and one variance per teacher channel.

    Args:
        key: a JAX PRNG key.
        student_shape: [b, h, w, c], [b, t, c] or [b, c].
        teacher_shape: of the same kind.
        hidden: channels between the convolutions; the teacher's if None.
        variance: σ² to start from (the authors' 5).

    Raises:
        UserError: shapes that cannot be compared.
    """
    _require_comparable(student_shape, teacher_shape)
    inputs, outputs = student_shape[-1], teacher_shape[-1]
    width = outputs if hidden is None else hidden
    first, second, third = jax.random.split(key, 3)
    return {
        "mean": {
            "0": projectors.init_dense(first, inputs, width, scale=HE, bias=False),
            "1": projectors.init_dense(second, width, width, scale=HE, bias=False),
            "2": projectors.init_dense(third, width, outputs, bias=False),
        },
        # The inverse of softplus, in the form that does not overflow.
        "raw_variance": jnp.full(outputs, variance + np.log(-np.expm1(-variance)), jnp.float32),
    }


def vid(
    params: Params, student: Array, teacher: Array, *, minimum_variance: Scalar = 1e-5, variant: str = "paper"
) -> Array:
    """Variational information distillation: negative log-likelihood of the teacher's feature given the student's.

    q(t | s) is Gaussian with mean μ(s) and variance σ_c² = softplus(α_c) + ε, one per channel. It bounds the mutual
    information of both features, and may be negative. The constant ½ log 2π per element is left out.
    paper: Σ over elements of log σ_c + (t - μ)² / 2σ_c². repdistiller: their mean.

    Args:
        params: of `init_vid`.
        student: [b, h, w, c], [b, t, c] or [b, c], float.
        teacher: the same kind of feature.
        minimum_variance: ε.
        variant: "paper" or "repdistiller".

    Returns:
        [b] float32, in nats.

    Raises:
        UserError: features that cannot be compared or for which the parameters were not made, or an unknown variant.

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", eq. 6.
    """
    student, teacher = match_size(student, jax.lax.stop_gradient(teacher))
    mean = student
    for name in ("0", "1"):
        mean = jax.nn.relu(projectors.dense(params["mean"][name], mean))
    mean = projectors.dense(params["mean"]["2"], mean)
    require_same_channels(mean, teacher)
    variance = (jax.nn.softplus(params["raw_variance"]) + minimum_variance).reshape((1,) * (mean.ndim - 1) + (-1,))
    nll = _flat(0.5 * (jnp.log(variance) + jnp.square(teacher - mean) / variance))
    if variant == "paper":
        return jnp.sum(nll, axis=-1)
    if variant == "repdistiller":
        return jnp.mean(nll, axis=-1)
    raise unknown("variant", variant, ("paper", "repdistiller"))


def init_review(
    key: Array, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, width: int | None = None
) -> Params:
    """Parameters of `review`: one attention-based fusion per stage, under "0" (shallowest), "1", ...

    Args:
        key: a JAX PRNG key.
        student_shapes: of the stages from shallow to deep, each [b, h, w, c] or, pooled, [b, c].
        teacher_shapes: of as many stages.
        width: channels of the fused feature; the deepest stage's of the student, at most 512, if None.

    Raises:
        UserError: no stage, stages that differ in number, or features that are neither images nor vectors.
    """
    _require_stages(student_shapes, teacher_shapes)
    width = min(512, student_shapes[-1][-1]) if width is None else width
    params = {}
    for i, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
        first, second, third = jax.random.split(jax.random.fold_in(key, i), 3)
        params[str(i)] = {
            "in": projectors.init_dense(first, student[-1], width),
            "out": projectors.init_conv(second, 3, width, teacher[-1]),
        }
        if i < len(student_shapes) - 1:  # the deepest stage has nothing to be fused with
            params[str(i)]["attention"] = projectors.init_dense(third, 2 * width, 2)
    return params


def review(params: Params, students: Sequence[Array], teachers: Sequence[Array]) -> Array:
    """Knowledge review: each stage of the teacher teaches the student's stage fused with all deeper ones.

    From deep to shallow, attention-based fusion: x = in(s_i); with y the fused feature of the stage below, enlarged
    to x, attention maps (a, a') = sigmoid(attention([x, y])), x <- a x + a' y; x is brought to the teacher's size
    (nearest neighbour) and out(x) compared with t_i by `feature.hierarchical_context`. The stages are added up. "in"
    and "attention" are 1x1 convolutions, "out" is 3x3.

    Args:
        params: of `init_review`.
        students: stages from shallow to deep, each [b, h, w, c] or [b, c] (an image of one pixel), float.
        teachers: as many.

    Returns:
        [b] float32.

    Raises:
        UserError: as `init_review`, or features for which the parameters were not made.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", sections 3.2 and 3.3.
    """
    _require_stages([x.shape for x in students], [x.shape for x in teachers])
    if len(params) != len(students):
        raise UserError(f"review was made for {len(params)} stages, not {len(students)}: initialise it with these.")
    total, fused = jnp.zeros(students[0].shape[0], jnp.float32), None
    for i in reversed(range(len(students))):
        stage, teacher = params[str(i)], jax.lax.stop_gradient(_image(teachers[i]))
        x = projectors.dense(stage["in"], _image(students[i]))
        if fused is not None:
            y = nearest(fused, x.shape[1], x.shape[2])
            attention = jax.nn.sigmoid(projectors.dense(stage["attention"], jnp.concatenate([x, y], axis=-1)))
            x = x * attention[..., :1] + y * attention[..., 1:]
        fused = nearest(x, teacher.shape[1], teacher.shape[2])
        total += hierarchical_context(projectors.conv(stage["out"], fused), teacher)
    return total


def init_mgd(key: Array, student_shape: Shape, teacher_shape: Shape) -> Params:
    """Parameters of `mgd`: "align", a 1x1 convolution, where channels differ, and the generator's 3x3 "0" and "1".

    Raises:
        UserError: features that are not images, or of different batches.
    """
    _require_comparable(student_shape, teacher_shape, images=True)
    inputs, outputs = student_shape[-1], teacher_shape[-1]
    align, first, second = jax.random.split(key, 3)
    generator = {
        "0": projectors.init_conv(first, 3, outputs, outputs, scale=HE),
        "1": projectors.init_conv(second, 3, outputs, outputs),
    }
    if inputs == outputs:
        return {"generator": generator}
    return {"align": projectors.init_dense(align, inputs, outputs), "generator": generator}


def mgd(params: Params, student: Array, teacher: Array, key: Array, *, mask_ratio: Scalar = 0.5) -> Array:
    """Masked generative distillation: the teacher's whole feature from a random part of the student's.

    || t - G(align(s) · M) ||², summed over elements; M hides each position with probability mask_ratio, in all
    channels at once; G is 3x3 convolution, ReLU, 3x3 convolution.

    Args:
        params: of `init_mgd`.
        student: [b, h, w, c], float.
        teacher: [b, h, w, c], float.
        key: a JAX PRNG key, a new one each step. An example's mask depends on the key and its place in the batch.
        mask_ratio: in [0, 1]; the paper's values are 0.5 for classification, 0.65 and 0.45 for detectors.

    Returns:
        [b] float32.

    Raises:
        UserError: features that are not images or for which the parameters were not made.

    Source: Yang et al. 2022, "Masked Generative Distillation", section 3.2.
    """
    _require_comparable(student.shape, teacher.shape, images=True)
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (1, 2))
    shape = (student.shape[0], height, width, 1)
    return mgd_with_mask(params, student, teacher, jax.random.uniform(key, shape) >= mask_ratio)


def mgd_with_mask(params: Params, student: Array, teacher: Array, mask: Array) -> Array:
    """`mgd` with an explicit mask [b, h, w, 1], 1 or True where the student's feature is seen; sizes as matched."""
    student, teacher = match_size(student, jax.lax.stop_gradient(teacher))
    if "align" in params:
        student = projectors.dense(params["align"], student)
    require_same_channels(student, teacher)
    hidden = jax.nn.relu(projectors.conv(params["generator"]["0"], student * mask))
    generated = projectors.conv(params["generator"]["1"], hidden)
    return jnp.sum(_flat(jnp.square(teacher - generated)), axis=-1)


def _init_stack(key: Array, channels: Sequence[int]) -> Params:
    """3x3 convolutions between successive numbers of channels, for `_stack`."""
    keys = jax.random.split(key, len(channels) - 1)
    return {str(i): projectors.init_conv(keys[i], 3, *pair, scale=HE) for i, pair in enumerate(pairwise(channels))}


def _stack(params: Params, x: Array) -> Array:
    """Convolutions, each followed by a leaky ReLU of slope 0.1 (the authors'); a transposed one of stride 1 is one."""
    for i in range(len(params)):
        x = jax.nn.leaky_relu(projectors.conv(params[str(i)], x), 0.1)
    return x


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _image(x: Array) -> Array:
    """A vector [b, c] as an image of one pixel; images as they are; float32."""
    return (x[:, None, None, :] if x.ndim == 2 else x).astype(jnp.float32)


def _require_comparable(student_shape: Shape, teacher_shape: Shape, *, images: bool = False) -> None:
    projectors.require_comparable(student_shape, teacher_shape)
    if images and len(student_shape) != 4:
        raise UserError(
            f"3x3 convolutions need images [b, h, w, c], not features of shapes {tuple(student_shape)} (student) and "
            f"{tuple(teacher_shape)} (teacher): tap layers that return images, or use 'fitnets' or 'vid'."
        )


def _require_stages(student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape]) -> None:
    if not student_shapes or len(student_shapes) != len(teacher_shapes):
        raise UserError(
            f"review pairs {len(student_shapes)} student stages with {len(teacher_shapes)} teacher stages: "
            "give one teacher tap for each student tap, from shallow to deep, at least one."
        )
    for shape in (*student_shapes, *teacher_shapes):
        if len(shape) not in (2, 4) or shape[0] != student_shapes[0][0]:
            raise UserError(
                f"review needs images [b, h, w, c] or vectors [b, c] of one batch, not a feature of shape "
                f"{tuple(shape)}: tap the ends of the convolutional stages."
            )

"""Projectors and size matching: what makes a student's feature comparable with its teacher's.

Features are channels last: images [b, h, w, c], tokens [b, t, c], vectors [b, c]. A projector maps the student's
channels to the teacher's; it is a learned part of the loss, trains with the student and is never exported with it.
No projector has batch normalisation: it would need running statistics beside the parameters. Parameters are nested
dicts of float32 arrays; every function computes in float32, at the precision of `jax_default_matmul_precision`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from kdjax.errors import UserError, unknown

Array = jax.Array
Params = dict[str, Any]  # a nested dict of float32 arrays

PROJECTORS = ("none", "linear", "conv3", "mlp")

HE, LECUN = initializers.he_normal(), initializers.lecun_normal()  # before a ReLU; before nothing


def init(key: Array, kind: str, inputs: int, outputs: int, *, hidden: int | None = None) -> Params:
    """Parameters of a projector from `inputs` to `outputs` channels.

    Args:
        key: a JAX PRNG key.
        kind: "none" (identity), "linear" (one dense layer on the last axis, the same as a 1x1 convolution), "conv3"
            (a 3x3 convolution with same padding, images only) or "mlp" (dense, ReLU, dense). All but "none" have
            biases, which start at 0; weights start at LeCun's scale, or He's before a ReLU.
        inputs: channels of the student.
        outputs: channels of the teacher.
        hidden: width of the "mlp"; `outputs` if None.

    Returns:
        A nested dict of float32 arrays, empty for "none".

    Raises:
        UserError: an unknown kind, or "none" between different numbers of channels.
    """
    if kind == "none":
        if inputs != outputs:
            raise UserError(
                f"projector='none' needs as many student channels as the teacher has, not {inputs} and {outputs}: "
                f"projector='linear' maps {inputs} channels to {outputs}."
            )
        return {}
    if kind == "linear":
        return init_dense(key, inputs, outputs)
    if kind == "conv3":
        return init_conv(key, 3, inputs, outputs)
    if kind == "mlp":
        width = outputs if hidden is None else hidden
        first, second = jax.random.split(key)
        return {"in": init_dense(first, inputs, width, scale=HE), "out": init_dense(second, width, outputs)}
    raise unknown("projector", kind, PROJECTORS)


def apply(params: Params, kind: str, x: Array) -> Array:
    """Map the channels of x with a projector made by `init`.

    Args:
        params: what `init` returned for this kind.
        kind: one of PROJECTORS.
        x: [..., inputs], float; [b, h, w, inputs] for "conv3".

    Returns:
        [..., outputs] float32.

    Raises:
        UserError: an unknown kind, or channels or a rank for which the projector was not made.
    """
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    if kind == "linear":
        return dense(params, x)
    if kind == "conv3":
        return conv(params, x)
    if kind == "mlp":
        return dense(params["out"], jax.nn.relu(dense(params["in"], x)))
    raise unknown("projector", kind, PROJECTORS)


def init_dense(
    key: Array, inputs: int, outputs: int, *, scale: initializers.Initializer = LECUN, bias: bool = True
) -> Params:
    """Kernel [inputs, outputs] and, unless `bias` is False, bias [outputs]; float32."""
    params = {"kernel": scale(key, (inputs, outputs), jnp.float32)}
    return params | {"bias": jnp.zeros(outputs, jnp.float32)} if bias else params


def dense(params: Params, x: Array) -> Array:
    """A dense layer on the last axis: [..., inputs] -> [..., outputs], float32."""
    _require_channels(x, params["kernel"].shape[0])
    return _add_bias(params, x.astype(jnp.float32) @ params["kernel"])


def init_conv(
    key: Array, size: int, inputs: int, outputs: int, *, scale: initializers.Initializer = LECUN, bias: bool = True
) -> Params:
    """Kernel [size, size, inputs, outputs] and, unless `bias` is False, bias [outputs]; float32."""
    params = {"kernel": scale(key, (size, size, inputs, outputs), jnp.float32)}
    return params | {"bias": jnp.zeros(outputs, jnp.float32)} if bias else params


def conv(params: Params, x: Array) -> Array:
    """A convolution of stride 1 with same padding: [b, h, w, inputs] -> [b, h, w, outputs], float32."""
    if x.ndim != 4:
        raise UserError(
            f"a convolution needs images [b, h, w, c], not a feature of shape {x.shape}: "
            "use projector='linear' or 'mlp', or tap a layer that returns images."
        )
    _require_channels(x, params["kernel"].shape[2])
    out = jax.lax.conv_general_dilated(
        x.astype(jnp.float32), params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _add_bias(params, out)


def match_size(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Bring both features to the same positions: images are averaged down to the smaller height and width.

    The pooling is adaptive: output i of n averages the inputs from floor(i·m/n) to ceil((i+1)·m/n), m inputs in all,
    so that any two sizes can be compared. Only what is larger is pooled, along height and width each on its own.

    Args:
        student: [b, h, w, c], [b, t, c] or [b, c], float.
        teacher: of the same rank and batch size; the channels may differ.

    Returns:
        Both as float32, equal in shape but for their channels.

    Raises:
        UserError: the ranks or batch sizes differ, or tokens differ in number.
    """
    require_comparable(student.shape, teacher.shape)
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if student.ndim < 4:
        return student, teacher
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (1, 2))
    return average_pool(student, height, width), average_pool(teacher, height, width)


def average_pool(x: Array, height: int, width: int) -> Array:
    """Adaptive average pooling of images: [b, h, w, c] -> [b, height, width, c], float32."""
    return _resample(x, _averaging(x.shape[1], height), _averaging(x.shape[2], width))


def nearest(x: Array, height: int, width: int) -> Array:
    """Nearest-neighbour resizing, [b, h, w, c] -> [b, height, width, c]: output i of n is input floor(i·m/n)."""
    return _resample(x, _picking(x.shape[1], height), _picking(x.shape[2], width))


def pool(x: Array) -> Array:
    """The embedding of a feature: the mean over all axes between the first and the last, [b, ..., c] -> [b, c]."""
    if x.ndim < 2:
        raise UserError(f"a feature of shape {x.shape} has no channels: give [b, ..., c].")
    x = x.astype(jnp.float32)
    # Converters take a mean over no axes for one over all.
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def require_comparable(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
    """Raise a UserError unless `match_size` can bring features of these shapes to the same positions."""
    student, teacher = tuple(student_shape), tuple(teacher_shape)
    where = f"features of shapes {student} (student) and {teacher} (teacher)"
    if len(student) != len(teacher) or len(student) not in (2, 3, 4):
        raise UserError(
            f"{where} cannot be compared: both must be images [b, h, w, c], tokens [b, t, c] or vectors [b, c]; "
            "tap layers of the same kind."
        )
    if student[0] != teacher[0]:
        raise UserError(f"{where} are of different examples: give both the same batch.")
    if len(student) == 3 and student[1] != teacher[1]:
        raise UserError(
            f"{where} differ in their number of tokens, which cannot be pooled to match: "
            "tap layers with as many tokens, or use a loss of pooled embeddings."
        )


def _resample(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """[b, h, w, c] -> [b, height, width, c] with constant matrices [height, h] and [width, w].

    Products serve any ratio of sizes, and their gradient is a product too: that of a gather would be a scatter, which
    adds in any order on some devices. Accelerators' short formats are switched off, since an average is exact.
    """
    x = x.astype(jnp.float32)
    if rows.shape[0] != rows.shape[1]:
        x = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    if columns.shape[0] != columns.shape[1]:
        x = jnp.einsum("xw,bhwc->bhxc", columns, x, precision="highest")
    return x


def _averaging(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs]: row i averages its bin of adaptive pooling."""
    matrix = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        start, stop = i * inputs // outputs, math.ceil((i + 1) * inputs / outputs)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def _picking(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs]: row i picks input floor(i·inputs/outputs)."""
    return np.eye(inputs, dtype=np.float32)[np.arange(outputs) * inputs // outputs]


def _add_bias(params: Params, x: Array) -> Array:
    if "bias" not in params:
        return x
    return x + params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def _require_channels(x: Array, channels: int) -> None:
    if x.shape[-1] != channels:
        raise UserError(
            f"this projector was made for {channels} channels, not for a feature of shape {x.shape}: "
            "initialise the loss with the shapes of the features that it gets."
        )

"""Few bits: teachers' weights stored in one byte each, and products of float8 matrices while a student learns.

**Stored weights.** A teacher is only ever asked, so its weights need no more bits than its answers do. A weight W is
kept as integers (or float8) q and one float32 scale s for each output channel, W ≈ s q with s = max |W| / bound:
symmetric, by the largest magnitude, no calibration (Jacob et al. 2018, section 2, without the zero point; Dettmers et
al. 2022, vector-wise scales). Products are computed from s q in the dtype of the model, made where a layer uses it.

**Float8 products.** Both operands are rounded to float8_e4m3fn on the way forward and the gradient to float8_e5m2 on
the way back (Micikevicius et al. 2022, section 3), with one scale for each matrix, of what it holds at this very step
("current scaling"), so that there is no state to save. Scales are powers of two: float8 values then keep their mantissa
whatever else is in the matrix, and padding or splitting a batch moves nothing but what is below 2^-13 of the largest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import sharding
from kdjax.compress.weights import is_decoder, scale_axes, weights_of
from kdjax.errors import UserError
from kdjax.model import LAYOUT, Array, Model, Variables, path_name

INT8, FLOAT8 = "int8", "float8_e4m3"
# What a teacher's weights can be stored in -> the dtype, and the magnitude that a channel's largest weight gets.
STORED: Mapping[str, tuple[Any, float]] = MappingProxyType(
    {"bfloat16": (jnp.bfloat16, 0.0), INT8: (jnp.int8, 127.0), FLOAT8: (jnp.float8_e4m3fn, 448.0)}
)
PRODUCTS = ("", "float8")  # what dense products are computed in; "": the dtype of the computation
_SMALLEST_STORED = 2**10  # elements; a smaller array is not worth its scales
_LARGEST = {jnp.float8_e4m3fn: 8, jnp.float8_e5m2: 15}  # the exponent of the largest power of two
_SMALLEST_EXPONENT = -100  # of a scale: all smaller matrices count as zeros


# --------------------------------------------------------------------------------------------------- stored weights


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Stored:
    """A weight as it is stored; to a model it is an array that must be cast before it is used.

    Attributes:
      values: in the weight's shape, int8, or uint8 for the bits of float8_e4m3fn: XLA's CPU compiler would widen an
        array of float8 before it takes a layer's share of it, and so the whole model at once.
      scale: float32, in the weight's number of dimensions, each whole or 1; the weight is ``values * scale``.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    def astype(self, dtype: Any) -> Array:
        """The weight, multiplied out in float32 and rounded once to ``dtype``."""
        values = self.values
        if values.dtype == jnp.uint8:
            values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
        return (values.astype(jnp.float32) * self.scale).astype(dtype)

    def __getitem__(self, rows: slice) -> "Stored":
        """Some rows of the leading dimension."""
        cut = lambda x: x[rows] if x.shape[0] > 1 else x
        return Stored(cut(self.values), cut(self.scale))


def is_stored(leaf: Any) -> bool:
    """Whether a leaf of a tree is a stored weight, for ``is_leaf``."""
    return isinstance(leaf, Stored)


def store(variables: Variables, kind: str) -> Variables:
    """A model's variables with its weights stored; norms, biases, small weights and the state stay as they are.

    Weights are what :func:`kdjax.compress.weights.weights_of` finds, of 1024 elements or more. Real arrays are rounded
    on the host, where they stay, in NumPy: the same bits, and so the same fingerprint, whatever device and mesh they
    came from. Under a trace, such as that of ``jax.eval_shape``, it is part of the program.

    Args:
      variables: floats of any dtype.
      kind: a name in :data:`STORED`.
    """
    params = variables["params"]
    weights = weights_of(params)
    dtype, bound = STORED[kind]

    def stored(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name not in weights or leaf.size < _SMALLEST_STORED:
            return leaf
        if not isinstance(leaf, jax.core.Tracer):
            leaf = np.asarray(sharding.to_host(leaf))
        if kind == "bfloat16":
            return leaf.astype(dtype)
        return _rounded(leaf, dtype, bound, scale_axes(name, leaf, params))

    return {**variables, "params": jax.tree_util.tree_map_with_path(stored, params)}


def restored(variables: Variables) -> Variables:
    """Variables whose stored weights are float32 arrays again, but for those of bfloat16, which are arrays already."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_stored(x) else x, variables, is_leaf=is_stored)


def of_stored(model: Model, kind: str) -> Model:
    """The model as it is asked with stored weights: ``init`` makes such, and ``apply`` takes such and plain ones.

    A bundled decoder casts each weight where it uses it, within the walk over its layers, so that one layer at a time
    is there in full. Any other model is given all of its weights multiplied out, from which the compiler makes each
    where it is needed.
    """

    def apply(variables: Variables, inputs: Any, **options: Any) -> Any:
        given = variables if is_decoder(variables["params"]) else restored(variables)
        return model.apply(given, inputs, **options)

    return Model(lambda key: store(model.init(key), kind), apply)


def _rounded(weight: Any, dtype: Any, bound: float, own: tuple[int, ...]) -> Stored:
    """In methods that NumPy's and JAX's arrays both have; each index of the axes ``own`` has a scale."""
    shared = tuple(axis for axis in range(weight.ndim) if axis not in own)
    wide = weight.astype(np.float32)
    # Clipped, so that a channel of zeros has a scale to be divided by.
    scale = abs(wide).max(axis=shared, keepdims=True).clip(1e-30) / np.float32(bound)
    values = wide / scale
    return Stored(values.round().astype(dtype) if dtype == jnp.int8 else values.astype(dtype).view(np.uint8), scale)


# --------------------------------------------------------------------------------------------------- float8 products


@partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=[])
@dataclass(frozen=True)
class Float8:
    """A kernel [inputs, outputs] whose products are computed in float8."""

    kernel: Any  # an array, or Stored


def product(x: Array, kernel: Any) -> Array:
    """x [..., m] @ kernel [m, n] in the dtype of x; the kernel is an array, :class:`Stored` or :class:`Float8`."""
    if not isinstance(kernel, Float8) and not all(isinstance(size, int) for size in x.shape):
        return x @ kernel.astype(x.dtype)  # of symbolic sizes, in an export: converters know this form best
    # As a product of two matrices: XLA's CPU gradient of a batched one is slower.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, Float8):
        y = float8_product(rows, kernel.kernel.astype(x.dtype))
    else:
        y = rows @ kernel.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def float8_product(x: Array, kernel: Array) -> Array:
    """x [r, m] @ kernel [m, n] in the dtype of x, both rounded to float8_e4m3fn, summed up in float32.

    The gradient is rounded to float8_e5m2, and both products with it are of the rounded operands, which are all that is
    kept for it, a byte an element. XLA makes cuBLASLt's float8 products of these where the hardware has them (compute
    capability 8.9 or more, dimensions that 16 divides), and widens the operands elsewhere.
    """
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    x8, x_scale = to_float8(x, jnp.float8_e4m3fn)
    kernel8, kernel_scale = to_float8(kernel, jnp.float8_e4m3fn)
    y = _dot(x8, kernel8, 1, 0) * (x_scale * kernel_scale)
    like = (jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))  # residuals are arrays, and a dtype is none
    return y.astype(x.dtype), (x8, x_scale, kernel8, kernel_scale, like)


def _backward(kept, cotangent):
    x8, x_scale, kernel8, kernel_scale, like = kept
    gradient8, scale = to_float8(cotangent, jnp.float8_e5m2)
    of_x = _dot(gradient8, kernel8, 1, 1) * (scale * kernel_scale)
    of_kernel = _dot(x8, gradient8, 0, 0) * (x_scale * scale)
    return of_x.astype(like[0].dtype), of_kernel.astype(like[1].dtype)


float8_product.defvjp(_forward, _backward)


def to_float8(x: Array, dtype: Any) -> tuple[Array, Array]:
    """``(values, scale)``: x / scale rounded to ``dtype``, and a float32 power of two, by which the largest magnitude
    comes to lie in the highest binade that holds whole; what is not finite makes values that are not."""
    wide = x.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(wide)))  # largest < 2^exponent
    scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - _LARGEST[dtype], _SMALLEST_EXPONENT))
    return (wide / scale).astype(dtype), scale


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def float8_decoder(model: Model) -> Model:
    """A bundled decoder whose blocks' products with kernels are of float8; attention, norms and head are as they were,
    and so are its parameters."""

    def mark(path: Any, leaf: Any) -> Any:
        return Float8(leaf) if path_name(path).endswith("kernel") else leaf

    def apply(variables: Variables, inputs: Any, **options: Any) -> Any:
        lay = LAYOUT.get()  # first, since it knows weights by their paths
        marked = lambda path, weights: jax.tree_util.tree_map_with_path(mark, lay(path, weights), is_leaf=is_stored)
        before = LAYOUT.set(marked)
        try:
            return model.apply(variables, inputs, **options)
        finally:
            LAYOUT.reset(before)

    return model._replace(apply=apply)


def float8_modules(factory: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[nnx.Rngs], nnx.Module]:
    """A factory of the same NNX modules, whose dense layers, but for the classifier, compute products of float8."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = factory(rngs)
        for layer in _dense_layers(module):
            layer.dot_general = _dense_float8
        return module

    return make


def check_dense(factory: Callable[[nnx.Rngs], nnx.Module]) -> None:
    """Raises a UserError where a student's modules have no dense layer that float8 products are for."""
    if not _dense_layers(nnx.eval_shape(lambda: factory(nnx.Rngs(0)))):
        raise UserError(
            "train.products=float8 is for dense layers, and the student has none but its classifier: take an mlp, a "
            "vit or a decoder, or leave it out."
        )


def _dense_layers(module: nnx.Module) -> list[nnx.Linear]:
    return [layer for path, layer in module.iter_modules() if isinstance(layer, nnx.Linear) and path != ("head",)]


def _dense_float8(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """What ``nnx.Linear`` asks of ``dot_general``: the last dimension of x with the first of the kernel."""
    return product(x, Float8(kernel))

"""The head of a model with many classes: hidden states to logits, in the one place where that is done.

A model over a large vocabulary returns its hidden states and its head, so that whoever needs logits makes them for a
few positions at a time: ``[batch, tokens, vocabulary]`` never exists.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel"],
    meta_fields=["dtype", "scale", "soft_cap", "classes"],
)
@dataclass(frozen=True)
class Head:
    """Logits = cap · tanh(scale · h Kᵀ / cap), or scale · h Kᵀ without a cap.

    Attributes:
      kernel: [rows, width], as an embedding table lies.
      dtype: what the product is computed in, summed up in float32.
      scale: a model's own factor of its logits.
      soft_cap: the bound of the logits (Gemma 2); 0 for none.
      classes: how many rows are classes; the others pad the table and never get a logit. 0: all.
    """

    kernel: Array
    dtype: Any = jnp.float32
    scale: float = 1.0
    soft_cap: float = 0.0
    classes: int = 0

    @property
    def size(self) -> int:
        """The number of classes."""
        return self.classes or self.kernel.shape[0]

    def __call__(self, hidden: Array) -> Array:
        """Hidden states [..., width] to float32 logits [..., classes]."""
        logits = _product(self.dtype, hidden, self.kernel[: self.size]) * self.scale
        return self.soft_cap * jnp.tanh(logits / self.soft_cap) if self.soft_cap else logits


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype: Any, hidden: Array, kernel: Array) -> Array:
    """h Kᵀ, float32. Its derivative is rounded to ``dtype`` before it is multiplied: a float32 operand would make both
    products of the backward pass float32 ones, many times slower on accelerators."""
    return _dot(hidden.astype(dtype), kernel.astype(dtype), ((hidden.ndim - 1,), (1,)))


def _forward(dtype, hidden, kernel):
    return _product(dtype, hidden, kernel), (hidden, kernel)


def _backward(dtype, operands, cotangent):
    hidden, kernel = operands
    cotangent, positions = cotangent.astype(dtype), tuple(range(hidden.ndim - 1))
    of_hidden = _dot(cotangent, kernel.astype(dtype), ((hidden.ndim - 1,), (0,)))
    of_kernel = _dot(cotangent, hidden.astype(dtype), (positions, positions))
    return of_hidden.astype(hidden.dtype), of_kernel.astype(kernel.dtype)


def _dot(x: Array, y: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=jnp.float32)


_product.defvjp(_forward, _backward)

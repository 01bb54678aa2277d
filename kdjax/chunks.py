"""Sums over positions, walked over in chunks: what a loss over a large vocabulary needs at once is one chunk's logits.

The gradient is made chunk by chunk in the forward pass, while the logits are there, so that no logits are kept and none
are computed twice. That is possible because the total is linear in the sums: the coefficient of each is known before.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kdjax.model import Array, Outputs
from kdjax.sharding import TENSOR

# Bytes of one model's float32 logits that a device holds at a time. On an accelerator a chunk must be large enough for
# matrix products to be quick; on a CPU, whose chunks are quick at any size, the smaller the better.
BUDGET = {"cpu": 32 * 2**20}
BUDGET_OF_ACCELERATORS = 512 * 2**20


class Positions(NamedTuple):
    """What is known of the positions [b, t] of a batch; every array but the heads' begins with these dimensions."""

    student: Outputs
    teachers: tuple[Outputs, ...]  # in their order, which a dict would lose
    ema: Outputs | None  # of the student's moving average
    batch: Mapping[str, Array]


Sums = dict[str, Array]
# (positions, numbers that all positions share) -> float32 sums over the positions by name
Function = Callable[[Positions, Any], Sums]


class Layout(NamedTuple):
    """How positions lie on devices: over which axes of the mesh their leading dimension is split."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def ways(self) -> int:
        """In how many parts the positions are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


def weighted_sums(
    function: Function,
    coefficients: Mapping[str, Array],
    positions: Positions,
    shared: Any,
    chunks: int,
    layout: Layout | None = None,
) -> tuple[Array, Sums]:
    """The sums of ``function`` over all positions, and Σ coefficient · sum of those that have a coefficient.

    Args:
      function: gives the sums of any part of the positions; those of the parts must add up to those of the whole.
      coefficients: float32 scalars by name of a sum. The total's gradient flows into them and into the student.
      positions: one chunk: any shape; several: [b, t, ...].
      shared: what the function needs besides; without gradient.
      chunks: in how many parts of the token dimension, which must divide it, the positions are walked over; 1 is the
        dense computation, by plain differentiation.
      layout: where the positions lie, with several chunks on several devices: each device then walks over its own
        share, and kernels are gathered and their gradients summed up once, not once for each chunk.

    Returns:
      ``(total, sums)``; no gradient flows through the sums.
    """
    positions = positions._replace(student=positions.student._replace(taps={}))
    if chunks == 1:
        total, sums = _weighted(function, coefficients, positions, shared)
        return total, jax.lax.stop_gradient(sums)
    others = (positions.teachers, positions.ema, positions.batch)
    total, sums = _walk(function, chunks, layout, dict(coefficients), positions.student, others, shared)
    return total, jax.lax.stop_gradient(sums)


def chunk_count(batch: int, tokens: int, classes: int, layout: Layout | None = None, tokens_per_chunk: int = 0) -> int:
    """In how many chunks [batch, tokens] positions are walked over: the smallest divisor of ``tokens`` that is enough.

    Args:
      batch: sequences, over all devices.
      tokens: of a sequence.
      classes: the vocabulary.
      layout: over which devices the sequences are split, and over which the vocabulary.
      tokens_per_chunk: on each device; 0 for what a fixed budget of logits allows.
    """
    local = max(batch // (layout.ways if layout else 1), 1)
    classes = -(-classes // (layout.mesh.shape.get(TENSOR, 1) if layout else 1))
    budget = BUDGET.get(jax.default_backend(), BUDGET_OF_ACCELERATORS)
    most = tokens_per_chunk or max(budget // (4 * classes), 1)
    enough = min(math.ceil(local * tokens / most), tokens)
    return next(count for count in range(enough, tokens + 1) if tokens % count == 0)


def _weighted(function: Function, coefficients: Mapping[str, Array], positions: Positions, shared: Any):
    sums = function(positions, shared)
    parts = (coefficients[name] * sums[name] for name in coefficients)
    return sum(parts, jnp.zeros((), jnp.float32)), sums


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _walk(function, chunks, layout, coefficients, student, others, shared):
    def local(coefficients, student, others, shared):
        def body(sums, index):
            part = _cut(Positions(student, *others), index, chunks)
            return jax.tree.map(jnp.add, sums, function(part, shared)), None

        part = jax.eval_shape(lambda: function(_cut(Positions(student, *others), 0, chunks), shared))
        return _summed(jax.lax.scan(body, _zeros(part), jnp.arange(chunks))[0], layout)

    sums = _on_devices(local, layout, False)(coefficients, student, others, shared)
    return sum((coefficients[name] * sums[name] for name in coefficients), jnp.zeros((), jnp.float32)), sums


def _forward(function, chunks, layout, coefficients, student, others, shared):
    def local(coefficients, student, others, shared):
        def of_chunk(part: Positions):
            loss = lambda one: _weighted(function, coefficients, part._replace(student=one), shared)
            (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(part.student)
            return sums, gradient

        def body(carry, index):
            sums, whole = carry
            new, gradient = of_chunk(_cut(Positions(student, *others), index, chunks))
            return (jax.tree.map(jnp.add, sums, new), _put(whole, gradient, index)), None

        zero = jax.eval_shape(lambda: of_chunk(_cut(Positions(student, *others), 0, chunks))[0])
        start = (_zeros(zero), _zero_gradient(student))
        (sums, gradient), _ = jax.lax.scan(body, start, jnp.arange(chunks))
        if gradient.head is not None:
            gradient = gradient._replace(head=_summed(gradient.head, layout))
        return _summed(sums, layout), gradient

    sums, gradient = _on_devices(local, layout, True)(coefficients, student, others, shared)
    total = sum((coefficients[name] * sums[name] for name in coefficients), jnp.zeros((), jnp.float32))
    like = jax.tree.map(lambda x: jnp.zeros((), x.dtype), student)
    return (total, sums), ({name: sums[name] for name in coefficients}, gradient, like)


def _backward(function, chunks, layout, kept, cotangents):
    sums, gradient, like = kept
    by_total = cotangents[0]
    scaled = jax.tree.map(lambda g, x: (by_total * g).astype(x.dtype), gradient, like)
    return jax.tree.map(lambda x: by_total * x, sums), scaled, None, None


_walk.defvjp(_forward, _backward)


# --------------------------------------------------------------------------------------------------- over devices


def _on_devices(local: Callable, layout: Layout | None, with_gradient: bool) -> Callable:
    """``local(coefficients, student, others, shared)`` on each device's share of the positions."""
    if layout is None or layout.ways == 1:
        return local
    split, whole = PartitionSpec(layout.axes), PartitionSpec()

    def of_outputs(outputs: Any) -> Any:
        if not isinstance(outputs, Outputs):
            return jax.tree.map(lambda _: split, outputs)
        specs = jax.tree.map(lambda _: split, outputs._replace(head=None))
        return specs._replace(head=jax.tree.map(lambda _: whole, outputs.head))

    def run(coefficients, student, others, shared):
        inner = jax.tree.map(of_outputs, others, is_leaf=lambda x: isinstance(x, Outputs))
        everywhere = lambda tree: jax.tree.map(lambda _: whole, tree)
        return jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(everywhere(coefficients), of_outputs(student), inner, everywhere(shared)),
            out_specs=(whole, of_outputs(student)) if with_gradient else whole,
            axis_names=set(layout.axes),
            check_vma=False,
        )(coefficients, student, others, shared)

    return run


def _summed(tree: Any, layout: Layout | None) -> Any:
    return tree if layout is None or layout.ways == 1 else jax.lax.psum(tree, layout.axes)


# ------------------------------------------------------------------------------------------------------- the chunks


def _cut(positions: Positions, index: Array | int, chunks: int) -> Positions:
    """A chunk of the token dimension; a slice of the arrays where they lie, so that the batch stays on its devices."""

    def cut(x: Array) -> Array:
        size = x.shape[1] // chunks
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)

    def of_outputs(outputs: Outputs) -> Outputs:
        bare = jax.tree.map(cut, outputs._replace(head=None, taps={}))
        return bare._replace(head=outputs.head)

    student, teachers, ema, batch = positions
    return Positions(
        of_outputs(student),
        tuple(map(of_outputs, teachers)),
        None if ema is None else of_outputs(ema),
        jax.tree.map(cut, dict(batch)),
    )


def _zero_gradient(student: Outputs) -> Outputs:
    """Zeros to gather the gradient in: a head's in float32, whatever its kernel is, since all chunks add to it."""
    rest = jax.tree.map(jnp.zeros_like, student._replace(head=None))
    return rest._replace(head=jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), student.head))


def _put(whole: Outputs, gradient: Outputs, index: Array) -> Outputs:
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, index * new.shape[1], axis=1)
    rest = jax.tree.map(put, whole._replace(head=None), gradient._replace(head=None))
    return rest._replace(head=jax.tree.map(lambda x, new: x + new.astype(jnp.float32), whole.head, gradient.head))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

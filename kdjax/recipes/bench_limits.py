"""What the machine and the arithmetic allow: the rate of plain matrix products, and the fewest bytes of a step."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import memory

SIZES = (512, 1024, 2048, 4096, 8192)
LONGEST = 0.1  # seconds of one product, after which no larger one is tried
CALLS, ROUNDS = 4, 3


def peak(mesh: Mesh, dtype: str, sizes: Sequence[int] = ()) -> float:
    """FLOP/s of the best of several square matrix products, one on each device of the mesh at a time, together.

    Products are as JAX makes them by default, the same precision as the models'. Several are in flight, and the best
    of a few rounds counts: it is a limit that is looked for, and not an average. Without ``sizes`` larger and larger
    ones are tried.
    """
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    multiply = jax.jit(lambda x: x @ x, out_shardings=spread)
    best = 0.0
    for size in sizes or SIZES:
        make = jax.jit(lambda size=size: jnp.full((mesh.size, size, size), 1.0 / size, dtype), out_shardings=spread)
        x = make()
        jax.block_until_ready(multiply(x))
        seconds = min(_seconds(multiply, x) for _ in range(ROUNDS))
        best = max(best, 2.0 * mesh.size * size**3 / seconds)
        if seconds > LONGEST:
            break
    return best


def _seconds(multiply: Any, x: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready([multiply(x) for _ in range(CALLS)])
    return (time.perf_counter() - start) / CALLS


def fewest_bytes(state: Any, teachers: Any, batch: Any) -> int:
    """Bytes that a step must move on one device: its state read and written, its teachers and its batch read.

    Arrays or shapes with their shardings. What a step keeps between its two passes is not in it, so no step reaches it.
    """
    return 2 * bytes_of(state) + bytes_of(teachers) + bytes_of(batch)


def bytes_of(tree: Any) -> int:
    """What a tree of arrays takes on one device; random keys, which are a few bytes, are left out."""
    plain = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return memory.per_device(plain)

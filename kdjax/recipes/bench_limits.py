"""What the machine and the arithmetic allow: the rate of plain matrix products, and the fewest bytes of a step."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import memory

SIZES = (512, 1024, 2048, 4096, 8192)
LONGEST = 0.1  # seconds of one product, after which no larger one is tried
CALLS, MOST_CALLS, ROUNDS = 4, 100, 3


def peak(mesh: Mesh, dtype: str, sizes: Sequence[int] = ()) -> float:
    """FLOP/s of the best of several square matrix products, one on each device of the mesh at a time, together.

    Products are as JAX makes them by default, the same precision as the models', and of random numbers, since some
    devices are faster on constants. Several are in flight, and the best of a few rounds counts: it is a limit that is
    looked for, and not an average. Without ``sizes`` larger and larger ones are tried.
    """
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    multiply = jax.jit(lambda x: x @ x, out_shardings=spread)
    best = 0.0
    for size in sizes or SIZES:
        shape = (mesh.size, size, size)
        x = jax.jit(lambda shape=shape: jax.random.normal(jax.random.key(0), shape, dtype), out_shardings=spread)()
        jax.block_until_ready(multiply(x))
        calls = min(max(round(LONGEST / _seconds(multiply, x, CALLS)), CALLS), MOST_CALLS)
        seconds = min(_seconds(multiply, x, calls) for _ in range(ROUNDS))
        best = max(best, 2.0 * mesh.size * size**3 / seconds)
        if seconds > LONGEST:
            break
    return best


def _seconds(multiply: Any, x: jax.Array, calls: int) -> float:
    start, found = time.perf_counter(), x
    for _ in range(calls):
        found = multiply(x)
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / calls


def fewest_bytes(state: Any, teachers: Any, batch: Any) -> int:
    """Bytes that a step must move on one device: its state read and written, its teachers and its batch read.

    Arrays or shapes with their shardings. What a step keeps between its two passes is not in it, so no step reaches it.
    """
    return 2 * bytes_of(state) + bytes_of(teachers) + bytes_of(batch)


def bytes_of(tree: Any) -> int:
    """What a tree of arrays takes on one device; random keys, which are a few bytes, are left out."""
    plain = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return memory.per_device(plain)

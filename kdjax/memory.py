"""What a run needs of each device's memory, said and refused before its first step."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax import sharding
from kdjax.errors import UserError
from kdjax.model import flatten_paths

_WORTH_SAYING = 2**20  # bytes of a replicated array


def limit_of(device: jax.Device) -> tuple[int, str]:
    """Bytes that one device may use, and where the figure is from; a CPU's devices share the host's memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit), device.device_kind
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of the container, cgroup 2 and 1
        try:
            host = min(host, int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):
            continue
    return host // jax.local_device_count(), "host"


def per_device(tree: Any) -> int:
    """The bytes that a tree of arrays or shapes, with their shardings, takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_text(count: float) -> str:
    """A size in bytes for a person: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def check(name: str, needs: Mapping[str, int], device: jax.Device) -> str:
    """One sentence on what an arm needs of a device.

    Args:
      name: of the arm.
      needs: bytes per device by what takes them, such as ``{"teacher": ..., "activations": ...}``.
      device: one of those that it runs on.

    Raises:
      UserError: it needs more than there is; says of what the most, and what helps against it.
    """
    limit, where = limit_of(device)
    parts = ", ".join(f"{what} {bytes_text(size)}" for what, size in needs.items() if size)
    total = sum(needs.values())
    if total > limit:
        largest = max(needs, key=needs.__getitem__)
        raise UserError(
            f"{name} needs {bytes_text(total)} of each device ({parts}) and there are {bytes_text(limit)} ({where}): "
            f"{_REMEDIES[largest]}."
        )
    return f"{name}: {parts} of {bytes_text(limit)} per device ({where})"


_REMEDIES = {
    "teacher": "split it with mesh.fsdp or mesh.tensor and sharding.teacher, or store it smaller with teacher.weights",
    "student": "split it with mesh.fsdp or mesh.tensor and sharding.student",
    "optimiser": "split it with mesh.fsdp and sharding.student, or choose an optimizer with fewer moments",
    "objective": "split it with mesh.fsdp and sharding.student, or choose losses that learn and remember less",
    "activations": "raise train.accumulate, lower data.batch_size, or use more devices",
}


def replicated(tree: Any, mesh: Mesh, rules: sharding.Rules) -> list[str]:
    """The large arrays of a tree of which every device holds a whole copy, each with the reason, largest first."""
    found = []
    for path, leaf in flatten_paths(tree).items():
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size < _WORTH_SAYING or not leaf.sharding.is_fully_replicated:
            continue
        tactic = next((tactic for pattern, tactic in rules if re.search(pattern, path)), "replicate")
        ways = {axis: mesh.shape.get(axis, 1) for axis in ("fsdp", sharding.TENSOR)}
        if tactic == "replicate":
            why = "the rules say so"
        elif all(count == 1 for count in ways.values()):
            why = "mesh.fsdp is 1"
        else:
            sizes = " or ".join(f"{axis}={count}" for axis, count in ways.items() if count > 1)
            why = f"{sizes} divides no dimension of {list(leaf.shape)}"
        found.append((size, f"{path} {bytes_text(size)} ({why})"))
    return [sentence for _, sentence in sorted(found, reverse=True)]

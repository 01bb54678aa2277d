"""StableHLO: the model as ``jax.export`` serialises it, one file for CPUs, GPUs and TPUs, whatever made it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from kdjax.export.serving import Serving

PLATFORMS = ("cpu", "cuda", "tpu")


def write(serving: Serving, path: Path) -> dict[str, Any]:
    """Writes the serialised program, with its weights in it; named dimensions of the input stay free.

    It is versioned: JAX keeps reading such a file for at least six months. A student that was trained with quantisation
    is written with the rounding in it and its weights in float32, so that it answers as it was trained to.

    Args:
      serving: what is written; its ``reference``.
      path: of the file.

    Returns:
      What the file is called with: ``platforms`` and ``calling_convention``.
    """
    shape = export.symbolic_shape(", ".join(map(str, serving.input_shape)))
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(serving.input_dtype))
    exported = export.export(jax.jit(serving.reference), platforms=PLATFORMS)(like)
    Path(path).write_bytes(exported.serialize())
    return {"platforms": list(PLATFORMS), "calling_convention": exported.calling_convention_version}

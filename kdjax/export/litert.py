"""LiteRT (TensorFlow Lite), for phones: JAX to TensorFlow by ``jax2tf``, then TensorFlow's own converter.

The input has one shape, with a batch of 1: what is left free keeps the delegates of a phone from taking the model, and
the converter does not take a decoder of free length.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.errors import UserError
from kdjax.export.serving import Serving


def write(serving: Serving, path: Path, *, length: int = 0, calibration: np.ndarray | None = None) -> dict[str, Any]:
    """Writes a ``.tflite`` file, in float32 or, with calibration, with int8 weights and activations.

    A student that was trained with quantisation is written with its rounding in float32; in int8, from its plain
    weights, and with the converter's ranges.

    Args:
      serving: what is written.
      path: of the file.
      length: of the sequences, where the input has a length.
      calibration: [n, ...] inputs like those of the model, from which the ranges of the activations are taken.

    Returns:
      ``weights_bytes``: of the constants as the file stores them.

    Raises:
      UserError: TensorFlow or LiteRT is not installed, calibration of another shape or dtype, or an operation that the
        format lacks (names it, and the line of the layer).
    """
    sizes: dict[str | int, str | int] = {"batch": 1, "length": length}
    shape = tuple(sizes.get(size, size) for size in serving.input_shape)
    if calibration is not None and (
        calibration.shape[1:] != shape[1:] or not len(calibration) or calibration.dtype != serving.input_dtype
    ):
        raise UserError(
            f"calibration is {calibration.dtype} {list(calibration.shape)} and the model takes {serving.input_dtype} "
            f"{['examples', *shape[1:]]}: give inputs of the data that the model was trained on."
        )
    data = _converted(serving.function if calibration is not None else serving.reference, shape, serving, calibration)
    Path(path).write_bytes(data)
    return {"weights_bytes": _weights_bytes(data)}


def _converted(function: Any, shape: tuple, serving: Serving, calibration: np.ndarray | None) -> bytes:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow starts: its notes are not for the user
    try:
        import ai_edge_litert  # noqa: F401 - needed below; said before anything is converted
        import tensorflow as tf
        from jax.experimental import jax2tf
        from tensorflow.lite.python.convert_phase import ConverterError
    except ImportError as error:
        raise UserError("LiteRT needs tensorflow-cpu and ai-edge-litert: run pip install 'kdjax[litert]'.") from error
    signature = [tf.TensorSpec(shape, serving.input_dtype, name=serving.input_name)]
    traced = tf.function(jax2tf.convert(function, with_gradient=False), input_signature=signature, autograph=False)
    try:
        converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()], tf.Module())
        if calibration is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([example[None]] for example in calibration)
        return converter.convert()
    except ConverterError as error:
        found = re.search(r"(\S+:\d+):\d+: error: '([\w.]+)' op", str(error))
        what = f"the operation {found[2]} of {found[1]}" if found else f"this model ({str(error).splitlines()[0]})"
        raise UserError(f"LiteRT cannot hold {what}: choose another format, or a model without it.") from error


def _weights_bytes(data: bytes) -> int:
    """The bytes of all constants of a ``.tflite`` file; a buffer that several tensors share counts once."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    return sum(len(model.buffers[number].data) for number in used if model.buffers[number].data is not None)

"""Integers in an ONNX graph: weights on the grid that students are trained on, activations by onnxruntime.

Weights alone are rounded here, as ``compress.quantise`` and qwix do: a symmetric grid with one scale for each output
channel, so that a student answers from its file as it did in training. Where activations are quantised too,
onnxruntime's own quantisers place the nodes that it and other runtimes fuse to integer kernels.
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

# Of each kind: the largest magnitude in steps (for integers half a step beyond the largest), the range, the dtype.
GRIDS: dict[str, tuple[float, float, float, Any]] = {
    "int8": (127.5, -128, 127, np.int8),
    "int4": (7.5, -8, 7, ml_dtypes.int4),
    "int2": (1.5, -2, 1, ml_dtypes.int4),
    "fp8": (448.0, -448.0, 448.0, ml_dtypes.float8_e4m3fn),
}
_LAYERS = ("Conv", "Gemm", "MatMul")
_FIRST = "first_axis"  # the initialiser that says which dimension is taken away again
_BATCH = 64  # calibration inputs that run at once
_STATIC = [*_LAYERS, "Relu", "MaxPool"]  # the last two cost nothing beside a layer, and a node each without one


def rounded(weight: np.ndarray, axis: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """``(values, scale)`` of a float32 weight, with one scale for each index of an axis.

    scale = max |w| / bound, or 1 where that is 0; values = w / scale, rounded to nearest, halves to even, and clipped.
    The weight is ``values.astype(float32) * scale`` along the axis.

    Computed by XLA, as in training: every channel's largest weight lies halfway between two integers, and which of them
    it becomes hangs on the last bit of a division, that NumPy does otherwise.
    """
    bound, low, high, dtype = GRIDS[kind]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    on_device = jnp.asarray(weight)
    scale = jnp.abs(on_device).max(axis=others, keepdims=True) / bound
    scale = jnp.where(scale < np.sqrt(np.finfo(np.float32).tiny), 1.0, scale)
    values = on_device / scale
    values = jnp.clip(values if kind == "fp8" else jnp.round(values), low, high).astype(dtype)
    return np.asarray(values), np.asarray(scale).reshape(-1)


def quantise_weights(model: Any, kind: str, skip: Iterable[str] = ()) -> None:
    """Rounds the float32 weights of layers and tables, in place: each is stored in few bits, and dequantised.

    A weight is an initialiser of two or more dimensions that nothing reads but as the second operand of Conv, Gemm and
    MatMul, or as the table of a Gather, with one axis of output channels for all of them. A matrix is stored with its
    output channels as rows, which dequantises faster, and with one more dimension before them, because onnxruntime
    would else round the activations that it meets to int8, unasked.

    Args:
      model: an ONNX model of opset 21 or later.
      kind: a name in :data:`GRIDS`.
      skip: names of initialisers that stay as they are.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph, skip = model.graph, set(skip)
    axes = _channel_axes(graph)
    kept, nodes = [], []
    for tensor in graph.initializer:
        axis = axes.get(tensor.name)
        if axis is None or tensor.name in skip or tensor.data_type != onnx.TensorProto.FLOAT:
            kept.append(tensor)
            continue
        values, scale = rounded(numpy_helper.to_array(tensor), axis, kind)
        made, matrix = tensor.name, values.ndim == 2 and axis == 1
        if matrix:
            values, axis, made = np.ascontiguousarray(values.T)[None], 1, f"{tensor.name}_stored"
        names = [f"{tensor.name}_{kind}", f"{tensor.name}_scale"]
        kept += [numpy_helper.from_array(array, name) for array, name in zip((values, scale), names, strict=True)]
        nodes.append(helper.make_node("DequantizeLinear", names, [made], axis=axis))
        if matrix:
            nodes.append(helper.make_node("Squeeze", [made, _FIRST], [f"{tensor.name}_rows"]))
            nodes.append(helper.make_node("Transpose", [f"{tensor.name}_rows"], [tensor.name], perm=[1, 0]))
    if any(node.op_type == "Squeeze" for node in nodes):
        kept.append(numpy_helper.from_array(np.zeros(1, np.int64), _FIRST))
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _channel_axes(graph: Any) -> dict[str, int]:
    """The axis of output channels of every weight, by name."""
    from onnx import helper

    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer if len(tensor.dims) >= 2}
    turned = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and ranks.get(node.input[0]) == 2
    }
    found: dict[str, set[int | None]] = {}
    for node in graph.node:
        if node.output and node.output[0] in turned:
            continue
        for place, read in enumerate(node.input):
            name = turned.get(read, read)
            if name not in ranks:
                continue
            axis: int | None = None
            if (node.op_type, place) == ("Conv", 1):
                axis = 0
            elif (node.op_type, place) == ("Gemm", 1):
                flipped = helper.get_node_attr_value(node, "transB") if _has(node, "transB") else 0
                axis = 0 if flipped else 1
            elif (node.op_type, place) == ("MatMul", 1):
                axis = ranks[name] - 1
            elif (node.op_type, place) == ("Gather", 0) and ranks[name] == 2:
                axis = 0
            if name != read and axis is not None:
                axis = 1 - axis
            found.setdefault(name, set()).add(axis)
    return {name: axis for name, (axis, *others) in found.items() if axis is not None and not others}


def _has(node: Any, attribute: str) -> bool:
    return any(found.name == attribute for found in node.attribute)


def skipped(model: Any, params: Mapping[str, np.ndarray], skip: Iterable[str]) -> set[str]:
    """The initialisers of the parameters in whose path a regex of ``skip`` is found.

    Found by their values, whatever a converter called them and however it turned them.
    """
    from onnx import numpy_helper

    patterns = [re.compile(regex) for regex in skip]
    wanted = set()
    for path, array in params.items():
        if any(pattern.search(path) for pattern in patterns):
            wanted |= {_content(part) for part in (array, *(array if array.ndim > 2 else ()))}  # of each layer, stacked
    if not wanted:
        return set()
    return {tensor.name for tensor in model.graph.initializer if _content(numpy_helper.to_array(tensor)) in wanted}


def _content(array: np.ndarray) -> bytes:
    return np.sort(array, axis=None).tobytes()


# ------------------------------------------------------------------------------------------- activations as well


def dynamic(model: Any, skip: Iterable[str] = ()) -> Any:
    """The model whose dense layers multiply integers, the range of each input found as it comes.

    Convolutions are left out: onnxruntime's for this, ConvInteger, is some times slower than its float one.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def quantise(source: Path, target: Path) -> None:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_reading(model, skip),
        )

    return _through_files(model, quantise)


def static(model: Any, calibration: np.ndarray, skip: Iterable[str] = ()) -> Any:
    """The model whose layers multiply integers, with ranges of activations as ``calibration`` has them.

    Batch normalisation is folded into the convolution before it. What dense layers put out stays float32, the logits
    among it, and so do residual sums, norms and attention between the layers.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration[i : i + _BATCH] for i in range(0, len(calibration), _BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    def quantise(source: Path, target: Path) -> None:
        folded = source.with_name("folded.onnx")
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_STATIC,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # onnxruntime 1.32 refuses some graphs of QInt8, and runs others slower
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_reading(model, skip),
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )

    return _through_files(model, quantise)


def _reading(model: Any, names: Iterable[str]) -> list[str]:
    """The nodes that read an initialiser of these names, by name."""
    names = set(names)
    return [node.name for node in model.graph.node if names & set(node.input)]


def _through_files(model: Any, quantise: Callable[[Path, Path], None]) -> Any:
    """What a quantiser makes of a model, as a model: onnxruntime's work from file to file."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, source)
        with _quiet():
            quantise(source, target)
        quantised = onnx.load(target)
    del quantised.graph.value_info[:]
    standard = [opset for opset in quantised.opset_import if not opset.domain]  # onnxruntime names all that it knows
    del quantised.opset_import[:]
    quantised.opset_import.extend(standard)
    return quantised


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to users of its quantisers, who are not ours."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

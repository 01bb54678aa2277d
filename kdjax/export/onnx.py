"""ONNX, for onnxruntime, TensorRT and OpenVINO: one file in the standard domain, with free batch and length.

jax2onnx writes the graph; what it writes in a way that runtimes are slow at, or their quantisers blind to, is put
right here: a product with a constant is a MatMul, and a ReLU stands beside the layer that it follows.
"""

import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from kdjax.errors import UserError, unknown
from kdjax.export import onnx_quantise
from kdjax.export.serving import Serving

PRECISIONS = ("float32", "int8", "int8-dynamic", "int8-weights", "int4", "fp8")
_OPSET = 21  # the first with int4
_LARGEST = 2**31 - 2**24  # bytes of a file of protocol buffers, less some room for the graph


def write(
    serving: Serving, path: Path, *, precision: str = "float32", calibration: np.ndarray | None = None
) -> dict[str, Any]:
    """Writes a model as an ONNX file, checked by ``onnx.checker``.

    Args:
      serving: what is written.
      path: of the file.
      precision: ``"float32"``, which of a student that was trained with quantisation means as it was trained;
        ``"int8"``, weights and activations, static, by calibration; ``"int8-dynamic"``, the ranges of activations found
        anew for every input; ``"int8-weights"``, ``"int4"`` and ``"fp8"`` (e4m3fn), weights alone, with one scale for
        each output channel. What the rule's ``skip`` names stays float32 in all of them. Activations that were trained
        rounded are written so where weights too are int8; else they stay float32, for runtimes multiply nothing else.
      calibration: some hundred inputs of the training split, of the input's shape and dtype, for ``"int8"``.

    Returns:
      ``weights_bytes``, of all initialisers as they are stored, and ``opset``.

    Raises:
      UserError: an unknown precision, an absent package, calibration that is missing or of another shape or dtype, an
        operation that ONNX lacks (names it and its layer), or weights of more than 2 GiB in float32.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    rule = serving.quantise or {}
    kind = rule.get("weights")
    if precision == "float32" and kind:
        alone = "int8-weights" if kind == "int8" else kind
        precision = "int8" if kind == rule.get("activations") == "int8" else alone
    if precision == "int8":
        _check_calibration(serving, calibration)
    size = 4 * sum(array.size for array in serving.params.values())
    if size > _LARGEST:
        raise UserError(
            f"an ONNX file holds 2 GiB at most, and the model's weights in float32 take {size / 2**30:.1f}: choose the "
            "format safetensors."
        )
    onnx = _packages()
    model = _converted(serving)
    skipped = onnx_quantise.skipped(model, serving.params, rule.get("skip") or ())
    if precision == "int8":
        assert calibration is not None
        model = onnx_quantise.static(model, calibration, skipped)
    elif precision == "int8-dynamic":
        model = onnx_quantise.dynamic(model, skipped)
    if precision != "float32":
        onnx_quantise.quantise_weights(model, "int8" if precision.startswith("int8") else precision, skipped)
    onnx.checker.check_model(model, full_check=True)
    _store_sparse(model)
    onnx.checker.check_model(model)  # shape inference, the full check, does not know sparse initialisers
    onnx.save(model, path)
    return {"weights_bytes": weights_bytes(model), "opset": model.opset_import[0].version}


def weights_bytes(model: Any) -> int:
    """The bytes of a model's initialisers as they are stored: two int4 to a byte, sparse ones' values and places."""
    dense = sum(_tensor_bytes(tensor) for tensor in model.graph.initializer)
    return dense + sum(_tensor_bytes(s.values) + _tensor_bytes(s.indices) for s in model.graph.sparse_initializer)


def _packages() -> Any:
    try:
        import jax2onnx  # noqa: F401
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"export to ONNX needs {error.name}: run pip install 'kdjax[export]'.") from error
    return onnx


def _check_calibration(serving: Serving, calibration: np.ndarray | None) -> None:
    name, shape, dtype = serving.input_name, serving.input_shape, serving.input_dtype
    wanted = f"{name} [{', '.join(map(str, shape))}] of {dtype}"
    if calibration is None:
        raise UserError(f"int8 needs calibration: give {wanted} from the training split, or choose int8-dynamic.")
    fits = len(calibration.shape) == len(shape) and all(
        size > 0 if isinstance(dimension, str) else size == dimension
        for dimension, size in zip(shape, calibration.shape, strict=True)
    )
    if not fits or calibration.dtype != dtype:
        raise UserError(
            f"calibration of shape {list(calibration.shape)} and dtype {calibration.dtype} does not fit the model: "
            f"give {wanted}."
        )


# ------------------------------------------------------------------------------------------------------ the graph


def _converted(serving: Serving) -> Any:
    """The float32 graph."""
    import jax2onnx

    shape = jax.export.symbolic_shape(", ".join(map(str, serving.input_shape)))
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(serving.input_dtype))
    chatter = logging.getLogger("onnx_ir")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # of shapes that it leaves out of the graph
    try:
        model = jax2onnx.to_onnx(
            serving.function, [like], opset=_OPSET, input_names=[serving.input_name], output_names=["logits"]
        )
    except Exception as error:
        raise _lacking(error) from error
    finally:
        chatter.setLevel(level)
    del model.graph.value_info[:]  # some are wrong, and onnxruntime warns of those
    _name_dimensions(model.graph.output[0], serving.output_shape)
    _merge_equals(model.graph)
    _products(model.graph)
    _relus_first(model.graph)
    return model


def _lacking(error: Exception) -> Exception:
    """The UserError for what jax2onnx cannot convert, by the equation that it was at; else the error itself."""
    equation, trace = None, error.__traceback__
    while trace is not None:  # the last found is the innermost
        found = trace.tb_frame.f_locals.get("eqn")
        equation = found if hasattr(found, "primitive") else equation
        trace = trace.tb_next
    if equation is None:
        return error
    place = source_info_util.summarize(equation.source_info)
    layer = f" in {equation.source_info.name_stack}" if str(equation.source_info.name_stack) else ""
    return UserError(
        f"ONNX export has no form for the operation {equation.primitive.name!r}{layer} at {place} ({error}): write "
        "that layer with other operations, or choose the format stablehlo."
    )


def _name_dimensions(value: Any, shape: tuple[str | int, ...]) -> None:
    for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(size, str):
            dimension.dim_param = size


def _merge_equals(graph: Any) -> None:
    """Keeps one of equal initialisers, in place: jax2onnx writes a tied table once for each of its two uses."""
    first: dict[bytes, str] = {}
    names, kept = {}, []
    for tensor in graph.initializer:
        name, tensor.name = tensor.name, ""
        content = tensor.SerializeToString(deterministic=True)
        tensor.name = name
        names[name] = first.setdefault(content, name)
        if names[name] == name:
            kept.append(tensor)
    for node in graph.node:
        node.input[:] = [names.get(read, read) for read in node.input]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _products(graph: Any) -> None:
    """Writes Einsum nodes that multiply matrices as MatMul, in place.

    Handled is ``...ik, ...kj -> ...ij``, where the second operand may lie transposed, and may have no leading
    dimensions: what quantisers and runtimes have fast code for. A transposed constant is transposed here and now, but
    for an embedding table that is also looked up, which would be in the file twice.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = [name for node in graph.node for name in node.input]
    nodes = []
    for node in graph.node:
        flipped = (
            _is_product(helper.get_node_attr_value(node, "equation").decode()) if node.op_type == "Einsum" else None
        )
        if flipped is None:
            nodes.append(node)
            continue
        left, right = node.input
        if flipped and right in constants and uses.count(right) == 1:
            array = numpy_helper.to_array(constants[right])
            constants[right].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.T), right))
        elif flipped:
            rank = flipped
            turned = f"{node.output[0]}_turned"
            nodes.append(helper.make_node("Transpose", [right], [turned], perm=[*range(rank - 2), rank - 1, rank - 2]))
            right = turned
        nodes.append(helper.make_node("MatMul", [left, right], node.output, name=node.name))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_product(equation: str) -> int | None:
    """Of an Einsum that is a product of matrices: the rank of the second operand if that lies transposed, or 0."""
    inputs, output = equation.replace(" ", "").split("->")
    left, _, right = inputs.partition(",")
    if len(left) < 2 or len(right) < 2 or left[:-1] != output[:-1]:
        return None
    leading, inner, outer = left[:-2], left[-1], output[-1]
    for flipped, matrix in ((0, inner + outer), (len(right), outer + inner)):
        if right[-2:] == matrix and right[:-2] in ("", leading):
            return flipped
    return None


def _relus_first(graph: Any) -> None:
    """Moves each ReLU to before the Transpose that it follows, in place: there it is one with its layer."""
    uses = [name for node in graph.node for name in node.input]
    makers = {name: node for node in graph.node for name in node.output}
    for relu in graph.node:
        turn = makers.get(relu.input[0]) if relu.op_type == "Relu" else None
        if turn is not None and turn.op_type == "Transpose" and uses.count(turn.output[0]) == 1:
            # The two nodes change their operations, and the names between them stay.
            relu.op_type, turn.op_type = turn.op_type, relu.op_type
            relu.attribute.extend(turn.attribute)
            del turn.attribute[:]


def _store_sparse(model: Any) -> None:
    """Stores as places and values, in place, each float32 weight that takes fewer bytes so: where more than two thirds
    are zero, for a place is an int64."""
    from onnx import TensorProto, helper, numpy_helper

    dense = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        places = np.flatnonzero(array)
        smaller = 0 < places.size * (array.itemsize + 8) < array.nbytes
        if tensor.data_type != TensorProto.FLOAT or array.ndim < 2 or not smaller:
            dense.append(tensor)
            continue
        values = numpy_helper.from_array(array.reshape(-1)[places], tensor.name)
        indices = numpy_helper.from_array(places.astype(np.int64))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(tensor.dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(dense)


def _tensor_bytes(tensor: Any) -> int:
    import onnx

    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    width = 0.5 if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * width)

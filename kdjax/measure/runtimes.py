"""A model file opened by the runtime that serves it, whichever that is, as one function from array to array.

Nothing here imports JAX, nor any runtime but the one that is asked for: what a process weighs is measured.
"""

import contextlib
import importlib
import importlib.util
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.errors import UserError, first_line, unknown

SAID = 300  # characters of what a runtime says of an error, in ours
Call = Callable[[np.ndarray], np.ndarray]
Shape = tuple[str | int, ...]
BATCH = "batch"


class Runner(NamedTuple):
    """An opened model.

    Attributes:
      call: ``inputs -> logits``: [batch, ...] of the model's own dtype to float32 [batch, ..., classes].
      input_shape: a number where the file fixes one, else a name; ``None`` where the file does not say.
      input_dtype: NumPy's name of the dtype that ``call`` takes; "" where the file does not say.
      weights_bytes: of parameters and constants, where the opened model tells.
    """

    call: Call
    input_shape: Shape | None
    input_dtype: str
    weights_bytes: int | None = None


class Runtime(NamedTuple):
    """What a runtime needs installed, and how it opens a file."""

    module: str
    package: str  # whose version is the runtime's
    install: str  # what to say after pip install
    open: Callable[[Path, int], Runner]


def open_model(path: Path, runtime: str, *, threads: int = 1) -> Runner:
    """Opens a model file for inference on the CPU.

    A file that fixes a batch of 1 is called once per example; ``input_shape`` still shows the 1.

    Args:
      path: the file.
      runtime: one of ``RUNTIMES``: "onnxruntime", "jax" (a serialised ``jax.export``), "litert", or "torch"
        (``torch.jit``; what ``torch.export`` saves cannot be opened without unpickling it).
      threads: how many the runtime computes with. JAX has no such setting: it takes as many as the process may use
        cores when it starts.

    Raises:
      UserError: an unknown runtime, one that is not installed (names what to install), or a file that it cannot read.
    """
    start(runtime)
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: give a model file, or the folder that kdjax export wrote.")
    try:
        runner = RUNTIMES[runtime].open(Path(path), threads)
    except UserError:
        raise
    except Exception as error:  # every runtime has errors of its own
        raise UserError(f"{path} cannot be opened by {runtime}: {first_line(error)[:SAID]}.") from error
    if runner.input_shape and runner.input_shape[0] == 1:
        return runner._replace(call=_one_by_one(runner.call))
    return runner


def start(runtime: str) -> None:
    """Imports what a runtime needs, and nothing else.

    Raises:
      UserError: an unknown runtime, or one that is not installed (names what to install).
    """
    require(runtime)
    importlib.import_module(RUNTIMES[runtime].module)
    if runtime == "jax":
        import jax

        jax.devices()  # starts its thread pool and allocator, which are of the runtime, not of a model


def require(runtime: str) -> None:
    """Raises a UserError where a runtime is unknown or not installed; imports nothing."""
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    module, package, install, _ = RUNTIMES[runtime]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"a model for {runtime} needs {package}: run pip install {install}.")


# ---------------------------------------------------------------------------------------------------- the runtimes


def _onnxruntime(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    # Threads that wait by spinning would take the cores from whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not _rounds_activations(path):
        # Weights of few bits are then unpacked once, when the file is opened, and not at every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = session.get_inputs()
    if len(taken) != 1:
        raise UserError(f"{path} takes {len(taken)} inputs, and one is given: export it with a single input.")
    name, shape = taken[0].name, tuple(_dimension(size, i) for i, size in enumerate(taken[0].shape))
    first = [session.get_outputs()[0].name]

    def call(inputs: np.ndarray) -> np.ndarray:
        return session.run(first, {name: inputs})[0].astype(np.float32, copy=False)

    return Runner(call, shape, _ONNX_DTYPES.get(taken[0].type, ""))


def _rounds_activations(path: Path) -> bool:
    """Whether an ONNX file has a node QuantizeLinear: its operator's name, as protocol buffers write it."""
    mark, before = b'"\x0eQuantizeLinear', b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # piece by piece, for what a process holds is measured
            if mark in before + block:
                return True
            before = block[-len(mark) :]
    return False


_ONNX_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8",
    "tensor(int8)": "int8", "tensor(int32)": "int32", "tensor(int64)": "int64",
}  # fmt: skip


def _jax(path: Path, threads: int) -> Runner:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    if len(exported.in_avals) != 1:
        raise UserError(f"{path} takes {len(exported.in_avals)} arrays, and one is given: export it with its weights.")
    aval = exported.in_avals[0]
    compiled = jax.jit(exported.call)
    shape = tuple(size if isinstance(size, int) else _dimension(str(size), i) for i, size in enumerate(aval.shape))
    return Runner(lambda inputs: np.asarray(compiled(inputs), np.float32), shape, aval.dtype.name)


def _litert(path: Path, threads: int) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]
    place = given["index"]
    ready: tuple[int, ...] = ()

    def call(inputs: np.ndarray) -> np.ndarray:
        nonlocal ready
        if inputs.shape != ready:  # a new shape is planned anew
            interpreter.resize_tensor_input(place, inputs.shape, strict=True)
            interpreter.allocate_tensors()
            ready = inputs.shape
        interpreter.set_tensor(place, inputs)
        interpreter.invoke()
        return interpreter.get_tensor(made).astype(np.float32, copy=False)

    shape = tuple(_dimension(int(size), i) for i, size in enumerate(given["shape_signature"]))
    return Runner(call, shape, np.dtype(given["dtype"]).name)


def _torch(path: Path, threads: int) -> Runner:
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # can be set once, before anything was computed
        torch.set_num_interop_threads(1)
    _refuse_file_access(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what many have
        # Reads TorchScript alone: a pickled module, which could run anything, is refused.
        module = torch.jit.load(str(path), map_location="cpu")
    module.eval()
    tensors = [*module.parameters(), *module.buffers()]

    def call(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(inputs)).float().numpy()

    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors if hasattr(tensor, "numel"))
    return Runner(call, None, "", weights)


def _refuse_file_access(path: Path) -> None:
    """Refuses TorchScript that could read or write files, and operations of other packages, before any of it is run:
    some of it runs while it is loaded."""
    if not zipfile.is_zipfile(path):
        return  # which torch.jit.load refuses
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if "/code/" in name and name.endswith(".py")]
        if sum(file.getinfo(name).file_size for name in names) > _CODE_BYTES:
            raise UserError(f"{path} has more code than a model has: do not use this file.")
        for name in names:
            if found := _FILE_ACCESS.search(file.read(name).decode("utf-8", "replace")):
                raise UserError(f"{path} calls {found.group()!r}, which no model needs: do not use this file.")


_CODE_BYTES = 2**26
# In the code of TorchScript: what opens files, and operations that are not PyTorch's own.
_OWN = "aten|prim|quantized|mkldnn_prepacked"
_FILE_ACCESS = re.compile(rf"\b(?:save|from_file|load_tensor)\b|\bops\.(?!(?:{_OWN})\b)\w+")


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime("onnxruntime", "onnxruntime", "'kdjax[export]'", _onnxruntime),
    "jax": Runtime("jax.export", "jax", "jax", _jax),
    "litert": Runtime("ai_edge_litert.interpreter", "ai-edge-litert", "'kdjax[litert]'", _litert),
    "torch": Runtime("torch", "torch", "torch", _torch),
}


# ---------------------------------------------------------------------------------------------------------- helpers


def _dimension(size: Any, place: int) -> str | int:
    """A size as a number where it is fixed, else as a name: the file's own, or "batch" for the first."""
    if isinstance(size, int) and size > 0:
        return size
    return BATCH if place == 0 else size if isinstance(size, str) and size else f"d{place}"


def _one_by_one(call: Call) -> Call:
    def each(inputs: np.ndarray) -> np.ndarray:
        if len(inputs) == 1:
            return call(inputs)
        return np.concatenate([call(inputs[i : i + 1]) for i in range(len(inputs))])

    return each

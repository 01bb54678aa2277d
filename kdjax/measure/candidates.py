"""What is to be measured: the words of the command line as model files, each with how it wants its inputs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.errors import UserError, unknown
from kdjax.export import artefact
from kdjax.untrusted import inside

SUFFIXES = {".onnx": "onnxruntime", ".pt": "torch", ".tflite": "litert"}  # of files from elsewhere
WAYS = ("nchw", "scaled", "normalised")  # how such a file may want its inputs


# Of a manifest, what is computed with.
_KINDS = {"format": str, "arm": str, "params": int, "weights_bytes": int, "file_bytes": int, "data": dict}


class Candidate(NamedTuple):
    """One model to measure."""

    name: str  # of its column
    path: str  # as it was given
    model: Path  # the file that its runtime opens
    runtime: str
    ways: tuple[str, ...] = ()  # of WAYS: what is done to the data's own inputs beforehand
    manifest: dict[str, Any] | None = None  # of an artefact


def read(words: Sequence[str]) -> list[Candidate]:
    """The models that ``[NAME=]PATH[:WAY,WAY]`` name: folders of kdjax export, or files of another maker.

    Names that are left out are the artefact's arm and format, or the file's name; one that is taken gets a number.

    Raises:
      UserError: no words, nothing there, a damaged artefact, one that no runtime runs, a kind of file that is not
        known, a way that is none, or ways beside an artefact, whose preprocessing is within.
    """
    if not words:
        raise UserError(
            "there is nothing to measure: give a folder of kdjax export or a model file, the reference first."
        )
    found: list[Candidate] = []
    for word in words:
        candidate = _read(word)
        taken = {one.name for one in found}
        names = [candidate.name, *(f"{candidate.name} ({n})" for n in range(2, len(words) + 1))]
        found.append(candidate._replace(name=next(name for name in names if name not in taken)))
    return found


def weigh(candidate: Candidate) -> tuple[int | None, int]:
    """Bytes of the weights, where the file tells without being opened, and of the model's files."""
    if candidate.manifest:
        return candidate.manifest["weights_bytes"], candidate.manifest["file_bytes"]
    size = candidate.model.stat().st_size
    if candidate.runtime != "onnxruntime":
        return None, size
    try:
        import onnx
    except ImportError:
        return None, size
    from onnx.external_data_helper import uses_external_data

    graph = onnx.load(str(candidate.model), load_external_data=False).graph
    constants = [
        part.t for node in graph.node if node.op_type == "Constant" for part in node.attribute if part.name == "value"
    ]
    tensors = [*graph.initializer, *constants]
    beside = {e.value for t in tensors if uses_external_data(t) for e in t.external_data if e.key == "location"}
    try:
        size += sum(inside(candidate.model.parent, name).stat().st_size for name in beside)
    except OSError as error:
        raise UserError(f"{error.filename}, which {candidate.model} names, is missing: copy it beside.") from error
    return sum(_bytes(onnx, tensor) for tensor in tensors), size


def _bytes(onnx: Any, tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    bits = _NARROW.get(onnx.TensorProto.DataType.Name(tensor.data_type))
    return -(-count * (bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) // 8)


_NARROW = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}  # bits; NumPy holds a byte of each


def _read(word: str) -> Candidate:
    name, place, ways = _split(word)
    if Path(place).is_dir():
        found = artefact.read(place)
        manifest = found.manifest
        for key, kind in _KINDS.items():
            if type(manifest[key]) is not kind:
                raise UserError(
                    f"{found.folder / artefact.MANIFEST} has a {key} that is no {kind.__name__}: export again."
                )
        if manifest["runtime"] is None:
            raise UserError(
                f"{place} holds weights in the format {manifest['format']}, which no runtime runs: export it with "
                "--format onnx as well, and measure that."
            )
        if manifest["runtime"] == "jax":
            _refuse_calls(found.model)
        if ways:
            raise UserError(f"{word}: an artefact of kdjax prepares its inputs itself: leave out :{','.join(ways)}.")
        return Candidate(
            name or f"{manifest['arm']} {manifest['format']}", place, found.model, manifest["runtime"], (), manifest
        )
    path = Path(place)
    if not path.is_file():
        raise UserError(f"there is no model at {place}: give a folder of kdjax export, or a file ({_kinds()}).")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{place} is no kind of model file that can be measured: give one of {_kinds()}; what is pickled (also by "
            "torch.export.save) may run anything as it is read, so save the module with torch.onnx or torch.jit."
        )
    return Candidate(name or path.stem, place, path, SUFFIXES[path.suffix.lower()], ways)


def _refuse_calls(path: Path) -> None:
    """Refuses a serialised ``jax.export`` that calls what is no StableHLO: such a call names a function of the process,
    or an address in it. Here and not in the worker, whose memory is measured."""
    from jax import export

    try:
        program = export.deserialize(bytearray(path.read_bytes())).mlir_module()
    except Exception as error:  # the reader has errors of its own
        raise UserError(f"{path} cannot be read by jax ({error}): export the model again.") from error
    called = {name.strip('"') for name in re.findall(r'custom_call\s*@("[^"]*"|[\w.$-]+)', program)}
    # The generic form of the text, which nothing above should leave, has the name as an attribute.
    called |= set(re.findall(r'call_target_name\s*=\s*"([^"]*)"', program))
    if foreign := sorted(called - _CALLS):
        raise UserError(f"{path} calls {foreign[0]!r}, which is no StableHLO: export the model again without it.")


_CALLS = {"shape_assertion", "Sharding"}  # which JAX itself checks and takes away


def _split(word: str) -> tuple[str, str, tuple[str, ...]]:
    """Name, path and ways; what is there as it stands is a path and nothing else."""
    if Path(word).exists():
        return "", word, ()
    name, place = "", word
    if match := re.match(r"([^/=]+)=(.+)", word):
        name, place = match.groups()
    before, colon, after = place.rpartition(":")
    if not colon or Path(place).exists() or "/" in after or "\\" in after:
        return name, place, ()
    ways = tuple(filter(None, after.split(",")))
    for way in ways:
        if way not in WAYS:
            raise unknown(f"way of {before} to take its inputs", way, WAYS)
    if {"scaled", "normalised"} <= set(ways):
        raise UserError(f"{word}: inputs are either scaled or normalised: leave out one of the two.")
    return name, before, ways


def _kinds() -> str:
    return ", ".join(f"*{suffix}" for suffix in SUFFIXES)

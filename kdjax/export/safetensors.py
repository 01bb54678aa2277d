"""Safetensors: the weights alone. A decoder goes out in the layout of Hugging Face; what has no architecture there, by
the paths of its arrays, with the model's name and options beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from kdjax.errors import UserError
from kdjax.model import Variables
from kdjax.untrusted import parse_json

LAYOUT = "kdjax"  # in the file's metadata, so that another file is not taken for one of ours


def write(variables: Variables, path: Path, *, name: str, options: Mapping[str, Any]) -> None:
    """Writes parameters and state bit for bit, each array by its path such as ``"params/blocks/0/conv/kernel"``.

    Args:
      variables: ``{"params": ..., "state": ...}``.
      path: of the file.
      name: of the model, for the metadata, as ``model``.
      options: of the model, for the metadata, as JSON.

    Raises:
      UserError: safetensors is not installed.
    """
    flat = flatten_dict(jax.device_get(variables), keep_empty_nodes=True, sep="/")
    empty = [where for where, value in flat.items() if value is empty_node]
    # Not ascontiguousarray, which gives a scalar a dimension.
    tensors = {where: np.asarray(value, order="C") for where, value in flat.items() if where not in empty}
    metadata = {"layout": LAYOUT, "model": name, "options": json.dumps(dict(options)), "empty": json.dumps(empty)}
    Path(path).write_bytes(_library().numpy.save(tensors, metadata))  # its save_file makes files for their owner alone


def load(path: Path) -> Variables:
    """The variables of a file that ``write`` made, as NumPy arrays.

    Raises:
      UserError: safetensors is not installed, or the file is missing, damaged, or of another layout.
    """
    library = _library()
    try:
        with library.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {where: file.get_tensor(where) for where in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): export the model again.") from error
    if metadata.get("layout") != LAYOUT:
        raise UserError(f"{path} is not in kdjax's own layout: load a decoder with kdjax.huggingface.load.")
    try:
        empty = dict.fromkeys(parse_json(metadata["empty"]), empty_node)
        return unflatten_dict({**arrays, **empty}, sep="/")
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # names that are not there, or no tree
        raise UserError(f"{path} is damaged, for its metadata do not go with its arrays: export it again.") from error


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("weights as safetensors need safetensors: run pip install 'kdjax[text]'.") from error
    return safetensors

"""A decoder's weights as a folder that ``transformers`` loads as it is."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.huggingface.config import Leaf, architecture_of, leaves, written_config
from kdjax.huggingface.load import INDEX, SINGLE
from kdjax.model import Variables, flatten_paths
from kdjax.models.decoder import DecoderConfig
from kdjax.untrusted import inside

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # by NumPy's name: safetensors' name
TOKENISER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class _Tensor(NamedTuple):
    name: str
    leaf: Leaf
    array: Any  # ours
    layer: int


def save(
    folder: str | Path,
    variables: Variables,
    config: DecoderConfig,
    *,
    architecture: str | None = None,
    dtype: Any = jnp.float32,
    tokenizer_folder: str | Path | None = None,
    eos: int | Sequence[int] | None = None,
    bos: int | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``config.json``, ``generation_config.json``, the weights and the tokenizer's files.

    One tensor at a time is gathered on the host. All is written to a hidden folder beside and then renamed, so the
    folder is there whole or not at all. One process must hold all devices of the arrays.

    Args:
      folder: must not exist, or be empty.
      variables: ``{"params": ..., "state": ...}``; the state is not written, as a decoder has none.
      config: of the variables.
      architecture: a name in :data:`kdjax.huggingface.ARCHITECTURES`; ``None``: the one that fits.
      dtype: of the file: float32, bfloat16 or float16.
      tokenizer_folder: where the tokenizer's files, those of :data:`TOKENISER_FILES` that exist, are copied from.
      eos: the ids of the tokens that end a text.
      bos: the id of the token that begins a text.
      shard_bytes: no file of weights is larger, unless a single tensor is.

    Raises:
      UserError: the folder is not empty or cannot be written; variables that are not of the config; an architecture
        that cannot hold it; another dtype; no tokenizer in its folder.
    """
    folder = Path(folder).absolute()
    target = np.dtype(dtype)
    if target.name not in DTYPES:
        raise UserError(f"cannot save a model as {target.name}: choose one of {', '.join(DTYPES)}.")
    about = written_config(config, architecture_of(config) if architecture is None else architecture)
    tokens = {"bos_token_id": bos, "eos_token_id": eos if eos is None or isinstance(eos, int) else list(eos)}
    tensors = _tensors(variables, config)
    copied = [] if tokenizer_folder is None else _tokenizer_files(Path(tokenizer_folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name another folder to save the model to, or delete it.")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # transformers 4 and 5 both read the dtype under this name.
        _write_json(partial / "config.json", {**about, **tokens, "torch_dtype": target.name})
        _write_json(partial / "generation_config.json", tokens)
        _write_weights(partial, tensors, target, shard_bytes)
        for path in copied:
            shutil.copyfile(path, partial / path.name)
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"cannot save the model to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors(variables: Variables, config: DecoderConfig) -> list[_Tensor]:
    wanted, arrays = leaves(config), flatten_paths(variables["params"])
    for path in sorted(wanted.keys() | arrays.keys()):
        expected = wanted[path].shape if path in wanted else None
        found = tuple(arrays[path].shape) if path in arrays else None
        if expected != found:
            raise UserError(
                f"parameter {path} is {found or 'absent'} and should be {expected or 'absent'}: "
                "pass the config that the variables are of."
            )
    return [
        _Tensor(name, leaf, arrays[path], layer)
        for path, leaf in wanted.items()
        for layer, name in enumerate(leaf.names)
    ]


def _write_weights(folder: Path, tensors: list[_Tensor], dtype: np.dtype, shard_bytes: int) -> None:
    shards = list(_shards(tensors, dtype, shard_bytes))
    if len(shards) == 1:
        return _write_safetensors(folder / SINGLE, tensors, dtype)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(folder / file, shard, dtype)
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    total = sum(_size(tensor, dtype) for tensor in tensors)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: list[_Tensor], dtype: np.dtype, shard_bytes: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + _size(tensor, dtype) > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _size(tensor, dtype)
    yield shard


def _write_safetensors(path: Path, tensors: list[_Tensor], dtype: np.dtype) -> None:
    """The format: the header's length in 8 bytes, the header in JSON, the tensors one after another, little-endian.

    The safetensors package wants all tensors at once; this writes them one by one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        start, end = end, end + _size(tensor, dtype)
        entry = {"dtype": DTYPES[dtype.name], "shape": tensor.leaf.tensor_shape, "data_offsets": (start, end)}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            part = np.asarray(tensor.array[tensor.layer] if tensor.leaf.stacked else tensor.array)
            part = np.ascontiguousarray((part.T if tensor.leaf.transposed else part).astype(dtype, copy=False))
            file.write(part.view(np.uint8).data)  # as bytes, for bfloat16 has no buffer


def _size(tensor: _Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.leaf.tensor_shape)) * dtype.itemsize


def _tokenizer_files(folder: Path) -> list[Path]:
    # What a link leads to would be handed over with the model.
    found = [inside(folder, name) for name in TOKENISER_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"no tokenizer in {folder}: it should have one of {', '.join(TOKENISER_FILES)}.")
    return found


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")

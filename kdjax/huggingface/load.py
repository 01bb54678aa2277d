"""Safetensors onto the mesh: each device's part of each array is read from the files by itself."""

import contextlib
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.huggingface.config import Leaf, leaves, read_json
from kdjax.model import Variables, path_name
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.untrusted import inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS_COMPARED = 4096


class _Tensor(NamedTuple):
    path: Path  # the file it lies in
    slice: Any  # safetensors' handle, which reads what it is indexed with


def load(folder: str | Path, config: DecoderConfig, *, shardings: Any = None, dtype: Any = None) -> Variables:
    """The weights of the model in a folder: ``{"params": ..., "state": {}}``.

    The host holds one array of ours at a time, and of that just the parts for its own devices; a decoder's arrays are
    stacked over layers, so the largest is the embedding or a kernel of all layers.

    Args:
      folder: with ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      config: as :func:`kdjax.huggingface.read_config` gives it.
      shardings: a tree of ``NamedSharding`` like the parameters; ``None`` puts all on the default device.
      dtype: what to cast to; ``None`` is float32.

    Raises:
      UserError: safetensors is not installed; a file is missing, truncated or damaged; a tensor is missing, of another
        shape, not of floats, or not of this architecture (all but tables of rotary frequencies, which are ignored); a
        tied model whose files hold a head that differs from the embedding.
    """
    wanted = leaves(config)
    target = np.dtype(jnp.float32 if dtype is None else dtype)
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))["params"]
    if shardings is None:
        default = jnp.zeros(()).sharding  # of whatever device jax.default_device names
        shardings = jax.tree.map(lambda _: default, shapes)

    with contextlib.ExitStack() as files:
        tensors = _open(Path(folder), files)
        _check(Path(folder), tensors, wanted, config)

        def make(path: Any, shape: Any, sharding: Any) -> jax.Array:
            leaf = wanted[path_name(path)]
            read = _reader(leaf, [tensors[name].slice for name in leaf.names], target)
            array = jax.make_array_from_callback(shape.shape, sharding, read)
            # What was read stays on the host until its transfer is done, and then until JAX collects its garbage.
            del read
            jax.block_until_ready(array)
            gc.collect(0)
            return array

        params = jax.tree_util.tree_map_with_path(make, shapes, shardings)
    return {"params": params, "state": {}}


def _reader(leaf: Leaf, tensors: list[Any], dtype: np.dtype) -> Callable[[Any], np.ndarray]:
    """What reads a part of an array, each part once, however many devices hold it."""
    done: dict[tuple[range, ...], np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        index = index + (slice(None),) * (len(leaf.shape) - len(index))
        part = tuple(range(*along.indices(size)) for along, size in zip(index, leaf.shape, strict=True))
        if part not in done:
            done[part] = fresh(part)
        return done[part]

    def fresh(part: tuple[range, ...]) -> np.ndarray:
        within = tuple(slice(along.start, along.stop) for along in part[1 if leaf.stacked else 0 :])
        if not leaf.stacked:
            return tensors[0][within].astype(dtype, copy=False)
        array = np.empty([len(along) for along in part], dtype)
        for row, layer in enumerate(part[0]):
            array[row] = tensors[layer][within[::-1]].T if leaf.transposed else tensors[layer][within]
        return array

    return read


def _open(folder: Path, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every tensor of a folder by name; reads the files' headers alone."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError("reading models needs safetensors: run pip install 'kdjax[text]'.") from error
    index: Mapping[str, str] = {}
    if (folder / SINGLE).exists():  # which transformers prefers, too
        names = [SINGLE]
    elif (folder / INDEX).exists():
        index = read_json(inside(folder, INDEX), "download it again").get("weight_map") or {}
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"the weight_map of {folder / INDEX} does not map tensors to files: download it again.")
        names = sorted(set(index.values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    paths = [inside(folder, name) for name in names]
    if not paths:
        raise UserError(
            f"no *.safetensors in {folder}: name the folder of a model in Hugging Face's format, or save it in "
            "transformers with model.save_pretrained(folder), if it has files of another kind."
        )
    tensors: dict[str, _Tensor] = {}
    for path in paths:
        try:
            # NumPy's framework gives bfloat16 as ml_dtypes has it.
            file = files.enter_context(safe_open(path, framework="np"))
        except FileNotFoundError as error:
            raise UserError(f"{path}, which {INDEX} names, is missing: download it again.") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}): download it again.") from error
        tensors |= {name: _Tensor(path, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    for name, file_name in index.items():
        if name not in tensors:
            raise UserError(f"tensor {name} is not in {folder / file_name}, where {INDEX} has it: download it again.")
    return tensors


def _check(folder: Path, tensors: Mapping[str, _Tensor], wanted: Mapping[str, Leaf], config: DecoderConfig) -> None:
    """Raises a UserError where the files do not hold just the tensors of the config."""
    shapes = {name: leaf.tensor_shape for leaf in wanted.values() for name in leaf.names}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"tensor {name} {shape} is missing from {folder}: its config.json is of another model.")
        path, tensor = tensors[name]
        if tuple(tensor.get_shape()) != shape:
            raise UserError(
                f"tensor {name} in {path} is {tuple(tensor.get_shape())} and should be {shape}: "
                "the config is of another model."
            )
        if tensor.get_dtype() not in FLOATS:
            raise UserError(
                f"tensor {name} in {path} is {tensor.get_dtype()} and should be one of {', '.join(FLOATS)}: "
                "choose the unquantised model."
            )
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for name, (path, tensor) in tensors.items():
        if name in shapes or name.endswith("rotary_emb.inv_freq"):
            continue
        if name != head or not config.tied:
            raise UserError(
                f"tensor {name} {tuple(tensor.get_shape())} in {path} is not part of the model that the config "
                "describes: the config is of another model."
            )
        if not _equal(tensor, tensors[embedding].slice):
            raise UserError(
                f"tensor {head} in {path} differs from {embedding}, though the config says that they are one: "
                'set "tie_word_embeddings": false in config.json to use it.'
            )


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors [rows, columns] are equal; reads some rows at a time."""
    if one.get_shape() != other.get_shape():
        return False
    total = one.get_shape()[0]
    rows = (slice(start, min(start + _ROWS_COMPARED, total)) for start in range(0, total, _ROWS_COMPARED))
    return all(np.array_equal(one[part], other[part]) for part in rows)

"""What a ``config.json`` says of a decoder, what it must not say, and what the tensors of its files are called."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kdjax.errors import UserError, unknown
from kdjax.model import flatten_paths
from kdjax.models.decoder import DecoderConfig, RopeScaling, make_decoder
from kdjax.untrusted import inside, parse_json


class Architecture(NamedTuple):
    """One family of decoders: its name in ``config.json``, and what it has where the config does not say."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None: width / heads
    optional_bias: bool = True  # whether ``attention_bias`` means something to it


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, optional_bias=False),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True, head_dim=128),
}

# Our sizes and their names in config.json; none of them has a default that a file could silently rely on.
SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "context": "max_position_embeddings",
}

# A size beyond these, by which the shapes of arrays could not even be reckoned, is damage; of others, beyond 2^20.
_LARGEST = {
    "vocab_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
}

_LAYER = "model.layers.{}."
NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "blocks/attention_norm/scale": _LAYER + "input_layernorm.weight",
    **{f"blocks/attention/{p}/kernel": _LAYER + f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"blocks/attention/{p}/bias": _LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"},
    **{f"blocks/attention/{p}_norm/scale": _LAYER + f"self_attn.{p}_norm.weight" for p in "qk"},
    "blocks/mlp_norm/scale": _LAYER + "post_attention_layernorm.weight",
    **{f"blocks/mlp/{p}/kernel": _LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}


class Leaf(NamedTuple):
    """One of our arrays, as tensors of a file.

    Attributes:
      shape: ours.
      names: the tensors it is made of: one for each layer where it is stacked over layers, else one.
      stacked: whether its leading axis is that of the layers.
      transposed: whether a tensor is the transpose of ours: a ``Linear.weight`` is [outputs, inputs], our kernels are
        [inputs, outputs].
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves(config: DecoderConfig) -> dict[str, Leaf]:
    """The arrays of a decoder by path, such as ``"blocks/mlp/up/kernel"``; makes none.

    Raises:
      UserError: an impossible config.
    """
    params = jax.eval_shape(make_decoder(config).init, jax.random.key(0))["params"]

    def leaf(path: str, shape: tuple[int, ...]) -> Leaf:
        stacked = path.startswith("blocks/")
        names = tuple(NAMES[path].format(layer) for layer in range(config.layers if stacked else 1))
        return Leaf(shape, names, stacked, stacked and path.endswith("/kernel"))

    return {path: leaf(path, array.shape) for path, array in flatten_paths(params).items()}


def read_config(folder: str | Path) -> DecoderConfig:
    """The config of the model in a folder, from its ``config.json`` as transformers 4 or 5 writes it.

    Raises:
      UserError: no readable ``config.json``; an architecture not in :data:`ARCHITECTURES`; a size that is missing or no
        whole number; or a choice, such as another kind of rotary scaling, that this decoder would silently ignore.
    """
    path = inside(folder, "config.json")
    data = read_json(path, "name the folder of a model in Hugging Face's format")
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise UserError(f"{path} names no architecture: it needs one of {', '.join(sorted(ARCHITECTURES))}.")
    if name not in ARCHITECTURES:
        raise unknown(f"architecture (in {path})", name, ARCHITECTURES)
    family = ARCHITECTURES[name]
    _refuse(data, family, path)
    sizes = {ours: _whole(data, theirs, path) for ours, theirs in SIZES.items()}
    head_dim = family.head_dim or sizes["width"] // max(sizes["heads"], 1)
    theta, scaling = _rope(data, path)
    return DecoderConfig(
        **sizes,
        kv_heads=_whole(data, "num_key_value_heads", path, sizes["heads"]),
        head_dim=_whole(data, "head_dim", path, head_dim),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied=bool(data.get("tie_word_embeddings", False)),
        norm_eps=_number(data, "rms_norm_eps", path, 1e-6),
    )


def architecture_of(config: DecoderConfig) -> str:
    """The architecture that has just what the config has.

    Raises:
      UserError: none has.
    """
    for name, family in ARCHITECTURES.items():
        if (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm):
            return name
    raise UserError(
        f"no architecture of {', '.join(sorted(ARCHITECTURES))} has qkv_bias={config.qkv_bias} with "
        f"qk_norm={config.qk_norm}: choose a student with one of them or neither."
    )


def written_config(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The ``config.json`` of a decoder, without dtype and special tokens, in the layout that transformers 4 and 5 read.

    Raises:
      UserError: an unknown architecture, or one that cannot hold this config.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    if architecture != architecture_of(config):
        raise UserError(
            f"{architecture} cannot hold a decoder of qkv_bias={config.qkv_bias} and qk_norm={config.qk_norm}: "
            f"save it as {architecture_of(config)}."
        )
    if architecture == "LlamaForCausalLM" and config.width % config.heads:
        raise UserError(
            f"transformers refuses a LlamaForCausalLM of width {config.width} and {config.heads} heads: "
            "choose a width that the heads divide."
        )
    scaling = config.rope_scaling
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture].model_type,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        **({"attention_bias": False} if ARCHITECTURES[architecture].optional_bias else {}),
    }


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; raises a UserError where there is none."""
    try:
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): {remedy}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__} and should hold an object: download it again.")
    return data


def _refuse(data: Mapping[str, Any], family: Architecture, path: Path) -> None:
    """Raises a UserError where the file asks for what the decoder does not do."""
    layer_types = data.get("layer_types") or []
    asked = {
        "quantization_config": bool(data.get("quantization_config")),
        "use_sliding_window": bool(data.get("use_sliding_window")),
        "layer_types": not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types),
        "attention_bias": bool(data.get("attention_bias")) and family.optional_bias,
        "mlp_bias": bool(data.get("mlp_bias")),
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": (data.get("partial_rotary_factor") or 1.0) != 1.0,
    }
    for key, refused in asked.items():
        if refused:
            value = "..." if key == "quantization_config" else json.dumps(data[key])
            remedy = "choose the unquantised model" if key == "quantization_config" else "choose a model without it"
            raise UserError(f"{path} asks for {key}={value}, which kdjax's decoder does not do: {remedy}.")


def _rope(data: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling: from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{path} gives each kind of layer its own rotary positions: choose a model with one for all.")
    theta = _number(rope, "rope_theta", path, _number(data, "rope_theta", path, 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        kind = f"{kind} with partial_rotary_factor"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{path} asks for rotary scaling {kind!r}, which kdjax's decoder does not do: "
            "choose a model with none or with 'llama3'."
        )
    # transformers looks for the original context here and there, in this order.
    trained = _whole(rope, "original_max_position_embeddings", path, _whole(data, "max_position_embeddings", path))
    return theta, RopeScaling(
        factor=_number(rope, "factor", path),
        low_freq_factor=_number(rope, "low_freq_factor", path),
        high_freq_factor=_number(rope, "high_freq_factor", path),
        original_context=_whole(data, "original_max_position_embeddings", path, trained),
    )


def _whole(data: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = _number(data, key, path, default)
    if value != int(value):
        raise UserError(f"{path} has {key}={value}: it must be a whole number.")
    if abs(value) > _LARGEST.get(key, 2**20):
        raise UserError(f"{path} has {key}={value}, which no model has: download it again.")
    return int(value)


def _number(data: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise UserError(f"{path} has no {key!r}: download it again.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UserError(f"{path} has {key}={json.dumps(value)}: it must be a number.")
    return value

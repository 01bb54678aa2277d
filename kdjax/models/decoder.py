"""Causal language models: one decoder that, by its config, is Llama 2 or 3, Qwen2, Qwen2.5 or Qwen3.

Pre-norm blocks of grouped-query attention with rotary positions and of a gated feedforward, as pure functions over a
plain dict of parameters. The parameters of all blocks lie stacked along a leading axis and ``jax.lax.scan`` walks them,
so a model compiles in the time of one block, whatever its depth.

Sources: Touvron et al. 2023 and Grattafiori et al. 2024 (Llama 2 and 3), Yang et al. 2024 and 2025 (Qwen2, Qwen3),
Su et al. 2021 (rotary positions), Ainslie et al. 2023 (grouped queries), Zhang and Sennrich 2019 (RMSNorm), Shazeer
2020 (SwiGLU).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, unknown
from kdjax.head import Head
from kdjax.low_precision import product
from kdjax.model import EVERY, ROWS, STACK, Array, Model, Outputs, Params, Variables, at_use

# What the backward pass keeps of a block: all it needs; the products with kernels; only the block's input.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ("auto", "xla", "cudnn")
_STREAM, _QKV = "", ".attention.qkv"  # what can be tapped in a block, as the end of the tap's name
_STD = 0.02


class RopeScaling(NamedTuple):
    """How Llama 3.1 and later stretch the rotary wavelengths to contexts longer than ``original_context`` tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class DecoderConfig(NamedTuple):
    """The sizes and the few choices in which the families differ.

    Attributes:
      vocabulary: rows of the embedding.
      width: of the residual stream.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key and value heads, each shared by ``heads / kv_heads`` query heads.
      head_dim: width of a head; even.
      mlp_width: hidden units of the feedforward.
      context: the longest sequence, in tokens.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: the Llama-3 rule; ``None`` for unscaled wavelengths.
      qkv_bias: biases of q, k and v (Qwen2).
      qk_norm: RMSNorm of each head of q and k before the rotation (Qwen3).
      tied: the head is the embedding.
      norm_eps: added to the mean square in every RMSNorm.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    norm_eps: float = 1e-6


def make_decoder(
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    unrolled: bool = False,
) -> Model:
    """The decoder of a config.

    ``apply`` takes ``{"tokens": int32 [b, t], "segments": int32 [b, t], "positions": int32 [b, t]}``, of which the last
    two may be absent, or just the tokens. Segments number the documents packed into a window: attention stays within
    one; 0 is padding, whose outputs are finite and mean nothing. Without positions tokens are counted from the window's
    start; as rotary attention sees only differences of positions, packed documents may do without them.

    It returns ``hidden`` [b, t, width] after the final norm, in ``dtype``, and the ``head``. Taps, in ``dtype``:
    ``"blocks.3"``, the residual stream [b, t, width] after layer 3 (from 0), and ``"blocks.3.attention.qkv"``
    [b, t, 3 * heads * head_dim], that layer's q, k and v as they enter attention, k and v repeated to ``heads`` heads.

    Args:
      config: sizes and choices.
      dtype: what is computed in. Norms, angles and softmax are float32 whatever it is; parameters keep their own.
      remat: a name in :data:`REMAT`, what the backward pass keeps of each block where ``train`` is true.
      attention: ``"xla"``; ``"cudnn"``, flash attention in bfloat16 or float16 on NVIDIA GPUs; or ``"auto"``, cuDNN
        where it serves.
      unrolled: the same numbers from a Python loop over the layers and attention written out as products, which do
        without ``remat`` and ``attention``: for converters to other formats, that know neither well.

    Raises:
      UserError: an impossible config, an unknown remat or attention; from ``apply``, while tracing: a sequence longer
        than the context, or an unknown tap.
    """
    _check(config)
    if remat not in REMAT:
        raise unknown("remat", remat, REMAT)
    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    if attention == "cudnn" and not _is_half(dtype):
        raise UserError(
            f"attention 'cudnn' cannot compute in {jnp.dtype(dtype).name}: choose dtype bfloat16 or attention 'xla'."
        )

    def init(key: Array) -> Variables:
        return {"params": _initial(config, key), "state": {}}

    def apply(variables, inputs, *, train, key=None, taps=()):
        params = variables["params"]
        inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
        tokens, segments = inputs["tokens"], inputs.get("segments")
        length = tokens.shape[1]
        if isinstance(length, int) and length > config.context:  # of a symbolic length, in an export, nobody knows
            raise UserError(
                f"a sequence of {length} tokens is longer than the model's context of {config.context}: "
                "cut the sequences, or use a model of longer context."
            )
        # By iota and not by arange, because a converter may take a symbolic length here.
        positions = inputs.get("positions", jax.lax.broadcasted_iota(jnp.int32, (1, length), 1))
        rotation = _rotation(config, positions)
        mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
        attend = (
            partial(_attention, mask=mask)
            if unrolled
            else partial(
                jax.nn.dot_product_attention,
                mask=mask,
                is_causal=True,
                implementation=_implementation(attention, config, dtype, length),
            )
        )
        layers_of = _layers_of(config, taps)

        def block(x: Array, weights: Params) -> tuple[Array, dict[str, Array]]:
            weights = at_use(STACK, weights)
            q, k, v = _qkv(config, weights["attention"], _rms(config, x, weights["attention_norm"]), rotation)
            x = x + _dense(attend(q, k, v).reshape(*x.shape[:2], -1), weights["attention"]["o"])
            x = x + _mlp(weights["mlp"], _rms(config, x, weights["mlp_norm"]))
            tapped = {_STREAM: x} if _STREAM in layers_of else {}
            return x, tapped | ({_QKV: _joined(config, q, k, v)} if _QKV in layers_of else {})

        # prevent_cse guards against merging what is computed again with the original; the scan's body already does.
        policy = REMAT[remat] if train and not unrolled else None
        step = jax.checkpoint(block, policy=policy, prevent_cse=False) if policy else block

        def walk(carry, layer):
            x, kept = carry
            weights, slots = layer
            x, tapped = step(x, weights)
            return (x, {k: jax.lax.dynamic_update_index_in_dim(kept[k], tapped[k], slots[k], 0) for k in kept}), None

        # Only the layers asked for are kept: a layer writes to its own row, or, like all others, to a spare last one.
        widths = {_STREAM: config.width, _QKV: 3 * config.heads * config.head_dim}
        kept = {k: jnp.zeros((len(of) + 1, *tokens.shape, widths[k]), dtype) for k, of in layers_of.items()}
        slots = {k: np.full(config.layers, len(of), np.int32) for k, of in layers_of.items()}
        for k, of in layers_of.items():
            slots[k][of] = np.arange(len(of))
        # An id outside the vocabulary turns its sequence into NaN; plain indexing would read another token's row.
        x = jax.tree.map(lambda table: jnp.take(table, tokens, axis=0), params["embed"]["embedding"]).astype(dtype)
        x = at_use(ROWS, x)
        scan = _loop if unrolled else jax.lax.scan
        (x, kept), _ = scan(walk, (x, kept), (params["blocks"], slots))

        captured = {f"blocks.{n}{k}": kept[k][row] for k, of in layers_of.items() for row, n in enumerate(of)}
        kernel = params["embed"]["embedding"] if config.tied else params["head"]["kernel"]
        hidden = _rms(config, x, params["norm"])
        return Outputs(taps=captured, hidden=hidden, head=Head(kernel, dtype)), variables["state"]

    return Model(init, apply)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """The rotary frequencies in radians per token, float32 [head_dim / 2].

    Wavelengths that fit ``high_freq_factor`` times into the original context stay; those that fit less than
    ``low_freq_factor`` times become ``factor`` times as long; those between are blended linearly (Llama 3.1).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = config.rope_scaling
    fits = context * frequencies / (2 * math.pi)
    kept = np.clip((fits - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / factor + kept * frequencies).astype(np.float32)


def _rotation(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine [b, t, 1, head_dim / 2], float32, of positions [b, t]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates each pair (i, i + head_dim / 2) of heads [b, t, h, head_dim]: the "rotate half" of Hugging Face."""
    cos, sin = rotation
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _rms(config: DecoderConfig, x: Array, weights: Params) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    scale = weights["scale"].astype(jnp.float32)
    return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def _dense(x: Array, weights: Params) -> Array:
    """[b, t, m] to [b, t, n], in the dtype of ``x``; where the kernel is a product of two, by way of a few channels."""
    if "first" in weights:  # kdjax.compress.low_rank
        x, weights = _dense(x, weights["first"]), weights["second"]
    y = product(x, weights["kernel"])
    return y + weights["bias"].astype(x.dtype)[None, None] if "bias" in weights else y


def _qkv(config: DecoderConfig, weights: Params, x: Array, rotation: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """q [b, t, heads, head_dim], k and v [b, t, kv_heads, head_dim], as they enter attention."""
    q, k, v = (_dense(x, weights[name]).reshape(*x.shape[:2], -1, config.head_dim) for name in "qkv")
    if config.qk_norm:
        q, k = _rms(config, q, weights["q_norm"]), _rms(config, k, weights["k_norm"])
    return _rotate(q, rotation), _rotate(k, rotation), v


def _attention(q: Array, k: Array, v: Array, *, mask: Array | None) -> Array:
    """Causal attention [b, t, h, d] of q [b, t, h, d] over k and v [b, t, kv, d], the softmax in float32.

    The queries of a group lie side by side in one product with the keys that they share, so that none is repeated.
    """
    b, t, heads, d = q.shape
    kv_heads = k.shape[2]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [b, kv, t, d]
    q = q.reshape(b, t, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)  # [b, kv, group, t, d]
    scores = jnp.einsum("bkqd,bksd->bkqs", q.reshape(b, kv_heads, -1, d), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv_heads, -1, t, t) * d**-0.5
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, t, t), axis) for axis in (3, 4))
    seen = row >= column if mask is None else (row >= column) & mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights.reshape(b, kv_heads, -1, t), v)
    return mixed.reshape(b, kv_heads, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, d)


def _loop(body: Any, carry: Any, xs: Any) -> tuple[Any, None]:
    """``jax.lax.scan`` as a Python loop, for a body without outputs."""
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry, None


def _joined(config: DecoderConfig, q: Array, k: Array, v: Array) -> Array:
    group = config.heads // config.kv_heads
    heads = jnp.concatenate([q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)], axis=2)
    return heads.reshape(*q.shape[:2], -1)


def _mlp(weights: Params, x: Array) -> Array:
    return _dense(jax.nn.silu(_dense(x, weights["gate"])) * _dense(x, weights["up"]), weights["down"])


def _implementation(attention: str, config: DecoderConfig, dtype: Any, length: int) -> Literal["xla", "cudnn"]:
    """cuDNN where it was asked for, or, for "auto", where it takes the dtype, the head and the (even) length."""
    fits = config.head_dim % 8 == 0 and config.head_dim <= 128 and length % 2 == 0
    serves = jax.default_backend() == "gpu" and _is_half(dtype) and fits
    return "cudnn" if attention == "cudnn" or (attention == "auto" and serves) else "xla"


def _is_half(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def _layers_of(config: DecoderConfig, taps: Sequence[str]) -> dict[str, list[int]]:
    """The layers wanted of each kind of tap, in order; a kind of which none is wanted is absent."""
    places = {f"blocks.{layer}{kind}": (kind, layer) for layer in range(config.layers) for kind in (_STREAM, _QKV)}
    taps = tuple(places) if tuple(taps) == EVERY else taps
    for tap in taps:
        if tap not in places:
            raise unknown("tap", tap, places)
    wanted = sorted({places[tap] for tap in taps})
    return {kind: [layer for other, layer in wanted if other == kind] for kind, _ in wanted}


def _initial(config: DecoderConfig, key: Array) -> Params:
    """Fresh float32 parameters: normal kernels, standard deviation 0.02, those that end a residual branch divided by
    the root of the number of branches (Radford et al. 2019).

    An untrained model should find all tokens about equally likely, a loss of ln V, or training starts with unlearning.
    The final norm gives hidden states of root mean square 1, so kernels of 0.02 would not do at every size, and two
    effects are each held to a share of ln V, the least that it takes, for a smaller start than needed learns slower:

    - Logits of variance σ² add σ² / 2. A head of deviation s gives σ² = s² width, so wide heads get a smaller s.
    - A tied head meets the hidden state that its own row began: the logit of the token just read is L = 0.02 width, 31
      at width 1536, and adds ln(1 + e^L / V). A smaller embedding would drown in what the blocks add, so the final
      norm's scale, which training soon moves, starts below 1 instead and shrinks L and σ alike.
    """
    d, f, layers = config.width, config.mlp_width, config.layers
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    keys = iter(jax.random.split(key, 9))
    branch_std = _STD / math.sqrt(2 * layers)

    def normal(std: float, *shape: int) -> Array:
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def ones(*shape: int) -> Params:
        return {"scale": jnp.ones(shape, jnp.float32)}

    def project(width: int) -> Params:
        kernel = {"kernel": normal(_STD, layers, d, width)}
        return kernel | ({"bias": jnp.zeros((layers, width), jnp.float32)} if config.qkv_bias else {})

    attention = {"q": project(q_width), "k": project(kv_width), "v": project(kv_width)}
    attention["o"] = {"kernel": normal(branch_std, layers, q_width, d)}
    if config.qk_norm:
        attention |= {"q_norm": ones(layers, config.head_dim), "k_norm": ones(layers, config.head_dim)}
    mlp = {
        "gate": {"kernel": normal(_STD, layers, d, f)},
        "up": {"kernel": normal(_STD, layers, d, f)},
        "down": {"kernel": normal(branch_std, layers, f, d)},
    }
    room = 0.002 * math.log(config.vocabulary)
    head_std = min(_STD, math.sqrt(2 * room / d))
    norm_scale = min(head_std / _STD, math.log1p(room * config.vocabulary) / (_STD * d)) if config.tied else 1.0
    params = {
        "embed": {"embedding": normal(_STD, config.vocabulary, d)},
        "blocks": {
            "attention_norm": ones(layers, d),
            "attention": attention,
            "mlp_norm": ones(layers, d),
            "mlp": mlp,
        },
        "norm": {"scale": jnp.full(d, norm_scale, jnp.float32)},
    }
    return params if config.tied else params | {"head": {"kernel": normal(head_std, config.vocabulary, d)}}


def _check(config: DecoderConfig) -> None:
    """Raises a UserError where no decoder has such a config."""
    for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "context"):
        if getattr(config, name) < 1:
            raise UserError(f"a decoder's {name} is {getattr(config, name)}: it must be 1 or more.")
    if config.heads % config.kv_heads:
        raise UserError(
            f"a decoder of {config.heads} heads cannot have {config.kv_heads} kv_heads: "
            "the kv_heads must divide the heads."
        )
    if config.head_dim % 2:
        raise UserError(f"a decoder's head_dim is {config.head_dim}: it must be even, for positions rotate pairs.")
    if config.rope_theta <= 0 or config.norm_eps < 0:
        raise UserError(
            f"a decoder has rope_theta={config.rope_theta} and norm_eps={config.norm_eps}: "
            "the first must be above 0 and the second not below."
        )
    scaling = config.rope_scaling
    if scaling and (scaling.factor <= 0 or scaling.original_context < 1 or not 0 < scaling[1] < scaling[2]):
        raise UserError(
            f"a decoder cannot have {scaling}: factor and original_context must be above 0, and low_freq_factor "
            "above 0 and below high_freq_factor."
        )

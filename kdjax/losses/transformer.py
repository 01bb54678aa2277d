"""Losses between transformers: attention matrices, hidden states and relations of tokens, and which layers to pair.

Arrays: q, k, v are [b, n, t, d] (batch, heads, tokens, width of one head); hidden states are [b, t, c]; `tokens` is
[b, t], 1 = real, 0 = padding, or None where all are real. Any float dtype; the arithmetic is in float32.

Every loss returns one float32 value per example, [b]: the mean over the real tokens of that example, as the papers
define it for one sequence, so that neither the length of the padding nor its content changes value or gradient. (Public
code often divides by the padded length instead, and TinyBERT's also by rows of padding.) An example without a real
token gives 0. Attention is bidirectional,
every real token a key of every real token, unless `sees` says which keys each query sees (causal attention, packed
documents): [b, t, t], query before key.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.errors import UserError, unknown
from kdjax.losses.contrastive import unit

Array = jax.Array
Scalar = float | Array

LAYER_MAPS = ("uniform", "last", "final", "middle", "learned")
TINYBERT_VARIANTS = ("paper", "huawei-noah")
_NOWHERE = -1e30  # the score of a padding key: finite, so that no gradient meets inf - inf


def split_heads(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """The projections [b, t, 3 n d], ordered (q, k, v), head, width as those of `kdjax.models.vit.Attention.qkv`.

    Returns:
        q, k, v: [b, n, t, d] each, n = `heads`, of the same dtype.

    Raises:
        UserError: the width is not a multiple of 3 n.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise UserError(
            f"a tap of shape {qkv.shape} cannot be split into q, k and v of {heads} heads: "
            "tap the layer whose output is [b, t, 3 * width] and give the model's own number of heads."
        )
    batch, length, _ = qkv.shape
    q, k, v = qkv.reshape(batch, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return q, k, v


def attention_scores(q: Array, k: Array, tokens: Array | None = None) -> Array:
    """Scaled, unnormalised attention matrices A = q kᵀ / √d: [b, n, t, t] float32, [.., query, key].

    Entries whose query or key is padding are 0.

    Raises:
        UserError: shapes that do not fit.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1, before the softmax.
    """
    _require_heads("q and k", q, k, tokens)
    if q.shape != k.shape:
        raise UserError(f"q {q.shape} and k {k.shape} differ in shape: take both from one attention layer.")
    q, k = (_without_padding(x, _real(x, tokens)[:, None]) for x in (q, k))
    return jnp.einsum("bnqd,bnkd->bnqk", q, k, precision="highest") * q.shape[-1] ** -0.5


def attention_maps(q: Array, k: Array, tokens: Array | None = None, sees: Array | None = None) -> Array:
    """Attention distributions softmax(q kᵀ / √d) over the real keys: [b, n, t, t] float32.

    A padding key has probability 0, and a row whose query is padding is all 0.

    Raises:
        UserError: shapes that do not fit.
    """
    return jnp.where(_pairs(_real(q, tokens), sees), jnp.exp(_log_maps(q, k, tokens, sees)), 0.0)


def tinybert_attention(
    student: tuple[Array, Array],
    teacher: tuple[Array, Array],
    tokens: Array | None = None,
    sees: Array | None = None,
) -> Array:
    """TinyBERT's attention loss: 1/n Σ_heads MSE(A^S, A^T) of unnormalised attention matrices over the real tokens.

    Args:
        student: (q, k), each [b, n, t, d_s].
        teacher: (q, k), each [b, n, t, d_t]; the widths may differ, the heads may not.
        tokens: [b, t] or None.
        sees: [b, t, t] or None.

    Returns:
        [b] float32.

    Raises:
        UserError: shapes that do not fit, or numbers of heads that differ.

    Source: Jiao et al. 2020, "TinyBERT", eq. 7. The authors' code averages over all t² entries of the padded matrices,
    and counts those with padding queries.
    """
    _require_same_heads("TinyBERT's attention loss", student, teacher, tokens)
    error = attention_scores(*student, tokens) - attention_scores(*teacher, tokens)
    pairs = _pairs(_real(student[0], tokens), sees)
    entries = error.shape[1] * jnp.maximum(jnp.sum(pairs, axis=(1, 2, 3)), 1).astype(jnp.float32)
    return jnp.sum(jnp.square(error), axis=(1, 2, 3), where=pairs) / entries


def init_tinybert_hidden(
    key: Array, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], *, variant: str = "paper"
) -> dict[str, Array]:
    """The learned map W_h: {"kernel": [c_s, c_t]} float32, normal with variance 1 / c_s.

    Variant "huawei-noah" adds {"bias": [c_t]} of zeros: the authors' code has one, the paper has none.

    Args:
        key: a JAX random key.
        student_shape, teacher_shape: (b, t, c_s) and (b, t, c_t).
        variant: "paper" or "huawei-noah".

    Raises:
        UserError: hidden states that are not [b, t, c], or an unknown variant.
    """
    if variant not in TINYBERT_VARIANTS:
        raise unknown("TinyBERT variant", variant, TINYBERT_VARIANTS)
    for whose, shape in (("student", student_shape), ("teacher", teacher_shape)):
        _require_hidden(whose, shape)
    kernel = jax.nn.initializers.lecun_normal()(key, (student_shape[2], teacher_shape[2]), jnp.float32)
    bias = {} if variant == "paper" else {"bias": jnp.zeros(teacher_shape[2], jnp.float32)}
    return {"kernel": kernel, **bias}


def tinybert_hidden(params: dict[str, Array], student: Array, teacher: Array, tokens: Array | None = None) -> Array:
    """TinyBERT's hidden-state loss: MSE(H^S W_h, H^T), the mean over real tokens and the teacher's channels.

    The same loss serves the embedding layers (eq. 9), with its own W_e.

    Args:
        params: of `init_tinybert_hidden`; a "bias", if there, is added.
        student: [b, t, c_s].
        teacher: [b, t, c_t].
        tokens: [b, t] or None.

    Returns:
        [b] float32.

    Raises:
        UserError: shapes that do not fit.

    Source: Jiao et al. 2020, "TinyBERT", eq. 8.
    """
    real = _require_hidden_pair(student, teacher, tokens)
    kernel = params["kernel"]
    if kernel.shape != (student.shape[2], teacher.shape[2]):
        raise UserError(
            f"W_h of shape {kernel.shape} cannot map student states of shape {student.shape} to the teacher's of shape "
            f"{teacher.shape}: make it with init_tinybert_hidden from these shapes."
        )
    mapped = jnp.matmul(_without_padding(student, real), kernel, precision="highest")
    mapped = mapped + params["bias"][None, None] if "bias" in params else mapped
    error = jnp.where(real[..., None], mapped - _without_padding(teacher, real), 0.0)
    return jnp.sum(jnp.square(error), axis=(1, 2)) / (_count(real) * teacher.shape[2])


def distilbert_cosine(student: Array, teacher: Array, tokens: Array | None = None) -> Array:
    """DistilBERT's cosine embedding loss: 1 - cos(h^S, h^T), the mean over real tokens.

    A state of all zeros has no direction: its cosine counts as 0, without a gradient.

    Args:
        student, teacher: [b, t, c], of the same width.
        tokens: [b, t] or None.

    Returns:
        [b] float32, in [0, 2].

    Raises:
        UserError: shapes that do not fit.

    Source: Sanh et al. 2019, "DistilBERT", section 2 (L_cos).
    """
    real = _require_hidden_pair(student, teacher, tokens)
    if student.shape[2] != teacher.shape[2]:
        raise UserError(
            f"the cosine of student states of {student.shape[2]} channels and teacher states of {teacher.shape[2]} is "
            f"not defined: a projector ('linear') maps {student.shape[2]} channels to {teacher.shape[2]}."
        )
    s, t = _without_padding(student, real), _without_padding(teacher, real)
    # 1 - cos = ½ ||ŝ - t̂||² of unit vectors: exact, value and gradient, where both agree.
    distance = 0.5 * jnp.sum(jnp.square(unit(s) - unit(t)), axis=-1)
    directed = jnp.any(s != 0, axis=-1) & jnp.any(t != 0, axis=-1)
    return jnp.sum(jnp.where(directed, distance, 1.0), axis=1, where=real) / _count(real)


def minilm(
    student: tuple[Array, Array, Array],
    teacher: tuple[Array, Array, Array],
    tokens: Array | None = None,
    sees: Array | None = None,
) -> Array:
    """MiniLM's deep self-attention distillation: L_AT + L_VR, both means over heads and real positions.

    L_AT = KL(softmax(q kᵀ / √d)^T || ^S), of the attention distributions; L_VR is the same of the value relations
    softmax(v vᵀ / √d). Both are meant for the last layer of each model.

    Args:
        student: (q, k, v), each [b, n, t, d_s].
        teacher: (q, k, v), each [b, n, t, d_t]; the widths may differ, the heads may not.
        tokens: [b, t] or None.
        sees: [b, t, t] or None.

    Returns:
        [b] float32, in nats.

    Raises:
        UserError: shapes that do not fit, or numbers of heads that differ.

    Source: Wang et al. 2020, "MiniLM", eqs. 5-8.
    """
    _require_same_heads("MiniLM", student, teacher, tokens)
    (q_s, k_s, v_s), (q_t, k_t, v_t) = student, teacher
    attention = _relation_kl((q_s, k_s), (q_t, k_t), tokens, sees)
    return attention + _relation_kl((v_s, v_s), (v_t, v_t), tokens, sees)


def minilmv2(
    student: tuple[Array, Array, Array],
    teacher: tuple[Array, Array, Array],
    tokens: Array | None = None,
    sees: Array | None = None,
    *,
    relation_heads: int,
    query_weight: Scalar = 1.0,
    key_weight: Scalar = 1.0,
    value_weight: Scalar = 1.0,
) -> Array:
    """MiniLMv2's self-attention relations: weighted KL of the q-q, k-k and v-v relations of many relation heads.

    The heads of each model are concatenated and split anew into `relation_heads`, so that neither their number nor
    their width has to agree. L = Σ weight · 1/(heads · tokens) Σ KL(R^T || R^S), R = softmax(a aᵀ / √d_r), with d_r the
    width of a relation head in that model.

    Args:
        student, teacher: (q, k, v), each [b, n_s, t, d_s] and [b, n_t, t, d_t].
        tokens: [b, t] or None.
        sees: [b, t, t] or None.
        relation_heads: divides n_s d_s and n_t d_t; static.
        query_weight, key_weight, value_weight: of the q-q, k-k and v-v relations.

    Returns:
        [b] float32, in nats.

    Raises:
        UserError: shapes that do not fit, or relation heads that do not divide both widths.

    Source: Wang et al. 2021, "MiniLMv2", eqs. 5-8.
    """
    loss = jnp.zeros(student[0].shape[0], jnp.float32)
    for a_s, a_t, weight in zip(student, teacher, (query_weight, key_weight, value_weight), strict=True):
        r_s, r_t = _relation_heads("student", a_s, relation_heads), _relation_heads("teacher", a_t, relation_heads)
        _require_same_heads("MiniLMv2", (r_s,), (r_t,), tokens)
        loss = loss + weight * _relation_kl((r_s, r_s), (r_t, r_t), tokens, sees)
    return loss


def layer_map(kind: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Which layers to pair, as (student, teacher) indices from 0; embedding layers are not counted.

    With M student and N teacher layers, counted from 1, student layer m learns from
    "uniform": ⌈m N / M⌉, which is TinyBERT's g(m) = m N / M where M divides N (Jiao et al. 2020, section 4.1);
    "last": N - M + m, the last M of the teacher; "final": only the last of both (MiniLM); "middle": only ⌈N / 2⌉, by
    student layer ⌈M / 2⌉ (FitNets); "learned": every teacher layer, in proportions that `mix_layers` learns.

    Raises:
        UserError: an unknown kind, fewer than one layer, or "last" where the student has more layers.
    """
    if kind not in LAYER_MAPS:
        raise unknown("layer map", kind, LAYER_MAPS)
    if min(student_layers, teacher_layers) < 1:
        raise UserError(
            f"a layer map of {student_layers} student and {teacher_layers} teacher layers is empty: "
            "name at least one tap of each."
        )
    if kind == "last" and student_layers > teacher_layers:
        raise UserError(
            f"the layer map 'last' needs a teacher layer for each of the {student_layers} student layers, and there "
            f"are {teacher_layers}: use 'uniform', where several student layers may share one."
        )
    if kind == "final":
        return [(student_layers - 1, teacher_layers - 1)]
    if kind == "middle":
        return [((student_layers - 1) // 2, (teacher_layers - 1) // 2)]
    students = range(student_layers)
    if kind == "learned":
        return [(s, t) for s in students for t in range(teacher_layers)]
    if kind == "last":
        return [(s, teacher_layers - student_layers + s) for s in students]
    return [(s, -(-(s + 1) * teacher_layers // student_layers) - 1) for s in students]


def mix_layers(weights_logits: Array, per_pair: Array) -> Array:
    """The learned layer map: 1/s Σ_s Σ_t softmax_t(logits)_st · loss_st.

    Each student layer spreads a weight of 1 over the teacher's layers. Minimised together with the losses, the weights
    move to the teacher layers that are easiest to match.

    Args:
        weights_logits: [s, t], float; zeros weigh all teacher layers equally.
        per_pair: [s, t, b], the per-example loss of every pair of layers, in the order of `layer_map("learned", ...)`.

    Returns:
        [b] float32.

    Raises:
        UserError: shapes that do not fit.

    Source: a static form of the attention over teacher layers of Passban et al. 2021, "ALP-KD", which mixes the
    teacher's states where this mixes the losses.
    """
    if per_pair.ndim != 3 or per_pair.shape[:2] != weights_logits.shape:
        raise UserError(
            f"layer weights of shape {weights_logits.shape} do not fit losses of shape {per_pair.shape}: "
            "give losses [student layers, teacher layers, b] and one weight per pair."
        )
    weights = jax.nn.softmax(weights_logits.astype(jnp.float32), axis=1)
    return jnp.sum(weights[..., None] * per_pair.astype(jnp.float32), axis=(0, 1)) / len(weights)


def _relation_kl(
    student: tuple[Array, Array], teacher: tuple[Array, Array], tokens: Array | None, sees: Array | None
) -> Array:
    """KL between the attention maps of two pairs (a, c) of one number of heads: mean over heads and real queries."""
    log_s, log_t = _log_maps(*student, tokens, sees), _log_maps(*teacher, tokens, sees)
    real = _real(student[0], tokens)
    divergence = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=(1, 2, 3), where=_pairs(real, sees))
    return divergence / (log_s.shape[1] * _count(real))


def _log_maps(q: Array, k: Array, tokens: Array | None, sees: Array | None) -> Array:
    """log softmax over the keys in sight, [b, n, t, t]; finite everywhere, of no meaning where a token is padding."""
    keys = _real(k, tokens)[:, None, None]
    keys = keys if sees is None else keys & sees.astype(jnp.bool_)[:, None]
    return jax.nn.log_softmax(jnp.where(keys, attention_scores(q, k, tokens), _NOWHERE), axis=-1)


def _relation_heads(whose: str, a: Array, relation_heads: int) -> Array:
    """[b, n, t, d] to [b, relation heads, t, n d / relation heads]."""
    if a.ndim != 4:
        raise UserError(f"{whose} heads of shape {a.shape} are not [b, heads, t, d]: use split_heads on a tap of qkv.")
    batch, heads, length, width = a.shape
    if relation_heads < 1 or heads * width % relation_heads:
        raise UserError(
            f"{relation_heads} relation heads do not divide the {whose}'s {heads} heads of width {width}: "
            f"choose a divisor of {heads * width}."
        )
    return a.transpose(0, 2, 1, 3).reshape(batch, length, relation_heads, -1).transpose(0, 2, 1, 3)


def _real(x: Array, tokens: Array | None) -> Array:
    """Which tokens are real, bool [b, t], for x [b, n, t, d] or [b, t, c]."""
    return jnp.ones((x.shape[0], x.shape[-2]), jnp.bool_) if tokens is None else tokens.astype(jnp.bool_)


def _pairs(real: Array, sees: Array | None = None) -> Array:
    """Which (query, key) are both real, and in sight of each other, bool [b, 1, t, t]."""
    pairs = real[:, None, :, None] & real[:, None, None, :]
    return pairs if sees is None else pairs & sees.astype(jnp.bool_)[:, None]


def _without_padding(x: Array, real: Array) -> Array:
    """x [..., t, c] in float32, with zeros where real [..., t] is false: first of all, for padding may hold NaN."""
    return jnp.where(real[..., None], x.astype(jnp.float32), 0.0)


def _count(real: Array) -> Array:
    """The number of real tokens of each example, [b] float32, at least 1 as a divisor."""
    return jnp.maximum(jnp.sum(real, axis=1), 1).astype(jnp.float32)


def _require_heads(what: str, x: Array, y: Array, tokens: Array | None) -> None:
    if x.ndim != 4 or y.ndim != 4 or (x.shape[0], x.shape[2]) != (y.shape[0], y.shape[2]):
        raise UserError(
            f"{what} of shapes {x.shape} and {y.shape} are not [b, heads, t, d] of one batch and one number of tokens: "
            "use split_heads on taps of qkv, of models that cut their input into the same tokens."
        )
    _require_tokens(tokens, (x.shape[0], x.shape[2]))


def _require_same_heads(method: str, student: Sequence[Array], teacher: Sequence[Array], tokens: Array | None) -> None:
    for x, y in zip(student, teacher, strict=True):
        _require_heads(f"{method}: student and teacher heads", x, y, tokens)
        if x.shape[1] != y.shape[1]:
            raise UserError(
                f"{method} pairs heads one to one, and the student has {x.shape[1]} where the teacher has "
                f"{y.shape[1]}: use minilmv2, whose relation heads split both models alike."
            )


def _require_hidden(whose: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise UserError(f"{whose} hidden states of shape {tuple(shape)} are not [b, t, c]: tap a transformer block.")


def _require_hidden_pair(student: Array, teacher: Array, tokens: Array | None) -> Array:
    """Raises UserError where hidden states do not fit; returns which tokens are real, bool [b, t]."""
    for whose, hidden in (("student", student), ("teacher", teacher)):
        _require_hidden(whose, hidden.shape)
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"student states of shape {student.shape} and teacher states of shape {teacher.shape} differ in examples "
            "or tokens: give both models one batch, cut into the same tokens."
        )
    _require_tokens(tokens, student.shape[:2])
    return _real(student, tokens)


def _require_tokens(tokens: Array | None, shape: tuple[int, ...]) -> None:
    if tokens is not None and tokens.shape != shape:
        raise UserError(f"a token mask of shape {tokens.shape} does not fit {shape} examples and tokens: give [b, t].")

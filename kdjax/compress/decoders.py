"""A student cut out of its teacher: layers evenly spaced, channels, heads and neurons by their activations.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
section 2.2, for what is measured; Sreenivas et al. 2024, "LLM Pruning and Distillation in Practice", for the mean over
the sequence and the L2 norm over the batch.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.model import Array, Params, Variables
from kdjax.models.decoder import DecoderConfig, make_decoder

# What a student may have less of than its teacher; in all else, but for ties to the embedding, the two agree.
SIZES = ("vocabulary", "width", "layers", "heads", "kv_heads", "mlp_width", "context")


class Importance(NamedTuple):
    """How much of a teacher's activations passes through each of its parts, float32.

    Attributes:
      channels: [width], of the residual stream, summed over all norms.
      heads: [layers, kv_heads], of each key and value head, summed over the query heads that share it.
      neurons: [layers, mlp_width], of the feedforward's hidden units.
    """

    channels: Array
    heads: Array
    neurons: Array


def layer_choice(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher's layers that a student of fewer gets: the first, the last, and between them evenly spaced ones.

    Layer i of the student is round(i (L_t - 1) / (L_s - 1)), halves up; a student of one layer gets the first.

    Raises:
      UserError: the student has no layers, or more than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UserError(
            f"a student of {student_layers} layers cannot be cut out of a teacher of {teacher_layers}: "
            f"choose 1 to {teacher_layers}."
        )
    steps = max(student_layers - 1, 1)
    return tuple((2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers))


def importance(teacher_config: DecoderConfig, teacher_variables: Variables, inputs: Any) -> Importance:
    """What matters in a teacher, measured on a few texts.

    The score of a channel is the absolute value of a norm's output; of a neuron, that of what the down projection gets;
    of a query head, the L2 norm of its output. Each is averaged over the tokens of a row, without padding, its L2 norm
    is taken over rows, and then it is summed as :class:`Importance` says. All is in float32, one row at a time.

    Args:
      teacher_config: of the variables.
      teacher_variables: the teacher's.
      inputs: as the decoder takes them; some dozens of rows are enough.
    """
    inputs = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    known = {name: jnp.asarray(inputs[name]) for name in ("tokens", "segments", "positions") if name in inputs}
    return _importance(teacher_config, teacher_variables, known)


def student_from_teacher(
    teacher_config: DecoderConfig,
    teacher_variables: Variables,
    student_config: DecoderConfig,
    *,
    importance: Importance | None = None,
) -> Variables:
    """A student's first variables, made of its teacher's.

    Layers are those of :func:`layer_choice`; of the vocabulary the first rows stay; channels of the residual stream,
    groups of heads (a key and value head with all its query heads) and neurons are the most important ones, in the
    teacher's order. A student without ties to its embedding gets the embedding of a tied teacher as its head.

    Args:
      teacher_config: of the teacher's variables.
      teacher_variables: ``{"params": ..., "state": {}}``; nothing of them is changed.
      student_config: like the teacher's, with some of :data:`SIZES` smaller.
      importance: what :func:`importance` measured; needed where width, heads or mlp_width are smaller.

    Returns:
      ``{"params": ..., "state": {}}`` in the teacher's dtype; the same weights as the teacher's where the configs are
      the same.

    Raises:
      UserError: a student that cannot be cut out of the teacher; no importance to cut by, or that of another model.
    """
    _check(teacher_config, student_config, importance)
    if importance is None:  # nothing is chosen by it: every part stays
        importance = Importance(
            jnp.zeros(teacher_config.width),
            jnp.zeros((teacher_config.layers, teacher_config.kv_heads)),
            jnp.zeros((teacher_config.layers, teacher_config.mlp_width)),
        )
    params = _cut(teacher_config, student_config, teacher_variables["params"], importance)
    return {"params": params, "state": {}}


@partial(jax.jit, static_argnums=0)
def _importance(config: DecoderConfig, variables: Variables, inputs: dict[str, Array]) -> Importance:
    model, params = make_decoder(config, attention="xla"), variables["params"]
    streams = [f"blocks.{layer}" for layer in range(config.layers)]
    attended = [f"{name}.attention.qkv" for name in streams]

    def norm(x: Array, scale: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale[None]

    def of_row(row: dict[str, Array]) -> Importance:
        tokens, segments = row["tokens"], row.get("segments", jnp.ones_like(row["tokens"]))
        row = {name: value[None] for name, value in row.items()}
        taps = model.apply(variables, row, train=False, taps=(*streams, *attended))[0].taps
        embedded = jnp.take(params["embed"]["embedding"], tokens, axis=0).astype(jnp.float32)
        befores = jnp.stack([embedded, *(taps[name][0] for name in streams[:-1])])
        real = (segments > 0) / jnp.maximum(jnp.sum(segments > 0), 1)
        mask = (segments[:, None] == segments[None])[None, None]

        def mean(values: Array) -> Array:
            """Of absolute values [t, n], over the tokens that are not padding."""
            return real @ jnp.abs(values)

        # The taps are what goes into attention and what leaves a block; what lies between is computed from them.
        def of_block(layer: tuple[Params, Array, Array]) -> Importance:
            weights, before, qkv = layer
            q, k, v = qkv.reshape(len(tokens), 3, config.heads, config.head_dim).swapaxes(0, 1)[:, None]
            mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")[0]
            middle = before + mixed.reshape(len(tokens), -1) @ weights["attention"]["o"]["kernel"]
            read = norm(middle, weights["mlp_norm"]["scale"])
            hidden = jax.nn.silu(read @ weights["mlp"]["gate"]["kernel"]) * (read @ weights["mlp"]["up"]["kernel"])
            return Importance(
                channels=jnp.stack([mean(norm(before, weights["attention_norm"]["scale"])), mean(read)]),
                heads=mean(jnp.linalg.norm(mixed, axis=-1)),
                neurons=mean(hidden),
            )

        blocks = jax.lax.map(of_block, (params["blocks"], befores, jnp.stack([taps[name][0] for name in attended])))
        channels = blocks.channels.reshape(-1, config.width)
        final = mean(norm(taps[streams[-1]][0], params["norm"]["scale"]))
        return blocks._replace(channels=jnp.concatenate([channels, final[None]]))

    # By row: channels of each norm, single heads, neurons.
    scores = jax.tree.map(lambda of_rows: jnp.linalg.norm(of_rows, axis=0), jax.lax.map(of_row, inputs))
    groups = scores.heads.reshape(config.layers, config.kv_heads, -1)
    return Importance(scores.channels.sum(0), groups.sum(-1), scores.neurons)


@partial(jax.jit, static_argnums=(0, 1))
def _cut(teacher: DecoderConfig, student: DecoderConfig, params: Params, importance: Importance) -> Params:
    layers = jnp.array(layer_choice(teacher.layers, student.layers))
    channels = _best(importance.channels, student.width)

    def scale(weights: Params) -> Params:
        return {"scale": weights["scale"][channels]}

    def block(weights: Params, head_scores: Array, neuron_scores: Array) -> Params:
        """One layer's parameters, no longer stacked."""
        groups, neurons = _best(head_scores, student.kv_heads), _best(neuron_scores, student.mlp_width)
        attention, mlp = weights["attention"], weights["mlp"]

        def of_groups(x: Array) -> Array:
            """Of an axis that all heads share, the leading one, the parts of the chosen groups."""
            return x.reshape(teacher.kv_heads, -1, *x.shape[1:])[groups].reshape(-1, *x.shape[1:])

        def project(part: Params) -> Params:
            kernel = {"kernel": of_groups(part["kernel"][channels].T).T}
            return kernel | ({"bias": of_groups(part["bias"])} if "bias" in part else {})

        return {
            "attention_norm": scale(weights["attention_norm"]),
            "attention": attention  # whatever is not below is of a single head, and the same for all of them
            | {name: project(attention[name]) for name in "qkv"}
            | {"o": {"kernel": of_groups(attention["o"]["kernel"])[:, channels]}},
            "mlp_norm": scale(weights["mlp_norm"]),
            "mlp": {
                "gate": {"kernel": mlp["gate"]["kernel"][channels][:, neurons]},
                "up": {"kernel": mlp["up"]["kernel"][channels][:, neurons]},
                "down": {"kernel": mlp["down"]["kernel"][neurons][:, channels]},
            },
        }

    def rows(table: Array) -> Array:
        return table[: student.vocabulary, channels]

    chosen = jax.tree.map(lambda x: x[layers], (params["blocks"], importance.heads, importance.neurons))
    embedding = params["embed"]["embedding"]
    cut = {
        "embed": {"embedding": rows(embedding)},
        "blocks": jax.vmap(block)(*chosen),
        "norm": scale(params["norm"]),
    }
    return (
        cut
        if student.tied
        else cut | {"head": {"kernel": rows(embedding if teacher.tied else params["head"]["kernel"])}}
    )


def _best(scores: Array, count: int) -> Array:
    """The places of the highest scores, in ascending order; of equal ones the first."""
    return jnp.sort(jnp.argsort(-scores, stable=True)[:count])


def _check(teacher: DecoderConfig, student: DecoderConfig, importance: Importance | None) -> None:
    """Raises a UserError where the student cannot be cut out of the teacher."""
    for name in SIZES:
        if not 1 <= getattr(student, name) <= getattr(teacher, name):
            raise UserError(
                f"a student of {name}={getattr(student, name)} cannot be cut out of a teacher of "
                f"{name}={getattr(teacher, name)}: choose 1 to {getattr(teacher, name)}."
            )
    group = teacher.heads // teacher.kv_heads
    if student.heads != group * student.kv_heads:
        raise UserError(
            f"a student of {student.heads} heads and {student.kv_heads} kv_heads cannot be cut out of a teacher whose "
            f"kv_heads are shared by {group} heads each: choose heads={group * student.kv_heads}."
        )
    if student.tied and not teacher.tied:
        raise UserError(
            "a student tied to its embedding cannot be cut out of a teacher with a head of its own: "
            "choose tied=False for the student."
        )
    for name in DecoderConfig._fields:
        if name not in (*SIZES, "tied") and getattr(student, name) != getattr(teacher, name):
            raise UserError(
                f"a student of {name}={getattr(student, name)} cannot be cut out of a teacher of "
                f"{name}={getattr(teacher, name)}: choose the teacher's."
            )
    narrower = [name for name in ("width", "heads", "mlp_width") if getattr(student, name) < getattr(teacher, name)]
    if narrower and importance is None:
        raise UserError(
            f"a student of smaller {' and '.join(narrower)} needs a choice of what stays: pass "
            "importance=decoders.importance(teacher_config, teacher_variables, inputs)."
        )
    sizes = {"channels": (teacher.width,), "heads": (teacher.layers, teacher.kv_heads)}
    for name, shape in (sizes | {"neurons": (teacher.layers, teacher.mlp_width)}).items():
        if importance is not None and jnp.shape(getattr(importance, name)) != shape:
            raise UserError(
                f"the importance of {name} is {jnp.shape(getattr(importance, name))} and should be {shape}: "
                "measure it on this teacher."
            )

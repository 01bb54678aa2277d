"""Losses in which the student, its past or its peers are the teacher.

Arrays: logits [b, classes], labels int32 [b] (-1: unlabelled, without a cross-entropy), float32 [b] out. The side that
teaches is never differentiated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.losses import projectors
from kdjax.losses.projectors import Params
from kdjax.losses.response import _log_softmax, cross_entropy, kl

Array = jax.Array
Scalar = float | Array
Shape = tuple[int, ...]


def init_exits(key: Array, shapes: list[Shape], classes: int, *, projector: str = "linear", hidden: int = 64) -> Params:
    """Classifiers for the student's earlier layers, and what maps their features to the width of the last one's.

    Args:
        key: of the initial weights.
        shapes: of the taps from shallow to deep; the last is the one that teaches.
        classes: the number of classes.
        projector: the kind of the hint's map; see ``projectors.PROJECTORS``.
        hidden: units of the classifiers' hidden layer.
    """
    params: Params = {}
    for index, shape in enumerate(shapes[:-1]):
        first, second = jax.random.split(jax.random.fold_in(key, index))
        params[str(index)] = {
            "classifier": projectors.init(first, "mlp", shape[-1], classes, hidden=hidden),
            "hint": projectors.init(second, projector, shape[-1], shapes[-1][-1]),
        }
    return params


def exit_logits(params: Params, taps: list[Array]) -> list[Array]:
    """The scores [b, classes] of each exit, from the pooled taps."""
    return [
        projectors.apply(params[str(index)]["classifier"], "mlp", projectors.pool(tap))
        for index, tap in enumerate(taps[:-1])
    ]


def exits(
    params: Params,
    taps: list[Array],
    logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 3.0,
    label_weight: Scalar = 0.7,
    soft_weight: Scalar = 0.3,
    hint_weight: Scalar = 0.03,
    projector: str = "linear",
) -> Array:
    """Be your own teacher: every exit learns from the labels, from the last classifier and from the last features.

    Σ over exits of label_weight · CE(exit, label) + soft_weight · T² KL(softmax(z / T) ‖ softmax(exit / T)) +
    hint_weight · ‖hint(tap) - last tap‖², of pooled taps. The last classifier and the last features are constants here;
    what the labels teach the last classifier is the caller's own cross-entropy. Exits are a hidden layer on the pooled
    features, where the paper has bottleneck convolutions.

    Args:
        params: of ``init_exits``.
        taps: the student's features from shallow to deep, [b, ..., c].
        logits: [b, classes], the student's own.
        labels: [b].
        temperature: T.
        label_weight: 1 - α of the paper.
        soft_weight: α of the paper.
        hint_weight: λ of the paper. These three values and T are those of mmrazor's recipe.
        projector: as in ``init_exits``.

    Returns:
        [b] float32. An unlabelled example has no cross-entropy, but learns from the last classifier and features.

    Source: Zhang et al. 2019, "Be Your Own Teacher", eqs. 3 to 5 and 7.
    """
    last = jax.lax.stop_gradient(projectors.pool(taps[-1]))
    own = jax.lax.stop_gradient(logits)
    total = jnp.zeros(labels.shape, jnp.float32)
    for index, score in enumerate(exit_logits(params, taps)):
        hinted = projectors.apply(params[str(index)]["hint"], projector, projectors.pool(taps[index]))
        distance = jnp.sum(jnp.square(hinted - last), axis=-1)
        soft = kl(score, own, temperature=temperature)
        total += label_weight * cross_entropy(score, labels) + soft_weight * soft + hint_weight * distance
    return total


def past_predictions(logits: Array, labels: Array, past: Array, seen: Array, *, share: Scalar = 0.8) -> Array:
    """Progressive self-distillation: cross-entropy with a target that mixes the label and one's own past prediction.

    Target: (1 - α) onehot(label) + α p_past, where the example was seen before and is labelled; the label alone where
    it was not seen; p_past alone where there is no label. α grows linearly over training in the paper: schedule it.

    Args:
        logits: [b, classes].
        labels: [b].
        past: [b, classes], what the student predicted when it last met the example.
        seen: [b] bool, whether it has met it.
        share: α in [0, 1].

    Returns:
        [b] float32; 0 where there is neither a label nor a past.

    Source: Kim et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets", eqs. 3 and 4. There
    the past is the model of the epoch before, run again; here it is what that model said when it met the example.
    """
    past = jax.lax.stop_gradient(past)
    log_p = jnp.where(past > 0, _log_softmax(logits, 1.0), 0.0)  # a class that both rule out adds nothing
    soft = -jnp.sum(past * log_p, axis=-1)
    share = jnp.where(labels >= 0, share, 1.0) * seen
    return (1.0 - share) * cross_entropy(logits, labels) + share * soft


def mutual(peers: Array, labels: Array, *, temperature: Scalar = 1.0) -> Array:
    """Deep mutual learning: each of K students follows the mean over the others, and the labels.

    Σ_k 1/(K - 1) Σ_{j ≠ k} T² KL(p_j ‖ p_k), to which Σ_{k ≥ 1} CE_k is added: student 0 has its own ``ce`` term. What
    a peer says is a constant to the one that listens, so each student has the gradient of its own loss alone.

    Args:
        peers: [K, b, classes], the logits of all students, the main one first.
        labels: [b].
        temperature: T; 1 in the paper.

    Returns:
        [b] float32. Unlabelled examples take part in the divergences alone.

    Source: Zhang et al. 2018, "Deep Mutual Learning", eqs. 6 and 7 (there the students update in turn).
    """
    said = jax.lax.stop_gradient(peers)
    count = len(peers)
    total = jnp.zeros(labels.shape, jnp.float32)
    for listener in range(count):
        for speaker in range(count):
            if speaker != listener:
                total += kl(peers[listener], said[speaker], temperature=temperature) / (count - 1)
        if listener:
            total += cross_entropy(peers[listener], labels)
    return total


def curriculum_temperature(
    params: Params,
    logits: Array,
    teacher_logits_at: Callable[[Array], Array],
    *,
    reversal: Scalar = 1.0,
    lowest: Scalar = 1.0,
    span: Scalar = 20.0,
) -> Array:
    """KL at a temperature that is learned against the student: gradient reversal makes it grow harder as λ grows.

    T = lowest + span · sigmoid(τ); the loss is T² KL(p_T ‖ q_T), whose gradient by τ is multiplied by -λ. Schedule λ
    from 0 to 1 (a cosine over the first epochs in the paper).

    Args:
        params: ``{"temperature": τ}``, a scalar.
        logits: [b, classes].
        teacher_logits_at: ``teacher_logits_at(temperature) -> [b, classes]``.
        reversal: λ.
        lowest: of T.
        span: of T.

    Returns:
        [b] float32, in nats.

    Source: Li et al. 2023, "Curriculum Temperature for Knowledge Distillation", eqs. 3 to 6 (the global version).
    """
    adversary = -reversal * params["temperature"]
    learned = adversary + jax.lax.stop_gradient(params["temperature"] - adversary)  # the value τ, the gradient -λ
    temperature = lowest + span * jax.nn.sigmoid(learned)
    return kl(logits, teacher_logits_at(temperature), temperature=temperature)

"""The catalogue: every loss term by its name in a config."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import (
    contrastive,
    feature,
    feature_learned,
    projectors,
    relation,
    response,
    response_labels,
    self_taught,
    sparse,
    transformer,
)
from kdjax.model import Array, Params
from kdjax.terms import (
    BLOCKS,
    Options,
    Sizes,
    Term,
    View,
    from_all_pairs,
    from_labels,
    from_pairs,
    from_scores,
    from_scores_and_labels,
    from_scores_of_batch,
    learned_map,
    no_learned_map,
    only,
    options_of_loss,
    over_layers,
    tapped,
    without_layer_weights,
)

QKV = r"^(.*\.)?blocks\.\d+\.attention\.qkv$"


# ------------------------------------------------------------------------------------------------ features, joined


def _fsp(view: View, options: Options) -> Array:
    """Gram matrices between neighbouring taps (the flow of the solution procedure), the mean over neighbours."""
    if len(view.pairs) < 2:
        raise UserError("losses.fsp relates neighbouring layers and has one: name two taps or more in losses.fsp.")
    matched = []
    for index, (student, teacher) in enumerate(view.pairs):
        student = projectors.apply(view.learned[str(index)], options["projector"], student)
        matched.append(projectors.match_size(student, teacher))
    values = []
    for (s1, t1), (s2, t2) in itertools.pairwise(matched):
        s1, s2 = projectors.match_size(s1, s2)
        t1, t2 = projectors.match_size(t1, t2)
        values.append(relation.fsp(s1, s2, t1, t2, **only(relation.fsp, options)))
    return jnp.mean(jnp.stack(values), axis=0)


def _projectors(key: Array, sizes: Sizes, options: Options) -> Params:
    no_learned_map(options, "relates neighbouring layers")
    make = lambda index, pair: projectors.init(
        jax.random.fold_in(key, index), options["projector"], pair[0][-1], pair[1][-1]
    )
    return {str(index): make(index, pair) for index, pair in enumerate(sizes.pairs)}


def _one(pairs: Sequence[Any]) -> Sequence[Any]:
    if len(pairs) != 1:
        raise UserError(
            f"a contrastive term compares one pair of layers, not {len(pairs)}: name one tap of each model."
        )
    return pairs


def _contrastive(loss: Callable[..., Array]) -> Term:
    """A contrastive loss of pooled features over the global batch and, where asked for, a queue of earlier ones."""

    def value(view: View, options: Options) -> Any:
        ((student, teacher),) = _one(view.pairs)
        student, teacher = projectors.pool(student), projectors.pool(teacher)
        labels = view.labels if options["by_label"] else None
        given = {**only(loss, options), "labels": labels, "queue": view.memory.get("queue")}
        if "examples" in inspect.signature(loss).parameters:
            given["examples"] = view.memory["examples"]
        found = loss(view.learned, student, teacher, view.valid, **given)
        if given["queue"] is None:
            return found, view.memory
        new = contrastive.embed(view.learned["student"], student), contrastive.embed(view.learned["teacher"], teacher)
        return found, view.memory | {"queue": contrastive.push(given["queue"], *new, view.labels, view.valid)}

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        ((student, teacher),) = _one(sizes.pairs)
        pooled = (student[0], student[-1]), (teacher[0], teacher[-1])
        return contrastive.init_contrastive(key, *pooled, width=options["width"])

    def remember(key: Array, sizes: Sizes, options: Options) -> Any:
        memory: dict[str, Any] = {"examples": jnp.asarray(sizes.examples, jnp.float32)}
        if options["queue"]:
            memory["queue"] = contrastive.init_queue(key, options["queue"], options["width"])
        return memory

    options = {"width": 128, "queue": 0, "by_label": False} | options_of_loss(loss)
    options.pop("examples", None)
    return without_layer_weights(tapped(value, options, init=make, memory=remember))


# ------------------------------------------------------------------------------------------------ transformers


def _heads(view: View, options: Options) -> list[tuple[Any, Any]]:
    """Queries, keys and values of both models, pair by pair, each [b, heads, tokens, width]."""
    for side in ("student", "teacher"):
        if not options[f"{side}_heads"]:
            raise UserError(f"losses on attention must know its heads: set {side}_heads of the term.")
    split = transformer.split_heads
    return [(split(s, options["student_heads"]), split(t, options["teacher_heads"])) for s, t in view.pairs]


def _in_sight(view: View) -> tuple[Array | None, Array | None]:
    """Which tokens are real [b, t], and which keys each query sees [b, t, t]; of sequences that are read in order."""
    segments = view.batch.get("segments")
    if segments is None:
        return None, None
    same = segments[:, :, None] == segments[:, None, :]
    return segments > 0, same & jnp.tril(jnp.ones(same.shape[1:], jnp.bool_))[None]


def _attention(loss: Callable[..., Array], parts: int, layers: str, **more: Any) -> Term:
    """A loss of queries, keys (and values), taken from the taps of the joint projection.

    ``student_heads`` and ``teacher_heads`` of 0 are those of the models, where kdjax knows them.
    """

    def value(view: View, options: Options) -> Array:
        if not options.get("relation_heads", 1):
            options = {**options, "relation_heads": options["student_heads"]}
        tokens, sees = _in_sight(view)
        values = [loss(s[:parts], t[:parts], tokens, sees, **only(loss, options)) for s, t in _heads(view, options)]
        return over_layers(values, view.learned, options)

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        return learned_map(sizes, options)

    options = options_of_loss(loss) | {"student_heads": 0, "teacher_heads": 0} | more
    return tapped(value, options, layers, taps=QKV, init=make, sequences=True)


# ------------------------------------------------------------------------------------------------ self-taught


def _exits(view: View, options: Options) -> Array:
    taps = [student for student, _ in view.pairs]
    return self_taught.exits(view.learned, taps, view.logits, view.labels, **only(self_taught.exits, options))


def _init_exits(key: Array, sizes: Sizes, options: Options) -> Params:
    shapes = [student for student, _ in sizes.pairs]
    if len(shapes) < 2:
        raise UserError("losses.exits needs a layer before the last one: name two student_taps or more.")
    return self_taught.init_exits(key, shapes, sizes.classes, projector=options["projector"], hidden=options["hidden"])


def _past(view: View, options: Options) -> Any:
    ids = view.batch["id"]
    past = view.memory["predictions"][ids]
    value = self_taught.past_predictions(view.logits, view.labels, past, past.sum(-1) > 0, share=options["share"])
    said = jax.nn.softmax(jax.lax.stop_gradient(view.logits).astype(jnp.float32), axis=-1)
    kept = jnp.where((view.valid > 0)[:, None], said, past)
    return value, {"predictions": view.memory["predictions"].at[ids].set(kept)}


def _mutual(view: View, options: Options) -> Any:
    """Runs the peers on the student's batch. Their weights train with the step, as learned parts of the objective, so
    they are saved with it and are no part of the student that is handed over."""
    scores, states = [view.logits], {}
    for index, peer in enumerate(view.peers):
        variables = {"params": view.learned[str(index)], "state": view.memory[str(index)]}
        key = jax.random.fold_in(view.key, index)
        outputs, states[str(index)] = peer.apply(variables, view.batch["inputs"], train=True, key=key)
        scores.append(outputs.logits)
    value = self_taught.mutual(jnp.stack(scores), view.labels, **only(self_taught.mutual, options))
    return value, jax.lax.stop_gradient(states)


def _init_peers(part: str) -> Callable[[Array, Sizes, Options], Any]:
    def init(key: Array, sizes: Sizes, options: Options) -> Any:
        if not sizes.peers:
            raise UserError("losses.mutual needs students that learn beside the student: name one or more in peers.")
        return {str(i): peer.init(jax.random.fold_in(key, i))[part] for i, peer in enumerate(sizes.peers)}

    return init


def _top_k(view: View, options: Options) -> Array:
    """Of what the teacher said beforehand, or of what it says."""
    if view.signal is not None:
        return sparse.sparse_kl(view.logits, *view.signal)
    teacher = view.teacher_logits(1.0)
    return sparse.sparse_kl(view.logits, *sparse.top_k(teacher, min(options["k"], teacher.shape[-1])))


def _ema(view: View, options: Options) -> Array:
    assert view.ema_logits is not None, "make_train_step runs the moving average for terms that read it"
    return response.kl(view.logits, jax.lax.stop_gradient(view.ema_logits), temperature=options["temperature"])


TERMS: dict[str, Term] = {
    # Response: what the models score.
    "ce": from_labels(response.cross_entropy),
    "kl": from_scores(partial(response.kl, direction="forward")),
    "reverse_kl": from_scores(partial(response.kl, direction="reverse")),
    "js": from_scores(response.jensen_shannon),
    "skew_kl": from_scores(partial(response.skew_kl, direction="forward")),
    "skew_reverse_kl": from_scores(partial(response.skew_kl, direction="reverse")),
    "logits_mse": from_scores(response.logits_mse),
    "standardised_kl": from_scores(response.standardised_kl),
    "total_variation": from_scores(response.total_variation),
    "top_k": Term(_top_k, {"k": 32}, reads="signal"),
    "dist": from_scores_of_batch(response.dist),
    "dkd": from_scores_and_labels(response_labels.dkd),
    "nkd": from_scores_and_labels(response_labels.nkd),
    "wsld": from_scores_and_labels(response_labels.weighted_soft_labels),
    "teacher_free": from_labels(response_labels.teacher_free),
    "curriculum_kl": Term(
        lambda view, options: self_taught.curriculum_temperature(
            view.learned, view.logits, view.teacher_logits, **only(self_taught.curriculum_temperature, options)
        ),
        options_of_loss(self_taught.curriculum_temperature),
        init=lambda key, sizes, options: {"temperature": jnp.ones(())},
    ),
    # Features: what the layers hold.
    "fitnets": from_pairs(feature_learned.fitnets, init=feature_learned.init_fitnets, layers="middle"),
    "attention_transfer": from_pairs(feature.attention_transfer, layers="uniform"),
    "nst": from_pairs(feature.nst),
    "factor_transfer": from_pairs(feature_learned.factor_transfer, init=feature_learned.init_factor_transfer),
    "vid": from_pairs(feature_learned.vid, init=feature_learned.init_vid, layers="uniform"),
    "review": from_all_pairs(feature_learned.review, feature_learned.init_review, layers="uniform"),
    "mgd": from_pairs(feature_learned.mgd, init=feature_learned.init_mgd, random=True),
    "simkd": from_pairs(feature.simkd, prepare=projectors.pool, projector="linear"),
    # Relations: between examples, channels or layers.
    "cka": from_pairs(relation.cka, over="batch"),
    "pkt": from_pairs(relation.pkt, over="batch", prepare=projectors.pool),
    "rkd_distance": from_pairs(relation.rkd_distance, over="batch", prepare=projectors.pool),
    "rkd_angle": from_pairs(relation.rkd_angle, over="batch", prepare=projectors.pool),
    "similarity": from_pairs(relation.similarity_preserving, over="batch"),
    "correlation": from_pairs(relation.correlation_congruence, over="batch", prepare=projectors.pool),
    "fsp": without_layer_weights(
        tapped(_fsp, options_of_loss(relation.fsp) | {"projector": "linear"}, "uniform", init=_projectors)
    ),
    "ickd": from_pairs(relation.ickd, projector="linear"),
    # Contrast.
    "crd": _contrastive(contrastive.crd),
    "infonce": _contrastive(contrastive.infonce),
    # Transformers.
    "tinybert_attention": _attention(transformer.tinybert_attention, 2, "uniform"),
    "tinybert_hidden": from_pairs(transformer.tinybert_hidden, init=transformer.init_tinybert_hidden, layers="uniform"),
    "distilbert_cosine": from_pairs(transformer.distilbert_cosine, projector="none"),
    "minilm": _attention(transformer.minilm, 3, "final"),
    "minilmv2": _attention(transformer.minilmv2, 3, "final", relation_heads=0),
    # The student's own: its moving average, its past, its exits, its peers.
    "ema_kl": Term(_ema, {"temperature": 1.0}, reads="ema"),
    "past_predictions": Term(
        _past,
        options_of_loss(self_taught.past_predictions),
        reads="student",
        memory=lambda key, sizes, options: {"predictions": jnp.zeros((sizes.examples, sizes.classes))},
    ),
    "exits": Term(
        _exits,
        {"student_taps": (), "hidden": 64, **options_of_loss(self_taught.exits)},
        reads="student",
        init=_init_exits,
        taps=BLOCKS,
    ),
    "mutual": Term(
        _mutual,
        options_of_loss(self_taught.mutual),
        reads="student",
        init=_init_peers("params"),
        memory=_init_peers("state"),
        random=True,
    ),
}

"""The catalogue of loss terms: how each loss of ``kdjax.losses`` takes part in an objective.

A loss is a function of arrays and knows nothing of models; a term says what it reads of a step (scores, labels, taps),
which options it has, and what it learns or remembers. Options with a float as default are traced: a new value never
recompiles. The others (names, flags, sizes) are part of the program.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    transformer,
)
from kdjax.model import Array, Model, Params

Shape = tuple[int, ...]
Options = Mapping[str, Any]


class View(NamedTuple):
    """What a term may look at in a step.

    Attributes:
      logits: [b, classes], the student's.
      teacher_logits: ``teacher_logits(temperature) -> [b, classes]``, all teachers together.
      labels: int32 [b], -1 where unlabelled.
      batch: the whole batch.
      valid: float32 [b], 0 for padding.
      pairs: the student's and the teacher's features, pair by pair.
      learned: what the term learns.
      memory: what the term remembers from step to step.
      key: of this step's randomness.
      ema_logits: [b, classes] of the student's moving average, where a term reads them.
      peers: the models that learn beside the student; their weights are what the term that runs them learns.
    """

    logits: Array
    teacher_logits: Callable[[Any], Array]
    labels: Array
    batch: Mapping[str, Array]
    valid: Array
    pairs: Sequence[tuple[Array, Array]]
    learned: Params
    memory: Any
    key: Array
    ema_logits: Array | None
    peers: Sequence[Model] = ()


class Sizes(NamedTuple):
    """What the learned parts and memories of a term are sized by: its features' shapes, and the run's."""

    pairs: Sequence[tuple[Shape, Shape]]
    student_layers: int  # in how many of the pairs' rows the student's taps come
    classes: int
    examples: int  # of the student's training split
    peers: Sequence[Model] = ()


class Term(NamedTuple):
    """A kind of loss term.

    Attributes:
      loss: ``loss(view, options) -> [b]``, or a scalar where ``over`` is "batch"; with a memory: ``(value, memory)``.
      options: their defaults.
      reads: "labels", "logits" (the teachers'), "both", "taps" (of student and main teacher), "student" (its own
        outputs and taps) or "ema" (its moving average).
      over: "example" or "batch"; the latter compares the examples of a batch with each other.
      init: ``init(key, sizes, options) -> params``, where the term learns something.
      memory: ``memory(key, sizes, options) -> arrays``, where it remembers something.
      taps: a regex of the modules that are tapped unless the config names some.
      layers: how layers are mapped unless the config says so (see ``taps.pairs_of``).
      random: whether its value depends on the step's key.
    """

    loss: Callable[[View, Options], Any]
    options: dict[str, Any]
    reads: str = "logits"
    over: str = "example"
    init: Callable[[Array, Sizes, Options], Params] | None = None
    memory: Callable[[Array, Sizes, Options], Any] | None = None
    taps: str = ""
    layers: str = "final"
    random: bool = False

    @property
    def on_labels(self) -> bool:
        """Whether only labelled examples count."""
        return self.reads in ("labels", "both")

    @property
    def uses_teacher(self) -> bool:
        """Whether the teachers must run."""
        return self.reads in ("logits", "both", "taps")


BLOCKS = r"^(.*\.)?blocks\.\d+$"
QKV = r"^(.*\.)?blocks\.\d+\.attention\.qkv$"


# ------------------------------------------------------------------------------------- from functions to terms


def _options(loss: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a loss's keyword-only arguments, which are the options of its term."""
    parameters = inspect.signature(loss).parameters.values()
    fixed = getattr(loss, "keywords", {})
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return {name: value for name, value in found.items() if value is not None and name not in fixed}


def _only(loss: Callable[..., Array], options: Options) -> dict[str, Any]:
    """Of the options, those that the loss takes: the others belong to the term (taps, projectors)."""
    names = inspect.signature(loss).parameters
    return {name: value for name, value in options.items() if name in names}


def _labels(loss: Callable[..., Array]) -> Term:
    """A loss of logits and labels."""
    return Term(lambda view, options: mixed(loss, view.logits, view, options), _options(loss), reads="labels")


def mixed(loss: Callable[..., Array], logits: Array, view: View, options: Options) -> Array:
    """A label loss where mixup or cutmix may have blended two labels: the same blend of the two losses."""
    options = _only(loss, options)
    first = loss(logits, view.labels, **options)
    if "mix" not in view.batch:
        return first
    return view.batch["mix"] * first + (1.0 - view.batch["mix"]) * loss(logits, view.batch["mixed_labels"], **options)


def _soft(loss: Callable[..., Array]) -> Term:
    """A loss of the student's and the teacher's logits."""

    def value(view: View, options: Options) -> Array:
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, **_only(loss, options))

    return Term(value, _options(loss))


def _soft_batch(loss: Callable[..., Array]) -> Term:
    def value(view: View, options: Options) -> Array:
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, view.valid, **_only(loss, options))

    return Term(value, _options(loss), over="batch")


def _soft_labels(loss: Callable[..., Array]) -> Term:
    """A loss of both models' logits and the labels; blended labels count by their larger part."""

    def value(view: View, options: Options) -> Array:
        labels = view.labels
        if "mix" in view.batch:
            labels = jnp.where(view.batch["mix"] >= 0.5, labels, view.batch["mixed_labels"])
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, labels, **_only(loss, options))

    return Term(value, _options(loss), reads="both")


def _tapped(value: Callable[..., Any], options: Mapping[str, Any], layers: str = "final", **fields: Any) -> Term:
    """A term over pairs of taps, with the options that all of them have."""
    common = {"student_taps": (), "teacher_taps": (), "layers": layers, "layer_weights": ()}
    return Term(value, {**common, **options}, reads="taps", **{"taps": BLOCKS, **fields})


def _without_layer_weights(term: Term) -> Term:
    return term._replace(options={name: value for name, value in term.options.items() if name != "layer_weights"})


def _pairwise(
    loss: Callable[..., Array],
    *,
    layers: str = "final",
    over: str = "example",
    prepare: Callable[[Array], Array] = lambda x: x,
    init: Callable[..., Params] | None = None,
    projector: str = "",
    random: bool = False,
    **fields: Any,
) -> Term:
    """A loss of one pair of features as a term over several: their mean, weighted by layer.

    Args:
      loss: ``loss(student, teacher, ...)``; with ``init``: ``loss(params, student, teacher, ...)``.
      layers: the default layer map.
      over: "example", or "batch" for a loss that takes a mask of examples.
      prepare: applied to each feature, such as pooling.
      init: makes the learned parameters of one pair.
      projector: the default kind of a projector of the student's feature to the teacher's width, put before a loss that
        compares channel by channel; "" for a loss that needs none.
      random: whether the loss takes a key.
    """

    def one(view: View, options: Options, index: int, student: Array, teacher: Array) -> Array:
        student, teacher = prepare(student), prepare(teacher)
        params = view.learned.get(str(index), {})
        if projector:
            student = projectors.apply(params, options["projector"], student)
        arguments: list[Any] = [params] if init else []
        arguments += [student, teacher]
        if random:
            arguments.append(jax.random.fold_in(view.key, index))
        if over == "batch":
            arguments.append(view.valid)
        return loss(*arguments, **_only(loss, options))

    def value(view: View, options: Options) -> Array:
        values = [one(view, options, i, *pair) for i, pair in enumerate(view.pairs)]
        return _over_layers(values, view.learned, options)

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        params: Params = {}
        for index, pair in enumerate(sizes.pairs):
            student, teacher = (jax.eval_shape(prepare, jax.ShapeDtypeStruct(s, jnp.float32)).shape for s in pair)
            own = jax.random.fold_in(key, index)
            if init:
                params[str(index)] = init(own, student, teacher, **_only(init, options))
            elif projector:
                params[str(index)] = projectors.init(own, options["projector"], student[-1], teacher[-1])
        return params | _layers(sizes, options)

    options = _options(loss)
    if init:
        options = _options(init) | options
    if projector:
        options["projector"] = projector
    return _tapped(value, options, layers, over=over, init=make, random=random, **fields)


def _layers(sizes: Sizes, options: Options) -> Params:
    """The learned part of a learned layer map: the logits [student layers, teacher layers] of its weights."""
    if options["layers"] != "learned":
        return {}
    return {"layers": jnp.zeros((sizes.student_layers, len(sizes.pairs) // sizes.student_layers))}


def _not_learned(options: Options, why: str) -> None:
    if options["layers"] == "learned":
        raise UserError(f"a learned layer map does not fit a term that {why}: choose another value of layers.")


def _over_layers(values: Sequence[Array], learned: Params, options: Options) -> Array:
    """The mean over pairs of layers: equal, weighted as configured, or with learned weights (each student layer has a
    softmax over the teacher's)."""
    stacked = jnp.stack(values)
    if "layers" in learned:
        shares = jax.nn.softmax(learned["layers"], axis=-1) / learned["layers"].shape[0]
        return jnp.tensordot(shares.reshape(-1), stacked, axes=1)
    weights = jnp.asarray(options["layer_weights"] or (1.0,) * len(values), jnp.float32)
    return jnp.tensordot(weights / jnp.sum(weights), stacked, axes=1)


def _all_pairs(loss: Callable[..., Array], init: Callable[..., Params], layers: str) -> Term:
    """A learned loss that sees all pairs at once."""

    def value(view: View, options: Options) -> Array:
        students, teachers = zip(*view.pairs, strict=True)
        return loss(view.learned, list(students), list(teachers), **_only(loss, options))

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        _not_learned(options, "reads all layers together")
        students, teachers = zip(*sizes.pairs, strict=True)
        return init(key, list(students), list(teachers), **_only(init, options))

    options = _options(init) | _options(loss)
    return _without_layer_weights(_tapped(value, options, layers, init=make))


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
        values.append(relation.fsp(s1, s2, t1, t2, **_only(relation.fsp, options)))
    return jnp.mean(jnp.stack(values), axis=0)


def _projectors(key: Array, sizes: Sizes, options: Options) -> Params:
    _not_learned(options, "relates neighbouring layers")
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
        given = {**_only(loss, options), "labels": labels, "queue": view.memory.get("queue")}
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

    options = {"width": 128, "queue": 0, "by_label": False} | _options(loss)
    options.pop("examples", None)
    return _without_layer_weights(_tapped(value, options, init=make, memory=remember))


# ------------------------------------------------------------------------------------------------ transformers


def _heads(view: View, options: Options) -> list[tuple[Any, Any]]:
    """Queries, keys and values of both models, pair by pair, each [b, heads, tokens, width]."""
    for side in ("student", "teacher"):
        if not options[f"{side}_heads"]:
            raise UserError(f"losses on attention must know its heads: set {side}_heads of the term.")
    split = transformer.split_heads
    return [(split(s, options["student_heads"]), split(t, options["teacher_heads"])) for s, t in view.pairs]


def _attention(loss: Callable[..., Array], parts: int, layers: str, **more: Any) -> Term:
    """A loss of queries, keys (and values), taken from the taps of the joint projection.

    ``student_heads`` and ``teacher_heads`` of 0 are those of the models, where kdjax knows them.
    """

    def value(view: View, options: Options) -> Array:
        if not options.get("relation_heads", 1):
            options = {**options, "relation_heads": options["student_heads"]}
        values = [loss(s[:parts], t[:parts], None, **_only(loss, options)) for s, t in _heads(view, options)]
        return _over_layers(values, view.learned, options)

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        return _layers(sizes, options)

    options = _options(loss) | {"student_heads": 0, "teacher_heads": 0} | more
    return _tapped(value, options, layers, taps=QKV, init=make)


# ------------------------------------------------------------------------------------------------ self-taught


def _exits(view: View, options: Options) -> Array:
    taps = [student for student, _ in view.pairs]
    return self_taught.exits(view.learned, taps, view.logits, view.labels, **_only(self_taught.exits, options))


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
    value = self_taught.mutual(jnp.stack(scores), view.labels, **_only(self_taught.mutual, options))
    return value, jax.lax.stop_gradient(states)


def _init_peers(part: str) -> Callable[[Array, Sizes, Options], Any]:
    def init(key: Array, sizes: Sizes, options: Options) -> Any:
        if not sizes.peers:
            raise UserError("losses.mutual needs students that learn beside the student: name one or more in peers.")
        return {str(i): peer.init(jax.random.fold_in(key, i))[part] for i, peer in enumerate(sizes.peers)}

    return init


def _ema(view: View, options: Options) -> Array:
    assert view.ema_logits is not None, "make_train_step runs the moving average for terms that read it"
    return response.kl(view.logits, jax.lax.stop_gradient(view.ema_logits), temperature=options["temperature"])


TERMS: dict[str, Term] = {
    # Response: what the models score.
    "ce": _labels(response.cross_entropy),
    "kl": _soft(partial(response.kl, direction="forward")),
    "reverse_kl": _soft(partial(response.kl, direction="reverse")),
    "js": _soft(response.jensen_shannon),
    "skew_kl": _soft(partial(response.skew_kl, direction="forward")),
    "skew_reverse_kl": _soft(partial(response.skew_kl, direction="reverse")),
    "logits_mse": _soft(response.logits_mse),
    "standardised_kl": _soft(response.standardised_kl),
    "total_variation": _soft(response.total_variation),
    "dist": _soft_batch(response.dist),
    "dkd": _soft_labels(response_labels.dkd),
    "nkd": _soft_labels(response_labels.nkd),
    "wsld": _soft_labels(response_labels.weighted_soft_labels),
    "teacher_free": _labels(response_labels.teacher_free),
    "curriculum_kl": Term(
        lambda view, options: self_taught.curriculum_temperature(
            view.learned, view.logits, view.teacher_logits, **_only(self_taught.curriculum_temperature, options)
        ),
        _options(self_taught.curriculum_temperature),
        init=lambda key, sizes, options: {"temperature": jnp.ones(())},
    ),
    # Features: what the layers hold.
    "fitnets": _pairwise(feature_learned.fitnets, init=feature_learned.init_fitnets, layers="middle"),
    "attention_transfer": _pairwise(feature.attention_transfer, layers="uniform"),
    "nst": _pairwise(feature.nst),
    "factor_transfer": _pairwise(feature_learned.factor_transfer, init=feature_learned.init_factor_transfer),
    "vid": _pairwise(feature_learned.vid, init=feature_learned.init_vid, layers="uniform"),
    "review": _all_pairs(feature_learned.review, feature_learned.init_review, layers="uniform"),
    "mgd": _pairwise(feature_learned.mgd, init=feature_learned.init_mgd, random=True),
    "simkd": _pairwise(feature.simkd, prepare=projectors.pool, projector="linear"),
    # Relations: between examples, channels or layers.
    "cka": _pairwise(relation.cka, over="batch"),
    "pkt": _pairwise(relation.pkt, over="batch", prepare=projectors.pool),
    "rkd_distance": _pairwise(relation.rkd_distance, over="batch", prepare=projectors.pool),
    "rkd_angle": _pairwise(relation.rkd_angle, over="batch", prepare=projectors.pool),
    "similarity": _pairwise(relation.similarity_preserving, over="batch"),
    "correlation": _pairwise(relation.correlation_congruence, over="batch", prepare=projectors.pool),
    "fsp": _without_layer_weights(
        _tapped(_fsp, _options(relation.fsp) | {"projector": "linear"}, "uniform", init=_projectors)
    ),
    "ickd": _pairwise(relation.ickd, projector="linear"),
    # Contrast.
    "crd": _contrastive(contrastive.crd),
    "infonce": _contrastive(contrastive.infonce),
    # Transformers.
    "tinybert_attention": _attention(transformer.tinybert_attention, 2, "uniform"),
    "tinybert_hidden": _pairwise(transformer.tinybert_hidden, init=transformer.init_tinybert_hidden, layers="uniform"),
    "distilbert_cosine": _pairwise(transformer.distilbert_cosine, projector="none"),
    "minilm": _attention(transformer.minilm, 3, "final"),
    "minilmv2": _attention(transformer.minilmv2, 3, "final", relation_heads=0),
    # The student's own: its moving average, its past, its exits, its peers.
    "ema_kl": Term(_ema, {"temperature": 1.0}, reads="ema"),
    "past_predictions": Term(
        _past,
        _options(self_taught.past_predictions),
        reads="student",
        memory=lambda key, sizes, options: {"predictions": jnp.zeros((sizes.examples, sizes.classes))},
    ),
    "exits": Term(
        _exits,
        {"student_taps": (), "hidden": 64, **_options(self_taught.exits)},
        reads="student",
        init=_init_exits,
        taps=BLOCKS,
    ),
    "mutual": Term(
        _mutual,
        _options(self_taught.mutual),
        reads="student",
        init=_init_peers("params"),
        memory=_init_peers("state"),
        random=True,
    ),
}

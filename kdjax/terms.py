"""Terms: how a loss of ``kdjax.losses`` takes part in an objective. ``catalogue`` names them all.

A loss is a function of arrays and knows nothing of models; a term says what it reads of a step (scores, labels, taps),
which options it has, and what it learns or remembers. Options with a float as default are traced: a new value never
recompiles. The others (names, flags, sizes) are part of the program.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import projectors
from kdjax.losses.transformer import mix_layers
from kdjax.model import Array, Model, Params, Signal

Shape = tuple[int, ...]
Options = Mapping[str, Any]


class View(NamedTuple):
    """What a term may look at in a step: n positions, which are examples, or the tokens of sequences in a row.

    Attributes:
      logits: [n, classes], the student's; ``None`` for a term that reads taps alone.
      teacher_logits: ``teacher_logits(temperature) -> [n, classes]``, all teachers together.
      labels: int32 [n], -1 where unlabelled.
      batch: the whole batch.
      valid: float32 [n], 0 for padding.
      labelled: float32 [n], 0 where the label is unknown.
      signal: what the teacher said when it was asked before, where that is all there is of it.
      pairs: the student's and the teacher's features, pair by pair.
      learned: what the term learns.
      memory: what the term remembers from step to step.
      key: of this step's randomness.
      ema_logits: [n, classes] of the student's moving average, where a term reads them.
      peers: the models that learn beside the student; their weights are what the term that runs them learns.
    """

    logits: Any
    teacher_logits: Callable[[Any], Array]
    labels: Array
    batch: Mapping[str, Array]
    valid: Array
    labelled: Array
    signal: Signal | None = None
    pairs: Sequence[tuple[Array, Array]] = ()
    learned: Params = MappingProxyType({})  # type: ignore[assignment]
    memory: Any = None
    key: Any = None
    ema_logits: Array | None = None
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
      reads: "labels", "logits" (the teachers'), "signal" (the same, of which its likeliest classes are enough), "both",
        "taps" (of student and main teacher), "student" (its own outputs and taps) or "ema" (its moving average).
      over: "example" or "batch"; the latter compares the examples of a batch with each other.
      init: ``init(key, sizes, options) -> params``, where the term learns something.
      memory: ``memory(key, sizes, options) -> arrays``, where it remembers something.
      taps: a regex of the modules that are tapped unless the config names some.
      layers: how layers are mapped unless the config says so (see ``taps.pairs_of``).
      random: whether its value depends on the step's key.
      sequences: whether its features are those of whole sequences, whose tokens it relates.
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
    sequences: bool = False

    @property
    def on_labels(self) -> bool:
        """Whether only labelled examples count."""
        return self.reads in ("labels", "both")

    @property
    def uses_teacher(self) -> bool:
        """Whether the teachers must run."""
        return self.reads in ("logits", "signal", "both", "taps")


BLOCKS = r"^(.*\.)?blocks\.\d+$"


# ------------------------------------------------------------------------------------- from functions to terms


def options_of_loss(loss: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a loss's keyword-only arguments, which are the options of its term."""
    parameters = inspect.signature(loss).parameters.values()
    fixed = getattr(loss, "keywords", {})
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return {name: value for name, value in found.items() if value is not None and name not in fixed}


def only(loss: Callable[..., Any], options: Options) -> dict[str, Any]:
    """Of the options, those that the loss takes: the others belong to the term (taps, projectors)."""
    names = inspect.signature(loss).parameters
    return {name: value for name, value in options.items() if name in names}


def from_labels(loss: Callable[..., Array]) -> Term:
    """A loss of logits and labels."""
    return Term(lambda view, options: mixed(loss, view.logits, view, options), options_of_loss(loss), reads="labels")


def mixed(loss: Callable[..., Array], logits: Array, view: View, options: Options) -> Array:
    """A label loss where mixup or cutmix may have blended two labels: the same blend of the two losses."""
    options = only(loss, options)
    first = loss(logits, view.labels, **options)
    if "mix" not in view.batch:
        return first
    return view.batch["mix"] * first + (1.0 - view.batch["mix"]) * loss(logits, view.batch["mixed_labels"], **options)


def from_scores(loss: Callable[..., Array]) -> Term:
    """A loss of the student's and the teacher's logits."""

    def value(view: View, options: Options) -> Array:
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, **only(loss, options))

    return Term(value, options_of_loss(loss))


def from_scores_of_batch(loss: Callable[..., Array]) -> Term:
    """A loss of both models' logits that compares the examples of a batch."""

    def value(view: View, options: Options) -> Array:
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, view.valid, **only(loss, options))

    return Term(value, options_of_loss(loss), over="batch")


def from_scores_and_labels(loss: Callable[..., Array]) -> Term:
    """A loss of both models' logits and the labels; blended labels count by their larger part."""

    def value(view: View, options: Options) -> Array:
        labels = view.labels
        if "mix" in view.batch:
            labels = jnp.where(view.batch["mix"] >= 0.5, labels, view.batch["mixed_labels"])
        teacher = view.teacher_logits(options.get("temperature", 1.0))
        return loss(view.logits, teacher, labels, **only(loss, options))

    return Term(value, options_of_loss(loss), reads="both")


def tapped(value: Callable[..., Any], options: Mapping[str, Any], layers: str = "final", **fields: Any) -> Term:
    """A term over pairs of taps, with the options that all of them have."""
    common = {"student_taps": (), "teacher_taps": (), "layers": layers, "layer_weights": ()}
    return Term(value, {**common, **options}, reads="taps", **{"taps": BLOCKS, **fields})


def without_layer_weights(term: Term) -> Term:
    """The term without the option of a weight for each pair of layers, for one that takes all pairs together."""
    return term._replace(options={name: value for name, value in term.options.items() if name != "layer_weights"})


def from_pairs(
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
        return loss(*arguments, **only(loss, options))

    def value(view: View, options: Options) -> Array:
        values = [one(view, options, i, *pair) for i, pair in enumerate(view.pairs)]
        return over_layers(values, view.learned, options)

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        params: Params = {}
        for index, pair in enumerate(sizes.pairs):
            student, teacher = (jax.eval_shape(prepare, jax.ShapeDtypeStruct(s, jnp.float32)).shape for s in pair)
            own = jax.random.fold_in(key, index)
            if init:
                params[str(index)] = init(own, student, teacher, **only(init, options))
            elif projector:
                params[str(index)] = projectors.init(own, options["projector"], student[-1], teacher[-1])
        return params | learned_map(sizes, options)

    options = options_of_loss(loss)
    if init:
        options = options_of_loss(init) | options
    if projector:
        options["projector"] = projector
    return tapped(value, options, layers, over=over, init=make, random=random, **fields)


def learned_map(sizes: Sizes, options: Options) -> Params:
    """The learned part of a learned layer map: the logits [student layers, teacher layers] of its weights."""
    if options["layers"] != "learned":
        return {}
    return {"layers": jnp.zeros((sizes.student_layers, len(sizes.pairs) // sizes.student_layers))}


def no_learned_map(options: Options, why: str) -> None:
    """Raises a UserError where a learned layer map is asked of a term that has no use for one."""
    if options["layers"] == "learned":
        raise UserError(f"a learned layer map does not fit a term that {why}: choose another value of layers.")


def over_layers(values: Sequence[Array], learned: Params, options: Options) -> Array:
    """The mean over pairs of layers: equal, weighted as configured, or with learned weights (each student layer has a
    softmax over the teacher's)."""
    stacked = jnp.stack(values)
    if "layers" in learned:
        grid = stacked.reshape(*learned["layers"].shape, -1)  # a loss of the whole batch is one number per pair
        return mix_layers(learned["layers"], grid).reshape(stacked.shape[1:])
    weights = jnp.asarray(options["layer_weights"] or (1.0,) * len(values), jnp.float32)
    return jnp.tensordot(weights / jnp.sum(weights), stacked, axes=1)


def from_all_pairs(loss: Callable[..., Array], init: Callable[..., Params], layers: str) -> Term:
    """A learned loss that sees all pairs at once."""

    def value(view: View, options: Options) -> Array:
        students, teachers = zip(*view.pairs, strict=True)
        return loss(view.learned, list(students), list(teachers), **only(loss, options))

    def make(key: Array, sizes: Sizes, options: Options) -> Params:
        no_learned_map(options, "reads all layers together")
        students, teachers = zip(*sizes.pairs, strict=True)
        return init(key, list(students), list(teachers), **only(init, options))

    options = options_of_loss(init) | options_of_loss(loss)
    return without_layer_weights(tapped(value, options, layers, init=make))

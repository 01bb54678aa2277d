"""The objective: the weighted sum of named terms, each a loss over the valid examples of a batch.

A term over examples is summed over the batch and divided by the *global* number of valid examples, so neither gradient
accumulation nor data parallelism changes what is minimised. A term over the batch (a relation between examples) is one
number per batch; with gradient accumulation it is the mean over the parts, each of which relates its own examples.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import chunks, losses, weighting
from kdjax.catalogue import TERMS
from kdjax.chunks import Layout, Positions
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Model, Outputs, Signal, Variables, logits_of
from kdjax.taps import Network, Pairs, pairs_of
from kdjax.terms import Sizes, Term, View

Batch = Mapping[str, Array]
Hparams = Mapping[str, Any]
NOTHING: Variables = {"params": {}, "state": {}}
COMBINATIONS = ("probabilities", "logits", "confidence", "routed")
# What a batch may hold of each position, beside what the models take: [b], or [b, t] where labels are those of tokens.
_OF_POSITIONS = ("labels", "mask", "mix", "mixed_labels", "domain")


class Objective(NamedTuple):
    """A loss to minimise.

    Attributes:
      hparams: the value of every number of the objective by name, such as ``"kl.temperature"``: numbers, or the
        schedules that the config gave. They are arguments of ``loss``, so a new value never recompiles.
      counts: ``counts(batch) -> {name: number of valid examples}`` for every term and metric.
      init: ``init(key) -> {"params": ..., "state": ...}``: what the objective learns beside the student (projectors,
        weights) and what it remembers (queues, past predictions); both empty for most.
      loss: ``loss(student, teachers, batch, hparams, counts, learned, key, ema) -> (scalar, ({name: sum}, new
        state))``, ``ema`` being the outputs of the student's moving average. With ``batch`` a part of the examples that
        ``counts`` counted, the scalars of all parts add up to the loss of the whole.
      uses_teacher: whether any term needs the teachers' outputs.
      uses_ema: whether any term needs the scores of the student's moving average.
      student_taps: the modules of the student whose outputs ``loss`` needs.
      teacher_taps: the same of the first teacher.
      terms: every term in use with all its options.
    """

    hparams: dict[str, Any]
    counts: Callable[[Batch], dict[str, Array]]
    init: Callable[[Array], Variables]
    loss: Callable[..., tuple[Array, tuple[dict[str, Array], dict[str, Any]]]]
    uses_teacher: bool
    uses_ema: bool = False
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    terms: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class Setting(NamedTuple):
    """What an objective must know of a run to build terms that look into models or remember examples."""

    student: Network = Network({})
    teacher: Network = Network({})  # the first one
    classes: int = 0
    examples: int = 0  # of the student's training split
    epoch_steps: int = 1
    peers: tuple[Model, ...] = ()  # that learn beside the student
    sequences: bool = False  # whether positions are tokens, labels and features [b, t, ...]
    signals: bool = False  # whether the teacher was asked before and gives sparse signals
    tokens_per_chunk: int = 0  # of a device, where logits are made chunk by chunk; 0: by a fixed budget
    layout: Layout | None = None  # of the batch on the mesh; None: one device, or left to the compiler


class _Active(NamedTuple):
    """A term in use: its kind, all its options, those that are no traced numbers, and the taps that it reads."""

    term: Term
    options: dict[str, Any]
    static: dict[str, Any]
    numbers: tuple[str, ...]
    pairs: Pairs

    @property
    def by_position(self) -> bool:
        """Whether it reads nothing but scores and labels, of one position at a time."""
        term = self.term
        parts = (term.init, term.memory, term.taps, term.random)
        return term.over == "example" and term.reads != "student" and not any(parts)

    @property
    def at_start(self) -> dict[str, Any]:
        """The options that its learned parts begin with; a schedule gives way to the default."""
        return {k: v for k, v in self.options.items() if not isinstance(v, Mapping)} | self.static


# Where each option makes sense, where that is not "0 or more". The losses see traced values, so this is the only place
# that can refuse one.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("above 0", lambda value: value > 0),
    "beta": ("between 0 and 1, without the ends", lambda value: 0 < value < 1),
    "skew": ("from 0 to less than 1", lambda value: 0 <= value < 1),
    "label_smoothing": ("from 0 to less than 1", lambda value: 0 <= value < 1),
    "correct": ("between 0 and 1, without the ends", lambda value: 0 < value < 1),
    "mask_ratio": ("from 0 to less than 1", lambda value: 0 <= value < 1),
    "share": ("from 0 to 1", lambda value: 0 <= value <= 1),
}
_KEY_SHAPE = jax.eval_shape(lambda: jax.random.key(0))
_NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)


def options_of(term: Term) -> dict[str, Any]:
    """A term's options with their defaults, those that all such terms have included."""
    weighs_examples = term.over == "example" and term.reads in ("labels", "logits", "both", "taps")
    return {**({"examples": "all"} if weighs_examples else {}), **term.options}


def default_losses() -> dict[str, dict[str, Any]]:
    """Every term switched off (weight 0) with the default of each option: what a config starts from."""
    return {name: {"weight": 0.0, **options_of(term)} for name, term in TERMS.items()}


def make_objective(
    terms: Mapping[str, Mapping[str, Any]],
    teacher_weights: Mapping[str, float] | None = None,
    combine: str = "probabilities",
    *,
    setting: Setting | None = None,
    balance: str = "fixed",
) -> Objective:
    """Builds the objective from ``{term: {"weight": ..., option: ...}}``.

    Args:
      terms: the terms by name (``catalogue.TERMS``); each number may be a schedule (see ``schedules``). A term with
        weight 0 is left out.
      teacher_weights: the weight of each teacher by name; ``None`` for one teacher.
      combine: how several teachers' scores become one (:data:`COMBINATIONS`): the mean of their probabilities (at the
        term's temperature) or of their logits; or probabilities weighted for each example, by how well a teacher knows
        its label ("confidence") or by the batch's ``domain``, the number of the teacher to ask ("routed").
      setting: of the run; needed by terms that tap, learn or remember.
      balance: how terms are weighed among each other beside their weights (``weighting.BALANCES``).

    Returns:
      The objective over batches with ``labels`` [b] int32 (-1: unlabelled) and, where there is padding, ``mask`` [b].

    Raises:
      UserError: an unknown term or option, a tap that does not exist, features that a term cannot compare, or no term
        at all.
    """
    setting = setting or Setting()
    hparams: dict[str, Any] = {}
    active: dict[str, _Active] = {}
    for name, options in terms.items():
        if name not in TERMS:
            raise unknown("loss term", name, TERMS)
        if options.get("weight", 1.0) == 0:
            continue
        active[name], numbers = _activate(name, TERMS[name], options, setting)
        hparams |= {f"{name}.{option}": value for option, value in numbers.items()}
    if not active:
        raise UserError("the objective has no term: set the weight of at least one, for example losses.ce.weight=1.")
    if combine not in COMBINATIONS:
        raise unknown("way to combine teachers", combine, COMBINATIONS)
    uses_teacher = any(one.term.uses_teacher or one.static.get("examples", "all") != "all" for one in active.values())
    # Only where they are there anyway: the scores of a teacher whose features are learned from are never made.
    compares = any(
        one.by_position
        and (one.term.reads in ("logits", "signal", "both") or one.static.get("examples", "all") != "all")
        for one in active.values()
    )
    if uses_teacher and teacher_weights and len(teacher_weights) > 1:
        hparams |= {f"teacher.{name}": float(weight) for name, weight in teacher_weights.items()}
    if setting.signals:
        _check_signals(active)
    weighting.init_balance(balance, list(active))  # refuses an unknown one
    _try(active, setting)

    def counts(batch):
        valid = _valid(batch)
        labelled = valid * _is_labelled(batch)
        per_term = {name: labelled if one.term.on_labels else valid for name, one in active.items()}
        shares = {"accuracy": labelled} | ({"agreement": valid} if compares else {})
        return {name: jnp.sum(weight) for name, weight in (per_term | shares).items()}

    def init(key):
        params, state = {}, {}
        for index, (name, one) in enumerate(active.items()):
            own = jax.random.fold_in(key, index)
            sizes = _sizes(one, setting)
            made = one.term.init(own, sizes, one.at_start) if one.term.init else {}
            if made:
                params[name] = made
            if one.term.memory:
                state[name] = one.term.memory(own, sizes, one.at_start)
        learned, memory = weighting.init_balance(balance, list(active))
        params |= {"balance": learned} if learned else {}
        state |= {"balance": memory} if memory else {}
        return {"params": params, "state": state}

    def loss(
        student: Outputs,
        teachers: Mapping[str, Outputs],
        batch: Batch,
        hparams: Hparams,
        counts: Mapping[str, Array],
        learned: Variables = NOTHING,
        key: Array | None = None,
        ema: Outputs | None = None,
    ):
        factors, constant = weighting.balance_factors(balance, list(active), learned["params"], learned["state"])
        coefficients = {
            name: factors[name] * hparams[f"{name}.weight"] / jnp.maximum(counts[name], 1.0) for name in active
        }
        state = dict(learned["state"])

        def sums_of(positions: Positions, hparams: Hparams) -> dict[str, Array]:
            """Of every term that takes one position at a time."""
            view = _view(positions, tuple(teachers), hparams, combine)
            sums = {name: _sum(name, one, view, hparams)[0] for name, one in active.items() if one.by_position}
            choice = _likeliest(view.logits)
            sums["accuracy"] = jnp.sum(view.valid * view.labelled * (choice == view.labels))
            if compares:
                sums["agreement"] = jnp.sum(view.valid * (choice == _first_choice(view)))
            return sums

        past = None if ema is None else jax.lax.stop_gradient(ema)
        said = tuple(outputs._replace(taps={}) for outputs in teachers.values())
        positions = Positions(student, said, past, batch)
        alone = positions._replace(batch={name: batch[name] for name in _OF_POSITIONS if name in batch})
        shared = {name: value for name, value in hparams.items() if not name.endswith(".weight")}
        linear = {name: value for name, value in coefficients.items() if active[name].by_position}
        total, sums = chunks.weighted_sums(sums_of, linear, alone, shared, _chunks(student, setting), setting.layout)
        for index, (name, one) in enumerate(active.items()):
            if one.by_position:
                continue
            view = _view(positions, tuple(teachers), hparams, combine, scores=one.term.reads != "taps")._replace(
                pairs=_features(one, student, teachers, batch, setting.sequences),
                learned=learned["params"].get(name, {}),
                memory=state.get(name),
                key=jax.random.fold_in(jax.random.key(0) if key is None else key, index),
                peers=setting.peers,
            )
            sums[name], memory = _sum(name, one, view, hparams)
            if one.term.memory:
                state[name] = memory
            total += coefficients[name] * sums[name]
        if balance == "dwa":
            means = {name: sums[name] / jnp.maximum(counts[name], 1.0) for name in active}
            state["balance"] = weighting.dwa_remember(state["balance"], means, setting.epoch_steps)
        return total + constant, (sums, state)

    return Objective(
        hparams,
        counts,
        init,
        loss,
        uses_teacher=uses_teacher,
        uses_ema=any(one.term.reads == "ema" for one in active.values()),
        student_taps=_unique(s for one in active.values() for s, _ in one.pairs.pairs),
        teacher_taps=_unique(t for one in active.values() for _, t in one.pairs.pairs if t is not None),
        terms={name: one.options for name, one in active.items()},
    )


# ------------------------------------------------------------------------------------------------------ building


def _activate(name: str, term: Term, given: Mapping[str, Any], setting: Setting) -> tuple[_Active, dict[str, Any]]:
    """A term with its options sorted: numbers, which are traced, and the rest; and its taps found."""
    defaults = {"weight": 1.0, **options_of(term)}
    for option in given:
        if option not in defaults:
            raise unknown(f"option of losses.{name}", option, defaults)
    values = {**defaults, **given}
    numbers = {option: values[option] for option, default in defaults.items() if isinstance(default, float)}
    for option, value in numbers.items():
        check_range(f"losses.{name}.{option}", option, value)
    static = {option: value for option, value in values.items() if option not in numbers}
    if static.get("examples", "all") not in ("all", *weighting.EXAMPLE_WEIGHTS):
        raise unknown(f"losses.{name}.examples", static["examples"], ["all", *weighting.EXAMPLE_WEIGHTS])
    for side, network in (("student", setting.student), ("teacher", setting.teacher)):
        if not static.get(f"{side}_heads", 1):
            static[f"{side}_heads"] = network.heads
    pairs = Pairs([], 0)
    if term.taps:
        pairs = pairs_of(name, term, static, setting.student, setting.teacher if term.reads == "taps" else None)
    return _Active(
        term, values | static, static, tuple(option for option in numbers if option != "weight"), pairs
    ), numbers


def _check_signals(active: Mapping[str, _Active]) -> None:
    """Refuses what needs more of the teacher than a cache holds."""
    for name, one in active.items():
        if one.term.uses_teacher and one.term.reads != "signal":
            able = ", ".join(sorted(key for key, term in TERMS.items() if term.reads == "signal"))
            raise UserError(
                f"losses.{name} needs all that the teacher says, and teacher.cache holds its likeliest classes: use "
                f"losses.{able}, or leave out teacher.cache."
            )
        if one.static.get("examples", "all") != "all":
            raise UserError(
                f"losses.{name}.examples={one.static['examples']} needs the teacher's scores: with teacher.cache set "
                "it to all."
            )


def _sizes(one: _Active, setting: Setting) -> Sizes:
    apart = setting.sequences and not one.term.sequences

    def shape(network: Network, tap: str | None) -> tuple[int, ...]:
        found = network.taps[tap] if tap else ()
        return _one_token(found) if apart and len(found) > 1 else found

    pairs = [(shape(setting.student, s), shape(setting.teacher, t)) for s, t in one.pairs.pairs]
    return Sizes(pairs, one.pairs.student_layers, setting.classes, setting.examples, setting.peers)


def _try(active: Mapping[str, _Active], setting: Setting) -> None:
    """Shapes each term that reads taps once, so that features that do not fit are refused before any device time."""
    for name, one in active.items():
        sizes = _sizes(one, setting)
        if not one.pairs.pairs:
            if one.term.init:
                jax.eval_shape(lambda key, one=one, sizes=sizes: one.term.init(key, sizes, one.at_start), _KEY_SHAPE)
            continue
        batch = (sizes.pairs[0][0] or (1,))[0]
        scores, rows = jnp.zeros((batch, max(setting.classes, 2))), jnp.zeros(batch)

        def value(key, one=one, sizes=sizes, scores=scores, rows=rows):
            blank = lambda shape: jnp.zeros(shape)
            view = View(
                logits=scores,
                teacher_logits=lambda temperature: scores,
                labels=rows.astype(jnp.int32),
                batch={"id": rows.astype(jnp.int32)},
                valid=rows,
                labelled=rows,
                pairs=[(blank(s), blank(t)) for s, t in sizes.pairs],
                learned=one.term.init(key, sizes, one.at_start) if one.term.init else {},
                memory=one.term.memory(key, sizes, one.at_start) if one.term.memory else None,
                key=key,
            )
            return one.term.loss(view, one.static | dict.fromkeys(one.numbers, 0.5))

        try:
            jax.eval_shape(value, _KEY_SHAPE)
        except UserError as error:
            joined = ", ".join(
                f"{s} {list(a)} and {t} {list(b)}" for (s, t), (a, b) in zip(one.pairs.pairs, sizes.pairs, strict=True)
            )
            raise UserError(f"losses.{name} cannot compare {joined}: {error}") from error


def _unique(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def check_range(path: str, option: str, spec: Any) -> None:
    """Refuses a number, or a schedule that passes through one, for which the loss has no meaning."""
    numbers = [spec]
    if isinstance(spec, Mapping):
        numbers = [spec[key] for key in ("init", "end", "value") if key in spec] + list(spec.get("values", ()))
        if spec.get("schedule") == "cosine":
            numbers.append(spec.get("end", 0.0))
        if any(key.startswith("warmup_") and key != "warmup_init" for key in spec):
            numbers.append(spec.get("warmup_init", 0.0))
    allowed, holds = _RANGES.get(option, _NOT_NEGATIVE)
    for number in numbers:
        if isinstance(number, int | float) and not holds(number):
            raise UserError(f"{path} is {number} and should be {allowed} (at every step, where it is a schedule).")


# ------------------------------------------------------------------------------------------------------ evaluating


def _view(positions: Positions, names: Sequence[str], hparams: Hparams, combine: str, *, scores: bool = True) -> View:
    """What terms see, all positions in a row: [n], [n, classes]; without scores, for terms that read none."""
    batch, labels = positions.batch, positions.batch["labels"]
    row = lambda x: x.reshape(-1, *x.shape[labels.ndim :])
    of_positions = {name: row(batch[name]) for name in _OF_POSITIONS if name in batch}
    signal = positions.teachers[0].signal if positions.teachers else None
    taught = [row(logits_of(outputs)) for outputs in positions.teachers] if scores and signal is None else []
    return View(
        logits=row(logits_of(positions.student)) if scores else None,
        teacher_logits=lambda temperature: _teacher_logits(names, taught, of_positions, hparams, combine, temperature),
        signal=None if signal is None else Signal(*map(row, signal)),
        labels=row(labels),
        batch={**batch, **of_positions},
        valid=row(_valid(batch)),
        labelled=row(_is_labelled(batch)).astype(jnp.float32),
        ema_logits=row(logits_of(positions.ema)) if scores and positions.ema is not None else None,
    )


def _first_choice(view: View) -> Array:
    """The class that the teachers find most likely, [n]."""
    if view.signal is None:
        return _likeliest(view.teacher_logits(1.0))
    best = jnp.argmax(view.signal.log_probs, axis=-1, keepdims=True)
    return jnp.take_along_axis(view.signal.ids, best, axis=-1)[..., 0]


def _likeliest(logits: Array) -> Array:
    """The class of the largest of logits [n, classes], the lowest among equals; no class where one is NaN.

    XLA's CPU compiler makes vector instructions of two reductions and none of an argmax: a third of its time.
    """
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, classes, logits.shape[1]), axis=-1)


def _sum(name: str, one: _Active, view: View, hparams: Hparams) -> tuple[Array, Any]:
    """A term summed over the positions of a view (a number for the whole batch counts for each of them), and its
    memory."""
    value = one.term.loss(view, one.static | {option: hparams[f"{name}.{option}"] for option in one.numbers})
    value, memory = value if one.term.memory else (value, None)
    if one.term.over == "batch":
        return value * jnp.sum(view.valid), memory
    rows = view.valid * view.labelled if one.term.on_labels else view.valid
    if value.shape != rows.shape:  # one number for a sequence, which each of its tokens has
        value = jnp.repeat(value, rows.size // value.size)
    value = jnp.where(rows > 0, value, 0.0)
    kind = one.static.get("examples", "all")
    if kind != "all":
        weights = weighting.of_examples(kind, view.logits, view.teacher_logits(1.0), view.labels)
        value *= jnp.where(rows > 0, weights, 0.0)
    return jnp.sum(value), memory


def _chunks(student: Outputs, setting: Setting) -> int:
    """How many chunks of tokens the positions are walked over in; those of a model that gives its logits are one."""
    if student.head is None or student.hidden.ndim != 3:
        return 1
    batch, tokens, _ = student.hidden.shape
    return chunks.chunk_count(batch, tokens, student.head.size, setting.layout, setting.tokens_per_chunk)


def _features(
    one: _Active, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch, sequences: bool
) -> list[tuple[Any, Any]]:
    """The pairs of features of a term. Of sequences each token is an example of one token, but for terms that relate
    the tokens of a sequence."""
    taught = next(iter(teachers.values())).taps if teachers else {}
    apart = sequences and not one.term.sequences

    def clean(x: Array) -> Array:
        """Without what padding holds, which would reach the gradients of learned parts as 0 times NaN."""
        if apart:
            x = x.reshape(-1, *_one_token(x.shape)[1:])
        # A token that is in no loss is in sight of others all the same.
        mask = batch.get("segments" if one.term.sequences and "segments" in batch else "mask")
        if mask is None:
            return x
        mask = mask.reshape(-1) > 0 if apart else mask > 0
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, 0)

    return [(clean(student.taps[s]), clean(taught[t]) if t else None) for s, t in one.pairs.pairs]


def _one_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [b * t, 1, ...] of a tap [b, t, ...] in which each token is an example."""
    return (shape[0] * shape[1], 1, *shape[2:])


def combine_teachers(logits: Sequence[Array], weights: Sequence[Any], how: str, temperature: Any = 1.0) -> Array:
    """Several teachers' logits as one, by weights that need not sum to 1; see ``losses.combine_logits``.

    A weight is a number or [b], one for each example."""
    shares = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    return losses.combine_logits(logits, shares, how=how, temperature=temperature)


def _teacher_logits(
    names: Sequence[str], logits: Sequence[Array], batch: Batch, hparams: Hparams, how: str, temperature: Any
) -> Array:
    if len(logits) == 1:
        return logits[0]
    weights = jnp.stack([jnp.asarray(hparams[f"teacher.{name}"], jnp.float32) for name in names])
    if how == "confidence":
        weights = weights[:, None] * weighting.teacher_shares(logits, batch["labels"])
    if how == "routed":
        weights = weighting.routed_shares(len(logits), batch["domain"])
    return combine_teachers(logits, list(weights), "logits" if how == "logits" else "probabilities", temperature)


def _valid(batch: Batch) -> Array:
    return batch["mask"].astype(jnp.float32) if "mask" in batch else jnp.ones(batch["labels"].shape, jnp.float32)


def _is_labelled(batch: Batch) -> Array:
    labelled = batch["labels"] >= 0
    return labelled & (batch["mixed_labels"] >= 0) if "mixed_labels" in batch else labelled

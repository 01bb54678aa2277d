"""The objective: the weighted sum of named terms, each a loss over the valid examples of a batch.

A term is summed over the batch and divided by the *global* number of valid examples, so neither gradient accumulation
nor data parallelism changes what is minimised.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from kdjax import losses
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Outputs

Batch = Mapping[str, Array]
Hparams = Mapping[str, Any]


class Objective(NamedTuple):
    """A loss to minimise.

    Attributes:
      hparams: the value of every number of the objective by name, such as ``"kl.temperature"``: numbers, or the
        schedules that the config gave. They are arguments of ``loss``, so a new value never recompiles.
      counts: ``counts(batch) -> {name: number of valid examples}`` for every term and metric.
      loss: ``loss(student, teachers, batch, hparams, counts) -> (scalar, {name: sum})``. With ``batch`` a part of the
        examples that ``counts`` counted, the scalars of all parts add up to the loss of the whole.
      uses_teacher: whether any term needs the teachers' outputs.
    """

    hparams: dict[str, Any]
    counts: Callable[[Batch], dict[str, Array]]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    uses_teacher: bool


class Term(NamedTuple):
    """A kind of loss term: the function of one example, and the defaults of its options."""

    loss: Callable[..., Array]  # (student_logits, teacher_logits_or_labels, **options) -> [batch]
    options: dict[str, float]
    on_labels: bool = False


_SOFT = {"temperature": 1.0}
# Where each option makes sense. The losses see traced values, so this is the only place that can refuse one.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("0 or more", lambda value: value >= 0),
    "temperature": ("above 0", lambda value: value > 0),
    "beta": ("between 0 and 1, without the ends", lambda value: 0 < value < 1),
    "skew": ("from 0 to less than 1", lambda value: 0 <= value < 1),
    "label_smoothing": ("from 0 to less than 1", lambda value: 0 <= value < 1),
}
TERMS: dict[str, Term] = {
    "ce": Term(losses.cross_entropy, {"label_smoothing": 0.0}, on_labels=True),
    "kl": Term(losses.kl, _SOFT),
    "reverse_kl": Term(partial(losses.kl, direction="reverse"), _SOFT),
    "js": Term(losses.jensen_shannon, _SOFT | {"beta": 0.5}),
    "skew_kl": Term(losses.skew_kl, _SOFT | {"skew": 0.1}),
    "skew_reverse_kl": Term(partial(losses.skew_kl, direction="reverse"), _SOFT | {"skew": 0.1}),
    "logits_mse": Term(losses.logits_mse, {}),
}


def default_losses() -> dict[str, dict[str, float]]:
    """Every term switched off (weight 0) with the default of each option: what a config starts from."""
    return {name: {"weight": 0.0, **term.options} for name, term in TERMS.items()}


def make_objective(
    terms: Mapping[str, Mapping[str, Any]],
    teacher_weights: Mapping[str, float] | None = None,
    combine: str = "probabilities",
) -> Objective:
    """Builds the objective from ``{term: {"weight": ..., option: ...}}``.

    Args:
      terms: the terms by name (:data:`TERMS`); each number may be a schedule (see ``schedules``). A term with weight 0
        is left out.
      teacher_weights: the weight of each teacher by name; ``None`` for one teacher.
      combine: what is averaged over several teachers, ``"probabilities"`` (at the term's temperature) or ``"logits"``.

    Returns:
      The objective over batches with ``labels`` [b] int32 (-1: unlabelled) and, where there is padding, ``mask`` [b].

    Raises:
      UserError: an unknown term or option, or no term at all.
    """
    hparams: dict[str, Any] = {}
    active: dict[str, Term] = {}
    for name, options in terms.items():
        if name not in TERMS:
            raise unknown("loss term", name, TERMS)
        for option in options:
            if option != "weight" and option not in TERMS[name].options:
                raise unknown(f"option of losses.{name}", option, ["weight", *TERMS[name].options])
        values = {"weight": 1.0, **TERMS[name].options, **options}
        if values["weight"] == 0:
            continue
        for option, value in values.items():
            _check_range(f"losses.{name}.{option}", option, value)
        active[name] = TERMS[name]
        hparams |= {f"{name}.{option}": value for option, value in values.items()}
    if not active:
        raise UserError("the objective has no term: set the weight of at least one, for example losses.ce.weight=1.")
    if combine not in ("probabilities", "logits"):
        raise unknown("way to combine teachers", combine, ["probabilities", "logits"])
    uses_teacher = any(not term.on_labels for term in active.values())
    if uses_teacher and teacher_weights and len(teacher_weights) > 1:
        hparams |= {f"teacher.{name}": float(weight) for name, weight in teacher_weights.items()}

    def counts(batch):
        valid = _valid(batch)
        labelled = valid * _is_labelled(batch)
        per_term = {name: labelled if term.on_labels else valid for name, term in active.items()}
        return {name: jnp.sum(weight) for name, weight in {**per_term, "accuracy": labelled}.items()}

    def loss(
        student: Outputs, teachers: Mapping[str, Outputs], batch: Batch, hparams: Hparams, counts: Mapping[str, Array]
    ):
        valid = _valid(batch)
        labelled = valid * _is_labelled(batch)
        total, sums = jnp.zeros((), jnp.float32), {}
        for name, term in active.items():
            options = {option: hparams[f"{name}.{option}"] for option in term.options}
            if term.on_labels:
                per_example = jnp.where(labelled > 0, _mixed(term.loss, student.logits, batch, options), 0.0)
            else:
                teacher = _teacher_logits(teachers, hparams, combine, options.get("temperature", 1.0))
                per_example = jnp.where(valid > 0, term.loss(student.logits, teacher, **options), 0.0)
            sums[name] = jnp.sum(per_example)
            total += hparams[f"{name}.weight"] * sums[name] / jnp.maximum(counts[name], 1.0)
        sums["accuracy"] = jnp.sum(labelled * (jnp.argmax(student.logits, -1) == batch["labels"]))
        return total, sums

    return Objective(hparams, counts, loss, uses_teacher)


def _check_range(path: str, option: str, spec: Any) -> None:
    """Refuses a number, or a schedule that passes through one, for which the loss has no meaning."""
    numbers = [spec]
    if isinstance(spec, Mapping):
        numbers = [spec[key] for key in ("init", "end", "value") if key in spec] + list(spec.get("values", ()))
        if spec.get("schedule") == "cosine":
            numbers.append(spec.get("end", 0.0))
        if any(key.startswith("warmup_") and key != "warmup_init" for key in spec):
            numbers.append(spec.get("warmup_init", 0.0))
    allowed, holds = _RANGES[option]
    for number in numbers:
        if isinstance(number, int | float) and not holds(number):
            raise UserError(f"{path} is {number} and should be {allowed} (at every step, where it is a schedule).")


def combine_teachers(logits: Sequence[Array], weights: Sequence[Any], how: str, temperature: Any = 1.0) -> Array:
    """Several teachers' logits as one, by weights that need not sum to 1; see ``losses.combine_logits``."""
    shares = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    return losses.combine_logits(logits, shares, how=how, temperature=temperature)


def _teacher_logits(teachers: Mapping[str, Outputs], hparams: Hparams, how: str, temperature: Any) -> Array:
    logits = [outputs.logits for outputs in teachers.values()]
    if len(logits) == 1:
        return logits[0]
    return combine_teachers(logits, [hparams[f"teacher.{name}"] for name in teachers], how, temperature)


def _mixed(loss: Callable[..., Array], logits: Array, batch: Batch, options: Mapping[str, Any]) -> Array:
    """A label loss where mixup or cutmix may have blended two labels: the same blend of the two losses."""
    first = loss(logits, batch["labels"], **options)
    if "mix" not in batch:
        return first
    return batch["mix"] * first + (1.0 - batch["mix"]) * loss(logits, batch["mixed_labels"], **options)


def _valid(batch: Batch) -> Array:
    return batch["mask"].astype(jnp.float32) if "mask" in batch else jnp.ones(batch["labels"].shape, jnp.float32)


def _is_labelled(batch: Batch) -> Array:
    labelled = batch["labels"] >= 0
    return labelled & (batch["mixed_labels"] >= 0) if "mixed_labels" in batch else labelled

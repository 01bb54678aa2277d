"""Schedules: config -> a number that depends on the step.

The numbers of a schedule (`params`) are arguments of the compiled step, so new ones never recompile and a grid of them
can be mapped over with `vmap`. Its kind and its lengths are constants of the program.

A schedule of steps 0 … total_steps - 1 gives `init` at the end of its warm-up and would reach `end` at step
total_steps, one past the last update, as optax's schedules do; after its length it holds the last value. Kinds:

- constant: ``init``.
- linear, cosine: from ``init`` to ``end``; cosine is end + (init - end) (1 + cos(π t)) / 2, t in [0, 1] (Loshchilov &
  Hutter 2017, "SGDR", eq. 5).
- step: ``init`` times ``factor`` once for every boundary that has been reached.
- piecewise: ``values[i]``, i being the number of boundaries that have been reached.

Each may start with a linear warm-up from ``warmup_init`` (0) to its first value. Boundaries count from step 0, warm-up
included. A length stands in ``…_steps``, ``…_epochs`` or ``…_percent`` (of total_steps).
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax.errors import UserError, unknown

Array = jax.Array
UNITS = ("steps", "epochs", "percent")


class Schedule(NamedTuple):
    """A number as a function of the step: ``at(params, step) -> float32 scalar``, step an int or int32 scalar."""

    params: dict[str, float | tuple[float, ...]]  # what is traced: the values, by name
    at: Callable[[Mapping[str, Any], Any], Array]


class _Kind(NamedTuple):
    required: tuple[str, ...]
    defaults: dict[str, float]
    length: bool  # runs over a length
    boundaries: bool  # changes at boundaries


_KINDS = {
    "constant": _Kind(("init",), {}, length=False, boundaries=False),
    "linear": _Kind(("init", "end"), {}, length=True, boundaries=False),
    "cosine": _Kind(("init",), {"end": 0.0}, length=True, boundaries=False),
    "step": _Kind(("init",), {"factor": 0.1}, length=False, boundaries=True),
    "piecewise": _Kind(("values",), {}, length=False, boundaries=True),
}


def make(spec: Any, *, total_steps: int, steps_per_epoch: float, name: str = "schedule") -> Schedule:
    """The schedule that a config asks for.

    Args:
        spec: a number, or a mapping such as ``{"schedule": "cosine", "init": 0.1, "warmup_epochs": 5}``; a key whose
            value is None counts as absent.
        total_steps: the updates of the run or stage that the schedule spans.
        steps_per_epoch: updates per epoch, not necessarily whole.
        name: the config key, for messages.

    Returns:
        The schedule; lengths are rounded to whole steps, at least one.

    Raises:
        UserError: unknown kind or key, a missing or mistyped value, lengths or boundaries out of order.
    """
    spec = spec.to_dict() if isinstance(spec, ConfigDict) else spec
    if not isinstance(spec, Mapping):
        value = _number(name, spec)
        return Schedule({"init": value}, lambda params, step: jnp.asarray(params["init"], jnp.float32))

    spec = {key: value for key, value in spec.items() if value is not None}
    kind_name = spec.pop("schedule", "constant")
    if kind_name not in _KINDS:
        raise unknown("schedule", kind_name, _KINDS)
    kind = _KINDS[kind_name]
    _check_keys(name, kind_name, kind, spec)

    params: dict[str, Any] = {
        key: _numbers(f"{name}.{key}", spec[key]) if key == "values" else _number(f"{name}.{key}", spec[key])
        for key in kind.required
    }
    params |= {key: _number(f"{name}.{key}", spec.get(key, default)) for key, default in kind.defaults.items()}

    warmup = steps_of("warmup", spec, total_steps, steps_per_epoch, where=name, zero=True) or 0
    if warmup:
        params["warmup_init"] = _number(f"{name}.warmup_init", spec.get("warmup_init", 0.0))
    if kind.length:
        length = steps_of("length", spec, total_steps, steps_per_epoch, where=name) or total_steps - warmup
        if length <= 0:
            raise UserError(
                f"{name}: a warm-up of {warmup} steps leaves nothing of {total_steps}: shorten the warm-up."
            )
        main = _ramp(kind_name, warmup, length)
    elif kind.boundaries:
        boundaries = _boundaries(name, spec, total_steps, steps_per_epoch, warmup)
        if kind_name == "piecewise" and len(params["values"]) != len(boundaries) + 1:
            raise UserError(
                f"{name}: {len(boundaries)} boundaries need {len(boundaries) + 1} values, not {len(params['values'])}."
            )
        main = _stairs(kind_name, boundaries)
    else:
        main = lambda params, step: jnp.asarray(params["init"], jnp.float32)
    return Schedule(params, _after_warmup(main, warmup) if warmup else main)


def values(schedules: Mapping[str, Schedule]) -> dict[str, dict[str, np.ndarray | np.float32]]:
    """The traced values of several schedules as float32 NumPy scalars and arrays: an argument of the compiled step."""
    as_float32 = lambda value: np.asarray(value, np.float32) if isinstance(value, tuple) else np.float32(value)
    return {name: {key: as_float32(v) for key, v in s.params.items()} for name, s in schedules.items()}


def at(schedules: Mapping[str, Schedule], params: Mapping[str, Mapping[str, Any]], step: Any) -> dict[str, Array]:
    """Every schedule's value at a step, float32 scalars; `params` has the structure of `values(schedules)`."""
    return {name: schedule.at(params[name], step) for name, schedule in schedules.items()}


def steps_of(
    name: str,
    mapping: Mapping[str, Any],
    total_steps: int | None,
    steps_per_epoch: float,
    *,
    where: str = "config",
    zero: bool = False,
) -> int | None:
    """A length from the keys ``{name}_steps``, ``{name}_epochs`` or ``{name}_percent``; bare ``steps`` … if name is "".

    Args:
        name: the length's name, such as "warmup", or "".
        mapping: the config section; None counts as absent.
        total_steps: what percents are of; None where they have no meaning.
        steps_per_epoch: updates per epoch.
        where: the section's name, for messages.
        zero: whether 0 is a valid length.

    Returns:
        Whole steps, at least 1 for a positive length; None if no such key is given.

    Raises:
        UserError: two units at once, not a number, not positive.
    """
    found = _length_key(name, mapping, where)
    if found is None:
        return None
    key, unit = found
    return _in_steps(f"{where}.{key}", mapping[key], unit, total_steps, steps_per_epoch, zero=zero)


def _length_key(name: str, mapping: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    keys = {f"{name}_{unit}" if name else unit: unit for unit in UNITS}
    given = [key for key in keys if key in mapping and mapping[key] is not None]
    if len(given) > 1:
        raise UserError(f"{where} has both {given[0]} and {given[1]}: give the length in one unit.")
    return (given[0], keys[given[0]]) if given else None


def _in_steps(
    where: str, value: Any, unit: str, total_steps: int | None, steps_per_epoch: float, *, zero: bool = False
) -> int:
    number = _number(where, value)
    if number < 0 or (number == 0 and not zero):
        raise UserError(f"{where} is {value!r}: a length must be {'at least 0' if zero else 'positive'}.")
    if unit == "percent" and total_steps is None:
        raise UserError(f"{where}: percent of what is not known here: use steps or epochs.")
    factor = {"steps": 1.0, "epochs": steps_per_epoch, "percent": (total_steps or 0) / 100.0}[unit]
    # A short run must not lose its warm-up or its first boundary to rounding.
    return max(1, round(number * factor)) if number else 0


def _boundaries(
    name: str, spec: Mapping[str, Any], total_steps: int, steps_per_epoch: float, warmup: int
) -> tuple[int, ...]:
    found = _length_key("boundaries", spec, name)
    if found is None:
        raise UserError(f"{name} has no boundaries: give boundaries_steps, boundaries_epochs or boundaries_percent.")
    key, unit = found
    where = f"{name}.{key}"
    steps = tuple(_in_steps(where, b, unit, total_steps, steps_per_epoch) for b in _numbers(where, spec[key]))
    if any(later <= earlier for earlier, later in zip((warmup, *steps), steps, strict=False)):
        raise UserError(
            f"{where} gives steps {list(steps)}: they must increase, and come after the {warmup} warm-up steps."
        )
    return steps


def _ramp(kind: str, begin: int, length: int) -> Callable[..., Array]:
    def value(params: Mapping[str, Any], step: Any) -> Array:
        init, end = jnp.asarray(params["init"], jnp.float32), jnp.asarray(params["end"], jnp.float32)
        progress = jnp.clip((step - begin) / length, 0.0, 1.0)
        remaining = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return end + (init - end) * remaining

    return value


def _stairs(kind: str, boundaries: tuple[int, ...]) -> Callable[..., Array]:
    def value(params: Mapping[str, Any], step: Any) -> Array:
        reached = jnp.sum(step >= jnp.asarray(boundaries, jnp.int32))
        if kind == "piecewise":
            return jnp.asarray(params["values"], jnp.float32)[reached]
        return jnp.asarray(params["init"], jnp.float32) * jnp.asarray(params["factor"], jnp.float32) ** reached

    return value


def _after_warmup(main: Callable[..., Array], warmup: int) -> Callable[..., Array]:
    def value(params: Mapping[str, Any], step: Any) -> Array:
        begin = jnp.asarray(params["warmup_init"], jnp.float32)
        warming = begin + (main(params, 0) - begin) * (step / warmup)
        return jnp.where(step < warmup, warming, main(params, step))

    return value


def _check_keys(name: str, kind_name: str, kind: _Kind, spec: Mapping[str, Any]) -> None:
    lengths = ["warmup"] + ["length"] * kind.length + ["boundaries"] * kind.boundaries
    valid = {
        *kind.required,
        *kind.defaults,
        "warmup_init",
        *(f"{length}_{unit}" for length in lengths for unit in UNITS),
    }
    for key in spec:
        if key not in valid:
            raise unknown(f"key of {name}, a schedule of kind {kind_name!r},", key, valid)
    for key in kind.required:
        if key not in spec:
            raise UserError(f"{name}: a schedule of kind {kind_name!r} needs {key!r}.")


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}: give a finite number.")
    return float(value)


def _numbers(where: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} is {value!r}: give a list of numbers.")
    return tuple(_number(where, v) for v in value)

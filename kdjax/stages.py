"""Stages: where each stretch of a run begins and ends, and which losses and learning rate it has."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kdjax import schedules
from kdjax.errors import UserError, unknown

KEYS = ("steps", "epochs", "percent", "losses", "learning_rate")


class Plan(NamedTuple):
    """A stage, still as config: steps ``start`` up to ``stop``; the learning rate's schedule may begin earlier."""

    start: int
    stop: int
    losses: dict[str, dict[str, Any]]
    learning_rate: Any
    rate_start: int
    rate_stop: int


def make_plan(
    sections: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, Mapping[str, Any]],
    learning_rate: Any,
    total_steps: int,
    steps_per_epoch: float,
) -> list[Plan]:
    """The stages of a run.

    Args:
      sections: ``{name: {"percent"|"epochs"|"steps": ..., "losses": ..., "learning_rate": ...}}``, run in the order of
        their names; empty for a run of one stage. The last may leave out its length.
      losses: what a stage's ``losses`` change.
      learning_rate: a number or schedule over the whole run, for stages without one of their own.
      total_steps: of the run.
      steps_per_epoch: updates per epoch.

    Raises:
      UserError: an unknown key, a stage without a length, or lengths that do not add up to the run.
    """
    plans: list[Plan] = []
    start = 0
    for number, (name, section) in enumerate(sorted(sections.items()) or [("", {})]):
        for key in section:
            if key not in KEYS:
                raise unknown(f"key of stages.{name}", key, KEYS)
        is_last = number >= len(sections) - 1
        given = {unit: section[unit] for unit in schedules.UNITS if unit in section}
        length = schedules.steps_of("", given, total_steps, steps_per_epoch, where=f"stages.{name}")
        if length is None and not is_last:
            raise UserError(f"stages.{name} has no length: give it steps, epochs or percent.")
        stop = total_steps if length is None else start + length
        if is_last and abs(stop - total_steps) <= len(sections):
            stop = total_steps  # percents are rounded to whole steps
        if stop > total_steps or (is_last and stop < total_steps) or stop <= start:
            raise UserError(
                f"the stages up to {name or 'the last'} take {stop} steps and the run has {total_steps}: make their "
                "lengths add up, or leave out the last one's."
            )
        changes = section.get("losses", {})
        merged = {term: {**losses.get(term, {}), **changes.get(term, {})} for term in {**losses, **changes}}
        own = "learning_rate" in section
        plans.append(
            Plan(
                start,
                stop,
                merged,
                section["learning_rate"] if own else learning_rate,
                rate_start=start if own else 0,
                rate_stop=stop if own else total_steps,
            )
        )
        start = stop
    return plans

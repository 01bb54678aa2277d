"""What training leaves of an arm, and what scoring leaves of a run."""

from typing import Any, NamedTuple

from kdjax.model import Variables


class Trained(NamedTuple):
    """A model at its last step: weights to evaluate, steps done, and its speed (``None`` if not trained here)."""

    variables: Variables
    steps: int
    examples_per_s: float | None


class Outcome(NamedTuple):
    """What ``results.json`` holds, and on how many test examples it was measured."""

    results: dict[str, Any]
    test_examples: int


def whole(teachers: dict[str, Trained]) -> Trained:
    """Several teachers as the one that the table shows: all weights, all steps."""
    if len(teachers) == 1:
        return next(iter(teachers.values()))
    parts = {
        part: {name: teacher.variables[part] for name, teacher in teachers.items()} for part in ("params", "state")
    }
    return Trained(parts, sum(teacher.steps for teacher in teachers.values()), None)

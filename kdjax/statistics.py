"""What several seeds say together: Student's t for means and paired differences, and Holm's correction for many tests.

A seed is one draw of initial weights and data order. An interval says what other seeds would give on the same test set;
it does not say what another test set would give.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05  # two-sided; the intervals are its complement, 95 %


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample standard deviation (``None`` for a single value)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def mean_interval(values: Sequence[float], least_sd: float = 0.0) -> dict[str, Any]:
    """Mean and deviation, with the 95 % interval of Student's t: ``{"mean", "sd", "interval_95": [low, high]}``.

    Args:
        values: one per seed, or one difference per seed. A single value has no deviation and no interval: ``None``.
        least_sd: the deviation that the interval assumes where the values show a smaller one. Accuracies are counts: a
            few seeds can agree to the last example by chance, which is no proof that all seeds would.
    """
    found: dict[str, Any] = mean_and_sd(values)
    if found["sd"] is None:
        return {**found, "interval_95": None}
    half = float(stats.t.isf(LEVEL / 2, len(values) - 1)) * _standard_error(found["sd"], len(values), least_sd)
    return {**found, "interval_95": [found["mean"] - half, found["mean"] + half]}


def paired(first: Sequence[float], second: Sequence[float], least_sd: float = 0.0) -> dict[str, Any]:
    """The paired differences ``first - second``: as ``mean_interval``, and ``"p"`` of the two-sided paired t-test.

    Where no difference varies and ``least_sd`` is 0, t is 0/0 or infinite and p its limit: 1 if all differences are 0,
    else 0. A single pair has no p: ``None``.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    found = mean_interval(differences, least_sd)
    if found["sd"] is None:
        return {**found, "p": None}
    error = _standard_error(found["sd"], len(differences), least_sd)
    if error == 0:
        return {**found, "p": 1.0 if found["mean"] == 0 else 0.0}
    return {**found, "p": float(2 * stats.t.sf(abs(found["mean"]) / error, len(differences) - 1))}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values of one family of tests, in the order given; ``None`` is no test and stays ``None``.

    Rejecting where the adjusted value is at most 5 % keeps the chance of any false rejection in the family at 5 %,
    however the tests depend on each other (Holm, "A simple sequentially rejective multiple test procedure", 1979).
    """
    tests = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - rank) * p))
        adjusted[i] = highest
    return adjusted


def visible_difference(sd: float, seeds: int, comparisons: int) -> float:
    """The smallest mean difference that a family of comparisons can call real when no other one is.

    That is where Holm's first and hardest step lies: |t| of the 1 - 5 % / (2 ``comparisons``) quantile. A true
    difference of that size is seen in about half of all such experiments.

    Args:
        sd: the standard deviation of the paired differences.
        seeds: how many pairs there are, at least 2.
        comparisons: the size of the family.
    """
    return float(stats.t.isf(LEVEL / (2 * comparisons), seeds - 1) * _standard_error(sd, seeds, 0.0))


def _standard_error(sd: float, count: int, least_sd: float) -> float:
    return max(sd, least_sd) / math.sqrt(count)

"""Stages: their bounds, what they inherit, and what is refused."""

import itertools

import pytest

from kdjax.errors import UserError
from kdjax.stages import make_plan

LOSSES = {"kl": {"weight": 0.9, "temperature": 4.0}, "ce": {"weight": 0.1}}


def plan(sections, total=100, per_epoch=10.0):
    return make_plan(sections, LOSSES, 0.1, total, per_epoch)


def test_without_sections_there_is_one_stage():
    (only,) = plan({})
    assert (only.start, only.stop, only.losses, only.learning_rate) == (0, 100, LOSSES, 0.1)
    assert (only.rate_start, only.rate_stop) == (0, 100)


def test_units_order_and_inheritance():
    first, second, third = plan(
        {
            "2": {"epochs": 3, "losses": {"kl": {"temperature": 1.0}}, "learning_rate": 0.5},
            "1": {"percent": 20},
            "3": {"losses": {"js": {"weight": 1.0}}},
        }
    )
    assert [(p.start, p.stop) for p in (first, second, third)] == [(0, 20), (20, 50), (50, 100)]
    assert second.losses == {"kl": {"weight": 0.9, "temperature": 1.0}, "ce": {"weight": 0.1}}
    assert third.losses == {**LOSSES, "js": {"weight": 1.0}}
    assert (second.learning_rate, second.rate_start, second.rate_stop) == (0.5, 20, 50)
    assert (third.learning_rate, third.rate_start, third.rate_stop) == (0.1, 0, 100)


def test_percents_that_round_still_fill_the_run():
    plans = plan({str(i): {"percent": 100 / 3} for i in range(3)})
    assert [p.stop for p in plans][-1] == 100
    assert all(a.stop == b.start for a, b in itertools.pairwise(plans))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"a": {"loses": {}}}, "unknown key of stages.a 'loses': did you mean 'losses'"),
        ({"a": {}, "b": {"percent": 50}}, "stages.a has no length"),
        ({"a": {"percent": 60}, "b": {"percent": 60}}, "take 120 steps and the run has 100"),
        ({"a": {"percent": 30}, "b": {"percent": 30}}, "take 60 steps and the run has 100"),
        ({"a": {"steps": 100}, "b": {}}, "take 100 steps and the run has 100"),
        ({"a": {"steps": 10, "epochs": 1}}, "stages.a"),
    ],
)
def test_refusals(sections, message):
    with pytest.raises(UserError, match=message):
        plan(sections)

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdjax import statistics

FIRST = [0.91, 0.93, 0.92, 0.95, 0.90]
SECOND = [0.90, 0.91, 0.905, 0.92, 0.895]


def test_mean_and_sd_by_hand():
    found = statistics.mean_and_sd([1.0, 2.0, 6.0])
    assert found["mean"] == 3.0 and found["sd"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert statistics.mean_and_sd([2.5]) == {"mean": 2.5, "sd": None}


def test_the_interval_is_students():
    found = statistics.mean_interval(FIRST)
    expected = stats.ttest_1samp(FIRST, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(found["interval_95"], expected)
    assert statistics.mean_interval([0.1]) == {"mean": 0.1, "sd": None, "interval_95": None}


def test_the_interval_by_hand():
    """Three values of mean 2 and deviation 1; the quantile of t with 2 degrees of freedom is 4.3027."""
    low, high = statistics.mean_interval([1.0, 2.0, 3.0])["interval_95"]
    assert (low, high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_paired_test_is_scipys(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 3 + seed)).tolist()
    expected = stats.ttest_rel(first, second)
    found = statistics.paired(first, second)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    np.testing.assert_allclose(found["interval_95"], expected.confidence_interval(0.95))
    assert found["mean"] == pytest.approx(np.mean(first) - np.mean(second))
    swapped = statistics.paired(second, first)
    assert swapped["p"] == pytest.approx(found["p"]) and swapped["mean"] == pytest.approx(-found["mean"])


def test_pairs_matter():
    """The same values in another order have the same means, and another p."""
    assert statistics.paired(FIRST, SECOND)["p"] < 0.05 < statistics.paired(FIRST, SECOND[::-1])["p"]


def test_differences_that_do_not_vary():
    assert statistics.paired([0.5, 0.25], [0.5, 0.25]) == {"mean": 0.0, "sd": 0.0, "interval_95": [0.0, 0.0], "p": 1.0}
    equal = statistics.paired([0.75, 0.5], [0.5, 0.25])
    assert equal == {"mean": 0.25, "sd": 0.0, "interval_95": [0.25, 0.25], "p": 0.0}


def test_counts_that_agree_by_chance_prove_nothing():
    """Two seeds that both gain one of 359 examples: t = mean / (least / sqrt(2)) with one degree of freedom."""
    step = 1 / 359
    least = step / math.sqrt(6)
    found = statistics.paired([100 * step, 101 * step], [99 * step, 100 * step], least)
    expected = 1 - 2 / math.pi * math.atan(math.sqrt(2) * math.sqrt(6))  # t with one degree of freedom is Cauchy's
    assert found["p"] == pytest.approx(expected) and found["p"] > 0.15
    low, high = found["interval_95"]
    assert low < 0 < step < high
    assert statistics.paired(FIRST, SECOND, 1e-6) == statistics.paired(FIRST, SECOND)  # these do vary


def test_a_single_pair_has_no_test():
    assert statistics.paired([0.5], [0.25]) == {"mean": 0.25, "sd": None, "interval_95": None, "p": None}


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="shorter"):
        statistics.paired([0.1, 0.2], [0.1])


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never below the one before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_leaves_out_what_was_not_tested():
    assert statistics.holm([None, 0.02, None, 0.04]) == [None, 0.04, None, 0.04]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """Marcus et al. 1976: a hypothesis falls if every intersection that holds it falls, each tested by Bonferroni."""
    count = len(p_values)
    subsets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    closure = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in range(count)]
    assert statistics.holm(p_values) == pytest.approx(closure)


@pytest.mark.parametrize("comparisons", [1, 7])
def test_the_visible_difference_is_where_the_verdict_turns(comparisons):
    shape = np.array([-1.0, 0.5, 2.0, -0.5, -1.0])
    shape /= shape.std(ddof=1)
    edge = statistics.visible_difference(1.0, 5, comparisons)
    nothing = [1.0] * (comparisons - 1)
    for factor, seen in ((0.999, False), (1.001, True)):
        p = statistics.paired((shape + factor * edge).tolist(), [0.0] * 5)["p"]
        assert (statistics.holm([p, *nothing])[0] <= 0.05) == seen


def test_more_seeds_see_more():
    visible = [statistics.visible_difference(0.01, seeds, 20) for seeds in (2, 3, 5, 10)]
    assert (np.diff(visible) < 0).all()

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data import curriculum, pipeline
from kdjax.data.sources import Split
from kdjax.errors import UserError

GROWING = [kind for kind in curriculum.PACINGS if kind != "none"]
FEW = settings(max_examples=30, deadline=None)
SHARES = st.floats(0.01, 1.0)


def _split(n, **more):
    return Split(np.arange(n * 4, dtype=np.float32).reshape(n, 2, 2, 1), np.arange(n, dtype=np.int32) * 10, **more)


def _scores(n, seed=0):
    return np.random.default_rng(seed).permutation(n).astype(np.float32)


def _batches(n=100, *, scores=None, split=None, **options):
    plan = {"pacing": "linear", "start": 0.2, "full_percent": 50.0, "order": "easy_first"}
    common = {"total_steps": 40, "batch_size": 8, "seed": 3}
    scores = _scores(n) if scores is None else scores
    return curriculum.batches(split or _split(n), scores, **plan | common | options)


def _take(count, **options):
    return list(itertools.islice(_batches(**options), count))


def _same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key])


# ------------------------------------------------------------------------------------------------------- the pacing


@FEW
@given(
    kind=st.sampled_from(curriculum.PACINGS),
    examples=st.integers(1, 10**6),
    total=st.integers(1, 300),
    start=SHARES,
    full=st.floats(1.0, 100.0),
)
def test_the_pool_grows_from_its_share_to_all(kind, examples, total, start, full):
    size = lambda step: curriculum.pool_size(kind, step, total, examples, start=start, full_percent=full)
    sizes = [size(step) for step in range(total + 1)]
    assert sizes == sorted(sizes) and sizes[0] >= 1 and sizes[-1] == examples
    assert sizes[0] == (examples if kind == "none" else max(round(start * examples), 1))
    assert all(here == examples for step, here in enumerate(sizes) if 100 * step >= full * total * (1 + 1e-12))


def test_paces_are_those_of_their_formulas():
    at = lambda kind, step, start=0.2: curriculum.pool_size(kind, step, 200, 1000, start=start, full_percent=50.0)
    assert [at("linear", step) for step in (0, 25, 50, 99, 100, 101)] == [200, 400, 600, 992, 1000, 1000]
    assert at("root", 25) == round(1000 * math.sqrt(0.04 + 0.96 / 4)) and at("root", 75) > at("linear", 75)
    # From an eighth there are three doublings, at a third of the way each; the last one brings all.
    assert [at("step", step, 0.125) for step in (0, 33, 34, 66, 67, 99, 100)] == [125, 125, 250, 250, 500, 500, 1000]
    assert [at("step", step, 0.3) for step in (49, 50, 99, 100)] == [300, 600, 600, 1000]
    assert at("none", 0) == 1000


# ------------------------------------------------------------------------------------------------------ the batches


@FEW
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    resumed=st.integers(0, 12),
    pacing=st.sampled_from(curriculum.PACINGS),
    order=st.sampled_from(curriculum.ORDERS),
)
def test_a_run_can_be_resumed_at_any_step(n, batch_size, seed, resumed, pacing, order):
    options = {"n": n, "batch_size": batch_size, "seed": seed, "pacing": pacing, "order": order, "total_steps": 12}
    whole = _take(15, **options)
    for theirs, mine in zip(_take(15 - resumed, start_step=resumed, **options), whole[resumed:], strict=True):
        _same(theirs, mine)


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("order", curriculum.ORDERS)
def test_a_batch_holds_different_examples_of_its_pool(kind, order):
    scores = _scores(100)
    ranked = curriculum.ranking(scores, order, seed=3).tolist()
    for step, batch in enumerate(_take(20, pacing=kind, order=order)):
        pool = set(ranked[: curriculum.pool_size(kind, step, 40, 100, start=0.2, full_percent=50.0)])
        assert set(batch["id"].tolist()) <= pool and len(set(batch["id"].tolist())) == 8
        np.testing.assert_array_equal(batch["inputs"], _split(100).inputs[batch["id"]])
        np.testing.assert_array_equal(batch["labels"], batch["id"] * 10)
        assert {batch[key].dtype for key in ("id", "labels", "epoch")} == {np.dtype(np.int32)}
        np.testing.assert_array_equal(batch["epoch"], step * 8 // 100)


def test_early_batches_are_easier_and_hard_first_is_the_other_way_round():
    scores = np.random.default_rng(1).exponential(size=400)
    mean = {}
    for order in curriculum.ORDERS:
        taken = _take(40, n=400, scores=scores, split=_split(400), batch_size=32, total_steps=40, order=order)
        mean[order] = [scores[batch["id"]].mean() for batch in taken]
    easy, hard, random = (np.array(mean[order]) for order in curriculum.ORDERS)
    assert (np.diff(easy.reshape(4, 10).mean(1)[:2]) > 0).all() and easy[:5].mean() < 0.4 * easy[20:].mean()
    assert hard[:5].mean() > 2 * hard[20:].mean()
    assert abs(random[:10].mean() - scores.mean()) < 0.3 * scores.mean()
    for each in (easy, hard, random):  # all of them go on as the same ordinary epochs
        np.testing.assert_array_equal(each[20:], easy[20:])


@pytest.mark.parametrize("kind", curriculum.PACINGS)
def test_a_full_pool_goes_on_as_the_ordinary_epochs_and_meets_every_example(kind):
    ordinary = list(itertools.islice(pipeline.train_batches(_split(100), batch_size=8, seed=3, start_step=20), 26))
    for mine, theirs in zip(_take(26, pacing=kind, start_step=20), ordinary, strict=True):
        _same(mine, theirs)
    assert set(np.concatenate([batch["id"] for batch in _take(40, pacing=kind)])) == set(range(100))


def test_equal_scores_are_ranked_by_id_and_random_orders_by_seed():
    assert curriculum.ranking([2, 1, 2, 1, 0], "easy_first", 0).tolist() == [4, 1, 3, 0, 2]
    assert curriculum.ranking([2, 1, 2, 1, 0], "hard_first", 0).tolist() == [0, 2, 1, 3, 4]
    orders = [tuple(curriculum.ranking(np.zeros(50), "random", seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(50))


def test_a_batch_larger_than_its_pool_repeats_it_evenly():
    first = next(_batches(n=10, batch_size=8))["id"]  # a pool of 2
    assert sorted(np.bincount(first, minlength=10)[np.argsort(_scores(10))]) == [0] * 8 + [4, 4]
    counts = np.bincount(next(_batches(n=10, batch_size=7, start=0.3))["id"], minlength=10)
    assert sorted(counts[counts > 0]) == [2, 2, 3]


def test_draws_differ_by_step_and_seed():
    drawn = {tuple(batch["id"]) for seed in range(5) for batch in _take(5, seed=seed, start=0.9, pacing="step")}
    assert len(drawn) == 25


def test_processes_share_one_global_batch():
    alone = _take(24)  # beyond the step at which the pool is full
    parts = [_take(24, process_index=index, process_count=4) for index in range(4)]
    for step, batch in enumerate(alone):
        _same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


def test_domains_go_with_their_examples():
    split = _split(100, domain=np.arange(100, dtype=np.int32) % 3)
    for batch in _take(24, split=split):
        np.testing.assert_array_equal(batch["domain"], batch["id"] % 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pacing": "linaer"}, "unknown data.curriculum.pacing 'linaer': did you mean 'linear'"),
        ({"order": "easy_frst"}, "unknown data.curriculum.order 'easy_frst': did you mean 'easy_first'"),
        ({"start": 0.0}, "data.curriculum.start=0.0 is the share"),
        ({"start": 1.5}, "data.curriculum.start=1.5"),
        ({"start": math.nan}, "data.curriculum.start=nan"),
        ({"full_percent": 0.0}, "data.curriculum.full_percent=0.0 is the percent"),
        ({"full_percent": 101}, "data.curriculum.full_percent=101"),
        ({"batch_size": 6, "process_count": 4}, "batch size 6 is not divisible by 4 process"),
        ({"seed": -1}, "seed=-1"),
        ({"scores": np.zeros(99)}, r"scores of shape \(99,\) for 100 examples"),
        ({"scores": np.full(100, np.nan)}, "not NaN"),
    ],
)
def test_what_makes_no_curriculum_is_refused_before_the_first_batch(options, message):
    with pytest.raises(UserError, match=message) as caught:
        _batches(**options)
    assert str(caught.value).endswith(".")

import itertools

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.data import pipeline
from kdjax.data.sources import Split
from kdjax.errors import UserError

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)
FEW = settings(max_examples=25, deadline=None)


def _split(n):
    return Split(np.arange(n * 4, dtype=np.float32).reshape(n, 2, 2, 1), np.arange(n, dtype=np.int32) * 10)


def _take(count, n, **options):
    return list(itertools.islice(pipeline.train_batches(_split(n), **options), count))


def _joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def _same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key])


@FEW
@given(n=SIZES, batch_size=SIZES, seed=SEEDS)
def test_every_epoch_is_a_permutation_and_none_is_dropped(n, batch_size, seed):
    epochs = 3
    batches = _take(-(-epochs * n // batch_size), n, batch_size=batch_size, seed=seed)
    ids, epoch = _joined(batches, "id")[: epochs * n], _joined(batches, "epoch")[: epochs * n]
    np.testing.assert_array_equal(epoch, np.repeat(np.arange(epochs), n))
    for part in ids.reshape(epochs, n):
        assert sorted(part) == list(range(n))
    assert all(len(batch["id"]) == batch_size for batch in batches)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(pipeline.order(50, seed, epoch * 50, 50)[0]) for seed in range(8) for epoch in range(8)]
    assert len(set(orders)) == len(orders)  # also seed s, epoch e + 1 is not seed s + 1, epoch e
    assert tuple(range(50)) not in orders


@FEW
@given(n=SIZES, batch_size=SIZES, seed=SEEDS, start=st.integers(0, 10**6))
def test_a_run_can_be_resumed_at_any_step(n, batch_size, seed, start):
    options = {"batch_size": batch_size, "seed": seed}
    whole = _take(5, n, start_step=start, **options)
    for skipped in (1, 4):
        _same(_take(1, n, start_step=start + skipped, **options)[0], whole[skipped])


@FEW
@given(n=SIZES, seed=SEEDS, step=st.integers(0, 1000))
def test_the_order_is_that_of_grains_dataset(n, seed, step):
    base = int(np.random.SeedSequence(seed).generate_state(1)[0])
    dataset = grain.MapDataset.range(n).shuffle(seed=base).repeat()
    ids, _ = pipeline.order(n, seed, step * 7, 7)
    assert ids.tolist() == [dataset[step * 7 + j] for j in range(7)]


def test_the_order_is_the_same_in_every_release():
    """A run that was begun with an older release resumes in the same order."""
    assert pipeline.order(10, 0, 0, 10)[0].tolist() == [5, 8, 9, 7, 4, 2, 1, 0, 3, 6]


@pytest.mark.parametrize("batches", [pipeline.train_batches, pipeline.eval_batches])
def test_processes_share_one_global_batch(batches):
    options = {"batch_size": 8} | ({"seed": 1, "start_step": 3} if batches is pipeline.train_batches else {})
    alone = list(itertools.islice(batches(_split(19), **options), 3))
    parts = [
        list(itertools.islice(batches(_split(19), process_index=p, process_count=4, **options), 3)) for p in range(4)
    ]
    for step, batch in enumerate(alone):
        _same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


def test_the_blocks_of_processes_are_in_the_order_of_a_global_array():
    """The array that JAX joins from process-local data holds a process's block where its devices are: in order."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = _take(1, 19, batch_size=16, seed=0)[0]
    whole = jax.make_array_from_process_local_data(sharding, batch["id"])
    blocks = [_take(1, 19, batch_size=16, seed=0, process_index=p, process_count=8)[0]["id"] for p in range(8)]
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(shard.data, blocks[shard.device.id])


def test_a_batch_holds_the_examples_that_its_ids_name():
    split = _split(13)
    for batch in _take(4, 13, batch_size=6, seed=2):
        np.testing.assert_array_equal(batch["inputs"], split.inputs[batch["id"]])
        np.testing.assert_array_equal(batch["labels"], split.labels[batch["id"]])
        assert [batch[key].dtype for key in ("labels", "id", "epoch")] == [np.int32] * 3


def test_domains_go_with_their_examples():
    split = _split(13)._replace(domain=np.arange(13, dtype=np.int32) % 3)
    trained = itertools.islice(pipeline.train_batches(split, batch_size=6, seed=2), 4)
    for batch in (*trained, *pipeline.eval_batches(split, batch_size=6)):
        assert batch["domain"].dtype == np.int32
        np.testing.assert_array_equal(batch["domain"], batch["id"] % 3)
        _same(next(pipeline.from_iterable([batch])), batch)
    assert "domain" not in _take(1, 13, batch_size=6, seed=2)[0]


@FEW
@given(n=SIZES, batch_size=SIZES)
def test_evaluation_sees_each_example_once_in_order(n, batch_size):
    batches = list(pipeline.eval_batches(_split(n), batch_size=batch_size))
    mask = _joined(batches, "mask")
    assert mask.dtype == np.float32 and set(mask.tolist()) <= {0.0, 1.0}
    np.testing.assert_array_equal(_joined(batches, "id")[mask > 0], np.arange(n))
    assert all(len(batch["inputs"]) == batch_size for batch in batches)
    assert len(batches) == -(-n // batch_size)


@pytest.mark.parametrize("batches", [pipeline.train_batches, pipeline.eval_batches])
def test_what_cannot_be_batched_is_refused_before_the_first_batch(batches):
    seed = {"seed": 0} if batches is pipeline.train_batches else {}
    with pytest.raises(UserError, match="batch size 6 is not divisible by 4 process"):
        batches(_split(9), batch_size=6, process_count=4, **seed)
    with pytest.raises(UserError, match="batch size 0"):
        batches(_split(9), batch_size=0, **seed)
    with pytest.raises(UserError, match="the split is empty"):
        batches(_split(0), batch_size=6, **seed)
    if seed:
        with pytest.raises(UserError, match="seed=-1"):
            batches(_split(9), batch_size=6, seed=-1)


def test_any_iterable_becomes_batches():
    x, y = np.zeros((5, 2, 2, 1)), np.arange(5)
    first, second = pipeline.from_iterable([(x[:3], y[:3]), {"inputs": x[3:]}])
    assert first["inputs"].dtype == np.float32
    assert {key: first[key].tolist() for key in ("labels", "id", "epoch")} == {
        "labels": [0, 1, 2],
        "id": [0, 1, 2],
        "epoch": [0, 0, 0],
    }
    assert second["labels"].tolist() == [-1, -1] and second["id"].tolist() == [3, 4]
    repeated = list(itertools.islice(pipeline.from_iterable([(x, y)], repeat=True), 3))
    assert [batch["epoch"][0] for batch in repeated] == [0, 1, 2] and repeated[2]["id"].tolist() == [0, 1, 2, 3, 4]
    given_ids = next(pipeline.from_iterable([{"inputs": x, "id": y + 7, "mask": y > 1}]))
    assert given_ids["id"].tolist() == [7, 8, 9, 10, 11] and given_ids["mask"].tolist() == [0, 0, 1, 1, 1]


def test_batches_of_the_pipeline_pass_through_unchanged():
    mine = list(pipeline.eval_batches(_split(7), batch_size=3))
    for theirs, batch in zip(pipeline.from_iterable(mine), mine, strict=True):
        _same(theirs, batch)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((3, 4))], "batch 0 is a ndarray"),
        ([(np.zeros((3, 4)), np.zeros(2, int))], r"3 inputs, but labels of shape \(2,\)"),
        ([(np.zeros((3, 4)), np.zeros(3))], "labels of type float64: give integers"),
        ([{"inputs": np.zeros((3, 4)), "label": np.zeros(3, int)}], "did you mean 'labels'"),
        ([(np.zeros((3, 4)), [0] * 3), (np.zeros((3, 5)), [0] * 3)], r"batch 1 has inputs of shape \(5,\)"),
        ([{"inputs": np.zeros((3, 4)), "domain": np.zeros(3)}], "domain of type float64: give integers"),
        (
            [{"inputs": np.zeros((3, 4)), "domain": [0] * 3}, (np.zeros((3, 4)), [0] * 3)],
            "batch 1 has inputs, labels, id, epoch, and those before it inputs, labels, id, epoch, domain",
        ),
        ([(np.zeros((3, 4), int), [0] * 3)], "int64 inputs: give uint8"),
        ([(np.zeros(3), [0] * 3)], r"inputs of shape \(3,\)"),
        ([], "gave nothing in pass 0"),
        (iter([(np.zeros((3, 4)), [0] * 3)]), "gave nothing in pass 1: it can be walked over only once"),
    ],
)
def test_a_wrong_iterable_is_explained(batches, message):
    with pytest.raises(UserError, match=message):
        list(itertools.islice(pipeline.from_iterable(batches, repeat=True), 4))

"""The cache of teacher signals: what goes in comes out, within its size; damage and strangers are found."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kdjax.data import cache, signal_codec
from kdjax.errors import UserError

ROOT = Path(__file__).parents[2]
DIGESTS = {"teacher_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "data_sha256": "c" * 64}
TOP_K = cache.Manifest("top_k", 20, 50_257, 64, 75, 32, **DIGESTS, seed=3, version="0.1.0")
SAMPLE = TOP_K._replace(form="sample", width=30)
MANIFESTS = {"top_k": TOP_K, "sample": SAMPLE}
LARGE = TOP_K._replace(positions=8192)  # shards of 23 MB: ArrayRecord holds back the first 16


def signals_of(manifest, example):
    """What a teacher might say of an example: (ids, log_probs, log_rest, log_sum)."""
    rng = np.random.default_rng([manifest.seed, example])
    ids = np.sort(rng.integers(0, manifest.vocabulary // manifest.width, (manifest.positions, manifest.width)), -1)
    ids = ids + np.arange(manifest.width) * (manifest.vocabulary // manifest.width)  # distinct, ascending
    if manifest.form == "sample":
        distinct = rng.integers(1, manifest.width + 1, manifest.positions)
        there = np.arange(manifest.width) < distinct[:, None]
        counts = np.where(there, 1, 0)
        counts[:, 0] += manifest.width - distinct
        with np.errstate(divide="ignore"):
            log_probs = np.log(counts / manifest.width)
        return np.where(there, ids, 0), log_probs, np.full(manifest.positions, -np.inf), None
    log_p = rng.standard_normal((manifest.positions, manifest.width + 1)) * 3
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    return ids, log_p[:, 1:], log_p[:, 0], rng.standard_normal(manifest.positions) * 10


def payload_of(manifest, example):
    ids, log_probs, log_rest, log_sum = signals_of(manifest, example)
    if manifest.form == "sample":
        return signal_codec.encode_sample(ids, log_probs, samples=manifest.width, vocabulary=manifest.vocabulary)
    return signal_codec.encode_top_k(ids, log_probs, log_rest, log_sum, vocabulary=manifest.vocabulary)


def records(manifest, number):
    return ((example, payload_of(manifest, example)) for example in cache.shard_examples(manifest, number))


def write(folder, manifest, process_index=0, process_count=1):
    cache.prepare(folder, manifest)
    for number in cache.missing_shards(folder, manifest, process_index=process_index, process_count=process_count):
        cache.write_shard(folder, manifest, number, records(manifest, number))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of each form, written without disturbance; not to be changed."""
    folders = {name: tmp_path_factory.mktemp(name) / "cache" for name in MANIFESTS}
    for name, folder in folders.items():
        write(folder, MANIFESTS[name])
    return folders


@pytest.fixture(params=MANIFESTS)
def copy(request, made, tmp_path):
    """(a copy to damage, its manifest)."""
    return Path(shutil.copytree(made[request.param], tmp_path / "cache")), MANIFESTS[request.param]


# What goes in comes out.


@pytest.mark.parametrize("form", MANIFESTS)
def test_examples_come_back_in_any_order(made, form):
    manifest = MANIFESTS[form]
    opened = cache.open_cache(made[form])
    assert opened.manifest == manifest
    ids = np.array([70, 3, 31, 32, 3, 64, 0, 74], np.int32)
    got = cache.read(opened, ids)
    assert list(got) == ["ids", "log_probs", "log_rest"]
    assert [got[key].dtype for key in got] == [np.int32, np.float32, np.float32]
    want = [signals_of(manifest, example) for example in ids]
    for at, key in enumerate(got):
        expected = np.stack([signals[at] for signals in want])
        assert got[key].shape == expected.shape
        # float16 has 11 bits: half a unit in the last place is 2^-11 of the value. The others are exact to float32.
        rtol = 2.0**-11 if (form, key) == ("top_k", "log_probs") else 1e-6
        np.testing.assert_allclose(got[key], expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("vocabulary, id_bytes", [(300, 2), (65_536, 2), (65_537, 3), (151_936, 3), (2**24, 3)])
def test_top_k_takes_at_most_six_bytes_a_class_and_eight_more(vocabulary, id_bytes):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (7, 50))
    ids[0, :2] = 0, vocabulary - 1
    log_probs = -rng.exponential(5.0, (7, 50)).astype(np.float32)
    log_probs[1, :4] = 0.0, -1e-6, -np.inf, -1e6
    log_rest, log_sum = np.array([-np.inf, *rng.standard_normal(6)]), rng.standard_normal(7)
    payload = signal_codec.encode_top_k(ids, log_probs, log_rest, log_sum, vocabulary=vocabulary)
    assert len(payload) == 7 * ((id_bytes + 2) * 50 + 8) <= 7 * (6 * 50 + 8)
    got = signal_codec.decode_top_k([payload, payload], positions=7, k=50, vocabulary=vocabulary)
    for half in (0, 1):
        np.testing.assert_array_equal(got["ids"][half], ids)
        log_probs[1, 3] = -np.inf  # below what float16 holds
        np.testing.assert_allclose(got["log_probs"][half], log_probs, rtol=2.0**-11, atol=2.0**-25)
        np.testing.assert_array_equal(got["log_rest"][half], log_rest.astype(np.float32))
        np.testing.assert_array_equal(got["log_sum"][half], log_sum.astype(np.float32))
    transposed = signal_codec.encode_top_k(
        np.asfortranarray(ids), log_probs.T.copy().T, log_rest, log_sum, vocabulary=vocabulary
    )
    assert transposed == payload


@pytest.mark.parametrize("vocabulary, entry_bytes", [(262_144, 3), (262_145, 4), (2**26, 4)])
def test_a_sample_takes_one_byte_and_three_or_four_a_distinct_class(vocabulary, entry_bytes):
    ids = np.array([[vocabulary - 1, 0, 0, 0], [5, vocabulary - 1, 0, 0], [1, 2, 3, 4]])
    counts = np.array([[63, 0, 0, 0], [1, 62, 0, 0], [1, 1, 1, 60]])
    with np.errstate(divide="ignore"):
        log_probs = np.log(counts / 63)
    payload = signal_codec.encode_sample(ids, log_probs, samples=63, vocabulary=vocabulary)
    assert len(payload) == 3 + entry_bytes * 7
    got = signal_codec.decode_sample([payload] * 2, positions=3, samples=63, vocabulary=vocabulary)
    assert got["ids"].shape == (2, 3, 63) and np.all(np.isneginf(got["log_rest"]))
    np.testing.assert_array_equal(got["ids"][1, :, :4], ids)
    np.testing.assert_allclose(got["log_probs"][1, :, :4], log_probs, rtol=1e-6)
    assert not got["ids"][:, :, 4:].any() and np.all(np.isneginf(got["log_probs"][:, :, 4:]))


def test_as_many_draws_as_the_budget_holds():
    """The exact expectation against a million simulated draws, and a corpus of drawn tokens against the budget."""
    rng = np.random.default_rng(1)
    logits = 4.0 * rng.standard_normal((40, 1000))
    logits[0, :500] = -np.inf
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    draws = signal_codec.samples_within(log_probs, 30.0)
    assert 9 < draws < 50

    def payloads(draws):
        sizes = []
        for row in np.exp(log_probs):
            drawn = rng.choice(1000, (200, draws), p=row)
            for ids, counts in (np.unique(one, return_counts=True) for one in drawn):
                sizes.append(
                    len(signal_codec.encode_sample([ids], [np.log(counts / draws)], samples=draws, vocabulary=1000))
                )
        return np.array(sizes)

    sizes = payloads(draws)
    error = sizes.std() / math.sqrt(len(sizes))
    assert sizes.mean() < 30.0 + 4 * error
    assert payloads(draws + 1).mean() > 30.0 - 4 * error
    assert (
        signal_codec.samples_within(log_probs, 1000.0) == 50
        and signal_codec.samples_within(log_probs, 1000.0, most=63) == 63
    )
    sure = np.where(np.arange(1000) == 3, 0.0, -np.inf)
    assert signal_codec.samples_within(sure, 4.0) == 50  # one class however often
    assert signal_codec.samples_within(np.full(1000, -math.log(1000)), 4.0) == 1
    with pytest.raises(UserError, match="give at least 4"):
        signal_codec.samples_within(log_probs, 3.0)
    with pytest.raises(UserError, match="at most 63 draws"):
        signal_codec.samples_within(log_probs, most=64)


def test_verify_and_size_say_what_is_there(made):
    for form, folder in made.items():
        summary = cache.verify(folder)
        assert summary[:4] == (form, 75, 75 * 64, 3)
        on_disk = sum(path.stat().st_size for path in folder.glob("shard-*"))
        assert summary.bytes_per_token == cache.size(folder) == on_disk / (75 * 64)
        payloads = sum(len(payload_of(MANIFESTS[form], example)) for example in range(75))
        assert payloads < on_disk < payloads + 75 * 64 + 3 * 131_072  # the framing that the module's text states


# Cut off, continued, shared.


def test_a_killed_writer_leaves_whole_shards_and_is_continued(tmp_path):
    folder = tmp_path / "killed"
    killed = subprocess.run([sys.executable, __file__, folder], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cache.missing_shards(folder, LARGE) == [1, 2]
    (cut_off,) = folder.glob(".shard-00001*")
    assert cut_off.stat().st_size > 0
    with pytest.raises(UserError, match=r"unfinished, 2 of its 3 shards .*shard-00001.*finish it with kdjax cache"):
        cache.open_cache(folder)
    write(folder, LARGE)
    write(tmp_path / "undisturbed", LARGE)
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_what_a_writer_left_at_any_byte_is_no_shard(made, copy):
    folder, manifest = copy
    path = cache.shard_path(folder, 1)
    whole = path.read_bytes()
    for length in (0, 1, 70_000, len(whole) - 1, len(whole)):
        path.unlink()
        (folder / f".{path.name}.12345.tmp").write_bytes(whole[:length])
        assert cache.missing_shards(folder, manifest) == [1]
        write(folder, manifest)
        assert contents(folder) == contents(made[manifest.form])


def test_two_processes_write_the_files_of_one(made, tmp_path):
    for form, manifest in MANIFESTS.items():
        for process in (1, 0):
            write(tmp_path / form, manifest, process, 2)
            assert cache.missing_shards(tmp_path / form, manifest) == ([0, 2] if process else [])
        assert contents(tmp_path / form) == contents(made[form])


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    cache.prepare(tmp_path, TOP_K)
    given = list(records(TOP_K, 0))

    def broken():
        yield from given[:20]
        raise RuntimeError("out of device memory")

    with pytest.raises(RuntimeError, match="out of device memory"):  # the teacher's, as it is
        cache.write_shard(tmp_path, TOP_K, 0, broken())
    for wrong in (given[:-1], given[1:], [*given, (32, given[0][1])], given[::-1]):
        with pytest.raises(UserError, match="give 0 to 31 in order"):
            cache.write_shard(tmp_path, TOP_K, 0, wrong)
    with pytest.raises(UserError, match="example 0 has a payload that is not"):
        cache.write_shard(tmp_path, TOP_K, 0, [(0, given[0][1][:-1])])
    with pytest.raises(UserError, match="cannot write"):
        cache.write_shard(tmp_path / "nowhere", TOP_K, 0, given)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_full_disk_is_one_sentence_and_no_shard(tmp_path):
    cache.prepare(tmp_path, TOP_K)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond fails like one on a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*shard-00000.*free some space"):
            cache.write_shard(tmp_path, TOP_K, 0, list(records(TOP_K, 0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


# Damage.


def test_a_cut_shard_is_found_on_opening(copy):
    folder, _ = copy
    path = cache.shard_path(folder, 1)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"shard-00001.array_record has 0 of its 32 records: .*kdjax cache"):
            cache.open_cache(folder)
    shutil.copy(cache.shard_path(folder, 2), path)  # whole, and too short
    with pytest.raises(UserError, match="has 11 of its 32 records"):
        cache.verify(folder)


def test_a_flipped_bit_is_found_on_reading(copy):
    """Anywhere in the file: it is named, or it lies in padding and changes nothing."""
    folder, manifest = copy
    path = cache.shard_path(folder, 1)
    whole, before = path.read_bytes(), cache.read(cache.open_cache(folder), np.arange(32, 64))
    rng, found = np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            after = cache.read(cache.open_cache(folder), np.arange(32, 64))
        except UserError as error:
            assert "shard-00001.array_record" in str(error) and "delete it and write it again" in str(error)
            found += 1
        else:
            for key in before:
                np.testing.assert_array_equal(after[key], before[key])
    assert found > 20
    # In a known place: the payload of example 40. The rest of the cache is still good.
    place = whole.index(payload_of(manifest, 40)[:100]) + 50
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    opened = cache.open_cache(folder)
    cache.read(opened, [0, 74])
    for look in (lambda: cache.read(opened, [74, 40, 0]), lambda: cache.verify(folder)):
        with pytest.raises(UserError, match=r"shard-00001.array_record: the record of example \d+ cannot be read"):
            look()


def test_records_that_array_record_reads_well_are_checked_too(copy):
    """Bits that flipped before they were written, records in another's place, shards of another cache."""
    folder, manifest = copy
    path = cache.shard_path(folder, 2)
    reader = ArrayRecordReader(str(path))
    good = reader.read_all()
    reader.close()

    def rewrite(records):
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()

    flipped = good[3][:-1] + bytes([good[3][-1] ^ 1])
    swapped = [*good[:3], good[4], good[3], *good[5:]]
    for bad in ([*good[:3], flipped, *good[4:]], swapped, [*good[:3], b"", *good[4:]]):
        rewrite(bad)
        with pytest.raises(UserError, match=r"shard-00002.array_record: the record of example 67 does not match"):
            cache.verify(folder)
        with pytest.raises(UserError, match="example 67 does not match"):
            cache.read(cache.open_cache(folder), [1, 67])
    cache.write_shard(folder, manifest._replace(seed=4), 2, records(manifest, 2))
    with pytest.raises(UserError, match="example 64 does not match"):
        cache.verify(folder)


def test_classes_beyond_the_vocabulary_are_found(tmp_path):
    manifest = TOP_K._replace(vocabulary=100, examples=5)
    cache.prepare(tmp_path, manifest)
    beyond = lambda example: payload_of(manifest._replace(vocabulary=200 if example == 3 else 100), example)
    cache.write_shard(tmp_path, manifest, 0, ((example, beyond(example)) for example in range(5)))
    with pytest.raises(UserError, match="example 3 names classes beyond the 100"):
        cache.verify(tmp_path)


# Strangers.


def test_a_cache_of_another_teacher_tokenizer_or_data_is_refused():
    mine = {**DIGESTS, "examples": 75, "positions": 64}
    cache.check_matches(TOP_K, **mine)
    others = {
        "teacher_sha256": (
            "d" * 64,
            r"the signals of another teacher \(aaaaaaaaaaaa, not dddddddddddd\): give that teacher",
        ),
        "tokenizer_sha256": ("d" * 64, r"made with another tokenizer \(bbbbbbbbbbbb, not"),
        "data_sha256": ("d" * 64, r"made of other data \(cccccccccccc, not .*packing"),
        "examples": (76, r"another number of examples \(75, not 76\)"),
        "positions": (65, r"another number of tokens \(64, not 65\)"),
    }
    for key, (value, sentence) in others.items():
        with pytest.raises(UserError, match=sentence):
            cache.check_matches(TOP_K, **{**mine, key: value})


def test_a_folder_of_another_cache_is_not_written_to(copy):
    folder, manifest = copy
    cache.prepare(folder, manifest)
    before = contents(folder)
    for key, value in (("seed", 4), ("width", 19), ("version", "0.2.0"), ("teacher_sha256", "d" * 64)):
        with pytest.raises(UserError, match=f"holds a cache of {key} .*, not {value!r}"):
            cache.prepare(folder, manifest._replace(**{key: value}))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has shards and no manifest\.json"):
        cache.prepare(folder, manifest)
    assert contents(folder) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_folders_that_are_no_cache(copy):
    folder, _ = copy
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for text, sentence in (
        ("{", "is not JSON"),
        ("[]", "schema None, and this kdjax reads 1"),
        (json.dumps({**good, "schema": 2}), "schema 2, and this kdjax reads 1"),
        (json.dumps({**good, "width": "20"}), "has not the entries form, width"),
        (json.dumps({**good, "more": 1}), "has not the entries"),
        (json.dumps({**good, "form": "topk"}), "did you mean 'top_k'"),
    ):
        path.write_text(text)
        for look in (cache.open_cache, cache.verify, cache.size):
            with pytest.raises(UserError, match=sentence):
                look(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"is no cache.*make one with kdjax cache"):
        cache.open_cache(folder)
    cache.shard_path(folder, 2).unlink()
    path.write_text(json.dumps(good))
    for look in (cache.open_cache, cache.verify, cache.size):
        with pytest.raises(UserError, match="1 of its 3 shards"):
            look(folder)


def test_impossible_manifests_and_ids(made, tmp_path):
    for changes, sentence in (
        ({"form": "samples"}, "did you mean 'sample'"),
        ({"form": "sample", "width": 64}, "keeps 1 to 63 draws a token, not 64"),
        ({"width": 0}, "keeps 1 to 50257 classes"),
        ({"vocabulary": 10}, "keeps 1 to 10 classes a token, not 20"),
        ({"vocabulary": 2**24 + 1}, "at most 16777216 classes"),
        ({"examples": 0}, "cannot have examples 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            cache.prepare(tmp_path, TOP_K._replace(**changes))
    opened = cache.open_cache(made["top_k"])
    for ids in ([75], [-1], [[0]], []):
        with pytest.raises(UserError, match="has the examples 0 to 74"):
            cache.read(opened, ids)


def cut_off_in_the_second_shard(folder):
    def records_until_killed():
        for place, record in enumerate(records(LARGE, 1)):
            if place == 25:
                os.kill(os.getpid(), signal.SIGKILL)
            yield record

    cache.prepare(folder, LARGE)
    cache.write_shard(folder, LARGE, 0, records(LARGE, 0))
    cache.write_shard(folder, LARGE, 1, records_until_killed())


if __name__ == "__main__":
    cut_off_in_the_second_shard(sys.argv[1])

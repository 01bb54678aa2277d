"""What a teacher said beforehand: the same as it says online, however it was asked, and of nothing but its own data."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import build, checkpoint, results
from kdjax import experiment as experiments
from kdjax.data import cache, pipeline
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED
from kdjax.losses import response, sparse
from kdjax.model import logits_of
from kdjax.recipes import distill, signals
from kdjax.tasks import language
from tests.helpers import decoder_folder, letters_config, letters_tokenizer

QUIET = lambda sentence: None
K = 8


def changed(config, **changes):
    """A copy of a config, such as with ``train__steps=2``."""
    config = ConfigDict(config.to_dict(), type_safe=False)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def shards(folder):
    return {name: content for name, content in files(folder).items() if name.startswith("shard")}


def metrics_of(workdir, arm=DISTILLED):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["arm"] == arm and "loss" in record]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config whose teacher, of a padded table, is a folder; it asks for 8 of the 33 likeliest letters."""
    folder = tmp_path_factory.mktemp("letters")
    config = letters_config(folder)
    decoder_folder(folder / "teacher", folder / "tokenizer", vocabulary=40)
    config.teacher.init, config.teacher.options = str(folder / "teacher"), {}
    # A file takes up to 128 KiB beside what it holds, which is much for 30 windows.
    config.cache.update(k=K, examples_per_shard=30, examples_per_batch=8, bytes_per_token=250.0)
    config.losses.kl.weight, config.losses.top_k.weight = 0.0, 0.9
    config.losses.top_k.k = K
    config.train.steps, config.checkpoint.every = 4, 2
    return config


@pytest.fixture(scope="module")
def top_k(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("top_k")
    return workdir / "cache", signals.run(base, workdir, say=QUIET)


@pytest.fixture(scope="module")
def drawn(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("drawn")
    return workdir / "cache", signals.run(changed(base, cache__form="sample"), workdir, say=QUIET)


@pytest.fixture(scope="module")
def online(base):
    """The teacher's dense logits of each training window [n, t, 33]."""
    experiment = build.prepare(base)
    split = experiment.dataset.train
    batch = pipeline.gather(split, np.arange(len(split.tokens)), np.zeros(len(split.tokens), np.int32))
    inputs = language.make_normalise(experiment.dataset)(batch)["inputs"]
    weights = experiments.load_teacher(experiment, "teacher")
    return np.asarray(logits_of(experiment.teachers["teacher"].apply(weights, inputs, train=False)[0]))


@pytest.fixture(scope="module")
def trained(base, top_k, tmp_path_factory):
    """A whole run from the cache."""
    workdir = tmp_path_factory.mktemp("cached")
    found = distill.run(changed(base, teacher__cache=str(top_k[0])), workdir, say=QUIET).results
    return workdir, found


# ------------------------------------------------------------------------------------------- the same as online


def test_the_likeliest_classes_are_those_that_the_teacher_gives_online(top_k, online):
    found = cache.read(cache.open_cache(top_k[0]), np.arange(len(online)))
    log_p = np.asarray(jax.nn.log_softmax(online.astype(np.float64)), np.float64)
    order = np.argsort(-log_p, axis=-1, kind="stable")[..., :K]
    kept = np.take_along_axis(log_p, found["ids"], -1)
    np.testing.assert_allclose(kept, np.take_along_axis(log_p, order, -1), atol=1e-5)  # equal ones in any order
    np.testing.assert_allclose(found["log_probs"], kept, rtol=2**-10, atol=1e-5)  # kept in float16
    np.testing.assert_allclose(np.exp(found["log_rest"]), 1 - np.exp(kept).sum(-1), atol=1e-5)
    assert found["ids"].max() < 33  # no row that pads the teacher's table


def test_the_loss_of_the_cache_is_the_loss_online(base, trained, tmp_path):
    distill.run_one(changed(base, train__steps=1), tmp_path, DISTILLED, say=QUIET)
    cached, live = metrics_of(trained[0])[0], metrics_of(tmp_path)[0]
    assert live["top_k"] > 0.01
    for name in ("loss", "top_k", "ce"):
        assert cached[name] == pytest.approx(live[name], rel=1e-3), name


def test_results_say_from_what_was_learned(trained, top_k):
    workdir, found = trained
    results.validate(found)
    assert found["signals"] == {"form": "top_k", "k": K, "bytes_per_token": pytest.approx(top_k[1].bytes_per_token)}
    assert json.loads((workdir / "results.json").read_text())["signals"] == found["signals"]
    assert "signals" in (workdir / "report.html").read_text() or "cache" in (workdir / "report.html").read_text()


def test_a_cached_run_that_was_cut_off_ends_with_the_same_weights(base, top_k, trained, tmp_path):
    workdir, found = trained
    copy = shutil.copytree(workdir, tmp_path / "cut")
    shutil.rmtree(copy / "checkpoints" / DISTILLED / "4")
    config = changed(base, teacher__cache=str(top_k[0]))
    again = distill.run_one(config, copy, DISTILLED, say=QUIET)
    assert checkpoint.digest(again.variables) == found["arms"][DISTILLED]["params_sha256"]
    assert [record["step"] for record in metrics_of(copy)] == [1, 2, 3, 4]


# -------------------------------------------------------------------------------------------- however it was asked


@pytest.mark.parametrize("asked", [{"cache__examples_per_batch": 2}, {"train__tokens_per_chunk": 4, "mesh__data": 8}])
def test_draws_are_the_same_whatever_the_batches_chunks_and_devices(base, drawn, tmp_path, asked):
    signals.run(changed(base, cache__form="sample", **asked), tmp_path, say=QUIET)
    assert files(tmp_path / "cache") == files(drawn[0])


def test_another_seed_draws_others_and_a_rerun_the_same(base, drawn, tmp_path):
    again = signals.run(changed(base, cache__form="sample"), drawn[0].parent, say=QUIET)  # nothing is left to do
    assert again == drawn[1]
    signals.run(changed(base, cache__form="sample", seed=1), tmp_path, say=QUIET)
    ours, other = (cache.read(cache.open_cache(folder), [0, 1]) for folder in (drawn[0], tmp_path / "cache"))
    assert not np.array_equal(ours["ids"], other["ids"])


def test_a_killed_writer_is_continued_to_the_same_bytes(base, top_k, tmp_path):
    config = changed(base, cache__examples_per_shard=5)
    whole = tmp_path / "whole"
    signals.run(config, whole, say=QUIET)
    program = (
        "import json, sys; from ml_collections import ConfigDict; from kdjax.recipes import signals; "
        "signals.run(ConfigDict(json.loads(sys.argv[1])), sys.argv[2], say=lambda s: print(s, flush=True))"
    )
    plain = json.dumps(config.to_dict())
    process = subprocess.Popen(
        [sys.executable, "-c", program, plain, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "shard 3" in line:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = shards(tmp_path / "cut" / "cache")
    assert 3 <= len(there) < len(shards(whole / "cache"))
    with pytest.raises(UserError, match="unfinished"):
        build.prepare(changed(base, teacher__cache=str(tmp_path / "cut" / "cache")))
    said = []
    signals.run(config, tmp_path / "cut", say=said.append)
    assert "going on" in said[0]
    assert files(tmp_path / "cut" / "cache") == files(whole / "cache")


# --------------------------------------------------------------------------------------------------------- its size


def test_a_cache_keeps_to_its_bytes(base, top_k, drawn):
    """With 100 bytes an example of 32 tokens, and some thousand a file, beside what they hold."""
    k = top_k[1]
    payload = K * 4 + 8  # two bytes of an id and two of a logarithm each; two sums
    assert k.tokens == k.examples * 32 and payload <= 6 * K + 8
    raw = sum(len(content) for content in shards(top_k[0]).values())
    assert k.bytes_per_token == raw / k.tokens
    assert payload < k.bytes_per_token


def test_draws_keep_to_40_bytes_where_the_teacher_is_sure_of_the_first_windows_alone(base, tmp_path):
    """Four thousand tokens and one file, for which up to 128 KiB are set aside: the framing is not to dominate."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = "a" * 6_000 + "".join(rng.choice(list(letters), 60_000))
    (tmp_path / "train.txt").write_text(text)
    config = changed(base, data__name=f"text:{tmp_path}/train.txt", cache__form="sample", cache__examples_per_batch=64)
    config.cache.update(examples_per_shard=4096, bytes_per_token=40.0)
    config.teacher.init, config.teacher.options = "", {"width": 16, "heads": 2, "mlp_width": 32, "layers": 1}
    config.teacher.steps, config.teacher.optimizer.learning_rate = 30, 1e-2
    summary = signals.run(config, tmp_path / "run", say=QUIET)
    manifest = cache.read_manifest(tmp_path / "run" / "cache")
    assert summary.tokens > 65_000
    assert 5 <= manifest.width < 50
    assert 20 < summary.bytes_per_token <= 40


# ------------------------------------------------------------------------------------------------- what draws teach


def test_draws_teach_what_the_dense_divergence_teaches_on_average(base, drawn, online, tmp_path):
    experiment = build.prepare(base)
    split = experiment.dataset.train
    ids = np.arange(0, len(split.tokens), 4)
    batch = pipeline.gather(split, ids, np.zeros_like(ids))
    inputs = language.make_normalise(experiment.dataset)(batch)["inputs"]
    variables = experiment.student.init(jax.random.key(3))

    def gradient(loss):
        def mean(params):
            outputs = experiment.student.apply({"params": params, "state": {}}, inputs, train=False)[0]
            return jnp.mean(loss(logits_of(outputs)))

        return jax.jit(jax.grad(mean))(variables["params"])

    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    dense = flat(gradient(lambda logits: response.kl(logits, online[ids], temperature=1.0)))
    sampled = []
    for seed in range(4):
        folder = drawn[0]
        if seed:
            signals.run(changed(base, cache__form="sample", seed=seed), tmp_path / str(seed), say=QUIET)
            folder = tmp_path / str(seed) / "cache"
        said = cache.read(cache.open_cache(folder), ids)
        said = tuple(jnp.asarray(said[name]) for name in ("ids", "log_probs", "log_rest"))
        sampled.append(flat(gradient(lambda logits, said=said: sparse.sparse_kl(logits, *said))))
    apart = lambda found: np.linalg.norm(found - dense) / np.linalg.norm(dense)
    alone = np.mean([apart(one) for one in sampled])
    assert alone < 0.2
    assert apart(np.mean(sampled, axis=0)) < 0.65 * alone  # of independent errors without bias: half


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_cache_of_another_teacher_is_refused_before_a_student_is_trained(base, top_k, tmp_path):
    other, _ = decoder_folder(tmp_path / "other", Path(base.data.tokenizer), seed=9, vocabulary=40)
    config = changed(base, teacher__cache=str(top_k[0]), teacher__init=str(other))
    with pytest.raises(UserError, match="another teacher"):
        distill.run(config, tmp_path / "run", say=QUIET)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cache_is_refused_where_the_teacher_trained_in_the_run_is_another(base, top_k, tmp_path):
    config = changed(base, teacher__cache=str(top_k[0]), teacher__init="", teacher__options={"width": 16, "layers": 1})
    with pytest.raises(UserError, match="another teacher"):
        distill.run(config, tmp_path / "run", say=QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["teacher"]


def test_a_cache_of_another_tokenizer_data_or_context_is_refused(base, top_k, tmp_path):
    cached = changed(base, teacher__cache=str(top_k[0]))
    other = letters_tokenizer(tmp_path / "other", letters="".join(sorted("abcdefghijklmnopqrstuvwxyz .é漢\n;!")))
    (tmp_path / "train.txt").write_text(Path(base.data.name.removeprefix("text:")).read_text().replace("x", "y"))
    for change, message in (
        ({"data__tokenizer": str(other), "teacher__init": ""}, "another tokenizer"),
        ({"data__name": f"text:{tmp_path}/train.txt"}, "other data"),
        ({"data__context": 16}, "another number of tokens"),
    ):
        with pytest.raises(UserError, match=message):
            build.prepare(changed(cached, **change))


def test_what_a_cache_cannot_teach_is_refused(base, top_k, drawn):
    cached = changed(base, teacher__cache=str(top_k[0]))
    for term in ("kl", "dkd", "fitnets", "minilm"):
        config = changed(cached)
        config.losses[term].weight = 1.0
        with pytest.raises(UserError, match=rf"losses\.{term} needs all that the teacher says"):
            build.prepare(config)
    config = changed(cached, losses__ce__examples="teacher_right")
    with pytest.raises(UserError, match="examples"):
        build.prepare(config)
    config = changed(cached, more_teachers={"other": {"options": {}}})
    with pytest.raises(UserError, match="one teacher"):
        build.prepare(config)
    with pytest.raises(UserError, match="kdjax cache"):
        build.prepare(changed(base, teacher__cache=str(drawn[0].parent)))


def test_what_cannot_be_cached_is_refused(base, top_k, tmp_path):
    from tests.helpers import tiny_config

    for config, message in (
        (tiny_config(), "language models"),
        (changed(base, more_teachers={"other": {"init": base.teacher.init, "options": {}}}), "one teacher"),
        (changed(base, teacher__cache=str(top_k[0])), "leave it empty"),
        (changed(base, cache__form="topk"), "topk.*top_k"),
        (changed(base, cache__form="sample", cache__bytes_per_token=2.0), "bytes"),
    ):
        with pytest.raises(UserError, match=message):
            signals.run(config, tmp_path / "run", say=QUIET)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(UserError, match=r"another config|cache of"):
        signals.run(changed(base, cache__k=4), top_k[0].parent, say=QUIET)

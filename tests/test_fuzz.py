"""Files and words that nobody meant to write: a sentence or a right answer, never another exception, or a long wait.

A few examples of each in an ordinary run; many of them with ``python -m pytest -m chaos tests/test_fuzz.py``.
"""

import contextlib
import json
import resource
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax import huggingface, results, writers
from kdjax.compare import results as comparison
from kdjax.compress import report as compression
from kdjax.data import cache, text, tokenizers
from kdjax.data.signal_codec import encode_top_k
from kdjax.errors import UserError
from kdjax.export import artefact, safetensors
from kdjax.measure import candidates
from kdjax.measure import results as measurement
from kdjax.models.decoder import make_decoder
from tests.helpers import decoder_folder, letters_tokenizer

FEW, MANY = 25, 3000
LETTERS = "abcdefgh ;"


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.chaos)])
def fuzz(request):
    """``fuzz(holds, *strategies)`` tries a property on what the strategies draw."""

    def tried(holds, *strategies, few=FEW):
        often = request.param == "many"
        quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        settings(max_examples=MANY if often else few, derandomize=not often, **quiet)(given(*strategies)(holds))()

    return tried


@contextlib.contextmanager
def one_sentence():
    """Nothing but a UserError of one line, and at most 1 GiB of new memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except UserError as error:
        said = str(error)
        assert said.endswith(".") and "\n" not in said and "\x1b" not in said, said
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB"


# ------------------------------------------------------------------------------------------------------- strategies

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, float("nan"), float("inf")]),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["../up", "/etc/passwd", "\0", "\x1b[2J"])
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The path of every value in a document, at any depth."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, document):
    """A JSON document in which some values, at any depth, are others or gone."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*places(document)][:200]))
        if not path:
            document = draw(json_values) if draw(st.integers(0, 9)) == 0 else document
            continue
        inner = document
        try:
            for key in path[:-1]:
                inner = inner[key]
            if draw(st.integers(0, 3)) == 0:
                del inner[path[-1]]
            else:
                inner[path[-1]] = draw(json_values)
        except (KeyError, IndexError, TypeError):
            continue
    return document


@st.composite
def damaged(draw, content):
    """Bytes of which some are flipped, cut off, put in, or all others."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "other"]))
    if how == "cut":
        return content[: draw(st.integers(0, max(len(content) - 1, 0)))]
    if how == "other":
        return draw(st.one_of(st.binary(max_size=64), st.sampled_from([b"", b"[" * 100_000, b"\xff\xfe", b"null"])))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        found[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(found)


def document_or_damage(document):
    text = json.dumps(document).encode()
    return st.one_of(changed(document).map(lambda value: json.dumps(value).encode()), damaged(text))


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of good files, each of which a test spoils and then puts back."""
    place = tmp_path_factory.mktemp("fuzz")
    letters_tokenizer(place / "tokenizer", LETTERS)
    decoder_folder(place / "model", place / "tokenizer", vocabulary=len(LETTERS))
    manifest = cache.Manifest("top_k", 2, 9, 3, 4, 2, "a" * 64, "b" * 64, "c" * 64, 0, "0", cache.SCHEMA)
    cache.prepare(place / "cache", manifest)
    some = np.zeros((3, 2), int), np.full((3, 2), -1.0), np.zeros(3), np.zeros(3)
    for number in range(2):
        records = [(example, encode_top_k(*some, vocabulary=9)) for example in cache.shard_examples(manifest, number)]
        cache.write_shard(place / "cache", manifest, number, records)

    def fill(partial):
        (partial / "model.onnx").write_bytes(b"model")
        about = dict.fromkeys(artefact.KEYS)
        return about | {
            **{"format": "onnx", "runtime": "onnxruntime", "model": "model.onnx", "arm": "teacher"},
            **{"params": 1, "weights_bytes": 4, "file_bytes": 5, "data": {"task": "classification"}},
        }

    artefact.write(place / "artefact", fill)
    variables = {"params": {"a": jnp.ones((2, 3)), "b": {"c": jnp.zeros(4, jnp.int32)}}, "state": {}}
    safetensors.write(variables, place / "ours.safetensors", name="mlp", options={"hidden": (8,)})
    return place


@contextlib.contextmanager
def spoilt(path: Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield path
    finally:
        path.write_bytes(before)


# ------------------------------------------------------------------------------------------------------ the config

KEYS = sorted(configs.flat_keys(configs.default().to_dict()))
words = st.builds(
    lambda key, value: f"--config.{key}{value}",
    st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: key + ".x"), st.text(max_size=8)),
    st.one_of(
        json_values.map(lambda value: f"={value!r}"),
        st.text(max_size=8).map(lambda value: f"={value}"),
        st.sampled_from(["", "=" + "(" * 2000, "=" + "9" * 5000, "=1e999", "={}", "={1: 2}", "=[{}]", "=b''", "=1j"]),
    ),
)


def test_config_words(fuzz):
    def holds(given_words):
        with one_sentence():
            configs.sha256(configs.resolve(configs.override(configs.default(), given_words)))

    fuzz(holds, st.lists(words, min_size=1, max_size=3), few=12)


def test_the_config_of_a_workdir(fuzz):
    whole = json.loads(configs.to_json(configs.default().to_dict()))

    def holds(config):
        try:
            found = ConfigDict(config, type_safe=False)
        except ValueError:  # a full stop in a name, which distill.saved_config catches
            return
        with one_sentence():
            configs.resolve(found)

    fuzz(holds, changed(whole).filter(lambda config: isinstance(config, dict)), few=12)


# -------------------------------------------------------------------------------------------------------- the results

ENVIRONMENT = results.environment()
SHA = "0" * 64
ARM = {
    **{"params": 1, "weights_bytes": 4, "steps": 2, "examples_per_s": None, "params_sha256": SHA},
    **{"test": {"accuracy": 0.5, "macro_f1": 0.5, "nll": 1.0, "ece": 0.1}},
    **{"fidelity": {"agreement": 1.0, "kl": 0.0}, "latency_ms": {"p50": 1.0, "p99": 2.0}},
}
CELL = {"seed": 0, "params_sha256": SHA, "accuracy": 0.5, "nll": 1.0, "ece": 0.1, "agreement": 0.9, "kl": 0.1}
METHOD = {"losses": {"ce": {"weight": 1.0}}, "tuned": None, "flops_per_step": 1, "ms_per_step": 1.0, "cells": [CELL]}
RUN = {"config_sha256": SHA, "environment": ENVIRONMENT, "schema": 1}
GRID = {"keys": ["seed"], "values": [[1]], "cells": [{"values": [1], "seed": 0, "accuracy": 0.5}]}
SCORE = {"accuracy": 0.5, "nll": 1.0, "agreement": 0.9, "kl": 0.1}
SIZES = {"params": 2, "nonzero": 2, "weights_bytes": 8}
STEP = {
    **{"name": "1", "method": "prune", "of": "teacher", "teacher": "teacher", "options": {}, "spec": {}},
    **{"before": SCORE, "made": SCORE, "alone": None, "distilled": None, "updates": 0, "seconds": 1.0, **SIZES},
}
RATES = {"1": 1.0, "8": 1.0, "32": 1.0}
MODEL = {
    **dict.fromkeys(("path", "format", "runtime", "version"), "a"),
    **{"inputs": [], "params": 1, "weights_bytes": 1, "file_bytes": 2, "tokens_per_s": None, "joules_per_1000": None},
    "latency_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0, "calls": 9, "rounds": [1.0]},
    **dict.fromkeys(("items_per_s", "cpu_s_per_1000", "peak_bytes"), RATES),
    **{"test": {"accuracy": 0.5, "nll": 1.0, "bits_per_byte": None, "agreement": 1.0}, "ratios": None},
}
FILES = {
    "results": (results, {**RUN, "seed": 0, "arms": {"teacher": ARM}, "chain": [{"name": "a", "params": 1, "steps": 1,
                "test": ARM["test"], "fidelity": ARM["fidelity"]}]}),
    "compare": (comparison, {**RUN, "kind": "compare", "seeds": [0], "test_examples": 9, "updates": 3,
                "teacher": {"accuracy": 0.9, "params": 9}, "student": {"params": 3}, "control": "a", "baseline": None,
                "tuning": None, "methods": {"a": METHOD, "b": METHOD}, "grid": GRID}),
    "compress": (compression, {**RUN, "seed": 0, "task": "classification", "steps": [STEP],
                 "models": {"teacher": {"spec": {}, "score": SCORE, **SIZES}}}),
    "measure": (measurement, {"schema": 1, "kind": "measure", "environment": ENVIRONMENT, "reference": "a",
                "data": {"task": "classification", "name": "digits", "examples": 9, "of": 9, "positions": 9},
                "settings": {"threads": 1, "cores": [0], "calls": 9, "rounds": 1, "batches": [1, 8, 32]},
                "machine": {"quiet": True, "causes": [], "others": 0.0, "elsewhere": 0.0, "steal": None,
                            "busy_before": 0.0, "load_before": 0.1, "spread": {"a": 0.0}},
                "models": {"a": MODEL}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_results(fuzz, tmp_path, kind):
    module, document = FILES[kind]
    (tmp_path / "found.json").write_text(json.dumps(document))
    assert module.load(tmp_path / "found.json") == document

    def holds(content):
        (tmp_path / "found.json").write_bytes(content)
        with one_sentence():
            module.load(tmp_path / "found.json")

    fuzz(holds, document_or_damage(document), few=40)


def test_metrics_jsonl(fuzz, tmp_path):
    lines = b"".join(json.dumps({"arm": "teacher", "step": n, "loss": 0.5}).encode() + b"\n" for n in range(3))

    def holds(content):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with one_sentence():
            writers.read_jsonl(tmp_path / "metrics.jsonl")
            with writers.JsonlWriter(tmp_path / "metrics.jsonl") as writer:
                writer.truncate("teacher", 1)

    fuzz(holds, damaged(lines))


# --------------------------------------------------------------------------------------------------- models and data


@st.composite
def headers(draw, content):
    """A safetensors file with another header, or another length of it."""
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw(st.integers(0, 3)) == 0:
        length = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", length) + content[8:]
    name = draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    entry = st.sampled_from(
        [
            ("dtype", draw(st.sampled_from(["F64", "I64", "F8_E4M3", "BOOL", "x", None, 7]))),
            ("shape", draw(st.lists(st.sampled_from([-1, 0, 1, 3, 2**40, 2**63, 1.5, "a"]), max_size=3))),
            ("data_offsets", draw(st.lists(st.sampled_from([-1, 0, 8, 24, 2**40, 2**64, None]), max_size=3))),
        ]
    )
    for _ in range(draw(st.integers(1, 2))):
        key, value = draw(entry)
        header[name][key] = value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def test_safetensors(fuzz, folder):
    path = folder / "ours.safetensors"
    content = path.read_bytes()
    assert set(safetensors.load(path)["params"]) == {"a", "b"}

    def holds(spoilt_content):
        with spoilt(path, spoilt_content), one_sentence():
            safetensors.load(path)

    fuzz(holds, st.one_of(headers(content), damaged(content)))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_hugging_face_folder(fuzz, folder, file):
    model = folder / "model"
    content = (model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    names = [name for name in json.loads(content[8 : 8 + size]) if name != "__metadata__"]
    if file.endswith("index.json"):
        model = folder / "sharded"
        shutil.copytree(folder / "model", model, dirs_exist_ok=True)
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / file).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    good = (model / file).read_bytes()
    strategy = (
        st.one_of(headers(content), damaged(content)) if good == content else document_or_damage(json.loads(good))
    )

    def holds(spoilt_content):
        with spoilt(model / file, spoilt_content), one_sentence():
            sizes = huggingface.read_config(model)
            if sizes.vocabulary <= 64 and sizes.width <= 64 and sizes.layers <= 4 and sizes.mlp_width <= 64:
                huggingface.load(model, sizes)
            else:
                make_decoder(sizes)

    fuzz(holds, strategy, few=20)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(fuzz, folder, file):
    place = folder / "tokenizer"

    def holds(content):
        with spoilt(place / file, content), one_sentence():
            found = tokenizers.load(place)
            found.decode(found.encode("abc")[0])

    fuzz(holds, document_or_damage(json.loads((place / file).read_text())), few=40)


def test_lines_of_data(fuzz, folder):
    lines = [{"text": "some text"}, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "assistant",
             "content": "c"}]}]  # fmt: skip
    config = {"name": "jsonl:lines.jsonl", "data_dir": str(folder), "options": {"test": "test.jsonl"}}
    config |= {"tokenizer": "bytes", "context": 8, "packing": "split"}

    def holds(parts, choice):
        good = json.dumps({"text": "a text that is long enough"}).encode()
        (folder / "test.jsonl").write_bytes(good)
        (folder / "lines.jsonl").write_bytes(b"\n".join([good, *parts]))
        with one_sentence():
            found = text.load(config | {"corrupt": choice})
            assert found.train.tokens.max() <= 256

    fuzz(
        holds,
        st.lists(st.sampled_from(lines).flatmap(document_or_damage), max_size=3),
        st.sampled_from(["stop", "skip"]),
    )


@pytest.mark.parametrize("file", ["manifest.json", "shard-00001.array_record"])
def test_a_cache_of_signals(fuzz, folder, file):
    path = folder / "cache" / file
    content = path.read_bytes()
    assert cache.verify(folder / "cache").examples == 4
    strategy = document_or_damage(json.loads(content)) if file.endswith("json") else damaged(content)

    def holds(spoilt_content):
        with spoilt(path, spoilt_content), one_sentence():
            cache.read(cache.open_cache(folder / "cache"), [0, 3])

    fuzz(holds, strategy)


def test_the_manifest_of_an_artefact(fuzz, folder):
    path = folder / "artefact" / "manifest.json"
    assert candidates.read([str(folder / "artefact")])[0].name == "teacher onnx"

    def holds(content):
        with spoilt(path, content), one_sentence():
            candidates.weigh(candidates.read([str(folder / "artefact")])[0])

    fuzz(holds, document_or_damage(json.loads(path.read_text())), few=40)

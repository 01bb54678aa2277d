"""Teacher signals on disk, keyed by example: a folder of ArrayRecord files and a ``manifest.json`` that says whose.

An example is a window of ``positions`` tokens, and its record holds what the teacher says of each. There are two forms
(see ``kdjax.losses.sparse``): ``top_k``, the k most probable classes of a token with the mass of the others, and
``sample``, classes drawn from the teacher's distribution with how often each was drawn.

Examples lie in contiguous blocks of ``examples_per_shard``, a file each. A shard appears under its name once it is
whole and on the disk: a writer that is cut off anywhere leaves complete shards alone, what is left to do is the shards
that are not there, and any process can do it. All arrays are NumPy's, all numbers little-endian.

A record is the example's number (uint32), a CRC-32 of the manifest, that number and the payload (uint32), and the
payload:

- ``top_k``: ids [t, k] of 2 bytes (3 where there are more than 65,536 classes), log-probabilities float16 [t, k], the
  log of the others' mass float32 [t], the log-sum-exp of the raw logits float32 [t]: at most 5 k + 8 bytes a token.
- ``sample``: the number of distinct classes uint8 [t], then for each of these in turn ``id << 6 | count`` in 3 bytes (4
  where there are more than 262,144 classes), so 1 + 3 · distinct bytes a token.

The files add about 100 bytes an example and up to 128 KiB a shard.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from numpy.typing import ArrayLike

from kdjax.data import signal_codec
from kdjax.data.signal_codec import Signals
from kdjax.errors import UserError, unknown
from kdjax.untrusted import inside, parse_json
from kdjax.writers import write_atomic

SCHEMA = 1
FORMS = ("top_k", "sample")
_MANIFEST = "manifest.json"
_HEADER = struct.Struct("<II")
# One record a group, so that each can be read alone; a compressor finds little in ids and rounded logarithms.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_REMEDY = "the file is damaged; delete it and write it again with kdjax cache"
_READ_ERRORS = (RuntimeError, ValueError, IndexError, OSError)

Folder = str | os.PathLike[str]


class Manifest(NamedTuple):
    """What a cache holds, and of which teacher, tokenizer and data.

    Attributes:
      form: ``"top_k"`` or ``"sample"``.
      width: k of ``top_k``, the number of draws of ``sample``: the places per token that ``read`` gives.
      vocabulary: the number of classes.
      positions: tokens per example.
      examples: how many there are; their ids are 0, 1, ...
      examples_per_shard: of each file but the last.
      teacher_sha256: digest of the teacher's weights.
      tokenizer_sha256: digest of the tokenizer.
      data_sha256: digest of the tokens of all examples.
      seed: of the draws.
      version: of the kdjax that made it.
      schema: of the files.
    """

    form: str
    width: int
    vocabulary: int
    positions: int
    examples: int
    examples_per_shard: int
    teacher_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    seed: int
    version: str
    schema: int = SCHEMA


class Cache(NamedTuple):
    """A complete cache, open for reading."""

    folder: Path
    manifest: Manifest
    source: Any  # grain.sources.ArrayRecordDataSource: record i is example i


class Summary(NamedTuple):
    """What ``verify`` has read."""

    form: str
    examples: int
    tokens: int
    shards: int
    bytes_per_token: float


def prepare(folder: Folder, manifest: Manifest) -> None:
    """Begins a cache, or goes on with one of the same manifest.

    Raises:
      UserError: a manifest that cannot be, the folder has another one, or it cannot be written.
    """
    folder = Path(folder)
    _require_possible(manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}; choose another.") from error
    if not (folder / _MANIFEST).exists():
        if any(folder.glob("shard-*")):
            raise UserError(
                f"{folder} has shards and no {_MANIFEST} that says whose: delete them, or choose another folder."
            )
        write_atomic(folder / _MANIFEST, _json(manifest))
    found = read_manifest(folder)
    for key, value in manifest._asdict().items():
        if getattr(found, key) != value:
            raise UserError(
                f"{folder} holds a cache of {key} {getattr(found, key)!r}, not {value!r}: choose another folder, or "
                "delete that one."
            )


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a cache, complete or not.

    Raises:
      UserError: no manifest, a damaged one, or one of another schema.
    """
    path = inside(Path(folder), _MANIFEST)
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no cache of teacher signals, {_MANIFEST} is missing: make one with kdjax cache."
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: the file is damaged; make the cache again with kdjax cache.") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has the schema {schema!r}, and this kdjax reads {SCHEMA}: make the cache again with it."
        )
    kinds = Manifest.__annotations__
    if set(values) != set(kinds) or any(type(values[key]) is not kind for key, kind in kinds.items()):
        raise UserError(f"{path} has not the entries {', '.join(kinds)}, each of its type: the file is damaged.")
    manifest = Manifest(**values)
    _require_possible(manifest)
    return manifest


def missing_shards(folder: Folder, manifest: Manifest, *, process_index: int = 0, process_count: int = 1) -> list[int]:
    """The numbers of the shards that are left to write, of those that a process has: p, p + n, p + 2n, ..."""
    mine = range(process_index, _shards(manifest), process_count)
    return [number for number in mine if not shard_path(folder, number).exists()]


def shard_path(folder: Folder, number: int) -> Path:
    """Where a shard lies once it is complete."""
    return Path(folder) / f"shard-{number:05d}.array_record"


def shard_examples(manifest: Manifest, number: int) -> range:
    """The ids of the examples of a shard."""
    first = number * manifest.examples_per_shard
    return range(first, min(first + manifest.examples_per_shard, manifest.examples))


def write_shard(folder: Folder, manifest: Manifest, number: int, records: Iterable[tuple[int, bytes]]) -> None:
    """Writes a shard whole or not at all: under another name, synced, then renamed.

    Args:
      folder: that was prepared with this manifest.
      manifest: of the cache.
      number: of the shard; no two processes may write the same one at once.
      records: (id, payload) of its examples (``shard_examples``), in order.

    Raises:
      UserError: other ids than the shard's, a payload of another size than the manifest's, or no space or permission.
    """
    path = shard_path(folder, number)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            for record in _framed(manifest, number, records):  # the teacher's own errors are not the disk's
                with _writing(path):
                    writer.write(record)
        finally:
            with _writing(path):
                writer.close()
        with _writing(path):
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_cache(folder: Folder) -> Cache:
    """Opens a complete cache.

    Raises:
      UserError: no cache, one that is not complete, or a shard that has not all of its records.
    """
    folder = Path(folder)
    manifest = _complete(folder)
    paths = [str(inside(folder, shard_path(folder, number).name)) for number in range(_shards(manifest))]
    try:
        source = grain.sources.ArrayRecordDataSource(paths)
        complete = len(source) == manifest.examples
    except _READ_ERRORS:
        complete = False
    if not complete:
        for number, path in enumerate(paths):
            found, wanted = _records_in(path), len(shard_examples(manifest, number))
            if found != wanted:
                raise UserError(f"{path} has {found} of its {wanted} records: {_REMEDY}.")
        raise UserError(f"{folder} cannot be read: check its permissions.")
    return Cache(folder, manifest, source)


def check_matches(
    manifest: Manifest, *, teacher_sha256: str, tokenizer_sha256: str, data_sha256: str, examples: int, positions: int
) -> None:
    """Refuses a cache of another teacher, tokenizer or data.

    Raises:
      UserError: what differs.
    """
    for held, given, what, remedy in (
        (manifest.teacher_sha256, teacher_sha256, "holds the signals of another teacher", "give that teacher"),
        (manifest.tokenizer_sha256, tokenizer_sha256, "was made with another tokenizer", "give that tokenizer"),
        (manifest.positions, positions, "has examples of another number of tokens", "give that length"),
        (manifest.examples, examples, "has another number of examples", "give the same data"),
        (manifest.data_sha256, data_sha256, "was made of other data", "give the same data in the same packing"),
    ):
        if held != given:
            held, given = str(held)[:12], str(given)[:12]  # of a digest its beginning
            raise UserError(
                f"the cache {what} ({held}, not {given}): {remedy}, or make a cache of its own with kdjax cache."
            )


def read(cache: Cache, ids: ArrayLike) -> Signals:
    """The signals of some examples, in any order; ids is int [b].

    Returns:
      ``ids`` int32 [b, t, width], ``log_probs`` float32 [b, t, width], ``log_rest`` float32 [b, t]: the fields of
      ``kdjax.model.Signal``.

    Raises:
      UserError: an id that the cache does not have, or a damaged record.
    """
    wanted = np.asarray(ids)
    if wanted.ndim != 1 or not len(wanted) or wanted.min() < 0 or wanted.max() >= cache.manifest.examples:
        raise UserError(
            f"the cache has the examples 0 to {cache.manifest.examples - 1}, so it cannot give {wanted.tolist()}: "
            "give a list of those."
        )
    signals = _decoded(cache.manifest, _payloads(cache, wanted.tolist()))
    return {key: signals[key] for key in ("ids", "log_probs", "log_rest")}


def verify(folder: Folder) -> Summary:
    """Reads every record of a cache and checks its digest and its classes.

    Raises:
      UserError: the first fault, with its file and example.
    """
    cache = open_cache(folder)
    manifest = cache.manifest
    at_once = max(1, 2**17 // manifest.positions)
    for number in range(_shards(manifest)):
        block = shard_examples(manifest, number)
        for first in range(0, len(block), at_once):
            examples = list(block[first : first + at_once])
            signals = _decoded(manifest, _payloads(cache, examples))
            beyond = (signals["ids"] >= manifest.vocabulary).any(axis=(1, 2))
            if beyond.any():
                example = examples[int(beyond.argmax())]
                raise _damaged(cache, example, f"names classes beyond the {manifest.vocabulary} of the vocabulary")
    tokens = manifest.examples * manifest.positions
    return Summary(manifest.form, manifest.examples, tokens, _shards(manifest), size(folder))


def size(folder: Folder) -> float:
    """Bytes of the files of a complete cache per token.

    Raises:
      UserError: no cache, or one that is not complete.
    """
    manifest = _complete(folder)
    total = sum(shard_path(folder, number).stat().st_size for number in range(_shards(manifest)))
    return total / (manifest.examples * manifest.positions)


def _complete(folder: Folder) -> Manifest:
    manifest = read_manifest(folder)
    shards = _shards(manifest)
    # Not by missing_shards: a damaged manifest may speak of thousands of millions.
    first = next((number for number in range(shards) if not shard_path(folder, number).exists()), None)
    if first is not None:
        there = sum(1 for _ in Path(folder).glob("shard-*.array_record"))
        raise UserError(
            f"the cache {folder} is unfinished, {max(shards - there, 1)} of its {shards} shards are missing "
            f"({shard_path(folder, first).name} is the first): finish it with kdjax cache."
        )
    return manifest


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot write {path}: {error}; free some space or fix the permissions.") from error


def _damaged(cache: Cache, example: int, what: str) -> UserError:
    path = shard_path(cache.folder, example // cache.manifest.examples_per_shard)
    return UserError(f"{path}: the record of example {example} {what}: {_REMEDY}.")


def _framed(manifest: Manifest, number: int, records: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    expected = shard_examples(manifest, number)
    written = 0
    for example, payload in records:
        if written == len(expected) or example != expected[written]:
            raise UserError(
                f"shard {number} is given example {example}: give {expected.start} to {expected.stop - 1} in order."
            )
        if len(payload) != _payload_bytes(manifest, payload):
            raise UserError(f"example {example} has a payload that is not of the manifest's form, width and positions.")
        yield _HEADER.pack(example, _digest(manifest, example, payload)) + payload
        written += 1
    if written != len(expected):
        raise UserError(
            f"shard {number} is given {written} examples: give {expected.start} to {expected.stop - 1} in order."
        )


def _payloads(cache: Cache, examples: list[int]) -> list[bytes]:
    """The payloads of some examples, each checked."""
    try:
        records = cache.source.__getitems__(examples)
    except _READ_ERRORS:
        records = [_record(cache, example) for example in examples]  # finds which one
    payloads = []
    for example, record in zip(examples, records, strict=True):
        payload = record[_HEADER.size :]
        if len(record) < _HEADER.size or _HEADER.unpack_from(record) != (
            example,
            _digest(cache.manifest, example, payload),
        ):
            raise _damaged(cache, example, "does not match its digest")
        if len(payload) != _payload_bytes(cache.manifest, payload):
            raise _damaged(cache, example, f"is not of the form that {_MANIFEST} says")
        payloads.append(payload)
    return payloads


def _record(cache: Cache, example: int) -> bytes:
    try:
        return cache.source[example]
    except _READ_ERRORS as error:
        raise _damaged(cache, example, "cannot be read") from error


def _decoded(manifest: Manifest, payloads: Sequence[bytes]) -> Signals:
    positions, width, vocabulary = manifest.positions, manifest.width, manifest.vocabulary
    if manifest.form == "top_k":
        return signal_codec.decode_top_k(payloads, positions=positions, k=width, vocabulary=vocabulary)
    return signal_codec.decode_sample(payloads, positions=positions, samples=width, vocabulary=vocabulary)


def _payload_bytes(manifest: Manifest, payload: bytes) -> int:
    """How long a payload should be, by the manifest and, of a sample, by its own count of classes."""
    if manifest.form == "top_k":
        return manifest.positions * ((signal_codec.bytes_of_id(manifest.vocabulary) + 2) * manifest.width + 8)
    distinct = np.frombuffer(payload[: manifest.positions], np.uint8)
    fits = not distinct.size or distinct.max() <= manifest.width
    return manifest.positions + signal_codec.bytes_of_entry(manifest.vocabulary) * int(distinct.sum()) if fits else -1


def _require_possible(manifest: Manifest) -> None:
    if manifest.form not in FORMS:
        raise unknown("form of a cache", manifest.form, FORMS)
    for key in ("positions", "examples", "examples_per_shard", "vocabulary"):
        if not 1 <= getattr(manifest, key) <= 2**32:
            raise UserError(f"a cache cannot have {key} {getattr(manifest, key)}: give a number from 1 to 2^32.")
    most = min(manifest.vocabulary, 2**16) if manifest.form == "top_k" else signal_codec.MOST_DRAWS
    if not 1 <= manifest.width <= most:
        what = "classes" if manifest.form == "top_k" else "draws"
        raise UserError(f"a cache of the form {manifest.form} keeps 1 to {most} {what} a token, not {manifest.width}.")
    largest = 2**24 if manifest.form == "top_k" else 2 ** (32 - signal_codec.COUNT_BITS)
    if manifest.vocabulary > largest:
        raise UserError(
            f"a cache of the form {manifest.form} has at most {largest} classes, not {manifest.vocabulary}."
        )


def _shards(manifest: Manifest) -> int:
    return -(-manifest.examples // manifest.examples_per_shard)


def _records_in(path: str) -> int:
    try:
        reader = ArrayRecordReader(path)
        found = reader.num_records()
        reader.close()
    except _READ_ERRORS:
        return 0
    return found


def _digest(manifest: Manifest, example: int, payload: bytes) -> int:
    """Of the manifest too, so that a shard of another cache is no part of this one."""
    return zlib.crc32(payload, zlib.crc32(f"{_json(manifest)}{example}".encode()))


def _json(manifest: Manifest) -> str:
    return json.dumps(manifest._asdict(), indent=2) + "\n"


def _sync_folder(folder: Path) -> None:
    """Makes a rename last: it is an entry of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

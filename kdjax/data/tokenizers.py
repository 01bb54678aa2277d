"""Tokenizers: the bytes themselves, or a ``tokenizer.json``; and the guard that two models speak one vocabulary."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdjax.errors import UserError
from kdjax.untrusted import inside, parse_json

BYTES = "bytes"  # the name of the tokenizer that needs no file
END_OF_TEXT = "<|endoftext|>"
# Where a folder says its special tokens, the tokenizer's own files before those of the model.
_BY_TOKEN = ("tokenizer_config.json", "special_tokens_map.json")
_MOST_IDS = 2**24  # beyond, a table of embeddings would fill any memory
_BY_ID = ("generation_config.json", "config.json")


class Encoded(NamedTuple):
    """The tokens of one text, without any that the text does not say."""

    ids: NDArray[np.int32]  # [n]
    bytes: NDArray[np.int32]  # [n], how many UTF-8 bytes of the text each covers; their sum is that of the text
    starts: NDArray[np.int32]  # [n], the first character that each covers
    ends: NDArray[np.int32]  # [n], the character after the last one


class Tokenizer(NamedTuple):
    """Text to ids and back.

    Tokens that share a character (the bytes of one, for example) all have its place; its bytes are counted once.
    """

    name: str
    vocabulary: Mapping[str, int]  # token -> id, special and added tokens included
    size: int  # the highest id + 1
    bos: int | None  # what the tokenizer puts before every text; None: nothing
    eos: int  # what ends a text
    encode_all: Callable[[Sequence[str]], list[Encoded]]
    decode: Callable[[Sequence[int]], str]  # invalid UTF-8 becomes U+FFFD, special and unknown ids nothing
    sha256: str  # of what decides the ids
    chat_template: str | None = None  # in Jinja
    special_tokens: Mapping[str, str] = {}  # such as bos_token, by the names that chat templates use

    def encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The ids of a text, and how many UTF-8 bytes of it each covers; int32 [n] both."""
        return self.encode_all([text])[0][:2]


def load(place: str | Path) -> Tokenizer:
    """The tokenizer ``bytes``, or the one of a ``tokenizer.json``, given as this file or as the folder it is in.

    ``bytes`` has the ids 0 to 255 for the bytes and 256 for the end of a text; no text contains the latter. In a
    ``tokenizer.json`` a special token that a text spells out is that token, as in ``transformers``. Which token ends a
    text, which one the tokenizer puts first, and the chat template are read from the files beside it:
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` and, for the end of a text alone,
    ``generation_config.json`` and ``config.json``.

    Raises:
      UserError: no such file, one that cannot be read, no token that ends a text, or the package tokenizers is missing.
    """
    if str(place) == BYTES:
        return _byte_tokenizer()
    folder = folder_of(place)
    path = inside(folder, "tokenizer.json") if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {place}: give {BYTES!r}, the path of a tokenizer.json, or a folder that has one."
        )
    return _from_file(str(place), path, folder)


def folder_of(place: str | Path) -> Path:
    """The folder of the tokenizer at ``place``, which is this folder or a file in it."""
    return Path(place) if Path(place).is_dir() else Path(place).parent


def shared_vocabulary(teacher: Mapping[str, int] | Tokenizer, student: Mapping[str, int] | Tokenizer) -> int:
    """How many ids, from 0 on, mean the same token to both: all, or those of the smaller, whose ids the larger goes on.

    Vocabularies of one size are not therefore one vocabulary, so that the maps token -> id are compared.

    Raises:
      UserError: an id below the size of the smaller means different tokens; the lowest such is named.
    """
    maps = [whose.vocabulary if isinstance(whose, Tokenizer) else whose for whose in (teacher, student)]
    shared = min(max(tokens.values(), default=-1) + 1 for tokens in maps)
    different = [number for _, number in maps[0].items() ^ maps[1].items() if number < shared]
    if different:
        lowest = min(different)
        ours, theirs = (
            ", ".join(repr(token) for token in sorted(tokens) if tokens[token] == lowest) or "no token"
            for tokens in maps
        )
        raise UserError(
            f"teacher and student have different vocabularies: id {lowest} is {ours} to the teacher and {theirs} to "
            "the student, so give both one tokenizer."
        )
    return shared


def shared_rows(teacher_rows: int, student_rows: int, tokenizer_size: int) -> int:
    """How many rows of two tables of embeddings, padded differently, count: as many as the tokenizer has ids.

    Raises:
      UserError: a table has fewer rows than that.
    """
    for whose, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < tokenizer_size:
            raise UserError(
                f"the {whose}'s table of embeddings has {rows} rows and the tokenizer {tokenizer_size} ids: give the "
                f"{whose} at least as many rows, or use the tokenizer that belongs to it."
            )
    return tokenizer_size


def write_byte_tokenizer(folder: str | Path, size: int = 257) -> None:
    """Writes the tokenizer ``bytes`` as ``transformers.AutoTokenizer`` and ``load`` read it: byte-level BPE, no merges.

    The ids are the same for every text that does not spell out ``<|endoftext|>``, which ``transformers`` takes for the
    end of a text.

    Args:
      folder: made where it does not exist; gets ``tokenizer.json`` and ``tokenizer_config.json``.
      size: of the vocabulary; ids from 257 on are tokens that no text has, for benchmarks of a model of that many.
    """
    # An added token that the model does not have itself would get the number after the model's last.
    unused = {f"<|unused_{number}|>": number for number in range(257, size)}
    unused |= {END_OF_TEXT: 256} if unused else {}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": END_OF_TEXT, "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | plain],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())} | unused,
            "merges": [],
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_tokenizer() -> Tokenizer:
    def encode(text: str) -> Encoded:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        starts = np.cumsum(ids & 0xC0 != 0x80, dtype=np.int32) - 1  # 10xxxxxx goes on with a character
        return Encoded(ids, np.ones_like(ids), starts, starts + 1)

    def decode(ids: Sequence[int]) -> str:
        return bytes(int(number) for number in ids if 0 <= number < 256).decode(errors="replace")

    vocabulary = {token: number for number, token in enumerate([*_byte_characters(), END_OF_TEXT])}
    return Tokenizer(
        name=BYTES,
        vocabulary=vocabulary,
        size=257,
        bos=None,
        eos=256,
        encode_all=lambda texts: [encode(text) for text in texts],
        decode=decode,
        sha256=_digest([BYTES, vocabulary]),
        special_tokens={"eos_token": END_OF_TEXT},
    )


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE (GPT-2's ``bytes_to_unicode``) writes each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _from_file(name: str, path: Path, folder: Path) -> Tokenizer:
    backend = _tokenizers()
    settings = {file: _json(inside(folder, file)) for file in (*_BY_TOKEN, *_BY_ID)}
    content = _json(path)
    # A file may say how its last user padded or cut batches; neither belongs to the ids of a text.
    content = {**content, "truncation": None, "padding": None}
    try:
        tokenizer = backend.Tokenizer.from_str(json.dumps(content))
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        whole = tokenizer.encode("a", add_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, or panics, which is none
        raise UserError(f"{path} is not a tokenizer.json that the package tokenizers reads: {error}.") from error
    tokens = {id_: token for token, id_ in vocabulary.items()}
    if not tokens or max(tokens) >= _MOST_IDS:
        raise UserError(f"{path} has no tokens with ids below {_MOST_IDS:,} alone: copy it anew.")
    special = _special_tokens(settings)
    eos = _end_of_text(special, settings, vocabulary, tokens)
    if eos is None:
        raise UserError(
            f"nothing beside {path} says which token ends a text: name one of its tokens as eos_token in "
            "tokenizer_config.json."
        )
    bos = _first_token(whole, special, settings, vocabulary)
    special.setdefault("eos_token", tokens[eos])
    if bos is not None:
        special.setdefault("bos_token", tokens[bos])

    def encode_all(texts: Sequence[str]) -> list[Encoded]:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_encoded(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(number) for number in ids if int(number) in tokens], skip_special_tokens=True)

    return Tokenizer(
        name=name,
        vocabulary=vocabulary,
        size=max(tokens) + 1,
        bos=bos,
        eos=eos,
        encode_all=encode_all,
        decode=decode,
        sha256=_digest([content, bos, eos]),
        chat_template=_chat_template(settings["tokenizer_config.json"], folder),
        special_tokens=special,
    )


def _encoded(text: str, encoding: Any) -> Encoded:
    ids = np.array(encoding.ids, np.int32)
    starts, ends = np.array(encoding.offsets, np.int32).reshape(-1, 2).T
    sizes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (sizes >= 0x80).astype(np.int64) + (sizes >= 0x800) + (sizes >= 0x10000)
    places = np.concatenate([[0], np.cumsum(widths)])
    # What no token covers, such as white space that a normaliser takes away, counts with the token after it, and at
    # the end of the text with the last one.
    until = np.maximum.accumulate(places[ends])
    if len(until):
        until[-1] = places[-1]
    return Encoded(ids, np.diff(until, prepend=0).astype(np.int32), starts, ends)


def _special_tokens(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """``eos_token`` and its like, each a string or a dict with its "content"; the first file that has one counts."""
    found: dict[str, str] = {}
    for file in _BY_TOKEN:
        for key, token in settings[file].items():
            token = token.get("content") if isinstance(token, Mapping) else token
            if key.endswith("_token") and isinstance(token, str):
                found.setdefault(key, token)
    return found


def _end_of_text(
    special: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    vocabulary: Mapping[str, int],
    tokens: Mapping[int, str],
) -> int | None:
    if special.get("eos_token") in vocabulary:
        return vocabulary[special["eos_token"]]
    for file in _BY_ID:
        given = settings[file].get("eos_token_id")
        for number in given if isinstance(given, list) else [given]:
            if type(number) is int and number in tokens:
                return number
    return None


def _first_token(
    whole: Any,
    special: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    vocabulary: Mapping[str, int],
) -> int | None:
    """The token that the tokenizer puts before a text.

    Not every model that names a ``bos_token`` was trained with one before its texts (GPT-2 and Qwen were not): what
    counts is ``add_bos_token`` or, where that is not said, what the tokenizer itself does.
    """
    own = whole.ids[0] if whole.special_tokens_mask[:1] == [1] else None
    if settings["tokenizer_config.json"].get("add_bos_token", own is not None):
        return vocabulary.get(special.get("bos_token", ""), own)
    return None


def _chat_template(settings: Mapping[str, Any], folder: Path) -> str | None:
    file = inside(folder, "chat_template.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 ({error}): copy it anew.") from error
    given = settings.get("chat_template")
    if isinstance(given, list):  # several, each with its name
        named = [entry for entry in given if isinstance(entry, Mapping) and entry.get("name") == "default"]
        given = named[-1].get("template") if named else None
    if not isinstance(given, str | None):
        raise UserError(f"the chat_template of {folder / 'tokenizer_config.json'} is not text: copy it anew.")
    return given


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}): copy it anew.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not a JSON object: copy it anew.")
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "a tokenizer.json is read and written with the package tokenizers, which is missing: "
            "pip install 'kdjax[text]'."
        ) from None
    return tokenizers

"""Text data sets: documents from files, from JSON lines, from TFDS or from Python itself, as windows of tokens."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.data import chat, corrupt, tokenizers
from kdjax.data.packing import Document, TextSplit, pack, target_mask
from kdjax.data.sources import decoded, opened, prepared
from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError, unknown
from kdjax.untrusted import parse_json

_TEXT, _JSONL, _TFDS = "text:", "jsonl:", "tfds:"
_PROMPT = 64  # characters of a document without a prompt of its own
_TOGETHER = 1024  # documents that are tokenised at a time


class Source(NamedTuple):
    """A document before it is tokenised."""

    name: str  # where it is from, for messages
    text: str
    spans: chat.Spans | None = None  # characters that are in the loss; None: all


class TextDataset(NamedTuple):
    """Windows of tokens of a language model.

    ``sha256`` is of the tokens, segments and in_loss of both splits: what signals of a teacher depend on.
    """

    name: str
    train: TextSplit
    test: TextSplit
    tokenizer: Tokenizer
    context: int  # targets that a window has room for
    sha256: str
    prompt: str  # for samples: what precedes the loss of the first test document, or its beginning
    dropped: tuple[int, int] = (0, 0)  # windows of train and test that had no target and were left out


def load(config_data: Mapping[str, Any]) -> TextDataset:
    """Loads the text that ``name`` says, tokenises it and packs it into windows.

    Names and their options:

    * ``stdlib``: the modules of the running Python's standard library, one document each; one in ten, by the digest of
      its path, is for testing. ``modules``: a glob below the library's folder ("*.py"); ``files``: at most so many, in
      the order of their names (0: all). Files that are empty or not in UTF-8 are left out.
    * ``text:GLOB``: each file a document. ``test``: a glob of the files for testing; without it, one in ten by the
      digest of its name, and of a single file the last tenth, from the next line on that begins there.
    * ``jsonl:GLOB``: each line a document, an object with a text, with the messages of a conversation (``kdjax.data.
      chat.conversation``), or with a prompt and a completion, of which the latter is in the loss. ``text``,
      ``messages``, ``prompt``, ``completion``: the names of these fields; without them, those of these names that the
      first line has. ``separator``: what is put between prompt and completion (""). ``test``: as above; without it,
      one line in ten by the digest of its file's name and its number.
    * ``tfds:NAME``: a set that TFDS has prepared: its splits train and test (or validation). ``text``: the feature.

    All take ``longer``: what is done with documents longer than a window where whole ones are packed, ``refuse`` (the
    default) or ``cut``.

    A document is the token that the tokenizer puts before texts, if it has one, the text, and the token that ends it,
    which is in the loss and covers 0 bytes; a text that begins or ends with these tokens does not get them twice.

    Args:
      config_data: ``name``, ``data_dir`` (of TFDS; and where relative globs begin), ``options``, ``tokenizer``
        (``bytes`` or a path), ``context`` (targets of a window), ``packing`` (``split`` or ``whole``) and ``corrupt``
        (``stop`` or ``skip``: whether what cannot be read, a file, a line or an example, is left out).

    Raises:
      UserError: an unknown name or option, files that are not there, empty or not in UTF-8, lines that are not what
        they should be, a split without documents, or whatever ``tokenizers.load`` and ``packing.pack`` refuse.
    """
    name, data_dir = config_data["name"], config_data.get("data_dir") or ""
    choice = config_data.get("corrupt", "stop")
    corrupt.check(choice)
    options = dict(config_data.get("options") or {})
    longer = options.pop("longer", "refuse")
    tokenizer = tokenizers.load(config_data["tokenizer"])
    train, test = _sources(name, data_dir, options, tokenizer, choice)
    packed = {}
    for where, sources in (("train", train), ("test", test)):
        if not sources:
            raise UserError(
                f"the {where} split of {name} has no documents: give more of them, or say with data.options.test which "
                "are for testing."
            )
        documents = _documents(sources, tokenizer)
        try:
            packed[where] = pack(
                documents, config_data["context"], config_data["packing"], size=tokenizer.size, longer=longer
            )
        except UserError as error:
            raise UserError(f"the {where} split of {name}: {error}") from error
    splits = packed["train"][0], packed["test"][0]
    first = test[0]
    begins = first.spans[0][0] if first.spans else 0
    return TextDataset(
        name=name,
        train=splits[0],
        test=splits[1],
        tokenizer=tokenizer,
        context=config_data["context"],
        sha256=_digest(splits),
        prompt=first.text[: begins or _PROMPT],
        dropped=(packed["train"][1], packed["test"][1]),
    )


def targets(split: TextSplit) -> int:
    """How many targets all windows have together."""
    return int(target_mask(split).sum())


def target_bytes(split: TextSplit) -> int:
    """How many UTF-8 bytes of text the targets cover, by which nats become bits per byte."""
    return int(split.bytes[:, 1:][target_mask(split)].sum(dtype=np.int64))


def _sources(
    name: str, data_dir: str, options: dict[str, Any], tokenizer: Tokenizer, choice: str
) -> tuple[list[Source], list[Source]]:
    """The documents for training and those for testing."""
    for prefix, read in _READERS.items():
        if name == prefix or (prefix.endswith(":") and name.startswith(prefix)):
            valid = read.__kwdefaults__ or {}
            for option in options:
                if option not in valid:
                    raise unknown(f"option of the text {name}", option, [*valid, "longer"])
            return read(name, data_dir, tokenizer, choice, **options)
    raise unknown("text", name, ["stdlib", "text:FILES", "jsonl:FILES", "tfds:NAME"])


def _stdlib(
    name: str, data_dir: str, tokenizer: Tokenizer, choice: str, *, modules: str = "*.py", files: int = 0
) -> tuple[list[Source], list[Source]]:
    root = Path(sysconfig.get_path("stdlib"))
    if files < 0:
        raise UserError(f"data.options.files={files}: give how many at most, or 0 for all.")
    found = sorted(Path(path) for path in glob.glob(os.path.join(glob.escape(str(root)), modules), recursive=True))
    found = [path for path in found if path.is_file() and path.is_relative_to(root)]
    # Installed packages lie below the library's folder without being part of it.
    found = [path for path in found if not {"site-packages", "dist-packages"} & {*path.relative_to(root).parts}]
    if not found:
        raise UserError(f"data.options.modules={modules!r} matches no file in {root}: try '*.py'.")
    sources = []
    for path in found[: files or None]:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text:
            sources.append(Source(path.relative_to(root).as_posix(), text))
    return _by_digest(sources)


def _text(
    name: str, data_dir: str, tokenizer: Tokenizer, choice: str, *, test: str = ""
) -> tuple[list[Source], list[Source]]:
    train_files, test_files = _files(name.removeprefix(_TEXT), test, data_dir)

    def read(path: Path, number: int) -> Source:
        return _filled(Source(str(path), _decoded(path.read_bytes(), str(path))), number)

    train, held_out = (
        corrupt.readable([partial(read, path, number) for number, path in enumerate(files)], choice, name)
        for files in (train_files, test_files)
    )
    if test:
        return train, held_out
    if len(train_files) > 1:
        return _by_digest(train, lambda source: Path(source.name).name)
    if not train:
        return [], []
    text = train[0].text
    goal = len(text) * 9 // 10
    cut = text.find("\n", goal - 1) + 1
    if not 0 < cut < len(text):
        cut = text.rfind("\n", 0, goal) + 1
    if not cut:
        raise UserError(
            f"{train[0].name} is one line, of which nothing can be set aside for testing: give files for testing with "
            "data.options.test."
        )
    return [train[0]._replace(text=text[:cut])], [train[0]._replace(text=text[cut:])]


def _jsonl(
    name: str,
    data_dir: str,
    tokenizer: Tokenizer,
    choice: str,
    *,
    text: str = "",
    messages: str = "",
    prompt: str = "",
    completion: str = "",
    separator: str = "",
    test: str = "",
) -> tuple[list[Source], list[Source]]:
    train_files, test_files = _files(name.removeprefix(_JSONL), test, data_dir)
    given = {"text": text, "messages": messages, "prompt": prompt, "completion": completion}
    fields: dict[str, str] = {}

    def read(content: bytes, where: str, number: int) -> Source:
        line = _object(content, where)
        if not fields:
            try:
                fields.update(_fields(given, line, where))
            except UserError as error:  # the config's, not this line's
                raise _WrongFields from error
        return _filled(_from_line(line, where, fields, separator, tokenizer), number)

    def readers(files: Sequence[Path]) -> Iterator[Callable[[], Source]]:
        lines = (line for path in files for line in _lines(path))
        return (partial(read, content, where, number) for number, (where, content) in enumerate(lines))

    try:
        train, held_out = (corrupt.readable(readers(files), choice, name) for files in (train_files, test_files))
    except _WrongFields as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    return (train, held_out) if test else _by_digest(train, lambda source: Path(source.name).name)


class _WrongFields(Exception):
    """The options name fields that lines do not have."""


def _tfds(
    name: str, data_dir: str, tokenizer: Tokenizer, choice: str, *, text: str = "text"
) -> tuple[list[Source], list[Source]]:
    import tensorflow_datasets as tfds

    builder = prepared(name, data_dir or None)
    if text not in builder.info.features:
        raise unknown(f"feature of {name} (data.options.text)", text, builder.info.features)
    if not isinstance(builder.info.features[text], tfds.features.Text):
        raise UserError(f"data.options.text={text!r}: that feature of {name} is not text.")
    both = []
    for split, examples in zip(("train", "test"), opened(name, builder), strict=True):

        def read(number: int, split: str = split, examples: Any = examples) -> Source:
            where = f"{name} {split}:{number}"
            value = decoded(examples, number, f"{name} {split}")[text]
            value = _decoded(value, where) if isinstance(value, bytes) else str(value)
            return _filled(Source(where, value), number)

        both.append(corrupt.readable([partial(read, number) for number in range(len(examples))], choice, name))
    return both[0], both[1]


_READERS: dict[str, Callable[..., tuple[list[Source], list[Source]]]] = {
    "stdlib": _stdlib,
    _TEXT: _text,
    _JSONL: _jsonl,
    _TFDS: _tfds,
}


def _files(pattern: str, test: str, data_dir: str) -> tuple[list[Path], list[Path]]:
    """The files for training and those for testing, none of which are for training too."""

    def matching(pattern: str, what: str) -> list[Path]:
        # A pattern that begins at the root of the file system stays as it is.
        whole = os.path.join(glob.escape(data_dir), pattern)
        found = sorted(Path(path) for path in glob.glob(whole, recursive=True))
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f"{what}{pattern!r} matches no file in {Path(data_dir).absolute()}: mend the pattern.")
        return found

    test_files = matching(test, "data.options.test=") if test else []
    return [path for path in matching(pattern, "data.name: ") if path not in test_files], test_files


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}, so convert it first."
        ) from error


def _filled(source: Source, number: int) -> Source:
    if not source.text:
        raise UserError(f"document {number} ({source.name}) is empty: leave it out.")
    return source


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where each line is, and what it holds; blank lines are passed over."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _object(line: bytes, where: str) -> dict[str, Any]:
    text = _decoded(line, where)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): write one object per line.") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__} and not an object: write one object per line.")
    return content


def _fields(given: Mapping[str, str], line: Mapping[str, Any], where: str) -> dict[str, str]:
    """What the lines hold, "messages", "text", or "prompt" and "completion", and the names of these fields."""
    kinds: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
    named = {key for key, field in given.items() if field}
    if named:
        kinds = tuple(kind for kind in kinds if named <= {*kind})
        if not kinds:
            raise UserError(
                f"data.options name fields of more than one kind ({', '.join(sorted(named))}): name the text, the "
                "messages, or prompt and completion."
            )
        return {key: given[key] or key for key in kinds[0]}
    for kind in kinds:
        if line.keys() >= {*kind}:
            return {key: key for key in kind}
    raise UserError(
        f"{where} has the fields {', '.join(line)}, and neither text, nor messages, nor prompt and completion: say "
        "with data.options (text, messages, or prompt and completion) what they are called."
    )


def _from_line(
    line: Mapping[str, Any], where: str, fields: Mapping[str, str], separator: str, tokenizer: Tokenizer
) -> Source:
    for key, field in fields.items():
        if field not in line:
            raise UserError(f"{where} has no field {field!r}: it has {', '.join(line)}.")
        if key != "messages" and not isinstance(line[field], str):
            raise UserError(f"the field {field!r} of {where} is a {type(line[field]).__name__} and not text: mend it.")
    try:
        if "text" in fields:
            source = Source(where, line[fields["text"]])
        elif "messages" in fields:
            source = Source(where, *chat.conversation(line[fields["messages"]], tokenizer))
        else:
            source = Source(where, *chat.pair(line[fields["prompt"]] + separator, line[fields["completion"]]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        source.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half a surrogate pair, {source.text[error.start]!r}, which is no character: mend it."
        ) from error
    return source


def _by_digest(
    sources: Sequence[Source], key: Callable[[Source], str] = lambda source: source.name
) -> tuple[list[Source], list[Source]]:
    """Nine in ten and one in ten, by a digest of their names, so that others are never moved by what is added."""
    in_test = [int(hashlib.sha256(key(source).encode()).hexdigest(), 16) % 10 == 0 for source in sources]
    return (
        [source for source, held_out in zip(sources, in_test, strict=True) if not held_out],
        [source for source, held_out in zip(sources, in_test, strict=True) if held_out],
    )


def _documents(sources: Sequence[Source], tokenizer: Tokenizer) -> list[Document]:
    documents = []
    for first in range(0, len(sources), _TOGETHER):
        part = sources[first : first + _TOGETHER]
        encoded = tokenizer.encode_all([source.text for source in part])
        for source, tokens in zip(part, encoded, strict=True):
            wanted = np.ones(len(tokens.ids), bool)
            if source.spans is not None:
                wanted = chat.in_spans(tokens.starts, tokens.ends, source.spans)
            ids, covered = tokens.ids, tokens.bytes
            # Chat templates may write both tokens themselves.
            if tokenizer.bos is not None and ids[:1].tolist() != [tokenizer.bos]:
                ids, covered, wanted = np.r_[tokenizer.bos, ids], np.r_[0, covered], np.r_[False, wanted]
            if ids[-1:].tolist() != [tokenizer.eos]:
                ids, covered, wanted = np.r_[ids, tokenizer.eos], np.r_[covered, 0], np.r_[wanted, True]
            documents.append(Document(source.name, ids.astype(np.int32), wanted, covered.astype(np.int32)))
    return documents


def _digest(splits: Sequence[TextSplit]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for values in (split.tokens, split.segments, split.in_loss):
            digest.update(f"{values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()

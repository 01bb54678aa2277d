import json
import subprocess
import sys

import numpy as np
import pytest

from kdjax.data import tokenizers
from kdjax.errors import UserError

backend = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

TEXTS = [
    "plain\nlines\r\n\n  indented\twith tabs  ",
    "Grüße, naïve café, ΑΒΓ, 漢字, 😀👩‍👩‍👧, \u2028",
    "".join(map(chr, range(256))),
    "\x7f\x80\u07ff\u0800\uffff\U00010000",  # the first and last characters of 1 to 4 bytes
    "",
]


def train_tokenizer(folder, corpus=TEXTS, *, settings=None, special=("<|endoftext|>",), vocabulary=400, first=None):
    """A folder with a byte-level BPE that is trained on the spot; ``first``: a token it puts before every text."""
    tokenizer = backend.Tokenizer(backend.models.BPE())
    tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backend.decoders.ByteLevel()
    trainer = backend.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=backend.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if first:
        tokenizer.post_processor = backend.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>"} if settings is None else settings
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings})
    )
    return folder


def test_bytes_are_the_ids():
    tokenizer = tokenizers.load("bytes")
    for text in TEXTS:
        ids, covered = tokenizer.encode(text)
        assert ids.dtype == covered.dtype == np.int32
        assert ids.tolist() == list(text.encode()) and covered.tolist() == [1] * len(ids)
        assert tokenizer.decode(ids) == text
    encoded = tokenizer.encode_all(["aé😀"])[0]
    assert encoded.starts.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert encoded.ends.tolist() == [1, 2, 2, 3, 3, 3, 3]
    assert (tokenizer.size, tokenizer.eos, tokenizer.bos) == (257, 256, None)
    assert tokenizer.decode([97, 0xC3, 98, 256, 300]) == "a\ufffdb"  # half a character; the end of text; no token
    assert sorted(tokenizer.vocabulary.values()) == list(range(257))


def test_a_larger_vocabulary_has_tokens_that_no_text_has(tmp_path):
    tokenizers.write_byte_tokenizer(tmp_path, 1000)
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.size == 1000 and sorted(tokenizer.vocabulary.values()) == list(range(1000))
    for text in TEXTS:
        assert tokenizer.encode(text)[0].tolist() == list(text.encode())


def test_bytes_need_no_package(tmp_path):
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from kdjax.data import tokenizers\n"
        "assert tokenizers.load('bytes').encode('a')[0].tolist() == [97]\n"
        f"tokenizers.write_byte_tokenizer({str(tmp_path)!r})\n"
        f"try: tokenizers.load({str(tmp_path)!r})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UserError") and "pip install 'kdjax[text]'" in done.stdout


def test_the_written_byte_tokenizer_is_the_same_to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers.write_byte_tokenizer(tmp_path / "bytes")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")
    ours = tokenizers.load("bytes")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)[0].tolist() == list(text.encode())
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.decode([*range(256)]) == ours.decode(range(256))
    assert (theirs.eos_token_id, len(theirs), theirs.bos_token_id) == (256, 257, None)
    assert theirs("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    read = tokenizers.load(tmp_path / "bytes")
    assert (read.size, read.bos, read.eos) == (257, None, 256)
    assert tokenizers.shared_vocabulary(ours, read) == 257
    assert read.vocabulary == ours.vocabulary == theirs.get_vocab()


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_tokenizer_file_gives_the_ids_of_transformers(tmp_path, place):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = train_tokenizer(tmp_path / "bpe")
    content = json.loads((folder / "tokenizer.json").read_text())
    # What a training script left behind; it must not reach the ids.
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 300},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    plain = tokenizers.load(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ours = tokenizers.load(folder if place == "folder" else folder / "tokenizer.json")
    assert ours.sha256 == plain.sha256
    assert tokenizers.folder_of(ours.name) == folder
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text, encoded in zip(TEXTS, ours.encode_all(TEXTS), strict=True):
        ids, covered = ours.encode(text)
        assert ids.tolist() == encoded.ids.tolist() == theirs(text)["input_ids"]
        assert ids.dtype == covered.dtype == np.int32
        assert covered.sum() == len(text.encode()) and (covered >= 0).all()
        assert ours.decode(ids) == text
    assert (ours.size, ours.eos) == (len(theirs), theirs.eos_token_id)
    assert ours.vocabulary == theirs.get_vocab()
    assert ours.decode([ours.eos, ours.vocabulary["Ã"], 10**6]) == "\ufffd"


def test_bytes_of_tokens_that_share_a_character_or_drop_some(tmp_path):
    folder = train_tokenizer(tmp_path, ["a"], vocabulary=257)
    encoded = tokenizers.load(folder).encode_all(["aé😀b"])[0]
    assert encoded.bytes.tolist() == [1, 2, 0, 4, 0, 0, 0, 1]
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoded = tokenizers.load(folder).encode_all(["  ab é \n"])[0]
    assert encoded.bytes.tolist() == [3, 1, 1, 2, 2]


def test_the_digest_tells_tokenizers_apart(tmp_path):
    one = tokenizers.load(train_tokenizer(tmp_path / "one"))
    other = tokenizers.load(train_tokenizer(tmp_path / "other", vocabulary=390))
    assert len({one.sha256, other.sha256, tokenizers.load("bytes").sha256}) == 3
    assert one.sha256 == tokenizers.load(tmp_path / "one").sha256


SPECIAL = ("<|endoftext|>", "<s>", "</s>")


@pytest.mark.parametrize(
    "settings, files, eos",
    [
        ({"eos_token": {"content": "</s>", "lstrip": False}}, {}, 2),
        ({"eos_token": "</s>"}, {"generation_config.json": {"eos_token_id": [0, 2]}}, 2),
        ({}, {"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, 2),
        ({}, {"generation_config.json": {"eos_token_id": [2, 0]}, "config.json": {"eos_token_id": 0}}, 2),
        ({}, {"config.json": {"eos_token_id": 2}}, 2),
        ({"eos_token": None}, {"config.json": {"eos_token_id": 0}}, 0),
    ],
)
def test_which_token_ends_a_text_is_read_from_the_files_beside(tmp_path, settings, files, eos):
    folder = train_tokenizer(tmp_path, settings=settings, special=SPECIAL)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer = tokenizers.load(folder)
    assert tokenizer.eos == eos and tokenizer.special_tokens["eos_token"] == SPECIAL[eos]


@pytest.mark.parametrize(
    "first, settings, bos",
    [
        ("<s>", {"bos_token": "<s>"}, 1),
        ("<s>", {}, 1),
        (None, {"bos_token": "<s>"}, None),  # GPT-2 names one that is not put before its texts
        (None, {"bos_token": "<s>", "add_bos_token": True}, 1),
        ("<s>", {"bos_token": "<s>", "add_bos_token": False}, None),
        (None, {"bos_token": None}, None),
    ],
)
def test_the_token_before_a_text_is_the_one_that_transformers_puts_there(tmp_path, first, settings, bos):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = {"eos_token": "</s>", **settings}
    folder = train_tokenizer(tmp_path, settings=settings, special=SPECIAL, first=first)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0}))  # of the model, as Qwen2.5 has one
    tokenizer = tokenizers.load(folder)
    assert tokenizer.bos == bos
    if "add_bos_token" not in settings:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)("plain")["input_ids"]
        assert theirs == [*([] if bos is None else [bos]), *tokenizer.encode("plain")[0].tolist()]


def test_chat_templates_are_found(tmp_path):
    folder = train_tokenizer(tmp_path)
    assert tokenizers.load(folder).chat_template is None
    train_tokenizer(tmp_path, settings={"eos_token": "<|endoftext|>", "chat_template": "one"})
    assert tokenizers.load(folder).chat_template == "one"
    named = [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]
    train_tokenizer(tmp_path, settings={"eos_token": "<|endoftext|>", "chat_template": named})
    assert tokenizers.load(folder).chat_template == "three"
    (folder / "chat_template.jinja").write_text("four")
    assert tokenizers.load(folder).chat_template == "four"


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere: give 'bytes'"):
        tokenizers.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer at"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer.json"):
        tokenizers.load(tmp_path)
    train_tokenizer(tmp_path, settings={})
    with pytest.raises(UserError, match="which token ends a text"):
        tokenizers.load(tmp_path)


def test_vocabularies_are_compared_id_by_id():
    small = {"a": 0, "b": 1, "c": 2}
    assert tokenizers.shared_vocabulary(small, dict(small)) == 3
    assert tokenizers.shared_vocabulary(small, {**small, "d": 3}) == 3
    assert tokenizers.shared_vocabulary({**small, "d": 3, "e": 9}, small) == 3
    with pytest.raises(UserError, match="id 1 is 'b' to the teacher and 'c' to the student"):
        tokenizers.shared_vocabulary(small, {"a": 0, "c": 1, "b": 2})  # equal sizes, equal tokens
    with pytest.raises(UserError, match="id 0 is 'a' to the teacher and no token to the student"):
        tokenizers.shared_vocabulary(small, {"a": 3, "b": 1, "c": 2})
    with pytest.raises(UserError, match="id 2 is 'c' to the teacher and 'x' to the student"):
        tokenizers.shared_vocabulary(small, {"a": 0, "b": 1, "x": 2, "c": 3})


def test_padded_tables_are_cut_to_the_tokenizer():
    assert tokenizers.shared_rows(151936, 152064, 151665) == 151665
    assert tokenizers.shared_rows(257, 257, 257) == 257
    with pytest.raises(UserError, match="the student's table of embeddings has 150000 rows and the tokenizer 151665"):
        tokenizers.shared_rows(151936, 150000, 151665)
    with pytest.raises(UserError, match="the teacher's"):
        tokenizers.shared_rows(100, 300, 257)

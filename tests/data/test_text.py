import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from kdjax.data import text, tokenizers
from kdjax.data.packing import target_mask
from kdjax.errors import UserError
from tests.data.conftest import shared_data
from tests.data.test_tokenizers import train_tokenizer


def _config(name, data_dir="", *, tokenizer="bytes", context=16, packing="split", **options):
    return {
        "name": name,
        "data_dir": str(data_dir),
        "options": options,
        "tokenizer": str(tokenizer),
        "context": context,
        "packing": packing,
    }


def _shared(path):
    if not (shared_data() / path).exists():
        pytest.skip(f"{path} is not here: set KDJAX_TEST_DATA to a folder that has it")
    return shared_data()


def _write(folder, **files):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _lines(folder, name, lines):
    (folder / name).write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )


def _documents(split, tokenizer):
    """The documents of windows of whole ones: (text, text of the targets), sorted."""
    found = []
    mask = np.concatenate([np.zeros((len(split.tokens), 1), bool), target_mask(split)], axis=1)
    for tokens, segments, targets in zip(split.tokens, split.segments, mask, strict=True):
        for segment in range(1, segments.max() + 1):
            ids, wanted = tokens[segments == segment], targets[segments == segment]
            assert ids[-1] == tokenizer.eos and wanted[-1]  # what ends a text stays a target
            found.append((tokenizer.decode(ids), tokenizer.decode(ids[wanted])))
    return sorted(found)


def _stream(split):
    """The tokens of windows that were split, one after the other."""
    tokens, segments = (np.concatenate([x[0], x[1:, 1:].ravel()]) for x in (split.tokens, split.segments))
    return tokens[segments > 0]


def _count(split):
    """How many documents end in windows of bytes."""
    return int((split.tokens[:, 1:] == 256).sum())


def test_stdlib_is_every_module_once_in_the_split_of_its_digest():
    dataset = text.load(_config("stdlib", context=256))
    root = Path(sysconfig.get_path("stdlib"))
    for split, in_test in ((dataset.train, False), (dataset.test, True)):
        wanted = []
        for path in sorted(root.glob("*.py")):
            if (int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 10 == 0) == in_test and path.stat().st_size:
                wanted += [*path.read_bytes(), 256]
        np.testing.assert_array_equal(_stream(split), wanted)
        count = wanted.count(256)
        assert text.targets(split) == len(wanted) - count
        assert text.target_bytes(split) == len(wanted) - 2 * count  # nor the first byte, nor the end that is none
    again = text.load(_config("stdlib", context=256))
    assert again.sha256 == dataset.sha256 and dataset.context == 256 and dataset.dropped == (0, 0)
    assert dataset.prompt and dataset.test.tokens.dtype == np.uint16


def test_stdlib_modules_can_be_chosen():
    few = text.load(_config("stdlib", modules="encodings/*.py", context=64, packing="whole", longer="cut"))
    assert few.prompt and _count(few.train) > 60
    fewer = text.load(_config("stdlib", modules="encodings/*.py", files=40))
    assert _count(fewer.train) + _count(fewer.test) <= 40 < _count(few.train)
    with pytest.raises(UserError, match="matches no file in"):
        text.load(_config("stdlib", modules="*.pyx"))
    with pytest.raises(UserError, match=r"data.options.files=-1"):
        text.load(_config("stdlib", files=-1))


def test_a_single_file_is_cut_where_a_line_begins():
    folder = _shared("tiny_shakespeare/input.txt")
    dataset = text.load(_config("text:tiny_shakespeare/*.txt", folder, context=128))
    whole = (folder / "tiny_shakespeare" / "input.txt").read_bytes()
    train, test = _stream(dataset.train), _stream(dataset.test)
    assert train[-1] == test[-1] == 256
    assert bytes(train[:-1].tolist()) + bytes(test[:-1].tolist()) == whole
    assert train[-2] == ord("\n") and abs(len(test) / len(whole) - 0.1) < 0.001
    assert dataset.prompt == bytes(test[:64].tolist()).decode()


def test_real_text_has_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = _shared("tiny_shakespeare/input.txt")
    content = (folder / "tiny_shakespeare" / "input.txt").read_text(encoding="utf-8")
    bpe = train_tokenizer(tmp_path, [content[:100_000]], vocabulary=600)
    dataset = text.load(_config("text:tiny_shakespeare/input.txt", folder, tokenizer=bpe, context=128))
    theirs = transformers.AutoTokenizer.from_pretrained(bpe)
    train, test = _stream(dataset.train), _stream(dataset.test)
    cut = len(theirs.decode(train[:-1]))
    assert [*theirs(content[:cut])["input_ids"], theirs.eos_token_id] == train.tolist()
    assert [*theirs(content[cut:])["input_ids"], theirs.eos_token_id] == test.tolist()
    first = len(theirs.decode(train[:1]).encode())
    assert text.target_bytes(dataset.train) == len(content[:cut].encode()) - first


def test_files_are_documents_in_the_split_that_is_said_or_that_of_their_digest(tmp_path):
    names = [f"{number}.txt" for number in range(30)]
    _write(tmp_path, **{name: f"text of {name}" for name in names})
    for wanted, options in (
        ({name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}, {}),
        ({name for name in names if name.startswith("1")}, {"test": "1*.txt"}),
    ):
        dataset = text.load(_config("text:*.txt", tmp_path, context=20, packing="whole", **options))
        tests = _documents(dataset.test, dataset.tokenizer)
        assert [whole for whole, _ in tests] == sorted(f"text of {name}" for name in wanted)
        trains = _documents(dataset.train, dataset.tokenizer)
        assert [whole for whole, _ in trains] == sorted(f"text of {name}" for name in {*names} - wanted)
        assert all(targets == whole[1:] for whole, targets in trains)
    folder = tmp_path / "moved [1]"  # a pattern to glob, were it not the name of a folder
    folder.mkdir()
    for name in names:
        (tmp_path / name).rename(folder / name)
    moved = text.load(_config("text:**/*.txt", folder, context=20, packing="whole", test="1*.txt"))
    assert moved.sha256 == dataset.sha256


def test_lines_of_prompt_and_completion_have_the_completion_in_the_loss():
    folder = _shared("gsm8k/test.jsonl")
    options = {"prompt": "question", "completion": "answer", "separator": "\n", "test": "gsm8k/test.jsonl"}
    dataset = text.load(_config("jsonl:gsm8k/*.jsonl", folder, context=2047, packing="whole", **options))
    problems = [json.loads(line) for line in (folder / "gsm8k" / "test.jsonl").read_text().split("\n") if line]
    wanted = sorted((p["question"] + "\n" + p["answer"], p["answer"]) for p in problems)
    assert _documents(dataset.test, dataset.tokenizer) == wanted
    assert text.target_bytes(dataset.test) == sum(len(answer.encode()) for _, answer in wanted)
    assert text.targets(dataset.test) == text.target_bytes(dataset.test) + len(wanted)
    assert dataset.prompt == problems[0]["question"] + "\n"
    train = [json.loads(line) for line in (folder / "gsm8k" / "train.jsonl").read_text().split("\n") if line]
    assert text.target_bytes(dataset.train) == sum(len(problem["answer"].encode()) for problem in train)


def test_lines_are_read_by_what_the_first_has(tmp_path):
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed")
    conversation = [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Ja\u2028."}]
    for lines, test, whole, targets, prompt in (
        ([{"text": "añb", "id": 7}], [{"text": "test"}], "añb", "ñb", "test"),
        ([{"prompt": "p ", "completion": "q"}], [{"prompt": "r ", "completion": "s"}], "p q", "q", "r "),
        (
            [{"messages": conversation}],
            [{"messages": conversation}],
            "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\nJa\u2028.<|im_end|>",
            "Ja\u2028.<|im_end|>",
            "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ):
        _lines(tmp_path, "train.jsonl", lines)
        _lines(tmp_path, "test.jsonl", test)
        dataset = text.load(_config("jsonl:*.jsonl", tmp_path, context=100, packing="whole", test="test.jsonl"))
        assert _documents(dataset.train, dataset.tokenizer) == [(whole, targets)]
        assert dataset.prompt == prompt


def test_lines_are_split_by_digest(tmp_path):
    _lines(tmp_path, "a.jsonl", [{"body": f"line {number}"} for number in range(1, 101)])
    dataset = text.load(_config("jsonl:a.jsonl", tmp_path, packing="whole", text="body"))
    held_out = [n for n in range(1, 101) if int(hashlib.sha256(f"a.jsonl:{n}".encode()).hexdigest(), 16) % 10 == 0]
    assert [whole for whole, _ in _documents(dataset.test, dataset.tokenizer)] == sorted(f"line {n}" for n in held_out)
    assert len(_documents(dataset.train, dataset.tokenizer)) == 100 - len(held_out)


def test_a_trained_tokenizer_with_tokens_before_and_after(tmp_path):
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed")
    special = ("<s>", "</s>")
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    settings = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>", "chat_template": template}
    folder = train_tokenizer(tmp_path / "bpe", settings=settings, special=special, first="<s>", vocabulary=300)
    _lines(tmp_path, "text.jsonl", [{"text": "naïve 😀 café"}])
    _lines(tmp_path, "chat.jsonl", [{"messages": [{"role": role, "content": role} for role in ("user", "assistant")]}])
    load = lambda kind: text.load(
        _config(f"jsonl:{kind}.json*", tmp_path, tokenizer=folder, context=99, packing="whole", test=f"{kind}.jsonl")
    )
    with pytest.raises(UserError, match=r"the train split of jsonl:text.json. has no documents"):
        load("text")
    for kind in ("text", "chat"):
        (tmp_path / f"{kind}.json_").write_bytes((tmp_path / f"{kind}.jsonl").read_bytes())
    plain, spoken = load("text"), load("chat")
    real = plain.train.tokens[plain.train.segments > 0].tolist()
    assert real[0] == 0 and real[-1] == 1 and real[1:-1] == plain.tokenizer.encode("naïve 😀 café")[0].tolist()
    assert text.target_bytes(plain.train) == len("naïve 😀 café".encode())  # the first byte is a target after <s>
    real = spoken.train.tokens[spoken.train.segments > 0].tolist()
    assert real == spoken.tokenizer.encode("<s>[user]user</s>[assistant]assistant</s>")[0].tolist()
    assert real.count(0) == 1 and real.count(1) == 2  # neither is written twice
    targets = spoken.train.tokens[:, 1:][target_mask(spoken.train)]
    assert targets.tolist() == spoken.tokenizer.encode("assistant</s>")[0].tolist()
    assert plain.tokenizer.sha256 == tokenizers.load(folder).sha256


def test_the_digest_is_of_what_signals_of_a_teacher_depend_on(tmp_path):
    _write(tmp_path, **{"a.txt": "some text that is long enough\n" * 3, "b.txt": "another text of some length\n"})
    load = lambda **change: text.load(_config("text:a.txt", tmp_path, test="b.txt") | change).sha256
    assert len({load(), load(context=15), load(context=99, packing="whole"), load(options={})}) == 4
    assert load() == load()
    same = ({"text": "ab"}, {"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": "\0"})
    digests = set()
    for number, line in enumerate(same):  # of one text, or of one that is all there but for padding
        for name in ("train", "test"):
            _lines(tmp_path, f"{name}{number}.jsonl", [line])
        digests.add(load(name=f"jsonl:train{number}.jsonl", options={"test": f"test{number}.jsonl"}, packing="whole"))
    assert len(digests) == 3


def test_a_prepared_tfds_set_is_read(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.features import FeaturesDict, Text

    # As download_and_prepare writes it, which needs TensorFlow.
    folder = tmp_path / "poems" / "1.0.0"
    folder.mkdir(parents=True)
    features = FeaturesDict({"poem": Text(), "title": Text()})
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    texts = {"train": ["Über allen Gipfeln", "ist Ruh"], "test": ["in allen Wipfeln"]}
    splits = []
    for split, poems in texts.items():
        writer = ArrayRecordWriter(str(folder / f"poems-{split}.array_record-00000-of-00001"), "group_size:1")
        for poem in poems:
            writer.write(_example({"poem": poem, "title": "t"}))
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        size = str(sum(map(len, poems)))
        splits.append(
            {"name": split, "filepathTemplate": template, "numBytes": size, "shardLengths": [str(len(poems))]}
        )
    info = {"name": "poems", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    dataset = text.load(_config("tfds:poems", tmp_path, packing="whole", context=30, text="poem"))
    assert [whole for whole, _ in _documents(dataset.train, dataset.tokenizer)] == sorted(texts["train"])
    assert [whole for whole, _ in _documents(dataset.test, dataset.tokenizer)] == texts["test"]
    assert dataset.prompt == "in allen Wipfeln"
    with pytest.raises(UserError, match="did you mean 'poem'"):
        text.load(_config("tfds:poems", tmp_path, text="poen"))


def _example(values):
    """A serialised tf.train.Example of byte features."""
    field = lambda number, content: bytes([number << 3 | 2, len(content)]) + content
    entries = b"".join(
        field(1, field(1, key.encode()) + field(2, field(1, field(1, value.encode())))) for key, value in values.items()
    )
    return field(1, entries)


def test_a_set_of_images_is_no_text(fashion_mnist_dir):
    with pytest.raises(UserError, match="that feature of tfds:fashion_mnist is not text"):
        text.load(_config("tfds:fashion_mnist", fashion_mnist_dir, text="image"))
    with pytest.raises(UserError, match="unknown data set tfds:nothing_like_it"):
        text.load(_config("tfds:nothing_like_it", fashion_mnist_dir))


def test_corrupt_lines_and_files_are_left_out_and_counted(tmp_path, capsys):
    good = [json.dumps({"text": f"a line {number}"}).encode() for number in range(6)]
    broken = [b'{"text": "torn', b'{"text": "caf\xe9"}', b'{"text": ""}', b"[" * 100_000, b'{"body": "other"}']
    _write(tmp_path, **{"train.jsonl": b"\n".join([*broken[:1], *good, *broken[1:]]), "test.jsonl": good[0]})
    config = _config("jsonl:train.jsonl", tmp_path, packing="whole", test="test.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl:1 is not JSON"):
        text.load(config)
    dataset = text.load(config | {"corrupt": "skip"})
    assert [whole for whole, _ in _documents(dataset.train, dataset.tokenizer)] == [f"a line {n}" for n in range(6)]
    said = capsys.readouterr().err
    assert said.startswith("kdjax: data.corrupt=skip left out 5 of the 11 records of jsonl:train.jsonl: ")
    assert "train.jsonl:1 is not JSON" in said and "train.jsonl:8 is not UTF-8: byte 13 is 0xe9" in said
    assert "(and 2 more)" in said
    with pytest.raises(UserError, match="neither text, nor messages"):  # the options are wrong, not the lines
        text.load(_config("jsonl:other.jsonl", tmp_path) | {"corrupt": "skip"} | _other(tmp_path))
    _write(tmp_path, **{"a.txt": GOOD, "b.txt": b"caf\xe9", "c.txt": GOOD})
    dataset = text.load(_config("text:*.txt", tmp_path, test="a.txt") | {"corrupt": "skip"})
    assert _stream(dataset.train).tolist() == [*GOOD.encode(), 256]
    assert "left out 1 of the 2 records of text:*.txt" in capsys.readouterr().err


def _other(folder):
    _write(folder, **{"other.jsonl": b'{"question": "a"}\n' * 3})
    return {}


GOOD = "text that is long enough for a window of sixteen\n"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("stdlob", {}, "did you mean 'stdlib'"),
        ("text:good*.txt", {"tset": "x"}, "did you mean 'test'"),
        ("stdlib", {"module": "x"}, "did you mean 'modules'"),
        ("text:no*.txt", {}, r"data.name: 'no\*.txt' matches no file in "),
        ("text:good*.txt", {"test": "no*"}, r"data.options.test='no\*' matches no file in "),
        ("text:empty.txt", {"test": "good1.txt"}, r"document 0 \(.*empty.txt\) is empty"),
        ("text:latin.txt", {}, "latin.txt is not UTF-8: byte 3 is 0xe9"),
        ("text:line.txt", {}, "line.txt is one line"),
        ("text:good1.txt", {"test": "good1.txt"}, "the train split of text:good1.txt has no documents"),
        ("text:good*.txt", {"longer": "no"}, "unknown way with longer documents 'no'"),
        ("text:short.txt", {"test": "good1.txt"}, "the train split of text:short.txt: the text has 6 tokens, too few"),
        ("jsonl:broken.jsonl", {}, "broken.jsonl:2 is not JSON"),
        ("jsonl:list.jsonl", {}, "list.jsonl:1 holds a list and not an object"),
        ("jsonl:question.jsonl", {}, "question.jsonl:1 has the fields question, answer, and neither text"),
        ("jsonl:question.jsonl", {"prompt": "question"}, "question.jsonl:1 has no field 'completion': it has question"),
        ("jsonl:question.jsonl", {"prompt": "a", "text": "b"}, r"more than one kind \(prompt, text\)"),
        ("jsonl:mixed.jsonl", {}, "mixed.jsonl:3 has no field 'text': it has body"),
        ("jsonl:number.jsonl", {}, "field 'text' of .*number.jsonl:1 is a int and not text"),
        ("jsonl:empty.jsonl", {}, r"document 1 \(.*empty.jsonl:2\) is empty"),
        ("jsonl:surrogate.jsonl", {}, "surrogate.jsonl:1 has half a surrogate pair"),
        ("jsonl:silent.jsonl", {}, "silent.jsonl:1: a completion is empty"),
        ("jsonl:user.jsonl", {}, "user.jsonl:1: a conversation has no turn of the assistant"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, name, options, message):
    _write(
        tmp_path,
        **{
            "good1.txt": GOOD,
            "good2.txt": GOOD,
            "empty.txt": "",
            "latin.txt": b"caf\xe9",
            "line.txt": "one line only",
            "short.txt": "short",
            "broken.jsonl": '{"text": "a"}\n{"text": \n',
            "list.jsonl": "[1]\n",
            "question.jsonl": '{"question": "a", "answer": "b"}\n',
            "mixed.jsonl": '{"text": "a"}\n\n{"body": "b"}\n',
            "number.jsonl": '{"text": 7}\n',
            "empty.jsonl": '{"text": "a"}\n{"text": ""}\n',
            "surrogate.jsonl": '{"text": "\\ud800"}\n',
            "silent.jsonl": '{"prompt": "a", "completion": ""}\n',
            "user.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
        },
    )
    with pytest.raises(UserError, match=message) as raised:
        text.load(_config(name, tmp_path, **options))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 1}, "the train split of text:.*: a context of 1 tokens"),
        ({"packing": "hole"}, "did you mean 'whole'"),
        ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
        ({"packing": "whole"}, r"document 0 \(.*a.txt\) has 50 tokens and a window 17"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, change, message):
    _write(tmp_path, **{"a.txt": GOOD, "b.txt": GOOD})
    with pytest.raises(UserError, match=message):
        text.load(_config("text:a.txt", tmp_path, test="b.txt") | change)

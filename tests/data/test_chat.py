import json

import numpy as np
import pytest

from kdjax.data import chat, tokenizers
from kdjax.errors import UserError
from tests.data.conftest import shared_data
from tests.data.test_tokenizers import train_tokenizer

pytest.importorskip("jinja2", reason="the package jinja2 is not installed")

BYTES = tokenizers.load("bytes")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
TURNS = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And in Roman numerals? Ⅱ é 😀"},
    {"role": "assistant", "content": "IV, naïvely 😀."},
]
# What the model writes, marked by the template itself; the white space after the end of a turn is outside.
MARKED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# What chat templates use of their environment.
WIDE = """
{%- if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{% continue %}{% endif %}
    {% if loop.first %}
Today is {{ strftime_now('%Y') }}.
    {% endif %}
    {{- message | tojson }} {{ message.content | tojson(indent=2) }}
{% endfor %}
{{- eos_token }}{% if add_generation_prompt %}>{% endif %}
"""
# Takes the thinking of all turns but the last away, and gives the last an empty one (Qwen3).
THINKING = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
    {{- message.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def _of(template, **settings):
    return BYTES._replace(chat_template=template, special_tokens={"eos_token": "<|endoftext|>", **settings})


def _folder(tmp_path, template):
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<s>", "chat_template": template}
    return train_tokenizer(tmp_path, settings=settings, special=SPECIAL)


def _in_loss(tokenizer, messages):
    text, spans = chat.conversation(messages, tokenizer)
    encoded = tokenizer.encode_all([text])[0]
    return encoded.ids, chat.in_spans(encoded.starts, encoded.ends, spans)


@pytest.mark.parametrize("messages", [TURNS, TURNS[:3], TURNS[1:3]], ids=["two turns", "one turn", "no system"])
def test_the_loss_is_on_what_transformers_says_the_assistant_writes(tmp_path, messages):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = _folder(tmp_path, MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, wanted = _in_loss(tokenizers.load(folder), messages)
    count = len(ids)  # ours ends with the last turn, theirs with the white space after it
    assert theirs["input_ids"][:count] == ids.tolist() and len(theirs["input_ids"]) == count + 1
    assert theirs["assistant_masks"][:count] == wanted.astype(int).tolist()
    assert not any(theirs["assistant_masks"][count:])
    ends = np.flatnonzero(ids == SPECIAL.index("<|im_end|>"))  # which is the token that pads, too
    roles = [message["role"] for message in messages]
    assert wanted[ends].tolist() == [role == "assistant" for role in roles]


@pytest.mark.parametrize("template", [MARKED, WIDE, THINKING, chat.CHATML])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(tmp_path, template, prompt):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = _folder(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=prompt
    )
    assert chat.render(TURNS, tokenizers.load(folder), add_generation_prompt=prompt) == theirs


def test_without_a_template_it_is_chatml():
    text, spans = chat.conversation(TURNS[1:], BYTES)
    assert text == (
        "<|im_start|>user\nWhat is 2 + 2?\n<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
        "<|im_start|>user\nAnd in Roman numerals? Ⅱ é 😀<|im_end|>\n<|im_start|>assistant\nIV, naïvely 😀.<|im_end|>"
    )
    assert [text[start:end] for start, end in spans] == ["It is 4.<|im_end|>", "IV, naïvely 😀.<|im_end|>"]
    ids, wanted = _in_loss(BYTES, TURNS[1:])
    assert BYTES.decode(ids[wanted]) == "It is 4.<|im_end|>IV, naïvely 😀.<|im_end|>"


def test_of_turns_that_are_rewritten_only_the_last_is_in_the_loss():
    text, spans = chat.conversation(TURNS, _of(THINKING))
    assert [text[start:end] for start, end in spans] == ["<think>\n\n</think>\n\nIV, naïvely 😀.<|im_end|>"]
    assert "It is 4." in text and text.endswith("<|im_end|>")
    text, spans = chat.conversation(TURNS[:3], _of(THINKING))
    assert [text[start:end] for start, end in spans] == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]


def test_one_turn_that_is_rewritten_leaves_only_the_last_in_the_loss():
    rewritten = (
        "{% for m in messages %}{% if m.content != 'long' or (loop.last and not add_generation_prompt) %}"
        "{{ m.content }};{% else %}short;{% endif %}{% endfor %}"
    )
    for contents, in_loss in (("one", "long", "two"), ["two;"]), (("one", "two", "three"), ["one;", "two;", "three;"]):
        messages = [{"role": "assistant", "content": content} for content in contents]
        text, spans = chat.conversation(messages, _of(rewritten))
        assert [text[start:end] for start, end in spans] == in_loss


def test_what_follows_the_last_assistant_turn_is_left_out():
    assert chat.conversation(TURNS[:4], BYTES) == chat.conversation(TURNS[:3], BYTES)


def test_real_problems_as_conversations():
    path = shared_data() / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("GSM8K is not here: set KDJAX_TEST_DATA to a folder with gsm8k/test.jsonl")
    for line in path.read_text().split("\n")[:50]:
        problem = json.loads(line)
        messages = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": problem["answer"]},
        ]
        ids, wanted = _in_loss(BYTES, messages)
        assert BYTES.decode(ids[wanted]) == problem["answer"] + "<|im_end|>"


def test_a_pair_has_its_completion_in_the_loss():
    text, spans = chat.pair("2 + 2 = ", "4é")
    assert (text, [text[start:end] for start, end in spans]) == ("2 + 2 = 4é", ["4é"])
    with pytest.raises(UserError, match="a completion is empty"):
        chat.pair("2 + 2 = ", "")


def test_tokens_are_in_a_span_by_any_of_their_characters():
    starts, ends = np.array([0, 2, 4, 4, 6], np.int32), np.array([2, 4, 6, 4, 8], np.int32)
    assert chat.in_spans(starts, ends, [(3, 5)]).tolist() == [False, True, True, True, False]
    assert chat.in_spans(starts, ends, [(4, 6)]).tolist() == [False, False, True, True, False]
    assert chat.in_spans(starts, ends, [(0, 2), (6, 8)]).tolist() == [True, False, False, False, True]
    assert not chat.in_spans(starts, ends, []).any()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "messages, template, message",
    [
        ([], None, "at least one"),
        ("text", None, "list of messages"),
        ([USER, "b"], None, "message 1 of a conversation is not an object"),
        ([USER, {"role": "assistant"}], None, "message 1 of a conversation has no content that is text"),
        ([{"content": "a"}], None, "message 0 of a conversation has no role"),
        ([USER], None, "no turn of the assistant"),
        ([USER, ASSISTANT], "{{ raise_exception('roles must alternate') }}", "refuses a conversation: roles must alt"),
        ([USER, ASSISTANT], "{{ messages[7].content }}", "refuses a conversation"),
        ([USER, ASSISTANT], "{{ ''.__class__.__mro__ }}", "refuses a conversation"),  # the sandbox
        ([USER, ASSISTANT], "{% for %}", "not one that jinja2 reads"),
        ([USER, ASSISTANT], THINKING + "{% if add_generation_prompt %}<think>no{% endif %}", "use another template"),
        ([USER, ASSISTANT], "{{ messages[0].content }}", "an assistant turn of a conversation is empty"),
    ],
)
def test_bad_conversations_are_refused(messages, template, message):
    with pytest.raises(UserError, match=message):
        chat.conversation(messages, _of(template))

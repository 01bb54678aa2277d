"""Conversations and prompts as text, and which of its characters are in the loss.

No token is ever left out of the loss by its value: a token that both ends a turn and pads elsewhere stays a target.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]  # characters [start, end)

# For tokenizers without a template (OpenAI's ChatML).
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, Spans]:
    """A conversation as text that ends with its last assistant turn, and the spans of the turns that are in the loss.

    In the loss is what the model is to write: each assistant turn, from the end of what the template gives as its
    prompt to the end of the turn, with the token that ends it; the white space that the template puts after that token
    is not, for nobody waits for it. A turn is found by writing the conversation up to it and with it. Templates that
    rewrite earlier turns (Qwen3 takes their thinking away) leave only the last assistant turn to be found so, and then
    only that one is in the loss. Messages after the last assistant turn are left out: no target sees them.

    Args:
      messages: dicts with ``role`` and ``content``, both text; other keys are the template's.
      tokenizer: whose ``chat_template`` is used; ChatML where it has none.

    Raises:
      UserError: messages that are none, no assistant turn, one with nothing in it, what the template refuses, or a
        template by which not even the last turn can be found.
    """
    _check(messages)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation has no turn of the assistant, which is what is in the loss: add one.")
    text = render(messages[: turns[-1] + 1], tokenizer)
    spans = [_span(text, messages, turn, tokenizer) for turn in turns]
    last = spans[-1]
    if last is None:
        raise UserError(
            "the chat template does not begin its last assistant turn with what it gives as the prompt of one, so that "
            "the turn cannot be found: use another template."
        )
    found = [span for span in spans if span is not None]
    found = found if len(found) == len(spans) else [last]
    for start, end in found:
        if start >= end:
            raise UserError("an assistant turn of a conversation is empty: leave it out.")
    return text[: last[1]], found


def pair(prompt: str, completion: str) -> tuple[str, Spans]:
    """A prompt with its completion right after it as text, and the completion's span, which is in the loss.

    Raises:
      UserError: an empty completion.
    """
    if not completion:
        raise UserError("a completion is empty, so that nothing of the text is in the loss: leave it out.")
    return prompt + completion, [(len(prompt), len(prompt) + len(completion))]


def in_spans(starts: NDArray[np.int32], ends: NDArray[np.int32], spans: Spans) -> NDArray[np.bool_]:
    """Whether each token has any character of the spans; bool [n].

    Args:
      starts: [n], the first character of each token.
      ends: [n], the character after its last one.
      spans: of characters, as ``conversation`` and ``pair`` give them.
    """
    found = np.zeros(starts.shape, bool)
    for start, end in spans:
        found |= (starts < end) & (np.maximum(ends, starts + 1) > start)
    return found


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation, as ``transformers``' ``apply_chat_template(..., tokenize=False)`` gives it.

    A template that asks for the date gets that of today, so that its text is another tomorrow.

    Args:
      messages: dicts with ``role`` and ``content``.
      tokenizer: its ``chat_template`` and ``special_tokens``; ChatML where it has no template.
      add_generation_prompt: end with what comes before an assistant turn.

    Raises:
      UserError: the template cannot be read or refuses the messages, or the package jinja2 is missing.
    """
    template = _template(tokenizer.chat_template or CHATML)
    try:
        return template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a program, so it may raise anything
        raise UserError(
            f"the chat template of {tokenizer.name} refuses a conversation: {str(error) or type(error).__name__}."
        ) from error


def _span(text: str, messages: Sequence[Message], turn: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Where a turn is in ``text``, without the white space at its end; None where its prefixes are not the text's."""
    before = render(messages[:turn], tokenizer, add_generation_prompt=True)
    until = render(messages[: turn + 1], tokenizer)
    if not (text.startswith(until) and until.startswith(before)):
        return None
    return len(before), len(until.rstrip())


def _check(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a conversation is a list of messages with at least one of them.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} of a conversation is not an object with role and content.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"message {number} of a conversation has no {key} that is text: give it one.")


_MOST = 2**24  # characters, or entries, that a template may make at once


@lru_cache(maxsize=16)
def _template(source: str) -> Any:
    """The template in the environment that ``transformers`` gives chat templates."""
    jinja2 = _jinja2()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, by which templates mark what the model writes; here its body as it is."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    class Sandbox(ImmutableSandboxedEnvironment):
        """In which ``'a' * 10**12`` and ``9 ** 9 ** 9`` do not fill the memory."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
            if operator == "*" and sizes[0] * sizes[1] > _MOST and any(hasattr(x, "__len__") for x in (left, right)):
                raise jinja2.exceptions.SecurityError("it repeats a text too often")
            if operator == "**" and sizes[1] > 64:
                raise jinja2.exceptions.SecurityError("it raises a number to too high a power")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.exceptions.TemplateError, ValueError, RecursionError) as error:
        raise UserError(f"the chat template is not one that jinja2 reads: {error}.") from error


def _jinja2() -> Any:
    try:
        import jinja2
        import jinja2.nodes
    except ImportError:
        raise UserError(
            "conversations are written with the package jinja2, which is missing: pip install 'kdjax[text]'."
        ) from None
    return jinja2

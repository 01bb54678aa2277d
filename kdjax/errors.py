"""The one kind of error that is the user's to mend: shown as a sentence, without a traceback, exit code 2."""

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and the remedy, in one sentence.

    It may quote a file that somebody else wrote, so it is one line in which nothing commands a terminal.
    """

    def __init__(self, sentence: str):
        super().__init__(visible(" ".join(sentence.splitlines())))


def visible(text: str) -> str:
    """Text in which every character that cannot be shown, or that would change how the rest is shown, is a number.

    Control and format characters, halves of surrogate pairs, and what is private or not a character become ``<U+202E>``
    and the like; line breaks, tabs, spaces and the two joiners within the words of many scripts stay.
    """
    shown = lambda c: c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"
    return "".join(c if shown(c) else f"<U+{ord(c):04X}>" for c in text)


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, without a full stop; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def unknown(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: gives the nearest valid name and lists them all."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}:{hint} valid names are {', '.join(valid)}.")

"""The one kind of error that is the user's to mend: shown as a sentence, without a traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and the remedy, in one sentence."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: gives the nearest valid name and lists them all."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}:{hint} valid names are {', '.join(valid)}.")

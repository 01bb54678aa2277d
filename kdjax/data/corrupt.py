"""Records that cannot be read: the first stops the run, or all are left out and counted, as ``data.corrupt`` says."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from kdjax import cluster
from kdjax.errors import UserError, unknown

CHOICES = ("stop", "skip")
_SHOWN = 3  # of the records that are left out
T = TypeVar("T")


def check(choice: str) -> None:
    """Raises a UserError where ``data.corrupt`` is none of ``CHOICES``."""
    if choice not in CHOICES:
        raise unknown("data.corrupt", choice, CHOICES)


def readable(readers: Iterable[Callable[[], T]], choice: str, what: str) -> list[T]:
    """What these readers give, each of one record.

    Args:
      readers: each raises a UserError that names its record, where that is corrupt.
      choice: of ``CHOICES``.
      what: they are records of, for the message.

    Raises:
      UserError: the first that is corrupt, unless those are to be left out.
    """
    found, faults, count = [], [], 0
    for read in readers:
        count += 1
        try:
            found.append(read())
        except UserError as error:
            if choice != "skip":
                raise
            faults.append(str(error))
    tell(faults, count, what)
    return found


def tell(faults: Sequence[str], count: int, what: str) -> None:
    """Says on stderr how many of ``count`` records were left out, and what is wrong with the first few; nothing where
    there are none."""
    if faults and cluster.is_first():
        more = f" (and {len(faults) - _SHOWN:,} more)" if len(faults) > _SHOWN else ""
        shown = " ".join(faults[:_SHOWN])
        print(
            f"kdjax: data.corrupt=skip left out {len(faults):,} of the {count:,} records of {what}: {shown}{more}",
            file=sys.stderr,
            flush=True,
        )

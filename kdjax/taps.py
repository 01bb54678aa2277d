"""Taps: which layers of student and teacher a term looks at, and which of them belong together."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.errors import UserError
from kdjax.losses.transformer import layer_map
from kdjax.terms import Term

Shape = tuple[int, ...]


class Network(NamedTuple):
    """What a term may tap of a model: the shape of every module's output by path, and its attention heads, if any."""

    taps: Mapping[str, Shape]
    heads: int = 0


class Pairs(NamedTuple):
    """Pairs of (student tap, teacher tap), and how many different student taps there are among them."""

    pairs: list[tuple[str, str | None]]
    student_layers: int


def pairs_of(name: str, term: Term, options: Mapping[str, Any], student: Network, teacher: Network | None) -> Pairs:
    """The taps of a term.

    Args:
      name: of the term, for messages.
      term: the kind.
      options: with ``student_taps``, ``teacher_taps`` (paths; empty: all modules that match ``term.taps``) and
        ``layers``: two lists of one length that are both given belong together in their order; otherwise the layer map
        of that name joins them (``losses.transformer.layer_map``).
      student: the student's modules.
      teacher: the main teacher's; ``None`` for a term that looks at the student alone.

    Raises:
      UserError: a tap that does not exist (names those near it), or a model without modules of that kind.
    """
    found = _taps(name, "student", options["student_taps"], term.taps, student)
    if teacher is None:
        return Pairs([(tap, None) for tap in found], len(found))
    taught = _taps(name, "teacher", options["teacher_taps"], term.taps, teacher)
    in_order = options["student_taps"] and options["teacher_taps"] and len(found) == len(taught)
    if in_order and options["layers"] != "learned":
        indices = [(i, i) for i in range(len(found))]
    else:
        try:
            indices = layer_map(options["layers"], len(found), len(taught))
        except UserError as error:
            raise UserError(f"losses.{name}.layers: {error}") from error
    weights = options.get("layer_weights", ())
    if weights and len(weights) != len(indices):
        raise UserError(f"losses.{name}.layer_weights has {len(weights)} numbers for {len(indices)} pairs of layers.")
    return Pairs([(found[s], taught[t]) for s, t in indices], len({s for s, _ in indices}))


def _taps(name: str, side: str, given: Sequence[str], pattern: str, network: Network) -> list[str]:
    for tap in given:
        if tap not in network.taps:
            near = difflib.get_close_matches(tap, network.taps, 4, 0.3) or list(network.taps)[:8]
            raise UserError(
                f"losses.{name}.{side}_taps: the {side} has no module {tap!r}; near it are {', '.join(near)}."
            )
    if given:
        return list(given)
    numbers = lambda path: [int(n) for n in re.findall(r"\d+", path)]
    matching = sorted((path for path in network.taps if re.search(pattern, path)), key=numbers)
    if not matching:
        some = ", ".join(list(network.taps)[:8])
        raise UserError(
            f"losses.{name} finds no module like {pattern!r} in the {side}: set losses.{name}.{side}_taps to some of "
            f"its modules, such as {some}."
        )
    return matching

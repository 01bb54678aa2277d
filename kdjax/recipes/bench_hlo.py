"""What devices say to each other in a compiled program, read from its text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One result of a collective operation on one device: an operation on several arrays is one for each."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int  # in a run of the program; 1 in a loop whose length the compiler does not know

    @property
    def bytes(self) -> int:
        """Of the result on one device, each time."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * max(int(bits.group()) if bits else 8, 8) // 8  # a truth value takes a byte


def collectives(text: str) -> list[Collective]:
    """The collective operations of a compiled program, from ``compiled.as_text()``."""
    found: list[tuple[str, str, tuple[str, str]]] = []
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    here, entry = "", ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            here = begins.group(2)
            entry = here if begins.group(1) else entry
            continue
        trips = _TRIPS.search(line)
        for role, names in _CALLED.findall(line):
            for name in re.findall(r"[\w.-]+", names):
                callers[name].append((here, int(trips.group(1)) if trips and role == "body" else 1))
        if match := _COLLECTIVE.search(line):
            result, kind, begun = match.groups()
            shapes = _SHAPE.findall(result)
            if begun and kind in ("all-gather", "collective-permute"):  # (operands, results)
                shapes = [shape for shape in shapes if shape[1]]  # without the contexts of a permute
                shapes = shapes[len(shapes) // 2 :]
            found += [(here, kind, shape) for shape in shapes]

    @cache
    def runs(name: str) -> int:
        return 1 if name == entry else sum(times * runs(caller) for caller, times in callers[name])

    sizes = lambda text: tuple(int(size) for size in text.split(",") if size)
    return [Collective(kind, dtype, sizes(shape), max(runs(where), 1)) for where, kind, (dtype, shape) in found]


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """``{kind: {"count", "bytes"}}`` of a run of the program, on one device."""
    total: dict[str, dict[str, int]] = {}
    for one in found:
        kind = total.setdefault(one.kind, {"count": 0, "bytes": 0})
        kind["count"] += one.times
        kind["bytes"] += one.times * one.bytes
    return total


def unasked(found: Iterable[Collective], whole: Mapping[str, tuple[int, ...]], split: Iterable[str]) -> list[str]:
    """The all-gathers whose result has the sizes of a whole parameter that the sharding rules keep whole, in words.

    Sizes are compared in any order and without those of 1, since a compiler transposes and reshapes, and those of a
    stack of layers also without the number of layers. Vectors are left out, for much else has their length.

    Args:
      found: of the compiled program.
      whole: parameters by path, and their shapes.
      split: the paths of those that the rules split, which are gathered where they are used.
    """
    asked = {sizes for path in split for sizes in _sizes(whole[path])}
    names = {sizes: path for path, shape in whole.items() for sizes in _sizes(shape) if sizes not in asked}
    return [
        f"{one.dtype}{list(one.shape)} is of the sizes of {names[_plain(one.shape)]}"
        for one in found
        if one.kind == "all-gather" and _plain(one.shape) in names
    ]


def _sizes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [sizes for sizes in (_plain(shape), _plain(shape[1:])) if len(sizes) > 1]


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))

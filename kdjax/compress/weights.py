"""Which parameters are weights: the arrays that are quantised, factorised and thinned out."""

import re
from collections.abc import Iterable
from typing import Any

from kdjax.errors import UserError
from kdjax.model import Params, flatten_paths

NAMES = ("kernel", "embedding")


def weights_of(params: Params, skip: Iterable[str] = ()) -> dict[str, Any]:
    """The weights among the parameters by path, such as ``"blocks/0/conv/kernel"``, in a fixed order.

    They are the arrays of two or more dimensions named kernel or embedding in whose path no regex of ``skip`` is found.
    """
    patterns = [re.compile(regex) for regex in skip]
    return {
        path: leaf
        for path, leaf in flatten_paths(params).items()
        if path.rsplit("/", 1)[-1] in NAMES and leaf.ndim >= 2 and not any(p.search(path) for p in patterns)
    }


def is_decoder(params: Params) -> bool:
    """Whether these are a bundled decoder's, whose blocks lie stacked: kernels [layers, m, n], tables [rows, width]."""
    return "attention" in params.get("blocks", {})


def is_stacked(path: str, params: Params) -> bool:
    """Whether the leading dimension of a weight counts layers."""
    return is_decoder(params) and path.startswith("blocks/")


def scale_axes(path: str, weight: Any, params: Params) -> tuple[int, ...]:
    """The axes that have a scale for each index: a table's rows, a kernel's outputs, those of each stacked layer."""
    if path.endswith("embedding") or (is_decoder(params) and path == "head/kernel"):  # [vocabulary, width]
        return (0,)
    return (0, weight.ndim - 1) if is_stacked(path, params) else (weight.ndim - 1,)


def check_skip(where: str, skip: Any, params: Params | None = None) -> None:
    """Raises a UserError where ``skip`` is no list of regexes, or, given parameters, one finds no weight or all are."""
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise UserError(f"{where} is {skip!r}: give a list of regexes.")
    weights = None if params is None else list(weights_of(params))
    for regex in skip:
        try:
            pattern = re.compile(regex)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {regex!r} is not a regex ({error}).") from error
        if weights and not any(map(pattern.search, weights)):
            raise UserError(f"{where}: {regex!r} matches no weight, such as {weights[0]!r}.")
    if params is not None and not weights_of(params, skip):
        raise UserError(f"{where} leaves no weight of the model over: narrow its regexes.")

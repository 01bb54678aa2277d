"""``results.json`` of a comparison of methods, as a contract (schema 1; ``docs/results-format.md``)."""

import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from kdjax import results as contract
from kdjax.errors import UserError, unknown
from kdjax.writers import write_atomic

SCHEMA = 1
KIND = "compare"
_CELLS = 2**20  # of a grid
CELL = {"accuracy": 1.0, "nll": math.inf, "ece": 1.0, "agreement": 1.0, "kl": math.inf}  # -> the highest value


def write(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Checks the contract, then writes the file whole or not at all."""
    validate(results)
    write_atomic(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a comparison's ``results.json``; UserError if it is missing, torn, or not of this schema."""
    results = contract.read_json(path, "finish `kdjax compare --workdir ...` first", "run the comparison again")
    validate(results)
    return results


def validate(results: Any) -> None:
    """Raises a UserError that names the first key of ``results`` that breaks the contract."""
    described = {"schema", "kind", "config_sha256", "environment", "seeds", "test_examples", "updates"}
    arms = {"teacher", "student", "control", "baseline", "tuning", "methods", "grid"}
    contract.check_keys("results", results, described | arms)
    if results["schema"] != SCHEMA or results["kind"] != KIND:
        raise UserError(
            f"results are of schema {results['schema']!r} and kind {results['kind']!r}, this reads schema {SCHEMA} and "
            f"kind {KIND!r}: give the results.json of `kdjax compare`, written by this kdjax."
        )
    contract.check_sha256("results.config_sha256", results["config_sha256"])
    contract.check_environment("results.environment", results["environment"])
    _seeds("results.seeds", results["seeds"])
    for key in ("test_examples", "updates"):
        contract.check_number(f"results.{key}", results[key], whole=True)
    if results["test_examples"] == 0:
        raise contract.wrong("results.test_examples", "at least 1", 0)
    contract.check_keys("results.teacher", results["teacher"], {"accuracy", "params"})
    contract.check_number("results.teacher.accuracy", results["teacher"]["accuracy"], 1.0)
    contract.check_keys("results.student", results["student"], {"params"})
    for arm in ("teacher", "student"):
        contract.check_number(f"results.{arm}.params", results[arm]["params"], whole=True)
    if results["tuning"] is not None:
        contract.check_keys("results.tuning", results["tuning"], {"trials", "holdout_examples"})
        for key, value in results["tuning"].items():
            contract.check_number(f"results.tuning.{key}", value, whole=True)
    _methods(results)
    if results["grid"] is not None:
        _grid("results.grid", results["grid"], results["seeds"])


def _methods(results: Mapping[str, Any]) -> None:
    methods = results["methods"]
    if not isinstance(methods, dict) or not methods:
        raise contract.wrong("results.methods", "an object with at least one method", methods)
    for name, method in methods.items():
        if not name or not name.isprintable():
            raise contract.wrong("a name in results.methods", "printable text", name)
        _method(f"results.methods.{name}", method, results["seeds"])
    for key in ("control", "baseline"):
        if results[key] is not None or key == "control":
            _text(f"results.{key}", results[key])
    if results["control"] not in methods:
        raise unknown("method in results.control", results["control"], methods)
    if results["baseline"] is not None and results["baseline"] not in methods:
        raise unknown("method in results.baseline", results["baseline"], methods)
    if results["baseline"] == results["control"]:
        raise contract.wrong("results.baseline", "another method than results.control, or null", results["baseline"])


def _method(path: str, method: Any, seeds: list[int]) -> None:
    contract.check_keys(path, method, {"losses", "tuned", "flops_per_step", "ms_per_step", "cells"})
    if not isinstance(method["losses"], dict) or not all(isinstance(term, dict) for term in method["losses"].values()):
        raise contract.wrong(f"{path}.losses", "an object of terms, each an object of options", method["losses"])
    for key in ("flops_per_step", "ms_per_step"):
        contract.check_number(f"{path}.{key}", method[key])
    if method["tuned"] is not None:
        _tuned(f"{path}.tuned", method["tuned"])
    cells = method["cells"]
    if not isinstance(cells, list) or len(cells) != len(seeds):
        count = f"a list of {len(seeds)} cells, one per seed"
        raise contract.wrong(f"{path}.cells", count, len(cells) if isinstance(cells, list) else cells)
    for i, (cell, seed) in enumerate(zip(cells, seeds, strict=True)):
        where = f"{path}.cells[{i}]"
        contract.check_keys(where, cell, {"seed", "params_sha256", *CELL})
        if cell["seed"] != seed or isinstance(cell["seed"], bool):
            raise contract.wrong(f"{where}.seed", f"{seed}, as in results.seeds", cell["seed"])
        for key, highest in CELL.items():
            contract.check_number(f"{where}.{key}", cell[key], highest)
        contract.check_sha256(f"{where}.params_sha256", cell["params_sha256"])


def _tuned(path: str, tuned: Any) -> None:
    contract.check_keys(path, tuned, {"key", "tried", "accuracy", "chosen"})
    _text(f"{path}.key", tuned["key"])
    _values(f"{path}.tried", tuned["tried"])
    accuracy = tuned["accuracy"]
    if not isinstance(accuracy, list) or len(accuracy) != len(tuned["tried"]):
        raise contract.wrong(f"{path}.accuracy", f"a list of {len(tuned['tried'])} numbers, one per trial", accuracy)
    for i, value in enumerate(accuracy):
        contract.check_number(f"{path}.accuracy[{i}]", value, 1.0)
    if tuned["chosen"] not in tuned["tried"]:
        raise contract.wrong(f"{path}.chosen", f"one of {tuned['tried']}", tuned["chosen"])


def _grid(path: str, grid: Any, seeds: list[int]) -> None:
    contract.check_keys(path, grid, {"keys", "values", "cells"})
    keys, axes, cells = grid["keys"], grid["values"], grid["cells"]
    if not isinstance(keys, list) or not keys:
        raise contract.wrong(f"{path}.keys", "a list of at least one config key", keys)
    if not isinstance(axes, list) or len(axes) != len(keys):
        raise contract.wrong(f"{path}.values", f"a list of {len(keys)} lists, one per key", axes)
    for i, (key, axis) in enumerate(zip(keys, axes, strict=True)):
        _text(f"{path}.keys[{i}]", key)
        _values(f"{path}.values[{i}]", axis)
    if not isinstance(cells, list):
        raise contract.wrong(f"{path}.cells", "a list", cells)
    if math.prod(map(len, axes)) * len(seeds) > _CELLS:
        raise contract.wrong(f"{path}.values", f"a grid of at most {_CELLS:,} cells", axes)
    missing = set(itertools.product(itertools.product(*axes), seeds))
    for i, cell in enumerate(cells):
        where = f"{path}.cells[{i}]"
        contract.check_keys(where, cell, {"values", "seed", "accuracy"})
        if not isinstance(cell["values"], list):
            raise contract.wrong(f"{where}.values", "a list", cell["values"])
        contract.check_number(f"{where}.accuracy", cell["accuracy"], 1.0)
        place = (tuple(map(_hashable, cell["values"])), _hashable(cell["seed"]))
        if place not in missing:
            raise contract.wrong(where, "another point of the grid and seed than the cells before it", cell)
        missing.remove(place)
    if missing:
        values, seed = min(missing)
        raise UserError(f"{path}.cells lacks {len(missing)} cells, such as {list(values)} with seed {seed}: run them.")


def _seeds(path: str, seeds: Any) -> None:
    if not isinstance(seeds, list) or not seeds:
        raise contract.wrong(path, "a list of at least one seed", seeds)
    for i, seed in enumerate(seeds):
        contract.check_number(f"{path}[{i}]", seed, whole=True)
    if len(set(seeds)) < len(seeds):
        raise contract.wrong(path, "a list of different seeds", seeds)


def _values(path: str, values: Any) -> None:
    """A list of different finite numbers of either sign."""
    if not isinstance(values, list) or not values:
        raise contract.wrong(path, "a list of at least one number", values)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise contract.wrong(f"{path}[{i}]", "a finite number", value)
    if len(set(values)) < len(values):
        raise contract.wrong(path, "a list of different numbers", values)


def _text(path: str, value: Any) -> None:
    if not isinstance(value, str) or not value.isprintable():
        raise contract.wrong(path, "printable text", value)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)

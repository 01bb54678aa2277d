"""``kdjax bench report``: runs the benchmarks whose tables docs/performance.md holds, and writes them there.

A table stands between two comments of the document, ``<!-- kdjax bench report: NAME -->`` and ``<!-- end -->``; all
else in it is left alone.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.table import Table

from kdjax import results
from kdjax.errors import UserError
from kdjax.measure import machine
from kdjax.recipes import (
    bench_compile,
    bench_input,
    bench_loss,
    bench_population,
    bench_resume,
    bench_scaling,
    bench_step,
    bench_taps,
    bench_variants,
)
from kdjax.writers import write_atomic

DOCUMENT = "docs/performance.md"
MACHINE = "machine"
Found = Mapping[str, dict[str, Any] | str]  # by column: what a benchmark printed, or why it printed nothing
_BLOCK = re.compile(r"<!-- kdjax bench report: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


class Section(NamedTuple):
    """One table: the benchmark, the words that it is called with by column, and what writes the table."""

    benchmark: str
    columns: Mapping[str, Sequence[str]]
    write: Callable[[Found], str]


def measure(config: ConfigDict, workdir: Path, out: str = DOCUMENT) -> dict[str, Any]:
    """Runs every benchmark of the document's tables in a process of its own, and writes each table when it is there.

    What each printed is kept in ``workdir/NAME-COLUMN.json``. Of the config only ``data.data_dir`` is used, where
    Fashion-MNIST is. A benchmark that refuses to run is not measured, and the document says why. Takes about half an
    hour on two cores.

    Raises:
      UserError: no such document, or none with places for tables.
    """
    document = Path(out)
    wanted = sections(config.data.data_dir)
    places = _places(document, {MACHINE, *wanted})
    wanted = {name: section for name, section in wanted.items() if name in places}
    workdir.mkdir(parents=True, exist_ok=True)
    busy = machine.busy_now(None)
    commit = results.commit()  # before the document is changed, which may be in the checkout
    number, last, missing = 0, sum(len(section.columns) for section in wanted.values()), []
    for name, section in wanted.items():
        found: dict[str, dict[str, Any] | str] = {}
        for column, words in section.columns.items():
            number += 1
            print(f"{number} of {last}: kdjax bench {section.benchmark} {' '.join(words)}", file=sys.stderr)
            found[column] = run(section.benchmark, words)
            if isinstance(found[column], str):
                missing.append(f"{name}, {column}: {found[column]}")
            else:
                label = re.sub(r"\W+", "-", column).lower()
                write_atomic(workdir / f"{name}-{label}.json", json.dumps(found[column], indent=2) + "\n")
        put(document, {name: section.write(found)})
    environment = results.environment() | {"commit": commit}
    if MACHINE in places:
        put(document, {MACHINE: about(environment, busy)})
    return {
        "benchmark": "report",
        "document": str(document),
        "tables": list(wanted),
        "not_measured": missing,
        "busy_before": busy,
        "environment": environment,
    }


def sections(data_dir: str) -> dict[str, Section]:
    """Every table by its name in the document."""
    language = {"language (lm_bytes)": ["--config", "configs/lm_bytes.py"]}
    all_of_them = {
        "digits": [],
        "Fashion-MNIST": ["--config", "configs/fashion_mnist.py", f"--config.data.data_dir={data_dir}"],
        **language,
    }
    synthetic = ["--config.data.name=synthetic", "--config.data.options={'shape':(28,28,1)}"]
    taps = {"digits": [], "28 x 28 x 1": ["--config", "configs/fashion_mnist.py", *synthetic]}
    crowd = ["--seeds", "16", "--config.mesh.data=1"]
    crowd.append("--config.teacher.options={'widths': (48, 96, 160), 'strides': (1, 2, 2)}")
    by_meaning = lambda meaning: lambda found: meanings(meaning, found)
    return {
        "step": Section("step", all_of_them, by_meaning(bench_step.MEANING)),
        "input": Section("input", all_of_them, by_meaning(bench_input.MEANING)),
        "compile": Section("compile", all_of_them, by_meaning(bench_compile.MEANING)),
        "resume": Section("resume", all_of_them, by_meaning(bench_resume.MEANING)),
        "variants": Section("variants", language, _one_by_one(bench_variants.cells, bench_variants.caption)),
        "scaling": Section("scaling", all_of_them, _one_by_one(bench_scaling.cells, bench_scaling.caption)),
        "loss": Section("loss", {"4,096 tokens, 32,768 classes": []}, by_meaning(bench_loss.MEANING)),
        "population": Section("population", {"digits, 16 members": crowd}, by_meaning(bench_population.MEANING)),
        "taps": Section("taps", taps, _one_by_one(bench_taps.cells, bench_taps.caption)),
    }


def run(benchmark: str, words: Sequence[str]) -> dict[str, Any] | str:
    """What ``kdjax bench BENCHMARK --json WORDS`` prints in a fresh process, or the sentence with which it refuses."""
    command = [sys.executable, "-m", "kdjax", "bench", benchmark, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return said[-1].removeprefix("kdjax: ")
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------ markdown


def meanings(meaning: Mapping[str, str], found: Found) -> str:
    """A row for each thing measured, a column for each config, and what it is."""
    there = {column: values for column, values in found.items() if isinstance(values, dict)}
    rows = [
        [
            f"`{name}`",
            *(bench_step.shown(values[name]) if name in values else "" for values in there.values()),
            text,
        ]
        for name, text in meaning.items()
        if any(name in values for values in there.values())
    ]
    return (_markdown(["", *there, "what it is"], rows) if there else "") + _missing(found)


def _one_by_one(
    cells: Callable[[Mapping[str, Any]], tuple[list[str], list[list[str]]]],
    caption: Callable[[Mapping[str, Any]], str],
) -> Callable[[Found], str]:
    """What writes a table of its own for each config."""

    def write(found: Found) -> str:
        parts = [
            f"{column}: {caption(values)}.\n\n{_markdown(*cells(values))}"
            for column, values in found.items()
            if isinstance(values, dict)
        ]
        return "\n".join(parts) + _missing(found)

    return write


def about(environment: Mapping[str, Any], busy: float | None) -> str:
    """Where the tables were measured, in a sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    quiet = "" if busy is None else f" Before the first one {100 * busy:.0f} % of the machine was in use."
    return (
        f"The tables that `kdjax bench report` wrote: {environment['device_count']} {environment['device_kind']} on "
        f"{environment['cpu']}, {environment['cpu_count']} processors, {environment['platform']}; Python "
        f"{environment['python']}, {packages}; commit {environment['commit'] or 'unknown'}, {environment['date'][:10]}."
        f"{quiet}\n"
    )


def put(document: Path, tables: Mapping[str, str]) -> None:
    """Puts tables in their places in a document."""

    def replaced(match: re.Match[str]) -> str:
        name, before = match.groups()
        return f"<!-- kdjax bench report: {name} -->\n{tables.get(name, before)}<!-- end -->"

    write_atomic(document, _BLOCK.sub(replaced, document.read_text(encoding="utf-8")))


def _places(document: Path, known: set[str]) -> list[str]:
    remedy = "run kdjax bench report in a checkout of kdjax, or give --out a document with places for tables"
    try:
        found = [name for name, _ in _BLOCK.findall(document.read_text(encoding="utf-8"))]
    except OSError as error:
        raise UserError(f"cannot read {document} ({error.strerror}): {remedy}.") from error
    if not set(found) & known:
        raise UserError(f"{document} has no place for a table of {', '.join(sorted(known))}: {remedy}.")
    return found


def _missing(found: Found) -> str:
    refused = [f"{column}: not measured. {why}" for column, why in found.items() if isinstance(why, str)]
    return "".join(f"\n{sentence}\n" for sentence in refused)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |\n"
    return line(header) + line(["---"] * len(header)) + "".join(map(line, rows))


def table(values: Mapping[str, Any]) -> Table:
    """What was written, for people."""
    shown = Table("written", "to", caption="; ".join(values["not_measured"]) or "all was measured")
    for name in values["tables"]:
        shown.add_row(name, values["document"])
    return shown

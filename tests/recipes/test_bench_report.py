"""The document's tables are made of what the benchmarks print, and nothing else in it changes."""

import re
from pathlib import Path

import pytest

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.recipes import bench, bench_report

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_has_a_place_for_every_table():
    text = (ROOT / bench_report.DOCUMENT).read_text()
    names = re.findall(r"<!-- kdjax bench report: (\w+) -->", text)
    assert sorted(names) == sorted([*bench_report.sections(""), bench_report.MACHINE])
    assert text.count("<!-- end -->") == len(names)
    known = {name: values for section in bench_report.sections("").values() for name, values in section.columns.items()}
    files = [word for words in known.values() for word in words if word.endswith(".py")]
    assert files and all((ROOT / word).is_file() for word in files)
    assert {section.benchmark for section in bench_report.sections("").values()} <= set(bench.BENCHMARKS)


def test_tables_are_written_and_what_refuses_is_told(tmp_path, monkeypatch):
    document = tmp_path / "performance.md"
    place = "<!-- kdjax bench report: {} -->\nold\n<!-- end -->"
    document.write_text(f"# Title\n\n{place.format('input')}\n\nprose | stays\n{place.format('machine')}\n")
    prints = {"benchmark": "input", "input_over_step": 0.25, "batch_bytes": 4864, "examples_per_s": {"training": 12.0}}
    asked = []

    def run(benchmark, words):
        asked.append((benchmark, *words))
        return "no such data." if any("fashion" in word for word in words) else prints

    monkeypatch.setattr(bench_report, "run", run)
    found = bench.run("report", configs.default(), workdir=tmp_path / "runs", out=str(document))
    text = document.read_text()
    assert "old" not in text and text.startswith(
        "# Title\n\n<!-- kdjax bench report: input -->\n|  | digits | language"
    )
    assert "| `batch_bytes` | 4,864 | 4,864 | on the host |\n" in text and "| training: 12 |" in text
    assert "Fashion-MNIST: not measured. no such data.\n<!-- end -->\n\nprose | stays\n" in text
    assert f"commit {found['environment']['commit']}" in text and "tokens_per_s" not in text
    assert [words[0] for words in asked] == ["input"] * 3 and found["tables"] == ["input"]
    assert found["not_measured"] == ["input, Fashion-MNIST: no such data."]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "input-digits.json",
        "input-language-lm_bytes-.json",
    ]


def test_a_benchmark_that_refuses_gives_its_sentence():
    assert str(bench_report.run("signals", ["--config.seed=-1.5"])).startswith("config.seed is -1.5")


def test_a_document_without_places_is_refused(tmp_path):
    document = tmp_path / "other.md"
    with pytest.raises(UserError, match="cannot read"):
        bench.run("report", configs.default(), workdir=tmp_path, out=str(document))
    document.write_text("nothing")
    with pytest.raises(UserError, match="no place for a table"):
        bench.run("report", configs.default(), workdir=tmp_path, out=str(document))

"""``kdjax report`` on the files of a real run, as they are at every stage of its life, and on files that are broken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdjax import cli, progress
from kdjax.recipes import distill
from kdjax.recipes import report as recipe
from tests.helpers import tiny_config
from tests.test_report import Page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run: teacher, student alone, distilled student; a few dozen steps each."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    distill.run(tiny_config(), workdir, say=lambda _: None)
    return workdir


def cut(finished: Path, to: Path, lines: int, tail: bytes = b"") -> Path:
    """The workdir as it was when so many lines were written, and a part of the next."""
    to.mkdir()
    for name in ("config.json", ".lock"):
        (to / name).write_bytes((finished / name).read_bytes())
    written = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:lines]
    (to / "metrics.jsonl").write_bytes(b"".join(written) + tail)
    return to


def test_a_finished_run(finished, capsys):
    assert cli.run(["report", str(finished)]) == 0
    text = capsys.readouterr().out
    assert "The run is finished." in text and "report.html" in text
    found = progress.read(finished)
    measured = json.loads((finished / "results.json").read_text())["arms"]
    assert [(arm.name, arm.step, arm.total) for arm in found.arms] == [
        (name, arm["steps"], arm["steps"]) for name, arm in measured.items()
    ]
    page = Page((finished / recipe.PAGE).read_text())
    assert not {"script", "link", "img"} & set(page.tags)
    assert {link for link in page.links if not link.startswith("#")} == {"report.html"}
    report = Page((finished / "report.html").read_text()).text
    for part in ("Norm of the update", "Agreement with the teacher, training", "Where the time went", "goodput"):
        assert part in page.text and part in report
    for part in ("Training loss", "Test accuracy", "times their weights", "Norm of the gradient", "Learning rate"):
        assert part in page.text


def test_a_run_in_progress_is_not_disturbed(finished, tmp_path):
    """Also with a half-written line; in a process for which a device would be an error."""
    workdir = cut(finished, tmp_path / "run", 5, b'{"arm": "teach')
    before = {name: (workdir / name).read_bytes() for name in os.listdir(workdir)}
    with distill.claimed(workdir, distill.saved_config(workdir)):
        done = subprocess.run(
            [sys.executable, "-m", "kdjax", "report", str(workdir)],
            env={**os.environ, "JAX_PLATFORMS": "none_such"},
            capture_output=True,
            text=True,
        )
        running = progress.read(workdir).running
    assert done.returncode == 0, done.stderr
    assert "not started" in done.stdout and "student distilled" in done.stdout
    assert {name: (workdir / name).read_bytes() for name in before} == before
    if running is not None:  # where the system lists its locks
        assert running and "A process is in the workdir" in done.stdout
        assert progress.read(workdir).running is False


def test_before_the_first_line_and_in_no_workdir(finished, tmp_path, capsys):
    workdir = cut(finished, tmp_path / "run", 0)
    assert cli.run(["report", "--workdir", str(workdir)]) == 0
    assert "no line is written yet" in capsys.readouterr().out
    assert "No step is logged yet" in (workdir / recipe.PAGE).read_text()
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "is not a workdir of kdjax" in capsys.readouterr().err
    assert cli.run(["report"]) == 2 and "say which run" in capsys.readouterr().err


def test_lines_that_are_none_are_counted_and_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    strange = [
        b"\xff\xfe", b"[1]", b'{"arm": 3, "step": 1}', b'{"arm": "teacher", "step": "1"}', b"[" * 100_000,
        b'{"arm": "teacher", "step": -1, "loss": 1}', b'{"arm": "teacher", "step": 1' + b"0" * 400 + b"}",
    ]  # fmt: skip
    good = [
        {"arm": "teacher", "step": 1, "loss": None, "hparams": None, "seconds": [], "accuracy": "high"},
        {"arm": "teacher", "step": 2, "loss": 10**400, "hparams": {"ce.weight": {"a": evil}}, "examples_per_s": 0},
        {"arm": evil, "step": 2, "loss": 0.5, "hparams": {f"{evil}.weight": 1.0}, evil: 1.0},
    ]
    config = {"config": {"data": evil, "teacher": [], "train": {"steps": "many"}, "compress": 3, "seed": evil}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "results.json").write_text('{"arms": {"teacher": 3}, "chain": [1]}')
    lines = [*strange, *(json.dumps(record).encode() for record in good)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = recipe.run(tmp_path)
    assert found.damaged == len(strange)
    assert "7 lines of metrics.jsonl could not be read" in recipe.summary(found)
    page = Page((tmp_path / recipe.PAGE).read_text())
    assert "script" not in page.tags and evil in page.text


def test_time_by_cause_adds_up(tmp_path):
    """By hand: 20 steps kept in 8 s, 5 done again, of 20 s in all."""
    history = [
        {"arm": "a", "step": 10, "loss": 2.0, "seconds": {"step": 4.0, "compile": 5.0}},
        {"arm": "a", "step": 10, "event": "resumed", "redone_steps": 5},
        {"arm": "a", "step": 20, "loss": 1.0, "seconds": {"step": 4.0, "input": 1.0, "save": 3.0, "restore": 1.0}},
    ]
    spent = progress.seconds(progress.series(history)["a"])
    assert spent == {
        "step": 8.0, "input": 1.0, "compile": 5.0, "save": 3.0, "restore": 1.0, "redone": 5 * 8.0 / 20,
    }  # fmt: skip
    assert progress.goodput(spent) == pytest.approx(8 / 20)
    assert progress.goodput({}) is None
    (tmp_path / "config.json").write_text('{"config": {"train": {"steps": 50}}}')
    lines = [{**record, "arm": "student_distilled"} for record in history]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arm = progress.read(tmp_path).arms[-1]
    assert (arm.name, arm.step, arm.total) == ("student_distilled", 20, 50)
    assert arm.left_s == pytest.approx(30 * (8 + 1 + 3) / 20)  # compiling and restoring are over
    page = Page(recipe.page(progress.read(tmp_path), now=time.time())).text
    assert "Where the time went" in page and "steps 40.0 %" in page and "done again 10.0 %" in page


def test_members_links_steps_of_compress_and_given_teachers(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"teacher": {"init": "there"}, "generations": 2, "assistants": {"mid": {}}}})
    )
    names = [arm.name for arm in progress.read(tmp_path).arms]
    assert names == ["teacher", "assistant_mid", "generation_1", "student_alone", "student_distilled"]
    assert progress.read(tmp_path).arms[0].total == 0
    (tmp_path / "members.json").write_text("[]")
    (tmp_path / "compress").mkdir()
    of_members = {"arm": "population", "step": 5, "loss": 2.0, "members": {"loss": [1.0, None, 3.0], "accuracy": []}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(of_members) + "\n")
    (tmp_path / "compress" / "metrics.jsonl").write_text('{"arm": "half", "step": 3, "loss": 1.0}\n')
    found = recipe.run(tmp_path)
    assert [(arm.name, arm.step) for arm in found.arms] == [("teacher", 0), ("population", 5), ("half", 3)]
    numbers = progress.series(found.history)["population"]
    assert [numbers[f"members/loss/{end}"][1] for end in ("low", "high")] == [[1.0], [3.0]]
    assert "Loss of the members, population" in (tmp_path / recipe.PAGE).read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.0, "0 s"), (0.44, "0.4 s"), (59.6, "1 min 00 s"), (7865, "2 h 11 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text

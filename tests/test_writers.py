import io
import json
import os
import re
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.writers import JsonlWriter, Progress, TensorBoardWriter, WandbWriter, read_jsonl, write_atomic


def test_lines_are_on_disk_at_once_and_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"arm": "teacher", "step": 1, "loss": jnp.float32(0.5), "kl": np.float64("nan"), "n": np.int32(3)})
        writer.write({"arm": "teacher", "step": 2, "loss": float("inf"), "hparams": {"kl.weight": jnp.float32(0.25)}})
        first, second = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert first == {"arm": "teacher", "step": 1, "loss": 0.5, "kl": None, "n": 3}
    assert second == {"arm": "teacher", "step": 2, "loss": None, "hparams": {"kl.weight": 0.25}}
    assert read_jsonl(path) == [first, second]


def test_truncate_drops_only_later_lines_of_that_arm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        for arm in ("teacher", "student_alone"):
            for step in (10, 20, 30):
                writer.write({"arm": arm, "step": step})
        writer.truncate("student_alone", 10)
        writer.write({"arm": "student_alone", "step": 20, "again": True})
    kept = [(line["arm"], line["step"]) for line in read_jsonl(path)]
    assert kept == [("teacher", 10), ("teacher", 20), ("teacher", 30), ("student_alone", 10), ("student_alone", 20)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # no temporary file is left


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"arm": "a", "step": 1, "name": "é"}\n{"arm": "a", "step": 2, "name": "é'.encode()[:-1])
    assert [line["step"] for line in read_jsonl(path)] == [1]
    with JsonlWriter(path) as writer:
        writer.write({"arm": "a", "step": 2})
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]


def test_a_killed_writer_leaves_a_file_that_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from kdjax.writers import JsonlWriter; writer = JsonlWriter(sys.argv[1]); step = 0\n"
        "while True: step += 1; writer.write({'arm': 'a', 'step': step, 'pad': 'x' * 20000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = [line["step"] for line in read_jsonl(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 9
    with JsonlWriter(path) as writer:
        writer.truncate("a", 5)
        writer.write({"arm": "a", "step": 6})
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3, 4, 5, 6]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        read_jsonl(path)
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_what_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        JsonlWriter(tmp_path / "absent" / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "absent" / "x", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_user_error():
    writer = JsonlWriter.__new__(JsonlWriter)
    writer.path = "/dev/full"
    writer._file = open("/dev/full", "w")  # noqa: SIM115 (opening for append would truncate, which a device refuses)
    with pytest.raises(UserError, match="No space left"):
        writer.write({"step": 1})


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = TensorBoardWriter(tmp_path)
    writer.write({"arm": "teacher", "step": 7, "loss": 0.5, "kl": None, "hparams": {"kl.weight": 0.25}})
    writer.truncate("teacher", 7)
    writer.write({"arm": "teacher", "step": 7, "event": "resumed", "redone_steps": 3, "seconds": {"step": 0.1}})
    writer.write({"arm": "teacher", "step": 8, "loss": 0.25})
    writer.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "teacher").iterdir())
    assert b"loss" in written and b"hparams/kl.weight" in written and b"kl.weight" in written
    assert b"redone_steps" in written and b"seconds/step" in written and b"event" not in written
    assert len(list((tmp_path / "teacher").iterdir())) == 2  # the second starts where the first is void


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")  # writes what it would send into the folder
    workdir = tmp_path / "digits"
    workdir.mkdir()
    config = {"seed": 12345, "student": {"options": {"widths": (8, 16)}}}
    writer = WandbWriter("demo", workdir, config)
    writer.truncate("a/b", 0)
    writer.write({"arm": "a/b", "step": 20, "loss": 0.5, "kl": None, "hparams": {"kl.weight": np.float32(0.25)}})
    writer.write({"arm": "a/b", "step": 20, "eval_accuracy": 0.75})
    writer.write({"arm": "teacher", "step": 1, "loss": 1.0})
    writer.close()
    moved = workdir.rename(tmp_path / "moved")
    writer = WandbWriter("demo", moved, config)  # the run was killed and goes on from step 10
    writer.truncate("a/b", 10)
    writer.write({"arm": "a/b", "step": 10, "event": "resumed", "redone_steps": 10})
    writer.write({"arm": "a/b", "step": 20, "loss": 0.5})
    writer.close()
    folders = sorted(path.name for path in (moved / "wandb").glob("offline-run-*"))
    identity = (moved / "wandb-id").read_text().strip()
    runs = [name.removeprefix("offline-run-").partition("-")[2] for name in folders]
    assert len(runs) == 3 and len(set(runs)) == 2 and all(run.startswith(f"{identity}-") for run in runs)
    sent = b"".join(path.read_bytes() for path in (moved / "wandb").glob("offline-run-*/*.wandb"))
    for part in (b"demo", f"digits-{identity}".encode(), b"a/b", b"eval_accuracy", b"hparams/kl.weight", b"12345"):
        assert part in sent
    assert b"redone_steps" not in sent


def test_wandb_that_does_not_start_is_one_sentence(tmp_path):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    code = "from kdjax.writers import WandbWriter; WandbWriter('demo', '.', {}).truncate('teacher', 0)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(  # W&B reads its variables once in a process
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env | {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kdjax.errors.UserError: W&B does not start (") and "WANDB_MODE=offline" in last


def test_an_absent_wandb_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[wandb\]'"):
        WandbWriter("demo", tmp_path, {})


def test_an_absent_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=re.escape("pip install 'kdjax[tensorboard]'")):
        TensorBoardWriter(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_a_few_plain_lines():
    stream = io.StringIO()
    with Progress("teacher", 1000, 100, stream=stream) as progress:
        for step in range(101, 1001):
            progress.update(step, {"loss": 0.5, "kl": 0.125}, 5100.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # the start, the first step, the last; between them less than 10 s have passed
    assert lines[0] == "teacher: 1,000 steps, from 100"
    assert lines[-1].startswith("teacher: step 1,000/1,000  5,100 examples/s  loss 0.5 kl 0.125  ETA 00:00:00")
    assert "\x1b" not in stream.getvalue()


def test_progress_on_a_terminal_shows_all_parts(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress("student_distilled", 50, stream=stream) as progress:
        for step in range(1, 51):
            progress.update(step, {"loss": 0.5, "k[l]": 0.125}, 5100.0)
    text = stream.getvalue()
    assert "\x1b" in text
    for part in ("compiling", "student_distilled", "50/50", "5,100 examples/s", "loss 0.5", "k[l] 0.125"):
        assert part in text


def test_progress_is_cheap(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    with Progress("teacher", 10**6, stream=Terminal()) as progress:
        start = time.perf_counter()
        for step in range(20_000):
            progress.update(step, {"loss": 0.5}, 5100.0)
        seconds = time.perf_counter() - start
    assert seconds / 20_000 < 50e-6  # a step of a small model takes about a millisecond


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_progress_survives_a_terminal_that_goes_away(kind, writes, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    before = sys.stdout, sys.stderr

    class Gone(kind):
        left = writes

        def write(self, text):
            self.left -= 1
            if self.left < 0:
                raise BrokenPipeError
            return super().write(text)

    with Progress("teacher", 10, stream=Gone(), every_s=0.0) as progress:
        for step in range(11):
            progress.update(step, {"loss": float("nan")}, 0.0)
            progress._next = 0.0
        assert (sys.stdout, sys.stderr) == before  # what the user prints next must not go to the broken terminal
    assert (sys.stdout, sys.stderr) == before


def test_progress_survives_an_ascii_stream(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress("élève", 10, stream=stream) as progress:
        progress.update(10, {"loss": 1.0}, 1.0)


def test_an_exception_inside_progress_is_not_swallowed():
    with pytest.raises(ValueError, match="mine"), Progress("teacher", 10, stream=io.StringIO()):
        raise ValueError("mine")


def test_eta_is_the_time_left():
    stream = io.StringIO()
    with Progress("teacher", 300, 100, stream=stream, every_s=0.0) as progress:
        progress.update(110, {}, 1.0)
        progress._began = (time.monotonic() - 40.0, 110)
        progress.update(150, {}, 1.0)  # 40 steps in 40 s, 150 are left
    assert "ETA unknown" in stream.getvalue() and "ETA 00:02:30" in stream.getvalue()

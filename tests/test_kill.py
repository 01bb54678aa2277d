"""The real command in a process of its own, killed with SIGKILL at random moments: the result must not change."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

ARGUMENTS = (
    *("--config.teacher.options={'widths': (8,), 'strides': (2,)}", "--config.teacher.steps=120"),
    *("--config.student.options={'widths': (4,), 'strides': (2,)}", "--config.train.steps=240"),
    *("--config.train.ema=0.9", "--config.data.augment.crop_padding=1", "--config.mesh.data=1"),
    *("--config.checkpoint.every=15", "--config.log.every=5", "--config.log.eval_every=60"),
)


def start(workdir):
    command = [sys.executable, "-m", "kdjax", "distill", "--workdir", str(workdir), *ARGUMENTS]
    # One device and a small thread pool: the command as a laptop runs it.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def finish(workdir):
    process = start(workdir)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    arms = json.loads((workdir / "results.json").read_text())["arms"]
    steps = [(line["arm"], line["step"]) for line in lines(workdir) if "loss" in line]
    assert len(steps) == len(set(steps))
    return {name: arm["params_sha256"] for name, arm in arms.items()}


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def kill_after(workdir, new_lines, pause):
    """Kills the command once it has logged so many lines; returns where it was, or ``None`` where it was done first."""
    process = start(workdir)
    before = None
    while process.poll() is None:
        now = len(lines(workdir))
        if before is None or now < before:
            before = now  # a resumed run first drops the lines after its checkpoint
        if now >= before + new_lines:
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return (lines(workdir) or [{}])[-1]
        time.sleep(0.01)
    process.communicate()
    return None


def killed_run_equals_an_uninterrupted_one(tmp_path, kills, seed):
    expected = finish(tmp_path / "whole")
    rng = random.Random(seed)
    most = min(300 // kills, 60)  # lines between two kills, so that they fall into every arm (120 lines in all)
    places = [kill_after(tmp_path / "killed", rng.randint(1, most), rng.uniform(0, 0.1)) for _ in range(kills)]
    hit = [(place["arm"], place["step"]) for place in places if place]
    print("killed at", hit)
    assert len(hit) >= kills / 2  # otherwise the run was too short to be a test
    assert finish(tmp_path / "killed") == expected


def test_killed_twice(tmp_path):
    killed_run_equals_an_uninterrupted_one(tmp_path, kills=2, seed=1)


@pytest.mark.chaos
def test_killed_twenty_times(tmp_path):
    killed_run_equals_an_uninterrupted_one(tmp_path, kills=20, seed=2)

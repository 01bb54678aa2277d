"""The real command in a process of its own, killed or told to stop at random moments: the result must not change."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

COMMON = (
    *("--config.mesh.data=1", "--config.checkpoint.every=15", "--config.log.every=5", "--config.log.eval_every=60"),
    "--config.compile_cache=workdir",
)
VISION = (
    *("--config.teacher.options={'widths': (8,), 'strides': (2,)}", "--config.teacher.steps=120"),
    *("--config.student.options={'widths': (4,), 'strides': (2,)}", "--config.train.steps=240"),
    *("--config.data.augment.crop_padding=1", *COMMON),
)
SIZES = "{'width': 16, 'heads': 2, 'mlp_width': 32, 'layers': 1}"
LANGUAGE = (
    *("--config.task=language", "--config.data.name=stdlib", "--config.data.options={'modules': 'si*.py'}"),
    *("--config.data.context=32", "--config.data.batch_size=8", "--config.log.sample.tokens=8", *COMMON),
    *("--config.teacher.name=decoder", f"--config.teacher.options={SIZES}", "--config.teacher.steps=120"),
    *("--config.student.name=decoder", f"--config.student.options={SIZES}", "--config.train.steps=240"),
)
COMMANDS = {
    "vision": ("distill", *VISION, "--config.train.ema=0.9"),
    "language": ("distill", *LANGUAGE),
    "population": ("population", "--seeds", "3", *VISION, "--config.population.chunk=3"),
}


def start(kind, workdir):
    command = [sys.executable, "-m", "kdjax", *COMMANDS[kind], "--workdir", str(workdir)]
    # One device and a small thread pool: the command as a laptop runs it.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def finish(kind, workdir):
    """The fingerprints of all that was trained."""
    process = start(kind, workdir)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    steps = [(line["arm"], line["step"]) for line in lines(workdir) if "loss" in line]
    assert len(steps) == len(set(steps))
    assert any((workdir / "compiled").iterdir())  # programs for the next start
    if kind == "population":
        members = json.loads((workdir / "population.json").read_text())["members"]
        return [member["params_sha256"] for member in members]
    arms = json.loads((workdir / "results.json").read_text())["arms"]
    return [arm["params_sha256"] for arm in arms.values()]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def is_saving(workdir):
    return any("tmp" in place.name for place in workdir.glob("checkpoints/*/*"))


def hit_after(kind, workdir, new_lines, pause, number, *, in_save=False):
    """Sends a signal once so many lines were logged, or in the next save after that; says where the command was, or
    ``None`` where it was done first."""
    process = start(kind, workdir)
    before = None
    while process.poll() is None:
        now = len(lines(workdir))
        if before is None or now < before:
            before = now  # a resumed run first drops the lines after its checkpoint
        if now >= before + new_lines and (not in_save or is_saving(workdir)):
            time.sleep(0 if in_save else pause)
            process.send_signal(number)
            _, errors = process.communicate()
            # Python's own death of a signal, before and after the loop that catches it.
            assert process.returncode in (-number, 128 + number, 0), errors[-2000:]
            assert not is_saving(workdir) or number == signal.SIGKILL
            return (lines(workdir) or [{}])[-1]
        time.sleep(0.001 if in_save else 0.01)
    process.communicate()
    return None


def an_interrupted_run_equals_a_whole_one(tmp_path, kind, hits, seed):
    """Returns how many of the signals came before the run was done."""
    expected = finish(kind, tmp_path / "whole")
    rng = random.Random(seed)
    most = min(300 // hits, 60)  # lines between two, so that they fall into every arm
    # In a save, at any other moment, and told to stop, in turns.
    kinds = itertools.cycle([(signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGKILL, False)])
    places = []
    for _ in range(hits):
        number, in_save = next(kinds)
        after, pause = rng.randint(1, most), rng.uniform(0, 0.1)
        places.append(hit_after(kind, tmp_path / "hit", after, pause, number, in_save=in_save))
    hit = [(place.get("arm"), place.get("step")) for place in places if place]
    print(f"{kind}: {len(hit)} of {hits} at", hit)
    assert len(hit) >= hits / 2  # otherwise the run was too short to be a test
    assert finish(kind, tmp_path / "hit") == expected
    return len(hit)


def test_killed_in_a_save_and_told_to_stop(tmp_path):
    an_interrupted_run_equals_a_whole_one(tmp_path, "vision", hits=2, seed=1)


@pytest.mark.chaos
@pytest.mark.parametrize(("kind", "hits"), [("vision", 34), ("language", 33), ("population", 33)])
def test_a_hundred_hits(tmp_path, kind, hits):
    """In rounds, each of which ends a run: it is too short for all of them at once."""
    done = 0
    for number in itertools.count():
        if done >= hits:
            return
        done += an_interrupted_run_equals_a_whole_one(tmp_path / str(number), kind, min(12, hits - done), seed=number)

"""Several real processes through the launch script that users run: the same result, another number of them on resume,
one of them killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import build, checkpoint
from kdjax import config as configs
from kdjax.experiment import MAIN, load_weights
from kdjax.model import flatten_paths
from tests.test_kill import lines

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
WORDS = (
    *("--config.teacher.name=mlp", "--config.teacher.options={'hidden': (256,)}", "--config.teacher.steps=300"),
    *("--config.teacher.optimizer.name=sgd", "--config.teacher.optimizer.learning_rate=0.05"),
    *("--config.student.name=mlp", "--config.student.options={'hidden': (8,)}", "--config.train.steps=40"),
    *("--config.log.every=10", "--config.log.eval_every=100", "--config.checkpoint.every=50"),
)
ARM = ("train", "--arm", MAIN)


def environment():
    """One device a process, as a laptop has."""
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHON": sys.executable}


def start(processes, workdir, *words):
    command = ["bash", str(LOCAL), str(processes), *words, *WORDS, "--workdir", str(workdir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment() | {"GRACE": "40"}, **pipes)


def finish(processes, workdir, *words):
    process = start(processes, workdir, *words)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


def when_at(process, workdir, step):
    while process.poll() is None and not any(line["step"] >= step for line in lines(workdir) if "loss" in line):
        time.sleep(0.05)


def weights(workdir):
    config = configs.override(configs.default(), WORDS)
    model = build.prepare(config).teachers[MAIN]
    return flatten_paths(load_weights(model, workdir / "checkpoints" / MAIN))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights of a run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "kdjax", *ARM, *WORDS, "--workdir", str(workdir)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=600)
    return weights(workdir)


def assert_close(found, expected):
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=2e-4, err_msg=path)


def test_four_processes_stop_together_and_others_go_on_from_their_checkpoint(tmp_path, alone):
    """SIGTERM to the launch script of 4; then 2 on another mesh, and 1, each end where one process alone does."""
    process = start(4, tmp_path / "4", *ARM)
    when_at(process, tmp_path / "4", 20)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, errors[-3000:]
    assert len(re.findall(r"stopped by a signal at step (\d+); its state is saved", errors)) == 4
    (saved,) = {int(step) for step in re.findall(r"stopped by a signal at step (\d+)", errors)}
    assert 20 <= saved < 300
    shutil.copytree(tmp_path / "4", tmp_path / "1")
    output = finish(2, tmp_path / "4", *ARM, "--config.mesh={'data': 1, 'fsdp': 2}")
    assert output.count(f"resuming from step {saved}") == 1  # the first process speaks for all
    assert f"{MAIN}: 300 steps done" in output
    finish(1, tmp_path / "1", *ARM)
    for workdir in (tmp_path / "4", tmp_path / "1"):
        assert_close(weights(workdir), alone)


def test_two_processes_do_the_whole_job_with_one_result(tmp_path, alone):
    """Teacher, both students, scores and report; what is split over processes is scored and kept whole."""
    workdir = tmp_path / "run"
    output = finish(2, workdir, "distill", "--config.mesh={'data': 1, 'fsdp': 2}")
    assert output.count("student distilled") and (workdir / "report.html").is_file()
    assert_close(weights(workdir), alone)
    steps = [(line["arm"], line["step"]) for line in lines(workdir) if "loss" in line]
    assert len(steps) == len(set(steps)) == 30 + 4 + 4


def test_one_of_two_is_killed_and_the_other_says_so_and_ends(tmp_path):
    process = start(2, tmp_path, *ARM, "--config.teacher.steps=100000", "--heartbeat", "3")
    saved = tmp_path / "checkpoints" / MAIN / "50"  # a save goes on beside the steps, which are quick
    while process.poll() is None and not saved.is_dir():
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "process 1"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - began < 40  # seconds until the script would have ended the other, which ended by itself
    assert "process 0 of 2 ends: process 1 has given no sign of life for 3 s" in errors, errors[-3000:]
    assert "local.sh: process 1 ended by SIGKILL" in errors
    assert process.returncode == 128 + signal.SIGKILL
    with checkpoint.Checkpoints(tmp_path / "checkpoints" / MAIN) as kept:
        assert kept.latest_step() >= 50
    assert jax.process_count() == 1

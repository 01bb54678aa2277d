"""Compiling, the input, saving and resuming: each benchmark measures what it says; no assertion is on seconds."""

import json
import os
import time

import jax
import numpy as np
import pytest

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.recipes import bench, bench_compile, bench_input, bench_process, bench_resume, bench_step
from tests.helpers import tiny_config, tiny_language_config


@pytest.fixture(scope="module")
def prepared():
    config = tiny_config()
    config.teacher.options = {"hidden": (256, 256)}
    return bench_step.prepare(configs.resolve(config))


# ------------------------------------------------------------------------------------------------------------- resuming


def test_steps_go_on_while_a_save_is_in_flight(prepared, tmp_path):
    found = bench_resume.saves(prepared, tmp_path, count=2)
    assert len(found.blocked) == 2 and len(found.otherwise) == 2 * bench_resume.QUIET
    assert len(found.saving) >= 2 and min(found.saving) > 0.0
    assert bench_resume.synchronous(prepared, tmp_path / "waited", count=1) > 0.0


def test_checkpoints_weigh_the_same_whatever_the_teacher(prepared, tmp_path):
    found = bench_resume.sizes(prepared, tmp_path)
    params = 64 * 8 + 8 + 80 + 10
    assert found["teacher_params"] == {"own": 64 * 256 + 256 + 256 * 257 + 2570, "small": params}
    # Orbax splits a tree's description into more or fewer nodes as time goes by, some hundred bytes of these few.
    assert found["checkpoint_over_small_teacher"] == pytest.approx(1.0, abs=0.2)
    keys = 2 * np.asarray(jax.random.key_data(jax.random.key(0))).nbytes
    assert 3 * 4 * params <= found["state_bytes"] - keys < 3 * 4 * params + 100  # and counters
    assert found["checkpoint_bytes"] < 4 * 20 * (64 * 256 + 256 + 256 * 257)  # far from holding the teacher


def test_a_second_process_goes_on_where_the_first_one_stopped(tmp_path):
    config = configs.resolve(tiny_config())
    first = bench_resume.first_step(config, folder=str(tmp_path), stop=2, began=time.time())
    again = bench_resume.first_step(config, folder=str(tmp_path), stop=4, began=time.time())
    assert first["step"] == 1 and again["step"] == 3
    assert 0.0 < again["prepare_s"] < again["first_step_s"]


# ------------------------------------------------------------------------------------------------------------ compiling


def test_a_cached_program_is_found_again_by_the_next_process(tmp_path):
    """In real processes, which share nothing but the folder."""
    config, env = configs.resolve(tiny_config()), bench_process.cached_in(str(tmp_path))
    env |= bench_process.fake_devices(1)
    cold, warm = (bench_process.ask("compile", config, env=env) for _ in range(2))
    assert (cold["cache_hits"], warm["cache_hits"]) == (0, 1)
    assert cold["instructions"] == warm["instructions"] > 100 and cold["environment"]["devices"] == 1
    assert all(found[name] > 0 for found in (cold, warm) for name in (*bench_compile.EVENTS, "prepare_s"))
    assert len(list(tmp_path.glob("jit_packed-*-cache"))) == 1
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_process_that_fails_says_why():
    config = configs.resolve(tiny_config())
    config.data.batch_size = 0
    with pytest.raises(UserError, match=r"measures compile failed: data\.batch_size"):
        bench_process.ask("compile", config)


def test_a_config_twice_as_deep():
    deeper = bench_compile.twice_as_deep(configs.resolve(tiny_language_config()))
    assert bench_compile.depth_of(deeper) == {"teacher": 4, "student": 2}
    config = tiny_config()
    config.teacher.update(name="vit_ti", options={"depth": 3})
    assert bench_compile.depth_of(bench_compile.twice_as_deep(configs.resolve(config))) == {"teacher": 6}
    assert bench_compile.twice_as_deep(configs.resolve(tiny_config())) is None  # nothing says how deep an mlp is


# ------------------------------------------------------------------------------------------------------------ the input


def test_every_kind_of_batch_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "SECONDS", 0.0)
    monkeypatch.setattr(bench_input, "ROUNDS", 1)
    config = tiny_config()
    config.data.curriculum.update(pacing="linear")
    found = bench.run("input", configs.resolve(config), workdir=tmp_path, json_output=True)
    assert json.loads(capsys.readouterr().out) == found
    assert set(bench_input.MEANING) - {"tokens_per_s"} <= set(found)
    assert set(found["examples_per_s"]) == {"training", "plain", "evaluation"}
    assert found["batch_bytes"] == found["batch_bytes_per_device"] == 64 * (64 + 3 * 4)
    assert found["in_flight_bytes_per_device"] == 16 * found["batch_bytes"]

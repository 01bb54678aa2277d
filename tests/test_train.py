"""The loop: exact resume, one compile a stage, no implicit transfer, NaN stops with the cause, schedules."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import advance, sharding, state, train
from kdjax.checkpoint import Checkpoints, digest
from kdjax.data import pipeline
from kdjax.errors import UserError
from kdjax.model import Model, Outputs
from kdjax.objective import make_objective
from kdjax.recipes import distill as recipe
from kdjax.step import make_train_step
from kdjax.writers import JsonlWriter, read_jsonl
from tests.helpers import digits, equal_trees, small, tiny_config

QUIET = lambda sentence: None


def make_arm(stops=(12,), batches=None, optimizer=None, ahead=False, teacher_mesh=None, **options):
    student, teacher = small(8, norm=True, dropout=0.2, features=64), small(16)
    optimizer = optimizer or optax.adam(1e-3)
    stages = []
    for start, stop in itertools.pairwise((0, *stops)):
        objective = make_objective({"kl": {"weight": 0.9, "temperature": 4.0 + start}, "ce": {"weight": 0.1}})
        step = make_train_step(student, {"teacher": teacher}, objective, optimizer, **options)
        hparams = {k: np.float32(v) for k, v in objective.hparams.items()}
        stages.append(train.Stage(start, stop, step, hparams, objective, ahead))
    return train.Arm(
        name="student",
        create=lambda keys: state.create_state(student, optimizer, keys.student),
        keys=train.Keys(jax.random.key(0), jax.random.key(0)),
        stages=stages,
        batches=batches or (lambda first: float_batches(first)),
        batch_size=32,
        teacher_variables={"teacher": teacher.init(jax.random.key(7))},
        teacher_mesh=teacher_mesh,
    )


def float_batches(first, poison_at=()):
    for number, batch in enumerate(
        pipeline.train_batches(digits().train, batch_size=32, seed=3, start_step=first), first
    ):
        inputs = batch["inputs"].astype(np.float32) / 16.0
        yield {**batch, "inputs": np.full_like(inputs, np.nan) if number in poison_at else inputs}


def run(arm, folder=None, every=None, meta=None, devices=1, writers=()):
    mesh = sharding.make_mesh({"data": devices})
    if folder is None:
        return train.run(arm, mesh, every=every or train.Every(log=4), say=QUIET, writers=writers)
    with Checkpoints(folder) as checkpoints:
        return train.run(
            arm,
            mesh,
            every=every or train.Every(log=4, save=5),
            checkpoints=checkpoints,
            meta=meta,
            say=QUIET,
            writers=writers,
        )


@pytest.fixture(scope="module")
def uninterrupted():
    return run(make_arm()).state


class Killed(Exception):
    pass


def until(first, number, error):
    """The batches up to a step, at which an error is raised."""
    for place, batch in enumerate(float_batches(first), first):
        if place == number:
            raise error
        yield batch


@pytest.mark.parametrize("dies_at", [1, 5, 7, 11])
def test_resumes_bit_for_bit_from_wherever_it_died(tmp_path, uninterrupted, dies_at):
    with pytest.raises(Killed):
        run(make_arm(batches=lambda first: until(first, dies_at, Killed)), tmp_path)
    assert equal_trees(run(make_arm(), tmp_path).state, uninterrupted)


def test_a_finished_arm_is_loaded_not_trained(tmp_path, uninterrupted):
    run(make_arm(), tmp_path)

    def no_batches(first):
        raise AssertionError("a finished arm needs no data")

    assert equal_trees(run(make_arm(batches=no_batches), tmp_path).state, uninterrupted)


def test_a_signal_saves_and_stops_and_resume_is_exact(tmp_path, uninterrupted):
    def signalling(first):
        for number, batch in enumerate(float_batches(first), first):
            if number == 7:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(train.Interrupted, match="step 8"):
        run(make_arm(batches=signalling), tmp_path, train.Every(log=4))
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "8").is_dir()
    assert equal_trees(run(make_arm(), tmp_path).state, uninterrupted)


@pytest.mark.parametrize(("comes_at", "saved_at"), [(6, 7), (12, 12)])
def test_a_signal_while_a_step_is_being_handled_is_not_lost_and_saves_first(
    tmp_path, uninterrupted, comes_at, saved_at
):
    """It comes after the loop has decided what to save at this step: in the midst of an evaluation, here."""
    evaluated = []

    def evaluate(_):
        evaluated.append(len(evaluated))
        if len(evaluated) * 3 == comes_at:
            signal.raise_signal(signal.SIGTERM)
        return 0.5

    mesh = sharding.make_mesh({"data": 1})
    every = train.Every(log=4, evaluate=3)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(train.Interrupted, match=f"step {saved_at}; its state is saved"),
    ):
        train.run(make_arm(), mesh, every=every, checkpoints=checkpoints, evaluate=evaluate, say=QUIET)
    assert (tmp_path / str(saved_at)).is_dir()
    assert equal_trees(run(make_arm(), tmp_path).state, uninterrupted)


def test_nan_stops_with_step_cause_and_last_good_checkpoint(tmp_path):
    arm = make_arm(batches=lambda first: float_batches(first, poison_at=(8,)))
    with pytest.raises(UserError, match=r"not finite at step 9 \(in ce, kl\); the last good checkpoint is step 5"):
        run(arm, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["5"]


def test_steps_that_are_not_finite_are_left_out_and_counted_until_too_many_follow_each_other(tmp_path):
    def poisoned(*places):
        return make_arm(batches=lambda first: float_batches(first, poison_at=places), skip_nan=True)

    every = train.Every(log=4, save=1, skip_nan=2)
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer, Checkpoints(tmp_path / "c", keep=12) as checkpoints:
        arm, mesh = poisoned(4, 8, 9), sharding.make_mesh({"data": 1})
        train.run(arm, mesh, every=every, checkpoints=checkpoints, writers=[writer], say=QUIET)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 1, 2]
    assert all(np.isfinite([record[name] for name in ("loss", "kl", "grad_norm")]).all() for record in records)
    after = {}
    for step in ("8", "10"):  # steps 9 and 10 are of poisoned batches
        (tmp_path / step).mkdir()
        shutil.copytree(tmp_path / "c" / step, tmp_path / step / step)
        with Checkpoints(tmp_path / step) as checkpoints:
            after[step], _ = checkpoints.restore_newest(train.abstract_state(arm, mesh), QUIET)
    assert int(after["10"].step) == 10
    assert equal_trees(after["10"]._replace(step=after["8"].step), after["8"])
    with pytest.raises(UserError, match=r"step 7 \(in loss or gradient, 3 steps in a row\)"):
        run(poisoned(4, 5, 6), every=every)


def test_nan_of_the_teacher_and_of_a_gradient_alone_are_seen():
    arm = make_arm()
    broken = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), arm.teacher_variables)
    with pytest.raises(UserError, match=r"not finite at step 1 \(in kl\)"):
        run(arm._replace(teacher_variables=broken))
    # The root of 0 has a value and no slope.
    apply = lambda variables, inputs, **_: (
        Outputs(jnp.sqrt(0.0 * variables["params"]["w"])[None] + jnp.zeros((4, 3))),
        {},
    )
    model = Model(lambda key: {"params": {"w": jnp.ones(3)}, "state": {}}, apply)
    optimizer, objective = optax.sgd(0.1), make_objective({"ce": {"weight": 1.0}})
    batch = {"inputs": jnp.zeros((4, 1)), "labels": jnp.asarray([0, 1, 2, 0])}
    for skip_nan in (False, True):
        step = make_train_step(model, {}, objective, optimizer, skip_nan=skip_nan)
        fresh = state.create_state(model, optimizer, jax.random.key(0))
        new, metrics = jax.jit(step)(fresh, {}, batch, objective.hparams)
        assert np.isfinite(new.params["w"]).all() == skip_nan
        assert float(metrics["loss"][1]) == 1.0 - skip_nan
    assert [float(x) for x in metrics["skipped"]] == [1.0, 1.0]


def test_a_clock_that_jumps_changes_nothing(tmp_path, uninterrupted, monkeypatch):
    real, jumps = time.time, itertools.cycle((0.0, 1e7, -1e7, 3.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with pytest.raises(Killed):
        run(make_arm(batches=lambda first: until(first, 7, Killed)), tmp_path, train.Every(log=4, save=2))
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        found = run(make_arm(), tmp_path, train.Every(log=4, save=2), writers=[writer])
    assert equal_trees(found.state, uninterrupted)
    for record in (record for record in read_jsonl(tmp_path / "metrics.jsonl") if "seconds" in record):
        assert record["examples_per_s"] > 0 and all(0 <= value < 1e4 for value in record["seconds"].values())


def test_a_stalled_input_is_said_and_ends_the_process_where_that_is_asked_for(capfd):
    def stalling(first):
        for number, batch in enumerate(float_batches(first), first):
            if number == 6:
                time.sleep(1.5)
            yield batch

    run(make_arm(batches=stalling), every=train.Every(log=4, stall_s=0.3))
    said = capfd.readouterr().err
    assert re.search(r"student has waited \d s for the next batch of the input pipeline, after step 6", said)
    code = "import time; from kdjax.clock import *; Watchdog('student', Clock(), 0.0, 0.2).__enter__(); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75 and "student stops: it has waited" in ended.stderr


def test_another_teacher_is_refused(tmp_path):
    run(make_arm(), tmp_path, meta={"teacher_sha256": "a"})
    with pytest.raises(UserError, match="another teacher_sha256"):
        run(make_arm(), tmp_path, meta={"teacher_sha256": "b"})


def test_one_compile_a_stage_and_no_implicit_transfer():
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: (
            compiles.append(about.get("fun_name", "")) if event.endswith("backend_compile_duration") else None
        )
    )
    stages = []
    original = advance.compile_step

    def counting(*args):
        before = len(compiles)
        result = original(*args)
        stages.append(len(compiles) - before)
        return result

    advance.compile_step = counting
    try:
        run(make_arm(stops=(6, 12)))  # under transfer_guard("disallow"), in train.run
    finally:
        advance.compile_step = original
    assert stages == [1, 1]
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jax.jit(lambda x: x + 1)(np.ones(3))  # the guard does raise


def test_stages_use_their_own_values_and_share_the_state():
    arm = make_arm(stops=(4, 12))
    whole, staged = run(make_arm()).state, run(arm).state
    assert int(staged.step) == 12
    assert not equal_trees(whole.params, staged.params)


def test_eight_devices_equal_one():
    # Plain SGD: Adam divides by the gradient's size, so for a bias before batch normalisation it follows rounding.
    one, eight = (run(make_arm(optimizer=optax.sgd(0.01)), devices=devices).state for devices in (1, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), eight.params, one.params)


def test_metrics_are_window_means_and_have_no_duplicates_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        run(make_arm(), tmp_path / "c", writers=[writer])
        run(make_arm(), tmp_path / "c", writers=[writer])
    lines = [line for line in read_jsonl(path) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[0]["hparams"]["kl.temperature"] == 4.0
    for line in lines:
        assert line["loss"] == pytest.approx(0.9 * line["kl"] + 0.1 * line["ce"], rel=1e-5)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, recipe.run(tiny_config(), workdir, say=QUIET).results


def test_main_job_writes_everything_it_promises(finished_run):
    workdir, found = finished_run
    for name in ("config.json", "metrics.jsonl", "results.json", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert json.loads((workdir / "results.json").read_text()) == found
    assert set(found["arms"]) == {"teacher", "student_alone", "student_distilled"}
    assert found["arms"]["student_alone"]["steps"] == found["arms"]["student_distilled"]["steps"]
    for arm in found["arms"]:
        assert (workdir / "checkpoints" / arm / str(found["arms"][arm]["steps"])).is_dir()


def test_same_seed_gives_the_same_weights_and_a_rerun_changes_nothing(finished_run, tmp_path):
    workdir, found = finished_run
    again = recipe.run(tiny_config(), tmp_path, say=QUIET).results
    rerun = recipe.run(tiny_config(), workdir, say=QUIET).results
    for arm, result in found["arms"].items():
        assert again["arms"][arm]["params_sha256"] == result["params_sha256"]
        assert rerun["arms"][arm]["params_sha256"] == result["params_sha256"]
        assert rerun["arms"][arm]["examples_per_s"] == result["examples_per_s"]


def test_both_students_start_alike_and_see_the_same_batches(finished_run):
    from kdjax import build, experiment

    prepared = build.prepare(tiny_config())
    alone, distilled = (build.make_arm(prepared, name) for name in experiment.STUDENTS)
    assert equal_trees(*(train.fresh_state(arm, prepared.mesh) for arm in (alone, distilled)))
    for a, b in itertools.islice(zip(alone.batches(0), distilled.batches(0), strict=True), 3):
        assert equal_trees(a, b)


def test_teacher_from_a_checkpoint_and_several_teachers(finished_run, tmp_path):
    workdir, found = finished_run
    config = tiny_config()
    config.teacher.init = str(workdir)
    config.more_teachers = {"second": {"options": {"hidden": (16,)}, "weight": 0.5}}
    both = recipe.run(config, tmp_path, say=QUIET).results
    assert not (tmp_path / "checkpoints" / "teacher").exists()  # loaded, not trained
    assert (tmp_path / "checkpoints" / "second").is_dir()
    assert both["arms"]["teacher"]["params"] > found["arms"]["teacher"]["params"]
    assert both["arms"]["student_alone"]["params_sha256"] == found["arms"]["student_alone"]["params_sha256"]
    assert both["arms"]["student_distilled"]["params_sha256"] != found["arms"]["student_distilled"]["params_sha256"]


def test_teacher_augment_changes_the_teachers_training_alone(finished_run, tmp_path):
    _, found = finished_run
    config = tiny_config()
    config.teacher.augment = {"crop_padding": 0}
    shas = {
        arm: digest(recipe.run_one(config, tmp_path, arm, say=QUIET).variables) for arm in ("teacher", "student_alone")
    }
    assert shas["student_alone"] == found["arms"]["student_alone"]["params_sha256"]
    assert shas["teacher"] != found["arms"]["teacher"]["params_sha256"]


def test_two_stage_config_with_schedules_runs_as_written(tmp_path):
    config = tiny_config()
    config.stages = {
        "1_soft": {"percent": 50, "losses": {"kl": {"weight": 1.0, "temperature": 8.0}, "ce": {"weight": 0.0}}},
        "2_task": {
            "percent": 50,
            "losses": {"kl": {"weight": {"schedule": "linear", "init": 1.0, "end": 0.0}}, "ce": {"weight": 1.0}},
        },
    }
    recipe.run(config, tmp_path, say=QUIET)
    lines = [
        line for line in read_jsonl(tmp_path / "metrics.jsonl") if line["arm"] == "student_distilled" and "loss" in line
    ]
    half = lines[-1]["step"] // 2
    first, second = ([line["hparams"] for line in lines if (line["step"] <= half) == early] for early in (True, False))
    assert all(values["kl.temperature"] == 8.0 and "ce.weight" not in values for values in first)
    weights = [values["kl.weight"] for values in second]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] < 0.2 < weights[0]


def test_moving_average_is_what_is_evaluated_and_kept(tmp_path):
    config = tiny_config(ema=0.9)
    first = recipe.run_one(config, tmp_path, "student_alone", say=QUIET)
    again = recipe.run_one(config, tmp_path, "student_alone", say=QUIET)
    plain = recipe.run_one(tiny_config(), tmp_path / "plain", "student_alone", say=QUIET)
    assert equal_trees(first.variables, again.variables)
    assert not equal_trees(first.variables, plain.variables)


def test_inference_variables_of_a_state_without_average_are_its_parameters():
    current = state.create_state(small(), optax.sgd(0.1), jax.random.key(0))
    assert state.inference_variables(current)["params"] is current.params

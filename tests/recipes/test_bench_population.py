"""The benchmarks of populations and of taps measure what they say; no assertion is on seconds."""

import json

import jax
import numpy as np
import pytest

from kdjax import build
from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.losses.relation import similarity_preserving
from kdjax.recipes import bench, bench_population, bench_step, bench_taps, population
from tests.helpers import tiny_config


def config():
    found = tiny_config(steps=6)
    found.teacher.options = {"hidden": (64, 64)}
    found.data.augment.crop_padding = 0  # compiles sooner
    return configs.resolve(found)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return bench.run("population", config(), workdir=tmp_path_factory.mktemp("empty"), seeds=2)


@pytest.fixture(scope="module")
def parts():
    """``(experiment, teachers, members)`` of two seeds."""
    members = population.make_members(bench_population.plain(config()), 2, {})
    experiment = build.prepare(members.template)
    return experiment, {"teacher": experiment.teachers["teacher"].init(jax.random.key(0))}, members


# ------------------------------------------------------------------------------------------------------- populations


def test_a_population_is_compared_with_its_members_runs(values):
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert set(bench_population.MEANING) <= set(values)
    assert values["members"] == values["separate_runs_measured"] == 2 and values["steps"] == 6
    assert values["recompiles"] == 0
    assert (
        max(values["params_differ_by"], values["params_differ_by_one_by_one"]) < 1e-5 < 0.1 < values["params_largest"]
    )
    assert 0.5 < values["flops_over_separate"] < 1.0
    assert set(values["step_ms_by_chunk"]) == {"1", "2"} and values["chunk"] in (1, 2)
    assert values["over_separate"] > values["over_separate_chunk_given"] > 0.0
    assert values["separate_training_s"] < values["separate_s"]
    low, high = values["population_s_range"]
    assert low <= values["population_s"] <= high
    assert values["teacher_over_student_params"] == (64 * 64 + 64 + 64 * 64 + 64 + 650) / (64 * 8 + 8 + 90)


def test_a_loop_over_members_counts_as_often_as_it_runs(parts):
    """The compiler counts its body once; as one vmap the same arithmetic has no loop."""
    experiment, teachers, members = parts
    teacher_flops = bench_population.forward_flops(experiment, experiment.teachers["teacher"])
    at_once = bench_population.run_once(experiment, teachers, members.configs)
    loop = bench_population.run_once(experiment, teachers, members.configs, 1)
    assert loop.flops < 0.9 * at_once.flops
    assert bench_population.step_flops(at_once, teacher_flops, 1) == at_once.flops
    assert bench_population.step_flops(loop, teacher_flops, 2) == pytest.approx(at_once.flops, rel=0.05)
    names = bench_population.compiled_over_grid(experiment, teachers, at_once._replace(programs={}), 2)
    assert any("packed" in name for name in names)  # without the finished run's program, its step is compiled


def test_the_population_takes_turns_with_the_separate_runs(parts, monkeypatch):
    experiment, teachers, members = parts
    arm, order = build.make_arm(experiment, "student_distilled"), []

    def run_once(experiment, teachers, members=(), chunk=0):
        order.append("p" if members else "s")
        return bench_population.Run(arm, 1.0, 0.5, 1.0, {}, {})

    monkeypatch.setattr(bench_population, "run_once", run_once)
    many = members._replace(configs=members.configs * 3)
    together, alone = bench_population.in_turns(experiment, many, teachers, 1)
    assert "".join(order) == "pss" * 3 and len(together) == 3 and len(alone) == 6
    monkeypatch.setattr(bench_population, "ENOUGH", 2.5)
    assert len(bench_population.in_turns(experiment, many, teachers, 1)[1]) == 3  # the others are not begun


def test_a_population_of_one_and_losses_without_a_teacher_are_refused(tmp_path):
    with pytest.raises(UserError, match="shares its teacher with nobody"):
        bench.run("population", config(), workdir=tmp_path, seeds=1)
    changed = configs.override(config(), ["losses.kl.weight=0.0"])
    with pytest.raises(UserError, match="no loss asks one"):
        bench.run("population", changed, workdir=tmp_path, seeds=2)


# -------------------------------------------------------------------------------------------------------------- taps


def test_taps_are_compared_with_their_parts(monkeypatch):
    monkeypatch.setattr(bench_step, "SECONDS", 0.0)
    values = bench_taps.measure(config(), ["fitnets"])
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    (term,) = values["terms"].values()
    assert 0.95 < term["flops_over_parts"] < 1.05 and values["data"] == "digits"
    low, high = term["seconds_over_parts_range"]
    assert 0.0 < low <= term["seconds_over_parts"] <= high and term["bytes_over_parts"] > 0.0
    assert term["flops_alone"] > 0 and min(term[f"{what}_ms"] for what in ("step", "without", "alone")) > 0.0
    assert {column.header for column in bench_taps.table(values).columns} >= {"term", "FLOPs", "bytes"}


def test_a_term_alone_is_that_term():
    term_of = lambda name: configs.resolve(configs.override(config(), [f"losses.{name}.weight=1.0"]))
    only = configs.override(term_of("similarity"), ["losses.kl.weight=0.0", "losses.ce.weight=0.0"])
    measured = bench_step.prepare(term_of("similarity"))
    alone = bench_taps.term_alone(configs.resolve(only), measured)
    student, taught, _, _ = alone.given
    ((tap, feature),) = student.taps.items()
    (teacher,) = taught["teacher"].taps.values()
    _, value, gradient = alone.compiled(alone.own, alone.given)
    expected, slope = jax.value_and_grad(similarity_preserving)(feature, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[tap], slope, rtol=1e-4, atol=1e-8)

    only = configs.override(term_of("fitnets"), ["losses.kl.weight=0.0", "losses.ce.weight=0.0"])
    alone = bench_taps.term_alone(configs.resolve(only), measured)
    before = jax.device_get(alone.own[0]["params"])
    (learned, _), *_ = alone.compiled(alone.own, alone.given)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(learned["params"]))
    assert jax.tree.leaves(changed) and any(jax.tree.leaves(changed))  # the projector's own update is part of it

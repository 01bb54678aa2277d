"""A population: every member is its own run, one program serves a whole grid, and it is resumed as a whole."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import build, state, train
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED
from kdjax.objective import make_objective
from kdjax.recipes import distill, population
from kdjax.step import make_train_step
from tests.helpers import batch, digits, small, tiny_config

QUIET = lambda sentence: None
GRID = {"losses.kl.temperature": [1.0, 4.0], "losses.kl.weight": [0.0, 0.9]}


def config(**changes):
    found = tiny_config(steps=12, **changes)
    found.optimizer.name, found.optimizer.learning_rate = "sgd", 0.1  # Adam follows the rounding of zero gradients
    found.population.chunk = 4
    return found


@functools.cache
def teacher():
    experiment = build.prepare(config(), digits())
    return {"teacher": jax.jit(experiment.teachers["teacher"].init)(jax.random.key(3))}


def trained(experiment, arm):
    return train.run(arm, experiment.mesh, every=train.Every(log=6), say=QUIET).state


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_each_member_is_its_own_run(chunk):
    members = population.make_members(config(), 2, {"losses.kl.temperature": [1.0, 4.0]})
    experiment = build.prepare(members.template, digits())
    arm = build.make_arm(experiment, DISTILLED, teacher(), members=members.configs, chunk=chunk)
    together = trained(experiment, arm)
    assert [change["student.seed"] for change in members.changes] == [0, 1, 0, 1]
    for index, own in enumerate(members.configs):
        alone = build.prepare(own, digits())
        state = trained(alone, build.make_arm(alone, DISTILLED, teacher()))
        member = jax.tree.map(lambda x, index=index: x[index], (together.params, together.opt_state))
        close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
        jax.tree.map(close, member, (state.params, state.opt_state))
    kernel = together.params["head"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1]) and not np.allclose(kernel[0], kernel[2])  # seeds and temperatures


def test_a_grid_is_one_program_and_a_weight_of_zero_is_a_member(tmp_path):
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        members = population.make_members(config(), 1, GRID)
        experiment = build.prepare(members.template, digits())
        arm = build.make_arm(experiment, DISTILLED, teacher(), members=members.configs)
        programs = {}
        train.run(arm, experiment.mesh, programs=programs, say=QUIET)
        before = len(compiled)
        other = {"losses.kl.temperature": [2.0, 8.0], "losses.kl.weight": [0.3, 0.6]}
        again = build.make_arm(
            experiment, DISTILLED, teacher(), members=population.make_members(config(), 1, other).configs
        )
        # Another grid: other values of the same arguments.
        arm = arm._replace(stages=[arm.stages[0]._replace(hparams=again.stages[0].hparams)])
        train.run(arm, experiment.mesh, programs=programs, say=QUIET)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(programs) == 1
    assert len(compiled) - before <= 1  # the initial state alone


def test_run_writes_every_member_and_resumes_as_a_whole(tmp_path):
    whole = population.run(config(), tmp_path / "a", seeds=1, grid=GRID, say=QUIET)
    assert [member["changes"]["losses.kl.weight"] for member in whole["members"]] == [0.0, 0.9, 0.0, 0.9]
    assert json.loads((tmp_path / "a" / "population.json").read_text()) == whole
    first, second, third, _ = (member["params_sha256"] for member in whole["members"])
    assert first == third != second  # the temperature of a term of weight 0 changes nothing
    # Stopped at step 6, then run again: the same weights to the last bit.
    sayings = []
    cut = _stopped(tmp_path / "b")
    resumed = population.run(config(), tmp_path / "b", seeds=1, grid=GRID, say=sayings.append)
    assert cut == 10 and any("resuming from step 10" in sentence for sentence in sayings)
    assert [m["params_sha256"] for m in resumed["members"]] == [m["params_sha256"] for m in whole["members"]]
    with pytest.raises(UserError, match="has other members"):
        population.run(config(), tmp_path / "b", seeds=2, grid=GRID, say=QUIET)


def _stopped(workdir):
    """A population that a signal stops after its first checkpoint; returns the step that was saved."""
    original = population.train.run

    def interrupted(arm, *args, **kwargs):
        if arm.name != population.NAME:
            return original(arm, *args, **kwargs)

        def batches(first):
            for number, one in enumerate(arm.batches(first)):
                if number == 9:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield one

        return original(arm._replace(batches=batches), *args, **kwargs)

    population.train = type("Train", (), {**vars(train), "run": staticmethod(interrupted)})
    try:
        with pytest.raises(train.Interrupted) as stopped:
            population.run(config(), workdir, seeds=1, grid=GRID, say=QUIET)
    finally:
        population.train = train
    assert "its state is saved" in str(stopped.value)
    return max(int(place.name) for place in (workdir / "checkpoints" / "population").iterdir() if place.name.isdigit())


def test_members_are_split_over_an_axis_of_the_mesh():
    over = config()
    over.mesh = {"members": 4, "data": 2}
    members = population.make_members(over, 4, {})
    experiment = build.prepare(members.template, digits())
    arm = build.make_arm(experiment, DISTILLED, teacher(), members=members.configs)
    split = trained(experiment, arm)
    kernel = split.params["head"]["kernel"]
    assert kernel.sharding.spec[0] == "members" and kernel.addressable_shards[0].data.shape[0] == 1
    one = population.make_members(config(), 4, {})
    plain = build.prepare(one.template, digits())
    whole = trained(plain, build.make_arm(plain, DISTILLED, teacher(), members=one.configs))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, jax.device_get(split.params), jax.device_get(whole.params))


def test_accumulation_and_learned_parts_work_in_a_population():
    student, teacher_model = small(8), small(16)
    goal = make_objective({"kl": {"weight": 1.0, "temperature": 2.0}})
    optimizer = optax.sgd(0.1)
    teachers = {"teacher": teacher_model.init(jax.random.key(1))}

    def after(members, accumulate):
        step = make_train_step(
            student, {"teacher": teacher_model}, goal, optimizer, members=members, accumulate=accumulate
        )
        one = lambda key: state.create_state(student, optimizer, key, jax.random.key(9))
        made = jax.vmap(one)(jax.random.split(jax.random.key(0), 3))
        made = made._replace(step=made.step[0], view_key=made.view_key[0])
        hparams = jax.tree.map(lambda x: jnp.full(3, x), goal.hparams)
        return jax.jit(step)(made, teachers, batch(), hparams)[0].params

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, after(3, 1), after(3, 4))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"data.batch_size": [1, 2]}, "part of the compiled program"),
        ({"losses.dkd.temperature": [1.0]}, "part of the compiled program"),  # a term that is off
        ({"losses.fitnets.projector": ["mlp"]}, "part of the compiled program"),
        ({"losses.kl.temperature": [0.0]}, "should be above 0"),
        ({"losses.kl.tempreature": [1.0]}, "did you mean 'losses.kl.temperature'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid, message):
    with pytest.raises(UserError, match=message):
        population.make_members(config(), 1, grid)


@pytest.mark.parametrize("word", ["losses.kl.weight", "losses.kl.weight=", "losses.kl.weight=a,b", "a=1,1"])
def test_a_grid_that_cannot_be_read_is_refused(word):
    with pytest.raises(UserError):
        population.parse_grid([word])


def test_a_chunk_that_does_not_divide_the_members_is_refused(tmp_path):
    odd = config()
    odd.population.chunk = 3
    with pytest.raises(UserError, match="does not divide the 4 members"):
        population.run(odd, tmp_path, seeds=4, say=QUIET)


def test_distill_and_population_agree_on_member_zero(tmp_path):
    """The member with seed 0 is the distilled student of ``kdjax distill``."""
    single = config()
    single.control.losses.ce.weight = 1.0
    outcome = distill.run(single, tmp_path / "one", say=QUIET)
    single.population.chunk = 1
    found = population.run(single, tmp_path / "many", seeds=1, say=QUIET)
    accuracy = outcome.results["arms"]["student_distilled"]["test"]["accuracy"]
    assert found["members"][0]["accuracy"] == pytest.approx(accuracy, abs=0.003)

"""Teachers a batch ahead of the student: the same student as by the plain step, and resume to the bit."""

import jax
import numpy as np
import pytest

from kdjax import config as configs
from kdjax import sharding
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN, load
from kdjax.recipes import distill
from tests.helpers import equal_trees, tiny_config, tiny_language_config
from tests.test_train import Killed, make_arm, run, until

QUIET = lambda sentence: None


@pytest.fixture(scope="module")
def plain():
    return run(make_arm(stops=(5, 12))).state


def test_one_program_gives_the_plain_steps_student_to_the_bit_also_resumed(tmp_path, plain):
    assert equal_trees(run(make_arm(stops=(5, 12), ahead=True)).state, plain)

    with pytest.raises(Killed):
        run(make_arm(stops=(5, 12), ahead=True, batches=lambda first: until(first, 9, Killed)), tmp_path)
    assert equal_trees(run(make_arm(stops=(5, 12), ahead=True), tmp_path).state, plain)


def test_two_meshes_give_the_plain_steps_student(plain):
    devices = jax.devices()
    there = sharding.make_mesh({"data": 2}, devices[-2:])
    found = run(make_arm(stops=(5, 12), ahead=True, teacher_mesh=there)).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.params, plain.params)
    assert found.params["head"]["kernel"].sharding.device_set.isdisjoint(there.devices.flat)


def test_a_language_models_head_goes_over_once(tmp_path, monkeypatch):
    """Its logits are made beside the student, from hidden states that come with each batch."""
    plain, apart = tiny_language_config(), tiny_language_config()
    apart.teacher_mesh = {"data": 1}
    moved = []
    original = jax.device_put

    def counting(x, *args, **options):
        moved.append(getattr(x, "shape", None))
        return original(x, *args, **options)

    distill.run_one(plain, tmp_path / "run", MAIN, say=QUIET)
    found = {}
    for name, config in (("plain", plain), ("apart", apart)):
        config.teacher.init = str(tmp_path / "run")
        if name == "apart":
            monkeypatch.setattr(jax, "device_put", counting)
        found[name] = distill.run_one(config, tmp_path / name, DISTILLED, say=QUIET).variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found.values())
    hidden, width = (8, 32, 16), 16
    heads = [shape for shape in moved if shape and len(shape) == 2 and width in shape and max(shape) > 200]
    assert moved.count(hidden) == 6 > len(heads)  # those of each step; tables and heads at the start alone


def test_what_cannot_be_ahead_is_refused():
    config = tiny_config()
    config.train.update(overlap=True, accumulate=2)
    with pytest.raises(UserError, match="need whole batches"):
        load(config)
    config = configs.default()
    config.teacher_mesh = {"data": 8}
    with pytest.raises(UserError, match="1 to 7 of the 8 devices"):
        load(config)

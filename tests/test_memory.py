"""What a run needs of each device: said with reasons, and refused with advice before its first step."""

import jax
import jax.numpy as jnp
import pytest

from kdjax import memory, sharding
from kdjax.errors import UserError
from tests.test_train import make_arm, run


def placed(shapes, mesh, rules):
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return sharding.placed(tree, mesh, rules)


def test_bytes_are_those_of_one_device():
    tree = placed({"split": (1024, 512), "whole": (100,)}, sharding.make_mesh({"fsdp": 8}), ((".*", "fsdp"),))
    assert memory.per_device(tree) == 1024 * 512 * 4 // 8 + 400


def test_large_arrays_that_every_device_holds_are_named_with_the_reason():
    shapes = {"odd": (1023, 511), "kept": (1024, 1024), "split": (1024, 512), "small": (16,)}
    rules = (("kept", "replicate"), (".*", "fsdp"))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    assert memory.replicated(placed(shapes, mesh, rules), mesh, rules) == [
        "kept 4.0 MiB (the rules say so)",
        "odd 2.0 MiB (fsdp=4 divides no dimension of [1023, 511])",
    ]
    alone = sharding.make_mesh({"data": 8})
    found = memory.replicated(placed({"odd": (1024, 512)}, alone, rules), alone, rules)
    assert found == ["odd 2.0 MiB (mesh.fsdp is 1)"]


def test_what_does_not_fit_is_refused_with_what_takes_most_and_what_helps(monkeypatch):
    device = jax.devices()[0]
    needs = {"teacher": 3000, "student": 10, "optimiser": 20, "objective": 0}
    assert memory.check("student", needs, device).startswith(
        "student: teacher 2.9 KiB, student 10 B, optimiser 20 B of"
    )
    monkeypatch.setattr(memory, "limit_of", lambda device: (2000, "a small device"))
    with pytest.raises(
        UserError, match=r"needs 3.0 KiB of each device .* there are 2.0 KiB \(a small device\): split it"
    ):
        memory.check("student", needs, device)
    with pytest.raises(UserError, match=r"student needs .*: raise train.accumulate"):
        memory.check("student", {"student": 500, "activations": 5000}, device)
    with pytest.raises(UserError, match="student needs"):  # before any array is made
        run(make_arm(batches=lambda first: pytest.fail("no batch is needed to refuse a run")))

"""The mesh and the rules from parameter paths to shardings."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import sharding
from kdjax.errors import UserError


def test_mesh_has_auto_axes_and_fills_the_free_one():
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh({"data": 2}).size == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 16}, "needs 16 devices and there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, "1 or more"),
    ],
)
def test_impossible_meshes_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(axes)


def test_first_matching_rule_wins_and_fsdp_splits_the_largest_divisible_dimension():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    tree = {"a": {"kernel": jnp.zeros((3, 3, 100, 512)), "bias": jnp.zeros(512)}, "odd": jnp.zeros((131, 129))}
    found = sharding.by_rules(tree, mesh, (("^a/kernel", "fsdp"), (".*", "fsdp")))
    assert found["a"]["kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    assert found["a"]["bias"].spec == PartitionSpec()  # too small to be worth it
    assert found["odd"].spec == PartitionSpec()  # nothing divides
    found = sharding.by_rules(tree, mesh, (("kernel", "replicate"), (".*", "fsdp")))
    assert found["a"]["kernel"].spec == PartitionSpec()


def test_rules_must_cover_everything_and_name_known_tactics():
    mesh = sharding.make_mesh({"data": -1})
    with pytest.raises(UserError, match="no sharding rule speaks of bias"):
        sharding.by_rules({"bias": jnp.zeros(3)}, mesh, (("kernel", "replicate"),))
    with pytest.raises(UserError, match="did you mean 'replicate'"):
        sharding.by_rules({"bias": jnp.zeros(3)}, mesh, ((".*", "replicated"),))


def test_batch_must_divide_over_the_mesh():
    mesh = sharding.make_mesh({"data": -1})
    sharding.check_batch(64, mesh, accumulate=4)
    with pytest.raises(UserError, match=r"data.batch_size=100 is not divisible by the mesh's 8 devices: try 96"):
        sharding.check_batch(100, mesh)
    with pytest.raises(UserError, match=r"train\.accumulate=3"):
        sharding.check_batch(64, mesh, accumulate=3)


def test_put_batch_splits_the_leading_dimension_over_all_axes():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    array = sharding.put_batch({"x": jnp.arange(16.0)}, mesh)["x"]
    assert {shard.data.shape for shard in array.addressable_shards} == {(2,)}
    assert jax.numpy.array_equal(array, jnp.arange(16.0))

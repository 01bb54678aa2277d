"""The mesh and the rules from parameter paths to shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import build, sharding, train
from kdjax import config as configs
from kdjax.data.packing import TextSplit
from kdjax.data.text import TextDataset
from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError
from kdjax.model import flatten_paths
from kdjax.models.decoder import DecoderConfig, make_decoder


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


# --------------------------------------------------------------------------------------------------- the tensor axis

ON_BOTH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("tactic", "shape", "spec"),
    [
        ("tensor:-1", (3, 512, 1024), (None, None, "tensor")),
        ("tensor:1", (3, 512, 1024), (None, "tensor")),
        ("tensor:-1+fsdp", (3, 512, 1024), (None, "fsdp", "tensor")),
        ("tensor:-2+fsdp", (3, 512, 1024), (None, "tensor", "fsdp")),
        ("tensor:-2+fsdp", (1024, 512), ("tensor", "fsdp")),
        ("tensor:-1+fsdp", (3, 512, 1025), (None, "fsdp")),  # nothing for tensor to split, and fsdp keeps to the others
        ("tensor:-1+fsdp", (3, 511, 1024), (None, None, "tensor")),
        ("tensor:-1+fsdp", (4096 * 8,), ("tensor",)),
        ("tensor:-3+fsdp", (512, 1024), (None, "fsdp")),  # no such dimension
        ("tensor:-1+fsdp", (3, 32, 32), ()),  # too small to be worth it
        ("fsdp", (3, 512, 1024), (None, None, "fsdp")),
    ],
)
def test_tensor_splits_the_named_dimension_and_fsdp_the_largest_other(tactic, shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = sharding.by_rules({"x": leaf}, sharding.make_mesh(ON_BOTH), ((".*", tactic),))["x"]
    assert found.spec == PartitionSpec(*spec)


def test_fsdp_splits_the_same_dimension_on_a_mesh_without_tensor():
    leaf = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    for axes in ({"fsdp": 8}, {"fsdp": 8, "tensor": 1}):
        mesh = sharding.make_mesh(axes)
        assert sharding.by_rules(leaf, mesh, (("", "tensor:-2+fsdp"),)).spec == PartitionSpec(None, "fsdp")
        assert sharding.by_rules(leaf, mesh, (("", "tensor:-2"),)).spec == PartitionSpec()


@pytest.mark.parametrize(
    "tactic", ["tensor", "tensor:", "tensor:x", "tensor:-1+tensor", "fsdp+tensor:-1", "tensor:-1 "]
)
def test_other_tensor_tactics_are_refused(tactic):
    with pytest.raises(UserError, match="tensor:DIMENSION"):
        sharding.by_rules({"x": jnp.zeros(3)}, sharding.make_mesh(ON_BOTH), ((".*", tactic),))


def test_devices_of_one_tensor_group_see_the_same_batch():
    mesh = sharding.make_mesh(ON_BOTH)
    array = sharding.put_batch({"x": np.arange(8)}, mesh)["x"]
    seen = {shard.device: shard.data.tolist() for shard in array.addressable_shards}
    groups = mesh.devices.reshape(4, 2)
    assert [[seen[device] for device in group] for group in groups] == [[[2 * i, 2 * i + 1]] * 2 for i in range(4)]
    sharding.check_batch(4, mesh)
    with pytest.raises(UserError, match="is not divisible by the mesh's 4"):
        sharding.check_batch(6, mesh)


def test_rules_of_a_decoder_speak_of_its_weights_and_moments():
    config = DecoderConfig(
        vocabulary=512, width=256, layers=4, heads=8, kv_heads=4, head_dim=32, mlp_width=512, context=8, qkv_bias=True
    )
    params = jax.eval_shape(make_decoder(config).init, jax.random.key(0))["params"]
    state = {"params": params, "moments": jax.eval_shape(optax.scale_by_adam().init, params)}
    found = flatten_paths(sharding.by_rules(state, sharding.make_mesh(ON_BOTH), sharding.DECODER))
    specs = {path.removeprefix("params/"): one.spec for path, one in found.items() if path.startswith("params/")}
    for path, spec in specs.items():
        split = {"tensor", "fsdp"} if path.endswith(("kernel", "embedding")) else set()
        assert {axis for axis in spec if axis} == split, path
        assert found[f"moments/mu/{path}"].spec == found[f"moments/nu/{path}"].spec == spec
    assert specs["blocks/mlp/up/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["blocks/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["embed/embedding"] == PartitionSpec("tensor", "fsdp")


def windows(rng, count, context):
    segments = np.sort(rng.integers(1, 3, (count, context + 1)), axis=1).astype(np.uint16)
    tokens = rng.integers(0, 257, segments.shape).astype(np.uint16)
    return TextSplit(tokens, segments, rng.random(segments.shape) < 0.9, np.ones_like(tokens))


def distilled(axes, rules):
    """The parameters of a small language model after two steps on a mesh."""
    rng, context = np.random.default_rng(0), 32
    tokenizer = Tokenizer("none", {}, 257, None, 256, lambda texts: [], lambda ids: "", "")
    dataset = TextDataset("random", windows(rng, 16, context), windows(rng, 8, context), tokenizer, context, "", "")
    config = configs.default()
    config.task = "language"
    config.data.update(context=context, batch_size=8, eval_batch_size=8)
    # More rows than tokens: two devices have 132 rows each, and of the logits one has 129 and the other 128.
    common = {"vocabulary": 264, "width": 128, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 256}
    for part, tied in ((config.teacher, False), (config.student, True)):
        part.name, part.options = "decoder", {**common, "tied": tied}
    config.teacher.steps = config.train.steps = 2
    config.train.tokens_per_chunk = 16
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.5
    config.mesh, config.sharding = axes, {"student": rules, "teacher": rules}
    experiment = build.prepare(config, dataset)
    teachers = {"teacher": jax.jit(experiment.teachers["teacher"].init)(jax.random.key(7))}
    arm = build.make_arm(experiment, "student_distilled", jax.device_get(teachers))
    return train.run(arm, experiment.mesh).state.params


def test_a_step_with_split_products_is_the_step_of_one_device():
    alone = distilled({"data": 1}, ((".*", "replicate"),))
    split = distilled(ON_BOTH, sharding.DECODER)
    assert split["blocks"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert split["embed"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    for (path, one), other in zip(flatten_paths(alone).items(), flatten_paths(split).values(), strict=True):
        np.testing.assert_allclose(jax.device_get(other), jax.device_get(one), rtol=1e-4, atol=1e-6, err_msg=path)

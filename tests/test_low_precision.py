"""Stored teachers and float8 products, against NumPy in float64, and as the compiler and a run see them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kdjax import build, checkpoint, low_precision, sharding, train
from kdjax import experiment as experiments
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, MAIN
from kdjax.model import flatten_paths, from_nnx, logits_of
from kdjax.models.cnn import CNN
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.recipes import distill, program
from tests import helpers

BYTES = ("int8", "float8_e4m3")
SIZES = DecoderConfig(vocabulary=256, width=64, layers=16, heads=4, kv_heads=2, head_dim=16, mlp_width=256, context=32)
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@functools.cache
def decoder(tied=False):
    sizes = SIZES._replace(tied=tied)
    return make_decoder(sizes), jax.device_get(jax.jit(make_decoder(sizes).init)(jax.random.key(0)))


@functools.cache
def cnn():
    model = from_nnx(lambda rngs: CNN(classes=10, input_shape=(8, 8, 1), rngs=rngs, widths=(16, 32), strides=(1, 2)))
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def tokens(rows=4):
    return np.random.default_rng(0).integers(0, 256, (rows, 32)).astype(np.int32)


def asked(model, taps=()):
    def ask(variables, inputs):
        outputs = model.apply(variables, inputs, train=False, taps=taps)[0]
        return logits_of(outputs), outputs.taps

    return ask


# --------------------------------------------------------------------------------------------------- stored weights


@pytest.mark.parametrize("kind", BYTES)
def test_a_weight_is_rounded_by_its_channels_largest_magnitude(kind):
    _, variables = decoder()
    stored = low_precision.store(variables, kind)
    bound, to = {"int8": (127, np.rint), "float8_e4m3": (448, lambda x: x.astype(E4M3))}[kind]
    one = {  # by path, the axes along which a channel lies
        "blocks/mlp/down/kernel": (1,),
        "blocks/attention/q/kernel": (1,),
        "embed/embedding": (1,),
        "head/kernel": (1,),
    }
    found = jax.tree.map(lambda x: x, low_precision.restored(stored))
    for path, axes in one.items():
        weight = flatten_paths(variables["params"])[path].astype(np.float64)
        scale = np.abs(weight).max(axis=axes, keepdims=True) / bound
        expected = to((weight / scale).astype(np.float32)).astype(np.float64) * scale
        value = np.asarray(flatten_paths(found["params"])[path], np.float64)
        # float32 and float64 may differ where a value lies between two steps: one step, and only there.
        step = scale if kind == "int8" else np.maximum(np.abs(weight), scale * 2**-6) / 8
        differs = np.abs(value - expected) > 1e-5 * np.abs(weight).max()
        assert differs.mean() < 1e-3 and (np.abs(value - expected) <= 1.01 * step).all()
    norms = flatten_paths(stored["params"])["blocks/attention_norm/scale"]
    assert norms is flatten_paths(variables["params"])["blocks/attention_norm/scale"]


def test_a_channel_of_zeros_and_small_weights():
    weights = {"wide": {"kernel": np.zeros((64, 32), np.float32)}, "narrow": {"kernel": np.ones((8, 4), np.float32)}}
    weights["wide"]["kernel"][:, 1:] = 1e-20
    stored = low_precision.store({"params": weights, "state": {}}, "int8")
    assert stored["params"]["narrow"]["kernel"] is weights["narrow"]["kernel"]
    np.testing.assert_allclose(low_precision.restored(stored)["params"]["wide"]["kernel"], weights["wide"]["kernel"])


@functools.cache
def compiled(kind):
    model, variables = decoder()
    if kind:
        model, variables = low_precision.of_stored(model, kind), low_precision.store(variables, kind)
    return jax.jit(asked(model)).lower(variables, tokens()).compile(), variables


@pytest.mark.parametrize("kind", BYTES)
def test_one_layer_at_a_time_is_there_in_full(kind):
    (plain, variables), (program, stored) = compiled(""), compiled(kind)
    np.testing.assert_allclose(
        program(stored, tokens())[0], plain(low_precision.restored(stored), tokens())[0], atol=1e-5
    )
    before, after = plain.memory_analysis(), program.memory_analysis()
    layer = 4 * sum(x[0].size for x in jax.tree.leaves(variables["params"]["blocks"]))
    assert 3.7 * after.argument_size_in_bytes < before.argument_size_in_bytes
    assert after.temp_size_in_bytes - before.temp_size_in_bytes < layer < before.argument_size_in_bytes / 16


def test_a_sharded_decoder_says_what_its_restored_weights_say():
    model, variables = decoder(tied=True)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    stored = low_precision.store(variables, "int8")
    placed = train.put_teachers({MAIN: stored}, mesh, sharding.DECODER)[MAIN]
    kernel = placed["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.values.addressable_shards[0].data.size == kernel.values.size // 4
    taps = ("blocks.3",)
    inputs = jax.device_put(tokens(), sharding.over_batch(mesh))
    logits, tapped = jax.jit(asked(low_precision.of_stored(model, "int8"), taps))(placed, inputs)
    expected, wanted = jax.jit(asked(model, taps))(low_precision.restored(stored), tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(tapped["blocks.3"], wanted["blocks.3"], atol=1e-5)


@pytest.mark.parametrize("kind", low_precision.STORED)
def test_a_model_of_flax_is_given_its_weights_multiplied_out(kind):
    model, variables = cnn()
    stored, inputs = low_precision.store(variables, kind), helpers.batch()["inputs"]
    found = jax.jit(asked(low_precision.of_stored(model, kind)))(stored, inputs)[0]
    expected = jax.jit(asked(model))(low_precision.restored(stored), inputs)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shapes = jax.eval_shape(low_precision.of_stored(model, kind).init, jax.random.key(0))
    assert jax.tree.all(jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), shapes, stored))


def test_a_run_with_a_stored_teacher_resumes_with_it_alone(tmp_path):
    config = helpers.tiny_config()
    config.teacher.epochs, config.teacher.optimizer.learning_rate = 4, 1e-2
    distill.run_one(config, tmp_path / "teacher", MAIN, say=lambda _: None)
    config.teacher.init = str(tmp_path / "teacher")
    plain = build.prepare(config)
    config.teacher.weights = "int8"
    experiment = build.prepare(config)
    as_floats, given = (experiments.load_teacher(one, MAIN) for one in (plain, experiment))
    assert checkpoint.digest(given) == checkpoint.digest(low_precision.store(as_floats, "int8"))
    task, size = experiment.task, config.data.eval_batch_size
    accuracies = [
        task.make_accuracy(experiments.model_of(one, MAIN), one.dataset, one.mesh, size)(weights)
        for one, weights in ((plain, as_floats), (experiment, given))
    ]
    assert accuracies[0] > 0.6 and abs(accuracies[0] - accuracies[1]) < 0.01

    arm = build.make_arm(experiment, DISTILLED)
    shapes = program.abstract_teachers(experiment)[MAIN]
    assert jax.tree.all(jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), shapes, given))
    first = distill.run_one(config, tmp_path / "run", DISTILLED, say=lambda _: None)
    again = distill.run_one(config, tmp_path / "run", DISTILLED, say=lambda _: None)
    assert helpers.equal_trees(first.variables, again.variables)
    folder = tmp_path / "run" / "checkpoints" / DISTILLED
    with checkpoint.Checkpoints(folder, 1, False) as kept:
        _, meta = kept.restore_newest(train.abstract_state(arm, experiment.mesh), print)
    assert meta["teacher_sha256"] == {MAIN: checkpoint.digest(given)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.weights": "int4"}, "weights of teacher.*int8"),
        ({"train.products": "fp8"}, "train.products.*float8"),
        ({"teacher.weights": "int8", "student.reuse_classifier": True}, "student.reuse_classifier takes over weights"),
        ({"teacher.weights": "int8", "compress": {"a": {"method": "quantise", "of": "teacher"}}}, "of=teacher takes"),
        ({"train.products": "float8", "student.name": "cnn", "student.options": {}}, "none but its classifier"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    config = helpers.tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        build.prepare(config)


# --------------------------------------------------------------------------------------------------- float8 products


def rounded(x, dtype):
    """Float64 values as the float8 of a power-of-two scale holds them."""
    largest = {E4M3: 2.0**8, E5M2: 2.0**15}[dtype]
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max())) + 1) / largest
    return (x / scale).astype(dtype).astype(np.float64) * scale


def test_a_float8_product_and_its_gradients():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((64, 48)), 0.05 * rng.standard_normal((48, 16))
    cotangent = 1e-5 * rng.standard_normal((64, 16))
    x, kernel, cotangent = (array.astype(np.float32).astype(np.float64) for array in (x, kernel, cotangent))
    y, back = jax.vjp(low_precision.float8_product, *(jnp.asarray(array, jnp.float32) for array in (x, kernel)))
    found = (y, *back(jnp.asarray(cotangent, jnp.float32)))
    x8, kernel8, cotangent8 = rounded(x, E4M3), rounded(kernel, E4M3), rounded(cotangent, E5M2)
    expected = (x8 @ kernel8, cotangent8 @ kernel8.T, x8.T @ cotangent8)
    exact = (x @ kernel, cotangent @ kernel.T, x.T @ cotangent)
    for value, same, near in zip(found, expected, exact, strict=True):
        np.testing.assert_allclose(value, same, rtol=1e-5, atol=1e-6 * np.abs(same).max())
        assert 0.005 < np.linalg.norm(value - near) / np.linalg.norm(near) < 0.1  # it did round


def test_zeros_padding_and_what_is_not_finite():
    product = jax.jit(low_precision.float8_product)
    x, kernel = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.normal(jax.random.key(1), (8, 8))
    assert (product(jnp.zeros_like(x), kernel) == 0).all()
    padded = product(jnp.concatenate([x, 30 * x]), kernel)[:16]  # a larger scale, the same mantissas
    np.testing.assert_allclose(padded, product(x, kernel), atol=2e-3)
    assert not jnp.isfinite(product(x.at[0, 0].set(jnp.inf), kernel)).all()


def lowered(task):
    """The distilled student's step of a tiny config with float8 products, as the compiler is given it."""
    config = helpers.tiny_language_config() if task == "language" else helpers.tiny_config()
    config.train.products, config.teacher.weights = "float8", "int8"
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config.sharding = {"student": sharding.DECODER, "teacher": sharding.DECODER}
    experiment = build.prepare(config)
    arm = build.make_arm(experiment, DISTILLED)
    state, batch = train.abstract_state(arm, experiment.mesh), next(arm.batches(0))
    arguments = (state, program.abstract_teachers(experiment), batch, arm.stages[0].hparams)
    return jax.jit(arm.stages[0].step).lower(*arguments).as_text()


@pytest.mark.parametrize("task", ["language", "classification"])
def test_the_step_multiplies_float8(task):
    dots = [line for line in lowered(task).splitlines() if "dot_general" in line]
    forward = [line for line in dots if line.count("f8E4M3FN") == 2]
    backward = [line for line in dots if "f8E4M3FN" in line and "f8E5M2" in line]
    # Seven kernels of a decoder's block in teacher and student, one hidden layer in an mlp; two products back, or for
    # the first layer one, since nothing learns by the gradient of the images.
    assert (len(forward), len(backward)) == {"language": (14, 14), "classification": (2, 1)}[task]


def test_a_student_of_float8_products_learns_as_well():
    found = {}
    for products in ("", "float8"):
        config = helpers.tiny_config(products=products)
        config.student.options, config.optimizer.learning_rate = {"hidden": (32, 32)}, 1e-2
        config.train.epochs = 12
        experiment = build.prepare(config)
        arm = build.make_arm(experiment, "student_alone")
        done = train.run(arm, experiment.mesh)
        score = experiment.task.make_accuracy(experiment.student, experiment.dataset, experiment.mesh, 256)
        found[products] = score({"params": done.state.params, "state": done.state.model_state})
    assert found[""] > 0.85 and abs(found["float8"] - found[""]) < 0.03

"""Students cut out of their teachers: exact slices, importance as transformers' modules give it, and refusals."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import huggingface, sharding
from kdjax.compress import decoders
from kdjax.errors import UserError
from kdjax.model import first_mismatch, logits_of
from kdjax.models.decoder import DecoderConfig, RopeScaling, make_decoder
from tests.helpers import equal_trees

TEACHER = DecoderConfig(
    vocabulary=61, width=32, layers=5, heads=6, kv_heads=3, head_dim=8, mlp_width=40, context=64, qk_norm=True
)
FAMILIES = {
    "llama": TEACHER._replace(qk_norm=False, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), tied=True),
    "qwen2": TEACHER._replace(qk_norm=False, qkv_bias=True),
    "qwen3": TEACHER,
}
TOKENS = np.random.default_rng(0).integers(0, 61, (6, 24)).astype(np.int32)


@cache
def variables_of(config):
    """Random parameters in which every part matters, biases and norms too."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))

    def draw(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def any_scores(config):
    rng = np.random.default_rng(1)
    shapes = (config.width,), (config.layers, config.kv_heads), (config.layers, config.mlp_width)
    return decoders.Importance(*(rng.random(shape) for shape in shapes))


def scaled(variables, path, factors):
    """With one parameter multiplied by factors; the others are shared."""
    head, _, rest = path.partition("/")
    return variables | {head: scaled(variables[head], rest, factors) if rest else variables[head] * factors}


def logits(config, variables, tokens=TOKENS):
    return np.asarray(_forward(config, variables, tokens))


@partial(jax.jit, static_argnums=0)
def _forward(config, variables, tokens):
    return logits_of(make_decoder(config).apply(variables, tokens, train=False)[0])


def kl_to(teacher_logits, student_logits):
    p, q = (jax.nn.log_softmax(z) for z in (teacher_logits, student_logits))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("teacher", "student", "chosen"),
    [
        (4, 4, (0, 1, 2, 3)),
        (12, 6, (0, 2, 4, 7, 9, 11)),
        (32, 4, (0, 10, 21, 31)),
        (4, 3, (0, 2, 3)),
        (24, 2, (0, 23)),
        (3, 1, (0,)),
        (1, 1, (0,)),
    ],
)
def test_layers_are_evenly_spaced_from_the_first_to_the_last(teacher, student, chosen):
    assert decoders.layer_choice(teacher, student) == chosen


def test_layers_are_distinct_for_all_sizes():
    for teacher in range(1, 50):
        for student in range(1, teacher + 1):
            chosen = decoders.layer_choice(teacher, student)
            assert len(set(chosen)) == student
            assert chosen == tuple(sorted(chosen))
            assert student == 1 or (chosen[0], chosen[-1]) == (0, teacher - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_the_same_config_is_the_teacher(family):
    config = FAMILIES[family]
    variables = variables_of(config)
    assert equal_trees(decoders.student_from_teacher(config, variables, config), variables)
    cut = decoders.student_from_teacher(config, variables, config, importance=any_scores(config))
    assert equal_trees(cut, variables)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_are_the_teachers(family):
    config = FAMILIES[family]
    variables, smaller = variables_of(config), config._replace(layers=3)
    cut = decoders.student_from_teacher(config, variables, smaller)
    wanted = variables["params"] | {
        "blocks": jax.tree.map(lambda x: x[np.array([0, 2, 4])], variables["params"]["blocks"])
    }
    assert equal_trees(cut, {"params": wanted, "state": {}})


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_at_once_fit_the_students_config(family):
    config = FAMILIES[family]
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables_of(config))
    student = config._replace(vocabulary=50, width=20, layers=2, heads=4, kv_heads=2, mlp_width=17, context=32)
    cut = decoders.student_from_teacher(config, variables, student, importance=any_scores(config))
    assert first_mismatch(jax.eval_shape(make_decoder(student).init, jax.random.key(0)), cut) is None
    assert {leaf.dtype for leaf in jax.tree.leaves(cut)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(logits(student, cut, TOKENS % 50)).all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_cutting_dead_heads_and_neurons_changes_nothing(family):
    config = FAMILIES[family]
    variables = variables_of(config)
    groups, neurons = np.ones((5, 1, 3, 1), np.float32), np.ones((5, 1, 40), np.float32)
    rng = np.random.default_rng(1)
    for layer in range(5):  # others in each layer
        groups[layer, :, rng.integers(3)] = 0
        neurons[layer, :, rng.permutation(40)[:13]] = 0
    groups = np.repeat(groups, 8, axis=-1).reshape(5, 1, 24)
    dead = scaled(scaled(variables, "params/blocks/attention/v/kernel", groups), "params/blocks/mlp/up/kernel", neurons)
    if config.qkv_bias:
        dead = scaled(dead, "params/blocks/attention/v/bias", groups[:, 0])
    student = config._replace(heads=4, kv_heads=2, mlp_width=27)
    cut = decoders.student_from_teacher(config, dead, student, importance=decoders.importance(config, dead, TOKENS))
    wanted = logits(config, dead)
    assert np.abs(wanted - logits(config, variables)).max() > 0.1
    np.testing.assert_allclose(logits(student, cut), wanted, atol=2e-5)


def test_cutting_dead_channels_changes_the_norms_mean_square_alone():
    config = TEACHER._replace(norm_eps=0.0)
    alive = np.ones(32, np.float32)
    alive[np.random.default_rng(2).permutation(32)[:10]] = 0
    dead = variables_of(config)
    for path in ("embed/embedding", "blocks/attention/o/kernel", "blocks/mlp/down/kernel"):
        rank = 2 if path.startswith("embed") else 3
        dead = scaled(dead, f"params/{path}", alive.reshape((1,) * (rank - 1) + (32,)))
    student = config._replace(width=22)
    cut = decoders.student_from_teacher(config, dead, student, importance=decoders.importance(config, dead, TOKENS))
    # The same sum of squares over 22 channels instead of 32 gives a larger mean.
    for path in ("blocks/attention_norm", "blocks/mlp_norm", "norm"):
        dead = scaled(dead, f"params/{path}/scale", np.float32(np.sqrt(22 / 32)))
    np.testing.assert_allclose(logits(student, cut), logits(config, dead), atol=2e-5)


def test_the_vocabulary_is_cut_to_its_first_rows_and_a_tied_teacher_may_have_an_untied_student():
    tied = FAMILIES["llama"]
    variables = variables_of(tied)
    student = tied._replace(vocabulary=50, tied=False)
    cut = decoders.student_from_teacher(tied, variables, student)
    tokens = TOKENS % 50
    np.testing.assert_array_equal(logits(student, cut, tokens), logits(tied, variables, tokens)[..., :50])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_importance_is_what_the_modules_of_transformers_give(family, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers, the reference, runs on torch")
    transformers = pytest.importorskip("transformers", reason="the reference")
    config = FAMILIES[family]._replace(width=36)
    variables = variables_of(config)
    huggingface.save(tmp_path / "teacher", variables, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    seen = {}

    def keep(name, kind):
        def hook(_, inputs, output):
            seen[name] = (inputs[0] if kind == "input" else output).detach().double().numpy()

        return hook

    for name, module in model.named_modules():
        if name.endswith("norm") and "self_attn" not in name:
            module.register_forward_hook(keep(name, "output"))
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(keep(name, "input"))
    model(torch.tensor(TOKENS, dtype=torch.long))

    def total(scores):
        return np.linalg.norm(scores.mean(axis=1), axis=0)  # the mean over a row, the norm over rows

    norms = [name for name in seen if name.endswith("norm")]
    assert len(norms) == 11
    found = decoders.importance(config, variables, TOKENS)
    np.testing.assert_allclose(found.channels, sum(total(abs(seen[name])) for name in norms), rtol=1e-4)
    for layer in range(5):
        neurons = seen[f"model.layers.{layer}.mlp.down_proj"]
        np.testing.assert_allclose(found.neurons[layer], total(abs(neurons)), rtol=1e-3, atol=1e-5)
        mixed = seen[f"model.layers.{layer}.self_attn.o_proj"].reshape(6, 24, 3, 2, 8)
        np.testing.assert_allclose(found.heads[layer], total(np.linalg.norm(mixed, axis=-1)).sum(-1), rtol=1e-3)


def test_padding_does_not_count_and_packing_separates():
    variables = variables_of(TEACHER)
    plain = decoders.importance(TEACHER, variables, TOKENS)
    segments = np.pad(np.ones_like(TOKENS), ((0, 2), (0, 8)))
    padded = {"tokens": np.pad(TOKENS, ((0, 2), (0, 8)), constant_values=5), "segments": segments, "other": None}
    found = decoders.importance(TEACHER, variables, padded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, plain)
    # Two documents in a row count as its mean: with a row of twice the same, the scores are those of one.
    packed = {"tokens": np.tile(TOKENS, 2), "segments": np.repeat([[1, 2]], 24, axis=1) * np.ones((6, 1), int)}
    found = decoders.importance(TEACHER, variables, packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, plain)


@pytest.mark.parametrize("axis", ["channels", "heads", "neurons"])
def test_importance_cuts_better_than_chance(axis):
    """A teacher in which a few parts, at random places, do most of the work, as in trained models."""
    variables = variables_of(TEACHER)
    rng = np.random.default_rng(3)

    def strengths(*shape):
        return np.exp(1.5 * rng.standard_normal(shape)).astype(np.float32)

    if axis == "channels":
        strength = strengths(1, 32)
        for path in ("embed/embedding", "blocks/attention/o/kernel", "blocks/mlp/down/kernel"):
            factors = strength if path.startswith("embed") else strength[None]
            variables = scaled(variables, f"params/{path}", factors)
        student = TEACHER._replace(width=20)
    elif axis == "heads":
        variables = scaled(variables, "params/blocks/attention/v/kernel", np.repeat(strengths(5, 1, 3), 8, axis=-1))
        student = TEACHER._replace(heads=4, kv_heads=2)
    else:
        variables = scaled(variables, "params/blocks/mlp/up/kernel", strengths(5, 1, 40))
        student = TEACHER._replace(mlp_width=20)

    def kl(scores):
        cut = decoders.student_from_teacher(TEACHER, variables, student, importance=scores)
        held_out = np.random.default_rng(9).integers(0, 61, TOKENS.shape).astype(np.int32)
        return kl_to(logits(TEACHER, variables, held_out), logits(student, cut, held_out))

    measured = decoders.importance(TEACHER, variables, TOKENS)
    draws = [jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), measured) for _ in range(5)]
    chances = [kl(scores) for scores in draws]
    assert kl(measured) < 0.8 * min(chances), (kl(measured), chances)


def test_a_sharded_teacher_gives_the_same_student():
    variables = variables_of(TEACHER._replace(vocabulary=64))
    config = TEACHER._replace(vocabulary=64)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    spec = {2: PartitionSpec(None, "fsdp"), 3: PartitionSpec(None, "data", "fsdp")}
    spread = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec.get(x.ndim, PartitionSpec()))), variables
    )
    student = config._replace(width=20, layers=3, heads=4, kv_heads=2, mlp_width=16)
    whole = decoders.importance(config, variables, TOKENS)
    measured = decoders.importance(config, spread, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), measured, whole)
    cut = decoders.student_from_teacher(config, spread, student, importance=measured)
    assert equal_trees(cut, decoders.student_from_teacher(config, variables, student, importance=whole))
    thinner = config._replace(layers=3)
    assert equal_trees(
        decoders.student_from_teacher(config, spread, thinner),
        decoders.student_from_teacher(config, variables, thinner),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 6}, "layers=6 cannot be cut out of a teacher of layers=5: choose 1 to 5"),
        ({"vocabulary": 62}, "vocabulary=62 cannot"),
        ({"width": 33}, "width=33 cannot"),
        ({"mlp_width": 0}, "mlp_width=0 cannot"),
        ({"context": 65}, "context=65 cannot"),
        ({"heads": 4}, "4 heads and 3 kv_heads cannot be cut out of a teacher whose kv_heads are shared by 2"),
        ({"kv_heads": 2}, "choose heads=4"),
        ({"head_dim": 4}, "head_dim=4 cannot be cut out of a teacher of head_dim=8: choose the teacher's"),
        ({"rope_theta": 1e6}, "rope_theta=1000000.0 cannot"),
        ({"qkv_bias": True}, "qkv_bias=True cannot"),
        ({"qk_norm": False}, "qk_norm=False cannot"),
        ({"tied": True}, "choose tied=False"),
        ({"width": 16, "mlp_width": 20}, r"smaller width and mlp_width needs .* pass importance=decoders.importance"),
    ],
)
def test_what_cannot_be_cut(changes, message):
    variables = jax.eval_shape(make_decoder(TEACHER).init, jax.random.key(0))
    with pytest.raises(UserError, match=message):
        decoders.student_from_teacher(TEACHER, variables, TEACHER._replace(**changes))
    with pytest.raises(UserError, match="a student of 6 layers cannot be cut out of a teacher of 5"):
        decoders.layer_choice(5, 6)


def test_importance_of_another_model_is_refused():
    variables = jax.eval_shape(make_decoder(TEACHER).init, jax.random.key(0))
    other = any_scores(TEACHER._replace(mlp_width=41))
    with pytest.raises(UserError, match=r"importance of neurons is \(5, 41\) and should be \(5, 40\)"):
        decoders.student_from_teacher(TEACHER, variables, TEACHER._replace(width=16), importance=other)

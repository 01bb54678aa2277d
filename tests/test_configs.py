"""Every config file and variant for images: it resolves, and its step compiles and runs on data of the right shape.

Those for language models are tested in ``test_lm_configs.py`` and ``recipes/test_distill_language.py``."""

import ast
import contextlib
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import advance, build, sharding, train
from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.model import parameter_count
from kdjax.recipes import difficulty
from kdjax.state import TrainState

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("lm_"))
VARIANTS = {
    "compress": ["", "chain", "int4", "int8", "fp8", "pruned", "low_rank", "sparse", "quick"],
    "digits": ["", "quick", "labels10", "two_stage"],
    "fashion_mnist": ["", "int4", "quick"],
    "cifar100": ["", "res56_res20", "res32x4_res8x4", "wrn40_2_wrn16_2"],
    "imagenet_r34_r18": [""],
    "imagenet_patient_teacher": [""],
    "curriculum": ["", "hard_first", "random"],
    "teachers": ["", "averaged", "confidence"],
    "strategies": [
        *("", "assistant", "born_again", "simkd", "ema_teacher", "exits", "past_predictions", "mutual"),
        *("curriculum_temperature", "responsive", "uncertainty", "dwa", "features_then_logits"),
    ],
}
ALL = [(name, variant) for name in FILES for variant in VARIANTS[name]]
# Variants whose step is that of another one.
SAME_STEP = [
    *(("compress", variant) for variant in VARIANTS["compress"]),
    ("digits", "quick"),
    ("digits", "labels10"),
    ("fashion_mnist", "int4"),
    ("fashion_mnist", "quick"),
    ("cifar100", ""),
    ("curriculum", "hard_first"),
    ("curriculum", "random"),
    ("teachers", "averaged"),
]
# What stands in for data that is not at hand: (image shape, classes).
SHAPES = {
    "compress": ((8, 8, 1), 10),
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet_r34_r18": ((224, 224, 3), 1000),
    "imagenet_patient_teacher": ((224, 224, 3), 1000),
    "curriculum": ((8, 8, 1), 10),
    "teachers": ((8, 8, 1), 10),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_synthetic(name, variant, batch=8):
    """The experiment of a config file as it is, on 16 synthetic images and one device."""
    shape, classes = SHAPES[name]
    words = [
        "data.name=synthetic",
        f"data.options={{'shape': {shape}, 'classes': {classes}, 'examples': 16}}",
        f"data.batch_size={batch}",
        f"data.eval_batch_size={batch}",
        "mesh.data=1",
    ]
    return build.prepare(configs.override(load(name).get_config(variant), words))


def test_every_file_is_listed_with_its_variants():
    assert set(VARIANTS) == set(FILES)
    for name in FILES:
        declared = set(getattr(load(name), "VARIANTS", ()))
        assert declared <= set(VARIANTS[name]), name


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_resolves_under_its_own_name(name, variant):
    config = configs.resolve(load(name).get_config(variant))
    assert config.data.name == "digits" or config.data.name.startswith("tfds:")
    assert configs.sha256(config) == configs.sha256(configs.resolve(load(name).get_config(variant)))


@pytest.mark.parametrize("name", FILES)
def test_unknown_variant_is_refused(name):
    with pytest.raises(UserError, match="no_such_variant") as caught:
        load(name).get_config("no_such_variant")
    for variant in filter(None, VARIANTS[name]):
        assert variant in str(caught.value)


def test_variants_differ():
    for name in FILES:
        resolved = {v: configs.resolve(load(name).get_config(v)) for v in VARIANTS[name]}
        hashes = {v: (configs.sha256(config), str(config.compress)) for v, config in resolved.items()}
        named = {hashes[v] for v in VARIANTS[name] if v}
        assert len(named) == sum(map(bool, VARIANTS[name])), name


def arbitrary(shapes):
    """Finite values for every leaf, made without a compilation: that of an initialiser takes as long as the step's."""
    rng = np.random.default_rng(0)
    # Small kernels keep a deep network's activations finite; ones keep every scale and variance positive.
    fill = lambda x: 0.05 * rng.standard_normal(x.shape) if len(x.shape) > 1 else np.ones(x.shape)
    return jax.tree.map(lambda x: fill(x).astype(x.dtype), shapes)


def fresh_state(arm, mesh):
    """As ``train.fresh_state``, with arbitrary parameters."""
    shapes = train.abstract_state(arm, mesh)
    params, model_state = arbitrary(shapes.params), arbitrary(shapes.model_state)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
    ema = params if shapes.ema else {}
    learned = {"params": arbitrary(shapes.learned["params"]), "state": {}}
    step = np.zeros((), np.int32)
    host = TrainState(
        step, params, model_state, learned, zeros, arm.keys.student, jax.random.clone(arm.keys.views), ema
    )
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), host, shapes)


# Slow because XLA must compile deep networks; one pass over the variants that differ in what is compiled. Strategies
# differ in more than a step: tests/test_strategies.py.
@pytest.mark.parametrize(
    ("name", "variant"), [pair for pair in ALL if pair not in SAME_STEP and pair[0] != "strategies"]
)
def test_two_steps_on_data_of_its_shape(name, variant):
    experiment = on_synthetic(name, variant)
    mesh = experiment.mesh
    teachers = {
        name: arbitrary(jax.eval_shape(model.init, jax.random.key(0))) for name, model in experiment.teachers.items()
    }
    experiment = difficulty.scored(experiment, teachers)
    arm = build.make_arm(experiment, "student_distilled", teachers)
    state = fresh_state(arm, mesh)
    before = jax.device_get(state.params)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    stage = arm.stages[0]
    batches = arm.batches(0)
    args = (
        jax.device_put(teachers, sharding.replicated(mesh)),
        sharding.put_batch(next(batches), mesh),
        jax.device_put(stage.hparams, sharding.replicated(mesh)),
    )
    step, names = advance.compile_step(stage.step, mesh, shardings, state, *args)
    for _ in range(2):
        state, packed = step(state, *args)
        sums, counts = jax.device_get(packed)
        assert np.isfinite(sums).all()
        assert sums[names.index("loss")] > 0
        assert "kl" in names
        assert counts[names.index("kl")] == 8
    after = jax.device_get(state.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    # A warm-up's first step may have rate 0, so it is two steps that must move every kernel.
    moved = [np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True) if a.ndim > 1]
    assert all(moved)


def test_docs_name_every_key_with_its_default():
    flat = configs.flat_keys(configs.default().to_dict())
    documented = {}
    for line in (FOLDER.parent / "docs" / "configs.md").read_text().splitlines():
        keys, default = ([*line.replace("`", "").strip("| ").split(" | "), "", ""])[:2]
        first, *more = keys.split(", ")
        names = [first, *(first.rpartition(".")[0] + key for key in more)]
        values = default.split(", ") if more else [default]
        documented |= dict(zip(names, values * len(names) if len(values) == 1 else values, strict=False))
    for key, value in flat.items():
        # The teacher's optimiser has the keys of the students'; what a model or a schedule takes has tables of its own.
        is_elsewhere = key.startswith(("teacher.optimizer.", "optimizer.learning_rate.")) or ".options." in key
        if is_elsewhere or (isinstance(value, dict) and value and key not in documented):
            continue
        assert key in documented
        with contextlib.suppress(SyntaxError, ValueError):  # a default in words, such as that of the learning rate
            assert ast.literal_eval(documented[key]) == value, key


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_student_is_small(name):
    experiment = on_synthetic(name, "")
    sizes = [
        parameter_count(jax.eval_shape(model.init, jax.random.key(0))["params"])
        for model in (experiment.teachers["teacher"], experiment.student)
    ]
    assert sizes[1] * (20 if name == "fashion_mnist" else 10) <= sizes[0]


def test_labels10_hides_nine_labels_of_ten_from_the_students_only():
    experiment = build.prepare(configs.override(load("digits").get_config("labels10"), ["mesh.data=1"]))
    assert 0.09 < np.mean(experiment.student_train.labels >= 0) < 0.11
    assert np.all(experiment.dataset.train.labels >= 0)


def test_two_stage_has_two_stages_for_the_distilled_student_only():
    experiment = build.prepare(configs.override(load("digits").get_config("two_stage"), ["mesh.data=1"]))
    distilled = build.make_arm(experiment, "student_distilled")
    alone = build.make_arm(experiment, "student_alone")
    assert [len(distilled.stages), len(alone.stages)] == [2, 1]
    first, second = distilled.stages
    assert first.start == 0 and first.stop == second.start and second.stop == alone.stages[-1].stop
    assert {"kl.weight", "kl.temperature"} <= set(first.hparams) and "ce.weight" not in first.hparams
    assert "ce.weight" in second.hparams and "kl.weight" not in second.hparams


def test_cifar_rate_drops_at_the_published_epochs():
    experiment = on_synthetic("cifar100", "res56_res20")
    config = experiment.config
    assert config.optimizer.learning_rate.to_dict() == config.teacher.optimizer.learning_rate.to_dict()
    assert tuple(config.optimizer.learning_rate.boundaries_epochs) == (150, 180, 210)
    assert [config.train.epochs, config.teacher.epochs, config.data.batch_size] == [240, 240, 8]

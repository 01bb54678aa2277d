"""Classifiers cut to smaller ones: exact slices, dead parts that nobody misses, importance, and refusals."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdjax import models
from kdjax.compress import classifiers
from kdjax.compress.importance import MEASURES
from kdjax.errors import UserError
from kdjax.model import first_mismatch, flatten_paths, from_nnx, parameter_count
from tests.helpers import batch, digits, equal_trees

SHAPE = (8, 8, 2)
OF = {"classes": 5, "input_shape": SHAPE}
MODELS = {
    "mlp": {"hidden": (12, 9)},
    "cnn": {"widths": (6, 8), "strides": (1, 2)},
    "cnn-dense": {"widths": (6, 8), "strides": (1, 2), "pool": "max", "norm": False, "dense": 10, "dropout": 0.1},
    "resnet8": {"stages": (2, 3, 1), "widths": (6, 6, 8, 12)},
    "resnet8-stem": {"stages": (1, 2), "widths": (4, 6, 8)},  # with a projection in the first stage
    "resnet50": {"stages": (1, 2), "widths": (8, 4, 6)},
    "wrn_16_1": {"depth": 16, "widths": (4, 6, 8, 10)},
    "vit_ti": {"patch": 4, "width": 24, "depth": 3, "heads": 4},
}
# What can be dead, and how: the places along the last axis of these parameters are 0. The axis is that of a key's
# parts, so many times over (queries, keys and values), each so many places wide (a head).
DEAD = {
    "mlp": {"hidden": [(r"blocks/0/.*", 12), (r"blocks/1/.*", 9)]},
    "cnn": {"channels": [(r"blocks/0/norm/(scale|bias)", 6), (r"blocks/1/norm/(scale|bias)", 8)]},
    "cnn-dense": {
        "channels": [(r"blocks/0/conv/.*", 6), (r"blocks/1/conv/.*", 8)],
        "hidden": [(r"dense/.*", 10)],
    },
    "resnet8": {
        "channels": [
            *((rf"blocks/{i}/norms/0/(scale|bias)", 6) for i in (0, 1)),
            *((rf"blocks/{i}/norms/0/(scale|bias)", 8) for i in (2, 3, 4)),
            (r"blocks/5/norms/0/(scale|bias)", 12),
        ],
        "width": [
            (r"(stem_norm|blocks/[01]/norms/1)/(scale|bias)", 6),
            (r"blocks/[234]/(norms/1|shortcut_norm)/(scale|bias)", 8),
            (r"blocks/5/(norms/1|shortcut_norm)/(scale|bias)", 12),
        ],
    },
    "resnet50": {
        "channels": [
            *((rf"blocks/0/norms/{j}/(scale|bias)", 4) for j in (0, 1)),
            *((rf"blocks/{i}/norms/{j}/(scale|bias)", 6) for i in (1, 2) for j in (0, 1)),
        ],
        "width": [
            (r"stem_norm/(scale|bias)", 8),
            (r"blocks/0/(norms/2|shortcut_norm)/(scale|bias)", 16),
            (r"blocks/[12]/(norms/2|shortcut_norm)/(scale|bias)", 24),
        ],
    },
    "wrn_16_1": {
        "channels": [(rf"blocks/{i}/norms/1/(scale|bias)", size) for i, size in enumerate((6, 6, 8, 8, 10, 10))],
        # A stream is read through norms: these have to be silent too.
        "width": [
            (r"stem/kernel|blocks/0/norms/0/(scale|bias)", 4),
            (r"blocks/[01]/(convs/1|shortcut)/kernel|blocks/[12]/norms/0/(scale|bias)", 6),
            (r"blocks/[23]/(convs/1|shortcut)/kernel|blocks/[34]/norms/0/(scale|bias)", 8),
            (r"blocks/[45]/(convs/1|shortcut)/kernel|blocks/5/norms/0/(scale|bias)|norm/(scale|bias)", 10),
        ],
    },
    "vit_ti": {
        "heads": [(rf"blocks/{i}/attention/qkv/.*", 4, 3) for i in range(3)],
        "hidden": [(rf"blocks/{i}/feedforward/up/.*", 96) for i in range(3)],
    },
}


def model_of(label, options=None, of=OF):
    name = label.split("-")[0]
    options = MODELS[label] if options is None else options
    return name, options, from_nnx(lambda rngs: models.build(name, rngs=rngs, **of, **options))


@cache
def variables_of(label):
    """Random parameters and statistics in which every part matters, biases and norms too."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model_of(label)[2].init, jax.random.key(0))

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "var":
            return jnp.asarray(0.5 + np.abs(noise))
        if path[-1].key == "kernel":
            return jnp.asarray(noise * np.float32(1.5 / np.sqrt(np.prod(leaf.shape[:-1]))))
        return jnp.asarray(0.3 * noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(count=32, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def logits(model, variables, inputs):
    return np.asarray(jax.jit(lambda v: model.apply(v, inputs, train=False)[0].logits)(variables))


def dead(variables, parts, share, seed):
    """With a share of the places of each part set to 0, at random."""
    rng = np.random.default_rng(seed)
    factors = []
    for pattern, size, *repeat in parts:
        alive = np.ones(size, np.float32)
        alive[rng.permutation(size)[: round(size * share)]] = 0
        factors.append((pattern, alive, *repeat))

    def silence(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        for pattern, alive, *repeat in factors:
            if re.fullmatch(pattern, name):
                times = repeat[0] if repeat else 1
                mask = np.tile(np.repeat(alive, leaf.shape[-1] // len(alive) // times), times)
                leaf = leaf * mask.reshape((1,) * (leaf.ndim - 1) + (-1,))
        return leaf

    return jax.tree_util.tree_map_with_path(silence, variables)


def is_model(label, options, variables, of=OF):
    expected = jax.eval_shape(model_of(label, options, of)[2].init, jax.random.key(0))
    return first_mismatch(expected, variables) is None


@pytest.mark.parametrize("label", DEAD)
def test_cutting_dead_parts_changes_no_logit(label):
    name, options, model = model_of(label)
    parts = [part for of_key in DEAD[label].values() for part in of_key]
    teacher, keep = dead(variables_of(label), parts, 0.5, seed=1), dict.fromkeys(DEAD[label], 0.5)
    wanted = logits(model, teacher, images())
    assert np.ptp(wanted, axis=0).min() > 0.01  # what is left still looks at the image
    for measure in MEASURES if label == "cnn-dense" else ["activations"]:
        smaller, cut = classifiers.prune(name, options, teacher, keep=keep, importance=measure, inputs=images(), **OF)
        assert is_model(label, smaller, cut)
        assert parameter_count(cut["params"]) < 0.8 * parameter_count(teacher["params"])
        np.testing.assert_allclose(logits(model_of(label, smaller)[2], cut, images()), wanted, atol=1e-5)


def test_cutting_dead_width_of_a_vit_changes_the_norms_alone():
    """With branches that add up to 0 over channels the mean stays 0, and the variance grows with the share."""
    name, options, model = model_of("vit_ti")
    alive = np.ones(24, np.float32)
    alive[np.random.default_rng(2).permutation(24)[:12]] = 0
    writers = r"embed/.*|class_token|positions|blocks/./(attention/out|feedforward/down)/.*"

    def changed(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        shape = (1,) * (leaf.ndim - 1) + (24,)
        if re.fullmatch(writers, path):
            leaf = leaf * alive.reshape(shape)
            leaf = leaf - leaf.mean(axis=-1, keepdims=True) * alive.reshape(shape) * 24 / alive.sum()
        return leaf * alive if "norm" in path else leaf

    teacher = jax.tree_util.tree_map_with_path(changed, variables_of("vit_ti"))
    smaller, cut = classifiers.prune(name, options, teacher, keep={"width": 0.5}, inputs=images(), **OF)
    assert is_model("vit_ti", smaller, cut)
    assert (smaller["width"], smaller["heads"], smaller["head_width"], smaller["hidden"]) == (12, 4, 6, 96)
    rescaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(np.sqrt(0.5)) if path[-1].key == "scale" else leaf, teacher
    )
    wanted = logits(model, rescaled, images())
    np.testing.assert_allclose(logits(model_of("vit_ti", smaller)[2], cut, images()), wanted, atol=5e-5)
    assert np.abs(wanted - logits(model, teacher, images())).max() > 0.1


@pytest.mark.parametrize("label", DEAD)
def test_what_is_kept_whole_is_the_same_bit_for_bit(label):
    name, options, _ = model_of(label)
    variables = variables_of(label)
    keep = dict.fromkeys(DEAD[label], 1.0)
    assert classifiers.prune(name, options, variables, keep=keep, **OF) == (options, variables)
    # Half of the parts of one key: whatever has no such part stays as it is.
    key = next(iter(DEAD[label]))
    model = model_of(label)[2]
    scores = {group.name: np.arange(group.size) for group in classifiers._groups(name, options, variables, model)}
    _, cut = classifiers.prune(name, options, variables, keep={key: 0.5}, importance=scores, **OF)
    before, after = flatten_paths(variables), flatten_paths(cut)
    same = [path for path in before if before[path].shape == after[path].shape]
    assert 0 < len(same) < len(before)
    assert all(np.array_equal(before[path], after[path]) for path in same)


def test_the_kept_channels_are_slices_in_the_teachers_order():
    name, options, _ = model_of("cnn-dense")
    variables = variables_of("cnn-dense")
    scores = {"blocks.0": [0, 9, 0, 5, 0, 7], "blocks.1": [1, 2, 3, 4, 5, 6, 7, 8], "dense": np.arange(10)[::-1]}
    smaller, cut = classifiers.prune(
        name, options, variables, keep={"channels": 3, "hidden": 0.4}, importance=scores, **OF
    )
    assert smaller == options | {"widths": (3, 3), "dense": 4}
    old, new = variables["params"], cut["params"]
    one, two = [1, 3, 5], [5, 6, 7]
    np.testing.assert_array_equal(
        new["blocks"]["1"]["conv"]["kernel"], old["blocks"]["1"]["conv"]["kernel"][:, :, one][..., two]
    )
    np.testing.assert_array_equal(new["blocks"]["1"]["conv"]["bias"], old["blocks"]["1"]["conv"]["bias"][np.array(two)])
    pixels = old["dense"]["kernel"].reshape(16, 8, 10)[:, two, :4]  # the flattened image, 4 x 4 pixels
    np.testing.assert_array_equal(new["dense"]["kernel"], pixels.reshape(48, 4))
    np.testing.assert_array_equal(new["head"]["kernel"], old["head"]["kernel"][:4])


@pytest.mark.parametrize(
    ("label", "share", "chosen", "sizes"),
    [
        ("resnet8", 0.5, (0, 2, 4, 5), {"stages": (1, 2, 1)}),
        ("wrn_16_1", 0.5, (0, 2, 4), {"depth": 10}),
        ("vit_ti", 2, (0, 2), {"depth": 2}),
    ],
)
def test_layers_that_do_nothing_can_go(label, share, chosen, sizes):
    name, options, model = model_of(label)
    ends = r"(norms/1|feedforward/down|attention/out|convs/1)/(scale|bias|kernel)"
    count = len(variables_of(label)["params"]["blocks"])
    idle = "|".join(str(i) for i in range(count) if i not in chosen)
    pattern = rf"blocks/({idle})/" + (ends if label != "wrn_16_1" else r"convs/1/kernel")
    teacher = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * bool(not re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))),
        variables_of(label),
    )
    smaller, cut = classifiers.prune(name, options, teacher, keep={"layers": share}, **OF)
    assert is_model(label, smaller, cut)
    assert {key: smaller[key] for key in sizes} == sizes
    for part in ("params", "state"):
        if "blocks" in teacher[part]:
            kept = {str(i): teacher[part]["blocks"][str(old)] for i, old in enumerate(chosen)}
            assert equal_trees(cut[part]["blocks"], kept)
    wanted = logits(model, teacher, images())
    np.testing.assert_allclose(logits(model_of(label, smaller)[2], cut, images()), wanted, atol=1e-5)


def test_activations_are_deviations_times_the_weights_that_read_them():
    name, options, model = model_of("vit_ti")
    variables, inputs = variables_of("vit_ti"), images()
    found = classifiers.importance(name, options, variables, inputs=inputs, **OF)
    taps = jax.jit(lambda v: model.apply(v, inputs, train=False, taps=("*",))[0].taps)(variables)
    taps = {path: np.asarray(value, np.float64) for path, value in taps.items()}
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    block = params["blocks"]["1"]

    hidden = np.asarray(jax.nn.gelu(taps["blocks.1.feedforward.up"], approximate=False)).reshape(-1, 96)
    wanted = hidden.std(axis=0) * np.linalg.norm(block["feedforward"]["down"]["kernel"], axis=1)
    np.testing.assert_allclose(found["blocks.1.feedforward"], wanted, rtol=1e-3)

    q, k, v = taps["blocks.1.attention.qkv"].reshape(32, 5, 3, 4, 6).transpose(2, 0, 3, 1, 4)
    weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(6))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v  # image, head, token, place
    deviation = np.sqrt(mixed.var(axis=(0, 2)).sum(axis=-1))
    wanted = deviation * np.linalg.norm(block["attention"]["out"]["kernel"].reshape(4, -1), axis=1)
    np.testing.assert_allclose(found["blocks.1.attention"], wanted, rtol=1e-3)

    norms = ["norm", *(f"blocks.{i}.{norm}" for i in range(3) for norm in ("norm1", "norm2"))]
    reading = [params["head"]["kernel"]]
    for i in "012":
        part = params["blocks"][i]
        reading += [part["attention"]["qkv"]["kernel"], part["feedforward"]["up"]["kernel"]]
    wanted = sum(taps[path].reshape(-1, 24).std(axis=0) for path in norms)
    wanted *= np.linalg.norm(np.concatenate(reading, axis=1), axis=1)
    np.testing.assert_allclose(found["width"], wanted, rtol=1e-3)


@pytest.mark.parametrize("label", ["cnn-dense", "vit_ti"])
def test_taylor_is_what_the_loss_loses_by_a_gate(label):
    name, options, model = model_of(label)
    variables, inputs = variables_of(label), images()
    labels = np.arange(32) % 5
    scores = classifiers.importance(name, options, variables, "taylor", inputs=inputs, labels=labels, **OF)
    # The third channel, or head, of the first block, as what follows reads it.
    group, reader, rows = {
        "cnn-dense": ("blocks.1", "dense", np.arange(16 * 8) % 8 == 2),
        "vit_ti": ("blocks.0.attention", "blocks/0/attention/out", np.arange(24) // 6 == 2),
    }[label]

    @jax.jit
    def losses(gate):
        def gated(path, leaf):
            here = jax.tree_util.keystr(path, simple=True, separator="/") == f"params/{reader}/kernel"
            return leaf * jnp.where(jnp.asarray(rows)[:, None], gate, 1.0) if here else leaf

        logits = model.apply(jax.tree_util.tree_map_with_path(gated, variables), inputs, train=False)[0].logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    slope = (losses(1.02) - losses(0.98)) / 0.04
    np.testing.assert_allclose(scores[group][2], np.linalg.norm(slope), rtol=2e-3)


@pytest.fixture(scope="module")
def trained():
    """A cnn of 97 % on scikit-learn's digits: its options, variables, and the normalised data."""
    of, options = {"classes": 10, "input_shape": (8, 8, 1)}, {"widths": (16, 24, 32), "strides": (1, 2, 2)}
    data = batch(1400)
    x, y = jnp.asarray(data["inputs"]), jnp.asarray(data["labels"])
    model = model_of("cnn", options, of)[2]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 176))

    def step(carry, rows):
        variables, state = carry

        def loss(params):
            outputs, new = model.apply({"params": params, "state": variables["state"]}, x[rows], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, y[rows]).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return ({"params": optax.apply_updates(variables["params"], updates), "state": new}, state), None

    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(1400)[:1408].reshape(-1, 56)[:22] for _ in range(8)])
    variables = model.init(jax.random.key(0))
    start = (variables, optimizer.init(variables["params"]))
    (variables, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.asarray(rows)))(start)
    raw = digits()
    first = raw.train.inputs[:1400].astype(np.float32)
    held_out = (raw.test.inputs.astype(np.float32) - first.mean()) / first.std()
    return of, options, variables, np.asarray(x[:320]), held_out, raw.test.labels


def accuracy(trained, options, variables):
    of, *_, held_out, labels = trained
    model = model_of("cnn", options, of)[2]
    return float((logits(model, variables, held_out).argmax(-1) == labels).mean())


@pytest.mark.parametrize("measure", MEASURES)
def test_importance_cuts_better_than_chance(trained, measure):
    of, options, variables, inputs, *_ = trained
    assert accuracy(trained, options, variables) > 0.95
    keep = {"channels": 0.75}
    scores = classifiers.importance("cnn", options, variables, measure, inputs=inputs, **of)
    rng = np.random.default_rng(0)

    def cut(scores):
        return accuracy(trained, *classifiers.prune("cnn", options, variables, keep=keep, importance=scores, **of))

    chances = [cut({name: rng.random(len(score)) for name, score in scores.items()}) for _ in range(6)]
    assert cut(scores) > np.mean(chances) + 0.03, (cut(scores), chances)


def test_recalibrated_statistics_are_those_of_the_images(trained):
    of, options, variables, inputs, *_ = trained
    options, cut = classifiers.prune("cnn", options, variables, keep={"channels": 0.5}, inputs=inputs, **of)
    new = classifiers.recalibrate("cnn", options, cut, inputs=inputs, **of)
    assert new["params"] is cut["params"]
    model = model_of("cnn", options, of)[2]
    taps = ("blocks.0.conv", "blocks.1.conv")
    values = jax.jit(lambda v: model.apply(v, inputs, train=True, taps=taps)[0].taps)(cut)
    for i, tap in enumerate(taps):
        statistics, seen = new["state"]["blocks"][str(i)]["norm"], np.asarray(values[tap], np.float64)
        seen = seen.reshape(-1, seen.shape[-1])
        np.testing.assert_allclose(statistics["mean"], seen.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(statistics["var"], seen.var(0), rtol=1e-3)
    assert accuracy(trained, options, new) > accuracy(trained, options, cut)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"channel": 0.5}, "unknown part of model 'resnet8' to keep 'channel': did you mean 'channels'?"),
        ({"heads": 0.5}, "valid names are channels, layers, width"),
        (
            {"channels": 0.0},
            "channels=0.0 cannot be kept of 6 channels: give a share (a float above 0, at most",
        ),
        ({"channels": 7}, "a number (an int from 1 to 6)"),
        ({"width": True}, "width=True cannot be kept of 4 width"),
        ({"layers": 0}, "layers=0 cannot be kept of 1 layers"),
        ({"layers": 2}, "layers=2 cannot be kept of 1 layers"),
        ({"width": 0.1}, "its first stage has a projection only where its width differs from the stem's"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, message):
    name, options, _ = model_of("resnet8-stem")
    variables = variables_of("resnet8-stem")
    with pytest.raises(UserError, match=re.escape(message)):
        classifiers.prune(name, options, variables, keep=keep, inputs=images(2), **OF)


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        ("resnet8", {"inner": (4, 4)}, "a ResNet of 3 stages needs 3 inner channel counts, not 2"),
        ("wrn_16_1", {"inner": (4,)}, "a wide ResNet of 3 stages needs 3 inner channel counts, not 1"),
        ("wrn_16_1", {"widths": (4, 8, 8)}, "a wide ResNet needs 4 widths (stem, three stages), not 3"),
        ("vit_ti", {"patch": 4, "heads": 5}, "or have a head_width of their own"),
    ],
)
def test_sizes_that_a_cut_model_cannot_have(label, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        models.build(label, rngs=nnx.Rngs(0), **OF, **options)


def test_what_cannot_be_measured_is_refused():
    name, options, _ = model_of("mlp")
    variables = variables_of("mlp")
    scores = {"blocks.0": np.zeros(12), "blocks.1": np.zeros(8)}
    for changes, message in [
        ({"importance": "activation"}, "unknown importance 'activation': did you mean 'activations'?"),
        ({}, "not on an array of shape ()"),
        ({"inputs": images()[..., :1]}, "images of (8, 8, 2)"),
        ({"inputs": images(), "labels": [1, 2], "importance": "taylor"}, "32 images need as many labels"),
        ({"importance": scores}, "the importance of 'blocks.1' is (8,) and should be (9,): measure it on this model"),
        ({"importance": {}}, "the importance of 'blocks.0' is absent"),
        ({"options": {"hidden": (12, 8)}}, "these variables are not of the model 'mlp' with its options"),
    ]:
        arguments = {"options": options, "keep": {"hidden": 0.5}} | changes
        with pytest.raises(UserError, match=re.escape(message)):
            classifiers.prune(name, variables=variables, **arguments, **OF)


def test_shares_are_rounded_to_multiples_and_numbers_are_exact():
    name, options, _ = model_of("resnet50")
    variables = variables_of("resnet50")
    groups = classifiers._groups(name, options, variables, model_of("resnet50")[2])
    scores = {group.name: np.arange(group.size) for group in groups}
    for keep, multiple, widths, inner in [
        ({"width": 0.6}, 1, (5, 2, 4), (4, 6)),  # the blocks put out four times the width of their stage
        ({"width": 0.6, "channels": 0.6}, 4, (4, 2, 4), (4, 4)),
        ({"width": 0.01, "channels": 1}, 1, (1, 1, 1), (1, 1)),
    ]:
        smaller, cut = classifiers.prune(
            name, options, variables, keep=keep, importance=scores, multiple=multiple, **OF
        )
        assert (smaller["widths"], smaller["inner"]) == (widths, inner)
        assert is_model("resnet50", smaller, cut)

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.data import augment
from kdjax.errors import UserError

SHAPE = (12, 10, 3)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
KEY = jax.random.key(5)
EVERYTHING = {
    "random_resized_crop": 0.3,
    "crop_padding": 2,
    "flip": True,
    "randaugment": {"layers": 2, "magnitude": 15.0},
}


def _batch(size=16, shape=SHAPE, epoch=0, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, *shape), np.uint8)
    return {
        "inputs": np.asarray(augment.normalise(jnp.asarray(pixels), MEAN, STD)),
        "labels": np.arange(size, dtype=np.int32) % 10 - 1,
        "id": np.arange(size, dtype=np.int32) * 3,
        "epoch": np.full(size, epoch, np.int32),
    }


@functools.cache
def _jitted(config):
    return jax.jit(augment.make(dict(json.loads(config)), SHAPE, MEAN, STD))


def _run(config, batch, key=KEY):
    return jax.device_get(_jitted(json.dumps(config))(batch, key))


@pytest.mark.parametrize("config", [*({name: EVERYTHING[name]} for name in EVERYTHING), EVERYTHING])
def test_a_view_follows_its_example_and_not_its_place(config):
    batch = _batch()
    views = _run(config, batch)["inputs"]
    assert views.dtype == np.float32 and views.shape == batch["inputs"].shape
    order = np.random.default_rng(1).permutation(16)
    shuffled = _run(config, {key: value[order] for key, value in batch.items()})["inputs"]
    np.testing.assert_array_equal(shuffled, views[order])
    half = _run(config, {key: value[:5] for key, value in batch.items()})["inputs"]
    np.testing.assert_allclose(half, views[:5], atol=1e-5)  # another program: equal up to rounding
    for change in ({"epoch": batch["epoch"] + 1}, {"id": batch["id"] + 1000}):
        assert not np.array_equal(_run(config, {**batch, **change})["inputs"], views)
    assert not np.array_equal(_run(config, batch, jax.random.key(6))["inputs"], views)


def test_one_augmentation_more_leaves_the_others_as_they_were():
    batch = _batch()
    crops = _run({"crop_padding": 2}, batch)["inputs"]
    both = _run({"crop_padding": 2, "flip": True}, batch)["inputs"]
    assert all(
        np.array_equal(one, crop) or np.array_equal(one, crop[:, ::-1]) for one, crop in zip(both, crops, strict=True)
    )


def test_crops_are_windows_of_the_image_in_black():
    batch = _batch(64)
    views = _run({"crop_padding": 2}, batch)["inputs"]
    black = -np.array(MEAN, np.float32) / np.array(STD, np.float32)
    found = set()
    for image, view in zip(batch["inputs"], views, strict=True):
        canvas = np.tile(black, (16, 14, 1))
        canvas[2:-2, 2:-2] = image
        windows = {(y, x): canvas[y : y + 12, x : x + 10] for y in range(5) for x in range(5)}
        matches = [place for place, window in windows.items() if np.array_equal(window, view)]
        assert len(matches) == 1
        found.add(matches[0])
    assert {y for y, _ in found} == {x for _, x in found} == set(range(5))  # every shift occurs


def test_half_of_the_images_are_flipped():
    batch = _batch(400)
    views = _run({"flip": True}, batch)["inputs"]
    flipped = [np.array_equal(view, image[:, ::-1]) for view, image in zip(views, batch["inputs"], strict=True)]
    kept = [np.array_equal(view, image) for view, image in zip(views, batch["inputs"], strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 0.4 < np.mean(flipped) < 0.6


def test_resized_crops_cut_out_the_share_that_was_asked_for():
    # On a plane of the pixels' places, a crop that is scaled to the whole is a plane too; its slopes are the shares.
    y, x = np.mgrid[:12, :10].astype(np.float32)
    batch = _batch(200) | {"inputs": np.broadcast_to(np.stack([y, x, y], -1), (200, *SHAPE)).copy()}
    views = _run({"random_resized_crop": 0.5}, batch)["inputs"]
    high = (views[:, 8, 5, 0] - views[:, 4, 5, 0]) / 4
    wide = (views[:, 6, 7, 1] - views[:, 6, 3, 1]) / 4
    area, aspect = high * wide, wide / high
    assert 0.45 < area.min() < 0.6 and 0.9 < area.max() < 1.001
    assert aspect.min() > 3 / 4 - 0.01 and aspect.max() < 4 / 3 + 0.01
    assert views.min() >= -1e-4 and views[..., 0].max() <= 11.001 and views[..., 1].max() <= 9.001
    np.testing.assert_allclose(_run({"random_resized_crop": 1.0}, _batch())["inputs"].shape, (16, *SHAPE))


def _operation(name, strength, image, sign=1.0):
    """One RandAugment operation on an image of 0 to 1."""
    choice = jnp.array(augment._OPERATIONS.index(name))
    moved = augment._resample(image, augment._affine(choice, sign * strength, image.shape))
    return np.asarray(augment._colour(moved, choice, sign, strength))


@pytest.mark.parametrize("name", augment._OPERATIONS)
def test_randaugment_without_strength_changes_nothing(name):
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, SHAPE) / 255, jnp.float32)
    np.testing.assert_allclose(_operation(name, 0.0, image), image, atol=1e-6)


def test_randaugment_operations_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    image = (rng.integers(0, 256, (20, 20, 3)) / 255).astype(np.float32)
    moved = _operation("translate_x", 1.0, image)  # 0.45 of 20 pixels
    np.testing.assert_allclose(moved[:, :11], image[:, 9:], atol=1e-6)
    np.testing.assert_array_equal(moved[:, 11:], 0.0)  # black moves in
    moved = _operation("translate_y", 1.0, image, sign=-1.0)
    np.testing.assert_allclose(moved[9:], image[:11], atol=1e-6)
    dot = np.zeros((21, 21, 1), np.float32)
    dot[10, 16] = 1.0
    turned = _operation("rotate", 1.0, dot)[..., 0]  # by 30 degrees about the centre: 6 to the right becomes 5.2 and 3
    y, x = (np.indices((21, 21)) * turned).sum((1, 2)) / turned.sum() - 10
    np.testing.assert_allclose((abs(y), x), (3.0, 5.196), atol=0.15)
    sheared = _operation("shear_x", 1.0, dot.swapaxes(0, 1))[..., 0]  # 6 rows below the centre: moved by 0.3 * 6
    y, x = (np.indices((21, 21)) * sheared).sum((1, 2)) / sheared.sum() - 10
    np.testing.assert_allclose((y, abs(x)), (6.0, 1.8), atol=0.15)
    np.testing.assert_allclose(_operation("brightness", 0.5, image, -1.0), image * 0.55, atol=1e-6)
    contrast = image.mean() + (image - image.mean()) * 1.45
    np.testing.assert_allclose(_operation("contrast", 0.5, image), contrast.clip(0, 1), atol=1e-5)
    grey = image.mean(-1, keepdims=True)
    np.testing.assert_allclose(_operation("saturation", 1.0, image, -1.0), grey + (image - grey) * 0.1, atol=1e-5)
    solarized = np.where(image * 255 < 128, image, 1 - image)
    np.testing.assert_allclose(_operation("solarize", 0.5, image), solarized, atol=1e-6)
    posterized = (np.rint(image * 255).astype(np.uint8) & 0b11110000) / 255
    np.testing.assert_allclose(_operation("posterize", 1.0, image), posterized, atol=1e-6)


def test_randaugment_draws_every_operation_and_leaves_the_identity_alone():
    batch = _batch(300)
    views = _run({"randaugment": {"layers": 1, "magnitude": 20.0}}, batch)["inputs"]
    same = np.mean([np.array_equal(view, image) for view, image in zip(views, batch["inputs"], strict=True)])
    assert 0.04 < same < 0.16  # 1 in 11
    raw = views * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    assert raw.min() > -1e-5 and raw.max() < 1 + 1e-5


def test_mixup_is_the_formula_of_the_paper():
    batch = _batch(512)
    mixed = _run({"mixup": 0.4}, batch)
    mix = mixed["mix"]
    assert mix.dtype == np.float32 and mixed["mixed_labels"].dtype == np.int32
    partner = np.roll(batch["inputs"], -1, 0)
    own = mix[:, None, None, None]
    np.testing.assert_allclose(mixed["inputs"], own * batch["inputs"] + (1 - own) * partner, atol=1e-5)
    np.testing.assert_array_equal(mixed["mixed_labels"], np.roll(batch["labels"], -1))
    np.testing.assert_array_equal(mixed["labels"], batch["labels"])
    # Beta(α, α) has mean 1/2 and variance 1 / (4 (2 α + 1)).
    assert abs(mix.mean() - 0.5) < 0.06 and abs(mix.var() - 1 / (4 * 1.8)) < 0.02


def test_cutmix_pastes_one_box_and_counts_its_pixels():
    batch = _batch(256)
    mixed = _run({"cutmix": 1.0}, batch)
    partner = np.roll(batch["inputs"], -1, 0)
    boxes = 0
    for index, view in enumerate(mixed["inputs"]):
        foreign = (view == partner[index]).all(-1) & (view != batch["inputs"][index]).any(-1)
        np.testing.assert_array_equal(view[~foreign], batch["inputs"][index][~foreign])
        np.testing.assert_allclose(mixed["mix"][index], 1 - foreign.mean(), atol=1e-6)
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        assert foreign.sum() == len(rows) * len(columns)  # a full rectangle
        if len(rows):
            boxes += 1
            assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
    assert boxes > 200
    assert 0.5 < mixed["mix"].mean() < 0.75  # uniform, but for what the border cuts off


def test_mixup_and_cutmix_take_turns():
    batch = _batch(400)
    mixed, blended, cut = (
        _run(config, batch) for config in ({"mixup": 1.0, "cutmix": 1.0}, {"mixup": 1.0}, {"cutmix": 1.0})
    )
    is_blended = mixed["mix"] == blended["mix"]
    np.testing.assert_array_equal(np.where(is_blended, blended["mix"], cut["mix"]), mixed["mix"])
    assert 0.4 < is_blended.mean() < 0.6
    expected = np.where(is_blended[:, None, None, None], blended["inputs"], cut["inputs"])
    np.testing.assert_allclose(mixed["inputs"], expected, atol=1e-6)


@pytest.mark.parametrize("config", [{"crop_padding": 2, "flip": True}, {**EVERYTHING, "mixup": 0.4, "cutmix": 1.0}])
def test_eight_devices_make_the_views_of_one(config):
    batch = _batch()
    alone = _run(config, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    put = {key: jax.device_put(value, split) for key, value in batch.items()}
    spread = jax.jit(augment.make(config, SHAPE, MEAN, STD), out_shardings=split)
    together = jax.device_get(spread(put, KEY))
    for key in alone:
        np.testing.assert_allclose(together[key], alone[key], atol=1e-5, err_msg=key)
    # Each device makes the views of its own examples: only mixing needs the next example, by a permute.
    assert "all-gather" not in spread.lower(put, KEY).compile().as_text()


def test_nothing_asked_for_is_nothing_done():
    batch = _batch()
    assert augment.make({}, (7,))(batch, KEY) is batch
    assert augment.make(augment.OFF, SHAPE)(batch, KEY) is batch


def test_normalise():
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    for given in (pixels, (pixels / 255).astype(np.float32)):
        result = jax.jit(functools.partial(augment.normalise, mean=MEAN, std=STD))(given)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"mixupp": 1.0}, SHAPE, "unknown augmentation 'mixupp': did you mean 'mixup'"),
        ({"randaugment": {"layer": 2}}, SHAPE, "did you mean 'layers'"),
        (
            {"randaugment": {"layers": 2, "magnitude": 31}},
            SHAPE,
            "magnitude is 31: give a number of at most 30",
        ),
        ({"crop_padding": 1.5}, SHAPE, "crop_padding is 1.5: give a whole number"),
        ({"mixup": -0.2}, SHAPE, "mixup is -0.2"),
        ({"cutmix": float("nan")}, SHAPE, "cutmix is nan"),
        ({"random_resized_crop": 1.2}, SHAPE, "at most 1"),
        ({"flip": True}, (64,), r"flip works on images.*\(64,\)"),
    ],
)
def test_wrong_augmentations_are_refused(config, shape, message):
    with pytest.raises(UserError, match=message):
        augment.make(config, shape)

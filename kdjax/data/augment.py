"""Augmentation on the device, inside the jitted step: pure functions of images and keys.

An example's view is keyed by (run key, epoch, example id), never by step or place in the batch, so that it can be made
again at any time, by any number of devices, and a cached teacher signal can refer to it.

Dimensions: b batch, h height, w width, c channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, unknown

Array = jax.Array
Batch = dict[str, Array]
View = Callable[[Array, Array], Array]  # (key, image [h, w, c]) -> image [h, w, c]

# Everything that can be asked for, switched off.
OFF: dict[str, Any] = {
    "random_resized_crop": 0.0,
    "crop_padding": 0,
    "flip": False,
    "randaugment": {"layers": 0, "magnitude": 9.0},
    "mixup": 0.0,
    "cutmix": 0.0,
}
# The place of a name here is what RandAugment draws; the first moves nothing.
_OPERATIONS = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "saturation",
    "solarize",
    "posterize",
)
_STRONGEST = 30.0  # RandAugment's largest magnitude


def normalise(inputs: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(inputs - mean) / std per channel, float32; uint8 inputs [..., c] are first divided by 255."""
    scaled = inputs.astype(jnp.float32)
    if inputs.dtype == jnp.uint8:
        scaled = scaled / 255.0
    return (scaled - _per_channel(mean, inputs.ndim)) / _per_channel(std, inputs.ndim)


def example_keys(key: Array, epoch: Array, ids: Array) -> Array:
    """One key per example, [b], from the run's key, the epochs [b] and the example ids [b]."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i))(epoch, ids)


def make(
    config_augment: Mapping[str, Any],
    image_shape: Sequence[int],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Callable[[Batch, Array], Batch]:
    """Makes ``augment(batch, key) -> batch`` for a batch of normalised float32 ``inputs``; jit it within the step.

    In this order, and each off where absent or 0:

    - ``random_resized_crop``: the smallest share of the area that is cut out, with an aspect of 3/4 to 4/3, and scaled
      to the whole (Szegedy et al. 2015, section 6);
    - ``crop_padding``: pixels of black around the image, before one of its size is cut out (He et al. 2016, 4.2);
    - ``flip``: left to right, every second time;
    - ``randaugment``: ``layers`` operations of strength ``magnitude`` (0 to 30), drawn per example from 11 of those of
      Cubuk et al. 2020. All geometric ones are done in one bilinear resampling, and then the colours;
    - ``mixup``, ``cutmix``: the α of Beta(α, α) (Zhang et al. 2018, equation 1; Yun et al. 2019, equations 1 and 2).
      The partner is the next example of the batch. Where both are on, each example gets one of them, evenly.

    Args:
      config_augment: ``config.data.augment``.
      image_shape: (h, w, c).
      mean: what ``normalise`` took off, by channel; a black pixel is -mean / std, a white one (1 - mean) / std.
      std: what it divided by.

    Returns:
      The function. It needs ``inputs`` [b, h, w, c], ``id`` and ``epoch`` [b], and gives the batch with new inputs.
      With mixup or cutmix it needs ``labels`` and adds ``mixed_labels`` int32 [b], the partners' labels, and ``mix``
      float32 [b]: the target is ``mix * onehot(labels) + (1 - mix) * onehot(mixed_labels)``. Either label may be -1
      (unlabelled): the consumer decides what half a target is worth.

    Raises:
      UserError: an unknown key, a value out of range, or inputs that are no images.
    """
    options = _options(config_augment, image_shape)
    views = _views(options, image_shape, mean, std)
    mixes = options["mixup"] > 0 or options["cutmix"] > 0

    def augment(batch: Batch, key: Array) -> Batch:
        keys = example_keys(key, batch["epoch"], batch["id"])
        if views:
            batch = {**batch, "inputs": jax.vmap(lambda k, image: _chain(views, k, image))(keys, batch["inputs"])}
        return _mix(batch, _fold(keys, 0), options["mixup"], options["cutmix"]) if mixes else batch

    return augment if views or mixes else lambda batch, key: batch


def _options(config_augment: Mapping[str, Any], image_shape: Sequence[int]) -> dict[str, Any]:
    options = {**OFF, **config_augment}
    for name in options:
        if name not in OFF:
            raise unknown("augmentation", name, OFF)
    randaugment = {**OFF["randaugment"], **options["randaugment"]}
    for name in randaugment:
        if name not in OFF["randaugment"]:
            raise unknown("option of randaugment", name, OFF["randaugment"])
    options["randaugment"] = randaugment
    _check_number("random_resized_crop", options["random_resized_crop"], 1.0)
    _check_number("crop_padding", options["crop_padding"], whole=True)
    _check_number("randaugment.layers", randaugment["layers"], whole=True)
    _check_number("randaugment.magnitude", randaugment["magnitude"], _STRONGEST)
    _check_number("mixup", options["mixup"])
    _check_number("cutmix", options["cutmix"])
    wanted = [name for name in OFF if (randaugment["layers"] if name == "randaugment" else options[name])]
    if wanted and len(image_shape) != 3:
        raise UserError(
            f"data.augment.{wanted[0]} works on images [h, w, c], and inputs have shape {tuple(image_shape)}."
        )
    return options


def _check_number(name: str, value: Any, highest: float = math.inf, whole: bool = False) -> None:
    if not isinstance(value, int if whole else int | float) or not 0 <= value <= highest:
        upto = "" if highest == math.inf else f" of at most {highest:g}"
        kind = "whole number" if whole else "number"
        raise UserError(f"data.augment.{name} is {value!r}: give a {kind}{upto}, 0 for off.")


def _views(
    options: Mapping[str, Any], image_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> dict[int, View]:
    """What is done to single images, in order, by the number that keys each: one more leaves the others' draws."""
    views: dict[int, View] = {}
    if smallest := options["random_resized_crop"]:
        views[1] = lambda key, image: _resized_crop(key, image, smallest)
    if padding := options["crop_padding"]:
        black = -np.asarray(mean, np.float32) / np.asarray(std, np.float32)
        views[2] = lambda key, image: _crop(key, image, padding, black)
    if options["flip"]:
        views[3] = lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
    randaugment = options["randaugment"]
    if layers := randaugment["layers"]:
        strength = randaugment["magnitude"] / _STRONGEST
        views[4] = lambda key, image: _randaugment(key, image, layers, strength, mean, std)
    return views


def _chain(views: Mapping[int, View], key: Array, image: Array) -> Array:
    for number, view in views.items():
        image = view(jax.random.fold_in(key, number), image)
    return image


def _crop(key: Array, image: Array, padding: int, black: np.ndarray) -> Array:
    height, width, channels = image.shape
    canvas = jnp.broadcast_to(_per_channel(black, 3), (height + 2 * padding, width + 2 * padding, channels)).astype(
        image.dtype
    )
    canvas = canvas.at[padding : padding + height, padding : padding + width].set(image)
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(canvas, (top, left, 0), image.shape)


def _resized_crop(key: Array, image: Array, smallest: float) -> Array:
    height, width, _ = image.shape
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, minval=smallest, maxval=1.0)
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3)))
    # Shares of height and width; a crop that would stick out is as high or wide as the image.
    share = jnp.minimum(jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)]), 1.0)
    start = jax.random.uniform(place_key, (2,)) * (1.0 - share) * jnp.array([height, width])
    return jax.image.scale_and_translate(image, image.shape, (0, 1), 1.0 / share, -start / share, "linear")


def _randaugment(
    key: Array, image: Array, layers: int, strength: float, mean: Sequence[float], std: Sequence[float]
) -> Array:
    choice_key, sign_key = jax.random.split(key)
    choices = jax.random.randint(choice_key, (layers,), 0, len(_OPERATIONS))
    signs = jax.random.rademacher(sign_key, (layers,), jnp.float32)
    mean_hwc, std_hwc = _per_channel(mean, 3), _per_channel(std, 3)
    raw = image * std_hwc + mean_hwc  # colours are defined on 0 (black) to 1 (white), and black fills what moves in
    matrix = jnp.eye(3)
    for layer in range(layers):
        step = _affine(choices[layer], signs[layer] * strength, image.shape)
        matrix = jnp.matmul(matrix, step, precision="highest")
    raw = _resample(raw, matrix)
    for layer in range(layers):
        raw = _colour(raw, choices[layer], signs[layer], strength)
    moved = choices != _OPERATIONS.index("identity")
    return jnp.where(jnp.any(moved), (raw - mean_hwc) / std_hwc, image)


def _affine(choice: Array, amount: Array, shape: Sequence[int]) -> Array:
    """The 3 x 3 map of (y, x, 1), counted from the centre, from a place in the output to where it is read.

    At amount 1 or -1 it is as strong as Cubuk et al. 2020 have it: 30 degrees, a shear of 0.3, 0.45 of the size.
    """
    amount_of = lambda name: jnp.where(choice == _OPERATIONS.index(name), amount, 0.0)
    angle = amount_of("rotate") * (jnp.pi / 6)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    row_y = jnp.stack([cos, sin + 0.3 * amount_of("shear_y"), 0.45 * shape[0] * amount_of("translate_y")])
    row_x = jnp.stack([0.3 * amount_of("shear_x") - sin, cos, 0.45 * shape[1] * amount_of("translate_x")])
    return jnp.stack([row_y, row_x, jnp.array([0.0, 0.0, 1.0])])


def _resample(image: Array, matrix: Array) -> Array:
    height, width, _ = image.shape
    centre = np.array([[(height - 1) / 2], [(width - 1) / 2]], np.float32)
    grid = np.indices((height, width), np.float32).reshape(2, -1) - centre
    # Full precision: places rounded to bfloat16 or TF32, accelerators' default, would be off by a pixel.
    coordinates = jnp.matmul(matrix[:2, :2], grid, precision="highest") + matrix[:2, 2:] + centre
    coordinates = coordinates.reshape(2, height, width)
    take = lambda plane: jax.scipy.ndimage.map_coordinates(plane, list(coordinates), order=1, mode="constant")
    return jax.vmap(take, in_axes=2, out_axes=2)(image)


def _colour(raw: Array, choice: Array, sign: Array, strength: float) -> Array:
    factor = 1.0 + sign * 0.9 * strength
    grey = raw.mean(axis=-1, keepdims=True)
    step = 2.0 ** round(4 * strength)  # posterize keeps 8 down to 4 bits
    changed = {
        "brightness": raw * factor,
        "contrast": grey.mean() + (raw - grey.mean()) * factor,
        "saturation": grey + (raw - grey) * factor,
        "solarize": jnp.where(raw * 255.0 < 256.0 * (1.0 - strength), raw, 1.0 - raw),
        "posterize": jnp.floor(jnp.round(raw * 255.0) / step) * step / 255.0,
    }
    for name, value in changed.items():
        raw = jnp.where(choice == _OPERATIONS.index(name), jnp.clip(value, 0.0, 1.0), raw)
    return raw


def _mix(batch: Batch, keys: Array, mixup: float, cutmix: float) -> Batch:
    inputs = batch["inputs"]
    draw = lambda key: _mix_weights(key, inputs.shape[1:3], mixup, cutmix)
    own, mix = jax.vmap(draw)(keys)
    partner = jnp.roll(inputs, -1, axis=0)
    labels = jnp.roll(batch["labels"], -1)
    return {**batch, "inputs": own * inputs + (1.0 - own) * partner, "mixed_labels": labels, "mix": mix}


def _mix_weights(key: Array, size: Sequence[int], mixup: float, cutmix: float) -> tuple[Array, Array]:
    """How much of each pixel ([h, w, 1], or [1, 1, 1] without cutmix) and of the target is the example's own."""
    which_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 4)
    if mixup:
        share = jax.random.beta(mixup_key, mixup, mixup)
        blended = share.reshape(1, 1, 1), share
        if not cutmix:
            return blended
    side = jnp.sqrt(1.0 - jax.random.beta(cutmix_key, cutmix, cutmix))
    inside = []
    for length, centre in zip(size, jax.random.uniform(place_key, (2,)), strict=True):
        start, stop = (centre - side / 2) * length, (centre + side / 2) * length
        places = jnp.arange(length)
        inside.append((places >= jnp.round(start)) & (places < jnp.round(stop)))
    own = 1.0 - (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)
    cut = own[:, :, None], own.mean()  # the label follows the pixels that are left, the box being clipped at the border
    if not mixup:
        return cut
    use_cut = jax.random.bernoulli(which_key)
    return jnp.where(use_cut, cut[0], blended[0]), jnp.where(use_cut, cut[1], blended[1])


def _fold(keys: Array, number: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _per_channel(values: Any, ndim: int) -> np.ndarray:
    """As float32 of shape [1, ..., 1, c], to be broadcast against arrays of ``ndim`` dimensions."""
    return np.asarray(values, np.float32).reshape((1,) * (ndim - 1) + (-1,))

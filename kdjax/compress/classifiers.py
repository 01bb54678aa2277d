"""A classifier cut to fewer channels, units, heads and layers: a plain smaller model of the same kind.

What can only be cut together is data (``compress.families``); here it is measured, chosen and cut. Sources: Li et al.
2017, "Pruning Filters for Efficient ConvNets", for whole filters with what reads them; Muralidharan et al. 2024,
"Compact Language Models via Pruning and Knowledge Distillation" (Minitron), for all sizes of a transformer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.compress.decoders import layer_choice
from kdjax.compress.families import Group, complete, family_of, spans_of
from kdjax.compress.importance import MEASURES, Scores
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Model, Variables, first_mismatch, flatten_paths, from_nnx, path_name


def prune(
    name: str,
    options: Mapping[str, Any],
    variables: Variables,
    *,
    keep: Mapping[str, int | float],
    importance: str | Mapping[str, Any] = "activations",
    inputs: Any = None,
    labels: Any = None,
    classes: int,
    input_shape: tuple[int, int, int],
    multiple: int = 1,
) -> tuple[dict[str, Any], Variables]:
    """Cuts a bundled model down to its most important parts.

    ``keep`` says how much stays of each layer: a float in (0, 1] is a share, at least one of them; an int is a number.
    Its keys are, each where a model has such a thing:

    - ``"channels"``: of each block of a cnn, or between the convolutions of each block of a residual network;
    - ``"width"``: channels of a residual stream, which all layers that add to it lose alike;
    - ``"hidden"``: units of each layer of an mlp, of the dense layer of a cnn, of each feedforward of a ViT;
    - ``"heads"``: of each block of a ViT; a head keeps its width;
    - ``"layers"``: blocks of a ViT, or of each stage of a residual network: the first, the last, and between them
      evenly spaced ones.

    What stays keeps its order. Cutting channels that are 0 for every input changes no logit, but for the width of a
    ViT, whose layer norms then take mean and variance over fewer channels.

    Args:
      name: of the model, in ``kdjax.models.MODELS``.
      options: of the model.
      variables: ``{"params": ..., "state": ...}`` of the model; nothing of them is changed.
      keep: see above.
      importance: what is measured, a name in :data:`MEASURES`; or scores, as :func:`importance` returns them.
      inputs: as for :func:`importance`; needed where something is measured.
      labels: as for :func:`importance`.
      classes: of the model.
      input_shape: (height, width, channels) of an image.
      multiple: what shares of channels, width and hidden units are rounded to a multiple of; hardware likes 8 or more.

    Returns:
      ``(options, variables)`` of the smaller model, for ``models.build(name, ..., **options)``: the options with the
      sizes that it has now. Both are as before where nothing is cut.

    Raises:
      UserError: an unknown model, option, key or measure; a number of nothing, or of more than there is; variables or
        scores of another model; nothing to measure on; a stem that gets as wide as a first stage that had another
        width.
    """
    model = _model(name, options, classes, input_shape)
    groups = _groups(name, options, variables, model)
    family, full = family_of(name), complete(name, options)
    stages = family.stages(full)
    keys = {group.key for group in groups} | ({"layers"} if stages else set())
    for key in keep:
        if key not in keys:
            raise unknown(f"part of model {name!r} to keep", key, keys)
    layers = tuple(_number("layers", keep.get("layers", count), count) for count in stages)
    counts = {
        group.name: _number(
            group.key,
            keep.get(group.key, group.size),
            group.size,
            fits=group.multiple,
            rounds=1 if group.key == "heads" else multiple,
        )
        for group in groups
    }
    shrinking = [group for group in groups if counts[group.name] < group.size]
    if not shrinking and layers == stages:
        return dict(options), variables

    def smaller(scores: Mapping[str, Any]) -> Variables:
        kept = {group.name: _best(scores[group.name], counts[group.name]) for group in shrinking}
        return _with_layers(_cut(shrinking, variables, kept), stages, layers)

    # By any scores the shapes are the same: what cannot be is refused before anything is measured.
    shapes = jax.eval_shape(lambda: smaller({group.name: np.zeros(group.size) for group in shrinking}))
    sizes = dict(options) | family.sizes(_shapes(shapes), full, layers)
    mismatch = first_mismatch(_abstract(_model(name, sizes, classes, input_shape)), shapes)
    if mismatch:
        raise UserError(
            f"model {name!r} cannot be cut so, because {mismatch}: its first stage has a projection only where its "
            "width differs from the stem's, so choose a width that keeps them different."
        )
    if shrinking and isinstance(importance, str):
        importance = _measured(importance, model, groups, variables, inputs, labels, input_shape)
    return sizes, smaller(_checked(importance, shrinking))


def importance(
    name: str,
    options: Mapping[str, Any],
    variables: Variables,
    measure: str = "activations",
    *,
    inputs: Any,
    labels: Any = None,
    classes: int,
    input_shape: tuple[int, int, int],
) -> Scores:
    """What matters in a model, measured on some examples.

    - ``"activations"``: the standard deviation of a channel, as it is read, over the places of all images (of a head:
      the root of its outputs' summed variances), added up over all norms or layers that share the channel, times the
      L2 norm of the weights that read it. The mean does not count: biases and batch statistics can stand in for it.
    - ``"taylor"``: how much the cross-entropy would change without the channel, to first order: the gradient of a gate
      of 1 on the channel wherever it is read; then the L2 norm over images.

    Args:
      name: of the model, in ``kdjax.models.MODELS``.
      options: of the model.
      variables: of the model.
      measure: a name in :data:`MEASURES`.
      inputs: float32 images [n, h, w, c], as the model takes them; some hundreds are enough.
      labels: int32 [n], the classes of the images, for ``"taylor"``; negative, or ``None`` for all of them, where it is
        not known: then it is the one that the model finds likeliest.
      classes: of the model.
      input_shape: (height, width, channels) of an image.

    Returns:
      For each group of channels, by name, float32 [size].

    Raises:
      UserError: an unknown model, option or measure; variables of another model; images of another shape or none.
    """
    model = _model(name, options, classes, input_shape)
    groups = _groups(name, options, variables, model)
    return _measured(measure, model, groups, variables, inputs, labels, input_shape)


def recalibrate(
    name: str,
    options: Mapping[str, Any],
    variables: Variables,
    *,
    inputs: Any,
    classes: int,
    input_shape: tuple[int, int, int],
) -> Variables:
    """A model with the batch statistics of some examples instead of its running ones.

    What a cut model's layers get is no longer what its batch norms were fitted to; new statistics mend much of the loss
    without any training (Li et al. 2020, "EagleEye", section 3.2: adaptive batch normalisation). Training mends it too.

    Args:
      name: of the model, in ``kdjax.models.MODELS``.
      options: of the model.
      variables: of the model; nothing of them is changed.
      inputs: float32 images [n, h, w, c], as the model takes them, in one batch.
      classes: of the model.
      input_shape: (height, width, channels) of an image.

    Raises:
      UserError: as :func:`importance`.
    """
    model = _model(name, options, classes, input_shape)
    _groups(name, options, variables, model)
    images = _images(inputs, input_shape)

    @jax.jit
    def moved(params: Any, state: Any) -> Any:
        return model.apply({"params": params, "state": state}, images, train=True, key=jax.random.key(0))[1]

    # A step keeps a share of a statistic and adds the rest of the batch's own; from two starts that gives both.
    zero, one = (
        moved(variables["params"], jax.tree.map(lambda x, start=start: jnp.full_like(x, start), variables["state"]))
        for start in (0, 1)
    )
    return {"params": variables["params"], "state": jax.tree.map(lambda a, b: a / (1 - (b - a)), zero, one)}


def _measured(
    measure: str,
    model: Model,
    groups: Sequence[Group],
    variables: Variables,
    inputs: Any,
    labels: Any,
    input_shape: Sequence[int],
) -> Scores:
    if measure not in MEASURES:
        raise unknown("importance", measure, MEASURES)
    images = _images(inputs, input_shape)
    count = len(images)
    labels = np.full(count, -1) if labels is None else labels
    if np.shape(labels) != (count,):
        raise UserError(f"{count} images need as many labels, not an array of shape {np.shape(labels)}.")

    measured = jax.jit(lambda variables, *examples: MEASURES[measure](model, groups, variables, *examples))
    return measured(variables, images, jnp.asarray(labels, jnp.int32))


def _images(inputs: Any, input_shape: Sequence[int]) -> Array:
    shape = np.shape(inputs)
    if shape[1:] != tuple(input_shape) or not shape[0]:
        raise UserError(
            f"a model for images of {tuple(input_shape)} is measured on some hundred of them, not on an array of shape "
            f"{shape}: pass inputs of shape (n, {', '.join(map(str, input_shape))})."
        )
    return jnp.asarray(inputs, jnp.float32)


def _cut(groups: Sequence[Group], variables: Variables, kept: Mapping[str, np.ndarray]) -> Variables:
    """With those channels of each group alone that are kept."""
    spans = spans_of(groups, variables)

    def cut(path: Any, leaf: Array) -> Array:
        for group, axis, repeat in spans[path_name(path)]:
            places = np.arange(leaf.shape[axis]).reshape(repeat, group.size, -1)
            leaf = jnp.take(leaf, places[:, kept[group.name]].reshape(-1), axis=axis)
        return leaf

    return jax.tree_util.tree_map_with_path(cut, variables)


def _with_layers(variables: Variables, stages: Sequence[int], layers: Sequence[int]) -> Variables:
    """With so many blocks of each stage alone, numbered anew."""
    starts = np.cumsum([0, *stages])
    chosen = [
        str(start + i)
        for start, count, fewer in zip(starts, stages, layers, strict=False)
        for i in layer_choice(count, fewer)
    ]

    def of(part: dict[str, Any]) -> dict[str, Any]:
        blocks = part.get("blocks")
        return {**part, "blocks": {str(i): blocks[old] for i, old in enumerate(chosen)}} if blocks and chosen else part

    return {name: of(part) for name, part in variables.items()}


def _best(scores: Any, count: int) -> np.ndarray:
    """The places of the highest scores, in ascending order; of equal ones the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def _number(key: str, amount: Any, size: int, fits: int = 1, rounds: int = 1) -> int:
    """How many of ``size`` an amount to keep means; it ``fits`` a model that can have but multiples of that.

    Raises:
      UserError: an amount that is neither a share nor such a number.
    """
    if isinstance(amount, float) and 0 < amount <= 1:
        step = math.lcm(fits, rounds)
        return size if amount == 1 else min(size, step * max(1, int(amount * size / step + 0.5)))
    if isinstance(amount, int) and not isinstance(amount, bool) and 1 <= amount <= size and amount % fits == 0:
        return amount
    numbers = f"from 1 to {size}" if fits == 1 else f"from {fits} to {size} that is a multiple of {fits}"
    raise UserError(
        f"{key}={amount!r} cannot be kept of {size} {key}: give a share (a float above 0, at most 1.0) or a "
        f"number (an int {numbers})."
    )


def _checked(scores: Any, groups: Sequence[Group]) -> Mapping[str, Any]:
    for group in groups:
        shape = np.shape(scores[group.name]) if group.name in scores else "absent"
        if shape != (group.size,):
            raise UserError(
                f"the importance of {group.name!r} is {shape} and should be {(group.size,)}: measure it on this model."
            )
    return scores


def _model(name: str, options: Mapping[str, Any], classes: int, input_shape: tuple[int, int, int]) -> Model:
    return from_nnx(lambda rngs: models.build(name, classes=classes, input_shape=input_shape, rngs=rngs, **options))


def _abstract(model: Model) -> Variables:
    """The shapes of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0))


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten_paths(variables["params"]).items()}


def _groups(name: str, options: Mapping[str, Any], variables: Variables, model: Model) -> list[Group]:
    """Of a model whose variables these are."""
    mismatch = first_mismatch(_abstract(model), variables)
    if mismatch:
        raise UserError(f"these variables are not of the model {name!r} with its options: {mismatch}.")
    return family_of(name).groups(_shapes(variables), complete(name, options))

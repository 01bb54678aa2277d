"""What matters in a classifier: scores of its channels, units and heads by what they do on real examples.

Sources: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), section 3,
for activations; Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3, for the gradient
of a gate on each channel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.compress.families import Group, spans_of
from kdjax.model import Array, Model, Variables, flatten_paths, path_name

Scores = dict[str, Array]  # group's name -> float32 [size], the higher the more important
_CHUNK = 32  # examples measured at a time


def activations(model: Model, groups: Sequence[Group], variables: Variables, images: Array, labels: Array) -> Scores:
    """How much a channel varies as it is read, times the weights that read it.

    Of channel i it is the sum over its norms or layers of sqrt(sum_w Var(x_iw)), over the places of all images and the
    width w of a head, times the L2 norm of the weights. Of a single reader it ranks as FLAP's metric does, its square.
    """
    taps = {tap: read for group in groups for tap, read in group.taps}

    def moments(image: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """The mean and the mean square of each channel as it is read, over the places of an image."""
        values = model.apply(variables, image[None], train=False, taps=tuple(taps))[0].taps
        seen = {tap: _places(read(values[tap])) for tap, read in taps.items()}
        return jax.tree.map(lambda x: x.mean(axis=0), seen), jax.tree.map(lambda x: (x * x).mean(axis=0), seen)

    of_images = jax.lax.map(moments, images, batch_size=_CHUNK)
    means, squares = jax.tree.map(lambda x: x.mean(axis=0), of_images)
    norms = _reading_norms(groups, variables)

    def score(group: Group) -> Array:
        variances = [(squares[tap] - means[tap] ** 2).reshape(group.size, -1).sum(axis=-1) for tap, _ in group.taps]
        return jnp.sqrt(jnp.maximum(jnp.stack(variances), 0)).sum(axis=0) * norms[group.name]

    return {group.name: score(group) for group in groups}


def taylor(model: Model, groups: Sequence[Group], variables: Variables, images: Array, labels: Array) -> Scores:
    """How the cross-entropy of an image changes with a gate of 1 on a channel, as the L2 norm over images."""

    def loss(gates: Scores, image: Array, label: Array) -> Array:
        logits = model.apply(_gated(groups, variables, gates), image[None], train=False)[0].logits[0]
        target = jnp.where(label < 0, jnp.argmax(logits), label)
        return -jax.nn.log_softmax(logits)[target]

    open_gates = {group.name: jnp.ones(group.size) for group in groups}
    slopes = jax.lax.map(lambda example: jax.grad(loss)(open_gates, *example), (images, labels), batch_size=_CHUNK)
    return jax.tree.map(lambda of_images: jnp.linalg.norm(of_images, axis=0), slopes)


MEASURES: dict[str, Callable[[Model, Sequence[Group], Variables, Array, Array], Scores]] = {
    "activations": activations,
    "taylor": taylor,
}


def _places(x: Array) -> Array:
    """[..., c] as float32 [places, c]."""
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])


def _gated(groups: Sequence[Group], variables: Variables, gates: Scores) -> Variables:
    """With all that is read of a channel multiplied by its gate."""
    spans = spans_of(groups, variables)

    def gated(path: Any, leaf: Array) -> Array:
        for group, axis, repeat in spans[path_name(path)]:
            if axis == -2:
                width = leaf.shape[-2] // (repeat * group.size)
                gate = jnp.tile(jnp.repeat(gates[group.name], width), repeat)
                leaf = leaf * gate.reshape((1,) * (leaf.ndim - 2) + (-1, 1)).astype(leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(gated, variables)


def _reading_norms(groups: Sequence[Group], variables: Variables) -> Scores:
    """The L2 norm of all weights that read a channel."""
    leaves, squares = flatten_paths(variables), {group.name: jnp.zeros(group.size) for group in groups}
    for path, spans in spans_of(groups, variables).items():
        for group, axis, repeat in spans:
            if axis == -2:
                weights = jnp.moveaxis(leaves[path].astype(jnp.float32), -2, 0).reshape(repeat, group.size, -1)
                squares[group.name] += jnp.square(weights).sum(axis=(0, 2))
    return jax.tree.map(jnp.sqrt, squares)

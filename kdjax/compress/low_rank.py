"""A kernel as the product of two thin ones: fewer parameters and multiplications, by its singular values.

A dense kernel [m, n] becomes [m, r] and [r, n]; a convolution [h, w, i, o], taken as the matrix [h w i, o], becomes one
of the same window to r channels and a 1 x 1 one from them (Zhang et al. 2016, "Accelerating Very Deep Convolutional
Networks for Classification and Detection", section 3.1). Both factors get the root of the singular values. Fresh
weights are the factors of fresh kernels (Khodak et al. 2021, "Initialization and Regularization of Factorized Neural
Layers", spectral initialisation), so a smaller student may also begin without a teacher.

``ranks`` are plain data: the rank by layer, such as ``{"blocks.1.conv": 4, "head": 2}``, or of a bundled decoder, whose
stacked layers share a rank, ``{"blocks/attention/q": 8}``. A factorised layer's parameters are ``LAYER/first/kernel``,
``LAYER/second/kernel`` and, where there was one, ``LAYER/second/bias``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.compress.weights import check_skip, is_decoder, is_stacked, weights_of
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Model, Params, Variables

Ranks = Mapping[str, int]


@partial(jax.jit, static_argnums=1)
def factorise(kernel: Array, rank: int) -> tuple[Array, Array]:
    """Two kernels by way of ``rank`` channels, whose product is nearest to a kernel's in the sum of squares (Eckart &
    Young 1936).

    Args:
      kernel: [m, n], or a convolution's [h, w, i, o].
      rank: from 1 to the smaller side of the matrix, at which nothing is lost.

    Returns:
      [m, rank] and [rank, n], or [h, w, i, rank] and [1, 1, rank, o], in the kernel's dtype. Of the squared singular
      values, those beyond ``rank`` add up to the squared error.
    """
    left, values, right = jnp.linalg.svd(_matrix(kernel).astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[:rank])
    first = (left[:, :rank] * root[None]).reshape(*kernel.shape[:-1], rank)
    second = (root[:, None] * right[:rank]).reshape((1,) * (kernel.ndim - 2) + (rank, kernel.shape[-1]))
    return first.astype(kernel.dtype), second.astype(kernel.dtype)


def by_energy(singular_values: np.ndarray, share: float) -> int:
    """The smallest rank that keeps a share, above 0 and up to 1, of the sum of squared singular values."""
    energy = np.cumsum(np.square(singular_values, dtype=np.float64))
    return 1 + int(np.searchsorted(energy[:-1], share * energy[-1]))


def by_budget(
    shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, np.ndarray], budget: float
) -> dict[str, int]:
    """Ranks of several matrices that together keep at most a share of their parameters.

    Greedy: of all singular directions, those with the largest share of their own matrix's squared singular values for
    each parameter that they cost stay, at least one of each matrix; one that no longer fits is passed over, and with it
    the rest of its matrix. A matrix that is no smaller as a product stays whole, which then costs its m n parameters.

    Args:
      shapes: (m, n) of each matrix.
      spectra: its singular values, descending.
      budget: a share of the parameters of all, above 0 and up to 1.

    Returns:
      The rank of each matrix that is factorised.

    Raises:
      UserError: rank 1 everywhere is too much already.
    """
    whole = {name: m * n for name, (m, n) in shapes.items()}
    cost = lambda name, rank: min(rank * sum(shapes[name]), whole[name])
    allowed = budget * sum(whole.values())
    ranks = dict.fromkeys(shapes, 1)
    spent = sum(cost(name, 1) for name in shapes)
    if spent > allowed:
        raise UserError(
            f"a budget of {budget:g} of the parameters is too small: rank 1 everywhere takes "
            f"{spent / sum(whole.values()):.3f} of them."
        )
    worth: dict[tuple[str, int], float] = {}
    for name, values in spectra.items():
        energy = np.square(values, dtype=np.float64)
        worth |= {(name, i): energy[i] / (energy.sum() or 1) / sum(shapes[name]) for i in range(1, len(energy))}
    closed = set()
    for name, _ in sorted(worth, key=lambda direction: (-worth[direction], direction)):
        more = cost(name, ranks[name] + 1) - cost(name, ranks[name])
        if name in closed or spent + more > allowed:
            closed.add(name)
            continue
        ranks[name], spent = ranks[name] + 1, spent + more
    return {name: rank for name, rank in ranks.items() if _saves(rank, shapes[name])}


def choose(
    params: Params, *, energy: float | None = None, budget: float | None = None, skip: Sequence[str] = ()
) -> dict[str, int]:
    """The ranks of a trained model, for :func:`factorised`; only where a product has fewer parameters than its kernel.

    Args:
      params: of a model of NNX (its kernels of two dimensions, and of four, convolutions), or of a bundled decoder (the
        kernels of its blocks, one rank for all layers). Tables, and so a decoder's head, are left alone.
      energy: the share of the squared singular values that each kernel keeps (:func:`by_energy`); in a decoder the
        layer that needs most counts. Or
      budget: the share of the parameters of all these kernels that stays (:func:`by_budget`).
      skip: regexes, found anywhere in a kernel's path, of those left whole.

    Raises:
      UserError: not one of energy and budget, or outside (0, 1]; a regex that is broken or matches no weight; a budget
        too small for any ranks.
    """
    given = {name: share for name, share in (("energy", energy), ("budget", budget)) if share is not None}
    if len(given) != 1:
        raise UserError("ranks are chosen by energy or by budget: give one of the two.")
    ((name, share),) = given.items()
    if not 0 < share <= 1:
        raise UserError(f"{name} is {share}: it is a share, above 0 and up to 1.")
    check_skip("skip of a factorisation", skip, params)
    spectra, shapes = {}, {}
    for path, kernel in weights_of(params, skip).items():
        stacked = is_stacked(path, params)
        if path.endswith("/kernel") and (stacked if is_decoder(params) else kernel.ndim in (2, 4)):
            matrices = np.asarray(kernel, np.float64)
            matrices = matrices if stacked else _matrix(matrices)[None]
            layer = path.removesuffix("/kernel")
            layer = layer if stacked else layer.replace("/", ".")
            spectra[layer], shapes[layer] = np.linalg.svd(matrices, compute_uv=False), matrices.shape[1:]
    if energy is not None:
        ranks = {layer: max(by_energy(values, energy) for values in of) for layer, of in spectra.items()}
        return {layer: rank for layer, rank in ranks.items() if _saves(rank, shapes[layer])}
    assert budget is not None
    energies = {layer: np.square(of) / np.square(of).sum(axis=1, keepdims=True) for layer, of in spectra.items()}
    return by_budget(shapes, {layer: np.sqrt(of.mean(axis=0)) for layer, of in energies.items()}, budget)


def factorised(params: Params, ranks: Ranks) -> Params:
    """The parameters of the factorised model, made of those of the whole one: kernels by :func:`factorise`, the rest
    as it is.

    Args:
      params: of a model of NNX or a bundled decoder.
      ranks: the layers to factorise.

    Raises:
      UserError: a layer that the parameters have not, or a rank that it cannot have.
    """
    layers = [path.removesuffix("/kernel").replace("/", ".") for path in weights_of(params) if path.endswith("/kernel")]
    for layer, rank in ranks.items():
        if layer.replace("/", ".") not in layers:
            raise unknown("layer to factorise", layer, layers)
        params = _replaced(params, re.split("[./]", layer), layer, rank, is_decoder(params))
    return params


def with_ranks(factory: Callable[[nnx.Rngs], nnx.Module], ranks: Ranks) -> Callable[[nnx.Rngs], nnx.Module]:
    """A factory of the same NNX modules with pairs of thinner layers in place of some.

    The pair of ``nnx.Linear`` or ``nnx.Conv`` layers keeps dtype, strides and padding, stands at its layer's path,
    which stays a tap, and begins with the factors of the layer's fresh kernel. Trained ones come from
    :func:`factorised`.

    Args:
      factory: from ``nnx.Rngs`` to a module.
      ranks: by module path.

    Raises:
      UserError: from the factory: a path that is no such layer; a rank that it cannot have; a grouped convolution.
    """

    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = factory(rngs)
        layers = {
            ".".join(map(str, path)): layer
            for path, layer in module.iter_modules()
            if isinstance(layer, nnx.Linear | nnx.Conv)
        }
        for name, rank in ranks.items():
            if name not in layers:
                raise unknown("layer to factorise", name, layers)
            *parents, last = name.split(".")
            parent: Any = module
            for part in parents:
                parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
            pair = _pair(name, layers[name], rank)
            if last.isdigit():
                parent[int(last)] = pair
            else:
                setattr(parent, last, pair)
        return module

    return make


def decoder_with_ranks(model: Model, ranks: Ranks) -> Model:
    """The bundled decoder with factorised fresh parameters; ``apply`` stays as it is, for it goes by the parameters."""

    def init(key: Array) -> Variables:
        variables = model.init(key)
        return {**variables, "params": factorised(variables["params"], ranks)}

    return Model(init, model.apply)


class Pair(nnx.Module):
    """Two layers, one after the other, in place of one."""

    def __init__(self, first: nnx.Module, second: nnx.Module):
        self.first = first
        self.second = second

    def __call__(self, x: Array) -> Array:
        """What the one layer takes, to what it gives."""
        return self.second(self.first(x))


def _pair(name: str, layer: Any, rank: int) -> Pair:
    kernel = layer.kernel[...]
    _check_rank(name, _matrix(kernel).shape, rank)
    common = {
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "precision": layer.precision,
        "promote_dtype": layer.promote_dtype,
        "preferred_element_type": layer.preferred_element_type,
        "kernel_init": nnx.initializers.zeros,
        "rngs": nnx.Rngs(0),  # nothing is drawn from it: the kernels are set below
    }
    if isinstance(layer, nnx.Linear):
        common["dot_general"] = layer.dot_general
        first: Any = nnx.Linear(layer.in_features, rank, use_bias=False, **common)
        second: Any = nnx.Linear(rank, layer.out_features, use_bias=layer.use_bias, **common)
    else:
        if layer.feature_group_count != 1 or layer.mask is not None:
            raise UserError(f"{name} is a grouped or masked convolution, which cannot be factorised: skip it.")
        common["conv_general_dilated"] = layer.conv_general_dilated
        first = nnx.Conv(
            layer.in_features,
            rank,
            layer.kernel_size,
            layer.strides,
            padding=layer.padding,
            input_dilation=layer.input_dilation,
            kernel_dilation=layer.kernel_dilation,
            use_bias=False,
            **common,
        )
        ones = (1,) * len(layer.kernel_size)
        second = nnx.Conv(rank, layer.out_features, ones, use_bias=layer.use_bias, **common)
    first.kernel[...], second.kernel[...] = factorise(kernel, rank)
    if layer.use_bias:
        second.bias[...] = layer.bias[...]
    return Pair(first, second)


def _replaced(tree: Params, path: Sequence[str], layer: str, rank: int, stacked: bool) -> Params:
    """The tree with the parameters of one layer as those of a pair; what is beside it is shared."""
    if path:
        return {**tree, path[0]: _replaced(tree[path[0]], path[1:], layer, rank, stacked)}
    kernel = jnp.asarray(tree["kernel"])
    _check_rank(layer, kernel.shape[1:] if stacked else _matrix(kernel).shape, rank)
    if stacked:
        first, second = jax.vmap(lambda of_layer: factorise(of_layer, rank))(kernel)
    else:
        first, second = factorise(kernel, rank)
    rest = {name: leaf for name, leaf in tree.items() if name != "kernel"}
    return {"first": {"kernel": first}, "second": {"kernel": second, **rest}}


def _matrix(kernel: Any) -> Any:
    """[..., n] as [m, n]."""
    return kernel.reshape(-1, kernel.shape[-1])


def _saves(rank: int, shape: tuple[int, ...]) -> bool:
    return rank * sum(shape) < shape[0] * shape[1]


def _check_rank(layer: str, shape: tuple[int, ...], rank: int) -> None:
    if not 1 <= rank <= min(shape):
        raise UserError(
            f"{layer}, a matrix of {shape[0]} x {shape[1]}, cannot have rank {rank}: choose 1 to {min(shape)}."
        )

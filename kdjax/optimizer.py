"""Optimisers: config -> an optax transformation whose learning rate is an argument of its update.

The chain is: clip by the global norm, the optimiser with its weight decay, times minus the learning rate. Frozen
parameters take no part in it: zero updates, no state, not in the norm.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from kdjax import schedules
from kdjax.compress import sparsify
from kdjax.errors import UserError, unknown

Params = Any
COMMON = ("clip_norm", "decay_mask", "freeze", "sparsify")
SPARSE = ("final", "initial", "every", "scope", "skip")  # what sparsify takes beside its lengths
LENGTHS = tuple(f"{name}_{unit}" for name in ("begin", "end") for unit in schedules.UNITS)


def sgd(
    *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0, mask: Params = None
) -> optax.GradientTransformation:
    """Gradient descent with momentum (Sutskever et al. 2013); decay is L2, before the momentum, as in PyTorch."""
    velocity = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return optax.chain(_decay(weight_decay, mask), velocity)


def adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015), without weight decay."""
    return optax.scale_by_adam(b1, b2, eps)


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4, mask: Params = None
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps), _decay(weight_decay, mask))


def lion(
    *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 1e-3, mask: Params = None
) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023)."""
    return optax.chain(optax.scale_by_lion(b1, b2), _decay(weight_decay, mask))


def lamb(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0, mask: Params = None
) -> optax.GradientTransformation:
    """Adam with a trust ratio per layer, for large batches (You et al. 2020)."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps), _decay(weight_decay, mask), optax.scale_by_trust_ratio())


def rmsprop(
    *,
    decay: float = 0.9,
    eps: float = 1e-8,
    centered: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Params = None,
) -> optax.GradientTransformation:
    """Gradients over their running root mean square (Tieleman & Hinton 2012); weight decay is L2, before it."""
    scale = optax.scale_by_stddev(decay, eps) if centered else optax.scale_by_rms(decay, eps)
    velocity = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return optax.chain(_decay(weight_decay, mask), scale, velocity)


# Name in the config -> function whose keyword arguments are its options (`mask` comes from `decay_mask`).
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "lamb": lamb,
    "rmsprop": rmsprop,
}


def make(config: Mapping[str, Any] | ConfigDict, params_example: Params) -> optax.GradientTransformationExtraArgs:
    """The optimiser that a config asks for; ``update(grads, state, params, learning_rate=lr)`` takes the traced rate.

    Args:
        config: ``name``, the options of that optimiser (the keyword arguments of its function), and for all:
            ``clip_norm`` (bound of the gradients' global norm), ``decay_mask`` (regexes, matched anywhere in a path
            such as "blocks/0/kernel", of the parameters that decay; default: arrays of two or more dimensions),
            ``freeze`` (regexes of those that are not trained). ``learning_rate`` is not read here. A key whose value
            is None counts as absent.
        params_example: a nested dict of arrays or ShapeDtypeStructs, the structure of the parameters.

    Returns:
        The transformation; its updates are to be added to the parameters.

    Raises:
        UserError: unknown optimiser or option, a mistyped value, a regex that is broken or matches no parameter,
            nothing left to train.
    """
    section = config.to_dict() if isinstance(config, ConfigDict) else config
    options = {key: value for key, value in section.items() if value is not None}
    options.pop("learning_rate", None)
    name = options.pop("name", None)
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    common = {key: options.pop(key) for key in COMMON if key in options}
    _check_options(name, options)

    if _decays(name):
        options["mask"] = _decay_mask(common.get("decay_mask"), params_example)
    elif "decay_mask" in common:
        raise UserError(f"optimizer.decay_mask: {name} has no weight decay: leave it out or use adamw.")
    steps = [OPTIMIZERS[name](**options), _scale_by_learning_rate()]
    if "clip_norm" in common:
        _check_number("clip_norm", common["clip_norm"])
        if common["clip_norm"] <= 0:
            raise UserError(f"optimizer.clip_norm is {common['clip_norm']!r}: give a positive bound, or leave it out.")
        steps.insert(0, optax.clip_by_global_norm(common["clip_norm"]))
    train = optax.with_extra_args_support(optax.chain(*steps))
    if not common.get("freeze"):
        return train

    frozen = _matching("freeze", common["freeze"], params_example)
    if all(jax.tree.leaves(frozen)):
        raise UserError("optimizer.freeze matches every parameter: nothing is left to train, so narrow its regexes.")
    labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
    return optax.partition({"trained": train, "frozen": optax.set_to_zero()}, labels)


def thinning(
    train: optax.GradientTransformation,
    options: Mapping[str, Any],
    params_example: Params,
    *,
    total_steps: int,
    steps_per_epoch: float,
) -> optax.GradientTransformation:
    """An optimiser that thins out the weights on its way, as ``optimizer.sparsify`` says.

    Args:
        train: the optimiser.
        options: those of ``sparsify.sparsify`` (``final``, the share of zeros in the end, is needed), of which
            ``begin`` and ``end`` are lengths as everywhere: ``begin_steps``, ``end_percent`` and so on; 0 and 70 % of
            the run.
        params_example: as for ``make``.
        total_steps: of the run.
        steps_per_epoch: updates per epoch.

    Raises:
        UserError: an unknown option, no ``final``, or what ``sparsify.sparsify`` refuses.
    """
    where, valid = "optimizer.sparsify", (*LENGTHS, *SPARSE)
    for option in options:
        if option not in valid:
            raise unknown(f"option of {where}", option, valid)
    if "final" not in options:
        raise UserError(f"{where} has no final: give the share of weights that shall be 0 in the end, such as 0.8.")
    length = lambda name: schedules.steps_of(name, options, total_steps, steps_per_epoch, where=where, zero=True)
    begin, end = length("begin"), length("end")
    return sparsify.sparsify(
        train,
        begin=begin or 0,
        end=round(0.7 * total_steps) if end is None else end,
        params_example=params_example,
        **{name: value for name, value in options.items() if name in SPARSE},
    )


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Updates times minus the learning rate, which comes as an extra argument."""

    def update(updates: Params, state: Any, params: Params = None, *, learning_rate: Any, **_: Any) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u: jnp.asarray(-learning_rate, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _decay(weight_decay: float, mask: Params) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()


def _decay_mask(regexes: Any, params: Params) -> Params:
    if regexes is None:
        return jax.tree.map(lambda p: p.ndim >= 2, params)  # biases and normalisations keep their scale
    return _matching("decay_mask", regexes, params)


def _matching(option: str, regexes: Any, params: Params) -> Params:
    """A tree like params: whether any regex is found in the leaf's path. Each regex must be found in some path."""
    if isinstance(regexes, str) or not isinstance(regexes, Iterable):
        raise UserError(f"optimizer.{option} is {regexes!r}: give a list of regexes.")
    path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = []
    for regex in regexes:
        try:
            pattern = re.compile(regex)
        except (re.error, TypeError) as error:
            raise UserError(f"optimizer.{option}: {regex!r} is not a regex ({error}).") from error
        if not any(map(pattern.search, paths)):
            raise UserError(f"optimizer.{option}: {regex!r} matches no parameter, such as {paths[0]!r}.")
        patterns.append(pattern)
    return jax.tree_util.tree_map_with_path(lambda path, _: any(p.search(path_of(path)) for p in patterns), params)


def _options_of(name: str) -> dict[str, Any]:
    return {key: p.default for key, p in inspect.signature(OPTIMIZERS[name]).parameters.items() if key != "mask"}


def _decays(name: str) -> bool:
    return "weight_decay" in _options_of(name)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    valid = _options_of(name)
    for key, value in options.items():
        if key == "weight_decay" and not _decays(name):
            raise UserError(f"optimizer.weight_decay: {name} has no weight decay: leave it out or use adamw.")
        if key not in valid:
            raise unknown(f"option of optimizer {name}", key, {*valid, *COMMON, "name", "learning_rate"})
        if isinstance(valid[key], bool):
            if not isinstance(value, bool):
                raise UserError(f"optimizer.{key} is {value!r}: give true or false.")
        else:
            _check_number(key, value)


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"optimizer.{key} is {value!r}: give a number.")

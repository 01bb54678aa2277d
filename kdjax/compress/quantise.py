"""Weights and activations of few bits: fake quantised while a student learns, true integers for an export.

A rule is plain data: ``{"weights": "int8", "activations": None, "skip": []}``, where ``weights`` is a name in
:data:`BITS`, ``activations`` is None or one in :data:`ACTIVATIONS`, and ``skip`` are regexes, found anywhere in a
parameter's path, of weights that stay float32 and so do the inputs of their layers.

Quantisation is qwix's, symmetric: q = round(w / scale) with scale = max |w| / bound, one scale per output channel of a
kernel and per row of a table. The bound is 127.5, 7.5 and 1.5 of int8, int4 and int2, half a step above the largest
integer, and 448 of float8_e4m3fn. Scales follow the weights: they are computed anew at every step, and none is learned.
Rounding has no gradient, so the backward pass takes it for the identity (Bengio et al. 2013, the straight-through
estimator; Jacob et al. 2018, section 3, for training with fake quantisation).
"""

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.compress.weights import check_skip, is_decoder, scale_axes, weights_of
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Model, ModelState, Params, flatten_paths, path_name

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
ACTIVATIONS = ("int8", "fp8")
Rule = Mapping[str, Any]
_DECAY = 0.99


def check_rule(rule: Rule, params: Params | None = None) -> None:
    """Raises a UserError where no model can be quantised so; with parameters (or their shapes), where this one cannot.

    Args:
      rule: as the module's docstring says; ``activations`` and ``skip`` may be absent.
      params: of the model.
    """
    for name in rule:
        if name not in ("weights", "activations", "skip"):
            raise unknown("key of a quantisation", name, ("weights", "activations", "skip"))
    kind, activations = rule.get("weights"), rule.get("activations")
    if kind not in BITS:
        raise unknown("quantisation of weights", kind, BITS)
    if activations is not None:
        if activations in BITS and activations not in ACTIVATIONS:
            raise UserError(f"activations cannot be {activations}: choose {' or '.join(ACTIVATIONS)}, or leave it out.")
        if activations not in ACTIVATIONS:
            raise unknown("quantisation of activations", activations, ACTIVATIONS)
        if (activations == "fp8") != (kind == "fp8"):
            raise UserError(
                f"weights of {kind} and activations of {activations} cannot be multiplied: quantise both to integers, "
                "or both to fp8."
            )
    check_skip("skip of a quantisation", rule.get("skip") or (), params)
    if params is not None and activations is not None and is_decoder(params):
        raise UserError("a decoder's activations stay float: leave activations out and quantise its weights alone.")
    _qwix()


def fake_quantised(model: Model, rule: Rule) -> Model:
    """The model that computes with quantised weights and learns float ones.

    Parameters, state, taps and random keys are those of ``model``; only the values of the weights change on their way
    in, to those that :func:`integers` gives, exactly. Applied to a trained model it is post-training quantisation.

    Args:
      model: any; its weights, as :func:`kdjax.compress.weights.weights_of` finds them, are quantised.
      rule: of which ``weights`` and ``skip`` are read; for activations see :func:`quantised_inputs`.

    Raises:
      UserError: as :func:`check_rule` without parameters.
    """
    check_rule(rule)

    def apply(variables, inputs, **options):
        params = variables["params"]
        weights = weights_of(params, rule.get("skip") or ())

        def seen(path, leaf):
            name = path_name(path)
            return (
                _straight_through(leaf, _qwix().dequantize(_quantised(name, leaf, params, rule)))
                if name in weights
                else leaf
            )

        return model.apply({**variables, "params": jax.tree_util.tree_map_with_path(seen, params)}, inputs, **options)

    return Model(model.init, apply)


def quantised_inputs(factory: Callable[[nnx.Rngs], nnx.Module], rule: Rule) -> Callable[[nnx.Rngs], nnx.Module]:
    """A factory of the same NNX modules, whose dense layers and convolutions round what they are given.

    One scale for the whole input of a layer: each example's largest magnitude, averaged over the batch, and over the
    batches of training as an exponential moving average with decay 0.99 (Jacob et al. 2018, section 3.1). That average
    is the one new entry of the model's state, ``LAYER/input_absmax``, a float32 scalar, 0 before the first batch of
    training; until then, each batch gives its own. In evaluation it is frozen. The scale is input_absmax / bound. What
    lies beyond is clipped, and the gradient passes as if it were not. Products within attention, of activations with
    each other, stay float.

    The weights are left alone: the student of a rule is
    ``fake_quantised(from_nnx(quantised_inputs(factory, rule)), rule)``.

    Args:
      factory: from ``nnx.Rngs`` to a module, whose ``nnx.Linear`` and ``nnx.Conv`` layers are changed.
      rule: without activations the factory comes back as it is.

    Raises:
      UserError: as :func:`check_rule` without parameters.
    """
    check_rule(rule)
    kind = rule.get("activations")
    if kind is None:
        return factory

    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = factory(rngs)
        layers = {
            "/".join(map(str, (*path, "kernel"))): layer
            for path, layer in module.iter_modules()
            if isinstance(layer, nnx.Linear | nnx.Conv)
        }
        kernels = {path: layer.kernel[...] for path, layer in layers.items()}
        for path in weights_of(kernels, rule.get("skip") or ()):
            _round_inputs(layers[path], kind)
        return module

    return make


def integers(params: Params, rule: Rule) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What an export writes: by path, the integers of a weight and their scales.

    Returns:
      ``(integers, scale)``: arrays of int8, ``ml_dtypes.int4`` (of int4 and int2) or ``ml_dtypes.float8_e4m3fn``, in
      the weight's shape; and of float32, with the weight's number of dimensions, each of them whole or 1. The weight is
      ``integers.astype(float32) * scale``.

    Raises:
      UserError: as :func:`check_rule`.
    """
    check_rule(rule, params)
    weights = weights_of(params, rule.get("skip") or ())

    @jax.jit
    def quantised(weights):
        return {path: _quantised(path, weight, params, rule) for path, weight in weights.items()}

    arrays = quantised({path: jnp.asarray(weight, jnp.float32) for path, weight in weights.items()})
    return {path: (np.asarray(array.qvalue), np.asarray(array.scale)) for path, array in arrays.items()}


def weights_bytes(params: Params, state: ModelState, rule: Rule | None = None) -> int:
    """The bytes of a model's variables, stored as a rule says: integers packed, scales and all the rest in float32.

    Args:
      params: arrays, or their shapes.
      state: what the model keeps besides.
      rule: None: all is float32.
    """
    skip = () if rule is None else rule.get("skip") or ()
    weights = {} if rule is None else weights_of(params, skip)
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    for path, leaf in flatten_paths(params).items():
        if rule is None or path not in weights:
            total += 4 * leaf.size
            continue
        scales = int(np.prod([leaf.shape[axis] for axis in scale_axes(path, leaf, params)]))
        total += -(-leaf.size * BITS[rule["weights"]] // 8) + 4 * scales
    return total


def _quantised(path: str, weight: Array, params: Params, rule: Rule) -> Any:
    return _qwix().quantize(weight, _qtype(rule["weights"]), channelwise_axes=scale_axes(path, weight, params))


def _qtype(kind: str) -> str:
    """qwix's name of a kind."""
    return "float8_e4m3fn" if kind == "fp8" else kind


def _straight_through(x: Array, rounded: Array) -> Array:
    """``rounded``, exactly, with the gradient of ``x``: x - x is 0, where x + (rounded - x) would round once more."""
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))


def _round_inputs(layer: Any, kind: str) -> None:
    layer.input_absmax = nnx.BatchStat(jnp.zeros((), jnp.float32))
    layer.input_kind = kind
    layer.use_running_average = True  # what nnx's train() and eval() set in every module that has it
    kind_of_layer: Any = type(layer)
    layer.__class__ = _rounding(kind_of_layer)


@cache  # one class for each, so that two modules of a factory have equal structures
def _rounding(kind: Any) -> Any:
    """The layer's class with rounded inputs.

    Not qwix's own provider: its running statistics of a convolution are written inside a custom gradient, which NNX
    refuses under jit (qwix 0.1.8), and it takes a batch for a weight where the shapes agree.
    """

    def call(self: Any, x: Array, *args: Any, **options: Any) -> Array:
        return kind.__call__(self, _rounded(self, x), *args, **options)

    members = {"__call__": call, "__module__": kind.__module__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members))


def _rounded(layer: Any, x: Array) -> Array:
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=tuple(range(1, x.ndim))).mean()
    if not layer.use_running_average:
        seen = layer.input_absmax[...]
        layer.input_absmax[...] = jnp.where(seen == 0, largest, _DECAY * seen + (1 - _DECAY) * largest)
    seen = layer.input_absmax[...]
    absmax = jnp.where(seen == 0, largest, seen)
    absmax = jnp.where(absmax == 0, 1.0, absmax)  # an input of zeros
    unit = _qwix().quantize(wide / absmax, _qtype(layer.input_kind), calibration_method="fixed,-1,1")
    return _straight_through(x, (_qwix().dequantize(unit) * absmax).astype(x.dtype))


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise UserError("quantisation needs qwix: run pip install 'kdjax[quantise]'.") from error
    return qwix

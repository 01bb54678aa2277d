"""What a network is to kdjax: a pair of pure functions, whatever library it was written in.

The adapters here and the modules under ``models/`` are the only places that know Flax objects. Everywhere else a model
is a :class:`Model` and its weights are plain nested dicts of arrays.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.errors import UserError, unknown
from kdjax.head import Head

Array = jax.Array
Params = dict[str, Any]
ModelState = dict[str, Any]
Variables = dict[str, Any]  # {"params": Params, "state": ModelState}


class Signal(NamedTuple):
    """What a teacher says of a position, in short: the probabilities of some classes, and what is left for the others.

    Either its k most probable classes, or a sample of its distribution (the share of each class drawn, nothing left).

    Attributes:
      ids: int32 [..., k], the classes, each at most once.
      log_probs: float32 [..., k]; -inf where a place is empty.
      log_rest: float32 [...], of all other classes together; -inf where nothing is left.
    """

    ids: Array
    log_probs: Array
    log_rest: Array


class Outputs(NamedTuple):
    """What a model says of a batch.

    One of ``logits``, ``hidden`` with ``head`` (so that logits over a large vocabulary are made for a few positions at
    a time), or ``signal`` (of a teacher that was asked before); and the intermediate values that were asked for.
    """

    logits: Any = None  # [batch, ..., classes]
    taps: Mapping[str, Array] = {}  # module path, such as "blocks.3" -> that module's output
    hidden: Any = None  # [batch, ..., width]
    head: Head | None = None
    signal: Signal | None = None


def logits_of(outputs: Outputs) -> Array:
    """The logits [batch, ..., classes] of a model that has some, whichever way it gives them."""
    return outputs.logits if outputs.head is None else outputs.head(outputs.hidden)


EVERY = ("*",)  # as ``taps``: every module's output
# While a step is traced: how a model's weights shall lie where they are used; see ``sharding.gathered``.
LAYOUT: ContextVar[Callable[[str, Any], Any]] = ContextVar("layout", default=lambda path, weights: weights)


STACK = "params/blocks"  # the path of stacked layers among the variables
ROWS = "rows"  # in place of a path: what was looked up in a table for each token [b, t, width]


def at_use(path: str, weights: Any) -> Any:
    """A model's weights as they shall lie where they are used. A model that walks over stacked layers asks for those of
    each layer, ``path`` being that of the stack among the variables, so that only one layer is whole at a time."""
    return LAYOUT.get()(path, weights)


class Model(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: ``init(key) -> variables``, where variables are ``{"params": ..., "state": ...}``, plain nested dicts of
        arrays; the state holds what is not learned by gradient, such as running batch statistics.
      apply: ``apply(variables, inputs, *, train, key=None, taps=()) -> (Outputs, new_state)``. ``key`` drives dropout
        and is needed only where ``train`` is true; ``taps`` names modules whose outputs are wanted, by path (or is
        :data:`EVERY`).
    """

    init: Callable[[Array], Variables]
    apply: Callable[..., tuple[Outputs, ModelState]]


def from_nnx(module: nnx.Module | Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Adapts a Flax NNX module.

    Args:
      module: a module that holds its weights (``init`` then returns those, whatever the key), or a function from
        ``nnx.Rngs`` to a module (``init`` then makes fresh weights). Its ``__call__(inputs)`` returns the logits.

    Returns:
      The pure functions. Taps are module paths with dots, such as ``"blocks.3"`` or ``"head"``; a module that is called
      several times gives its last output.
    """
    factory = (lambda rngs: module) if isinstance(module, nnx.Module) else module
    structure = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    graph, params, streams, rest = _split(structure)
    templates = {"params": nnx.to_flat_state(params), "state": nnx.to_flat_state(rest)}
    stream_leaves = nnx.to_flat_state(streams)

    def init(key: Array) -> Variables:
        _, params, _, rest = _split(factory(nnx.Rngs(key)))
        return {"params": _plain(params), "state": _plain(rest)}

    def apply(variables, inputs, *, train, key=None, taps=()):
        key = jax.random.key(0) if key is None else key
        leaves = {
            **_filled(templates["params"], variables["params"]),
            **_filled(templates["state"], variables["state"]),
        }
        for number, (path, stream) in enumerate(stream_leaves):
            is_key = isinstance(stream, nnx.RngKey)
            leaves[path] = stream.replace(jax.random.fold_in(key, number) if is_key else jax.numpy.zeros((), "uint32"))
        # A copy, because merging over captured variables inside a gradient is a trace error otherwise.
        net = nnx.merge(graph, nnx.State.from_flat_path(leaves), copy=True)
        (net.train if train else net.eval)()
        captured: Mapping[str, Array] = {}
        if taps:
            logits, outputs = nnx.capture(net, nnx.Intermediate, method_outputs=nnx.Intermediate)(inputs)
            captured = _pick_taps(
                {p[:-1]: v.get_value()[-1] for p, v in nnx.to_flat_state(outputs) if p[-1] == "__call__"}, taps
            )
        else:
            logits = net(inputs)
        new_state = nnx.split(net, nnx.Param, nnx.RngState, nnx.Intermediate, ...)[-1]
        return Outputs(logits, captured), _plain(new_state)

    return Model(init, apply)


def from_linen(module: Any, example_inputs: Any) -> Model:
    """Adapts a Flax Linen module.

    Args:
      module: the module; ``__call__(inputs)`` returns the logits. Where it takes one of the keywords ``train``,
        ``training``, ``is_training``, ``deterministic`` or ``use_running_average``, that is set.
      example_inputs: an array, or ``jax.ShapeDtypeStruct``, with the shape of a batch: Linen makes its weights from it.

    Returns:
      The pure functions. Taps are module paths with dots, such as ``"Dense_0"`` or ``"encoder.layer_3"``.
    """
    keywords = set(inspect.signature(module.__call__).parameters)

    def mode(train: bool) -> dict[str, bool]:
        on = {name: train for name in ("train", "training", "is_training") if name in keywords}
        return on | {name: not train for name in ("deterministic", "use_running_average") if name in keywords}

    def init(key: Array) -> Variables:
        blank = jax.numpy.zeros(example_inputs.shape, example_inputs.dtype)
        variables = dict(module.init({"params": key, "dropout": key}, blank, **mode(False)))
        return {"params": variables.pop("params", {}), "state": variables}

    def apply(variables, inputs, *, train, key=None, taps=()):
        result, updates = module.apply(
            {"params": variables["params"], **variables["state"]},
            inputs,
            rngs=None if key is None else {"dropout": key},
            mutable=[*(variables["state"] if train else ()), *(("intermediates",) if taps else ())],
            capture_intermediates=(
                (lambda owner, method: tuple(taps) == EVERY or ".".join(owner.path) in taps) if taps else False
            ),
            **mode(train),
        )
        outputs = flatten_dict(updates.pop("intermediates", {}))
        captured = _pick_taps({path[:-1]: value[-1] for path, value in outputs.items() if path[-1] == "__call__"}, taps)
        return Outputs(result, captured), {**variables["state"], **updates}

    return Model(init, apply)


def as_model(module: Any, example_inputs: Any) -> Model:
    """Adapts whatever a user may hold: a :class:`Model`, an NNX module (or its factory), or a Linen module."""
    from flax import linen

    if isinstance(module, Model):
        return module
    if isinstance(module, linen.Module):
        return from_linen(module, example_inputs)
    if isinstance(module, nnx.Module) or callable(module):
        return from_nnx(module)
    raise UserError(
        f"{type(module).__name__} is not a model: pass a Flax NNX or Linen module, a function from nnx.Rngs to an NNX "
        "module, or a kdjax.Model."
    )


def update_nnx(module: nnx.Module, variables: Variables) -> None:
    """Writes variables into the NNX module that they were made from."""
    _, params, _, rest = _split(module)
    for part, state in (("params", params), ("state", rest)):
        nnx.update(module, nnx.State.from_flat_path(_filled(nnx.to_flat_state(state), variables[part])))


def parameter_count(params: Params) -> int:
    """The number of learned scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def first_mismatch(expected: Any, found: Any) -> str | None:
    """The first difference in structure or shape between two trees of arrays or shapes, as a phrase; else ``None``."""
    expected, found = flatten_paths(expected), flatten_paths(found)
    for path in expected:
        if path not in found:
            return f"parameter {path} {tuple(expected[path].shape)} is missing"
        if tuple(found[path].shape) != tuple(expected[path].shape):
            return f"parameter {path} is {tuple(found[path].shape)} and should be {tuple(expected[path].shape)}"
    for path in found:
        if path not in expected:
            return f"parameter {path} {tuple(found[path].shape)} is not part of the model"
    return None


def flatten_paths(tree: Any) -> dict[str, Any]:
    """A tree's leaves by path, such as ``"blocks/0/conv/kernel"``, in a fixed order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name: leaf for name, leaf in sorted((path_name(path), leaf) for path, leaf in leaves)}


def path_name(path: Any) -> str:
    """A leaf's key path, as JAX gives it, in words: ``"blocks/0/conv/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """``(structure, parameters, random streams, the rest)``."""
    graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return graph, states[0], states[1], states[2]


def _plain(state: nnx.State) -> dict[str, Any]:
    return unflatten_dict({tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)})


def _filled(template: Any, values: dict[str, Any]) -> dict[tuple, nnx.Variable]:
    flat = flatten_dict(values)
    return {path: variable.replace(flat[tuple(map(str, path))]) for path, variable in template}


def tap_shapes(model: Model, inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every module's output, by path, for a batch of the shape of ``inputs``; computes nothing."""
    variables = jax.eval_shape(model.init, jax.random.key(0))
    taps = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, taps=EVERY)[0].taps, variables, inputs)
    return {name: tuple(value.shape) for name, value in taps.items()}


def _pick_taps(outputs: Mapping[tuple, Any], taps: Sequence[str]) -> dict[str, Array]:
    named = {".".join(map(str, path)): value for path, value in outputs.items()}
    if tuple(taps) == EVERY:
        return {name: value for name, value in named.items() if name and hasattr(value, "shape")}
    for tap in taps:
        if tap not in named:
            raise unknown("tap", tap, (name for name in named if name))
    return {tap: named[tap] for tap in taps}

"""Where arrays live: the mesh, and ordered (regex, tactic) rules from a parameter's path to its sharding."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.compress.weights import is_decoder
from kdjax.errors import UserError, unknown
from kdjax.model import LAYOUT, ROWS, Model, flatten_paths, path_name

Rules = Sequence[tuple[str, str]]
TACTICS = ("replicate", "fsdp", "tensor:DIMENSION", "tensor:DIMENSION+fsdp")
MEMBERS = "members"  # the mesh axis over which a population is split
TENSOR = "tensor"  # the mesh axis over which single products are split; it sees the same batch
# The rules of a decoder, whose kernels are [layers, inputs, outputs] and whose tables are [vocabulary, width]. Of a
# pair of products the first is split over its outputs and the second over its inputs, so that devices add up only what
# the second gives. fsdp splits a table's width: with rows split, every device would look up the tokens of all others.
DECODER: Rules = (
    ("norm|bias", "replicate"),
    ("/(q|k|v|gate|up)(/second)?/kernel", "tensor:-1+fsdp"),
    ("/(o|down)(/first)?/kernel", "tensor:-2+fsdp"),
    ("/(embedding|head/kernel)", "tensor:-2+fsdp"),
    (".*", "replicate"),
)
_TACTIC = re.compile(r"(replicate|fsdp|tensor:(-?\d)(\+fsdp)?)")
_SMALLEST_SHARDED = 2**14  # elements; a smaller array costs more to gather than to keep


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of some devices, or of all, such as ``{"data": -1, "fsdp": 1}``; one axis may be -1 for all that are
    left.

    Batches are split over every axis but ``tensor``; parameters over ``fsdp`` and ``tensor``, where a rule says so.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: sizes are 1 or more, and at most one may be -1 (all devices that are left).")
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    total = math.prod(sizes.values())
    if total > len(devices):
        raise UserError(f"mesh {dict(axes)} needs {total} devices and there are {len(devices)}: make an axis smaller.")
    if total < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh {dict(axes)} uses {total} of {len(devices)} devices: over processes it must use all.")
    # Auto axes: the compiler places the collectives; JAX's default changed to Explicit.
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:total])


def make_meshes(axes: Mapping[str, int], teacher_axes: Mapping[str, int]) -> tuple[Mesh, Mesh | None]:
    """The mesh of the student, and one of the last devices for the teachers alone, where they are to have some.

    Raises:
      UserError: as ``make_mesh``; the teachers' sizes do not say how many devices, or there are several processes.
    """
    if not teacher_axes:
        return make_mesh(axes), None
    if jax.process_count() > 1:
        raise UserError("teacher_mesh is for the devices of one process: set train.overlap=True instead.")
    devices, count = jax.devices(), math.prod(teacher_axes.values())
    if not 0 < count < len(devices) or any(size < 1 for size in teacher_axes.values()):
        raise UserError(
            f"teacher_mesh {dict(teacher_axes)} should have 1 to {len(devices) - 1} of the {len(devices)} devices, and "
            "leave some to the student: change its sizes, none of which may be -1."
        )
    return make_mesh(axes, devices[:-count]), make_mesh(teacher_axes, devices[-count:])


def over_batch(mesh: Mesh) -> NamedSharding:
    """Splits the leading dimension over every axis of the mesh, but those of a population and of single products."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a batch is split."""
    return tuple(name for name in mesh.axis_names if name not in (MEMBERS, TENSOR))


def batch_ways(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rules(tree: Any, mesh: Mesh, rules: Rules, *, members: int = 0) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes: the tactic of the first rule whose regex is found in
    its path.

    ``"replicate"`` keeps a copy on each device; ``"fsdp"`` splits the largest dimension that the ``fsdp`` axis
    divides; ``"tensor:-1"`` splits the last dimension over the ``tensor`` axis, and ``"tensor:-1+fsdp"`` besides the
    largest of the others over ``fsdp``. What an axis does not divide, or a mesh does not have, stays whole; a dimension
    named for ``tensor`` is never split over ``fsdp``, so that the layout does not depend on the mesh's sizes. An
    optimiser's moments carry the path of their parameter, so they follow it. In a population of ``members``
    the leading dimension is split over the axis ``members``, where the mesh has one, and the rules see the rest.

    Raises:
      UserError: an unknown tactic, or a parameter that no rule speaks of.
    """
    for _, tactic in rules:
        if not _TACTIC.fullmatch(tactic):
            raise unknown("sharding tactic", tactic, TACTICS)

    def choose(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, tactic in rules:
            if re.search(pattern, name):
                lead = (MEMBERS if MEMBERS in mesh.shape else None,) if members and leaf.ndim else ()
                spec = _spec(tactic, leaf.shape[len(lead) :], mesh)
                return NamedSharding(mesh, PartitionSpec(*lead, *spec))
        raise UserError(f'no sharding rule speaks of {name}: end the rules with (".*", "replicate").')

    return jax.tree_util.tree_map_with_path(choose, tree)


def placed(tree: Any, mesh: Mesh, rules: Rules, *, members: int = 0) -> Any:
    """The shapes and dtypes of a tree of arrays or shapes, with the shardings of ``by_rules``."""
    places = by_rules(tree, mesh, rules, members=members)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def gathered(model: Model, mesh: Mesh, rules: Rules) -> Model:
    """The model, of whose weights each device has a whole copy while it uses them, but for their share of ``tensor``.

    Without it the compiler may as well split activations the way the weights are split, over ``fsdp``, and add them up
    on all devices, which moves more. Stacked layers are gathered one at a time. Gradients come back as they lie whole.
    """
    if mesh.shape.get("fsdp", 1) == 1:
        return model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = flatten_paths(placed(shapes, mesh, rules))

    def lay(path: str, weights: Any) -> Any:
        if path == ROWS:  # of the tokens that are a device's own
            return jax.lax.with_sharding_constraint(weights, over_batch(mesh))

        def one(below: Any, x: jax.Array) -> jax.Array:
            name = f"{path}/{path_name(below)}"
            spec, whole = places[name].sharding.spec, places[name].ndim
            axes = [*spec, *[None] * (whole - len(spec))][whole - x.ndim :]  # a layer has no first
            kept = (axis if axis == TENSOR else None for axis in axes)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*kept)))

        return jax.tree_util.tree_map_with_path(one, weights)

    def apply(variables, inputs, **options):
        params = variables["params"]
        # A decoder asks for its layers by itself, and its tables stay as they lie: nothing as long as a vocabulary
        # should be whole on a device.
        left = ("blocks", "embed", "head") if is_decoder(params) else ()
        params = {name: x if name in left else lay(f"params/{name}", x) for name, x in params.items()}
        before = LAYOUT.set(lay)
        try:
            return model.apply({**variables, "params": params}, inputs, **options)
        finally:
            LAYOUT.reset(before)

    return model._replace(apply=apply)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's share of a batch on its devices, as global arrays split over the mesh."""
    sharding = over_batch(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # it is asked for here, which JAX does not see over processes
        return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def abstract_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """What ``put_batch`` makes of a process's share of a batch, as shapes; of another ``size`` where that is given."""
    size, place = size or global_size(batch), over_batch(mesh)
    dtype = jax.dtypes.canonicalize_dtype
    return {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), dtype(x.dtype), sharding=place) for k, x in batch.items()}


def global_size(batch: Mapping[str, np.ndarray]) -> int:
    """How many examples all processes have together, of a process's share of a batch."""
    return len(next(iter(batch.values()))) * jax.process_count()


def to_host(tree: Any) -> Any:
    """A tree of whole arrays on the host, in every process, also of what is split over processes."""

    def fetch(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetch, tree)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1, what: str = "data.batch_size") -> None:
    """Raises a UserError where the mesh, times the parts of gradient accumulation, does not divide the global batch."""
    ways = batch_ways(mesh)
    if batch_size < 1 or batch_size % (ways * accumulate):
        parts = f" times train.accumulate={accumulate}" if accumulate > 1 else ""
        near = max(round(batch_size / (ways * accumulate)), 1) * ways * accumulate
        raise UserError(f"{what}={batch_size} is not divisible by the mesh's {ways} devices{parts}: try {near}.")


def _spec(tactic: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if tactic == "replicate" or math.prod(shape) < _SMALLEST_SHARDED:
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)
    _, number, _ = _TACTIC.fullmatch(tactic).groups()  # type: ignore[union-attr]
    theirs = None  # the dimension of the tensor axis; fsdp leaves it alone, whether or not the mesh splits it
    if number and -len(shape) <= int(number) < len(shape):
        theirs = int(number) % len(shape)
        ways = mesh.shape.get(TENSOR, 1)
        if ways > 1 and shape[theirs] % ways == 0:
            axes[theirs] = TENSOR
    ways = mesh.shape.get("fsdp", 1)
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0 and axis != theirs]
    if tactic.endswith("fsdp") and ways > 1 and divisible:
        axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)

"""The bundled classifiers as data: which parameters share a channel, for each family of models.

A :class:`Group` is a set of channels that can only go together, such as the filters of a convolution with their batch
normalisation and the inputs of what reads them; all layers that add to one residual stream are of one group. Whatever
cuts, scores or gates channels is then the same code for every family.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from flax import nnx

from kdjax.errors import UserError
from kdjax.model import Array, Variables, flatten_paths
from kdjax.models import MODELS
from kdjax.models.cnn import CNN
from kdjax.models.layers import attention, gelu
from kdjax.models.mlp import MLP
from kdjax.models.resnet import ResNet, WideResNet
from kdjax.models.vit import ViT

Shapes = Mapping[str, tuple[int, ...]]  # of parameters by path, such as "blocks/0/conv/kernel"
Options = Mapping[str, Any]


class Part(NamedTuple):
    """A module, or a parameter, by path; along its axis a group's channels lie ``repeat`` times, one block of places
    of equal size for each."""

    path: str
    repeat: int = 1


class Group(NamedTuple):
    """Channels that are cut alike.

    Attributes:
      name: of the group, such as ``"blocks.0"``; unlike all others of the model.
      key: what a user calls its size: ``"channels"``, ``"hidden"``, ``"heads"`` or ``"width"``.
      size: the number of channels, or of heads.
      writers: what makes or normalises the channels: they are the last axis of all its parameters.
      readers: what takes the channels in: they are the last axis but one of its kernel.
      taps: outputs of modules, and the function that makes of them the channels as they are read.
      multiple: of what the size must be.
    """

    name: str
    key: str
    size: int
    writers: tuple[Part, ...]
    readers: tuple[Part, ...] = ()
    taps: tuple[tuple[str, Callable[[Array], Array]], ...] = ()
    multiple: int = 1


class Family(NamedTuple):
    """What is known of the models of one class.

    Attributes:
      groups: ``groups(shapes, options) -> groups`` of a model of these parameters and complete options.
      stages: ``stages(options) -> counts`` of the blocks in each stretch of blocks that may lose some, first to last.
      sizes: ``sizes(shapes, options, stages) -> options`` that describe a model of these parameters, cut out of one of
        the complete ``options``, in which each stage has so many blocks.
    """

    groups: Callable[[Shapes, Options], list[Group]]
    stages: Callable[[Options], tuple[int, ...]]
    sizes: Callable[[Shapes, Options, tuple[int, ...]], dict[str, Any]]


class Span(NamedTuple):
    """Where a group's channels lie in a parameter: ``repeat`` times over along an axis, in equally many places each."""

    group: Group
    axis: int
    repeat: int


def family_of(name: str) -> Family:
    """The family of the bundled model ``name``; raises UserError where the model has none."""
    constructor = MODELS[name]
    family = FAMILIES.get(getattr(constructor, "func", constructor))
    if family is None:
        raise UserError(f"nothing is known of how to cut a model {name!r}: choose another, or add it to FAMILIES.")
    return family


def complete(name: str, options: Options) -> dict[str, Any]:
    """The options of the model ``name``, with those that its name stands for."""
    return {**getattr(MODELS[name], "keywords", {}), **options}


def spans_of(groups: Sequence[Group], variables: Variables) -> dict[str, list[Span]]:
    """By the path of a parameter or statistic, such as ``"params/blocks/0/conv/kernel"``."""
    writers, readers = (
        {part.path: (group, part.repeat) for group in groups for part in getattr(group, side)}
        for side in ("writers", "readers")
    )
    spans: dict[str, list[Span]] = {}
    for path in flatten_paths(variables):
        here = path.partition("/")[2]  # without "params" or "state"
        module, _, leaf = here.rpartition("/")
        spans[path] = [Span(group, -1, n) for group, n in (writers[p] for p in (here, module) if p in writers)]
        if leaf == "kernel" and module in readers:
            group, n = readers[module]
            spans[path].append(Span(group, -2, n))
    return spans


def _identity(x: Array) -> Array:
    return x


def _parts(*paths: str) -> tuple[Part, ...]:
    """Of paths, of which a model may lack some."""
    return tuple(map(Part, paths))


def _outputs(shapes: Shapes, path: str) -> int:
    return shapes[f"{path}/kernel"][-1]


def _count(shapes: Shapes, path: str) -> int:
    """How many members the list of modules at ``path`` has."""
    return len({p.removeprefix(f"{path}/").split("/")[0] for p in shapes if p.startswith(f"{path}/")})


def _blocks(shapes: Shapes) -> range:
    return range(_count(shapes, "blocks"))


def _mlp_groups(shapes: Shapes, options: Options) -> list[Group]:
    layers = [*(f"blocks/{i}" for i in _blocks(shapes)), "head"]
    return [
        Group(
            name := path.replace("/", "."),
            "hidden",
            _outputs(shapes, path),
            writers=_parts(path),
            readers=_parts(after),
            taps=((name, nnx.relu),),
        )
        for path, after in pairwise(layers)
    ]


def _mlp_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    return {"hidden": tuple(_outputs(shapes, f"blocks/{i}") for i in _blocks(shapes))}


def _cnn_groups(shapes: Shapes, options: Options) -> list[Group]:
    dense = "dense/kernel" in shapes
    readers = [Part(f"blocks/{i}/conv") for i in _blocks(shapes)[1:]]
    if dense:  # reads the flattened image: all channels of its first pixel, then of the next
        channels = _outputs(shapes, f"blocks/{_blocks(shapes)[-1]}/conv")
        readers.append(Part("dense", repeat=shapes["dense/kernel"][0] // channels))
    else:
        readers.append(Part("head"))
    groups = [
        Group(
            f"blocks.{i}",
            "channels",
            _outputs(shapes, f"blocks/{i}/conv"),
            writers=_parts(f"blocks/{i}/conv", f"blocks/{i}/norm"),
            readers=(reader,),
            taps=((f"blocks.{i}", _identity),),
        )
        for i, reader in enumerate(readers)
    ]
    if dense:
        size = _outputs(shapes, "dense")
        groups.append(Group("dense", "hidden", size, _parts("dense"), _parts("head"), (("dense", nnx.relu),)))
    return groups


def _cnn_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    widths = tuple(_outputs(shapes, f"blocks/{i}/conv") for i in _blocks(shapes))
    return {"widths": widths} | ({"dense": _outputs(shapes, "dense")} if "dense/kernel" in shapes else {})


def _residual_groups(shapes: Shapes, options: Options, *, wide: bool) -> list[Group]:
    """Of residual networks: one stream until a shortcut projects to the next, and what lies inside the blocks.

    In a wide block ``norms/i`` stands before ``convs/i``, in any other behind it. Paths that this leads to and that a
    model does not have, as a norm behind the last convolution of a wide block, stand for nothing.
    """
    streams = [Group("stem", "width", _outputs(shapes, "stem"), _parts("stem", "stem_norm"))]
    inner = []
    if not wide:
        streams[0] = streams[0]._replace(taps=(("stem_norm", nnx.relu),))
    for i in _blocks(shapes):
        block, name = f"blocks/{i}", f"blocks.{i}"
        last = _count(shapes, f"{block}/convs") - 1
        norm = [f"norms/{j + wide}" for j in range(last + 1)]  # of the outputs of convolution j
        for j in range(last):
            inner.append(
                Group(
                    f"{name}.convs.{j}",
                    "channels",
                    _outputs(shapes, f"{block}/convs/{j}"),
                    writers=_parts(f"{block}/convs/{j}", f"{block}/{norm[j]}"),
                    readers=_parts(f"{block}/convs/{j + 1}"),
                    taps=((f"{name}.{norm[j].replace('/', '.')}", nnx.relu),),
                )
            )
        streams[-1] = _joined(
            streams[-1],
            writers=_parts(f"{block}/norms/0") if wide else (),
            readers=_parts(f"{block}/convs/0", f"{block}/shortcut"),
            taps=((f"{name}.norms.0", nnx.relu),) if wide else (),
        )
        if f"{block}/shortcut/kernel" in shapes:
            size = _outputs(shapes, f"{block}/shortcut")
            streams.append(Group(f"{name}.shortcut", "width", size, (), multiple=4 if options.get("bottleneck") else 1))
        streams[-1] = _joined(
            streams[-1],
            writers=_parts(
                f"{block}/convs/{last}", f"{block}/{norm[last]}", f"{block}/shortcut", f"{block}/shortcut_norm"
            ),
            taps=() if wide else ((name, _identity),),
        )
    streams[-1] = _joined(
        streams[-1], writers=_parts("norm"), readers=_parts("head"), taps=(("norm", nnx.relu),) if wide else ()
    )
    return streams + inner


def _joined(group: Group, **more: tuple) -> Group:
    return group._replace(**{field: getattr(group, field) + values for field, values in more.items()})


def _residual_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    """Channels of the stem and of each stage, and those inside a stage's blocks."""
    first = [f"blocks/{start}/convs" for start in accumulate((0, *stages[:-1]))]  # of each stage
    last, times = (2, 4) if options.get("bottleneck") else (1, 1)
    return {
        "widths": (_outputs(shapes, "stem"), *(_outputs(shapes, f"{path}/{last}") // times for path in first)),
        "inner": tuple(_outputs(shapes, f"{path}/0") for path in first),
    }


def _resnet_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    return {"stages": stages, **_residual_sizes(shapes, options, stages)}


def _wide_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    return {"depth": 6 * stages[0] + 4, **_residual_sizes(shapes, options, stages)}


def _vit_groups(shapes: Shapes, options: Options) -> list[Group]:
    heads = options["heads"]
    blocks = [(f"blocks/{i}", f"blocks.{i}") for i in _blocks(shapes)]

    def of_all(*ends: str) -> tuple[Part, ...]:
        return _parts(*(f"{path}/{end}" for path, _ in blocks for end in ends))

    width = Group(
        "width",
        "width",
        _outputs(shapes, "embed"),
        writers=(
            *_parts("embed", "class_token", "positions", "norm"),
            *of_all("norm1", "attention/out", "norm2", "feedforward/down"),
        ),
        readers=(*of_all("attention/qkv", "feedforward/up"), Part("head")),
        taps=(
            *((f"{name}.{norm}", _identity) for _, name in blocks for norm in ("norm1", "norm2")),
            ("norm", _identity),
        ),
    )
    groups = [width]
    for path, name in blocks:
        qkv, up = f"{path}/attention/qkv", f"{path}/feedforward/up"
        groups += [
            Group(
                f"{name}.attention",
                "heads",
                heads,
                writers=(Part(qkv, repeat=3),),
                readers=_parts(f"{path}/attention/out"),
                taps=((f"{name}.attention.qkv", partial(attention, heads=heads)),),
            ),
            Group(
                f"{name}.feedforward",
                "hidden",
                _outputs(shapes, up),
                writers=_parts(up),
                readers=_parts(f"{path}/feedforward/down"),
                taps=((f"{name}.feedforward.up", gelu),),
            ),
        ]
    return groups


def _vit_sizes(shapes: Shapes, options: Options, stages: tuple[int, ...]) -> dict[str, Any]:
    head_width = options.get("head_width") or options["width"] // options["heads"]
    return {
        "width": _outputs(shapes, "embed"),
        "depth": stages[0],
        "heads": _outputs(shapes, "blocks/0/attention/qkv") // (3 * head_width),
        "head_width": head_width,
        "hidden": _outputs(shapes, "blocks/0/feedforward/up"),
    }


FAMILIES: dict[Any, Family] = {
    MLP: Family(_mlp_groups, lambda options: (), _mlp_sizes),
    CNN: Family(_cnn_groups, lambda options: (), _cnn_sizes),
    ResNet: Family(partial(_residual_groups, wide=False), lambda options: tuple(options["stages"]), _resnet_sizes),
    WideResNet: Family(
        partial(_residual_groups, wide=True), lambda options: ((options["depth"] - 4) // 6,) * 3, _wide_sizes
    ),
    ViT: Family(_vit_groups, lambda options: (options["depth"],), _vit_sizes),
}

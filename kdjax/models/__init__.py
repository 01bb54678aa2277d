"""The bundled classifiers, Flax NNX modules: images [b, h, w, c] to float32 logits [b, classes].

``model.train()`` and ``model.eval()`` switch batch statistics and dropout. Every residual or hidden block is
``blocks.<i>``, which is its name as a tap.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kdjax.errors import UserError, unknown
from kdjax.models.cnn import CNN
from kdjax.models.mlp import MLP
from kdjax.models.resnet import ResNet, WideResNet
from kdjax.models.vit import ViT

THIN, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)  # stem and stages of the CIFAR networks, plain and "x4"
IMAGENET = (64, 64, 128, 256, 512)


def _cifar(depth: int, widths: tuple[int, ...] = THIN) -> Callable[..., nnx.Module]:
    return partial(ResNet, stages=((depth - 2) // 6,) * 3, widths=widths)


def _imagenet(*stages: int, bottleneck: bool = False) -> Callable[..., nnx.Module]:
    return partial(ResNet, stages=stages, widths=IMAGENET, bottleneck=bottleneck, large_stem=True)


MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet8": _cifar(8),
    "resnet14": _cifar(14),
    "resnet20": _cifar(20),
    "resnet32": _cifar(32),
    "resnet44": _cifar(44),
    "resnet56": _cifar(56),
    "resnet110": _cifar(110),
    "resnet8x4": _cifar(8, WIDE),
    "resnet32x4": _cifar(32, WIDE),
    "wrn_16_1": partial(WideResNet, depth=16, widen=1),
    "wrn_16_2": partial(WideResNet, depth=16, widen=2),
    "wrn_40_1": partial(WideResNet, depth=40, widen=1),
    "wrn_40_2": partial(WideResNet, depth=40, widen=2),
    "resnet18": _imagenet(2, 2, 2, 2),
    "resnet34": _imagenet(3, 4, 6, 3),
    "resnet50": _imagenet(3, 4, 6, 3, bottleneck=True),
    "vit_ti": partial(ViT, width=192, depth=12, heads=3),
    "vit_s": partial(ViT, width=384, depth=12, heads=6),
    "vit_b": partial(ViT, width=768, depth=12, heads=12),
}


def _options(constructor: Callable[..., nnx.Module]) -> set[str]:
    module = constructor.func if isinstance(constructor, partial) else constructor
    parameters = inspect.signature(module.__init__).parameters  # type: ignore[misc]
    return set(parameters) - {"self", "classes", "input_shape", "rngs", "dtype"}


def heads(name: str, options: Mapping[str, Any]) -> int:
    """How many attention heads the model ``name`` has; 0 where it has no attention."""
    defaults = getattr(MODELS[name], "keywords", {})
    return int(options.get("heads", defaults.get("heads", 0)))


def build(
    name: str,
    *,
    classes: int,
    input_shape: tuple[int, int, int],
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    **options: Any,
) -> nnx.Module:
    """Build the model ``name`` of ``MODELS`` with float32 parameters.

    ``input_shape`` is (height, width, channels) of one image; ``dtype`` is what the model computes in; ``options`` are
    the constructor's own keywords, such as ``patch`` of a ViT. Raises UserError for an unknown model or option and for
    an image that the model cannot take, before any parameter is made.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    valid = _options(MODELS[name])
    for option in options:
        if option not in valid:
            raise unknown(f"option of model {name!r}", option, valid)
    if len(input_shape) != 3:
        raise UserError(f"model {name!r} takes images [height, width, channels], not of shape {tuple(input_shape)}.")
    if classes < 2:
        raise UserError(f"model {name!r} needs at least 2 classes, not {classes}.")
    return MODELS[name](classes=classes, input_shape=tuple(input_shape), rngs=rngs, dtype=dtype, **options)

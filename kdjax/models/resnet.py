"""Residual networks: CIFAR (post-activation and wide) and ImageNet.

He et al. 2016, "Deep residual learning for image recognition"; He et al. 2016, "Identity mappings in deep residual
networks" and Zagoruyko & Komodakis 2016, "Wide residual networks" for the pre-activation ones. The CIFAR networks have
the projection shortcuts of the distillation literature (Tian et al. 2020, RepDistiller), the ImageNet ones are those of
torchvision (the stride is in the 3 x 3 convolution of a bottleneck, "v1.5").
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import UserError
from kdjax.models.layers import BatchNorm, check_image, classifier, conv

Array = jax.Array


class Block(nnx.Module):
    """relu(residual(x) + shortcut(x)).

    The residual branch is two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 (``bottleneck``), with ``inner`` channels
    between them.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        *,
        stride: int,
        bottleneck: bool,
        zero_init: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        # (channels out, kernel size, stride) of each convolution
        plan = (
            [(inner, 1, 1), (inner, 3, stride), (outputs, 1, 1)]
            if bottleneck
            else [(inner, 3, stride), (outputs, 3, 1)]
        )
        last_scale = nnx.initializers.zeros if zero_init else nnx.initializers.ones
        self.convs: nnx.List[nnx.Conv] = nnx.List()
        self.norms: nnx.List[BatchNorm] = nnx.List()
        channels = inputs
        for i, (out, size, step) in enumerate(plan):
            self.convs.append(conv(channels, out, size=size, stride=step, dtype=dtype, rngs=rngs))
            scale_init = last_scale if i == len(plan) - 1 else nnx.initializers.ones
            self.norms.append(BatchNorm(out, scale_init=scale_init, rngs=rngs))
            channels = out
        projects = stride != 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, size=1, stride=stride, dtype=dtype, rngs=rngs) if projects else None
        self.shortcut_norm = BatchNorm(outputs, rngs=rngs) if projects else None

    def __call__(self, x: Array) -> Array:
        """[b, h, w, inputs] to [b, h / stride, w / stride, outputs]."""
        y = x
        for i, (convolve, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(convolve(nnx.relu(y) if i else y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.shortcut and self.shortcut_norm else x))


class ResNet(nnx.Module):
    """A post-activation residual network; ``blocks.i`` counts the blocks of all stages in one sequence.

    ``stages``: blocks in each stage; ``widths``: channels of the stem, then of each stage, of which the blocks of a
    ``bottleneck`` network put out four times as many; ``inner``: channels between a block's convolutions, for each
    stage (none given: its width); every stage but the first halves the image. ``large_stem``: the 7 x 7 stem of stride
    2 with a 3 x 3 max pool (ImageNet), else 3 x 3 (CIFAR). ``zero_init`` starts every block as the identity (last scale
    0; Goyal et al. 2017, section 5.1).
    """

    def __init__(
        self,
        *,
        classes: int,
        input_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        stages: Sequence[int],
        widths: Sequence[int],
        inner: Sequence[int] = (),
        bottleneck: bool = False,
        large_stem: bool = False,
        zero_init: bool = False,
    ):
        if len(widths) != len(stages) + 1:
            raise UserError(
                f"a ResNet of {len(stages)} stages needs {len(stages) + 1} widths (stem, stages), not {len(widths)}."
            )
        inner = _inner("a ResNet", inner, widths)
        check_image("this ResNet", input_shape, 2 ** (len(stages) - 1) * (4 if large_stem else 1))
        self.large_stem = large_stem
        channels = widths[0]
        size, stride = (7, 2) if large_stem else (3, 1)
        self.stem = conv(input_shape[-1], channels, size=size, stride=stride, dtype=dtype, rngs=rngs)
        self.stem_norm = BatchNorm(channels, rngs=rngs)
        self.blocks: nnx.List[Block] = nnx.List()
        common: dict[str, Any] = {"bottleneck": bottleneck, "zero_init": zero_init, "dtype": dtype, "rngs": rngs}
        for stage, (count, between, width) in enumerate(zip(stages, inner, widths[1:], strict=True)):
            outputs = 4 * width if bottleneck else width
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.blocks.append(Block(channels, between, outputs, stride=stride, **common))
                channels = outputs
        self.head = classifier(channels, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] to float32 logits [b, classes]."""
        x = nnx.relu(self.stem_norm(self.stem(x)))
        if self.large_stem:
            # Padded by hand, as a converter to ONNX leaves out a pool's own padding; nothing lies below 0 after a ReLU.
            x = nnx.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), window_shape=(3, 3), strides=(2, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class WideBlock(nnx.Module):
    """x + convolutions of its normalised ReLU (pre-activation); a projection reads the activated input."""

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int, dtype: Any, rngs: nnx.Rngs):
        self.norms = nnx.List([BatchNorm(inputs, rngs=rngs), BatchNorm(inner, rngs=rngs)])
        self.convs = nnx.List(
            [
                conv(inputs, inner, stride=stride, dtype=dtype, rngs=rngs),
                conv(inner, outputs, dtype=dtype, rngs=rngs),
            ]
        )
        projects = stride != 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, size=1, stride=stride, dtype=dtype, rngs=rngs) if projects else None

    def __call__(self, x: Array) -> Array:
        """[b, h, w, inputs] to [b, h / stride, w / stride, outputs]."""
        active = nnx.relu(self.norms[0](x))
        y = self.convs[1](nnx.relu(self.norms[1](self.convs[0](active))))
        return y + (self.shortcut(active) if self.shortcut else x)


class WideResNet(nnx.Module):
    """A pre-activation ResNet for small images: depth 6n + 4, three stages of widths 16, 32, 64 times ``widen``.

    ``widths``, channels of the stem and of each stage, stand in for ``widen``; ``inner``: channels between a block's
    convolutions, for each stage (none given: its width).
    """

    def __init__(
        self,
        *,
        classes: int,
        input_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        depth: int,
        widen: int,
        widths: Sequence[int] = (),
        inner: Sequence[int] = (),
    ):
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"a wide ResNet cannot have depth {depth}: it must be 6n + 4, such as 16, 28 or 40.")
        check_image("this wide ResNet", input_shape, 4)
        widths = widths or (16, 16 * widen, 32 * widen, 64 * widen)
        if len(widths) != 4:
            raise UserError(f"a wide ResNet needs 4 widths (stem, three stages), not {len(widths)}.")
        inner = _inner("a wide ResNet", inner, widths)
        channels = widths[0]
        self.stem = conv(input_shape[-1], channels, dtype=dtype, rngs=rngs)
        self.blocks: nnx.List[WideBlock] = nnx.List()
        for stage, (between, width) in enumerate(zip(inner, widths[1:], strict=True)):
            for i in range((depth - 4) // 6):
                stride = 2 if stage and not i else 1
                self.blocks.append(WideBlock(channels, between, width, stride=stride, dtype=dtype, rngs=rngs))
                channels = width
        self.norm = BatchNorm(channels, rngs=rngs)
        self.head = classifier(channels, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] to float32 logits [b, classes]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x))
        return self.head(x.mean(axis=(1, 2)))


def _inner(model: str, inner: Sequence[int], widths: Sequence[int]) -> Sequence[int]:
    """Channels between a block's convolutions, one for each stage of ``widths`` (stem, stages)."""
    stages = widths[1:]
    if inner and len(inner) != len(stages):
        raise UserError(f"{model} of {len(stages)} stages needs {len(stages)} inner channel counts, not {len(inner)}.")
    return inner or stages

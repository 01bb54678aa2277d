"""Vision transformers: Dosovitskiy et al. 2021, "An image is worth 16 x 16 words"; sizes of Touvron et al. 2021."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import UserError
from kdjax.models.layers import LayerNorm, attention, classifier, dense, dropout_layer, gelu, narrow

Array = jax.Array


class Attention(nnx.Module):
    """Multi-head self-attention; ``qkv`` is one dense layer whose outputs are ordered (q, k, v), head, width."""

    def __init__(self, width: int, heads: int, head_width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = dense(width, 3 * heads * head_width, dtype=dtype, rngs=rngs)
        self.out = dense(heads * head_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Tokens [b, t, width] to [b, t, width]."""
        return self.out(attention(self.qkv(x), self.heads))


class Feedforward(nnx.Module):
    """Two dense layers with the exact GELU (erf) between them."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.up = dense(width, hidden, dtype=dtype, rngs=rngs)
        self.down = dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Tokens [b, t, width] to [b, t, width]."""
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(
        self, width: int, heads: int, head_width: int, hidden: int, *, dropout: float, dtype: Any, rngs: nnx.Rngs
    ):
        self.norm1 = LayerNorm(width)
        self.attention = Attention(width, heads, head_width, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width)
        self.feedforward = Feedforward(width, hidden, dtype=dtype, rngs=rngs)
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, x: Array) -> Array:
        """Tokens [b, t, width] to [b, t, width]."""
        drop = self.dropout or (lambda y: y)
        x = x + drop(self.attention(self.norm1(x)))
        return x + drop(self.feedforward(self.norm2(x)))


class ViT(nnx.Module):
    """A vision transformer with a class token and learned positions.

    Options: ``patch`` (pixels a side), ``width``, ``depth`` (blocks), ``heads``, ``head_width`` (0: ``width / heads``),
    ``mlp_ratio`` (hidden units of the feedforward over ``width``), ``hidden`` (their number, if not 0, instead),
    ``dropout`` (of the embedding and of every residual branch).
    """

    def __init__(
        self,
        *,
        classes: int,
        input_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        patch: int = 16,
        width: int,
        depth: int,
        heads: int,
        head_width: int = 0,
        mlp_ratio: float = 4.0,
        hidden: int = 0,
        dropout: float = 0.0,
    ):
        rows, columns, channels = input_shape
        if rows % patch or columns % patch:
            raise UserError(
                f"a ViT with patches of {patch} x {patch} cannot take images of {rows} x {columns} pixels: "
                "choose a patch that divides both sides."
            )
        if not head_width and width % heads:
            raise UserError(
                f"a ViT of width {width} cannot have {heads} heads: the heads must divide the width, or have a "
                "head_width of their own."
            )
        head_width, hidden = head_width or width // heads, hidden or int(width * mlp_ratio)
        tokens = rows * columns // patch**2
        self.patch = patch
        self.embed = nnx.Linear(patch * patch * channels, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(narrow(rngs.params(), (1, tokens + 1, width), jnp.float32))
        self.dropout = dropout_layer(dropout, rngs)
        self.blocks = nnx.List(
            Block(width, heads, head_width, hidden, dropout=dropout, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.head = classifier(width, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] to float32 logits [b, classes]."""
        x = self.embed(patches(x, self.patch))
        batch, _, width = x.shape
        class_token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (batch, 1, width))
        x = jnp.concatenate([class_token, x], axis=1) + self.positions[...].astype(x.dtype)
        x = self.dropout(x) if self.dropout else x
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def patches(images: Array, patch: int) -> Array:
    """Cut [b, h, w, c] into [b, (h / patch) (w / patch), patch * patch * c]: a strided convolution as one matmul."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)

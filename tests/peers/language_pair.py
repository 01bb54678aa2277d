"""Pairs of small Qwen2 models, and kdjax's side of them."""

import contextlib
import tempfile
from typing import NamedTuple

import kdjax_step
import numpy as np
from alternate import Side


class Pair(NamedTuple):
    """A teacher and a student, each (width, layers).

    The loss is temperature² KL weighed by ``soft`` and cross-entropy weighed by the rest, mean over tokens.
    """

    teacher: tuple[int, int]
    student: tuple[int, int]
    temperature: float
    soft: float
    head_dim: int = 64
    batch: int = 4
    tokens: int = 128  # that are predicted; a window has one more
    vocabulary: int = 8192


_SMALL = {"teacher": (512, 6), "student": (256, 4)}
_TINY = {"teacher": (64, 2), "student": (32, 1), "head_dim": 8, "batch": 2, "tokens": 12, "vocabulary": 61}
PAIRS = {
    "qwen2": Pair(**_SMALL, temperature=2.0, soft=0.5),
    "qwen2_kl": Pair(**_SMALL, temperature=1.0, soft=1.0),
    "tiny_qwen2": Pair(**_TINY, temperature=2.0, soft=0.5),
    "tiny_qwen2_kl": Pair(**_TINY, temperature=1.0, soft=1.0),
}
RATE = 1e-3
ADAMW = {"eps": 1e-8, "weight_decay": 0.0}  # optax and PyTorch agree on the rest
BATCHES = 4


def windows(pair):
    """The batches that all sides walk over: int32 tokens [b, t + 1]."""
    rng = np.random.default_rng(0)
    shape = (pair.batch, pair.tokens + 1)
    return [rng.integers(0, pair.vocabulary, shape).astype(np.int32) for _ in range(BATCHES)]


def sizes(pair, width, layers):
    """The kdjax.models.decoder.DecoderConfig of one of the pair's models."""
    from kdjax.models.decoder import DecoderConfig

    return DecoderConfig(
        vocabulary=pair.vocabulary,
        width=width,
        layers=layers,
        heads=width // pair.head_dim,
        kv_heads=width // pair.head_dim // 2,
        head_dim=pair.head_dim,
        mlp_width=3 * width,
        context=pair.tokens + 1,
        qkv_bias=True,
        tied=True,
    )


def kdjax_side(pair):
    """kdjax's step, with segments and positions as its language task gives them; the weights are (teacher, student)."""
    import jax
    import jax.numpy as jnp
    import optax

    from kdjax.models.decoder import make_decoder
    from kdjax.objective import Setting
    from kdjax.tasks import language

    models = [make_decoder(sizes(pair, *size)) for size in (pair.teacher, pair.student)]
    rng = np.random.default_rng(1)
    # Every leaf away from its initial value, so that no two can be swapped unseen, and the models disagree.
    moved = lambda leaf: leaf + rng.normal(0, 0.03, leaf.shape).astype(np.float32)
    weights = [jax.tree.map(moved, model.init(jax.random.key(i))) for i, model in enumerate(models)]
    batches = []
    for tokens in map(jnp.asarray, windows(pair)):
        segments = jnp.ones((pair.batch, pair.tokens), jnp.int32)  # a document a window, without padding
        inputs = {"tokens": tokens[:, :-1], "segments": segments, "positions": language.positions_of(segments)}
        batches.append({"inputs": inputs, "labels": tokens[:, 1:], "mask": segments.astype(jnp.float32)})
    terms = {"kl": {"weight": pair.soft, "temperature": pair.temperature}, "ce": {"weight": 1 - pair.soft}}
    setting = Setting(classes=pair.vocabulary, sequences=True)
    step = kdjax_step.make(*models, terms, optax.adamw(RATE, **ADAMW), *weights, batches, setting)
    return Side(step, jax.tree.map(np.asarray, weights))


@contextlib.contextmanager
def folders(pair, weights):
    """The folders of teacher and student in Hugging Face's layout, for as long as it takes to read them."""
    from kdjax import huggingface

    with tempfile.TemporaryDirectory() as scratch:
        names = [f"{scratch}/teacher", f"{scratch}/student"]
        for name, size, variables in zip(names, (pair.teacher, pair.student), weights, strict=True):
            huggingface.save(name, variables, sizes(pair, *size))
        yield names

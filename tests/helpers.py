"""What several tests share: small real models, batches of real digits, and a config that is done in seconds."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from kdjax import config as configs
from kdjax.data import sources
from kdjax.model import Model, from_nnx


class Small(nnx.Module):
    """Two dense layers, optionally with batch normalisation and dropout, over flattened images."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, features: int = 64, classes: int = 10, norm=False, dropout=0.0):
        self.hidden = nnx.Linear(features, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        x = self.norm(x) if self.norm else x
        return self.head(self.dropout(x) if self.dropout else x)


def small(width: int = 16, **options) -> Model:
    return from_nnx(lambda rngs: Small(width, rngs=rngs, **options))


@functools.cache
def digits() -> sources.Dataset:
    return sources.load({"name": "digits", "data_dir": "", "options": {}})


def batch(size: int = 32, start: int = 0) -> dict[str, np.ndarray]:
    """Real digits, as floats around 0."""
    inputs, labels = digits().train[:2]
    ids = np.arange(start, start + size, dtype=np.int32)
    x = inputs[ids].astype(np.float32)
    return {
        "inputs": (x - x.mean()) / x.std(),
        "labels": labels[ids].astype(np.int32),
        "id": ids,
        "epoch": np.zeros(size, np.int32),
    }


def tiny_config(**train):
    """The digits experiment with minute networks, a few dozen steps an arm, on one device."""
    config = configs.default()
    config.teacher.name, config.teacher.options, config.teacher.epochs = "mlp", {"hidden": (32,)}, 2
    config.student.name, config.student.options = "mlp", {"hidden": (8,)}
    config.train.update(epochs=2, **train)
    config.mesh.data = 1
    config.checkpoint.every = 10
    config.log.update(every=5, eval_every=20)
    return config


def equal_trees(a, b) -> bool:
    """Bit for bit."""
    same = jax.tree.map(lambda x, y: np.array_equal(_raw(x), _raw(y)), a, b)
    return jax.tree.all(same)


def _raw(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


LETTERS = "abcdefghijklmnopqrstuvwxyz .é漢\n"  # with characters of 1, 2 and 3 bytes


def letters_tokeniser(folder: Path, letters: str = LETTERS) -> Path:
    """A folder with a ``tokenizer.json`` in which each letter is a token; the last one ends a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokeniser = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokeniser.decoder = tokenizers.decoders.Fuse()
    tokeniser.add_special_tokens(["<end>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokeniser.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny_language_config(**train):
    """Some modules of Python as bytes, minute decoders, a few steps an arm, on one device."""
    config = configs.default()
    config.task = "language"
    config.data.update(
        name="stdlib", options={"modules": "a*.py"}, context=32, batch_size=8, eval_batch_size=256
    )
    sizes = {"width": 16, "heads": 2, "mlp_width": 32}
    config.teacher.update(name="decoder", epochs=0, steps=6)
    config.student.name = "decoder"
    config.teacher.options, config.student.options = {**sizes, "layers": 2}, {**sizes, "layers": 1}
    config.losses.kl.temperature = 1.0
    for part in (config, config.teacher):
        part.optimizer.learning_rate = 3e-3
    config.train.update(epochs=0, steps=6)
    config.train.update(train)
    config.mesh.data = 1
    config.checkpoint.every = 4
    config.log.update(every=1, eval_every=0, sample={"tokens": 8, "temperature": 0.7})
    return config

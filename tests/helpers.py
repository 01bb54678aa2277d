"""What several tests share: small real models, batches of real digits, and a config that is done in seconds."""

import functools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import config as configs
from kdjax import huggingface
from kdjax.data import sources
from kdjax.model import Model, from_nnx
from kdjax.models.decoder import DecoderConfig, make_decoder


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
WORDS = ("kleine", "modelle", "lernen", "漢é", "von", "ééé", "na\n", "漢", "x")


def letters_tokenizer(folder: Path, letters: str) -> Path:
    """A folder with a ``tokenizer.json`` in which each letter is a token; the last one ends a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny_language_config(**train):
    """Some modules of Python as bytes, minute decoders, a few steps an arm, on one device."""
    config = configs.default()
    config.task = "language"
    config.data.update(name="stdlib", options={"modules": "si*.py"}, context=32, batch_size=8, eval_batch_size=256)
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


def letters_config(folder: Path):
    """The same on words, whose tokens are the letters of a ``tokenizer.json`` in ``folder/tokenizer``: 33 ids."""
    letters_tokenizer(folder / "tokenizer", LETTERS + ";")
    rng = random.Random(1)
    for name, count in (("train", 800), ("test", 200)):
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(count)))
    config = tiny_language_config()
    config.data.update(name=f"text:{folder}/train.txt", tokenizer=str(folder / "tokenizer"))
    config.data.options = {"test": f"{folder}/test.txt"}
    return config


def decoder_folder(folder: Path, tokenizer: Path | None = None, *, seed: int = 0, dtype=jnp.float32, **sizes):
    """A decoder of random weights in the layout of Hugging Face, and its variables in ``dtype``, as they are kept."""
    tiny = {"vocabulary": 33, "width": 16, "layers": 1, "heads": 2, "head_dim": 8, "mlp_width": 32, "context": 32}
    tiny |= sizes
    config = DecoderConfig(**{"kv_heads": tiny["heads"], **tiny})
    variables = make_decoder(config).init(jax.random.key(seed))
    noise = lambda x: (x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)).astype(dtype)
    variables = jax.tree.map(noise, variables)
    huggingface.save(folder, variables, config, tokenizer_folder=tokenizer, dtype=dtype)
    return folder, variables

"""What several tests share: small real models, batches of real digits, and a config that is done in seconds."""

import functools

import jax
import numpy as np
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

"""Pairs of image classifiers, and kdjax's side of them."""

from typing import NamedTuple

import kdjax_step
import numpy as np
from alternate import Side


class Pair(NamedTuple):
    """A teacher and a student on square colour images; a model is (name, options) of kdjax.models.build."""

    teacher: tuple[str, dict]
    student: tuple[str, dict]
    batch: int
    image: int = 32
    classes: int = 100


def _vit(width, depth, heads):
    return ("vit_s", {"patch": 4, "width": width, "depth": depth, "heads": heads})


PAIRS = {
    "vit": Pair(_vit(384, 12, 6), _vit(192, 6, 3), batch=32),
    "resnet": Pair(("resnet56", {}), ("resnet20", {}), batch=64),
    "tiny_vit": Pair(_vit(48, 2, 3), _vit(24, 1, 2), batch=4, image=8, classes=10),
    "tiny_resnet": Pair(("resnet14", {}), ("resnet8", {}), batch=4, classes=10),
}
TEMPERATURE, SOFT, HARD, RATE, MOMENTUM = 4.0, 0.9, 0.1, 0.05, 0.9
BATCHES = 4


def batches(pair):
    """The batches that all sides walk over: float32 images [b, h, w, c] and int32 labels [b]."""
    rng = np.random.default_rng(0)
    shape = (pair.batch, pair.image, pair.image, 3)
    return [
        (rng.normal(size=shape).astype(np.float32), rng.integers(0, pair.classes, pair.batch).astype(np.int32))
        for _ in range(BATCHES)
    ]


def kdjax_side(pair):
    """kdjax's step; the weights are (teacher, student), flat dicts from path to array."""
    import jax
    import optax

    from kdjax.model import from_nnx
    from kdjax.models import build

    def model(name, options):
        shape = (pair.image, pair.image, 3)
        return from_nnx(lambda rngs: build(name, classes=pair.classes, input_shape=shape, rngs=rngs, **options))

    teacher, student = model(*pair.teacher), model(*pair.student)
    on_device = [jax.device_put({"inputs": x, "labels": y}) for x, y in batches(pair)]
    taught, learning = jax.jit(teacher.init)(jax.random.key(1)), jax.jit(student.init)(jax.random.key(2))
    warm = jax.jit(lambda v, x: {**v, "state": teacher.apply(v, x, train=True, key=jax.random.key(0))[1]})
    for i in range(40 if taught["state"] else 0):  # running statistics of a network in use, not 0 and 1
        taught = warm(taught, on_device[i % BATCHES]["inputs"])
    terms = {"kl": {"weight": SOFT, "temperature": TEMPERATURE}, "ce": {"weight": HARD}}
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    step = kdjax_step.make(teacher, student, terms, optimizer, taught, learning, on_device)
    return Side(step, (flatten(taught), flatten(learning)))


def flatten(variables):
    """{"params": nested, "state": nested} as one flat dict {"blocks.0.convs.0.kernel": array}."""
    import jax

    leaves = jax.tree.leaves_with_path([variables["params"], variables["state"]])
    return {".".join(str(key.key) for key in path[1:]): np.asarray(leaf) for path, leaf in leaves}

"""big_vision's distillation update (google-research/big_vision) on its ViT, from a clone of its repository.

Its file defines ``loss_fn`` and ``update_fn`` inside ``main``, after flags and a TensorFlow pipeline, and calls two
functions of JAX by names that JAX has since dropped. So both are compiled out of that file as they stand, with the
names that ``main`` gives them.
"""

import ast
import functools
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import kdjax_step
import numpy as np
from alternate import Side

FOLDER = "BIG_VISION"  # the environment variable that names the clone
SOURCE = "big_vision/trainers/proj/distill/distill.py"


class Pair(NamedTuple):
    """A teacher and a student, options of big_vision.models.vit; the loss is temperature² KL."""

    teacher: dict
    student: dict
    batch: int
    image: int = 32
    classes: int = 100


def _vit(width, depth, heads):
    sizes = {"width": width, "depth": depth, "num_heads": heads, "patch_size": (4, 4)}
    return sizes | {"pool_type": "tok", "head_zeroinit": False}


PAIRS = {
    "big_vision_vit": Pair(_vit(384, 12, 6), _vit(192, 6, 3), batch=32),
    "tiny_big_vision_vit": Pair(_vit(48, 2, 3), _vit(24, 1, 2), batch=4, image=8, classes=10),
}
TEMPERATURE, RATE, MOMENTUM = 4.0, 0.05, 0.9
BATCHES = 4


class _Repository(NamedTuple):
    distance: Any
    optax: Any
    utils: Any
    vit: Any


def _repository():
    """The modules of the clone."""
    sys.path.insert(0, os.environ[FOLDER])
    try:
        import big_vision.evaluators.proj.distill.distance as distance
        import big_vision.optax as bv_optax
        import big_vision.utils as utils
        from big_vision.models import vit
    finally:
        sys.path.remove(os.environ[FOLDER])
    return _Repository(distance, bv_optax, utils, vit)


def _models(pair):
    """big_vision's teacher and student by name."""
    make = functools.partial(_repository().vit.Model, num_classes=pair.classes)
    return {"teacher": make(**pair.teacher), "student": make(**pair.student)}


def _images(pair):
    """The batches that both sides walk over: float32 images [b, h, w, c]."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(pair.batch, pair.image, pair.image, 3)).astype(np.float32) for _ in range(BATCHES)]


def kdjax_side(pair):
    """kdjax's step around the same Linen modules; the weights are both models' parameters by name."""
    import jax
    import jax.numpy as jnp
    import optax

    from kdjax.model import Model, Outputs

    def adapted(module):
        def init(key):
            return {"params": module.init(key, jnp.zeros((1, pair.image, pair.image, 3)))["params"], "state": {}}

        def apply(variables, inputs, *, train, key=None, taps=()):
            return Outputs(module.apply({"params": variables["params"]}, inputs, train=train)[0]), {}

        return Model(init, apply)

    models = {name: adapted(module) for name, module in _models(pair).items()}
    weights = {name: jax.jit(model.init)(jax.random.key(i)) for i, (name, model) in enumerate(models.items())}
    batches = [{"inputs": jnp.asarray(x), "labels": jnp.full(pair.batch, -1)} for x in _images(pair)]
    terms = {"kl": {"weight": 1.0, "temperature": TEMPERATURE}}
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    step = kdjax_step.make(*models.values(), terms, optimizer, *weights.values(), batches)
    return Side(step, {name: jax.tree.map(np.asarray, one["params"]) for name, one in weights.items()})


def big_vision_side(pair, weights):
    """big_vision's update."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from ml_collections import ConfigDict

    found = _repository()
    config = ConfigDict({"teachers": ["teacher"], "distance": "kl", "distance_kw": {"t": TEMPERATURE}, "lr": RATE})
    config.update(
        {"optax_name": "trace", "optax": {"decay": MOMENTUM}, "schedule": {"decay_type": "stair"}}
    )  # constant
    params = jax.tree.map(jnp.asarray, weights)
    optimizer, _ = found.optax.make(config, params["student"], sched_kw={"total_steps": 10**6})
    names = {
        "jax": types.SimpleNamespace(**vars(jax), tree_map=jax.tree.map, tree_leaves=jax.tree.leaves),
        "jnp": jnp,
        "optax": optax,
        "functools": functools,
        "u": found.utils,
        "dd": found.distance,
        "bv_optax": found.optax,
        "config": config,
        "models": _models(pair),
        "tx": optimizer,
        "repl_sharding": NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec()),
    }
    path = Path(os.environ[FOLDER]) / SOURCE
    everything = ast.walk(ast.parse(path.read_text()))
    wanted = [node for node in everything if getattr(node, "name", "") in ("getfirst", "loss_fn", "update_fn")]
    exec(compile(ast.Module(wanted, type_ignores=[]), str(path), "exec"), names)
    state = params, optimizer.init(params["student"]), jax.random.PRNGKey(0)
    batches = itertools.cycle([{"image": jnp.asarray(x)} for x in _images(pair)])

    def step():
        nonlocal state
        *state, loss, _ = names["update_fn"](*state, next(batches))
        return float(loss)

    return Side(step)

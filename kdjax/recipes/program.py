"""The compiled step, as its compiler describes it: operations and memory, known before anything runs."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import build, sharding, train
from kdjax import experiment as experiments
from kdjax.experiment import Experiment
from kdjax.model import Variables
from kdjax.tasks import language


class Program(NamedTuple):
    """A compiled step as its compiler describes it; bytes are those of one device."""

    compiled: Any  # jax.stages.Compiled; returns (state, metrics as one array)
    flops: float  # of one step over all devices, each body of a loop counted once
    argument_bytes: int
    output_bytes: int  # without what takes the place of an argument
    temp_bytes: int

    @property
    def bytes(self) -> int:
        """All that the step needs at once on one device."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def compile_stage(experiment: Experiment, arm: train.Arm, stage: train.Stage, batch_size: int) -> Program:
    """Compiles a stage's step for a global batch of any size, as training would; takes no device memory."""
    mesh = experiment.mesh
    state = train.abstract_state(arm, mesh)
    raw = next(arm.batches(0))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype, sharding=sharding.over_batch(mesh))
        for name, value in raw.items()
    }
    whole = sharding.replicated(mesh)
    hparams = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=whole), stage.hparams)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled: Any
    compiled, _ = train.compile_step(stage.step, mesh, shardings, state, abstract_teachers(experiment), batch, hparams)
    memory = compiled.memory_analysis()
    return Program(
        compiled=compiled,
        flops=flops(compiled) * mesh.size,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


def in_one_part(experiment: Experiment) -> Experiment:
    """The same without gradient accumulation: XLA counts the body of a loop once, however often it runs."""
    config = ConfigDict(experiment.config.to_dict(), type_safe=False)
    config.train.accumulate = 1
    return build.prepare(config, experiment.source)


def abstract_teachers(experiment: Experiment) -> dict[str, Variables]:
    """The shapes, dtypes and shardings of all teachers' weights."""
    config = experiment.config
    shapes = {}
    for name, model in experiments.asked(experiment).items():
        shapes[name] = jax.eval_shape(model.init, jax.random.key(0))
        if language.is_folder(experiments.init_of(config, name)):  # loaded in the dtype of the computation
            cast = lambda x: jax.ShapeDtypeStruct(x.shape, config.train.dtype)
            shapes[name] = jax.tree.map(cast, shapes[name])
    placed = sharding.by_rules(shapes, experiment.mesh, config.sharding.teacher)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def flops(compiled: Any) -> float:
    """Floating-point operations of a compiled program on one device, as XLA's cost model counts them."""
    return float(compiled.cost_analysis()["flops"])


def memory_limit(device: jax.Device) -> tuple[int, str]:
    """Bytes that one device may use, and where the figure is from; a CPU's devices share the host's memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit), device.device_kind
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of the container, cgroup 2 and 1
        try:
            host = min(host, int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):
            continue
    return host // jax.local_device_count(), "host"


def bytes_per_device(tree: Any) -> int:
    """What a tree of arrays or shapes, with their shardings, takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

"""The compiled step, as its compiler describes it: operations and memory, known before anything runs."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from kdjax import advance, build, sharding, train
from kdjax import experiment as experiments
from kdjax.experiment import Experiment
from kdjax.model import Variables
from kdjax.tasks import language

# What JAX calls cuDNN's attention -> how many products it stands for.
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


class Program(NamedTuple):
    """A compiled step as its compiler describes it; bytes are those of one device."""

    compiled: Any  # jax.stages.Compiled; returns (state, metrics as one array)
    names: list[str]  # of the metrics
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
    batch = sharding.abstract_batch(next(arm.batches(0)), mesh, batch_size)
    whole = sharding.replicated(mesh)
    hparams = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=whole), stage.hparams)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled: Any
    compiled, names = advance.compile_step(
        stage.step, mesh, shardings, state, abstract_teachers(experiment), batch, hparams
    )
    memory = compiled.memory_analysis()
    return Program(
        compiled=compiled,
        names=names,
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
            floats = jax.eval_shape(experiments.model_of(experiment, name).init, jax.random.key(0))
            floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.train.dtype), floats)
            shapes[name] = jax.eval_shape(lambda x, name=name: experiments.stored(experiment, name, x), floats)
    return sharding.placed(shapes, experiment.mesh, config.sharding.teacher)


def flops(compiled: Any) -> float:
    """Floating-point operations of a compiled program on one device, as XLA's cost model counts them."""
    return float(compiled.cost_analysis()["flops"])


def bytes_accessed(compiled: Any) -> float:
    """Bytes that a compiled program's operations read and write on one device, as XLA's cost model counts them."""
    return float(compiled.cost_analysis()["bytes accessed"])


def products(function: Callable, *args: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of a function of arrays or shapes, over all
    devices.

    Counted in the traced program, the body of a loop as often as it runs, so that a decoder's layers and the chunks of
    its loss all count. A product of [m, k] and [k, n] is 2 m k n; a convolution counts what meets an element of its
    input, not padding, as XLA does. cuDNN's attention counts as the products that it stands for, two forward and four
    back, all pairs of tokens in them. All other operations are left out; of a branch the longer one counts.
    """
    return _products(jax.make_jaxpr(function)(*args).jaxpr)


def _products(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shape = lambda variables: variables[0].aval.shape
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shared = math.prod(shape(equation.invars)[axis] for axis in contracted)
            total += 2.0 * math.prod(shape(equation.outvars)) * shared
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name in _ATTENTION:
            (batch, queries, heads, width), keys = shape(equation.invars), shape(equation.invars[1:])[1]
            total += _ATTENTION[name] * 2.0 * batch * heads * queries * keys * width
        elif inner := [_products(one) for one in _inner(params)]:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an operation runs, such as the body of a loop."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _convolution(equation: Any) -> float:
    params, (image, kernel) = equation.params, (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    images, kernels, outs = params["dimension_numbers"]
    met = 1
    for number, (low, _) in enumerate(params["padding"]):
        places = np.arange(out[outs[2 + number]])[:, None] * params["window_strides"][number]
        places = places + np.arange(kernel[kernels[2 + number]])[None] * params["rhs_dilation"][number] - low
        apart = params["lhs_dilation"][number]
        last = (image[images[2 + number]] - 1) * apart
        met *= int(np.sum((places >= 0) & (places <= last) & (places % apart == 0)))
    return 2.0 * out[outs[0]] * out[outs[1]] * kernel[kernels[1]] * met

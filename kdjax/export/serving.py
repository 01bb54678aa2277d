"""What is exported: one pure function from the data set's own values to logits, with its weights inside.

It is the student alone, at T = 1: plain logits, no teacher, no projectors. Normalisation is part of it, so that whoever
serves it needs no constants.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax.compress import quantise as quantisation
from kdjax.experiment import Experiment
from kdjax.model import Array, Model, Variables, flatten_paths, logits_of
from kdjax.models.decoder import make_decoder
from kdjax.tasks import classification, language


class Serving(NamedTuple):
    """A model as it is served.

    Attributes:
      function: raw inputs -> float32 logits, with float32 weights closed over as NumPy arrays and without fake
        quantisation.
      reference: what an export is held against: ``function``, or, of a student that was trained with quantisation, the
        same with the rounding in it.
      input_name: ``"images"`` or ``"tokens"``.
      input_shape: such as ``("batch", 28, 28, 1)`` or ``("batch", "length")``; a name is a dimension left free.
      input_dtype: the data set's own, such as ``"uint8"``; ``"int32"`` of tokens.
      output_shape: ``("batch", classes)`` or ``("batch", "length", vocabulary)``.
      params: the parameters by path, float32, as they were trained.
      quantise: the rule that the student was trained with (see ``compress.quantise``); None for none.
    """

    function: Callable[[Array], Array]
    reference: Callable[[Array], Array]
    input_name: str
    input_shape: tuple[str | int, ...]
    input_dtype: str
    output_shape: tuple[str | int, ...]
    params: dict[str, np.ndarray]
    quantise: dict[str, Any] | None


def make_serving(
    experiment: Experiment,
    model: Model,
    variables: Variables,
    part: ConfigDict,
    quantise: Mapping[str, Any] | None = None,
    trained: Model | None = None,
) -> Serving:
    """The function that an arm of an experiment is served as.

    Args:
      experiment: whose data and task it was trained on.
      model: the arm's, without fake quantisation, computing in float32.
      variables: its weights, of any float dtype, on host or device.
      part: the config of the model, such as ``config.student``; a decoder is built from it once more, in the form that
        converters take, and without the rows that only pad its tables.
      quantise: the rule that the weights were trained with.
      trained: the model as it was trained, where that is more than ``model`` with the rule's rounded weights, because
        its activations are rounded too.
    """
    variables = jax.tree.map(_float32, jax.device_get(dict(variables)))
    if experiment.task is language:
        model, variables = _decoder(experiment, variables, part)
        name, shape, dtype = "tokens", ("batch", "length"), "int32"
        output: tuple[str | int, ...] = ("batch", "length", experiment.classes)
        prepare = lambda tokens: tokens
    else:
        images = experiment.dataset.train.inputs
        name, shape, dtype = "images", ("batch", *images.shape[1:]), images.dtype.name
        output = ("batch", experiment.classes)
        prepare = _make_normalise(experiment.dataset)

    def served(model: Model) -> Callable[[Array], Array]:
        return lambda raw: logits_of(model.apply(variables, prepare(raw), train=False)[0]).astype(jnp.float32)

    function = served(model)
    reference = function if quantise is None else served(trained or quantisation.fake_quantised(model, quantise))
    rule = None if quantise is None else dict(quantise)
    return Serving(function, reference, name, shape, dtype, output, flatten_paths(variables["params"]), rule)


def _float32(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _decoder(experiment: Experiment, variables: Variables, part: ConfigDict) -> tuple[Model, Variables]:
    sizes = language.decoder_config(experiment.config, part, experiment.dataset)
    sizes = sizes._replace(vocabulary=experiment.classes)
    tables = {
        name: jax.tree.map(lambda table: table[: experiment.classes], variables["params"][name])
        for name in ("embed", "head")
        if name in variables["params"]
    }
    return make_decoder(sizes, unrolled=True), {**variables, "params": {**variables["params"], **tables}}


def _make_normalise(dataset: classification.sources.Dataset) -> Callable[[Array], Array]:
    """``classification.make_normalise`` as one product and one sum per value, float32.

    A runtime takes a microsecond and more for every operation on a small image; a scalar of fewer dimensions than the
    image costs onnxruntime ten times as much as this [1, 1, 1, c].
    """
    whole = 255.0 if dataset.train.inputs.dtype == np.uint8 else 1.0
    mean, std = (np.asarray(values, np.float64)[None, None, None] for values in (dataset.mean, dataset.std))
    scale, shift = (1 / (whole * std)).astype(np.float32), (-mean / std).astype(np.float32)
    return lambda images: images.astype(jnp.float32) * scale + shift

"""SimKD: a student that ends in its teacher's own classifier.

The student's backbone, a learned projector of its pooled last block to the width of the teacher's, and the teacher's
classifier, frozen (Chen et al. 2022, "Knowledge distillation with the reused teacher classifier", section 3). Unlike
the projectors of loss terms, this one is part of the student by design: projector and classifier are handed over with
it, and it needs nothing of the teacher's any more. The authors project images by three convolutions before pooling;
here a hidden layer projects the pooled feature, so that student and teacher may be of any kind.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import sharding
from kdjax.errors import UserError
from kdjax.losses import projectors
from kdjax.model import EVERY, Array, Model, Outputs, Params, Variables, tap_shapes
from kdjax.terms import BLOCKS

PROJECTED = "projected"  # the tap of the projected feature [b, c], which the teacher's classifier reads
PROJECTOR = "mlp"
HEAD = "head"  # the classifier of every bundled model
# What a model may do to its pooled last block before its classifier: an MLP's block is tapped before its ReLU.
_BEFORE_HEAD: tuple[Callable[[Array], Array], ...] = (lambda feature: feature, jax.nn.relu)
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest logit


def reuse_classifier(student: Model, teacher: Model, inputs: Array) -> Model:
    """The student with its teacher's classifier in the place of its own.

    Its ``params`` are ``{"backbone", "projector"}`` (the backbone without its own classifier); its ``state`` is
    ``{"backbone", "classifier"}``, since the classifier is not learned. ``init`` knows no teacher and makes a
    classifier of zeros: see ``with_classifier``. Besides the backbone's taps it offers ``projected``, which the term
    ``simkd`` compares with the teacher's pooled last block.

    Args:
      student: the backbone, a model with ``blocks.<i>``.
      teacher: a model whose ``head`` reads its pooled last block.
      inputs: [b, ...] float32, real examples as the models see them, on which that is tried.

    Raises:
      UserError: a model without blocks, or a teacher whose classifier reads something else.
    """
    before_head, classifier = _head_of(teacher, inputs)
    last, width = _last_block(student, inputs, "student")
    own_head = jax.eval_shape(student.init, jax.random.key(0))["params"].get(HEAD, {})

    def init(key: Array) -> Variables:
        backbone = student.init(key)
        made = projectors.init(jax.random.fold_in(key, 1), PROJECTOR, width, classifier["kernel"].shape[0])
        learned = {name: value for name, value in backbone["params"].items() if name != HEAD}
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), classifier)
        return {
            "params": {"backbone": learned, "projector": made},
            "state": {"backbone": backbone["state"], "classifier": zeros},
        }

    def apply(variables, inputs, *, train, key=None, taps=()):
        params, state = variables["params"], variables["state"]
        unused = {HEAD: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own_head)} if own_head else {}
        backbone = {"params": {**params["backbone"], **unused}, "state": state["backbone"]}
        every = tuple(taps) == EVERY
        wanted = EVERY if every else tuple(dict.fromkeys((last, *(tap for tap in taps if tap != PROJECTED))))
        outputs, new_state = student.apply(backbone, inputs, train=train, key=key, taps=wanted)
        projected = projectors.apply(params["projector"], PROJECTOR, projectors.pool(outputs.taps[last]))
        found = {**outputs.taps, PROJECTED: projected}
        logits = projectors.dense(state["classifier"], before_head(projected))
        names = [name for name in found if name != HEAD] if every else taps
        return Outputs(logits, {name: found[name] for name in names}), {**state, "backbone": new_state}

    return Model(init, apply)


def with_classifier(model: Model, teacher_variables: Variables) -> Model:
    """A model of ``reuse_classifier`` whose ``init`` puts in the classifier of these weights."""
    classifier = sharding.to_host(teacher_variables["params"][HEAD])

    def init(key: Array) -> Variables:
        variables = model.init(key)
        return {**variables, "state": {**variables["state"], "classifier": jax.tree.map(jnp.asarray, classifier)}}

    return model._replace(init=init)


def _head_of(teacher: Model, inputs: Array) -> tuple[Callable[[Array], Array], Params]:
    """What the teacher does to its pooled last block before its classifier, and the classifier's shapes.

    Tried on fresh weights: it is the model's structure that must be right.
    """
    shapes = jax.eval_shape(teacher.init, jax.random.key(0))["params"].get(HEAD, {})
    if set(shapes) == {"kernel", "bias"}:
        last, width = _last_block(teacher, inputs, "teacher")
        # In full precision also where products are shortened by default, so that the tolerance can be tight.
        with jax.default_matmul_precision("highest"):
            variables = jax.jit(teacher.init)(jax.random.key(0))
            outputs = jax.jit(lambda v, x: teacher.apply(v, x, train=False, taps=(last,))[0])(variables, inputs)
            feature, logits = projectors.pool(outputs.taps[last]), outputs.logits
            bound = _TOLERANCE.get(outputs.taps[last].dtype.name, 2e-2) * jnp.max(jnp.abs(logits))
            for before_head in _BEFORE_HEAD if shapes["kernel"].shape[0] == width else ():
                found = projectors.dense(variables["params"][HEAD], before_head(feature))
                if jnp.max(jnp.abs(found - logits)) <= bound:
                    return before_head, shapes
    raise UserError(
        "student.reuse_classifier takes over a classifier that reads the teacher's pooled last block, and this "
        "teacher's does not: take a cnn (without dense), an mlp or a resnet as teacher, or set it to False."
    )


def _last_block(model: Model, inputs: Any, side: str) -> tuple[str, int]:
    """The path and the width of a model's last block."""
    shapes = tap_shapes(model, jax.ShapeDtypeStruct(inputs.shape, jnp.float32))
    blocks = sorted((path for path in shapes if re.search(BLOCKS, path)), key=_numbers)
    if not blocks:
        raise UserError(f"student.reuse_classifier looks for blocks.<i> in the {side} and finds none: set it to False.")
    return blocks[-1], shapes[blocks[-1]][-1]


def _numbers(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]

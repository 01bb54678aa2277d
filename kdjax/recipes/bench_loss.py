"""``kdjax bench loss``: what the loss over a large vocabulary needs, walked over in chunks and all at once.

The program measured is the objective alone: from both models' hidden states and heads to the loss and its gradients for
the student's hidden states and head. Bytes are the compiler's, of the temporary memory of one device.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import chunks, objective, results
from kdjax.head import Head
from kdjax.model import Array, Outputs
from kdjax.objective import Setting

MEANING = {
    "temp_chunked_bytes": "temporary memory of loss and gradients, walked over in chunks",
    "temp_dense_bytes": "the same with all logits at once",
    "temp_chunked_over_dense": "their ratio (goal: at most 0.15 at 4,096 tokens and 32,768 classes)",
    "temp_twice_tokens_over_once": "temporary memory with twice the tokens, over that with once (goal: at most 1.05)",
    "temp_twice_vocabulary_over_once": "the same with twice the vocabulary (goal: at most 1.10)",
    "grad_max_rel_diff": "largest difference of the gradients, relative to the largest gradient (goal: at most 1e-5)",
    "ms": "milliseconds of loss and gradients, chunked, the median of 5",
    "ms_dense": "the same dense",
}
TERMS = {"kl": {"weight": 0.9, "temperature": 2.0}, "ce": {"weight": 0.1}}
CALLS = 5


def measure(
    tokens: int = 4096,
    vocabulary: int = 32768,
    *,
    student_width: int = 256,
    teacher_width: int = 512,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Compiles, compares and times the loss of one sequence of ``tokens`` tokens, chunked as training would, and dense.

    Args:
      tokens: of the sequence.
      vocabulary: the number of classes.
      student_width: of the student's hidden states.
      teacher_width: of the teacher's.
      dtype: of hidden states and products; the student's head is float32.
    """
    chunked, inputs = _program(tokens, vocabulary, student_width, teacher_width, dtype, dense=False)
    dense, _ = _program(tokens, vocabulary, student_width, teacher_width, dtype, dense=True)
    temp = {name: _temp(program, inputs) for name, program in (("chunked", chunked), ("dense", dense))}
    temp_of = lambda t, v: _temp(*_program(t, v, student_width, teacher_width, dtype, dense=False))
    arrays = _arrays(inputs, vocabulary)
    one, other = chunked(*arrays), dense(*arrays)
    values: dict[str, Any] = {
        "benchmark": "loss",
        "tokens": tokens,
        "vocabulary": vocabulary,
        "student_width": student_width,
        "teacher_width": teacher_width,
        "dtype": dtype,
        "chunks": chunks.chunk_count(1, tokens, vocabulary),
        "temp_chunked_bytes": temp["chunked"],
        "temp_dense_bytes": temp["dense"],
        "temp_chunked_over_dense": temp["chunked"] / temp["dense"],
        "temp_twice_tokens_over_once": temp_of(2 * tokens, vocabulary) / temp["chunked"],
        "temp_twice_vocabulary_over_once": temp_of(tokens, 2 * vocabulary) / temp["chunked"],
        "grad_max_rel_diff": _difference(one[1], other[1]),
        "loss_rel_diff": abs(float(one[0]) / float(other[0]) - 1.0),
    }
    values["ms"] = _milliseconds(chunked, arrays)
    values["ms_dense"] = _milliseconds(dense, arrays)
    return values | {"environment": results.environment()}


Inputs = Mapping[str, Any]


def _program(
    tokens: int, vocabulary: int, student_width: int, teacher_width: int, dtype: str, *, dense: bool
) -> tuple[Callable, tuple[Inputs, Inputs]]:
    """``jitted(student, rest) -> (loss, gradients of student)`` and the shapes of its arguments."""
    goal = objective.make_objective(TERMS, setting=Setting(sequences=True, tokens_per_chunk=tokens if dense else 0))
    kind = jnp.dtype(dtype)
    hparams = goal.hparams

    def loss(student: Inputs, rest: Inputs) -> Array:
        batch = {"labels": rest["labels"]}
        outputs = Outputs(hidden=student["hidden"], head=Head(student["kernel"], kind))
        teacher = Outputs(hidden=rest["hidden"], head=Head(rest["kernel"], kind))
        return goal.loss(outputs, {"teacher": teacher}, batch, hparams, goal.counts(batch))[0]

    shape = lambda *s, dtype=kind: jax.ShapeDtypeStruct(s, dtype)
    student = {"hidden": shape(1, tokens, student_width), "kernel": shape(vocabulary, student_width, dtype=jnp.float32)}
    rest = {
        "hidden": shape(1, tokens, teacher_width),
        "kernel": shape(vocabulary, teacher_width),
        "labels": shape(1, tokens, dtype=jnp.int32),
    }
    return jax.jit(jax.value_and_grad(loss)), (student, rest)


def _temp(program: Any, inputs: tuple[Inputs, Inputs]) -> int:
    return program.lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def _arrays(shapes: tuple[Inputs, Inputs], vocabulary: int) -> tuple[Inputs, Inputs]:
    """Hidden states of unit size and heads whose logits spread as those of a trained model do, by a factor of e²."""
    rng = np.random.default_rng(0)

    def make(path: Any, x: Any) -> Array:
        if x.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, vocabulary, x.shape), jnp.int32)
        scale = 2.0 * x.shape[-1] ** -0.5 if path[-1].key == "kernel" else 1.0
        return jnp.asarray(scale * rng.standard_normal(x.shape, np.float32), x.dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _difference(one: Any, other: Any) -> float:
    apart = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    return max(map(apart, jax.tree.leaves(one), jax.tree.leaves(other)))


def _milliseconds(program: Callable, arrays: Any) -> float:
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - start)
    return float(1e3 * np.median(seconds))

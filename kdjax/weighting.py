"""Dynamic weights: of an example within a term, and of the terms among each other.

All are pure functions of traced values, and none sends a gradient into what it weighs by.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.errors import unknown
from kdjax.model import Array, Params

# ------------------------------------------------------------------------------------------------- of an example


def teacher_confidence(student: Array, teacher: Array, labels: Array) -> Array:
    """1 - H(p_t) / ln K: an example counts for as much as the teacher is sure of it."""
    return 1.0 - teacher_entropy(student, teacher, labels)


def teacher_entropy(student: Array, teacher: Array, labels: Array) -> Array:
    """H(p_t) / ln K: hard examples, where the teacher says more than the label does, count for more."""
    log_p = jax.nn.log_softmax(teacher, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, log_p), axis=-1)
    return entropy / jnp.log(teacher.shape[-1])


def teacher_correct(student: Array, teacher: Array, labels: Array) -> Array:
    """1 where the teacher is right or the example is unlabelled, else 0."""
    return ((jnp.argmax(teacher, axis=-1) == labels) | (labels < 0)).astype(jnp.float32)


def student_loss(student: Array, teacher: Array, labels: Array) -> Array:
    """1 - p_s(label), the teacher's first class where there is no label: what the student knows counts for less."""
    return 1.0 - _said(student, _reference(teacher, labels))


def responsive(student: Array, teacher: Array, labels: Array) -> Array:
    """p_t(c) (1 - p_s(c)), c as in ``student_loss``: high where the teacher is sure and right and the student is not
    there yet, and falling as it learns."""
    reference = _reference(teacher, labels)
    return _said(teacher, reference) * (1.0 - _said(student, reference))


def _reference(teacher: Array, labels: Array) -> Array:
    return jnp.where(labels >= 0, labels, jnp.argmax(teacher, axis=-1))


def _said(logits: Array, classes: Array) -> Array:
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(p * jax.nn.one_hot(classes, p.shape[-1]), axis=-1)


# (student logits [b, classes], teacher logits [b, classes], labels [b]) -> [b] in [0, 1]
EXAMPLE_WEIGHTS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "teacher_confidence": teacher_confidence,
    "teacher_entropy": teacher_entropy,
    "teacher_correct": teacher_correct,
    "student_loss": student_loss,
    "responsive": responsive,
}


def of_examples(kind: str, student: Array, teacher: Array, labels: Array) -> Array:
    """[b] weights of that kind, float32, without gradient."""
    return jax.lax.stop_gradient(EXAMPLE_WEIGHTS[kind](student, teacher.astype(jnp.float32), labels))


# -------------------------------------------------------------------------------------- of a teacher, per example


def teacher_shares(logits: Sequence[Array], labels: Array) -> Array:
    """[teachers, b]: how far each of K teachers is trusted with an example.

    w_k = (1 - exp(CE_k) / Σ_j exp(CE_j)) / (K - 1), CE_k a teacher's cross-entropy with the label; equal shares where
    there is none (Zhang et al. 2022, "Confidence-aware multi-teacher knowledge distillation", eq. 4).
    """
    log_p = [jax.nn.log_softmax(z.astype(jnp.float32), axis=-1) for z in logits]
    is_label = jax.nn.one_hot(labels, logits[0].shape[-1], dtype=jnp.bool_)
    losses = jnp.stack([-jnp.sum(jnp.where(is_label, p, 0.0), axis=-1) for p in log_p])
    return (1.0 - jax.nn.softmax(losses, axis=0)) / (len(logits) - 1)


def routed_shares(teachers: int, domain: Array) -> Array:
    """[teachers, b]: 1 for the teacher whose number is the example's domain."""
    return jax.nn.one_hot(domain, teachers, axis=0)


# -------------------------------------------------------------------------------------------------- between terms

BALANCES = ("fixed", "uncertainty", "dwa")


def init_balance(kind: str, terms: Sequence[str]) -> tuple[Params, dict[str, Any]]:
    """``(learned, memory)`` of a balance over these terms."""
    zeros = lambda: {name: jnp.zeros(()) for name in terms}
    if kind == "uncertainty":
        return zeros(), {}
    if kind == "dwa":
        return {}, {"sum": zeros(), "last": zeros(), "before": zeros(), "steps": jnp.zeros((), jnp.int32)}
    if kind == "fixed":
        return {}, {}
    raise unknown("balance of terms", kind, BALANCES)


def balance_factors(
    kind: str, terms: Sequence[str], learned: Params, memory: Mapping[str, Any]
) -> tuple[dict[str, Any], Array]:
    """What each term is multiplied by beside its weight, and what is added to the total.

    "uncertainty": Σ exp(-s_i) L_i + s_i with learned s_i = ln σ_i² (Kendall et al. 2018, eq. 7, times 2): at its
    optimum each term has the weight 1 / L_i. "dwa": see ``dwa_weights``. "fixed": 1, and nothing.
    """
    if kind == "uncertainty":
        logs = learned["balance"]
        return {name: jnp.exp(-logs[name]) for name in terms}, sum(logs.values(), jnp.zeros(()))
    if kind == "dwa":
        return dwa_weights(memory["balance"]), jnp.zeros(())
    return dict.fromkeys(terms, 1.0), jnp.zeros(())


def dwa_weights(memory: Mapping[str, Any], temperature: Any = 2.0) -> dict[str, Array]:
    """Dynamic weight average: K softmax(r_i / T), r_i the ratio of a term's mean over the last period to the one before
    (Liu et al. 2019, "End-to-end multi-task learning with attention", eq. 7); all 1 until there are two periods."""
    names = list(memory["last"])
    last, before = (jnp.stack([memory[when][name] for name in names]) for when in ("last", "before"))
    known = (before > 0) & (last > 0)
    ratios = jnp.where(known, last / jnp.where(known, before, 1.0), 1.0)
    weights = len(names) * jax.nn.softmax(ratios / temperature)
    return {name: weights[index] for index, name in enumerate(names)}


def dwa_remember(memory: Mapping[str, Any], losses: Mapping[str, Array], period: int) -> dict[str, Any]:
    """The memory after a step with these losses; ``period`` is in steps, an epoch in the paper."""
    steps = memory["steps"] + 1
    full = steps % period == 0
    total = {name: memory["sum"][name] + jax.lax.stop_gradient(losses[name]) for name in losses}
    pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(full, a, b), new, old)
    mean = {name: value / period for name, value in total.items()}
    return {
        "sum": pick(jax.tree.map(jnp.zeros_like, total), total),
        "last": pick(mean, memory["last"]),
        "before": pick(memory["last"], memory["before"]),
        "steps": steps,
    }

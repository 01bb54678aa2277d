"""How good a classifier is, and how like its teacher, from the logits of a whole test set.

The numbers of a test set are computed in NumPy float64 from all logits at once, so that they do not depend on how the
set was cut into batches. Inside the step a metric stays a ``(sum, count)`` pair: ``merge`` and ``mean`` work on those.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from kdjax.errors import UserError

Metric = tuple[Any, Any]  # (sum, count), scalars
BINS = 15  # of the reliability diagram and the ECE, as in Guo et al. 2017


class Reliability(NamedTuple):
    """Confidence against accuracy in equal-width bins of confidence; NaN where a bin is empty."""

    counts: np.ndarray  # [bins] int64
    confidence: np.ndarray  # [bins] float64, mean probability of the predicted class
    accuracy: np.ndarray  # [bins] float64


def merge(a: Any, b: Any) -> Any:
    """Adds two trees of (sum, count) pairs of the same structure, leaf by leaf."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def mean(metric: Metric) -> jax.Array:
    """The mean of one (sum, count) pair: a float32 scalar; NaN if the count is 0 (nothing was measured).

    To find out whether a loss broke, look at the sum: a batch without a single label has an empty, healthy metric.
    """
    total, count = metric
    nothing = jnp.asarray(count) == 0
    return jnp.where(nothing, jnp.nan, total / jnp.where(nothing, 1, count)).astype(jnp.float32)


def classification(logits: Any, labels: Any, bins: int = BINS) -> dict[str, float]:
    """The quality of a classifier on a labelled set.

    Args:
        logits: [examples, classes] finite numbers.
        labels: [examples] integers below ``classes``; -1 (unlabelled) is left out.
        bins: equal-width bins of confidence for the ECE.

    Returns:
        ``accuracy`` (a fraction), ``macro_f1`` (mean over all classes; 0 for a class that is neither present nor
        predicted), ``nll`` (nats per example), ``ece`` (expected calibration error: Guo et al. 2017, equation 3).

    Raises:
        UserError: nothing is labelled, a label is out of range, shapes disagree, or a logit is not finite.
    """
    logits_nc, labels_n = _labelled(logits, labels)
    counts_cc = _confusion(logits_nc, labels_n)
    true_positive_c, support_c, predicted_c = np.diag(counts_cc), counts_cc.sum(1), counts_cc.sum(0)
    f1_c = 2 * true_positive_c / np.maximum(support_c + predicted_c, 1)
    log_probs_nc = log_softmax(logits_nc, axis=-1)
    parts = _reliability(logits_nc, labels_n, bins)
    gap = np.nan_to_num(np.abs(parts.accuracy - parts.confidence))  # an empty bin has no gap and no weight
    return {
        "accuracy": float(true_positive_c.sum() / len(labels_n)),
        "macro_f1": float(f1_c.mean()),
        "nll": float(-log_probs_nc[np.arange(len(labels_n)), labels_n].mean()),
        "ece": float(parts.counts @ gap / len(labels_n)),
    }


def fidelity(student_logits: Any, teacher_logits: Any) -> dict[str, float]:
    """How like its teacher a student is, with or without labels (Stanton et al. 2021, section 3).

    Args:
        student_logits: [examples, classes] finite numbers.
        teacher_logits: [examples, classes] of the same examples in the same order.

    Returns:
        ``agreement`` (the fraction of examples on which both predict the same class) and ``kl`` (mean over the
        examples of KL(teacher || student) at temperature 1, in nats).

    Raises:
        UserError: no examples, shapes disagree, or a logit is not finite.
    """
    student_nc, teacher_nc = _logits(student_logits), _logits(teacher_logits)
    if student_nc.shape != teacher_nc.shape:
        raise UserError(
            f"student logits {list(student_nc.shape)} and teacher logits {list(teacher_nc.shape)} differ in shape: "
            "compare the two on the same examples and classes."
        )
    log_student_nc, log_teacher_nc = log_softmax(student_nc, axis=-1), log_softmax(teacher_nc, axis=-1)
    kl_n = np.sum(np.exp(log_teacher_nc) * (log_teacher_nc - log_student_nc), axis=-1)
    return {
        "agreement": float(np.mean(student_nc.argmax(-1) == teacher_nc.argmax(-1))),
        "kl": max(float(kl_n.mean()), 0.0),  # rounding can leave -1e-17 between equal distributions
    }


def confusion(logits: Any, labels: Any) -> np.ndarray:
    """Counts [classes, classes] int64: rows are the true class, columns the predicted one; label -1 is left out."""
    return _confusion(*_labelled(logits, labels))


def per_class_accuracy(logits: Any, labels: Any) -> np.ndarray:
    """The fraction right of each true class: [classes] float64, NaN for a class without an example."""
    counts_cc = confusion(logits, labels)
    support_c = counts_cc.sum(1)
    return np.where(support_c > 0, np.diag(counts_cc) / np.maximum(support_c, 1), np.nan)


def reliability(logits: Any, labels: Any, bins: int = BINS) -> Reliability:
    """The reliability diagram (Guo et al. 2017, equations 1 and 2): bin m holds confidences in ((m-1)/M, m/M]."""
    return _reliability(*_labelled(logits, labels), bins)


def _confusion(logits_nc: np.ndarray, labels_n: np.ndarray) -> np.ndarray:
    classes = logits_nc.shape[1]
    return np.bincount(labels_n * classes + logits_nc.argmax(-1), minlength=classes**2).reshape(classes, classes)


def _reliability(logits_nc: np.ndarray, labels_n: np.ndarray, bins: int) -> Reliability:
    confidence_n = np.exp(log_softmax(logits_nc, axis=-1).max(-1))
    right_n = logits_nc.argmax(-1) == labels_n
    inner_edges = np.arange(1, bins) / bins
    bin_n = np.searchsorted(inner_edges, confidence_n, side="left")  # a value on an edge belongs to the bin below
    counts = np.bincount(bin_n, minlength=bins)
    weight = np.where(counts > 0, counts, np.nan)
    return Reliability(
        counts=counts,
        confidence=np.bincount(bin_n, confidence_n, minlength=bins) / weight,
        accuracy=np.bincount(bin_n, right_n, minlength=bins) / weight,
    )


def _logits(logits: Any) -> np.ndarray:
    logits_nc = np.asarray(logits, np.float64)
    if logits_nc.ndim != 2 or 0 in logits_nc.shape:
        raise UserError(
            f"logits of shape {list(logits_nc.shape)} cannot be evaluated: give [examples, classes], neither empty."
        )
    if not np.isfinite(logits_nc).all():
        bad = np.flatnonzero(~np.isfinite(logits_nc).all(-1))
        raise UserError(
            f"logits are NaN or infinite for {len(bad)} of {len(logits_nc)} examples (first: example {bad[0]}): "
            "the model has diverged; restore an earlier checkpoint or lower optimizer.learning_rate."
        )
    return logits_nc


def _labelled(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """The examples that have a label: logits [n, classes] float64, labels [n] int64."""
    logits_nc, labels_n = _logits(logits), np.asarray(labels)
    if labels_n.shape != logits_nc.shape[:1]:
        raise UserError(f"labels of shape {list(labels_n.shape)} do not go with {len(logits_nc)} rows of logits.")
    known_n = labels_n != -1
    if not known_n.any():
        raise UserError("nothing to evaluate: all labels are -1 (unlabelled); give a labelled test split.")
    labels_n, classes = labels_n[known_n].astype(np.int64), logits_nc.shape[1]
    if labels_n.min() < 0 or labels_n.max() >= classes:
        raise UserError(
            f"labels lie in [{labels_n.min()}, {labels_n.max()}] but the model has {classes} classes: "
            f"labels must be in [0, {classes - 1}], or -1 for unlabelled."
        )
    return logits_nc[known_n], labels_n

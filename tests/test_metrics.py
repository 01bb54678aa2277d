import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from kdjax import metrics
from kdjax.errors import UserError


@pytest.fixture(scope="module")
def digits():
    """Real logits and labels: a linear model on half of the digits, seen on the other half."""
    images, labels = load_digits(return_X_y=True)
    model = LogisticRegression(C=0.01, max_iter=60).fit(images[::2] / 16, labels[::2])
    return model.decision_function(images[1::2] / 16), labels[1::2]


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float64))


def test_classification_equals_scikit_learn(digits):
    logits, labels = digits
    found = metrics.classification(logits, labels)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    predicted = logits.argmax(1)
    assert found["accuracy"] == accuracy_score(labels, predicted)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(labels, probabilities), abs=1e-12)
    np.testing.assert_array_equal(metrics.confusion(logits, labels), confusion_matrix(labels, predicted))


def test_macro_f1_counts_absent_classes_as_zero():
    logits = np.eye(4)[[0, 0, 1, 1]]  # classes 2 and 3 are neither true nor predicted
    labels = np.array([0, 1, 1, 1])
    expected = f1_score(labels, logits.argmax(1), labels=range(4), average="macro", zero_division=0)
    assert metrics.classification(logits, labels)["macro_f1"] == pytest.approx(expected, abs=1e-15)


def test_nll_survives_logits_that_overflow_exp():
    found = metrics.classification([[2000.0, 0.0], [0.0, 2000.0]], [0, 0])
    assert found["nll"] == 1000.0


def test_ece_by_hand():
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right): |0.5 - 0.9| * 2/3 + |1 - 0.6| * 1/3 = 0.4.
    logits = logits_of([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    assert metrics.classification(logits, [0, 1, 1])["ece"] == pytest.approx(0.4, abs=1e-12)
    # One bin: |mean accuracy - mean confidence| = |2/3 - 0.8|.
    assert metrics.classification(logits, [0, 1, 1], bins=1)["ece"] == pytest.approx(0.8 - 2 / 3, abs=1e-12)


def test_ece_equals_a_loop_over_the_bins_of_the_paper(digits):
    logits, labels = digits
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), logits.argmax(1) == labels
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected > 0.05  # the model is badly calibrated: the sum is not trivially small
    assert metrics.classification(logits, labels)["ece"] == pytest.approx(expected, abs=1e-12)


def test_reliability_puts_an_edge_in_the_bin_below_and_marks_empty_bins():
    parts = metrics.reliability([[0.0, 0.0], [50.0, 0.0]], [0, 1], bins=2)  # confidences exactly 0.5 and 1.0
    np.testing.assert_array_equal(parts.counts, [1, 1])
    np.testing.assert_allclose(parts.confidence, [0.5, 1.0])
    np.testing.assert_array_equal(parts.accuracy, [1.0, 0.0])
    assert np.isnan(metrics.reliability([[50.0, 0.0]], [0], bins=3).accuracy[:2]).all()


def test_unlabelled_examples_are_left_out(digits):
    logits, labels = digits
    hidden = np.where(np.arange(len(labels)) % 3 == 0, -1, labels)
    kept = hidden != -1
    assert metrics.classification(logits, hidden) == metrics.classification(logits[kept], labels[kept])
    assert metrics.confusion(logits, hidden).sum() == kept.sum()


def test_per_class_accuracy(digits):
    logits, labels = digits
    found = metrics.per_class_accuracy(logits, labels)
    for label in range(10):
        assert found[label] == pytest.approx(np.mean(logits[labels == label].argmax(1) == label), abs=1e-15)
    assert np.isnan(metrics.per_class_accuracy(logits, np.where(labels == 3, -1, labels))[3])


def test_fidelity_by_hand_and_its_direction():
    teacher, student = [[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # sum over classes of p_teacher log(p_teacher / p_student)
    assert metrics.fidelity(logits_of(student), logits_of(teacher)) == {
        "agreement": 0.0,
        "kl": pytest.approx(expected, abs=1e-12),
    }
    peaked, flat = logits_of([[0.98, 0.01, 0.01]]), np.zeros((1, 3))
    forward = math.log(3) + 0.98 * math.log(0.98) + 0.02 * math.log(0.01)
    assert metrics.fidelity(flat, peaked)["kl"] == pytest.approx(forward, abs=1e-12)
    assert metrics.fidelity(peaked, flat)["kl"] != pytest.approx(forward, abs=0.1)


def test_fidelity_to_oneself_is_perfect_and_ignores_shifts(digits):
    logits, _ = digits
    found = metrics.fidelity(logits + 7.0, logits)
    assert found["agreement"] == 1.0
    assert 0.0 <= found["kl"] < 1e-12


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (np.zeros((3, 2)), [-1, -1, -1], "unlabelled"),
        (np.zeros((0, 2)), [], "empty"),
        (np.zeros((3, 2)), [0, 1], "do not go with 3"),
        (np.zeros((3, 2)), [0, 1, 2], r"\[0, 1\]"),
        (np.zeros((3, 2)), [0, 1, -2], r"\[-2, 1\]"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], "1 of 2 examples .first: example 1"),
        (np.zeros(3), [0, 1, 1], r"\[examples, classes\]"),
    ],
)
def test_bad_input_is_one_sentence(logits, labels, says):
    with pytest.raises(UserError, match=says):
        metrics.classification(logits, labels)


def test_fidelity_refuses_other_class_counts():
    with pytest.raises(UserError, match="differ in shape"):
        metrics.fidelity(np.zeros((2, 3)), np.zeros((2, 4)))


def test_merge_and_mean_are_independent_of_the_split():
    values = np.arange(12, dtype=np.float32)
    pair = lambda part: {"loss": (jnp.sum(part), jnp.float32(part.size))}
    merged = metrics.merge(metrics.merge(pair(values[:5]), pair(values[5:6])), pair(values[6:]))
    assert float(jax.jit(metrics.mean)(merged["loss"])) == values.mean()
    assert metrics.mean(merged["loss"]).dtype == jnp.float32
    assert np.isnan(metrics.mean((jnp.float32(0), jnp.float32(0))))

"""Metrics of classifiers: scikit-learn, literal loops, and edge cases as the docstrings state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics.classification import Predictions

NAN, BINS = float("nan"), 7
METRICS = ("average_precision", "f1", "accuracy", "best_threshold", "expected_calibration_error")


@st.composite
def scored_labels(draw):
    """Scores on a coarse grid (so that many tie) and labels of both classes."""
    count = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = random.integers(0, draw(st.sampled_from([2, 5, 1000])), count) / 999
    labels = random.random(count) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    labels[:2] = True, False
    return scores, labels


@given(scored_labels())
def test_binary_metrics_are_those_of_scikit_learn(data):
    scores, labels = data
    for threshold in (0.0, 0.002, 0.5):
        positive = scores >= threshold
        expected = sk.f1_score(labels, positive, zero_division=0)
        assert classification_metrics.f1(scores, labels, threshold) == pytest.approx(expected)
        expected = sk.accuracy_score(labels, positive)
        assert classification_metrics.accuracy(scores, labels, threshold) == pytest.approx(expected)
    expected = sk.average_precision_score(labels, scores)
    assert classification_metrics.average_precision(scores, labels) == pytest.approx(expected)
    fpr, tpr = classification_metrics.roc_curve(scores, labels)
    for ours, expected in zip(
        (fpr, tpr), sk.roc_curve(labels, scores, drop_intermediate=False)[:2], strict=True
    ):
        np.testing.assert_allclose(ours, expected)
    assert np.trapezoid(tpr, fpr) == pytest.approx(classification_metrics.auroc(scores, labels))


@given(scored_labels())
def test_the_best_threshold_has_the_highest_f1(data):
    scores, labels = data
    best = classification_metrics.best_threshold(scores, labels)
    candidates = [sk.f1_score(labels, scores >= t, zero_division=0) for t in np.unique(scores)]
    assert classification_metrics.f1(scores, labels, best) == pytest.approx(max(candidates))
    tied = [
        t for t, f in zip(np.unique(scores), candidates, strict=True) if f > max(candidates) - 1e-12
    ]
    assert best == max(tied)


@given(scored_labels())
def test_calibration_is_a_loop_over_bins_and_scikit_learn(data):
    scores, labels = data
    probability, rate, count = classification_metrics.calibration(scores, labels, BINS)
    error = 0.0
    for k in range(BINS):
        low, high = np.linspace(0, 1, BINS + 1)[k : k + 2]
        inside = [n for n, p in enumerate(scores) if (low < p <= high) or (k == 0 and p == 0)]
        assert count[k] == len(inside)
        if not inside:
            assert np.isnan([probability[k], rate[k]]).all()
            continue
        assert probability[k] == pytest.approx(sum(scores[n] for n in inside) / len(inside))
        assert rate[k] == pytest.approx(sum(labels[n] for n in inside) / len(inside))
        error += len(inside) / len(scores) * abs(probability[k] - rate[k])
    value = classification_metrics.expected_calibration_error(scores, labels, BINS)
    assert value == pytest.approx(error, abs=1e-12)
    true, predicted = calibration_curve(labels, scores, n_bins=BINS)
    np.testing.assert_allclose(rate[count > 0], true)
    np.testing.assert_allclose(probability[count > 0], predicted)


def test_a_bin_owns_its_upper_edge():
    edges = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    probability, _, count = classification_metrics.calibration(edges, np.zeros(5, bool), 4)
    assert count.tolist() == [2, 1, 1, 1] and probability.tolist() == [0.125, 0.5, 0.75, 1.0]


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_multiclass_metrics_are_those_of_scikit_learn(seed, classes):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(30, classes))
    truth = np.r_[np.arange(classes), random.integers(0, classes, 30 - classes)]
    labels = np.eye(classes, dtype=bool)[truth]
    predicted = scores.argmax(1)
    expected = sk.f1_score(truth, predicted, average="macro")
    assert classification_metrics.macro_f1(scores, labels) == pytest.approx(expected)
    assert classification_metrics.accuracy(scores, labels) == pytest.approx(
        sk.accuracy_score(truth, predicted)
    )
    thresholds = random.normal(size=classes)
    expected = sk.f1_score(labels, scores >= thresholds, average="macro", zero_division=0)
    assert classification_metrics.macro_f1(scores, labels, thresholds) == pytest.approx(expected)


def test_constant_scores():
    labels = np.array([True, False, False, False])
    constant = np.full(4, 0.3)
    assert classification_metrics.average_precision(constant, labels) == 0.25
    assert classification_metrics.f1(constant, labels, 0.5) == 0
    assert classification_metrics.f1(constant, labels, 0.0) == pytest.approx(2 * 0.25 / 1.25)
    assert classification_metrics.accuracy(constant, labels, 0.5) == 0.75
    assert classification_metrics.best_threshold(constant, labels) == 0.3
    fpr, tpr = classification_metrics.roc_curve(constant, labels)
    assert fpr.tolist() == tpr.tolist() == [0, 1]


def test_one_class_is_nan_where_the_metric_means_nothing():
    scores = np.array([0.1, 0.9])
    for labels in (np.zeros(2, bool), np.ones(2, bool)):
        assert np.isnan(classification_metrics.average_precision(scores, labels))
        assert np.isnan(classification_metrics.roc_curve(scores, labels)).all()
    absent, present = np.zeros(2, bool), np.ones(2, bool)
    assert np.isnan(classification_metrics.f1(scores, absent)) and np.isnan(
        classification_metrics.f1(-scores, absent)
    )
    assert classification_metrics.f1(scores, present, 0.05) == 1
    assert classification_metrics.best_threshold(scores, absent) == np.inf
    assert classification_metrics.best_threshold(scores, present) == 0.1
    assert classification_metrics.accuracy(scores, absent) == 0.5
    empty = np.zeros(0)
    for name in ("accuracy", "expected_calibration_error", "average_precision", "f1"):
        assert np.isnan(getattr(classification_metrics, name)(empty, empty.astype(bool)))


@pytest.mark.parametrize("name", METRICS)
def test_nan_stays_visible(name):
    metric, labels = getattr(classification_metrics, name), np.array([True, False, True])
    assert np.isfinite(metric(np.array([0.2, 0.1, 0.4]), labels))
    assert np.isnan(metric(np.array([0.2, NAN, 0.4]), labels))


def test_nan_stays_visible_in_tables_and_points():
    labels = np.eye(3, dtype=bool)
    scores = np.eye(3)
    assert (
        classification_metrics.macro_f1(scores, labels)
        == classification_metrics.accuracy(scores, labels)
        == 1
    )
    scores[1, 2] = NAN
    assert np.isnan(classification_metrics.macro_f1(scores, labels))
    assert np.isnan(classification_metrics.accuracy(scores, labels))
    assert np.isnan(classification_metrics.vote_shares(scores)).any(1).tolist() == [
        False,
        True,
        False,
    ]
    assert np.isnan(classification_metrics.macro_f1(np.eye(3), labels, np.array([0.5, NAN, 0.5])))
    assert np.isnan(classification_metrics.f1(np.ones(3), labels[0], NAN))
    assert np.isnan(classification_metrics.roc_curve(scores[1], labels[0])).all()
    assert np.isnan(np.stack(classification_metrics.calibration(scores[1], labels[0]))).all()
    assert np.isnan(classification_metrics.macro_mean([])) and np.isnan(
        classification_metrics.macro_mean([1.0, NAN])
    )


def test_classes_that_tie_share_the_vote():
    labels = np.eye(4, dtype=bool)[np.array([0, 0, 0, 1, 2, 3])]
    constant = np.zeros((6, 4))
    for order in (np.arange(4), np.arange(4)[::-1]):
        assert classification_metrics.accuracy(constant, labels[:, order]) == 0.25
        tied = classification_metrics.macro_f1(constant, labels[:, order])
        assert tied == pytest.approx(np.mean([2 * 0.75 / 4.5] + [2 * 0.25 / 2.5] * 3))


def test_a_class_without_positives_is_left_out_of_macro_f1():
    labels = np.array([[True, False, False], [False, True, False], [False, True, False]])
    scores = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert classification_metrics.macro_f1(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(classification_metrics.macro_f1(scores, np.zeros((3, 3), bool)))


def test_each_label_policy():
    names = ["Atelectasis", "cardiomegaly", "CONSOLIDATION", "edema", "Pleural Effusion", "Mass"]
    labels = np.array([[-1] * 6, [1, 0] * 3])
    expected = {
        "ignore": (0, 0, 0, 0, 0, 0),
        "zero": (0, 0, 0, 0, 0, 0),
        "one": (1, 1, 1, 1, 1, 1),
        "mgca": (1, 0, 0, 1, 1, 0),
    }
    for policy, values in expected.items():
        truth, mask = classification_metrics.binarise_labels(labels, names, policy)
        assert truth.astype(int).tolist() == [list(values), [1, 0] * 3]
        assert mask.tolist() == [[policy != "ignore"] * 6, [True] * 6]


def test_a_finding_is_scored_where_its_label_is_known():
    random = np.random.default_rng(0)
    predictions = Predictions(random.normal(size=(40, 3)), *(random.random((2, 40, 3)) < 0.6))
    changed = predictions._replace(labels=predictions.labels ^ ~predictions.mask)
    for metric, thresholds in (
        (classification_metrics.auroc, None),
        (classification_metrics.f1, [0.1, 0.4]),
    ):
        values = classification_metrics.per_finding(metric, predictions, [2, 0], thresholds)
        assert values == classification_metrics.per_finding(metric, changed, [2, 0], thresholds)
        for n, i in enumerate((2, 0)):
            rows = [k for k in range(40) if predictions.mask[k, i]]
            threshold = () if thresholds is None else (thresholds[n],)
            assert values[n] == metric(
                predictions.scores[rows, i], predictions.labels[rows, i], *threshold
            )
    truth = np.array([[True, True, False], [False, True, True]])
    mask = np.array([[True, True, False], [True, True, True]])
    assert classification_metrics.has_both_classes(truth, mask).tolist() == [True, False, False]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(items):
    scores = np.array([float(score) for score, _ in items])
    labels = np.array([label for _, label in items])
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[labels] for b in scores[~labels]
    ]
    area = classification_metrics.auroc(scores, labels)
    assert area == pytest.approx(np.mean(pairs)) if pairs else np.isnan(area)


def test_auroc_with_nan_is_nan():
    scores, labels = np.array([NAN, 1.0]), np.array([True, False])
    assert np.isnan(classification_metrics.auroc(scores, labels))

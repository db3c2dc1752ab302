"""The metrics of classifiers, against scikit-learn, literal loops and their stated edge cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics.classification import Judged

NAN, BINS = float("nan"), 7
METRICS = ("average_precision", "f1", "accuracy", "best_threshold", "expected_calibration_error")


@st.composite
def binary(draw):
    """Scores on a coarse grid (so that many tie) and labels of both classes."""
    count = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = random.integers(0, draw(st.sampled_from([2, 5, 1000])), count) / 999
    labels = random.random(count) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    labels[:2] = True, False
    return scores, labels


@given(binary())
def test_binary_metrics_are_those_of_scikit_learn(data):
    scores, labels = data
    for threshold in (0.0, 0.002, 0.5):
        called = scores >= threshold
        expected = sk.f1_score(labels, called, zero_division=0)
        assert classification_metrics.f1(scores, labels, threshold) == pytest.approx(expected)
        expected = sk.accuracy_score(labels, called)
        assert classification_metrics.accuracy(scores, labels, threshold) == pytest.approx(expected)
    expected = sk.average_precision_score(labels, scores)
    assert classification_metrics.average_precision(scores, labels) == pytest.approx(expected)
    fpr, tpr = classification_metrics.roc_curve(scores, labels)
    for ours, theirs in zip(
        (fpr, tpr), sk.roc_curve(labels, scores, drop_intermediate=False)[:2], strict=True
    ):
        np.testing.assert_allclose(ours, theirs)
    assert np.trapezoid(tpr, fpr) == pytest.approx(classification_metrics.auroc(scores, labels))


@given(binary())
def test_the_best_threshold_beats_every_other(data):
    scores, labels = data
    best = classification_metrics.best_threshold(scores, labels)
    tried = [sk.f1_score(labels, scores >= t, zero_division=0) for t in np.unique(scores)]
    assert classification_metrics.f1(scores, labels, best) == pytest.approx(max(tried))
    equals = [t for t, f in zip(np.unique(scores), tried, strict=True) if f > max(tried) - 1e-12]
    assert best == max(equals)


@given(binary())
def test_calibration_is_a_loop_over_bins_and_that_of_scikit_learn(data):
    scores, labels = data
    said, happened, count = classification_metrics.calibration(scores, labels, BINS)
    error = 0.0
    for k in range(BINS):
        low, high = np.linspace(0, 1, BINS + 1)[k : k + 2]
        inside = [n for n, p in enumerate(scores) if (low < p <= high) or (k == 0 and p == 0)]
        assert count[k] == len(inside)
        if not inside:
            assert np.isnan([said[k], happened[k]]).all()
            continue
        assert said[k] == pytest.approx(sum(scores[n] for n in inside) / len(inside))
        assert happened[k] == pytest.approx(sum(labels[n] for n in inside) / len(inside))
        error += len(inside) / len(scores) * abs(said[k] - happened[k])
    found = classification_metrics.expected_calibration_error(scores, labels, BINS)
    assert found == pytest.approx(error, abs=1e-12)
    true, predicted = calibration_curve(labels, scores, n_bins=BINS)
    np.testing.assert_allclose(happened[count > 0], true)
    np.testing.assert_allclose(said[count > 0], predicted)


def test_a_bin_owns_its_upper_edge():
    edges = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    said, _, count = classification_metrics.calibration(edges, np.zeros(5, bool), 4)
    assert count.tolist() == [2, 1, 1, 1] and said.tolist() == [0.125, 0.5, 0.75, 1.0]


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_multiclass_metrics_are_those_of_scikit_learn(seed, classes):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(30, classes))
    truth = np.r_[np.arange(classes), random.integers(0, classes, 30 - classes)]
    labels = np.eye(classes, dtype=bool)[truth]
    called = scores.argmax(1)
    expected = sk.f1_score(truth, called, average="macro")
    assert classification_metrics.macro_f1(scores, labels) == pytest.approx(expected)
    assert classification_metrics.accuracy(scores, labels) == pytest.approx(
        sk.accuracy_score(truth, called)
    )
    limits = random.normal(size=classes)
    expected = sk.f1_score(labels, scores >= limits, average="macro", zero_division=0)
    assert classification_metrics.macro_f1(scores, labels, limits) == pytest.approx(expected)


def test_what_calls_nothing_or_everything_scores_as_stated():
    labels = np.array([True, False, False, False])
    same = np.full(4, 0.3)
    assert classification_metrics.average_precision(same, labels) == 0.25
    assert classification_metrics.f1(same, labels, 0.5) == 0
    assert classification_metrics.f1(same, labels, 0.0) == pytest.approx(2 * 0.25 / 1.25)
    assert classification_metrics.accuracy(same, labels, 0.5) == 0.75
    assert classification_metrics.best_threshold(same, labels) == 0.3
    fpr, tpr = classification_metrics.roc_curve(same, labels)
    assert fpr.tolist() == tpr.tolist() == [0, 1]


def test_one_class_is_no_number_where_it_says_nothing():
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
    assert np.isnan(classification_metrics.votes(scores)).any(1).tolist() == [False, True, False]
    assert np.isnan(classification_metrics.macro_f1(np.eye(3), labels, np.array([0.5, NAN, 0.5])))
    assert np.isnan(classification_metrics.f1(np.ones(3), labels[0], NAN))
    assert np.isnan(classification_metrics.roc_curve(scores[1], labels[0])).all()
    assert np.isnan(np.stack(classification_metrics.calibration(scores[1], labels[0]))).all()
    assert np.isnan(classification_metrics.mean([])) and np.isnan(
        classification_metrics.mean([1.0, NAN])
    )


def test_classes_that_tie_share_the_vote():
    labels = np.eye(4, dtype=bool)[np.array([0, 0, 0, 1, 2, 3])]
    constant = np.zeros((6, 4))
    for order in (np.arange(4), np.arange(4)[::-1]):
        assert classification_metrics.accuracy(constant, labels[:, order]) == 0.25
        same = classification_metrics.macro_f1(constant, labels[:, order])
        assert same == pytest.approx(np.mean([2 * 0.75 / 4.5] + [2 * 0.25 / 2.5] * 3))


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
    for policy, made in expected.items():
        truth, known = classification_metrics.truths(labels, names, policy)
        assert truth.astype(int).tolist() == [list(made), [1, 0] * 3]
        assert known.tolist() == [[policy != "ignore"] * 6, [True] * 6]


def test_findings_are_judged_where_they_are_known():
    random = np.random.default_rng(0)
    judged = Judged(random.normal(size=(40, 3)), *(random.random((2, 40, 3)) < 0.6))
    changed = judged._replace(truth=judged.truth ^ ~judged.known)
    for metric, limits in (
        (classification_metrics.auroc, None),
        (classification_metrics.f1, [0.1, 0.4]),
    ):
        found = classification_metrics.each_finding(metric, judged, [2, 0], limits)
        assert found == classification_metrics.each_finding(metric, changed, [2, 0], limits)
        for n, i in enumerate((2, 0)):
            rows = [k for k in range(40) if judged.known[k, i]]
            some = () if limits is None else (limits[n],)
            assert found[n] == metric(judged.scores[rows, i], judged.truth[rows, i], *some)
    truth = np.array([[True, True, False], [False, True, True]])
    known = np.array([[True, True, False], [True, True, True]])
    assert classification_metrics.two_sided(truth, known).tolist() == [True, False, False]

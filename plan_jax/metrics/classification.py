"""Metrics of classifiers: AUROC, AUPRC, F1, accuracy, ROC points, calibration.

scikit-learn computes the average precision, the ROC points and F1. The wrappers here define what it
leaves undefined:

- A NaN score makes the metric NaN.
- Labels that have no positives, or only one class, give NaN where the number would mean nothing.
- Tied scores are treated alike, so a classifier with the same answer for every image gains nothing
  from the order of images or classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import rankdata
from sklearn import metrics as sklearn_metrics

NAN = float("nan")
UncertainPolicy = Literal["ignore", "zero", "one", "mgca"]
# What an uncertain label becomes in MGCA's code (`constants.py`, after CheXpert, arXiv 1901.07031).
MGCA_POLICY = {
    "atelectasis": 1,
    "cardiomegaly": 0,
    "consolidation": 0,
    "edema": 1,
    "pleural effusion": 1,
}


class Predictions(NamedTuple):
    """A classifier's scores for N images, the true labels, and a mask of the labels that exist."""

    scores: Float[np.ndarray, "N F"]
    labels: Bool[np.ndarray, "N F"]
    mask: Bool[np.ndarray, "N F"]


def has_single_class(
    labels: Int[np.ndarray, "N F"], absent: Int[np.ndarray, "N G"] | None = None
) -> Bool[np.ndarray, " N"]:
    """Returns which images have exactly one of F classes, as CheXpert 5x200 is selected.

    No other class may be uncertain, and none of the G findings in `absent` present or uncertain.

    >>> labels = np.array([[1, 0], [1, 1], [1, -1], [0, 1]])
    >>> has_single_class(labels, np.array([[0], [0], [0], [-1]])).tolist()
    [True, False, False, False]
    """
    is_single = ((labels == 1).sum(1) == 1) & (labels >= 0).all(1)
    return is_single if absent is None else is_single & (absent == 0).all(1)


def binarise_labels(
    labels: Int[np.ndarray, "N F"], names: Sequence[str], policy: UncertainPolicy
) -> tuple[Bool[np.ndarray, "N F"], Bool[np.ndarray, "N F"]]:
    """Returns where each finding is present, and a mask of where that is known.

    Args:
      labels: 1 present, 0 absent, -1 uncertain.
      names: the findings, in the order of the columns.
      policy: what an uncertain label becomes: masked out (`ignore`), absent (`zero`), present
        (`one`), or by MGCA's table for CheXpert's five findings (`mgca`; names are compared in
        lower case, other findings become absent).

    >>> labels = np.array([[-1, -1, 0]])
    >>> [x.tolist() for x in binarise_labels(labels, ["Edema", "mass", "nodule"], "mgca")]
    [[[True, False, False]], [[True, True, True]]]
    """
    constant = {"ignore": 0, "zero": 0, "one": 1}.get(policy)
    values = [MGCA_POLICY.get(name.lower(), 0) if constant is None else constant for name in names]
    uncertain = labels < 0
    present = np.where(uncertain, np.array(values, bool), labels == 1)
    return present, ~uncertain if policy == "ignore" else np.ones_like(uncertain)


def has_both_classes(
    labels: Bool[np.ndarray, "N F"], mask: Bool[np.ndarray, "N F"]
) -> Bool[np.ndarray, " F"]:
    """Returns which findings are present in one image and absent in another, where `mask` is True.

    >>> labels = np.array([[True, True], [False, True]])
    >>> has_both_classes(labels, np.ones((2, 2), bool)).tolist()
    [True, False]
    """
    return (labels & mask).any(0) & (~labels & mask).any(0)


def per_finding(
    metric: Callable[..., Any],
    predictions: Predictions,
    columns: Sequence[int],
    thresholds: Sequence[float] | None = None,
) -> list[Any]:
    """Returns a metric of each finding in `columns`, over the images where its label is known.

    The metric is called as `metric(scores, labels)`, or as `metric(scores, labels, threshold)` if
    there are `thresholds`, one for each of `columns`.
    """
    values = []
    for position, column in enumerate(columns):
        rows = predictions.mask[:, column]
        threshold = () if thresholds is None else (thresholds[position],)
        scores, labels = predictions.scores[rows, column], predictions.labels[rows, column]
        values.append(metric(scores, labels, *threshold))
    return values


def macro_mean(values: Sequence[float]) -> float:
    """Returns the mean of the values; NaN if there are none, or if one of them is NaN."""
    return float(np.mean(values)) if len(values) else NAN


def auroc(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Computes the probability that a positive scores above a negative, ties counted half: 0 to 1.

    *Mann-Whitney: (R - n1 (n1 + 1) / 2) / (n1 n0)*, R the sum of the ranks of the positives, n1 and
    n0 the numbers of positives and negatives. NaN with one class only.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    if _any_nan(scores) or _one_class(labels):
        return NAN
    positives = int(labels.sum())
    negatives = len(labels) - positives
    rank_sum = rankdata(scores)[labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Computes the area under the precision-recall curve as a step function (AUPRC): 0 to 1.

    *AP = sum_n (R_n - R_{n-1}) P_n* over the distinct scores from high to low, with recall R and
    precision P of all rows that score at least as much; no interpolation (scikit-learn's
    `average_precision_score`). Tied scores are one step: a constant classifier gets the share of
    positives. NaN with one class only (scikit-learn returns 0 or 1 there).

    >>> scores, labels = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    >>> round(average_precision(scores, labels), 12)
    0.833333333333
    """
    if _any_nan(scores) or _one_class(labels):
        return NAN
    return float(sklearn_metrics.average_precision_score(labels, scores))


def roc_curve(
    scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Computes the points of the ROC curve: false and true positive rates, from (0, 0) to (1, 1).

    There is one point for each distinct score, from high to low. Tied scores are one straight step,
    so the area by trapezoids is `auroc`. With one class only, or NaN scores, the curve is a single
    NaN.

    >>> [x.tolist() for x in roc_curve(np.array([0.9, 0.5, 0.5]), np.array([True, False, True]))]
    [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    if _any_nan(scores) or _one_class(labels):
        return np.full(1, np.nan), np.full(1, np.nan)
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    return fpr, tpr


def f1(
    scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], threshold: float = 0.5
) -> float:
    """Computes the harmonic mean of precision and recall of {score >= threshold}: 0 to 1.

    *F1 = 2 TP / (2 TP + FP + FN)*. A classifier that predicts no positives scores 0. NaN for labels
    without positives (scikit-learn warns and returns 0), and for a threshold that is NaN.

    >>> round(f1(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])), 3)
    0.5
    """
    if _any_nan(scores) or np.isnan(threshold) or not labels.any():
        return NAN
    return float(sklearn_metrics.f1_score(labels, scores >= threshold, zero_division=0))


def macro_f1(
    scores: Float[np.ndarray, "N F"],
    labels: Bool[np.ndarray, "N F"],
    thresholds: Float[np.ndarray, " F"] | None = None,
) -> float:
    """Computes the mean F1 of the columns that have positives: 0 to 1.

    With `thresholds` a prediction is {score >= threshold of its column} (multi-label). Without, it
    is the class of the row's largest score, and classes that tie share the row (multi-class;
    `labels` have at most one True in a row). A class without positives is left out of the mean
    (scikit-learn counts it as 0 if it is predicted). NaN if no class has positives.

    >>> macro_f1(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([[True, False], [False, True]]))
    0.3333333333333333
    """
    columns = np.flatnonzero(labels.any(0))
    if _any_nan(scores) or not len(columns):
        return NAN
    if thresholds is not None:
        return macro_mean([f1(scores[:, n], labels[:, n], thresholds[n]) for n in columns])
    # A row whose classes tie becomes one weighted row for each of them, of total weight 1.
    shares = vote_shares(scores)
    rows, predicted = np.nonzero(shares)
    # A row without a True label matches no class, and -1 is not among `columns`.
    classes = np.where(labels.any(1), labels.argmax(1), -1)
    values = sklearn_metrics.f1_score(
        classes[rows],
        predicted,
        labels=columns,
        average=None,
        sample_weight=shares[rows, predicted],
        zero_division=0,
    )
    return macro_mean(values.tolist())


def accuracy(
    scores: Float[np.ndarray, "N *F"], labels: Bool[np.ndarray, "N *F"], threshold: float = 0.5
) -> float:
    """Computes the share of correct predictions: 0 to 1.

    Scores [N] and labels [N]: a prediction is {score >= threshold}. Scores [N F] and one-hot labels
    [N F]: the class of the largest score, where `threshold` plays no part and classes that tie
    share the row, so that a constant classifier scores 1 / F. NaN without rows.

    >>> accuracy(np.array([0.9, 0.8, 0.1]), np.array([True, False, False]))
    0.6666666666666666
    >>> accuracy(np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([[False, True], [True, False]]))
    0.75
    """
    if not len(scores) or _any_nan(scores) or np.isnan(threshold):
        return NAN
    if scores.ndim == 1:
        return float(np.mean((scores >= threshold) == labels))
    return float(np.mean((vote_shares(scores) * labels).sum(1)))


def vote_shares(scores: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
    """Returns 1 for the class of each row's largest score, split equally between ties.

    A row with NaN gives NaN.

    >>> vote_shares(np.array([[0.1, 0.7, 0.7], [3.0, 2.0, 1.0]])).tolist()
    [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    """
    is_best = (scores == scores.max(1, keepdims=True)).astype(float)
    # A row with NaN has no best class; the maximum keeps 0 / 0 out of the division.
    shares = is_best / np.maximum(is_best.sum(1, keepdims=True), 1)
    return np.where(np.isnan(scores).any(1, keepdims=True), np.nan, shares)


def best_threshold(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Finds the threshold at which {score >= threshold} has the highest F1.

    Select it on validation data only. The candidates are the scores themselves. Among candidates of
    equal F1 the highest one wins, which predicts the fewest positives (ours). Without positives all
    thresholds are equally bad, and the result is infinity: nothing is predicted. NaN scores give
    NaN.

    >>> best_threshold(np.array([0.9, 0.6, 0.4, 0.1]), np.array([True, False, True, False]))
    0.4
    """
    if _any_nan(scores):
        return NAN
    if not labels.any():
        return float("inf")
    # Counts of rows and of positives that reach each distinct score, from high to low. Whole counts
    # keep equal F1 values exactly equal; precision and recall would round them apart.
    negated, index = np.unique(-scores, return_inverse=True)
    predicted = np.bincount(index, minlength=len(negated)).cumsum()
    true_positives = np.bincount(index, labels, len(negated)).cumsum()
    f1_values = 2 * true_positives / (predicted + true_positives[-1])
    return float(-negated[np.argmax(f1_values)])


def calibration(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], bins: int = 15
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Computes the points of the reliability diagram: mean probability, share of positives, count.

    *Guo et al. (arXiv 1706.04599): K = 15 bins ((k - 1) / K, k / K] of equal width*; 0 is in the
    first. An empty bin has count 0 and NaN for the rest; NaN in the probabilities makes all NaN.

    >>> labels = np.array([True, False, True])
    >>> [x.tolist() for x in calibration(np.array([0.1, 0.3, 0.8]), labels, 2)]
    [[0.2, 0.8], [0.5, 1.0], [2.0, 1.0]]
    """
    if _any_nan(probabilities):
        return np.full(bins, np.nan), np.full(bins, np.nan), np.full(bins, np.nan)
    edges = np.linspace(0, 1, bins + 1)
    # Only the inner edges: with them 0 falls into the first bin and 1 into the last.
    index = np.searchsorted(edges[1:-1], probabilities)
    count, probability_sum, positives = (
        np.bincount(index, weights, bins) for weights in (None, probabilities, labels)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return probability_sum / count, positives / count, count.astype(float)


def expected_calibration_error(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], bins: int = 15
) -> float:
    """Computes the mean distance of probabilities from observed rates: 0 (calibrated) to 1.

    *Guo et al. (arXiv 1706.04599): ECE = sum_k n_k / N |share of positives_k - mean probability_k|*
    over the bins of `calibration`, with n_k of the N rows in bin k. For more than two classes pass
    the largest probability of each row, and whether its class is correct. NaN without rows.

    >>> round(expected_calibration_error(np.array([0.75, 0.75]), np.array([True, False])), 3)
    0.25
    """
    if not len(probabilities) or _any_nan(probabilities):
        return NAN
    probability, rate, count = calibration(probabilities, labels, bins)
    # An empty bin is NaN and has weight 0, so it adds nothing.
    return float(np.sum(count * np.nan_to_num(np.abs(rate - probability))) / len(probabilities))


def _any_nan(scores: Shaped[np.ndarray, "N ..."]) -> bool:
    return bool(np.isnan(scores).any())


def _one_class(labels: Bool[np.ndarray, " N"]) -> bool:
    return bool(labels.all() or not labels.any())

"""The formulas by which classifiers are judged: F1, AUPRC, accuracy, ROC points, calibration.

The rules are those of `metrics`: a score that is NaN gives NaN, and what is not defined by its
formula is defined here. Scores of the same value are always treated alike, so that a classifier
which gives every image the same answer gains nothing from the order of the images or classes. A
truth without positives, or of one class only, gives NaN where the number would say nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import rankdata

NAN = float("nan")
Uncertain = Literal["ignore", "zero", "one", "mgca"]
# What an uncertain label becomes in MGCA's code (`constants.py`, after CheXpert, arXiv 1901.07031).
MGCA = {"atelectasis": 1, "cardiomegaly": 0, "consolidation": 0, "edema": 1, "pleural effusion": 1}


class Judged(NamedTuple):
    """What a classifier says of N images, which findings are present, and where that is known."""

    scores: Float[np.ndarray, "N F"]
    truth: Bool[np.ndarray, "N F"]
    known: Bool[np.ndarray, "N F"]


def truths(
    labels: Int[np.ndarray, "N F"], names: Sequence[str], uncertain: Uncertain
) -> tuple[Bool[np.ndarray, "N F"], Bool[np.ndarray, "N F"]]:
    """Say where each finding is present, and where that is known.

    1 is present, 0 absent, -1 what `uncertain` makes of it: not known (`ignore`), absent, present,
    or by MGCA's table for CheXpert's five findings, by lower-cased name, other findings absent.

    >>> [x.tolist() for x in truths(np.array([[-1, -1, 0]]), ["Edema", "mass", "nodule"], "mgca")]
    [[[True, False, False]], [[True, True, True]]]
    """
    value = {"ignore": 0, "zero": 0, "one": 1}.get(uncertain)
    made = [MGCA.get(name.lower(), 0) if value is None else value for name in names]
    unsure = labels < 0
    present = np.where(unsure, np.array(made, bool), labels == 1)
    return present, ~unsure if uncertain == "ignore" else np.ones_like(unsure)


def two_sided(
    truth: Bool[np.ndarray, "N F"], known: Bool[np.ndarray, "N F"]
) -> Bool[np.ndarray, " F"]:
    """Say which findings are known to be present somewhere and absent somewhere.

    >>> two_sided(np.array([[True, True], [False, True]]), np.ones((2, 2), bool)).tolist()
    [True, False]
    """
    return (truth & known).any(0) & (~truth & known).any(0)


def each_finding(
    metric: Callable[..., Any],
    judged: Judged,
    columns: Sequence[int],
    thresholds: Sequence[float] | None = None,
) -> list[Any]:
    """Apply `metric(scores, labels)` to some findings over the images where they are known.

    With `thresholds`, one for each of the columns, it is `metric(scores, labels, threshold)`.
    """
    values = []
    for n, i in enumerate(columns):
        known = judged.known[:, i]
        more = () if thresholds is None else (thresholds[n],)
        values.append(metric(judged.scores[known, i], judged.truth[known, i], *more))
    return values


def mean(values: Sequence[float]) -> float:
    """Average values; NaN for none, and where one is NaN."""
    return float(np.mean(values)) if len(values) else NAN


def average_precision(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Give the area under the precision-recall curve as a step function (AUPRC): 0 to 1.

    *AP = sum_n (R_n - R_{n-1}) P_n* over the distinct scores from high to low, with recall R and
    precision P of all that scores at least as much; no interpolation (that of scikit-learn's
    `average_precision_score`). Tied scores are one step: a constant classifier gets the share of
    positives. NaN with one class only (scikit-learn says 0 or 1 there).

    >>> average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    0.8333333333333333
    """
    if not _decided(scores) or not _both(labels):
        return NAN
    _, right, called = _steps(scores, labels)
    recall = right / right[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * right / called))


def f1(
    scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], threshold: float = 0.5
) -> float:
    """Give the harmonic mean of precision and recall of {score >= threshold}: 0 to 1.

    *F1 = 2 TP / (2 TP + FP + FN)*. A classifier that calls nothing scores 0. NaN for a truth
    without positives (scikit-learn warns and says 0), and for a threshold that is NaN.

    >>> round(f1(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])), 3)
    0.5
    """
    if not _decided(scores) or np.isnan(threshold):
        return NAN
    return _f1((scores >= threshold).astype(float), labels)


def accuracy(
    scores: Float[np.ndarray, "N *F"], labels: Bool[np.ndarray, "N *F"], threshold: float = 0.5
) -> float:
    """Give the share of right answers: 0 to 1.

    Scores [N] and labels [N]: a call is {score >= threshold}. Scores [N F] and one-hot labels
    [N F]: the class of the largest score, where `threshold` plays no part and classes that tie
    share the vote, so that a constant classifier scores 1 / F. NaN for no rows.

    >>> accuracy(np.array([0.9, 0.8, 0.1]), np.array([True, False, False]))
    0.6666666666666666
    >>> accuracy(np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([[False, True], [True, False]]))
    0.75
    """
    if not len(scores) or not _decided(scores) or np.isnan(threshold):
        return NAN
    if scores.ndim == 1:
        return float(np.mean((scores >= threshold) == labels))
    return float(np.mean((votes(scores) * labels).sum(1)))


def votes(scores: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
    """Give each row's vote to the class with the largest score, in equal parts to those that tie.

    A row with NaN gives NaN.

    >>> votes(np.array([[0.1, 0.7, 0.7], [3.0, 2.0, 1.0]])).tolist()
    [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    """
    best = (scores == scores.max(1, keepdims=True)).astype(float)
    unsure = np.isnan(scores).any(1, keepdims=True)
    return np.where(unsure, np.nan, best / np.maximum(best.sum(1, keepdims=True), 1))


def macro_f1(
    scores: Float[np.ndarray, "N F"],
    labels: Bool[np.ndarray, "N F"],
    thresholds: Float[np.ndarray, " F"] | None = None,
) -> float:
    """Average the F1 of each column over the columns that have positives: 0 to 1.

    With `thresholds` a call is {score >= threshold of its column} (multi-label); without, the class
    of the row's largest score (multi-class; classes that tie share the call). A class without
    positives is left out (scikit-learn counts it as 0 if it was called). NaN if there is none left.

    >>> macro_f1(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([[True, False], [False, True]]))
    0.3333333333333333
    """
    if not _decided(scores) or (thresholds is not None and np.isnan(thresholds).any()):
        return NAN
    called = votes(scores) if thresholds is None else (scores >= thresholds).astype(float)
    some = np.flatnonzero(labels.any(0))
    each = [_f1(called[:, i], labels[:, i]) for i in some]
    return mean(each)


def best_threshold(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Find the threshold at which {score >= threshold} has the highest F1.

    To be chosen on validation data only. The thresholds tried are the scores themselves; among
    equals the highest is taken, which calls the fewest (ours). Without positives every threshold is
    as bad: infinity, nothing is called. NaN scores give NaN.

    >>> best_threshold(np.array([0.9, 0.6, 0.4, 0.1]), np.array([True, False, True, False]))
    0.4
    """
    if not _decided(scores):
        return NAN
    if not labels.any():
        return float("inf")
    level, right, called = _steps(scores, labels)
    return float(level[np.argmax(2 * right / (called + right[-1]))])


def roc_curve(
    scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Give the points of the ROC curve: false and true positive rates, from (0, 0) to (1, 1).

    One point for each distinct score, from high to low; tied scores are one straight step, so that
    the area by trapezoids is `auroc`. A single NaN with one class only, or NaN scores.

    >>> [x.tolist() for x in roc_curve(np.array([0.9, 0.5, 0.5]), np.array([True, False, True]))]
    [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    if not _decided(scores) or not _both(labels):
        return np.full(1, np.nan), np.full(1, np.nan)
    _, right, called = _steps(scores, labels)
    wrong = called - right
    return np.r_[0.0, wrong / wrong[-1]], np.r_[0.0, right / right[-1]]


def calibration(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], bins: int = 15
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Give the points of the reliability diagram: mean probability, share of positives, count.

    *Guo et al. (arXiv 1706.04599): K = 15 bins ((k - 1) / K, k / K] of equal width*; 0 is in the
    first. An empty bin has count 0 and NaN for the rest; NaN in the probabilities makes all NaN.

    >>> happened = np.array([True, False, True])
    >>> [x.tolist() for x in calibration(np.array([0.1, 0.3, 0.8]), happened, 2)]
    [[0.2, 0.8], [0.5, 1.0], [2.0, 1.0]]
    """
    if not _decided(probabilities):
        return tuple(np.full(bins, np.nan) for _ in range(3))
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], probabilities)
    count, said, happened = (
        np.bincount(place, weights, bins) for weights in (None, probabilities, labels)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return said / count, happened / count, count.astype(float)


def expected_calibration_error(
    probabilities: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"], bins: int = 15
) -> float:
    """Average how far probabilities are from what happened: 0 (calibrated) to 1.

    *Guo et al. (arXiv 1706.04599): ECE = sum_k n_k / N |share of positives_k - mean probability_k|*
    over the bins of `calibration`. For many classes give the largest probability of each row and
    whether its class is right. NaN for no rows.

    >>> round(expected_calibration_error(np.array([0.75, 0.75]), np.array([True, False])), 3)
    0.25
    """
    if not len(probabilities) or not _decided(probabilities):
        return NAN
    said, happened, count = calibration(probabilities, labels, bins)
    return float(np.sum(count * np.nan_to_num(np.abs(happened - said))) / len(probabilities))


def _steps(
    scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the distinct scores from high to low, with the positives and rows that reach each."""
    level, place = np.unique(-scores, return_inverse=True)
    right = np.bincount(place, labels, len(level)).cumsum()
    return -level, right, np.bincount(place, minlength=len(level)).cumsum()


def _f1(called: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Give F1 of calls, which may be parts of a call; NaN without positives."""
    positive = labels.sum()
    return float(2 * called[labels].sum() / (called.sum() + positive)) if positive else NAN


def _decided(scores: Shaped[np.ndarray, "N ..."]) -> bool:
    return not np.isnan(scores).any()


def _both(labels: Bool[np.ndarray, " N"]) -> bool:
    return bool(labels.any() and not labels.all())


def auroc(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float:
    """Give the chance that a positive scores above a negative, ties counted half: 0 to 1.

    *Mann-Whitney: (sum of positive ranks - n1 (n1 + 1) / 2) / (n1 n0)*. NaN with one class only.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative or np.isnan(scores).any():
        return float("nan")
    ranks = rankdata(scores)[labels].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))

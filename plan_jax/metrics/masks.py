"""Metrics of segmentation masks: Dice and intersection over union, one value for each image.

All published numbers depend on how an image without a true mask is counted, so the name of a metric
says its convention. Deviation: MGCA (arXiv 2210.06044) averages the means of batches, which gives
the images of a smaller last batch more weight; here the mean is over images.
"""

import numpy as np
from jaxtyping import Bool, Float


def dice(
    predicted: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """Computes the Dice coefficient of each image: 0 to 1.

    *Dice = 2 |A and B| / (|A| + |B|)*, A the predicted and B the true pixels. An image without a
    true mask scores 1 if its predicted mask is empty too, else 0: the convention of MGCA's code and
    of the SIIM challenge.

    >>> dice(np.array([[True, True], [False, False]]), np.array([[True, False], [False, False]]))
    array([0.66666667, 1.        ])
    """
    return _ratio(2 * (predicted & truth).sum(1), predicted.sum(1) + truth.sum(1))


def iou(
    predicted: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """Computes the intersection over union of each image: 0 to 1.

    *IoU = |A and B| / |A or B|*, A the predicted and B the true pixels. An image without a true
    mask scores 1 if its predicted mask is empty too, else 0.

    >>> iou(np.array([[True, True], [True, False]]), np.array([[True, False], [False, False]]))
    array([0.5, 0. ])
    """
    return _ratio((predicted & truth).sum(1), (predicted | truth).sum(1))


def dice_positive(
    predicted: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """Computes Dice of the images that have a true mask; the others are NaN, see `nan_mean`.

    The convention of LoVT (arXiv 2112.02889). With it a decoder that predicts only empty masks
    scores 0, however many images have no true mask.

    >>> dice_positive(np.array([[True, True]] * 2), np.array([[True, False], [False, False]]))
    array([0.66666667,        nan])
    """
    return np.where(truth.any(1), dice(predicted, truth), np.nan)


def nan_mean(values: Float[np.ndarray, " N"]) -> float:
    """Returns the mean of the values that are not NaN; NaN, without a warning, if all are.

    >>> nan_mean(np.array([1.0, np.nan, 0.0]))
    0.5
    """
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, and 1 where `whole` is 0: both masks are empty and agree."""
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))

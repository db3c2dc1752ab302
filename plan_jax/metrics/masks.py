"""How well masks agree: Dice and intersection over union, for each image.

Every public number rests on what an image without truth counts for, so the convention stands in the
name. Deviation: MGCA (arXiv 2210.06044) averages the means of batches, so that the images of a
smaller last batch weigh more; here the mean is that of images.
"""

import numpy as np
from jaxtyping import Bool, Float


def dice(found: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]) -> Float[np.ndarray, " N"]:
    """Measure the overlap of each image: 0 to 1.

    *Dice = 2 |A and B| / (|A| + |B|)*. An image without truth scores 1 if nothing is found in it,
    else 0: the convention of MGCA's code and of the SIIM challenge.

    >>> dice(np.array([[True, True], [False, False]]), np.array([[True, False], [False, False]]))
    array([0.66666667, 1.        ])
    """
    return _share(2 * (found & truth).sum(1), found.sum(1) + truth.sum(1))


def iou(found: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]) -> Float[np.ndarray, " N"]:
    """Measure the overlap of each image as intersection over union: 0 to 1.

    *IoU = |A and B| / |A or B|*; an image without truth scores 1 if nothing is found in it, else 0.

    >>> iou(np.array([[True, True], [True, False]]), np.array([[True, False], [False, False]]))
    array([0.5, 0. ])
    """
    return _share((found & truth).sum(1), (found | truth).sum(1))


def dice_positive(
    found: Bool[np.ndarray, "N P"], truth: Bool[np.ndarray, "N P"]
) -> Float[np.ndarray, " N"]:
    """Measure the overlap of each image that has a truth; the others are NaN, so use `nanmean`.

    The convention of LoVT (arXiv 2112.02889); by it a decoder that finds nothing scores 0, however
    many images are without truth.

    >>> dice_positive(np.array([[True, True]] * 2), np.array([[True, False], [False, False]]))
    array([0.66666667,        nan])
    """
    return np.where(truth.any(1), dice(found, truth), np.nan)


def mean_known(values: Float[np.ndarray, " N"]) -> float:
    """Average what is not NaN; NaN if nothing is.

    >>> mean_known(np.array([1.0, np.nan, 0.0]))
    0.5
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))

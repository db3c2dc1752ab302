"""Metrics of a heat map against the region where its phrase is true.

A map with NaN or infinity scores NaN. Cases that the papers leave open, as a constant map and ties,
are defined here such that a model cannot score by the order of its pixels in memory.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt

Normalisation = Literal["raw", "minmax", "z"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)

# Differences below this fraction of a map's largest value are rounding errors.
_RELATIVE_NOISE = 1e-6
# Smallest standard deviation in units of a map's range. Without it the CNR of a map that equals
# the truth would be infinite, and one such map would dominate every mean.
_MIN_DEVIATION = 1e-3


def bilinear_matrix(num_inputs: int, num_outputs: int) -> Float[np.ndarray, "outputs inputs"]:
    """Returns the matrix that resizes a line of samples bilinearly.

    Samples are pixel centres (half-pixel convention: torch's `align_corners=False`). Outputs beyond
    the first or last input centre repeat that input. Every row sums to one.

    >>> bilinear_matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    return interpolation_matrix((np.arange(num_outputs) + 0.5) / num_outputs, num_inputs)


def interpolation_matrix(
    positions: Float[np.ndarray, " outputs"], num_inputs: int
) -> Float[np.ndarray, "outputs {num_inputs}"]:
    """Returns the matrix that interpolates a line of samples linearly.

    >>> interpolation_matrix(np.array([0.25, 0.5, 1.0]), 2).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]

    Args:
      positions: of the outputs, as fractions of the length of the line.
      num_inputs: number of samples, at the centres of equal parts of the line. Positions beyond the
        first or last centre repeat that sample.
    """
    centre = np.clip(positions * num_inputs - 0.5, 0, num_inputs - 1)
    lower = np.floor(centre).astype(int)
    upper = np.minimum(lower + 1, num_inputs - 1)
    matrix = np.zeros((len(positions), num_inputs), np.float32)
    # `add.at` sums both weights where lower and upper are the same input, at the last one.
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, lower), 1 - (centre - lower))
    np.add.at(matrix, (rows, upper), centre - lower)
    return matrix


def upsample(maps: Float[np.ndarray, "B y x"], size: tuple[int, int]) -> Float[np.ndarray, "B Y X"]:
    """Returns maps resized bilinearly to `size` = (Y, X), by one matrix product for each side."""
    if maps.shape[1:] == tuple(size):
        return maps
    rows, columns = (bilinear_matrix(*pair) for pair in zip(maps.shape[1:], size, strict=True))
    return rows @ (maps.astype(np.float32) @ columns.T)


def contrast_to_noise(
    maps: Float[np.ndarray, "B P"], truth: Bool[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Computes how far a map stands out inside the truth, in units of its own spread.

    *BioViL (arXiv 2204.09817): CNR = (mean_in - mean_out) / sqrt(var_in + var_out)*, where `in` are
    the pixels of the truth and `out` the rest of the image. It is signed here; the paper takes the
    absolute value. An affine change of a map with positive slope does not change it.

    A constant map scores 0. The denominator is at least 1e-3 of the map's range, so a map that is
    the truth itself scores 1000 and not infinity. A truth that is empty or covers the whole map
    gives NaN.
    """
    low, high = maps.min(1), maps.max(1)
    inside = truth.astype(maps.dtype)
    count_in = inside.sum(1)
    count_out = truth.shape[1] - count_in
    with np.errstate(invalid="ignore", divide="ignore"):
        # On the scale 0..1 the squares below neither overflow nor lose small contrasts.
        level = (maps - low[:, None]) / (high - low)[:, None]
        total = level.sum(1)
        total_in = np.einsum("bp,bp->b", level, inside)
        mean_in, mean_out = total_in / count_in, (total - total_in) / count_out
        # In place: `level` becomes the squared deviation from the mean of its own side.
        level -= np.where(truth, mean_in[:, None], mean_out[:, None])
        level *= level
        total_in = np.einsum("bp,bp->b", level, inside)
        variance = total_in / count_in + (level.sum(1) - total_in) / count_out
        ratio = (mean_in - mean_out) / np.maximum(np.sqrt(variance), _MIN_DEVIATION)
    ratio = np.where(_is_constant(low, high), 0.0, ratio)
    undefined = (count_in == 0) | (count_out == 0) | ~_is_finite(low, high)
    return np.where(undefined, np.nan, ratio)


def pointing(
    maps: Float[np.ndarray, "B P"], truth: Bool[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Returns 1 where the highest pixel of a map lies in the truth, else 0; ties share the point.

    *Pointing game (Zhang et al., arXiv 1608.00507), without tolerance around the truth.* The first
    of several equal maxima would favour a corner. The expected value over them does not, so a
    constant map scores the truth's share of the image.
    """
    peak, is_finite = _find_peaks(maps)
    share = (peak & truth).sum(1) / np.maximum(peak.sum(1), 1)
    return np.where(is_finite, share, np.nan)


def pointing_near(
    maps: Float[np.ndarray, "B Y X"], truth: Bool[np.ndarray, "B Y X"], radius: float
) -> Float[np.ndarray, " B"]:
    """Returns `pointing` with a tolerance: a peak up to `radius` pixels from the truth is a hit.

    *Zhang et al., arXiv 1608.00507*, who allow 15 pixels in the image that their network sees.
    Distances are between the centres of pixels. An empty truth is near nothing.
    """
    batch, rows, columns = maps.shape
    peak, is_finite = _find_peaks(maps.reshape(batch, -1))
    shares = np.full(batch, np.nan)
    for index in np.flatnonzero(is_finite).tolist():
        inside = truth[index]
        if not inside.any():
            shares[index] = 0
            continue
        # Most maps have one peak; a constant map has as many as pixels.
        y, x = np.divmod(np.flatnonzero(peak[index]), columns)
        truth_y, truth_x = np.nonzero(inside)
        if len(y) * len(truth_y) <= rows * columns:
            distance = np.hypot(y[:, None] - truth_y, x[:, None] - truth_x).min(1)
        else:
            distance = distance_transform_edt(~inside)[y, x]
        shares[index] = (distance <= radius).mean()
    return shares


def wrong_side(
    maps: Float[np.ndarray, "B Y X"], truth: Bool[np.ndarray, "B Y X"]
) -> Float[np.ndarray, " B"]:
    """Returns the share of a map's mass in the half of the image that does not hold the truth.

    The mass of a pixel is *max(S - mean S, 0)*, as in the `z` normalisation. NaN where the truth
    lies on both sides of the middle column of pixels, or nowhere; 0.5 for a constant map. Ours: the
    middle of the image stands for that of the patient.
    """
    middle = maps.shape[2] / 2
    left = np.arange(maps.shape[2]) + 0.5 < middle
    columns = truth.any(1)
    on_left, on_right = (columns & left).any(1), (columns & ~left).any(1)
    low, high = maps.min((1, 2)), maps.max((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        mass = np.maximum(maps - maps.mean((1, 2), keepdims=True), 0).sum(1)
        total = mass.sum(1)
        wrong = np.where(on_left, mass[:, ~left].sum(1), mass[:, left].sum(1)) / total
    wrong = np.where(_is_constant(low, high), 0.5, wrong)
    return np.where((on_left != on_right) & _is_finite(low, high), wrong, np.nan)


def _find_peaks(
    maps: Float[np.ndarray, "B P"],
) -> tuple[Bool[np.ndarray, "B P"], Bool[np.ndarray, " B"]]:
    """Returns the highest pixels of each map, and which maps are finite."""
    low, high = maps.min(1), maps.max(1)
    margin = _RELATIVE_NOISE * np.maximum(abs(low), abs(high))
    with np.errstate(invalid="ignore"):
        return maps >= (high - margin)[:, None], _is_finite(low, high)


def normalise(
    maps: Float[np.ndarray, "B P"], normalisation: Normalisation
) -> Float[np.ndarray, "B P"]:
    """Returns maps on the scale of the thresholds of `mean_iou`.

    - `raw`: *max(S, 0)*, for maps S that are cosines already.
    - `minmax`: *(S - min S) / (max S - min S)*.
    - `z`: *max(S - mean S, 0) / max(S - mean S)*.

    A constant map becomes 0 under `minmax` and `z`.

    >>> normalise(np.array([[-1.0, 0.0, 4.0]]), "minmax").tolist()
    [[0.0, 0.2, 1.0]]
    """
    if normalisation == "raw":
        return np.maximum(maps, 0)
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    zero = low if normalisation == "minmax" else maps.mean(1, keepdims=True)
    is_constant = _is_constant(low, high)
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.maximum(maps - zero, 0) / np.where(is_constant, 1, high - zero)
    return np.where(is_constant, 0, level)


def mean_iou(
    maps: Float[np.ndarray, "B P"],
    truth: Bool[np.ndarray, "B P"],
    normalisation: Normalisation,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[np.ndarray, " B"]:
    """Returns the overlap of a thresholded map with the truth, averaged over thresholds.

    *IoU = |A and B| / |A or B|*, from 0 to 1, where A are the pixels above a threshold after
    `normalise` and B is the truth. The normalisation changes the value a lot, so a report has to
    name it.

    A map without a pixel above a threshold scores 0 there; public code omits such maps, which
    rewards flat maps. An empty truth gives NaN.
    """
    is_finite = _is_finite(maps.min(1), maps.max(1))
    level = normalise(maps, normalisation)
    inside = truth.astype(np.float32)
    size = inside.sum(1)
    total = np.zeros(len(maps))
    for threshold in thresholds:
        above = (level > threshold).astype(np.float32)
        overlap = np.einsum("bp,bp->b", above, inside)
        total += overlap / np.maximum(above.sum(1) + size - overlap, 1)
    return np.where(is_finite & (size > 0), total / len(thresholds), np.nan)


def afloc_ious(
    maps: Float[np.ndarray, "B P"],
    truth: Bool[np.ndarray, "B P"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[np.ndarray, "B T"]:
    """Returns the overlap of a map with the truth at each of T thresholds, as AFLoc's code has it.

    Maps are scaled to [-1, 1], so that thresholds of .1 to .5 are .55 to .75 of `minmax`. A map
    without a pixel above a threshold, an empty truth and a constant map give NaN, and AFLoc leaves
    them out of its means: fewer, surer maps are rewarded. Compare `mean_iou`.

    >>> afloc_ious(np.array([[0.0, 0.7, 1.0]]), np.array([[False, False, True]])).tolist()
    [[0.5, 0.5, 0.5, 1.0, 1.0]]
    """
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        level = 2 * (maps - low) / np.where(_is_constant(low, high), np.nan, high - low) - 1
    ious = np.full((len(maps), len(thresholds)), np.nan)
    for column, threshold in enumerate(thresholds):
        above = level > threshold  # nowhere in a map of NaN
        is_defined = above.any(1) & truth.any(1)
        overlap, union = (above & truth).sum(1), (above | truth).sum(1)
        ious[is_defined, column] = overlap[is_defined] / union[is_defined]
    return ious


def _is_finite(low: Float[np.ndarray, "..."], high: Float[np.ndarray, "..."]) -> np.ndarray:
    # NaN spreads to the minimum, and infinity is one of the two.
    return np.isfinite(low) & np.isfinite(high)


def _is_constant(low: Float[np.ndarray, "..."], high: Float[np.ndarray, "..."]) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return high - low <= _RELATIVE_NOISE * np.maximum(abs(low), abs(high))

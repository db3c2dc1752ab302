"""Scores of a heat map against the region where its phrase is true.

A map with NaN or infinity scores NaN. Cases that the papers leave open (a constant map, ties) are
defined here, so that a model without an opinion cannot score by the order of its memory.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
NORMALISATIONS = ("raw", "minmax", "z")
_NOISE = 1e-6  # differences below this fraction of a map's largest value are rounding


def interpolation(inside: int, outside: int) -> Float[np.ndarray, "outside inside"]:
    """Make the matrix that resizes a line of `inside` samples bilinearly to `outside` samples.

    Samples are pixel centres (half-pixel convention: torch's `align_corners=False`), the ends are
    held; every row sums to one.

    >>> interpolation(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    centre = (np.arange(outside) + 0.5) * inside / outside - 0.5
    centre = np.clip(centre, 0, inside - 1)
    low = np.floor(centre).astype(int)
    high = np.minimum(low + 1, inside - 1)
    matrix = np.zeros((outside, inside), np.float32)
    np.add.at(matrix, (np.arange(outside), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(outside), high), centre - low)
    return matrix


def upsample(maps: Float[np.ndarray, "B y x"], size: tuple[int, int]) -> Float[np.ndarray, "B Y X"]:
    """Resize maps bilinearly to `size` = (Y, X): one matrix product for each side."""
    if maps.shape[1:] == tuple(size):
        return maps
    rows, columns = (interpolation(a, b) for a, b in zip(maps.shape[1:], size, strict=True))
    return rows @ (maps.astype(np.float32) @ columns.T)


def contrast_to_noise(
    maps: Float[np.ndarray, "B P"], truth: Bool[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Measure how far a map stands out inside the truth, in units of its own spread.

    *BioViL (arXiv 2204.09817): CNR = (mean_in - mean_out) / sqrt(var_in + var_out)*, with the rest
    of the image as outside; signed here, the paper takes the absolute value. Any affine change of a
    map with positive slope leaves it unchanged. A constant map scores 0. The denominator is at
    least 1e-3 of the map's range: a map that is the truth itself scores 1000 and not infinity. A
    truth that is empty or covers the whole map gives NaN.
    """
    low, high = maps.min(1), maps.max(1)
    span = high - low
    inside = truth.astype(maps.dtype)
    count = inside.sum(1)
    rest = truth.shape[1] - count
    with np.errstate(invalid="ignore", divide="ignore"):
        level = (maps - low[:, None]) / span[:, None]
        total = level.sum(1)
        within = np.einsum("bp,bp->b", level, inside)
        mean_in, mean_out = within / count, (total - within) / rest
        level -= np.where(truth, mean_in[:, None], mean_out[:, None])
        level *= level
        within = np.einsum("bp,bp->b", level, inside)
        variance = within / count + (level.sum(1) - within) / rest
        ratio = (mean_in - mean_out) / np.maximum(np.sqrt(variance), 1e-3)
    ratio = np.where(_constant(low, high), 0.0, ratio)
    undefined = (count == 0) | (rest == 0) | ~_finite(low, high)
    return np.where(undefined, np.nan, ratio)


def pointing(
    maps: Float[np.ndarray, "B P"], truth: Bool[np.ndarray, "B P"]
) -> Float[np.ndarray, " B"]:
    """Say whether the map's highest pixel lies in the truth: 1 or 0, the share of hits among ties.

    *Pointing game (Zhang et al., arXiv 1608.00507), without tolerance around the truth.* Taking the
    first of equal maxima would favour a corner; the expected value over them does not, so that a
    constant map scores the truth's share of the image.
    """
    low, high = maps.min(1), maps.max(1)
    margin = _NOISE * np.maximum(abs(low), abs(high))
    with np.errstate(invalid="ignore"):
        peak = maps >= (high - margin)[:, None]
        share = (peak & truth).sum(1) / np.maximum(peak.sum(1), 1)
    return np.where(_finite(low, high), share, np.nan)


def normalise(maps: Float[np.ndarray, "B P"], how: str) -> Float[np.ndarray, "B P"]:
    """Bring maps to the scale on which thresholds are read.

    `raw`: max(S, 0), for maps that are cosines already; `minmax`: (S - min) / (max - min);
    `z`: max(S - mean, 0) / its maximum. A constant map becomes 0 under `minmax` and `z`.

    >>> normalise(np.array([[-1.0, 0.0, 4.0]]), "minmax").tolist()
    [[0.0, 0.2, 1.0]]
    """
    if how == "raw":
        return np.maximum(maps, 0)
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    zero = {"minmax": low, "z": maps.mean(1, keepdims=True)}[how]
    flat = _constant(low, high)
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.maximum(maps - zero, 0) / np.where(flat, 1, high - zero)
    return np.where(flat, 0, level)


def mean_iou(
    maps: Float[np.ndarray, "B P"],
    truth: Bool[np.ndarray, "B P"],
    how: str,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[np.ndarray, " B"]:
    """Average the overlap of {map > t} with the truth over thresholds t, after `normalise(how)`.

    *IoU = |A and B| / |A or B|*, 0 to 1; the normalisation moves it a lot, so name it beside the
    number. A map nowhere above a threshold scores 0 there (public code leaves such maps out, which
    rewards silence). An empty truth gives NaN.
    """
    finite = _finite(maps.min(1), maps.max(1))
    level = normalise(maps, how)
    inside = truth.astype(np.float32)
    size = inside.sum(1)
    total = np.zeros(len(maps))
    for threshold in thresholds:
        above = (level > threshold).astype(np.float32)
        both = np.einsum("bp,bp->b", above, inside)
        total += both / np.maximum(above.sum(1) + size - both, 1)
    return np.where(finite & (size > 0), total / len(thresholds), np.nan)


def _finite(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.isfinite(low) & np.isfinite(high)


def _constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return high - low <= _NOISE * np.maximum(abs(low), abs(high))

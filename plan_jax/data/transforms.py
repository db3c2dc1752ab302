"""Fitting radiographs to a square and moving them a little, together with their boxes and masks."""

from dataclasses import replace
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image

from plan_jax.types import Record


def fit(image: UInt8[np.ndarray, "Y X 1"], size: int) -> UInt8[np.ndarray, "size size 1"]:
    """Scale the longer side to `size`, keep the aspect, and pad with black around the centre.

    >>> fit(np.full((2, 4, 1), 9, np.uint8), 4)[..., 0].tolist()
    [[0, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [0, 0, 0, 0]]
    """
    if image.shape[:2] == (size, size):
        return image
    y, x, top, left = _placed(image.shape[:2], size)
    out = np.zeros((size, size, 1), np.uint8)
    out[top : top + y, left : left + x, 0] = resize(image[..., 0], y, x)
    return out


def fit_boxes(
    boxes: Float[np.ndarray, "n 4"], shape: tuple[int, int], size: int
) -> Float[np.ndarray, "n 4"]:
    """Move boxes (x0, y0, x1, y1; pixels of an image of `shape` rows, columns) as `fit` does it.

    >>> fit_boxes(np.asarray([[0.0, 0.0, 4.0, 2.0]]), (2, 4), 8).tolist()
    [[0.0, 2.0, 8.0, 6.0]]
    """
    y, x, top, left = _placed(shape, size)
    scale = np.asarray([x / shape[1], y / shape[0]] * 2, boxes.dtype)
    return boxes * scale + np.asarray([left, top] * 2, boxes.dtype)


def fit_mask(mask: Bool[np.ndarray, "Y X"], size: int) -> Bool[np.ndarray, "size size"]:
    """Fit a mask as `fit` does it; a pixel is True where at least half of it was."""
    if mask.shape == (size, size):
        return mask
    return fit(mask[..., None].astype(np.uint8) * 255, size)[..., 0] >= 128


def fit_record(record: Record, size: int) -> Record:
    """Fit a study to a square: image, boxes, phrase masks and anatomy together."""
    shape = record.image.shape[:2]
    if shape == (size, size):
        return record
    phrases = tuple(
        replace(
            phrase,
            boxes=tuple(
                tuple(map(float, box))
                for box in fit_boxes(
                    np.asarray(phrase.boxes, np.float64).reshape(-1, 4), shape, size
                )
            ),
            mask=None if phrase.mask is None else fit_mask(phrase.mask, size),
        )
        for phrase in record.phrases
    )
    anatomy = {name: fit_mask(mask, size) for name, mask in record.anatomy.items()}
    return replace(record, image=fit(record.image, size), phrases=phrases, anatomy=anatomy)


def draw(rng: np.random.Generator, shift: int) -> tuple[int, int]:
    """Draw by how much to move an image in training: rows down, columns right, at most `shift`.

    It is never mirrored: left and right are part of what a report says.
    """
    if shift == 0:
        return 0, 0
    down, right = rng.integers(-shift, shift + 1, 2)
    return int(down), int(right)


def move(
    image: Shaped[np.ndarray, "Y X *C"], down: int, right: int
) -> Shaped[np.ndarray, "Y X *C"]:
    """Move an image or a mask, repeating its edges.

    >>> move(np.asarray([[1, 2, 3]]), 0, 1).tolist()
    [[1, 1, 2]]
    """
    rows = _clipped(image.shape[0], down)
    columns = _clipped(image.shape[1], right)
    return image.take(rows, axis=0).take(columns, axis=1)


def move_boxes(
    boxes: Float[np.ndarray, "n 4"], down: int, right: int, size: int
) -> Float[np.ndarray, "n 4"]:
    """Move boxes as `move` does it, cut at the border.

    >>> move_boxes(np.asarray([[0.0, 1.0, 2.0, 3.0]]), 2, -1, 4).tolist()
    [[0.0, 3.0, 1.0, 4.0]]
    """
    offset = np.asarray([right, down, right, down], boxes.dtype)
    return np.clip(boxes + offset, 0, size)


def resize(image: UInt8[np.ndarray, "Y X"], y: int, x: int) -> UInt8[np.ndarray, "{y} {x}"]:
    """Resize to y rows and x columns with a triangle filter: linear up, antialiased down."""
    if image.shape == (y, x):
        return image
    return np.asarray(Image.fromarray(image).resize((x, y), Image.Resampling.BILINEAR))


def longest_side(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the rows and columns of an image scaled to the longer side `size`.

    >>> longest_side((1000, 800), 96)
    (96, 77)
    """
    longer = max(shape)
    return max(1, round(shape[0] * size / longer)), max(1, round(shape[1] * size / longer))


def _placed(shape: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    y, x = longest_side(shape, size)
    return y, x, (size - y) // 2, (size - x) // 2


@cache  # a handful of offsets, thousands of images
def _clipped(length: int, offset: int) -> Int[np.ndarray, " length"]:
    return np.clip(np.arange(length) - offset, 0, length - 1)

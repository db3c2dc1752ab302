"""Geometric transforms of an image with its boxes and masks: fit to a square, and shift."""

from dataclasses import replace
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image

from plan_jax.types import Geometry, Record

# Fit to a square ------------------------------------------------------------------------------


def fit_image(image: UInt8[np.ndarray, "Y X 1"], size: int) -> UInt8[np.ndarray, "size size 1"]:
    """Scales the longer side to `size`, keeps the aspect ratio, and centres on a black square.

    >>> fit_image(np.full((2, 4, 1), 9, np.uint8), 4)[..., 0].tolist()
    [[0, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [0, 0, 0, 0]]
    """
    if image.shape[:2] == (size, size):
        return image
    rows, columns, top, left = content_area(image.shape[:2], size)
    square = np.zeros((size, size, 1), np.uint8)
    content = resize_image(image[..., 0], rows, columns)
    square[top : top + rows, left : left + columns, 0] = content
    return square


def fit_boxes(
    boxes: Float[np.ndarray, "N 4"], shape: tuple[int, int], size: int
) -> Float[np.ndarray, "N 4"]:
    """Transforms boxes (x0, y0, x1, y1; pixels) of an image as `fit_image` transforms the image.

    >>> fit_boxes(np.asarray([[0.0, 0.0, 4.0, 2.0]]), (2, 4), 8).tolist()
    [[0.0, 2.0, 8.0, 6.0]]

    Args:
      boxes: boxes in the original image. A box without area keeps no area.
      shape: rows and columns of the original image.
      size: side of the square.
    """
    rows, columns, top, left = content_area(shape, size)
    scale = np.asarray([columns / shape[1], rows / shape[0]] * 2, boxes.dtype)
    return boxes * scale + np.asarray([left, top] * 2, boxes.dtype)


def fit_mask(mask: Bool[np.ndarray, "Y X"], size: int) -> Bool[np.ndarray, "size size"]:
    """Transforms a mask as `fit_image` does; a pixel is True where at least half of it was."""
    if mask.shape == (size, size):
        return mask
    return fit_image(mask[..., None].astype(np.uint8) * 255, size)[..., 0] >= 128


def fit_record(record: Record, size: int) -> Record:
    """Fits image, phrase boxes, phrase masks and anatomy of a study to a square.

    `regions` keep the original pixels: only training uses them, and it fits them by itself.
    """
    shape = record.image.shape[:2]
    if shape == (size, size):
        return record
    phrases = tuple(
        replace(
            phrase,
            boxes=_fit_phrase_boxes(phrase.boxes, shape, size),
            mask=None if phrase.mask is None else fit_mask(phrase.mask, size),
        )
        for phrase in record.phrases
    )
    return replace(
        record,
        image=fit_image(record.image, size),
        phrases=phrases,
        anatomy={name: fit_mask(mask, size) for name, mask in record.anatomy.items()},
        geometry=_fit_geometry(record.geometry or Geometry(shape), shape, size),
    )


def _fit_geometry(geometry: Geometry, shape: tuple[int, int], size: int) -> Geometry:
    rows, columns, top, left = content_area(shape, size)
    down, across = rows / shape[0], columns / shape[1]
    return Geometry(
        geometry.shape,
        (geometry.scale[0] * down, geometry.scale[1] * across),
        (geometry.offset[0] * down + top, geometry.offset[1] * across + left),
    )


def _fit_phrase_boxes(
    boxes: tuple[tuple[float, float, float, float], ...], shape: tuple[int, int], size: int
) -> tuple[tuple[float, float, float, float], ...]:
    boxes_N4 = fit_boxes(np.asarray(boxes, np.float64).reshape(-1, 4), shape, size)
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_N4.tolist())


def content_area(shape: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Returns rows, columns, top and left of an image inside the square that `fit_image` returns.

    >>> content_area((2, 4), 8)
    (4, 8, 2, 0)
    """
    rows, columns = scale_shape(shape, size)
    return rows, columns, (size - rows) // 2, (size - columns) // 2


def scale_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Returns the rows and columns of an image whose longer side is scaled to `size`.

    >>> scale_shape((1000, 800), 96)
    (96, 77)
    """
    longer = max(shape)
    # A strip much narrower than 1 / size would round to nothing.
    return max(1, round(shape[0] * size / longer)), max(1, round(shape[1] * size / longer))


def resize_image(
    image: UInt8[np.ndarray, "Y X"],
    rows: int,
    columns: int,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> UInt8[np.ndarray, "{rows} {columns}"]:
    """Resizes an image, by default with a triangle filter, which is antialiased downwards.

    Upwards the filter is always linear: the mean over an area would only repeat pixels.
    """
    if image.shape == (rows, columns):
        return image
    return np.asarray(resize_picture(Image.fromarray(image), rows, columns, resampling))


def resize_picture(
    picture: Image.Image, rows: int, columns: int, resampling: Image.Resampling
) -> Image.Image:
    """Resizes a picture of Pillow as `resize_image` does an array, without a copy of its pixels."""
    if rows * columns > picture.width * picture.height:
        resampling = Image.Resampling.BILINEAR
    return picture.resize((columns, rows), resampling)


# Shift ----------------------------------------------------------------------------------------


def draw_shift(rng: np.random.Generator, max_shift: int) -> tuple[int, int]:
    """Draws the shift of a training image: rows down and columns right, each at most `max_shift`.

    Images are never mirrored, because reports name left and right.
    """
    down, right = rng.integers(-max_shift, max_shift + 1, 2)
    return int(down), int(right)


def shift_image(
    image: Shaped[np.ndarray, "Y X *C"], down: int, right: int
) -> Shaped[np.ndarray, "Y X *C"]:
    """Shifts an image or a mask and repeats its edges.

    >>> shift_image(np.asarray([[1, 2, 3]]), 0, 1).tolist()
    [[1, 1, 2]]
    """
    rows = _source_indices(image.shape[0], down)
    columns = _source_indices(image.shape[1], right)
    # Two takes along one axis are several times faster than one index with both.
    return image.take(rows, axis=0).take(columns, axis=1)


def shift_boxes(
    boxes: Float[np.ndarray, "N 4"], down: int, right: int, size: int
) -> Float[np.ndarray, "N 4"]:
    """Shifts boxes as `shift_image` does and cuts them at the border of a square of `size`.

    >>> shift_boxes(np.asarray([[0.0, 1.0, 2.0, 3.0]]), 2, -1, 4).tolist()
    [[0.0, 3.0, 1.0, 4.0]]
    """
    offset = np.asarray([right, down, right, down], boxes.dtype)
    return np.clip(boxes + offset, 0, size)


@cache  # few distinct offsets, thousands of images
def _source_indices(length: int, offset: int) -> Int[np.ndarray, " length"]:
    """Returns the row or column that each shifted row or column is copied from."""
    return np.clip(np.arange(length) - offset, 0, length - 1)

"""Masks of public datasets: decoding of run-length texts, and drawing of shapes.

A pixel (y, x) of an image covers the square from (x, y) to (x + 1, y + 1), and belongs to a shape
if the middle of that square does.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.data.public.items import Shape

Runs: TypeAlias = list[list[int]]

ROUNDING = 1e-6  # of a pixel's covered fraction: half of it may be computed as 0.4999999


# Run-length texts ---------------------------------------------------------------------------------


def parse_relative_runs(text: str, size: tuple[int, int]) -> Runs:
    """Returns the runs of a text of pairs (gap, length), as those of SIIM-ACR.

    A gap is counted from the end of the run before it. Pixels are counted from 0, down the columns.

    >>> parse_relative_runs("2 3 1 2", (4, 2))
    [[2, 3], [6, 2]]

    Args:
      text: whole numbers with blanks between them.
      size: rows and columns of the mask.

    Raises:
      ValueError: it is not such a text, or its runs leave the mask.
    """
    try:
        numbers = [int(number) for number in text.split()]
    except ValueError:
        raise ValueError("the runs are not whole numbers") from None
    if not numbers or len(numbers) % 2:
        raise ValueError("the runs are not pairs of numbers")
    return _place_runs(numbers, size)


def parse_coco_runs(counts: str | Sequence[int], size: tuple[int, int]) -> Runs:
    """Returns the runs of the `counts` of a mask as COCO stores it, as CheXlocalize does.

    The counts are the lengths of background and foreground in turn, down the columns. In a text,
    each is written in digits of five bits, lowest first; from the fourth on, what is written is the
    difference from the count two before.

    >>> parse_coco_runs([2, 3, 1, 2], (4, 2)), parse_coco_runs("231O", (4, 2))
    ([[2, 3], [6, 2]], [[2, 3], [6, 2]])

    Args:
      counts: COCO's compressed text, or the numbers themselves.
      size: rows and columns of the mask.

    Raises:
      ValueError: they are not such counts, or they are not those of a mask of this size.
    """
    numbers = _parse_coco_text(counts) if isinstance(counts, str) else list(counts)
    if sum(numbers) != size[0] * size[1]:
        raise ValueError(f"the runs are not those of {size[0]} x {size[1]} pixels")
    if len(numbers) % 2:
        numbers = numbers[:-1]  # background below the last run
    return _place_runs(numbers, size)


def _parse_coco_text(text: str) -> list[int]:
    """Returns the counts of a compressed text."""
    counts: list[int] = []
    count = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError("the runs have a character that COCO does not write")
        count |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # another digit follows
            continue
        if digit & 16:  # the sign
            count -= 1 << shift
        if len(counts) > 2:
            count += counts[-2]
        counts.append(count)
        count = shift = 0
    if shift:
        raise ValueError("the runs end within a number")
    return counts


def _place_runs(numbers: Sequence[int], size: tuple[int, int]) -> Runs:
    """Returns the starts and lengths of runs that are listed as gap, length, gap, length ..."""
    if min(numbers, default=0) < 0:
        raise ValueError("the runs have a negative number")
    ends = [0, *itertools.accumulate(numbers)]
    runs = [
        [start, length] for start, length in zip(ends[1::2], numbers[1::2], strict=True) if length
    ]
    if runs and sum(runs[-1]) > size[0] * size[1]:
        raise ValueError(f"the runs leave the mask of {size[0]} x {size[1]} pixels")
    return runs


# Drawing ------------------------------------------------------------------------------------------


def draw_mask(
    shapes: Iterable[Shape], shape: tuple[int, int], rows: int, columns: int
) -> Bool[np.ndarray, "{rows} {columns}"]:
    """Draws the union of shapes on an image, and resizes it to a mask [rows columns].

    A pixel of the result is True where at least half of its area was. Parts of a shape that lie
    outside of the image are left out.

    Args:
      shapes: shapes of any kind but `file`.
      shape: rows and columns of the image, for shapes without a frame of their own.
      rows: rows of the result.
      columns: columns of the result.
    """
    frames: dict[tuple[int, int], Bool[np.ndarray, "Y X"]] = {}
    for part in shapes:
        frame = part.size or shape
        mask = frames.setdefault(frame, np.zeros(frame, bool))
        DRAW[part.kind](mask, part.content)
    union = np.zeros((rows, columns), bool)
    for mask in frames.values():
        union |= resize_by_area(mask, rows, columns)
    return union


def resize_by_area(
    mask: Bool[np.ndarray, "Y X"], rows: int, columns: int
) -> Bool[np.ndarray, "{rows} {columns}"]:
    """Resizes a mask [Y X]: a pixel is True where at least half of its area was.

    >>> resize_by_area(np.asarray([[True, True, False]]), 1, 2).tolist()
    [[True, False]]
    """
    if mask.shape == (rows, columns):
        return mask
    covered = _average_rows(_average_rows(mask, rows).T, columns).T
    return covered >= 0.5 - ROUNDING


def _average_rows(values: Any, rows: int) -> Float[np.ndarray, "{rows} X"]:
    """Computes the means of rows [Y X] over `rows` equal intervals, whose ends may cut a row."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=float)])
    ends = np.linspace(0, len(values), rows + 1)
    below = np.minimum(ends.astype(int), len(values) - 1)
    weight = (ends - below)[:, None]
    at_ends = (1 - weight) * sums[below] + weight * sums[below + 1]
    return np.diff(at_ends, axis=0) * (rows / len(values))


def _draw_runs(mask: Bool[np.ndarray, "Y X"], runs: Sequence[Sequence[int]]) -> None:
    if any(start < 0 or start + length > mask.size for start, length in runs):
        raise ValueError("a mask has runs that leave its frame")
    for start, length in runs:
        # The columns of the mask are the rows of its transpose.
        pixels = np.arange(start, start + length)
        mask.T[np.divmod(pixels, len(mask))] = True


def _draw_polygons(mask: Bool[np.ndarray, "Y X"], polygons: Sequence[Any]) -> None:
    for points in polygons:
        corners = np.asarray(points, float).reshape(-1, 2)
        _check_finite(corners)
        mask |= _fill_polygon(corners, mask.shape)


def _fill_polygon(
    points: Float[np.ndarray, "N 2"], shape: tuple[int, ...]
) -> Bool[np.ndarray, "Y X"]:
    """Returns the pixels [Y X] whose row crosses the border an odd number of times left of them."""
    x, y = points.T
    next_x, next_y = np.roll(points, -1, axis=0).T
    middles = np.arange(shape[0]) + 0.5
    is_crossed_NY = (y[:, None] <= middles) != (next_y[:, None] <= middles)
    edge, row = np.nonzero(is_crossed_NY)
    slope = (next_x - x)[edge] / (next_y - y)[edge]
    crossing = x[edge] + (middles[row] - y[edge]) * slope
    # The first pixel whose middle is not left of the crossing.
    first = np.clip(np.ceil(crossing - 0.5), 0, shape[1]).astype(int)
    num_crossings: Int[np.ndarray, "Y X1"] = np.zeros((shape[0], shape[1] + 1), int)
    np.add.at(num_crossings, (row, first), 1)
    return np.cumsum(num_crossings, axis=1)[:, :-1] % 2 == 1


def _draw_ellipse(mask: Bool[np.ndarray, "Y X"], corners: Sequence[float | int]) -> None:
    _check_finite(corners)
    x0, y0, x1, y1 = corners
    if x1 <= x0 or y1 <= y0:
        return
    y, x = (np.arange(length) + 0.5 for length in mask.shape)
    across = ((2 * x - x0 - x1) / (x1 - x0)) ** 2
    down = ((2 * y - y0 - y1) / (y1 - y0)) ** 2
    mask |= np.add.outer(down, across) <= 1


def _draw_rectangle(mask: Bool[np.ndarray, "Y X"], corners: Sequence[float | int]) -> None:
    _check_finite(corners)
    x0, y0, x1, y1 = (max(0, int(np.ceil(corner - 0.5))) for corner in corners)
    mask[y0:y1, x0:x1] = True


def _check_finite(numbers: Any) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError("a mask has a corner that is not a number")


DRAW: dict[str, Callable[[Bool[np.ndarray, "Y X"], Any], None]] = {
    "runs": _draw_runs,
    "polygons": _draw_polygons,
    "ellipse": _draw_ellipse,
    "rectangle": _draw_rectangle,
}

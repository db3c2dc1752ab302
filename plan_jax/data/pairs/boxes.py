"""Boxes of a manifest: their coordinates, and the format that the whole column must have."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.cells import is_missing, parse_literal, to_number
from plan_jax.types import UserError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, unless a format is named

# Corners, a corner and a size, or (YOLO) a centre and a size; in pixels or in fractions.
CORNERS, CORNER_AND_SIZE = "xyxy", "xywh"
NORMALISED = "normalised_"
FORMATS = (
    CORNERS,
    CORNER_AND_SIZE,
    f"{NORMALISED}xyxy",
    f"{NORMALISED}xywh",
    f"{NORMALISED}cxcywh",
)
# Names of coordinates, in lower case and without `_`, and the format that they state.
_NAMES = {
    ("x0", "y0", "x1", "y1"): CORNERS,
    ("x1", "y1", "x2", "y2"): CORNERS,
    ("xmin", "ymin", "xmax", "ymax"): CORNERS,
    ("left", "top", "right", "bottom"): CORNERS,
    ("x", "y", "width", "height"): CORNER_AND_SIZE,
    ("x", "y", "w", "h"): CORNER_AND_SIZE,
    ("xmin", "ymin", "width", "height"): CORNER_AND_SIZE,
    ("left", "top", "width", "height"): CORNER_AND_SIZE,
}
# Largest share of boxes that may be mistakes of a row rather than the format of the column.
MAX_MISTAKES = 0.1


# Cells ----------------------------------------------------------------------------------------


def match_coordinates(names: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """Returns the names that are the coordinates of a box, and their format; None without any.

    >>> match_coordinates(["patientId", "x", "y", "width", "height", "Target"])
    (('x', 'y', 'width', 'height'), 'xywh')
    """
    # As `Bbox [x`, `y`, `w`, `h]` in the list of boxes of NIH, and `bbox_x`.
    spellings = {re.sub(r"[^a-z0-9]|bbox", "", str(name).lower()): str(name) for name in names}
    for keys, box_format in _NAMES.items():
        if set(keys) <= set(spellings):
            return tuple(spellings[key] for key in keys), box_format
    return None


def parse_box(fields: Mapping[str, Any]) -> tuple[Box | None, str]:
    """Returns the four numbers of a box, and the format that their names state, or "".

    The box is None if all of its numbers are missing.

    >>> parse_box({"box": [1, 2, 3, 4]}), parse_box({"x": 1, "y": 2, "w": 3, "h": 4})
    (((1.0, 2.0, 3.0, 4.0), ''), ((1.0, 2.0, 3.0, 4.0), 'xywh'))

    Raises:
      ValueError: if it is not a box.
    """
    value, box_format = parse_literal(fields.get("box", fields.get("bbox"))), ""
    has_box = "box" in fields or "bbox" in fields
    named_fields = value if isinstance(value, Mapping) else {} if has_box else fields
    match = match_coordinates(list(named_fields))
    if match is not None:
        names, box_format = match
        value = [named_fields[name] for name in names]
    elif has_box and is_missing(value):
        return None, ""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or len(value) != 4:
        raise ValueError(f"box {quoting.quote(value)} is not [x0, y0, x1, y1]")
    if all(map(is_missing, value)):
        return None, ""
    numbers = [None if isinstance(item, bool) else to_number(item) for item in value]
    x0, y0, x1, y1 = numbers
    if x0 is None or y0 is None or x1 is None or y1 is None:
        numbers_text = quoting.shorten(", ".join(quoting.quote(item) for item in value))
        raise ValueError(f"box [{numbers_text}] is not [x0, y0, x1, y1] of numbers")
    return (x0, y0, x1, y1), box_format


# The format of a column -----------------------------------------------------------------------


def check_format(field: str, box_format: str) -> None:
    """Raises UserError if the format in a field of the config is neither "" nor in `FORMATS`."""
    if box_format and box_format not in FORMATS:
        raise UserError(
            f"{field} {quoting.quote(box_format)} is unknown; use one of {', '.join(FORMATS)}"
        )


def choose_format(boxes: Sequence[Box], name: str, option: str = "", stated: str = "") -> str:
    """Returns the format of a column of boxes: corners in pixels, if nothing says otherwise.

    Args:
      boxes: all boxes of the column that state the same.
      name: `boxes` or `regions`.
      option: the format that the user has named, or ""; it wins over the names.
      stated: the format that the names of their coordinates state, or "".

    Raises:
      UserError: if the numbers cannot have this format.
    """
    # What the user says wins: columns `x, y, w, h` may hold a centre and a size, as YOLO has it.
    box_format = option or stated or CORNERS
    field = f"data.builder.{'region' if name == 'regions' else 'box'}_format"
    num_fractions = sum(min(box) >= 0 and max(box) <= 1 for box in boxes)
    highest = max((max(box) for box in boxes), default=0.0)
    if box_format.startswith(NORMALISED):
        # A few boxes in pixels are mistakes of their rows, and lie outside of their images.
        if sum(max(box) > 2 for box in boxes) > MAX_MISTAKES * len(boxes):
            raise UserError(
                f"{name} reach to {highest:g}, so they are in pixels and not {box_format}; "
                f"set {field} to {CORNERS} or {CORNER_AND_SIZE}"
            )
        return box_format
    if num_fractions > MAX_MISTAKES * len(boxes):
        raise UserError(
            f"{num_fractions} of {len(boxes)} {name} lie between 0 and 1, smaller than a pixel; if "
            f"they are fractions of the image, set {field} to "
            f"{', '.join(FORMATS[2:4])} or {FORMATS[4]}"
        )
    has_sizes = box_format == CORNER_AND_SIZE
    invalid_boxes = [box for box in boxes if not _has_area(box, has_sizes)]
    if len(invalid_boxes) > MAX_MISTAKES * len(boxes):
        fault, remedy = "x1 left of x0 or y1 above y0", "are x, y, width, height"
        if has_sizes:
            fault, remedy = "no width or height above 0", "are x0, y0, x1, y1"
        raise UserError(
            f"{len(invalid_boxes)} of {len(boxes)} {name} have {fault}, as "
            f"{describe_box(invalid_boxes[0])}; if they {remedy}, set {field} to "
            f"{CORNERS if has_sizes else CORNER_AND_SIZE}, else correct them"
        )
    return box_format


def _has_area(box: Box, has_sizes: bool) -> bool:
    return min(box[2:]) > 0 if has_sizes else box[2] > box[0] and box[3] > box[1]


def describe_box(box: Sequence[float]) -> str:
    """Returns a box as a message shows it.

    >>> describe_box((1.0, 2.5, 3.0, 4.0))
    '(1, 2.5, 3, 4)'
    """
    return f"({', '.join(f'{number:g}' for number in box)})"


def to_corners(box: Box, box_format: str, shape: tuple[int, int]) -> Box:
    """Returns a box of any format as corners in pixels of an image of `shape` (rows, columns).

    >>> to_corners((0.5, 0.5, 0.5, 0.5), "normalised_cxcywh", (20, 40))
    (10.0, 5.0, 30.0, 15.0)
    """
    x0, y0, x1, y1 = box
    if box_format.startswith(NORMALISED):
        rows, columns = shape
        x0, y0, x1, y1 = x0 * columns, y0 * rows, x1 * columns, y1 * rows
    kind = box_format.removeprefix(NORMALISED)
    if kind == "cxcywh":
        x0, y0 = x0 - x1 / 2, y0 - y1 / 2
    return (x0, y0, x1, y1) if kind == CORNERS else (x0, y0, x0 + x1, y0 + y1)


def proves_corners(box: Box, shape: tuple[int, int]) -> bool:
    """Returns whether a box leaves an image of `shape` if it is read as x, y, width, height."""
    rows, columns = shape
    return box[0] + box[2] > columns or box[1] + box[3] > rows


def scale_box(box: Box, shape: tuple[int, int], new_shape: tuple[int, int]) -> Box:
    """Scales a box from an image of `shape` (rows, columns) to `new_shape`, cut at its border.

    Raises:
      ValueError: if the box has no area or lies outside of the image.
    """
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(
            f"box {describe_box(box)} has x1 left of x0 or y1 above y0; is it x, y, width, height?"
        )
    scale = (new_shape[1] / shape[1], new_shape[0] / shape[0]) * 2
    limits = (new_shape[1], new_shape[0]) * 2
    x0, y0, x1, y1 = (
        min(max(coordinate * factor, 0.0), float(limit))
        for coordinate, factor, limit in zip(box, scale, limits, strict=True)
    )
    if x0 >= x1 or y0 >= y1:
        raise ValueError(
            f"box {describe_box(box)} lies outside of its {shape[1]} x {shape[0]} image"
        )
    return x0, y0, x1, y1

"""Annotations in the cells of a manifest: labels, boxes, masks, regions, and phrases made of them.

The parsers raise ValueError for a malformed cell. The builder then skips and reports the row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plan_jax.data.pairs.manifest import parse_json
from plan_jax.types import Phrase

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

_LABEL_VALUES = {"1": 1, "true": 1, "0": 0, "false": 0, "-1": -1, "none": -1, "": -1, "nan": -1}


# Labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The labels of a row, 1 (present), 0 (absent) or -1 (unknown).

    `default` is the value of a name that is not in `values`.
    """

    values: Mapping[str, int]
    default: int = -1


def parse_labels(value: Any, columns: Mapping[str, Any] | None = None, blank: int = -1) -> Labels:
    """Parses labels: JSON {name: 1, 0 or -1}, a JSON list of present names, or `a; b`.

    A name that is not in a list is absent (0). A name that is not in an object is unknown (-1), and
    so are all names if the cell is empty.

    >>> parse_labels("oedema; effusion")
    Labels(values={'oedema': 1, 'effusion': 1}, default=0)
    >>> parse_labels('{"oedema": 0}')
    Labels(values={'oedema': 0}, default=-1)
    >>> parse_labels(None, {"Edema": "1.0", "Pneumonia": ""}, blank=0)
    Labels(values={'Edema': 1, 'Pneumonia': 0}, default=-1)

    Args:
      value: the cell of the column of labels.
      columns: name -> cell of the columns that contain one label each. They win over `value`.
      blank: value of an empty cell of `columns`.

    Raises:
      ValueError: if a cell is none of these.
    """
    content = parse_json(value)
    if columns:
        cells = {name: blank if cell in (None, "") else cell for name, cell in columns.items()}
        labels = Labels({}) if content is None else parse_labels(content)
        return Labels({**labels.values, **_parse_label_values(cells)}, labels.default)
    if content is None:
        return Labels({})
    if isinstance(content, Mapping):
        return Labels(_parse_label_values(content))
    if isinstance(content, str | int | float):
        content = [name.strip() for name in str(content).split(";")]
    if not isinstance(content, Sequence) or not all(isinstance(name, str) for name in content):
        raise ValueError("labels are not names")
    return Labels({name: 1 for name in content if name}, default=0)


def _parse_label_values(cells: Mapping[str, Any]) -> dict[str, int]:
    for name, cell in cells.items():
        if _label_text(cell) not in _LABEL_VALUES:
            raise ValueError(f"label {name!r} is {cell!r}, not 1, 0 or -1")
    return {str(name): _LABEL_VALUES[_label_text(cell)] for name, cell in cells.items()}


def _label_text(cell: Any) -> str:
    if isinstance(cell, str):
        cell = cell.removesuffix(".0")  # pandas writes ints of a column with gaps as floats
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell):
        cell = int(cell)
    return str(cell).strip().lower()


# Boxes, masks and regions ---------------------------------------------------------------------


def parse_boxes(value: Any, text: str) -> list[dict[str, Any]]:
    """Parses boxes: JSON [{"box": [x0, y0, x1, y1], "phrase": .., "label": ..}] or [[x0, ..], ..].

    A box without a phrase belongs to the whole text. Additional fields are kept, for `box_where`.

    >>> parse_boxes("[[1, 2, 3, 4]]", "Effusion.")
    [{'box': (1.0, 2.0, 3.0, 4.0), 'phrase': 'Effusion.', 'label': ''}]

    Raises:
      ValueError: if the cell is neither.
    """
    content = parse_json(value)
    if content is None:
        return []
    # A single box may stand without its list.
    is_box = isinstance(content, Sequence) and len(content) == 4 and all(map(_is_number, content))
    if is_box or isinstance(content, Mapping):
        content = [content]
    if isinstance(content, str) or not isinstance(content, Sequence):
        raise ValueError("boxes are not a list")
    boxes = []
    for item in content:
        fields = dict(item) if isinstance(item, Mapping) else {"box": item}
        boxes.append(
            fields
            | {
                "box": _parse_box(fields.get("box")),
                "phrase": str(fields.get("phrase") or text),
                "label": str(fields.get("label") or ""),
            }
        )
    return boxes


def parse_masks(value: Any, phrases: Sequence[str], text: str) -> dict[str, str]:
    """Parses masks, phrase -> path: JSON {phrase: path}, or one path.

    One path belongs to the only phrase, or to the whole text if there is no phrase.

    >>> parse_masks("m.png", ["effusion"], "Left effusion.")
    {'effusion': 'm.png'}

    Raises:
      ValueError: if the cell is neither, or is one path and there are several phrases.
    """
    content = parse_json(value)
    if content is None:
        return {}
    if isinstance(content, Mapping):
        return {str(phrase): str(path) for phrase, path in content.items() if path}
    names = list(dict.fromkeys(phrases)) or [text]
    if not isinstance(content, str) or len(names) > 1:
        raise ValueError("mask is neither one path for one phrase nor {phrase: path}")
    return {names[0]: content}


def organ_from_column(column: str) -> str:
    """Returns the organ of a column of masks whose cells are paths without a name.

    >>> organ_from_column("lung_mask"), organ_from_column("masks/heart")
    ('lung', 'heart')
    """
    words = column.lower().replace("_", " ").replace("/", " ").split()
    return " ".join(word for word in words if word not in ("mask", "masks")) or "anatomy"


def parse_regions(value: Any) -> dict[str, Box]:
    """Parses boxes of anatomical regions: JSON {region: [x0, y0, x1, y1]}, pixels of the image.

    >>> parse_regions('{"left lung": [5, 1, 9, 8]}')
    {'left lung': (5.0, 1.0, 9.0, 8.0)}

    Raises:
      ValueError: if the cell is something else.
    """
    content = parse_json(value)
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError("regions are not {region: [x0, y0, x1, y1]}")
    return {str(name): _parse_box(box) for name, box in content.items()}


def _parse_box(value: Any) -> Box:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4
    if not is_list or not all(map(_is_number, value)):
        raise ValueError(f"box {value!r} is not [x0, y0, x1, y1]")
    x0, y0, x1, y1 = map(float, value)
    return x0, y0, x1, y1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# Phrases --------------------------------------------------------------------------------------


def scale_box(box: Box, shape: tuple[int, int], new_shape: tuple[int, int]) -> Box:
    """Scales a box from an image of `shape` (rows, columns) to `new_shape`, cut at its border.

    Raises:
      ValueError: if the box lies outside of the image.
    """
    scale = (new_shape[1] / shape[1], new_shape[0] / shape[0]) * 2
    limits = (new_shape[1], new_shape[0]) * 2
    x0, y0, x1, y1 = (
        min(max(coordinate * factor, 0.0), float(limit))
        for coordinate, factor, limit in zip(box, scale, limits, strict=True)
    )
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"box {box} lies outside of its {shape[1]} x {shape[0]} image")
    return x0, y0, x1, y1


def build_phrases(
    boxes: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Any],
    findings: Sequence[str],
    shape: tuple[int, int],
    new_shape: tuple[int, int],
) -> list[Phrase]:
    """Groups boxes and masks by phrase, in order of first occurrence.

    The label of a phrase is its `bare` form; without a label, the phrase is its own bare form if it
    is the name of a finding.

    Args:
      boxes: as `parse_boxes` returns them.
      masks: phrase -> mask of `new_shape`.
      findings: names of the dataset's findings.
      shape: rows and columns that the boxes refer to.
      new_shape: rows and columns of the resized image.

    Raises:
      ValueError: if a box lies outside of its image.
    """
    boxes_of_phrase: dict[str, list[Box]] = {}
    label_of_phrase: dict[str, str] = {}
    for item in boxes:
        box = scale_box(item["box"], shape, new_shape)
        boxes_of_phrase.setdefault(item["phrase"], []).append(box)
        label_of_phrase.setdefault(item["phrase"], item["label"])
    phrases = []
    for text in dict.fromkeys([*boxes_of_phrase, *masks]):
        bare = label_of_phrase.get(text) or (text if text in findings else "")
        phrases.append(
            Phrase(
                text=text,
                finding=findings.index(bare) if bare in findings else -1,
                key=" ".join(text.lower().split()),
                bare=bare,
                boxes=tuple(boxes_of_phrase.get(text, ())),
                mask=masks.get(text),
            )
        )
    return phrases

"""Annotations in the cells of a manifest: labels, boxes, masks, regions, and phrases made of them.

The parsers raise ValueError for a malformed cell. The builder then skips and reports the row.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.boxes import CORNER_AND_SIZE, FORMATS, Box, parse_box, scale_box
from plan_jax.data.pairs.cells import (
    fold_name,
    is_missing,
    normalise_name,
    parse_literal,
    to_number,
)
from plan_jax.types import Phrase

LABEL_WORDS = {
    **dict.fromkeys(("true", "yes", "y", "t", "positive", "present"), 1),
    **dict.fromkeys(("false", "no", "n", "f", "negative", "absent"), 0),
    **dict.fromkeys(("uncertain", "unknown", "u"), -1),
}
DEFAULT_SEPARATOR = re.compile(r"[;|\n\t；、｜]")
MAX_NAME = 200  # characters of the name of a finding, as in ICD


# Labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The labels of a row, 1 (present), 0 (absent) or -1 (unknown).

    `default` is the value of a name that is not in `values`.
    """

    values: Mapping[str, int]
    default: int = -1


def parse_labels(
    value: Any,
    columns: Mapping[str, Any] | None = None,
    blank: int = -1,
    separator: re.Pattern[str] = DEFAULT_SEPARATOR,
) -> Labels:
    """Parses labels: an object {name: 1, 0 or -1}, a list of present names, or `a; b` or `a|b`.

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
      separator: what divides the names of a cell.

    Raises:
      ValueError: if a cell is none of these, or contains sentences.
    """
    if columns:
        cells = {name: blank if is_missing(cell) else cell for name, cell in columns.items()}
        labels = parse_labels(value, separator=separator)
        return Labels({**labels.values, **_parse_label_values(cells)}, labels.default)
    content: Any = None if is_missing(value) else parse_literal(value)
    if is_missing(content):
        return Labels({})
    if isinstance(content, list) and content and all(map(_is_pair, content)):
        content = dict(content)  # a map of Parquet
    if isinstance(content, Mapping):
        return Labels(_parse_label_values(content))
    if isinstance(content, str | int | float):
        content = separator.split(str(content))
    is_list = isinstance(content, list | tuple)
    if not is_list or not all(isinstance(name, str) or is_missing(name) for name in content):
        raise ValueError(f"labels are not names but {quoting.quote(content)}")
    names = [normalise_name(name.strip(" '\"")) for name in content if not is_missing(name)]
    for name in names:
        _check_label_name(name)
    if content and not names and any(name != "" for name in content):
        return Labels({})  # the only name is a word that means missing
    return Labels(dict.fromkeys(names, 1), default=0)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _check_label_name(name: str) -> None:
    is_sentence = quoting.has_sentence_end(name) and len(name.split()) > quoting.MAX_WORDS
    if is_sentence or len(name) > MAX_NAME:
        raise ValueError(f"labels are a text of {len(name)} characters, not names of findings")


def _parse_label_values(cells: Mapping[str, Any]) -> dict[str, int]:
    values: dict[str, int] = {}
    for key, cell in cells.items():
        name = normalise_name(key)
        _check_label_name(name)
        value = _parse_label_value(name, cell)
        if values.get(name, value) != value:
            raise ValueError(f"label {quoting.quote(name)} is there twice, with two values")
        values[name] = value
    return values


def _parse_label_value(name: str, cell: Any) -> int:
    if is_missing(cell):
        return -1
    number = to_number(cell)  # pandas writes ints of a column with gaps as floats
    if number in (1, 0, -1):
        return int(number or 0)
    word = str(cell).strip().casefold() if isinstance(cell, str) else ""
    if word not in LABEL_WORDS:
        raise ValueError(f"label {quoting.quote(name)} is {quoting.quote(cell)}, not 1, 0 or -1")
    return LABEL_WORDS[word]


# Boxes, masks and regions ---------------------------------------------------------------------


def parse_boxes(value: Any, text: str) -> list[dict[str, Any]]:
    """Parses boxes: JSON [{"box": [x0, y0, x1, y1], "phrase": .., "label": ..}] or [[x0, ..], ..].

    A box without a phrase belongs to the whole text. Additional fields are kept, for `box_where`. A
    box whose numbers are all missing is none. A box may also be an object of named coordinates, as
    {"x": .., "y": .., "width": .., "height": ..}; `box_format` is then the format that they name. A
    field `box_format` names it too.

    >>> parse_boxes("[[1, 2, 3, 4]]", "Effusion.")
    [{'box': (1.0, 2.0, 3.0, 4.0), 'phrase': 'Effusion.', 'label': ''}]

    Raises:
      ValueError: if the cell is neither.
    """
    content = parse_literal(value)
    if is_missing(content):
        return []
    # A single box may stand without its list.
    is_list = isinstance(content, Sequence) and not isinstance(content, str | bytes)
    is_box = is_list and len(content) == 4 and all(map(_is_coordinate, content))
    if is_box or isinstance(content, Mapping):
        content = [content]
    elif not is_list:
        raise ValueError("boxes are not a list")
    boxes = []
    for item in content:
        fields = dict(item) if isinstance(item, Mapping) else {"box": item}
        box, box_format = parse_box(fields)
        if box is None:
            continue
        box_format = _read_format(fields) or box_format
        fields.pop("box_format", None)
        phrase, label = _read_name(fields, "phrase") or text, _read_name(fields, "label")
        fields |= {"box": box, "phrase": phrase, "label": normalise_name(label)}
        boxes.append(fields | ({"box_format": box_format} if box_format else {}))
    return boxes


def _read_format(fields: Mapping[str, Any]) -> str:
    value = fields.get("box_format")
    if is_missing(value):
        return ""
    if value not in FORMATS:
        raise ValueError(
            f"box_format {quoting.quote(value)} of a box is unknown; use one of "
            f"{', '.join(FORMATS)}"
        )
    return str(value)


def _read_name(fields: Mapping[str, Any], key: str) -> str:
    """Returns the phrase or the label of a box, "" if it is missing.

    Raises:
      ValueError: if it is something else than text, as the number of a class.
    """
    value = fields.get(key)
    if is_missing(value):
        return ""
    if not isinstance(value, str) or to_number(value) is not None:
        raise ValueError(f"the {key} of a box is {quoting.quote(value)}, not its name")
    return value


def _is_coordinate(value: Any) -> bool:
    return is_missing(value) or to_number(value) is not None


def parse_masks(value: Any, phrases: Sequence[str], text: str) -> dict[str, str]:
    """Parses masks, phrase -> path: JSON {phrase: path}, or one path.

    One path belongs to the only phrase, or to the whole text if there is no phrase.

    >>> parse_masks("m.png", ["effusion"], "Left effusion.")
    {'effusion': 'm.png'}

    Raises:
      ValueError: if the cell is neither, or is one path and there are several phrases.
    """
    content = parse_literal(value)
    if is_missing(content):
        return {}
    if isinstance(content, Mapping):
        paths = {str(phrase): path for phrase, path in content.items() if not is_missing(path)}
        if not all(isinstance(path, str) for path in paths.values()):
            raise ValueError("mask is not a path")
        return paths
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


def parse_regions(value: Any, region_format: str = "") -> dict[str, Box]:
    """Parses boxes of anatomical regions: JSON {region: [x0, y0, x1, y1]}, pixels of the image.

    >>> parse_regions('{"left lung": [5, 1, 9, 8]}')
    {'left lung': (5.0, 1.0, 9.0, 8.0)}
    >>> parse_regions({"left lung": {"x": 5, "y": 1, "width": 4, "height": 7}})
    {'left lung': (5.0, 1.0, 9.0, 8.0)}

    Args:
      value: the cell.
      region_format: the format that the user has named. If it is "", sizes become corners where the
        names of the coordinates state them.

    Raises:
      ValueError: if the cell is something else.
    """
    content = parse_literal(value)
    if is_missing(content):
        return {}
    if not isinstance(content, Mapping):
        raise ValueError("regions are not {region: [x0, y0, x1, y1]}")
    # Names as `data.report_parser` writes them.
    parsed = {fold_name(name): parse_box({"box": box}) for name, box in content.items()}
    if len(parsed) < len(content):
        raise ValueError("regions have one name twice")
    regions = {}
    for name, (box, stated) in parsed.items():
        if box is None:
            continue
        has_sizes = stated == CORNER_AND_SIZE and not region_format
        x0, y0, x1, y1 = box
        regions[name] = (x0, y0, x0 + x1, y0 + y1) if has_sizes else box
    return regions


# Phrases --------------------------------------------------------------------------------------


def build_phrases(
    boxes: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Any],
    findings: Sequence[str],
    shape: tuple[int, int],
    new_shape: tuple[int, int],
) -> list[Phrase]:
    """Groups boxes and masks by phrase, in order of first occurrence.

    The label of a phrase is its `bare` form; without a label, that is the finding whose name the
    phrase is, in any case. Boxes of one phrase and of several labels, as those of a whole text, are
    not boxes of one thing: the phrase of each is its label.

    Args:
      boxes: as `parse_boxes` returns them.
      masks: phrase -> mask of `new_shape`.
      findings: names of the dataset's findings.
      shape: rows and columns that the boxes refer to.
      new_shape: rows and columns of the resized image.

    Raises:
      ValueError: if a box lies outside of its image.
    """
    labels_of_phrase: dict[str, set[str]] = {}
    for item in boxes:
        labels_of_phrase.setdefault(item["phrase"], set()).add(item["label"])
    boxes_of_phrase: dict[str, list[Box]] = {}
    label_of_phrase: dict[str, str] = {}
    for item in boxes:
        text = item["phrase"]
        if item["label"] and len(labels_of_phrase[text]) > 1:
            text = item["label"]
        boxes_of_phrase.setdefault(text, []).append(scale_box(item["box"], shape, new_shape))
        label_of_phrase.setdefault(text, item["label"])
    phrases = []
    finding_of = {fold_name(name): name for name in findings}
    for text in dict.fromkeys([*boxes_of_phrase, *masks]):
        bare = label_of_phrase.get(text) or finding_of.get(fold_name(text), "")
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

"""What the cells of a manifest say about an image: labels, and phrases with boxes or masks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plan_jax.data.pairs.manifest import parsed
from plan_jax.types import Phrase

_TRUTH = {"1": 1, "true": 1, "0": 0, "false": 0, "-1": -1, "none": -1, "": -1, "nan": -1}


@dataclass(frozen=True)
class Labels:
    """Values of the names that a row gives, and the `rest`: that of names it does not give."""

    values: Mapping[str, int]
    rest: int = -1


def read_labels(value: Any, columns: Mapping[str, Any] | None = None, blank: int = -1) -> Labels:
    """Read labels: JSON {name: 1, 0 or -1}, a JSON list of what is present, or `a; b`.

    A name that is not in a list is absent (0); one that is not in an object, unknown (-1), as all
    are where the cell is empty. `columns` are names that have a cell each; an empty one is `blank`.

    >>> read_labels("oedema; effusion")
    Labels(values={'oedema': 1, 'effusion': 1}, rest=0)
    >>> read_labels('{"oedema": 0}')
    Labels(values={'oedema': 0}, rest=-1)
    >>> read_labels(None, {"Edema": "1.0", "Pneumonia": ""}, blank=0)
    Labels(values={'Edema': 1, 'Pneumonia': 0}, rest=-1)

    Raises:
      ValueError: if it is none of these.
    """
    found = parsed(value)
    if columns:
        single = _read_values({n: blank if c in (None, "") else c for n, c in columns.items()})
        several = read_labels(found) if found is not None else Labels({})
        return Labels({**several.values, **single}, several.rest)
    if found is None:
        return Labels({})
    if isinstance(found, Mapping):
        return Labels(_read_values(found))
    if isinstance(found, str | int | float):
        found = [name.strip() for name in str(found).split(";")]
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise ValueError("labels are no names")
    return Labels({name: 1 for name in found if name}, rest=0)


def _read_values(given: Mapping[str, Any]) -> dict[str, int]:
    for name, value in given.items():
        if _key(value) not in _TRUTH:
            raise ValueError(f"label {name!r} is {value!r}, not 1, 0 or -1")
    return {str(name): _TRUTH[_key(value)] for name, value in given.items()}


def _key(value: Any) -> str:
    if isinstance(value, str) and value.endswith(".0"):
        value = value.removesuffix(".0")  # what pandas writes of a column with gaps
    if isinstance(value, float) and value == int(value if math.isfinite(value) else 0):
        value = int(value)
    return str(value).strip().lower()


def read_boxes(value: Any, text: str) -> list[dict[str, Any]]:
    """Read boxes: JSON [{"box": [x0, y0, x1, y1], "phrase": .., "label": ..}] or [[x0, ..], ..].

    A box without a phrase is of the whole text. Other fields stay, for `box_where`.

    >>> read_boxes("[[1, 2, 3, 4]]", "Effusion.")
    [{'box': (1.0, 2.0, 3.0, 4.0), 'phrase': 'Effusion.', 'label': ''}]

    Raises:
      ValueError: if it is none of these.
    """
    found = parsed(value)
    if found is None:
        return []
    if isinstance(found, Mapping):
        found = [found]
    if isinstance(found, Sequence) and len(found) == 4 and all(map(_number, found)):
        found = [found]
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError("boxes are no list")
    boxes = []
    for item in found:
        item = dict(item) if isinstance(item, Mapping) else {"box": item}
        phrase, label = str(item.get("phrase") or text), str(item.get("label") or "")
        boxes.append(item | {"box": _box(item.get("box")), "phrase": phrase, "label": label})
    return boxes


def read_masks(value: Any, phrases: Sequence[str], text: str) -> dict[str, str]:
    """Read masks, phrase -> path: JSON {phrase: path}, or one path, of the only phrase or the text.

    >>> read_masks("m.png", ["effusion"], "Left effusion.")
    {'effusion': 'm.png'}

    Raises:
      ValueError: if it is none of these, or one path and several phrases.
    """
    found = parsed(value)
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return {str(phrase): str(path) for phrase, path in found.items() if path}
    names = list(dict.fromkeys(phrases)) or [text]
    if not isinstance(found, str) or len(names) > 1:
        raise ValueError("mask is neither one path for one phrase nor {phrase: path}")
    return {names[0]: found}


def organ_of(column: str) -> str:
    """Name what the masks of a column show, where they are paths without a name.

    >>> organ_of("lung_mask"), organ_of("masks/heart")
    ('lung', 'heart')
    """
    words = column.lower().replace("_", " ").replace("/", " ").split()
    return " ".join(word for word in words if word not in ("mask", "masks")) or "anatomy"


def read_regions(value: Any) -> dict[str, tuple[float, ...]]:
    """Read boxes of anatomical regions: JSON {region: [x0, y0, x1, y1]}, pixels of the image.

    >>> read_regions('{"left lung": [5, 1, 9, 8]}')
    {'left lung': (5.0, 1.0, 9.0, 8.0)}

    Raises:
      ValueError: if it is something else.
    """
    found = parsed(value)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError("regions are not {region: [x0, y0, x1, y1]}")
    return {str(name): _box(box) for name, box in found.items()}


def scale_box(
    box: Sequence[float], shape: tuple[int, int], size: tuple[int, int]
) -> tuple[float, ...]:
    """Scale a box from an image of `shape` rows, columns to one of `size`, cut at its border.

    Raises:
      ValueError: if it lies outside.
    """
    scale = (size[1] / shape[1], size[0] / shape[0]) * 2
    limit = (size[1], size[0]) * 2
    corners = zip(box, scale, limit, strict=True)
    scaled = tuple(min(max(at * factor, 0.0), float(most)) for at, factor, most in corners)
    if scaled[0] >= scaled[2] or scaled[1] >= scaled[3]:
        raise ValueError(f"box {tuple(box)} lies outside of its {shape[1]} x {shape[0]} image")
    return scaled


def make_phrases(
    boxes: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Any],
    findings: Sequence[str],
    shape: tuple[int, int],
    size: tuple[int, int],
) -> list[Phrase]:
    """Gather boxes and masks by phrase, in order, and scale boxes from `shape` to `size`.

    Both are rows and columns; a mask is already of `size`. The label of a phrase is its `bare`
    form, or it is itself where it is the name of a finding.

    Raises:
      ValueError: if a box lies outside of its image.
    """
    placed: dict[str, list[tuple[float, ...]]] = {}
    labels: dict[str, str] = {}
    for item in boxes:
        box = scale_box(item["box"], shape, size)
        placed.setdefault(item["phrase"], []).append(box)
        labels.setdefault(item["phrase"], item["label"])
    phrases = []
    for text in dict.fromkeys([*placed, *masks]):
        bare = labels.get(text) or (text if text in findings else "")
        phrases.append(
            Phrase(
                text=text,
                finding=findings.index(bare) if bare in findings else -1,
                key=" ".join(text.lower().split()),
                bare=bare,
                boxes=tuple(placed.get(text, ())),
                mask=masks.get(text),
            )
        )
    return phrases


def _box(value: Any) -> tuple[float, ...]:
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4
    if not listed or not all(map(_number, value)):
        raise ValueError(f"box {value!r} is not [x0, y0, x1, y1]")
    return tuple(map(float, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

"""The columns of images and of texts: what kind of cells the whole column has."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.cells import (
    fold_name,
    is_literal_of_strings,
    is_missing,
    parse_literal,
    to_number,
)
from plan_jax.types import UserError

MAX_LISTED = 8  # names in a message
MAX_EMPTY = 100  # characters of a text of nothing but headings and words that mean missing
MAX_SHARE = 0.3  # of texts that are the same, before it is remarkable
MIN_TEXTS = 10  # below, any share is usual


def check_order(images: Sequence[Any], texts: Sequence[Any]) -> None:
    """Raises UserError if the column of images holds the texts and that of texts the paths."""
    num_texts = sum(isinstance(cell, str) and _is_text(cell) for cell in images)
    num_paths = sum(isinstance(cell, str) and _is_path(cell) for cell in texts)
    if min(num_texts, num_paths) > len(images) / 2:
        raise UserError(
            f"the columns of images and of texts are swapped in {min(num_texts, num_paths)} of "
            f"{len(images)} rows; swap them in data.builder.columns"
        )


# Images ---------------------------------------------------------------------------------------


def check_images(cells: Sequence[Any], column: str, max_bad: float, image_suffix: str = "") -> None:
    """Raises UserError if a column of images does not hold one path in each row.

    Args:
      cells: all cells of the column.
      column: its name.
      max_bad: largest share of rows that may be mistakes of their own.
      image_suffix: the suffix that the names lack; with it a number is a name.
    """
    contents = [_add_suffix(_parse_quietly(cell), image_suffix) for cell in cells]
    faults: list[tuple[Callable[[Any], bool], str]] = [
        (
            lambda value: isinstance(value, bytes | dict),
            "embedded images; save them as files and write their paths",
        ),
        (
            lambda value: isinstance(value, list | tuple) and len(value) > 1,
            "lists of images; write one row for each image, with the same text and patient",
        ),
        (
            lambda value: isinstance(value, str) and _is_text(value),
            "texts, not paths; name the column of paths with data.builder.columns={'image': '...'}",
        ),
        (
            lambda value: isinstance(value, bool | int | float),
            "numbers, not paths; name the column of paths with "
            "data.builder.columns={'image': '...'}",
        ),
    ]
    for has_fault, description in faults:
        count = sum(map(has_fault, contents))
        if count > max_bad * len(cells):
            raise UserError(
                f"column {quoting.quote(column)} (image) of {len(cells)} rows has {count} "
                f"{description}"
            )


def _add_suffix(content: Any, suffix: str) -> Any:
    is_name = isinstance(content, str | int) and not isinstance(content, bool)
    return f"{content}{suffix}" if suffix and is_name else content


def _is_text(value: str) -> bool:
    return not quoting.is_path(value)


def _parse_quietly(cell: Any) -> Any:
    try:
        return parse_literal(cell)
    except ValueError:
        return cell


# Texts ----------------------------------------------------------------------------------------


def check_texts(
    cells: Sequence[Any], column: str, join_text: bool, sections: Sequence[str]
) -> None:
    """Raises UserError if a column of texts holds something else than reports.

    Args:
      cells: all cells of the column.
      column: its name.
      join_text: whether the items of a list are one text.
      sections: the sections of an object that are the text.
    """
    contents = [_parse_text(cell) for cell in cells if cell is not None]
    name = f"column {quoting.quote(column)} (text)"
    lists = [item for item in contents if isinstance(item, list | tuple) and item]
    if lists and not join_text:
        raise UserError(
            f"{name} is a list in {len(lists)} of {len(cells)} rows; set data.builder.join_text to "
            "True if a list is one report, else write one row for each text"
        )
    objects = [item for item in contents if isinstance(item, Mapping)]
    keys = list(dict.fromkeys(str(key) for item in objects for key in item))
    key_list = ", ".join(quoting.quote(key).strip("'") for key in keys[:MAX_LISTED])
    if objects and not sections:
        raise UserError(
            f"{name} is an object of {key_list} in {len(objects)} of {len(cells)} rows; name the "
            "sections of the report, in order, in data.builder.text_sections"
        )
    missing_sections = {fold_name(section) for section in sections} - {
        fold_name(key) for key in keys
    }
    if objects and missing_sections:
        raise UserError(
            f"text_sections {', '.join(sorted(missing_sections))} do not exist; use {key_list}"
        )
    numbers = sum(map(_is_number, contents))
    if contents and numbers == len(contents):
        raise UserError(
            f"{name} holds numbers, not reports; name the column of reports with "
            "data.builder.columns={'text': '...'}"
        )
    num_paths = sum(isinstance(item, str) and _is_path(item) for item in contents)
    if num_paths > len(contents) / 2:
        raise UserError(
            f"{name} holds paths, not reports; name the column of reports with "
            "data.builder.columns={'text': '...'}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or to_number(value) is not None


def _is_path(text: str) -> bool:
    name = text.strip().lower()
    return len(name.split()) == 1 and name.endswith((".png", ".jpg", ".jpeg", ".dcm", ".dicom"))


def read_text(cell: Any, join_text: bool = False, sections: Sequence[str] = ()) -> str:
    """Returns the text in a cell; "" if it is missing.

    >>> read_text(["No effusion", "Heart is normal."], join_text=True)
    'No effusion. Heart is normal.'
    >>> read_text({"Findings": "No effusion.", "impression": None}, sections=("findings",))
    'No effusion.'

    Args:
      cell: the cell.
      join_text: whether the items of a list are one text.
      sections: the sections of an object that are the text, in order.

    Raises:
      ValueError: if the cell is not a text.
    """
    content = None if cell is None else _parse_text(cell)
    if isinstance(content, str) and is_literal_of_strings(content):
        raise ValueError("its text is a list or an object that cannot be read; write JSON")
    if isinstance(content, Mapping):
        by_name = {fold_name(key): value for key, value in content.items()}
        content = [by_name.get(fold_name(section)) for section in sections]
    elif isinstance(content, list | tuple) and content and not join_text:
        raise ValueError(f"its text is a list of {len(content)}")
    if isinstance(content, list | tuple):
        parts = [read_text(part, join_text, sections) for part in content if not is_missing(part)]
        return " ".join(_end_sentence(part) for part in parts if part)
    if is_missing(content):
        return ""
    if isinstance(content, bytes):
        raise ValueError(f"its text is {len(content)} bytes that are not UTF-8")
    if not isinstance(content, str) or _is_number(content):
        raise ValueError(f"its text is {quoting.quote(content)}")
    text = content.strip()
    if len(text) > MAX_EMPTY:
        return text
    # As `Findings: nan Impression: nan`, which is what pandas makes of two empty columns.
    words = [word for word in text.split() if not word.endswith(":")]
    return "" if all(map(is_missing, words)) else text


def remark_texts(texts: Sequence[str]) -> list[str]:
    """Returns what is remarkable about the texts of a dataset, without showing any."""
    num_nan = sum(re.search(r"\bnan\b", text, re.IGNORECASE) is not None for text in texts)
    notes = [f"{num_nan} texts contain the word nan"] if num_nan else []
    ((_, highest),) = Counter(filter(None, texts)).most_common(1) or [("", 0)]
    if highest > MAX_SHARE * len(texts) and len(texts) >= MIN_TEXTS:
        notes.append(f"{highest} of {len(texts)} texts are the same")
    return notes


def _end_sentence(text: str) -> str:
    # Without an end, two items of a list would become one sentence.
    return text if text[-1:] in ".!?:;,。！？" else f"{text}."


def _parse_text(cell: Any) -> Any:
    """Returns the list or object that a text spells, or the cell as it is.

    `[** name **] ...` of de-identified reports is a text.
    """
    content = _parse_quietly(cell)
    if content is cell or isinstance(content, Mapping):
        return content
    if isinstance(content, list | tuple) and all(
        isinstance(part, str | Mapping) or is_missing(part) for part in content
    ):
        return content
    return cell

"""Ids of patients and readers over a whole column: one id each, however a row spells it."""

import re
from collections.abc import Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.cells import fold_name, normalise_name
from plan_jax.types import UserError

_FLOAT_SPELLING = re.compile(r"([+-]?\d+)\.0+")
_EXCEL_SPELLING = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")
MAX_EXACT = 2**53  # ints up to here are exact as floats


def match_ids(cells: Sequence[Any], noun: str = "patient") -> list[str | None]:
    """Returns the id of the patient, or of another person, of each row; None if it is missing.

    7 and 7.0 are one patient, because pandas writes ints of a column with gaps as floats.

    >>> match_ids([7, 7.0, "7.0", None, "p1"])
    ['7', '7', '7', None, 'p1']

    Raises:
      UserError: if two ids differ in leading zeros or in case only, if Excel has shortened ids, or
        if a cell is a list or an object.
    """
    ids = [None if cell is None else _read_id(cell, noun) for cell in cells]
    first_spelling: dict[str, str] = {}
    for name in ids:
        if name is None:
            continue
        spelling = first_spelling.setdefault(_fold_id(name), name)
        if spelling != name:
            raise UserError(
                f"{noun}s {quoting.quote(spelling)} and {quoting.quote(name)} "
                f"differ in zeros, case or blanks only; write each {noun} in one way"
            )
    return ids


def _fold_id(name: str) -> str:
    """Returns the key of an id: equal for ids that differ in leading zeros, case or blanks.

    >>> _fold_id("P-007") == _fold_id("p 7"), _fold_id("-1") == _fold_id("1"), _fold_id("1.05")
    (True, False, '1.05')
    """
    key = fold_name(name)
    sign = "-" if name[:1] == "-" and name[1:2].isdigit() else ""
    head = key.rstrip("0123456789")
    digits = key[len(head) :]
    # Zeros after a point are not leading ones.
    if digits and not head.endswith("."):
        digits = digits.lstrip("0") or "0"
    return f"{sign}{head}{digits}"


def fill_ids(ids: Sequence[str | None], images: Sequence[Any]) -> list[str | None]:
    """Returns the ids, where a missing one is that of another row of the same image.

    >>> fill_ids(["p1", None, None], ["a.png", "a.png", "b.png"])
    ['p1', 'p1', None]
    """
    id_of_image: dict[str, str] = {}
    for name, image in zip(ids, images, strict=True):
        if name is not None and isinstance(image, str):
            id_of_image.setdefault(image, name)
    return [
        id_of_image.get(image) if name is None and isinstance(image, str) else name
        for name, image in zip(ids, images, strict=True)
    ]


def _read_id(cell: Any, noun: str) -> str:
    if isinstance(cell, float):
        if abs(cell) >= MAX_EXACT:
            raise UserError(f"{noun} {cell:g} is a float, which has lost digits; store ids as text")
        return str(int(cell)) if cell == int(cell) else str(cell)
    if not isinstance(cell, str | int) or isinstance(cell, bool):
        if isinstance(cell, list | tuple | dict | bytes | bool):
            raise UserError(f"a {noun} is {quoting.quote(cell)}; write one id for each row")
        cell = str(cell)
    name = normalise_name(cell)
    if _EXCEL_SPELLING.fullmatch(name):
        raise UserError(
            f"{noun} {name!r} is a number that a spreadsheet has shortened; store ids as text"
        )
    match = _FLOAT_SPELLING.fullmatch(name)
    return match[1] if match else name

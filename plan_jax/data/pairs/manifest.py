"""A user's manifest: reading its rows, choosing among them, and splitting them by patient."""

import csv
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plan_jax.types import UserError

SPLITS = ("train", "val", "test")
_SPELT = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "dev": "val"}

RowDict = dict[str, Any]


def read(path: Path) -> list[RowDict]:
    """Read a manifest: CSV, JSONL or Parquet, by its suffix.

    Raises:
      UserError: if it is missing, of another kind, malformed or empty.
    """
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist; give the path of a file")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"manifest {path} is not CSV, JSONL or Parquet; give one of {[*readers]}")
    try:
        rows = readers[path.suffix](path)
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} is not UTF-8; save it as UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise UserError(f"manifest {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not rows:
        raise UserError(f"manifest {path} has no rows; list at least one image and its text")
    return rows


def _csv(path: Path) -> list[RowDict]:
    csv.field_size_limit(2**31 - 1)  # boxes of one row can be long
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many fields as the header")
            rows.append(row)
    return rows


def _jsonl(path: Path) -> list[RowDict]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error.msg}") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is no JSON object")
    return rows


def _parquet(path: Path) -> list[RowDict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def cell(row: RowDict, column: str | None) -> Any:
    """Return a cell; None where the column or the value is missing, blank or not a number.

    >>> [cell({"a": " x ", "b": " "}, column) for column in ("a", "b", "c", None)]
    ['x', None, None, None]
    """
    value = None if column is None else row.get(column)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        return value.strip() or None
    return value


def parsed(value: Any) -> Any:
    """Parse a cell that holds JSON; anything else comes back as it is.

    Raises:
      ValueError: if it begins like JSON and is not.
    """
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return json.loads(value)
    return value


def pick_columns(
    rows: Sequence[RowDict],
    chosen: Mapping[str, str],
    required: Iterable[str],
    roles: Iterable[str],
) -> dict[str, str | None]:
    """Say which column plays which role: the one chosen, else the one of the role's name, or None.

    Choosing "" means that none does, whatever the columns are called.

    Raises:
      UserError: for an unknown role, a chosen column that is missing, or a required role without.
    """
    present = {name for row in rows for name in row}
    roles = tuple(roles)
    for role in chosen:
        if role not in roles:
            raise UserError(
                f"columns has the unknown role {role!r}; choose from {', '.join(roles)}"
            )
    found: dict[str, str | None] = {}
    for role in roles:
        name = chosen.get(role, role)
        if role in chosen and not name:
            found[role] = None
        elif name in present:
            found[role] = name
        elif role in chosen or role in required:
            raise UserError(
                f"column {name!r} ({role}) is not in the manifest{_near(name, present)}"
            )
        else:
            found[role] = None
    return found


def check_columns(conditions: Mapping[str, Any], items: Sequence[RowDict], what: str) -> None:
    """Check that each column of `conditions` occurs and each condition is one.

    Raises:
      UserError: naming the first that is not.
    """
    present = {name for item in items for name in item}
    for column, condition in conditions.items():
        if items and column not in present:
            raise UserError(f"column {column!r} of {what} does not exist{_near(column, present)}")
        lists = condition.values() if isinstance(condition, Mapping) else [condition]
        kinds = set(condition) if isinstance(condition, Mapping) else {"in"}
        if kinds - {"in", "not"} or any(isinstance(v, str | int | float | None) for v in lists):
            raise UserError(
                f'{what} of {column!r} is {condition!r}; write {{"in": [..]}} or {{"not": [..]}}'
            )


def where(items: Iterable[RowDict], conditions: Mapping[str, Any]) -> list[RowDict]:
    """Keep the items that fulfil all conditions: column -> {"in": [...]}, {"not": [...]} or [...].

    Values are compared as text; a missing one is "".

    >>> where([{"view": "PA"}, {"view": "L"}], {"view": {"not": ["L"]}})
    [{'view': 'PA'}]
    """
    items = list(items)
    for column, condition in conditions.items():
        rules = condition if isinstance(condition, Mapping) else {"in": condition}
        for kind, values in rules.items():
            listed = {str(value) for value in values}
            items = [i for i in items if (_text(cell(i, column)) in listed) == (kind == "in")]
    return items


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _near(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"


def split_of(given: Any, patient: str, fractions: tuple[float, float]) -> str:
    """Name the split of a row: as given, or, for None, by a hash of the patient.

    >>> split_of("Validation", "7", (0.1, 0.1)), split_of(None, "7", (0.0, 0.0))
    ('val', 'train')

    Args:
      fractions: shares of val and test.

    Raises:
      UserError: if the given name is unknown.
    """
    if given is not None:
        name = _SPELT.get(str(given).lower(), str(given).lower())
        if name not in SPLITS:
            raise UserError(f"split {given!r} is unknown; write {', '.join(SPLITS)}")
        return name
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    val, test = fractions
    return "val" if place < val else "test" if place < val + test else "train"


def check_leaks(pairs: Iterable[tuple[str, str]]) -> None:
    """Check that no patient is in two splits.

    Args:
      pairs: patient and split of each row.

    Raises:
      UserError: naming the first patient that is.
    """
    seen: dict[str, str] = {}
    for patient, split in pairs:
        if seen.setdefault(patient, split) != split:
            raise UserError(
                f"patient {patient!r} is in splits {seen[patient]!r} and {split!r}; "
                "put all rows of a patient into one"
            )

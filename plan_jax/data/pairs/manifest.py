"""A user's manifest: reading, matching of columns, filtering of rows, and splits by patient."""

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
_SPLIT_SYNONYMS = {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
}

Row = dict[str, Any]

# Reading --------------------------------------------------------------------------------------


def read_manifest(path: Path) -> list[Row]:
    """Reads a manifest: CSV, JSON Lines or Parquet, by its suffix.

    Raises:
      UserError: if it is missing, of another kind, malformed or empty.
    """
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist; give the path of a file")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(
            f"manifest {path} is not CSV, JSONL or Parquet; use one of {', '.join(readers)}"
        )
    try:
        rows = readers[path.suffix](path)
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} is not UTF-8; save it as UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"manifest {path} cannot be read: {reason}; fix the file") from None
    if not rows:
        raise UserError(f"manifest {path} has no rows; list at least one image and its text")
    return rows


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the boxes of one row can be long; the default is 128 KiB
    # `utf-8-sig` drops the mark that Excel writes at the start of a file.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        for row in reader:
            # DictReader stores surplus fields under None, and None for missing fields.
            if None in row or None in row.values():
                raise ValueError(
                    f"line {reader.line_num} does not have as many fields as the header"
                )
            rows.append(row)
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not `splitlines`, which also splits at separators that JSON allows inside a string.
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


# Cells ----------------------------------------------------------------------------------------


def get_cell(row: Row, column: str | None) -> Any:
    """Returns a cell, or None if the column or the value is missing, blank or not a number.

    >>> [get_cell({"a": " x ", "b": " "}, column) for column in ("a", "b", "c", None)]
    ['x', None, None, None]
    """
    value = None if column is None else row.get(column)
    if isinstance(value, float) and math.isnan(value):  # an empty cell of a numeric Parquet column
        return None
    if isinstance(value, str):
        return value.strip() or None
    return value


def parse_json(value: Any) -> Any:
    """Parses a cell that contains a JSON list or object; returns any other cell unchanged.

    Raises:
      ValueError: if it begins like JSON and is not JSON.
    """
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return json.loads(value)
    return value


# Columns --------------------------------------------------------------------------------------


def match_columns(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    required: Iterable[str],
    roles: Iterable[str],
) -> dict[str, str | None]:
    """Returns the column of each role, None for a role without one.

    Args:
      rows: all rows.
      columns: role -> column, where the column is not called like its role. "" means that no column
        has the role, whatever the columns are called.
      required: roles that must have a column.
      roles: all roles.

    Raises:
      UserError: for an unknown role, or a named or required column that is missing.
    """
    available = {name for row in rows for name in row}
    roles = tuple(roles)
    for role in columns:
        if role not in roles:
            raise UserError(f"columns has the unknown role {role!r}; use {', '.join(roles)}")
    matches: dict[str, str | None] = {}
    for role in roles:
        name = columns.get(role, role)
        is_ignored = role in columns and not name
        if is_ignored:
            matches[role] = None
        elif name in available:
            matches[role] = name
        elif role in columns or role in required:
            raise UserError(
                f"column {name!r} ({role}) is not in the manifest; {_suggest(name, available)}"
            )
        else:
            matches[role] = None
    return matches


def _suggest(name: str, candidates: Iterable[str]) -> str:
    candidates = sorted(candidates)
    matches = difflib.get_close_matches(name, candidates, 1)
    return f"did you mean {matches[0]!r}?" if matches else f"it has {', '.join(candidates)}"


# Filters --------------------------------------------------------------------------------------


def check_conditions(conditions: Mapping[str, Any], rows: Sequence[Row], name: str) -> None:
    """Raises UserError for a condition on a column that does not exist, or of the wrong form.

    Args:
      conditions: see `filter_rows`.
      rows: the rows to filter. If there are none, any column will do.
      name: name of the conditions in messages.
    """
    available = {column for row in rows for column in row}
    for column, condition in conditions.items():
        if rows and column not in available:
            raise UserError(
                f"column {column!r} of {name} does not exist; {_suggest(column, available)}"
            )
        rules = condition if isinstance(condition, Mapping) else {"in": condition}
        # A single string would be read as a list of its letters.
        has_scalar = any(isinstance(value, str | int | float | None) for value in rules.values())
        if set(rules) - {"in", "not"} or has_scalar:
            raise UserError(
                f'{name} of {column!r} is {condition!r}; write {{"in": [..]}} or {{"not": [..]}}'
            )


def filter_rows(rows: Iterable[Row], conditions: Mapping[str, Any]) -> list[Row]:
    """Returns the rows that fulfil all conditions.

    Conditions are column -> {"in": [...]}, {"not": [...]} or [...], which is short for "in". Values
    are compared as text; a missing one is "".

    >>> filter_rows([{"view": "PA"}, {"view": "L"}], {"view": {"not": ["L"]}})
    [{'view': 'PA'}]
    """
    rows = list(rows)
    for column, condition in conditions.items():
        rules = condition if isinstance(condition, Mapping) else {"in": condition}
        for rule, values in rules.items():
            texts = {str(value) for value in values}
            rows = [row for row in rows if (_cell_text(row, column) in texts) == (rule == "in")]
    return rows


def _cell_text(row: Row, column: str) -> str:
    value = get_cell(row, column)
    return "" if value is None else str(value)


# Splits ---------------------------------------------------------------------------------------


def assign_split(split: Any, patient_id: str, fractions: tuple[float, float]) -> str:
    """Returns the split of a row.

    >>> assign_split("Validation", "7", (0.1, 0.1)), assign_split(None, "7", (0.0, 0.0))
    ('val', 'train')

    Args:
      split: the split that the row names. If it is None, a hash of the patient decides.
      patient_id: id of the patient.
      fractions: expected fractions of patients in val and in test.

    Raises:
      UserError: if the row names an unknown split.
    """
    if split is not None:
        name = _SPLIT_SYNONYMS.get(str(split).lower(), str(split).lower())
        if name not in SPLITS:
            raise UserError(f"split {split!r} is unknown; use {', '.join(SPLITS)}")
        return name
    # Uniform in [0, 1) and the same in every run. So new rows do not move old patients.
    digest = hashlib.sha256(patient_id.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    val_fraction, test_fraction = fractions
    if position < val_fraction:
        return "val"
    return "test" if position < val_fraction + test_fraction else "train"


def check_patient_leaks(assignments: Iterable[tuple[str, str]]) -> None:
    """Raises UserError if a patient is in two splits, with the first such patient.

    Args:
      assignments: patient and split of each row.
    """
    split_of_patient: dict[str, str] = {}
    for patient_id, split in assignments:
        first_split = split_of_patient.setdefault(patient_id, split)
        if first_split != split:
            raise UserError(
                f"patient {patient_id!r} is in splits {first_split!r} and {split!r}; "
                "put all rows of a patient into one"
            )

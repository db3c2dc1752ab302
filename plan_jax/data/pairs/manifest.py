"""A user's manifest: reading, matching of columns, filtering of rows, and splits by patient."""

import csv
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.cells import (
    Row,
    fold_name,
    get_cell,
    normalise_name,
    replace_surrogates,
    to_number,
)
from plan_jax.types import UserError

DELIMITERS = ",;\t|"
MAX_LISTED = 5  # values in a message
MAX_REASON = 200  # characters of an error of a reader in a message
_IMAGE_NAME = re.compile(r"\.(png|jpe?g|dcm|dicom|tiff?|bmp|webp)$", re.IGNORECASE)
SPLITS = ("train", "val", "test")
_SPLIT_SYNONYMS = {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
}

# Reading --------------------------------------------------------------------------------------


def read_manifest(path: Path) -> list[Row]:
    """Reads a manifest: CSV, TSV, JSON Lines, JSON or Parquet, by its suffix.

    The delimiter of a CSV file is a comma, a semicolon, a tab or `|`, whichever its header has.

    Raises:
      UserError: if it is missing, of another kind, malformed or empty.
    """
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist; give the path of a file")
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(
            f"manifest {path} is not CSV, JSONL or Parquet; use one of {', '.join(readers)}"
        )
    try:
        rows = _normalise_columns(readers[suffix](path))
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} is not UTF-8; save it as UTF-8") from None
    # pyarrow raises all of these, as for a type it cannot read or a date out of range.
    except (csv.Error, OSError, ValueError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:MAX_REASON]
        raise UserError(f"manifest {path} cannot be read: {reason}; fix the file") from None
    if not rows:
        raise UserError(f"manifest {path} has no rows; list at least one image and its text")
    return rows


def _normalise_columns(rows: list[Row]) -> list[Row]:
    """Returns rows whose columns have their accents composed in one way."""
    names = {name: normalise_name(name) for name in dict.fromkeys(name for r in rows for name in r)}
    if all(name == normalised for name, normalised in names.items()):
        return rows
    for row in rows:
        _check_header([names[name] for name in row])
    return [{names[name]: cell for name, cell in row.items()} for row in rows]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the boxes of one row can be long; the default is 128 KiB
    # `utf-8-sig` drops the mark that Excel writes at the start of a file.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        declaration = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)  # Excel writes it
        if not declaration:
            lines.seek(0)
        is_tabbed = path.suffix.lower() == ".tsv" and "\t" in first
        delimiter = declaration[1] if declaration else _choose_delimiter(first)
        delimiter = "\t" if is_tabbed else delimiter
        # Leading blanks are dropped, or a quotation after `, ` would not be one.
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        # Spreadsheets write columns without a name at the end.
        while header and not header[-1]:
            header.pop()
        _check_header(header)
        if any(map(_IMAGE_NAME.search, header)):
            raise ValueError("it has no header; write the names of the columns in line 1")
        rows = []
        for fields in _name_lines(reader):
            if not any(map(str.strip, fields)):  # a blank line, or one that Excel writes as `,,`
                continue
            while len(fields) > len(header) and not fields[-1].strip():
                fields.pop()
            if len(fields) != len(header):
                raise ValueError(
                    f"line {reader.line_num} does not have as many fields as the header"
                )
            rows.append(dict(zip(header, fields, strict=True)))
    return rows


def _name_lines(reader: Any) -> Iterator[list[str]]:
    """Yields the fields of each line; an error of the reader says in which line it is."""
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _choose_delimiter(header: str) -> str:
    """Returns the delimiter that divides a header into the most fields; a comma if in doubt."""
    outside_quotes = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=outside_quotes.count)


def _check_header(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is there twice; columns without a name are not used."""
    if len(set(names)) == len(names):
        return
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(
                f"column {quoting.quote(name)} is there twice; rename or drop one of them"
            )


def _read_jsonl(path: Path) -> list[Row]:
    # Not `splitlines`, which also splits at separators that JSON allows inside a string.
    lines = enumerate(path.read_text("utf-8-sig").split("\n"), 1)
    return [_read_object(line, f"line {number}") for number, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    text = path.read_text("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_json_object(path, text)
    rows = _parse_json(text, "the file")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"item {number} is not a JSON object")
    return rows


def _read_json_object(path: Path, text: str) -> list[Row]:
    """Returns the only row of a file, or its lines, which are one object each."""
    try:
        content = json.loads(text, object_pairs_hook=_build_object)
    except (ValueError, RecursionError):
        return _read_jsonl(path)
    if isinstance(content, dict) and content and all(map(_is_list_of_rows, content.values())):
        names = ", ".join(quoting.quote(name).strip("'") for name in [*content][:MAX_LISTED])
        raise ValueError(
            f"it is an object with lists of rows ({names}); write one list, with the name of its "
            "list in a column `split` of each row"
        )
    return [_read_object(text, "the file")]


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _read_object(line: str, name: str) -> Row:
    row = _parse_json(line, name)
    if not isinstance(row, dict):
        raise ValueError(f"{name} is not a JSON object")
    return row


def _parse_json(text: str, name: str) -> Any:
    try:
        return replace_surrogates(json.loads(text, object_pairs_hook=_build_object), text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _build_object(pairs: list[tuple[str, Any]]) -> Row:
    """Returns an object of JSON, in which no name may stand twice: Python would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {quoting.quote(twice)} is there twice")
    return row


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_header(file.schema_arrow.names)
        return file.read().to_pylist()


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
    candidates = sorted(str(candidate) for candidate in candidates)
    matches = difflib.get_close_matches(name, candidates, 1)
    # A file without a header has a report for a name.
    names = [quoting.quote(candidate).strip("'") for candidate in candidates]
    return f"did you mean {matches[0]!r}?" if matches else f"it has {', '.join(names)}"


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
    are compared as numbers, or as names in any case; a missing one is "".

    >>> filter_rows([{"view": "PA"}, {"view": "L"}], {"view": {"not": ["L"]}})
    [{'view': 'PA'}]
    """
    rows = list(rows)
    for column, condition in conditions.items():
        rules = condition if isinstance(condition, Mapping) else {"in": condition}
        for rule, values in rules.items():
            keys = {_fold_value(value) for value in values}
            rows = [row for row in rows if bool(_cell_keys(row, column) & keys) == (rule == "in")]
    return rows


def remark_conditions(
    conditions: Mapping[str, Any], rows: Sequence[Row], num_rows: int, name: str, noun: str
) -> list[str]:
    """Returns notes on conditions: how much they leave out, and values that occur nowhere.

    Args:
      conditions: see `filter_rows`.
      rows: the rows before they are filtered.
      num_rows: number of rows that fulfil the conditions.
      name: name of the conditions.
      noun: what a row is, as "row" or "box".
    """
    if not conditions:
        return []
    num_excluded = len(rows) - num_rows
    verb = "leaves" if name == "box_where" else "leave"
    plural = "boxes" if noun == "box" else f"{noun}s"
    notes = [f"{name} {verb} out {num_excluded} of {quoting.count(len(rows), noun, plural)}"]
    for column, condition in conditions.items():
        rules = condition if isinstance(condition, Mapping) else {"in": condition}
        keys = {key for row in rows for key in _cell_keys(row, column)} | {""}
        values = [value for items in rules.values() for value in items]
        absent_values = [value for value in values if _fold_value(value) not in keys]
        if absent_values:
            value_list = ", ".join(map(quoting.quote, absent_values[:MAX_LISTED]))
            notes.append(f"{name}: no {noun} has {value_list} in column {quoting.quote(column)}")
    return notes


def _cell_keys(row: Row, column: str) -> set[str | int | float]:
    """Returns how a condition may write a cell: a missing one as "" or as its word."""
    value = get_cell(row, column)
    return {"", _fold_value(row.get(column, ""))} if value is None else {_fold_value(value)}


def _fold_value(value: Any) -> str | int | float:
    """Returns the key of a value: 1, 1.0 and "1" are one, and so are `PA` and `pa`."""
    return _fold_text(str(value).strip())


@functools.lru_cache(maxsize=4096)  # a column has few values, and many rows
def _fold_text(text: str) -> str | int | float:
    if re.fullmatch(r"[+-]?\d{1,300}", text):
        return int(text)  # exact, where a float of a long id is not
    number = to_number(text)
    return fold_name(text) if number is None else number


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
            raise UserError(f"split {quoting.quote(split)} is unknown; use {', '.join(SPLITS)}")
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
                f"patient {quoting.quote(patient_id)} is in splits {first_split!r} and "
                f"{split!r}; put all rows of a patient into one"
            )

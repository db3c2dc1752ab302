"""The folder of a public dataset as it was downloaded: its tables, and what cannot be used."""

import csv
import gzip
import io
import json
import lzma
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from plan_jax.data import faults, quoting
from plan_jax.types import UserError

MAX_DEPTH = 4  # folders below the source folder that are searched for tables
MAX_FOLDERS = 2000  # that are searched
MAX_BRANCHES = 256  # folders in one folder; those of a folder with more are patients, not searched
MAX_MEMBER_BYTES = 2**20  # of a report or a table in an archive
CUT_OFF = "a row of a table is cut off"
MAX_CELL = 2**20  # characters; a longer one swallows the rows behind a stray quotation mark
MAX_COLUMNS = 12  # names of columns in a message
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    UnicodeDecodeError,
    csv.Error,
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    RuntimeError,  # an archive with a password, JSON with thousands of levels
)


class SourceFolder:
    """A folder as downloaded, searched and read without leaving it.

    Paths are relative to the folder, with `/`. Each table that is read is noted in `tables`, and
    each row that cannot be used in `dropped`.

    Attributes:
      root: the folder.
      page: where the dataset is downloaded from, for messages.
      tables: paths of the files that rows were read from, and of folders whose names are rows.
      dropped: reason -> names of the rows or images that cannot be used for it.
      notes: sentences for the summary.
    """

    def __init__(self, root: Path, page: str = ""):
        """Initialises the folder.

        Raises:
          UserError: it does not exist.
        """
        self.root = Path(os.path.abspath(root))
        self.page = page
        self.tables: dict[str, None] = {}
        self.dropped: dict[str, list[str]] = {}
        self.notes: list[str] = []
        if not self.root.is_dir():
            raise UserError(
                f"source {self.root} is not a folder; pass the folder that the dataset was "
                "downloaded to"
            )

    # Files ------------------------------------------------------------------------------------

    def find(self, *names: str) -> str:
        """Returns the path of the first of some files that exists, or "".

        A name may contain folders. It is looked for in the source folder, then in the folders
        below it, nearest first. A table that ends in `.csv`, `.txt`, `.json` or `.tsv` may also be
        packed as `.gz`, or alone in a `.zip`.
        """
        for name in names:
            spellings = [name]
            if name.endswith((".csv", ".txt", ".json", ".tsv")):
                spellings += [f"{name}.gz", f"{name}.zip"]
            for folder in self._folders:
                for spelling in spellings:
                    path = os.path.join(folder, spelling).replace("\\", "/")
                    if os.path.isfile(self.resolve(path)):
                        return path
        return ""

    def find_folder(self, *names: str) -> str:
        """Returns the path of the first of some folders that exists, or "", as `find`."""
        for name in names:
            for folder in self._folders:
                path = os.path.join(folder, name).replace("\\", "/")
                if os.path.isdir(self.resolve(path)):
                    return path
        return ""

    def require(self, *names: str) -> str:
        """Returns the path of the first of some files that exists.

        Raises:
          UserError: none of them exists.
        """
        if path := self.find(*names):
            return path
        others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
        remedy = f"download it from {self.page}" if self.page else "add it"
        raise UserError(f"{self.root} has no {names[0]}{others}; {remedy}")

    def has(self, path: str) -> bool:
        """Returns whether a path of the source folder is a file that is not empty."""
        try:
            return os.stat(self.resolve(path)).st_size > 0
        except OSError as error:
            if faults.is_passing(error):
                raise faults.name_unreadable(error, self.root, path) from None
            return False

    def list_names(self, folder: str) -> list[str]:
        """Returns the names in a folder, sorted; none if it does not exist."""
        try:
            return sorted(os.listdir(self.resolve(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise faults.name_unreadable(error, self.root, folder) from None

    def resolve(self, path: str) -> Path:
        """Returns the full path of a file, which must be inside the source folder.

        Raises:
          UserError: it leaves the folder.
        """
        if "\0" not in path:
            full_path = Path(os.path.abspath(self.root / path))
            if full_path.is_relative_to(self.root):
                return full_path
        raise UserError(
            f"path {quoting.quote_path(path)} leaves the source folder {self.root}; correct the "
            "table that names it"
        )

    @cached_property
    def _folders(self) -> list[str]:
        """Returns the folders that tables may be in, nearest first."""
        folders, level = [""], [""]
        for _ in range(MAX_DEPTH):
            below: list[str] = []
            for folder in level:
                if len(folders) + len(below) > MAX_FOLDERS:
                    break
                try:
                    with os.scandir(self.root / folder) as entries:
                        names = [entry.name for entry in entries if entry.is_dir()]
                except OSError:  # a folder that may not be read has no tables
                    continue
                if len(names) > MAX_BRANCHES:
                    continue
                below += [f"{folder}/{name}" if folder else name for name in sorted(names)]
            folders += below[: MAX_FOLDERS - len(folders)]
            level = below
        return folders

    # Tables -----------------------------------------------------------------------------------

    def read_csv(
        self,
        path: str,
        columns: Sequence[str],
        *,
        optional: Sequence[str] = (),
        delimiter: str = ",",
    ) -> Iterator[dict[str, str]]:
        """Yields the rows of a table as {column: cell}, for the named columns.

        Columns are found by name, whatever their order; blanks around names and cells are dropped.
        Other columns do not matter. A row that has no cell of a required column is dropped, as the
        last one of a table that was cut off.

        Args:
          path: the table, which may be packed as gzip, or alone in a zip archive.
          columns: names of the columns that must exist.
          optional: names of columns that may exist; without them, their cells are "".
          delimiter: what divides the cells.

        Raises:
          UserError: the table cannot be read, or lacks a column.
        """
        csv.field_size_limit(MAX_CELL)
        self.tables[path] = None
        with self._name_damage(path), self._open(path) as file:
            lines = _CountedQuotes(file)
            reader = csv.reader(lines, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            if not any(header):
                raise UserError(
                    f"table {path} in {self.root} is empty; download it again"
                    f"{f' from {self.page}' if self.page else ''}"
                )
            if missing := [name for name in columns if name not in header]:
                raise UserError(
                    f"table {path} in {self.root} has no column {', '.join(map(repr, missing))}; "
                    f"its columns are {_list_columns(header)}"
                )
            # Of a name that is there twice, the first counts.
            place_of = {name: header.index(name) for name in columns}
            extra_of = {name: header.index(name) for name in optional if name in header}
            num_required = max(place_of.values(), default=-1) + 1
            start = end = reader.line_num
            is_empty = True
            for cells in reader:
                start, end = end, reader.line_num
                if not any(map(str.strip, cells)):
                    continue
                is_empty = False
                if len(cells) < num_required:
                    line = quoting.quote_path(f"{path}:{reader.line_num}")
                    if line not in self.dropped.get(CUT_OFF, ()):  # tables may be read again
                        self.drop(CUT_OFF, line)
                    continue
                row = dict.fromkeys(optional, "")
                row |= {name: cells[place].strip() for name, place in place_of.items()}
                for name, place in extra_of.items():
                    row[name] = cells[place].strip() if place < len(cells) else ""
                yield row
            if end - start > 1 and lines.count % 2:
                raise csv.Error(f"the quotation mark in line {start + 1} or after it has no end")
        if is_empty:
            self._note_empty(path)

    def read_lines(self, path: str) -> Iterator[str]:
        """Yields the lines of a list that are not blank, without blanks around them.

        Raises:
          UserError: the list cannot be read.
        """
        self.tables[path] = None
        is_empty = True
        with self._name_damage(path), self._open(path) as lines:
            for line in lines:
                if line.strip():
                    is_empty = False
                    yield line.strip()
        if is_empty:
            self._note_empty(path)

    def read_json(self, path: str) -> Any:
        """Returns the content of a file of JSON.

        Raises:
          UserError: the file cannot be read.
        """
        self.tables[path] = None
        with self._name_damage(path), self._open(path) as file:
            return json.load(file)

    def read_json_lines(self, path: str) -> Iterator[dict[str, Any]]:
        """Yields the objects of a file with one object of JSON a line.

        Raises:
          UserError: the file cannot be read.
        """
        for number, line in enumerate(self.read_lines(path), start=1):
            with self._name_damage(f"{path} line {number}"):
                content = json.loads(line)
            if not isinstance(content, dict):
                raise UserError(f"line {number} of {path} in {self.root} is not an object of JSON")
            yield content

    def read_text(self, path: str) -> str | None:
        """Returns the text of a small file, or None if it does not exist.

        Raises:
          ValueError: the text is not UTF-8.
          UserError: the file may exist, and cannot be read.
        """
        content = self.read_bytes(path)
        try:
            return None if content is None else content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"text is not UTF-8 at byte {error.start}") from None

    def read_bytes(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it does not exist.

        Raises:
          UserError: the file may exist, and cannot be read.
        """
        try:
            return self.resolve(path).read_bytes()
        except OSError as error:
            if faults.is_passing(error):
                raise faults.name_unreadable(error, self.root, path) from None
            return None

    def open_zip(self, path: str) -> zipfile.ZipFile:
        """Returns an archive, of which the caller reads members as bytes; nothing is unpacked.

        Raises:
          UserError: it cannot be read.
        """
        self.tables[path] = None
        with self._name_damage(path):
            return zipfile.ZipFile(self.resolve(path))

    def read_tar(self, path: str, suffix: str) -> Iterator[tuple[str, bytes]]:
        """Yields the names and contents of the small files of an archive that end in a suffix.

        The archive may be packed; nothing is unpacked onto the disk.

        Raises:
          UserError: it cannot be read.
        """
        self.tables[path] = None
        with self._name_damage(path), tarfile.open(self.resolve(path)) as archive:
            for member in archive:
                if not member.isfile() or not member.name.endswith(suffix):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    self.drop("a file of an archive is too large", member.name)
                    continue
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()

    # What cannot be used ----------------------------------------------------------------------

    def drop(self, reason: str, name: str) -> None:
        """Counts and lists a row or an image that cannot be used.

        Args:
          reason: the same few words for all that is dropped for it.
          name: an id, a path, or a table with a line; never the text of a report.
        """
        self.dropped.setdefault(reason, []).append(quoting.quote_path(name))

    def note(self, sentence: str) -> None:
        """Adds a sentence to the summary."""
        self.notes.append(sentence)

    def _note_empty(self, path: str) -> None:
        if (sentence := f"{path} has no rows") not in self.notes:  # it may be read again
            self.note(sentence)

    def _open(self, path: str) -> io.TextIOWrapper:
        raw = self.resolve(path).open("rb")
        start = raw.read(4)  # the suffix may say otherwise
        raw.seek(0)
        stream: Any = raw
        if start.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=raw)
        elif start == b"PK\x03\x04":
            archive = zipfile.ZipFile(raw)
            # macOS packs each file twice; the second has no content.
            members = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
            if len(members) != 1:
                raise UserError(
                    f"{path} in {self.root} packs {len(members)} files, not one table; unpack it"
                )
            stream = archive.open(members[0])
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")

    def _name_damage(self, path: str) -> "_NamedDamage":
        return _NamedDamage(f"{path} in {self.root}")


def parse_numbers(cells: Iterable[str]) -> tuple[float, ...] | None:
    """Returns the numbers of some cells; None if one of them is not a finite number.

    >>> parse_numbers(["562.0", " 7"]), parse_numbers(["1", "nan"]), parse_numbers(["1", ""])
    ((562.0, 7.0), None, None)
    """
    try:
        numbers = tuple(float(cell) for cell in cells)
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


class _CountedQuotes:
    """The lines of a file; it counts their quotation marks, of which a table has pairs."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)
        self.count = 0

    def __iter__(self) -> "_CountedQuotes":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.count += line.count('"')
        return line


class _NamedDamage:
    """A context that turns what goes wrong while a file is read into one sentence."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, OSError) and faults.is_passing(error):
            raise UserError(
                f"{self.name} cannot be read ({error.strerror}); correct that, and repeat the "
                "command"
            ) from None
        if isinstance(error, (*READ_ERRORS, json.JSONDecodeError)):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.name} is damaged ({quoting.shorten(reason)}); download it again"
            ) from None


def _list_columns(header: Sequence[str]) -> str:
    # A table without a header begins with a row, which may have a report.
    names = ", ".join(map(quoting.quote, header[:MAX_COLUMNS]))
    return f"{names} and {len(header) - MAX_COLUMNS} more" if len(header) > MAX_COLUMNS else names

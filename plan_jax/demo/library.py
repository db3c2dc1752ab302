"""Films and reports in which the page searches: phantoms, folders of a user, or tables."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from plan_jax.data import quoting
from plan_jax.demo.examples import Example
from plan_jax.prediction import tables
from plan_jax.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
TABLE_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
MAX_REPORT_BYTES = 2**16
MAX_FILMS = 20_000


@dataclass(frozen=True, eq=False)
class Entry:
    """A film to find, by its path or its grey values, and its report, "" if there is none."""

    name: str
    report: str
    path: Path | None = None
    pixels: UInt8[np.ndarray, "Y X"] | None = None

    def digest(self) -> str:
        """Returns the SHA-256 of the film, "" if its file cannot be read."""
        if self.pixels is not None:
            header = f"{self.pixels.shape}".encode()
            return hashlib.sha256(header + self.pixels.tobytes()).hexdigest()
        try:
            with open(self.path or "", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""


def digest_text(text: str) -> str:
    """Returns the SHA-256 of a report."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def list_phantoms(examples: Sequence[Example]) -> list[Entry]:
    """Returns phantoms as entries."""
    return [Entry(example.title, example.report, pixels=example.pixels) for example in examples]


def list_films(sources: Sequence[str]) -> list[Entry]:
    """Returns the films of folders and tables, each file once.

    The report of `film.png` in a folder is `film.txt` beside it. A table has the columns `image`
    and `text`, and may name a film several times.

    Raises:
      UserError: a source does not exist or has no film, or there are too many films.
    """
    entries: dict[Path, Entry] = {}
    for source in sources:
        path = Path(source)
        if os.path.isdir(source):
            found = _list_folder(path)
        elif os.path.isfile(source) and path.suffix.lower() in TABLE_SUFFIXES:
            found = _list_table(path)
        else:
            state = "is not a table" if os.path.isfile(source) else "does not exist"
            raise UserError(
                f"--films {source} {state}; pass a folder of PNG, JPEG and DICOM files, or a table "
                "with the columns image and text"
            )
        if not found:
            raise UserError(
                f"--films {source} has no film; put files {', '.join(SUFFIXES)} into it"
            )
        for entry in found:
            entries.setdefault(Path(os.path.abspath(entry.path or "")), entry)
    if len(entries) > MAX_FILMS:
        raise UserError(f"--films has {len(entries)} films, more than {MAX_FILMS}; pass a part")
    return list(entries.values())


def _list_folder(folder: Path) -> list[Entry]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [
        Entry(str(path.relative_to(folder)), _read_report(path.with_suffix(".txt")), path)
        for path in paths
        if path.is_file()
    ]


def _read_report(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_REPORT_BYTES)
    except OSError:
        return ""
    return " ".join(content.decode("utf-8", "replace").split())


def _list_table(table: Path) -> list[Entry]:
    entries = []
    for job in tables.read_jobs(table):
        if not job.fault:
            report = " ".join(" ".join(job.texts).split())
            entries.append(Entry(job.name, report, Path(job.path)))
    return entries


def describe(entries: Sequence[Entry]) -> str:
    """Returns how many films and reports there are."""
    num_reports = sum(bool(entry.report) for entry in entries)
    return f"{quoting.count(len(entries), 'film')}, {quoting.count(num_reports, 'report')}"

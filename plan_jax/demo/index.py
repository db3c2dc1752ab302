"""Features of the films and reports of a library, kept on disk between starts of the page.

The file has numbers and digests only: no name of a file, and no word of a report. It is valid for
one model. What it lacks is encoded, and a file that is damaged, or of another model, is replaced.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from plan_jax import logger
from plan_jax.data import quoting
from plan_jax.types import UserError

FORMAT = 1  # raised whenever the arrays of the file change
DEFAULT_FOLDER = "~/.cache/plan_jax/retrieval"
Encode = Callable[[int], Float[np.ndarray, " D"] | None]
Table = dict[str, Float[np.ndarray, " D"]]


class Index(NamedTuple):
    """Unit features of films and reports; a row is 0 where there is none, which is never found."""

    films: Float[np.ndarray, "N D"]
    reports: Float[np.ndarray, "N D"]


def name_file(sources: Sequence[str], folder: Path | None = None) -> Path:
    """Returns the path of the index of a library, named by the paths of its sources."""
    paths = "\n".join(str(Path(source).absolute()) for source in sources)
    name = hashlib.sha256(paths.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return (folder or Path(DEFAULT_FOLDER).expanduser()) / f"{name}.npz"


def load_or_build(
    path: Path,
    model: str,
    films: Sequence[str],
    reports: Sequence[str],
    encode_film: Encode,
    encode_report: Encode,
) -> tuple[Index, tuple[str, ...]]:
    """Returns the features of a library, and sentences on what was read and what was built.

    Args:
      path: of the file; it is written if anything in it is new.
      model: SHA-256 of the model.
      films: digest of each film, "" if it cannot be read.
      reports: digest of each report, "" if there is none.
      encode_film: returns the features of the film with that number; None if it cannot be used.
      encode_report: the same for reports.
    """
    tables, notes = _read(path, model)
    known = [table.copy() for table in tables]
    for table, digests, encode in zip(
        known, (films, reports), (encode_film, encode_report), strict=True
    ):
        for number, digest in enumerate(digests):
            if digest and digest not in table:
                features = encode(number)
                if features is not None:
                    table[digest] = _normalise(features)
    num_new = [len(table) - len(old) for table, old in zip(known, tables, strict=True)]
    parts = [
        quoting.count(count, noun) for count, noun in zip(num_new, ("film", "report"), strict=True)
    ]
    if any(num_new):
        notes.append(f"{' and '.join(parts)} were added to the index")
        # Only what the library has, or the file would grow with every change of a folder.
        current = [
            {digest: table[digest] for digest in digests if digest in table}
            for table, digests in zip(known, (films, reports), strict=True)
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, model, *current)
        except (OSError, UserError):
            notes.append("the index cannot be written, so the next start builds it again")
    else:
        notes.append("the index was read from the disk")
    num_lost = (
        sum(digest not in known[0] for digest in films),
        sum(bool(digest) and digest not in known[1] for digest in reports),
    )
    for count, noun in zip(num_lost, ("film", "report"), strict=True):
        if count:
            notes.append(f"{quoting.count(count, noun)} that cannot be used left out")
    width = next((len(row) for table in known for row in table.values()), 1)
    rows = [
        np.stack([table.get(digest, np.zeros(width, np.float32)) for digest in digests])
        if len(digests)
        else np.zeros((0, width), np.float32)
        for table, digests in zip(known, (films, reports), strict=True)
    ]
    return Index(*rows), tuple(notes)


def rank(
    query: Float[np.ndarray, " D"], features: Float[np.ndarray, "N D"], count: int
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Returns the rows [K] that are most similar to a query, best first, and their cosines [K]."""
    cosines = features @ _normalise(query)
    usable = np.flatnonzero(np.abs(features).sum(1) > 0)
    order = usable[np.argsort(-cosines[usable], kind="stable")][:count]
    return order, cosines[order]


def _normalise(features: Float[np.ndarray, " D"]) -> Float[np.ndarray, " D"]:
    norm = float(np.linalg.norm(features))
    return (np.asarray(features, np.float32) / (norm or 1.0)).astype(np.float32)


def _read(path: Path, model: str) -> tuple[tuple[Table, Table], list[str]]:
    """Returns what a file has of films and of reports, and why it has nothing, if it should."""
    empty: tuple[Table, Table] = ({}, {})
    if not path.is_file():
        return empty, []
    try:
        with np.load(path) as arrays:  # refuses pickles
            if int(arrays["format"]) != FORMAT:
                return empty, ["the index was of another version and is built again"]
            if str(arrays["model"]) != model:
                return empty, ["the index was of another model and is built again"]
            parts = [(arrays[f"{kind}_digests"], arrays[kind]) for kind in ("films", "reports")]
    except Exception:  # zipfile and numpy raise many kinds for a damaged file
        return empty, ["the index was damaged and is built again"]
    tables = []
    for digests, features in parts:
        is_valid = (
            features.ndim == 2
            and features.dtype == np.float32
            and digests.shape == features.shape[:1]
            and np.isfinite(features).all()
        )
        if not is_valid:
            return empty, ["the index was damaged and is built again"]
        tables.append(dict(zip(digests.astype(str).tolist(), features, strict=True)))
    return (tables[0], tables[1]), []


def _write(path: Path, model: str, films: Table, reports: Table) -> None:
    width = next((len(row) for table in (films, reports) for row in table.values()), 1)
    arrays: dict[str, Any] = {"format": np.asarray(FORMAT), "model": np.asarray(model)}
    for kind, table in (("films", films), ("reports", reports)):
        arrays[f"{kind}_digests"] = np.asarray(list(table), np.str_)
        rows = list(table.values())
        arrays[kind] = np.stack(rows) if rows else np.zeros((0, width), np.float32)
    with logger.open_atomically(path) as file:
        np.savez(file, **arrays)

"""Paths of images and masks: inside the images folder, in any spelling, and hints where not."""

import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plan_jax.data import faults, quoting
from plan_jax.data.pairs.cells import is_missing, parse_literal
from plan_jax.types import UserError

_URL = re.compile(r"[a-z][a-z0-9+]+://", re.IGNORECASE)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
MAX_FOLDERS = 50  # below the images folder that a hint looks into


def read_image_name(value: Any, suffix: str = "") -> str:
    """Returns the path in the cell of an image, with the suffix that it lacks.

    >>> read_image_name("a.png"), read_image_name(["a.png"]), read_image_name(7, ".png")
    ('a.png', 'a.png', '7.png')

    Raises:
      ValueError: if the cell is not one path.
    """
    content = parse_literal(value)
    if isinstance(content, list | tuple) and len(content) == 1:
        content = content[0]
    if is_missing(content):
        raise ValueError("names no image")
    if isinstance(content, list | tuple):
        raise ValueError(f"is a list of {len(content)} images; write one row for each image")
    if isinstance(content, dict) and "bytes" in content:
        raise ValueError("is an embedded image; save it as a file and write its path")
    if isinstance(content, bytes):
        raise ValueError("holds bytes of an image; save them as a file and write its path")
    if suffix and isinstance(content, int) and not isinstance(content, bool):
        content = str(content)
    if not isinstance(content, str):
        raise ValueError(f"is {quoting.quote(content)}, not the path of an image")
    return content.strip() + suffix


def resolve_path(root: Path, path: str, number: int) -> Path:
    """Returns the full path of an image or a mask, which must be inside the root.

    A manifest may come from somebody else: it must not make this process read other files. The
    spelling is that of an existing file, if there is one: with `/` for a backslash, or with
    accents composed in another way.

    Raises:
      ValueError: if the path is an address, a text, or too long for a path.
      UserError: if it leaves the root, or if the system does not say whether it exists.
    """
    if _URL.match(path):
        raise ValueError("is an address; download it and write the path of the file")
    spellings = _list_spellings(root, path)
    for spelling in spellings:
        if spelling.is_relative_to(root) and _is_file(root, spelling):
            return spelling
    # `..\\x` leaves the folder on a system that reads backslashes as `/`.
    if not all(spelling.is_relative_to(root) for spelling in spellings):
        inner_path = find_inside(root, path)
        remedy = f"write {quoting.quote_path(inner_path)}" if inner_path else "move it inside"
        raise UserError(
            f"path {quoting.quote_path(path)!r} of row {number} leaves the images folder {root}; "
            f"{remedy}"
        )
    if not quoting.is_path(path):
        raise ValueError(f"{quoting.quote_path(path)} is not a path")
    return spellings[0]


def list_candidates(root: Path, path: str) -> list[Path]:
    """Returns the files inside the root that a path may mean when they exist."""
    if _URL.match(path):
        return []
    return [spelling for spelling in _list_spellings(root, path) if spelling.is_relative_to(root)]


def _list_spellings(root: Path, path: str) -> list[Path]:
    slashes = [path, path.replace("\\", "/")]
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in slashes]
    names = dict.fromkeys([*slashes, *forms])
    return [Path(os.path.abspath(root / name)) for name in names]


def _is_file(root: Path, path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if faults.is_passing(error):
            raise faults.name_unreadable(error, root, os.path.relpath(path, root)) from None
        raise ValueError(f"is not a path ({error.strerror})") from None


def find_inside(root: Path, path: str) -> str | None:
    """Returns the end of a path that exists inside the root, or None."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if os.path.isfile(root / end):
            return end
    return None


def suggest_folder(root: Path, path: str) -> str:
    """Returns a hint on where a missing path may be, as the end of a sentence, or ""."""
    try:
        return next(_list_hints(root, path.replace("\\", "/")), "")
    except OSError:  # a folder that may not be read, a name that is too long
        return ""


def _list_hints(root: Path, path: str) -> Iterator[str]:
    name = quoting.quote_path(path)
    for folder in (root.parent, root.parent.parent):
        if (folder / path).is_file():
            yield f"{name} exists from {folder}: set data.builder.images to it"
    with os.scandir(root) as entries:
        entries_of_folders = (Path(entry.path) for entry in entries if entry.is_dir())
        folders = sorted(itertools.islice(entries_of_folders, MAX_FOLDERS))
    for folder in folders:
        if (folder / path).is_file():
            yield f"{name} exists in {folder}: set data.builder.images to it"
    if inner_path := find_inside(root, path):
        yield f"it exists as {quoting.quote_path(inner_path)}: write paths from {root}"
    for suffix in _SUFFIXES:
        if (root / f"{path}{suffix}").is_file():
            yield f"it exists with the suffix {suffix}: set data.builder.image_suffix to it"
        for folder in folders:
            if (folder / f"{path}{suffix}").is_file():
                yield (
                    f"it exists in {folder} with the suffix {suffix}: set data.builder.images and "
                    "data.builder.image_suffix to them"
                )
    siblings = (root / path).parent
    if siblings.is_dir():
        file_name = Path(path).name.casefold()
        for entry in siblings.iterdir():
            if entry.name.casefold() == file_name and entry.is_file():
                yield f"the file is called {quoting.quote_path(entry.name)}: write it so"
    if re.search(r"\.\w+\s*[,;|]\s*\S", path):
        yield "a cell that names several images needs one row for each"

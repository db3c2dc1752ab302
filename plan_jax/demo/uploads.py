"""Files that a browser sends: what is read of them, and that none of them stays."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from plan_jax.data import dicom, images, quoting
from plan_jax.data.grey import ImageError
from plan_jax.types import UserError

MAX_BYTES = 2**26
MAX_PIXELS = 2**26  # twice those of the largest detectors
SWEEP_SECONDS = 60  # files of uploads that nobody has read are deleted at this age
KINDS = ("PNG", "JPEG")
REMEDY = "open a PNG, a JPEG or a DICOM file"


@contextlib.contextmanager
def consume(path: Path, folder: Path) -> Iterator[Path]:
    """Yields an upload, which is deleted in any case when the context ends.

    A server puts uploads of one content into one folder below `folder`; that goes once it is empty.

    Raises:
      UserError: the path is not in the folder.
    """
    path, folder = path.resolve(), folder.resolve()
    if folder not in path.parents:
        raise UserError("the file is not an upload; open it again")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with contextlib.suppress(OSError):  # another tab has sent the same film by another name
                path.parent.rmdir()


def delete_old(folder: Path, age: int) -> None:
    """Deletes what is below a folder and has not changed for `age` seconds."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > age:
                path.rmdir() if path.is_dir() else path.unlink()


def show_name(name: str) -> str:
    """Returns the name of a file in one short line, without its folders.

    >>> show_name("/tmp/upload/film.png")
    'film.png'
    """
    return quoting.shorten(name.replace("\\", "/").rpartition("/")[2]) or "the file"


def check_file(path: Path, name: str) -> bytes:
    """Returns the content of a file that may be read: of a kind and a size that are.

    Nothing is decoded yet.

    Raises:
      UserError: it is missing, too large, of another kind, or promises too many pixels.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror or 'it is gone'}); open it again"
        ) from None
    if size > MAX_BYTES:
        megabytes = size / 2**20
        raise UserError(f"{name} has {megabytes:.0f} MB, more than {MAX_BYTES >> 20}; reduce it")
    kind = _find_kind(data)
    if kind not in (*KINDS, "DICOM"):
        what = f"is a file of kind {kind}" if kind else "is not an image"
        raise UserError(f"{name} {what if data else 'is an empty file'}; {REMEDY}")
    try:
        rows, columns = dicom.read_shape(data, Path(name)) if kind == "DICOM" else _read_shape(data)
    except ImageError as error:
        raise UserError(f"{name} {error}") from None
    if rows * columns > MAX_PIXELS:
        raise UserError(
            f"{name} has {rows:,} x {columns:,} pixels, more than {MAX_PIXELS:,}; reduce it"
        )
    return data


def _find_kind(data: bytes) -> str:
    """Returns the kind of a file by how it begins, "" if it is none of an image."""
    for start, kind in images.SIGNATURES.items():
        if data.startswith(start):
            return kind
    return "DICOM" if dicom.is_dicom(data) else ""


def _read_shape(data: bytes) -> tuple[int, int]:
    """Returns the rows and columns that a PNG or a JPEG promises; 0 if it is broken."""
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            return image.height, image.width
    except Image.DecompressionBombError:
        raise ImageError("has far more pixels than a film; reduce it") from None
    except Exception:  # whoever decodes it says what is wrong
        return 0, 0

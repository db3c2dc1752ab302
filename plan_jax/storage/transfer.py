"""Whole folders from and to an address, with the checksum of every file.

One file of a folder is written last and deleted first. While it is not there, the folder counts as
incomplete, so a kill at any moment leaves a whole folder or none. The checksums lie beside it.
"""

import contextlib
import fcntl
import filecmp
import glob
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from plan_jax.logger import report_write_errors
from plan_jax.storage.place import Place

CHECKSUMS = "uploaded.json"  # at the address only
BUFFER = 1 << 20


class DamagedError(Exception):
    """A folder at an address that is not what was uploaded: which file, and what is wrong."""


def _join(name: str, file: str) -> str:
    return f"{name}/{file}" if name else file


def list_files(folder: Path) -> dict[str, Path]:
    """Returns the files below a folder by their relative names; links are left out.

    What another process deletes meanwhile is left out too.
    """
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


@contextlib.contextmanager
def wait_for_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a local copy, for which it waits; without locks it holds none."""
    path = folder.with_name(f"{folder.name}.lock")
    with report_write_errors(path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    with stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def upload_folder(folder: Path, place: Place, name: str, last: str) -> None:
    """Uploads a folder that no process changes meanwhile, in place of one of the same name.

    Args:
      folder: the folder of this machine.
      place: where it goes.
      name: its name there.
      last: the file that makes it complete.

    Raises:
      UserError: a file cannot be read or written.
    """
    files = list_files(folder)
    place.delete([_join(name, last)])
    _upload_files(files, place, name, [file for file in files if file != last])
    _write_checksums(files, place, name)
    place.upload(files[last], _join(name, last))
    expected = {_join(name, file) for file in (*files, CHECKSUMS)}
    place.delete(place.list(name).keys() - expected)


def add_files(folder: Path, place: Place, name: str, new: list[str]) -> None:
    """Uploads files that a folder has got since it was uploaded."""
    files = list_files(folder)
    _upload_files(files, place, name, new)
    _write_checksums(files, place, name)


def upload_files(folder: Path, place: Place) -> None:
    """Uploads all files below a folder, as the results of an evaluation.

    Raises:
      UserError: one cannot be written.
    """
    for name, file in list_files(folder).items():
        place.upload(file, name)


def _upload_files(files: Mapping[str, Path], place: Place, name: str, names: list[str]) -> None:
    for file in names:
        place.upload(files[file], _join(name, file))


def _write_checksums(files: Mapping[str, Path], place: Place, name: str) -> None:
    checksums = {file: [path.stat().st_size, _checksum(path)] for file, path in files.items()}
    place.write(_join(name, CHECKSUMS), json.dumps(checksums).encode())


def download_folder(place: Place, name: str, folder: Path) -> None:
    """Downloads a complete folder, which appears under its name when every byte is there.

    A folder that another program has uploaded has no checksums. Of its files the sizes are compared
    only.

    Raises:
      DamagedError: a file is missing or not what was uploaded.
      UserError: a file cannot be read for another reason, or cannot be written here.
    """
    expected = _list_expected(place, name)
    if not expected:  # it has been deleted meanwhile
        raise DamagedError("all files are missing")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with report_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    # Of processes that were killed: whoever downloads holds the lock of the copy.
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        shutil.rmtree(part, ignore_errors=True)
    try:
        for file, (size, checksum) in expected.items():
            target = temporary / file
            for attempt in (1, 2):  # the second, because a network may be at fault
                try:
                    place.download(_join(name, file), target)
                except FileNotFoundError:
                    raise DamagedError(f"{file} is missing") from None
                fault = _find_fault(target, size, checksum)
                if not fault:
                    break
                if attempt == 2:
                    raise DamagedError(f"{file} {fault}")
        with report_write_errors(folder):
            if _has_same_files(temporary, folder):  # which another process may be reading
                return
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_equal(folder: Path, place: Place, name: str) -> bool:
    """Returns whether a folder of this machine is the one at the address, by its checksums."""
    checksums = _read_checksums(place, name)
    if not checksums or not folder.is_dir():
        return False
    files = list_files(folder)
    return files.keys() == checksums.keys() and all(
        not _find_fault(files[file], size, checksum) for file, (size, checksum) in checksums.items()
    )


def _has_same_files(folder: Path, other: Path) -> bool:
    """Returns whether two folders have the same files, byte by byte."""
    files, others = list_files(folder), list_files(other)
    return files.keys() == others.keys() and all(
        filecmp.cmp(file, others[name], shallow=False) for name, file in files.items()
    )


def _list_expected(place: Place, name: str) -> dict[str, tuple[int, int | None]]:
    """Returns the files of a folder at an address, with their sizes and checksums."""
    checksums = _read_checksums(place, name)
    if checksums is not None:
        return checksums
    prefix = _join(name, "")
    return {file.removeprefix(prefix): (size, None) for file, size in place.list(name).items()}


def _read_checksums(place: Place, name: str) -> dict[str, tuple[int, int | None]] | None:
    """Returns size and CRC-32 of each file of a folder at an address; None if nobody wrote them.

    Raises:
      DamagedError: they are not what was written.
    """
    content = place.read(_join(name, CHECKSUMS))
    if content is None:
        return None
    try:
        values = {
            file: (int(size), int(checksum))
            for file, (size, checksum) in json.loads(content).items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DamagedError(f"{CHECKSUMS} is not what was written") from None
    if not values or not all(map(_is_inside, values)):
        raise DamagedError(f"{CHECKSUMS} is not what was written")
    return values  # type: ignore[return-value]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    if not name or {"\\", "\0"} & set(name):
        return False
    return not path.is_absolute() and ".." not in path.parts


def _find_fault(file: Path, size: int, checksum: int | None) -> str:
    """Returns what is wrong with a downloaded file, or ""."""
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} of {size} bytes"
    return "has another checksum" if checksum not in (None, _checksum(file)) else ""


def _checksum(file: Path) -> int:
    """Returns the CRC-32 of a file."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(BUFFER):
            checksum = zlib.crc32(block, checksum)
    return checksum

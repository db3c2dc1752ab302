"""The objects below one address, by fsspec; what goes wrong with them is one sentence."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from plan_jax.logger import report_write_errors
from plan_jax.types import UserError, check_local, is_address

CACHE = "~/.cache/plan_jax"  # of this machine, unless PLAN_JAX_CACHE names another folder
# A bucket makes no folders, and `makedirs` would create a bucket whose name is mistyped.
BUCKETS = {"gs", "gcs", "s3", "s3a", "az", "abfs", "adl", "oci", "oss", "memory"}
# What the system says of the disk of this machine.
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# What trying again does not mend.
_FINAL_ERRORS = (FileNotFoundError, PermissionError, ImportError)
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt, and twice as many before the third

T = TypeVar("T")


class Place:
    """The objects whose names begin with an address; names are relative, with slashes.

    Attributes:
      address: the address without a slash at its end, as gs://bucket/run.
    """

    def __init__(self, address: str, files: Any, root: str) -> None:
        """Stores a file system of fsspec, and the path of the address in it."""
        self.address = address
        self._files, self._root = files, root.rstrip("/")

    def below(self, name: str) -> "Place":
        """Returns the place of a folder in this one."""
        return Place(f"{self.address}/{name}", self._files, self._path(name))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Returns the objects below a folder by name, with their sizes in bytes."""

        def find() -> dict[str, int]:
            self._files.invalidate_cache()
            entries = self._files.find(self._path(prefix), detail=True)
            sizes = {
                path[len(self._root) :].lstrip("/"): entry["size"]
                for path, entry in entries.items()
                if entry["type"] == "file"
            }
            # Some programs write an empty object for a folder. Nothing leaves the local copy.
            return {
                name: size
                for name, size in sizes.items()
                if name and name[-1] != "/" and ".." not in name.split("/")
            }

        try:
            return self._try(find, prefix, "read")
        except FileNotFoundError:  # the bucket
            return {}

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object, None if there is none."""
        try:
            return self._try(lambda: self._files.cat_file(self._path(name)), name, "read")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, which replaces one of the same name."""
        path = self._path(name)

        def pipe() -> None:
            self._files.pipe_file(path, content)
            self._check_size(path, len(content))

        self._try(lambda: self._with_parent(path, pipe), name, "written")

    def upload(self, file: Path, name: str) -> None:
        """Writes a file of this machine as an object, which replaces one of the same name."""
        path = self._path(name)

        def put() -> None:
            self._files.put_file(str(file), path)
            self._check_size(path, file.stat().st_size)

        self._try(lambda: self._with_parent(path, put), name, "written")

    def download(self, name: str, file: Path) -> None:
        """Writes an object into a file of this machine.

        Raises:
          FileNotFoundError: there is no such object any more.
          UserError: it cannot be read, or `file` cannot be written.
        """
        with report_write_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda: self._files.get_file(self._path(name), str(file)), name, "read", file)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, in this order; one that does not exist is none the less deleted."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._try(partial(self._files.rm_file, self._path(name)), name, "deleted")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _with_parent(self, path: str, write: Callable[[], None]) -> None:
        """Calls a function that writes an object; creates its folder where there are folders."""
        try:
            write()
        except FileNotFoundError:
            if self.address.partition("://")[0] in BUCKETS:
                raise
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            write()

    def _check_size(self, path: str, size: int) -> None:
        """Raises OSError if an object was not written as a whole."""
        self._files.invalidate_cache()
        stored = self._files.info(path)["size"]
        if stored != size:
            raise OSError(f"{stored} of {size} bytes arrived")

    def _try(self, action: Callable[[], T], name: str, verb: str, file: Path | None = None) -> T:
        """Returns what a function returns; tries it again, since a network fails now and then.

        Raises:
          FileNotFoundError: of a read or a deletion.
          UserError: in place of any other error.
        """
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except MemoryError:
                raise
            except Exception as error:  # each file system has kinds of its own
                number = getattr(error, "errno", None)
                if isinstance(error, FileNotFoundError) and verb != "written":
                    raise
                if file is not None and number in _LOCAL_ERRORS:
                    with report_write_errors(file):
                        raise
                if attempt + 1 < ATTEMPTS and not isinstance(error, _FINAL_ERRORS):
                    time.sleep(PAUSE * 2**attempt)
                    continue
                place = "/".join(filter(None, (self.address, name)))
                raise UserError(
                    f"{place} cannot be {verb} ({_first_line(error)}); check its name, the network"
                    " and your permission, and repeat the command"
                ) from error
        raise AssertionError("the last attempt returns or raises")


def find_place(name: str, path: str | os.PathLike[str]) -> Place | None:
    """Returns the place of an address, None for a path of this machine.

    Args:
      name: whose path it is, for a sentence.
      path: a path or an address. `Path("gs://b/run")`, which has lost a slash, is one too.

    Raises:
      UserError: it is an address that cannot be opened.
    """
    text = os.fspath(path)
    if not is_address(text):
        return None
    if "::" in text:
        raise UserError(
            f"{name} {text} is a chain of addresses; pass the one of the folder alone, as"
            " gs://bucket/folder, of which there is a copy on this machine anyway"
        )
    if isinstance(path, Path):
        text = re.sub(r"^([\w+.-]+:/)(?=[^/])", r"\1/", text)
    protocol, separator, rest = text.partition("://")
    if not separator or protocol.lower().startswith("http") or not rest.strip("/"):
        check_local(name, path)
    if re.match("[^/@]*:[^/]*@", rest):  # what names the address is printed, logged and saved
        raise UserError(
            f"{name} is an address of {protocol} with a password in it; leave it out, and set it"
            " in the configuration of fsspec"
        )
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        files, root = fsspec.core.url_to_fs(text, **options)
    except ImportError as error:
        remedy = (
            "pip install 'plan_jax[gcs]'"
            if protocol in ("gs", "gcs")
            else f"install it ({_first_line(error)})"
        )
        package = "gcsfs" if protocol in ("gs", "gcs") else "another package"
        raise UserError(f"{name} {text} needs {package}; {remedy}") from None
    except ValueError:
        raise UserError(
            f"{name} {text} is an address of an unknown kind; pass a path on a local disk, in a"
            " bucket that is mounted (gcsfuse), or an address as gs://bucket/folder"
        ) from None
    except Exception as error:  # such as credentials that cannot be read
        raise UserError(
            f"{name} {text} cannot be opened ({_first_line(error)}); check its name and your"
            " permission"
        ) from error
    _silence(files)
    return Place(text.rstrip("/"), files, root)


def _silence(files: Any) -> None:
    """Hides what the package of a file system logs: tracebacks of what becomes a sentence."""
    logger = logging.getLogger(type(files).__module__.partition(".")[0])
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def cache_root() -> Path:
    """Returns the folder of this machine for all copies."""
    return Path(os.environ.get("PLAN_JAX_CACHE") or CACHE).expanduser()


def cache_folder(kind: str, address: str) -> Path:
    """Returns the folder of this machine for the copy of an address.

    Args:
      kind: what the copy is for, the name of a folder.
      address: of the place.
    """
    label = re.sub(r"[^\w.-]+", "_", address, flags=re.ASCII)[-60:].strip("_.")
    return cache_root() / kind / f"{label}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    line = (str(text).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else f"{line[:117]}..."

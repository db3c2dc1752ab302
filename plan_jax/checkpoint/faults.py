"""Reasons of a failed read: a broken checkpoint, or one that only cannot be read now.

A checkpoint is broken if a checksum fails, a file is missing, or its content cannot be parsed. All
else that stops a read (permission, memory, a disk that does not answer, a missing library) passes,
and the checkpoint with hours of training in it is still good. Error messages of orbax do not tell
the two apart, so after a failure the files are read again here, by simpler means.
"""

import base64
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore

from plan_jax.checkpoint.silence import silence_orbax
from plan_jax.types import UserError

# The files of a step that are small enough to be parsed whenever its run is opened.
SMALL_FILES = ("config/metadata", "data/metadata", "state/_METADATA", "metrics/metrics")
# No error of the system, and those that mean that a file is missing: only then do the files tell.
MISSING_FILE_ERRORS = (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class BrokenError(Exception):
    """The proof that a checkpoint is not what was saved: which file or array, and what is wrong."""


class Failure(NamedTuple):
    """Why a step could not be read.

    Attributes:
      reason: a phrase for the user.
      is_proof: the step is broken. Otherwise nothing is known about it: it may be whole, and only
        the memory was too small.
    """

    reason: str
    is_proof: bool = False

    def to_error(self, step_folder: Path) -> UserError:
        """Returns the sentence for a run that cannot go on."""
        return UserError(
            f"checkpoint {step_folder} cannot be read ({self.reason}), which does not prove it"
            " broken; remove the cause and repeat the command, or move that folder away"
        )


def try_reading(read: Callable[[Path], Any], step_folder: Path) -> tuple[Any, Failure | None]:
    """Returns `read(step_folder)` and None, or None and why it failed.

    Raises:
      UserError: `read` raised one. The user's mistake does not make the checkpoint a broken one.
    """
    silence_orbax()
    try:
        return read(step_folder), None
    except UserError:
        raise
    except BrokenError as error:
        return None, Failure(str(error), is_proof=True)
    except Exception as error:  # orbax, tensorstore and JAX raise many kinds
        reason = first_line(error)
        if isinstance(error, MemoryError) or system_error(error) not in MISSING_FILE_ERRORS:
            return None, Failure(reason)
    try:
        fault = (
            find_fault(step_folder)
            or _find_fault_in_names(step_folder)
            or _find_fault_in_shardings(step_folder)
            or _find_fault_in_arrays(step_folder / "state")
        )
    except BrokenError as error:
        return None, Failure(str(error), is_proof=True)
    except (OSError, MemoryError) as error:
        return None, Failure(first_line(error))
    return None, Failure(fault or reason, is_proof=bool(fault))


def find_fault(step_folder: Path) -> str:
    """Returns what is wrong with the small files of a step, or "" if they can be parsed.

    Raises:
      OSError: a file is there and cannot be read.
    """
    for name in SMALL_FILES:
        path = step_folder / name
        if name == "metrics/metrics" and not path.parent.exists():
            continue  # saved without metrics, as most steps are
        try:
            read_json(path)
        except BrokenError as error:
            return str(error)
    return ""


def read_json(path: Path) -> Any:
    """Returns the content of a small file of a step.

    Raises:
      BrokenError: the file is missing, or is not JSON.
      OSError: it is there and cannot be read.
    """
    name = "/".join(path.parts[-2:])
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BrokenError(f"{name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"{name} is not JSON: {first_line(error)}") from None


def _find_fault_in_names(step_folder: Path) -> str:
    """Returns what is wrong with orbax's description of a step's tree, or "".

    It has no checksum, but the names in it are those of the checksums of the arrays.
    """
    checksums = read_json(step_folder / "config/metadata").get("checksums", {})
    name = "state/_METADATA"
    try:
        names = set()
        for path, entry in read_json(step_folder / name)["tree_metadata"].items():
            keys = [(key["key"], key["key_type"]) for key in entry["key_metadata"]]
            is_valid = all(kind == 2 or (kind == 1 and key.isdigit()) for key, kind in keys)
            if not is_valid or path != str(tuple(key for key, _ in keys)):
                return f"{name} is not what was saved"
            names.add(".".join(key for key, _ in keys))
    except (KeyError, TypeError, AttributeError):
        return f"{name} is not what was saved"
    return "" if checksums.keys() <= names else f"{name} is not what was saved"


def _find_fault_in_shardings(step_folder: Path) -> str:
    """Returns what is wrong with orbax's description of where arrays were, or "".

    It has no checksum, but all arrays of a run are on one mesh, and have the names of checksums.
    """
    checksums = read_json(step_folder / "config/metadata").get("checksums", {})
    name, meshes = "state/_sharding", set()
    if not (step_folder / name).exists():
        return ""
    try:
        for key, text in read_json(step_folder / name).items():
            sharding = json.loads(text)
            del sharding["partition_spec"]
            meshes.add(json.dumps(sharding, sort_keys=True))
            if base64.b64decode(key, validate=True).decode() not in checksums:
                return f"{name} is not what was saved"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{name} is not what was saved"
    return "" if len(meshes) <= 1 else f"{name} is not what was saved"


def _find_fault_in_arrays(folder: Path) -> str:
    """Returns what is wrong with the arrays in `folder`, the item `state` of a step, or "".

    Every byte is read first and then parsed in memory, where only the content can be at fault.

    Raises:
      OSError: a file is there and cannot be read.
    """
    context, source = tensorstore.Context(), {"driver": "ocdbt", "base": "memory://"}
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    try:
        for path in (folder / "manifest.ocdbt", *_list_files(folder)):
            if path.name == "_sharding" or path.parent.name == "array_metadatas":
                read_json(path)
            memory.write(str(path.relative_to(folder)), path.read_bytes()).result()
    except BrokenError as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{path.name} is missing"
    try:
        store = tensorstore.KvStore.open(source, context=context).result()
        for key in store.list().result():
            name, is_array, _ = key.decode().partition("/.zarray")
            if is_array:
                spec = {"driver": "zarr", "kvstore": {**source, "path": f"{name}/"}}
                tensorstore.open(spec, context=context).result().read().result()
    except MemoryError:
        raise
    except Exception as error:  # tensorstore raises several kinds
        return first_line(error)
    return ""


def _list_files(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder; unlike `rglob`, it does not skip what cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names)


def first_line(error: Any) -> str:
    """Returns the first line of an error, cut to 80 characters, to be part of a sentence.

    >>> first_line("DATA_LOSS: no array" + chr(10) + "lines that only its authors read")
    'DATA_LOSS: no array'
    """
    number = system_error(error)
    text = os.strerror(number) if number else str(error).strip()
    line = (text.splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 80 else f"{line[:77]}..."


def system_error(error: Any) -> int:
    """Returns the number of the system's error that an error reports, or 0.

    >>> system_error("Failed to open: Too many open files [os_error_code='24']")
    24
    """
    annotation = re.search(r"\[os_error_code='(\d+)'\]", str(error))  # by tensorstore
    return getattr(error, "errno", None) or int(annotation[1] if annotation else 0)

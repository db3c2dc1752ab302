"""The files that prepared records are made from, and whether they have changed since.

Identity is content: a file is hashed when its record is prepared. Later its size and times tell
whether it can have changed, and only then is it hashed again. So images that are mended in place
are noticed, and images that are copied to another folder or machine are the same images.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from plan_jax.data import faults
from plan_jax.logger import write_atomically
from plan_jax.types import UserError

# Files next to the records: the list of sources, and lines about the data for every run.
SOURCES_FILE = "sources.json"
MESSAGES_FILE = "messages.txt"
CACHE_PREFIX = "sources-"
ABSENT = (-1, 0, 0)  # the state of a file that does not exist
LARGEST_TIME = 2**63 - 1  # of the arrays that times are compared in
MAX_CACHES = 16  # in a folder: each copy of the images has one, and copies come and go
NUM_THREADS = 16  # a network drive answers many questions at once
CHUNK_SIZE = 512  # files asked for at a time
# Drives store times in steps of up to 2 s, so a file that young can change once more unnoticed.
YOUNG_NS = 2_000_000_000


class DigestCache:
    """Digests of the files below a folder, as of the states in which they were hashed last.

    It serves all records that are made from the folder. Records themselves remember the states
    that their files had. The cache has those of files that were changed or copied since then.
    """

    def __init__(self, root: Path, folders: Sequence[Path] = ()):
        """Initialises the cache; it is read when it is needed.

        Args:
          root: the folder of the files.
          folders: where the cache may be stored. It goes into the first that can be written.
        """
        self.root = root
        try:
            number = os.stat(root).st_ino  # copies on several machines may have one path
        except OSError:
            number = 0
        place = hashlib.sha256(f"{root}\n{number}".encode(errors="surrogateescape")).hexdigest()
        self._paths = [folder / f"{CACHE_PREFIX}{place[:12]}.json" for folder in folders]
        self._is_changed = False

    def find(self, path: str, state: Sequence[int]) -> str | None:
        """Returns the digest of a file in this state, or None if it is not in the cache."""
        old_state, digest = self._entries.get(path, (ABSENT, ""))
        return digest if old_state == (*state,) else None

    def add(self, path: str, state: Sequence[int], digest: str) -> None:
        """Adds the digest of a file that was hashed in this state."""
        new_state = _forget_young_times(state)
        if new_state == (*state,):
            self._entries[path] = (new_state, digest)
            self._is_changed = True

    def save(self) -> bool:
        """Writes what was added; returns whether that is on disk now."""
        for path in self._paths if self._is_changed else ():
            with contextlib.suppress(OSError, UserError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(self._entries))
                self._is_changed = False
                _delete_oldest(path.parent)
                break
        return not self._is_changed

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[tuple[int, ...], str]]:
        contents: list[tuple[float, dict[str, tuple[tuple[int, ...], str]]]] = []
        for path in self._paths:
            # Without a cache, or with a damaged one, files are hashed.
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                items = json.loads(path.read_text()).items()
                entries = {name: ((*state,), str(digest)) for name, (state, digest) in items}
                contents.append((path.stat().st_mtime, entries))
        newest_last = sorted(contents, key=lambda content: content[0])
        return {name: entry for _, entries in newest_last for name, entry in entries.items()}


class SourceFiles:
    """Files below a folder, with the state and the digest that each had when it was read.

    The state of a file is its size, and the times of its last change in content and in attributes.
    Paths are relative to the folder, which is not stored. A file that does not exist has an empty
    digest. A path that ends in a separator is a folder, of which the names count: its state is
    their number and a hash of them.
    """

    def __init__(
        self,
        paths: Iterable[str] = (),
        states: Iterable[Sequence[int]] = (),
        digests: Iterable[str] = (),
    ):
        """Initialises the list, in the order of the paths."""
        self._lock = threading.Lock()
        self._files = {
            path: ((*map(int, state),), digest)
            for path, state, digest in zip(paths, states, digests, strict=True)
        }

    def __len__(self) -> int:
        return len(self._files)

    def add(self, root: Path, path: Path) -> None:
        """Adds a file as it is now; threads may add at the same time.

        Raises:
          UserError: the file may exist, and cannot be read.
        """
        name, folder = os.path.relpath(path, root), os.path.join(root, "")
        # The state comes first: a change after it makes the file look changed, never unchanged.
        state = _forget_young_times(_read_state(folder, name))
        digest = _hash_file(folder, name)
        with self._lock:
            self._files[name] = (state, digest)

    def add_folder(self, root: Path, path: Path) -> None:
        """Adds the names in a folder as they are now; the content of its files does not count.

        Raises:
          UserError: the folder may exist, and cannot be read.
        """
        # The separator at the end tells a folder whose names matter from a file.
        name, folder = os.path.join(os.path.relpath(path, root), ""), os.path.join(root, "")
        with self._lock:
            self._files[name] = (_read_state(folder, name), _hash_file(folder, name))

    @property
    def states(self) -> list[tuple[int, ...]]:
        """Returns the states of the files, in the order of the list."""
        return [state for state, _ in self._files.values()]

    @property
    def digest(self) -> str:
        """Returns the digest of all contents; the folder and the times do not matter."""
        contents = [self._files[path][1] for path in sorted(self._files)]
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    def find_changes(
        self, cache: DigestCache, announce: Callable[[int], None] | None = None
    ) -> list[str]:
        """Returns the paths of files that have another content in the folder of a cache.

        If the size of a file differs, the result has only files of another size, and nothing is
        hashed.

        Args:
          cache: digests of the files in the folder; receives those of files that are hashed.
          announce: called with the number of files to hash, before they are.

        Raises:
          UserError: a file may exist, and cannot be read.
        """
        paths, folder = list(self._files), os.path.join(cache.root, "")
        old_states = np.asarray(self.states, np.int64).reshape(-1, 3)
        new_states = _read_states(folder, paths)
        resized = np.flatnonzero(old_states[:, 0] != new_states[:, 0])
        if len(resized):
            return sorted(paths[index] for index in resized)
        suspects = np.flatnonzero((old_states != new_states).any(axis=1)).tolist()
        digests = {
            index: cache.find(paths[index], new_states[index].tolist()) for index in suspects
        }
        unread = [index for index, digest in digests.items() if digest is None]
        if announce is not None and unread:
            announce(len(unread))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for index, digest in zip(
                unread,
                pool.map(lambda index: _hash_file(folder, paths[index]), unread),
                strict=True,
            ):
                digests[index] = digest
                cache.add(paths[index], new_states[index].tolist(), digest)
        return sorted(
            paths[index]
            for index, digest in digests.items()
            if digest != self._files[paths[index]][1]
        )

    def compare(self, reference: "SourceFiles") -> list[str]:
        """Returns the paths of files whose content differs from that in `reference`."""
        paths = {*self._files, *reference._files}
        absent = (ABSENT, "")
        return sorted(
            path
            for path in paths
            if self._files.get(path, absent)[1] != reference._files.get(path, absent)[1]
        )

    def find_copies(self, paths: Iterable[str]) -> list[list[str]]:
        """Returns the groups of paths that have the same content."""
        groups: dict[str, list[str]] = {}
        for path in sorted(paths):
            _, digest = self._files.get(path, (ABSENT, ""))
            if digest:
                groups.setdefault(digest, []).append(path)
        return [group for group in groups.values() if len(group) > 1]

    def save(self, folder: Path) -> None:
        """Writes the list into a folder, at once or not at all.

        Raises:
          UserError: the folder cannot be written.
        """
        content = {
            "paths": list(self._files),
            "sizes_and_times": self.states,
            "digests": [digest for _, digest in self._files.values()],
        }
        write_atomically(folder / SOURCES_FILE, json.dumps(content))

    @classmethod
    def load(cls, folder: Path) -> "SourceFiles":
        """Loads the list of a folder.

        Raises:
          OSError, ValueError: it cannot be read.
        """
        content = json.loads((folder / SOURCES_FILE).read_text())
        try:
            states = [(size, *times) for size, *times in content["sizes_and_times"]]
            if any(len(state) != len(ABSENT) for state in states):
                raise TypeError("a state has not three numbers")
            return cls(content["paths"], states, content["digests"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{SOURCES_FILE} is malformed: {error}") from None


def _delete_oldest(folder: Path) -> None:
    """Deletes caches of digests but the newest, as other processes may do at the same time."""
    with contextlib.suppress(OSError):
        caches = sorted(folder.glob(f"{CACHE_PREFIX}*.json"), key=os.path.getmtime)
        for path in caches[:-MAX_CACHES]:
            path.unlink(missing_ok=True)


def _read_state(folder: str, path: str) -> tuple[int, int, int]:
    """Returns size and times of a regular file; ABSENT if there is none.

    Args:
      folder: the folder, with a separator at its end.
      path: relative to the folder; with a separator at its end if it is a folder itself.

    Raises:
      UserError: the system does not say whether the file exists.
    """
    if path.endswith(os.sep):
        names = _list_names(folder, path)
        # A negative time is none that a file was changed at.
        digest = int.from_bytes(
            hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).digest()[:7]
        )
        return (len(names), -digest, 0) if names else ABSENT
    # Strings: to join paths as objects costs more than to ask for the files.
    try:
        status = os.stat(folder + path)
    except OSError as error:
        # A missing permission or drive must not look as if the file were deleted.
        if faults.is_passing(error):
            raise faults.name_unreadable(error, folder, path) from None
        return ABSENT
    except ValueError:  # a null byte in the path
        return ABSENT
    if not stat.S_ISREG(status.st_mode):
        return ABSENT
    # A drive may return a time that no array can hold.
    mtime, ctime = (
        max(min(time_ns, LARGEST_TIME), -LARGEST_TIME)
        for time_ns in (status.st_mtime_ns, status.st_ctime_ns)
    )
    return status.st_size, mtime, ctime


def _list_names(folder: str, path: str) -> list[str]:
    """Returns the names in a folder, sorted, without hidden ones; none if there is no folder.

    Raises:
      UserError: the folder may exist, and cannot be read.
    """
    try:
        return sorted(name for name in os.listdir(folder + path) if not name.startswith("."))
    except OSError as error:
        if faults.is_passing(error):
            raise faults.name_unreadable(error, folder, path) from None
        return []


def _read_states(folder: str, paths: Sequence[str]) -> Int64[np.ndarray, "N 3"]:
    """Returns size and times of files below a folder; ABSENT for those that do not exist."""
    chunks = [paths[start : start + CHUNK_SIZE] for start in range(0, len(paths), CHUNK_SIZE)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        states = pool.map(lambda chunk: [_read_state(folder, path) for path in chunk], chunks)
        return np.asarray([state for part in states for state in part], np.int64).reshape(-1, 3)


def _forget_young_times(state: Sequence[int]) -> tuple[int, int, int]:
    """Returns a state; without times if it is so young that it would survive another change.

    A time of change in content that lies ahead was set by a program, which sets the other time too.
    """
    size, mtime, ctime = state
    now = time.time_ns()
    is_young = ctime > now - YOUNG_NS or now - YOUNG_NS < mtime <= now + YOUNG_NS
    return (size, 0, 0) if is_young else (size, mtime, ctime)


def _hash_file(folder: str, path: str) -> str:
    """Returns the digest of a file's content, or "" if there is no such file.

    Raises:
      UserError: the file may exist, and cannot be read.
    """
    if path.endswith(os.sep):
        names = _list_names(folder, path)
        return (
            hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:32]
            if names
            else ""
        )
    if _read_state(folder, path) == ABSENT:  # to open a pipe would wait for ever
        return ""
    try:
        with open(folder + path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        if faults.is_passing(error):
            raise faults.name_unreadable(error, folder, path) from None
        return ""

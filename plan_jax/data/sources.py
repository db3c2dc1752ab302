"""The files that prepared records are made from, and whether they have changed since.

Identity is content: a file is hashed when its record is prepared. Later its size and times tell
whether it can have changed, and only then is it hashed again. So images that are mended in place
are noticed, and images that are copied to another folder or machine are the same images.
"""

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

# Files next to the records: the list of sources, and lines about the data for every run.
SOURCES_FILE = "sources.json"
MESSAGES_FILE = "messages.txt"
ABSENT = (-1, 0, 0)  # the state of a file that does not exist or cannot be read
NUM_THREADS = 16  # a network drive answers many questions at once
CHUNK_SIZE = 512  # files asked for at a time
# Drives store times in steps of up to 2 s, so a file that young can change once more unnoticed.
YOUNG_NS = 2_000_000_000


class SourceFiles:
    """Files below a folder, with the state and the digest that each had when it was read.

    The state of a file is its size, and the times of its last change in content and in attributes.
    Paths are relative to the folder, which is not stored. A file that cannot be read has an empty
    digest.
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
        """Adds a file as it is now; threads may add at the same time."""
        # The state comes first: a change after it makes the file look changed, never unchanged.
        state = _settle(_read_state(path))
        digest = _hash_file(path)
        with self._lock:
            self._files[os.path.relpath(path, root)] = (state, digest)

    @property
    def states(self) -> list[tuple[int, ...]]:
        """Returns the states of the files, in the order of the list."""
        return [state for state, _ in self._files.values()]

    @property
    def digest(self) -> str:
        """Returns the digest of all contents; the folder and the times do not matter."""
        contents = [self._files[path][1] for path in sorted(self._files)]
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    def find_changes(self, root: Path, announce: Callable[[int], None] | None = None) -> list[str]:
        """Returns the paths of files that have another content below `root`.

        The list adopts the states of files that have the same content. If the size of a file
        differs, the result has only files of another size, and nothing is hashed.

        Args:
          root: the folder.
          announce: called with the number of files to hash, before they are.
        """
        paths = list(self._files)
        before = np.asarray([self._files[path][0] for path in paths], np.int64).reshape(-1, 3)
        now = _read_states(root, paths)
        resized = np.flatnonzero(before[:, 0] != now[:, 0])
        if len(resized):
            return sorted(paths[index] for index in resized)
        suspects = np.flatnonzero((before != now).any(axis=1)).tolist()
        if announce is not None and suspects:
            announce(len(suspects))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            digests = list(pool.map(_hash_file, (root / paths[index] for index in suspects)))
        changes = []
        for index, digest in zip(suspects, digests, strict=True):
            if digest != self._files[paths[index]][1]:
                changes.append(paths[index])
            else:
                self._files[paths[index]] = (_settle(now[index].tolist()), digest)
        return sorted(changes)

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
          OSError: the folder cannot be written.
        """
        content = {
            "paths": list(self._files),
            "sizes_and_times": self.states,
            "digests": [digest for _, digest in self._files.values()],
        }
        temporary = folder / f"{SOURCES_FILE}.{os.getpid()}.{threading.get_ident()}"
        try:
            temporary.write_text(json.dumps(content))
            temporary.replace(folder / SOURCES_FILE)
        finally:
            temporary.unlink(missing_ok=True)

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


def _read_state(path: str | Path) -> tuple[int, int, int]:
    """Returns size and times of a regular file, or ABSENT."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return ABSENT
    if not stat.S_ISREG(status.st_mode):
        return ABSENT
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_states(root: Path, paths: Sequence[str]) -> Int64[np.ndarray, "N 3"]:
    """Returns size and times of files below a folder; ABSENT for those that do not exist."""
    # Strings: to join paths as objects costs more than to ask for the files.
    prefix = os.path.join(root, "")
    chunks = [paths[start : start + CHUNK_SIZE] for start in range(0, len(paths), CHUNK_SIZE)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        states = pool.map(lambda chunk: [_read_state(prefix + path) for path in chunk], chunks)
        return np.asarray([state for part in states for state in part], np.int64).reshape(-1, 3)


def _settle(state: Sequence[int]) -> tuple[int, int, int]:
    """Returns a state; without times if it is so young that it would survive another change."""
    size, *times = state
    is_young = max(times) > time.time_ns() - YOUNG_NS
    return (size, 0, 0) if is_young else (size, times[0], times[1])


def _hash_file(path: Path) -> str:
    """Returns the digest of a file's content, or "" if it cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except (OSError, ValueError):
        return ""

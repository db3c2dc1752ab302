"""The lock of a run's folder: of two runs in one folder, the second ends with a sentence.

The lock is that of the operating system on the file `.lock`, which is released however a process
ends. The file says who holds it and since when. On a file system without locks the file alone has
to do: a process of the same host is looked up, and one of another host renews the file as long as
it runs.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plan_jax import parallel
from plan_jax.checkpoint.folders import check_name
from plan_jax.logger import report_write_errors
from plan_jax.types import UserError

FILE = ".lock"
RENEWAL = 20.0  # seconds between two renewals
STALE = 120.0  # seconds without a renewal after which the process of another host has ended
# What file systems answer that have no locks: some network mounts, FUSE, overlays.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; of several hosts of one run only the main process does.

    Raises:
      UserError: another run holds it, in every process; or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            descriptor, has_locks = _open_locked(workdir)
            stack.callback(os.close, descriptor)
            if not has_locks:
                stack.enter_context(_renew(workdir / FILE))

        parallel.ask_main(lock)
        yield


def _open_locked(workdir: Path) -> tuple[int, bool]:
    """Returns the descriptor of the lock file, with which the lock ends, and whether it locks."""
    check_name(workdir)
    path = workdir / FILE
    with report_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with report_write_errors(path):
            return descriptor, _lock(workdir, descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _lock(workdir: Path, descriptor: int) -> bool:
    """Writes this process into the file, and returns whether the file system has locked it.

    Raises:
      UserError: another process holds the lock.
    """
    path = workdir / FILE
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": int(time.time())}
    has_locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # The first run may have locked the file a moment ago and not have written it yet.
        for _ in range(20):
            if is_alive(_read_owner(path)):
                break
            time.sleep(0.05)
        raise _refusal(workdir) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
        if _is_held(path):
            raise _refusal(workdir) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    if not has_locks:
        time.sleep(0.3)  # of runs that start at the same time, the last one to write goes on
        if _read_owner(path) != owner:
            raise _refusal(workdir)
        parallel.print_once(
            f"workdir {workdir} is on a file system without locks; start no second run in it"
        )
    return has_locks


@contextlib.contextmanager
def _renew(path: Path) -> Iterator[None]:
    """Sets the time of a file every few seconds, by a thread, and removes the file at the end.

    It leaves the file of another process alone, which has found this one stale, as after a pause.
    """
    owner, has_ended = _read_owner(path), threading.Event()

    def renew() -> None:
        while not has_ended.wait(RENEWAL):
            with contextlib.suppress(OSError):  # as while a server does not answer
                if _read_owner(path) == owner:
                    os.utime(path)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _read_owner(path) == owner:
                path.unlink()


def _read_owner(path: Path) -> dict[str, Any]:
    """Returns `pid` and `host` of the process that locked the file last, or {}."""
    with contextlib.suppress(OSError):
        return parse_owner(path.read_bytes())
    return {}


def parse_owner(content: bytes) -> dict[str, Any]:
    """Returns what a lock says of its process, or {} if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        owner = json.loads(content)
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int) and owner["pid"] > 0:
            return owner
    return {}


def describe_owner(owner: Mapping[str, Any]) -> str:
    """Returns how a sentence names the process of a lock."""
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"


def _is_held(path: Path) -> bool:
    """Returns whether another process, which a lock file names, still runs."""
    owner = _read_owner(path)
    if not owner or (owner["pid"], owner.get("host")) == (os.getpid(), socket.gethostname()):
        return False
    if owner.get("host") == socket.gethostname():
        return is_alive(owner)
    return _find_age(path) < STALE


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Returns whether the process exists; False if it is on another host, where nobody can tell."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _find_age(path: Path) -> float:
    """Returns the seconds since a file was renewed, by its file system's clock; inf without it."""
    probe = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _refusal(workdir: Path) -> UserError:
    owner = _read_owner(workdir / FILE)
    process = describe_owner(owner)
    if isinstance(owner.get("time"), int | float):
        process += time.strftime(" since %Y-%m-%d %H:%M", time.localtime(owner["time"]))
    return refuse_second(workdir, process)


def refuse_second(workdir: Path | str, process: str) -> UserError:
    """Returns the error of a second run, by the place of the first one and its process."""
    return UserError(
        f"workdir {workdir} is in use by {process}; pass another --workdir, or wait for its end"
    )

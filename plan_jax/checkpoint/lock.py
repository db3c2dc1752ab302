"""The lock of a run's folder: of two runs in one folder, the second ends with a sentence.

The lock is that of the operating system on the file `.lock`, which is released however a process
ends. The file says who holds it. On a file system without locks the file alone has to do: it keeps
out a second run on the same host.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plan_jax import parallel
from plan_jax.checkpoint.folders import check_name
from plan_jax.logger import report_write_errors
from plan_jax.types import UserError

FILE = ".lock"
# What file systems answer that have no locks: some network mounts, FUSE, overlays.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; of several hosts of one run only the main process does.

    Raises:
      UserError: another run holds it, in every process; or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if parallel.is_main():
            try:
                stack.callback(os.close, _open_locked(workdir))
            except UserError as error:
                refusal = str(error)
        # The other hosts would wait forever for a main process that has left.
        if refusal := parallel.gather_strings(refusal)[0]:
            raise UserError(refusal)
        yield


def _open_locked(workdir: Path) -> int:
    """Returns the descriptor of the lock file; the lock ends with it, or with the process."""
    check_name(workdir)
    path = workdir / FILE
    with report_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with report_write_errors(path):
            _lock(workdir, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(workdir: Path, descriptor: int) -> None:
    """Locks the file and writes this process into it; raises UserError if it is locked."""
    path, owner = workdir / FILE, {"pid": os.getpid(), "host": socket.gethostname()}
    has_locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # The first run may have locked the file a moment ago and not have written it yet.
        for _ in range(20):
            if _is_alive(_read_owner(path)):
                break
            time.sleep(0.05)
        raise _refusal(workdir) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
        if _read_owner(path) != owner and _is_alive(_read_owner(path)):
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


def _read_owner(path: Path) -> dict[str, Any]:
    """Returns `pid` and `host` of the process that locked the file last, or {}."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int) and owner["pid"] > 0:
            return owner
    return {}


def _is_alive(owner: Mapping[str, Any]) -> bool:
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


def _refusal(workdir: Path) -> UserError:
    owner = _read_owner(workdir / FILE)
    process = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
    return UserError(
        f"workdir {workdir} is in use by {process}; pass another --workdir, or wait for its end"
    )

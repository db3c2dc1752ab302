"""Errors of records and disks, as one sentence."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from plan_jax.data import quoting
from plan_jax.types import UserError

# What the system says of a disk that takes no more.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM),
)
# What it says of records that may be whole.
_PASSING_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
# What it says of a file that does not exist, or whose name no file can have.
ABSENCE_ERRORS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EINVAL, errno.EILSEQ, errno.ENXIO),
)


def is_passing(error: OSError) -> bool:
    """Returns whether a file may be readable later, as when a permission or a drive is missing."""
    return error.errno is not None and error.errno not in ABSENCE_ERRORS


def name_unreadable(error: OSError, folder: str | Path, path: str) -> UserError:
    """Returns the sentence for a file below a folder that may be readable later."""
    return UserError(
        f"{quoting.quote_path(path)} in {os.path.normpath(folder)} cannot be read "
        f"({error.strerror}); correct that, and repeat the command"
    )


@contextlib.contextmanager
def name_damage(folder: Path | None) -> Iterator[None]:
    """Turns what goes wrong when the records in a folder are read into one sentence.

    Raises:
      UserError: the records cannot be read.
    """
    try:
        yield
    except Exception as error:  # readers and parsers raise many kinds
        if isinstance(error, UserError | MemoryError):
            raise
        place = f" in {folder}" if folder else ""
        if reason := find_system_error(error, _PASSING_ERRORS):
            fault = f"cannot be read ({reason}); correct that, and repeat the command"
        else:
            fault = "are damaged; delete the folder, and the next run prepares it again"
        raise UserError(f"the prepared records{place} {fault}") from None


def find_system_error(error: BaseException | None, numbers: Sequence[int]) -> str:
    """Returns what the system says, if that is behind an error, or ""."""
    while error is not None:
        for number in numbers:
            # Libraries in C++ pass on the words only.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""

"""The folders of a run's checkpoints: which steps exist, and which are renamed or deleted."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from plan_jax import parallel
from plan_jax.logger import report_write_errors
from plan_jax.types import UserError

FOLDER = "checkpoints"
DELETED = ".deleted"  # where steps lie while they are deleted


def locate(folder: str | Path) -> tuple[Path, int | None]:
    """Returns the folder of checkpoints, and the step if `folder` names one (else None).

    `folder` is the folder of a run, its `checkpoints`, or one step in there.

    Raises:
      UserError: there is no checkpoint, or not the step that is named; or the system does not let
        us look.
    """
    path = Path(folder).absolute()
    check_name(path)
    with _report_read_errors(folder):
        parent, step = path, None
        # A run, else one step (which may not exist), else the folder of checkpoints itself.
        if (path / FOLDER).is_dir():
            parent = path / FOLDER
        elif _is_step(path.name) and (path.parent.name == FOLDER or (path / "state").is_dir()):
            parent, step = path.parent, int(path.name)
        available = list_steps(parent) if parent.is_dir() else []
        exists = path.is_dir()
    if not available:
        problem = "holds no checkpoint" if exists else "does not exist"
        raise UserError(f"checkpoint {folder} {problem}; pass the folder of a run that was trained")
    if step is not None and step not in available:
        steps = ", ".join(map(str, available))
        raise UserError(f"checkpoint {parent} has no step {step}; use one of {steps}")
    return parent, step


def list_steps(folder: Path) -> list[int]:
    """Returns the steps in a folder of checkpoints, complete or broken, in ascending order.

    Raises:
      UserError: the system does not let us look.
    """
    with _report_read_errors(folder):
        return sorted(
            int(path.name) for path in folder.iterdir() if _is_step(path.name) and path.is_dir()
        )


def _is_step(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


@contextlib.contextmanager
def _report_read_errors(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({error.strerror or error}); remove the cause and"
            " repeat the command"
        ) from error


def check_name(folder: Path) -> None:
    """Raises UserError if Python and the libraries below would not find the same folder.

    Python translates names to bytes by the locale, and the C++ of tensorstore to UTF-8. Orbax reads
    some characters of a path as a pattern, and then saves a state without its arrays.
    """
    path = folder.absolute()
    name = os.fsencode(path)
    if name != str(path).encode("utf-8", "replace"):
        raise UserError(
            f"folder {name.decode('utf-8', 'replace')} has a name that this locale cannot read;"
            " set PYTHONUTF8=1, or rename the folder"
        )
    if pattern := re.search(r"[][*?\\]", str(path)):
        raise UserError(
            f"folder {path} has {pattern[0]} in its name, where no checkpoint can be saved; use"
            " another folder"
        )


def set_aside(folder: Path, step: int, reason: str, substitute: int | None) -> None:
    """Renames a broken step to `broken-<step>` and prints one line about it.

    The number is then free for the step to be saved again. `substitute` is the step that is used
    instead, if there is one.

    Raises:
      UserError: the step cannot be renamed.
    """
    name, count = f"broken-{step}", 1
    while (folder / name).exists():
        name, count = f"broken-{step}-{count}", count + 1
    with report_write_errors(folder / name):
        (folder / str(step)).rename(folder / name)
    remedy = "there is no other one" if substitute is None else f"using step {substitute}"
    parallel.print_once(f"checkpoint {step} is broken ({reason}), renamed to {name}; {remedy}")


def empty_deleted(folder: Path) -> None:
    """Deletes the steps that a run does not keep, and what a killed one has left of them.

    Raises:
      UserError: they cannot be deleted.
    """
    with report_write_errors(folder / DELETED), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / DELETED)

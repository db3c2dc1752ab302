"""The folders of a run's checkpoints: which steps exist, which are complete, renaming of others."""

import contextlib
import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from plan_jax import parallel
from plan_jax.types import UserError

FOLDER = "checkpoints"
# The files of a step that are small enough to be parsed whenever its run is opened.
SMALL_FILES = ("config/metadata", "data/metadata", "state/_METADATA", "metrics/metrics")


def locate(folder: str | Path) -> tuple[Path, int | None]:
    """Returns the folder of checkpoints, and the step if `folder` names one (else None).

    `folder` is the folder of a run, its `checkpoints`, or one step in there.

    Raises:
      UserError: there is no checkpoint, or not the step that is named.
    """
    path = Path(folder).absolute()
    parent, step = path, None
    # A run, else one step (which may not exist), else the folder of checkpoints itself.
    if (path / FOLDER).is_dir():
        parent = path / FOLDER
    elif path.name.isdigit() and (path.parent.name == FOLDER or (path / "state").is_dir()):
        parent, step = path.parent, int(path.name)
    available = list_steps(parent) if parent.is_dir() else []
    if not available:
        problem = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {folder} {problem}; pass the folder of a run that was trained")
    if step is not None and step not in available:
        steps = ", ".join(map(str, available))
        raise UserError(f"checkpoint {parent} has no step {step}; use one of {steps}")
    return parent, step


def list_steps(folder: Path) -> list[int]:
    """Returns the steps in a folder of checkpoints, complete or broken, in ascending order."""
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir()
    )


def find_fault(step_folder: Path) -> str:
    """Returns what is wrong with the small files of a step, or "" if they can be parsed."""
    for name in SMALL_FILES:
        path = step_folder / name
        if name == "metrics/metrics" and not path.parent.exists():
            continue  # saved without metrics, as most steps are
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return first_line(f"{name}: {getattr(error, 'strerror', None) or error}")
    return ""


def set_aside(folder: Path, step: int, reason: str) -> None:
    """Renames a broken step to `broken-<step>` and prints one line about it.

    The number is then free for the step to be saved again.
    """
    if parallel.is_main():
        name, count = f"broken-{step}", 1
        while (folder / name).exists():
            name, count = f"broken-{step}-{count}", count + 1
        (folder / str(step)).rename(folder / name)
        older = list_steps(folder)
        remedy = f"using step {older[-1]}" if older else "there is no older one"
        parallel.print_once(f"checkpoint {step} is broken ({reason}), renamed to {name}; {remedy}")
    # No process may look for the newest step while the main one still renames it.
    parallel.barrier(f"set aside {step}")


def try_reading(read: Callable[[Path], Any], step_folder: Path) -> tuple[Any, str]:
    """Returns `read(step_folder)` and "", or None and the reason why it failed.

    Raises:
      UserError: `read` raised one. The user's mistake does not make the checkpoint a broken one.
    """
    with silence_orbax():
        try:
            return read(step_folder), ""
        except UserError:
            raise
        except Exception as error:  # orbax, tensorstore and json raise many kinds for broken files
            reason = first_line(error)
    _ignore_abandoned_reads()
    return None, reason


def read_json(folder: Path) -> dict:
    """Returns the JSON item that orbax wrote into `folder`."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder)


def rankable(value: float | None) -> float:
    """Returns a metric as a number to rank by: -inf, the worst, if missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def first_line(error: Any) -> str:
    """Returns the first line of an error, cut to 80 characters, to be part of a sentence.

    >>> first_line("DATA_LOSS: no array" + chr(10) + "lines that only its authors read")
    'DATA_LOSS: no array'
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 80 else f"{line[:77]}..."


@contextlib.contextmanager
def silence_orbax() -> Iterator[None]:
    """Hides what orbax logs: lines about each save, and tracebacks that we report as a sentence."""
    # Orbax logs through absl, and its abandoned reads through asyncio.
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache  # the hook is installed once
def _ignore_abandoned_reads() -> None:
    """Silences the coroutines of a read that failed.

    Orbax abandons them, and Python complains about each when it is collected, after the event loop
    is closed: thousands of lines, some of them only when the interpreter exits.
    """
    previous_hook = sys.unraisablehook

    def hook(event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        is_abandoned = code is not None and "orbax" in code.co_filename
        if not is_abandoned and "Event loop is closed" not in str(event.exc_value):
            previous_hook(event)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda row: "never retrieved" not in row.getMessage())

"""The folders of a run's checkpoints: which steps there are, whether one is whole, what it says."""

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
SMALL_FILES = ("config/metadata", "data/metadata", "state/_METADATA", "metrics/metrics")


def locate(folder: str | Path, step: int | None = None) -> tuple[Path, int | None]:
    """Give the folder of checkpoints and the step meant by a run, its checkpoints, or one of them.

    Raises:
      UserError: there is no checkpoint.
    """
    given = Path(folder).absolute()
    inside = given
    if (given / FOLDER).is_dir():
        inside = given / FOLDER
    elif given.name.isdigit() and (given / "state").is_dir():
        inside, step = given.parent, int(given.name) if step is None else step
    found = steps(inside) if inside.is_dir() else []
    if not found:
        what = "holds no checkpoint" if given.is_dir() else "is not there"
        raise UserError(f"checkpoint {folder} {what}; give the folder of a run that was trained")
    if step is not None and step not in found:
        has = ", ".join(str(other) for other in found)
        raise UserError(f"checkpoint {folder} has no step {step}; use one of {has}")
    return inside, step


def steps(folder: Path) -> list[int]:
    """Give the steps in a folder of checkpoints, whole or broken, in rising order."""
    return sorted(int(at.name) for at in folder.iterdir() if at.name.isdigit() and at.is_dir())


def best_step(folder: Path, metric: str) -> int:
    """Give the step saved with the largest value of `metric`; the newest if none has it."""
    values = {}
    for step in steps(folder):
        with contextlib.suppress(OSError, ValueError):
            text = (folder / str(step) / "metrics" / "metrics").read_text()
            values[step] = finite(json.loads(text).get(metric))
    return max(values, key=lambda step: (values[step], step), default=steps(folder)[-1])


def fault(at: Path) -> str:
    """Say what is wrong with the small files of the step folder `at`; empty if nothing is."""
    for item in SMALL_FILES:
        if item == "metrics/metrics" and not (at / item).parent.exists():
            continue  # not every step is measured
        try:
            json.loads((at / item).read_text())
        except (OSError, ValueError) as error:
            return short(f"{item}: {getattr(error, 'strerror', None) or error}")
    return ""


def set_aside(folder: Path, step: int, why: str) -> None:
    """Rename a broken step, so that it is neither found nor in the way, and say so on stderr."""
    if parallel.is_main():
        name, count = f"broken-{step}", 1
        while (folder / name).exists():
            name, count = f"broken-{step}-{count}", count + 1
        (folder / str(step)).rename(folder / name)
        older = steps(folder)
        instead = f"using step {older[-1]}" if older else "there is no older one"
        parallel.print_once(f"checkpoint {step} is broken ({why}), set aside as {name}; {instead}")
    parallel.barrier(f"set aside {step}")


def attempt(read: Callable[[Path], Any], at: Path) -> tuple[Any, str]:
    """Give what `read(at)` gives, and why it could not; a user's mistake is raised all the same."""
    why = ""
    with quiet():
        try:
            return read(at), ""
        except UserError:
            raise
        except Exception as error:  # whatever a broken file makes orbax and its libraries raise
            why = short(error)
    _hush_leftovers()
    return None, why


def read_json(at: Path) -> dict:
    """Read the JSON item that orbax wrote into the folder `at`."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(at)


def finite(value: float | None) -> float:
    """Give the value; minus infinity, which is worse than all, if it is missing or no number."""
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def short(error: Any) -> str:
    """Shorten what a library said to something that fits in a sentence.

    >>> short("DATA_LOSS: no array" + chr(10) + "lines that only its authors read")
    'DATA_LOSS: no array'
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 80 else f"{line[:77]}..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what orbax logs off the screen."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache  # once
def _hush_leftovers() -> None:
    """Let the tasks of a read that failed be silent: orbax abandons them, and they find no loop.

    They would print thousands of lines, some of them only when the interpreter ends.
    """
    before = sys.unraisablehook

    def hook(about: Any) -> None:
        code = getattr(about.object, "cr_code", None)
        orphan = code is not None and "orbax" in code.co_filename
        if not orphan and "Event loop is closed" not in str(about.exc_value):
            before(about)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda row: "never retrieved" not in row.getMessage())

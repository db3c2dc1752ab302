"""Trained models at an address, as gs://bucket/run: fetched into a folder of this machine."""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from plan_jax import parallel
from plan_jax.checkpoint.folders import FOLDER, check_name, list_steps
from plan_jax.logger import report_write_errors
from plan_jax.storage import (
    DamagedError,
    Place,
    cache_folder,
    download_folder,
    find_place,
    is_equal,
    wait_for_lock,
)
from plan_jax.types import UserError

# The file of a step that is written last: every reader starts with it.
MARKER = "config/metadata"
# The file of a saved model by which it is known.
MODEL_FILE = "model.safetensors"
MAX_READS = 10  # of a run that replaces its steps meanwhile

_locks: dict[Path, IO[str]] = {}  # of the copies that this process has fetched, and may be reading


def fetch_source(source: str | Path) -> str | Path:
    """Returns the local folder of a trained model, which is `source` unless that is an address.

    At an address it is the newest complete step of a run, the step that is named, or a saved model.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    place = find_place("checkpoint", source)
    if place is None:
        return source
    local = cache_folder("models", place.address)
    check_name(local)
    with wait_for_lock(local):
        return _fetch_model(place, local)


def _fetch_model(place: Place, local: Path) -> Path:
    """Fetches what `fetch_source` returns, into a folder that no other process fetches into."""
    run, step = find_run(place)
    for _ in range(MAX_READS):
        steps = sorted(find_remote_steps(run.list(FOLDER)))
        if step is not None and step not in steps:
            break
        if not steps:
            return _fetch_saved_model(place, local)
        candidates = steps if step is None else [step]
        if path := _fetch_newest(run, candidates, local):
            return path
    else:
        raise UserError(
            f"checkpoint {place.address} is replaced by its run before it can be read; wait for the"
            " end of the run"
        )
    listed = f"; use one of {', '.join(map(str, steps))}" if steps else " and no other one"
    raise UserError(f"checkpoint {run.address} has no step {step}{listed}")


def find_run(place: Place) -> tuple[Place, int | None]:
    """Returns the place of a run, and the step if `place` is one of its steps (else None)."""
    match = re.fullmatch(rf"(.*?)/{FOLDER}(?:/(0|[1-9]\d*))?", place.address)
    if not match:
        return place, None
    run = find_place("checkpoint", match[1])
    assert run is not None  # it is an address as well
    return run, int(match[2]) if match[2] else None


def _fetch_newest(run: Place, steps: Sequence[int], local: Path) -> Path | None:
    """Fetches the newest step that is whole; None if the run has deleted one meanwhile.

    Raises:
      UserError: none is whole, or one cannot be read.
    """
    failures = {}
    newest = None
    for step in reversed(steps):
        folder = local / FOLDER / str(step)
        try:
            if not is_equal(folder, run, f"{FOLDER}/{step}"):
                download_folder(run, f"{FOLDER}/{step}", folder)
            newest = step
            break
        except DamagedError as error:
            failures[step] = str(error)
    if failures and failures.keys() - find_remote_steps(run.list(FOLDER)):
        return None
    for broken, reason in failures.items():
        report_broken(run, f"{FOLDER}/{broken}", reason, newest)
    if newest is None:
        raise UserError(
            f"checkpoint {run.address} has no complete step; train again, or pass another folder"
        )
    with contextlib.suppress(FileNotFoundError):  # the curves of the page
        run.download("metrics.jsonl", local / "metrics.jsonl")
    _keep(local / FOLDER / str(newest))
    for other in list_steps(local / FOLDER):
        if other != newest:
            _delete_unused(local / FOLDER / str(other))
    return local / FOLDER / str(newest)


def _open_lock(folder: Path) -> IO[str]:
    path = folder.with_name(f".{folder.name}.lock")
    with report_write_errors(path):
        return path.open("w")


def _keep(folder: Path) -> None:
    """Keeps other processes from deleting a copy as long as this one lives."""
    if folder not in _locks:
        _locks[folder] = _open_lock(folder)
        with contextlib.suppress(OSError):  # without locks, nothing is deleted
            fcntl.flock(_locks[folder], fcntl.LOCK_SH)


def _delete_unused(folder: Path) -> None:
    """Deletes a copy, unless a process has fetched it and still lives."""
    with _open_lock(folder) as lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
        Path(lock.name).unlink()


def _fetch_saved_model(place: Place, local: Path) -> Path:
    """Fetches a saved model, whose checksums its reader verifies."""
    names = place.list()
    if MODEL_FILE not in names:
        problem = "holds neither a run nor a saved model" if names else "does not exist"
        raise UserError(
            f"checkpoint {place.address} {problem}; pass the folder of a run that was trained"
        )
    try:
        download_folder(place, "", local)
    except DamagedError as error:
        raise UserError(
            f"model {place.address} is not complete ({error}); upload it again"
        ) from None
    return local


def find_remote_steps(names: Iterable[str]) -> set[int]:
    """Returns the complete steps among the names of the objects of a run."""
    pattern = re.compile(rf"{FOLDER}/(0|[1-9]\d*)/{MARKER}")
    return {int(match[1]) for match in map(pattern.fullmatch, names) if match}


def report_broken(place: Place, name: str, reason: str, substitute: int | None) -> None:
    """Prints one line about a broken step at an address, and which step is used instead."""
    remedy = "there is no other one" if substitute is None else f"using step {substitute}"
    parallel.print_once(f"checkpoint {place.address}/{name} is broken ({reason}); {remedy}")

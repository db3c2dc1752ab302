"""Runs at an address, as gs://bucket/run: a folder of this machine stands for the one there.

A run is fetched before it is resumed, and trains in the local folder. In the background its files
are uploaded after each save and at the end: first the log, then each complete step, whose last file
makes it valid there. A killed run leaves the older steps, and the newest one if all of it had
arrived. What lies at the address has the names that it has in a folder.

Of several hosts the main one alone has the local folder, fetches and uploads.
"""

import contextlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from plan_jax import parallel
from plan_jax.checkpoint.address_lock import AddressLock
from plan_jax.checkpoint.faults import find_fault
from plan_jax.checkpoint.fetch import MARKER, find_remote_steps, report_broken
from plan_jax.checkpoint.folders import FOLDER, check_name, list_steps
from plan_jax.checkpoint.lock import FILE as LOCK_FILE
from plan_jax.checkpoint.lock import lock_workdir
from plan_jax.logger import report_write_errors
from plan_jax.storage import (
    DamagedError,
    Place,
    add_files,
    cache_folder,
    download_folder,
    find_place,
    is_equal,
    list_files,
    upload_folder,
)
from plan_jax.types import UserError

# What a resumed run reads beside its checkpoints; all else is only written.
LOG_FILES = ("config.json", "metrics.jsonl")
FITS = "fits"
SECONDS = 5.0  # between two looks at what the run has saved


@contextlib.contextmanager
def open_run(workdir: str | Path) -> Iterator[Path]:
    """Yields the local folder of a run, which is `workdir` unless that is an address.

    What a body writes into the folder is uploaded while it runs, and once more at its end. An
    upload that fails during the training is reported in one line and tried again; training goes on.

    Raises:
      UserError: the address cannot be used, another run writes there, or the last upload failed;
        in every process.
    """
    place = find_place("workdir", workdir)
    if place is None:
        yield Path(workdir)
        return
    mirror = cache_folder("runs", place.address)
    check_name(mirror)
    run = mirror / "run"
    with lock_workdir(mirror), contextlib.ExitStack() as stack:
        parallel.ask_main(lambda: stack.enter_context(_copy_run(place, run)))
        yield run
        parallel.ask_main(stack.close)
    parallel.print_once(f"run {run} is copied to {place.address}")


@contextlib.contextmanager
def _copy_run(place: Place, run: Path) -> Iterator[None]:
    """Fetches a run, and uploads what the body writes, while it runs and once more at its end.

    Raises:
      UserError: as `open_run`.
    """
    with AddressLock(place) as lock:
        upload = _Upload(run, place, lock, _fetch_run(place, run))
        thread = threading.Thread(target=upload.repeat, name="uploads", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            upload.stop(thread)
            if (run / "config.json").exists():
                try:
                    upload.copy()
                except (UserError, OSError) as error:  # the reason for the end counts more
                    parallel.print_once(_describe_failure(place, run, error))
            raise
        upload.stop(thread)
        try:
            upload.copy()
        except (UserError, OSError) as error:
            raise UserError(_describe_failure(place, run, error)) from error


def _describe_failure(place: Place, run: Path, error: Exception) -> str:
    return (
        f"run {place.address} is not copied completely: {error}; it is in {run}, from where the"
        " same command on this host copies it"
    )


class _Upload:
    """Copies a run to an address, each time only what is new."""

    def __init__(self, run: Path, place: Place, lock: AddressLock, steps: set[int]) -> None:
        """Prepares copies of `run`; `steps` are those that are equal at the address."""
        self.run, self.place, self.lock = run, place, lock
        self.files: dict[str, tuple[int, int]] = {}
        self.steps = {step: _describe_files(run / FOLDER / str(step)) for step in steps}
        self.remote_steps = steps
        self.is_first = True
        self.error = ""
        self._ended = threading.Event()

    def repeat(self) -> None:
        """Copies what is new every few seconds, until `stop`."""
        while not self._ended.wait(SECONDS):
            # A run that ends with a mistake before its first step leaves nothing behind.
            if not (self.run / FOLDER).is_dir():
                continue
            try:
                self.copy()
                self.error = ""
            except (UserError, OSError) as error:
                if str(error) != self.error:
                    tqdm.write(f"not copied, to be tried again: {error}", file=sys.stderr)
                self.error = str(error)

    def stop(self, thread: threading.Thread) -> None:
        """Waits for the end of the copy that is being made."""
        self._ended.set()
        thread.join()

    def copy(self) -> None:
        """Copies files that have changed, then complete steps, the newest one first.

        Raises:
          UserError: something cannot be written, or another run has taken the address.
        """
        if self.is_first:
            self.lock.require()  # else the remains may be a step that another run uploads
            self._delete_remains()
            self.is_first = False
        while True:
            self.lock.require()
            pending = [step for step in self._list_steps() if self._is_new(step)]
            # Rows before a step have to be there when it is resumed, and later ones are dropped.
            self._copy_files()
            if not pending:
                break
            self._copy_step(pending[-1])
            self._delete_old_steps()
        self._delete_old_steps()

    def _list_steps(self) -> list[int]:
        """Returns the steps of the run that can be read."""
        folder = self.run / FOLDER
        steps = list_steps(folder) if folder.is_dir() else []
        return [step for step in steps if not _has_fault(folder / str(step))]

    def _is_new(self, step: int) -> bool:
        return _describe_files(self.run / FOLDER / str(step)) != self.steps.get(step)

    def _copy_files(self) -> None:
        current = {}
        for name, file in list_files(self.run).items():
            if name.split("/")[0] in (FOLDER, LOCK_FILE) or name.endswith(".part"):
                continue
            with contextlib.suppress(FileNotFoundError):  # a page and its pictures are replaced
                status = file.stat()
                current[name] = (status.st_size, status.st_mtime_ns)
                if self.files.get(name) != current[name]:
                    self.place.write(name, file.read_bytes())
                    self.files[name] = current[name]
        for name in self.files.keys() - current.keys():
            self.place.delete([name])
            del self.files[name]

    def _copy_step(self, step: int) -> None:
        """Copies a step, of which a run may add metrics and which it may delete meanwhile."""
        hold, name = self.run.parent / "hold", f"{FOLDER}/{step}"
        current = _describe_files(self.run / name)
        shutil.rmtree(hold, ignore_errors=True)
        try:
            try:
                ignore = shutil.ignore_patterns("*.part")  # metrics that are being added
                shutil.copytree(self.run / name, hold, ignore=ignore, copy_function=_link)
            except OSError as error:  # shutil has a kind of its own, for several
                if not (self.run / name).is_dir():
                    return
                reason = error.strerror or "not all files can be linked"
                raise UserError(
                    f"{hold} cannot be written ({reason}); free disk space and repeat the command"
                ) from error
            previous = self.steps.pop(step, {})
            self.remote_steps.add(step)
            if previous and previous.items() <= current.items():
                add_files(hold, self.place, name, sorted(current.keys() - previous.keys()))
            else:
                upload_folder(hold, self.place, name, MARKER)
            self.steps[step] = current
            with report_write_errors(self.run.parent):
                (self.run.parent / "copied").touch()
        finally:
            shutil.rmtree(hold, ignore_errors=True)

    def _delete_old_steps(self) -> None:
        """Deletes steps at the address that the run does not keep, once a newer one is there."""
        steps = set(list_steps(self.run / FOLDER)) if (self.run / FOLDER).is_dir() else set()
        newest = max(steps & self.steps.keys(), default=-1)
        for step in sorted(self.remote_steps - steps):
            if step < newest:
                self._delete(step)
                self.remote_steps.discard(step)
                self.steps.pop(step, None)

    def _delete_remains(self) -> None:
        """Deletes steps of which an upload or a deletion that was killed has left a part.

        Complete steps that this run has not are later ones, or broken; they are replaced in time.
        """
        names = self.place.list(FOLDER)
        complete = find_remote_steps(names)
        self.remote_steps |= complete
        pattern = re.compile(rf"{FOLDER}/(0|[1-9]\d*)/.+")
        matches = filter(None, map(pattern.fullmatch, names))
        for step in {int(match[1]) for match in matches}:
            if step not in complete:
                self._delete(step)

    def _delete(self, step: int) -> None:
        name = f"{FOLDER}/{step}"
        self.place.delete([f"{name}/{MARKER}", *self.place.list(name)])


def _link(source: str, target: str) -> None:
    """Gives a file a second name, by which it stays when its run deletes the first."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _describe_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of each file of a step, but what is being added."""
    files = {}
    for name, file in list_files(folder).items():
        if name.split("/")[0].endswith(".part"):
            continue
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            files[name] = (status.st_size, status.st_mtime_ns)
    return files


def _has_fault(step_folder: Path) -> bool:
    try:
        return bool(find_fault(step_folder))
    except OSError:
        return True


def _fetch_run(place: Place, run: Path) -> set[int]:
    """Brings the local folder of a run to the state at the address; returns the equal steps.

    The address counts. Steps that could not be uploaded are kept if all that is there is older and
    of the same run. Otherwise they are moved into the folder `replaced` beside the run, once what
    is at the address has been fetched.
    """
    fetched, replaced = run.parent / "fetched", run.parent / "replaced"
    names = place.list()
    steps = find_remote_steps(names)
    own = list_steps(run / FOLDER) if (run / FOLDER).is_dir() else []
    equal = {step for step in steps if step in own and _is_equal_step(place, run, step)}
    failures = {}
    shutil.rmtree(fetched, ignore_errors=True)
    for step in sorted(steps - equal):
        try:
            download_folder(place, f"{FOLDER}/{step}", fetched / str(step))
        except DamagedError as error:
            failures[step] = str(error)
    whole = steps - failures.keys()
    # Nothing at the address means that nothing has been uploaded yet, or that it was deleted there.
    is_newer = max(whole) in equal if whole else bool(steps) or not (run.parent / "copied").exists()
    if not is_newer:
        newest = max(whole, default=-1)
        with report_write_errors(run):
            for name in LOG_FILES:  # without which they are fetched again, if this one is killed
                (run / name).unlink(missing_ok=True)
            for step in set(own) - equal:
                if step > newest:
                    shutil.rmtree(replaced / str(step), ignore_errors=True)
                    replaced.mkdir(exist_ok=True)
                    (run / FOLDER / str(step)).rename(replaced / str(step))
                else:
                    shutil.rmtree(run / FOLDER / str(step))
            if not steps:
                shutil.rmtree(run, ignore_errors=True)
                (run.parent / "copied").unlink(missing_ok=True)
            shutil.rmtree(run / FITS, ignore_errors=True)
        if own and own[-1] > newest:
            parallel.print_once(
                f"step {own[-1]} of this host does not continue the run at {place.address}; it is"
                f" kept in {replaced}"
            )
    if not is_newer or not (run / LOG_FILES[0]).exists():
        for name in sorted(names, reverse=True):
            if name in LOG_FILES or name.startswith(f"{FITS}/"):
                place.download(name, run / name)
    for step in sorted(whole - equal):  # the newest one last, by which a killed fetch is known
        with report_write_errors(run):
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            shutil.rmtree(run / FOLDER / str(step), ignore_errors=True)
            (fetched / str(step)).rename(run / FOLDER / str(step))
        equal.add(step)
    shutil.rmtree(fetched, ignore_errors=True)
    remaining = list_steps(run / FOLDER) if (run / FOLDER).is_dir() else []
    for step, reason in failures.items():
        report_broken(place, f"{FOLDER}/{step}", reason, max(remaining, default=None))
    if equal:
        with report_write_errors(run.parent):
            (run.parent / "copied").touch()
    return equal


def _is_equal_step(place: Place, run: Path, step: int) -> bool:
    try:
        return is_equal(run / FOLDER / str(step), place, f"{FOLDER}/{step}")
    except DamagedError:
        return False

"""Copies of a run in another folder, such as a mounted drive, and their way back.

A hosted machine may end at any moment, and its disk with it. A mounted drive outlives it, but is
slow with many small files and has no locks. So a run trains on the disk of the machine, and each
complete step is copied as one archive. The folder then holds

    step-<number>.zip    one checkpoint, not compressed
    run.zip              the other files of the run: config, metrics, TensorBoard, pages, pictures

An archive appears under its name by one rename, after it has been read back, so a kill at any
moment leaves old archives or new ones and never half of one.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from plan_jax import parallel
from plan_jax.checkpoint.faults import Failure, find_fault, first_line
from plan_jax.checkpoint.folders import FOLDER, list_steps
from plan_jax.checkpoint.lock import FILE as LOCK_FILE
from plan_jax.checkpoint.lock import lock_workdir
from plan_jax.logger import encode_json, report_write_errors
from plan_jax.types import UserError, check_local

RUN_ARCHIVE = "run.zip"
RESTORED = ".restored"  # where an archive is extracted before its content gets its place
# What a resumed run may change in its config. The data have a digest of their own.
FREE_FIELDS = ("log_every", "eval", "checkpoint", "parallel", "data", "dtype", "remat", "scan")
# What file systems answer that cannot be told to write everything now.
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# What zipfile raises for archives that are damaged, as NotImplementedError for an unknown method.
DAMAGES = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, LZMAError)
BUFFER = 1 << 20
MAX_ATTEMPTS = 5  # to copy files that their run replaces meanwhile
# One copy at a time, in whatever thread.
_lock = threading.Lock()


class _Vanished(Exception):
    """Names a file that its run has deleted before it could be copied."""


def copy_steps(run: str | Path, folder: str | Path) -> list[int]:
    """Copies the complete steps of a run that `folder` lacks, with the other files of the run.

    The run may be training meanwhile. A step that the run has deleted is deleted from `folder` as
    well, once a newer one is there.

    Args:
      run: the folder of the run.
      folder: where the archives are; created if it does not exist. Only one run at a time may be
        copied into a folder.

    Returns:
      The steps that were copied.

    Raises:
      UserError: `run` does not exist, `folder` holds copies of another run or newer steps, or an
        archive cannot be written.
    """
    run, folder = Path(run), Path(folder)
    if not parallel.is_main():
        return []
    if not (run / "config.json").is_file():
        raise UserError(f"run {run} does not exist; pass the folder of a run")
    with _lock:
        _require_same_run(run, folder)
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.zip.*.part"):  # of a copy that was killed
                path.unlink(missing_ok=True)
        steps = _list_run_steps(run)
        # Files first: rows of metrics after a step are dropped when it is resumed, and rows before
        # it would be missing.
        _copy_files(run, folder)
        copied = [step for step in steps if _copy_step(run / FOLDER / str(step), folder)]
        _delete_old_steps(folder, steps)
    return copied


def restore_steps(folder: str | Path, run: str | Path) -> int | None:
    """Restores a run from its copies in `folder`, so that the same command resumes it.

    Nothing changes if the run has the newest copied step. Otherwise the copied files of the run
    replace its own, and the copied steps are added. An archive that is not complete is left out,
    with one line.

    Returns:
      The newest step of the run afterwards; None if there is none, as before its first copy.

    Raises:
      UserError: another process holds `run`, `folder` holds another run, or files cannot be
        written.
    """
    check_local("folder", folder)
    check_local("run", run)
    folder, run = Path(folder), Path(run)
    archives, own = _list_archives(folder), _list_run_steps(run)
    missing = [step for step in sorted(archives) if step > max(own, default=-1)]
    if not missing or not parallel.is_main():
        return max(own, default=None)
    _require_equal_configs(run, folder)
    with lock_workdir(run):
        # The newest step comes last: a restoration that is killed before it is repeated.
        targets = {folder / RUN_ARCHIVE: ""}
        targets |= {archives[step]: f"{FOLDER}/{step}" for step in missing}
        for archive, target in targets.items():
            if reason := _extract(archive, run, target):
                parallel.print_once(f"copy {archive} is left out ({reason})")
    return max(_list_run_steps(run), default=None)


@contextlib.contextmanager
def copy_repeatedly(run: str | Path, folder: str | Path, seconds: float = 60.0) -> Iterator[None]:
    """Copies the complete steps of a run while the body trains it, and once more at the end.

        with copy_repeatedly("runs/mine", "/drive/mine"):
            main.run(["--config", "pairs", "--workdir", "runs/mine"])

    A copy that fails during the training is reported in one line and tried again; training goes on.

    Args:
      run: the folder of the run, which need not exist yet.
      folder: where the archives are.
      seconds: time between two copies.

    Raises:
      UserError: the last copy failed. Before the body: `folder` cannot be used.
    """
    run, folder = Path(run), Path(folder)
    _require_same_run(run, folder)
    _require_writable(folder)
    ended, reported = threading.Event(), set[str]()

    def copy() -> None:
        while not ended.wait(seconds):
            try:
                if (run / FOLDER).is_dir():
                    copy_steps(run, folder)
            except (UserError, OSError, _Vanished) as error:
                if str(error) not in reported:
                    tqdm.write(f"not copied, to be tried again: {error}", file=sys.stderr)
                reported.add(str(error))

    thread = threading.Thread(target=copy, name="copies", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (run / "config.json").exists():
            copy_steps(run, folder)


# Which run a folder holds ------------------------------------------------------------------------


def _require_same_run(run: Path, folder: Path) -> None:
    """Raises UserError unless `folder` may take the copies of `run`."""
    check_local("run", run)
    check_local("folder", folder)
    if folder.absolute().is_relative_to(run.absolute()):
        raise UserError(f"folder {folder} is inside of run {run}; pass another folder")
    archives = _list_archives(folder)
    if not archives:
        return
    _require_equal_configs(run, folder)
    newest = max(_list_run_steps(run), default=0)
    if max(archives) > newest:
        raise UserError(
            f"folder {folder} has a copy of step {max(archives)}, and run {run} is at step"
            f" {newest}; restore the copies first, or pass another folder"
        )


def _require_equal_configs(run: Path, folder: Path) -> None:
    """Raises UserError if a run and the steps in a folder are of different configs."""
    if not (run / "config.json").exists():
        return
    try:
        own = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read ({error}); delete it") from None
    before, after = _select_fields(own), _select_fields(_read_archived_config(folder) or own)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            raise UserError(
                f"folder {folder} holds copies of another run than {run}, which differ in {name};"
                " pass another folder"
            )


def _read_archived_config(folder: Path) -> dict[str, Any] | None:
    """Returns the config in the newest step that can be read; None if there is none."""
    for _, path in sorted(_list_archives(folder).items(), reverse=True):
        with contextlib.suppress(KeyError, *DAMAGES):
            with zipfile.ZipFile(path) as archive:
                about = json.loads(archive.read("config/metadata"))
            # As `config.json` is written, where NaN and infinities are null.
            return json.loads(encode_json(about["config"]))
    return None


def _select_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that tell two runs apart."""

    def select(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: select(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name not in FREE_FIELDS
        }

    return select(config) | {"data.fingerprint": config.get("data", {}).get("fingerprint")}


def _list_run_steps(run: Path) -> list[int]:
    return list_steps(run / FOLDER) if (run / FOLDER).is_dir() else []


def _require_writable(folder: Path) -> None:
    """Creates a folder; raises UserError if nothing can be written into it."""
    probe = folder / f"write.{os.getpid()}.part"
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()


# Archives ----------------------------------------------------------------------------------------


def _list_archives(folder: Path) -> dict[int, Path]:
    """Returns the archives of steps in a folder by the number of the step."""
    if not folder.is_dir():
        return {}
    names = {path: re.fullmatch(r"step-(\d+)\.zip", path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in names.items() if match}


def _copy_files(run: Path, folder: Path) -> None:
    """Copies all files of a run but its checkpoints, if one has changed."""
    for attempt in range(MAX_ATTEMPTS):
        try:
            files = {
                name: path
                for name, path in _list_files(run).items()
                if name.split("/")[0] not in (FOLDER, LOCK_FILE, RESTORED)
                and not name.endswith(".part")
            }
            current = {name: (_size(path), _change_time(path)) for name, path in files.items()}
            archived = _read_entries(folder / RUN_ARCHIVE)
            if current != {item.filename: (item.file_size, item.date_time) for item in archived}:
                _write_archive(files, folder / RUN_ARCHIVE)
            return
        except (_Vanished, FileNotFoundError):  # a page and its pictures are replaced
            if attempt == MAX_ATTEMPTS - 1:
                raise


def _copy_step(step_folder: Path, folder: Path) -> bool:
    """Copies one step unless its archive is there; returns whether it was copied."""
    path = folder / f"step-{step_folder.name}.zip"
    try:
        files = _list_files(step_folder)
        sizes = {name: _size(file) for name, file in files.items()}
        # A step does not change; at most, metrics are added to it.
        if sizes == {item.filename: item.file_size for item in _read_entries(path)}:
            return False
        if fault := _find_fault(step_folder):
            # A step that the run deletes meanwhile is not broken.
            if step_folder.is_dir():
                parallel.print_once(f"step {step_folder} is broken ({fault}) and was not copied")
            return False
        _write_archive(files, path)
    except (_Vanished, FileNotFoundError):
        if step_folder.is_dir():
            raise
        return False  # the run has deleted the step meanwhile
    return True


def _find_fault(step_folder: Path) -> str:
    try:
        return find_fault(step_folder)
    except OSError as error:
        raise Failure(first_line(error)).to_error(step_folder) from error


def _delete_old_steps(folder: Path, steps: Sequence[int]) -> None:
    """Deletes the archives of steps that the run does not keep and that are older than its own."""
    archives = _list_archives(folder)
    newest = max((step for step in steps if step in archives), default=-1)
    for step, path in archives.items():
        if step < newest and step not in steps:
            with report_write_errors(path):
                path.unlink(missing_ok=True)


def _list_files(folder: Path) -> dict[str, Path]:
    """Returns the files below a folder by their relative names; links are left out."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in paths.items() if path.is_file() and not path.is_symlink()}


def _size(file: Path) -> int:
    return file.stat().st_size


def _change_time(file: Path) -> tuple[int, ...]:
    """Returns when a file was changed, as an archive stores it."""
    *date, second = zipfile.ZipInfo.from_file(file, strict_timestamps=False).date_time
    return (*date, second // 2 * 2)  # in steps of two seconds


def _read_entries(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the list of files in an archive; [] if it is missing or cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except DAMAGES:
        return []


def _write_archive(files: Mapping[str, Path], path: Path) -> None:
    """Writes an archive of files completely or not at all, and reads it back before.

    Raises:
      _Vanished: one of the files does not exist any more.
      UserError: the archive cannot be written, or what is read back differs.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with report_write_errors(path):
            with temporary.open("wb") as stream:
                with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                    for name, file in files.items():
                        _add_file(archive, name, file)
                _sync(stream)
            if fault := _find_archive_fault(temporary):
                raise UserError(f"{path} is not what was written ({fault}); choose another folder")
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _add_file(archive: zipfile.ZipFile, name: str, file: Path) -> None:
    try:
        source = file.open("rb")
    except FileNotFoundError:
        raise _Vanished(str(file)) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); correct its rights") from None
    with source:
        entry = zipfile.ZipInfo.from_file(file, name, strict_timestamps=False)
        with archive.open(entry, "w", force_zip64=True) as target:
            shutil.copyfileobj(source, target, BUFFER)


def _sync(stream: IO[bytes]) -> None:
    """Writes what the system still holds of a file, where it can be told to."""
    stream.flush()
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _find_archive_fault(path: Path) -> str:
    """Returns what is wrong with an archive, all of which is read, or ""."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [item.filename for item in archive.infolist()]
    except DAMAGES as error:
        return str(error) or type(error).__name__
    if damaged:
        return f"{damaged} has another checksum"
    outside = [name for name in names if not _is_inside(name)]
    return f"{outside[0]!r} is outside of the run" if outside else ""


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _extract(path: Path, run: Path, target: str) -> str:
    """Extracts an archive into a run, after a check of every byte; returns what is wrong, or "".

    A step appears by one rename. Of the other files, each one does.
    """
    if fault := _find_archive_fault(path):
        return fault
    temporary = run / RESTORED
    with report_write_errors(run):
        shutil.rmtree(temporary, ignore_errors=True)  # of a restoration that was killed
        with zipfile.ZipFile(path) as archive:
            archive.extractall(temporary)
        if target:
            (run / target).parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(run / target)
        else:
            for name, file in _list_files(temporary).items():
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                file.replace(run / name)
            shutil.rmtree(temporary, ignore_errors=True)
    return ""

"""Shards of records, each written at once by one of several processes.

A shard is complete when its report is beside it, and the report is written last. So a preparation
that was killed goes on with the shards that are not complete, and with those that lack an image
which has been mended since.
"""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from plan_jax.data import quoting, schema
from plan_jax.data.public.items import list_files
from plan_jax.data.public.plan import Plan, find_size, read_item
from plan_jax.data.public.records import Reader, open_folder
from plan_jax.data.sections.captions import CAPTIONS, list_usable
from plan_jax.logger import write_atomically
from plan_jax.types import UserError

MAX_SHARDS = 200  # of a split, unless its shards would be larger than MAX_RECORDS
MIN_RECORDS, MAX_RECORDS = 64, 2048  # of a shard: what a kill costs at most, per process
MIN_PARALLEL_IMAGES = 300  # fewer are read before a second process has started
REPORT_EVERY = 16  # images
JOB_FILE = "job.json"
_WORKER_CODE = "from plan_jax.data.public.shards import run_worker; run_worker()"


@dataclass(frozen=True)
class Shard:
    """A complete shard: its file, the records in it, and what was left out.

    Attributes:
      path: the file.
      kept: places of the items that are records, in the order of the shard's items.
      dropped: (reason, path) of images that cannot be used.
      broken: the files of those images -> size and time of change when they were read.
      faults: reason -> ids of images with a fault.
      notes: what was noted of how images were read -> their paths.
      textless: caption rule -> places in `kept` of records that have no caption under it.
      num_bytes: size of the file.
    """

    path: Path
    record_places: Sequence[int]
    dropped: Sequence[tuple[str, str]]
    broken: Mapping[str, Sequence[int]]
    faults: Mapping[str, Sequence[str]]
    notes: Mapping[str | int, Sequence[str]]
    textless: Mapping[str, Sequence[int]]
    num_bytes: int


# Writing ----------------------------------------------------------------------------------------


def write_shards(
    plan: Plan, folder: Path, settings: Mapping[str, Any], workers: int, name: str
) -> dict[str, list[Shard]]:
    """Writes all records of a plan; shards that are complete already are kept.

    Args:
      plan: the images.
      folder: an existing folder of the shards.
      settings: the arguments of `records.Reader`; `folder` is the path of the images.
      workers: number of processes; 0 is one for each core.
      name: of the dataset, for the progress bar.

    Returns:
      The shards of each split, in order.

    Raises:
      UserError: a file may be readable later.
      OSError, RuntimeError: a shard cannot be written.
    """
    parts = {split: _divide(offsets) for split, offsets in plan.offsets.items()}
    jobs = {
        f"{split}-{index:05d}": part
        for split, split_parts in parts.items()
        for index, part in enumerate(split_parts)
    }
    identity = _identify(plan.digest, settings, jobs)
    _start_job(
        folder,
        {
            "identity": identity,
            "items": str(plan.path),
            "settings": dict(settings),
            "shards": jobs,
        },
    )
    open_jobs = [
        key
        for key in jobs
        if (shard := load_shard(folder, key, identity)) is None
        or _is_mended(shard, settings["folder"])
    ]
    num_open = sum(len(jobs[key]) for key in open_jobs)
    with tqdm(
        total=len(plan),
        initial=len(plan) - num_open,
        unit="image",
        desc=name,
        dynamic_ncols=True,
        mininterval=refresh_interval(),
        smoothing=0.05,
        file=sys.stderr,
        disable=num_open < REPORT_EVERY,
    ) as bar:
        if num_open:
            num_workers = min(workers or count_cores(), len(open_jobs))
            if num_workers == 1 or num_open < MIN_PARALLEL_IMAGES:
                writer = _ShardWriter(folder)
                for key in open_jobs:
                    writer.write(key, bar.update)
            else:
                _run_workers(folder, open_jobs, num_workers, bar.update)
    shards: dict[str, list[Shard]] = {split: [] for split in parts}
    for key in jobs:
        if (shard := load_shard(folder, key, identity)) is None:
            raise RuntimeError(f"shard {key} in {folder} was not written")
        shards[key.rpartition("-")[0]].append(shard)
    return shards


def refresh_interval() -> float:
    """Returns the seconds between two pictures of a progress bar: fewer of them in a file."""
    return 0.5 if sys.stderr.isatty() else 30.0


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; it honours the limits of a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _divide(offsets: Sequence[int]) -> list[list[int]]:
    """Returns the offsets of each shard."""
    length = min(max(math.ceil(len(offsets) / MAX_SHARDS), MIN_RECORDS), MAX_RECORDS)
    return [list(offsets[start : start + length]) for start in range(0, len(offsets), length)]


def _identify(digest: str, settings: Mapping[str, Any], shards: Mapping[str, Sequence[int]]) -> str:
    """Returns a hash of all that shards depend on; the folders may be moved."""
    content = [digest, dict(settings) | {"folder": ""}, shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _start_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Writes the job; deletes the shards of another one."""
    path, identity = folder / JOB_FILE, ""
    with suppress(OSError, ValueError, AttributeError):
        identity = json.loads(path.read_text("utf-8")).get("identity", "")
    if identity != job["identity"]:
        for stale in folder.glob("*-[0-9]*"):
            stale.unlink(missing_ok=True)
    write_atomically(path, json.dumps(job))


def _is_mended(shard: Shard, root: str) -> bool:
    """Returns whether the files of an image that could not be used have changed since."""
    return any(_read_state(root, path) != state for path, state in shard.broken.items())


def _read_state(root: str, path: str) -> list[int]:
    """Returns size and time of change of a file below a folder; [] if it does not exist."""
    try:
        status = os.stat(os.path.join(root, path))
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]


class _ShardWriter:
    """Writes the shards of the job in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        job = json.loads((folder / JOB_FILE).read_text("utf-8"))
        self.items, self.shards, self.settings = job["items"], job["shards"], job["settings"]
        self.identity = job["identity"]

    def write(self, key: str, advance: Callable[[int], Any]) -> None:
        """Writes one shard and its report."""
        path = self.folder / key
        temporary = self.folder / f"{key}.{os.getpid()}"
        settings = self.settings | {"folder": open_folder(self.settings["folder"])}
        reader = Reader(**settings)
        record_places: list[int] = []
        dropped: list[tuple[str, str]] = []
        broken: dict[str, list[int]] = {}
        textless: dict[str, list[int]] = {rule: [] for rule in CAPTIONS}
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        offsets = self.shards[key]
        try:
            with open(self.items, "rb") as lines:
                for place, offset in enumerate(offsets):
                    item = read_item(lines, offset)
                    record = reader.read(item)
                    if isinstance(record, str):
                        dropped.append((record, quoting.quote_path(item.image)))
                        for name in list_files(item):
                            broken[name] = _read_state(self.settings["folder"], name)
                    else:
                        writer.write(schema.serialize(record))
                        for rule in {*CAPTIONS} - {*list_usable(record.sections)}:
                            textless[rule].append(len(record_places))
                        record_places.append(place)
                    if place % REPORT_EVERY == REPORT_EVERY - 1:
                        advance(REPORT_EVERY)
            writer.close()
            # A writer of C++ may be silent about a full disk.
            if _count_records(temporary) != len(record_places):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except BaseException:  # a full disk needs the space
            with suppress(Exception):
                writer.close()
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)
        report = {
            "identity": self.identity,
            "kept": record_places,
            "dropped": dropped,
            "broken": broken,
            "faults": reader.faults,
            "textless": textless,
            "notes": [[note, names] for note, names in reader.notes.items()],
            "bytes": find_size(path),
        }
        write_atomically(path.with_name(f"{key}.json"), json.dumps(report))
        advance(len(offsets) % REPORT_EVERY)


def _count_records(path: Path) -> int:
    """Returns the number of records in a file; -1 if it is not whole."""
    try:
        reader = ArrayRecordReader(str(path))
    except (OSError, RuntimeError, ValueError):
        return -1
    try:
        return reader.num_records()
    finally:
        reader.close()


def load_shard(folder: Path, key: str, identity: str) -> Shard | None:
    """Returns a shard, or None if it is not complete, or is that of another job."""
    path = folder / key
    try:
        report = json.loads(path.with_name(f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    # A process whose parent was killed may have written the last shard of another job.
    if report.get("identity") != identity or find_size(path) != report["bytes"]:
        return None
    return Shard(
        path=path,
        record_places=report["kept"],
        dropped=[(reason, name) for reason, name in report["dropped"]],
        broken=report["broken"],
        faults=report["faults"],
        textless=report["textless"],
        notes={note: names for note, names in report["notes"]},
        num_bytes=report["bytes"],
    )


# Processes --------------------------------------------------------------------------------------


def _run_workers(
    folder: Path, keys: Iterable[str], num_workers: int, advance: Callable[[int], Any]
) -> None:
    """Writes shards by processes of their own, each of which is given one after the other.

    `multiprocessing` would import the caller's main module again, or fork a process that may run
    threads.
    """
    queue: SimpleQueue[str] = SimpleQueue()
    for key in keys:
        queue.put(key)
    lock, errors = threading.Lock(), list[Exception]()
    workers = [_start_worker(folder) for _ in range(num_workers)]

    def feed(worker: subprocess.Popen) -> None:
        try:
            while not errors:
                key = queue.get_nowait()
                for number in _request(worker, key):
                    with lock:
                        advance(number)
        except Empty:
            pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            # A join without a limit would not see a signal, nor the error of another thread.
            while thread.is_alive() and not errors:
                thread.join(0.2)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if errors:
        raise errors[0]


def _start_worker(folder: Path) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[3])
    python_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # One process per core: the threads of numpy's BLAS would only get in each other's way.
    single_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        # -P: the working directory may be the downloaded folder, whose files are no modules.
        [sys.executable, "-P", "-c", _WORKER_CODE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | single_thread | {"PYTHONPATH": python_path},
        start_new_session=True,  # Ctrl-C is for the parent alone, which ends its workers
    )


def _request(worker: subprocess.Popen, key: str) -> Iterator[int]:
    """Asks a worker for a shard; yields numbers of images as they are read."""
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(f"{key}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        raise _name_end(worker) from None
    for line in worker.stdout:
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"]) if answer["is_mistake"] else OSError(answer["error"])
        if "images" not in answer:
            return
        yield answer["images"]
    raise _name_end(worker)


def _name_end(worker: subprocess.Popen) -> Exception:
    """Returns the error of a worker that has ended before its work was done."""
    code = worker.wait()
    if code >= 0:
        return RuntimeError("a process that read images ended early; see its error above")
    return UserError(
        f"a process that read images was ended by {signal.Signals(-code).name}, as by a system "
        "short of memory; repeat the command, which goes on where it was, with fewer workers"
    )


def run_worker() -> None:
    """Writes the shards that stdin names into the folder that the command line names."""
    writer = _ShardWriter(Path(sys.argv[1]))

    def answer(content: Mapping[str, Any]) -> None:
        print(json.dumps(content), flush=True)

    try:
        for line in sys.stdin:
            writer.write(line.strip(), lambda number: answer({"images": number}))
            answer({})
    except BrokenPipeError:
        _end_worker()
    except (UserError, OSError, RuntimeError) as error:
        try:
            answer({"error": str(error), "is_mistake": isinstance(error, UserError)})
        except BrokenPipeError:
            _end_worker()


def _end_worker() -> None:
    """Ends a process whose parent is gone; a normal exit would fail to flush stdout."""
    os._exit(1)

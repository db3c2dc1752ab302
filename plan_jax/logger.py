"""The log of a run: progress bar, `metrics.jsonl`, TensorBoard, and atomic writes of files.

A file is either appended to line by line or replaced by a rename, so a killed process neither loses
a row nor leaves half a file. What the system says about a write becomes one sentence. Only the main
process writes.
"""

import builtins
import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from plan_jax import parallel
from plan_jax.types import UserError


class Logger:
    """The log of one run; a context manager that shows a progress bar while it is open.

    On processes other than the main one every method does nothing.

    Attributes:
      folder: the folder of the run.
      history: the rows of `metrics.jsonl`, those from before a resumption included.
      summary: values that are measured once and belong to the final metrics.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], num_steps: int, start_step: int = 0
    ) -> None:
        """Writes `config.json` and opens the log of a run that continues after `start_step`.

        Rows of later steps are dropped: they were logged after the checkpoint that the run resumes
        from, and are about to be logged again.

        Raises:
          UserError: `folder` cannot be written.
        """
        self.folder = folder
        self.num_steps, self.start_step = num_steps, start_step
        self.start_time = time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.is_main = parallel.is_main()
        if not self.is_main:
            return
        with report_write_errors(folder):
            (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", encode_json(config, indent=2, default=list))
        self.metrics_path = folder / "metrics.jsonl"
        self.history = [row for row in read_rows(self.metrics_path) if row["step"] <= start_step]
        write_atomically(self.metrics_path, "".join(encode_json(x) + "\n" for x in self.history))
        self.events = _EventFile(folder / "tensorboard", start_step + 1)

    def __enter__(self) -> "Logger":
        """Opens the progress bar."""
        if self.is_main:
            self.bar = tqdm(
                total=self.num_steps,
                initial=self.start_step,
                unit="step",
                dynamic_ncols=True,
                # Refreshing depends on time alone. By default tqdm also waits for a number of steps
                # that it adapts to past intervals, and a validation in between throws it off.
                miniters=1,
                mininterval=_refresh_interval(),
                # The mean over the run: validation and checkpoints belong to the remaining time,
                # and a moving average would jump at each of them.
                smoothing=0,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the progress bar and TensorBoard's file."""
        if self.bar is not None:
            self.bar.close()
            self.events.close()

    def advance(self) -> None:
        """Advances the progress bar by one step.

        The first step compiles the program, which takes as long as hundreds of later ones. The
        clock of the bar restarts after it, so that the remaining time counts later steps only.
        """
        if self.bar is None:
            return
        is_first = self.bar.n == self.start_step
        if is_first:
            self.bar.initial += 1
            self.bar.unpause()
        self.bar.update()
        if is_first:
            self.bar.refresh()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row of metrics, and shows the loss and images per second on the bar."""
        if not self.is_main:
            return
        row: dict[str, Any] = {"step": step} | {
            name: float(value) for name, value in values.items()
        }
        self.history.append(row)
        with (
            report_write_errors(self.metrics_path),
            self.metrics_path.open("a", encoding="utf-8") as file,
        ):
            file.write(encode_json(row) + "\n")
        self.events.write(step, {name: x for name, x in row.items() if name != "step"})
        if self.bar is not None and "loss" in row:
            postfix = f"loss {row['loss']:.3f}"
            if "images_per_s" in row:
                postfix += f", {row['images_per_s']:.0f} images/s"
            # Not redrawn here, or rows would set the pace of refreshing.
            self.bar.set_postfix_str(postfix, refresh=False)

    def info(self, sentence: str) -> None:
        """Prints a sentence on stderr, above the progress bar."""
        parallel.print_once(sentence)

    def elapsed(self) -> float:
        """Returns the seconds since the run, or its resumption, began."""
        return time.monotonic() - self.start_time


def _refresh_interval() -> float:
    """Returns the seconds between two refreshes of the progress bar.

    A log file keeps every refresh as a line of its own. A terminal and a notebook replace it.
    """
    return 0.5 if sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__") else 20.0


class _EventFile:
    """Scalars for TensorBoard, which are on disk when `write` returns.

    The `SummaryWriter` of tensorboardX writes in a thread of its own. When the disk is full, that
    thread dies with a traceback, and the run waits for it forever.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        # Imported here: it takes a second, and evaluation, which reads rows, does not need it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.path, self.event, self.summary = folder, event_pb2.Event, summary_pb2.Summary
        with report_write_errors(folder):
            self.file = EventsWriter(str(folder / "events"))
        # TensorBoard then ignores what a killed run wrote about this step and later ones.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(start_step, session_log=session)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self.summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._write(step, summary=self.summary(value=scalars))

    def _write(self, step: int, **content: Any) -> None:
        with report_write_errors(self.path):
            self.file.write_event(self.event(wall_time=time.time(), step=step, **content))
            self.file.flush()

    def close(self) -> None:
        # Only a row that could not be written is still in the buffer, and it has been reported.
        with contextlib.suppress(OSError):
            self.file.close()


# Files -------------------------------------------------------------------------------------------


def encode_json(value: Any, **options: Any) -> str:
    """Returns strict JSON, which every other program can read.

    NaN and infinities, which JSON does not have, become null. `options` are those of `json.dumps`.

    >>> encode_json({"loss": float("nan"), "bounds": (0.5, float("inf"))})
    '{"loss": null, "bounds": [0.5, null]}'
    """

    def replace(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {name: replace(content) for name, content in item.items()}
        if isinstance(item, list | tuple):
            return [replace(content) for content in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(replace(value), allow_nan=False, **options)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, or [] if there is none; null becomes NaN.

    A line that a killed process left unfinished is skipped.

    Raises:
      UserError: the file is there and cannot be read.
    """
    try:
        content = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); remove the cause and repeat the command"
        ) from error
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("step"), int)
    ]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all; text is encoded as UTF-8.

    The content goes to a temporary file next to `path`, which is then renamed. If writing fails,
    `path` is unchanged and the temporary file is removed.

    Raises:
      UserError: the disk is full, the folder cannot be written, and whatever else the system says.
    """
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the context ends without an exception.

    Raises:
      UserError: as `write_atomically`.
    """
    # In the same folder, since a rename is atomic only within one file system. The number of the
    # process keeps two evaluations apart that write into one folder.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with report_write_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about writing `path` into a sentence for the user.

    Raises:
      UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free disk space and repeat the command" if is_full else "choose another folder"
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); {remedy}"
        ) from error

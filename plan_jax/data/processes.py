"""Reader processes of the loader: how they start, and how they end with the run.

grain starts each of them as a new Python process, which imports the user's script.
"""

import contextlib
import errno
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from absl import flags

from plan_jax.types import UserError

# Ctrl-C and a closed terminal reach all processes that a terminal has started.
TERMINAL_SIGNALS = {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}
# Exit code of a reader process whose script would start the run once more.
UNGUARDED = 78
REMEDY = "set config.data.workers=0"
FULL = (errno.ENOSPC, errno.ENOMEM)


def check_script(num_workers: int) -> None:
    """Checks that this process can start reader processes, and that they can import its script.

    Raises:
      UserError: it cannot because it is daemonic, or they cannot because the script is not a file.
      SystemExit: this is itself a reader process, importing a script that starts a run.
    """
    leave_worker()
    if multiprocessing.current_process().daemon:
        raise UserError(
            f"config.data.workers is {num_workers}, and a daemonic process starts no others; "
            f"{REMEDY}"
        )
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path and getattr(main, "__spec__", None) is None and not Path(path).exists():
        raise UserError(
            f"config.data.workers is {num_workers}, which needs a script with "
            f'`if __name__ == "__main__":`, and {path} is not a file; {REMEDY}'
        )


def leave_worker() -> None:
    """Ends this process if it is a reader process that is importing the user's script.

    Without `if __name__ == "__main__":` the script would start a run in every reader process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(UNGUARDED)


def prepare(index: int = 0, count: int = 1) -> None:
    """Lets this reader process ignore the terminal, and end with the process that started it.

    The parent handles Ctrl-C. It may also be killed, and then nobody tells its readers to stop.
    """
    del index, count  # grain passes them
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


def read_first(iterator: Iterator[Any]) -> Any:
    """Returns the first element of an iterator, which starts its reader processes now."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which a notebook never parses
    _start_quiet_tracker()
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def read() -> None:
        # A process inherits the signals that are blocked in the thread that starts it. So Ctrl-C
        # does not reach readers that have not come to `prepare` yet.
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
        try:
            results.put((next(iterator), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=read, name="read_first", daemon=True).start()
    element, error = results.get()
    if error is not None:
        raise error
    return element


def _start_quiet_tracker() -> None:
    """Starts the process that frees shared memory, without its list of what was left to free."""
    previous = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["PYTHONWARNINGS"]
        if previous is not None:
            os.environ["PYTHONWARNINGS"] = previous


def explain(error: Exception, num_workers: int) -> UserError | None:
    """Returns the sentence for a reader process that failed or ended; None for other errors."""
    if num_workers and isinstance(error, OSError) and error.errno in FULL:
        return UserError(
            f"the shared memory of {num_workers} reader processes is full ({error.strerror}); "
            f"enlarge it, as with `docker run --shm-size=8g`, or {REMEDY}"
        )
    match = re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))
    if not match:
        return None
    code = int(match[1])
    if code == UNGUARDED:
        return UserError(
            f"config.data.workers is {num_workers}, and this script starts a run when it is "
            f'imported; put the call under `if __name__ == "__main__":`, or {REMEDY}'
        )
    cause = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            cause = signal.Signals(-code).name
    hints = {"SIGKILL": "lack of memory", "SIGBUS": "lack of shared memory"}
    hint = f", as for {hints[cause]}" if cause in hints else ""
    return UserError(
        f"one of {num_workers} reader processes was ended ({cause}{hint}); the same command "
        f"resumes; use fewer config.data.workers, or {REMEDY}"
    )

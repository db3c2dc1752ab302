"""Exit codes, signals, and output that nobody can read any more: common to all commands.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) end a command at once. Nothing is unwound:
files are complete or absent at any moment, and an exception that arises while XLA calls Python ends
in a segmentation fault. While a `StopSignal` is open, the first signal only requests a stop, so
that training can save its state.
"""

import builtins
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# SIGHUP does not exist on Windows.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
REPEATED = 1.0  # seconds in which SIGTERM and SIGHUP count once
BROKEN_PIPE = 13  # the number of SIGPIPE: a pipe without a reader requests a stop like a signal
# What the system says of a path or a disk, which no change of this program would mend.
SYSTEM_ERRORS = tuple(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENFILE"),
        *("ENAMETOOLONG", "ELOOP", "EFBIG"),
    )
    if hasattr(errno, name)
)


class _Process:
    """How this process takes signals; it has only one set of handlers."""

    def __init__(self) -> None:
        self.stops: list[StopSignal] = []
        self.is_listening = False
        self.number = 0  # of the signal that training has handled
        self.description, self.is_saved = "", False
        self.cleanups: list[Callable[[], None]] = []


_process = _Process()


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit code.

    The code is 0, 2 for a user's mistake and for what the system says (one sentence on stderr), 1
    for training that diverged (one sentence too), and 128 + n after signal n. It is 0 after SIGTERM
    if the same command continues.
    """
    # Imported here: it takes seconds, and signals have to be handled before.
    from plan_jax.types import UserError

    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # the stream of a notebook
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    stderr = sys.stderr
    if not isinstance(stderr, _TolerantStream):  # that of a run in another thread
        sys.stderr = _TolerantStream(stderr)
    run_stderr = sys.stderr
    _process.number = 0
    describe_interruption("")
    try:
        with warnings.catch_warnings():
            # Warnings of other packages are not the user's to correct.
            if any(map(_is_strict, warnings.filters)):
                warnings.simplefilter("default")
            command()
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        _flush_output()
        return error.exit_code
    except KeyboardInterrupt:
        print(_interruption(), file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as of `| head`, which has read enough
        _flush_output()
    except OSError as error:
        # A closed terminal fails like a disk that does not answer.
        if error.errno != errno.EIO or not _is_terminal_closed():
            print(_describe_system_error(error), file=sys.stderr)
            _flush_output()
            return 2
    finally:
        if sys.stderr is run_stderr:
            sys.stderr = stderr
    return _exit_code(_process.number, is_saved=True) if _process.number else 0


def _is_strict(warning_filter: tuple) -> bool:
    """Returns whether a filter turns a deprecation into an error, as `python -W error` does."""
    action, _, category, *_ = warning_filter
    # A notebook has filters of this kind for warnings of its own.
    return action == "error" and issubclass(DeprecationWarning, category)


def _describe_system_error(error: OSError) -> str:
    """Returns the sentence for what the system says; raises an error that is a bug."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the output"
        return f"{place} cannot be written ({error.strerror}); free disk space"
    if error.errno not in SYSTEM_ERRORS:
        raise error
    place = error.filename or "a file"
    return f"{place} cannot be read or written ({error.strerror}); remove the cause and repeat"


def describe_interruption(description: str, *, is_saved: bool = False) -> None:
    """Sets what a signal says from now on when it ends the process.

    Args:
      description: what is not lost, and what continues; the second half of a sentence.
      is_saved: whether the same command continues, so that SIGTERM is no failure.
    """
    _process.description, _process.is_saved = description, is_saved


def call_at_end(clean: Callable[[], None]) -> None:
    """Lets a signal that ends this process call a function first, as to delete temporary files."""
    _process.cleanups.append(clean)


# Signals -----------------------------------------------------------------------------------------


def end_on_signals(caller: FrameType | None = None) -> None:
    """Lets signals end this process from now on, at any moment and without a traceback.

    The process must be that of the module of `caller`, by default of the module that calls this. In
    a notebook or another program, which go on afterwards, nothing changes.

    A thread receives them. Python runs handlers in the main thread only, between two of its
    instructions, and while XLA compiles that can take minutes.
    """
    if not _is_program(caller or sys._getframe(1)) or not _install(lambda *_: None):
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The thread owns the writer too: it would be closed once it is collected.
    arguments = (reader, writer)
    threading.Thread(target=_receive_signals, args=arguments, name="signals", daemon=True).start()
    _process.is_listening = True


def owns_process() -> bool:
    """Returns whether this process ends with its command, unlike that of a notebook."""
    return _process.is_listening


def _is_program(frame: FrameType) -> bool:
    """Returns whether the module of a frame is the program that this process runs."""
    if _is_notebook() or hasattr(sys, "ps1") or sys.flags.interactive:
        return False
    variables = frame.f_globals
    while frame.f_back:
        frame = frame.f_back
    # `python -m` begins in runpy, by whose other functions a program runs a module inside itself.
    is_outermost = frame.f_globals is variables or frame.f_code.co_name == "_run_module_as_main"
    return is_outermost and vars(sys.modules["__main__"]) is variables


def _is_notebook() -> bool:
    return hasattr(builtins, "__IPYTHON__")


class StopSignal:
    """Remembers the signal that arrives between `start` and its end; a context manager.

    A second one ends the process at once. `timeout` and other senders signal a process and its
    group, so a second SIGTERM or SIGHUP within REPEATED seconds is the same request.

    Attributes:
      number: the number of the signal, 0 if there was none.
    """

    def __init__(self) -> None:
        """Starts without a signal."""
        self.number, self.time = 0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Changes nothing yet."""
        return self

    def start(self) -> None:
        """Waits for signals from now on, which so far have ended the process."""
        if not _process.is_listening:
            self._previous = _install(self._handle)
        _process.stops.append(self)

    def __exit__(self, *_: object) -> None:
        """Restores the previous handlers."""
        if self in _process.stops:
            _process.stops.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(self, number: int) -> bool:
        """Remembers a signal; returns False for a second one, which does not wait.

        A pipe without a reader is not a signal of the user, and the first one still comes.
        """
        if self.number and (self.number != BROKEN_PIPE or number == BROKEN_PIPE):
            is_repeated = time.monotonic() - self.time < REPEATED
            return number == BROKEN_PIPE or (is_repeated and number != signal.SIGINT)
        self.number, self.time = number, time.monotonic()
        _process.number = number
        again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
        _print_line(f"stopping after this step, whose state is saved{again}")
        return True

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.receive(number):
            raise KeyboardInterrupt


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Installs a handler of the signals that end a command; returns the previous ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may; nobody signals a thread of a notebook
    # What `nohup` and the background jobs of a shell ignore stays ignored.
    numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _receive_signals(reader: socket.socket, _: socket.socket) -> None:
    while True:
        for number in reader.recv(16):
            stop = _process.stops[-1] if _process.stops else None
            if number not in STOP_SIGNALS or (stop and stop.receive(number)):
                continue
            _print_line(_interruption())
            for clean in _process.cleanups:
                with contextlib.suppress(Exception):
                    clean()
            os._exit(_exit_code(number, is_saved=_process.is_saved and not stop))


def _interruption() -> str:
    description = _process.description
    if _process.stops:
        description = "the same command resumes from the last checkpoint"
    return f"interrupted; {description}" if description else "interrupted"


def _exit_code(number: int, is_saved: bool) -> int:
    return 0 if is_saved and number == signal.SIGTERM else 128 + number


def _print_line(sentence: str) -> None:
    """Prints a line on stderr, without the locks that the main thread may hold."""
    from tqdm import tqdm

    # A progress bar leaves the cursor behind itself.
    start = "\n" if getattr(tqdm, "_instances", None) else ""
    if _is_notebook():
        sys.stderr.write(f"{start}{sentence}\n")  # a stream without a file, and without such locks
        return
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{start}{sentence}\n".encode())


# Output ------------------------------------------------------------------------------------------


class _TolerantStream:
    """A stream whose errors end nothing: a terminal may be closed, and the reader of a pipe gone.

    Training whose output nobody reads any more saves its state and ends.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._tolerate():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerate():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerate(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            for stop in _process.stops:
                stop.receive(BROKEN_PIPE)
        except OSError:
            pass


def _open_closed_streams() -> None:
    """Opens a sink for each of stdin, stdout and stderr that the caller has closed.

    Otherwise the next file takes its number, and what libraries print goes into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _flush_output() -> None:
    """Flushes stdout, or drops what it cannot write: the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_terminal_closed() -> bool:
    """Returns whether stdout is a terminal that has been closed."""
    try:
        os.write(sys.stdout.fileno(), b"")
    except OSError as error:
        return error.errno == errno.EIO  # a stream without a number has no such error
    return False

"""Exit codes, signals, and output that nobody reads: what all commands share."""

import builtins
import errno
import os
import pty
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from plan_jax import command
from plan_jax.types import DivergedError, UserError

ROOT = Path(__file__).resolve().parent.parent
# A command in its own process: signals end it at once. `{body}` is what it does.
SCRIPT = """
import signal, sys, time
from plan_jax import command

def body():
    {body}

command.end_on_signals()
sys.exit(command.run(body))
"""


def start(body, *, before="", **options):
    """Starts a command in its own process."""
    script = before + SCRIPT.format(body=body)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **streams)


def raising(error):
    """Returns a command that raises an error."""

    def body():
        raise error

    return body


def test_exit_codes(capsys):
    assert command.run(lambda: None) == 0
    assert command.run(raising(UserError("batch 3 is odd; use 4"))) == 2
    assert capsys.readouterr().err == "batch 3 is odd; use 4\n"
    assert command.run(raising(DivergedError("the loss is not finite; lower the rate"))) == 1
    assert capsys.readouterr().err == "the loss is not finite; lower the rate\n"
    full = OSError(errno.ENOSPC, "No space left on device", "run/x")
    assert command.run(raising(full)) == 2
    assert capsys.readouterr().err == (
        "run/x cannot be written (No space left on device); free disk space\n"
    )
    assert command.run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        command.run(raising(ZeroDivisionError()))
    with pytest.raises(OSError, match="mistake"):
        command.run(raising(OSError(errno.EINVAL, "mistake")))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO, errno.EROFS])
def test_what_the_system_says_of_a_path_is_one_sentence(number, capsys):
    assert command.run(raising(OSError(number, os.strerror(number), "run/x"))) == 2
    assert capsys.readouterr().err == (
        f"run/x cannot be read or written ({os.strerror(number)}); remove the cause and repeat\n"
    )


@pytest.mark.parametrize(
    ("name", "is_saved", "code"),
    [("SIGINT", False, 130), ("SIGTERM", False, 143), ("SIGHUP", True, 129), ("SIGTERM", True, 0)],
)
def test_a_signal_ends_a_command_at_once(name, is_saved, code):
    # Almost all of the time in C, where Python runs no handler, as while XLA compiles.
    body = (
        f"command.describe_interruption('no results were written', is_saved={is_saved});"
        "import ctypes; print('ready', flush=True);"
        "[ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    )
    process = start(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err == "interrupted; no results were written\n"


def test_training_survives_a_signal_that_is_sent_twice_and_not_a_second_ctrl_c():
    body = (
        "stop = command.StopSignal(); stop.start(); signal.raise_signal(signal.SIGTERM)\n"
        "    while not stop.number: time.sleep(0.01)\n"
        "    print(stop.number, flush=True); signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(0.1); signal.raise_signal(signal.SIGINT); time.sleep(60)"
    )
    process = start(body)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, f"{signal.SIGTERM:d}\n")
    assert err == (
        "stopping after this step, whose state is saved\n"
        "interrupted; the same command resumes from the last checkpoint\n"
    )


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_training_does_not_survive_a_second_signal_that_comes_later(name, code):
    body = (
        "command.REPEATED = 0.2; stop = command.StopSignal(); stop.start()\n"
        "    signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGTERM)\n"
        f"    time.sleep(0.5); print('goes on', flush=True); signal.raise_signal(signal.{name})\n"
        "    time.sleep(60)"
    )
    process = start(body)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "goes on\n")
    assert err.endswith("interrupted; the same command resumes from the last checkpoint\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 0), ("SIGHUP", 129)])
def test_a_signal_is_remembered_until_the_state_is_saved(name, code, capfd):
    number = getattr(signal, name)
    handler = signal.getsignal(number)

    def body():
        with command.StopSignal() as stop:
            stop.start()
            signal.raise_signal(number)
            assert stop.number == number

    assert command.run(body) == code
    assert "stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_ctrl_c_interrupts_also_outside_of_a_command(name):
    with command.StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        stop.start()
        signal.raise_signal(getattr(signal, name))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.number == getattr(signal, name)


def test_what_nohup_ignores_stays_ignored():
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start("signal.raise_signal(signal.SIGHUP); print('alive')", before=before)
    assert process.communicate(timeout=60) == ("alive\n", "")
    assert process.returncode == 0


# Inside of another program ------------------------------------------------------------------------

SIGNALS_AFTER_RUNPY = """
import runpy, signal, sys
handler = signal.getsignal(signal.SIGINT)
sys.argv = ["main", "--help"]
try:
    runpy.run_module("plan_jax.main", run_name="__main__", alter_sys={alter_sys})
except SystemExit as end:
    assert end.code == 0
assert signal.getsignal(signal.SIGINT) is handler and signal.set_wakeup_fd(-1) == -1
"""


def test_what_is_registered_is_called_before_a_signal_ends_the_process():
    body = "command.call_at_end(lambda: 1 / 0); command.call_at_end(lambda: print('x', flush=True))"
    process = start(f"{body}; print('here', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("x\n", "interrupted\n")
    assert process.returncode == 143


@pytest.mark.parametrize("alter_sys", [False, True])
def test_a_program_that_runs_the_module_keeps_its_signals(alter_sys):
    script = SIGNALS_AFTER_RUNPY.format(alter_sys=alter_sys)
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("setting", ["builtins.__IPYTHON__", "sys.ps1"])
def test_an_interactive_interpreter_keeps_its_signals(setting):
    before = f"import builtins, sys; {setting} = True\n"
    process = start("signal.raise_signal(signal.SIGINT)", before=before)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")  # by Python's own KeyboardInterrupt
    body = "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert start(body, before=before).wait(timeout=60) == 0


def test_runs_in_two_threads_leave_the_streams_as_they_were():
    stream, is_inside, may_end = sys.stderr, threading.Event(), threading.Event()

    def wait():
        is_inside.set()
        may_end.wait(60)

    thread = threading.Thread(target=command.run, args=[wait])
    thread.start()
    is_inside.wait(60)
    # The second run ends after the first, so each would restore what it has seen at its start.
    assert command.run(lambda: (may_end.set(), thread.join(60))) == 0
    assert sys.stderr is stream


# Output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_read_enough_ends_the_output_quietly(stream):
    reader, writer = os.pipe()
    os.close(reader)
    body = f"print('line' * 100000, file=sys.{stream})"
    process = start(body, **{stream: writer})
    os.close(writer)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out or "", err or "") == (0, "", "")


def test_training_whose_output_nobody_reads_is_saved():
    reader, writer = os.pipe()
    os.close(reader)
    body = (
        "stop = command.StopSignal(); stop.start(); print('loss', file=sys.stderr, flush=True);"
        "print(stop.number)"
    )
    process = start(body, stderr=writer)
    os.close(writer)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + command.BROKEN_PIPE, f"{command.BROKEN_PIPE}\n")


def test_a_signal_after_a_closed_pipe_is_the_first(monkeypatch, capfd):
    monkeypatch.setattr(command, "REPEATED", 0.0)
    stop = command.StopSignal()
    answers = [stop.receive(number) for number in (command.BROKEN_PIPE,) * 2]
    assert answers == [True, True] and stop.number == command.BROKEN_PIPE
    assert stop.receive(signal.SIGHUP) and stop.number == signal.SIGHUP
    assert stop.receive(command.BROKEN_PIPE) and not stop.receive(signal.SIGHUP)
    assert capfd.readouterr().err.count("stopping after this step") == 2


def test_closed_streams_do_not_give_their_number_to_a_file(tmp_path):
    body = f"print('lost'); print('lost', file=sys.stderr); f = open({str(tmp_path / 'x')!r}, 'w')"
    body += f"; open({str(tmp_path / 'numbers')!r}, 'w').write(str(f.fileno()))"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=body))
    shell = f'exec "{sys.executable}" "{script}" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", shell], env=environment).returncode == 0
    assert int((tmp_path / "numbers").read_text()) > 2
    assert (tmp_path / "x").read_text() == ""


@pytest.mark.parametrize("ending", ["", "; sys.stdout.flush()"])
def test_a_terminal_that_is_closed_ends_the_output_quietly(ending):
    terminal, output = pty.openpty()
    body = f"sys.stdin.readline(); print('result' * 99){ending}"
    process = start(body, stdin=subprocess.PIPE, stdout=output)
    os.close(output)
    os.close(terminal)
    _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")


def test_a_disk_that_does_not_answer_is_no_closed_terminal():
    process = start("raise OSError(5, 'Input/output error')")
    _, err = process.communicate(timeout=60)
    sentence = "a file cannot be read or written (Input/output error); remove the cause and repeat"
    assert (process.returncode, err) == (2, f"{sentence}\n")


def test_a_name_that_the_output_cannot_encode_is_written_in_ascii():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start("print('runs/' + chr(246))", env=environment)
    assert process.communicate(timeout=60) == ("runs/\\xf6\n", "")
    assert process.returncode == 0


def test_a_full_disk_behind_the_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = start("print('result')", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "the output cannot be written (No space left on device); free disk space\n"


def test_a_notebook_shows_what_a_signal_says(monkeypatch, capsys):
    """Its stderr has no file that the front end would read."""
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 99, raising=False)
    with command.StopSignal() as stop:
        assert stop.receive(signal.SIGINT)
    assert capsys.readouterr().err.strip() == (
        "stopping after this step, whose state is saved; press Ctrl-C again to end at once"
    )


def test_a_notebook_that_hides_deprecations_still_does():
    """IPython has filters that turn warnings of its own into errors."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=FutureWarning)
        assert command.run(lambda: warnings.warn("theirs", DeprecationWarning, 2)) == 0
    assert not shown


def test_warnings_of_other_packages_are_no_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.warns(DeprecationWarning, match="theirs"):
            assert command.run(lambda: warnings.warn("theirs", DeprecationWarning, 2)) == 0
        with pytest.raises(DeprecationWarning):  # the filters are as before
            warnings.warn("ours", DeprecationWarning, stacklevel=1)

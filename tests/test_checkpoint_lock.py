"""The lock of a run's folder: the second run ends with a sentence and the first is undisturbed."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from plan_jax import checkpoint, parallel
from plan_jax.checkpoint import lock
from plan_jax.types import UserError

HOLD = """
import pathlib, sys, time
from plan_jax.checkpoint import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
REFUSAL = r"workdir .*{} is in use by process {} on {}( since [\d-]+ [\d:]+)?; pass another --w"


def write_owner(workdir, pid, host=None):
    workdir.mkdir(exist_ok=True)
    owner = {"pid": pid, "host": host or socket.gethostname()}
    (workdir / lock.FILE).write_text(json.dumps(owner))


@pytest.fixture
def ended_process():
    """The number of a process that does not exist any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def without_locks(monkeypatch):
    """A file system without locks, as some network mounts are."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    """The sentence names the other process, and the system releases the lock of a killed one."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "locked\n"
        refusal = REFUSAL.format("/run", run.pid, socket.gethostname())
        with pytest.raises(UserError, match=refusal), checkpoint.lock_workdir(tmp_path / "run"):
            pass
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    with checkpoint.lock_workdir(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / lock.FILE).read_text())
        assert 0 <= time.time() - owner.pop("time") < 60
        assert owner == {"pid": os.getpid(), "host": socket.gethostname()}


def test_the_lock_ends_with_its_block(tmp_path):
    """Also if the run fails; and the same folder under another path is the same folder."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), checkpoint.lock_workdir(tmp_path / "run"):
        refusal = REFUSAL.format("/link", os.getpid(), socket.gethostname())
        with pytest.raises(UserError, match=refusal), checkpoint.lock_workdir(tmp_path / "link"):
            pass
        raise ZeroDivisionError
    with checkpoint.lock_workdir(tmp_path / "link"):
        pass


def test_only_the_main_process_of_a_run_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    monkeypatch.setattr(parallel, "gather_strings", lambda _: ['[null, ""]', ""])
    with checkpoint.lock_workdir(tmp_path / "run"), checkpoint.lock_workdir(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
    # Where the main process is refused, no other one waits for it.
    monkeypatch.setattr(parallel, "gather_strings", lambda _: ['[null, "it is in use"]', ""])
    with pytest.raises(UserError, match="in use"), checkpoint.lock_workdir(tmp_path / "run"):
        pass


@pytest.mark.parametrize("host", [None, "another-host"])
def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path, without_locks, ended_process, host, capsys
):
    write_owner(tmp_path, ended_process, host)
    before = time.time() - 2 * lock.STALE
    os.utime(tmp_path / lock.FILE, (before, before))
    with checkpoint.lock_workdir(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    sentence = f"workdir {tmp_path} is on a file system without locks; start no second run in it\n"
    assert capsys.readouterr() == ("", sentence)


def test_without_locks_a_second_run_on_the_same_host_is_refused(tmp_path, without_locks):
    write_owner(tmp_path, os.getppid())
    refusal = REFUSAL.format(tmp_path.name, os.getppid(), socket.gethostname())
    with pytest.raises(UserError, match=refusal), checkpoint.lock_workdir(tmp_path):
        pass


def test_without_locks_a_run_on_another_host_renews_its_file(tmp_path, without_locks, monkeypatch):
    write_owner(tmp_path, 7, "another-host")
    refusal = REFUSAL.format(tmp_path.name, 7, "another-host")
    with pytest.raises(UserError, match=refusal), checkpoint.lock_workdir(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
    (tmp_path / lock.FILE).unlink()
    monkeypatch.setattr(lock, "RENEWAL", 0.01)
    with checkpoint.lock_workdir(tmp_path):
        os.utime(tmp_path / lock.FILE, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / lock.FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
            pass
        assert (tmp_path / lock.FILE).stat().st_mtime > 0
    assert not (tmp_path / lock.FILE).exists()
    with checkpoint.lock_workdir(tmp_path):
        write_owner(tmp_path, 7, "another-host")  # to which this process seemed stale
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == 7


def test_without_locks_one_of_two_runs_at_once_is_refused(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: write_owner(tmp_path, os.getppid()))
    with pytest.raises(UserError, match="is in use by process"), checkpoint.lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "7"}', '{"pid": -1}'])
def test_a_damaged_lock_file_is_no_owner(tmp_path, without_locks, content):
    (tmp_path / lock.FILE).write_text(content)
    with checkpoint.lock_workdir(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    sentence = "file/run cannot be written .Not a directory.; choose another folder"
    with pytest.raises(UserError, match=sentence), checkpoint.lock_workdir(tmp_path / "file/run"):
        pass


def test_a_name_that_the_locale_cannot_read(tmp_path):
    """Python would find the folder, and the C++ of tensorstore another one or none."""
    workdir = tmp_path / os.fsencode("läuft").decode("ascii", "surrogateescape")
    sentence = "läuft has a name that this locale cannot read; set PYTHONUTF8=1, or rename"
    with pytest.raises(UserError, match=sentence), checkpoint.lock_workdir(workdir):
        pass
    for read in (checkpoint.open_manager, checkpoint.load_weights):
        with pytest.raises(UserError, match=sentence):
            read(workdir)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["[x]", "lr=[0.1]", "a*", "a?", "a\\b"])
def test_a_name_that_is_a_pattern(tmp_path, name):
    """Orbax searches for the files of a state by a pattern, and would find none or others."""
    sentence = (
        re.escape(name)
        + "(/checkpoints)? has . in its name, where no checkpoint can be saved; use an"
    )
    with pytest.raises(UserError, match=sentence), checkpoint.lock_workdir(tmp_path / name):
        pass
    with pytest.raises(UserError, match=sentence):
        checkpoint.open_manager(tmp_path / name / "checkpoints")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "ä", "日本", "a'b", 'a"b', "{y}", "~"])
def test_any_other_name(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    manager = checkpoint.open_manager(folder)
    checkpoint.save(manager, 1, {"params": {"a": np.arange(3)}}, {}, {})
    checkpoint.close(manager)
    assert checkpoint.load_weights(tmp_path / name)["params"]["a"].tolist() == [0, 1, 2]

"""The log of a run: rows survive a kill, the remaining time leaves the compile out."""

import builtins
import errno
import json
import math
import os
import struct
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from plan_jax import parallel
from plan_jax.logger import Logger, read_rows, write_atomically
from plan_jax.types import UserError

CONFIG = {"method": "plan", "steps": 101}


class Clock:
    """A clock that is advanced by hand, in place of tqdm's."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.seconds)

    def advance(self, seconds):
        self.seconds += seconds


def remaining_time(logger):
    """The remaining time that the bar prints, such as `01:40`; `?` if it is unknown."""
    return str(logger.bar).split("<")[1].split(",")[0]


def last_refresh(capsys):
    """The number of steps in the newest line that the bar printed, or None if it printed none."""
    lines = [line for line in capsys.readouterr().err.split("\r") if "/101 [" in line]
    return int(lines[-1].split("|")[-1].split("/")[0]) if lines else None


def test_remaining_time_leaves_out_the_compile(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Logger(tmp_path, CONFIG, 101) as logger:
        clock.advance(40)  # the first step compiles for 40 seconds
        logger.advance()
        assert remaining_time(logger) == "?"
        clock.advance(2)
        logger.advance()
        assert remaining_time(logger) == "03:18"  # 99 steps of 2 seconds
        for _ in range(9):
            clock.advance(0.2)
            logger.advance()
        assert remaining_time(logger) == "00:34"  # 90 steps at the mean of 10 steps, 0.38 s


def test_remaining_time_of_a_resumed_run(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Logger(tmp_path, CONFIG, 101, start_step=50) as logger:
        clock.advance(40)
        logger.advance()
        clock.advance(1)
        logger.advance()
        assert remaining_time(logger) == "00:49"


def test_bar_refreshes_by_time(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Logger(tmp_path, CONFIG, 101) as logger:
        clock.advance(40)
        logger.advance()
        assert last_refresh(capsys) == 1
        for _ in range(30):  # 19.5 s in a log file, which gets a line every 20 s
            clock.advance(0.65)
            logger.advance()
        logger.log(31, {"loss": 1.0})
        assert last_refresh(capsys) is None
        clock.advance(0.65)
        logger.advance()
        assert last_refresh(capsys) == 32
        clock.advance(60)  # a validation does not change how many steps make a refresh
        logger.advance()
        assert last_refresh(capsys) == 33
        clock.advance(20)
        logger.advance()
        assert last_refresh(capsys) == 34


def test_a_notebook_refreshes_the_bar_as_a_terminal_does(tmp_path, monkeypatch):
    """A notebook replaces what it shows, as a terminal does; a log file keeps every line."""
    with Logger(tmp_path / "file", {}, 3) as logger:
        assert logger.bar.mininterval == 20
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with Logger(tmp_path / "notebook", {}, 3) as logger:
        assert logger.bar.mininterval == 0.5


def test_rows_of_later_steps_are_dropped_on_resumption(tmp_path):
    with Logger(tmp_path, CONFIG, 101) as logger:
        for step in (10, 20, 30):
            logger.log(step, {"loss": 1 / step, "images_per_s": 5})
        assert "loss 0.033, 5 images/s" in str(logger.bar)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a row
    with Logger(tmp_path, CONFIG, 101, start_step=20) as logger:
        assert [row["step"] for row in logger.history] == [10, 20]
        logger.log(30, {"loss": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == logger.history
    assert logger.history[-1] == {"step": 30, "loss": 0.5}
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert list((tmp_path / "tensorboard").iterdir())


def test_only_the_main_process_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    with Logger(tmp_path / "run", CONFIG, 101) as logger:
        logger.advance()
        logger.log(1, {"loss": 1.0})
        logger.info("hello")
    assert not (tmp_path / "run").exists() and logger.history == []
    assert capsys.readouterr() == ("", "")


def test_info_prints_a_whole_line_above_the_bar(tmp_path, capsys):
    with Logger(tmp_path, CONFIG, 101) as logger:
        capsys.readouterr()
        logger.info("resumed at step 5")
        assert "\rresumed at step 5\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/run.* cannot be written .Not a dir.*; choose another folder"
    ):
        Logger(tmp_path / "file" / "run", CONFIG, 101)


@pytest.mark.parametrize("content", ["ä\n", b"\x00\xff\r\n"])
def test_atomic_write(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")  # a lone surrogate has no UTF-8 encoding
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"/folder cannot be written \(Is a dir.*; choose another"):
        write_atomically(tmp_path / "folder", "new")  # a rename cannot replace a folder
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.txt", "folder"]


def raise_disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", raise_disk_full)
    sentence = r"metrics.json cannot be written \(No space left on device\); free disk space"
    with pytest.raises(UserError, match=sentence):
        write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("target", "name"), [("pathlib.Path.open", "metrics.jsonl"), ("os.fsync", "tensorboard")]
)
def test_a_full_disk_ends_the_log_in_a_sentence(tmp_path, monkeypatch, target, name):
    with Logger(tmp_path, CONFIG, 101) as logger:
        monkeypatch.setattr(target, raise_disk_full)
        with pytest.raises(UserError, match=rf"/{name} cannot be written \(No space.*free disk"):
            logger.log(1, {"loss": 1.0})


def test_rows_reach_tensorboard(tmp_path):
    """The numbers are in the file at once, NaN included, and a resumption is marked."""
    with Logger(tmp_path, CONFIG, 101, start_step=4) as logger:
        logger.log(5, {"loss": 0.5, "a/b": math.nan})
        (path,) = (tmp_path / "tensorboard").iterdir()
        content, events = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert [event.step for event in events] == [0, 5, 5]
    assert events[1].session_log.status == event_pb2.SessionLog.START
    values = {value.tag: value.simple_value for value in events[2].summary.value}
    assert values["loss"] == 0.5 and math.isnan(values["a/b"]) and len(values) == 2


def test_rows_are_strict_json(tmp_path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    values = {"loss": math.nan, "rate": math.inf, "norm": -math.inf, "accuracy": 0.5}
    with Logger(tmp_path, CONFIG, 101) as logger:
        logger.log(1, values)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "loss": None, "rate": None, "norm": None, "accuracy": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["accuracy"]) == (1, 0.5) and math.isnan(row["loss"])
    with Logger(tmp_path, CONFIG, 101, start_step=1):
        assert (tmp_path / "metrics.jsonl").read_text() == line + "\n"


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "lo', b"\x00" * 40, b"\xff\xfe", b"7", b"[1]", b"{}"]
)
def test_what_a_killed_process_leaves_is_no_row(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n' + tail)
    with Logger(tmp_path, CONFIG, 101, start_step=1) as logger:
        assert [row["step"] for row in logger.history] == [1]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_a_log_that_cannot_be_read(tmp_path):
    """Its rows would be lost if the run went on."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read .Is a directory.; remove"):
        Logger(tmp_path, CONFIG, 101, start_step=1)


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """As two evaluations of one run do: the second does not remove what the first writes."""
    path = tmp_path / "metrics.json"
    replace, numbers = Path.replace, iter([1, 2])
    monkeypatch.setattr(os, "getpid", lambda: next(numbers))

    def write_meanwhile(temporary, target):
        monkeypatch.setattr(Path, "replace", replace)
        write_atomically(path, "second")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", write_meanwhile)
    write_atomically(path, "first")
    assert path.read_text() == "first" and [x.name for x in tmp_path.iterdir()] == ["metrics.json"]

"""The log of a run: rows survive a kill, the remaining time leaves the compile out."""

import json

import pytest

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
    with pytest.raises(UserError, match=r"workdir .*file/run cannot be written .*choose another"):
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
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "new")  # a rename cannot replace a folder
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.txt", "folder"]

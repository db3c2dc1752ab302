"""Copies of a run on another drive: complete or absent, verified, and enough to resume the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import pytest
from test_checkpoint import CONFIG, is_identical, make_state, save_run

from plan_jax import checkpoint, parallel
from plan_jax.checkpoint import copies, copy_repeatedly, copy_steps, restore_steps
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent


def make_config(seed=0):
    return CONFIG | {"seed": seed, "data": {"fingerprint": "f00d", "dir": "data"}}


def make_run(folder, steps=(1, 2, 3), seed=0):
    """Writes a run as training leaves it: checkpoints, config, metrics, TensorBoard, a lock."""
    config = make_config(seed)
    save_run(folder / "checkpoints", steps, config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in steps))
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard/events").write_bytes(b"rows")
    (folder / ".lock").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, to be copied before it is changed."""
    return make_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path):
    """A run of three steps of this test's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder):
    """Returns the bytes of all files below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_returns_from_its_copies_bit_for_bit(run, tmp_path):
    drive = tmp_path / "drive" / "run"
    assert copy_steps(run, drive) == [1, 2, 3]
    names = {path.name for path in drive.iterdir()}
    assert names == {"run.zip", "step-1.zip", "step-2.zip", "step-3.zip"}
    assert restore_steps(drive, tmp_path / "back") == 3
    assert contents(tmp_path / "back") == contents(run)
    manager = checkpoint.open_manager(tmp_path / "back/checkpoints")
    restored = checkpoint.restore(manager, jax.tree.map(jax.numpy.zeros_like, make_state(3)))
    checkpoint.close(manager)
    assert restored.step == 3 and restored.data == {"next": 3}
    assert is_identical(restored.state, make_state(3))


def test_a_second_copy_writes_only_what_is_new(run, tmp_path):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    times = {path.name: path.stat().st_mtime_ns for path in drive.iterdir()}
    assert copy_steps(run, drive) == []
    assert times == {path.name: path.stat().st_mtime_ns for path in drive.iterdir()}
    manager = checkpoint.open_manager(run / "checkpoints")
    checkpoint.save(manager, 4, make_state(4), {"next": 4}, CONFIG)
    checkpoint.close(manager)
    assert copy_steps(run, drive) == [4]
    # The run keeps three steps, and so does the folder.
    assert sorted(copies._list_archives(drive)) == [2, 3, 4]
    assert times["step-2.zip"] == (drive / "step-2.zip").stat().st_mtime_ns


def test_copies_of_a_restored_run_stay_as_they_are(run, tmp_path):
    drive, back = tmp_path / "drive", tmp_path / "back"
    copy_steps(run, drive)
    restore_steps(drive, back)
    assert copy_steps(back, drive) == []


def test_rows_of_metrics_reach_the_drive_before_their_step(run, tmp_path, monkeypatch):
    """A resumed run drops rows after its step, but cannot take a step again for its row."""
    order, write = [], copies._write_archive
    monkeypatch.setattr(
        copies, "_write_archive", lambda files, path: (order.append(path.name), write(files, path))
    )
    copy_steps(run, tmp_path / "drive")
    assert order == ["run.zip", "step-1.zip", "step-2.zip", "step-3.zip"]


def test_nothing_is_restored_over_a_newer_run(run, tmp_path):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    (run / "metrics.jsonl").write_text('{"step": 3, "newer": 1}\n')
    before = contents(run)
    assert restore_steps(drive, run) == 3
    assert contents(run) == before


def test_an_older_run_is_completed(run, tmp_path):
    drive, older = tmp_path / "drive", tmp_path / "older"
    copy_steps(run, drive)
    shutil.copytree(run, older)
    shutil.rmtree(older / "checkpoints/3")
    (older / "metrics.jsonl").write_text('{"step": 2}\n')
    assert restore_steps(drive, older) == 3
    assert contents(older) == contents(run)


def test_nothing_to_restore_is_no_mistake(tmp_path):
    assert restore_steps(tmp_path / "missing", tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_a_damaged_archive_is_left_out(run, tmp_path, capsys):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    archive = bytearray((drive / "step-3.zip").read_bytes())
    archive[len(archive) // 2] ^= 1
    (drive / "step-3.zip").write_bytes(archive)
    assert restore_steps(drive, tmp_path / "back") == 2
    assert re.search(
        r"copy .*step-3.zip is left out \(.* has another checksum\)", capsys.readouterr().err
    )
    assert not list((tmp_path / "back").glob("checkpoints/3*"))


@pytest.mark.parametrize(
    ("position", "byte"), [(6, 255), (8, 0x20), (8, 0x40), (10, 8), (10, 12), (10, 14), (10, 99)]
)
def test_a_damaged_list_of_files_is_left_out(run, tmp_path, capsys, position, byte):
    """Version, flags or method of an entry, for which zipfile raises other errors than its own."""
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    archive = bytearray((drive / "step-3.zip").read_bytes())
    with zipfile.ZipFile(drive / "step-3.zip") as file:
        starts = [archive.index(b"PK\x01\x02", file.start_dir)]
    while (start := archive.find(b"PK\x01\x02", starts[-1] + 4)) > 0:
        starts.append(start)
    for start in starts:
        archive[start + position] = byte
    (drive / "step-3.zip").write_bytes(archive)
    assert copies._read_archived_config(drive)["seed"] == 0  # that of step 2
    assert restore_steps(drive, tmp_path / "back") == 2
    assert "step-3.zip is left out (" in capsys.readouterr().err
    copy_steps(run, drive)


def test_an_archive_that_was_cut_off_is_left_out_and_written_again(run, tmp_path, capsys):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    os.truncate(drive / "step-3.zip", 1000)
    assert restore_steps(drive, tmp_path / "back") == 2
    assert "left out" in capsys.readouterr().err
    assert copy_steps(run, drive) == [3]
    assert restore_steps(drive, tmp_path / "again") == 3


def test_the_files_of_a_run_are_written_again_if_their_archive_is_lost(run, tmp_path, capsys):
    """The steps alone resume the run, whose next copies are accepted."""
    drive, back = tmp_path / "drive", tmp_path / "back"
    copy_steps(run, drive)
    os.truncate(drive / "run.zip", 100)
    assert restore_steps(drive, back) == 3
    assert re.search("run.zip is left out", capsys.readouterr().err)
    assert not (back / "config.json").exists()
    shutil.copy(run / "config.json", back)  # as the resumed run writes it
    assert copy_steps(back, drive) == []
    with zipfile.ZipFile(drive / "run.zip") as archive:
        assert "config.json" in archive.namelist()


@pytest.mark.parametrize("name", ["../outside", "/outside", "state/../../outside", "a\\..\\b"])
def test_no_archive_writes_outside_of_its_run(run, tmp_path, capsys, name):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    with zipfile.ZipFile(drive / "step-9.zip", "w") as archive:
        archive.writestr(name, "content")
    assert restore_steps(drive, tmp_path / "back") == 3
    assert "is outside of the run" in capsys.readouterr().err
    assert not list(tmp_path.rglob("outside*"))


def test_a_broken_step_is_not_copied(run, tmp_path, capsys):
    (run / "checkpoints/3/state/_METADATA").unlink()
    assert copy_steps(run, tmp_path / "drive") == [1, 2]
    assert "was not copied" in capsys.readouterr().err


def test_a_step_that_the_run_deletes_meanwhile_is_passed_over(run, tmp_path, monkeypatch):
    add = copies._add_file

    def add_while_deleted(archive, name, file):
        if "/checkpoints/1/" in str(file):
            shutil.rmtree(run / "checkpoints/1", ignore_errors=True)
        add(archive, name, file)

    monkeypatch.setattr(copies, "_add_file", add_while_deleted)
    assert copy_steps(run, tmp_path / "drive") == [2, 3]
    assert not list((tmp_path / "drive").glob("*.part"))


def test_a_byte_that_the_drive_changes_is_noticed(run, tmp_path, monkeypatch):
    def sync_badly(stream):
        stream.flush()
        size = os.path.getsize(stream.name)
        with open(stream.name, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(copies, "_sync", sync_badly)
    with pytest.raises(UserError, match="is not what was written"):
        copy_steps(run, tmp_path / "drive")
    assert not list((tmp_path / "drive").iterdir())


COPY = """
import sys, time
from plan_jax.checkpoint import copies
add = getattr(copies, sys.argv[1])
def slowly(*arguments):
    print("at", flush=True)
    time.sleep(float(sys.argv[2]))
    return add(*arguments)
setattr(copies, sys.argv[1], slowly)
getattr(copies, sys.argv[3])(sys.argv[4], sys.argv[5])
"""


def kill_in_the_middle(function, slow, run, folder, lines):
    """Kills a process after it has called the slow function `lines` times."""
    process = subprocess.Popen(
        [sys.executable, "-c", COPY, slow, "0.05", function, str(run), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    for _ in range(lines):
        assert process.stdout.readline() == "at\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("lines", [1, 20])
def test_a_killed_copy_leaves_complete_archives_and_is_completed(run, tmp_path, lines):
    drive = tmp_path / "drive"
    kill_in_the_middle("copy_steps", "_add_file", run, drive, lines)
    for path in drive.glob("*.zip"):
        assert not copies._find_archive_fault(path)
    assert len(list(drive.glob("*.part"))) == 1
    complete = sorted(copies._list_archives(drive))
    assert sorted({1, 2, 3} - set(complete)) == copy_steps(run, drive)
    assert not list(drive.glob("*.part"))
    restore_steps(drive, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(run)


@pytest.mark.parametrize("lines", [1, 4])
def test_a_killed_restoration_leaves_complete_steps_and_is_completed(run, tmp_path, lines):
    drive, back = tmp_path / "drive", tmp_path / "back"
    copy_steps(run, drive)
    kill_in_the_middle("restore_steps", "_find_archive_fault", drive, back, lines)
    for step in (back / "checkpoints").glob("[0-9]*"):
        assert contents(step) == contents(run / "checkpoints" / step.name)
    assert restore_steps(drive, back) == 3
    assert contents(back) == contents(run)


@pytest.mark.parametrize("name", ["seed", "data.fingerprint"])
def test_a_folder_of_another_run_is_refused(run, tmp_path, name):
    drive, other = tmp_path / "drive", tmp_path / "other"
    copy_steps(run, drive)
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    change = {"seed": 1} if name == "seed" else {"data": {"fingerprint": "beef"}}
    (other / "config.json").write_text(json.dumps(config | change))
    shutil.rmtree(other / "checkpoints/3")
    for call in (lambda: copy_steps(other, drive), lambda: restore_steps(drive, other)):
        with pytest.raises(UserError, match=f"another run than .*, which differ in {name}; pass"):
            call()


def test_another_device_may_continue_the_run(run, tmp_path):
    drive, other = tmp_path / "drive", tmp_path / "other"
    copy_steps(run, drive)
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "log_every": 9}))
    assert copy_steps(other, drive) == []


def test_copies_are_not_replaced_by_a_run_that_began_anew(run, tmp_path):
    drive = tmp_path / "drive"
    copy_steps(run, drive)
    shutil.rmtree(run / "checkpoints/3")
    sentence = "has a copy of step 3, and run .* is at step 2; restore the copies first"
    with pytest.raises(UserError, match=sentence):
        copy_steps(run, drive)
    with pytest.raises(UserError, match="at step 0"), copy_repeatedly(tmp_path / "new", drive):
        raise AssertionError("the body must not begin")


@pytest.mark.parametrize(
    "folder, sentence",
    [
        ("gs://bucket/run", "is an address; pass a path on a local disk"),
        ("{run}/copies", "is inside of run"),
        ("{file}", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_hold_copies_is_one_sentence(run, tmp_path, folder, sentence):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=sentence) as error:
        copy_steps(run, folder.format(run=run, file=tmp_path / "file"))
    assert "\n" not in str(error.value)


def test_a_run_that_does_not_exist_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="run .*missing does not exist; pass the folder of a run"):
        copy_steps(tmp_path / "missing", tmp_path / "drive")


def test_a_full_drive_is_one_sentence_and_leaves_no_part(run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(copies, "_sync", fail)
    with pytest.raises(UserError, match="No space left on device.*free disk space"):
        copy_steps(run, tmp_path / "drive")
    assert not list((tmp_path / "drive").iterdir())


def test_steps_are_copied_while_a_run_trains(tmp_path):
    run, drive = tmp_path / "run", tmp_path / "drive"
    with copy_repeatedly(run, drive, seconds=0.05):
        make_run(run, (1,))
        deadline = time.monotonic() + 30
        while not (drive / "step-1.zip").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (drive / "step-1.zip").exists()
        manager = checkpoint.open_manager(run / "checkpoints")
        checkpoint.save(manager, 2, make_state(2), {"next": 2}, make_config())
        checkpoint.close(manager)
    assert sorted(copies._list_archives(drive)) == [1, 2]


def test_the_last_steps_are_copied_when_a_run_fails(run, tmp_path):
    drive = tmp_path / "drive"
    with pytest.raises(KeyboardInterrupt), copy_repeatedly(run, drive, seconds=60.0):
        raise KeyboardInterrupt
    assert sorted(copies._list_archives(drive)) == [1, 2, 3]


def test_a_drive_that_fails_does_not_end_the_training(run, tmp_path, monkeypatch, capsys):
    calls, write = [], copies._write_archive

    def fail_twice(files, path):
        calls.append(path)
        if len(calls) <= 2:
            raise UserError("drive cannot be written (Transport endpoint is not connected)")
        write(files, path)

    monkeypatch.setattr(copies, "_write_archive", fail_twice)
    with copy_repeatedly(run, tmp_path / "drive", seconds=0.02):
        deadline = time.monotonic() + 30
        while not (tmp_path / "drive/step-3.zip").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert restore_steps(tmp_path / "drive", tmp_path / "back") == 3
    assert capsys.readouterr().err.count("not copied, to be tried again: drive cannot") == 1


def test_only_the_main_host_copies(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    assert copy_steps(run, tmp_path / "drive") == []
    assert not (tmp_path / "drive").exists()

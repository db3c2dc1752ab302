"""Files that records are made from: a change of content is noticed, a move is none."""

import errno
import os
import shutil
import time

import pytest

from plan_jax.data import sources
from plan_jax.data.sources import DigestCache, SourceFiles
from plan_jax.types import UserError

OLD = 1_600_000_000  # seconds; a time that no clock takes for now


def write(path, content, seconds=OLD):
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        write(folder / f"{number}.png", b"image %d" % number)
    return folder


@pytest.fixture
def files(root):
    return make_files(root)


def make_files(root, *more):
    files = SourceFiles()
    for name in (*(f"{number}.png" for number in range(4)), *more):
        files.add(root, root / name)
    return files


def test_unchanged_files_are_not_hashed_again(root, files, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))  # so that all times count at once
    files = make_files(root)
    files.save(tmp_path)
    monkeypatch.setattr(sources, "_hash_file", lambda _, path: pytest.fail(f"{path} was hashed"))
    assert SourceFiles.load(tmp_path).find_changes(DigestCache(root)) == []


@pytest.mark.parametrize("seconds", [OLD, OLD + 1, OLD - 1])
@pytest.mark.parametrize("content", [b"IMAGE 1", b"another image", b""])
def test_a_change_in_place_is_found_whatever_its_size_and_time(root, files, content, seconds):
    write(root / "1.png", content, seconds)
    assert files.find_changes(DigestCache(root)) == ["1.png"]


def test_a_file_that_appears_or_disappears_is_a_change(root, tmp_path):
    files = make_files(root, "later.png")
    files.save(tmp_path)
    assert SourceFiles.load(tmp_path).find_changes(DigestCache(root)) == []
    write(root / "later.png", b"now")
    assert files.find_changes(DigestCache(root)) == ["later.png"]
    (root / "later.png").unlink()
    (root / "2.png").unlink()
    assert files.find_changes(DigestCache(root)) == ["2.png"]
    (root / "2.png").mkdir()
    assert files.find_changes(DigestCache(root)) == ["2.png"]


def test_a_link_to_another_file_is_a_change(root, files):
    (root / "1.png").unlink()
    (root / "1.png").symlink_to(root / "2.png")
    assert files.find_changes(DigestCache(root)) == ["1.png"]


def test_a_copy_has_the_same_identity_and_is_hashed_once(root, files, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # with times of its own
    assert files.find_changes(DigestCache(copy)) == []
    assert files.digest == make_files(copy).digest
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    numbers = []
    for _ in range(2):
        cache = DigestCache(copy, [tmp_path / "cache"])
        assert files.find_changes(cache, numbers.append) == [] and cache.save()
    assert numbers == [4]


def test_files_of_a_place_are_hashed_once_for_all_records_made_of_it(root, monkeypatch, tmp_path):
    """Also those that differ from the records, as after images were changed and restored."""
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    first = make_files(root)
    write(root / "1.png", b"IMAGE 1")
    second = make_files(root)
    write(root / "1.png", b"image 1")
    numbers = []
    for _ in range(2):
        cache = DigestCache(root, [tmp_path / "cache"])
        assert second.find_changes(cache, numbers.append) == ["1.png"]
        assert first.find_changes(cache, numbers.append) == []
        assert cache.save()
    assert numbers == [1]
    write(root / "1.png", b"IMAGE 2")
    assert first.find_changes(DigestCache(root, [tmp_path / "cache"])) == ["1.png"]


def test_a_cache_goes_where_it_can_be_written_and_damage_is_hashed_again(
    root, monkeypatch, tmp_path
):
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    (tmp_path / "file").write_text("not a folder")
    folders = [tmp_path / "file", tmp_path / "cache"]
    files = make_files(root)
    write(root / "1.png", b"image 1", OLD + 1)
    cache = DigestCache(root, folders)
    assert files.find_changes(cache) == [] and cache.save()
    (path,) = (tmp_path / "cache").iterdir()
    numbers = []
    assert files.find_changes(DigestCache(root, folders), numbers.append) == [] == numbers
    for content in ("", "[]", '{"1.png": 1}', '{"1.png": [1, 2]}', "\0"):
        path.write_text(content)
        files.find_changes(DigestCache(root, folders), numbers.append)
    assert numbers == [1] * 5
    cache = DigestCache(root, [tmp_path / "file"])
    assert files.find_changes(cache) == [] and not cache.save()


def test_caches_of_places_that_come_and_go_are_few(root, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    monkeypatch.setattr(sources, "MAX_CACHES", 2)
    files = make_files(root)
    for number in range(4):
        copy = tmp_path / f"job {number}"
        shutil.copytree(root, copy, copy_function=shutil.copyfile)
        cache = DigestCache(copy, [tmp_path / "cache"])
        assert files.find_changes(cache) == [] and cache.save()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_change_within_the_step_of_the_clock_is_found(root, monkeypatch):
    """On drives with coarse clocks a second change leaves the size and the times as they were."""
    now = time.time_ns()
    monkeypatch.setattr(sources, "_read_state", lambda *_: (7, now, now))
    files = make_files(root)
    write(root / "3.png", b"IMAGE 3")
    assert files.find_changes(DigestCache(root)) == ["3.png"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["os.stat", "builtins.open"])
def test_a_passing_fault_of_a_drive_is_no_change(root, files, monkeypatch, call, number):
    """A file that cannot be asked for is not deleted, neither at the first time nor later."""

    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    if call == "builtins.open":
        write(root / "3.png", b"IMAGE 3", OLD + 1)  # so that it is hashed
    monkeypatch.setattr(call, fail)
    sentence = f"png in {root} cannot be read .{os.strerror(number)}.; correct that, and repeat"
    with pytest.raises(UserError, match=sentence):
        files.find_changes(DigestCache(root))
    with pytest.raises(UserError, match=sentence):
        SourceFiles().add(root, root / "3.png")


def test_names_that_no_file_can_have_are_absent(root):
    files = SourceFiles()
    for name in ("x" * 300, "a\0b", "0.png/a", "no folder/a.png"):
        files.add(root, root / name)
    assert set(files.states) == {sources.ABSENT} and files.find_changes(DigestCache(root)) == []


@pytest.mark.parametrize("seconds", [10**10, -(10**10)])
def test_times_beyond_the_range_of_arrays_are_compared(root, monkeypatch, seconds):
    stat = os.stat

    def stat_with_far_times(path):
        status = stat(path)
        far = {"st_mtime_ns": seconds * 10**9, "st_ctime_ns": seconds * 10**9}
        return os.stat_result(tuple(status), far | {"st_mtime": 0.0, "st_ctime": 0.0})

    monkeypatch.setattr(sources.os, "stat", stat_with_far_times)
    files = make_files(root)
    assert files.find_changes(DigestCache(root)) == []
    write(root / "2.png", b"longer than it was")
    assert files.find_changes(DigestCache(root)) == ["2.png"]


def test_a_time_ahead_of_the_clock_is_not_hashed_for_ever(root, monkeypatch):
    ahead = time.time_ns() + 10**15
    monkeypatch.setattr(sources, "_read_state", lambda *_: (7, ahead, OLD * 10**9))
    files = make_files(root)
    monkeypatch.setattr(sources, "_hash_file", lambda _, path: pytest.fail(f"{path} was hashed"))
    assert files.find_changes(DigestCache(root)) == []


def test_the_digest_depends_on_every_content(root, files):
    write(root / "0.png", b"IMAGE 0")
    changed = make_files(root)
    assert changed.digest != files.digest
    assert changed.compare(files) == ["0.png"]
    write(root / "0.png", b"image 0")
    assert make_files(root).digest == files.digest


def test_a_list_survives_the_disk(files, tmp_path, root):
    files.save(tmp_path)
    again = SourceFiles.load(tmp_path)
    assert (again.digest, again.states, len(again)) == (files.digest, files.states, 4)
    assert [path.name for path in tmp_path.glob("sources*")] == [sources.SOURCES_FILE]
    with pytest.raises(FileNotFoundError):
        SourceFiles.load(root)


TWO_NUMBERS = '{"paths": ["a"], "sizes_and_times": [[1, 2]], "digests": ["3"]}'


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"paths": 1}', "\0", TWO_NUMBERS])
def test_a_damaged_list_is_reported(tmp_path, content):
    (tmp_path / sources.SOURCES_FILE).write_text(content)
    with pytest.raises(ValueError):
        SourceFiles.load(tmp_path)

"""Folders at an address: whole or absent, verified, and one sentence for whatever goes wrong."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
from bucket import BucketFileSystem

from plan_jax import storage
from plan_jax.storage import place as places
from plan_jax.storage.transfer import CHECKSUMS
from plan_jax.types import UserError


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSE", 0.0)
    monkeypatch.setattr(BucketFileSystem, "failures", [])
    monkeypatch.setattr(BucketFileSystem, "log", [])


@pytest.fixture(params=["memory", "bucket", "file"])
def place(request, tmp_path):
    folder = f"/{tmp_path.name}" if request.param == "memory" else tmp_path / "remote"
    return storage.find_place("workdir", f"{request.param}://{folder}/run/")


@pytest.fixture
def bucket(tmp_path):
    return storage.find_place("workdir", f"bucket://{tmp_path}/remote/run")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "state").mkdir(parents=True)
    (folder / "state/array").write_bytes(os.urandom(1000))
    (folder / "state/empty").write_bytes(b"")
    (folder / "config").write_text("{}")
    return folder


def contents(folder):
    return {name: path.read_bytes() for name, path in storage.list_files(folder).items()}


def fail(number=errno.EIO):
    return OSError(number, os.strerror(number))


# Addresses ---------------------------------------------------------------------------------------


def test_a_path_of_this_machine_is_no_address():
    for path in ("", "runs/demo", Path("/runs"), "owner/name", "C:/runs"):
        assert storage.find_place("workdir", path) is None


def test_an_address_that_was_a_path_is_mended():
    """`Path` takes one of the two slashes away."""
    for path in ("memory://b/run", "memory://b/run/", Path("memory://b/run")):
        assert storage.find_place("workdir", path).address == "memory://b/run"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("nil://b/run", "^workdir nil://b/run is an address of an unknown kind; pass a path"),
        ("nas:/share", "^workdir nas:/share is an address; pass a path on a local disk"),
        ("host:/runs", "^workdir host:/runs is an address; pass a path on a local disk"),
        (
            "simplecache::gs://b/run",
            "^workdir simplecache::gs://b/run is a chain of addresses; pass",
        ),
        ("gs://b/run::x", "^workdir gs://b/run::x is a chain of addresses; pass the one"),
        ("https://x.org/run", "^workdir https://x.org/run is an address; download it"),
        ("gs://", "^workdir gs:// is an address; pass a path"),
        ("gs://b/run", r"^workdir gs://b/run needs gcsfs; pip install 'plan_jax\[gcs\]'"),
        ("s3://b/run", "^workdir s3://b/run needs another package; install it .*s3fs"),
    ],
)
def test_an_address_that_does_not_work_is_one_sentence(address, sentence, monkeypatch):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=sentence) as error:
        storage.find_place("workdir", address)
    assert "\n" not in str(error.value)


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="^workdir is an address of ftp with a password") as error:
        storage.find_place("workdir", "ftp://me:secret@host/run")
    assert "secret" not in str(error.value)


# Objects -----------------------------------------------------------------------------------------


def test_objects_are_written_listed_read_and_deleted(place, tmp_path):
    assert place.list() == {} and place.read("a/b") is None
    place.write("a/b", b"one")
    place.write("a/b", b"other")
    (tmp_path / "file").write_bytes(b"content")
    place.upload(tmp_path / "file", "c")
    assert place.list() == {"a/b": 5, "c": 7} and place.list("a") == {"a/b": 5}
    assert place.below("a").list() == {"b": 5}
    assert place.read("a/b") == b"other"
    place.download("c", tmp_path / "new/copy")
    assert (tmp_path / "new/copy").read_bytes() == b"content"
    place.delete(["a/b", "missing"])
    assert place.list() == {"c": 7}
    with pytest.raises(FileNotFoundError):
        place.download("a/b", tmp_path / "none")


def test_names_that_leave_a_folder_are_no_objects(place, monkeypatch):
    """A bucket may hold any name."""
    place.write("a", b"")
    find = type(place._files).find

    def find_more(self, path, **options):
        entries = find(self, path, **options)
        (entry,) = entries.values()
        return entries | {f"{path}/{name}": entry for name in ("../b", "c/../../d", "e/", "")}

    monkeypatch.setattr(type(place._files), "find", find_more)
    assert place.list() == {"a": 0}


def test_what_fails_now_and_then_is_tried_again(bucket, tmp_path, capsys):
    BucketFileSystem.failures += [fail(), fail()]
    bucket.write("a", b"content")
    BucketFileSystem.failures += [fail(), ConnectionError("reset")]
    bucket.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert capsys.readouterr().err == ""


def test_what_fails_forever_is_one_sentence(bucket, tmp_path):
    sentence = "remote/run/a cannot be written .Input/output error.; check its name, the network"
    BucketFileSystem.failures += [fail()] * 3
    with pytest.raises(UserError, match=sentence):
        bucket.write("a", b"")
    bucket.write("a", b"")
    BucketFileSystem.failures += [RuntimeError("403 anonymous\ncaller")] * 3
    with pytest.raises(UserError, match="run/a cannot be read .403 anonymous.; check") as error:
        bucket.download("a", tmp_path / "a")
    assert "\n" not in str(error.value)


def test_a_permission_is_not_asked_for_twice(bucket):
    BucketFileSystem.failures += [fail(errno.EACCES)]
    with pytest.raises(UserError, match="run/a cannot be written .Permission denied.*permission"):
        bucket.write("a", b"")
    assert len(BucketFileSystem.log) == 1


def test_an_object_that_is_cut_off_is_written_again(bucket, monkeypatch):
    write, sizes = BucketFileSystem._write, [3, 700]
    monkeypatch.setattr(
        BucketFileSystem, "_write", lambda self, path, x: write(self, path, x[: sizes.pop(0)])
    )
    bucket.write("a", b"x" * 700)
    assert bucket.list() == {"a": 700}
    sizes += [3, 3, 3]
    with pytest.raises(UserError, match="run/a cannot be written .3 of 700 bytes arrived"):
        bucket.write("a", b"x" * 700)


def test_a_full_disk_of_this_machine_is_named(bucket, tmp_path):
    bucket.write("a", b"content")
    BucketFileSystem.failures += [fail(errno.ENOSPC)]
    sentence = f"^{tmp_path}/copy cannot be written .No space left on device.; free disk space"
    with pytest.raises(UserError, match=sentence):
        bucket.download("a", tmp_path / "copy")


# Folders -----------------------------------------------------------------------------------------


def test_a_folder_returns_bit_for_bit(place, folder, tmp_path):
    storage.upload_folder(folder, place, "steps/3", "config")
    storage.download_folder(place, "steps/3", tmp_path / "back/3")
    assert contents(tmp_path / "back/3") == contents(folder)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["3"]
    assert storage.is_equal(tmp_path / "back/3", place, "steps/3")
    (tmp_path / "back/3/config").write_text("[]")
    assert not storage.is_equal(tmp_path / "back/3", place, "steps/3")


def test_the_file_that_makes_a_folder_complete_is_last(bucket, folder):
    bucket.write("3/config", b"old")
    bucket.write("3/state/old", b"")
    BucketFileSystem.log.clear()
    storage.upload_folder(folder, bucket, "3", "config")
    assert BucketFileSystem.log == [
        ("delete", "config"),
        ("write", "array"),
        ("write", "empty"),
        ("write", CHECKSUMS),
        ("write", "config"),
        ("delete", "old"),
    ]


def test_a_file_is_added(bucket, folder, tmp_path):
    storage.upload_folder(folder, bucket, "3", "config")
    (folder / "metrics").write_text("1")
    BucketFileSystem.log.clear()
    storage.add_files(folder, bucket, "3", ["metrics"])
    assert BucketFileSystem.log == [("write", "metrics"), ("write", CHECKSUMS)]
    storage.download_folder(bucket, "3", tmp_path / "3")
    assert contents(tmp_path / "3") == contents(folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "array is missing": lambda path: path.unlink(),
    "array has 7 of 1000 bytes": lambda path: os.truncate(path, 7),
    "array has another checksum": flip,
    f"{CHECKSUMS} is not what was written": lambda path: (
        path.parent.parent / CHECKSUMS
    ).write_text("[]"),
    f"{CHECKSUMS} is not what": lambda path: (path.parent.parent / CHECKSUMS).write_text(
        '{"../outside": [1, 1]}'
    ),
    f"{CHECKSUMS} is": lambda path: (path.parent.parent / CHECKSUMS).write_text(
        '{"config": [Infinity, 1]}'
    ),
    "all files are missing": lambda path: shutil.rmtree(path.parent.parent),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_folder_is_noticed_and_leaves_nothing(bucket, folder, tmp_path, fault):
    storage.upload_folder(folder, bucket, "3", "config")
    DAMAGES[fault](tmp_path / "remote/run/3/state/array")
    with pytest.raises(storage.DamagedError, match=fault):
        storage.download_folder(bucket, "3", tmp_path / "back/3")
    assert not list(tmp_path.glob("back/*"))


def test_a_byte_that_is_lost_on_the_way_is_fetched_again(bucket, folder, tmp_path, monkeypatch):
    storage.upload_folder(folder, bucket, "3", "config")
    get, faults = BucketFileSystem.get_file, [1]

    def get_badly(self, source, target, **options):
        get(self, source, target, **options)
        if "array" in source and faults:
            faults.pop()
            flip(Path(target))

    monkeypatch.setattr(BucketFileSystem, "get_file", get_badly)
    storage.download_folder(bucket, "3", tmp_path / "3")
    assert not faults and contents(tmp_path / "3") == contents(folder)


def test_a_read_that_fails_is_no_damage(bucket, folder, tmp_path):
    storage.upload_folder(folder, bucket, "3", "config")
    before = bucket.list()
    BucketFileSystem.failures += [fail()] * 3
    with pytest.raises(UserError, match="cannot be read .Input/output error."):
        storage.download_folder(bucket, "3", tmp_path / "3")
    assert bucket.list() == before and not (tmp_path / "3").exists()


def test_a_folder_that_is_the_same_stays_for_its_readers(bucket, folder, tmp_path):
    storage.upload_folder(folder, bucket, "3", "config")
    part = tmp_path / "back/.3.1234567.part"  # of a process that was killed
    part.mkdir(parents=True)
    storage.download_folder(bucket, "3", tmp_path / "back/3")
    number = (tmp_path / "back/3").stat().st_ino
    storage.download_folder(bucket, "3", tmp_path / "back/3")
    assert (tmp_path / "back/3").stat().st_ino == number
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["3"]


def test_a_folder_of_another_program_has_no_checksums(bucket, folder, tmp_path):
    for name, path in storage.list_files(folder).items():
        bucket.upload(path, f"3/{name}")
    storage.download_folder(bucket, "3", tmp_path / "3")
    assert contents(tmp_path / "3") == contents(folder)
    assert not storage.is_equal(tmp_path / "3", bucket, "3")


def test_two_addresses_have_two_copies(tmp_path):
    copies = {storage.cache_folder("runs", f"gs://b/{name}") for name in ("a b", "a_b", "a", "ä")}
    assert len(copies) == 4 and all(path.parent == tmp_path / "cache/runs" for path in copies)

"""Datasets are prepared once, under a lock, and again when their files change."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from manifests import (
    NUM_ROWS,
    change_first_row,
    make_image_folder,
    make_rows,
    open_pairs,
    write_grey_image,
    write_manifest,
    write_mask,
)

from plan_jax.data import dataset as datasets
from plan_jax.data import images, preparation, sources
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    return make_image_folder(tmp_path)


# Preparation --------------------------------------------------------------------------------


def test_another_configuration_or_manifest_is_another_folder(folder):
    open_pairs(folder, make_rows())
    open_pairs(folder, make_rows(), size=16)
    open_pairs(folder, make_rows(text="Different text."))
    folders = [path for path in (folder.parent / "data" / "pairs").iterdir() if path.is_dir()]
    assert len(folders) == 3
    assert open_pairs(folder, make_rows(), size=16)[0].image.shape == (12, 16, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "32"}, "field 'size' of dataset pairs is '32'; it must be an int"),
        ({"size": True}, "field 'size' of dataset pairs is True; it must be an int"),
        ({"max_bad": "a"}, "field 'max_bad' of dataset pairs is 'a'; it must be a number"),
        ({"text_optional": 1}, "field 'text_optional' .* is 1; it must be true or false"),
        ({"images": 1}, "field 'images' of dataset pairs is 1; it must be a string"),
        ({"findings": "a"}, "field 'findings' of dataset pairs is 'a'; it must be a list"),
        ({"columns": "a"}, "field 'columns' of dataset pairs is 'a'; it must be a mapping"),
        ({"sise": 2}, "field 'sise' of dataset pairs is unknown; did you mean size"),
    ],
)
def test_fields_of_the_builder_are_checked(folder, config, message):
    with pytest.raises(UserError, match=message):
        open_pairs(folder, make_rows(), **config)
    assert not (folder.parent / "data").exists()


def test_a_data_folder_that_cannot_be_written_is_named(folder):
    (folder.parent / "file").write_text("not a folder")
    with pytest.raises(UserError, match="data folder .* cannot be written .File name too long"):
        datasets.open_dataset(
            "pairs",
            "train",
            data_dir=str(folder.parent / ("x" * 300)),
            manifest=write_manifest(folder, make_rows()),
        )
    with pytest.raises(UserError, match="data folder .*file.* cannot be written .*; set config"):
        datasets.open_dataset(
            "pairs",
            "train",
            data_dir=str(folder.parent / "file"),
            manifest=write_manifest(folder, make_rows()),
        )


# Changes after preparation ------------------------------------------------------------------


def grey_values(dataset):
    return sorted(int(record.image[0, 0, 0]) for record in dataset)


def test_images_that_are_mended_in_place_are_prepared_again(folder, capfd):
    (folder / "0.png").write_bytes(b"a broken download")
    first = open_pairs(folder, make_rows())
    assert grey_values(first) == [20, 40, 60, 80, 100, 120, 140]
    for number in range(NUM_ROWS):
        write_grey_image(folder / f"{number}.png", 255 - number * 20)
    capfd.readouterr()
    second = open_pairs(folder, make_rows())
    assert grey_values(second) == [115, 135, 155, 175, 195, 215, 235, 255]
    line, preparing, *_ = capfd.readouterr().err.splitlines()
    assert "0.png" in line and "changed since the records were prepared" in line
    assert f"delete {first.folder.parent}" in line and preparing.startswith("preparing pairs in ")
    assert first.folder.exists(), "the old records were deleted"
    assert open_pairs(folder, make_rows()).folder == second.folder
    assert capfd.readouterr().err == "", "the way to free the space was said twice"


def test_the_records_of_an_earlier_manifest_are_named_once(folder, capfd):
    first = open_pairs(folder, make_rows())
    different_size = open_pairs(folder, make_rows(), size=16)
    capfd.readouterr()
    open_pairs(folder, make_rows(text="Different text."))
    line = capfd.readouterr().err.splitlines()[0]
    assert line.startswith(f"manifest {folder / 'manifest.csv'} changed since the records were")
    assert line.endswith(f"delete {first.folder.parent}"), "records of another size are in use"
    assert different_size.folder.exists() and first.folder.exists()
    open_pairs(folder, make_rows(text="Different text."))
    assert capfd.readouterr().err == ""
    open_pairs(folder, make_rows(text="Third text."), name="second.csv")
    assert capfd.readouterr().err.startswith("preparing"), "the other manifest is in use"


def test_a_change_of_the_same_size_and_time_is_noticed(folder):
    """Archives and copies set times of their own, and DICOM or TIFF files have one size."""
    path = folder / "1.bmp"
    rows = change_first_row(image="1.bmp")
    write_grey_image(path, 20)
    os.utime(path, (0, 0))
    assert grey_values(open_pairs(folder, rows))[0] == 20
    write_grey_image(path, 7)
    os.utime(path, (0, 0))
    assert grey_values(open_pairs(folder, rows))[0] == 7


def test_a_replaced_folder_and_a_repaired_mask_are_noticed(folder, tmp_path):
    rows = change_first_row(mask="mask.png")
    (folder / "mask.png").write_bytes(b"broken")
    assert len(open_pairs(folder, rows)) == 7
    write_mask(folder / "mask.png")
    second = open_pairs(folder, rows)
    assert len(second) == 8 and max(len(record.phrases) for record in second) == 1
    folder.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", folder)
    assert open_pairs(folder, rows).folder == second.folder
    for number in range(NUM_ROWS):
        write_grey_image(folder / f"{number}.png", number)
    assert grey_values(open_pairs(folder, rows)) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_restored_images_find_their_records_again(folder):
    first = open_pairs(folder, make_rows())
    write_grey_image(folder / "3.png", 1)
    second = open_pairs(folder, make_rows())
    write_grey_image(folder / "3.png", 60)
    assert open_pairs(folder, make_rows()).folder == first.folder
    write_grey_image(folder / "3.png", 2)
    assert len({open_pairs(folder, make_rows()).folder, first.folder, second.folder}) == 3


def test_data_in_another_folder_are_the_same_data(folder, tmp_path, capfd):
    first = open_pairs(folder, make_rows())
    capfd.readouterr()
    config = {"data_dir": str(tmp_path / "data"), "size": 32}
    moved = tmp_path / "new name"
    folder.rename(moved)
    (moved / "manifest.csv").rename(tmp_path / "list.csv")
    config |= {"manifest": str(tmp_path / "list.csv"), "images": str(moved)}
    for copy in ("", "copy"):
        if copy:  # with times of its own
            shutil.copytree(moved, tmp_path / copy, copy_function=shutil.copyfile)
            config["images"] = str(tmp_path / copy)
        again = datasets.open_dataset("pairs", "train", **config, fingerprint=first.fingerprint)
        assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert capfd.readouterr().err == ""
    config["data_dir"] = str(tmp_path / "another machine")
    again = datasets.open_dataset("pairs", "train", **config, fingerprint=first.fingerprint)
    assert again.folder != first.folder and again.fingerprint == first.fingerprint


def test_data_that_differ_from_the_expected_ones_are_refused_by_name(folder, tmp_path):
    expected = open_pairs(folder, make_rows()).fingerprint
    with pytest.raises(UserError, match="manifest .*manifest.csv has another content; restore"):
        open_pairs(folder, make_rows(text="Normal."), fingerprint=expected)
    write_grey_image(folder / "3.png", 1)
    write_grey_image(folder / "10.png", 1)
    with pytest.raises(
        UserError, match="10.png and 1 more in .* changed; restore .*fingerprint=''"
    ):
        open_pairs(folder, make_rows(), fingerprint=expected)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="files in .*pairs have another content; restore"):
        open_pairs(folder, make_rows(), fingerprint=expected)


def test_messages_about_the_data_are_repeated_in_every_run(folder, capfd):
    rows = change_first_row(image="absent.png")
    message = "skipped 1 of 12 rows: absent.png (does not exist)\n"
    open_pairs(folder, rows)
    assert capfd.readouterr().err.endswith(message)
    open_pairs(folder, rows, "val")
    assert capfd.readouterr().err == ""
    with preparation.open_once():
        open_pairs(folder, rows)
        summary, columns, repeated = capfd.readouterr().err.splitlines(keepends=True)
        assert summary.startswith("manifest.csv: 11 studies") and columns.startswith("columns: ")
        assert repeated == message
    write_grey_image(folder / "absent.png", 9)
    assert len(open_pairs(folder, rows)) == 8
    assert "skipped" not in capfd.readouterr().err


def test_records_on_a_read_only_drive_are_used(folder, tmp_path, monkeypatch, capfd):
    first = open_pairs(folder, make_rows())
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))  # so that all times count at once
    monkeypatch.setattr(preparation, "MANY_FILES", 1)
    write = sources.write_atomically

    def refuse_data_folder(path, content):
        if home not in path.parents or not is_home_writable:
            raise UserError(f"{path} cannot be written ({os.strerror(errno.EROFS)})")
        write(path, content)

    monkeypatch.setattr(sources, "write_atomically", refuse_data_folder)
    for is_home_writable in (True, False):
        for number in range(NUM_ROWS):
            seconds = number + NUM_ROWS * is_home_writable
            os.utime(folder / f"{number}.png", (seconds, seconds))
        capfd.readouterr()
        for _ in range(2):
            assert open_pairs(folder, make_rows()).folder == first.folder
        assert capfd.readouterr().err == f"checking {NUM_ROWS} files in {folder}\n"
    assert [path.parent for path in home.rglob("*.json")] == [home / ".cache" / "plan_jax"]
    preparation._UNSAVED.clear()


def test_copies_of_images_in_two_places_are_hashed_once_each(folder, tmp_path, monkeypatch, capfd):
    first = open_pairs(folder, make_rows())
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    monkeypatch.setattr(preparation, "MANY_FILES", 1)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    capfd.readouterr()
    for images_folder in (folder, copy, folder, copy):
        again = open_pairs(folder, make_rows(), images=str(images_folder))
        assert again.folder == first.folder
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if str(copy) in line] == [f"checking {NUM_ROWS} files in {copy}"]
    assert len(lines) <= 2, "images in the first place may have been young when they were read"


def test_one_change_has_the_other_files_read_once(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sources, "YOUNG_NS", -(2**62))
    monkeypatch.setattr(preparation, "MANY_FILES", 1)
    rows = change_first_row(image="0.bmp")  # of the same size whatever its grey level is
    for value in (10, 20):
        write_grey_image(folder / "0.bmp", value)
        open_pairs(folder, rows)
    for number in range(1, NUM_ROWS):
        os.utime(folder / f"{number}.png", (number, number))
    write_grey_image(folder / "0.bmp", 30)
    capfd.readouterr()
    assert grey_values(open_pairs(folder, rows))[0:2] == [20, 30]
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "checking" in line] == [
        f"checking {NUM_ROWS} files in {folder}"
    ]


# Preparation by several processes, and on drives that are full or have no locks -------------


# Prepares a dataset with a pause before each image, and prints the number of its records.
PREPARE = """
import sys, time
from plan_jax.data import dataset, images
from plan_jax.types import UserError
read_image = images.read_image
def read_slowly(path, size, *rest):
    time.sleep(float(sys.argv[3]))
    return read_image(path, size, *rest)
images.read_image = read_slowly
data_dir, manifest = sys.argv[1:3]
try:
    train = dataset.open_dataset("pairs", "train", data_dir=data_dir, manifest=manifest, size=32)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(len(train))
assert "tensorflow" not in sys.modules
"""


def start_preparation(folder, manifest, pause, before=""):
    return subprocess.Popen(
        [sys.executable, "-c", before + PREPARE, str(folder.parent / "data"), manifest, str(pause)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_prepare_it_once_after_another_was_killed(folder):
    manifest, data_dir = write_manifest(folder, make_rows()), folder.parent / "data"
    victim = start_preparation(folder, manifest, pause=60)
    start = time.monotonic()
    while not list(data_dir.rglob("incomplete.*")):
        assert victim.poll() is None and time.monotonic() - start < 60
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert list(data_dir.rglob("incomplete.*"))

    processes = [start_preparation(folder, manifest, pause=0.02) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [out.strip() for out, _ in outputs] == ["8", "8"], outputs
    assert sum("preparing" in err for _, err in outputs) == 1
    assert not list(data_dir.rglob("incomplete.*"))


# A drive whose system call for locks answers as network drives do.
WITHOUT_LOCKS = """
import errno, fcntl, os
def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_drive_without_locks_is_used_without(folder, number, monkeypatch, capfd):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preparation.fcntl, "flock", flock)
    dataset = open_pairs(folder, make_rows())
    line, preparing, *_ = capfd.readouterr().err.splitlines()
    assert f"data folder {dataset.folder.parent} has no locks ({os.strerror(number)})" in line
    assert preparing.startswith("preparing pairs in ") and len(dataset) == 8
    open_pairs(folder, make_rows())
    assert capfd.readouterr().err == ""
    write_grey_image(folder / "1.png", 7)
    assert grey_values(open_pairs(folder, make_rows()))[0:2] == [0, 7]


def test_two_processes_without_locks_end_with_the_same_records(folder):
    manifest = write_manifest(folder, make_rows())
    processes = [
        start_preparation(folder, manifest, pause=pause, before=WITHOUT_LOCKS)
        for pause in (0.1, 0.2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [out.strip() for out, _ in outputs] == ["8", "8"], outputs
    assert all("Traceback" not in err and "has no locks" in err for _, err in outputs)
    assert not list((folder.parent / "data").rglob("incomplete.*"))


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_complete(folder):
    manifest = write_manifest(folder, make_rows())
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
    process = start_preparation(folder, manifest, pause=0, before=limit)
    out, err = process.communicate()
    data_dir = folder.parent / "data" / "pairs"
    assert process.returncode == 2 and out == ""
    preparing, sentence = err.splitlines()
    assert preparing.endswith("failed")
    assert sentence.startswith(f"data folder {data_dir}") and "(File too large)" in sentence
    assert "free the disk, which has" in sentence and "config.data.dir" in sentence
    assert not [path for path in data_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(open_pairs(folder, make_rows())) == 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_the_system_says_of_the_disk_is_found_in_any_form(
    folder, number, is_wrapped, monkeypatch
):
    reason = os.strerror(number)

    def fail(*_, **__):
        if is_wrapped:
            message = f"Failed to finalize writing of split: write() failed: {reason}; writing x"
            raise ValueError("while preparing") from RuntimeError(message)
        raise OSError(number, reason)

    monkeypatch.setattr(preparation.Pairs, "download_and_prepare", fail)
    with pytest.raises(UserError, match=f"cannot be written .{reason}.; free the disk"):
        open_pairs(folder, make_rows())


def test_images_on_a_faulty_disk_are_not_taken_for_the_data_folder(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(images, "read_image", fail)
    with pytest.raises(UserError, match="png in .*pairs cannot be read .Input/output error.; cor"):
        open_pairs(folder, make_rows())


@pytest.mark.parametrize("is_prepared", [False, True])
def test_images_that_cannot_be_read_for_a_while_are_not_dropped(
    folder, is_prepared, monkeypatch, capfd
):
    (folder / "s").mkdir()
    write_grey_image(folder / "s" / "0.png", 200)
    rows = change_first_row(image="s/0.png")
    if is_prepared:
        open_pairs(folder, rows)
    stat = os.stat

    def refuse(path, *args, **options):
        if str(path).startswith(str(folder / "s") + os.sep):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **options)

    capfd.readouterr()
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match="s/0.png in .* cannot be read .Permission denied.; corr"):
        open_pairs(folder, rows)
    assert "changed" not in capfd.readouterr().err
    monkeypatch.setattr(os, "stat", stat)
    assert grey_values(open_pairs(folder, rows))[-1] == 200
    assert len(list((folder.parent / "data" / "pairs").glob("*/*/sources.json"))) == 1


def test_images_whose_path_is_no_path_yet_are_noticed_when_they_exist(folder):
    rows = change_first_row(image="Clear lungs", mask="a\\mask.png")
    assert len(open_pairs(folder, rows)) == 7
    write_grey_image(folder / "0.png", 220)
    (folder / "0.png").rename(folder / "Clear lungs")
    assert len(open_pairs(folder, rows)) == 7, "its mask does not exist yet"
    (folder / "a").mkdir()
    write_mask(folder / "a" / "mask.png")
    assert grey_values(open_pairs(folder, rows))[-1] == 220


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("manifest.csv", "manifest .*manifest.csv"), ("", "images folder .*pairs")],
)
def test_a_manifest_or_folder_without_permission_is_named(folder, name, sentence, monkeypatch):
    refused_path, stat = folder / name, os.stat
    config = {"images": str(folder), "manifest": write_manifest(folder, make_rows())}

    def refuse(path, *args, **options):
        if str(path) == str(refused_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=f"{sentence} cannot be read .Permission denied.; correct"):
        datasets.open_dataset("pairs", "train", data_dir=str(folder.parent / "data"), **config)


def test_records_that_are_deleted_meanwhile_are_no_error(folder, monkeypatch):
    open_pairs(folder, make_rows())
    write_grey_image(folder / "1.png", 7)

    def list_deleted_files(path, _):
        yield path / "deleted a moment ago"

    monkeypatch.setattr(Path, "rglob", list_deleted_files)
    assert grey_values(open_pairs(folder, make_rows()))[:2] == [0, 7]


def test_a_mistake_in_the_code_stays_a_traceback(folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a mistake")

    monkeypatch.setattr(preparation.Pairs, "download_and_prepare", fail)
    with pytest.raises(KeyError):
        open_pairs(folder, make_rows())

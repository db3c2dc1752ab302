"""Public datasets from a folder to records: images, boxes and masks; kills, copies, full disks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_films
from PIL import Image
from radiographs import make_dicom, make_png
from records import are_equal
from toy_films import make_row

from plan_jax import prepare
from plan_jax.data import preparation, transforms
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public import shards, summary
from plan_jax.data.sections.captions import name_text_list
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def register(monkeypatch):
    """Adds the toy films to the datasets."""
    entry = (toy_films.ToyFilms, toy_films.ToyFilmsConfig)
    monkeypatch.setitem(preparation.BUILDERS, "toy_films", entry)


def open_films(folder, split="train", **fields):
    """Returns a split of the toy films, prepared from `folder/source` into `folder/data`."""
    fields = {"source": str(folder / "source"), "size": 30, "max_bad": 1.0} | fields
    return open_dataset("toy_films", split, data_dir=str(folder / "data"), **fields)


def draw_film(corners, shape=(40, 60)):
    """Returns a black film with a white box, the corners of which are whole pixels."""
    pixels = np.zeros(shape, np.uint8)
    x0, y0, x1, y1 = corners
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def test_boxes_and_masks_are_those_of_the_original(tmp_path):
    corners = (8, 12, 32, 36)
    shapes = [["rectangle", list(corners)]]
    rows = [make_row(0, boxes=json.dumps([corners]), shapes=json.dumps(shapes)), make_row(1)]
    (tmp_path / "source/films").mkdir(parents=True)
    draw_film(corners).save(tmp_path / "source/films/0.png")
    toy_films.write(tmp_path / "source", rows)
    records = {record.record_id: record for record in open_films(tmp_path)}
    record = records["film-0"]
    assert record.image.shape == (20, 30, 1)
    assert record.sections == {"findings": "Effusion of degree 0."}
    assert (record.patient_id, record.view, record.labels.tolist()) == ("p0", "PA", [0])
    assert record.geometry.shape == (40, 60)
    (phrase,) = record.phrases
    assert (phrase.text, phrase.finding) == ("effusion", 0)
    assert np.array_equal(phrase.mask, record.image[..., 0] > 128)
    boxes = record.geometry.to_original(np.asarray(phrase.boxes))
    assert np.abs(boxes - corners).max() < 1e-4
    fitted = transforms.fit_record(record, 24)
    boxes = fitted.geometry.to_original(np.asarray(fitted.phrases[0].boxes))
    assert np.abs(boxes - corners).max() < 1


def test_boxes_that_cannot_be_are_counted_and_others_kept(tmp_path):
    boxes = [[5, 5, 5, 9], [9, 5, 2, 9], [70, 5, 80, 9], [50, 30, 70, 50], [1, 1, 2, 2]]
    toy_films.write(tmp_path / "source", [make_row(0, boxes=json.dumps(boxes)), make_row(1)])
    dataset = open_films(tmp_path)
    record = next(record for record in dataset if record.record_id == "film-0")
    assert record.phrases[0].boxes == ((25.0, 15.0, 30.0, 20.0), (0.5, 0.5, 1.0, 1.0))
    content = json.loads((dataset.folder / summary.SUMMARY_FILE).read_text())
    assert content["faults"] == {
        "a box without area": 2,
        "a box outside of its image": 1,
        "a box under a pixel after resizing": 1,
    }


def test_corners_that_are_not_numbers_are_counted(tmp_path):
    boxes, shapes = "[[NaN, 1, 9, 9], [1, 1, Infinity, 9]]", '[["rectangle", [1, 1, NaN, 9]]]'
    rows = [make_row(0, boxes=boxes), make_row(1, shapes=shapes)]
    rows += [make_row(2, shapes='[["rectangle", [70, 1, 80, 9]]]', split="train"), make_row(3)]
    toy_films.write(tmp_path / "source", rows)
    dataset = open_films(tmp_path)
    assert {record.record_id: record.phrases for record in dataset} == {
        **{"film-0": (), "film-2": (), "film-3": ()},
    }
    content = json.loads((dataset.folder / summary.SUMMARY_FILE).read_text())
    assert content["faults"] == {
        "a box with a corner that is not a number": 2,
        "a mask without a pixel": 1,
    }
    assert content["dropped"] == {"a mask has a corner that is not a number": 1}


def test_a_reason_names_no_mask(tmp_path):
    rows = [
        make_row(number, shapes=f'[["file", "films/mask_{number}.png"]]', split="train")
        for number in range(4)
    ]
    folder = tmp_path / "source/films"
    folder.mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"mask_{number}.png")
    draw_film((1, 1, 9, 9)).save(folder / "mask_3.png")
    toy_films.write(tmp_path / "source", rows)
    dataset = open_films(tmp_path)
    content = json.loads((dataset.folder / summary.SUMMARY_FILE).read_text())
    reason = "mask looks like an image, not a mask; save a mask of 0 and 255"
    assert content["dropped"] == {reason: 3} and len(dataset) == 1


def make_files():
    """Returns the content of films that can be read, and of some that cannot."""
    grey = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60)
    dicom_without_pixels = make_dicom(grey, PixelData=None)
    return {
        "16_bits.png": make_png(grey[..., None], 0),
        "colour.png": make_png(np.repeat(grey[..., None] // 16, 4, -1).astype(np.uint8), 6, 8),
        "film.dicom": make_dicom(grey, BitsStored=12),
        "no_pixels.dcm": dicom_without_pixels,
        "text.png": b"<html>",
    }


def test_odd_images_are_read_or_listed(tmp_path):
    folder = tmp_path / "source/films"
    folder.mkdir(parents=True)
    for name, content in make_files().items():
        (folder / name).write_bytes(content)
    film = Image.fromarray(np.full((40, 60), 99, np.uint8))
    film.convert("P").save(folder / "palette.png")
    film.convert("CMYK").save(folder / "cmyk.jpg")
    film.convert("RGBA").save(folder / "alpha.png")
    film.save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-20])
    (folder / "empty.png").touch()
    names = sorted(path.name for path in folder.iterdir())
    rows = [
        make_row(number, path=f"films/{name}", patient=number, split="train")
        for number, name in enumerate(names)
    ]
    toy_films.write(tmp_path / "source", rows)
    dataset = open_films(tmp_path)
    read = sorted(names[int(record.record_id.removeprefix("film-"))] for record in dataset)
    lost = {"cut.jpg", "empty.png", "no_pixels.dcm", "text.png"}
    assert read == [name for name in names if name not in lost]
    lines = (dataset.folder / summary.DROPPED_FILE).read_text().splitlines()
    assert {Path(line.split("\t")[1]).name for line in lines} == lost
    content = json.loads((dataset.folder / summary.SUMMARY_FILE).read_text())
    assert content["dropped"] == {
        "is DICOM without pixel data (its modality is DX)": 1,
        "is a broken image (image file is truncated)": 1,
        "image is missing or empty": 1,
        "is not an image that can be read": 1,
    }


def test_too_many_broken_images_stop_the_preparation(tmp_path):
    rows = [make_row(number) for number in range(8)]
    (tmp_path / "source/films").mkdir(parents=True)
    (tmp_path / "source/films/0.png").write_text("x")
    toy_films.write(tmp_path / "source", rows)
    with pytest.raises(UserError, match="1 of 8 images .* max_bad 0.1, as films/0.png"):
        open_films(tmp_path, max_bad=0.1)
    assert len(open_films(tmp_path, max_bad=0.2)) == 3


def test_a_mended_image_is_noticed_and_a_removed_source_is_not_needed(tmp_path):
    rows = [make_row(number) for number in range(8)]
    film = tmp_path / "source/films/0.png"
    film.parent.mkdir(parents=True)
    film.write_text("x")
    toy_films.write(tmp_path / "source", rows)
    first = open_films(tmp_path)
    assert len(first) == 3
    draw_film((1, 1, 9, 9)).save(film)
    second = open_films(tmp_path)
    assert len(second) == 4 and second.fingerprint != first.fingerprint
    os.rename(tmp_path / "source", tmp_path / "elsewhere")
    assert open_films(tmp_path).fingerprint == second.fingerprint
    moved = open_films(tmp_path, source=str(tmp_path / "elsewhere"))
    assert moved.fingerprint == second.fingerprint
    with pytest.raises(UserError, match="toy_films is not prepared yet; download it from example"):
        open_films(tmp_path / "new", source="", size=16)
    with pytest.raises(UserError, match=r"1\.0\.0 with size \d+, not with size 16; set these"):
        open_films(tmp_path, source="", size=16)


def test_a_mended_image_is_noticed_by_its_whole_path_and_after_a_failure(tmp_path):
    name = f"films/{'a' * 70}.png"  # longer than what messages show of a path
    rows = [make_row(0, path=name), *map(make_row, range(1, 8))]
    film = tmp_path / "source" / name
    film.parent.mkdir(parents=True)
    film.write_text("x")
    toy_films.write(tmp_path / "source", rows)
    with pytest.raises(UserError, match="1 of 8 images"):
        open_films(tmp_path, max_bad=0.1)
    assert len(open_films(tmp_path)) == 3
    draw_film((1, 1, 9, 9)).save(film)
    # The shards of the failure are complete, but for an image that can be read now.
    assert len(open_films(tmp_path, max_bad=0.1)) == 4
    assert len(open_films(tmp_path)) == 4


def test_a_source_that_is_not_mounted_is_not_needed(tmp_path):
    toy_films.write(tmp_path / "source", [make_row(number) for number in range(8)])
    first = open_films(tmp_path)
    os.rename(tmp_path / "source", tmp_path / "drive")
    (tmp_path / "source").mkdir()
    assert open_films(tmp_path).fingerprint == first.fingerprint


def test_a_split_without_patients_is_named_with_a_remedy(tmp_path):
    toy_films.write(tmp_path / "source", [make_row(number, split="") for number in range(8)])
    with pytest.raises(UserError, match="use one of train.*, or raise data.builder.val_fraction$"):
        open_films(tmp_path, "val", val_fraction=0.0)


def test_the_summary_counts_what_has_become_a_record(tmp_path, capsys):
    rows = [make_row(number) for number in range(8)]
    rows[1]["report"] = ""
    (tmp_path / "source/films").mkdir(parents=True)
    (tmp_path / "source/films/0.png").write_text("x")
    toy_films.write(tmp_path / "source", rows)
    dataset = open_films(tmp_path)
    content = json.loads((dataset.folder / summary.SUMMARY_FILE).read_text())
    assert content["splits"]["train"] == {"images": 3, "patients": 2, "studies": 3}
    assert content["labels"]["train"]["effusion"] == {"present": 2, "absent": 1}
    assert content["sections"] == {"findings": 6, "images with a report": 6}
    assert content["views"] == {"PA": 7}
    assert "Effusion of" not in json.dumps(content)
    left_out = "left out 1: is not an image that can be read (films/0.png)"
    printed = capsys.readouterr().err
    assert "train: 3 images, 3 studies, 2 patients" in printed and printed.count(left_out) == 1
    with preparation.open_once():  # a later run
        open_films(tmp_path)
    printed = capsys.readouterr().err
    assert "train: 3 images" not in printed and printed.count(left_out) == 1


@pytest.mark.parametrize("caption", ["", "findings", "impression"])
def test_records_without_a_text_are_listed_when_they_are_prepared(tmp_path, caption):
    rows = [make_row(number, split="train") for number in range(70)]
    for number in (3, 66):
        rows[number]["report"] = ""
    toy_films.write(tmp_path / "source", rows)
    dataset = open_films(tmp_path, caption=caption)
    path = dataset.folder / name_text_list("train", caption)
    count, listed = json.loads(path.read_text())
    assert count == 70
    assert listed == [index for index in range(70) if not dataset.read_text(index)]
    if caption == "impression":
        with pytest.raises(UserError, match="none of the 70 records of split train"):
            dataset.select_texts()
    else:
        assert len(dataset.select_texts()) == 68


def test_several_processes_write_the_same_records(tmp_path, monkeypatch):
    rows = [make_row(number, split="train") for number in range(150)]
    toy_films.write(tmp_path / "source", rows)
    alone = open_films(tmp_path, workers=1)
    (tmp_path / "again").mkdir()
    os.symlink(tmp_path / "source", tmp_path / "again/source")
    monkeypatch.setattr(shards, "MIN_PARALLEL_IMAGES", 0)
    together = open_films(tmp_path / "again", workers=2)
    assert len(together) == 150
    assert all(map(are_equal, together, alone))


def test_a_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = [make_row(number, split="train") for number in range(150)]
    toy_films.write(tmp_path / "source", rows)
    written = []

    class Writer(shards._ShardWriter):
        def write(self, key, advance):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(key)
            super().write(key, advance)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_ShardWriter", Writer)
        with pytest.raises(KeyboardInterrupt):
            open_films(tmp_path)
    assert written == ["train-00000", "train-00001"]

    class Rest(shards._ShardWriter):
        def write(self, key, advance):
            written.append(key)
            super().write(key, advance)

    monkeypatch.setattr(shards, "_ShardWriter", Rest)
    dataset = open_films(tmp_path)
    assert written == ["train-00000", "train-00001", "train-00002"]
    assert sorted(record.record_id for record in dataset) == sorted(row["id"] for row in rows)
    assert not list(dataset.folder.parent.glob("parts*"))


def fail_before_the_end(folder, monkeypatch, when, **fields):
    """Prepares toy films until a method of the builder, which ends the process."""
    with monkeypatch.context() as patch:
        patch.setattr(toy_films.ToyFilms, when, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_films(folder, **fields)
    (parts,) = (folder / "data/toy_films").glob("*/parts")
    return parts


def refuse_to_write(monkeypatch):
    """Lets a shard that is written fail the test."""
    monkeypatch.setattr(shards._ShardWriter, "write", lambda *_: 1 / 0)


def test_shards_survive_a_kill_before_the_folder_is_renamed(tmp_path, monkeypatch):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(70)])
    with monkeypatch.context() as patch:
        patch.setattr(toy_films.tfds.core.DatasetInfo, "write_to_directory", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_films(tmp_path)
    refuse_to_write(monkeypatch)
    assert len(open_films(tmp_path)) == 70
    assert not list((tmp_path / "data/toy_films").glob("*/parts"))


def test_a_preparation_goes_on_from_a_folder_that_was_moved(tmp_path, monkeypatch):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(70)])
    fail_before_the_end(tmp_path, monkeypatch, "_place_shards")
    os.rename(tmp_path / "source", tmp_path / "moved")
    refuse_to_write(monkeypatch)
    assert len(open_films(tmp_path, source=str(tmp_path / "moved"))) == 70


def test_what_a_kill_has_begun_is_deleted(tmp_path, monkeypatch):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(70)])
    parts = fail_before_the_end(tmp_path, monkeypatch, "_place_shards")
    begun = ["items.17", "train-00000.17", "train-00000.json.17.part"]
    for name in begun:
        (parts / name).touch()
    fail_before_the_end(tmp_path, monkeypatch, "_place_shards")
    assert {path.name for path in parts.iterdir()} == {
        *(".lock", "items.jsonl", "job.json"),
        *("train-00000", "train-00000.json", "train-00001", "train-00001.json"),
    }


def test_the_shard_of_another_job_does_not_count(tmp_path, monkeypatch):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(70)])
    parts = fail_before_the_end(tmp_path, monkeypatch, "_place_shards")
    identity = json.loads((parts / "job.json").read_text())["identity"]
    assert shards.load_shard(parts, "train-00000", identity)
    assert shards.load_shard(parts, "train-00000", "other") is None


@pytest.mark.parametrize("code", ["os.kill(os.getpid(), 9)", "raise UserError('stop')"])
def test_a_process_that_ends_stops_the_others_at_once(tmp_path, monkeypatch, code):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(150)])
    worker = f"""
import os, sys, time
from plan_jax.data.public import shards
from plan_jax.types import UserError
def write(self, key, advance):
    if key != "train-00001":
        time.sleep(100)
    {code}
shards._ShardWriter.write = write
shards.run_worker()
"""
    monkeypatch.setattr(shards, "_WORKER_CODE", worker)
    monkeypatch.setattr(shards, "MIN_PARALLEL_IMAGES", 0)
    start_time = time.monotonic()
    message = "was ended by SIGKILL, as by a system short of memory" if "9" in code else "stop"
    with pytest.raises(UserError, match=message):
        open_films(tmp_path, workers=2)
    assert time.monotonic() - start_time < 90


def test_a_shard_that_is_cut_off_is_written_again(tmp_path, monkeypatch):
    toy_films.write(tmp_path / "source", [make_row(number, split="train") for number in range(70)])
    parts = fail_before_the_end(tmp_path, monkeypatch, "_place_shards")
    shard = parts / "train-00000"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert len(open_films(tmp_path)) == 70


CODE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import toy_films
from plan_jax import prepare
from plan_jax.data import preparation
preparation.BUILDERS["toy_films"] = (toy_films.ToyFilms, toy_films.ToyFilmsConfig)
{setup}
sys.exit(prepare.run({arguments!r}))
"""


def start(folder, setup=""):
    """Starts a process that prepares the toy films of a folder."""
    arguments = [
        "toy_films",
        "--source",
        str(folder / "source"),
        "--data_dir",
        str(folder / "data"),
    ]
    code = CODE.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        setup=setup,
        arguments=[*arguments, "--workers=1"],
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_preparations_at_once_and_a_full_disk(tmp_path):
    rows = [make_row(number, split="train") for number in range(100)]
    toy_films.write(tmp_path / "source", rows, shape=(256, 256))
    for row in rows:
        noise = np.random.default_rng(len(row["path"])).integers(0, 256, (256, 256))
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "source" / row["path"])
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))\n"
    limit += "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full = start(tmp_path, limit)
    _, error = full.communicate()
    assert full.returncode == 2, error
    assert "cannot be written (File too large)" in error and "Traceback" not in error
    processes = [start(tmp_path) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(open_films(tmp_path, size=256, max_bad=0.1)) == 100
    assert len(list((tmp_path / "data/toy_films").glob("*/*/dataset_info.json"))) == 1


def test_records_with_a_second_folder_are_others_wherever_it_is():
    def digest(**fields):
        return preparation.make_builder_config("mimic_cxr", fields).digest()

    assert digest(ms_cxr="a") == digest(ms_cxr="b", source="c", workers=3)
    assert len({digest(), digest(ms_cxr="a"), digest(reports="a"), digest(size=64)}) == 4


# The command ------------------------------------------------------------------------------------


def test_the_command_checks_and_prepares(tmp_path, capsys):
    toy_films.write(tmp_path / "source", [make_row(number) for number in range(8)])
    arguments = ["toy_films", "--source", str(tmp_path / "source"), "--size=16"]
    assert prepare.run([*arguments, "--check"]) == 0
    out = capsys.readouterr().out
    assert "train: 4 images, 4 studies, 2 patients" in out
    assert not (tmp_path / "data").exists()
    arguments += ["--data_dir", str(tmp_path / "data"), "--set", "max_bad=0.5"]
    assert prepare.run(arguments) == 0
    assert "summary.json" in capsys.readouterr().out
    assert prepare.run(["--list"]) == 0
    assert "toy_films" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no dataset is named; --list shows them"),
        (["toy_film"], "public dataset 'toy_film' is unknown; did you mean toy_films?"),
        (["phantom"], "public dataset 'phantom' is unknown"),
        (["toy_films", "--split=x"], "split rule 'x' of dataset toy_films is unknown; use one of"),
        (["toy_films", "--views=x"], "views 'x' of dataset toy_films is unknown"),
        (["toy_films", "--size=2"], "size 2 of dataset toy_films is too small"),
        (["toy_films", "--set", "max_bad=x"], "field 'max_bad' of dataset toy_films is 'x'"),
        (["toy_films", "--set", "max_bd=1"], "did you mean max_bad?"),
        (["toy_films", "--workers=-1"], "workers -1 is negative"),
        (["toy_films", "--source=/nowhere"], "source /nowhere is not a folder"),
        (["toy_films", "--size=x"], "invalid int value: 'x'; --help shows the usage"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert prepare.run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err

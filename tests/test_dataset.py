"""Records are read at random, and what is wrong with them is one sentence."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from manifests import (
    change_first_row,
    make_image_folder,
    make_rows,
    open_pairs,
    write_manifest,
)
from records import ANATOMY_NAMES, make_record

from plan_jax.data import dataset as datasets
from plan_jax.data import preparation, schema
from plan_jax.types import UserError

NUM_RECORDS = 8


@pytest.fixture(scope="module")
def source():
    return [schema.serialize(make_record(number)) for number in range(NUM_RECORDS)]


@pytest.fixture
def folder(tmp_path):
    return make_image_folder(tmp_path)


# Access -------------------------------------------------------------------------------------


def test_records_are_read_by_index(source):
    dataset = datasets.Dataset(source, anatomy_names=ANATOMY_NAMES)
    assert dataset[-1].patient_id == f"patient {(NUM_RECORDS - 1) // 2}"
    assert list(dataset[0].anatomy) == list(ANATOMY_NAMES)
    assert len(list(dataset)) == NUM_RECORDS
    with pytest.raises(IndexError, match=f"record {NUM_RECORDS} of {NUM_RECORDS}"):
        dataset[NUM_RECORDS]


def test_a_pair_is_the_same_with_and_without_cache(source):
    expected = make_record(5)
    cached = datasets.Dataset(source, cache=True)
    for dataset in (datasets.Dataset(source), cached):
        pair = dataset.read_pair(5)
        np.testing.assert_array_equal(pair.image, expected.image)
        np.testing.assert_array_equal(pair.labels, expected.labels)
        assert pair.text == expected.text
    assert cached.read_pair(5) is cached.read_pair(5)
    with pytest.raises(ValueError, match="read-only"):
        cached.read_pair(5).image[0] = 1


REPORTS = (
    {"findings": "Lungs are clear. No effusion.", "impression": "Normal chest."},
    {"findings": "Large heart."},
    {"indication": "Cough."},
)


def make_reports(stored_text=""):
    """Returns serialised records with the sections of REPORTS."""
    return [
        schema.serialize(
            dataclasses.replace(make_record(number), text=stored_text, sections=report, anatomy={})
        )
        for number, report in enumerate(REPORTS)
    ]


@pytest.mark.parametrize(
    ("caption", "stored_text", "texts"),
    [
        ("findings", "Stored.", ["Lungs are clear. No effusion.", "Large heart.", ""]),
        ("impression", "", ["Normal chest.", "", ""]),
        ("", "", ["Lungs are clear. No effusion.\n\nNormal chest.", "Large heart.", ""]),
        ("", "Stored.", ["Stored."] * 3),
    ],
)
def test_texts_are_captions_of_sections(caption, stored_text, texts):
    dataset = datasets.Dataset(make_reports(stored_text), caption=caption, cache=True)
    for index, text in enumerate(texts):
        assert dataset[index].text == text
        assert dataset[index].sections == REPORTS[index]
        assert dataset.read_text(index) == text
        for _ in range(2):  # the second comes from the cache
            assert dataset.read_pair(index).text == text
            assert dataset.read_pair(index, np.random.default_rng(0)).text == text


def test_a_sentence_is_drawn_with_a_generator_only():
    dataset = datasets.Dataset(make_reports(), caption="convirt", cache=True)
    rng = np.random.default_rng(0)
    drawn = {dataset.read_pair(0, rng).text for _ in range(30)}
    assert drawn == {"Lungs are clear.", "No effusion.", "Normal chest."}
    whole = "Lungs are clear.\n\nNo effusion.\n\nNormal chest."
    assert dataset.read_pair(0).text == dataset.read_text(0) == dataset[0].text == whole


def test_records_without_a_text_are_left_out(tmp_path):
    def make_dataset(source, caption, split="train"):
        return datasets.Dataset(
            source, caption=caption, split=split, folder=tmp_path, name="n", may_lack_text=True
        )

    source = make_reports()
    selection = make_dataset(source, "findings").select_texts()
    assert [selection.read_text(i) for i in range(len(selection))] == [
        "Lungs are clear. No effusion.",
        "Large heart.",
    ]
    assert selection.read_pair(1).image[0, 0, 0] == selection[1].image[0, 0, 0] == 1
    assert len(make_dataset(source, "impression").select_texts()) == 1
    # The second time no record is read.
    again = make_dataset([b""] * 3, "findings").select_texts()
    assert again.source.indices.tolist() == [0, 1]
    # A broken list is read anew, and so is a part of a split, or another number of records.
    for content in ("null", "[3, null]", '[3, {"a": 1}]', "[3"):
        (tmp_path / "texts-train-findings-1.json").write_text(content)
        assert len(make_dataset(source, "findings").select_texts()) == 2
    assert len(make_dataset(source[1:], "findings").select_texts()) == 1
    assert len(make_dataset(source, "findings", "train[:100%]").select_texts()) == 2
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(
        UserError, match="none of the 1 records of split train of dataset n has a t"
    ):
        make_dataset(source[2:], "mgca").select_texts()
    dataset = datasets.Dataset(source)
    assert dataset.select_texts() is dataset, "it was read"


def test_a_caption_needs_sections(tmp_path):
    config = {"data_dir": str(tmp_path), "train": 2, "val": 2, "test": 2, "size": 32}
    with pytest.raises(UserError, match="caption rule 'mcga' is unknown; use one of mgca, gloria"):
        datasets.open_dataset("phantom", "train", caption="mcga", **config)
    with pytest.raises(UserError, match="caption is 'mgca', and dataset phantom has no sections"):
        datasets.open_dataset("phantom", "train", caption="mgca", **config)


def test_the_splits_of_a_dataset_are_listed(folder):
    config = {"manifest": write_manifest(folder, make_rows()), "size": 32}
    data_dir = str(folder.parent / "data")
    assert datasets.list_splits("pairs", data_dir=data_dir, **config) == ("train", "val", "test")


def test_unknown_names_are_reported(folder):
    with pytest.raises(UserError, match="dataset 'phantoms' is unknown; use one of phantom, pairs"):
        datasets.open_dataset("phantoms", "train")
    message = "split 'trian' is not in .* pairs, which has train 8, val 2, test 2; use one of train"
    with pytest.raises(UserError, match=message):
        open_pairs(folder, make_rows(), "trian")
    with pytest.raises(UserError, match="split 'train.:x.' cannot be read; write train or train"):
        open_pairs(folder, make_rows(), "train[:x]")
    assert len(open_pairs(folder, make_rows(), "train[:50%]")) == 4
    for part in ("[:0%]", "[8:]"):
        with pytest.raises(UserError, match="split 'train.* has no rows; train of .* has 8"):
            open_pairs(folder, make_rows(), f"train{part}")


def test_a_split_without_rows_names_the_sizes_and_the_remedy(folder):
    rows = [{"image": f"{number}.png", "text": "Normal."} for number in range(3)]
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    message = (
        "split 'val' is not in .* which has train 3; none of its 3 patients fell into val with "
        "val_fraction 0; add rows .*, or raise val_fraction"
    )
    with pytest.raises(UserError, match=message):
        open_pairs(folder, rows, "val", **fractions)


# Damage -------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_bits(path):
    content = bytearray(path.read_bytes())
    for index in range(100, len(content), 50):
        content[index] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": ("*train*", truncate),
    "truncated to a block": ("*train*", lambda path: os.truncate(path, 65536)),
    "flipped bits": ("*train*", flip_bits),
    "empty": ("*train*", lambda path: path.write_bytes(b"")),
    "zeros": ("*train*", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "missing": ("*train*", Path.unlink),
    "a folder": ("*train*", lambda path: (path.unlink(), path.mkdir())),
    "records of another split": (
        "*train*",
        lambda path: shutil.copy(next(path.parent.glob("*val*")), path),
    ),
    "information": ("dataset_info.json", lambda path: path.write_text("{")),
    "no information": ("dataset_info.json", lambda path: path.write_text("{}")),
    "names": ("metadata.json", lambda path: path.write_text("[")),
    "no names": ("metadata.json", Path.unlink),
    "names of nothing": ("metadata.json", lambda path: path.write_text("{}")),
    "list of files": ("sources.json", lambda path: path.write_text("")),
    "no list of files": ("sources.json", Path.unlink),
    "messages": ("messages.txt", lambda path: path.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_are_named_with_the_remedy(folder, kind):
    pattern, damage = DAMAGE[kind]
    rows = change_first_row(image="absent.png")
    dataset = open_pairs(folder, rows)
    (path,) = dataset.folder.glob(pattern)
    damage(path)
    preparation._reported.clear()
    message = (
        f"prepared records in {dataset.folder} are damaged; delete the folder, and the next run"
    )
    with pytest.raises(UserError, match=message) as raised:
        damaged = open_pairs(folder, rows)
        for index in range(len(damaged)):
            damaged.read_pair(index)
    assert "\n" not in str(raised.value)
    shutil.rmtree(dataset.folder)
    assert len(open_pairs(folder, rows)) == 7


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_records_that_may_be_whole_are_not_to_be_deleted(folder, number, is_wrapped, monkeypatch):
    reason = os.strerror(number)

    def fail(*_, **__):
        raise RuntimeError(f"open failed: {reason}") if is_wrapped else OSError(number, reason)

    dataset = open_pairs(folder, make_rows())
    monkeypatch.setattr(type(dataset.source), "__getitem__", fail)
    with pytest.raises(UserError, match=rf"cannot be read \({reason}\); correct that") as raised:
        dataset.read_pair(0)
    assert "delete" not in str(raised.value)

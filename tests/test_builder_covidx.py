"""COVIDx from lists of several versions."""

import numpy as np
import pytest
from miniatures import covidx as miniature

from plan_jax.data.builders import covidx
from plan_jax.data.builders.covidx import CovidxConfig, read_items
from plan_jax.data.dataset import open_dataset
from plan_jax.data.preparation import check_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import count_leaks
from plan_jax.types import UserError


def read(folder, **options):
    source = SourceFolder(folder, covidx.FACTS.page)
    items = list(read_items(source, CovidxConfig(name="", **options)))
    return {item.image_id: item for item in items}, source


def test_lines_are_read_from_the_right(tmp_path):
    miniature.write(tmp_path)
    items, source = read(tmp_path, lists="9A", val_fraction=0.0)
    patients = {name: item.patient_id for name, item in items.items()}
    assert patients["COVID(70).png"] == "COVID 70"
    assert patients["SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg"] == "3"
    assert patients["abff4044-3c0a-458f-b0c7-04254be7fc0c.png"].startswith("abff4044")
    assert len(items) == 11
    assert {name for name, item in items.items() if not source.has(item.image)} == {
        miniature.MISSING
    }
    assert source.dropped == {}
    for split, lines in (("train", miniature.TRAIN_9A), ("test", miniature.TEST_9A)):
        for line in lines:
            item = items[miniature.file_of(line)]
            assert item.split == split and item.image == f"{split}/{item.image_id}"
            present = [name for name, value in item.labels.items() if value == 1]
            assert [name.casefold() for name in present] == [
                field.casefold() for field in line.split(" ") if field in miniature.CLASSES_B
            ]
            assert sorted(item.labels.values()) == [0, 0, 1]


def test_a_list_of_two_classes_says_nothing_of_pneumonia(tmp_path):
    miniature.write(tmp_path)
    items, _ = read(tmp_path, lists="9B")
    assert items["COVID(72).png"].labels == {"COVID-19": 1}
    assert items["0010f549-b242-4e94-87a8-57d79de215fc.png"].labels == {"COVID-19": 0}


def test_of_several_versions_one_has_to_be_chosen(tmp_path):
    miniature.write(tmp_path)
    with pytest.raises(
        UserError, match=r"versions 9A, 9B; choose one by the field lists, as lists=9A"
    ):
        read(tmp_path)
    with pytest.raises(UserError, match="lists '10' of dataset covidx is unknown"):
        read(tmp_path, lists="10")
    with pytest.raises(UserError, match=r"has no train_COVIDx8A\.txt; download"):
        read(tmp_path, lists="8A")


def test_cxr4_has_films_for_validation(tmp_path):
    miniature.write_cxr4(tmp_path)
    items, source = read(tmp_path)
    assert [item.split for item in items.values()] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert all(source.has(item.image) for item in items.values())


def test_a_film_is_found_in_the_folder_of_another_split(tmp_path):
    miniature.write_cxr4(tmp_path)
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    miniature.write_lists(tmp_path, train=miniature.TRAIN_9A[:6], test=miniature.TEST_9A)
    items, source = read(tmp_path)
    assert items["COVID(72).png"].image == "val/COVID(72).png"
    assert all(source.has(item.image) for item in items.values())


def test_names_of_files_may_have_blanks(tmp_path):
    miniature.write_lists(
        tmp_path,
        train=("7 second film.png COVID-19 cohen", "a b lone.png normal rsna"),
        test=("8 x.png normal rsna",),
    )
    (tmp_path / "train").mkdir()
    miniature.write_film(tmp_path / "train/second film.png")
    items, _ = read(tmp_path)
    assert {item.patient_id: name for name, item in items.items()} == {
        "7": "second film.png",
        "a b": "lone.png",
        "8": "x.png",
    }


def test_lines_that_cannot_be_read_are_listed(tmp_path):
    lines = ("patient_id filename class data_source", "1 a.png normal rsna", "b.png normal", "x")
    miniature.write_lists(tmp_path, train=lines, test=("2 c.png normal rsna",))
    items, source = read(tmp_path)
    assert list(items) == ["a.png", "c.png"]
    assert source.dropped == {
        "a line of a list without patient, file and class": [
            "train_COVIDx9A.txt:1",
            "train_COVIDx9A.txt:3",
            "train_COVIDx9A.txt:4",
        ]
    }


def test_no_patient_of_test_is_trained_on(tmp_path):
    # As ANON191 in version 6.
    train = ("ANON191 a.png positive actmed", "ANON191 b.png positive actmed", "5 c.png negative")
    miniature.write_lists(tmp_path, "_COVIDx6", train=train, test=("ANON191 d.png positive",))
    items, source = read(tmp_path)
    assert sorted(items) == ["c.png", "d.png"]
    assert source.dropped == {"a film of a patient of a later list": ["a.png", "b.png"]}
    # A hash puts all films of a patient into one split, whatever the lists say.
    assert sorted(read(tmp_path, split="hash")[0]) == ["a.png", "b.png", "c.png", "d.png"]
    train = [f"p{index // 3} {index}.png normal rsna" for index in range(300)]
    miniature.write_lists(tmp_path, "_COVIDx6", train=train, test=("q t.png normal rsna",))
    items, _ = read(tmp_path, val_fraction=0.3)
    splits = [(item.patient_id, item.split) for item in items.values()]
    assert {split for _, split in splits} == {"train", "val", "test"}
    assert count_leaks(splits) == {"val": 0, "test": 0}


def test_mgca_takes_a_fifth_of_the_films_for_validation(tmp_path):
    train = [f"p{index // 2} {index}.png normal rsna" for index in range(33)]
    miniature.write_lists(tmp_path, train=train, test=("q t.png normal rsna",))
    items, source = read(tmp_path, split="mgca_compat")
    assert "has 33, so the splits are not the published ones" in source.notes[0]
    val = np.random.RandomState(0).permutation(33)[:7]  # 26 of 33 are trained on
    assert {name for name, item in items.items() if item.split == "val"} == {
        f"{index}.png" for index in val
    }
    assert items["t.png"].split == "test"
    trained = {item.patient_id for item in items.values() if item.split == "train"}
    leaks = sum(item.patient_id in trained for item in items.values() if item.split == "val")
    assert leaks > 0
    lines = check_dataset("covidx", {"source": str(tmp_path), "split": "mgca_compat"})
    assert f"leak: {leaks} of 7 images of val are of patients whom train has too" in lines


def test_records_have_labels_and_films_of_every_format(tmp_path):
    miniature.write(tmp_path / "source")
    options = {"lists": "9A", "val_fraction": 0.0, "max_bad": 0.2, "size": 32}
    options |= {"source": str(tmp_path / "source"), "data_dir": str(tmp_path)}
    train = open_dataset("covidx", "train", **options)
    assert train.findings == covidx.FINDINGS
    records = {record.record_id: record for record in train}
    assert len(records) == 8 and miniature.MISSING not in records
    assert records["000004.jpg"].image.shape == (24, 32, 1)
    assert records["000004.png"].geometry.shape == (48, 36)
    assert records["COVID(70).png"].labels.tolist() == [0, 0, 1]
    assert len(open_dataset("covidx", "test", **options)) == 2

"""VinDr-CXR: readers who disagree, boxes that are fused, and films of several encodings."""

import numpy as np
import pytest
from miniatures import vindr_cxr as miniature
from miniatures.vindr_cxr import ABNORMAL, BROKEN, NORMAL, SINGLE, TEST

from plan_jax.data.builders import vindr_cxr
from plan_jax.data.builders.vindr_cxr import VindrCxrConfig, fuse, read_items
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **options):
    source = SourceFolder(folder, vindr_cxr.FACTS.page)
    items = list(read_items(source, VindrCxrConfig(name="", **options)))
    return {item.image_id: item for item in items}, source


def list_present(item):
    return {name for name, value in item.labels.items() if value == 1}


def list_boxes(item):
    return [(box.label, box.corners) for box in item.boxes]


def test_a_finding_is_present_if_two_readers_give_it(tmp_path):
    miniature.write_physionet(tmp_path)
    items, source = read(tmp_path, val_fraction=0.0)
    assert {name: list_present(item) for name, item in items.items()} == {
        NORMAL: {"No finding"},
        ABNORMAL: {"Cardiomegaly", "Pneumonia"},
        SINGLE: {"No finding"},
        BROKEN: {"No finding"},
        TEST: {"Lung Opacity", "Other diseases"},
    }
    assert all(set(item.labels) == set(vindr_cxr.FINDINGS) for item in items.values())
    assert all(sorted(item.labels.values())[0] == 0 for item in items.values())
    # The first two are fused, the third is elsewhere; the one of the nodule is of one reader.
    assert list_boxes(items[ABNORMAL]) == [
        ("Cardiomegaly", (11, 30, 41, 51)),
        ("Cardiomegaly", (44, 2, 54, 12)),
    ]
    assert list_boxes(items[SINGLE]) == []
    assert list_boxes(items[TEST]) == [("Lung Opacity", (6, 8, 26, 28))]
    assert {name: item.split for name, item in items.items() if item.split != "train"} == {
        TEST: "test"
    }
    assert all(source.has(item.image) for item in items.values())
    assert source.dropped == {}


def test_reduced_copies_are_not_taken_for_films(tmp_path):
    miniature.write_physionet(tmp_path)
    (tmp_path / "train" / f"{NORMAL}.dicom").rename(tmp_path / "train" / f"{NORMAL}.png")
    (tmp_path / "train" / f"{SINGLE}.dicom").rename(tmp_path / "train" / f"{SINGLE}.dcm")
    items, source = read(tmp_path)
    assert items[NORMAL].image == f"train/{NORMAL}.dicom" and not source.has(items[NORMAL].image)
    assert items[SINGLE].image == f"train/{SINGLE}.dcm"


def test_any_reader_or_the_boxes_of_every_reader_can_be_asked_for(tmp_path):
    miniature.write_physionet(tmp_path, films=False)
    items, _ = read(tmp_path, min_readers=1, fuse_boxes=False)
    assert list_present(items[ABNORMAL]) == {"Cardiomegaly", "Pneumonia", "Nodule/Mass"}
    assert list_present(items[SINGLE]) == {"No finding", "ILD"}
    assert len(list_boxes(items[ABNORMAL])) == 4
    items, _ = read(tmp_path, min_readers=3)
    assert list_present(items[ABNORMAL]) == {"Cardiomegaly"}
    assert list_present(items[TEST]) == {"Lung Opacity", "Other diseases"}
    with pytest.raises(UserError, match="min_readers 4"):
        read(tmp_path, min_readers=4)


def test_without_the_tables_of_labels_annotations_give_them(tmp_path):
    miniature.write_physionet(tmp_path, labels=False, films=False)
    items, source = read(tmp_path)
    assert list_present(items[ABNORMAL]) == {"Cardiomegaly", "Pneumonia"}
    assert list_present(items[TEST]) == {"Lung Opacity", "Other diseases"}
    assert sum("labels are those of the annotations" in note for note in source.notes) == 2
    readers = [(NORMAL, "R1", {"No finding"})]
    miniature.write_labels(tmp_path / "annotations/image_labels_train.csv", readers)
    items, source = read(tmp_path)
    assert sorted(items) == sorted([NORMAL, TEST])
    assert source.dropped == {
        "annotations of a film that the table of labels does not have": sorted(
            [ABNORMAL, SINGLE, BROKEN]
        )
    }


def test_kaggle_has_fifteen_of_the_labels_and_no_test(tmp_path):
    miniature.write_kaggle(tmp_path)
    items, source = read(tmp_path)
    assert sorted(items) == sorted(miniature.READINGS)
    assert list_present(items[ABNORMAL]) == {"Cardiomegaly"}
    assert len(items[ABNORMAL].labels) == 15 and "Pneumonia" not in items[ABNORMAL].labels
    assert {item.split for item in items.values()} == {""}
    assert "divided by hash" in source.notes[0]
    with pytest.raises(UserError, match=r"annotations_train\.csv"):
        read(tmp_path, split="benchx")


def test_columns_of_any_order_and_boxes_that_cannot_be(tmp_path):
    rows = ["9,8,2,1,ILD,R1,a", "9,8,,1,ILD,R1,b", "1,8,2,1,ILD,R1,b", "1,8,2,1,ILD,R2,c"]
    header = "y_max,x_max,y_min,x_min,class_name,rad_id,image_id"
    (tmp_path / "train.csv").write_text("\n".join([header, *rows]))
    items, source = read(tmp_path)
    assert list_boxes(items["a"]) == [("ILD", (1, 2, 8, 9))]
    assert list_present(items["b"]) == {"ILD"}  # by the one reader of the film
    assert source.dropped == {"a box has no four numbers": ["b"], "a box has no area": ["b", "c"]}
    (tmp_path / "train.csv").write_text(f"{header}\n9,8,2,1,Odd,R1,a\n")
    with pytest.raises(UserError, match="class 'Odd' of a"):
        read(tmp_path)
    (tmp_path / "train.csv").unlink()
    with pytest.raises(UserError, match=r"annotations_train\.csv \(or train\.csv\)"):
        read(tmp_path)


def test_benchx_holds_out_as_many_films_with_a_finding(tmp_path):
    lines = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
    lines += [f"{index:04d},R1,{'No finding' if index % 5 else 'COPD'},,,," for index in range(100)]
    (tmp_path / "annotations_train.csv").write_text("\n".join(lines[:1] + lines[:0:-1]))
    (tmp_path / "annotations_test.csv").write_text(
        "image_id,class_name,x_min,y_min,x_max,y_max\nt,No finding,,,,\n"
    )
    items, source = read(tmp_path, split="benchx")
    counts = {
        split: (len(part), sum("COPD" in list_present(item) for item in part))
        for split in ("train", "val", "test")
        for part in [[item for item in items.values() if item.split == split]]
    }
    assert counts == {"train": (80, 16), "val": (20, 4), "test": (1, 0)}
    assert "not the published ones" in " ".join(source.notes)


def test_boxes_are_fused_with_the_group_that_they_overlap_most():
    boxes = [(0.0, 0.0, 10.0, 10.0), (6.0, 0.0, 16.0, 10.0), (5.0, 0.0, 15.0, 10.0)]
    assert fuse(boxes) == [(0.0, 0.0, 10.0, 10.0), (5.5, 0.0, 15.5, 10.0)]
    # An IoU of 50 / 100 is enough.
    assert fuse([(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 5.0)]) == [(0.0, 0.0, 10.0, 7.5)]
    assert fuse([]) == []


def test_records_show_films_of_every_encoding(tmp_path):
    miniature.write_physionet(tmp_path / "source")
    options = {"val_fraction": 0.0, "max_bad": 0.3, "size": 64, "data_dir": str(tmp_path)}
    train = open_dataset("vindr_cxr", "train", source=str(tmp_path / "source"), **options)
    assert train.findings == vindr_cxr.FINDINGS
    records = {record.record_id: record for record in train}
    assert sorted(records) == sorted([NORMAL, ABNORMAL, SINGLE])  # one cannot be read
    expected = miniature.draw_film() / 4095 * 255
    for record in records.values():
        assert record.geometry.shape == (miniature.ROWS, miniature.COLUMNS)
        np.testing.assert_allclose(record.image[..., 0], expected, atol=2)
    (phrase,) = records[ABNORMAL].phrases
    boxes = records[ABNORMAL].geometry.to_original(np.asarray(phrase.boxes))
    np.testing.assert_allclose(boxes, [(11, 30, 41, 51), (44, 2, 54, 12)], atol=1)


def test_boxes_that_too_few_readers_back_are_counted(tmp_path):
    miniature.write_physionet(tmp_path, films=False)
    source = read(tmp_path)[1]
    sentence = "are left out, as fewer than 2 readers gave their finding"
    assert source.notes == [f"2 of 5 boxes of train {sentence}"]
    assert read(tmp_path, min_readers=1)[1].notes == []


def test_the_films_of_train_need_their_readers(tmp_path):
    miniature.write_physionet(tmp_path, films=False)
    for table in ("annotations_train.csv", "image_labels_train.csv"):
        path = tmp_path / "annotations" / table
        content = path.read_text()
        path.write_text(content.replace("rad_id", "rad_ID", 1))
        with pytest.raises(UserError, match=f"{table} .*has no column 'rad_id'"):
            read(tmp_path)
        path.write_text(content)


def test_a_label_that_is_not_0_or_1_is_an_error(tmp_path):
    miniature.write_physionet(tmp_path, films=False)
    path = tmp_path / "annotations/image_labels_test.csv"
    path.write_text(path.read_text().replace(f"{TEST},0", f"{TEST},yes"))
    with pytest.raises(UserError, match="label 'yes' of Aortic enlargement of 002a34c5"):
        read(tmp_path)


def test_no_film_of_train_is_tested_though_it_has_no_annotations(tmp_path):
    miniature.write_physionet(tmp_path, films=False)
    films = [(f"{index:032x}", reader, set()) for index in range(30) for reader in ("R1", "R2")]
    miniature.write_labels(tmp_path / "annotations/image_labels_train.csv", films)
    items, _ = read(tmp_path)
    assert {item.split for name, item in items.items() if name != TEST} == {"train", "val"}


def test_films_may_have_a_suffix_in_capitals(tmp_path):
    miniature.write_physionet(tmp_path)
    for path in [*tmp_path.rglob("*.dicom")]:
        path.rename(path.with_suffix(".DICOM"))
    items, source = read(tmp_path)
    assert all(source.has(item.image) for item in items.values())

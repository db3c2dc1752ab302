"""CheXpert Plus: one report a study, sections, lines of labels, and three forms of its films."""

import csv

import numpy as np
import pytest
from miniatures import chexpert_plus as miniature

from plan_jax.data.builders import chexpert_plus
from plan_jax.data.builders.chexpert_plus import FINDINGS, ChexpertPlusConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **fields):
    """Returns the folder as it was read, and its items by id."""
    source = SourceFolder(folder, chexpert_plus.FACTS.page)
    config = ChexpertPlusConfig(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in chexpert_plus.read_items(source, config)}


@pytest.mark.parametrize("layout", ["png", "dcm", "jpg"])
def test_films_are_found_in_each_form(tmp_path, layout):
    miniature.write(tmp_path, layout)
    source, items = read(tmp_path, val_fraction=0.0)
    assert not source.dropped
    assert list(items) == [row[0].removesuffix(".jpg") for row in miniature.ROWS]
    assert all(source.has(item.image) for item in items.values())
    assert [item.view for item in items.values()] == ["AP", "LATERAL", "PA", "AP", "AP", "PA"]
    assert [item.split for item in items.values()] == ["train"] * 5 + ["test"]
    item = items["train/patient00003/study2/view1_frontal"]
    assert (item.patient_id, item.study_id) == ("patient00003", "patient00003/study2")


def test_all_films_of_a_study_have_the_report_of_the_first(tmp_path):
    miniature.write(tmp_path)
    source, items = read(tmp_path)
    texts = [
        items[f"train/patient00002/study1/{name}"].sections["impression"]
        for name in ("view1_frontal", "view2_lateral")
    ]
    assert texts == ["STABLE SINCE 1/1/2001."] * 2
    assert source.notes == [
        "1 film had another copy of the report than the first film of the study, whose copy is used"
    ]


def test_sections_are_kept_apart_and_line_breaks_are_real(tmp_path):
    miniature.write(tmp_path)
    _, items = read(tmp_path)
    assert items["train/patient00001/study1/view1_frontal"].sections == {
        "findings": "NO EFFUSION.\nHEART IS NORMAL.",
        "impression": "1. CLEAR.",
        "report": "NARRATIVE:\n\nNO EFFUSION.\nHEART IS NORMAL.\n1. CLEAR.",
    }
    assert "findings" not in items["valid/patient64541/study1/view1_frontal"].sections


def test_labels_are_lines_of_json(tmp_path):
    miniature.write(tmp_path)
    _, items = read(tmp_path, label_blank=0)
    labels = {name: item.labels for name, item in items.items() if item.labels}
    assert labels == {
        "train/patient00001/study1/view1_frontal": dict.fromkeys(FINDINGS, 0),
        "train/patient00003/study2/view1_frontal": dict.fromkeys(FINDINGS, 0)
        | {"Edema": 1, "Pneumonia": -1},
    }
    _, items = read(tmp_path)
    unknown = items["train/patient00001/study1/view1_frontal"].labels
    assert unknown == dict.fromkeys(FINDINGS, -1) | {"Pleural Effusion": 0}
    source, items = read(tmp_path, labelled_text="findings")
    assert not any(item.labels for item in items.values())
    assert (
        source.notes[0] == "there is no chexbert_labels/findings_fixed.json, so no film has labels"
    )


@pytest.mark.parametrize("fields", [{"val_fraction": 0.5}, {"split": "hash"}])
def test_no_patient_is_in_two_splits(tmp_path, fields):
    miniature.write(tmp_path)
    _, items = read(tmp_path, **fields)
    splits = {(item.patient_id, item.split) for item in items.values()}
    assert len(splits) == 4
    assert ({split for _, split in splits} == {""}) == ("split" in fields)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no df_chexpert_plus_240401.csv; download it from stan"):
        read(tmp_path)
    with pytest.raises(UserError, match="labelled_text 'text' of dataset chexpert_plus"):
        ChexpertPlusConfig(name="", labelled_text="text")
    miniature.write(tmp_path)
    table = tmp_path / "df_chexpert_plus_240401.csv"
    rows = list(csv.reader(table.open(newline="")))
    with table.open("w", newline="") as file:  # columns in another order, one row cut off
        csv.writer(file).writerows([*(row[::-1] for row in rows), rows[1][:20]])
    source, items = read(tmp_path)
    assert len(items) == 6 and len(source.dropped["a row of a table is cut off"]) == 1
    table.write_text(table.read_text().replace("valid,", "dev,", 1))
    with pytest.raises(UserError, match="split 'dev' of valid/patient64541"):
        read(tmp_path)


@pytest.mark.parametrize("layout", ["png", "dcm"])
def test_records_have_films_and_sections(tmp_path, layout):
    miniature.write(tmp_path / "source", layout)
    fields = {"source": str(tmp_path / "source"), "size": 48, "workers": 1, "val_fraction": 0.0}
    records = list(
        open_dataset("chexpert_plus", "train", data_dir=str(tmp_path / "data"), **fields)
    )
    assert len(records) == 4  # a lateral film is left out
    for record in records:
        image = record.image.reshape(record.image.shape[:2])
        assert image.shape == miniature.SHAPE
        np.testing.assert_allclose(image[20, [4, 40]], [200, 60], atol=1)
    texts = {record.record_id: record.sections for record in records}
    assert texts["train/patient00003/study3/view1_frontal"]["findings"] == "EDEMA."


def test_a_report_in_another_column_is_not_shown(tmp_path):
    miniature.write(tmp_path)
    table = tmp_path / "df_chexpert_plus_240401.csv"
    rows = list(csv.reader(table.open(newline="")))
    rows[1][-1] = "SMALL LEFT EFFUSION IS SEEN."
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match="split a text of 28 characters of"):
        read(tmp_path)

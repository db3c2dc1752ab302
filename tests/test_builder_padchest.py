"""PadChest and PadChest-GR: lists as text, bit depth, and sentences with boxes in two languages."""

import json

import numpy as np
import pytest
from miniatures import padchest as miniature
from miniatures import padchest_gr as grounded

from configs.eval import padchest_gr_grounding
from plan_jax.data.builders import padchest, padchest_gr
from plan_jax.data.builders.padchest import FINDINGS, PadchestConfig
from plan_jax.data.builders.padchest_gr import PadchestGrConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError

TERMS = ("pleural effusion", "loculated pleural effusion", "nodule")


def read(folder, module=padchest, **fields):
    """Returns the folder as it was read, and its items by id."""
    source = SourceFolder(folder, module.FACTS.page)
    config = {padchest: PadchestConfig, padchest_gr: PadchestGrConfig}[module]
    items = list(module.read_items(source, config(name="", source=str(folder), **fields)))
    return source, {item.image_id: item for item in items}


# PadChest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_films_have_views_bits_and_ids(tmp_path, layout):
    miniature.write(tmp_path, layout)
    source, items = read(tmp_path)
    assert source.dropped == {"PadChest excludes it": ["3_a.png", "3_b.png"]}
    assert {name: (item.view, item.bit_depth) for name, item in items.items()} == {
        "1_a.png": ("PA", 12),
        "1_b.png": ("LATERAL", 12),
        "2_a.png": ("AP", 10),
        "2_b.png": ("OTHER", 12),
        "4_a.png": ("UNKNOWN", 12),
        "5_a.png": ("AP", 12),
    }
    assert items["1_a.png"].patient_id == miniature.PATIENT
    assert items["1_a.png"].sections == {"report": "sin hallazg ."}
    assert [name for name, item in items.items() if not source.has(item.image)] == ["5_a.png"]


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_no_patient_of_padchest_is_in_two_splits(tmp_path, fraction):
    miniature.write(tmp_path)
    _, items = read(tmp_path, val_fraction=fraction, test_fraction=fraction)
    splits = {(item.patient_id, item.split) for item in items.values()}
    assert len(splits) == 4 and ({split for _, split in splits} == {"train"}) == (fraction == 0)


@pytest.mark.parametrize("place", ["source", "option"])
def test_train_lacks_the_patients_that_padchest_gr_evaluates(tmp_path, place):
    miniature.write(tmp_path / "source")
    other = tmp_path / ("source/gr" if place == "source" else "gr")
    other.mkdir()
    (other / "master_table.csv").write_text("PatientID,split\n22,validation\n44,test\n55,train\n")
    fields = {"val_fraction": 0.0, "test_fraction": 0.0}
    fields |= {"padchest_gr": str(other)} if place == "option" else {}
    source, items = read(tmp_path / "source", **fields)
    left_out = ["2_a.png", "2_b.png", "4_a.png"]
    assert source.dropped["its patient is in val or test of PadChest-GR"] == left_out
    assert list(items) == ["1_a.png", "1_b.png", "5_a.png"]
    assert len(read(tmp_path / "source", keep_evaluated=True, **fields)[1]) == 6
    # In another split than train they may stay.
    assert len(read(tmp_path / "source", **fields | {"test_fraction": 1.0})[1]) == 6


def test_labels_are_those_of_the_list_and_unknown_if_none_is_a_finding(tmp_path):
    miniature.write(tmp_path)
    source, items = read(tmp_path)
    present = {
        name: {finding for finding, value in item.labels.items() if value}
        for name, item in items.items()
        if item.labels
    }
    assert present == {
        "1_a.png": {"normal"},
        "1_b.png": {"pacemaker", "cardiomegaly"},
        "5_a.png": {"pneumonia"},
    }
    assert all(tuple(item.labels) in ((), FINDINGS) for item in items.values())
    absent, note = source.notes
    assert absent.startswith("master_table.csv is not there, so train may have patients of the")
    assert note == ("label martian of 1 film is none of PadChest's findings, and is not used")


def test_films_that_no_physician_labelled_may_be_left_out(tmp_path):
    miniature.write(tmp_path)
    source, items = read(tmp_path, labelled_by="physician")
    assert list(items) == ["1_a.png", "1_b.png", "4_a.png"]
    assert source.dropped["not labelled by a physician"] == ["2_a.png", "2_b.png", "5_a.png"]


def test_archives_and_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no PADCHEST_chest.*download it from bimcv"):
        read(tmp_path)
    with pytest.raises(UserError, match="labelled_by 'nobody' of dataset padchest"):
        PadchestConfig(name="", labelled_by="nobody")
    miniature.write(tmp_path, "archives")
    with pytest.raises(UserError, match=r"0\.zip in .* is not unpacked"):
        read(tmp_path)


def test_records_are_scaled_by_the_bits_of_the_table(tmp_path):
    miniature.write(tmp_path / "source")
    fields = {"source": str(tmp_path / "source"), "size": 40, "workers": 1, "max_bad": 0.5}
    fields |= {"val_fraction": 0.0, "test_fraction": 0.0}
    records = {
        record.record_id: record
        for record in open_dataset("padchest", "train", data_dir=str(tmp_path / "data"), **fields)
    }
    assert sorted(records) == ["1_a.png", "2_a.png"]
    for record in records.values():  # three quarters of white in 12 bits and in 10
        assert record.image.shape[:2] == miniature.SHAPE
        assert sorted(np.unique(record.image).tolist()) in ([0, 191], [0, 192])


# PadChest-GR -------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["csv", "zip"])
def test_sentences_are_phrases_with_boxes(tmp_path, table):
    grounded.write(tmp_path, table=table)
    source, items = read(tmp_path, padchest_gr)
    assert source.dropped == {
        "a report of a study that the master table does not have": ["9_a.png"],
        "a box has no four numbers": ["1_b.png"],
    }
    assert {name: (item.split, item.patient_id, item.view) for name, item in items.items()} == {
        "1_a.png": ("test", "11", "PA"),
        "1_b.png": ("test", "11", "AP"),
        "2_a.png": ("val", "22", "PA"),
        "3_a.png": ("train", "33", "PA"),
    }
    assert all(source.has(item.image) for item in items.values())
    (box,) = items["1_a.png"].boxes
    assert box.corners == grounded.BOX and box.is_normalised
    assert (box.phrase, box.label) == ("Pleural effusion on the left", "pleural effusion")
    assert [box.phrase for box in items["1_b.png"].boxes] == ["Nodules in both lungs."] * 2
    assert items["1_a.png"].labels == {TERMS[0]: 1, TERMS[1]: 1, TERMS[2]: 0}
    assert items["2_a.png"].labels == dict.fromkeys(TERMS, 0)
    assert items["1_a.png"].sections == {
        "findings": "Pleural effusion on the left. The heart is normal.",
        "findings_es": "Derrame pleural izquierdo. Corazon normal.",
    }


def test_language_and_second_reader_are_options(tmp_path):
    grounded.write(tmp_path)
    _, items = read(tmp_path, padchest_gr, language="es", extra_boxes=True)
    assert [(box.phrase, box.corners[0]) for box in items["1_a.png"].boxes] == [
        ("Derrame pleural izquierdo.", 0.25),
        ("Derrame pleural izquierdo.", 0.2),
    ]
    assert items["1_a.png"].sections["findings_en"].startswith("Pleural effusion")
    assert items["1_a.png"].sections["findings"].startswith("Derrame")


@pytest.mark.parametrize("rule", ["official", "hash"])
def test_no_patient_is_in_two_splits(tmp_path, rule):
    grounded.write(tmp_path)
    _, items = read(tmp_path, padchest_gr, split=rule)
    splits = {(item.patient_id, item.split) for item in items.values()}
    assert len(splits) == 3 and (rule != "hash" or {split for _, split in splits} == {""})


def test_parts_and_mistakes_of_padchest_gr_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no grounded_reports_20240819\.json"):
        read(tmp_path, padchest_gr)
    with pytest.raises(UserError, match="language 'fr' of dataset padchest_gr"):
        PadchestGrConfig(name="", language="fr")
    grounded.write(tmp_path, "parts")
    with pytest.raises(UserError, match=r"join the parts with cat PadChest_GR\.zip"):
        read(tmp_path, padchest_gr)
    table = tmp_path / "master_table.csv"
    text = table.read_text()
    table.write_text(text.replace("s1,1_a.png,11,test,Loc", "s1,1_a.png,11,train,Loc"))
    with pytest.raises(UserError, match="study s1 of master_table.csv is in the splits test and"):
        read(tmp_path, padchest_gr)
    table.write_text(text.replace("validation", "dev"))
    with pytest.raises(UserError, match="split 'dev' of study s3 in master_table.csv"):
        read(tmp_path, padchest_gr)
    (tmp_path / "grounded_reports_20240819.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is not a list of reports"):
        read(tmp_path, padchest_gr)


def test_records_have_boxes_in_pixels_that_go_back_to_the_original(tmp_path):
    grounded.write(tmp_path / "source")
    config = padchest_gr_grounding.get_config()
    assert config.data.name == "padchest_gr" and config.eval.tasks == ("grounding",)
    fields = config.data.builder.to_dict() | {"source": str(tmp_path / "source"), "workers": 1}
    fields["size"] = 32
    records = {
        record.record_id: record
        for record in open_dataset("padchest_gr", "test", data_dir=str(tmp_path / "data"), **fields)
    }
    assert sorted(records) == ["1_a.png", "1_b.png"]
    record = records["1_a.png"]
    (phrase,) = record.phrases
    assert phrase.text == "Pleural effusion on the left"
    np.testing.assert_allclose(np.asarray(phrase.boxes) * 2, [[12, 32, 36, 64]], atol=1)
    x0, y0, x1, y1 = np.asarray(phrase.boxes[0]).astype(int)
    image = record.image.reshape(record.image.shape[:2])
    assert image[y0:y1, x0:x1].min() > 240 and image[: y0 - 1].max() < 70
    assert len(records["1_b.png"].phrases[0].boxes) == 2

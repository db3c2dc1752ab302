"""ReXGradient-160K: studies of three JSON files, with views and sections."""

import json

import pytest
from miniatures import rexgradient as miniature

from plan_jax.data.builders import rexgradient
from plan_jax.data.builders.rexgradient import RexgradientConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **fields):
    """Returns the folder as it was read, and its items by id."""
    source = SourceFolder(folder, rexgradient.FACTS.page)
    config = RexgradientConfig(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in rexgradient.read_items(source, config)}


@pytest.mark.parametrize("snake_case", [False, True])
def test_films_views_and_sections(tmp_path, snake_case):
    miniature.write(tmp_path, snake_case=snake_case)
    source, items = read(tmp_path)
    assert not source.dropped and not source.notes
    assert {name: item.view for name, item in items.items()} == miniature.VIEWS
    splits = {"train": "train", "valid": "val", "test": "test"}
    for split, study, patient, names, _, _ in miniature.STUDIES:
        for name in names:
            item = items[name]
            assert (item.split, item.study_id, item.patient_id) == (splits[split], study, patient)
            assert source.has(item.image)
    assert items["1.1"].sections == {
        "indication": "Cough",
        "findings": "Clear.",
        "impression": "Normal.",
    }
    assert items["2.1"].sections == {"findings": "No effusion."}
    assert len({(item.patient_id, item.split) for item in items.values()}) == 4
    _, items = read(tmp_path, split="hash")
    assert {item.split for item in items.values()} == {""}


def test_studies_without_images_or_text_are_dropped(tmp_path):
    studies = (
        *miniature.STUDIES,
        ("train", "S6", "GRDN06", (), (), ("", "", "Clear.", "")),
        ("train", "S7", "GRDN07", ("7.1",), ("PA",), ("Cough", "", "None", None)),
    )
    miniature.write(tmp_path, studies=studies)
    source, items = read(tmp_path)
    assert source.dropped == {
        "a study has no image": ["S6"],
        "a study has neither findings nor impression": ["S7"],
    }
    assert items.keys() == miniature.VIEWS.keys()


def test_an_entry_may_be_no_list_or_no_object(tmp_path):
    miniature.write(tmp_path)
    path = tmp_path / "metadata/train_metadata_view_position.json"
    image = "../deid_png/GRDN01/AS1/studies/S1/series/1/instances/1.1.png"
    study = {"ImagePath": image, "ImageViewPosition": "PA", "Findings": "Clear."}
    path.write_text(json.dumps({"S1": study, "S2": ["Clear."], "S3": None}))
    source, items = read(tmp_path)
    trained = [item for item in items.values() if item.split == "train"]
    assert [(item.image_id, item.view, item.patient_id) for item in trained] == [
        ("1.1", "PA", "GRDN01")
    ]
    assert source.has(trained[0].image)
    assert source.dropped == {"a study is not an object of JSON": ["S2", "S3"]}


def test_files_without_views_are_read_where_there_are_no_others(tmp_path):
    miniature.write(tmp_path)
    for split in ("train", "valid", "test"):
        path = tmp_path / f"metadata/{split}_metadata_view_position.json"
        content = json.loads(path.read_text())
        for entry in content.values():
            del entry["ImageViewPosition"]
        path.unlink()
        (tmp_path / f"metadata/{split}_metadata.json").write_text(json.dumps(content))
    _, items = read(tmp_path)
    assert items.keys() == miniature.VIEWS.keys()
    assert {item.view for item in items.values()} == {""}


@pytest.mark.parametrize("views", ["frontal", "all"])
def test_the_dataset_is_prepared(tmp_path, views):
    (tmp_path / "source").mkdir()
    studies = (
        *miniature.STUDIES[:3],
        ("test", "S8", "GRDN08", ("8.1",), ("PA",), ("",) * 3 + ("A",)),
    )
    miniature.write(tmp_path / "source", studies=studies)
    fields = {"source": str(tmp_path / "source"), "size": 20, "views": views}
    records = [
        record
        for split in ("train", "test")
        for record in open_dataset("rexgradient", split, data_dir=str(tmp_path / "data"), **fields)
    ]
    frontal = {"1.1": "PA", "2.1": "PA", "3.1": "AP", "8.1": "PA"}
    others = {"1.2": "LATERAL", "3.2": "UNKNOWN"} if views == "all" else {}
    assert {record.record_id: record.view for record in records} == frontal | others
    for record in records:
        assert record.image.shape == (20, 16, 1) and record.geometry.shape == miniature.SHAPE
        if record.study_id == "S1":
            assert record.sections["findings"] == "Clear." and record.patient_id == "GRDN01"


def test_what_is_missing_is_named(tmp_path):
    message = r"has no metadata/train_metadata_view_position.json .*download it from huggingface.co"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    miniature.write(tmp_path, images=False)
    assert read(tmp_path)[0].notes == ["there is no folder deid_png, so no image is found"]
    (tmp_path / "deid_png.part00").write_bytes(b"part")
    with pytest.raises(
        UserError, match=r"has deid_png in parts; unpack them there by cat deid_png"
    ):
        read(tmp_path)
    (tmp_path / "deid_png").mkdir()
    path = tmp_path / "metadata/valid_metadata_view_position.json"
    path.write_text('{"S4": {"PatientID": "a", "Findings": "Clear."}}')
    with pytest.raises(UserError, match="study S4 .* no ImagePath; its entries are Findings, Pat"):
        read(tmp_path)

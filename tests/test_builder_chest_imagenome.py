"""Chest ImaGenome: every layout of scene graphs, faulty regions, triplets, splits."""

import numpy as np
import pytest
from miniatures import chest_imagenome as miniature
from miniatures import mimic_cxr as mimic_miniature
from miniatures import ms_cxr as ms_cxr_miniature

from plan_jax.data import loader, report_parser
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.builders import chest_imagenome
from plan_jax.data.builders.chest_imagenome import (
    EVALUATED,
    FACTS,
    FINDINGS,
    GOLD,
    REGIONS,
    ChestImagenomeConfig,
)
from plan_jax.data.dataset import open_dataset
from plan_jax.data.phantom import ANATOMY
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.methods import asg
from plan_jax.types import UserError

FIRST, SECOND, AVOIDED, THIRD = (
    film.dicom_id
    for film in (miniature.FIRST, miniature.SECOND, miniature.AVOIDED, miniature.THIRD)
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic_cxr_jpg")
    mimic_miniature.write(folder)
    return folder


def read(folder, images="", **fields):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, FACTS.page)
    config = ChestImagenomeConfig(name="", source=str(folder), images=str(images), **fields)
    return source, {item.image_id: item for item in chest_imagenome.read_items(source, config)}


@pytest.mark.parametrize(
    ("layout", "below"),
    [
        ("folder", ""),
        ("nested", ""),
        ("zip", ""),
        ("zip", "physionet.org/files/chest-imagenome/1.0.0"),
        ("folder", "physionet.org/files/chest-imagenome/1.0.0"),
    ],
)
def test_each_layout_has_the_same_regions(tmp_path, images, layout, below):
    miniature.write(tmp_path, layout, below)
    source, items = read(tmp_path, images)
    assert list(items) == [FIRST, SECOND]
    for item in items.values():
        assert dict(item.regions) == {
            "right lung": (4, 6, 20, 50),
            "left lung": (26, 6, 44, 50),
            "heart": (18, 30, 34, 50),
            "left lower zone": (26, 36, 44, 50),
            "right clavicle": (0, 2, 18, 6),
        }
    assert source.dropped == {
        "a region has no area in the image": list(items),
        "an image has no scene graph": [THIRD],
        GOLD: [AVOIDED],
    }
    first = items[FIRST]
    assert (images / first.image).is_file() and first.view == "PA"
    assert (first.patient_id, first.study_id) == ("10000001", "50000001")
    assert first.sections["impression"] == "Left basal ___ opacity."


def test_attributes_become_triplets_and_labels(tmp_path, images):
    miniature.write(tmp_path)
    source, items = read(tmp_path, images)
    assert items[FIRST].triplets == (
        ("left lower zone", "lung opacity", 1),
        ("left lower zone", "pneumothorax", 0),
        ("left lung", "lung opacity", 0),
        ("left lung", "pneumonia", 1),
        ("left breast", "new finding", 1),
    )
    assert items[FIRST].labels == {"lung opacity": 1, "pneumothorax": 0, "pneumonia": 1}
    assert "findings of triplets that are no labels: new finding" in source.notes


def test_sentences_find_the_regions_that_have_boxes():
    assert len(REGIONS) == len(set(REGIONS.values())) == FACTS.counts["regions"]
    assert len(FINDINGS) == len(set(FINDINGS)) == 53
    sentence = "The heart is enlarged, with opacity of the right upper lobe and the left base."
    regions = report_parser.find_regions(sentence)
    assert {"heart", "right upper zone", "left lower zone"} <= set(regions) <= set(REGIONS)
    assert set(ANATOMY) <= set(REGIONS)


def test_gold_patients_are_left_out_of_train_under_every_rule(tmp_path, images):
    miniature.write(tmp_path)
    for fields, splits in (
        ({}, {FIRST: "train", SECOND: "test"}),
        ({"split": "mimic"}, {FIRST: "train", SECOND: "val"}),
        (
            {"split": "hash", "val_fraction": 0.0, "test_fraction": 0.0},
            {FIRST: "train", SECOND: "train"},
        ),
    ):
        source, items = read(tmp_path, images, **fields)
        assert {name: item.split for name, item in items.items()} == splits
        assert source.dropped[GOLD] == [AVOIDED]


def test_a_list_of_gold_patients_without_any_is_refused(tmp_path, images):
    miniature.write(tmp_path)
    table = tmp_path / "silver_dataset/splits/images_to_avoid.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"images_to_avoid.csv in .* names no patient; download it"):
        read(tmp_path, images)


def test_patients_of_ms_cxr_are_left_out_of_train(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        ms_cxr_miniature, "BOXES", [(miniature.FIRST, *ms_cxr_miniature.BOXES[0][1:])]
    )
    miniature.write(tmp_path / "imagenome")
    ms_cxr_miniature.write(tmp_path / "ms_cxr")
    fields = {"ms_cxr": str(tmp_path / "ms_cxr")}
    source, items = read(tmp_path / "imagenome", images, **fields)
    assert list(items) == [SECOND] and source.dropped[EVALUATED] == [FIRST]
    source, items = read(tmp_path / "imagenome", images)
    assert list(items) == [FIRST, SECOND]
    assert any("patients of the evaluation set ms_cxr" in note for note in source.notes)
    source, items = read(tmp_path / "imagenome", images, keep_evaluated=True, **fields)
    assert list(items) == [FIRST, SECOND] and not source.notes[1:]


def test_damaged_scene_graphs_are_dropped(tmp_path, images):
    miniature.write(tmp_path)
    graphs = tmp_path / "silver_dataset/scene_graph"
    (graphs / f"{FIRST}_SceneGraph.json").write_text('{"objects": [')
    (graphs / f"{SECOND}_SceneGraph.json").write_text('{"objects": [3], "attributes": []}')
    source, items = read(tmp_path, images)
    assert not items
    assert source.dropped["a scene graph is damaged"] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("splits/images_to_avoid.csv", "has no silver_dataset/splits/images_to_avoid.csv"),
        ("splits/valid.csv", "has no silver_dataset/splits/valid.csv"),
        ("scene_graph.zip", "has no silver_dataset/scene_graph.zip or folder"),
    ],
)
def test_a_missing_file_is_named_with_its_page(tmp_path, images, absent, message):
    miniature.write(tmp_path, "zip")
    (tmp_path / "silver_dataset" / absent).unlink()
    with pytest.raises(UserError) as error:
        read(tmp_path, images)
    assert message in str(error.value) and f"download it from {FACTS.page}" in str(error.value)


def test_records_are_complete(tmp_path, images):
    miniature.write(tmp_path / "imagenome", "zip")
    records = open_dataset(
        "chest_imagenome",
        "train",
        data_dir=str(tmp_path / "data"),
        source=str(tmp_path / "imagenome"),
        images=str(images),
        size=30,
    )
    assert records.findings == FINDINGS
    (record,) = records
    regions = dict(zip(records.region_names, record.regions, strict=True))
    assert set(regions) == {"right lung", "left lung", "heart", "left lower zone", "right clavicle"}
    boxes = record.geometry.to_original(np.stack([regions["heart"], regions["right clavicle"]]))
    assert np.abs(boxes - [(18, 30, 34, 50), (0, 2, 18, 6)]).max() < 1
    assert ("left lower zone", "lung opacity", 1) in record.triplets
    assert record.labels[FINDINGS.index("pneumothorax")] == 0
    assert record.labels[FINDINGS.index("scoliosis")] == -1
    assert record.sections["impression"] == "Left basal ___ opacity."


def test_batches_have_what_asg_needs(tmp_path, images):
    miniature.write(tmp_path / "imagenome")
    records = open_dataset(
        "chest_imagenome",
        "train",
        data_dir=str(tmp_path / "data"),
        caption="impression",
        source=str(tmp_path / "imagenome"),
        images=str(images),
        size=30,
        split="hash",
        val_fraction=0.0,
        test_fraction=0.0,
    )
    assert len(records) == 2
    batches = loader.train_batches(
        records,
        tokenization.load_tokenizer("phantom"),
        batch_size=2,
        size=30,
        max_tokens=24,
        max_words=20,
        seed=0,
        extra=asg.REQUIRES,
        max_shift=0,
    )
    batch = next(batches)
    batches.close()
    assert set(batch.extra) == set(asg.REQUIRES)
    assert batch.extra["labels"].shape == (2, len(FINDINGS))
    place = records.region_names.index("left lower zone")
    # 60 x 48 pixels become 30 x 24, and 3 columns are added on either side.
    expected = np.asarray([13 + 3, 18, 22 + 3, 25]) / 30
    assert np.abs(batch.extra["regions"][:, place] - expected).max() < 1e-6
    # Only the report of the darker film is about the left base.
    is_about = batch.extra["region_words"][:, place].any(1)
    assert is_about.sum() == 1
    assert is_about.argmax() == batch.image[:, 28, 15, 0].argmin()

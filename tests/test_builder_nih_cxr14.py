"""NIH ChestX-ray14: both generations of its tables, the official lists, boxes, and real films."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from miniatures import nih_cxr14 as miniature
from tiny_models import make_tiny_model

from configs import testing
from configs.eval import nih_linear
from plan_jax.config import Config
from plan_jax.data.builders import nih_cxr14
from plan_jax.data.builders.nih_cxr14 import FINDINGS, NihCxr14Config
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.evaluate import evaluate_model
from plan_jax.types import UserError

SAMPLE = Path(__file__).resolve().parents[2] / "shared/data/nih_sample"


def read(folder, **fields):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, nih_cxr14.FACTS.page)
    config = NihCxr14Config(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in nih_cxr14.read_items(source, config)}


@pytest.mark.parametrize("generation", ["2020", "2017", "sex"])
@pytest.mark.parametrize("layout", ["flat", "parts"])
def test_each_generation_and_layout_has_the_same_films(tmp_path, generation, layout):
    miniature.write(tmp_path, generation, layout)
    source, items = read(tmp_path)
    assert not source.dropped and not source.notes
    assert list(items) == [row[0] for row in miniature.ROWS]
    for name, labels, _, _, view in miniature.ROWS:
        item = items[name]
        assert item.patient_id == str(int(name[:8])) and item.view == view
        present = set(labels.split("|")) - {"No Finding"}
        assert {finding for finding, value in item.labels.items() if value == 1} == present
        assert {finding for finding, value in item.labels.items() if value == 0} == (
            set(FINDINGS) - present
        )
        assert source.has(item.image)
        assert (item.split == "test") == (name in miniature.TEST)


def test_boxes_are_corners_and_infiltrate_means_infiltration(tmp_path):
    miniature.write(tmp_path)
    _, items = read(tmp_path)
    boxes = [(name, box.label, *box.corners) for name, item in items.items() for box in item.boxes]
    assert boxes == [
        (name, label.replace("Infiltrate", "Infiltration"), x, y, x + width, y + height)
        for name, label, x, y, width, height in miniature.BOXES
    ]


def test_faulty_boxes_are_dropped_by_reason(tmp_path):
    faults = (
        ("00000001_000.png", "Mass", 10, 10, 0, 5),
        ("00000001_000.png", "Mass", 10, 10, -4, 5),
        ("00000002_000.png", "Mass", 10, "nan", 5, 5),
        ("99999999_000.png", "Mass", 10, 10, 5, 5),
    )
    miniature.write(tmp_path, boxes=faults)
    source, items = read(tmp_path)
    assert not any(item.boxes for item in items.values())
    assert source.dropped == {
        "a box has no area": ["00000001_000.png", "00000001_000.png"],
        "a box has no four numbers": ["00000002_000.png"],
        "boxes of a film that the table does not have": ["99999999_000.png"],
    }


@pytest.mark.parametrize("fields", [{}, {"split": "hash"}, {"val_fraction": 0.5}])
def test_no_patient_is_in_two_splits(tmp_path, fields):
    miniature.write(tmp_path)
    _, items = read(tmp_path, **fields)
    splits = {(item.patient_id, item.split) for item in items.values()}
    assert len(splits) == 6
    # With a rule of the hash, the base class divides the patients.
    assert {split for _, split in splits} <= (
        {""} if "split" in fields else {"train", "val", "test"}
    )


def test_a_patient_in_both_lists_is_an_error(tmp_path):
    miniature.write(tmp_path, test=("00000001_000.png", "00000020_000.png"))
    with pytest.raises(UserError, match="patient 20 has films in both official lists"):
        read(tmp_path)


def test_a_film_in_both_lists_and_an_empty_list_are_errors(tmp_path):
    miniature.write(tmp_path)
    path = tmp_path / "train_val_list.txt"
    path.write_text(f"{path.read_text()}\n00000001_000.png")
    with pytest.raises(UserError, match="00000001_000.png is in both official lists of"):
        read(tmp_path)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"train_val_list.txt in .* is empty; download it again"):
        read(tmp_path)


def test_images_that_are_still_packed_are_noted(tmp_path):
    miniature.write(tmp_path)
    (tmp_path / "images/images_001.tar.gz").write_bytes(b"packed")
    assert not read(tmp_path)[0].notes
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    (note,) = read(tmp_path)[0].notes
    assert note.startswith("the images are not unpacked; in the folder of images/images_001.tar.gz")


def test_without_lists_patients_are_divided_by_hash(tmp_path):
    miniature.write(tmp_path, lists=False)
    source, items = read(tmp_path)
    assert {item.split for item in items.values()} == {""}
    assert source.notes == [
        "the official lists are not there, so patients are divided by hash",
    ]


def test_a_film_in_neither_list_is_dropped_and_boxes_in_train_are_noted(tmp_path):
    boxes = (*miniature.BOXES, ("00000030_000.png", "Mass", 10, 10, 5, 5))
    miniature.write(tmp_path, boxes=boxes)
    path = tmp_path / "train_val_list.txt"
    path.write_text(path.read_text().replace("00000002_000.png\n", ""))
    source, items = read(tmp_path)
    assert source.dropped == {"in neither of the official lists": ["00000002_000.png"]}
    assert "00000002_000.png" not in items
    (note,) = source.notes
    assert note.startswith("1 film with boxes in train_val_list.txt")


def test_a_missing_table_an_unknown_label_and_a_missing_column_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no Data_Entry_2017_v2020.csv .*nihcc.app.box.com"):
        read(tmp_path)
    miniature.write(tmp_path)
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    text = table.read_text()
    table.write_text(text.replace("Hernia", "Herniation"))
    with pytest.raises(UserError, match="label 'Herniation' of 00000030_000.png"):
        read(tmp_path)
    table.write_text(text.replace("Finding Labels", "Labels"))
    with pytest.raises(
        UserError, match="no column 'Finding Labels'; its columns are 'Image Index'"
    ):
        read(tmp_path)


def test_the_dataset_is_prepared(tmp_path):
    (tmp_path / "source").mkdir()
    miniature.write(tmp_path / "source")
    fields = {"source": str(tmp_path / "source"), "size": 64, "val_fraction": 0.0}
    records = {}
    for split, number in (("train", 6), ("test", 3)):
        dataset = open_dataset("nih_cxr14", split, data_dir=str(tmp_path / "data"), **fields)
        assert len(dataset) == number and dataset.findings == FINDINGS
        records |= {record.record_id: record for record in dataset}
    assert records.keys() == {row[0] for row in miniature.ROWS}
    for name, labels, _, _, view in miniature.ROWS:
        record = records[name]
        assert record.view == view and record.geometry.shape == (1024, 1024)
        present = [FINDINGS[index] for index in np.flatnonzero(record.labels)]
        assert present == [label for label in labels.split("|") if label in FINDINGS]
        boxes = [(phrase.finding, box) for phrase in record.phrases for box in phrase.boxes]
        truth = [row for row in miniature.BOXES if row[0] == name]
        assert len(boxes) == len(truth)
        for (finding, box), (_, label, x, y, width, height) in zip(boxes, truth, strict=True):
            assert FINDINGS[finding].startswith(label.removesuffix("e"))  # Infiltrate
            original = record.geometry.to_original(np.asarray([box]))[0]
            np.testing.assert_allclose(original, (x, y, x + width, y + height), atol=1)
            x0, y0, x1, y1 = np.round(box).astype(int)
            assert (record.image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] == 200).all()


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real films is not on this machine")
def test_the_tables_of_real_films_are_read():
    source, items = read(SAMPLE)
    assert len(items) == len({item.patient_id for item in items.values()}) == 621
    assert not source.dropped and all(source.has(item.image) for item in items.values())
    assert Counter(item.view for item in items.values()).keys() == {"PA", "AP"}
    boxes = [box for item in items.values() for box in item.boxes]
    assert len(boxes) == 12
    for x0, y0, x1, y1 in (box.corners for box in boxes):
        assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real films is not on this machine")
def test_a_linear_probe_runs_on_real_films(tmp_path):
    fields = {"source": str(SAMPLE), "size": 32, "workers": 1}
    sizes = {}
    for split in ("train", "val", "test"):
        dataset = open_dataset("nih_cxr14", split, data_dir=str(tmp_path), **fields)
        sizes[split] = len(dataset)
        record = dataset[0]
        assert record.image.shape == (32, 32, 1) and np.ptp(record.image) > 100
        assert record.geometry.shape == (256, 256) and record.view in ("PA", "AP")
    assert sum(sizes.values()) == 621 and min(sizes.values()) > 40
    config = testing.get_config().to_dict()
    protocol = nih_linear.get_config().to_dict()
    config["data"] |= protocol["data"] | {"dir": str(tmp_path), "builder": fields}
    options = protocol["eval"]["classification"] | {"fractions": (1.0,), "epochs": 2}
    config["eval"] |= protocol["eval"] | {"classification": options | {"bootstrap_samples": 20}}
    metrics = evaluate_model(make_tiny_model(), Config.from_dict(config), "test").metrics
    assert metrics["classification/100/n_train"] == sizes["train"]
    # Edema is in no film of the test split.
    assert np.isnan(metrics["classification/100/edema/auroc"])
    assert metrics["classification/100/labels_skipped"] == 1
    assert 0.3 < metrics["classification/100/auroc_macro"] < 1

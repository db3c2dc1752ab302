"""Object-CXR: objects of three shapes, and the divisions of its films."""

import numpy as np
import pytest
from miniatures import object_cxr as miniature

from plan_jax.data.builders import object_cxr
from plan_jax.data.builders.object_cxr import ObjectCxrConfig, read_items
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.shapes import draw_mask
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **options):
    source = SourceFolder(folder, object_cxr.FACTS.page)
    items = list(read_items(source, ObjectCxrConfig(name="", **options)))
    return {item.image_id: item for item in items}, source


def write_tables(folder, num_train):
    rows = [f"{index:05d}.jpg,{'0 1 1 5 5' if index % 2 else ''}" for index in range(num_train)]
    (folder / "train.csv").write_text("\n".join(["image_name,annotation", *rows]))
    (folder / "dev.csv").write_text("image_name,annotation\n08001.jpg,\n")


def test_each_object_has_a_box_and_a_shape(tmp_path):
    miniature.write(tmp_path)
    items, source = read(tmp_path)
    assert {name: [box.corners for box in item.boxes] for name, item in items.items()} == (
        miniature.BOXES
    )
    assert all(item.labels == {"Foreign object": int(bool(item.boxes))} for item in items.values())
    assert [item.split for item in items.values()] == (["train"] * 4 + ["val"] * 2 + ["test"] * 2)
    assert all(source.has(item.image) for item in items.values())
    kinds = [shape.kind for shape in items["00001"].shapes]
    assert kinds == ["rectangle", "ellipse", "polygons"]
    shape = (miniature.ROWS, miniature.COLUMNS)
    np.testing.assert_array_equal(
        draw_mask(items["00001"].shapes, shape, *shape), miniature.draw_mask("00001")
    )
    assert source.dropped == {}


def test_without_the_table_of_test_dev_is_test(tmp_path):
    miniature.write(tmp_path, ("train", "dev"))
    items, source = read(tmp_path, val_fraction=0.5)
    splits = {name: item.split for name, item in items.items()}
    assert splits["08001"] == splits["08002"] == "test"
    assert {splits[name] for name in miniature.BOXES if name < "08000"} == {"train", "val"}
    assert source.notes == ["there is no test.csv, so dev.csv is test"]
    assert read(tmp_path, split="hash")[1].notes == []


def test_mgca_takes_a_tenth_of_train_for_validation(tmp_path):
    write_tables(tmp_path, 45)
    items, source = read(tmp_path, split="mgca_compat")
    val = np.random.RandomState(0).permutation(45)[:5]
    assert {name for name, item in items.items() if item.split == "val"} == {
        f"{index:05d}" for index in val
    }
    assert items["08001"].split == "test"
    assert "not the published ones" in source.notes[0]
    (tmp_path / "test.csv").write_text("image_path,annotation\ntest/09001.jpg,\n")
    items, _ = read(tmp_path, split="mgca_compat")
    assert items["09001"].split == "unused"


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("3 1 1 5 5", "an object of unknown kind"),
        ("x", "an object of unknown kind"),
        ("0 1 1 5", "an object whose number of points its kind cannot have"),
        ("1 1 1 5 5 6 6", "an object whose number of points its kind cannot have"),
        ("2 1 1 5 5", "an object whose number of points its kind cannot have"),
        ("2 1 1 5 5 9", "an object whose number of points its kind cannot have"),
        ("0 5 1 5 8", "an object without area"),
        ("2 1 4 5 4 9 4", "an object without area"),
    ],
)
def test_objects_that_cannot_be_are_listed(tmp_path, annotation, reason):
    write_tables(tmp_path, 2)
    table = tmp_path / "train.csv"
    table.write_text(f"image_name,annotation\n00001.jpg,0 1 1 5 5; {annotation} ;\n00002.jpg,nan\n")
    items, source = read(tmp_path)
    assert [box.corners for box in items["00001"].boxes] == [(1, 1, 5, 5)]
    assert items["00002"].labels == {"Foreign object": 0}
    assert source.dropped == {reason: ["train/00001.jpg"]}


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"has no train\.csv; download it from archive"):
        read(tmp_path)
    write_tables(tmp_path, 2)
    (tmp_path / "train.csv").write_text("image,annotation\na.jpg,\n")
    items, source = read(tmp_path)
    assert list(items) == ["08001"]
    assert source.dropped == {"a row without image_name or image_path": ["train.csv:1"]}
    (tmp_path / "train.csv").write_text("image_name,objects\na.jpg,\n")
    with pytest.raises(UserError, match="no column 'annotation'; its columns are 'image_name'"):
        read(tmp_path)


def test_records_have_boxes_and_masks_of_the_original(tmp_path):
    miniature.write(tmp_path / "source")
    options = {"source": str(tmp_path / "source"), "data_dir": str(tmp_path), "size": 60}
    records = {
        record.record_id: record for record in open_dataset("object_cxr", "train", **options)
    }
    assert len(records) == 4
    (phrase,) = records["00001"].phrases
    truth = miniature.draw_mask("00001")
    assert (phrase.mask & truth).sum() >= 0.99 * (phrase.mask | truth).sum()
    (record,) = (
        record
        for record in open_dataset("object_cxr", "train", **options | {"size": 30})
        if record.record_id == "00003"
    )
    boxes = record.geometry.to_original(np.asarray(record.phrases[0].boxes))
    np.testing.assert_allclose(boxes, miniature.BOXES["00003"], atol=1)
    assert record.geometry.shape == (miniature.ROWS, miniature.COLUMNS)
    assert len(open_dataset("object_cxr", "test", **options)) == 2

"""ChestX-Det: boxes and outlines of its two generations."""

import json

import numpy as np
import pytest
from miniatures import chestx_det as miniature

from plan_jax.data.builders import chestx_det
from plan_jax.data.builders.chestx_det import FINDINGS, ChestxDetConfig, read_items
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **options):
    source = SourceFolder(folder, chestx_det.FACTS.page)
    items = list(read_items(source, ChestxDetConfig(name="", **options)))
    return {item.image_id: item for item in items}, source


def write_entries(folder, *entries):
    (folder / "ChestX_Det_train.json").write_text(json.dumps(entries))
    (folder / "ChestX_Det_test.json").write_text("[]")


def test_each_finding_has_a_box_and_an_outline(tmp_path):
    miniature.write(tmp_path)
    items, source = read(tmp_path, val_fraction=0.0)
    assert {name: item.split for name, item in items.items()} == {
        "36199": "train",
        "36302": "train",
        "61234": "test",
    }
    for films in miniature.FILMS.values():
        for name, labels, boxes, outlines in films:
            item = items[name.removesuffix(".png")]
            assert item.labels == {finding: int(finding in labels) for finding in FINDINGS}
            assert [(box.label, list(box.corners)) for box in item.boxes] == list(
                zip(labels, boxes, strict=True)
            )
            assert [(shape.label, shape.content) for shape in item.shapes] == [
                (label, [points]) for label, points in zip(labels, outlines, strict=True)
            ]
            assert source.has(item.image)
    assert source.dropped == {}
    assert read(tmp_path, val_fraction=1.0, test_fraction=0.0)[0]["36199"].split == "val"


def test_the_first_generation_knows_ten_findings_and_no_outlines(tmp_path):
    miniature.write(tmp_path, generation=10)
    items, source = read(tmp_path)
    assert len(items["36302"].labels) == 10 and "Cardiomegaly" not in items["36302"].labels
    assert [box.label for box in items["36302"].boxes] == ["Effusion", "Effusion"]
    assert items["36302"].shapes == []
    assert source.has(items["61234"].image)


def test_what_cannot_be_used_is_listed(tmp_path):
    square = [[1, 1], [5, 1], [5, 5], [1, 5]]
    write_entries(
        tmp_path,
        {"file_name": "1.png", "syms": ["Mass"], "boxes": [], "polygons": []},
        {"file_name": "2.png", "syms": ["Mass"], "boxes": [[5, 1, 5, 9]], "polygons": [square]},
        {"file_name": "3.png", "syms": ["Mass"], "boxes": [[5, 1, 9]], "polygons": [square[:2]]},
        {"file_name": "4.png", "syms": ["Mass"], "boxes": [[5, 1, None, 9]], "polygons": [[1, 2]]},
        {"file_name": "5.png", "syms": ["Mass"], "boxes": [7], "polygons": [[*square, [None, 1]]]},
    )
    items, source = read(tmp_path)
    assert sorted(items) == ["2", "3", "4", "5"]
    assert items["2"].boxes == [] and len(items["2"].shapes) == 1
    assert items["3"].boxes == [] and items["3"].shapes == []
    assert source.dropped == {
        "lists of findings, boxes and outlines of different lengths": ["1.png"],
        "a box has no area": ["2.png"],
        "a box has no four numbers": ["3.png", "4.png", "5.png"],
        "an outline has no three points": ["3.png", "4.png", "5.png"],
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"file_name": "1.png"}]', "file_name, syms and boxes"),
        ('{"a": 1}', "file_name, syms and boxes"),
        ("[", "is damaged"),
        ('[{"file_name": "1.png", "syms": ["Odd"], "boxes": [[1, 1, 2, 2]]}]', "'Odd' of 1.png"),
        ("", r"has no ChestX_Det_train\.json \(or train\.json\)"),
    ],
)
def test_what_is_missing_or_damaged_is_said(tmp_path, content, words):
    if content:
        (tmp_path / "train.json").write_text(content)
        (tmp_path / "test.json").write_text("[]")
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_records_have_boxes_and_masks_of_the_original(tmp_path):
    miniature.write(tmp_path / "source")
    options = {"source": str(tmp_path / "source"), "data_dir": str(tmp_path), "val_fraction": 0.0}
    dataset = open_dataset("chestx_det", "train", size=64, **options)
    assert dataset.findings == FINDINGS
    (record,) = (record for record in dataset if record.record_id == "36302")
    effusion, heart = record.phrases
    assert (effusion.text, heart.text) == ("Effusion", "Cardiomegaly")
    assert effusion.boxes == ((4, 40, 20, 60), (40, 40, 60, 60))
    # The outline of the heart is the diamond |x - 34| / 18 + |y - 32| / 12 <= 1.
    y, x = np.mgrid[:64, :64] + 0.5
    truth = abs(x - 34) / 18 + abs(y - 32) / 12 <= 1
    assert (heart.mask & truth).sum() >= 0.99 * (heart.mask | truth).sum()
    (record,) = open_dataset("chestx_det", "test", size=32, **options)
    boxes = record.geometry.to_original(np.asarray(record.phrases[0].boxes))
    np.testing.assert_allclose(boxes, [[10, 10, 20, 18]], atol=1)

"""The sets of tuberculosis: Montgomery and Shenzhen with masks, TBX11K with boxes."""

import json

import numpy as np
import pytest
from miniatures import montgomery as montgomery_miniature
from miniatures import shenzhen as shenzhen_miniature
from miniatures import tbx11k as tbx11k_miniature

from plan_jax.data.builders import montgomery, shenzhen, tbx11k
from plan_jax.data.builders.tbx11k import Tbx11kConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.items import Shape
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(module, folder, *arguments):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, module.FACTS.page)
    return source, {item.image_id: item for item in module.read_items(source, *arguments)}


def read_tbx11k(folder, **fields):
    return read(tbx11k, folder, Tbx11kConfig(name="", source=str(folder), **fields))


def prepare(name, folder, size, split="train", **fields):
    """Returns the records of a split by id; of `folder/source`, in `folder/data`."""
    places = {"source": str(folder / "source"), "data_dir": str(folder / "data")}
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    dataset = open_dataset(name, split, size=size, **places, **fractions, **fields)
    return {record.record_id: record for record in dataset}


def make_folder(parent):
    (parent / "source").mkdir()
    return parent / "source"


def draw(shape, *rectangles):
    mask = np.zeros(shape, bool)
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = True
    return mask


# Montgomery ---------------------------------------------------------------------------------------


def test_montgomery(tmp_path):
    montgomery_miniature.write(tmp_path)
    source, items = read(montgomery, tmp_path)
    assert list(items) == list(montgomery_miniature.READINGS)
    assert not source.dropped and not source.notes
    for name, item in items.items():
        assert source.has(item.image) and item.patient_id == name
        assert item.labels == {"Tuberculosis": int(name[-1])}
        assert item.sections == {"findings": montgomery_miniature.READINGS[name]}
        folder = "MontgomerySet/ManualMask"
        assert item.anatomy == {
            "left lung": [Shape("file", f"{folder}/leftMask/{name}.png")],
            "right lung": [Shape("file", f"{folder}/rightMask/{name}.png")],
        }
        assert all(source.has(shape.content) for (shape,) in item.anatomy.values())


def test_montgomery_without_masks_or_films(tmp_path):
    with pytest.raises(UserError, match=r"no folder CXR_png .*MontgomerySet.zip"):
        read(montgomery, tmp_path)
    montgomery_miniature.write(tmp_path, masks=False)
    path = tmp_path / "MontgomerySet/ClinicalReadings/MCUCXR_0001_0.txt"
    path.write_bytes(b"\xff\xfe normal")
    source, items = read(montgomery, tmp_path)
    assert not any(item.anatomy for item in items.values())
    assert source.notes == ["ManualMask is not there, so no film has masks of both lungs"]
    reason = "a reading is not UTF-8, so its film has no text"
    assert list(source.dropped) == [reason]
    assert not items["MCUCXR_0001_0"].sections and len(items) == 4


def test_montgomery_is_prepared(tmp_path):
    montgomery_miniature.write(make_folder(tmp_path))
    records = prepare("montgomery", tmp_path, 49)
    assert records.keys() == montgomery_miniature.READINGS.keys()
    for name, record in records.items():
        assert record.labels.tolist() == [int(name[-1])]
        assert record.image.shape[:2] == record.geometry.shape
        assert record.geometry.shape in montgomery_miniature.SHAPES
        sides = {"left lung": "leftMask", "right lung": "rightMask"}
        for organ, mask in record.anatomy.items():
            corners = montgomery_miniature.LUNGS[sides[organ]]
            assert np.array_equal(mask, draw(record.geometry.shape, corners))


@pytest.mark.parametrize("module", [montgomery, shenzhen])
def test_films_may_have_a_suffix_in_capitals(tmp_path, module):
    miniature = montgomery_miniature if module is montgomery else shenzhen_miniature
    miniature.write(tmp_path)
    for path in sorted(tmp_path.rglob("CXR_png/*.png")):
        path.rename(path.with_suffix(".PNG"))
    source, items = read(module, tmp_path)
    assert list(items) == list(miniature.READINGS)
    assert all(source.has(item.image) for item in items.values())
    masked = [name for name, item in items.items() if item.anatomy]
    assert masked == list(getattr(miniature, "MASKED", miniature.READINGS))


@pytest.mark.parametrize("module", [montgomery, shenzhen])
def test_films_that_are_not_there_are_listed(tmp_path, module):
    miniature = montgomery_miniature if module is montgomery else shenzhen_miniature
    miniature.write(tmp_path)
    absent = list(miniature.READINGS)[1:3]
    for name in absent:
        next(tmp_path.rglob(f"CXR_png/{name}.png")).unlink()
    source, items = read(module, tmp_path)
    assert list(items) == [name for name in miniature.READINGS if name not in absent]
    assert source.dropped == {module.ABSENT: absent}


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("male 45yrs\nnormal", "normal"),
        ("Female, 28 yrs old; right PTB\nleft pleuritis", "right PTB\nleft pleuritis"),
        ("male24yrs \r\n\r\nSTB\t", "STB"),
        ("65yrs, male, normal", "normal"),
        ("bilateral PTB", "bilateral PTB"),
        ("female", ""),
    ],
)
def test_a_reading_of_shenzhen_has_neither_sex_nor_age(tmp_path, text, reading):
    shenzhen_miniature.write(tmp_path, "", findings=False)
    (tmp_path / "ClinicalReadings/CHNCXR_0001_0.txt").write_bytes(text.encode())
    _, items = read(shenzhen, tmp_path)
    assert items["CHNCXR_0001_0"].sections.get("findings", "") == reading


# Shenzhen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lung_folder", ["mask/mask", "mask", "masks"])
def test_shenzhen(tmp_path, lung_folder):
    shenzhen_miniature.write(tmp_path, lung_folder)
    source, items = read(shenzhen, tmp_path)
    assert list(items) == list(shenzhen_miniature.READINGS)
    assert not source.dropped and not source.notes
    for name, item in items.items():
        assert source.has(item.image)
        assert item.labels == {"Tuberculosis": int(name[-1])}
        assert item.sections == {"findings": shenzhen_miniature.READINGS[name][1]}
        lungs = [Shape("file", f"{lung_folder}/{name}_mask.png")]
        assert item.anatomy == ({"lungs": lungs} if name in shenzhen_miniature.MASKED else {})
    shapes = [(s.content, s.label, s.phrase) for item in items.values() for s in item.shapes]
    infiltrate = "small infiltrate (non-linear)"
    phrases = (infiltrate, infiltrate, "pleural effusion")
    assert shapes == [
        (f"Annotations-2/masks/{name}.png", "Tuberculosis", phrase)
        for name, phrase in zip(shenzhen_miniature.FINDINGS, phrases, strict=True)
    ]


def test_shenzhen_without_masks_or_films(tmp_path):
    with pytest.raises(UserError, match=r"no folder CXR_png .*ChinaSet_AllFiles.zip"):
        read(shenzhen, tmp_path)
    shenzhen_miniature.write(tmp_path, "", findings=False)
    source, items = read(shenzhen, tmp_path)
    assert len(items) == 4 and not any(i.anatomy or i.shapes for i in items.values())
    assert source.notes == ["the lung masks of Kaggle's shcxr-lung-mask are not there"]


def test_shenzhen_is_prepared(tmp_path):
    shenzhen_miniature.write(make_folder(tmp_path))
    records = prepare("shenzhen", tmp_path, 30)
    assert records.keys() == shenzhen_miniature.READINGS.keys()
    for name, record in records.items():
        assert record.image.shape == (30, 29, 1)
        halves = [np.asarray(corners) // 2 for corners in shenzhen_miniature.LUNGS]
        lungs = {"lungs": draw((30, 29), *halves)} if name in shenzhen_miniature.MASKED else {}
        assert record.anatomy.keys() == lungs.keys()
        assert all(np.array_equal(record.anatomy[organ], lungs[organ]) for organ in lungs)
    (phrase,) = records["CHNCXR_0327_1"].phrases
    assert (phrase.text, phrase.finding) == ("small infiltrate (non-linear)", 0)
    assert np.array_equal(phrase.mask, draw((30, 29), (5, 5, 10, 10), (5, 15, 10, 20)))


# TBX11K -------------------------------------------------------------------------------------------

LABELS = {
    "h0001": (0, 0, 0, 0),
    "h0002": (0, 0, 0, 0),
    "s0001": (0, 0, 0, 1),
    "s0002": (0, 0, 0, 1),
    "tb0005": (1, 1, 0, -1),
    "tb0007": (1, 1, 1, -1),
    "tb0009": (1, 0, 1, -1),
    "tb0011": (1, -1, -1, -1),  # a box of a kind that nobody could tell
    "tb1199": (1, -1, -1, -1),  # no box
}
TEST = ("h0002", "s0002", "tb0009", "tb0011")


def write_tbx11k(folder, layout):
    if layout == "kaggle":
        tbx11k_miniature.write_kaggle(folder)
    else:
        tbx11k_miniature.write(folder, whole=layout == "whole")


@pytest.mark.parametrize("layout", ["whole", "parts", "kaggle"])
def test_tbx11k(tmp_path, layout):
    write_tbx11k(tmp_path, layout)
    source, items = read_tbx11k(tmp_path)
    assert not source.dropped and not source.notes
    assert {name: tuple(item.labels.values()) for name, item in items.items()} == LABELS
    assert all(tuple(item.labels) == tbx11k.FINDINGS for item in items.values())
    assert all(source.has(item.image) for item in items.values())
    assert {name for name, item in items.items() if item.split == "test"} == set(TEST)
    kinds = tbx11k.KINDS
    boxes = [(name, b.label, *b.corners) for name, item in items.items() for b in item.boxes]
    assert sorted(boxes) == sorted(
        (path[3:-4], kinds[kind], x, y, x + width, y + height)
        for path, kind, x, y, width, height in tbx11k_miniature.BOXES
    )


@pytest.mark.parametrize("layout", ["whole", "kaggle"])
def test_tbx11k_is_prepared(tmp_path, layout):
    write_tbx11k(make_folder(tmp_path), layout)
    records = prepare("tbx11k", tmp_path, 64) | prepare("tbx11k", tmp_path, 64, "test")
    assert {name: tuple(record.labels) for name, record in records.items()} == LABELS
    for path, kind, x, y, width, height in tbx11k_miniature.BOXES:
        record = records[path[3:-4]]
        finding = tbx11k.FINDINGS.index(tbx11k.KINDS[kind])
        (phrase,) = (phrase for phrase in record.phrases if phrase.finding == finding)
        original = record.geometry.to_original(np.asarray(phrase.boxes))
        np.testing.assert_allclose(original, [(x, y, x + width, y + height)], atol=1)


def test_tbx11k_by_hash(tmp_path):
    write_tbx11k(tmp_path, "whole")
    _, items = read_tbx11k(tmp_path, split="hash")
    assert {item.split for item in items.values()} == {""}


def test_a_film_in_both_lists_of_tbx11k_is_an_error(tmp_path):
    write_tbx11k(tmp_path, "whole")
    path = tmp_path / "TBX11K/lists/TBX11K_val.txt"
    path.write_text(f"{path.read_text()}\ntb/tb0005.png")
    with pytest.raises(UserError, match=r"tb/tb0005.png is in both lists of .*; download them"):
        read_tbx11k(tmp_path)


def test_tbx11k_faults(tmp_path):
    with pytest.raises(UserError, match="neither a folder imgs nor Kaggle's data.csv; download"):
        read_tbx11k(tmp_path)
    faulty = ("tb/tb0005.png", "ActiveTuberculosis", 1.0, 1.0, 0.0, 5.0)
    tbx11k_miniature.write(tmp_path, boxes=(*tbx11k_miniature.BOXES, faulty))
    path = tmp_path / "TBX11K/lists/TBX11K_val.txt"
    path.write_text(path.read_text().replace("tb/tb0009.png", "extra/da/da0001.png"))
    source, items = read_tbx11k(tmp_path)
    assert len(items) == 8 and len(items["tb0005"].boxes) == 1
    assert source.dropped == {
        "a film of TBX11K/lists/TBX11K_val.txt is not in health, sick, tb": ["extra/da/da0001.png"],
        "boxes of a film that the lists do not have": ["tb0009"],
        "a box has no four numbers, or no area": ["tb0005"],
    }
    path = tmp_path / "TBX11K/annotations/json/TBX11K_trainval.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "Fracture"
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"not a file of boxes of TBX11K \('Fracture' is missing or"
    ):
        read_tbx11k(tmp_path)
    (tmp_path / "TBX11K/lists/TBX11K_train.txt").unlink()
    with pytest.raises(UserError, match=r"has no lists/TBX11K_train.txt"):
        read_tbx11k(tmp_path)

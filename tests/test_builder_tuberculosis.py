"""The sets of tuberculosis: Montgomery and Shenzhen with masks, TBX11K with boxes."""

import json

import pytest
from miniatures import montgomery as montgomery_miniature
from miniatures import shenzhen as shenzhen_miniature
from miniatures import tbx11k as tbx11k_miniature

from plan_jax.data.builders import montgomery, shenzhen, tbx11k
from plan_jax.data.builders.tbx11k import Tbx11kConfig
from plan_jax.data.public.items import Shape
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(module, folder, *arguments):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, module.FACTS.page)
    return source, {item.image_id: item for item in module.read_items(source, *arguments)}


def read_tbx11k(folder, **fields):
    return read(tbx11k, folder, Tbx11kConfig(name="", source=str(folder), **fields))


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


def test_tbx11k_by_hash(tmp_path):
    write_tbx11k(tmp_path, "whole")
    _, items = read_tbx11k(tmp_path, split="hash")
    assert {item.split for item in items.values()} == {""}


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

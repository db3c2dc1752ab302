"""JSRT: raw films, SCR's masks of half the size, nodules as boxes."""

import numpy as np
import pytest
from miniatures import jsrt as miniature

from plan_jax.data.builders import jsrt
from plan_jax.data.builders.jsrt import JsrtConfig
from plan_jax.data.dataset import open_dataset
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError


def read(folder, **fields):
    """Returns the folder as it was read, and its items by name."""
    source = SourceFolder(folder, jsrt.FACTS.page)
    config = JsrtConfig(name="", source=str(folder), **fields)
    return source, {item.image_id: item for item in jsrt.read_items(source, config)}


@pytest.mark.parametrize(("parted", "merged"), [(False, False), (True, False), (False, True)])
def test_films_masks_and_nodules(tmp_path, parted, merged):
    miniature.write(tmp_path, parted=parted, merged=merged)
    source, items = read(tmp_path)
    assert tuple(items) == miniature.NAMES and not source.dropped and not source.notes
    for name, item in items.items():
        assert source.has(item.image) and item.pixels == "jsrt" and item.shape == (2048, 2048)
        assert item.labels["Nodule"] == ("LN" in name)
        assert item.patient_id == name and item.split == ""
        assert tuple(item.anatomy) == tuple(miniature.ORGANS)
        for organ, (shape,) in item.anatomy.items():
            assert shape.kind == "file" and source.has(shape.content)
            assert organ in shape.content.replace("_", " ")
    malignant = [item.labels["Malignant nodule"] for item in items.values()]
    assert malignant == [1, 0, -1, 0, 0, 0]
    (box,) = items["JPCLN001"].boxes
    assert box.label == "Nodule" and box.corners == pytest.approx((1594, 652, 1674, 732))
    # A square that would leave the film ends at its edge.
    (box,) = items["JPCLN002"].boxes
    assert box.corners == pytest.approx((0, 900, 160, 1100))
    assert not items["JPCNN001"].boxes


def test_films_that_are_not_there_are_listed(tmp_path):
    miniature.write(tmp_path, ".png")
    for name in ("JPCLN002", "JPCNN002"):
        (tmp_path / f"All247images/{name}.png").unlink()
    source, items = read(tmp_path)
    assert len(items) == len(miniature.NAMES) - 2
    assert source.dropped == {
        "a film with masks or a nodule is not there": ["JPCLN002", "JPCNN002"]
    }


def test_scr_divides_by_number(tmp_path):
    miniature.write(tmp_path, ".png")
    _, items = read(tmp_path, split="scr", val_fraction=0.0)
    assert {name: item.split for name, item in items.items()} == {
        "JPCLN001": "train",
        "JPCLN002": "test",
        "JPCLN100": "test",
        "JPCNN001": "train",
        "JPCNN002": "test",
        "JPCNN093": "train",
    }
    # All 247 films: SCR's folds have 124 and 123.
    numbers = [*range(1, 155), *range(1, 94)]
    assert sum(number % 2 for number in numbers) == 124 and len(numbers) == 247


def test_converted_films_without_masks_and_table(tmp_path):
    miniature.write(tmp_path, ".png", masks=False, table=False)
    source, items = read(tmp_path)
    assert tuple(items) == miniature.NAMES
    assert {(item.pixels, item.shape) for item in items.values()} == {("", None)}
    assert not any(item.anatomy or item.boxes for item in items.values())
    assert source.notes == [
        "SCR's masks are not there, so no film has anatomy",
        "there is no CLNDAT_EN.txt, so no nodule has a box",
    ]


def test_the_dataset_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "NAMES", ("JPCLN001", "JPCNN002"))
    (tmp_path / "source").mkdir()
    miniature.write(tmp_path / "source", has_pixels=True)
    fields = {"source": str(tmp_path / "source"), "size": 128, "val_fraction": 0.0}
    dataset = open_dataset(
        "jsrt", "train", data_dir=str(tmp_path / "data"), test_fraction=0.0, **fields
    )
    records = {record.record_id: record for record in dataset}
    assert records.keys() == {"JPCLN001", "JPCNN002"}
    assert sorted(dataset.anatomy_names) == sorted(miniature.ORGANS)
    for record in records.values():
        assert record.geometry.shape == (2048, 2048)
        # High numbers are dark.
        left, right = record.image[5, 5, 0], record.image[120, 120, 0]
        assert (left, right) == (round(255 - 255 * 1000 / 4095), round(255 - 255 * 3000 / 4095))
        for organ, mask in record.anatomy.items():
            x0, y0, x1, y1 = np.asarray(miniature.ORGANS[organ]) // 8
            truth = np.zeros((128, 128), bool)
            truth[y0:y1, x0:x1] = True
            assert (mask & truth).sum() >= 0.99 * (mask | truth).sum()
    (phrase,) = records["JPCLN001"].phrases
    (box,) = phrase.boxes
    original = records["JPCLN001"].geometry.to_original(np.asarray([box]))[0]
    np.testing.assert_allclose(original, (1594, 652, 1674, 732), atol=1)
    x0, y0, x1, y1 = np.round(box).astype(int)
    assert (records["JPCLN001"].image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] == 255).all()


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no film like JPCLN001.IMG in All247images; download"):
        read(tmp_path)
    miniature.write(tmp_path, ".png")
    table = tmp_path / "Clinical_Information/CLNDAT_EN.txt"
    table.write_text(table.read_text().replace("1634", "?").replace("\t35\t", "\t0\t"))
    source, items = read(tmp_path)
    names = ["JPCLN001.IMG", "JPCLN002.IMG"]
    assert source.dropped == {"a nodule has no place and diameter": names}
    assert [name for name, item in items.items() if item.boxes] == ["JPCLN100"]

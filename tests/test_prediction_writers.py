"""Files of many results."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image
from test_prediction import make_grounding

from plan_jax.prediction import writers
from plan_jax.prediction.batches import Outcome


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def make_outcomes():
    heat = np.zeros((20, 30), np.float32)
    heat[5:9, 11:20] = 1
    grounding = make_grounding(heat, notes=("one", "two"))
    return [
        Outcome(1, "a.png", "no, really\nnothing", grounding),
        Outcome(2, "b\udcff.png", "edema", fault="b is broken"),
        Outcome(3, "c.png", "edema", make_grounding(heat.T.copy(), similarity={})),
    ]


def write_all(opener, path):
    with opener(path) as write:
        for outcome in make_outcomes():
            write(outcome)


def test_csv(tmp_path):
    write_all(writers.open_csv, tmp_path / "a.csv")
    with open("a.csv", encoding="utf-8", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert first["text"] == "no, really\nnothing" and first["notes"] == "one; two"
    assert json.loads(first["boxes"]) == [[11, 5, 20, 9, 1]]
    assert (first["peak_x"], first["peak_y"], first["similarity"]) == ("11", "5", "0.25")
    assert second["error"] == "b is broken" and second["image"] == "b\\udcff.png"
    assert json.loads(third["boxes"]) == [[5, 11, 9, 20, 1]] and third["error"] == ""


@pytest.mark.parametrize("text", ["one\rtwo", "one\r\ntwo", "one\ntwo", '=1+1, "x"'])
def test_a_cell_of_a_csv_is_read_as_it_was(text, tmp_path):
    with writers.open_csv(tmp_path / "a.csv") as write:
        write(Outcome(1, "a.png", text, fault="is broken"))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["text"] == text and row["error"] == "is broken"


def parse_strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json(tmp_path):
    write_all(writers.open_json, tmp_path / "a.json")
    rows = parse_strictly((tmp_path / "a.json").read_text())
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert rows[1] == {
        "row": 2,
        "image": "b\udcff.png",
        "text": "edema",
        "error": "b is broken",
    }
    assert rows[2]["similarity"] is None and rows[0]["similarities"] == {"global": 0.25}
    with writers.open_json(tmp_path / "none.json"):
        pass
    assert parse_strictly((tmp_path / "none.json").read_text()) == []


def test_json_on_a_stream():
    stream = io.StringIO()
    with writers.write_json(stream) as write:
        write(make_outcomes()[0])
    assert len(parse_strictly(stream.getvalue())) == 1


def test_npz(tmp_path):
    write_all(writers.open_npz, tmp_path / "a.npz")
    with np.load("a.npz") as arrays:  # which refuses a pickle
        assert arrays["row"].tolist() == [1, 3] and arrays["image"].tolist() == ["a.png", "c.png"]
        assert arrays["map_1"].shape == (20, 30) and arrays["map_3"].dtype == np.float32
        np.testing.assert_array_equal(arrays["map_3"].T, arrays["map_1"])


def test_pictures_and_masks(tmp_path):
    write_all(writers.open_pictures, tmp_path / "x" / "pictures")
    write_all(writers.open_masks, tmp_path / "masks")
    names = ["00001.png", "00003.png"]
    assert sorted(path.name for path in (tmp_path / "x/pictures").iterdir()) == names
    with Image.open("masks/00001.png") as mask:
        values = np.asarray(mask.convert("L"))
    assert values.shape == (20, 30) and set(np.unique(values)) == {0, 255}
    assert (values[5:9, 11:20] == 255).all() and (values == 255).sum() == 36


@pytest.mark.parametrize("opener", [writers.open_csv, writers.open_json, writers.open_npz])
def test_a_table_is_complete_or_absent(opener, tmp_path):
    path = tmp_path / "a.out"
    path.write_text("old")
    with pytest.raises(KeyError), opener(path) as write:
        write(make_outcomes()[0])
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

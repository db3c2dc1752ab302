"""Phrases in images on the command line."""

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from radiographs import make_dicom, save_with_orientation
from tiny_models import draw_film, make_tiny_model

from plan_jax import model as models
from plan_jax import predict

MODEL = ["--checkpoint", "x"]
PAIR = [*MODEL, "--image", "chest.png", "--text", "effusion"]


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda folder: make_tiny_model())
    Image.fromarray(draw_film(50, 40)).save("chest.png")


def save_table(*rows, name="pairs.csv"):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *rows])


def read_table(name="results.csv"):
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["heat.png", "heat.JPG"])
def test_a_heat_map_is_written(name, capsys):
    assert predict.run([*PAIR, "--out", name]) == 0
    out, err = capsys.readouterr()
    with pytest.warns(UserWarning, match="phantoms"):
        grounding = make_tiny_model().ground("chest.png", "effusion")
    x, y = grounding.peak
    assert out == f"{name}: highest at x {x}, y {y} of 40 x 50, patient's {grounding.side}\n"
    assert re.search(r"^1 image in \d+ ms \(reading, encoding, maps, writing\), after ", err, re.M)
    assert "trained on phantoms, which are drawings" in err
    with Image.open(name) as picture:
        assert picture.mode == "RGB" and picture.height / picture.width == 50 / 40


def test_all_pairs_of_images_and_phrases(capsys):
    film = draw_film(35, 61)
    save_with_orientation(film, "phone.png", 6)
    Path("film.dcm").write_bytes(make_dicom(film.astype(np.uint16) * 16, BitsStored=12))
    argv = [*MODEL, "--image", "chest.png", "*.dcm", "--image", "phone.png"]
    argv += ["--text", "effusion", "no nodule", "--out", "a.csv", "a.json", "a.npz", "pictures"]
    assert predict.run([*argv, "--masks", "masks"]) == 0
    assert capsys.readouterr().out == "a.csv, a.json, a.npz, pictures, masks: 6 of 6 pairs\n"
    rows = read_table("a.csv")
    assert [(row["row"], row["image"], row["text"]) for row in rows[1:3]] == [
        ("2", "chest.png", "no nodule"),
        ("3", "film.dcm", "effusion"),
    ]
    assert [row["height"] for row in rows] == ["50"] * 2 + ["35"] * 4
    assert len(json.loads(Path("a.json").read_text())) == 6
    with np.load("a.npz") as arrays:
        # The same film, turned upright and from 12 bits.
        np.testing.assert_allclose(arrays["map_3"], arrays["map_5"], atol=0.02)
        for row in rows:
            heat = arrays[f"map_{row['row']}"]
            y, x = np.unravel_index(heat.argmax(), heat.shape)
            assert (str(x), str(y)) == (row["peak_x"], row["peak_y"])
            with Image.open(f"masks/{int(row['row']):05d}.png") as mask:
                assert np.asarray(mask).mean() == pytest.approx(float(row["mask_fraction"]))
    assert len(list(Path("pictures").iterdir())) == 6


def test_pairs_of_a_table_that_partly_fail(capsys):
    Path("films").mkdir()
    Image.fromarray(draw_film(64, 64)).save("films/a.png")
    rows = [("a.png", "effusion"), ("none.png", "effusion"), ("a.png", "..."), ("a.png", "nodule")]
    save_table(*rows, name="films/pairs.csv")
    assert predict.run([*MODEL, "--csv", "films/pairs.csv"]) == 1
    out, err = capsys.readouterr()
    assert out == "results.csv: 2 of 4 pairs\n"
    assert "none.png cannot be read (No such file or directory); correct the path\n" in err
    assert err.endswith("2 of 4 pairs failed\n")
    errors = {int(row["row"]): row["error"] for row in read_table()}
    assert [bool(errors[number]) for number in (1, 2, 3, 4)] == [False, True, True, False]


def test_a_path_that_the_system_refuses_does_not_end_the_others(capsys):
    argv = [*MODEL, "--image", f"{'a' * 300}.png", "chest.png", "--text", "effusion"]
    assert predict.run(argv) == 1
    assert "a.png cannot be read (File name too long); correct the path" in capsys.readouterr().err
    assert [bool(row["error"]) for row in read_table()] == [True, False]


def test_when_all_pairs_fail_no_table_is_written(capsys):
    save_table(("none.png", "effusion"), ("nil.png", "effusion"))
    assert predict.run([*MODEL, "--csv", "pairs.csv", "--out", "a.csv", "a.npz"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("all 2 pairs failed; the first: ") and "none.png" in last
    assert not {"a.csv", "a.npz"} & {path.name for path in Path().iterdir()}


def test_json_is_printed(capsys):
    assert predict.run([*PAIR, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == "chest.png" and row["height"] == 50
    assert [path.name for path in Path().iterdir()] == ["chest.png"]


@pytest.mark.parametrize("owns_process", [False, True])
def test_only_a_command_of_its_own_stays_offline(owns_process, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(predict.command, "owns_process", lambda: owns_process)
    Path("x").mkdir()
    assert predict.run([*MODEL, "--image", "none.png", "--text", "effusion"]) == 2
    assert os.environ["HF_HUB_OFFLINE"] == str(int(owns_process))


def test_json_is_complete_when_all_pairs_fail(capsys):
    save_table(("none.png", "effusion"), ("nil.png", "effusion"))
    assert predict.run([*MODEL, "--csv", "pairs.csv", "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == ["none.png", "nil.png"]


def test_many_reasons_are_not_all_printed(capsys):
    save_table(("chest.png", "effusion"), *((f"{i}.png", "effusion") for i in range(15)))
    assert predict.run([*MODEL, "--csv", "pairs.csv"]) == 1
    err = capsys.readouterr().err
    assert err.count("cannot be read") == predict.MAX_NAMED
    assert err.endswith("15 of 16 pairs failed, 5 more reasons are in the tables\n")


def test_an_image_is_read_with_the_bit_depth_of_the_run(monkeypatch):
    model = make_tiny_model()
    builder = {**model.config.data.builder, "bit_depth": 12}
    config = replace(model.config, data=replace(model.config.data, builder=builder))
    Image.fromarray(draw_film(50, 40).astype(np.uint16) * 4).save("chest.png")
    similarities = []
    for changed in (model, replace(model, config=config)):
        monkeypatch.setattr(models, "load", lambda folder, changed=changed: changed)
        assert predict.run([*PAIR, "--out", "a.json"]) == 0
        similarities.append(json.loads(Path("a.json").read_text())[0]["similarities"])
    assert similarities[0] != similarities[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--image", "chest.png"], "--image needs phrases; pass them as --text"),
        (
            ["--csv", "pairs.csv", "--text", "edema"],
            "--csv has the phrases in its column text; leave --text out",
        ),
        (
            ["--image", "chest.png", "--text", "edema \udcff"],
            "--text has bytes that are not UTF-8; pass the phrase as UTF-8",
        ),
        (
            ["--image", "chest.png", "--text", "a", "b", "--out", "heat.png"],
            "--out heat.png is one picture, and there are 2 pairs; give a folder",
        ),
        (
            ["--image", "chest.png", "--text", "a", "--images", "x"],
            "--images is the folder of the images of --csv; pass --image alone",
        ),
        (
            ["--image", "chest.png", "--text", "a", "--threshold", "3"],
            "threshold is 3.0; use a number from 0 to 1",
        ),
        (["--image", "", "--text", "a"], "the image has an empty path; pass the path of a file"),
        (
            ["--image", "chest.png", "--text", "a", "--out", ""],
            "--out is an empty name; give a file, or a folder for pictures",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(argv, sentence, capsys):
    assert predict.run([*MODEL, *argv]) == 2
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        (["--out", "pairs.csv"], "--out pairs.csv has files that are read; give another place"),
        (["--out", "films/"], "--out films/ has files that are read; give another place"),
        (["--masks", "films"], "--masks films has files that are read; give another place"),
        (["--out", "x/", "--masks", "x"], "--masks x is the place of other results; give another"),
    ],
)
def test_nothing_that_is_read_is_overwritten(outputs, sentence, capsys):
    Path("films").mkdir()
    Image.fromarray(draw_film(64, 64)).save("films/00001.png")
    save_table(("films/00001.png", "effusion"))
    content = Path("pairs.csv").read_text()
    assert predict.run([*MODEL, "--csv", "pairs.csv", *outputs]) == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert Path("pairs.csv").read_text() == content


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}/heat"])
def test_an_output_whose_name_is_too_long(name, capsys):
    assert predict.run([*PAIR, "--out", f"{name}.png"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].count(f"{name}.png ") == 1

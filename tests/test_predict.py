"""The heat map of a phrase on the command line."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from radiographs import save_with_orientation

from plan_jax import model as models
from plan_jax import predict
from plan_jax.types import Features, Model


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def toy_model():
    """Returns a model whose only hot cell is row 1, column 3 of 4 x 4, unless a word is padding."""
    grid = np.zeros((4, 4), np.float32)
    grid[1, 3] = 1
    maps = np.stack([grid.ravel(), np.full(16, 9, np.float32)])[None]

    def features(count):
        return Features(np.zeros((count, 2)), np.zeros((count, 2, 2)), np.ones((count, 2), bool))

    return Model(
        name="toy",
        grid=(4, 4),
        rounds=0,
        size=32,
        encode_image=lambda images: features(len(images)),
        encode_text=lambda texts: features(len(texts)),
        similarity=lambda images, texts: {},
        heatmap=lambda images, texts, rounds=None: (maps, np.asarray([[1.0, 0.0]])),
    )


@pytest.mark.parametrize(("shape", "top", "left"), [((64, 64), 16, 48), ((40, 80), 0, 60)])
def test_the_heat_map_has_the_image_s_own_shape(shape, top, left):
    heat = predict.compute_heat_map(toy_model(), np.zeros((*shape, 1), np.uint8), "effusion")
    assert heat.shape == shape
    y, x = np.unravel_index(heat.argmax(), shape)
    cell = max(shape) // 4
    assert top <= y < top + cell and left <= x < left + cell


@pytest.mark.parametrize("name", ["heat.png", "heat.JPG"])
def test_a_heat_map_is_written(name, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda folder: toy_model())
    Image.fromarray(np.full((50, 40), 90, np.uint8)).save("chest.png")
    argv = ["--checkpoint", "x", "--image", "chest.png", "--text", "effusion", "--out", name]
    assert predict.run(argv) == 0
    assert capsys.readouterr().out == f"{name}: highest at x 39, y 18 of 40 x 50, patient's left\n"
    with Image.open(name) as picture:
        assert picture.mode == "RGB" and picture.height / picture.width == 50 / 40


def test_an_image_is_read_as_the_builder_reads_it():
    film = np.zeros((50, 40), np.uint8)
    film[5:15, 5:15] = 200
    save_with_orientation(film, "phone.png", 6)
    np.testing.assert_array_equal(predict.read_image("phone.png")[..., 0], film)
    Image.fromarray(film.astype(np.uint16) * 4).save("dim.png")
    assert predict.read_image("dim.png").max() == round(800 / 1023 * 255)
    assert predict.read_image("dim.png", 12).max() == round(800 / 4095 * 255)


def test_a_heat_map_uses_the_bit_depth_of_the_run(monkeypatch, capsys):
    config = SimpleNamespace(data=SimpleNamespace(builder={"bit_depth": 12}))
    depths = []
    read_image = predict.read_image

    def record_depth(image, bit_depth=0):
        depths.append(bit_depth)
        return read_image(image, bit_depth)

    monkeypatch.setattr(models, "load", lambda folder: replace(toy_model(), config=config))
    monkeypatch.setattr(predict, "read_image", record_depth)
    Image.fromarray(np.full((50, 40), 90, np.uint8)).save("chest.png")
    assert predict.run(["--checkpoint", "x", "--image", "chest.png", "--text", "effusion"]) == 0
    assert depths == [0, 12]


def test_a_text_with_bytes_that_are_no_text_is_refused(capsys):
    argv = ["--checkpoint", "x", "--image", "chest.png", "--text", "edema \udcff"]
    assert predict.run(argv) == 2
    sentence = "--text has bytes that are not UTF-8; pass the phrase as UTF-8"
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}/heat"])
def test_an_output_whose_name_is_too_long(name, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda folder: toy_model())
    Image.fromarray(np.full((50, 40), 90, np.uint8)).save("chest.png")
    argv = ["--checkpoint", "x", "--image", "chest.png", "--text", "edema", "--out", f"{name}.png"]
    assert predict.run(argv) == 2
    assert capsys.readouterr().err.startswith(f"--out {name}.png ")

"""Grounding of one phrase: its map, mask and boxes in an image, and the files of a result."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import draw_film, make_tiny_model

from plan_jax import prediction
from plan_jax.data import transforms
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.prediction import films, maps
from plan_jax.types import Model, UserError

FILM = draw_film(61, 47)
TEXT = "pleural effusion on the left"
pytestmark = pytest.mark.filterwarnings("ignore:this model was trained on phantoms")


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


def make_grounding(heat_map, **changes):
    """Returns a grounding of a map, in the mask where it exceeds 0.5."""
    mask, boxes, scores = maps.find_boxes(heat_map > 0.5, heat_map)
    picture = draw_film(*heat_map.shape)[..., None]
    film = films.Film(
        "a.png", heat_map.shape, heat_map.shape, np.zeros((8, 8, 1), np.uint8), picture
    )
    fields = {"film": film, "text": "edema", "heat_map": heat_map, "similarity": {"global": 0.25}}
    fields |= {"mask": mask, "boxes": boxes, "scores": scores}
    return prediction.Grounding(**fields | changes)


def test_a_grounding_is_what_the_functions_of_the_model_return(model):
    grounding = model.ground(FILM, TEXT, threshold=0.6, min_area=0.01)
    square = transforms.fit_image(
        transforms.resize_image(FILM, *transforms.scale_shape(FILM.shape, 32))[..., None], 32
    )
    images, texts = model.encode_image(square[None]), model.encode_text([TEXT])
    word_maps, weights = model.heatmap(images, texts)
    heat = np.average(word_maps[0], axis=0, weights=weights[0]).reshape(model.grid)
    expected = maps.enlarge_map(heat, FILM.shape, 32)
    np.testing.assert_allclose(grounding.heat_map, expected, atol=1e-5)
    y, x = np.unravel_index(expected.argmax(), expected.shape)
    assert grounding.peak == (x, y)
    for kind, table in model.similarity(images, texts).items():
        assert grounding.similarity[kind] == pytest.approx(float(table[0, 0]), abs=1e-4)
    level = (expected - expected.min()) / np.ptp(expected)
    mask, boxes, _ = maps.find_boxes(level > 0.6, expected, 0.01)
    np.testing.assert_array_equal(grounding.mask, mask)
    np.testing.assert_array_equal(grounding.boxes, boxes)


def test_a_file_and_its_pixels_have_one_grounding(model):
    Image.fromarray(FILM).save("film.png")
    first, second = model.ground("film.png", TEXT), model.ground(FILM[..., None], TEXT)
    np.testing.assert_array_equal(first.heat_map, second.heat_map)
    assert first.similarity == second.similarity


def test_rounds_are_those_of_the_call(model):
    first, second = (model.ground(FILM, TEXT, rounds=rounds) for rounds in (0, 1))
    assert np.abs(first.heat_map - second.heat_map).max() > 1e-4


def test_the_patient_faces_the_viewer():
    heat = np.zeros((4, 5))
    sides = []
    for column in range(5):
        changed = heat.copy()
        changed[1, column] = 1
        sides.append(make_grounding(changed).side)
    assert sides == ["right", "right", "left", "left", "left"]


@pytest.mark.parametrize("normalisation", grounding_metrics.NORMALISATIONS)
def test_a_mask_is_above_the_threshold_of_its_scale(normalisation):
    heat = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    scaled = {
        "raw": heat,
        "minmax": (heat - heat.min()) / (heat.max() - heat.min()),
        "z": (heat - heat.mean()) / (heat.max() - heat.mean()),
    }[normalisation]
    np.testing.assert_array_equal(maps.threshold_map(heat, 0.3, normalisation), scaled > 0.3)


def test_results_are_saved_by_suffix():
    heat = np.zeros((40, 30), np.float32)
    heat[10:20, 5:9] = 1
    grounding = make_grounding(heat, similarity={"global": float("nan")}, notes=("a note",))
    for name in ("a.png", "a.JPG", "a.npz", "a.json"):
        grounding.save(name)
    for name in ("a.png", "a.JPG"):
        with Image.open(name) as picture:
            assert picture.mode == "RGB" and picture.height / picture.width == 40 / 30
    with np.load("a.npz") as arrays:
        np.testing.assert_array_equal(arrays["heat_map"], heat)
        assert arrays["boxes"].tolist() == [[5, 10, 9, 20]] and arrays["text"] == "edema"

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(Path("a.json").read_text(), parse_constant=refuse)
    assert row["similarity"] is None and row["notes"] == ["a note"]
    assert row["boxes"] == [{"x0": 5.0, "y0": 10.0, "x1": 9.0, "y1": 20.0, "score": 1.0}]
    assert (row["peak_x"], row["peak_y"], row["side"]) == (5, 10, "right")
    assert row["mask_fraction"] == pytest.approx(40 / 1200)


def test_a_picture_shows_its_boxes():
    heat = np.zeros((300, 300), np.float32)
    heat[100:200, 50:90] = 1
    picture = make_grounding(heat).draw()
    assert picture.shape == (300, 300, 3)
    assert make_grounding(heat)._repr_png_().startswith(b"\x89PNG")
    assert picture[150, 50].tolist() == picture[100, 70].tolist() == [251, 139, 36]


@pytest.mark.parametrize(("name", "words"), [("a.gif", "none of the suffixes"), ("no/a.png", "no")])
def test_a_file_that_cannot_be_written_is_named(name, words):
    with pytest.raises(UserError, match=words):
        make_grounding(np.eye(9)).save(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; use a number"),
        ({"threshold": -0.5}, "threshold is -0.5; use a number"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"min_area": -1}, "min_area is -1; use a fraction"),
        ({"normalisation": "max"}, "normalisation is 'max'; use one of raw, minmax, z"),
        ({"rounds": -1}, "rounds is -1; use 0 or more"),
        ({"colour": 1}, "colour.*; use the fields of"),
    ],
)
def test_options_out_of_range_are_refused(options, message, model):
    with pytest.raises(UserError, match=message):
        model.ground(FILM, TEXT, **options)


def test_doubts_are_warned_of(model):
    with pytest.warns(UserWarning, match="trained on phantoms, which are drawings"):
        grounding = model.ground(draw_film(20, 20), f"{TEXT} \U0001fac1")
    assert [note.split()[2] for note in grounding.notes] == ["was", "the"]


def test_a_model_without_a_config_does_not_ground():
    functions = dict.fromkeys(("encode_image", "encode_text", "similarity", "heatmap"), max)
    with pytest.raises(UserError, match="no config to read images by; load one"):
        Model("toy", (4, 4), 0, 32, **functions).ground(FILM, TEXT)


def test_a_map_that_is_not_finite_is_refused(model):
    broken = replace(
        model, heatmap=lambda *_, rounds: (np.full((1, 3, 64), np.nan), np.ones((1, 3)))
    )
    ((heat_map, similarity),) = prediction.compute_maps(
        broken, model.encode_image(np.zeros((1, 32, 32, 1), np.uint8)), model.encode_text([TEXT])
    )
    film = films.read_film(FILM, 32)
    with pytest.raises(UserError, match="in the array has values that are not finite; use another"):
        prediction.locate(model, film, TEXT, heat_map, similarity, prediction.Options())

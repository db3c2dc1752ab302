"""Images in which phrases are located: how they are read, and which are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from radiographs import make_dicom, save_with_orientation
from tiny_models import draw_film

from plan_jax.data import transforms
from plan_jax.prediction import films
from plan_jax.types import UserError

FILM = draw_film(301, 203)


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_film_is_read_as_a_dataset_stores_it():
    Image.fromarray(FILM).save("film.png")
    film = films.read_film("film.png", 32, stored_size=64, with_picture=True)
    stored = transforms.resize_image(FILM, *transforms.scale_shape(FILM.shape, 64))
    np.testing.assert_array_equal(film.square, transforms.fit_image(stored[..., None], 32))
    np.testing.assert_array_equal(film.picture[..., 0], FILM)
    assert film.shape == FILM.shape and film.notes == () and film.name == "film.png"
    array = films.read_film(FILM, 32, stored_size=64, with_picture=True)
    np.testing.assert_array_equal(array.square, film.square)
    np.testing.assert_array_equal(array.picture, film.picture)


def test_a_turned_film_is_upright():
    save_with_orientation(FILM, "phone.png", 6)
    film = films.read_film("phone.png", 32, with_picture=True)
    assert film.shape == FILM.shape
    np.testing.assert_array_equal(film.picture[..., 0], FILM)


def test_a_large_film_has_a_picture_for_a_screen(monkeypatch):
    monkeypatch.setattr(films, "PICTURE_SIDE", 100)
    assert films.read_film(FILM, 32, with_picture=True).picture.shape == (100, 67, 1)


def save_dicom(**elements):
    with open("film.dcm", "wb") as file:
        file.write(make_dicom(FILM.astype(np.uint16) * 16, BitsStored=12, **elements))


def test_dicom_is_read():
    save_dicom(ViewPosition="PA", PatientOrientation=["L", "F"], BodyPartExamined="CHEST")
    film = films.read_film("film.dcm", 32, with_picture=True)
    assert film.shape == FILM.shape and film.notes == ()
    np.testing.assert_allclose(film.picture[..., 0], FILM, atol=1)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"Modality": "CT"}, "is DICOM of modality CT"),
        ({"Modality": "MR", "NumberOfFrames": 3}, "is DICOM of modality MR"),
        ({"ViewPosition": "LL"}, r"is a lateral view \(ViewPosition LL\)"),
        ({"ViewPosition": "LATERAL"}, r"is a lateral view \(ViewPosition LATERAL\)"),
        ({"PatientOrientation": ["A", "F"]}, r"is a lateral view \(PatientOrientation A\)"),
    ],
)
def test_other_dicom_is_refused_by_its_tags(elements, words):
    save_dicom(**elements)
    with pytest.raises(UserError, match=f"film.dcm {words}, not a frontal .*; leave it out"):
        films.read_film("film.dcm", 32)
    if "NumberOfFrames" not in elements:
        fault = films.read_film("film.dcm", 32, check=False).fault
        assert fault.startswith(films.LATERAL) == ("Modality" not in elements)
        assert films.read_film("film.dcm", 32, check=False).notes[0].startswith("is ")


def test_a_part_of_the_body_is_noted():
    save_dicom(BodyPartExamined="KNEE")
    assert films.read_film("film.dcm", 32).notes == ("shows KNEE, by its BodyPartExamined",)


def test_several_frames_are_refused():
    save_dicom(NumberOfFrames=3)
    with pytest.raises(UserError, match="has 3 frames, not one; save the frame"):
        films.read_film("film.dcm", 32)


def colour(film, tint):
    return Image.fromarray((film[..., None] * np.asarray(tint)).astype(np.uint8))


def test_a_tinted_and_marked_film_is_accepted():
    image = colour(FILM, (1, 0.87, 0.7))
    image.paste((255, 0, 0), (20, 30, 90, 100))
    image.save("film.jpg")
    assert films.read_film("film.jpg", 32).notes == ()


def test_a_colour_photograph_is_refused():
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((90, 70)).save("cat.png")
    with pytest.raises(UserError, match=r"cat.png is in colour \(.*\), not a frontal chest"):
        films.read_film("cat.png", 32)
    (note, *_) = films.read_film("cat.png", 32, check=False).notes
    assert note.startswith("is in colour")


def test_a_film_without_contrast_is_refused():
    Image.fromarray(np.full((50, 40), 90, np.uint8)).save("film.png")
    with pytest.raises(UserError, match="is blank: its pixels differ by 0 of 255 grey levels; use"):
        films.read_film("film.png", 32)


def test_a_film_smaller_than_the_map_is_refused():
    with pytest.raises(
        UserError, match="the array has 6 x 5 pixels, fewer than the 8 cells .*; use a"
    ):
        films.read_film(draw_film(6, 5), 32, min_side=8)
    (note,) = films.read_film(draw_film(20, 18), 32, min_side=8).notes
    assert note == "was enlarged from 20 x 18 pixels to the model's 32"


def test_a_film_without_symmetry_is_noted():
    film = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    (note,) = films.read_film(film, 32).notes
    assert note.startswith("may be a lateral view or turned: its symmetry is ")


def literal_symmetry(pixels):
    cells = transforms.resize_image(pixels, 16, 16)
    ranks = [[np.mean(cells <= cell) for cell in row] for row in cells]
    best = -1.0
    for axis in range(-2, 3):  # half columns that the axis lies beside the centre
        left, right = [], []
        for row in ranks:
            for column in range(16):
                mirrored = 15 - column + axis
                if max(axis, 0) <= column <= 15 + min(axis, 0) and 0 <= mirrored <= 15:
                    left.append(row[column])
                    right.append(row[mirrored])
        best = max(best, np.corrcoef(left, right)[0, 1])
    return best


@pytest.mark.parametrize("seed", range(3))
def test_symmetry_is_the_correlation_with_the_mirror_image(seed):
    film = draw_film(64, 64, seed)
    film = np.roll(film, 4 * seed, axis=1)
    film[:20] = np.random.default_rng(seed).integers(0, 256, (20, 64))
    assert films.measure_symmetry(film) == pytest.approx(literal_symmetry(film))


def test_the_mirror_image_of_a_flat_film_is_itself():
    assert films.measure_symmetry(np.zeros((16, 16), np.uint8)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", r"none.png cannot be read \(No such file or directory\); correct the path"),
        ("folder", r"folder is a folder; pass the images in it, as folder/\*.png"),
        ("text.png", "text.png is not an image that can be read; pass a PNG, JPEG or DICOM"),
        ("empty.png", "empty.png is an empty file; pass"),
        ("half.png", "half.png is a broken image"),
        ("pipe", "pipe is not a file; pass"),
        ("a" * 300, r"a cannot be read \(File name too long\); correct the path"),
        ("", "the image has an empty path; pass the path of a file"),
    ],
)
def test_what_is_not_an_image_is_refused(name, message):
    os.mkdir("folder")
    os.mkfifo("pipe")
    Image.fromarray(FILM).save("half.png")
    content = Path("half.png").read_bytes()
    for path, data in (
        ("text.png", b"hello"),
        ("empty.png", b""),
        ("half.png", content[: len(content) // 2]),
    ):
        Path(path).write_bytes(data)
    with pytest.raises(UserError, match=message):
        films.read_film(name, 32)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"uint8\[4, 4, 3\]"),
        (np.zeros((4, 4)), r"float64\[4, 4\]"),
        (np.zeros((0, 4), np.uint8), r"uint8\[0, 4\]"),
    ],
)
def test_arrays_are_grey(array, words):
    with pytest.raises(UserError, match=f"the array is {words}; pass grey values as uint8"):
        films.read_film(array, 32)


@pytest.mark.parametrize("source", [None, ["a.png"], Image.fromarray(FILM)])
def test_what_is_no_path_is_refused(source):
    # Tests check the types of `read_film`; a user's program does not.
    with pytest.raises(UserError, match=f"is of type {type(source).__name__}; pass a path, or"):
        films._check_path(source)

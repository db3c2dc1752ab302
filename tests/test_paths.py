"""Paths of images: other machines, other spellings, and hints for those that are missing."""

import errno
import os
import unicodedata

import pytest

from plan_jax.data.pairs import paths
from plan_jax.types import UserError


@pytest.fixture
def root(tmp_path):
    """A folder `study` with three images in `study/img`."""
    folder = tmp_path / "study"
    (folder / "img").mkdir(parents=True)
    for name in ("a.png", unicodedata.normalize("NFC", "é.png"), "1.dcm"):
        (folder / "img" / name).touch()
    return folder


@pytest.mark.parametrize(
    "path", ["img/a.png", "img\\a.png", ".\\img\\a.png", "./img//a.png", "img/e\u0301.png"]
)
def test_a_path_in_another_spelling_is_found(root, path):
    assert paths.resolve_path(root, path, 1).is_file()


@pytest.mark.parametrize("path", ["../x.png", "..\\x.png", "img\\..\\..\\x.png", "/etc/hostname"])
def test_a_path_that_leaves_the_folder_is_refused(root, path):
    with pytest.raises(UserError, match="of row 3 leaves the images folder .*; move it inside"):
        paths.resolve_path(root, path, 3)


def test_a_path_of_another_machine_names_the_path_here(root):
    for path in ("/data/me/img/a.png", "/img/a.png"):
        with pytest.raises(UserError, match=f"'{path}' of row 1 leaves .*; write img/a.png"):
            paths.resolve_path(root, path, 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a" * 300, "is not a path .File name too long"),
        ("https://x.org/a.png", "is an address; download it"),
    ],
)
def test_what_is_no_path_is_a_mistake_of_the_row(root, path, message):
    with pytest.raises(ValueError, match=message):
        paths.resolve_path(root, path, 1)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("img/a.png", "img/a.png in .*study cannot be read .Permission denied.; correct that, and"),
        ("img/Clear lungs", "a text of 15 characters in .*study cannot be read"),
        ("/data/me/img/a.png", "of row 1 leaves the images folder .*; move it inside"),
    ],
)
def test_a_folder_without_permission_is_no_mistake_of_the_row(root, path, sentence, monkeypatch):
    def refuse(place, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=sentence):
        paths.resolve_path(root, path, 1)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("study/img/a.png", "study/img/a.png exists from .*: set data.builder.images to it"),
        ("a.png", "a.png exists in .*img: set data.builder.images to it"),
        ("D:\\study\\img\\a.png", "it exists as img/a.png: write paths from"),
        ("img/1", "exists with the suffix .dcm: set data.builder.image_suffix"),
        ("1", "in .*img with the suffix .dcm: set data.builder.images and"),
        ("img/A.PNG", "the file is called a.png: write it so"),
        ("img/a.png;img/b.png", "several images needs one row for each"),
        ("b.png", "$"),
    ],
)
def test_a_missing_path_has_a_hint(root, path, hint):
    import re

    assert re.match(f".*{hint}", paths.suggest_folder(root, path))
    assert paths.suggest_folder(root, "x" * 5000) == ""


def test_a_folder_behind_many_files_is_a_hint(root):
    for number in range(paths.MAX_FOLDERS + 5):
        (root / f"0{number}.png").touch()
    (root / "z").mkdir()
    (root / "z" / "deep.png").touch()
    assert f"exists in {root / 'z'}: set data" in paths.suggest_folder(root, "deep.png")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["a.png", "b.png"], "is a list of 2 images; write one row for each image"),
        ({"bytes": b"x" * 9000, "path": None}, "is an embedded image; save it as a file"),
        (b"\xff\xd8" * 9000, "holds bytes of an image"),
        (7, "is 7, not the path of an image"),
        ([], "is a list of 0 images"),
        (None, "names no image"),
    ],
)
def test_a_cell_that_is_no_path_says_what_it_is(cell, message):
    with pytest.raises(ValueError, match=message):
        paths.read_image_name(cell)
    assert paths.read_image_name("['a.png']") == "a.png"

"""Tables of pairs to locate."""

from pathlib import Path

import pytest

from plan_jax.prediction import tables
from plan_jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "films" / name).touch()
    return tmp_path


def write(folder, text, name="pairs.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_rows_of_an_image_form_a_job(folder):
    table = write(folder, "image,text\nfilms/a.png,x\nfilms/b.png,y\nfilms/a.png,z\n")
    first, second = tables.read_jobs(table)
    assert Path(first.path) == folder / "films/a.png" and first.name == "films/a.png"
    assert (first.texts, first.rows) == (["x", "z"], [1, 3])
    assert (second.name, second.texts, second.rows) == ("films/b.png", ["y"], [2])


def test_json_lines_and_another_folder(folder):
    table = write(folder, '{"image": "a.png", "text": "x"}\n', "pairs.jsonl")
    (job,) = tables.read_jobs(table, folder / "films")
    assert Path(job.path) == folder / "films/a.png" and not job.fault


def test_cells_without_an_image_are_faults_of_their_rows(folder):
    table = write(folder, "image,text\n,x\n../../a.png,y\nfilms/a.png,\n")
    missing, outside, empty = tables.read_jobs(table)
    assert missing.fault == "the image of row 1 names no image; correct that cell"
    assert missing.name == "" and outside.name == "../../a.png"
    assert "row 2 leaves the images folder" in outside.fault
    assert empty.texts == [""] and not empty.fault


def test_a_row_keeps_its_spelling_of_an_image(folder):
    table = write(folder, "image,text\nfilms/a.png,x\n./films/a.png,y\n")
    first, second = tables.read_jobs(table)
    assert (first.name, second.name) == ("films/a.png", "./films/a.png")
    assert first.path == second.path


def test_a_list_is_not_a_phrase(folder):
    lines = '{"image": "films/a.png", "text": ["x", "y"]}\n{"image": "films/a.png", "text": 7}\n'
    several, number = tables.read_jobs(write(folder, lines, "pairs.jsonl"))
    assert several.fault == "the text of row 1 is a list of 2; write one phrase in each row"
    assert number.texts == ["7"] and not number.fault


def test_a_table_needs_both_columns(folder):
    with pytest.raises(UserError, match=r"column 'text' \(text\) is not in the manifest; did you"):
        tables.read_jobs(write(folder, "image,texts\nfilms/a.png,x\n"))

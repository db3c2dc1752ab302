"""The index of films and reports: what is kept, reused, and built again; and the library."""

import numpy as np
import pytest
from PIL import Image
from tiny_models import draw_film

from plan_jax.demo import index, library
from plan_jax.types import UserError

FILMS, REPORTS = ["a" * 64, "b" * 64, ""], ["c" * 64, "", "d" * 64]
BUILT = "2 films and 2 reports were added to the index"


class Encoders:
    """Encoders that count their calls: film n is the n-th unit vector, and so is report n."""

    def __init__(self):
        self.calls = []

    def encode(self, number):
        self.calls.append(number)
        return 2 * np.eye(4, dtype=np.float32)[number]


def build(path, *, model="m1", films=FILMS, reports=REPORTS):
    films_encoder, reports_encoder = Encoders(), Encoders()
    result, notes = index.load_or_build(
        path, model, films, reports, films_encoder.encode, reports_encoder.encode
    )
    return result, notes, films_encoder.calls, reports_encoder.calls


def test_an_index_is_built_once(tmp_path):
    path = tmp_path / "folder" / "index.npz"
    first, notes, films, reports = build(path)
    assert (films, reports) == ([0, 1], [0, 2])
    assert notes == (BUILT, "1 film that cannot be used left out")
    second, notes, films, reports = build(path)
    assert (films, reports) == ([], []) and notes[0] == "the index was read from the disk"
    np.testing.assert_array_equal(first.films, second.films)
    np.testing.assert_array_equal(first.films, np.eye(4)[[0, 1, 2]] * [[1], [1], [0]])
    assert [file.name for file in path.parent.iterdir()] == ["index.npz"]


def test_a_new_film_alone_is_encoded(tmp_path):
    path = tmp_path / "index.npz"
    build(path)
    _, notes, films, reports = build(path, films=[*FILMS, "e" * 64], reports=[*REPORTS, ""])
    assert (films, reports) == ([3], [])
    assert notes[0] == "1 film and 0 reports were added to the index"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "the index was damaged and is built again"),
        (lambda data: b"", "the index was damaged and is built again"),
        (lambda data: data[:200] + bytes(40) + data[240:], "was damaged and is built again"),
        (lambda data: b"\x80\x04\x95" + data, "the index was damaged and is built again"),
    ],
)
def test_a_damaged_index_is_built_again(change, sentence, tmp_path):
    path = tmp_path / "index.npz"
    expected = build(path)[0]
    path.write_bytes(change(path.read_bytes()))
    result, notes, films, _ = build(path)
    assert sentence in notes[0] and notes[1] == BUILT and films == [0, 1]
    np.testing.assert_array_equal(result.films, expected.films)
    assert build(path)[1][0] == "the index was read from the disk"


def test_arrays_of_another_shape_are_damage(tmp_path):
    path = tmp_path / "index.npz"
    np.savez(path, format=1, model="m1", films=np.ones(3), films_digests=["x"], reports=np.ones(3),
             reports_digests=["x"])  # fmt: skip
    assert build(path)[1][0] == "the index was damaged and is built again"


def test_an_index_of_another_model_or_version_is_built_again(tmp_path, monkeypatch):
    path = tmp_path / "index.npz"
    build(path)
    _, notes, films, _ = build(path, model="m2")
    assert notes[:2] == ("the index was of another model and is built again", BUILT)
    assert films == [0, 1]
    monkeypatch.setattr(index, "FORMAT", 2)
    assert build(path, model="m2")[1][0] == "the index was of another version and is built again"


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("x")
    result, notes, *_ = build(tmp_path / "file" / "index.npz")
    assert notes[1] == "the index cannot be written, so the next start builds it again"
    assert result.films.shape == (3, 4)


def test_the_file_has_no_names_and_no_words(tmp_path):
    path = tmp_path / "index.npz"
    build(path)
    with np.load(path) as arrays:
        assert set(arrays) == {
            *("format", "model", "films", "films_digests", "reports", "reports_digests")
        }


def test_rank_leaves_out_what_has_no_features():
    features = np.array([[0, 0], [1, 0], [0.6, 0.8]], np.float32)
    rows, cosines = index.rank(np.array([0, 3], np.float32), features, 5)
    assert rows.tolist() == [2, 1]
    np.testing.assert_allclose(cosines, [0.8, 0], atol=1e-6)


# The library -------------------------------------------------------------------------------------


def save_film(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_film(seed=seed)).save(path)


def test_films_of_a_folder_have_the_reports_beside_them(tmp_path):
    save_film(tmp_path / "b" / "film.png")
    save_film(tmp_path / "a.PNG", 1)
    (tmp_path / "b" / "film.txt").write_text("No\neffusion.")
    (tmp_path / "notes.md").write_text("x")
    entries = library.list_films([str(tmp_path), str(tmp_path / "b")])
    assert [(entry.name, entry.report) for entry in entries] == [
        ("a.PNG", ""),
        ("b/film.png", "No effusion."),
    ]
    assert library.describe(entries) == "2 films, 1 report"
    first, second = (entry.digest() for entry in entries)
    assert len(first) == 64 and first != second
    (tmp_path / "a.PNG").unlink()
    assert entries[0].digest() == ""


def test_films_of_a_table(tmp_path):
    save_film(tmp_path / "1.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,text\n1.png,No effusion.\n1.png,Heart is large.\n../2.png,x\n")
    (entry,) = library.list_films([str(table)])
    assert (entry.name, entry.report) == ("1.png", "No effusion. Heart is large.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "does not exist; pass a folder"),
        ("film.png", "is not a table; pass a folder"),
        ("empty", r"has no film; put files \.png"),
    ],
)
def test_sources_without_films(name, sentence, tmp_path):
    save_film(tmp_path / "film.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--films .*{name} {sentence}"):
        library.list_films([str(tmp_path / name)])

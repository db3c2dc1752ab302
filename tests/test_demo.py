"""The grounding page without a browser: a model that stays loaded, uploads, pictures, downloads."""

import io
import json
import os
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from radiographs import draw_picture, make_dicom, make_png, make_tiff
from tiny_models import draw_film, make_tiny_model

from plan_jax import parallel, prediction
from plan_jax.demo import (
    __main__ as demo,
)
from plan_jax.demo import (
    distractors,
    downloads,
    examples,
    grounder,
    pictures,
    render,
    service,
    uploads,
)
from plan_jax.types import UserError

FILM = draw_film(61, 47)
TEXT = "small effusion on the left"
SCRIPT = "effusion <script>alert(1)</script> <img src=x onerror=alert(2)>"
pytestmark = pytest.mark.filterwarnings("ignore:this model was trained on phantoms")


@pytest.fixture(scope="module")
def desk():
    desk = grounder.Grounder(make_tiny_model())
    desk.warm_up()
    return desk


@pytest.fixture
def film(desk):
    return desk.open_array(FILM, "film.png")


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def encode(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


# The model ---------------------------------------------------------------------------------------


def test_a_location_is_the_grounding_of_the_model(desk, film):
    location = desk.locate(film, TEXT)
    expected = make_tiny_model().ground(FILM, TEXT, normalisation="raw", threshold=0.1)
    placed = downloads.place(desk, film, location, 0.1)
    np.testing.assert_allclose(placed.heat_map, expected.heat_map, atol=1e-6)
    np.testing.assert_array_equal(placed.boxes, expected.boxes)
    assert placed.similarity == pytest.approx(expected.similarity)
    assert location.scores[0].similarity == pytest.approx(expected.similarity["global"])


def test_words_have_their_maps_and_weights(desk, film):
    location = desk.locate(film, "Small EFFUSION, left-sided.")
    assert location.words == ("Small", "EFFUSION", "left", "sided")
    assert location.word_maps.shape == (4, *desk.model.grid)
    assert location.shares.sum() == pytest.approx(1)
    mean = np.tensordot(location.shares, location.word_maps, 1)
    np.testing.assert_allclose(mean, location.heat_map, atol=1e-6)


def test_nothing_is_compiled_after_the_start(desk):
    counter = parallel.CompilationCounter()
    for rows, text in ((30, "nodule"), (90, "no effusion. " * 30)):
        film = desk.open_array(draw_film(rows, 50), "film.png")
        for rounds in range(desk.max_rounds + 1):
            desk.locate(film, text, rounds)
    assert (counter.compiled, counter.cache_hits) == (0, 0)


def test_rounds_change_the_map(desk, film):
    maps = [desk.locate(film, TEXT, rounds).heat_map for rounds in range(desk.max_rounds + 1)]
    assert len(maps) == desk.model.rounds + 3
    assert min(np.abs(a - b).max() for a, b in zip(maps, maps[1:], strict=False)) > 1e-6


def test_a_long_phrase_says_how_much_is_read(desk, film):
    location = desk.locate(film, "effusion " * 400)
    assert "400 words, of which the first 20 were read" in location.notes[0]
    assert len(location.words) == 20


def test_the_scale_is_that_of_the_references(desk, film):
    other = grounder.Grounder(desk.model)
    other.calibrate([film], ["effusion", "nodule"])
    heat = [desk.locate(film, text).heat_map for text in ("effusion", "nodule")]
    assert other.limits[1] == pytest.approx(np.max(heat))
    other.locate(film, "cardiomegaly")
    assert other.limits[1] == pytest.approx(np.max(heat))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("", "there is no phrase; type or pick one"),
        (" \n\t", "there is no phrase; type or pick one"),
        ("\U0001f480\U0001f480", "has no word; pass a phrase"),
        ("!?", "has no word; pass a phrase"),
        ("\n".join("abcdefg"), "there are 7 phrases, more than the 6 that fit"),
    ],
)
def test_phrases_that_cannot_be_used(typed, sentence):
    with pytest.raises(UserError, match=sentence):
        grounder.split_phrases(typed)


def test_a_phrase_with_an_emoji_is_read(desk, film):
    assert desk.locate(film, "effusion on the left \U0001f480").words[-1] == "left"


def test_a_text_of_many_characters_is_refused(desk, film):
    with pytest.raises(UserError, match="has 5,000 characters, more than 4,000; shorten it"):
        desk.locate(film, "a" * 5000)


# Distractors -------------------------------------------------------------------------------------


def test_distractors():
    kinds = {d.name: d.text for d in distractors.write_distractors("effusion on the left")}
    assert kinds == {
        "the opposite": "no effusion on the left",
        "the other side": "effusion on the right",
    }
    (opposite,) = distractors.write_distractors("No pneumothorax")
    assert opposite.text == "Pneumothorax"
    for text in ("no pneumothorax on the left", "effusions left and right", "no spot on the left"):
        assert "the other side" not in {d.name for d in distractors.write_distractors(text)}
    (opposite,) = distractors.write_distractors("a shadow of unknown kind")
    assert opposite.text == "no a shadow of unknown kind"


def test_scores_begin_with_the_phrase(desk, film):
    scores = desk.locate(film, TEXT).scores
    assert [score.name for score in scores] == [
        *("the phrase", "the opposite", "the other side", "another size"),
    ]
    texts = desk.model.encode_text([score.text for score in scores])
    expected = desk.model.similarity(film.features, texts)["global"][0]
    np.testing.assert_allclose([score.similarity for score in scores], expected, atol=1e-5)


# Uploads -----------------------------------------------------------------------------------------


def test_an_upload_is_deleted_in_any_case(tmp_path):
    path = save(tmp_path / "a1b2" / "film.png", b"x")
    with pytest.raises(ZeroDivisionError), uploads.consume(path, tmp_path) as file:
        assert file.read_bytes() == b"x"
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    outside = save(tmp_path / "secret.txt", b"x")
    (tmp_path / "uploads").mkdir()
    for name in (outside, tmp_path / "uploads" / ".." / "secret.txt"):
        with (
            pytest.raises(UserError, match="is not an upload"),
            uploads.consume(name, tmp_path / "uploads"),
        ):
            pass
    assert outside.exists()
    first, second = (save(tmp_path / "c3" / name, b"x") for name in ("a.png", "b.png"))
    with uploads.consume(first, tmp_path):
        pass
    assert not first.exists() and second.exists()  # of another tab, with the same content


def test_old_files_are_deleted(tmp_path):
    for name in ("a1/film.png", "tmp1"):
        os.utime(save(tmp_path / name, b"x"), (0, 0))
    save(tmp_path / "new" / "film.png", b"x")
    uploads.delete_old(tmp_path, 60)
    assert not (tmp_path / "tmp1").exists() and not (tmp_path / "a1" / "film.png").exists()
    assert (tmp_path / "new" / "film.png").exists()


def make_bomb():
    """Returns a PNG of a few hundred bytes that promises 60,000 x 60,000 pixels."""
    data = bytearray(make_png(np.zeros((1, 1, 1), np.uint8), 0, 8))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (make_tiff(np.zeros((8, 8, 1), np.uint8)), "is a file of kind TIFF; open a PNG"),
        (b"a report, not an image", "is not an image; open a PNG"),
        (b"", "is an empty file; open a PNG"),
        (make_bomb(), "far more pixels than a film; reduce it"),
        (make_png(np.zeros((1, 9000, 1), np.uint8), 0, 8), None),
    ],
)
def test_files_that_are_refused_before_they_are_decoded(data, sentence, tmp_path):
    path = save(tmp_path / "film.png", data)
    if sentence is None:
        assert uploads.check_file(path, "film.png") == data
        return
    with pytest.raises(UserError, match=f"^film.png .*{sentence}"):
        uploads.check_file(path, "film.png")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    path = save(tmp_path / "film.tif", bytes(2**21))
    with pytest.raises(UserError, match="film.tif has 2 MB, more than 1; reduce it"):
        uploads.check_file(path, "film.tif")


def test_dicom_promises_that_are_refused(tmp_path, monkeypatch):
    pixels = np.zeros((20, 30), np.uint16)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 500)
    path = save(tmp_path / "film.dcm", make_dicom(pixels))
    with pytest.raises(UserError, match="film.dcm has 20 x 30 pixels, more than 500; reduce it"):
        uploads.check_file(path, "film.dcm")
    path.write_bytes(
        make_dicom(pixels).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    )
    with pytest.raises(UserError, match="whose elements are compressed; save it uncompressed"):
        uploads.check_file(path, "film.dcm")


def test_a_colour_photograph_is_refused(desk, tmp_path):
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    path = save(tmp_path / "cat.jpg", encode(photograph, "JPEG"))
    with pytest.raises(UserError, match="^cat.jpg is in colour .*open another file"):
        desk.open_file(path, "cat.jpg")


def test_a_lateral_film_is_noted(desk, tmp_path):
    stored = FILM.astype(np.uint16) * 16
    path = save(tmp_path / "film.dcm", make_dicom(stored, BitsStored=12, ViewPosition="LL"))
    film = desk.open_file(path, "film.dcm")
    assert not film.has_sides and film.film.notes[0] == "is a lateral view (ViewPosition LL)"
    html = render.render_results(
        desk, film, [desk.locate(film, TEXT)], examples.NullMaps(None, (), 0), 0.2
    )
    assert "pj-right" not in html and "patient's" not in html
    assert "is a lateral view" in render.render_film(film, "film.dcm")


def test_a_mirrored_film_has_no_marks(desk, tmp_path):
    stored = FILM.astype(np.uint16) * 16
    data = make_dicom(stored, BitsStored=12, PatientOrientation=["R", "F"])
    film = desk.open_file(save(tmp_path / "film.dcm", data), "film.dcm")
    assert not film.has_sides and film.film.notes[0].startswith(
        "is mirrored (PatientOrientation R)"
    )
    display = downloads.Display(0.1, 0.8)
    result = json.loads(downloads.encode_json(desk, film, [desk.locate(film, TEXT)], display))
    assert result["phrases"][0]["side"] is None


def test_another_window_is_what_the_model_reads(desk, tmp_path):
    stored = np.round(draw_picture(64, 64) * 4095).astype(np.uint16)
    path = save(tmp_path / "film.dcm", make_dicom(stored, BitsStored=12))
    film = desk.open_file(path, "film.dcm")
    assert film.window.width == 4095 and film.window.high == stored.max()
    narrow = desk.open_bytes(film.source, "film.dcm", (1000.0, 500.0))
    assert narrow.window[:2] == (1000.0, 500.0)
    assert narrow.film.picture[stored < 700].max() == 0
    assert np.abs(narrow.film.square.astype(int) - film.film.square).max() > 50
    assert np.abs(narrow.features.pooled - film.features.pooled).max() > 1e-4


def test_names_are_short_and_without_folders():
    assert uploads.show_name("a/b\\c.png") == "c.png"
    assert len(uploads.show_name("x" * 300)) == 60


# Pictures ----------------------------------------------------------------------------------------


def test_heat_is_transparent_below_the_scale_and_opaque_above():
    layer = pictures.paint_heat(np.array([[-1.0, 0.2, 0.5, 0.8, 3.0]]), (0.2, 0.8))
    assert layer[0, :, 3].tolist() == [0, 0, 127, 255, 255]
    assert pictures.paint_heat(np.ones((2, 2)), (1.0, 1.0))[..., 3].max() == 0


def test_a_contour_lies_around_its_mask():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    alpha = pictures.draw_contour(mask, 1)[..., 3]
    assert alpha[4, 4] == 0 and alpha[4, 3] == alpha[3, 4] == 255 and (alpha > 0).sum() == 4
    assert not pictures.draw_contour(np.zeros((3, 3), bool)).any()


def test_layers_lie_over_the_film():
    film = np.full((40, 40, 3), 100, np.uint8)
    heat = np.full((40, 40, 4), 255, np.uint8)
    plain = pictures.compose(film, heat, [], 0.0, marks_sides=False)
    np.testing.assert_array_equal(plain, film)
    half = pictures.compose(film, heat, [], 0.5, marks_sides=False)
    assert half.min() == half.max() == 178
    marked = pictures.compose(film, heat, [], 0.0)
    assert (marked != film).any() and (marked[20:] == film[20:]).all()


def test_results_escape_what_the_user_writes(desk, film):
    locations = [desk.locate(film, SCRIPT)]
    html = render.render_results(desk, film, locations, examples.NullMaps(None, (), 0), 0.2)
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in render.render_message(SCRIPT)
    assert "<script" not in render.render_film(film, SCRIPT)
    assert "<script" not in render.render_reports([(SCRIPT, SCRIPT, 0.1)], [SCRIPT])


def test_results_of_several_phrases_share_a_scale(desk, film):
    locations = [desk.locate(film, text) for text in (TEXT, "no effusion")]
    html = render.render_results(desk, film, locations, examples.NullMaps(None, (), 0), 0.2)
    assert html.count('pj-card"') == 2 and html.count("pj-legend") == 1
    assert "a spot in the middle of the film" in html
    assert "of the heat is on the patient&#39;s left" in html or "patient's left" in html


def test_the_share_of_a_side():
    heat = np.zeros((4, 6))
    heat[1, 5] = 1
    assert render.measure_side(heat, "left") == 1 and render.measure_side(heat, "right") == 0
    assert render.measure_side(np.ones((4, 6)), "left") == 0.5


# Null maps ---------------------------------------------------------------------------------------


def test_null_maps_are_those_of_the_finding(desk):
    nulls = examples.fit_nulls(desk.model)
    name, effusion = nulls.find("no pleural effusion")
    assert name == f"mean mask of the finding in {examples.NUM_PRIOR_RECORDS} phantoms"
    assert effusion.shape == (64, 64) and effusion.max() > 0.2
    assert nulls.find("a broken clavicle")[0].startswith("mean lungs")
    assert examples.NullMaps(None, (), 0).find("effusion")[0].startswith("a spot")


# Downloads ---------------------------------------------------------------------------------------


def test_downloads(desk, film):
    locations = [desk.locate(film, text) for text in (TEXT, "no effusion")]
    display = downloads.Display(0.1, 0.8, 1)
    with Image.open(io.BytesIO(downloads.encode_png(desk, film, locations, display))) as picture:
        assert picture.format == "PNG" and picture.height == 640 + pictures.CAPTION_ROWS
    content = io.BytesIO(downloads.encode_npz(desk, film, locations, display))
    with np.load(content) as arrays:
        placed = downloads.place(desk, film, locations[0], 0.1)
        assert arrays["map_1"].shape == FILM.shape and arrays["map_1"].dtype == np.float32
        np.testing.assert_allclose(arrays["map_1"], placed.heat_map, atol=1e-4)
        assert arrays["text"].tolist() == [TEXT, "no effusion"]
        assert str(arrays["model"]) == desk.model.identify()
    result = json.loads(downloads.encode_json(desk, film, locations, display))
    assert result["model"] == {"method": "plan", "params_sha256": desk.model.identify()}
    assert (result["rounds"], result["threshold"]) == (1, 0.1)
    first = result["phrases"][0]
    assert first["text"] == TEXT and first["width"] == 47 and first["words"][0]["word"] == "small"
    assert first["boxes"] == prediction.Grounding.to_row(placed)["boxes"]
    assert first["distractors"][0]["text"] == "no small effusion on the left"


# The service -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.models, "load", lambda source: make_tiny_model())
        patch.setattr(service, "NUM_PHANTOMS", 5)
        patch.setattr(service, "NUM_REFERENCES", 2)
        patch.setattr(examples, "NUM_PRIOR_RECORDS", 4)
        yield service.Service("tiny", index_folder=tmp_path_factory.mktemp("index"))


def test_each_tab_has_its_own_film(page, tmp_path):
    titles = [example.title for example in page.examples]
    page.open_example("first", titles[0])
    page.open_example("second", titles[1])
    assert page.find("first").film.name == titles[0]
    with pytest.raises(UserError, match="no film is open; open a file or pick a phantom"):
        page.ground("third", TEXT, [], 0.2, 1)
    page.close("second")
    with pytest.raises(UserError, match="no film is open"):
        page.find("second")
    path = save(tmp_path / "a1" / "film.png", b"no image")
    with pytest.raises(UserError, match="film.png is not an image"):
        page.open_upload("first", path, tmp_path)
    assert not path.exists() and page.find("first").film.name == titles[0]
    path = save(tmp_path / "a2" / "film.png", encode(FILM))
    page.open_upload("first", path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert page.open_upload("second", path, tmp_path).features is page.find("first").features
    assert "pj-card" in page.ground("first", TEXT, ["nodule"], 0.2, 1)
    with pytest.raises(UserError, match="the film has no window; open a DICOM file"):
        page.change_window("first", 1.0, 2.0)


@pytest.mark.parametrize(
    ("level", "width", "sentence"),
    [
        (1000.0, 0.5, "the window width is 0.5; use 1 to 4,294,967,296"),
        (1000.0, None, "the window width is empty; type a number"),
        (None, 500.0, "the window level is empty; type a number"),
        (float("nan"), 500.0, "the window level is nan; use -4,294,967,296 to"),
    ],
)
def test_a_window_that_shows_nothing_is_one_sentence(level, width, sentence, page, tmp_path):
    data = make_dicom(np.round(draw_picture(64, 64) * 4095).astype(np.uint16), BitsStored=12)
    film = page.open_upload("tab", save(tmp_path / "a1" / "film.dcm", data), tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        page.change_window("tab", level, width)
    assert page.find("tab") is film


def test_few_films_are_kept(page, monkeypatch):
    monkeypatch.setattr(service, "MAX_OPEN", 3)
    for number in range(5):
        page.open_example(f"tab {number}", page.examples[0].title)
    assert "tab 4" in page._open and "tab 0" not in page._open and len(page._open) == 3


def test_retrieval(page):
    report = page.examples[2].report
    html = page.find_films(report)
    assert html.count("<figure>") == 5 and "Phantom 3" in html
    page.open_example("tab", page.examples[0].title)
    assert page.find_reports("tab").count("<li>") == 5
    with pytest.raises(UserError, match="there is no report; type one"):
        page.find_films("  ")


def test_a_second_start_reads_the_index(page, tmp_path, monkeypatch):
    path = tmp_path / "index.npz"
    _, notes = page._open_index(path)
    assert notes == ("5 films and 5 reports were added to the index",)
    monkeypatch.setattr(page.grounder, "encode", lambda film: 1 / 0)
    index, notes = page._open_index(path)
    assert notes == ("the index was read from the disk",)
    np.testing.assert_array_equal(index.films, page.index.films)


# The command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "70000"], "--port is 70000; use 1 to 65535, or leave it out"),
        (["--films", "gs://bucket/films"], "is an address"),
        (["--films", "nowhere"], "--films nowhere does not exist; pass a folder"),
    ],
)
def test_mistakes_of_the_command(arguments, sentence, capsys, monkeypatch):
    stub = types.SimpleNamespace(build=None)
    monkeypatch.setitem(sys.modules, "plan_jax.demo.page", stub)
    before = dict(os.environ)  # which the server changes for gradio
    try:
        assert demo.run(arguments) == 2
    finally:
        os.environ.clear()
        os.environ.update(before)
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


def test_without_gradio_there_is_a_remedy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.run([]) == 2
    assert capsys.readouterr().err == (
        "the page needs gradio, which is not installed; pip install 'plan-jax[demo]'\n"
    )


def test_a_signal_deletes_the_uploads(tmp_path):
    code = """
import os, signal, tempfile
from plan_jax import command
command.end_on_signals()
from plan_jax.demo import server
folder = server._make_folder()
(folder / "film.png").write_bytes(b"x")
print(folder, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
import time; time.sleep(30)
"""
    path = save(tmp_path / "main.py", code.encode())
    result = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    folder = Path(result.stdout.strip())
    assert result.returncode == 143 and folder.name.startswith("plan_jax_page_")
    assert not folder.exists()

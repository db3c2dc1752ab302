"""Whole columns of images and of texts are looked at before any row is used."""

import pytest

from plan_jax.data.pairs import columns
from plan_jax.types import UserError

REPORT = "There is a large effusion on the left. Mr Miller was told so."
SENTENCES = ["There is an effusion", "No fracture."]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": b"\x89PNG", "path": "a.png"}, "has 4 embedded images; save them as files"),
        (b"\x89PNG\xff", "has 4 embedded images"),
        (["a.png", "b.png"], "has 4 lists of images; write one row for each image"),
        ("['a.png', 'b.png']", "has 4 lists of images"),
        (REPORT, "has 4 texts, not paths; name the column of paths"),
        (7, "has 4 numbers, not paths"),
    ],
)
def test_a_column_of_images_without_paths_is_refused(cell, message):
    with pytest.raises(UserError, match=rf"column 'Path' \(image\) of 4 rows {message}") as raised:
        columns.check_images([cell] * 4, "Path", max_bad=0.1)
    assert "Miller" not in str(raised.value)
    columns.check_images([cell, *["a.png"] * 19], "Path", max_bad=0.1)


@pytest.mark.parametrize("cell", ["patient 0 ap", 7, "7"])
def test_a_name_with_its_suffix_is_a_path(cell):
    columns.check_images([cell] * 4, "Path", max_bad=0.1, image_suffix=".png")
    with pytest.raises(UserError, match="has 4 numbers, not paths"):
        columns.check_images([7.5] * 4, "Path", max_bad=0.1, image_suffix=".png")
    with pytest.raises(UserError, match="has 4 texts, not paths"):
        columns.check_images([REPORT] * 4, "Path", max_bad=0.1)


def test_swapped_columns_are_named():
    with pytest.raises(UserError, match="columns of images and of texts are swapped in 3 of 3"):
        columns.check_order([REPORT] * 3, ["a.png", "b.jpg", "c.dcm"])
    columns.check_order(["a.png"] * 3, [REPORT] * 3)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (SENTENCES, "is a list in 4 of 4 rows; set data.builder.join_text to True if"),
        (str(SENTENCES), "is a list in 4 of 4 rows"),
        (
            {"findings": REPORT, "impression": None},
            "is an object of findings, impression in 4 of 4 rows; name the sections .*text_sec",
        ),
        (str({"findings": REPORT}), "is an object of findings in 4 of 4"),
        (7, "holds numbers, not reports; name the column of reports"),
        ("7.5", "holds numbers, not reports"),
        ("img/001.png", "holds paths, not reports"),
    ],
)
def test_a_column_of_texts_that_is_something_else_is_refused(cell, message):
    with pytest.raises(UserError, match=rf"column 'report' \(text\) {message}") as raised:
        columns.check_texts([cell] * 4, "report", join_text=False, sections=())
    assert "Miller" not in str(raised.value)


def test_lists_and_objects_are_joined_as_the_options_say():
    for cell in (SENTENCES, str(SENTENCES)):
        columns.check_texts([cell], "text", join_text=True, sections=())
        assert columns.read_text(cell, True) == "There is an effusion. No fracture."
    cell = {"IMPRESSION": "Effusion.", "findings": SENTENCES, "history": "Cough."}
    text = columns.read_text(cell, True, ("findings", "impression"))
    assert text == "There is an effusion. No fracture. Effusion."
    assert columns.read_text({"findings": None, "impression": "nan"}, sections=("findings",)) == ""
    with pytest.raises(UserError, match="text_sections findngs do not exist; use IMPRESSION, find"):
        columns.check_texts([cell], "text", join_text=True, sections=("findngs",))


@pytest.mark.parametrize(
    "cell",
    [
        7,
        "7.0",
        float("inf"),
        True,
        "['a b'\n 'c d']",
        "array(['a'], dtype=object)",
        "{'findings': <object>}",
        b"\xff",
    ],
)
def test_pythons_spelling_is_never_a_report(cell):
    with pytest.raises(ValueError, match="its text is"):
        columns.read_text(cell, True, ("findings",))


@pytest.mark.parametrize(
    "text", ["[** Name **] has an effusion.", "[1] Clear.", "(Portable) clear"]
)
def test_brackets_at_the_start_of_a_report_are_text(text):
    columns.check_texts([text], "text", join_text=False, sections=())
    assert columns.read_text(text) == text


@pytest.mark.parametrize("cell", [None, [], "nan nan", "Findings: nan Impression: None", "{}"])
def test_a_text_of_missing_words_is_empty(cell):
    assert columns.read_text(cell, True, ("findings",)) == ""


def test_remarks_count_texts_and_show_none():
    texts = ["Clear. Impression: nan"] * 6 + [f"Effusion {number}." for number in range(6)]
    assert columns.remark_texts(texts) == [
        "6 texts contain the word nan",
        "6 of 12 texts are the same",
    ]
    assert columns.remark_texts(texts[6:]) == [] and columns.remark_texts([]) == []

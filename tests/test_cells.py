"""Cells: words that mean missing, literals of JSON and Python, and spellings of one name."""

import pytest

from plan_jax.data.pairs import cells

MISSING = (
    *("nan", "NaN", "None", "NULL", "N/A", "n/a", "NA", "<NA>", "null", "-", "--", "?", "#N/A"),
    *("(null)", "None.", "\\N", "nil", "", " ", "not available", "[nan]", float("nan"), None),
)


@pytest.mark.parametrize("word", MISSING)
def test_a_word_that_means_missing_is_no_value(word):
    assert cells.is_missing(word)
    assert cells.get_cell({"a": word}, "a") is None


@pytest.mark.parametrize(
    "word", ["0", "-1", "no", "normal", "[]", "{}", "Nan Wang", "none seen", 0, 0.0, False, [], "n"]
)
def test_a_value_is_not_missing(word):
    assert not cells.is_missing(word)


def test_bytes_and_their_spelling_are_text():
    row = {"a": "Épanchement".encode(), "b": "b'No effusion.'", "c": "Épanchement".encode("latin1")}
    assert cells.get_cell(row, "a") == "Épanchement"
    assert cells.get_cell(row, "b") == "No effusion."
    assert cells.get_cell(row, "c") == row["c"]


@pytest.mark.parametrize(
    ("cell", "content"),
    [
        ("['a', 'b']", ["a", "b"]),
        ("('a', 'b')", ("a", "b")),
        ("{'b', 'a'}", ["a", "b"]),
        ("{'a': nan, 'b': 'nan'}", {"a": None, "b": "nan"}),
        ("[np.float64(1.5), 2]", [1.5, 2]),
        ("[nan, nan]", [None, None]),
        ("left (small)", "left (small)"),
        (7, 7),
    ],
)
def test_literals_of_python_are_read_as_json_is(cell, content):
    parsed = cells.parse_literal(cell)
    # JSON of Python itself knows NaN.
    assert (
        [x if x == x else None for x in parsed] == content
        if cell == "[nan, nan]"
        else (parsed == content)
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("['a' 'b']", "a list without commas, as numpy writes it"),
        ("array(['a'], dtype=object)", "an array as numpy writes it"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("['a', " + "[" * 100_000 + "]" * 100_000, "is not JSON"),
        ("[" + "9" * 5000 + "]", "a number too long"),
        ("[" + "-" * 50000 + "1]", "is not JSON"),
        ("[__import__('os').getcwd()]", "is not JSON"),
        ("{x", "is not JSON"),
    ],
)
def test_hostile_and_numpy_literals_are_refused_in_one_sentence(cell, message):
    with pytest.raises(ValueError, match=message) as raised:
        cells.parse_literal(cell)
    assert len(str(raised.value)) < 120


def test_spellings_of_one_name_have_one_key():
    names = ("Pleural_Effusion", "pleural  effusion", "PLEURAL-EFFUSION ")
    assert len({cells.fold_name(name) for name in names}) == 1
    assert cells.fold_name("E\u0301panchement") == cells.fold_name("épanchement")
    assert cells.normalise_name(" E\u0301p  A\u200b ") == "Ép A"


@pytest.mark.parametrize("cell", [10**400, "x", "1e999", float("inf"), None, [1], b"1"])
def test_what_is_no_finite_number_is_none(cell):
    assert cells.to_number(cell) is None

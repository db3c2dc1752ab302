"""One patient has one id, however pandas or a spreadsheet has written it."""

import pytest

from plan_jax.data.pairs import patients
from plan_jax.types import UserError


def test_ids_of_one_patient_are_one():
    cells = [7, 7.0, "7", "7.0", " 7 ", 10**50, "p1", None, "00012"]
    assert patients.match_ids(cells) == [*["7"] * 5, str(10**50), "p1", None, "00012"]


@pytest.mark.parametrize("pair", [("007", "7"), ("P1", "p1"), ("p01", "p1"), ("p 1", "p_1")])
def test_ids_that_differ_in_spelling_only_are_refused(pair):
    with pytest.raises(UserError, match=f"'{pair[0]}' and '{pair[1]}' differ in zeros, case or bl"):
        patients.match_ids(["x", *pair])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "1.23E+12",
            "'1.23E[+]12' is a number that a spreadsheet has shortened; store ids as text",
        ),
        (float(2**60), "is a float, which has lost digits; store ids as text"),
        (float("inf"), "is a float, which has lost digits"),
        ([1], r"a patient is \[1\]; write one id for each row"),
        (b"\xff", "a patient is 1 bytes"),
    ],
)
def test_cells_that_are_no_id_are_refused(cell, message):
    with pytest.raises(UserError, match=message):
        patients.match_ids([cell])


def test_a_missing_patient_is_that_of_another_row_of_the_image():
    images = ["a.png", "a.png", "b.png", None]
    assert patients.fill_ids([None, "p1", None, None], images) == ["p1", "p1", None, None]


def test_readers_are_named_as_readers():
    assert patients.match_ids([1, 1.0, "R2"], "reader") == ["1", "1", "R2"]
    with pytest.raises(
        UserError, match="readers 'R1' and 'r1' differ .*; write each reader in one"
    ):
        patients.match_ids(["R1", "r1"], "reader")


def test_different_ids_stay_different():
    ids = ["1", "10", "100", "a1b", "a01c", "1e05", "20", "S1-01", "S10-1", "-1", "1.05", "1.5"]
    assert patients.match_ids(ids) == ids
    long_id = "0" * 20_000 + "x"  # a pattern that tries all of its zeros would take minutes
    assert patients.match_ids([long_id]) == [long_id]

"""Columns of labels: what divides the names of findings, and which spellings are one finding."""

import pytest

from plan_jax.data.pairs import annotations, label_names
from plan_jax.types import UserError


def split_all(cells, **options):
    pattern = label_names.choose_separator(cells, **options)
    return [annotations.parse_labels(cell, separator=pattern).values for cell in cells]


@pytest.mark.parametrize(
    "cell",
    ["A|B", "A; B", "A\tB", "A\nB", "['A', 'B']", '["A", "B"]', "{'A', 'B'}", "A；B", "A、B"],
)
def test_lists_of_findings_are_never_one_class(cell):
    assert split_all([cell, "A"]) == [{"A": 1, "B": 1}, {"A": 1}]


def test_a_comma_divides_where_its_parts_are_names():
    assert split_all(["A, B", "A", "B"])[0] == {"A": 1, "B": 1}
    assert split_all(["A, B", "B, C", "A, C"])[0] == {"A": 1, "B": 1}
    assert split_all(["A, b", "A|b"])[0] == {"A": 1, "b": 1}
    sides = [f"{name}, {side}" for name in ("Nodule", "Opacity") for side in ("left", "right")]
    for cells in (sides, [*sides, "Nodule", "Opacity"]):
        with pytest.raises(UserError, match="labels contain commas, as 'Nodule, left'; set"):
            split_all(cells)
    message = "labels contain commas, as 'A, B'; set data.builder.label_separator to ',' if"
    with pytest.raises(UserError, match=message):
        split_all(["A, B", "A"])
    assert split_all(["A, B", "A"], separator=",")[0] == {"A": 1, "B": 1}
    assert split_all(["A, B", "A"], separator=";")[0] == {"A, B": 1}
    assert split_all(["Fracture, rib", "A"], findings=("fracture, rib",))[0] == {"Fracture, rib": 1}


@pytest.mark.parametrize("mark", ["/", " + ", " & ", " and ", " "])
def test_a_mark_that_may_divide_two_findings_is_refused(mark):
    cells = [f"Effusion{mark}Edema", "Effusion", "Edema"]
    with pytest.raises(
        UserError, match="may be one finding or 2; set data.builder.label_separator"
    ):
        split_all(cells)
    assert split_all(cells, separator=mark)[0] == {"Effusion": 1, "Edema": 1}
    with pytest.raises(UserError, match="if it divides findings, else to ';'"):
        split_all(cells)
    assert split_all(cells, separator=";")[0] == {cells[0]: 1}
    with pytest.raises(UserError, match="if it divides findings, else to '|'"):
        split_all([*cells, "Mass|Edema"])
    assert split_all(["Nodule/Mass", "Edema"])[0] == {"Nodule/Mass": 1}


def test_spellings_are_merged_and_named():
    counts = {"Edema": 3, "edema": 1, "Pleural_Effusion": 1, "pleural effusion": 2}
    matches, notes = label_names.match_names(counts)
    assert matches["edema"] == "Edema" and matches["Pleural_Effusion"] == "pleural effusion"
    assert notes == [
        "'edema' (1) is read as 'Edema' (3)",
        "'Pleural_Effusion' (1) is read as 'pleural effusion' (2)",
    ]
    accents = {"E\u0301panchement": 1, "\u00c9panchement": 1}
    assert len(set(label_names.match_names(accents)[0].values())) == 1


def test_configured_findings_are_matched_without_regard_to_case():
    matches, notes = label_names.match_names({"Edema": 3, "Mass": 1}, ("edema", "gout"))
    assert matches == {"Edema": "edema"}
    assert notes == [
        "'Edema' (3) is read as 'edema'",
        "labels that are not in findings: Mass 1",
        "findings that no row names: gout",
    ]
    with pytest.raises(UserError, match="none of the findings gout is a label; the labels are Ede"):
        label_names.match_names({"Edema": 3}, ("gout",))
    with pytest.raises(UserError, match="findings edema, Edema has one name twice"):
        label_names.match_names({}, ("edema", "Edema"))


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (("0", "1"), "list it in data.builder.label_columns"),
        (("0.0", "1.0"), "list it in data.builder.label_columns"),
        (("False", "True"), "list it in data.builder.label_columns"),
        (("yes", "no"), "list it in data.builder.label_columns"),
        (("0", "1", "2"), "write the names of the classes"),
        (("0 1 0", "1 0 0"), "list it in data.builder.label_columns"),
        (("Edema", "1"), "list it in data.builder.label_columns"),
    ],
)
def test_values_are_no_names_of_findings(names, remedy):
    with pytest.raises(UserError, match=f"not names of findings; .*{remedy}"):
        label_names.match_names(dict.fromkeys(names, 1))


def test_a_value_in_a_name_is_refused_but_not_a_grade():
    for names in (("oedema: 1", "effusion: 0"), ("Edema=yes",)):
        with pytest.raises(UserError, match=f"label '{names[0]}' contains its value; write JSON"):
            label_names.match_names(dict.fromkeys(names, 1))
    grades = {"BI-RADS: 1": 3, "BI-RADS: 2": 1, "BI-RADS: 4a": 1}
    assert len(label_names.match_names(grades)[0]) == 3
    assert label_names.match_names({"BI-RADS: 1": 3}, ("BI-RADS: 1",))[0]


def test_texts_in_place_of_labels_are_counted_and_not_shown():
    texts = [f"small left effusion in zone {number}" for number in range(12)]
    with pytest.raises(UserError, match="labels are 12 different texts in one row each") as raised:
        label_names.match_names(dict.fromkeys(texts, 1))
    assert "effusion" not in str(raised.value)
    assert len(label_names.match_names(dict.fromkeys(texts, 2))[0]) == 12
    assert len(label_names.match_names(dict.fromkeys(texts, 1), texts)[0]) == 12
    _, notes = label_names.match_names({texts[0]: 1, "Edema": 3}, ("Edema",))
    assert notes == ["labels that are not in findings: a text of 29 characters 1"]


def test_names_that_look_alike_are_remarked_but_not_grades():
    _, notes = label_names.match_names({"Infiltrate": 1, "Infiltration": 1, "Edema": 1})
    assert notes == [
        "labels 'Infiltrate' and 'Infiltration' look alike; if they are one, write them in one way"
    ]
    assert label_names.match_names({"No Edema": 1, "edema": 1})[1][-1] == (
        "label 'No Edema' denies 'edema'; write the latter as 0"
    )
    assert label_names.match_names({"Grade 1": 1, "Grade 2": 1})[1] == []

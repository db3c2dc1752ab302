"""The summary of a manifest is short, counts what matters, and names what is remarkable."""

import dataclasses

from plan_jax.data.pairs.annotations import Labels
from plan_jax.data.pairs.studies import Study
from plan_jax.data.pairs.summary import Summary

ROW = Study(1, "0.png", "train", "p", "Effusion.", Labels({}), [], {}, {}, {})


def make_summary(columns=("image", "text", "patient_id"), **fields):
    settings = {
        "manifest": "m.csv",
        "columns": {name: name for name in columns},
        "label_columns": (),
        "box_columns": (),
        "unused": (),
        "num_missing": {},
        "separator": "",
    }
    return Summary(**settings | fields)


def make_studies(count, patient=lambda number: str(number), **fields):
    return [
        dataclasses.replace(ROW, path=f"{n}.png", patient_id=patient(n), **fields)
        for n in range(count)
    ]


def test_a_patient_with_a_large_share_of_the_images_is_remarked():
    """Placeholders as `anonymous` look like one patient."""
    studies = make_studies(12, lambda number: "anonymous" if number < 9 else str(number))
    lines = make_summary().describe(studies, ())
    assert lines[-1] == "note: patient 'anonymous' has 9 of the images"
    assert len(make_summary().describe(make_studies(12), ())) == 2


def test_findings_are_counted_and_long_lists_are_cut():
    studies = make_studies(3, labels=Labels({"a": 1}, 0)) + make_studies(1)
    line = make_summary().describe(studies, ("a", "b"))[2]
    assert line == "findings (1/0/unknown): a 3/0/1, b 0/0/4"
    names = tuple(f"finding {number}" for number in range(30))
    assert make_summary().describe(studies, names)[2].endswith(" and 18 more")


def test_columns_are_named_where_their_role_does_not_say_it():
    summary = make_summary(
        columns=(),
        unused=("age", "There is a report in place of a name."),
        box_columns=("x", "y", "w", "h"),
        label_columns=("Edema",),
        separator=",",
    )
    summary.columns = {"text": "report", "labels": "labels"}
    assert summary.describe(make_studies(1), ())[1] == (
        "columns: text 'report', labels divided by ',', one label each: Edema, coordinates: x, y, "
        "w, h; not used: age, a text of 37 characters"
    )

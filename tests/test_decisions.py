"""What is decided over all studies: which boxes are none, their format, and names of findings."""

import dataclasses

import pytest

from plan_jax.data.pairs import decisions
from plan_jax.data.pairs.annotations import Labels
from plan_jax.data.pairs.studies import Study
from plan_jax.types import UserError

ROW = Study(1, "a.png", "train", "p", "Effusion.", Labels({}), [], {}, {}, {})


def make_study(*boxes, **fields):
    items = [{"phrase": "p", "label": ""} | box for box in boxes]
    return dataclasses.replace(ROW, boxes=items, **fields)


def test_boxes_of_zeros_and_boxes_that_a_condition_excludes_are_none():
    real, other = {"box": (1, 2, 3, 4), "by": "a"}, {"box": (1, 2, 3, 4), "by": "b"}
    study = make_study(real, other, {"box": (0, 0, 0, 0), "by": "a"})
    (filtered,), num_zero = decisions.filter_boxes([study], {"by": ["a"]})
    assert num_zero == 1 and [box["by"] for box in filtered.boxes] == ["a"]


def test_boxes_and_regions_have_formats_of_their_own():
    study = make_study(
        {"box": (60.0, 60.0, 20.0, 20.0)},
        {"box": (50.0, 50.0, 10.0, 10.0), "box_format": "xywh"},
        regions={"left lung": (0.1, 0.1, 0.4, 0.9)},
    )
    (named,), formats, region_format = decisions.choose_box_formats(
        [study], "xywh", "normalised_xyxy"
    )
    assert formats == ["xywh"] and region_format == "normalised_xyxy"
    assert {box["box_format"] for box in named.boxes} == {"xywh"}
    study = make_study({"box": (0.5, 0.5, 0.2, 0.2), "box_format": "normalised_cxcywh"})
    assert decisions.choose_box_formats([study], "", "")[1] == ["normalised_cxcywh"]
    study = make_study(regions={"left lung": (0.1, 0.1, 0.4, 0.9)})
    with pytest.raises(UserError, match="1 of 1 regions .* set data.builder.region_format to"):
        decisions.choose_box_formats([study], "xywh", "")


def test_labels_of_rows_and_of_boxes_are_one_set_of_findings():
    studies = [
        make_study({"box": (1, 2, 3, 4), "label": "EDEMA"}, labels=Labels({"Edema": 1}, 0)),
        make_study({"box": (1, 2, 3, 4), "label": "Nodule"}, labels=Labels({"edema": 1}, 0)),
        make_study(labels=Labels({"Edema": 1, "Mass": 1}, 0)),
    ]
    matched, notes = decisions.match_findings(studies, ())
    assert [study.labels.values for study in matched][:2] == [{"Edema": 1}] * 2
    assert [box["label"] for study in matched for box in study.boxes] == ["Edema", "Nodule"]
    assert notes == ["'edema' (1) is read as 'Edema' (2)"]
    matched, notes = decisions.match_findings(studies, ("edema",))
    assert matched[2].labels == Labels({"edema": 1}, 0)
    assert notes == [
        "'Edema' (2) is read as 'edema' (1)",
        "labels that are not in findings: Mass 1",
        "labels of boxes that are not in findings: Nodule 1",
    ]


def test_two_spellings_that_contradict_each_other_in_a_row_are_refused():
    study = make_study(labels=Labels({"Edema": 1, "edema": 0}))
    with pytest.raises(UserError, match="row 1 says 1 and 0 of 'Edema', in two spellings"):
        decisions.match_findings([study], ())
    study = make_study(labels=Labels({"Edema": 1, "No Finding": 1}))
    notes = decisions.match_findings([study], ())[1]
    assert notes == ["rows that say that nothing is found and name a finding too: 1"]

"""Cells of a manifest become labels, boxes, masks, regions and phrases."""

import json

import numpy as np
import pytest

from plan_jax.data.pairs import annotations


@pytest.mark.parametrize(
    ("cell", "values", "default"),
    [
        (None, {}, -1),
        ("oedema; effusion", {"oedema": 1, "effusion": 1}, 0),
        ('["oedema"]', {"oedema": 1}, 0),
        ("[]", {}, 0),
        ('{"oedema": 0, "effusion": null, "nodule": true}', {"oedema": 0, "effusion": -1}, -1),
        ({"oedema": 1.0, "effusion": float("nan")}, {"oedema": 1, "effusion": -1}, -1),
        ({"oedema": "yes", "effusion": "Absent"}, {"oedema": 1, "effusion": 0}, -1),
        ("nan", {}, -1),
        ([("oedema", 1), ("effusion", None)], {"oedema": 1, "effusion": -1}, -1),
        ("'oedema'; \"effusion\"", {"oedema": 1, "effusion": 1}, 0),
        ('["nan"]', {}, -1),
        (["oedema", None], {"oedema": 1}, 0),
        ("oedema|effusion", {"oedema": 1, "effusion": 1}, 0),
        ("['oedema', 'effusion']", {"oedema": 1, "effusion": 1}, 0),
    ],
)
def test_labels_are_lists_or_objects(cell, values, default):
    labels = annotations.parse_labels(cell)
    assert values.items() <= labels.values.items() and labels.default == default


def test_columns_of_labels_win_over_the_cell():
    columns = {"oedema": "0", "nodule": ""}
    labels = annotations.parse_labels("oedema; effusion", columns, blank=-1)
    assert labels.values == {"oedema": 0, "effusion": 1, "nodule": -1}
    assert annotations.parse_labels(None, columns, blank=0).values == {"oedema": 0, "nodule": 0}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("{x", "property name"),
        ("[1, 2]", r"labels are not names but \[1, 2\]"),
        ("Mr Miller has an effusion. He knows.", "labels are a text of 36 characters, not names"),
        ("x" * 201, "labels are a text of 201 characters, not names"),
        ("['oedema' 'effusion']", "a list without commas, as numpy writes it"),
        ({"oedema": 10**400}, "label 'oedema' is 1000*[.]{3}, not 1, 0 or -1"),
        ({"oedema": 1, "oedema ": 0}, "label 'oedema' is there twice, with two values"),
        ({"oedema": 0.7}, "label 'oedema' is 0.7, not 1, 0 or -1"),
        ('{"oedema": 2}', "label 'oedema' is 2, not 1, 0 or -1"),
    ],
)
def test_malformed_labels_are_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        annotations.parse_labels(cell)


def test_boxes_may_have_phrases_labels_and_additional_fields():
    cell = json.dumps([{"box": [1, 2, 3, 4], "phrase": "left", "by": "a"}, [5, 6, 7, 8]])
    assert annotations.parse_boxes(cell, "whole") == [
        {"box": (1.0, 2.0, 3.0, 4.0), "phrase": "left", "label": "", "by": "a"},
        {"box": (5.0, 6.0, 7.0, 8.0), "phrase": "whole", "label": ""},
    ]
    single = [{"box": (1.0, 2.0, 3.0, 4.0), "phrase": "whole", "label": ""}]
    assert annotations.parse_boxes("[1, 2, 3, 4]", "whole") == single
    assert annotations.parse_boxes('{"box": [1, 2, 3, 4]}', "whole") == single
    assert annotations.parse_boxes(None, "whole") == []
    named = annotations.parse_boxes("{'x': 1, 'y': 2, 'width': 3, 'height': 4}", "whole")
    assert named[0]["box"] == (1.0, 2.0, 3.0, 4.0) and named[0]["box_format"] == "xywh"


@pytest.mark.parametrize(
    "cell", ["nan", "[NaN, NaN, NaN, NaN]", "[nan, nan, nan, nan]", [[None] * 4], '[{"box": null}]']
)
def test_a_healthy_image_has_no_box(cell):
    assert annotations.parse_boxes(cell, "whole") == []


@pytest.mark.parametrize("cell", ["[[1, 2, 3]]", '[{"phrase": "x"}]', '[["a", 1, 2, 3]]'])
def test_malformed_boxes_are_refused(cell):
    with pytest.raises(ValueError, match=r"box .* is not \[x0, y0, x1, y1\]"):
        annotations.parse_boxes(cell, "whole")
    with pytest.raises(ValueError, match="boxes are not a list"):
        annotations.parse_boxes("1 2 3 4", "whole")


def test_a_box_may_name_its_format_and_an_unknown_one_is_refused():
    item = {"box": [1, 2, 3, 4], "box_format": "normalised_cxcywh"}
    (box,) = annotations.parse_boxes([item], "whole")
    assert box["box_format"] == "normalised_cxcywh"
    (box,) = annotations.parse_boxes([item | {"box_format": None}], "whole")
    assert "box_format" not in box
    for value in ("yolo", ["xywh"], {}):
        with pytest.raises(ValueError, match="box_format .* of a box is unknown; use one of xyxy"):
            annotations.parse_boxes([item | {"box_format": value}], "whole")


@pytest.mark.parametrize("value", [3, "3", ["mass"], {"a": 1}])
@pytest.mark.parametrize("key", ["phrase", "label"])
def test_the_name_of_a_box_is_text(value, key):
    with pytest.raises(ValueError, match=f"the {key} of a box is .*, not its name"):
        annotations.parse_boxes([{"box": [1, 2, 3, 4], key: value}], "whole")
    (box,) = annotations.parse_boxes([{"box": [1, 2, 3, 4], key: "nan"}], "whole")
    assert (box["phrase"], box["label"]) == ("whole", "")


def test_masks_belong_to_the_only_phrase_or_to_named_phrases():
    assert annotations.parse_masks("m.png", [], "whole") == {"whole": "m.png"}
    assert annotations.parse_masks("m.png", ["a", "a"], "whole") == {"a": "m.png"}
    cell = '{"a": "m.png", "b": ""}'
    assert annotations.parse_masks(cell, ["a", "b"], "whole") == {"a": "m.png"}
    with pytest.raises(ValueError, match="mask is neither one path for one phrase nor"):
        annotations.parse_masks("m.png", ["a", "b"], "whole")


def test_regions_of_named_sizes_become_corners_unless_the_user_names_a_format():
    box = {"x": 10, "y": 10, "width": 50, "height": 40}
    cell = json.dumps({"left lung": box, "heart": [1, 2, 3, 4]})
    corners = {"left lung": (10, 10, 60, 50), "heart": (1, 2, 3, 4)}
    assert annotations.parse_regions(cell) == corners
    named = {"heart": {"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}}
    assert annotations.parse_regions(named) == {"heart": (1, 2, 3, 4)}
    unchanged = {"left lung": (10, 10, 50, 40)}
    assert annotations.parse_regions({"left lung": box}, "xywh") == unchanged


def test_malformed_regions_are_refused():
    assert annotations.parse_regions(None) == {}
    assert annotations.parse_regions({"Left_Lung": [1, 2, 3, 4]}) == {"left lung": (1, 2, 3, 4)}
    with pytest.raises(ValueError, match="regions have one name twice"):
        annotations.parse_regions({"Left_Lung": [1, 2, 3, 4], "left lung": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="regions are not {region: "):
        annotations.parse_regions("[[1, 2, 3, 4]]")


def test_boxes_are_scaled_and_cut_at_the_border():
    assert annotations.scale_box((4.0, 10.0, 50.0, 20.0), (30, 40), (60, 80)) == (
        8.0,
        20.0,
        80.0,
        40.0,
    )
    with pytest.raises(ValueError, match=r"box \(50, 2, 60, 4\) lies outside of its 40 x 30"):
        annotations.scale_box((50.0, 2.0, 60.0, 4.0), (30, 40), (60, 80))


def test_boxes_of_one_text_and_several_labels_have_their_labels_as_phrases():
    text = "Edema, and an effusion."
    cell = [
        {"box": [1, 2, 30, 29], "label": "Edema"},
        {"box": [20, 10, 39, 20], "label": "Effusion"},
        {"box": [5, 5, 9, 9]},
    ]
    boxes, shape = annotations.parse_boxes(cell, text), (30, 40)
    phrases = annotations.build_phrases(boxes, {}, ("Edema", "Effusion"), shape, shape)
    assert [(phrase.text, phrase.finding, phrase.boxes) for phrase in phrases] == [
        ("Edema", 0, ((1, 2, 30, 29),)),
        ("Effusion", 1, ((20, 10, 39, 20),)),
        (text, -1, ((5, 5, 9, 9),)),
    ]
    (phrase,) = annotations.build_phrases(boxes[:1], {}, ("Edema",), shape, shape)
    assert (phrase.text, phrase.bare) == (text, "Edema")


def test_boxes_and_masks_are_grouped_by_phrase():
    boxes = [
        {"box": (4.0, 10.0, 12.0, 20.0), "phrase": "Left  effusion", "label": "effusion"},
        {"box": (20.0, 0.0, 40.0, 15.0), "phrase": "Left  effusion", "label": "effusion"},
        {"box": (0.0, 0.0, 4.0, 4.0), "phrase": "mass", "label": ""},
    ]
    mask = np.ones((60, 80), bool)
    phrases = annotations.build_phrases(
        boxes, {"mass": mask, "x": mask}, ("mass", "effusion"), (30, 40), (60, 80)
    )
    effusion, mass, unnamed = phrases
    assert (effusion.text, effusion.key) == ("Left  effusion", "left effusion")
    assert (effusion.bare, effusion.finding, effusion.mask) == ("effusion", 1, None)
    assert effusion.boxes == ((8.0, 20.0, 24.0, 40.0), (40.0, 0.0, 80.0, 30.0))
    assert (mass.bare, mass.finding, len(mass.boxes)) == ("mass", 0, 1)
    assert mass.mask is mask and unnamed.mask is mask
    assert (unnamed.bare, unnamed.finding, unnamed.boxes) == ("", -1, ())

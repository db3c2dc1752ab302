"""Boxes: the format of a whole column, and what its numbers cannot mean."""

import pytest

from plan_jax.data.pairs import boxes
from plan_jax.types import UserError

NORMALISED = [(0.1, 0.2, 0.4, 0.5)] * 10
SIZES = [(60.0, 60.0, 20.0, 20.0)] * 10
CORNERS = [(10.0, 10.0, 40.0, 40.0)] * 10


def test_boxes_in_fractions_are_refused_until_their_format_is_named():
    message = (
        "10 of 10 boxes lie between 0 and 1, .* data.builder.box_format to normalised_xyxy, no"
    )
    for option, stated in (("", ""), ("xywh", ""), ("xyxy", ""), ("", "xywh")):
        with pytest.raises(UserError, match=message):
            boxes.choose_format(NORMALISED, "boxes", option, stated)
    assert boxes.choose_format(NORMALISED, "boxes", "normalised_xywh") == "normalised_xywh"
    with pytest.raises(UserError, match="boxes reach to 60, so they are in pixels and not normali"):
        boxes.choose_format(SIZES, "boxes", "normalised_xyxy")


def test_sizes_in_place_of_corners_are_refused_until_their_format_is_named():
    message = (
        r"10 of 10 boxes have x1 left of x0 .*, as \(60, 60, 20, 20\); if they are x, y, width"
    )
    for option in ("", "xyxy"):
        with pytest.raises(UserError, match=message):
            boxes.choose_format(SIZES, "boxes", option)
    assert boxes.choose_format(SIZES, "boxes", "xywh") == "xywh"
    assert boxes.choose_format(SIZES, "boxes", stated="xywh") == "xywh"
    with pytest.raises(UserError, match="have no width or height above 0, .*box_format to xyxy"):
        boxes.choose_format([(5.0, 5.0, 0.0, -3.0)], "boxes", "xywh")


def test_the_format_that_the_user_names_wins_over_the_names_of_coordinates():
    for option in ("normalised_cxcywh", "normalised_xyxy"):
        assert boxes.choose_format(NORMALISED, "boxes", option, "xywh") == option
    assert boxes.choose_format(CORNERS, "boxes", "xyxy", stated="xywh") == "xyxy"
    assert boxes.choose_format(SIZES, "boxes", "xywh", stated="xyxy") == "xywh"


def test_a_single_mistake_does_not_decide_on_the_column():
    assert boxes.choose_format([*CORNERS, SIZES[0]], "boxes") == "xyxy"
    assert boxes.choose_format([*CORNERS, NORMALISED[0]], "boxes") == "xyxy"
    fractions = [*NORMALISED, SIZES[0]]
    assert boxes.choose_format(fractions, "boxes", "normalised_xywh") == "normalised_xywh"
    assert boxes.choose_format([], "boxes") == "xyxy"


@pytest.mark.parametrize(
    ("box", "box_format", "corners"),
    [
        ((1.0, 2.0, 3.0, 4.0), "xyxy", (1, 2, 3, 4)),
        ((1.0, 2.0, 3.0, 4.0), "xywh", (1, 2, 4, 6)),
        ((0.25, 0.5, 0.75, 1.0), "normalised_xyxy", (10, 10, 30, 20)),
        ((0.25, 0.5, 0.5, 0.5), "normalised_xywh", (10, 10, 30, 20)),
        ((0.5, 0.75, 0.5, 0.5), "normalised_cxcywh", (10, 10, 30, 20)),
    ],
)
def test_every_format_becomes_corners_in_pixels(box, box_format, corners):
    assert boxes.to_corners(box, box_format, (20, 40)) == corners


def test_an_unknown_format_is_named():
    with pytest.raises(UserError, match="box_format 'coco' is unknown; use one of xyxy, xywh, nor"):
        boxes.check_format("box_format", "coco")
    with pytest.raises(
        UserError, match="10 of 10 regions lie .*data.builder.region_format to norm"
    ):
        boxes.choose_format(NORMALISED, "regions")


@pytest.mark.parametrize(
    ("names", "box_format"),
    [
        (("x", "y", "width", "height"), "xywh"),
        (("x_min", "y_min", "x_max", "y_max"), "xyxy"),
        (("Bbox [x", "y", "w", "h]"), "xywh"),
        (("xmin", "ymin", "width", "height"), "xywh"),
        (("x1", "y1", "x2", "y2"), "xyxy"),
    ],
)
def test_usual_names_of_coordinates_state_the_format(names, box_format):
    assert boxes.match_coordinates(["id", *names, "Target"]) == (names, box_format)
    assert boxes.match_coordinates(names[1:]) is None


@pytest.mark.parametrize("value", [None, float("nan"), "nan", ""])
def test_a_box_of_missing_numbers_is_none(value):
    assert boxes.parse_box({"box": [value] * 4}) == (None, "")
    assert boxes.parse_box({"box": value}) == (None, "")
    assert boxes.parse_box(dict.fromkeys(("x", "y", "w", "h"), value)) == (None, "")
    with pytest.raises(ValueError, match="is not .* of numbers"):
        boxes.parse_box({"box": [1, 2, 3, value]})


@pytest.mark.parametrize("number", [10**400, "1e999", True, "x"])
def test_a_box_of_no_finite_numbers_is_refused_in_a_few_words(number):
    with pytest.raises(ValueError, match="of numbers") as raised:
        boxes.parse_box({"box": [1, 2, number, 4]})
    assert len(str(raised.value)) < 120


def test_a_box_that_ends_left_of_its_start_asks_for_its_format():
    with pytest.raises(ValueError, match=r"box \(60, 60, 20, 20\) has x1 left of x0 .* width, hei"):
        boxes.scale_box(SIZES[0], (96, 96), (48, 48))

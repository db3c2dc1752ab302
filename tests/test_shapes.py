"""Masks of public datasets against loops over their pixels."""

import numpy as np
import pytest

from plan_jax.data.public import shapes
from plan_jax.data.public.items import Shape


def draw(kind, content, frame, rows=None, columns=None, size=None):
    part = Shape(kind, content, size=size)
    return shapes.draw_mask([part], frame, rows or frame[0], columns or frame[1])


def decode_relative_by_loop(text, rows, columns):
    """Returns the mask of SIIM's text by its definition, one pixel at a time."""
    flat, position = [False] * (rows * columns), 0
    numbers = [int(number) for number in text.split()]
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        position += gap
        for pixel in range(position, position + length):
            flat[pixel] = True
        position += length
    return np.asarray(flat).reshape(columns, rows).T


def write_coco(mask):
    """Returns the text of a mask as COCO writes it."""
    flat, counts, value = mask.T.ravel(), [], False
    while len(flat):
        change = np.flatnonzero(flat != value)
        counts.append(int(change[0]) if len(change) else len(flat))
        flat, value = flat[counts[-1] :], not value
    text = ""
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        while True:
            digit, number = number & 31, number >> 5
            is_last = number == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if is_last else 32))
            if is_last:
                break
    return text


def is_inside_by_loop(x, y, points):
    """Returns whether a point is in a polygon, by the edges that a ray to its left crosses."""
    is_inside = False
    for index, (x1, y1) in enumerate(points):
        x0, y0 = points[index - 1]
        is_crossed = (y0 <= y) != (y1 <= y)
        if is_crossed and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
            is_inside = not is_inside
    return is_inside


@pytest.mark.parametrize("text", ["0 3 1 2", "5 1", "2 3 0 4 9 12", "34 1", " 3 2 "])
def test_relative_runs_are_counted_from_the_end_of_the_last_one(text):
    runs = shapes.parse_relative_runs(text, (7, 5))
    expected = decode_relative_by_loop(text, 7, 5)
    np.testing.assert_array_equal(draw("runs", runs, (7, 5)), expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 2 3", "pairs"),
        ("", "pairs"),
        ("1 x", "whole numbers"),
        ("1.5 2", "whole numbers"),
        ("-1 2", "negative"),
        ("30 6", "leave the mask of 7 x 5"),
        ("0 1 34 1", "leave the mask"),
    ],
)
def test_a_damaged_text_of_relative_runs_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        shapes.parse_relative_runs(text, (7, 5))


def test_runs_of_coco_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 40)) < 0.3, np.zeros((9, 40), bool), np.ones((9, 40), bool)]
    masks.append(np.indices((9, 40))[1] > 20)  # counts of more than 5 bits
    masks.append(np.indices((9, 40)).sum(0) % 2 == 0)  # begins with a pixel of the mask
    for mask in masks:
        runs = shapes.parse_coco_runs(write_coco(mask), mask.shape)
        np.testing.assert_array_equal(draw("runs", runs, mask.shape), mask)


def test_the_text_of_coco_is_that_of_its_own_documentation():
    # Counts 6, 1, 40, 4, 5, 4, 5, 4, 21 are written with differences from the fourth on.
    mask = np.repeat([0, 1, 0, 1, 0, 1, 0, 1, 0], [6, 1, 40, 4, 5, 4, 5, 4, 21]).astype(bool)
    text = write_coco(mask.reshape(9, 10).T)
    assert text == "61X13mN000`0"
    runs = shapes.parse_coco_runs(text, (10, 9))
    assert runs == [[6, 1], [47, 4], [56, 4], [65, 4]]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [("61X1", "10 x 9"), ("61X", "within"), ("6 1", "character"), ([91, -1], "negative")],
)
def test_damaged_runs_of_coco_are_refused(counts, reason):
    with pytest.raises(ValueError, match=reason):
        shapes.parse_coco_runs(counts, (10, 9))


@pytest.mark.parametrize(
    "points",
    [
        [[1, 1], [9, 2], [4, 8]],
        [[0, 0], [10, 0], [10, 8], [0, 8]],
        [[2.5, 1.5], [7.5, 1.5], [7.5, 6.5], [5, 3], [2.5, 6.5]],  # not convex
        [[-5, 2], [4, -3], [20, 4], [3, 30]],  # leaves the image
        [[1, 1], [8, 7], [8, 1], [1, 7]],  # crosses itself
    ],
)
def test_a_polygon_has_the_pixels_whose_middle_is_inside(points):
    mask = draw("polygons", [points], (8, 10))
    expected = [[is_inside_by_loop(x + 0.5, y + 0.5, points) for x in range(10)] for y in range(8)]
    np.testing.assert_array_equal(mask, expected)


def test_polygons_are_united():
    left, right = [[0, 0], [4, 0], [4, 4], [0, 4]], [[2, 0], [6, 0], [6, 4], [2, 4]]
    assert draw("polygons", [left, right], (4, 8)).sum() == 24
    parts = [Shape("polygons", [left]), Shape("rectangle", [2, 0, 6, 4])]
    assert shapes.draw_mask(parts, (4, 8), 4, 8).sum() == 24


@pytest.mark.parametrize("corners", [[1, 2, 9, 7], [-4, -3, 5.5, 20], [3, 3, 3, 8], [0, 0, 10, 8]])
def test_ellipses_and_rectangles_fill_their_box(corners):
    x0, y0, x1, y1 = corners
    ellipse, rectangle = np.zeros((8, 10), bool), np.zeros((8, 10), bool)
    for row in range(8):
        for column in range(10):
            x, y = column + 0.5, row + 0.5
            rectangle[row, column] = x0 <= x < x1 and y0 <= y < y1
            if x1 > x0:
                distance = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2
                distance += ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2
                ellipse[row, column] = distance <= 0.25
    np.testing.assert_array_equal(draw("ellipse", corners, (8, 10)), ellipse)
    np.testing.assert_array_equal(draw("rectangle", corners, (8, 10)), rectangle)


def test_a_mask_is_resized_by_area():
    rng = np.random.default_rng(1)
    mask = rng.random((7, 10)) < 0.5
    enlarged = mask.repeat(4 * 5, 0).repeat(3 * 5, 1)  # 140 x 150 cells: 35 x 50 of each new pixel
    covered = enlarged.reshape(4, 35, 3, 50).mean((1, 3))
    np.testing.assert_array_equal(shapes.resize_by_area(mask, 4, 3), covered >= 0.5)


def test_a_pixel_of_which_just_half_is_covered_belongs_to_the_mask():
    assert draw("rectangle", [0, 0, 5, 10], (10, 10), 1, 1).tolist() == [[True]]
    assert draw("rectangle", [0, 0, 4, 10], (10, 10), 1, 1).tolist() == [[False]]
    # Nine thirds of a third, in an order of sums that may fall below a half.
    assert draw("rectangle", [0, 0, 3, 9], (9, 6), 3, 1).tolist() == [[True]] * 3


def test_a_shape_with_a_frame_of_its_own_covers_the_whole_image():
    # A mask of 4 x 4 for an image of 8 x 16.
    mask = draw("rectangle", [0, 0, 2, 4], (8, 16), 8, 16, size=(4, 4))
    np.testing.assert_array_equal(mask, np.indices((8, 16))[1] < 8)


def test_no_shapes_are_an_empty_mask():
    assert shapes.draw_mask([], (8, 16), 2, 4).tolist() == [[False] * 4] * 2

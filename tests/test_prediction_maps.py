"""Maps in pixels of the original image, against loops, and the boxes of their areas."""

import numpy as np
import pytest

from plan_jax.data import transforms
from plan_jax.prediction import maps


def literal_value(heat_map, y, x, shape, size, stored_shape=None):
    """Returns the value at the centre of pixel (y, x) of an image, by the definition."""
    stored_shape = stored_shape or shape
    longer = max(stored_shape)
    rows, columns = (max(1, round(length * size / longer)) for length in stored_shape)
    top, left = (size - rows) // 2, (size - columns) // 2
    # In pixels of the square, then in cells, whose centres lie at whole numbers plus a half.
    v = ((y + 0.5) * rows / shape[0] + top) * heat_map.shape[0] / size - 0.5
    u = ((x + 0.5) * columns / shape[1] + left) * heat_map.shape[1] / size - 0.5
    v, u = (min(max(c, 0), n - 1) for c, n in zip((v, u), heat_map.shape, strict=True))
    value = 0.0
    for row in range(heat_map.shape[0]):
        for column in range(heat_map.shape[1]):
            weight = max(0, 1 - abs(row - v)) * max(0, 1 - abs(column - u))
            value += weight * heat_map[row, column]
    return value


@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [((7, 5), 8, (4, 4)), ((5, 13), 9, (3, 3)), ((33, 31), 16, (2, 5)), ((1, 9), 8, (4, 4))],
)
def test_a_map_is_enlarged_as_its_definition_says(shape, size, grid):
    heat_map = np.random.default_rng(0).normal(size=grid).astype(np.float32)
    enlarged = maps.enlarge_map(heat_map, shape, size)
    expected = [
        [literal_value(heat_map, y, x, shape, size) for x in range(shape[1])]
        for y in range(shape[0])
    ]
    np.testing.assert_allclose(enlarged, expected, atol=1e-5)


def test_a_map_of_an_image_that_was_resized_before():
    """Rounding twice and rounding once differ for this image by a column of the square."""
    shape, stored_shape, size = (101, 54), (19, 10), 16
    assert transforms.scale_shape(shape, 19) == stored_shape
    assert transforms.content_area(shape, size) != transforms.content_area(stored_shape, size)
    heat_map = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    enlarged = maps.enlarge_map(heat_map, shape, size, stored_shape)
    for y, x in ((0, 0), (50, 20), (100, 50), (7, 33)):
        expected = literal_value(heat_map, y, x, shape, size, stored_shape)
        assert enlarged[y, x] == pytest.approx(expected, abs=1e-5)


def test_a_map_lies_over_its_image():
    """What the model sees in a cell is found again where it is in the original image."""
    image = np.zeros((301, 203, 1), np.uint8)
    image[200:231, 150:183] = 255
    square = transforms.fit_image(image, 64)[..., 0].astype(np.float32)
    heat = maps.enlarge_map(square, image.shape[:2], 64)
    _, boxes, _ = maps.find_boxes(heat > 127, heat)
    assert len(boxes) == 1
    np.testing.assert_allclose(boxes[0], [150, 200, 183, 231], atol=301 / 64 / 2 + 1)


def literal_areas(mask):
    """Returns the sets of pixels that are connected by their sides."""
    rest, areas = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while rest:
        area, border = set(), [min(rest)]
        while border:
            y, x = border.pop()
            if (y, x) in rest:
                rest.remove((y, x))
                area.add((y, x))
                border += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        areas.append(area)
    return areas


@pytest.mark.parametrize("min_area", [0.0, 0.02])
def test_boxes_are_those_of_connected_areas(min_area):
    random = np.random.default_rng(1)
    mask, heat = random.random((15, 17)) < 0.35, random.random((15, 17)).astype(np.float32)
    areas = [area for area in literal_areas(mask) if len(area) >= min_area * mask.size]
    expected = {
        (
            min(x for _, x in area),
            min(y for y, _ in area),
            max(x for _, x in area) + 1,
            max(y for y, _ in area) + 1,
            float(max(heat[pixel] for pixel in area)),
        )
        for area in areas
    }
    kept, boxes, scores = maps.find_boxes(mask, heat, min_area)
    assert {(*box, score) for box, score in zip(boxes.tolist(), scores.tolist())} == expected  # noqa: B905
    assert {tuple(pixel) for pixel in np.argwhere(kept).tolist()} == set().union(*areas)
    assert (np.diff(scores) <= 0).all()


def test_an_empty_mask_has_no_boxes():
    kept, boxes, scores = maps.find_boxes(np.zeros((3, 4), bool), np.ones((3, 4)))
    assert not kept.any() and boxes.shape == (0, 4) and scores.shape == (0,)


def test_the_map_of_a_text_is_the_weighted_mean_of_its_words():
    random = np.random.default_rng(2)
    words, weights = random.random((2, 3, 4)), np.array([[1.0, 0.5, 0], [0, 0, 0]])
    expected = (words[0, 0] + 0.5 * words[0, 1]) / 1.5
    np.testing.assert_allclose(maps.combine_words(words, weights), [expected, np.zeros(4)])

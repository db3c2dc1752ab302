"""Images, boxes and masks are transformed together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data import transforms
from plan_jax.types import Phrase, Record


def make_ramp(rows, columns):
    ramp = np.add.outer(np.arange(rows) * 3, np.arange(columns)) % 256
    return ramp.astype(np.uint8)[..., None]


def make_rectangle(rows, columns, box):
    image = np.zeros((rows, columns, 1), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def bounding_box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_square_image_of_the_size_is_returned_unchanged():
    image = make_ramp(16, 16)
    assert transforms.fit_image(image, 16) is image


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 17]))
def test_a_fitted_image_is_square_and_keeps_its_brightness(rows, columns, size):
    square = transforms.fit_image(np.full((rows, columns, 1), 200, np.uint8), size)
    content_rows, content_columns = transforms.scale_shape((rows, columns), size)
    assert square.shape == (size, size, 1)
    assert max(content_rows, content_columns) == size
    assert (square > 0).sum() == content_rows * content_columns
    assert set(np.unique(square)) <= {0, 200}


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(40, 20, 80), (60, 90, 30), (32, 32, 64), (31, 57, 24)]
)
def test_boxes_and_masks_are_fitted_as_the_image_is(rows, columns, size):
    box = (columns // 4, rows // 3, columns // 2, 2 * rows // 3)
    image = make_rectangle(rows, columns, box)
    square = transforms.fit_image(image, size)
    boxes = transforms.fit_boxes(np.asarray([box], np.float32), (rows, columns), size)
    mask = transforms.fit_mask(image[..., 0] > 0, size)
    np.testing.assert_allclose(bounding_box(square[..., 0] >= 128), boxes[0], atol=1)
    np.testing.assert_array_equal(mask, square[..., 0] >= 128)


def test_a_record_is_fitted_as_a_whole():
    mask = np.zeros((20, 40), bool)
    mask[4:10, 8:20] = True
    phrase = Phrase("x", boxes=((8.0, 4.0, 20.0, 10.0),), mask=mask)
    record = Record(make_ramp(20, 40), "x", phrases=(phrase, Phrase("y")), anatomy={"lung": mask})
    square = transforms.fit_record(record, 80)
    assert square.image.shape == (80, 80, 1)
    assert square.phrases[0].boxes == ((16.0, 28.0, 40.0, 40.0),)
    assert bounding_box(square.phrases[0].mask) == [16, 28, 40, 40]
    assert bounding_box(square.anatomy["lung"]) == [16, 28, 40, 40]
    assert square.phrases[1] == Phrase("y")
    assert transforms.fit_record(square, 80) is square


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_shifted_boxes_follow_the_image(down, right):
    box = (8, 9, 15, 12)
    image = transforms.shift_image(make_rectangle(24, 24, box), down, right)
    boxes = transforms.shift_boxes(np.asarray([box], np.float32), down, right, 24)
    assert bounding_box(image[..., 0] > 0) == boxes[0].tolist()


def test_edges_are_repeated_and_nothing_is_mirrored():
    image = make_ramp(12, 12)
    shifted = transforms.shift_image(image, 2, -3)
    np.testing.assert_array_equal(shifted[2:, :-3], image[:-2, 3:])
    np.testing.assert_array_equal(shifted[0, :-3], image[0, 3:])
    np.testing.assert_array_equal(shifted[2:, -1], image[:-2, -1])


def test_a_shift_follows_the_generator_and_its_bound():
    image = make_rectangle(24, 24, (10, 10, 12, 12))
    corners = set()
    for seed in range(60):
        down, right = transforms.draw_shift(np.random.default_rng(seed), 2)
        assert (down, right) == transforms.draw_shift(np.random.default_rng(seed), 2)
        shifted = transforms.shift_image(image, down, right)
        left, top, *_ = bounding_box(shifted[..., 0] > 0)
        assert (left, top) == (10 + right, 10 + down)
        corners.add((left, top))
    assert len(corners) > 15
    assert all(abs(coordinate - 10) <= 2 for corner in corners for coordinate in corner)
    assert transforms.draw_shift(np.random.default_rng(0), 0) == (0, 0)

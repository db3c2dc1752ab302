"""Images, boxes and masks move together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data import transforms
from plan_jax.types import Phrase, Record


def ramp(y, x):
    return (np.add.outer(np.arange(y) * 3, np.arange(x)) % 256).astype(np.uint8)[..., None]


def blob(y, x, box):
    image = np.zeros((y, x, 1), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def bounds(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_square_image_of_the_size_is_left_alone():
    image = ramp(16, 16)
    assert transforms.fit(image, 16) is image


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 17]))
def test_a_fitted_image_is_square_and_keeps_its_brightness(y, x, size):
    out = transforms.fit(np.full((y, x, 1), 200, np.uint8), size)
    rows, columns = transforms.longest_side((y, x), size)
    assert out.shape == (size, size, 1)
    assert max(rows, columns) == size
    assert (out > 0).sum() == rows * columns
    assert set(np.unique(out)) <= {0, 200}


@pytest.mark.parametrize(
    ("y", "x", "size"), [(40, 20, 80), (60, 90, 30), (32, 32, 64), (31, 57, 24)]
)
def test_boxes_and_masks_are_fitted_as_the_image_is(y, x, size):
    box = (x // 4, y // 3, x // 2, 2 * y // 3)
    image = blob(y, x, box)
    fitted = transforms.fit(image, size)
    moved = transforms.fit_boxes(np.asarray([box], np.float32), (y, x), size)[0]
    mask = transforms.fit_mask(image[..., 0] > 0, size)
    np.testing.assert_allclose(bounds(fitted[..., 0] >= 128), moved, atol=1)
    np.testing.assert_array_equal(mask, fitted[..., 0] >= 128)


def test_a_record_is_fitted_as_a_whole():
    mask = np.zeros((20, 40), bool)
    mask[4:10, 8:20] = True
    phrase = Phrase("x", boxes=((8.0, 4.0, 20.0, 10.0),), mask=mask)
    record = Record(ramp(20, 40), "x", phrases=(phrase, Phrase("y")), anatomy={"lung": mask})
    out = transforms.fit_record(record, 80)
    assert out.image.shape == (80, 80, 1)
    assert out.phrases[0].boxes == ((16.0, 28.0, 40.0, 40.0),)
    assert bounds(out.phrases[0].mask) == [16, 28, 40, 40]
    assert bounds(out.anatomy["lung"]) == [16, 28, 40, 40]
    assert out.phrases[1] == Phrase("y")
    assert transforms.fit_record(out, 80) is out


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_moved_boxes_follow_the_image(down, right):
    box = (8, 9, 15, 12)
    moved = transforms.move(blob(24, 24, box), down, right)
    expected = transforms.move_boxes(np.asarray([box], np.float32), down, right, 24)[0]
    assert bounds(moved[..., 0] > 0) == expected.tolist()


def test_edges_are_repeated_and_nothing_is_mirrored():
    image = ramp(12, 12)
    out = transforms.move(image, 2, -3)
    np.testing.assert_array_equal(out[2:, :-3], image[:-2, 3:])
    np.testing.assert_array_equal(out[0, :-3], image[0, 3:])
    np.testing.assert_array_equal(out[2:, -1], image[:-2, -1])


def test_what_an_image_is_moved_by_follows_the_generator_and_its_bound():
    image = blob(24, 24, (10, 10, 12, 12))
    seen = set()
    for seed in range(60):
        down, right = transforms.draw(np.random.default_rng(seed), 2)
        assert (down, right) == transforms.draw(np.random.default_rng(seed), 2)
        left, top, *_ = bounds(transforms.move(image, down, right)[..., 0] > 0)
        assert (left, top) == (10 + right, 10 + down)
        seen.add((left, top))
    assert len(seen) > 15
    assert all(abs(a - 10) <= 2 for corner in seen for a in corner)
    assert transforms.draw(np.random.default_rng(0), 0) == (0, 0)

"""Grey values of any depth become 8 bits, on a scale that two films share."""

import numpy as np
import pytest
from radiographs import draw_picture

from plan_jax.data import grey


def test_two_films_of_one_detector_are_comparable():
    bright = (draw_picture() * 4095).astype(np.uint16)
    dim = (draw_picture() * 2100).astype(np.uint16)
    ratio = grey.scale_to_uint8(dim).mean() / grey.scale_to_uint8(bright).mean()
    assert ratio == pytest.approx(2100 / 4095, abs=0.01)


@pytest.mark.parametrize(("white", "marker"), [(255, 1023), (1023, 4095), (4095, 65535)])
@pytest.mark.parametrize("num_pixels", [1, 40, 70])
def test_a_burnt_in_marker_does_not_decide_the_depth(white, marker, num_pixels):
    film = np.round(draw_picture() * white).astype(np.uint16)
    marked = film.copy()
    marked.reshape(-1)[-num_pixels:] = marker
    expected = grey.scale_to_uint8(film, white.bit_length())
    expected.reshape(-1)[-num_pixels:] = 255
    np.testing.assert_array_equal(grey.scale_to_uint8(marked), expected)


def test_a_white_frame_does_not_decide_the_depth():
    film = np.round(draw_picture() * 4095).astype(np.uint16)
    framed = np.pad(film, 6, constant_values=65535)
    assert (framed == 65535).mean() > 0.3
    np.testing.assert_array_equal(
        grey.scale_to_uint8(framed)[6:-6, 6:-6], grey.scale_to_uint8(film)
    )


@pytest.mark.parametrize(
    ("film", "outlier"),
    [
        (np.round(draw_picture() * 4095).astype(np.uint16), 4096),
        ((draw_picture() * 255).astype(np.float32), 256.5),
        ((draw_picture() * 255).astype(np.float32), -1.5),
        ((draw_picture() * 65535).astype(np.float32), 65540),
    ],
)
def test_a_pixel_just_beyond_the_depth_does_not_decide_it(film, outlier):
    resampled = film.copy()
    resampled[0, 0] = outlier
    expected = grey.scale_to_uint8(film)
    expected[0, 0] = 255 if outlier > 0 else 0
    np.testing.assert_array_equal(grey.scale_to_uint8(resampled), expected)


def test_a_small_bright_object_is_not_a_marker():
    black = np.zeros((40, 40), np.uint16)
    black[3:8, 4:9] = 40000
    assert grey.scale_to_uint8(black).max() == round(40000 / 65535 * 255)
    film = np.round(draw_picture() * 65535).astype(np.uint16)
    assert grey.find_bit_depth(film) == 16
    assert grey.find_bit_depth(np.round(draw_picture() * 1100).astype(np.uint16)) == 12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_real_pixels_from_0_to_1_keep_their_levels(dtype):
    picture = draw_picture().astype(dtype)
    pixels = grey.scale_to_uint8(picture)
    np.testing.assert_allclose(pixels, picture * 255, atol=0.51)
    assert len(np.unique(pixels)) > 100
    overshoot = grey.scale_to_uint8(picture * 1.1 - 0.04)
    assert overshoot.max() == 255 and len(np.unique(overshoot)) > 100


def test_real_pixels_from_0_to_255_are_8_bits():
    picture = draw_picture() * 255
    np.testing.assert_array_equal(grey.scale_to_uint8(picture), np.round(picture))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.asarray([[-5, 9]], np.int32), "has pixels from -5 to 9, not 0 to 65535; shift or"),
        (np.asarray([[0, 2**17]], np.int32), "has pixels from 0 to 131072, not 0 to 65535"),
        (np.asarray([[-2.1, 3.3]], np.float32), "has pixels from -2.1 to 3.3, not 0 to 65535"),
        (np.asarray([[0, 2.5]], np.float32), "has real pixels from 0 to 2.5, neither 0 to 1 nor"),
        (np.asarray([[0, np.nan]], np.float32), "has pixels that are NaN or infinite"),
        (np.asarray([[0, np.inf]], np.float32), "has pixels that are NaN or infinite"),
    ],
)
def test_pixels_whose_scale_is_unknown_are_refused(pixels, message):
    with pytest.raises(grey.ImageError, match=message):
        grey.scale_to_uint8(pixels)

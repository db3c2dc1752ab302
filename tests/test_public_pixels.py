"""Readers of formats that only one dataset has."""

import numpy as np
import pytest

from plan_jax.data.public.pixels import READERS


def test_a_film_of_jsrt_is_big_endian_and_dark_where_numbers_are_high(tmp_path):
    density = np.full((2048, 2048), 4095, np.uint16)
    density[:1024, :1024] = 0  # bright
    density[:1024, 1024:] = 1024
    density[1024:, :1024] = 5000  # beyond 12 bits: black
    path = tmp_path / "JPCLN001.IMG"
    path.write_bytes(density.astype(">u2").tobytes())
    pixels, shape = READERS["jsrt"](path, 8)
    assert shape == (2048, 2048) and pixels.shape == (8, 8) and pixels.dtype == np.uint8
    assert pixels[1, 1] == 255 and pixels[6, 1] == pixels[6, 6] == 0
    assert pixels[1, 6] == round(255 - 255 * 1024 / 4095)


def test_a_film_of_jsrt_is_reduced_by_area(tmp_path):
    density = np.full((2048, 2048), 4095, np.uint16)
    density[:, 800:] = 0  # an edge within the fourth of eight columns
    path = tmp_path / "JPCLN001.IMG"
    path.write_bytes(density.astype(">u2").tobytes())
    pixels, _ = READERS["jsrt"](path, 8)
    assert pixels[0].tolist() == [0, 0, 0, round(255 * 224 / 256), 255, 255, 255, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is an empty file"), (b"12", "has 2 bytes, not the 8,388,608 of a film of JSRT")],
)
def test_another_length_is_named(tmp_path, content, message):
    path = tmp_path / "JPCLN001.IMG"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        READERS["jsrt"](path, 8)

"""Real radiographs of the package pydicom-data look as pydicom's own pipeline shows them."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from plan_jax.data import images

# Films of a chest and of a hand in four codings: MONOCHROME1, 15 and 10 bits, with a window. The
# last file has a table of grey values (VOI LUT sequence) with 16 bits instead.
FILMS = tuple(
    f"RG{number}_{kind}" for number in (1, 3) for kind in ("UNCI", "UNCR", "J2KI", "J2KR")
)


@pytest.mark.parametrize("name", [*FILMS, "vlut_04"])
def test_grey_is_that_of_pydicom(name):
    path = Path(get_testdata_file(f"{name}.dcm"))
    film = dcmread(path)
    values = apply_voi_lut(apply_modality_lut(film.pixel_array, film), film).astype(np.float64)
    depth = 16 if "VOILUTSequence" in film else film.BitsStored
    expected = values / (2**depth - 1) * 255
    if film.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    pixels, shape = images.read_image(path, max(film.Rows, film.Columns))
    assert shape == (film.Rows, film.Columns) == pixels.shape
    # Half a grey level is the rounding to 8 bits.
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9

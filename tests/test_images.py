"""Radiographs of every kind become 8-bit grey."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from plan_jax.data import images


def test_depths_colours_and_alpha_become_grey(tmp_path):
    ramp = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "12_bits.png")
    pixels, shape = images.read_image(tmp_path / "12_bits.png", 8)
    assert shape == (8, 8)
    np.testing.assert_allclose(pixels, ramp / 4095 * 255, atol=0.5)
    Image.fromarray((ramp * 16).astype(np.uint16)).save(tmp_path / "16_bits.png")
    np.testing.assert_allclose(images.read_image(tmp_path / "16_bits.png", 8)[0], pixels, atol=1)

    colour = np.zeros((8, 8, 4), np.uint8)
    colour[..., :3], colour[:4, :, 3] = 200, 255
    Image.fromarray(colour).save(tmp_path / "alpha.png")
    expected = np.repeat([200, 0], 4)[:, None] * np.ones((1, 8))
    np.testing.assert_array_equal(images.read_image(tmp_path / "alpha.png", 8)[0], expected)
    Image.fromarray(colour[..., :3]).save(tmp_path / "colour.jpg")
    assert np.ptp(images.read_image(tmp_path / "colour.jpg", 8)[0]) <= 2


def test_a_large_jpeg_keeps_its_shape_for_boxes(tmp_path):
    Image.fromarray(np.full((800, 600), 90, np.uint8)).save(tmp_path / "large.jpg")
    pixels, shape = images.read_image(tmp_path / "large.jpg", 48)
    assert shape == (800, 600) and pixels.shape == (48, 36)
    assert abs(pixels.astype(int) - 90).max() <= 1


@pytest.mark.skipif(find_spec("pydicom") is None, reason="the extra `dicom` is not installed")
def test_dicom_is_windowed_and_inverted(tmp_path):
    import pydicom

    stored = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
    dicom = pydicom.Dataset()
    dicom.file_meta = pydicom.dataset.FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dicom.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dicom.SOPInstanceUID = pydicom.uid.generate_uid()
    dicom.Rows = dicom.Columns = 8
    dicom.SamplesPerPixel, dicom.PixelRepresentation = 1, 0
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit = 16, 12, 11
    dicom.PhotometricInterpretation = "MONOCHROME1"
    dicom.WindowCenter, dicom.WindowWidth = 2048, 1024
    dicom.PixelData = stored.tobytes()
    dicom.save_as(tmp_path / "whole.dcm", enforce_file_format=True)
    pixels, _ = images.read_image(tmp_path / "whole.dcm", 8)
    expected = 255 - np.clip((stored.astype(float) - 1536) / 1024, 0, 1) * 255
    np.testing.assert_allclose(pixels, expected, atol=2)
    (tmp_path / "truncated.dcm").write_bytes((tmp_path / "whole.dcm").read_bytes()[:400])
    with pytest.raises(ValueError, match="is not readable as DICOM"):
        images.read_image(tmp_path / "truncated.dcm", 8)


def test_a_file_of_another_kind_is_not_an_image(tmp_path):
    (tmp_path / "notes.png").write_text("not pixels")
    with pytest.raises(ValueError, match="is not an image"):
        images.read_image(tmp_path / "notes.png", 8)


@pytest.mark.parametrize(("low", "high"), [(-5, 9), (0, 2**17)])
def test_pixels_beyond_sixteen_bits_are_refused(low, high):
    with pytest.raises(ValueError, match=f"has pixels from {low} to .*, not 0 to 65535"):
        images.scale_to_uint8(np.asarray([[low, high]], np.int32))


def test_a_mask_has_the_size_of_its_image(tmp_path):
    stored = np.zeros((20, 30), np.uint8)
    stored[5:10, 6:12] = 1
    Image.fromarray(stored).save(tmp_path / "mask.png")
    mask = images.read_mask(tmp_path / "mask.png", (20, 30), 40, 60)
    assert mask[11:19, 13:23].all() and not mask[:9].any() and not mask[:, 26:].any()
    with pytest.raises(ValueError, match="mask mask.png has 20 x 30 pixels, its image 30 x 20"):
        images.read_mask(tmp_path / "mask.png", (30, 20), 40, 60)

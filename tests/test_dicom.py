"""DICOM files become the grey that viewers show; what cannot be read is named in words."""

import io
import sys
import types

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from radiographs import draw_picture, make_dicom

from plan_jax.data import dicom, images
from plan_jax.types import UserError

PICTURE = draw_picture()
SHAPE = PICTURE.shape
STORED = np.round(PICTURE * 4095).astype(np.uint16)
TWELVE_BITS = {"BitsStored": 12}
CONTENT = make_dicom(STORED)


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads an image from a file's content, at its own size."""

    def read_content(content, bit_depth=0, notes=None):
        (tmp_path / "film.dcm").write_bytes(content)
        path = tmp_path / "film.dcm"
        pixels, shape = images.read_image(path, max(SHAPE), bit_depth, notes)
        assert shape == pixels.shape == SHAPE
        return pixels

    return read_content


def shown(values, black, white):
    return np.clip((values.astype(float) - black) / (white - black), 0, 1) * 255


def assert_close(pixels, expected):
    np.testing.assert_allclose(pixels, expected, atol=0.6)


# Scale ------------------------------------------------------------------------------------------


def test_a_window_is_applied_and_monochrome1_inverted(read):
    window = {"WindowCenter": 2048, "WindowWidth": 1024, **TWELVE_BITS}
    expected = shown(STORED, 1536, 2559)
    assert_close(read(make_dicom(STORED, **window)), expected)
    inverted = read(make_dicom(STORED, PhotometricInterpretation="MONOCHROME1", **window))
    assert_close(inverted, 255 - expected)


def test_another_window_takes_the_place_of_that_of_the_file(tmp_path):
    path = tmp_path / "film.dcm"
    elements = {"WindowCenter": 2048, "WindowWidth": 1024, "RescaleIntercept": -100, **TWELVE_BITS}
    path.write_bytes(make_dicom(STORED, **elements))
    own = dicom.read_window(path.read_bytes(), path)
    assert own == (2048, 1024, STORED.min() - 100, STORED.max() - 100)
    pixels, _ = images.read_image(path, max(SHAPE), window=(900.0, 400.0))
    assert_close(pixels, shown(STORED - 100.0, 700, 1099))
    data = path.read_bytes()
    np.testing.assert_array_equal(
        dicom.decode_dicom(data, path, window=own[:2]), dicom.decode_dicom(data, path)
    )


@pytest.mark.parametrize("invert", ["MONOCHROME1", "MONOCHROME2"])
def test_without_a_window_it_is_what_is_shown(tmp_path, invert):
    path = tmp_path / "film.dcm"
    data = make_dicom(STORED, PhotometricInterpretation=invert, **TWELVE_BITS)
    window = dicom.read_window(data, path)
    assert window == (2047.5, 4095, STORED.min(), STORED.max())
    again = dicom.decode_dicom(data, path, window=window[:2])
    np.testing.assert_allclose(again, dicom.decode_dicom(data, path).astype(float), atol=1)


def test_colour_has_no_window(tmp_path):
    assert dicom.read_window(make_dicom(np.zeros((4, 4, 3), np.uint8)), tmp_path / "a.dcm") is None


def test_the_shape_is_read_without_the_pixels(tmp_path):
    assert dicom.read_shape(CONTENT, tmp_path / "a.dcm") == SHAPE
    assert dicom.read_shape(make_dicom(STORED, Rows=60_000), tmp_path / "a.dcm")[0] == 60_000


def test_a_window_is_not_stretched_to_an_image_that_does_not_fill_it(read):
    dim = STORED // 4
    pixels = read(make_dicom(dim, WindowCenter=2048, WindowWidth=4096, **TWELVE_BITS))
    assert_close(pixels, dim / 4095 * 255)


@pytest.mark.parametrize(
    ("elements", "black", "white"),
    [
        ({"WindowCenter": [2000, 40], "WindowWidth": [1001, 80]}, 1499.5, 2499.5),
        ({"WindowCenter": [40, 2000], "WindowWidth": [0, 1001]}, 1499.5, 2499.5),
        ({"WindowCenter": 2000, "WindowWidth": 0}, 0, 4095),
        ({"WindowCenter": 2000, "WindowWidth": -5}, 0, 4095),
        ({"WindowCenter": 2000}, 0, 4095),
        ({"WindowCenter": "", "WindowWidth": ""}, 0, 4095),
        ({"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}, 1500, 2500),
        ({"WindowCenter": 2000, "WindowWidth": 1001, "VOILUTFunction": "?"}, 1499.5, 2499.5),
    ],
)
def test_the_window_is_the_first_with_a_width(read, elements, black, white):
    assert_close(read(make_dicom(STORED, **TWELVE_BITS, **elements)), shown(STORED, black, white))


def test_a_window_beside_all_grey_values_is_named(read):
    with pytest.raises(dicom.ImageError, match=r"has a window \(center 9000.*shows none of its"):
        read(make_dicom(STORED, WindowCenter=9000, WindowWidth=10, **TWELVE_BITS))


def test_a_sigmoid_window_has_its_black_and_white(read):
    elements = {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    expected = 255 / (1 + np.exp(-4 * (STORED.astype(float) - 2000) / 1000))
    assert_close(read(make_dicom(STORED, **TWELVE_BITS, **elements)), expected)


@pytest.mark.parametrize(
    ("slope", "intercept", "black", "white"),
    [("", "", 0, 4095), ("", "-1024", 0, 4095), (2, -100, 0, 4095), (0, 0, 0, 4095)],
)
def test_an_empty_or_linear_rescale_keeps_the_scale(read, slope, intercept, black, white):
    rescale = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    assert_close(read(make_dicom(STORED, **TWELVE_BITS, **rescale)), shown(STORED, black, white))


def test_a_window_refers_to_rescaled_values(read):
    elements = {"RescaleSlope": 2, "RescaleIntercept": -100, **TWELVE_BITS}
    pixels = read(make_dicom(STORED, WindowCenter=4000, WindowWidth=2001, **elements))
    assert_close(pixels, shown(STORED * 2.0 - 100, 2999.5, 4999.5))
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095, **TWELVE_BITS}
    assert_close(read(make_dicom(STORED, **falling)), 255 - shown(STORED, 0, 4095))
    pixels = read(make_dicom(STORED, WindowCenter=2048, WindowWidth=4096, **falling))
    assert_close(pixels, 255 - shown(STORED, 0, 4095))


def test_bits_stored_is_the_depth_of_all_films(read):
    dim = STORED // 3
    assert_close(read(make_dicom(dim, **TWELVE_BITS)), dim / 4095 * 255)
    marked = STORED.copy()
    marked[-2:, -8:] = 65535
    expected = np.where(marked == 65535, 255, STORED / 4095 * 255)
    assert_close(read(make_dicom(marked, **TWELVE_BITS)), expected)
    assert_close(read(make_dicom(marked)), expected)  # 16 of 16 bits say nothing
    byte = np.round(PICTURE * 250).astype(np.uint8)
    assert_close(read(make_dicom(byte), bit_depth=12), byte)


def test_an_underexposed_film_keeps_the_scale_of_its_neighbours(read):
    notes = set()
    dim = np.round(PICTURE * 460).astype(np.uint16)
    assert_close(read(make_dicom(dim, **TWELVE_BITS), notes=notes), dim / 4095 * 255)
    assert not notes


def test_unused_bits_are_an_overlay_or_an_error(read):
    overlay = (np.arange(STORED.size) % 3 == 0).reshape(SHAPE).astype(np.uint16) << 13
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(STORED | overlay, **TWELVE_BITS)))
    dataset.add_new((0x6000, 0x0102), "US", 13)  # position of the overlay's bit
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert_close(read(buffer.getvalue()), STORED / 4095 * 255)
    with pytest.raises(dicom.ImageError, match="has grey values up to .*, beyond its BitsStored 8"):
        read(make_dicom(STORED, BitsStored=8))


def test_a_border_beyond_the_bits_is_padding_and_a_window_clips_the_rest(read):
    notes = set()
    framed = STORED.copy()
    framed[:8] = 65535
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    expected = STORED / 4095 * 255
    expected[:8] = 0
    for elements in (window, {}):
        assert_close(read(make_dicom(framed, **TWELVE_BITS, **elements), notes=notes), expected)
        assert notes == {dicom.PADDED}
    assert_close(read(make_dicom(STORED, BitsStored=10, **window)), STORED / 4095 * 255)


@pytest.mark.parametrize("padding", [-32768, -2000])
def test_a_negative_border_of_one_value_is_padding(read, padding):
    notes = set()
    framed = STORED.astype(np.int16)
    framed[:8] = padding
    expected = STORED / 4095 * 255
    expected[:8] = 0
    assert_close(read(make_dicom(framed), notes=notes), expected)
    assert notes == {12, dicom.PADDED}


def test_signed_pixels_keep_their_grey_levels(read):
    notes = set()
    assert_close(read(make_dicom(STORED.astype(np.int16)), notes=notes), STORED / 4095 * 255)
    assert notes == {12}
    signed = STORED.astype(np.int16) - 1000
    assert_close(read(make_dicom(signed, BitsStored=13)), shown(signed, -4096, 4095))
    assert_close(read(make_dicom(signed), bit_depth=12), shown(signed, -2048, 2047))
    notes = set()
    assert_close(read(make_dicom(signed), notes=notes), shown(signed, -4096, 4095))
    assert notes == {13, dicom.SIGNED}


@pytest.mark.parametrize("elements", [{"BitsStored": 13}, {}])
@pytest.mark.parametrize("marker", [-1, -4096])
def test_a_few_negative_pixels_do_not_decide_the_scale(read, elements, marker):
    marked = STORED.astype(np.int16)
    marked[0, :5] = marker
    expected = STORED / 4095 * 255
    expected[0, :5] = 0
    assert_close(read(make_dicom(marked, **elements)), expected)


def test_a_scale_of_the_image_itself_is_noted(read):
    wide = np.round(PICTURE * 100000).astype(np.uint32)
    notes = set()
    assert_close(read(make_dicom(wide), notes=notes), wide / wide.max() * 255)
    assert notes == {dicom.OWN_RANGE}


@pytest.mark.parametrize(
    ("padding", "elements"),
    [
        (63536, {"PixelPaddingValue": 63536}),
        (63536, {"PixelPaddingValue": 63536, "BitsStored": 10}),
        (4000, {"PixelPaddingValue": 3900, "PixelPaddingRangeLimit": 4095}),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_has_no_part_in_the_scale(read, padding, elements, photometric):
    dim = np.round(PICTURE * 900).astype(np.uint16)
    padded = dim.copy()
    padded[:12] = padding
    pixels = read(make_dicom(padded, PhotometricInterpretation=photometric, **elements))
    expected = shown(dim, 0, 1023)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    expected[:12] = 0
    assert_close(pixels, expected)


def test_a_voi_table_is_applied(read):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.add_new("LUTData", "US", [round((x / 4095) ** 2 * 60000) for x in range(4096)])
    pixels = read(make_dicom(STORED, VOILUTSequence=[table], **TWELVE_BITS))
    assert_close(pixels, (STORED / 4095.0) ** 2 * 255)
    assert_close(
        read(make_dicom(STORED, VOILUTSequence=[Dataset()], **TWELVE_BITS)), STORED / 4095 * 255
    )


def test_a_modality_table_is_applied(read):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.add_new("LUTData", "US", [2 * (4095 - x) for x in range(4096)])
    pixels = read(make_dicom(STORED, ModalityLUTSequence=[table], **TWELVE_BITS))
    assert_close(pixels, 255 - STORED / 4095 * 255)


# Colour -----------------------------------------------------------------------------------------


def test_colour_becomes_luminance(read):
    colour = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
    expected = colour @ np.asarray([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read(make_dicom(colour)), expected, atol=1)
    grey = np.round(PICTURE * 255).astype(np.uint8)
    neutral = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], -1)
    ybr = read(make_dicom(neutral, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(ybr, grey, atol=1)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_palette_is_applied(read, depth):
    grey = np.round(PICTURE * 255).astype(np.uint8)
    table = np.arange(256)[::-1] * (257 if depth == 16 else 1)
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        stem = f"{name}PaletteColorLookupTable"
        elements[f"{stem}Descriptor"] = [256, 0, depth]
        elements[f"{stem}Data"] = table.astype(f"<u{depth // 8}").tobytes()
    np.testing.assert_allclose(read(make_dicom(255 - grey, **elements)), grey, atol=1)


# What cannot be read ----------------------------------------------------------------------------


def test_a_file_without_its_preamble_is_read(read):
    assert_close(read(make_dicom(STORED, **TWELVE_BITS)[132:]), STORED / 4095 * 255)


def remove_syntax(content):
    """Returns a file whose meta group has lost its transfer syntax, but not its length."""
    return content.replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x11\x00UI")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_dicom(STORED, PixelData=None), "is DICOM without pixel data .its modality is DX"),
        (make_dicom(STORED, Rows=None), "is DICOM without Rows"),
        (make_dicom(STORED, PhotometricInterpretation=None), "without PhotometricInterpretation"),
        (make_dicom(STORED, PhotometricInterpretation="HSV"), "photometric interpretation HSV, w"),
        (remove_syntax(CONTENT), "is DICOM without the transfer syntax .0002,0010"),
        (
            CONTENT[CONTENT.index(b"\x08\x00\x16\x00") :],
            "is DICOM without the prefix DICM and the transfer syntax",
        ),
        (CONTENT[:-900], r"has pixels that cannot be decoded \(.*less than expected"),
        (
            make_dicom(STORED, NumberOfFrames=2, PixelData=STORED.tobytes() * 2),
            "has 2 frames, not one; save the frame to use as a file of its own",
        ),
        (bytes(132) + CONTENT[132:], "is not DICOM: it has no prefix DICM at byte 128"),
        (b"\x08\x00\x05\x00" + b"nothing of DICOM" * 20, "is not an image that can be read"),
    ],
)
def test_what_is_missing_is_named(read, content, message):
    with pytest.raises(dicom.ImageError, match=message):
        read(content)


def test_one_frame_of_one_is_read(read):
    assert_close(read(make_dicom(STORED, NumberOfFrames=1, **TWELVE_BITS)), STORED / 4095 * 255)


@pytest.mark.parametrize(
    ("syntax", "plugin", "message"),
    [
        (
            pydicom.uid.JPEGLosslessSV1,
            "libjpeg",
            "is compressed as JPEG Lossless.*, and no decoder for it is installed; pip install "
            "'plan-jax.dicom.', or python-gdcm, or pylibjpeg pylibjpeg-libjpeg",
        ),
        (pydicom.uid.JPEGLSLossless, "libjpeg", "is compressed as JPEG-LS Lossless.*python-gdcm"),
        (pydicom.uid.JPEG2000, "openjpeg", "as JPEG 2000 Image.*or pylibjpeg pylibjpeg-openjpeg"),
    ],
)
def test_a_missing_decoder_is_named_with_its_package(read, monkeypatch, syntax, plugin, message):
    decoder = pydicom.pixels.get_decoder(syntax)
    needs = ("pylibjpeg>=2.0", f"pylibjpeg-{plugin}>=2.1")
    monkeypatch.setattr(decoder, "_available", {})
    missing = {"gdcm": ("gdcm>=3.0.10",), "pylibjpeg": needs, "pillow": ()}
    monkeypatch.setattr(decoder, "_unavailable", missing)
    with pytest.raises(dicom.ImageError, match=message):
        read(make_dicom(STORED, syntax))


def test_a_decoder_that_fails_and_one_that_does_not_exist_are_named(read, monkeypatch):
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGExtended12Bit)
    missing = {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")}
    monkeypatch.setattr(decoder, "_unavailable", missing)
    message = r"cannot be decoded \(.*compressed as JPEG Extended.*, try pip install pylibjpeg pyl"
    with pytest.raises(dicom.ImageError, match=message):
        read(make_dicom(STORED, pydicom.uid.JPEGExtended12Bit, **TWELVE_BITS))
    with pytest.raises(dicom.ImageError, match="is coded as MPEG2 .*, which pydicom cannot decode"):
        read(make_dicom(STORED, pydicom.uid.MPEG2MPML))


@pytest.mark.parametrize("version", ["2.4.4", "1.0"])
def test_an_old_pydicom_is_named_with_the_version_that_is_needed(read, monkeypatch, version):
    old = types.ModuleType("pydicom")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "pydicom", old)
    with pytest.raises(UserError, match=f"pydicom {version} is too old.*install 'pydicom>=3'"):
        read(CONTENT)


def test_a_missing_pydicom_is_named_with_the_extra(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"film.dcm is DICOM; pip install 'plan-jax\[dicom\]'"):
        read(CONTENT)

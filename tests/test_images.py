"""Radiographs of every kind become 8-bit grey, and masks of every kind their foreground."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, TiffImagePlugin
from radiographs import draw_picture, make_dicom, make_png, make_tiff, save_with_orientation

from plan_jax.data import dicom, images

PICTURE = draw_picture()
GREY = np.round(PICTURE * 255).astype(np.uint8)
SHAPE = GREY.shape
MASK = np.zeros(SHAPE, bool)
MASK[8:20, 4:24] = True


def read(path):
    """Reads an image at its own size."""
    pixels, shape = images.read_image(path, max(SHAPE))
    assert shape == pixels.shape == SHAPE
    return pixels


def read_mask(path):
    return images.read_mask(path, SHAPE, *SHAPE)


# Depth ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
@pytest.mark.parametrize("alpha_white", [4095, 65535])
def test_16_bit_colour_keeps_its_grey_levels(tmp_path, colour_type, channels, alpha_white):
    stored = np.round(PICTURE * 4095)[..., None].repeat(channels, -1)
    if channels in (2, 4):
        stored[..., -1] = alpha_white
    (tmp_path / "film.png").write_bytes(make_png(stored, colour_type))
    np.testing.assert_allclose(read(tmp_path / "film.png"), PICTURE * 255, atol=0.6)


def test_16_bit_alpha_and_luminance_are_those_of_8_bits(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (*SHAPE, 4)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "8.png")
    (tmp_path / "16.png").write_bytes(make_png(colour.astype(np.uint16) * 257, 6))
    difference = read(tmp_path / "8.png").astype(int) - read(tmp_path / "16.png")
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_tiff_keeps_its_grey_levels(tmp_path, deflate, channels):
    stored = np.round(PICTURE * 4095).astype("<u2")[..., None].repeat(channels, -1)
    if channels == 4:
        stored[..., 3] = 65535
    (tmp_path / "film.tif").write_bytes(make_tiff(stored, deflate=deflate))
    np.testing.assert_allclose(read(tmp_path / "film.tif"), PICTURE * 255, atol=0.6)


@pytest.mark.parametrize("dtype", ["<f4", "<i2", "<i4"])
def test_real_and_signed_tiff_keep_their_grey_levels(tmp_path, dtype):
    white = 1 if "f" in dtype else 4095
    stored = (PICTURE * white if "f" in dtype else np.round(PICTURE * white)).astype(dtype)
    (tmp_path / "film.tif").write_bytes(make_tiff(stored[..., None]))
    np.testing.assert_allclose(read(tmp_path / "film.tif"), PICTURE * 255, atol=0.6)
    (tmp_path / "negative.tif").write_bytes(make_tiff(-stored[..., None] - 1))
    with pytest.raises(ValueError, match="has pixels from -.*, not 0 to 65535; shift or scale"):
        read(tmp_path / "negative.tif")


def test_a_tiff_of_a_kind_that_is_not_read_is_named(tmp_path):
    (tmp_path / "film.tif").write_bytes(make_tiff(PICTURE.astype("<f8")[..., None]))
    with pytest.raises(ValueError, match="is a broken TIFF, or a kind that cannot be read"):
        read(tmp_path / "film.tif")


def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path):
    for dtype, white in (("u1", 255), ("<u2", 4095)):
        stored = np.round((1 - PICTURE) * white).astype(dtype)[..., None]
        (tmp_path / "film.tif").write_bytes(make_tiff(stored, photometric=0))
        np.testing.assert_allclose(read(tmp_path / "film.tif"), PICTURE * 255, atol=0.6)


def test_16_bit_planes_are_refused_rather_than_misread(tmp_path):
    stored = np.zeros((*SHAPE, 3), "<u2")
    (tmp_path / "planes.tif").write_bytes(make_tiff(stored, planar=2))
    with pytest.raises(ValueError, match="has 16 bits a channel in an unusual layout; save it as"):
        read(tmp_path / "planes.tif")


def test_the_depth_is_guessed_noted_or_set(tmp_path):
    Image.fromarray(np.round(PICTURE * 900).astype(np.uint16)).save(tmp_path / "dim.png")
    notes = set()
    images.read_image(tmp_path / "dim.png", 48, notes=notes)
    assert notes == {10}
    notes = set()
    pixels, _ = images.read_image(tmp_path / "dim.png", 48, 12, notes)
    assert not notes
    np.testing.assert_allclose(pixels, PICTURE * 900 / 4095 * 255, atol=0.6)


def test_a_large_jpeg_keeps_its_shape_for_boxes(tmp_path):
    Image.fromarray(np.full((800, 600), 90, np.uint8)).save(tmp_path / "large.jpg")
    pixels, shape = images.read_image(tmp_path / "large.jpg", 48)
    assert shape == (800, 600) and pixels.shape == (48, 36)
    assert abs(pixels.astype(int) - 90).max() <= 1


# Orientation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_is_upright_as_viewers_show_it(tmp_path, suffix, orientation):
    path = tmp_path / f"film.{suffix}"
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    pixels = np.stack([GREY] * 3, -1) if suffix == "webp" else GREY
    if suffix == "tif":
        save_with_orientation(GREY, tmp_path / "film.png", orientation)
        with Image.open(tmp_path / "film.png") as image:
            path.write_bytes(make_tiff(np.asarray(image)[..., None], orientation))
    else:
        save_with_orientation(pixels, path, orientation, **options)
    notes = set()
    read_pixels, shape = images.read_image(path, 48, notes=notes)
    assert shape == SHAPE
    # JPEG ripples beside the bright square.
    assert abs(read_pixels.astype(int) - GREY).mean() < (2 if suffix == "jpg" else 0.5)
    assert notes == (set() if orientation == 1 else {images.TURNED})


def test_16_bit_colour_is_upright_too(tmp_path):
    turned = np.ascontiguousarray(np.rot90(np.round(PICTURE * 4095).astype("<u2")))
    tiff = make_tiff(turned[..., None].repeat(3, -1), orientation=6)
    (tmp_path / "film.tif").write_bytes(tiff)
    np.testing.assert_allclose(read(tmp_path / "film.tif"), PICTURE * 255, atol=0.6)


def test_an_orientation_that_does_not_exist_is_ignored(tmp_path):
    for orientation in (0, 9, 6000):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(GREY).save(tmp_path / "film.png", exif=exif)
        np.testing.assert_array_equal(read(tmp_path / "film.png"), GREY)
    Image.fromarray(GREY).save(tmp_path / "film.jpg", exif=b"Exif\0\0II*\0broken")
    assert abs(read(tmp_path / "film.jpg").astype(int) - GREY).mean() < 3


# Files ------------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_not_an_image(tmp_path):
    (tmp_path / "notes.png").write_text("not pixels")
    with pytest.raises(ValueError, match="is not an image"):
        images.read_image(tmp_path / "notes.png", 8)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is an empty file"):
        images.read_image(tmp_path / "empty.png", 8)


def test_a_format_that_runs_a_program_is_not_opened(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "film.png", "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: 1 / 0)
    with pytest.raises(ValueError, match="is not an image that can be read"):
        read(tmp_path / "film.png")
    with pytest.raises(ValueError, match="mask film.png is not an image that can be read"):
        read_mask(tmp_path / "film.png")


def test_a_reduced_copy_in_a_tiff_is_no_frame(tmp_path):
    image = Image.fromarray(GREY)
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "film.tif") as file:
        image.save(file, "TIFF")
        file.newFrame()
        image.resize((16, 24)).save(file, "TIFF", tiffinfo={254: 1})
    np.testing.assert_array_equal(read(tmp_path / "film.tif"), GREY)


def test_several_frames_are_refused(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for suffix in ("gif", "tif", "png", "webp"):
        path = tmp_path / f"stack.{suffix}"
        frames[0].convert("RGB").save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match="has 2 frames, not one; save the frame to use"):
            read(path)
        with pytest.raises(ValueError, match=f"mask stack.{suffix} has 2 frames, not one"):
            read_mask(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="has more than the 1,000 pixels that are read; reduce it"):
        read(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="mask bomb.png has more than the 1,000 pixels"):
        read_mask(tmp_path / "bomb.png")


def encode(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "png": encode(GREY, "PNG"),
    "jpeg": encode(GREY, "JPEG"),
    "tiff": encode(GREY, "TIFF", compression="tiff_lzw"),
    "bmp": encode(GREY, "BMP"),
    "gif": encode(GREY, "GIF"),
    "webp": encode(GREY, "WEBP"),
    "jpeg2000": encode(GREY, "JPEG2000"),
    "png of 16 bits": encode(GREY.astype(np.uint16) * 16, "PNG"),
    "colour of 16 bits": make_png(GREY.astype(np.uint16)[..., None].repeat(3, -1), 2),
    "tiff of 16 bits": make_tiff(GREY.astype("<u2")[..., None].repeat(3, -1), deflate=True),
    "dicom": make_dicom(GREY),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_in_its_shape_or_refused(tmp_path, kind):
    data, rng = FILES[kind], np.random.default_rng(0)
    num_refused = 0
    for trial in range(12):
        damaged = bytearray(data)
        if trial % 3 == 0:
            del damaged[rng.integers(len(data)) :]
        else:
            for position in rng.integers(0, len(data) if trial % 3 == 1 else 64, 4):
                damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "film").write_bytes(damaged)
        try:
            pixels, shape = images.read_image(tmp_path / "film", 24)
            assert max(pixels.shape) == 24 and pixels.dtype == np.uint8 and min(shape) > 0
        except ValueError as error:
            num_refused += 1
            assert len(str(error)) < 300 and "\n" not in str(error)
        try:
            assert images.read_mask(tmp_path / "film", SHAPE, 24, 16).shape == (24, 16)
        except ValueError as error:
            assert str(error).startswith("mask film ")
    assert num_refused


# Masks ------------------------------------------------------------------------------------------


def test_a_mask_has_the_size_of_its_image(tmp_path):
    stored = np.zeros((20, 30), np.uint8)
    stored[5:10, 6:12] = 1
    Image.fromarray(stored).save(tmp_path / "mask.png")
    mask = images.read_mask(tmp_path / "mask.png", (20, 30), 40, 60)
    assert mask[11:19, 13:23].all() and not mask[:9].any() and not mask[:, 26:].any()
    with pytest.raises(ValueError, match="has 20 x 30 pixels, its image 30 x 20; turn it like"):
        images.read_mask(tmp_path / "mask.png", (30, 20), 40, 60)
    with pytest.raises(ValueError, match="mask mask.png has 20 x 30 pixels, its image 20 x 31$"):
        images.read_mask(tmp_path / "mask.png", (20, 31), 40, 60)
    with pytest.raises(ValueError, match="mask absent.png cannot be read"):
        read_mask(tmp_path / "absent.png")
    report = "Effusion on the left, no pneumothorax. " * 20
    with pytest.raises(ValueError, match="cannot be read") as fault:
        read_mask(tmp_path / report)
    assert "no pneumothorax" not in str(fault.value)


def paint(foreground, background):
    """Returns pixels of two colours."""
    colours = np.asarray([background, foreground])
    return colours[MASK.astype(int)].astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        paint(1, 0),
        paint(255, 0),
        paint(128, 0),
        MASK,
        MASK.astype(np.uint16),
        MASK.astype(np.uint16) * 65535,
        paint((255, 255), (0, 255)),
        paint((255, 255), (0, 0)),
        paint((255, 255), (255, 0)),
        paint((255, 0, 0, 255), (0, 0, 0, 255)),
        paint((255, 0, 0, 255), (0, 0, 0, 0)),
        paint((0, 0, 255, 255), (255, 255, 255, 0)),
        paint((0, 0, 0, 255), (0, 0, 0, 0)),
        paint((0, 9, 0), (0, 0, 0)),
    ],
)
def test_a_mask_is_its_colour_where_it_is_opaque(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)


@pytest.mark.parametrize("dtype", ["<f4", "<u2", "u1"])
def test_a_tiff_mask_is_read(tmp_path, dtype):
    (tmp_path / "mask.tif").write_bytes(make_tiff(MASK[..., None].astype(dtype)))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), MASK)


def test_a_mask_of_16_bit_colour_keeps_small_values(tmp_path):
    (tmp_path / "mask.png").write_bytes(make_png(MASK[..., None].repeat(3, -1), 2))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)


@pytest.mark.parametrize(
    ("indices", "palette"),
    [
        (MASK, [0, 0, 0, 128, 0, 0]),  # as of PASCAL VOC
        (~MASK, [255, 255, 255, 0, 0, 0]),  # sorted by brightness: index 0 is the foreground
        (MASK, [255, 255, 255, 200, 30, 30]),  # no black: index 0 is the background
        (MASK, [0, 0, 0, 0, 0, 0]),  # no colour at all
    ],
)
def test_a_palette_is_read_by_its_colours(tmp_path, indices, palette):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(palette)
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)
    image.save(tmp_path / "clear.png", transparency=int(indices[0, 0]))
    np.testing.assert_array_equal(read_mask(tmp_path / "clear.png"), MASK)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_ripples_and_soft_edges_are_no_mask(tmp_path, quality, mode):
    image = Image.fromarray(paint(255, 0)).convert(mode)
    image.save(tmp_path / "mask.jpg", quality=quality)
    with Image.open(tmp_path / "mask.jpg") as lossy:
        assert ((np.asarray(lossy) > 0).reshape(*SHAPE, -1).any(-1) != MASK).sum() > 10
        lossy.save(tmp_path / "mask.png")
    for name in ("mask.jpg", "mask.png"):
        assert (read_mask(tmp_path / name) != MASK).sum() <= 4
    image.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "soft.png")
    assert (read_mask(tmp_path / "soft.png") != MASK).sum() <= 8


@pytest.mark.parametrize("factors", [(4, 4), (5, 3)])
def test_a_soft_mask_enlarged_by_nearest_neighbour_has_one_label(tmp_path, factors):
    soft = np.asarray(Image.fromarray(paint(255, 0)).filter(ImageFilter.GaussianBlur(2)))
    assert len(np.unique(soft)) > images.FEW_LEVELS
    enlarged = np.kron(soft, np.ones(factors, np.uint8))
    Image.fromarray(enlarged).save(tmp_path / "mask.png")
    mask = images.read_mask(tmp_path / "mask.png", enlarged.shape, *enlarged.shape)
    np.testing.assert_array_equal(mask, enlarged >= soft.max() / 2)


def test_an_image_named_as_a_mask_is_refused(tmp_path):
    noise = np.random.default_rng(0).normal(0, 6, SHAPE)
    film = np.clip(np.round(GREY * 0.7 + 40 + noise), 0, 255).astype(np.uint8)
    for suffix in ("png", "jpg"):
        Image.fromarray(film).save(tmp_path / f"film.{suffix}")
        message = f"mask film.{suffix} looks like an image, not a mask; save a mask of 0 and 255"
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / f"film.{suffix}")


@pytest.mark.parametrize(
    ("white", "dtype", "message"),
    [(0.02, "<f4", "0.02 of 1;"), (12, "u1", "12 of 255;"), (300, "<u2", "300 of 1023;")],
)
def test_a_dark_map_is_not_thresholded_at_half_of_its_own_maximum(tmp_path, white, dtype, message):
    heat = np.linspace(0, 1, MASK.size).reshape(SHAPE) ** 8 * white
    heat = heat if "f" in dtype else np.round(heat)
    (tmp_path / "mask.tif").write_bytes(make_tiff(heat.astype(dtype)[..., None]))
    with pytest.raises(ValueError, match=f"brightest pixel is {message} threshold it yourself"):
        read_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("labels", [(0, 128, 255), (0, 1, 2), (1, 2, 3), (0, 1, 255)])
def test_several_labels_are_refused(tmp_path, labels):
    stored = np.full(SHAPE, labels[0], np.uint8)
    stored[8:20, 4:14], stored[8:20, 18:28] = labels[1:]
    Image.fromarray(stored).save(tmp_path / "mask.png")
    message = f"mask mask.png has the grey levels {', '.join(map(str, labels))}, as of several"
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "mask.png")


def test_many_labels_drawn_in_blocks_are_refused(tmp_path):
    stored = np.zeros((8, 8), np.uint8)
    stored[1:6:2, 1:6:2] = np.arange(28, 253, 28).reshape(3, 3)
    Image.fromarray(np.kron(stored, np.ones((8, 8), np.uint8))).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask mask.png has the grey levels 0, 28, 56.*several"):
        images.read_mask(tmp_path / "mask.png", (64, 64), 64, 64)


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255)])
def test_several_colours_are_refused(tmp_path, background):
    stored = np.tile(np.uint8(background), (*SHAPE, 1))
    stored[8:20, 4:14], stored[8:20, 18:28] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(stored).save(tmp_path / "mask.png")
    count = 3 if background[0] else 2
    with pytest.raises(ValueError, match=f"mask mask.png has {count} colours beside its backgr"):
        read_mask(tmp_path / "mask.png")
    palette = Image.fromarray(stored).quantize(4)
    palette.save(tmp_path / "palette.png")
    with pytest.raises(ValueError, match="mask palette.png has . colours beside its background"):
        read_mask(tmp_path / "palette.png")


def test_odd_masks_are_described():
    assert images.describe_mask(MASK) == ""
    assert images.describe_mask(~MASK) == images.FRAME
    assert images.describe_mask(MASK | True) == images.FULL
    assert images.describe_mask(MASK & False) == images.EMPTY


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_like_its_image(tmp_path, orientation):
    save_with_orientation(paint(255, 0), tmp_path / "mask.png", orientation)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)


def test_a_mask_that_cannot_be_a_picture_is_named(tmp_path):
    (tmp_path / "mask.dcm").write_bytes(make_dicom(paint(255, 0)))
    with pytest.raises(ValueError, match="mask mask.dcm is DICOM; save it as PNG"):
        read_mask(tmp_path / "mask.dcm")
    stored = np.where(MASK, np.nan, 0).astype("<f4")
    (tmp_path / "mask.tif").write_bytes(make_tiff(stored[..., None]))
    with pytest.raises(ValueError, match="mask mask.tif has pixels that are NaN or infinite"):
        read_mask(tmp_path / "mask.tif")


def test_notes_become_one_sentence_each():
    notes = {
        images.TURNED: ["a.jpg"],
        images.ENLARGED: ["d.png", "c.png", "b.png", "a.png"],
        10: ["x.png"],
        12: ["y.png", "z.png"],
        14: ["w.png"],
        dicom.OWN_RANGE: ["p.dcm"],
        dicom.SIGNED: ["q.dcm"],
        dicom.PADDED: ["r.dcm"],
        images.EMPTY: ["m.png"],
        images.FULL: ["n.png"],
        images.FRAME: ["o.png"],
    }
    messages = images.summarise_notes(notes, 224)
    turned, enlarged, depths, own_range, signed, padded, empty, full, frame = messages
    assert turned.startswith("turned 1 image (a.jpg) upright by the EXIF orientation")
    assert enlarged.startswith("enlarged 4 images (a.png, b.png, c.png and 1 more) to size 224")
    assert "(10 bits in 1, 12 bits in 2, 14 bits in 1)" in depths
    assert "data.builder.bit_depth=12" in depths  # the most frequent
    assert own_range.startswith("1 image (p.dcm) scaled from the smallest to the largest pixel")
    assert signed.startswith("1 image (q.dcm) with negative pixels and no window")
    assert padded.startswith("1 image (r.dcm) with a border or area of one value")
    assert empty.startswith("1 mask (m.png) without any pixel")
    assert full.startswith("1 mask (n.png) of the whole image")
    assert frame.startswith("1 mask (o.png) with all of the image's border")
    assert images.summarise_notes({12: ["y.png"]}, 224) == []


def save_colours(path, film, tint=(1, 1, 1), uneven=0.0, marked=0.0, noise=0.0):
    """Saves a grey film in the colour of a tint, with an uneven cast, marks in red, and noise."""
    x = np.linspace(-1, 1, film.shape[1])[:, None]
    pixels = film[..., None] * np.asarray(tint) * (1 + uneven * x * np.asarray([1, 0, -1]))
    pixels[: round(marked * len(pixels))] = (200, 30, 30)
    pixels += np.random.default_rng(0).normal(size=pixels.shape) * noise
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    "colour",
    [
        {},
        {"tint": (1, 0.87, 0.7)},
        {"tint": (0.2, 0.4, 1)},
        {"uneven": 0.1},
        {"marked": 0.15},
        {"tint": (0.4, 0.6, 1), "uneven": 0.06, "marked": 0.15},
    ],
)
def test_a_tint_has_no_spread_of_hues(colour, tmp_path):
    film = np.linspace(0, 250, 64)[:, None] * np.ones(64)
    film = np.random.default_rng(1).permutation(film.ravel()).reshape(64, 64)
    save_colours(tmp_path / "a.png", film, **colour)
    assert images.measure_hue_spread(tmp_path / "a.png") < 1.2  # rounding to whole levels


def test_noise_in_colour_is_a_spread_of_hues(tmp_path):
    """If the noise has *s* levels, Cb and Cr deviate by 0.556 s and 0.638 s at one luminance."""
    save_colours(tmp_path / "a.png", np.full((64, 64), 128.0), noise=20)
    spread = images.measure_hue_spread(tmp_path / "a.png")
    # The median length of a vector of two normal parts is 1.18 deviations.
    assert spread == pytest.approx(1.18 * np.hypot(0.556, 0.638) / 2**0.5 * 20, rel=0.05)


def test_a_banner_in_colour_has_no_spread_of_hues(tmp_path):
    """On a film of nearly one brightness, a banner looks like a tint that changes with height."""
    film = np.random.default_rng(1).normal(120, 15, (64, 64))
    save_colours(tmp_path / "a.png", film, tint=(0.4, 0.6, 1), marked=0.17)
    assert images.measure_hue_spread(tmp_path / "a.png") < 1.5

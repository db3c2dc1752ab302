"""Reading of image files: radiographs as 8-bit grey, and masks; PNG, JPEG, TIFF, DICOM ..."""

import io
import sys
from collections.abc import Mapping, MutableSet, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import ndimage

from plan_jax.data import dicom, grey, quoting, transforms
from plan_jax.data.grey import ImageError

MAX_REASON = 60  # characters of a decoder's own words in a message
# Orientation of EXIF -> whether to transpose, then to reverse the rows, and the columns.
ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# Layouts of 16-bit colour whose low bytes can be decoded like the high bytes.
COLOUR_LAYOUTS = ("RGB", "RGBX", "RGBA", "LA")
SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
DICOM_SUFFIXES = (".dcm", ".dicom")
WHITE_IS_ZERO = 0  # of the TIFF tag PhotometricInterpretation
SEPARATE_PLANES = 2  # of the TIFF tag PlanarConfiguration
# Formats that are read. Pillow knows more, and starts Ghostscript for some of them.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
# Those whose frames are pictures of their own, not a preview or a depth map.
FRAME_FORMATS = ("GIF", "PNG", "WEBP", "TIFF")
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000")
CODE_OF_COLOUR = np.asarray([1, 2**16, 2**32])  # red, green and blue of 16 bits as one number
FEW_LEVELS = 8  # levels or colours of a mask without soft edges, not compressed with loss
RIPPLE = 1 / 8  # of a mask's maximum: how far lossy compression moves its pixels, or nearly so
MAX_FLAT = 0.05  # largest fraction of a mask with soft edges that is flat and half bright
MIN_DRAWN = 16  # rows and columns of a mask that was enlarged; fewer are drawn blocks
MAX_SOFT = 0.5  # largest fraction of a picture of a mask that is neither black nor white
# What is noted of an image, and of a mask.
TURNED, ENLARGED = "turned", "enlarged"
EMPTY, FULL, FRAME = "empty", "full", "frame"
MAX_NAMES = 3  # of files in a sentence
RANGE_WIDTH = 8  # grey levels in which pixels count as equally bright
TINT_STEPS = 8  # repetitions of a fit of colours
HUE_SIDE = 64  # pixels of the sides to which an image is reduced to measure its colours


# Images -----------------------------------------------------------------------------------------


def read_image(
    path: Path,
    size: int,
    bit_depth: int = 0,
    notes: MutableSet[str | int] | None = None,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    window: tuple[float, float] | None = None,
) -> tuple[UInt8[np.ndarray, "Y X"], tuple[int, int]]:
    """Reads an image as 8-bit grey with the longer side `size`, and its original rows and columns.

    The image is upright, as viewers show it: turned and mirrored as the EXIF orientation says.
    Colour becomes luminance, and transparent pixels become black. Pixels of more than 8 bits are
    scaled by `grey.scale_to_uint8`. For DICOM, see `dicom.decode_dicom`.

    Args:
      path: the file.
      size: longer side of the result in pixels.
      bit_depth: depth of images of more than 8 bits that do not say it (0: guessed from each).
      notes: receives TURNED if the image was turned, ENLARGED if it was smaller than `size`, the
        bit depth if it was guessed, and what `dicom.decode_dicom` notes.
      resampling: filter that reduces an image; BOX is the mean over the area of a pixel.
      window: of DICOM, see `dicom.decode_dicom`.

    Raises:
      OSError, ValueError: if the file is missing or is not a readable image.
      UserError: if it is DICOM and pydicom is not installed.
    """
    notes = set() if notes is None else notes
    data = path.read_bytes()
    if dicom.is_dicom(data):
        pixels = dicom.decode_dicom(data, path, bit_depth, notes, window)
        shape = pixels.shape
    else:
        try:
            pixels, shape, guessed_depth, is_turned = _decode_image(
                data, size, bit_depth, resampling
            )
        except Exception as error:  # decoders raise many kinds for a broken file
            if isinstance(error, UnidentifiedImageError) and path.suffix.lower() in DICOM_SUFFIXES:
                error = ImageError("is not DICOM: it has no prefix DICM at byte 128")
            raise ImageError(_describe_error(error, data)) from None
        if is_turned:
            notes.add(TURNED)
        if guessed_depth:
            notes.add(guessed_depth)
    if max(shape) < size:
        notes.add(ENLARGED)
    new_shape = transforms.scale_shape(shape, size)
    return transforms.resize_image(pixels, *new_shape, resampling), shape


def measure_hue_spread(path: Path) -> float:
    """Computes how much pixels of one brightness differ in colour: 0 for grey, from 0 to 180.

    It is the median over pixels of *|c - t - m|*, where *c = (Cb, Cr)* is the colour of a pixel,
    and m the median of *c - t* over the pixels whose luminance is in the same of 32 ranges. *t* is
    0, or the tint of `_fit_tint`, whose strength may change across the picture: whichever leaves
    less. Marks in colour cover a small part of a film, and so they change neither median.

    Args:
      path: a file that `read_image` reads, and that is not DICOM.
    """
    with _open(path.read_bytes()) as image:
        if image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F")):
            return 0.0
        # A JPEG is decoded at an eighth of its size.
        image.draft("RGB", (HUE_SIDE, HUE_SIDE))
        small = image.convert("RGB").resize((HUE_SIDE, HUE_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small.convert("YCbCr"), np.float64).reshape(-1, 3)
    luminance, colours = pixels[:, 0], pixels[:, 1:] - 128
    tint = _fit_tint(luminance / 255, colours)
    return min(_measure_rest(luminance, rest) for rest in (colours, colours - tint))


def _measure_rest(luminance: Float[np.ndarray, " P"], colours: Float[np.ndarray, "P 2"]) -> float:
    """Computes the median distance of colours from the median at their luminance."""
    ranges, rest = luminance // RANGE_WIDTH, colours.copy()
    for index in np.unique(ranges):
        is_inside = ranges == index
        rest[is_inside] -= np.median(rest[is_inside], axis=0)
    return float(np.median(np.hypot(*rest.T)))


def _fit_tint(
    luminance: Float[np.ndarray, " P"], colours: Float[np.ndarray, "P 2"]
) -> Float[np.ndarray, "P 2"]:
    """Returns the colours of a tint *t = a + Y (b + c x + d y)*, fitted to a square picture.

    It makes the sum of *|c - t|* small, not that of squares, so that marks count little: weighted
    least squares, repeated with new weights.
    """
    side = round(len(luminance) ** 0.5)
    y, x = np.mgrid[:side, :side].reshape(2, -1) / side - 0.5
    terms = np.stack([np.ones_like(luminance), luminance, luminance * x, luminance * y], axis=1)
    weights, tint = np.ones((len(luminance), 1)), colours
    for _ in range(TINT_STEPS):
        tint = terms @ np.linalg.lstsq(terms * weights, colours * weights, rcond=None)[0]
        # Square roots, since squares are summed; half a level keeps the weights finite.
        weights = (np.hypot(*(colours - tint).T) + 0.5)[:, None] ** -0.5
    return tint


def summarise_notes(notes: Mapping[str | int, Sequence[str]], size: int) -> list[str]:
    """Returns one sentence on each thing that a user should know of how images were read.

    Args:
      notes: what `read_image` and `describe_mask` noted -> the names of the files.
      size: longer side of the stored images, in pixels.
    """
    messages = []
    if names := notes.get(TURNED):
        messages.append(
            f"turned {_count(names, 'image')} upright by the EXIF orientation, as viewers show "
            "them; boxes and masks drawn on the stored pixels need files without that tag"
        )
    if names := notes.get(ENLARGED):
        messages.append(f"enlarged {_count(names, 'image')} to size {size}; use a smaller size")
    depths = sorted(depth for depth in notes if isinstance(depth, int))
    if len(depths) > 1:
        counts = ", ".join(f"{depth} bits in {len(notes[depth])}" for depth in depths)
        likely_depth = max(depths, key=lambda depth: (len(notes[depth]), depth))
        messages.append(
            f"images have different bit depths ({counts}); if all are of one detector, set "
            f"data.builder.bit_depth={likely_depth}"
        )
    if names := notes.get(dicom.OWN_RANGE):
        messages.append(
            f"{_count(names, 'image')} scaled from the smallest to the largest pixel of each; to "
            "compare them, add a window (0028,1050) and (0028,1051)"
        )
    if names := notes.get(dicom.SIGNED):
        messages.append(
            f"{_count(names, 'image')} with negative pixels and no window: 0 is grey; to make it "
            "black, add a window (0028,1050) and (0028,1051)"
        )
    if names := notes.get(dicom.PADDED):
        messages.append(
            f"{_count(names, 'image')} with a border or area of one value that is negative or "
            "beyond BitsStored, which was taken as padding"
        )
    if names := notes.get(EMPTY):
        messages.append(f"{_count(names, 'mask')} without any pixel; draw or remove them")
    if names := notes.get(FULL):
        messages.append(f"{_count(names, 'mask')} of the whole image; make the background black")
    if names := notes.get(FRAME):
        messages.append(
            f"{_count(names, 'mask')} with all of the image's border; if black and white are "
            "exchanged, exchange them"
        )
    return messages


def _count(names: Sequence[str], noun: str) -> str:
    """Returns `1 image (a.png)` or `7 images (a.png, b.png, c.png and 4 more)`."""
    names = sorted(set(names))
    suffix = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{quoting.count(len(names), noun)} ({', '.join(names[:MAX_NAMES])}{suffix})"


def _decode_image(
    data: bytes, size: int, bit_depth: int, resampling: Image.Resampling
) -> tuple[UInt8[np.ndarray, "Y X"], tuple[int, int], int, bool]:
    """Returns grey, the upright shape in the file, the depth if guessed, and if it was turned.

    Grey of 8 bits that is upright has its new size already: a copy as an array would take time.
    """
    guessed_depth = 0
    with _open(data) as image:
        _check_frames(image)
        layout = _find_colour_layout(image)
        shape = _read_shape(image)
        is_turned = _read_orientation(image) in ORIENTATIONS
        if image.mode in ("L", "RGB") and not layout:
            # A JPEG decoder skips the finest frequencies of an image far larger than this.
            image.draft("L", (2 * size, 2 * size))
        if layout or image.mode.startswith(("I", "F")):
            values = _read_luminance(data, layout) if layout else np.asarray(image)
            image.load()  # reads the metadata behind the pixels too
            if not bit_depth and not grey.is_unit(values):
                guessed_depth = grey.find_bit_depth(values)
            pixels = grey.scale_to_uint8(values, bit_depth or guessed_depth)
            if _is_white_zero(image):
                pixels = 255 - pixels
        else:
            picture = _convert_to_grey(image)
            if not is_turned:
                new_shape = transforms.scale_shape(shape, size)
                picture = transforms.resize_picture(picture, *new_shape, resampling)
            pixels = np.asarray(picture)
        return _turn_upright(pixels, image), shape, guessed_depth, is_turned


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _describe_error(error: Exception, data: bytes) -> str:
    """Returns what is wrong with a file, as the end of a sentence about it."""
    if not data:
        return "is an empty file"
    if isinstance(error, UnidentifiedImageError):
        kind = next((kind for start, kind in SIGNATURES.items() if data.startswith(start)), "")
        if not kind:
            return "is not an image that can be read"
        return f"is a broken {kind}, or a kind that cannot be read; save it as 8 or 16-bit PNG"
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # from there on Pillow refuses
        return f"has more than the {limit:,} pixels that are read; reduce it"
    reason = (str(error) or type(error).__name__).splitlines()[0][:MAX_REASON]
    return f"is a broken image ({reason})"


def _check_frames(image: Image.Image) -> None:
    """Raises ImageError if a file has several pictures; reduced copies do not count."""
    if image.format not in FRAME_FORMATS:
        return
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format == "TIFF":
        num_copies = 0
        for page in range(1, num_frames):
            image.seek(page)
            num_copies += image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1  # type: ignore[attr-defined]
        image.seek(0)
        num_frames -= num_copies
    if num_frames > 1:
        raise ImageError(
            f"has {num_frames} frames, not one; save the frame to use as a file of its own"
        )


def _convert_to_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image if image.mode == "L" else image.convert("L")


def _is_white_zero(image: Image.Image) -> bool:
    """Returns whether 0 is white; Pillow inverts such a TIFF itself only if it has 8 bits."""
    if image.format != "TIFF" or not image.mode.startswith(("I", "F")):
        return False
    return image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO  # type: ignore[attr-defined]


# Orientation ------------------------------------------------------------------------------------


def _read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 if there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata, which viewers ignore
        return 1


def _read_shape(image: Image.Image) -> tuple[int, int]:
    """Returns the rows and columns of an upright image; loads a PNG, which may end with EXIF."""
    columns, rows = image.size
    # Pillow turns a TIFF by itself, and deletes the orientation when it has loaded the image.
    is_transposed = image.format != "TIFF" and ORIENTATIONS.get(_read_orientation(image), (0,))[0]
    return (columns, rows) if is_transposed else (rows, columns)


def _turn_upright(pixels: Num[np.ndarray, "Y X"], image: Image.Image) -> Num[np.ndarray, "V U"]:
    """Returns the pixels of a loaded image upright."""
    is_transposed, reverses_rows, reverses_columns = ORIENTATIONS.get(
        _read_orientation(image), (False, False, False)
    )
    pixels = pixels.T if is_transposed else pixels
    pixels = pixels[:: -1 if reverses_rows else 1, :: -1 if reverses_columns else 1]
    return np.ascontiguousarray(pixels)


# 16-bit colour ----------------------------------------------------------------------------------


def _find_colour_layout(image: Image.Image) -> str:
    """Returns the layout of an image of 16 bits a channel, as `RGB;16B`; "" for other images.

    Raises:
      ImageError: if it is a layout whose low bytes cannot be decoded.
    """
    if image.mode.startswith(("I", "F")):
        return ""
    is_separate = image.format == "TIFF" and (
        image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == SEPARATE_PLANES  # type: ignore[attr-defined]
        and 16 in image.tag_v2.get(ExifTags.Base.BitsPerSample, ())  # type: ignore[attr-defined]
    )
    for tile in image.tile:  # type: ignore[attr-defined]
        layout = tile.args if isinstance(tile.args, str) else next(iter(tile.args or ()), "")
        if not is_separate and not (isinstance(layout, str) and ";16" in layout):
            continue
        if is_separate or layout.partition(";")[0] not in COLOUR_LAYOUTS:
            raise ImageError("has 16 bits a channel in an unusual layout; save it as 16-bit grey")
        return layout
    return ""


def _read_channels(data: bytes, layout: str) -> Num[np.ndarray, "Y X C"]:
    """Reads the channels of an image of 16 bits a channel, of which Pillow keeps the high bytes.

    Decoded in the other byte order, the low bytes take the place of the high ones.
    """
    if layout == "LA;16B":  # four bytes a pixel, like RGBA of 8 bits
        return np.ascontiguousarray(_read_bytes(data, layout, "RGBA")).view(">u2").astype(np.uint16)
    native, foreign = ("L", "B") if sys.byteorder == "little" else ("B", "L")
    other = {"L": "B", "B": "L", "N": foreign}[layout[-1]]
    high, low = (_read_bytes(data, layout, new) for new in (layout, layout[:-1] + other))
    return high.astype(np.uint16) << 8 | low


def _read_bytes(data: bytes, layout: str, new_layout: str) -> UInt8[np.ndarray, "Y X C"]:
    """Decodes an image with another layout of its bytes."""
    with _open(data) as image:
        image.tile = [  # type: ignore[attr-defined]
            tile._replace(
                args=(new_layout, *tile.args[1:]) if isinstance(tile.args, tuple) else new_layout
            )
            for tile in image.tile  # type: ignore[attr-defined]
        ]
        return np.asarray(image)


def _read_luminance(data: bytes, layout: str) -> Num[np.ndarray, "Y X"]:
    """Reads an image of 16 bits a channel as grey of 16 bits, transparent pixels black."""
    channels = _read_channels(data, layout)
    colours, alpha = _split_alpha(channels)
    luminance = colours[..., 0] if colours.shape[-1] == 1 else grey.convert_to_luminance(colours)
    if alpha is None:
        return luminance
    return np.round(luminance * (alpha / (2 ** grey.find_bit_depth(alpha) - 1)))


def _split_alpha(
    channels: Num[np.ndarray, "Y X C"],
) -> tuple[Num[np.ndarray, "Y X N"], Num[np.ndarray, "Y X"] | None]:
    """Returns the channels of colour, and that of alpha if there are two or four."""
    has_alpha = channels.shape[-1] in (2, 4)
    return (channels[..., :-1], channels[..., -1]) if has_alpha else (channels, None)


# Masks ------------------------------------------------------------------------------------------


def read_mask(
    path: Path, shape: tuple[int, int], rows: int, columns: int
) -> Bool[np.ndarray, "{rows} {columns}"]:
    """Reads a mask of an image of `shape`, resized to `rows` and `columns`.

    Like its image, a mask is turned upright. True is what is at least half as bright as the
    brightest pixel, so that neither soft edges nor the ripples of JPEG count. A pixel of colour is
    as bright as its brightest channel, and a transparent one is background. Where all opaque pixels
    are black, the opaque ones are the mask. A palette without black has its background at index 0.

    Raises:
      ValueError: if it is missing, unreadable, not of `shape`, or shows several labels.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"mask {quoting.quote_path(path.name)} cannot be read ({error.strerror})"
        ) from None
    try:
        if dicom.is_dicom(data):
            raise ImageError("is DICOM; save it as PNG")
        with _open(data) as image:
            _check_frames(image)
            # Before anything is decoded: a broken header may promise millions of rows.
            mask_shape = image.height, image.width
            if sorted(mask_shape) == sorted(shape):
                values = _turn_upright(_read_brightness(image, data), image)
                mask_shape = values.shape
            if mask_shape != shape:
                remedy = "; turn it like its upright image" if mask_shape == shape[::-1] else ""
                raise ImageError(
                    f"has {mask_shape[0]} x {mask_shape[1]} pixels, "
                    f"its image {shape[0]} x {shape[1]}{remedy}"
                )
            is_lossy = image.format in LOSSY_FORMATS
        mask = _find_foreground(values, is_lossy)
    except Exception as error:  # as in `read_image`
        raise ImageError(
            f"mask {quoting.quote_path(path.name)} {_describe_error(error, data)}"
        ) from None
    return transforms.resize_image(mask.astype(np.uint8) * 255, rows, columns) >= 128


def describe_mask(mask: Bool[np.ndarray, "Y X"]) -> str:
    """Returns what is odd about a mask: EMPTY, FULL, FRAME if it has the whole border, or ""."""
    if not mask.any():
        return EMPTY
    if mask.all():
        return FULL
    is_border = np.ones(mask.shape, bool)
    is_border[1:-1, 1:-1] = False
    return FRAME if mask[is_border].all() else ""


def _read_brightness(image: Image.Image, data: bytes) -> Num[np.ndarray, "Y X"]:
    """Returns the brightest channel of each pixel of a mask, 0 where it is transparent."""
    layout = _find_colour_layout(image)
    indices = np.asarray(image) if image.mode == "P" else None
    if layout:
        channels = _read_channels(data, layout)
        image.load()
    elif image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;"):
        image = image.convert("L") if image.mode == "1" else image
        channels = np.asarray(image)[..., None]
        if "transparency" in image.info and image.mode == "L":
            channels = np.asarray(image.convert("LA"))
        if _is_white_zero(image):
            channels = channels.max() - channels
    else:
        has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
        has_alpha = has_alpha or "transparency" in image.info
        channels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    if not np.isfinite(channels).all():
        raise ImageError("has pixels that are NaN or infinite")
    colours, alpha = _split_alpha(channels)
    values = colours.max(-1)
    is_opaque = np.ones(values.shape, bool) if alpha is None else alpha >= max(alpha.max(), 1) / 2
    if indices is not None and is_opaque.all() and values.all():
        values = np.where(indices == 0, 0, values)
    elif indices is not None and not values[is_opaque].any():
        values = indices
    elif not values[is_opaque].any() and not is_opaque.all():
        return is_opaque.astype(np.uint8)
    values = np.where(is_opaque, values, 0)
    if colours.shape[-1] == 3 and image.format not in LOSSY_FORMATS:
        _check_colours(np.where(values > 0, colours.astype(np.int64) @ CODE_OF_COLOUR, 0))
    return values


def _check_colours(codes: Int[np.ndarray, "Y X"]) -> None:
    """Raises ImageError if two colours, given by numbers of which 0 is background, have areas."""
    if len(np.unique(codes)) > FEW_LEVELS:
        return  # soft edges
    if (count := np.count_nonzero(np.unique(codes[_is_flat(codes)]))) > 1:
        raise ImageError(
            f"has {count} colours beside its background, as of several labels or of a background "
            "that is not black; save one mask of 0 and 255 for each"
        )


def _is_flat(values: Num[np.ndarray, "Y X"]) -> Bool[np.ndarray, "Y X"]:
    """Returns which pixels have the value of all their neighbours, as those of an area have."""
    return ndimage.minimum_filter(values, 3) == ndimage.maximum_filter(values, 3)


def _reduce_blocks(values: Num[np.ndarray, "Y X"]) -> Num[np.ndarray, "V U"]:
    """Returns one pixel of each block of equal pixels, as enlarging by nearest neighbour makes."""
    picture = values
    for _ in range(2):
        is_step = (picture[1:] != picture[:-1]).any(1)
        size = np.gcd.reduce(np.append(np.flatnonzero(is_step) + 1, len(picture)))
        picture = picture[::size].T
    return picture if min(picture.shape) >= MIN_DRAWN else values


def _find_foreground(values: Num[np.ndarray, "Y X"], is_lossy: bool) -> Bool[np.ndarray, "Y X"]:
    """Returns which pixels of a mask are at least half as bright as its brightest one.

    Raises:
      ImageError: if pixels of a brightness between have an area of their own, as several labels do,
        or if it is an image, or a map too dark to say what is white.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0:
        raise ImageError(f"has pixels from {low:g} to {high:g}; save it with 0 and 255")
    levels = np.unique(values)
    is_exact = len(levels) <= FEW_LEVELS and not is_lossy
    margin = 0 if is_exact else high * RIPPLE
    if len(levels) > FEW_LEVELS:
        _check_range(values, margin)
    picture = values if is_exact else _reduce_blocks(values)
    is_between = (picture > margin) & (picture < high - margin)
    if is_between.any():
        area = (is_between & _is_flat(picture)).sum() / max((picture > margin).sum(), 1)
        if area > (0 if is_exact else MAX_FLAT):
            names = ", ".join(f"{level:g}" for level in levels[:FEW_LEVELS])
            raise ImageError(
                f"has the grey levels {names}{' ...' * (len(levels) > FEW_LEVELS)}, as of several "
                "labels; save one mask of 0 and 255 for each"
            )
    return (values >= high / 2) & (values > 0)


def _check_range(values: Num[np.ndarray, "Y X"], margin: float) -> None:
    """Raises ImageError if many grey levels are those of an image, or do not reach white.

    White is the smallest of those in use that is not exceeded: 1 of real pixels, else 255, 1023 ...
    """
    high = float(values.max())
    whites = (1, *grey.WHITES) if np.issubdtype(values.dtype, np.floating) else grey.WHITES
    white = next((w for w in whites if high <= w * (1 + grey.UNIT_TOLERANCE)), high)
    if high < white / 2:
        raise ImageError(
            f"is too dark to tell its foreground: its brightest pixel is {high:g} of {white:g}; "
            "threshold it yourself, and save it with 0 and 255"
        )
    if ((values > margin) & (values < high - margin)).mean() > MAX_SOFT:
        raise ImageError("looks like an image, not a mask; save a mask of 0 and 255")

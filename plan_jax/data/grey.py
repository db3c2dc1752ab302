"""Grey values of any depth as 8-bit grey, so that films of one kind stay comparable.

An image file rarely says how many of its bits a detector used. The scale is therefore one of the
usual bit depths, never the image's own maximum: two films of one detector differ in their maxima,
and stretching each to its own would change their exposure against each other.
"""

import numpy as np
from jaxtyping import Num, UInt8

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of detectors and of the files that they write
WHITES = tuple(2**depth - 1 for depth in BIT_DEPTHS)
MAX_MARKER = 0.05  # largest fraction of an image that burnt-in letters and lines cover
MAX_FRAME = 0.5  # largest fraction that a white frame around the film covers
UNIT_TOLERANCE = 0.05  # how far resampling moves pixels beyond black and white, white being 1
MAX_OVERSHOOT = 0.001  # largest fraction of whole grey values that are moved so
MIN_REAL_WHITE = 16  # real pixels whose maximum lies between 1 and this have an unknown white
LUMINANCE = np.asarray([0.299, 0.587, 0.114], np.float32)  # of ITU-R 601, as in Pillow


class ImageError(ValueError):
    """A fault of an image, as the end of a sentence that begins with the name of its file."""

    def __init__(self, message: str):
        """Initialises the fault; what a damaged file says of itself may not be printable."""
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def scale_to_uint8(pixels: Num[np.ndarray, "Y X"], bit_depth: int = 0) -> UInt8[np.ndarray, "Y X"]:
    """Scales pixels to 8 bits: real pixels from 0 to 1 by 255, others by their bit depth.

    >>> scale_to_uint8(np.asarray([[0, 2048, 4095]], np.uint16)).tolist()
    [[0, 128, 255]]
    >>> scale_to_uint8(np.asarray([[0, 0.5, 1]], np.float32)).tolist()
    [[0, 128, 255]]

    Args:
      pixels: grey values, 0 is black; real ones may be a little below it, as after resampling.
      bit_depth: their depth (0: that of `find_bit_depth`); brighter pixels become white.

    Raises:
      ImageError: for pixels that are negative or not numbers, more than 16 bits, or real pixels
        whose white is unknown.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():  # NaN is the minimum and the maximum
        raise ImageError("has pixels that are NaN or infinite")
    if is_unit(pixels):
        return clip_to_uint8(pixels, 0.0, 1.0)
    tolerance = UNIT_TOLERANCE if np.issubdtype(pixels.dtype, np.floating) else 0.0
    if low < -tolerance * high or high < 0 or high > WHITES[-1] * (1 + tolerance):
        raise ImageError(
            f"has pixels from {low:g} to {high:g}, not 0 to 65535; shift or scale them"
        )
    if high < MIN_REAL_WHITE and np.any(pixels % 1):
        raise ImageError(
            f"has real pixels from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255; scale them"
        )
    return clip_to_uint8(pixels, 0.0, 2.0 ** (bit_depth or find_bit_depth(pixels)) - 1)


def is_unit(pixels: Num[np.ndarray, "Y X"]) -> bool:
    """Returns whether pixels are real numbers from 0 to 1, up to the overshoot of resampling."""
    is_real = np.issubdtype(pixels.dtype, np.floating)
    low, high = -UNIT_TOLERANCE, 1 + UNIT_TOLERANCE
    return bool(is_real and low <= pixels.min() and pixels.max() <= high)


def find_bit_depth(pixels: Num[np.ndarray, "*N"]) -> int:
    """Returns the smallest depth of `BIT_DEPTHS` that holds an image, aside from burnt-in markers.

    A marker is a small part of the image that lies far beyond all the rest, as a letter of 65535 on
    a film of 12 bits does. A frame of one value, the largest of a depth, may be half of the image.
    Neither do single pixels count that lie just beyond, as resampling leaves them.

    >>> film = np.arange(4096)
    >>> find_bit_depth(film), find_bit_depth(np.append(film, [65535] * 50))
    (12, 12)

    Args:
      pixels: grey values from 0 to 65535.
    """
    largest = float(pixels.max())
    for depth in BIT_DEPTHS:
        white = 2**depth - 1
        if largest <= white:
            return depth
        is_beyond = pixels > white
        fraction = is_beyond.mean()
        if fraction <= MAX_OVERSHOOT and largest <= white * (1 + UNIT_TOLERANCE):
            return depth
        if fraction > MAX_FRAME or (fraction > MAX_MARKER and largest not in WHITES):
            continue
        marker = pixels[is_beyond]
        # A film of this depth uses a good part of it, or the small part is the picture itself.
        is_film = pixels[~is_beyond].max() > white / 4
        is_marker = fraction <= MAX_MARKER or marker.min() == largest
        if is_film and is_marker and np.median(marker) > 3 * white:
            return depth
    return BIT_DEPTHS[-1]


def clip_to_uint8(
    pixels: Num[np.ndarray, "Y X"], black: float, white: float
) -> UInt8[np.ndarray, "Y X"]:
    """Scales pixels so that `black` becomes 0 and `white` 255; those beyond are clipped."""
    if black == white:
        return np.zeros(pixels.shape, np.uint8)
    unit = (pixels.astype(np.float64) - black) / (white - black)
    return np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def convert_to_luminance(colours: Num[np.ndarray, "Y X 3"]) -> Num[np.ndarray, "Y X"]:
    """Converts red, green and blue to luminance, rounded to whole grey values."""
    return np.round(colours.astype(np.float32) @ LUMINANCE)

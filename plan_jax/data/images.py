"""Reading of radiographs as 8-bit grey: PNG or JPEG, 8 or 16 bits, colour, alpha, DICOM."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Num, UInt8
from PIL import Image, UnidentifiedImageError

from plan_jax.data import transforms
from plan_jax.types import UserError

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of detectors and of the files that they write


def read_image(path: Path, size: int) -> tuple[UInt8[np.ndarray, "Y X"], tuple[int, int]]:
    """Reads an image as 8-bit grey with the longer side `size`, and its original rows and columns.

    Colour becomes luminance, and transparent pixels become black. More than 8 bits are scaled by
    the smallest usual depth that holds the image's maximum, so a 12-bit radiograph in a 16-bit file
    keeps its contrast. For DICOM, see `decode_dicom`.

    Raises:
      OSError, ValueError: if the file is missing or is not a readable image.
      UserError: if it is DICOM and pydicom is not installed.
    """
    data = path.read_bytes()
    if data[128:132] == b"DICM":
        pixels = decode_dicom(data, path)
        shape = pixels.shape
    else:
        try:
            with Image.open(io.BytesIO(data)) as image:
                shape = image.height, image.width
                if image.mode in ("L", "RGB"):
                    # A JPEG decoder skips the finest frequencies of an image far larger than this.
                    image.draft("L", (2 * size, 2 * size))
                pixels = _convert_to_grey(image)
        except Exception as error:  # decoders raise many kinds for a broken file
            raise ValueError(_describe_error(error)) from None
    return transforms.resize_image(pixels, *transforms.scale_shape(shape, size)), shape


def _describe_error(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not an image"
    return (str(error) or type(error).__name__).splitlines()[0]


def read_mask(
    path: Path, shape: tuple[int, int], rows: int, columns: int
) -> Bool[np.ndarray, "{rows} {columns}"]:
    """Reads a mask (non-zero is True) of an image of `shape`, resized to `rows` and `columns`.

    Raises:
      OSError, ValueError: if it is missing, unreadable, or not of `shape`.
    """
    with Image.open(path) as image:
        if (image.height, image.width) != shape:
            raise ValueError(
                f"mask {path.name} has {image.height} x {image.width} pixels, "
                f"its image {shape[0]} x {shape[1]}"
            )
        pixels = np.asarray(image)
    mask = np.any(pixels.reshape(*shape, -1), axis=-1)  # any channel of a coloured mask
    return transforms.resize_image(mask.astype(np.uint8) * 255, rows, columns) >= 128


def decode_dicom(data: bytes, path: Path) -> UInt8[np.ndarray, "Y X"]:
    """Decodes the pixels of a DICOM file: rescaled, windowed if the file has a window.

    MONOCHROME1 is inverted, so that bone is bright in every image.

    Args:
      data: content of the file.
      path: its path, for messages.

    Raises:
      UserError: if pydicom is not installed.
      ValueError: if the pixels cannot be read.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UserError(f"image {path} is DICOM; pip install plan-jax[dicom]") from None
    try:
        dicom = pydicom.dcmread(io.BytesIO(data))
        pixels = apply_voi_lut(apply_modality_lut(dicom.pixel_array, dicom), dicom)
    except Exception as error:  # pydicom raises many kinds, each for a file it cannot read
        raise ValueError(f"is not readable as DICOM: {type(error).__name__}") from None
    if pixels.ndim != 2:
        raise ValueError(f"has {pixels.ndim} dimensions, not rows and columns of grey")
    pixels = pixels.astype(np.float64) - pixels.min()
    pixels *= 255 / max(float(pixels.max()), 1e-9)  # an image of one value stays black
    if dicom.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    return np.round(pixels).astype(np.uint8)


def _convert_to_grey(image: Image.Image) -> UInt8[np.ndarray, "Y X"]:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits; Pillow's own conversion clips at 255
        return scale_to_uint8(np.asarray(image).astype(np.float32))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def scale_to_uint8(pixels: Num[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X"]:
    """Scales pixels to 8 bits by the smallest depth of `BIT_DEPTHS` that holds their maximum.

    >>> scale_to_uint8(np.asarray([[0, 2048, 4095]], np.uint16)).tolist()
    [[0, 128, 255]]

    Raises:
      ValueError: for negative pixels, or more than 16 bits.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high < 2**16:
        raise ValueError(f"has pixels from {low:g} to {high:g}, not 0 to 65535")
    white = next(2**depth - 1 for depth in BIT_DEPTHS if high <= 2**depth - 1)
    return np.round(pixels * (255 / white)).astype(np.uint8)

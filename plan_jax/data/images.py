"""Reading radiographs as they come: PNG, JPEG, 16 bits, colour, alpha, DICOM -> 8-bit grey."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Num, UInt8
from PIL import Image, UnidentifiedImageError

from plan_jax.data import transforms
from plan_jax.types import UserError

DEPTHS = (8, 10, 12, 14, 16)


def read_image(path: Path, size: int) -> tuple[UInt8[np.ndarray, "Y X"], tuple[int, int]]:
    """Read an image as 8-bit grey with the longer side `size`; also its own rows and columns.

    Colour becomes luminance, what is transparent black. More than 8 bits are scaled from the
    smallest usual depth that holds the image's largest value (a 12-bit radiograph in a 16-bit file
    keeps its contrast). DICOM: see `read_dicom`.

    Raises:
      OSError, ValueError: if the file is missing or no readable image.
      UserError: if it is DICOM and pydicom is not installed.
    """
    data = path.read_bytes()
    if data[128:132] == b"DICM":
        pixels = read_dicom(data, path)
        shape = pixels.shape
    else:
        try:
            with Image.open(io.BytesIO(data)) as image:
                shape = image.height, image.width
                if image.mode in ("L", "RGB"):
                    image.draft("L", (2 * size, 2 * size))  # a JPEG far larger decodes smaller
                pixels = _grey(image)
        except Exception as error:  # decoders raise many kinds for a broken file
            raise ValueError(_reason(error)) from None
    return transforms.resize(pixels, *transforms.longest_side(shape, size)), shape


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no image"
    return (str(error) or type(error).__name__).splitlines()[0]


def read_mask(path: Path, shape: tuple[int, int], y: int, x: int) -> Bool[np.ndarray, "{y} {x}"]:
    """Read a mask (non-zero is True) of an image of `shape`, resized to y rows and x columns.

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
    marked = pixels.reshape(*shape, -1).any(axis=-1)
    return transforms.resize(marked.astype(np.uint8) * 255, y, x) >= 128


def read_dicom(data: bytes, path: Path) -> UInt8[np.ndarray, "Y X"]:
    """Read the pixels of a DICOM file: rescaled, windowed if it says how, MONOCHROME1 inverted.

    Raises:
      UserError: if pydicom is not installed.
      ValueError: if the pixels cannot be read.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UserError(f"image {path} is DICOM; install the extra: plan-jax[dicom]") from None
    try:
        found = pydicom.dcmread(io.BytesIO(data))
        pixels = apply_voi_lut(apply_modality_lut(found.pixel_array, found), found)
    except Exception as error:  # pydicom raises many kinds, each for a file it cannot read
        raise ValueError(f"not readable as DICOM: {type(error).__name__}") from None
    if pixels.ndim != 2:
        raise ValueError(f"has {pixels.ndim} dimensions, not rows and columns of grey")
    pixels = pixels.astype(np.float64) - pixels.min()
    pixels *= 255 / max(float(pixels.max()), 1e-9)
    if found.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    return np.round(pixels).astype(np.uint8)


def _grey(image: Image.Image) -> UInt8[np.ndarray, "Y X"]:
    if image.mode.startswith(("I", "F")):
        return scale_depth(np.asarray(image).astype(np.float32))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def scale_depth(pixels: Num[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X"]:
    """Scale pixels of any depth to 8 bits, from the smallest usual depth that holds their maximum.

    >>> scale_depth(np.asarray([[0, 2048, 4095]], np.uint16)).tolist()
    [[0, 128, 255]]

    Raises:
      ValueError: for negative pixels, or more than 16 bits.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high < 2**16:
        raise ValueError(f"has pixels from {low:g} to {high:g}, not 0 to 65535")
    full = next(2**depth - 1 for depth in DEPTHS if high <= 2**depth - 1)
    return np.round(pixels * (255 / full)).astype(np.uint8)

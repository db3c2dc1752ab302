"""Readers of pixels in formats that are those of one dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from plan_jax.data import grey, transforms
from plan_jax.data.grey import ImageError

JSRT_SIDE = 2048  # rows and columns of a film of JSRT
JSRT_BLACK = 4095.0  # the largest number of 12 bits is the darkest pixel

# Takes a file and the longer side of the result. Returns grey values, and the original rows and
# columns. Raises OSError or ValueError if the file cannot be read.
Reader: TypeAlias = Callable[[Path, int], tuple[UInt8[np.ndarray, "Y X"], tuple[int, int]]]


def read_jsrt(path: Path, size: int) -> tuple[UInt8[np.ndarray, "Y X"], tuple[int, int]]:
    """Reads a film of JSRT as grey (Y, X) with the longer side `size`, and its rows and columns.

    The file has no header: 2048 x 2048 numbers of 16 bits, the high byte first, of which 12 bits
    are used. High numbers are dark; numbers beyond 12 bits are black.

    Raises:
      OSError, ValueError: if the file is missing or has another length.
    """
    data = path.read_bytes()
    if not data:
        raise ImageError("is an empty file")
    if len(data) != 2 * JSRT_SIDE**2:
        raise ImageError(f"has {len(data):,} bytes, not the {2 * JSRT_SIDE**2:,} of a film of JSRT")
    density = np.frombuffer(data, ">u2").reshape(JSRT_SIDE, JSRT_SIDE)
    darkness = grey.clip_to_uint8(density, 0.0, JSRT_BLACK)
    shape = JSRT_SIDE, JSRT_SIDE
    new_shape = transforms.scale_shape(shape, size)
    # The mean over an area, as of all public images.
    return transforms.resize_image(255 - darkness, *new_shape, Image.Resampling.BOX), shape


# Item.pixels -> the reader of its file.
READERS: dict[str, Reader] = {"jsrt": read_jsrt}

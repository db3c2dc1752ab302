"""Layers of a picture that lie over each other in the browser: film, heat, contour, boxes.

A layer is an RGBA picture [V U 4] of the film's proportions.
"""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from plan_jax.data import transforms
from plan_jax.page import figures

SIDE = 640  # pixels of the longer side of a film
CONTOUR_COLOUR = (0, 229, 255)
BOX_COLOUR = (255, 255, 255)
CAPTION_ROWS = 22


def show_film(
    picture: UInt8[np.ndarray, "V U 1"], side: int = SIDE
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Returns a film as RGB whose longer side has `side` pixels."""
    rows, columns = transforms.scale_shape(picture.shape[:2], side)
    grey = Image.fromarray(picture[..., 0]).resize((columns, rows), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def paint_heat(
    heat_map: Float[np.ndarray, "V U"], limits: tuple[float, float]
) -> UInt8[np.ndarray, "V U 4"]:
    """Returns the colours of a map: transparent up to the lower limit, opaque from the upper one.

    Args:
      heat_map: the map.
      limits: the ends of the colour scale; if they are equal, nothing is painted.
    """
    low, high = limits
    strength = np.zeros(heat_map.shape, np.float32)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        strength = np.clip((np.nan_to_num(heat_map, nan=low) - low) / (high - low), 0, 1)
    levels = (strength * 255).round().astype(np.uint8)
    return np.concatenate([figures.heat_colours()[levels], levels[..., None]], axis=2)


def draw_contour(mask: Bool[np.ndarray, "V U"], width: int = 3) -> UInt8[np.ndarray, "V U 4"]:
    """Returns a line of `width` pixels around a mask, outside of it."""
    ring = binary_dilation(mask, iterations=width) & ~mask if mask.any() else mask
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[ring] = (*CONTOUR_COLOUR, 255)
    return layer


def draw_boxes(
    boxes: Float[np.ndarray, "N 4"], scores: Float[np.ndarray, " N"], shape: tuple[int, int]
) -> UInt8[np.ndarray, "V U 4"]:
    """Returns boxes (x0, y0, x1, y1; pixels of the layer) with the highest value in each."""
    layer = Image.new("RGBA", shape[::-1])
    canvas, font = ImageDraw.Draw(layer), ImageFont.load_default(max(12, max(shape) // 26))
    for (x0, y0, x1, y1), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        rectangle = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
        canvas.rectangle(rectangle, outline=(*BOX_COLOUR, 255), width=max(1, max(shape) // 240))
        place = (x0 + 4, y0 + 2)
        canvas.text(
            place, f"{score:.2f}", fill=(*BOX_COLOUR, 255), font=font, stroke_width=2,
            stroke_fill=(0, 0, 0, 255),
        )  # fmt: skip
    return np.asarray(layer)


def compose(
    film: UInt8[np.ndarray, "V U 3"],
    heat: UInt8[np.ndarray, "V U 4"],
    lines: list[UInt8[np.ndarray, "V U 4"]],
    opacity: float,
    *,
    marks_sides: bool = True,
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a film with the heat over it, lines over both, and the patient's sides.

    Args:
      film: the film.
      heat: what `paint_heat` returns.
      lines: layers that are not made transparent.
      opacity: of the heat, 0 to 1.
      marks_sides: whether R and L are written where a frontal film has them.
    """
    picture = film.astype(np.float32)
    for layer, factor in [(heat, opacity), *((layer, 1.0) for layer in lines)]:
        alpha = layer[..., 3:].astype(np.float32) / 255 * factor
        picture = (picture * (1 - alpha) + layer[..., :3] * alpha).astype(np.float32)
    mixed = picture.round().astype(np.uint8)
    return mark_sides(mixed) if marks_sides else mixed


def mark_sides(picture: UInt8[np.ndarray, "V U 3"]) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a frontal film with R and L in its upper corners: the patient faces the viewer."""
    image = Image.fromarray(picture)
    rows, columns = picture.shape[:2]
    size = max(12, max(rows, columns) // 24)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    options: dict[str, Any] = {
        "fill": (255, 255, 255),
        "stroke_width": 2,
        "stroke_fill": (0, 0, 0),
        "font": font,
    }
    canvas.text((size // 2, size // 3), "R", anchor="lt", **options)
    canvas.text((columns - size // 2, size // 3), "L", anchor="rt", **options)
    return np.asarray(image)


def add_caption(picture: UInt8[np.ndarray, "V U 3"], text: str) -> UInt8[np.ndarray, "_ U 3"]:
    """Returns a picture with a line of text above it, shortened to its width."""
    strip = Image.new("RGB", (picture.shape[1], CAPTION_ROWS), (0, 0, 0))
    canvas, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    # The font in the box has no letters beyond Latin.
    line = text.encode("latin-1", "replace").decode("latin-1")
    while line and canvas.textlength(line, font=font) > picture.shape[1] - 8:
        line = f"{line.removesuffix('...')[:-1]}..." if len(line) > 4 else ""
    canvas.text((4, 3), line, fill=(255, 255, 255), font=font)
    return np.concatenate([np.asarray(strip), picture])


def encode_layer(layer: Shaped[np.ndarray, "V U C"]) -> bytes:
    """Returns a picture [V U 3] or [V U 4] as the bytes of a PNG, quickly rather than small."""
    stream = io.BytesIO()
    Image.fromarray(layer).save(stream, "PNG", compress_level=2)
    return stream.getvalue()


def to_address(content: bytes, kind: str = "image/png") -> str:
    """Returns an address that contains a file itself, so that none has to be kept."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

"""Pictures over radiographs: heat maps, outlines of the truth, masks and boxes.

Pictures are RGB arrays [V U 3] of V x U pixels: the radiograph's Y x X pixels, enlarged.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

from plan_jax.types import BoxExample, MaskExample, PhraseExample

TRUTH_COLOUR = (0, 229, 255)
PREDICTION_COLOUR = (251, 139, 36)
SIDE = 288  # pixels of the longer side of a picture, about
GAP = 6  # white pixels between the pictures of a strip


def radiograph(
    image: UInt8[np.ndarray, "Y X 1"],
    truth: Bool[np.ndarray, "Y X"] | None = None,
    *,
    side: int = SIDE,
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a radiograph as RGB, enlarged to about `side` pixels, with the truth outlined."""
    # A whole factor keeps every pixel of a mask the same size.
    factor = max(1, round(side / max(image.shape[:2])))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    grey = Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC)
    picture = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    return picture if truth is None else draw_outline(picture, truth)


def draw_outline(
    picture: UInt8[np.ndarray, "V U 3"], truth: Bool[np.ndarray, "Y X"]
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a picture with a line two pixels wide around the truth, outside of it."""
    mask = _enlarge_mask(truth, picture)
    ring = binary_dilation(mask, iterations=2) & ~mask
    return np.where(ring[..., None], np.array(TRUTH_COLOUR, np.uint8), picture)


def heat_limits(heat_maps: Float[np.ndarray, "*N y x"]) -> tuple[float, float]:
    """Returns one colour scale (low, high) for maps that are to be compared.

    `low` is one standard deviation above the mean of all values, so that the usual level and the
    noise around it stay unpainted. `high` is the largest value. Equal limits mean that there is
    nothing to paint. Values that are not finite are ignored.
    """
    values = np.asarray(heat_maps, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0
    high = float(values.max())
    # Rounding may put the mean of a constant map above its maximum.
    return min(float(values.mean() + values.std()), high), high


def overlay_heat_map(
    image: UInt8[np.ndarray, "Y X 1"],
    heat_map: Float[np.ndarray, "y x"],
    truth: Bool[np.ndarray, "Y X"] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    side: int = SIDE,
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a radiograph with a heat map in colour over it, transparent where it is low.

    Args:
      image: the radiograph.
      heat_map: a map of any size; it is resized bilinearly between pixel centres, as in metrics.
      truth: the mask to outline, if any.
      limits: the colour scale of `heat_limits`; by default that of this map alone.
      side: pixels of the picture's longer side, about.
    """
    low, high = heat_limits(heat_map) if limits is None else limits
    picture = radiograph(image, side=side)
    heat = Image.fromarray(np.nan_to_num(np.asarray(heat_map, np.float32), nan=low))
    heat_VU = np.asarray(heat.resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    # A constant map has no contrast to show; dividing by rounding errors would paint noise.
    if high - low > 1e-6 * max(abs(low), abs(high)):
        strength_VU = np.clip((heat_VU - low) / (high - low), 0, 1)
        colour_VU3 = heat_colours()[(strength_VU * 255).astype(int)]
        opacity_VU1 = 0.85 * strength_VU[..., None]
        mixed_VU3 = picture * (1 - opacity_VU1) + colour_VU3 * opacity_VU1
        picture = mixed_VU3.round().astype(np.uint8)
    return picture if truth is None else draw_outline(picture, truth)


def phrase_pictures(example: PhraseExample, side: int = SIDE) -> list[UInt8[np.ndarray, "V U 3"]]:
    """Returns the radiograph, its truth, and the heat map after each round, as [V U 3] pictures."""
    # One scale for all rounds, or a weak map would be painted as strongly as a strong one.
    limits = heat_limits(example.heat_maps)
    plain = radiograph(example.image, side=side)
    heat_maps = [
        overlay_heat_map(example.image, heat_map, example.truth, limits=limits, side=side)
        for heat_map in example.heat_maps
    ]
    return [plain, draw_outline(plain, example.truth), *heat_maps]


def phrase_captions(example: PhraseExample) -> list[str]:
    """Returns the captions of `phrase_pictures`."""
    num_maps = len(example.heat_maps)
    rounds = [f"round {i}" for i in range(num_maps)] if num_maps > 1 else ["heat map"]
    return ["radiograph", "truth", *rounds]


def concatenate(
    pictures: Sequence[UInt8[np.ndarray, "V _ 3"]],
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns pictures of one height [V _ 3] as a single picture [V U 3], from left to right."""
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)]
    return np.concatenate(parts[1:], axis=1)


def mask_picture(example: MaskExample, side: int = SIDE) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a radiograph with the predicted mask tinted and the true one outlined."""
    picture = radiograph(example.image, side=side)
    tinted = (0.55 * picture + 0.45 * np.asarray(PREDICTION_COLOUR)).round().astype(np.uint8)
    predicted = _enlarge_mask(example.predicted, picture)
    return draw_outline(np.where(predicted[..., None], tinted, picture), example.truth)


def box_picture(
    example: BoxExample, side: int = SIDE, max_boxes: int = 6, min_score: float = 0.2
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a radiograph with its true boxes and the best predicted ones, with their scores.

    At most `max_boxes` predictions are drawn, none with a score below `min_score`.
    """
    pixels = radiograph(example.image, side=side)
    shape = example.image.shape[:2]
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    for box in example.truth:
        canvas.rectangle(_to_rectangle(box, shape, pixels), outline=TRUTH_COLOUR, width=2)
    is_shown = example.scores[:max_boxes] >= min_score
    return draw_boxes(
        np.asarray(picture),
        example.predicted[:max_boxes][is_shown],
        example.scores[:max_boxes][is_shown],
        shape,
    )


def draw_boxes(
    picture: UInt8[np.ndarray, "V U 3"],
    boxes: Float[np.ndarray, "N 4"],
    scores: Float[np.ndarray, " N"],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, "V U 3"]:
    """Returns a picture with predicted boxes and their scores.

    Args:
      picture: the picture.
      boxes: (x0, y0, x1, y1) in pixels of the image that the picture shows.
      scores: the scores.
      shape: rows and columns of that image.
    """
    drawing = Image.fromarray(picture)
    canvas = ImageDraw.Draw(drawing)
    for box, score in zip(boxes, scores, strict=True):
        rectangle = _to_rectangle(box, shape, picture)
        canvas.rectangle(rectangle, outline=PREDICTION_COLOUR, width=1)
        corner = (rectangle[0] + 3, rectangle[1] + 1)
        canvas.text(corner, f"{score:.2f}", fill=PREDICTION_COLOUR)
    return np.asarray(drawing)


def _to_rectangle(
    box: Float[np.ndarray, " 4"], shape: tuple[int, int], picture: UInt8[np.ndarray, "V U 3"]
) -> list[float]:
    scale_x, scale_y = picture.shape[1] / shape[1], picture.shape[0] / shape[0]
    x0, y0, x1, y1 = (
        float(coordinate) * scale
        for coordinate, scale in zip(box, (scale_x, scale_y) * 2, strict=True)
    )
    # Pillow includes the last row and column of a rectangle; boxes end before theirs.
    return [x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)]


def encode_picture(picture: Shaped[np.ndarray, "V U 3"], file_format: str = "PNG") -> bytes:
    """Returns a picture [V U 3] as the bytes of a PNG or JPEG file."""
    stream = io.BytesIO()
    # Chroma subsampling would blur the thin coloured outlines.
    options = {"quality": 90, "subsampling": 0} if file_format == "JPEG" else {}
    Image.fromarray(picture).save(stream, file_format, **options)
    return stream.getvalue()


def css_colour_bar() -> str:
    """Returns the colours of a heat map, from weak to strong, as a CSS gradient."""
    stops = heat_colours()[np.linspace(0, 255, 9).astype(int)]
    colours = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in stops)
    return f"linear-gradient(90deg, {colours})"


def _enlarge_mask(
    mask: Bool[np.ndarray, "Y X"], picture: UInt8[np.ndarray, "V U 3"]
) -> Bool[np.ndarray, "V U"]:
    """Returns a mask at the size of a picture."""
    return np.asarray(Image.fromarray(mask).resize(picture.shape[1::-1], Image.Resampling.NEAREST))


def import_matplotlib() -> ModuleType:
    """Returns matplotlib, whatever MPLBACKEND says.

    Matplotlib cannot be imported if the variable names a backend that is not installed, as it does
    in what a notebook starts. Files are drawn without a backend.
    """
    # Imported here: it takes a second, and most commands draw nothing.
    is_first, backend = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib

        if is_first and backend:
            # For whatever else draws in this process.
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    finally:
        if backend:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


@cache
def heat_colours() -> UInt8[np.ndarray, "256 3"]:
    """Returns 256 perceptually uniform colours, without the dark end, lost on a radiograph."""
    colours = import_matplotlib().colormaps["inferno"](np.linspace(0.3, 0.97, 256))[:, :3]
    return (colours * 255).round().astype(np.uint8)

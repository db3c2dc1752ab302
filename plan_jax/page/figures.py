"""Pictures: heat maps over radiographs, outlines of the truth, curves of a run.

Nothing here knows of models or tasks; tasks fill the two small rows that the page draws.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image
from scipy.ndimage import binary_dilation

from plan_jax.types import PhraseExample

OUTLINE = (0, 229, 255)
INK = "#010203"  # near black in a PNG; in an SVG replaced by the text colour of the page
LINES = ("#c2410c", "#0e7490", "#7c3aed", "#4d7c0f", "#be185d", "#64748b")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a line for each label, from that key of the history; level lines beside."""

    title: str
    lines: Mapping[str, str]
    levels: Mapping[str, float] = field(default_factory=dict)


def heat_scale(heats: Float[np.ndarray, "*N y x"]) -> tuple[float, float]:
    """Choose one colour scale for maps that are to be compared: nothing drawn below, full above.

    From one standard deviation above the mean of all values, so that the usual level and what
    moves about it is not painted, to the largest value. Equal ends mean: nothing to draw. Values
    that are not finite are ignored.
    """
    values = np.asarray(heats, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0
    high = float(values.max())
    return min(float(values.mean() + values.std()), high), high


def heat_over(
    image: UInt8[np.ndarray, "Y X 1"],
    heat: Float[np.ndarray, "y x"],
    truth: Bool[np.ndarray, "Y X"] | None = None,
    *,
    scale: tuple[float, float] | None = None,
    side: int = 288,
) -> UInt8[np.ndarray, "V U 3"]:
    """Lay a map over its radiograph in colour, transparent where it is low; outline the truth.

    `heat` of any size is resized bilinearly (pixel centres, as in the metrics); `scale` is (low,
    high) as from `heat_scale`, by default of this map alone; the picture [V U] is enlarged by a
    whole factor to about `side` pixels.
    """
    low, high = heat_scale(heat) if scale is None else scale
    picture = radiograph(image, side=side)
    size = picture.shape[1::-1]
    values = Image.fromarray(np.nan_to_num(np.asarray(heat, np.float32), nan=low))
    values = np.asarray(values.resize(size, Image.Resampling.BILINEAR))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        strength = np.clip((values - low) / (high - low), 0, 1)
        colour = _colours()[(strength * 255).astype(int)]
        alpha = 0.85 * strength[..., None]
        picture = (picture * (1 - alpha) + colour * alpha).round().astype(np.uint8)
    return picture if truth is None else outline(picture, truth)


def radiograph(
    image: UInt8[np.ndarray, "Y X 1"],
    truth: Bool[np.ndarray, "Y X"] | None = None,
    *,
    side: int = 288,
) -> UInt8[np.ndarray, "V U 3"]:
    """Enlarge a radiograph by a whole factor to about `side` pixels, as RGB; outline the truth."""
    factor = max(1, round(side / max(image.shape[:2])))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    grey = Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC)
    picture = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    return picture if truth is None else outline(picture, truth)


def outline(
    picture: UInt8[np.ndarray, "V U 3"], truth: Bool[np.ndarray, "Y X"]
) -> UInt8[np.ndarray, "V U 3"]:
    """Draw a line two pixels wide around the truth, outside of it, over a picture [V U]."""
    size = picture.shape[1::-1]
    mask = np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
    ring = binary_dilation(mask, iterations=2) & ~mask
    return np.where(ring[..., None], np.uint8(OUTLINE), picture)


def row_picture(row: PhraseExample, side: int = 288) -> UInt8[np.ndarray, "V U 3"]:
    """Put side by side: radiograph, its truth, the map after each round, on one colour scale."""
    parts = row_parts(row, side)
    gap = np.full((parts[0].shape[0], 6, 3), 255, np.uint8)
    return np.concatenate([x for part in parts for x in (part, gap)][:-1], axis=1)


def row_parts(row: PhraseExample, side: int = 288) -> list[UInt8[np.ndarray, "V U 3"]]:
    """Draw the pictures [V U 3] of a row: radiograph, truth, the map after each round."""
    scale = heat_scale(row.heat_maps)
    heats = [heat_over(row.image, h, row.truth, scale=scale, side=side) for h in row.heat_maps]
    plain = radiograph(row.image, side=side)
    return [plain, outline(plain, row.truth), *heats]


def encode(picture: Shaped[np.ndarray, "V U 3"], kind: str = "PNG") -> bytes:
    """Write a picture [V U 3] as the bytes of a PNG or JPEG file."""
    stream = io.BytesIO()
    options = {"quality": 90, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(picture).save(stream, kind, **options)
    return stream.getvalue()


def colour_bar() -> str:
    """Give the colours of a heat map, weak to strong, as a CSS gradient."""
    stops = _colours()[np.linspace(0, 255, 9).astype(int)]
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in stops)})"


def curves(
    history: Sequence[Mapping[str, Any]], panels: Sequence[Panel], columns: int = 3
) -> tuple[str, bytes]:
    """Draw panels over the steps of a history; the same figure as inline SVG and as PNG bytes.

    Each row of the history holds its `step` and any of the keys.
    """
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        for i, panel in enumerate(panels):
            _draw(figure.add_subplot(rows, columns, i + 1), history, panel)

    return render((3.6 * columns, 2.5 * rows), draw)


def render(size: tuple[float, float], draw: Callable[[Any], None]) -> tuple[str, bytes]:
    """Let `draw` fill a figure of `size` inches (wide, high); give it as inline SVG and as PNG.

    The SVG takes its ink from the text around it, so that it fits a light and a dark page, and
    names no other document.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "plan", "text.parse_math": False}
    style |= dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    svg, png = io.StringIO(), io.BytesIO()
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(png, format="png", dpi=110)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' xmlns(:xlink)?="[^"]*"|<metadata>.*?</metadata>', "", text, flags=re.S), (
        png.getvalue()
    )


def _draw(axes, history: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    for (label, key), colour in zip(panel.lines.items(), LINES, strict=False):
        points = [(row["step"], row[key]) for row in history if key in row]
        marker = "o" if len(points) < 30 else ""
        axes.plot(
            *np.array(points).reshape(-1, 2).T,
            color=colour,
            label=label,
            lw=1.4,
            marker=marker,
            ms=3,
        )
    for (label, level), style in zip(panel.levels.items(), (":", "--", "-.") * 3, strict=False):
        axes.axhline(level, color=INK, lw=0.9, ls=style, alpha=0.6, label=label)
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.grid(color=INK, alpha=0.12, lw=0.6)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(fontsize=7, frameon=False)


@cache
def _colours() -> np.ndarray:
    """Make 256 colours that are perceptually uniform, dark end cut: it is lost on a radiograph."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.linspace(0.3, 0.97, 256))[:, :3] * 255).round().astype(np.uint8)

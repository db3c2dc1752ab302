"""Pictures of downstream tasks: masks and boxes over radiographs, ROC and calibration curves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from plan_jax.page.figures import INK, LINES, OUTLINE, outline, radiograph, render
from plan_jax.types import BoxExample, Curve, MaskExample

FOUND = (251, 139, 36)  # what a model found; the truth has the colour of `figures.OUTLINE`
AXES = {
    "roc": ("share of negatives called positive", "share of positives found"),
    "calibration": ("probability", "share of positives"),
}


def tint(
    picture: UInt8[np.ndarray, "V U 3"], mask: Bool[np.ndarray, "Y X"], strength: float = 0.45
) -> UInt8[np.ndarray, "V U 3"]:
    """Colour what was found over a picture [V U]."""
    size = picture.shape[1::-1]
    where = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    mixed = (picture * (1 - strength) + np.asarray(FOUND) * strength).round().astype(np.uint8)
    return np.where(where[..., None], mixed, picture)


def mask_picture(row: MaskExample, side: int = 288) -> UInt8[np.ndarray, "V U 3"]:
    """Draw what was found in colour and the truth as an outline."""
    return outline(tint(radiograph(row.image, side=side), row.predicted), row.truth)


def box_picture(
    row: BoxExample, side: int = 288, most: int = 6, least: float = 0.2
) -> UInt8[np.ndarray, "V U 3"]:
    """Draw the true boxes and at most `most` found ones with a score of `least` or more."""
    pixels = radiograph(row.image, side=side)
    factor = pixels.shape[0] / row.image.shape[0]
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)

    def corners(box: Float[np.ndarray, " 4"]) -> list[float]:
        x0, y0, x1, y1 = (float(at) * factor for at in box)
        return [x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)]

    for box in row.truth:
        draw.rectangle(corners(box), outline=OUTLINE, width=2)
    for box, score in list(zip(row.predicted, row.scores, strict=True))[:most]:
        if score < least:
            continue
        at = corners(box)
        draw.rectangle(at, outline=FOUND, width=1)
        draw.text((at[0] + 3, at[1] + 1), f"{score:.2f}", fill=FOUND)
    return np.asarray(picture)


def line_chart(rows: Sequence[Curve]) -> tuple[str, bytes]:
    """Draw ROC curves, and calibration, side by side: the figure as inline SVG and as PNG bytes."""
    kinds = [kind for kind in AXES if any(row.kind == kind for row in rows)]

    def draw(figure: Any) -> None:
        for i, kind in enumerate(kinds):
            _draw(figure.add_subplot(1, len(kinds), i + 1), kind, rows)

    return render((4.4 * len(kinds), 4.0), draw)


def _draw(axes, kind: str, rows: Sequence[Curve]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, lw=0.9, ls=":", alpha=0.6)
    chosen = [row for row in rows if row.kind == kind]
    for i, row in enumerate(chosen):
        style = ("-", "--", "-.")[i // len(LINES) % 3]
        marker = "o" if kind == "calibration" else ""
        axes.plot(
            row.x,
            row.y,
            color=LINES[i % len(LINES)],
            ls=style,
            lw=1.4,
            marker=marker,
            ms=3,
            label=row.name,
        )
    x, y = AXES[kind]
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y, aspect="equal")
    axes.set_title(
        kind.upper() if kind == "roc" else "Calibration", fontsize=10, loc="left", fontweight="bold"
    )
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")

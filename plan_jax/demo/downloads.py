"""Files of a result: a picture, the maps, and the boxes and scores."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from plan_jax import logger, prediction
from plan_jax.demo import pictures
from plan_jax.demo.grounder import Grounder, Location, OpenFilm
from plan_jax.page import figures
from plan_jax.prediction import maps

ROUNDING = 2.0**13  # values of maps in the NPZ are multiples of its inverse, which pack well


@dataclass(frozen=True)
class Display:
    """How results are shown: the threshold of contours and boxes, the opacity, the rounds."""

    threshold: float
    opacity: float
    rounds: int | None = None


def place(
    grounder: Grounder,
    film: OpenFilm,
    location: Location,
    threshold: float,
    shape: tuple[int, int] | None = None,
) -> prediction.Grounding:
    """Returns a map with its mask and boxes in the pixels of the film, or of a picture of it.

    Args:
      grounder: the model.
      film: the film.
      location: where the phrase is.
      threshold: a value of the map: the mask is where it is exceeded.
      shape: rows and columns of a picture of the film; None for the film itself.
    """
    options = prediction.Options(threshold=min(max(threshold, 0.0), 1.0), normalisation="raw")
    source = film.film
    if shape is not None:
        source = replace(source, shape=shape)
    return prediction.locate(
        grounder.model, source, location.text, location.heat_map, location.kinds, options,
        location.notes,
    )  # fmt: skip


def encode_png(
    grounder: Grounder, film: OpenFilm, locations: Sequence[Location], display: Display
) -> bytes:
    """Returns the pictures of all phrases side by side on one scale, with captions, as a PNG."""
    assert film.film.picture is not None
    base = pictures.show_film(film.film.picture, pictures.SIDE)
    parts = []
    for location in locations:
        grounding = place(grounder, film, location, display.threshold, base.shape[:2])
        lines = [
            pictures.draw_contour(grounding.mask),
            pictures.draw_boxes(grounding.boxes, grounding.scores, base.shape[:2]),
        ]
        heat = pictures.paint_heat(grounding.heat_map, grounder.limits)
        picture = pictures.compose(base, heat, lines, display.opacity, marks_sides=film.has_sides)
        parts.append(pictures.add_caption(picture, location.text))
    return figures.encode_picture(figures.concatenate(parts))


def encode_npz(
    grounder: Grounder, film: OpenFilm, locations: Sequence[Location], display: Display
) -> bytes:
    """Returns the maps as an NPZ: `map_1` Float32[Y X] in pixels of the film, and the phrases.

    `words_1` Float32[W y x] are the maps of the words on the model's grid, and `weights_1` their
    shares. `text` has the phrases, and `model` the SHA-256 of the parameters.
    """
    arrays: dict[str, Any] = {
        "text": np.asarray([location.text for location in locations], np.str_),
        "model": np.asarray(grounder.sha256),
    }
    for number, location in enumerate(locations, 1):
        enlarged = maps.enlarge_map(
            location.heat_map, film.film.shape, grounder.model.size, film.film.stored_shape
        )
        rounded = (enlarged * ROUNDING).round() / ROUNDING
        arrays[f"map_{number}"] = rounded.astype(np.float32)
        arrays[f"words_{number}"] = location.word_maps
        arrays[f"weights_{number}"] = location.shares
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def encode_json(
    grounder: Grounder, film: OpenFilm, locations: Sequence[Location], display: Display
) -> bytes:
    """Returns boxes, scores, words and distractors of all phrases, and what they come from."""
    rounds = grounder.model.rounds if display.rounds is None else display.rounds
    rows = []
    for location in locations:
        row = place(grounder, film, location, display.threshold).to_row()
        if not film.has_sides:
            row["side"] = None
        row["words"] = [
            {"word": word, "weight": float(share)}
            for word, share in zip(location.words, location.shares, strict=True)
        ]
        row["distractors"] = [score._asdict() for score in location.scores[1:]]
        rows.append(row)
    content: dict[str, Any] = {
        "use": "research only, not for diagnosis",
        "model": {"method": grounder.model.name, "params_sha256": grounder.sha256},
        "rounds": rounds if grounder.model.rounds else None,
        "threshold": display.threshold,
        "colour_scale": list(grounder.limits),
        "window": film.window and [film.window.center, film.window.width],
        "phrases": rows,
    }
    return (logger.encode_json(content, indent=2) + "\n").encode()


ENCODERS = {"png": encode_png, "npz": encode_npz, "json": encode_json}
KINDS = {"png": "image/png", "npz": "application/octet-stream", "json": "application/json"}

"""The results as HTML: Jinja2 escapes every phrase, report and name, and no script is in them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from plan_jax import prediction
from plan_jax.demo import downloads, pictures
from plan_jax.demo.distractors import find_side
from plan_jax.demo.examples import NullMaps
from plan_jax.demo.grounder import Grounder, Location, OpenFilm
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.page import figures
from plan_jax.prediction import maps

WORD_SIDE = 160  # pixels of the longer side of a word's map, which the browser enlarges
NULL_SIDE = 240
THUMBNAIL_SIDE = 320


def render_results(
    grounder: Grounder,
    film: OpenFilm,
    locations: Sequence[Location],
    nulls: NullMaps,
    threshold: float,
) -> str:
    """Returns the cards of all phrases, side by side, with one colour scale.

    Args:
      grounder: the model.
      film: the film.
      locations: where each phrase is.
      nulls: the maps that do not look at the film.
      threshold: of contours and boxes, a value of the maps.
    """
    assert film.film.picture is not None
    base = pictures.show_film(film.film.picture)
    address = pictures.to_address(figures.encode_picture(base, "JPEG"), "image/jpeg")
    low, high = grounder.limits
    cards = [
        _describe_card(grounder, film, location, nulls, threshold, base.shape[:2])
        for location in locations
    ]
    return _environment().get_template("results.html").render(
        film=address,
        proportions=f"{base.shape[1]} / {base.shape[0]}",
        marks_sides=film.has_sides,
        cards=cards,
        most_words=max(len(card["words"]) for card in cards),
        colours=figures.css_colour_bar(),
        low=low,
        high=high,
        threshold=threshold,
        null_film=address,
    )  # fmt: skip


def _describe_card(
    grounder: Grounder,
    film: OpenFilm,
    location: Location,
    nulls: NullMaps,
    threshold: float,
    shape: tuple[int, int],
) -> dict[str, Any]:
    """Returns what the template shows of a phrase."""
    grounding = downloads.place(grounder, film, location, threshold, shape)
    null_name, null_map = nulls.find(location.text)
    null = _enlarge(grounder, film, null_map, shape)
    side = find_side(location.text) if film.has_sides else ""
    similarities = [score.similarity for score in location.scores]
    return {
        "text": location.text,
        "heat": _paint(grounding.heat_map, grounder.limits),
        "contour": _encode(pictures.draw_contour(grounding.mask)),
        "boxes": _encode(pictures.draw_boxes(grounding.boxes, grounding.scores, shape)),
        "num_boxes": len(grounding.boxes),
        "peak": float(grounding.heat_map.max()),
        "peak_side": grounding.side,
        "fraction": float(grounding.mask.mean()),
        "words": [
            {
                "word": word,
                "share": float(share),
                "heat": _paint(_enlarge(grounder, film, word_map, _fit(shape, WORD_SIDE)),
                               grounder.limits),
            }
            for word, share, word_map in zip(
                location.words, location.shares, location.word_maps, strict=True
            )
        ],
        "null_name": null_name,
        "null": _paint(null, (float(null.min()), float(null.max()))),
        "correlation": correlate(grounding.heat_map, null),
        "side": side,
        "side_share": measure_side(grounding.heat_map, side) if side else 0.0,
        "scores": [
            {**score._asdict(), "length": length}
            for score, length in zip(location.scores, _scale(similarities), strict=True)
        ],
        "num_beaten": location.num_beaten,
        "notes": location.notes,
    }  # fmt: skip


def _enlarge(
    grounder: Grounder, film: OpenFilm, heat_map: Float[np.ndarray, "y x"], shape: tuple[int, int]
) -> Float[np.ndarray, "Y X"]:
    return maps.enlarge_map(heat_map, shape, grounder.model.size, film.film.stored_shape)


def _fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    longer = max(shape)
    return max(1, round(shape[0] * side / longer)), max(1, round(shape[1] * side / longer))


def _paint(heat_map: Float[np.ndarray, "Y X"], limits: tuple[float, float]) -> str:
    # The browser enlarges a smooth map as well as we would.
    step = max(1, max(heat_map.shape) // (pictures.SIDE // 2))
    return _encode(pictures.paint_heat(heat_map[::step, ::step], limits))


def _encode(layer: Any) -> str:
    return pictures.to_address(pictures.encode_layer(layer))


def _scale(values: Sequence[float]) -> list[float]:
    """Returns values as lengths of bars in percent: from 0, or the lowest if it is negative."""
    low = min(0.0, *values)
    span = max(*values, 0.0) - low
    return [100 * (value - low) / span if span else 0.0 for value in values]


def correlate(first: Float[np.ndarray, "Y X"], second: Float[np.ndarray, "Y X"]) -> float:
    """Computes the correlation of two maps over the pixels; 0 if one of them is constant.

    >>> round(correlate(np.eye(2), 3 * np.eye(2)), 6), correlate(np.eye(2), np.ones((2, 2)))
    (1.0, 0.0)
    """
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / norm) if norm > 1e-12 else 0.0


def measure_side(heat_map: Float[np.ndarray, "Y X"], side: str) -> float:
    """Returns the share of a map's mass on the patient's `left` or `right`, 0.5 if it has none."""
    half = np.zeros(heat_map.shape, bool)
    columns = heat_map.shape[1]
    # The patient faces the viewer.
    half[:, : columns // 2] = side == "right"
    half[:, columns - columns // 2 :] = side == "left"
    return 1 - float(grounding_metrics.wrong_side(heat_map[None], half[None])[0])


def render_head(grounder: Grounder, name: str) -> str:
    """Returns the head of the page: the model, its hash, and what the page is not for."""
    model = grounder.model
    notes = prediction.describe_model(model)
    return _environment().get_template("head.html").render(
        name=name, method=model.name, sha256=grounder.sha256, notes=notes
    )  # fmt: skip


def render_library(description: str, notes: Sequence[str]) -> str:
    """Returns in what the page searches, and what was read of it or built."""
    return _environment().get_template("library.html").render(description=description, notes=notes)


def render_film(film: OpenFilm, title: str) -> str:
    """Returns what is known of a film: its size, its window, and what makes it doubtful."""
    return _environment().get_template("film.html").render(film=film.film, title=title)


def render_message(sentence: str, kind: str = "warning") -> str:
    """Returns one sentence for the user, as a `warning` or a `note`; "" for an empty one."""
    return _environment().get_template("message.html").render(sentence=sentence, kind=kind)


def render_films(matches: Sequence[tuple[str, str, str, float]], notes: Sequence[str]) -> str:
    """Returns films that were found: (name, report, address of a picture, similarity)."""
    return _environment().get_template("films.html").render(matches=matches, notes=notes)


def render_reports(matches: Sequence[tuple[str, str, float]], notes: Sequence[str]) -> str:
    """Returns reports that were found: (name of the film, report, similarity)."""
    return _environment().get_template("reports.html").render(matches=matches, notes=notes)


def read_style() -> str:
    """Returns the style sheet of the page."""
    return (Path(__file__).parent / "style.css").read_text("utf-8")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

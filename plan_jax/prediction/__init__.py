"""Location of a phrase in an image: its heat map, mask and boxes in the pixels of the image."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from plan_jax import logger
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.prediction import films, maps, phrases
from plan_jax.types import Features, Model, UserError, check_local

# Of a map scaled to [0, 1]; docs/predict.md has the overlap with the truth at this and others.
THRESHOLD = 0.65
MIN_AREA = 0.001  # of the image
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = (*PICTURE_SUFFIXES, ".npz", ".json")
PRIMARY_KIND = "global"


@dataclass(frozen=True)
class Options:
    """How boxes and masks follow from heat maps, and how images are read.

    Attributes:
      threshold: a pixel is in the mask if its normalised value is above it.
      normalisation: that of `metrics.grounding.normalise`. `minmax` scales each map to [0, 1], so
        every map that is not constant has a mask. `raw` compares the values themselves, whose scale
        is that of the method.
      min_area: the smallest area of the mask that is kept, as a fraction of the image.
      rounds: of refinement; None as the method was configured.
      check: whether to refuse what is not a frontal film.

    Raises:
      UserError: a value is out of its range.
    """

    threshold: float = THRESHOLD
    normalisation: grounding_metrics.Normalisation = "minmax"
    min_area: float = MIN_AREA
    rounds: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        # Written as `not`, so that NaN is refused too.
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; use a number from 0 to 1")
        if not 0 <= self.min_area <= 1:
            raise UserError(f"min_area is {self.min_area}; use a fraction of the image, 0 to 1")
        if self.normalisation not in grounding_metrics.NORMALISATIONS:
            names = ", ".join(grounding_metrics.NORMALISATIONS)
            raise UserError(f"normalisation is {self.normalisation!r}; use one of {names}")
        if self.rounds is not None and self.rounds < 0:
            raise UserError(f"rounds is {self.rounds}; use 0 or more")


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where a phrase is in an image; all coordinates are pixels of the upright original image.

    Attributes:
      film: the image.
      text: the phrase.
      heat_map: the mean over the phrase's words of what the method's `heatmap` returns, by their
        weights: cosines from -1 to 1, and from 0 to 1 for PLACE. It is not a probability.
      similarity: similarity of the whole image and the whole phrase, one for each kind.
      mask: where the map is above the threshold, without small areas.
      boxes: (x0, y0, x1, y1) of the areas of the mask; x1 and y1 are not included.
      scores: the largest value of the map in each box, best first.
      notes: sentences on what makes the result doubtful.
    """

    film: films.Film
    text: str
    heat_map: Float[np.ndarray, "Y X"]
    similarity: Mapping[str, float]
    mask: Bool[np.ndarray, "Y X"]
    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, " N"]
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> tuple[int, int]:
        """Returns x and y of the highest pixel, the first of several."""
        y, x = np.unravel_index(int(self.heat_map.argmax()), self.heat_map.shape)
        return int(x), int(y)

    @property
    def side(self) -> str:
        """Returns the patient's side of the peak, `left` or `right`, in a frontal film."""
        # The patient faces the viewer: the left half of the image is the patient's right.
        return "right" if self.peak[0] + 0.5 < self.heat_map.shape[1] / 2 else "left"

    def to_row(self) -> dict[str, Any]:
        """Returns the result without its maps, as a mapping that JSON can hold."""
        x, y = self.peak
        kinds = {kind: float(value) for kind, value in self.similarity.items()}
        boxes = np.column_stack([self.boxes, self.scores]).round(4).tolist()
        primary = PRIMARY_KIND if PRIMARY_KIND in kinds else next(iter(kinds), "")
        return {
            "image": self.film.name,
            "text": self.text,
            "similarity": kinds.get(primary, float("nan")),
            "peak_x": x,
            "peak_y": y,
            "peak_value": float(self.heat_map[y, x]),
            "side": self.side,
            "mask_fraction": float(self.mask.mean()),
            "boxes": [
                dict(zip(("x0", "y0", "x1", "y1", "score"), box, strict=True)) for box in boxes
            ],
            "width": self.film.shape[1],
            "height": self.film.shape[0],
            "similarities": kinds,
            "notes": list(self.notes),
        }

    def draw(self) -> Shaped[np.ndarray, "V U 3"]:
        """Returns the image with the heat map over it and the boxes, RGB [V U 3]."""
        from plan_jax.page import figures  # imported late: most commands draw nothing

        if self.film.picture is None:
            raise UserError(f"{self.film.name} was read without its picture; ground it again")
        picture = figures.overlay_heat_map(self.film.picture, self.heat_map)
        return figures.draw_boxes(picture, self.boxes, self.scores, self.film.shape)

    def save(self, path: str | Path) -> None:
        """Writes the result: a picture (PNG, JPEG), its arrays (NPZ) or its row (JSON), by suffix.

        The NPZ has `heat_map`, `mask`, `boxes`, `scores`, `peak`, `image` and `text`.

        Raises:
          UserError: the suffix is another one, or the file cannot be written.
        """
        check_local("file", path)
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            content = self.encode_picture("PNG" if suffix == ".png" else "JPEG")
        elif suffix == ".npz":
            content = self._encode_arrays()
        elif suffix == ".json":
            content = (logger.encode_json(self.to_row(), indent=2) + "\n").encode()
        else:
            raise UserError(f"{path} has none of the suffixes {', '.join(SUFFIXES)}; use one")
        logger.write_atomically(path, content)

    def encode_picture(self, kind: str = "PNG") -> bytes:
        """Returns the picture of `draw` as the bytes of a PNG or JPEG file."""
        from plan_jax.page import figures

        return figures.encode_picture(self.draw(), kind)

    def _repr_png_(self) -> bytes:
        """Returns the picture, as notebooks show a result."""
        return self.encode_picture()

    def _encode_arrays(self) -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(
            stream,
            heat_map=self.heat_map,
            mask=self.mask,
            boxes=self.boxes,
            scores=self.scores,
            peak=np.asarray(self.peak),
            image=np.asarray(self.film.name),
            text=np.asarray(self.text),
        )
        return stream.getvalue()

    def __repr__(self) -> str:
        """Returns the peak, the side and the boxes, as a console shows them."""
        x, y = self.peak
        rows, columns = self.heat_map.shape
        return (
            f"Grounding(peak x {x}, y {y} of {columns} x {rows}, patient's {self.side}, "
            f"{len(self.boxes)} boxes, {self.mask.mean():.1%} of the image)"
        )


def ground(
    model: Model,
    image: str | Path | Shaped[np.ndarray, "*shape"],
    text: str,
    **options: Any,
) -> Grounding:
    """Locates a phrase in an image.

    `model.ground(image, text)` calls this function. What makes the result doubtful is in its
    `notes`, and is warned of.

    Args:
      model: the model.
      image: path of a PNG, JPEG, DICOM ... of any size, or grey values UInt8[Y X].
      text: the phrase.
      **options: the fields of `Options`.

    Raises:
      UserError: the image cannot be read or is not a frontal film, the phrase has no word, or an
        option is out of its range.
    """
    try:
        chosen = Options(**options)
    except TypeError as error:
        raise UserError(f"ground: {error}; use the fields of plan_jax.prediction.Options") from None
    text_notes = describe_text(model, text)
    film = read_film(model, image, check=chosen.check, with_picture=True)
    features = model.encode_image(film.square[None]), model.encode_text([text])
    ((heat_map, similarity),) = compute_maps(model, *features, rounds=chosen.rounds)
    grounding = locate(model, film, text, heat_map, similarity, chosen, text_notes)
    for note in (*describe_model(model), *grounding.notes):
        warnings.warn(note, stacklevel=2)
    return grounding


def describe_model(model: Model) -> tuple[str, ...]:
    """Returns a sentence if a model knows drawings only."""
    if model.config is None or model.config.data.name != "phantom":
        return ()
    return (
        "this model was trained on phantoms, which are drawings: in a real film its maps mean "
        "nothing",
    )


def describe_text(model: Model, text: str) -> tuple[str, ...]:
    """Returns `phrases.describe_phrase` of a model.

    Raises:
      UserError: see there.
    """
    if model.tokenizer is None:
        phrases.check_phrase(text)
        return ()
    data = model.config.data
    return phrases.describe_phrase(model.tokenizer, text, data.max_tokens, data.max_words)


def read_film(
    model: Model,
    image: str | Path | Shaped[np.ndarray, "*shape"],
    *,
    check: bool = True,
    with_picture: bool = False,
    name: str = "",
    window: tuple[float, float] | None = None,
) -> films.Film:
    """Reads a film as a model was trained on its images; see `films.read_film`."""
    builder = model.config.data.builder if model.config is not None else {}
    return films.read_film(
        image,
        model.size,
        stored_size=builder.get("size", 0),
        bit_depth=builder.get("bit_depth", 0),
        min_side=max(model.grid),
        check=check,
        with_picture=with_picture,
        name=name,
        window=window,
    )


def compute_maps(
    model: Model, images: Features, texts: Features, *, rounds: int | None = None
) -> list[tuple[Float[np.ndarray, "y x"], dict[str, float]]]:
    """Returns the map of text b in image b, on the model's grid [y x], and their similarities.

    Raises:
      UserError: the method has no rounds.
    """
    word_maps, weights = (
        np.asarray(array, np.float32) for array in model.heatmap(images, texts, rounds=rounds)
    )
    heat_maps = maps.combine_words(word_maps, weights).reshape(-1, *model.grid)
    kinds = model.pair_similarity(images, texts) if model.pair_similarity else {}
    return [
        (heat_map, {kind: float(values[index]) for kind, values in kinds.items()})
        for index, heat_map in enumerate(heat_maps)
    ]


def locate(
    model: Model,
    film: films.Film,
    text: str,
    heat_map: Float[np.ndarray, "y x"],
    similarity: Mapping[str, float],
    options: Options,
    text_notes: tuple[str, ...] = (),
) -> Grounding:
    """Returns the grounding of a phrase from its map on the model's grid.

    Args:
      model: the model.
      film: the image.
      text: the phrase.
      heat_map: the map.
      similarity: that of the image and the phrase.
      options: for the mask and the boxes.
      text_notes: what `describe_text` returns.

    Raises:
      UserError: the map is not finite.
    """
    if not np.isfinite(heat_map).all():
        raise UserError(
            f"the heat map in {film.name} has values that are not finite; use another checkpoint"
        )
    enlarged = maps.enlarge_map(heat_map, film.shape, model.size, film.stored_shape)
    is_hot = maps.threshold_map(enlarged, options.threshold, options.normalisation)
    mask, boxes, scores = maps.find_boxes(is_hot, enlarged, options.min_area)
    notes = (*(f"the image {note}" for note in film.notes), *text_notes)
    return Grounding(film, text, enlarged, similarity, mask, boxes, scores, notes)

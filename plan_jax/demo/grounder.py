"""A model that stays loaded: films are encoded once, phrases are remembered, nothing recompiles."""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from plan_jax import prediction
from plan_jax.data import dicom, quoting
from plan_jax.data.grey import ImageError
from plan_jax.data.tokenizer import tokenize
from plan_jax.demo.distractors import Distractor, write_distractors
from plan_jax.demo.uploads import check_file
from plan_jax.page import figures
from plan_jax.prediction import films, maps, phrases
from plan_jax.types import Features, Model, UserError

MAX_CHARACTERS = 4000  # of a phrase or a report
MAX_PHRASES = 6  # that are shown side by side
MORE_ROUNDS = 2  # of refinement than the method was trained with
KEPT_TEXTS = 512
MAX_OFFERED = 8  # phrases in the list to pick from


class Text(NamedTuple):
    """An encoded phrase: its words in the order of its word slots, and notes on it."""

    features: Features
    words: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class OpenFilm:
    """A film that has been read and encoded.

    Attributes:
      film: the film with its picture.
      features: those of the image.
      window: of DICOM in grey; else None.
      source: content of the DICOM file, for another window; else b"".
      phrases: what is true in it, if that is known.
      upload: the path that it was sent to, which names its content; else "".
    """

    film: films.Film
    features: Features
    window: dicom.Window | None = None
    source: bytes = b""
    phrases: tuple[str, ...] = ()
    upload: str = ""

    @property
    def has_sides(self) -> bool:
        """Returns whether its left half is the patient's right, as far as its file says."""
        notes = self.film.notes
        return not any(note.startswith((films.LATERAL, films.MIRRORED)) for note in notes)


class Score(NamedTuple):
    """How similar a film and a text are; `name` says how the text differs from the phrase."""

    name: str
    text: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Location:
    """Where a phrase is in a film, on the model's grid.

    Attributes:
      text: the phrase.
      heat_map: the mean of the maps of its words, by their weights.
      words: the words that the model reads.
      word_maps: the map of each word.
      shares: the weight of each word as a share of their sum.
      scores: the phrase itself, then its distractors.
      kinds: all similarities of the phrase.
      notes: sentences on what makes it doubtful.
    """

    text: str
    heat_map: Float[np.ndarray, "y x"]
    words: tuple[str, ...]
    word_maps: Float[np.ndarray, "W y x"]
    shares: Float[np.ndarray, " W"]
    scores: tuple[Score, ...]
    kinds: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def num_beaten(self) -> int:
        """Returns how many distractors are less similar to the film than the phrase."""
        own, *others = self.scores
        return sum(other.similarity < own.similarity for other in others)


class Grounder:
    """A model, its hash, and the phrases that it has read.

    Attributes:
      model: the model.
      sha256: of its parameters.
      limits: values that are the ends of the colour scale, for every film and phrase.
    """

    def __init__(self, model: Model) -> None:
        """Keeps a model; nothing is compiled yet."""
        self.model, self.sha256 = model, model.identify()
        self.limits = (0.0, 1.0)
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self._lock = threading.Lock()  # a request runs in a thread of its own

    @property
    def max_rounds(self) -> int:
        """Returns the most rounds that may be asked for; 0 if the method has none."""
        return self.model.rounds + MORE_ROUNDS if self.model.rounds else 0

    def warm_up(self) -> None:
        """Compiles every program on noise, so that no phrase waits for it."""
        noise = np.random.default_rng(0).integers(0, 256, (self.model.size,) * 2, np.uint8)
        film = self.encode(films.read_film(noise, self.model.size, with_picture=True))
        for rounds in range(self.max_rounds + 1):
            self.locate(film, "no effusion", rounds)

    def open_file(
        self, path: Path, name: str, window: tuple[float, float] | None = None
    ) -> OpenFilm:
        """Reads and encodes a film; a lateral view is noted, other kinds are refused.

        Args:
          path: the file.
          name: how the user calls it.
          window: of DICOM: centre and width, in place of those of the file.

        Raises:
          UserError: it cannot be read, or is not a radiograph.
        """
        data = check_file(path, name)
        film = prediction.read_film(
            self.model, path, check=False, with_picture=True, name=name, window=window
        )
        if film.fault and not film.fault.startswith(films.LATERAL):
            raise UserError(f"{name} {film.fault}, not a chest radiograph; open another file")
        if not dicom.is_dicom(data):
            return self.encode(film)
        builder = self.model.config.data.builder if self.model.config is not None else {}
        try:
            shown = dicom.read_window(data, path, builder.get("bit_depth", 0))
        except ImageError as error:
            raise UserError(f"{name} {error}") from None
        if shown is not None and window is not None:
            shown = shown._replace(center=window[0], width=window[1])
        return replace(self.encode(film), window=shown, source=data)

    def open_bytes(self, data: bytes, name: str, window: tuple[float, float]) -> OpenFilm:
        """Reads and encodes a DICOM film again, in another window; see `open_file`."""
        with tempfile.TemporaryDirectory(prefix="plan_jax_film_") as folder:
            path = Path(folder) / "film.dcm"
            path.write_bytes(data)
            return self.open_file(path, name, window)

    def open_array(
        self, pixels: UInt8[np.ndarray, "Y X"], name: str, phrases: Sequence[str] = ()
    ) -> OpenFilm:
        """Encodes a film from its grey values [Y X]."""
        film = prediction.read_film(self.model, pixels, with_picture=True, name=name)
        return replace(self.encode(film), phrases=tuple(phrases))

    def encode(self, film: films.Film) -> OpenFilm:
        """Encodes a film that has been read."""
        with self._lock:
            return OpenFilm(film, self.model.encode_image(film.square[None]))

    def read_text(self, text: str, name: str = phrases.NAME) -> Text:
        """Encodes a phrase, or returns what is remembered of it.

        Raises:
          UserError: it has no word, is too long, or most of its pieces are unknown.
        """
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; shorten it"
            )
        with self._lock:
            if text not in self._texts:
                notes = prediction.describe_text(self.model, text)
                features = self.model.encode_text([text])
                self._texts[text] = Text(features, self._list_words(text), notes)
                if len(self._texts) > KEPT_TEXTS:
                    self._texts.popitem(last=False)
            self._texts.move_to_end(text)
            return self._texts[text]

    def _list_words(self, text: str) -> tuple[str, ...]:
        """Returns the words of a text in the order of its word slots, without padding."""
        data, tokenizer = self.model.config.data, self.model.tokenizer
        tokens = tokenize(
            tokenizer, text, max_tokens=data.max_tokens, max_words=data.max_words, name=phrases.NAME
        )
        words = [w for part in tokens.sentence_texts for w in tokenizer.split_words(part)]
        return tuple(words[: int((tokens.sentence >= 0).sum())])

    def locate(self, film: OpenFilm, text: str, rounds: int | None = None) -> Location:
        """Returns where a phrase is in a film, and how the film compares with its distractors.

        Args:
          film: the film.
          text: the phrase.
          rounds: of refinement; None as the method was configured. Ignored if it has none.

        Raises:
          UserError: the phrase cannot be read, or the map is not finite.
        """
        own = self.read_text(text)
        rounds = rounds if self.model.rounds else None
        # Any other number would be compiled first.
        if rounds is not None and not 0 <= rounds <= self.max_rounds:
            raise UserError(f"rounds is {rounds}; use 0 to {self.max_rounds}")
        with self._lock:
            word_maps, weights = self.model.heatmap(film.features, own.features, rounds=rounds)
        word_maps, weights = np.asarray(word_maps, np.float32), np.asarray(weights, np.float32)
        if not np.isfinite(word_maps).all():
            raise UserError("the heat map has values that are not finite; use another checkpoint")
        count = len(own.words)
        kinds = self._compare(film, own)
        scores = [Score("the phrase", text, _primary(kinds))]
        for distractor in self._readable(write_distractors(text)):
            similarity = _primary(self._compare(film, self.read_text(distractor.text)))
            scores.append(Score(distractor.name, distractor.text, similarity))
        total = float(weights[0, :count].sum())
        return Location(
            text=text,
            heat_map=maps.combine_words(word_maps, weights).reshape(self.model.grid),
            words=own.words,
            word_maps=word_maps[0, :count].reshape(-1, *self.model.grid),
            shares=weights[0, :count] / (total or 1.0),
            scores=tuple(scores),
            kinds=kinds,
            notes=own.notes,
        )

    def _readable(self, distractors: Sequence[Distractor]) -> list[Distractor]:
        """Returns the distractors that the model can read."""
        readable = []
        for distractor in distractors:
            try:
                self.read_text(distractor.text)
            except UserError:
                continue
            readable.append(distractor)
        return readable

    def _compare(self, film: OpenFilm, text: Text) -> dict[str, float]:
        if self.model.pair_similarity is None:
            return {}
        with self._lock:
            kinds = self.model.pair_similarity(film.features, text.features)
        return {kind: float(values[0]) for kind, values in kinds.items()}

    def calibrate(self, references: Sequence[OpenFilm], texts: Sequence[str]) -> None:
        """Fixes the colour scale by the maps of some phrases in some films, see `heat_limits`."""
        heat_maps = [self.locate(film, text).heat_map for film in references for text in texts]
        if heat_maps:
            self.limits = figures.heat_limits(np.stack(heat_maps))


def split_phrases(typed: str, picked: Sequence[str] = ()) -> list[str]:
    """Returns the phrases to locate: one in each line, and those that were picked, each once.

    >>> split_phrases("effusion on the left\\n\\n no effusion ", ["effusion on the left"])
    ['effusion on the left', 'no effusion']

    Raises:
      UserError: there is none, or there are too many.
    """
    lines = [" ".join(line.split()) for line in (*picked, *typed.splitlines())]
    texts = list(dict.fromkeys(filter(None, lines)))
    if not texts:
        raise UserError("there is no phrase; type or pick one")
    if len(texts) > MAX_PHRASES:
        raise UserError(
            f"there are {len(texts)} phrases, more than the {MAX_PHRASES} that fit side by side; "
            "leave some out"
        )
    for text in texts:
        if len(text) <= MAX_CHARACTERS:
            phrases.check_phrase(text, f"phrase {quoting.quote(text)}"[:80])
    return texts


def check_number(value: Any, name: str, low: int, high: int) -> float:
    """Returns the number that stands in a field.

    Raises:
      UserError: the field is empty, or the number is out of its range.
    """
    if not isinstance(value, (int, float)):
        raise UserError(f"the {name} is empty; type a number")
    if not low <= value <= high:
        raise UserError(f"the {name} is {value:,}; use {low:,} to {high:,}")
    return float(value)


def _primary(kinds: Mapping[str, float]) -> float:
    """Returns the similarity that ranks: that of the whole image and text, if there is one."""
    return kinds.get(prediction.PRIMARY_KIND, next(iter(kinds.values()), float("nan")))

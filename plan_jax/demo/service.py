"""Answers of the page, without the page: films that are open, phrases, downloads, retrieval."""

import base64
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from plan_jax import model as models
from plan_jax import prediction
from plan_jax.demo import downloads, examples, index, library, pictures, render, uploads
from plan_jax.demo.downloads import Display
from plan_jax.demo.grounder import Grounder, OpenFilm, check_number, split_phrases
from plan_jax.page import figures
from plan_jax.prediction import films, phrases
from plan_jax.types import Features, UserError

NUM_PHANTOMS = 40
NUM_OFFERED = 8  # phantoms in the list
NUM_REFERENCES = 6  # films by which the colour scale is fixed
NUM_MATCHES = 5
MAX_WINDOW = 2**32  # grey values of a film of the most bits that DICOM has
MAX_OPEN = 64  # films that are kept, one for each browser tab
# What anybody may ask of a film; they also fix the colour scale.
OFFERED_PHRASES = (
    "pleural effusion on the left",
    "pleural effusion on the right",
    "no pleural effusion",
    "pneumothorax on the left",
    "pneumothorax on the right",
    "consolidation in the left lower zone",
    "consolidation in the right lower zone",
    "nodule in the right upper zone",
    "cardiomegaly",
    "pulmonary oedema",
)


def _pool(features: Features) -> Float[np.ndarray, " D"]:
    """Returns the features of the whole of one image or text."""
    return np.asarray(features.pooled)[0]


class Service:
    """A model with all that the page shows of it.

    Attributes:
      grounder: the model.
      examples: phantoms.
      entries: the films and reports in which the page searches.
      index: their features.
      notes: sentences on the index.
    """

    def __init__(
        self, source: str, sources: Sequence[str] = (), index_folder: Path | None = None
    ) -> None:
        """Loads a model, compiles its programs, and reads or builds the index.

        Args:
          source: what `plan_jax.load` takes.
          sources: folders and tables of films; () is the phantoms.
          index_folder: where indices are kept; None is the user's cache.

        Raises:
          UserError: there is no such model, or no film.
        """
        entries = library.list_films(sources)  # a mistake there needs no model
        self.name = source
        self.grounder = Grounder(models.load(source))
        self.examples = examples.draw_examples(self.grounder.model, NUM_PHANTOMS)
        self.nulls = examples.fit_nulls(self.grounder.model)
        self.entries = entries or library.list_phantoms(self.examples)
        self.grounder.warm_up()
        self.grounder.calibrate(self._open_references(), OFFERED_PHRASES)
        path = index.name_file(sources or ["phantoms"], index_folder)
        self.index, self.notes = self._open_index(path)
        self._open: OrderedDict[str, OpenFilm] = OrderedDict()
        self._lock = threading.Lock()

    def _open_references(self) -> list[OpenFilm]:
        """Returns the first films that can be used, for the colour scale."""
        references: list[OpenFilm] = []
        for entry in self.entries[: 4 * NUM_REFERENCES]:
            film = self._read_entry(entry)
            if film is not None and len(references) < NUM_REFERENCES:
                references.append(self.grounder.encode(film))
        return references

    def _open_index(self, path: Path) -> tuple[index.Index, tuple[str, ...]]:
        digests = [
            entry.digest() for entry in tqdm(self.entries, "films", leave=False, disable=None)
        ]
        reports = [
            library.digest_text(entry.report) if entry.report else "" for entry in self.entries
        ]
        bar = tqdm(total=len(digests), desc="index", leave=False, disable=None)
        with bar:

            def encode_film(number: int) -> np.ndarray | None:
                bar.update()
                film = self._read_entry(self.entries[number])
                return None if film is None else _pool(self.grounder.encode(film).features)

            def encode_report(number: int) -> np.ndarray | None:
                try:
                    text = self.grounder.read_text(self.entries[number].report)
                except UserError:
                    return None
                return _pool(text.features)

            return index.load_or_build(
                path, self.grounder.sha256, digests, reports, encode_film, encode_report
            )

    def _read_entry(self, entry: library.Entry) -> films.Film | None:
        """Returns the film of an entry with its picture; None if it is no film."""
        source: Any = entry.pixels if entry.pixels is not None else entry.path
        try:
            if entry.path is not None:
                uploads.check_file(entry.path, entry.name)
            return prediction.read_film(
                self.grounder.model, source, with_picture=True, name=entry.name
            )
        except UserError:
            return None

    # Films ---------------------------------------------------------------------------------------

    def open_upload(self, session: str, path: Path, folder: Path) -> OpenFilm:
        """Opens a film that was sent, and deletes its file.

        Args:
          session: names the browser tab.
          path: the file.
          folder: that of all uploads.

        Raises:
          UserError: it cannot be used; the film that was open stays.
        """
        with uploads.consume(path, folder) as file:
            film = self._find_twin(file) or self.grounder.open_file(
                file, uploads.show_name(path.name)
            )
        return self._keep(session, replace(film, upload=str(file)))

    def _find_twin(self, path: Path) -> OpenFilm | None:
        """Returns the film of a file that is gone, if another tab has it open.

        A server gives two tabs that send the same file one path, and the first tab deletes it.
        """
        if path.exists():
            return None
        with self._lock:
            return next((film for film in self._open.values() if film.upload == str(path)), None)

    def open_example(self, session: str, title: str) -> OpenFilm:
        """Opens a phantom by its title.

        Raises:
          UserError: there is none of that title.
        """
        for example in self.examples:
            if example.title == title:
                film = self.grounder.open_array(example.pixels, example.title, example.phrases)
                return self._keep(session, film)
        raise UserError("there is no such phantom; pick one of the list")

    def change_window(self, session: str, level: float | None, width: float | None) -> OpenFilm:
        """Shows the open DICOM film in another window, and reads it so.

        Raises:
          UserError: no DICOM film is open, or the window shows nothing.
        """
        film = self.find(session)
        if film.window is None:
            raise UserError("the film has no window; open a DICOM file")
        level = check_number(level, "window level", -MAX_WINDOW, MAX_WINDOW)
        width = check_number(width, "window width", 1, MAX_WINDOW)
        new = self.grounder.open_bytes(film.source, film.film.name, (float(level), float(width)))
        return self._keep(session, new)

    def find(self, session: str) -> OpenFilm:
        """Returns the film that a browser tab has open.

        Raises:
          UserError: there is none.
        """
        with self._lock:
            if session not in self._open:
                raise UserError("no film is open; open a file or pick a phantom")
            self._open.move_to_end(session)
            return self._open[session]

    def close(self, session: str) -> None:
        """Forgets the film of a browser tab that was closed."""
        with self._lock:
            self._open.pop(session, None)

    def _keep(self, session: str, film: OpenFilm) -> OpenFilm:
        with self._lock:
            self._open[session] = film
            self._open.move_to_end(session)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return film

    # Phrases -------------------------------------------------------------------------------------

    def ground(
        self, session: str, typed: str, picked: Sequence[str], threshold: float, rounds: int | None
    ) -> str:
        """Returns the results of all phrases in the open film, as HTML.

        Raises:
          UserError: there is no film, or a phrase cannot be used.
        """
        film = self.find(session)
        locations = [
            self.grounder.locate(film, text, rounds) for text in split_phrases(typed, picked)
        ]
        return render.render_results(self.grounder, film, locations, self.nulls, threshold)

    def download(
        self, session: str, kind: str, typed: str, picked: Sequence[str], display: Display
    ) -> str:
        """Returns a file of the results as `name|kind|content in base64`.

        Raises:
          UserError: as `ground`.
        """
        film = self.find(session)
        locations = [
            self.grounder.locate(film, text, display.rounds)
            for text in split_phrases(typed, picked)
        ]
        content = downloads.ENCODERS[kind](self.grounder, film, locations, display)
        encoded = base64.b64encode(content).decode()
        return f"grounding.{kind}|{downloads.KINDS[kind]}|{encoded}"

    # Retrieval -----------------------------------------------------------------------------------

    def find_films(self, text: str) -> str:
        """Returns the films that are most similar to a report, as HTML.

        Raises:
          UserError: the report cannot be read.
        """
        text = " ".join(text.split())
        if not text:
            raise UserError("there is no report; type one")
        phrases.check_phrase(text, "the report")
        query = self.grounder.read_text(text, "the report")
        rows, cosines = index.rank(_pool(query.features), self.index.films, NUM_MATCHES)
        matches = []
        for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True):
            entry = self.entries[row]
            film = self._read_entry(entry)
            if film is None or film.picture is None:
                continue  # it was removed since the start
            picture = pictures.show_film(film.picture, render.THUMBNAIL_SIDE)
            content = figures.encode_picture(picture, "JPEG")
            address = pictures.to_address(content, "image/jpeg")
            matches.append((entry.name, entry.report, address, cosine))
        return render.render_films(matches, query.notes)

    def find_reports(self, session: str) -> str:
        """Returns the reports that are most similar to the open film, as HTML.

        Raises:
          UserError: no film is open, or there are no reports.
        """
        film = self.find(session)
        if not np.abs(self.index.reports).sum():
            raise UserError(
                "the films have no reports; put film.txt beside film.png, or pass a table with the "
                "columns image and text as --films"
            )
        rows, cosines = index.rank(_pool(film.features), self.index.reports, NUM_MATCHES)
        matches = [
            (self.entries[row].name, self.entries[row].report, cosine)
            for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]
        return render.render_reports(matches, film.film.notes)

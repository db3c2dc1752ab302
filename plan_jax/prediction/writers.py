"""Files of many results: CSV, JSON, NPZ, and folders of pictures and masks.

A table is written as its rows come, under another name until it is complete.
"""

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plan_jax import logger
from plan_jax.prediction import Grounding
from plan_jax.prediction.batches import Outcome

Write = Callable[[Outcome], None]
CSV_COLUMNS = (
    *("row", "image", "text", "similarity", "peak_x", "peak_y", "peak_value", "side"),
    *("mask_fraction", "boxes", "width", "height", "notes", "error"),
)


def to_row(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome as a mapping that JSON can hold; `error` is None if there is a result."""
    head = {"row": outcome.row, "image": outcome.image, "text": outcome.text}
    if outcome.grounding is None:
        return {**head, "error": outcome.fault}
    return head | outcome.grounding.to_row() | head | {"error": None}


@contextlib.contextmanager
def open_csv(path: Path) -> Iterator[Write]:
    """Opens a CSV file with the columns `CSV_COLUMNS`; boxes are a JSON list of numbers."""
    with _open_text(path, newline="") as text:
        # Python quotes a line break inside a cell only if it is part of this one: a single \r too.
        table = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\r\n")

        def write(outcome: Outcome) -> None:
            row = to_row(outcome)
            boxes = [list(box.values()) for box in row.get("boxes", ())]
            row |= {"boxes": json.dumps(boxes), "notes": "; ".join(row.get("notes", ()))}
            with logger.report_write_errors(path):
                table.writerow(row)

        with logger.report_write_errors(path):
            table.writeheader()
        yield write


@contextlib.contextmanager
def open_json(path: Path) -> Iterator[Write]:
    """Opens a JSON file: a list of one object for each pair, one in a line."""
    with _open_text(path) as text, write_json(text) as write_row:

        def write(outcome: Outcome) -> None:
            with logger.report_write_errors(path):
                write_row(outcome)

        yield write


@contextlib.contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Opens a file of text in UTF-8, which is under another name until it is complete."""
    with logger.open_atomically(path) as file:
        # A name that is not UTF-8 must not end the run.
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline=newline)
        yield text
        with logger.report_write_errors(path):
            text.flush()
            text.detach()


@contextlib.contextmanager
def write_json(text: Any) -> Iterator[Write]:
    """Writes a list of rows as strict JSON to an open stream of text, and ends it in any case."""
    separator = "["

    def write(outcome: Outcome) -> None:
        nonlocal separator
        text.write(f"{separator}\n{logger.encode_json(to_row(outcome))}")
        separator = ","

    try:
        yield write
    finally:
        text.write("\n]\n" if separator == "," else "[]\n")


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Write]:
    """Opens an NPZ file: `map_<row>` Float32[Y X] in pixels of the image, for each pair.

    Besides, `row`, `image` and `text` list the pairs. Each map is written as it comes.
    """
    pairs: list[tuple[int, str, str]] = []
    with (
        logger.open_atomically(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):

        def add(name: str, array: np.ndarray) -> None:
            with (
                logger.report_write_errors(path),
                archive.open(f"{name}.npy", "w", force_zip64=True) as entry,
            ):
                np.lib.format.write_array(entry, array)

        def write(outcome: Outcome) -> None:
            if outcome.grounding is not None:
                add(f"map_{outcome.row}", outcome.grounding.heat_map)
                pairs.append((outcome.row, outcome.image, outcome.text))

        yield write
        add("row", np.asarray([row for row, _, _ in pairs], np.int64))
        add("image", np.asarray([image for _, image, _ in pairs], np.str_))
        add("text", np.asarray([text for _, _, text in pairs], np.str_))


@contextlib.contextmanager
def open_picture(path: Path) -> Iterator[Write]:
    """Opens the file of the picture of the only pair, or the row of it, as `Grounding.save`."""

    def write(outcome: Outcome) -> None:
        if outcome.grounding is not None:
            outcome.grounding.save(path)

    yield write


def open_pictures(folder: Path) -> contextlib.AbstractContextManager[Write]:
    """Opens a folder for one picture of each pair, `<row>.png`."""
    return _open_folder(folder, lambda grounding: grounding.encode_picture())


def open_masks(folder: Path) -> contextlib.AbstractContextManager[Write]:
    """Opens a folder for the mask of each pair, `<row>.png`: 0 and 255, as large as its image."""

    def encode(grounding: Grounding) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(grounding.mask).save(stream, "PNG")
        return stream.getvalue()

    return _open_folder(folder, encode)


@contextlib.contextmanager
def _open_folder(folder: Path, encode: Callable[[Grounding], bytes]) -> Iterator[Write]:
    """Opens a folder for one PNG file of each pair, `<row>.png`."""
    with logger.report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def write(outcome: Outcome) -> None:
        if outcome.grounding is not None:
            content = encode(outcome.grounding)
            logger.write_atomically(folder / f"{outcome.row:05d}.png", content)

    yield write

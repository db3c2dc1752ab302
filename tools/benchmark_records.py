"""Measures reading from records against torch's DataLoader: `tools/benchmark.py records`.

Both sides read the same images and reports, crop 224 of 256 pixels at random, and tokenise. The
originals are JPEG of 3056 x 2544 pixels, as of MIMIC-CXR, and PNG of 1024 x 1024 pixels, as of NIH.
Preparation is compared with Pillow alone, which only decodes and resizes.
"""

import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from plan_jax.data import images, loader, phantom, schema, tokenizer, transforms
from plan_jax.data.augmentation import PRESETS
from plan_jax.data.dataset import Dataset, open_dataset
from plan_jax.data.public.items import Item
from plan_jax.data.public.records import Reader, open_folder

NUM_FILMS = 64
STORED_SIZE, SIZE = 256, 224
BATCH = 16
MAX_TOKENS, MAX_WORDS = 96, 80
WORKERS = (0, 1, 2)
KINDS = {"jpg": (3056, 2544), "png": (1024, 1024)}


# Films ------------------------------------------------------------------------------------------


def write_films(folder: Path, kind: str) -> list[tuple[str, str]]:
    """Writes phantoms as large as published films; returns their names and reports."""
    rows = []
    shape = KINDS[kind]
    for index in range(NUM_FILMS):
        study = phantom.draw_study(0, index, 128)
        film = Image.fromarray(study.image[..., 0]).resize(shape[::-1], Image.Resampling.BICUBIC)
        # Grain as of a film: smooth pictures would be decoded faster.
        noise = np.random.default_rng(index).normal(0, 3, shape)
        pixels = np.clip(np.asarray(film) + noise, 0, 255).astype(np.uint8)
        name = f"{index}.{kind}"
        Image.fromarray(pixels).save(folder / name, quality=95)
        rows.append((name, study.text))
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "text", "split"))
        writer.writerows((*row, "train") for row in rows)
    return rows


def tokenize(words: Any, text: str, rng: np.random.Generator) -> tokenizer.TokenizedText:
    """Returns a text as arrays; both sides do the same."""
    return tokenizer.tokenize(
        words, text, max_tokens=MAX_TOKENS, max_words=MAX_WORDS, rng=rng, name="film"
    )


@dataclass
class Originals(torch.utils.data.Dataset):
    """Films as a loop of torch reads them: decoded, reduced, cropped and tokenised at each access.

    Attributes:
      folder: the folder of the films.
      rows: their names and reports.
      words: the tokenizer.
    """

    folder: Path
    rows: list[tuple[str, str]]
    words: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        name, text = self.rows[index]
        rng = np.random.default_rng()
        with Image.open(self.folder / name) as film:
            rows, columns = transforms.scale_shape((film.height, film.width), STORED_SIZE)
            small = film.convert("L").resize((columns, rows), Image.Resampling.BILINEAR)
        square = Image.new("L", (STORED_SIZE, STORED_SIZE))
        square.paste(small, ((STORED_SIZE - columns) // 2, (STORED_SIZE - rows) // 2))
        top, left = rng.integers(0, STORED_SIZE - SIZE + 1, 2)
        pixels = np.asarray(square)[top : top + SIZE, left : left + SIZE]
        report = tokenize(self.words, text, rng)
        return torch.tensor(pixels), torch.tensor(report.tokens), torch.tensor(report.word_index)


class UnpreparedFilms(Dataset):
    """Films that the loader of this library decodes from the originals at each access."""

    def __init__(self, folder: Path, rows: list[tuple[str, str]]):
        """Initialises the dataset with the names and reports of films in a folder."""
        super().__init__([b""] * len(rows), name="films")
        self.root, self.rows = folder, rows

    def read_pair(self, index: int, rng: np.random.Generator | None = None) -> schema.Pair:
        """Returns image and report of a film."""
        del rng
        name, text = self.rows[index]
        pixels, _ = images.read_image(self.root / name, STORED_SIZE)
        return schema.Pair(
            image=pixels[..., None],
            text=text,
            labels=np.zeros(0, np.int8),
            regions=np.zeros((0, 4), np.float32),
            sections={},
        )


# Measurements -----------------------------------------------------------------------------------


def iterate_torch(films: Originals, workers: int) -> Iterator[Any]:
    """Yields batches of torch's DataLoader without an end."""
    batches = torch.utils.data.DataLoader(
        films, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        yield from batches


def iterate_jax(dataset: Dataset, words: Any, workers: int) -> Iterator[Any]:
    """Yields batches of this library without an end."""
    return loader.train_batches(
        dataset,
        words,
        batch_size=BATCH,
        size=SIZE,
        max_tokens=MAX_TOKENS,
        max_words=MAX_WORDS,
        seed=0,
        workers=workers,
        augment=PRESETS["mgca"],
    )


def measure_rate(batches: Iterator[Any], steps: int, num_ahead: int) -> float:
    """Returns images per second over some batches; those that were read ahead do not count."""
    for _ in range(num_ahead):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * BATCH / (time.perf_counter() - start)


def compare_readers(folder: Path, kind: str, repeats: int, steps: int) -> None:
    """Prints images per second of both sides, in turns, for each number of workers."""
    rows = write_films(folder, kind)
    words = tokenizer.load_tokenizer("phantom")
    prepared = open_dataset(
        "pairs",
        "train",
        data_dir=str(folder / "data"),
        manifest=str(folder / "manifest.csv"),
        size=STORED_SIZE,
    )
    for workers in WORKERS:
        readers = {
            "records": iterate_jax(prepared, words, workers),
            "originals": iterate_jax(UnpreparedFilms(folder, rows), words, workers),
            "torch": iterate_torch(Originals(folder, rows, words), workers),
        }
        # Threads and processes read ahead, and their buffers add up; torch has two a worker.
        num_ahead = dict.fromkeys(readers, 1 + loader.PREFETCHED_BATCHES * (1 + 4 * workers))
        num_ahead["torch"] = 1 + 2 * workers
        for batches in readers.values():
            next(batches)
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, batches in readers.items():
                rates[name].append(measure_rate(batches, steps, num_ahead[name]))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        cells = [f"{min(values):.0f} / {medians[name]:.0f}" for name, values in rates.items()]
        ratios = [medians[name] / medians["torch"] for name in ("records", "originals")]
        print(
            f"| {kind} | {workers} | {' | '.join(cells)} | {ratios[0]:.1f} | {ratios[1]:.1f} |",
            flush=True,
        )
        del readers


def measure_seconds(run: Callable[[], Any], count: int) -> float:
    """Returns the CPU seconds of an image."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / count


def compare_preparation(folder: Path, kind: str, repeats: int) -> None:
    """Prints images per second of a core, for Pillow and for a whole record, in turns."""
    names = [f"{index}.{kind}" for index in range(NUM_FILMS)]
    reader = Reader(folder=open_folder(folder), size=STORED_SIZE)
    rows, columns = transforms.scale_shape(KINDS[kind], STORED_SIZE)

    def decode() -> None:
        for name in names:
            with Image.open(folder / name) as film:
                film.convert("L").resize((columns, rows), Image.Resampling.BOX)

    def prepare() -> None:
        for name in names:
            record = reader.read(Item(image_id=name, image=name))
            assert not isinstance(record, str), record
            schema.serialize(record)

    seconds: dict[str, list[float]] = {"Pillow": [], "records": []}
    for _ in range(repeats):
        seconds["Pillow"].append(measure_seconds(decode, len(names)))
        seconds["records"].append(measure_seconds(prepare, len(names)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cells = [f"{1 / max(s):.0f} / {1 / medians[name]:.0f}" for name, s in seconds.items()]
    print(f"| {kind} | {' | '.join(cells)} | {medians['Pillow'] / medians['records']:.2f} |")


def main(repeats: int, steps: int) -> None:
    """Prints both tables."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: Path(name) / kind for kind in KINDS}
        print("images per second, least / median; ratios to torch at the median")
        print("| films | workers | records | originals | torch | records | originals |")
        print("|---|---|---|---|---|---|---|")
        for kind, folder in folders.items():
            folder.mkdir()
            compare_readers(folder, kind, repeats, steps)
        print("preparation: images per second of a core, least / median")
        print("| films | Pillow | records | ratio |\n|---|---|---|---|")
        for kind, folder in folders.items():
            compare_preparation(folder, kind, repeats)

"""Location of many phrases in many images, in batches, with memory that does not grow.

Each image and each distinct phrase is encoded once. An image that cannot be used, or a phrase, does
not end the others.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from plan_jax import prediction
from plan_jax.prediction import films
from plan_jax.types import Features, Model, UserError

NUM_READERS = 4  # threads that decode images


@dataclass(frozen=True)
class Job:
    """An image and its phrases.

    Attributes:
      path: the path of the image.
      name: how the user calls it.
      texts: the phrases.
      rows: number of each pair of the image and a phrase.
      fault: why there is no image, or "".
    """

    path: str
    name: str
    texts: Sequence[str]
    rows: Sequence[int]
    fault: str = ""


class Sizes(NamedTuple):
    """How many images, texts and pairs pass through the model at once."""

    images: int
    texts: int
    pairs: int


@dataclass(frozen=True)
class Outcome:
    """The result of a pair: a grounding, or a sentence on why there is none."""

    row: int
    image: str
    text: str
    grounding: prediction.Grounding | None = None
    fault: str = ""


@dataclass
class Clock:
    """Durations in seconds.

    `latencies` has one entry for each located image: reading it, its share of its batch's encoding
    and maps, the boxes and masks of its phrases, and writing them. `compilation` is the time of the
    first call of each program, on noise.
    """

    compilation: float = 0.0
    latencies: list[float] = field(default_factory=list)


class TextCache:
    """Features of phrases that later pairs need too; a phrase is dropped after its last use."""

    def __init__(self, model: Model, jobs: Sequence[Job]) -> None:
        """Counts how often each phrase is used, and encodes nothing yet."""
        self.model, self.size = model, 1  # texts that are encoded at once
        self.counts = Counter(text for job in jobs for text in job.texts)
        self.features: dict[str, Features] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.faults: dict[str, str] = {}

    def add(self, texts: Sequence[str]) -> None:
        """Encodes those phrases that are new and readable."""
        new = []
        for text in dict.fromkeys(texts):
            if text in self.features or text in self.faults:
                continue
            try:
                self.notes[text] = prediction.describe_text(self.model, text)
                new.append(text)
            except UserError as error:
                self.faults[text] = str(error)
        for start in range(0, len(new), self.size):
            part = new[start : start + self.size]
            # Padded as the images are.
            features = self.model.encode_text([part[i] for i in _pad(len(part), self.size)])
            for index, text in enumerate(part):
                self.features[text] = _select(features, [index])

    def release(self, text: str) -> None:
        """Counts one use of a phrase."""
        self.counts[text] -= 1
        if not self.counts[text]:
            for table in (self.features, self.notes, self.faults):
                table.pop(text, None)


def ground_jobs(
    model: Model,
    jobs: Sequence[Job],
    options: prediction.Options,
    clock: Clock,
    *,
    with_picture: bool = False,
    on_compiled: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Yields the outcome of every pair, in the order of the jobs.

    If there are fewer images, phrases or pairs than a batch, they pass through the model one by
    one, since a batch is padded to its size.

    Args:
      model: the model.
      jobs: the images with their phrases.
      options: for masks and boxes.
      clock: receives the times.
      with_picture: whether the groundings need pictures.
      on_compiled: is called before the first image is read.
    """
    cache = TextCache(model, jobs)
    sizes = _choose_sizes(model, jobs, cache)
    cache.size = sizes.texts
    _compile(model, sizes, cache, options, clock, with_picture)
    on_compiled()
    chunks = [jobs[start : start + sizes.images] for start in range(0, len(jobs), sizes.images)]

    def read(job: Job) -> tuple[films.Film | str, float]:
        start = time.perf_counter()
        try:
            if job.fault:
                raise UserError(job.fault)
            film = prediction.read_film(
                model, job.path, check=options.check, with_picture=with_picture, name=job.name
            )
        except UserError as error:
            return str(error), 0.0
        return film, time.perf_counter() - start

    with ThreadPoolExecutor(NUM_READERS) as pool:
        futures: list[list[Future]] = [[pool.submit(read, job) for job in chunks[0]]]
        for index, chunk in enumerate(chunks):
            if index + 1 < len(chunks):  # read while the model computes
                futures.append([pool.submit(read, job) for job in chunks[index + 1]])
            results = [future.result() for future in futures.pop(0)]
            yield from _ground_chunk(model, chunk, results, cache, options, clock, sizes)


def _ground_chunk(
    model: Model,
    jobs: Sequence[Job],
    results: Sequence[tuple[films.Film | str, float]],
    cache: TextCache,
    options: prediction.Options,
    clock: Clock,
    sizes: Sizes,
) -> Iterator[Outcome]:
    """Yields the outcomes of the jobs whose films were read together."""
    start = time.perf_counter()
    films_by_job = {
        index: film for index, (film, _) in enumerate(results) if isinstance(film, films.Film)
    }
    cache.add([text for index in films_by_job for text in jobs[index].texts])
    pairs = [
        (slot, text)
        for slot, index in enumerate(films_by_job)
        for text in jobs[index].texts
        if text not in cache.faults
    ]
    features: Any = None
    if pairs:
        squares = np.stack([film.square for film in films_by_job.values()])
        # The last batch is padded here, since one image alone would need a program of its own.
        features = model.encode_image(squares[_pad(len(squares), sizes.images)])
    shared = (time.perf_counter() - start) / max(len(films_by_job), 1)
    maps = _compute_maps(model, features, pairs, cache, options, sizes.pairs)
    for index, job in enumerate(jobs):
        film, seconds = results[index]
        num_located = 0
        for row, text in zip(job.rows, job.texts, strict=True):
            if not isinstance(film, films.Film):
                yield Outcome(row, job.name, text, fault=film)
            elif text in cache.faults:
                yield Outcome(row, job.name, text, fault=cache.faults[text])
            else:
                heat_map, similarity, duration = next(maps)
                start = time.perf_counter()
                notes = cache.notes[text]
                try:
                    grounding = prediction.locate(
                        model, film, text, heat_map, similarity, options, notes
                    )
                except UserError as error:
                    yield Outcome(row, job.name, text, fault=str(error))
                    continue
                yield Outcome(row, job.name, text, grounding)  # the caller writes it
                seconds += duration + time.perf_counter() - start
                num_located += 1
        if num_located:
            clock.latencies.append(seconds + shared)
    for job in jobs:
        for text in job.texts:
            cache.release(text)


def _compute_maps(
    model: Model,
    features: Any,
    pairs: Sequence[tuple[int, str]],
    cache: TextCache,
    options: prediction.Options,
    size: int,
) -> Iterator[tuple[Float[np.ndarray, "y x"], dict[str, float], float]]:
    """Yields the map of each pair, its similarities, and the seconds that it took.

    Args:
      model: the model.
      features: those of the images.
      pairs: the index of the image in `features`, and the phrase.
      cache: has the features of the phrases.
      options: has the rounds.
      size: pairs that pass through the model at once.
    """
    for first in range(0, len(pairs), size):
        part = pairs[first : first + size]
        start = time.perf_counter()
        padded = [part[position] for position in _pad(len(part), size)]
        texts = [cache.features[text] for _, text in padded]
        results = prediction.compute_maps(
            model,
            _select(features, [slot for slot, _ in padded]),
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *texts),
            rounds=options.rounds,
        )
        duration = (time.perf_counter() - start) / len(part)
        for heat_map, similarity in results[: len(part)]:
            yield heat_map, similarity, duration


def _choose_sizes(model: Model, jobs: Sequence[Job], cache: TextCache) -> Sizes:
    batch = model.config.eval.batch if model.config is not None else 1
    counts = len(jobs), len(cache.counts), cache.counts.total()
    return Sizes(*(batch if count >= batch else 1 for count in counts))


def _pad(count: int, size: int) -> np.ndarray:
    """Returns the indices of `count` items, and the last one again up to `size`: Int[size]."""
    return np.minimum(np.arange(size), count - 1)


def _compile(
    model: Model,
    sizes: Sizes,
    cache: TextCache,
    options: prediction.Options,
    clock: Clock,
    with_picture: bool,
) -> None:
    """Calls every program once on noise, so that no image waits for a compilation."""
    start = time.perf_counter()
    for text in cache.counts:
        cache.add([text])
        if text in cache.features:
            break
    else:
        return  # no phrase can be read
    noise = np.random.default_rng(0).integers(0, 256, (model.size, model.size, 1), np.uint8)
    images = model.encode_image(np.stack([noise] * sizes.images))
    texts = model.encode_text([text] * sizes.texts)
    first = [0] * sizes.pairs
    ((heat_map, similarity), *_) = prediction.compute_maps(
        model, _select(images, first), _select(texts, first), rounds=options.rounds
    )
    film = films.Film("noise", noise.shape[:2], noise.shape[:2], noise, noise)
    grounding = prediction.locate(model, film, text, heat_map, similarity, options)
    if with_picture:
        grounding.draw()  # imports what draws
    clock.compilation = time.perf_counter() - start


def _select(features: Features, indices: Sequence[int]) -> Features:
    rows = np.asarray(indices)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], features)


def list_products(images: Sequence[str], texts: Sequence[str]) -> list[Job]:
    """Returns the jobs of all pairs of images and texts, numbered from 1, image by image."""
    count = len(texts)
    return [
        Job(image, image, texts, range(1 + count * index, 1 + count * (index + 1)))
        for index, image in enumerate(images)
    ]

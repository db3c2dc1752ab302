"""Batches for training, as a pure function of (seed, step), and records for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from plan_jax.data import report_parser, transforms
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.dataset import Dataset
from plan_jax.types import Batch, Record, TextBatch, UserError

AHEAD = 4  # batches made ahead of the step
_TEXT = ("tokens", "word_index", "word_id", "sentence")
_ALWAYS = ("image", *_TEXT)
_COLUMN = {"labels": "labels", "regions": "regions", "region_words": "regions"}  # of a manifest


def train_batches(
    dataset: Dataset,
    tokenizer: tokenization.Tokenizer,
    *,
    batch: int,
    size: int,
    length: int,
    words: int,
    seed: int,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    extra: Sequence[str] = (),
    shift: int | None = None,
) -> "Batches":
    """Iterate for ever over this process's share of shuffled batches.

    Each item is a `Batch` of numpy arrays: image UInt8[B size size 1], tokens and word_index
    Int32[B L], word_id and sentence Int32[B W], and, in `extra`, those of labels Int8[B F], regions
    Float32[B R 4] and region_words Bool[B R W] that are asked for (see `Batch`). Images are moved
    by up to `shift` pixels (by default a sixteenth of `size`) and sentences are shuffled.

    An epoch is a permutation of its own; what is left of it after whole batches over all processes
    is left out, so that no study comes twice in a batch. Item k of a global batch is that of
    process k modulo the number of processes: the global batch does not depend on their number, nor
    anything on `workers` (processes that read; 0: one thread does).

    Args:
      batch: pairs a process.
      shard: index and number of processes.

    Raises:
      UserError: if the batch over all processes is larger than the dataset, or it lacks something
        of `extra`.
    """
    total = batch * shard[1]
    _check(dataset, total, length, words, seed, extra)
    steps = _Steps(
        dataset=dataset,
        tokenizer=tokenizer,
        positions=np.arange(batch) * shard[1] + shard[0],
        total=total,
        size=size,
        length=length,
        words=words,
        seed=seed,
        extra=tuple(extra),
        shift=size // 16 if shift is None else shift,
    )
    order = {"seed": seed, "batch": total, "examples": len(dataset)}
    return Batches(grain.MapDataset.source(steps), workers, order)


def _check(dataset, total: int, length: int, words: int, seed: int, extra: Sequence[str]) -> None:
    for name in extra:
        if name not in _COLUMN:
            known = ", ".join(_COLUMN)
            raise UserError(f"extra {name!r} is unknown; the data can add {known}")
        column = _COLUMN[name]
        if not (dataset.findings if column == "labels" else dataset.region_names):
            raise UserError(
                f"batches need {name}, which dataset {dataset.name or 'given'} does not have; name "
                f"the column that holds them: --config.data.builder.columns=\"{{'{column}': ..}}\""
            )
    if not 0 < total <= len(dataset):
        raise UserError(
            f"batch {total} does not fit a dataset of {len(dataset)} pairs; "
            f"use 1 to {len(dataset)} over all processes"
        )
    if length < 3 or words < 1 or seed < 0:
        raise UserError(
            f"length {length}, words {words}, seed {seed} cannot be; use at least 3, 1 and 0"
        )


@dataclass
class _Steps:
    """Batch k of this process as item k of an endless source: a pure function of (seed, k)."""

    dataset: Dataset
    tokenizer: tokenization.Tokenizer
    positions: Int[np.ndarray, " B"]
    total: int
    size: int
    length: int
    words: int
    seed: int
    extra: tuple[str, ...]
    shift: int

    def __len__(self) -> int:
        return 2**60

    def __getitem__(self, step: int) -> dict[str, Any]:
        items = [self._item(int(step) * self.total + int(at)) for at in self.positions]
        whole = {name: np.stack([item[name] for item in items]) for name in items[0]}
        return whole | {"extra": {name: whole.pop(name) for name in self.extra}}

    def _item(self, position: int) -> dict[str, np.ndarray]:
        count = len(self.dataset)
        epoch, place = divmod(position, count // self.total * self.total)
        study = int(_permutation(count, self.seed, epoch)[place])
        rng = np.random.default_rng((self.seed, position))
        row = self.dataset.image_text(study)
        limits = {"length": self.length, "words": self.words}
        flags = self._speaks_of if "region_words" in self.extra else None
        item = tokenization.encode(
            self.tokenizer, row.text, **limits, rng=rng, row=str(study), flags=flags
        )
        item["region_words"] = item.pop("flagged", None)
        fitted = transforms.fit(row.image, self.size)
        down, right = transforms.draw(rng, self.shift)
        item["image"] = transforms.move(fitted, down, right)
        item["labels"] = row.labels
        if "regions" in self.extra:
            boxes = transforms.fit_boxes(row.regions, row.image.shape[:2], self.size)
            item["regions"] = transforms.move_boxes(boxes, down, right, self.size) / self.size
        return {name: item[name] for name in (*_ALWAYS, *self.extra)}

    def _speaks_of(self, sentence: str) -> Bool[np.ndarray, " R"]:
        named = report_parser.regions(sentence)
        return np.asarray([name in named for name in self.dataset.region_names], bool)


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Int[np.ndarray, " {count}"]:
    return np.random.default_rng((seed, epoch, count)).permutation(count)


class Batches(grain.DatasetIterator):
    """An endless iterator whose whole state is the number of batches taken.

    The state is a dict of a few integers, fit for JSON; it does not depend on the number of
    readers or of processes.
    """

    def __init__(self, batches: grain.MapDataset, workers: int, order: dict[str, int]):
        super().__init__()
        self._batches, self._workers, self._order = batches, workers, order
        self._step = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._reader is None:
            self._reader = self._read_from(self._step)
        item = next(self._reader)
        self._step += 1
        text = TextBatch(*(item[name] for name in _TEXT))
        return Batch(item["image"], text, item["extra"])

    def get_state(self) -> dict[str, int]:
        """Return the number of batches taken and what their order depends on."""
        return {"step": self._step} | self._order

    def set_state(self, state: dict[str, int]) -> None:
        """Continue after `state["step"]` batches.

        Raises:
          UserError: if the state is of another seed, batch over all processes, or dataset.
        """
        for name, ours in self._order.items():
            if state.get(name) != ours:
                raise UserError(
                    f"the checkpoint was trained with {name} {state.get(name)}, now it is {ours}; "
                    "keep it or start in a new workdir"
                )
        self._stop()
        self._step = int(state["step"])

    def start_prefetch(self) -> None:
        """Begin to read ahead."""
        if self._reader is None:
            self._reader = self._read_from(self._step)
        self._reader.start_prefetch()

    def close(self) -> None:
        """Stop reading ahead; the iterator gives nothing any more."""
        self._stop()
        super().close()

    def _read_from(self, step: int) -> grain.DatasetIterator:
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        left = self._batches[step:].to_iter_dataset(reading)
        if self._workers:
            left = left.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=AHEAD
                )
            )
        return iter(left)

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def records(dataset: Dataset, limit: int | None = None, size: int | None = None) -> list[Record]:
    """Read the first `limit` studies (None: all), fitted to a square of `size` pixels if given.

    Raises:
      UserError: if there are none.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 1:
        raise UserError(f"{count} records are too few to evaluate; raise the limit")
    found = [dataset[i] for i in range(count)]
    return found if size is None else [transforms.fit_record(record, size) for record in found]

"""Batches for training, as a pure function of (seed, step)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from plan_jax.data import augmentation, processes, report_parser, transforms
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.augmentation import AS_STORED, Augmentation, Draw
from plan_jax.data.dataset import Dataset
from plan_jax.data.report_parser import rewriting
from plan_jax.data.schema import Pair
from plan_jax.data.sections import sides
from plan_jax.types import Batch, UserError

PREFETCHED_BATCHES = 4  # read ahead of the step, by each worker
CHECKED_TEXTS = 256  # of which unknown pieces are counted before training
# What a batch can have in `extra` -> the column of a manifest that it needs.
EXTRA_COLUMNS = {"labels": "labels", "regions": "regions", "region_words": "regions"}


def train_batches(
    dataset: Dataset,
    tokenizer: tokenization.Tokenizer,
    *,
    batch_size: int,
    size: int,
    max_tokens: int,
    max_words: int,
    seed: int,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    extra: Sequence[str] = (),
    max_shift: int | None = None,
    augment: Augmentation = AS_STORED,
    variants: Sequence[str] = (),
) -> "BatchIterator":
    """Returns an endless iterator over this process's part of shuffled batches.

    Each item is a `Batch` of numpy arrays: image UInt8[B size size 1], tokens and word_index
    Int32[B L], word_id and sentence Int32[B W], and in `extra` the requested fields: labels
    Int8[B F], regions Float32[B R 4], region_words Bool[B R W]. Images are shifted or augmented,
    and sentences are shuffled.

    An epoch is a permutation of its own. The last incomplete global batch of an epoch is dropped,
    so a study never appears twice in one batch. Item k of a global batch belongs to process k
    modulo the number of processes. So the global batch depends neither on their number nor on
    `workers`.

    Args:
      dataset: the split to train on.
      tokenizer: the tokenizer of the text tower.
      batch_size: pairs per process.
      size: side of the square that images are fitted to, in pixels.
      max_tokens: L, token positions per text.
      max_words: W, word slots per text.
      seed: seed of the order, the shifts, the augmentation and the sentences.
      workers: processes that read batches (0: one thread of this process).
      shard: index of this process, and number of processes.
      extra: names of the additional fields, see `Batch`.
      max_shift: largest shift of an image, in pixels (None: size / 16). It applies only where
        `augment` has no geometric part.
      augment: what else is drawn for each image; regions and texts follow it.
      variants: kinds of false variants, see `rewriting`. Each text gets one of the first kind, in
        random order, of which it has any, with its sentences in the order of the text.

    Raises:
      UserError: if the global batch is larger than the dataset, if the dataset lacks a field of
        `extra`, if a number is out of range, or if images are mirrored and a region or a finding
        has no counterpart on the other side.
    """
    shard_index, num_shards = shard
    global_batch = batch_size * num_shards
    _check_extra(dataset, extra)
    if augment.flip and "labels" in extra:
        augmentation.have_sides(dataset.findings, "findings")
    if augment.flip and {*extra} & {"regions", "region_words"}:
        augmentation.have_sides(dataset.region_names, "regions")
    if not 0 < global_batch <= len(dataset):
        count = len(dataset)
        remedy = f"use 1 to {count} over all processes"
        if count < 2:
            remedy = "add rows to that split: pairs are contrasted with each other"
        raise UserError(
            f"batch {global_batch} does not fit a dataset of {count} "
            f"{'pair' if count == 1 else 'pairs'}; {remedy}"
        )
    if max_tokens < 3 or max_words < 1 or seed < 0:
        raise UserError(
            "data.max_tokens must be >= 3, data.max_words >= 1 and seed >= 0; "
            f"got {max_tokens}, {max_words} and {seed}"
        )
    source = _BatchSource(
        dataset=dataset,
        tokenizer=tokenizer,
        offsets=np.arange(batch_size) * num_shards + shard_index,
        global_batch=global_batch,
        size=size,
        max_tokens=max_tokens,
        max_words=max_words,
        seed=seed,
        extra=tuple(extra),
        max_shift=size // 16 if max_shift is None else max_shift,
        augment=augment,
        variants=tuple(variants),
    )
    order = {"seed": seed, "batch": global_batch, "examples": len(dataset)}
    return BatchIterator(grain.MapDataset.source(source), workers, order)


def _sample_indices(dataset: Dataset) -> range:
    """Returns the indices of evenly spaced records, `CHECKED_TEXTS` or some more."""
    return range(0, len(dataset), max(1, len(dataset) // CHECKED_TEXTS))


def check_texts(dataset: Dataset, tokenizer: tokenization.Tokenizer) -> float:
    """Returns the share of unknown pieces in a sample of a dataset's texts.

    Raises:
      UserError: if the texts are in a script that the tokenizer does not know.
    """
    texts = [dataset.read_text(index) for index in _sample_indices(dataset)]
    return tokenization.check_known(
        tokenizer,
        texts,
        f"the texts of dataset {dataset.name!r}",
        "set config.data.tokenizer to one of their language",
    )


def describe_lengths(
    dataset: Dataset, tokenizer: tokenization.Tokenizer, max_tokens: int, max_words: int
) -> list[str]:
    """Returns how many texts of a sample are too long, in a sentence; none if all fit."""
    indices = _sample_indices(dataset)
    count = 0
    for index in indices:
        sentences = tokenizer.tokenize_sentences(dataset.read_text(index))
        num_pieces = sum(len(sentence.tokens) for sentence in sentences)
        num_words = sum(len(sentence.word_id) for sentence in sentences)
        count += num_pieces > max_tokens - 2 or num_words > max_words  # [CLS] and [SEP]
    if not count:
        return []
    return [
        f"{count} of {len(indices)} sampled texts exceed data.max_tokens {max_tokens} or "
        f"data.max_words {max_words}; at each step such a text loses sentences, in a new order"
    ]


def describe_augmentation(
    dataset: Dataset, augment: Augmentation, size: int, seed: int = 0
) -> list[str]:
    """Returns what an augmentation does to the texts and the regions of a sample, in sentences."""
    indices = _sample_indices(dataset)
    sentences = []
    if augment.flip:
        num_sided = sum(sides.names_side(dataset.read_text(index)) for index in indices)
        sentences.append(
            f"{augment.flip:.0%} of the images are mirrored; {num_sided} of {len(indices)} sampled "
            "texts say left or right in English or Spanish, which change places then"
        )
    if dataset.region_names and augment.is_geometric:
        num_boxes = num_kept = 0
        for index in indices:
            pair = dataset.read_pair(index)
            rng = np.random.default_rng((seed, index))
            sample = augmentation.draw(augment, pair.image.shape[:2], size, rng)
            num_boxes += int((pair.regions[:, 2] > pair.regions[:, 0]).sum())
            num_kept += int(
                augmentation.warp_boxes(pair.regions, sample.matrix, size).any(axis=1).sum()
            )
        sentences.append(
            f"the augmentation moves {num_boxes - num_kept} of {num_boxes} sampled regions out of "
            "the image, which are then absent"
        )
    return sentences


def describe_variants(dataset: Dataset, kinds: Sequence[str]) -> list[str]:
    """Returns how many texts of a sample have a false variant of some kinds, in a sentence.

    Raises:
      UserError: no text of the sample has one.
    """
    if not kinds:
        return []
    texts = [dataset.read_text(index) for index in _sample_indices(dataset)]
    findings = tuple(dataset.findings)
    count = sum(
        any(rewriting.find_variants(text, kind, findings) for kind in kinds) for text in texts
    )
    if not count:
        raise UserError(
            f"no text of {len(texts)} sampled ones has a variant of hard_negatives.kinds "
            f"{', '.join(kinds)}; the rules know findings in English: set it to ()"
        )
    return [
        f"{count} of {len(texts)} sampled texts have a false variant of {', '.join(kinds)}, which "
        "is a hard negative"
    ]


def _check_extra(dataset: Dataset, extra: Sequence[str]) -> None:
    """Raises UserError if a batch cannot have these additional fields."""
    for name in extra:
        if name not in EXTRA_COLUMNS:
            raise UserError(f"batch field {name!r} is unknown; use {', '.join(EXTRA_COLUMNS)}")
        column = EXTRA_COLUMNS[name]
        if not (dataset.findings if column == "labels" else dataset.region_names):
            raise UserError(
                f"batches need {name}, which dataset {dataset.name!r} does not have; name its "
                f"column with --config.data.builder.columns=\"{{'{column}': '...'}}\""
            )


@dataclass
class _BatchSource:
    """Batch k of this process as item k of an endless source: a pure function of (seed, k).

    `offsets` are the positions of this process's items within a global batch.
    """

    dataset: Dataset
    tokenizer: tokenization.Tokenizer
    offsets: Int[np.ndarray, " B"]
    global_batch: int
    size: int
    max_tokens: int
    max_words: int
    seed: int
    extra: tuple[str, ...]
    max_shift: int
    augment: Augmentation
    variants: tuple[str, ...]

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """Returns the names of the dataset's findings."""
        return tuple(self.dataset.findings)

    def __len__(self) -> int:
        return 2**60  # grain needs a length; no run reaches this one

    def __getitem__(self, step: int) -> Batch:
        # As a Python int: an int64 of numpy overflows silently.
        first = int(step) * self.global_batch
        items = [self._load_item(first + int(offset)) for offset in self.offsets]
        images, texts, variants, extras = zip(*items, strict=True)
        # Numpy arrays, until the batch is put on a device.
        image: Any = np.stack(images)
        extra: dict[str, Any] = {
            name: np.stack([fields[name] for fields in extras]) for name in self.extra
        }
        variant = tokenization.stack_texts(variants) if self.variants else None
        return Batch(image, tokenization.stack_texts(texts), extra, variant)

    def _load_item(
        self, position: int
    ) -> tuple[
        np.ndarray,
        tokenization.TokenizedText,
        tokenization.TokenizedText | None,
        dict[str, np.ndarray],
    ]:
        """Returns image [Y X 1], text, its variant and extra fields at an endless position."""
        count = len(self.dataset)
        epoch_length = count // self.global_batch * self.global_batch
        epoch, index = divmod(position, epoch_length)
        study = int(_permutation(count, self.seed, epoch)[index])
        # The position seeds all that is random about an item, so that any step can be the first.
        rng = np.random.default_rng((self.seed, position))
        pair = self.dataset.read_pair(study, rng)
        sample = None
        if self.augment != AS_STORED:
            # By a generator of its own, so that sentences do not depend on the augmentation.
            (child,) = rng.spawn(1)
            sample = augmentation.draw(self.augment, pair.image.shape[:2], self.size, child)
            pair = self._exchange_sides(pair) if sample.is_mirrored else pair
        variant = None
        if self.variants:
            # By a copy, so that both texts have their sentences in one order.
            whole = self.dataset.read_text(study)
            if sample and sample.is_mirrored:
                whole = sides.swap_sides(whole)
            own = np.random.default_rng((position, self.seed))
            false_text = self._draw_variant(pair.text, whole, own)
            variant = self._tokenize(false_text, copy.deepcopy(rng), study)
        text = self._tokenize(pair.text, rng, study)
        image, boxes = self._place(pair, sample, rng)
        extra = {}
        if "labels" in self.extra:
            extra["labels"] = pair.labels
        if "regions" in self.extra:
            extra["regions"] = boxes / self.size
        if "region_words" in self.extra:
            extra["region_words"] = self._mark_region_words(text)
        return image, text, variant, extra

    def _tokenize(
        self, text: str, rng: np.random.Generator, study: int
    ) -> tokenization.TokenizedText:
        return tokenization.tokenize(
            self.tokenizer,
            text,
            max_tokens=self.max_tokens,
            max_words=self.max_words,
            rng=rng,
            name=str(study),
        )

    def _draw_variant(self, text: str, report: str, rng: np.random.Generator) -> str:
        """Returns a false variant of a text, or the text itself if it has none of these kinds.

        A caption rule may have drawn the text from a report, whose other claims are true as well.
        """
        for index in rng.permutation(len(self.variants)):
            kind = self.variants[index]
            found = rewriting.find_variants(text, kind, self.findings, report)
            if found:
                return found[rng.integers(len(found))].text
        return text

    def _place(
        self, pair: Pair, sample: Draw | None, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "Y X 1"], Float[np.ndarray, "R 4"]]:
        """Returns an image in the square that an encoder sees, and its regions, in pixels."""
        if sample and self.augment.is_geometric:
            image = augmentation.warp_image(pair.image, sample.matrix, self.size)
            boxes = augmentation.warp_boxes(pair.regions, sample.matrix, self.size)
        else:
            down, right = transforms.draw_shift(rng, self.max_shift)
            image = transforms.shift_image(transforms.fit_image(pair.image, self.size), down, right)
            boxes = transforms.fit_boxes(pair.regions, pair.image.shape[:2], self.size)
            boxes = transforms.shift_boxes(boxes, down, right, self.size)
        return augmentation.change_grey(image, sample) if sample else image, boxes

    def _exchange_sides(self, pair: Pair) -> Pair:
        """Returns the text, the labels and the regions of a mirrored image, those of `extra`."""
        labels, regions = pair.labels, pair.regions
        if "labels" in self.extra:
            labels = augmentation.exchange_sides(labels, self.dataset.findings, "findings")
        if "regions" in self.extra:
            regions = augmentation.exchange_sides(regions, self.dataset.region_names, "regions")
        return pair._replace(text=sides.swap_sides(pair.text), labels=labels, regions=regions)

    def _mark_region_words(self, text: tokenization.TokenizedText) -> Bool[np.ndarray, "R W"]:
        """Returns which words are in a sentence about which region."""
        topics = [report_parser.find_regions(sentence) for sentence in text.sentence_texts]
        is_about_RS = np.asarray(
            [[region in topic for topic in topics] for region in self.dataset.region_names], bool
        )
        # Padding has sentence -1, which indexes the last sentence: mask it afterwards.
        return is_about_RS[:, text.sentence] & (text.sentence >= 0)


@lru_cache(maxsize=8)  # batches read ahead can be of more than one epoch
def _permutation(count: int, seed: int, epoch: int) -> Int[np.ndarray, " {count}"]:
    return np.random.default_rng((seed, epoch, count)).permutation(count)


class BatchIterator(grain.DatasetIterator):
    """An endless iterator whose whole state is the number of batches returned.

    The state is a dict of a few ints, fit for JSON. It does not depend on the number of workers or
    of processes.
    """

    def __init__(self, batches: grain.MapDataset, workers: int, order: dict[str, int]):
        """Initialises an iterator at step 0.

        Args:
          batches: batch k as item k.
          workers: processes that read batches (0: one thread of this process).
          order: the numbers that the order of the studies depends on.
        """
        super().__init__()
        self._batches, self._workers, self._order = batches, workers, order
        self._step = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        is_first = self._reader is None
        if self._reader is None:
            self._reader = self._open_reader(self._step)
        try:
            if is_first and self._workers:
                batch = processes.read_first(self._reader)
            else:
                batch = next(self._reader)
        except (OSError, RuntimeError) as error:
            self._close_reader()
            raise processes.explain(error, self._workers) or error from None
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the number of batches returned, and the numbers that their order depends on."""
        return {"step": self._step} | self._order

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after `state["step"]` batches.

        Raises:
          UserError: if the state is of another seed, global batch or size of the dataset.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint was trained with {name} {state.get(name)}, now it is {value}; "
                    "restore that value or start in a new workdir"
                )
        self._close_reader()
        self._step = int(state["step"])

    def start_prefetch(self) -> None:
        """Starts to read ahead, before the first batch is requested."""
        if self._reader is None:
            self._reader = self._open_reader(self._step)
        self._reader.start_prefetch()

    def close(self) -> None:
        """Stops reading ahead; a closed iterator returns no more batches."""
        self._close_reader()
        super().close()

    def _open_reader(self, step: int) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
        # `_BatchSource` determines the order; grain only runs it in the background.
        reader = self._batches[step:].to_iter_dataset(options)
        if self._workers:
            processes.check_script(self._workers)
            reader = reader.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=PREFETCHED_BATCHES
                ),
                worker_init_fn=processes.prepare,
            )
        return iter(reader)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

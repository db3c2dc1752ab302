"""Targets of phrase grounding, and the null maps that a model's heat maps have to beat.

A phrase is true inside its mask if it has one, else inside the union of its boxes. Several phrases
with the same words form one target, whose truth is their union.

The null maps are noise, the image centre, the mean lungs, and the mean masks of the training
records. The last two know the text but not the image.
"""

import math
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.types import Phrase, Record


@dataclass(frozen=True)
class Target:
    """A phrase to locate in the record with that index, and the region where it is true."""

    record_index: int
    text: str
    finding: int
    key: str
    truth: Bool[np.ndarray, "Y X"]


@dataclass(frozen=True)
class MapBank:
    """Heat maps of N targets that share K maps: target n has `maps[index[n]]`.

    A null map is the same for many targets, so that storing it once keeps memory independent of N.
    """

    maps: Float[np.ndarray, "K y x"]
    index: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Priors:
    """Mean masks of the training records, by index of the finding and by key of the phrase.

    `lung` is None where no lungs are annotated.
    """

    lung: Float[np.ndarray, "Y X"] | None
    finding: Mapping[int, Float[np.ndarray, "Y X"]]
    phrase: Mapping[str, Float[np.ndarray, "Y X"]]


def truth_mask(phrase: Phrase, size: tuple[int, int]) -> Bool[np.ndarray, "Y X"]:
    """Returns the region where a phrase is true on an image of `size` (Y, X).

    A pixel belongs to a box if its centre lies in it: *x0 <= x + 1/2 < x1*, and likewise for y.

    Raises:
      ValueError: if the mask does not have the size of the image.
    """
    if phrase.mask is not None:
        mask = np.asarray(phrase.mask, bool)
        if mask.shape != tuple(size):
            raise ValueError(
                f"mask of phrase {phrase.text!r} is {mask.shape} on an image of {tuple(size)}; "
                "fit both to one size"
            )
        return mask
    y, x = (np.arange(length) + 0.5 for length in size)
    truth = np.zeros(size, bool)
    for x0, y0, x1, y1 in phrase.boxes:
        truth |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None]
    return truth


def compress_mask(mask: Bool[np.ndarray, "*shape"]) -> bytes:
    """Returns a mask in a few hundred bytes, for when there are many; see `expand_mask`."""
    return zlib.compress(np.packbits(mask).tobytes(), 1)


def expand_mask(compressed: bytes, shape: tuple[int, ...]) -> Bool[np.ndarray, "*shape"]:
    """Inverts `compress_mask` for a mask of a shape.

    >>> expand_mask(compress_mask(np.eye(3, dtype=bool)), (3, 3)).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    bits = np.frombuffer(zlib.decompress(compressed), np.uint8)
    return np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape)


def collect_targets(records: Sequence[Record], bare: bool = False) -> tuple[list[Target], int]:
    """Returns the targets of all records, and the number of phrases without a usable truth.

    Phrases with the same words and finding in one record form one target. A `bare` phrase, the
    finding without its location, is true in the union of all phrases of that finding in the image.
    A truth that is empty or covers the whole image is not usable: every metric compares inside with
    outside.
    """
    targets, skipped = [], 0
    for record_index, record in enumerate(records):
        union = finding_masks(record) if bare else {}
        merged: dict[tuple[str, int], Target] = {}
        for phrase in record.phrases:
            text = phrase.bare if bare else phrase.text
            words = " ".join(text.lower().split())
            if not words:
                continue
            truth = union[phrase.finding] if bare else truth_mask(phrase, record.image.shape[:2])
            identity = words, phrase.finding
            if identity in merged:
                truth = truth | merged[identity].truth
            merged[identity] = Target(record_index, text, phrase.finding, phrase.key, truth)
        usable = [
            target for target in merged.values() if target.truth.any() and not target.truth.all()
        ]
        targets += usable
        skipped += len(merged) - len(usable)
    return targets, skipped


def finding_masks(record: Record) -> dict[int, Bool[np.ndarray, "Y X"]]:
    """Returns the union of the truths of each finding in a record, as masks [Y X] by finding."""
    union: dict[int, np.ndarray] = {}
    for phrase in record.phrases:
        truth = truth_mask(phrase, record.image.shape[:2])
        previous = union.get(phrase.finding)
        union[phrase.finding] = truth if previous is None else previous | truth
    return union


def fit_priors(records: Iterable[Record]) -> Priors:
    """Computes mean masks of training records, in one pass; their images have one size.

    The map of a finding is the mean of its union masks over the images that have it. The map of a
    phrase key is the mean over the targets with that key. The lungs are the union of all anatomy
    masks with `lung` in their name.
    """
    sums: dict[tuple[str, Any], tuple[np.ndarray, int]] = {}

    def add(kind: str, key: int | str, mask: np.ndarray) -> None:
        total, count = sums.get((kind, key), (np.zeros(mask.shape, np.float32), 0))
        sums[kind, key] = total + mask, count + 1

    for record in records:
        lungs = [np.asarray(mask, bool) for name, mask in record.anatomy.items() if "lung" in name]
        if lungs:
            add("lung", "", np.any(lungs, axis=0))
        for target in collect_targets([record])[0]:
            add("phrase", target.key, target.truth)
        for finding, mask in finding_masks(record).items():
            add("finding", finding, mask)
    means = {key: total / np.float32(count) for key, (total, count) in sums.items()}
    return Priors(
        lung=means.get(("lung", "")),
        finding={key: mask for (kind, key), mask in means.items() if kind == "finding"},
        # The empty key marks phrases without a normalised meaning; their mean says nothing.
        phrase={key: mask for (kind, key), mask in means.items() if kind == "phrase" and key},
    )


def null_maps(
    targets: Sequence[Target],
    priors: Priors | None,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    bare: bool = False,
    random: np.random.Generator | int = 0,
) -> dict[str, MapBank]:
    """Returns the null maps of the targets by name.

    - `random`: uniform noise on the model's `grid`, a new map for each target, by the generator or
      seed `random`.
    - `centre`: a Gaussian around the image centre; sigma is a quarter of each side.
    - `prior`: the mean lungs.
    - `mean_finding`: the mean mask of the target's finding.
    - `mean_phrase`: the mean mask of its phrase key; not for bare phrases, whose key is the
      finding.

    All but `random` have the `size` (Y, X) of the image. A phrase that is not in the training
    records falls back to its finding, then to the lungs, then to the centre. Without priors there
    are only the first two maps, and without annotated lungs no `prior`.
    """
    count = len(targets)
    shared = np.zeros(count, int)
    y, x = (((np.arange(length) + 0.5) / length - 0.5) / 0.25 for length in size)
    centre = np.exp(-(y[:, None] ** 2 + x[None] ** 2) / 2).astype(np.float32)
    noise = np.random.default_rng(random).random((count, *grid), np.float32)
    banks = {"random": MapBank(noise, np.arange(count)), "centre": MapBank(centre[None], shared)}
    if priors is None:
        return banks
    if priors.lung is not None:
        banks["prior"] = MapBank(priors.lung[None], shared)
    fallback = centre if priors.lung is None else priors.lung
    findings = [target.finding for target in targets]
    finding_maps = {finding: priors.finding.get(finding, fallback) for finding in findings}
    banks["mean_finding"] = _to_bank(finding_maps, findings)
    if not bare:
        phrases = [(target.key, target.finding) for target in targets]
        phrase_maps = {
            (key, finding): priors.phrase.get(key, finding_maps[finding])
            for key, finding in phrases
        }
        banks["mean_phrase"] = _to_bank(phrase_maps, phrases)
    return banks


def _to_bank(maps: Mapping[Any, np.ndarray], names: Sequence[Hashable]) -> MapBank:
    """Returns the bank of maps [Y X] in which target n has the map called `names[n]`."""
    rows = {name: row for row, name in enumerate(maps)}
    return MapBank(np.stack(list(maps.values())), np.array([rows[name] for name in names]))

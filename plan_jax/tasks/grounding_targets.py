"""Where phrases are true in their images, and the maps that know less than a model should.

A phrase is true where its mask is, else in its boxes; several are one truth, their union. The null
maps are what a model's heat maps have to beat: noise, the centre, the lungs, and the mean masks of
training, which know the text but not the image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.types import Phrase, Record


@dataclass(frozen=True)
class Target:
    """A phrase to be found in the record of that index, and where it is true."""

    record: int
    text: str
    finding: int
    key: str
    truth: Bool[np.ndarray, "Y X"]


@dataclass(frozen=True)
class Maps:
    """One map for each of N targets: a bank of K maps, and which of them each target has."""

    bank: Float[np.ndarray, "K y x"]
    row: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Priors:
    """Mean truths of the training records, keyed by index of the finding and by phrase key.

    `lung` is None where no lungs are annotated.
    """

    lung: Float[np.ndarray, "Y X"] | None
    finding: Mapping[int, Float[np.ndarray, "Y X"]]
    phrase: Mapping[str, Float[np.ndarray, "Y X"]]


def truth_mask(phrase: Phrase, size: tuple[int, int]) -> Bool[np.ndarray, "Y X"]:
    """Draw where a phrase is true on an image of `size` (Y, X): its mask, else its boxes' union.

    A pixel belongs to a box if its centre lies in it: x0 <= x + 1/2 < x1, and so for y.

    Raises:
        ValueError: if the mask is not of the image's size.
    """
    if phrase.mask is not None:
        mask = np.asarray(phrase.mask, bool)
        if mask.shape != tuple(size):
            raise ValueError(f"mask of {mask.shape} on an image of {tuple(size)}: {phrase.text!r}")
        return mask
    y, x = (np.arange(n) + 0.5 for n in size)
    truth = np.zeros(size, bool)
    for x0, y0, x1, y1 in phrase.boxes:
        truth |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None]
    return truth


def targets(records: Sequence[Record], bare: bool = False) -> tuple[list[Target], int]:
    """List what to ask of an image and count what was left out.

    Phrases with the same words in one record are one. A `bare` phrase, the finding without its
    place, is true in the union of all phrases of that finding in the image. Left out and counted
    are phrases whose truth is empty or covers the whole image.
    """
    found, skipped = [], 0
    for index, record in enumerate(records):
        union = finding_masks(record) if bare else {}
        merged: dict[tuple[str, int], Target] = {}
        for phrase in record.phrases:
            text = phrase.bare if bare else phrase.text
            name = " ".join(text.lower().split()), phrase.finding
            if not name[0]:
                continue
            truth = union[phrase.finding] if bare else truth_mask(phrase, record.image.shape[:2])
            if name in merged:
                truth = truth | merged[name].truth
            merged[name] = Target(index, text, phrase.finding, phrase.key, truth)
        usable = [t for t in merged.values() if t.truth.any() and not t.truth.all()]
        found += usable
        skipped += len(merged) - len(usable)
    return found, skipped


def finding_masks(record: Record) -> dict[int, Bool[np.ndarray, "Y X"]]:
    """Unite the truths of each finding in a record, as masks [Y X] keyed by finding."""
    union: dict[int, np.ndarray] = {}
    for phrase in record.phrases:
        truth = truth_mask(phrase, record.image.shape[:2])
        before = union.get(phrase.finding)
        union[phrase.finding] = truth if before is None else before | truth
    return union


def fit_priors(records: Iterable[Record]) -> Priors:
    """Average the truths of training records, all of one image size, seen once each.

    The map of a finding averages, over images that have it, the union of its masks; that of a
    phrase key over its phrases. Lungs are all anatomy masks with `lung` in their name.
    """
    sums: dict[tuple[str, int | str], tuple[np.ndarray, int]] = {}

    def add(kind: str, key: int | str, mask: np.ndarray) -> None:
        total, count = sums.get((kind, key), (np.zeros(mask.shape, np.float32), 0))
        sums[kind, key] = total + mask, count + 1

    for record in records:
        lungs = [np.asarray(m, bool) for name, m in record.anatomy.items() if "lung" in name]
        if lungs:
            add("lung", "", np.any(lungs, axis=0))
        for target in targets([record])[0]:
            add("phrase", target.key, target.truth)
        for finding, mask in finding_masks(record).items():
            add("finding", finding, mask)
    mean = {key: total / np.float32(count) for key, (total, count) in sums.items()}
    return Priors(
        lung=mean.get(("lung", "")),
        finding={key: value for (kind, key), value in mean.items() if kind == "finding"},
        phrase={key: value for (kind, key), value in mean.items() if kind == "phrase" and key},
    )


def null_maps(
    wanted: Sequence[Target],
    priors: Priors | None,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    bare: bool = False,
    seed: int = 0,
) -> dict[str, Maps]:
    """Make the maps to beat: for each name, one map a target, `size` (Y, X) that of the image.

    `random`: uniform noise on the model's grid; `centre`: a Gaussian, sigma a quarter of each side;
    `prior`: the mean lungs; `mean_finding`; `mean_phrase` (not for bare phrases, whose key is their
    finding). A phrase never seen in training falls back to its finding, lungs, centre. Without
    priors only the first two; without annotated lungs no `prior`.
    """
    number, same = len(wanted), np.zeros(len(wanted), int)
    y, x = (((np.arange(n) + 0.5) / n - 0.5) / 0.25 for n in size)
    centre = np.exp(-(y[:, None] ** 2 + x[None] ** 2) / 2).astype(np.float32)
    noise = np.random.default_rng(seed).random((number, *grid), np.float32)
    nulls = {"random": Maps(noise, np.arange(number)), "centre": Maps(centre[None], same)}
    if priors is None:
        return nulls
    if priors.lung is not None:
        nulls["prior"] = Maps(priors.lung[None], same)
    last = centre if priors.lung is None else priors.lung
    finding = {t.finding: priors.finding.get(t.finding, last) for t in wanted}
    nulls["mean_finding"] = _bank(finding, [t.finding for t in wanted])
    if not bare:
        names = [(t.key, t.finding) for t in wanted]
        phrase = {name: priors.phrase.get(name[0], finding[name[1]]) for name in names}
        nulls["mean_phrase"] = _bank(phrase, names)
    return nulls


def _bank(table: Mapping, names: Sequence) -> Maps:
    rows = {name: i for i, name in enumerate(table)}
    return Maps(np.stack(list(table.values())), np.array([rows[name] for name in names]))

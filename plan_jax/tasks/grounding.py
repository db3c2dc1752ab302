"""Phrase grounding: does the heat map of a phrase light up where the phrase is true?

The map of a phrase is `sum_n w_n S_np / sum_n w_n` over its words n, from the model's grid resized
bilinearly to the image; the rest of the image is outside. Each phrase is asked twice: in full
("consolidation in the left lower zone"), and bare ("consolidation"), where the truth is the union
over all phrases of that finding in the image.

Keys of the result:
`cnr_signed`, `cnr_abs`, `pointing`, `miou_raw`, `miou_minmax`, `miou_z`: mean over findings of the
mean over phrases, the truth of a phrase being the union of its boxes; `cnr_boxes_signed`,
`cnr_boxes_abs`: the CNR (its absolute value) of each box, mean over the boxes of a phrase;
`cnr_signed_low`, `..._high`, `pointing_low`, ...: 95 % bootstrap interval over images; `micro/...`:
plain mean over phrases; `<finding>/...`: one finding; `random/...`, `centre/...`, `prior/...` (mean
lungs), `mean_finding/...`, `mean_phrase/...`: the maps of `truth.null_maps`, scored the same way;
`round<t>/...`: the model after t rounds, if it refines; `n`: phrases scored, `skipped`: without a
usable truth, `outside`: true only where a crop cuts the image away; `bare/...`: all again for bare
phrases. Phrases of unknown finding (-1) form one more group, `other`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy.ndimage import gaussian_filter

from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.tasks.grounding_targets import (
    Maps,
    Priors,
    Target,
    fit_priors,
    null_maps,
    targets,
    truth_mask,
)
from plan_jax.types import Features, Model, Phrase, PhraseExample, Record, UserError

__all__ = ["BIOVIL", "Case", "Options", "Priors", "evaluate", "fit_priors", "illustrate"]

HEADLINE = ("cnr_signed", "pointing")  # with an interval; for null maps also by finding
CHUNK = 64  # phrases that go to the model at once; always this many, so that nothing recompiles


@dataclass(frozen=True)
class Options:
    """What the model sees and what is done to its maps; the defaults are the whole image and none.

    `crop`: the model sees the central part of that share of each side, resized back, and maps are
    scored inside it; `smooth`: sigma of a Gaussian over the model's grid, in cells, reflected at
    the border, which the random maps get as well.

    Raises:
        UserError: if a value is out of its range.
    """

    crop: float = 1.0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.crop <= 1 and 0 <= self.smooth < np.inf):
            said = f"crop is {self.crop} and smooth {self.smooth}"
            raise UserError(f"{said}; use a share above 0, up to 1, and a number of cells from 0")


PLAIN = Options()
BIOVIL = Options(crop=448 / 512, smooth=1.5)  # for MS-CXR: arXiv 2204.09817, and its code


@dataclass(frozen=True)
class Case:
    """One phrase of one record (by its index), where it is true in what is shown, and how found."""

    record: int
    phrase: str
    finding: str
    cnr: float
    pointing: float
    truth: Bool[np.ndarray, "Y X"]


def evaluate(
    model: Model,
    records: Sequence[Record],
    *,
    findings: Sequence[str],
    priors: Priors | None = None,
    per_round: bool = True,
    options: Options = PLAIN,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, float], list[Case]]:
    """Score the phrases of `records`, in full and bare, beside the maps that know less.

    `findings` names the indices in the phrases; `per_round` also scores every round of refinement;
    `samples` are drawn for the intervals. The list has one `Case` for each full phrase scored.

    Raises:
        UserError: if the records' images are not of one size.
    """
    shown, seen = _see(model, records, options)
    window = _window(records[0], options)
    known, values = dict(enumerate(findings)), dict[str, float]()
    cases: list[Case] = []
    for prefix, bare in (("", False), ("bare/", True)):
        wanted, skipped = targets(shown, bare)
        part = {"n": float(len(wanted)), "skipped": float(skipped)}
        if options.crop < 1:
            whole = targets(records, bare)[0]
            part["outside"] = float(sum(not t.truth[window].any() for t in whole))
            part["skipped"] -= part["outside"]
        if wanted:
            names = [known.get(t.finding, "other") for t in wanted]
            boxes = [_boxes(shown[t.record], t, bare) for t in wanted]
            scores = _score(_heat(model, seen, wanted, options), wanted, boxes)
            part |= _summary(scores, names, tuple(scores))
            part |= _intervals(scores, names, wanted, samples, seed)
            part |= {f"micro/{key}": float(score.mean()) for key, score in scores.items()}
            size = records[0].image.shape[:2]
            nulls = null_maps(wanted, priors, size=size, grid=model.grid, bare=bare, seed=seed)
            for null, maps in nulls.items():
                if null == "random":  # smoothing raises the absolute CNR of noise as well
                    maps = _smoothed(maps, options)
                else:
                    maps = replace(
                        maps, bank=grounding_metrics.upsample(maps.bank, size)[:, *window]
                    )
                part |= _prefix(null, _summary(_score(maps, wanted, boxes), names, HEADLINE))
            for t in range(model.rounds + 1 if per_round and model.rounds else 0):
                scored = _score(_heat(model, seen, wanted, options, t), wanted, boxes)
                part |= _prefix(f"round{t}", _summary(scored, names))
            if not bare:
                cases = _cases(wanted, names, scores)
        values |= {prefix + key: value for key, value in part.items()}
    return values, cases


def illustrate(
    model: Model,
    records: Sequence[Record],
    cases: Sequence[Case],
    *,
    count: int = 4,
    options: Options = PLAIN,
    seed: int = 0,
) -> list[PhraseExample]:
    """Draw `count` best, random and worst cases by signed CNR, with the map after every round.

    Best and worst take one case of each finding before a second of any; a case is shown once.
    `options` are those that the cases were scored with.
    """
    order = np.argsort([-case.cnr for case in cases], kind="stable").tolist()
    best = _diverse(order, cases, count)
    worst = _diverse([i for i in order[::-1] if i not in best], cases, count)
    rest = [i for i in range(len(cases)) if i not in {*best, *worst}]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:count]
    parts = {"best": best, "random": [rest[i] for i in drawn], "worst": worst}
    chosen = [(kind, cases[i]) for kind, part in parts.items() for i in part]
    if not chosen:
        return []
    shown, seen = _see(model, [records[case.record] for _, case in chosen], options)
    wanted = [Target(i, case.phrase, -1, "", case.truth) for i, (_, case) in enumerate(chosen)]
    steps = range(model.rounds + 1) if model.rounds else (None,)
    heats = np.stack([_heat(model, seen, wanted, options, t).bank for t in steps], axis=1)
    return [
        PhraseExample(kind, case.phrase, record.image, case.truth, heat, case.cnr, case.pointing)
        for (kind, case), record, heat in zip(chosen, shown, heats, strict=True)
    ]


def _see(
    model: Model, records: Sequence[Record], options: Options
) -> tuple[list[Record], Features]:
    """Crop records and show them to the model, resized to its size if anything was cut off."""
    sizes = sorted({record.image.shape[:2] for record in records})
    if len(sizes) != 1:
        raise UserError(
            f"grounding needs images of one size and got {sizes or 'none'}; fit them to one first"
        )
    if options.crop == 1:
        return list(records), model.encode_image(np.stack([record.image for record in records]))
    shown = [_crop(record, options) for record in records]
    plain = [Image.fromarray(record.image[..., 0]) for record in shown]
    large = [one.resize((model.size,) * 2, Image.Resampling.BILINEAR) for one in plain]
    return shown, model.encode_image(np.stack(large)[..., None])


def _window(record: Record, options: Options) -> tuple[slice, slice]:
    sides = [(n, max(1, round(n * options.crop))) for n in record.image.shape[:2]]
    return tuple(slice((n - side) // 2, (n + side) // 2) for n, side in sides)


def _crop(record: Record, options: Options) -> Record:
    """Cut the central part out of an image and out of the truths of its phrases."""
    y, x = window = _window(record, options)
    phrases = []
    for phrase in record.phrases:
        moved = np.reshape(phrase.boxes, (-1, 4)) - [x.start, y.start] * 2
        mask = None if phrase.mask is None else phrase.mask[window]
        phrases.append(replace(phrase, boxes=tuple(map(tuple, moved.tolist())), mask=mask))
    return replace(record, image=record.image[window], phrases=tuple(phrases))


def _boxes(record: Record, target: Target, bare: bool) -> list[Phrase]:
    """List the boxes and masks whose union is the truth of a target, as phrases of one each."""
    words = target.text.lower().split()
    same = [p for p in record.phrases if p.finding == target.finding]
    same = [p for p in same if bare or p.text.lower().split() == words]
    split = [[p] if p.mask is not None else [replace(p, boxes=(b,)) for b in p.boxes] for p in same]
    return [part for parts in split for part in parts]


def _heat(
    model: Model,
    seen: Features,
    wanted: Sequence[Target],
    options: Options,
    rounds: int | None = None,
) -> Maps:
    """Ask the model for the map of each target; each text is read once."""
    place = {text: i for i, text in enumerate(sorted({target.text for target in wanted}))}
    read = model.encode_text(list(place))
    image = np.array([target.record for target in wanted])
    text = np.array([place[target.text] for target in wanted])
    maps = []
    for start in range(0, len(wanted), CHUNK):
        rows = np.minimum(np.arange(start, start + CHUNK), len(wanted) - 1)
        shown = jax.tree.map(lambda x, i=image[rows]: x[i], seen)
        words = jax.tree.map(lambda x, i=text[rows]: x[i], read)
        pair = model.heatmap(shown, words, rounds=rounds)
        similarity, weight = (np.asarray(x, np.float32) for x in pair)
        total = weight.sum(1, keepdims=True)
        heat = np.einsum("bwp,bw->bp", similarity, weight)
        maps.append(heat / np.where(total == 0, 1, total))
    heat = np.concatenate(maps)[: len(wanted)]
    return _smoothed(Maps(heat.reshape(-1, *model.grid), np.arange(len(wanted))), options)


def _smoothed(maps: Maps, options: Options) -> Maps:
    sigma = (0, options.smooth, options.smooth)
    return replace(maps, bank=gaussian_filter(maps.bank, sigma)) if options.smooth else maps


def _score(
    maps: Maps, wanted: Sequence[Target], boxes: Sequence[Sequence[Phrase]]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Measure each target's map, a chunk at a time, so that memory does not grow with N."""
    parts = []
    size = wanted[0].truth.shape
    for start in range(0, len(wanted), CHUNK):
        rows = maps.row[start : start + CHUNK]
        heat = grounding_metrics.upsample(maps.bank[rows], size).reshape(len(rows), -1)
        truth = np.stack([t.truth for t in wanted[start : start + CHUNK]]).reshape(heat.shape)
        cnr = grounding_metrics.contrast_to_noise(heat, truth)
        part = {
            "cnr_signed": cnr,
            "cnr_abs": abs(cnr),
            "pointing": grounding_metrics.pointing(heat, truth),
        }
        for how in grounding_metrics.NORMALISATIONS:
            part[f"miou_{how}"] = grounding_metrics.mean_iou(heat, truth, how)
        part["cnr_boxes_signed"], part["cnr_boxes_abs"] = cnr.copy(), abs(cnr)
        for i, some in enumerate(boxes[start : start + CHUNK]):
            if len(some) > 1:
                each = _each_box(heat[i], some, size)
                part["cnr_boxes_signed"][i] = each.mean()
                part["cnr_boxes_abs"][i] = abs(each).mean()
        parts.append(part)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _each_box(
    heat: Float[np.ndarray, " P"], boxes: Sequence[Phrase], size: tuple[int, int]
) -> Float[np.ndarray, " R"]:
    """Measure the signed CNR of each box of a phrase in turn.

    *BioViL's protocol for MS-CXR:* the pixels of a box count no more for those after it, neither
    inside nor outside. A box of which nothing is left is left out.
    """
    left, found = np.ones(heat.shape, bool), []
    for box in boxes:
        inside = truth_mask(box, size).ravel() & left
        if inside.any():
            found.append(
                grounding_metrics.contrast_to_noise(heat[None, left], inside[None, left])[0]
            )
        left &= ~inside
    return np.array(found)


def _summary(
    scores: Mapping[str, np.ndarray], names: Sequence[str], each: Sequence[str] = ()
) -> dict[str, float]:
    """Average over phrases within each finding, then over findings; also name those in `each`."""
    labels, group = np.unique(names, return_inverse=True)
    values = {}
    for key, score in scores.items():
        mean = np.bincount(group, score) / np.bincount(group)
        values[key] = float(mean.mean())
        if key in each:
            values |= {f"{slug(n)}/{key}": float(m) for n, m in zip(labels, mean, strict=True)}
    return values


def _intervals(
    scores: Mapping[str, np.ndarray],
    names: Sequence[str],
    wanted: Sequence[Target],
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Resample images, keeping the phrases of an image together, and recompute the macro mean."""
    labels, group = np.unique(names, return_inverse=True)
    _, image = np.unique([t.record for t in wanted], return_inverse=True)
    values = {}
    for key in HEADLINE:
        table = np.zeros((image.max() + 1, 2, len(labels)))
        np.add.at(table, (image, 0, group), scores[key])
        np.add.at(table, (image, 1, group), 1)
        low, high = intervals.bootstrap(table, _macro, samples, seed)
        values |= {f"{key}_low": low, f"{key}_high": high}
    return values


def _macro(table: Float[np.ndarray, "N 2 F"]) -> float:
    total, count = table.sum(0)
    return float((total[count > 0] / count[count > 0]).mean())


def _cases(
    wanted: Sequence[Target], names: Sequence[str], scores: Mapping[str, np.ndarray]
) -> list[Case]:
    measured = zip(wanted, names, *(scores[key].tolist() for key in HEADLINE), strict=True)
    return [Case(t.record, t.text, name, *found, t.truth) for t, name, *found in measured]


def _prefix(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in values.items()}


def _diverse(order: Sequence[int], cases: Sequence[Case], count: int) -> list[int]:
    """Take `count` from `order`, one of each finding before a second of any."""
    met: dict[str, int] = {}
    turns = []
    for i in order:
        met[cases[i].finding] = met.get(cases[i].finding, -1) + 1
        turns.append((met[cases[i].finding], len(turns), i))
    return [i for _, _, i in sorted(turns)[:count]]

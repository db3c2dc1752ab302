"""Phrase grounding: does the heat map of a phrase light up where the phrase is true?

The map of a phrase is `sum_n w_n S_np / sum_n w_n` over its words n, from the model's grid resized
bilinearly to the image; the rest of the image is outside. Each phrase is asked twice: in full
("consolidation in the left lower zone"), and bare ("consolidation"), where the truth is the union
over all phrases of that finding in the image.

Keys of the result:
`cnr_signed`, `cnr_abs`, `pointing`, `miou_raw`, `miou_minmax`, `miou_z`: mean over findings of the
mean over phrases; `cnr_signed_low`, `..._high`, `pointing_low`, ...: 95 % bootstrap interval over
images; `micro/...`: plain mean over phrases; `<finding>/...`: one finding (CNR signed, pointing);
`random/...`, `centre/...`, `prior/...` (mean lungs), `mean_finding/...`, `mean_phrase/...`: the
maps of `truth.null_maps`, scored the same way; `round<t>/...`: the model after t rounds, if it
refines; `n`: phrases scored, `skipped`: without a usable truth; `bare/...`: all again for bare
phrases. Phrases of unknown finding (-1) form one more group, `other`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from plan_jax import metrics
from plan_jax.figures import PhraseRow, slug
from plan_jax.truth import Maps, Priors, Target, fit_priors, null_maps, targets
from plan_jax.types import Features, Model, Record, UserError

__all__ = ["Case", "Priors", "evaluate", "fit_priors", "illustrate"]

HEADLINE = ("cnr_signed", "pointing")  # these also get an interval and a value for each finding
CHUNK = 64  # phrases that go to the model at once; always this many, so that nothing recompiles


@dataclass(frozen=True)
class Case:
    """One phrase of one record (by its index), where it is true, and how well it was found."""

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
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, float], list[Case]]:
    """Score the phrases of `records`, in full and bare, beside the maps that know less.

    `findings` names the indices in the phrases; `per_round` also scores every round of refinement;
    `samples` are drawn for the intervals. The list has one `Case` for each full phrase scored.

    Raises:
        UserError: if the records' images are not of one size.
    """
    images = _stack(records)
    seen, size = model.see(images), images.shape[1:3]
    values: dict[str, float] = {}
    cases: list[Case] = []
    for prefix, bare in (("", False), ("bare/", True)):
        wanted, skipped = targets(records, bare)
        part = {"n": float(len(wanted)), "skipped": float(skipped)}
        if wanted:
            names = [_name(t.finding, findings) for t in wanted]
            scores = _score(_heat(model, seen, wanted), wanted, size)
            part |= _summary(scores, names) | _intervals(scores, names, wanted, samples, seed)
            part |= {f"micro/{key}": float(score.mean()) for key, score in scores.items()}
            nulls = null_maps(wanted, priors, size=size, grid=model.grid, bare=bare, seed=seed)
            for null, maps in nulls.items():
                part |= _prefix(null, _summary(_score(maps, wanted, size), names))
            for t in range(model.rounds + 1 if per_round and model.rounds else 0):
                scored = _score(_heat(model, seen, wanted, t), wanted, size)
                part |= _prefix(f"round{t}", _summary(scored, names, each=False))
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
    seed: int = 0,
) -> list[PhraseRow]:
    """Draw `count` best, random and worst cases by signed CNR, with the map after every round.

    Best and worst take one case of each finding before a second of any; a case is shown once.
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
    seen = model.see(_stack([records[case.record] for _, case in chosen]))
    wanted = [Target(i, case.phrase, -1, "", case.truth) for i, (_, case) in enumerate(chosen)]
    steps = range(model.rounds + 1) if model.rounds else (None,)
    heats = np.stack([_heat(model, seen, wanted, t).bank for t in steps], axis=1)
    return [
        PhraseRow(
            kind=kind,
            phrase=case.phrase,
            image=records[case.record].image,
            truth=case.truth,
            heats=heat,
            cnr=case.cnr,
            pointing=case.pointing,
        )
        for (kind, case), heat in zip(chosen, heats, strict=True)
    ]


def _stack(records: Sequence[Record]) -> UInt8[np.ndarray, "N Y X 1"]:
    sizes = sorted({record.image.shape[:2] for record in records})
    if len(sizes) != 1:
        raise UserError(
            f"grounding needs images of one size and got {sizes or 'none'}; fit them to one first"
        )
    return np.stack([record.image for record in records])


def _heat(
    model: Model, seen: Features, wanted: Sequence[Target], rounds: int | None = None
) -> Maps:
    """Ask the model for the map of each target; each text is read once."""
    place = {text: i for i, text in enumerate(sorted({target.text for target in wanted}))}
    read = model.read(list(place))
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
    return Maps(heat.reshape(-1, *model.grid), np.arange(len(wanted)))


def _score(
    maps: Maps, wanted: Sequence[Target], size: tuple[int, int]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Measure each target's map, a chunk at a time, so that memory does not grow with N."""
    parts = []
    for start in range(0, len(wanted), CHUNK):
        rows = maps.row[start : start + CHUNK]
        heat = metrics.upsample(maps.bank[rows], size).reshape(len(rows), -1)
        truth = np.stack([t.truth for t in wanted[start : start + CHUNK]]).reshape(heat.shape)
        cnr = metrics.contrast_to_noise(heat, truth)
        part = {"cnr_signed": cnr, "cnr_abs": abs(cnr), "pointing": metrics.pointing(heat, truth)}
        for how in metrics.NORMALISATIONS:
            part[f"miou_{how}"] = metrics.mean_iou(heat, truth, how)
        parts.append(part)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _summary(
    scores: Mapping[str, np.ndarray], names: Sequence[str], each: bool = True
) -> dict[str, float]:
    """Average over phrases within each finding, then over findings; `each` also names them."""
    labels, group = np.unique(names, return_inverse=True)
    values = {}
    for key, score in scores.items():
        mean = np.bincount(group, score) / np.bincount(group)
        values[key] = float(mean.mean())
        if each and key in HEADLINE:
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
        low, high = metrics.bootstrap(table, _macro, samples, seed)
        values |= {f"{key}_low": low, f"{key}_high": high}
    return values


def _macro(table: Float[np.ndarray, "N 2 F"]) -> float:
    total, count = table.sum(0)
    return float((total[count > 0] / count[count > 0]).mean())


def _cases(
    wanted: Sequence[Target], names: Sequence[str], scores: Mapping[str, np.ndarray]
) -> list[Case]:
    points = zip(scores["cnr_signed"].tolist(), scores["pointing"].tolist(), strict=True)
    return [
        Case(t.record, t.text, name, cnr, pointing, t.truth)
        for t, name, (cnr, pointing) in zip(wanted, names, points, strict=True)
    ]


def _name(finding: int, findings: Sequence[str]) -> str:
    return findings[finding] if 0 <= finding < len(findings) else "other"


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

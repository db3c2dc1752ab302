"""Phrase grounding: the heat map of a phrase is compared with the region where the phrase is true.

The heat map of a phrase is *sum_n w_n S_np / sum_n w_n* over its words n, where S_np is the map of
word n at pixel p and w_n its weight. It is resized bilinearly from the model's grid to the image;
the rest of the image is outside. Each phrase is evaluated twice: in full ("consolidation in the
left lower zone"), and bare ("consolidation"), where the truth is the union over all phrases of that
finding in the image.

Keys of the metrics:

- `cnr_signed`, `cnr_abs`, `pointing`, `miou_raw`, `miou_minmax`, `miou_z`: mean over findings of
  the mean over phrases. The truth of a phrase is the union of its boxes.
- `pointing_box`: pointing where any pixel of a box around the truth is a hit, as CARZero, KAD and
  RadZero score it; a phrase with a mask and no boxes has the box around the mask. `pointing_near`:
  pointing with a tolerance of `Options.tolerance` around the truth.
- `wrong_side`: the share of the map's mass in the other half of the image, for phrases whose truth
  lies in one half; absent if there is none.
- `miou_afloc`: AFLoc's mean over its thresholds, of the mean over findings, of the mean over the
  phrases whose map has a pixel above the threshold; see `metrics.grounding.afloc_ious`. It is
  absent where no phrase has one.
- `cnr_boxes_signed`, `cnr_boxes_abs`: the CNR, or its absolute value, of each box, mean over the
  boxes of a phrase.
- `cnr_signed_low`, `cnr_signed_high`, `pointing_low`, `pointing_high`: 95 % bootstrap intervals
  over images.
- `micro/...`: plain mean over phrases. `<finding>/...`: one finding; phrases of unknown finding
  (-1) form one more group, `other`.
- `random/...`, `centre/...`, `prior/...` (mean lungs), `mean_finding/...`, `mean_phrase/...`: the
  maps of `grounding_targets.null_maps`, scored in the same way.
- `round<t>/...`: the model after t rounds, if it refines.
- `n`: scored phrases. `skipped`: phrases without a usable truth. `outside`: phrases that are true
  only where a crop cuts the image away. `not_finite`: scored phrases whose map is not finite, if
  there are any; `wrong_side` and `miou_afloc` leave them out, and other means are NaN.
- `bare/...`: all of these again for bare phrases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy.ndimage import gaussian_filter

from plan_jax.heads.examples import count_parts, read_ahead, share_batches
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.tasks.grounding_targets import (
    MapBank,
    Priors,
    Target,
    collect_targets,
    compress_mask,
    expand_mask,
    fit_priors,
    null_maps,
    truth_mask,
)
from plan_jax.types import (
    EvalData,
    ExampleScores,
    Features,
    Metric,
    Model,
    Phrase,
    PhraseExample,
    Record,
    Result,
    StoredRecords,
    TaskContext,
    UserError,
    check_options,
    read_annotations,
    select_records,
)

TITLE = "Phrase grounding"
FITS_HEAD = False

# These two have an interval, and for null maps they are also listed by finding.
PRIMARY_KEYS = ("cnr_signed", "pointing")
AFLOC_KEY = "miou_afloc"  # left out of the metrics where no map exceeds some threshold
SIDE_KEY = "wrong_side"  # left out where no truth lies in one half of its image
PARTIAL_KEYS = (AFLOC_KEY, SIDE_KEY)  # scores that some phrases do not have
# Phrases per call of the model. Every call has exactly this many, so that nothing recompiles.
CHUNK = 64
RECORD_BLOCK = 256  # records whose images, features and truths are in memory at once

_SCORES = {
    "cnr_signed": (
        "CNR, signed",
        "How far the heat inside the truth stands above the rest of the image, in units of its "
        "spread. 0: no contrast; negative: the wrong place is hot.",
    ),
    "pointing": ("pointing game", "How often the hottest pixel lies inside the truth."),
    "pointing_box": (
        "pointing game, boxes",
        "How often the hottest pixel lies inside a box around the truth.",
    ),
    "pointing_near": (
        "pointing game, tolerant",
        "How often the hottest pixel lies in the truth or close to it.",
    ),
    "wrong_side": (
        "heat on the wrong side",
        "Share of the heat above the mean that lies in the other half of the image.",
    ),
    "miou_z": (
        "mIoU, above the mean",
        "Overlap of the hot area with the truth at thresholds .1 to .5, after max(S - mean, 0) / "
        "max.",
    ),
    "miou_minmax": ("mIoU, min-max", "The same overlap after scaling each map to [0, 1]."),
    "miou_raw": ("mIoU, raw", "The same overlap on the map as it is, negative values as 0."),
    "miou_afloc": (
        "mIoU, as AFLoc computes it",
        "The overlap at thresholds .1 to .5 after scaling each map to [-1, 1], mean over the maps "
        "that exceed the threshold anywhere.",
    ),
    "cnr_abs": (
        "CNR, absolute",
        "CNR without its sign, as first published. A map that is dark where it should be bright "
        "also scores, so read it next to the signed one.",
    ),
    "cnr_boxes_signed": ("CNR by box, signed", "CNR of each box of a phrase, mean over its boxes."),
    "cnr_boxes_abs": ("CNR by box, absolute", "The same without its sign."),
}
_NULL_LABELS = {
    "random": "random map",
    "centre": "image centre",
    "prior": "lung prior",
    "mean_finding": "mean mask of finding",
    "mean_phrase": "mean mask of phrase",
}


def _describe_scores(
    prefix: str,
    suffix: str,
    nulls: str = "",
    keys: Sequence[str] = tuple(_SCORES),
    headlines: Sequence[str] = (),
) -> dict[str, Metric]:
    """Returns the catalogue entries of some scores under a prefix.

    `nulls` is the prefix of the scores of a null map, with `NULL` for its name.
    """
    metrics = {}
    for key in keys:
        label, meaning = _SCORES[key]
        baselines = {
            null_label: f"{nulls.replace('NULL', null)}{key}"
            for null, null_label in _NULL_LABELS.items()
        }
        metrics[f"{prefix}{key}"] = Metric(
            f"{label}{suffix}",
            meaning,
            digits=2 if key.startswith("cnr") else 3,
            higher_is_better=key != SIDE_KEY,
            baselines=baselines if nulls else {},
            headline=key in headlines,
            undefined="no phrase has a usable truth, or the maps are not finite",
        )
    return metrics


_ROUND_KEYS = (*PRIMARY_KEYS, "miou_z")
# `micro` and `round{t}` come before `{finding}`, which would match them as well.
METRICS = {
    **_describe_scores("", "", "NULL/", headlines=_ROUND_KEYS),
    **_describe_scores("bare/", ", bare phrases", "bare/NULL/", headlines=PRIMARY_KEYS),
    **_describe_scores("micro/", ", mean over phrases", keys=PRIMARY_KEYS),
    **_describe_scores("bare/micro/", ", mean over bare phrases", keys=PRIMARY_KEYS),
    "n": Metric("phrases", "Number of scored phrases.", digits=0),
    "skipped": Metric("skipped phrases", "Phrases without a usable truth.", digits=0),
    "not_finite": Metric(
        "maps that are not finite",
        "Scored phrases whose map is not finite; the heat on the wrong side and AFLoc's mIoU leave "
        "them out.",
        digits=0,
        higher_is_better=False,
    ),
    **_describe_scores("round{t}/", ", round {t}", keys=_ROUND_KEYS),
    **_describe_scores("bare/round{t}/", ", bare phrases, round {t}", keys=_ROUND_KEYS),
    **_describe_scores("{finding}/", ", {finding}", "NULL/{finding}/", keys=PRIMARY_KEYS),
    **_describe_scores(
        "bare/{finding}/", ", bare phrases, {finding}", "bare/NULL/{finding}/", keys=PRIMARY_KEYS
    ),
}


@dataclass(frozen=True)
class Options:
    """The crop of the images and the smoothing of the maps; the defaults change nothing.

    The protocol of BioViL for MS-CXR (arXiv 2204.09817, and its code) is `crop` 480 / 512 and
    `smooth` 1.5; that of BioViL-T and AFLoc is `crop` 448 / 512 and the same `smooth`.

    Attributes:
      crop: the model sees the central part of this share of each side, resized to the model's size,
        and maps are scored inside it.
      smooth: sigma of a Gaussian over the model's grid, in cells, reflected at the border. The
        random maps are smoothed as well.
      tolerance: of `pointing_near`, as a share of the longer side of the image.
      bootstrap_samples: number of resamples of an interval.
      num_examples: number of best, of random and of worst examples on the page.

    Raises:
      UserError: if a value is out of its range.
    """

    crop: float = 1.0
    smooth: float = 0.0
    tolerance: float = 15 / 224  # Zhang et al., arXiv 1608.00507
    bootstrap_samples: int = 1000
    num_examples: int = 4

    def __post_init__(self) -> None:
        check_options("grounding", self, {"bootstrap_samples": 2, "num_examples": 0})
        # Written as `not`, so that NaN is refused too.
        if not 0 < self.crop <= 1:
            raise UserError(
                f"config.eval.grounding.crop is {self.crop}; use a number above 0, at most 1"
            )
        if not 0 <= self.smooth < np.inf:
            raise UserError(f"config.eval.grounding.smooth is {self.smooth}; use 0 or more")
        if not 0 <= self.tolerance <= 1:
            raise UserError(f"config.eval.grounding.tolerance is {self.tolerance}; use 0 to 1")


@dataclass(frozen=True)
class ScoredPhrase:
    """A phrase of the record with that index, its truth in the (cropped) image, and its scores.

    The truth is compressed, because there may be many phrases.
    """

    record_index: int
    text: str
    finding: str
    cnr: float
    pointing: float
    shape: tuple[int, int]
    compressed: bytes

    @property
    def truth(self) -> Bool[np.ndarray, "Y X"]:
        """Returns where the phrase is true [Y X]."""
        return expand_mask(self.compressed, self.shape)


@dataclass
class PhraseScores:
    """The scores of phrases, in full or bare, of a block of records or of all blocks.

    Attributes:
      bare: whether the phrases are bare.
      names: the finding of each scored phrase.
      texts: its words.
      images: the index of its record.
      skipped: phrases without a usable truth.
      outside: phrases that are true only outside of the crop.
      tables: the scores of each block, by the maps that are scored: "" for the model's, the names
        of null maps, and `round<t>`.
      phrases: the scored phrases, unless they are bare.
    """

    bare: bool
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    skipped: int = 0
    outside: int = 0
    tables: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    phrases: list[ScoredPhrase] = field(default_factory=list)

    def add(self, maps: str, scores: dict[str, np.ndarray]) -> None:
        """Appends the scores of a block."""
        self.tables.setdefault(maps, []).append(scores)

    def join(self, maps: str) -> dict[str, np.ndarray]:
        """Returns the scores [N ...] of all blocks."""
        parts = self.tables[maps]
        return {key: np.concatenate([scores[key] for scores in parts]) for key in parts[0]}

    def to_tree(self) -> dict[str, Any]:
        """Returns all but `bare` as dicts and lists, for `extend`."""
        tree = {item.name: getattr(self, item.name) for item in fields(self)}
        del tree["bare"]
        phrases = [vars(phrase) | {"shape": list(phrase.shape)} for phrase in self.phrases]
        return tree | {"phrases": phrases}

    def extend(self, tree: Mapping[str, Any]) -> None:
        """Adds what `to_tree` returned for a block."""
        self.names += tree["names"]
        self.texts += tree["texts"]
        self.images += tree["images"]
        self.skipped += tree["skipped"]
        self.outside += tree["outside"]
        for maps, tables in tree["tables"].items():
            self.tables.setdefault(maps, []).extend(tables)
        for values in tree["phrases"]:
            self.phrases.append(ScoredPhrase(**{**values, "shape": tuple(values["shape"])}))


class Noise:
    """Draws the random maps of phrases: in turn, whichever records a host has.

    A host that has not all records skips what belongs to the others.
    """

    def __init__(self, seed: int, grid: tuple[int, int], num_targets: Sequence[int]) -> None:
        """Starts at the first record.

        Args:
          seed: of the maps.
          grid: the size of a map.
          num_targets: the targets of each record; may be empty where a host has all records.
        """
        self._random = np.random.default_rng(seed)
        self._grid, self._num_targets, self._position = grid, num_targets, 0

    def start(self, first: int, stop: int) -> np.random.Generator:
        """Returns the generator at the first of the records that are next."""
        for count in self._num_targets[self._position : first]:
            self._random.random((count, *self._grid), np.float32)
        self._position = stop
        return self._random


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is grounded."""
    return ("phrases",)


def check(data: EvalData, options: Options) -> None:
    """Raises UserError if the evaluated images do not have one size."""
    if isinstance(data.test, StoredRecords):
        return
    sizes = sorted({record.image.shape[:2] for record in data.test})
    if len(sizes) != 1:
        raise UserError(
            f"task grounding needs images of one size and got {sizes or 'none'}; resize them to "
            "one size first"
        )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Returns the metrics listed in the module's docstring, and examples of phrases.

    Raises:
      UserError: see `check`.
    """
    check(data, options)
    prior_records = data.prior_records
    priors = fit_priors(read_annotations(prior_records)) if len(prior_records) else None
    sides = _score_sides(model, data.test, data.findings, priors, options, context.seed)
    metrics = _summarise_sides(sides, model.rounds, options, context.seed)
    examples = illustrate(model, data.test, sides[""].phrases, options=options)
    scores = {
        f"{prefix}{key}": _score_images(side, key)
        for prefix, side in sides.items()
        if side.names
        for key in _SCORES
        if key not in PARTIAL_KEYS
    }
    return Result(metrics, examples, scores)


def score_phrases(
    model: Model,
    records: Sequence[Record],
    findings: Sequence[str],
    *,
    priors: Priors | None = None,
    options: Options | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], list[ScoredPhrase]]:
    """Computes the metrics of all phrases, in full and bare, and of the null maps.

    `findings` names the indices in the phrases. The list has one `ScoredPhrase` for each full
    phrase with a usable truth.
    """
    options = options or Options()
    sides = _score_sides(model, records, findings, priors, options, seed)
    return _summarise_sides(sides, model.rounds, options, seed), sides[""].phrases


def _score_sides(
    model: Model,
    records: Sequence[Record],
    findings: Sequence[str],
    priors: Priors | None,
    options: Options,
    seed: int,
) -> dict[str, PhraseScores]:
    """Returns the scores of full phrases under "", and of bare ones under "bare/"."""
    sides = {"": PhraseScores(False), "bare/": PhraseScores(True)}
    num_targets = _count_targets(records, sides, options)
    noises = {prefix: Noise(seed, model.grid, counts) for prefix, counts in num_targets.items()}

    def score_block(indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        block = list(read_ahead(lambda index: records[index], indices.tolist()))
        views, features = _encode_views(model, block, options)
        start, trees = int(indices[0]), {}
        for prefix, side in sides.items():
            part = PhraseScores(side.bare)
            random = noises[prefix].start(start, start + len(block))
            _score_block(
                part, model, block, views, features, start, findings, priors, options, random
            )
            trees[prefix] = part.to_tree()
        return trees

    for trees in share_batches(score_block, len(records), RECORD_BLOCK):
        for prefix, tree in trees.items():
            sides[prefix].extend(tree)
    return sides


def _summarise_sides(
    sides: Mapping[str, PhraseScores], rounds: int, options: Options, seed: int
) -> dict[str, float]:
    """Returns the metrics of full and bare phrases."""
    metrics: dict[str, float] = {}
    for prefix, side in sides.items():
        part = {"n": float(len(side.names)), "skipped": float(side.skipped)}
        if options.crop < 1:
            part["outside"] = float(side.outside)
        if side.names:
            part |= _summarise(side, rounds, options.bootstrap_samples, seed)
            if num_lost := np.isnan(side.join("")["pointing"]).sum():
                part["not_finite"] = float(num_lost)
        elif not side.bare:
            part |= dict.fromkeys(PRIMARY_KEYS, float("nan"))
        metrics |= {f"{prefix}{key}": value for key, value in part.items()}
    return metrics


def _count_targets(
    records: Sequence[Record], sides: Mapping[str, PhraseScores], options: Options
) -> dict[str, list[int]]:
    """Returns the number of targets of each record, for both kinds of phrases.

    They are counted only where hosts share the records, since it reads all annotations.
    """
    if count_parts() == 1:
        return {prefix: [] for prefix in sides}

    def count(indices: Int[np.ndarray, " B"]) -> dict[str, list[int]]:
        counts: dict[str, list[int]] = {prefix: [] for prefix in sides}
        for record in read_annotations(select_records(records, indices.tolist())):
            view = record if options.crop == 1 else _crop(record, options)
            for prefix, side in sides.items():
                counts[prefix].append(len(collect_targets([view], side.bare)[0]))
        return counts

    parts = share_batches(count, len(records), RECORD_BLOCK)
    return {prefix: [n for part in parts for n in part[prefix]] for prefix in sides}


def _score_block(
    side: PhraseScores,
    model: Model,
    records: Sequence[Record],
    views: Sequence[Record],
    features: Features,
    start: int,
    findings: Sequence[str],
    priors: Priors | None,
    options: Options,
    random: np.random.Generator,
) -> None:
    """Adds the scores of the phrases of some records, of which the first has the index `start`.

    `random` draws the random maps.
    """
    targets, skipped = collect_targets(views, side.bare)
    side.skipped += skipped
    window = _crop_window(records[0], options)
    if options.crop < 1:
        # A target that the crop removes is empty in the view, so it was counted as skipped.
        whole, _ = collect_targets(records, side.bare)
        outside = sum(not target.truth[window].any() for target in whole)
        side.outside += outside
        side.skipped -= outside
    if not targets:
        return
    boxes = [_truth_parts(views[target.record_index], target, side.bare) for target in targets]
    texts, text_index = _encode_texts(model, targets)

    def compute_maps(rounds: int | None = None) -> MapBank:
        return _heat_maps(model, features, targets, texts, text_index, options, rounds)

    def score(bank: MapBank) -> dict[str, np.ndarray]:
        return _score_maps(bank, targets, boxes, options.tolerance)

    scores = score(compute_maps())
    side.add("", scores)
    size = records[0].image.shape[:2]
    nulls = null_maps(targets, priors, size=size, grid=model.grid, bare=side.bare, random=random)
    for null, bank in nulls.items():
        if null == "random":
            # Smoothing raises the absolute CNR of noise too, so the null needs it as well.
            bank = _smooth(bank, options)
        else:
            # The other maps belong to the whole image: cut them as the image was cut.
            maps = grounding_metrics.upsample(bank.maps, size)[:, *window]
            bank = replace(bank, maps=maps)
        side.add(null, score(bank))
    for rounds in range(model.rounds + 1 if model.rounds else 0):
        side.add(f"round{rounds}", score(compute_maps(rounds)))
    names = [_finding_name(target, findings) for target in targets]
    side.names += names
    side.texts += [target.text for target in targets]
    side.images += [start + target.record_index for target in targets]
    if not side.bare:
        side.phrases += _to_phrases(targets, names, scores, start)


def _summarise(side: PhraseScores, rounds: int, samples: int, seed: int) -> dict[str, float]:
    """Returns the metrics of all phrases, in full or bare."""
    names, scores = side.names, side.join("")
    metrics = _macro_means(scores, names, by_finding=tuple(scores))
    metrics |= _macro_intervals(scores, names, side.images, samples, seed)
    metrics |= _prefixed("micro", _macro_means(scores, [""] * len(names)))
    num_rounds = rounds + 1 if rounds else 0
    round_names = [f"round{t}" for t in range(num_rounds)]
    for null in [maps for maps in side.tables if maps and maps not in round_names]:
        metrics |= _prefixed(null, _macro_means(side.join(null), names, by_finding=PRIMARY_KEYS))
    for name in round_names:
        metrics |= _prefixed(name, _macro_means(side.join(name), names))
    return metrics


def illustrate(
    model: Model,
    records: Sequence[Record],
    phrases: Sequence[ScoredPhrase],
    *,
    options: Options | None = None,
) -> list[PhraseExample]:
    """Returns the best, random and worst phrases by signed CNR, with the map after every round.

    There are `options.num_examples` of each kind. Best and worst have one phrase of each finding
    before a second one of any; no phrase appears twice. `options` are those that the phrases were
    scored with. The first `num_examples` of a random order that is the same for every model are
    always among the examples, so that models can be compared by them.
    """
    options = options or Options()
    count = options.num_examples
    # NaN sorts last, so the phrases of a model that diverged are shown as the worst.
    order = np.argsort([-phrase.cnr for phrase in phrases], kind="stable").tolist()
    best = _spread_over_findings(order, phrases, count)
    worst = _spread_over_findings([i for i in order[::-1] if i not in best], phrases, count)
    shuffled = np.random.default_rng(0).permutation(len(phrases)).tolist()
    random = [i for i in shuffled if i not in {*best, *worst}][:count]
    selection = [
        (kind, phrases[i])
        for kind, indices in (("best", best), ("random", random), ("worst", worst))
        for i in indices
    ]
    if not selection:
        return []
    views, features = _encode_views(
        model, [records[phrase.record_index] for _, phrase in selection], options
    )
    targets = [
        Target(row, phrase.text, -1, "", phrase.truth) for row, (_, phrase) in enumerate(selection)
    ]
    rounds = range(model.rounds + 1) if model.rounds else (None,)
    texts = _encode_texts(model, targets)
    heat_maps_NTyx = np.stack(
        [_heat_maps(model, features, targets, *texts, options, t).maps for t in rounds], axis=1
    )
    return [
        PhraseExample(
            kind=kind,
            phrase=phrase.text,
            image=view.image,
            truth=phrase.truth,
            heat_maps=heat_maps,
            cnr=phrase.cnr,
            pointing=phrase.pointing,
            # Pages compare runs by it: what another protocol shows is another example.
            name=f"{phrase.record_index} {phrase.text} {options.crop} {options.smooth}",
        )
        for (kind, phrase), view, heat_maps in zip(selection, views, heat_maps_NTyx, strict=True)
    ]


# Images ------------------------------------------------------------------------------------------


def _encode_views(
    model: Model, records: Sequence[Record], options: Options
) -> tuple[list[Record], Features]:
    """Returns the records as the model sees them, and the features of their images."""
    if options.crop == 1:
        views = list(records)
        images = np.stack([record.image for record in records])
    else:
        views = [_crop(record, options) for record in records]
        # Only the model's input is resized: truths and scores stay in pixels of the crop.
        resized = [
            np.asarray(
                Image.fromarray(view.image[..., 0]).resize(
                    (model.size, model.size), Image.Resampling.BILINEAR
                )
            )
            for view in views
        ]
        images = np.stack(resized)[..., None]
    return views, model.encode_image(images)


def _crop_window(record: Record, options: Options) -> tuple[slice, slice]:
    def central(length: int) -> slice:
        side = max(1, round(length * options.crop))
        return slice((length - side) // 2, (length + side) // 2)

    return central(record.image.shape[0]), central(record.image.shape[1])


def _crop(record: Record, options: Options) -> Record:
    """Returns the central part of a record: of its image, and of the truths of its phrases."""
    window = rows, columns = _crop_window(record, options)
    phrases = []
    for phrase in record.phrases:
        # Boxes may stick out of the window: `truth_mask` counts only pixels of the image.
        boxes = np.reshape(phrase.boxes, (-1, 4)) - [columns.start, rows.start] * 2
        mask = None if phrase.mask is None else phrase.mask[window]
        phrases.append(replace(phrase, boxes=tuple(map(tuple, boxes.tolist())), mask=mask))
    return replace(record, image=record.image[window], phrases=tuple(phrases))


# Maps --------------------------------------------------------------------------------------------


def _encode_texts(
    model: Model, targets: Sequence[Target]
) -> tuple[Features, Int[np.ndarray, " N"]]:
    """Returns the features of the different texts, and the index of each target's text."""
    texts = sorted({target.text for target in targets})
    row_of_text = {text: row for row, text in enumerate(texts)}
    return model.encode_text(texts), np.array([row_of_text[target.text] for target in targets])


def _heat_maps(
    model: Model,
    features: Features,
    targets: Sequence[Target],
    text_features: Features,
    text_index: Int[np.ndarray, " N"],
    options: Options,
    rounds: int | None = None,
) -> MapBank:
    """Returns the model's heat map of each target, on its grid."""
    image_index = np.array([target.record_index for target in targets])
    chunks = []
    for start in range(0, len(targets), CHUNK):
        # The last chunk repeats the last target, so that all chunks have one shape.
        rows = np.minimum(np.arange(start, start + CHUNK), len(targets) - 1)
        images = jax.tree.map(lambda leaf, index=image_index[rows]: leaf[index], features)
        words = jax.tree.map(lambda leaf, index=text_index[rows]: leaf[index], text_features)
        pair = model.heatmap(images, words, rounds=rounds)
        word_maps_BWP, weights_BW = (np.asarray(array, np.float32) for array in pair)
        total = weights_BW.sum(1, keepdims=True)
        heat_BP = np.einsum("bwp,bw->bp", word_maps_BWP, weights_BW)
        # A phrase whose words all have weight 0 has the map 0, which scores as a constant map.
        chunks.append(heat_BP / np.where(total == 0, 1, total))
    heat = np.concatenate(chunks)[: len(targets)]
    return _smooth(MapBank(heat.reshape(-1, *model.grid), np.arange(len(targets))), options)


def _smooth(bank: MapBank, options: Options) -> MapBank:
    if not options.smooth:
        return bank
    sigma = (0, options.smooth, options.smooth)
    return replace(bank, maps=gaussian_filter(bank.maps, sigma))


# Scores ------------------------------------------------------------------------------------------


def _finding_name(target: Target, findings: Sequence[str]) -> str:
    return findings[target.finding] if 0 <= target.finding < len(findings) else "other"


def _truth_parts(view: Record, target: Target, bare: bool) -> list[Phrase]:
    """Returns the boxes and masks whose union is the truth of a target, one in each phrase."""
    words = target.text.lower().split()
    parts = []
    for phrase in view.phrases:
        if phrase.finding != target.finding or not (bare or phrase.text.lower().split() == words):
            continue
        if phrase.mask is not None:
            parts.append(phrase)
        else:
            parts += [replace(phrase, boxes=(box,)) for box in phrase.boxes]
    return parts


def _score_maps(
    bank: MapBank,
    targets: Sequence[Target],
    boxes: Sequence[Sequence[Phrase]],
    tolerance: float,
) -> dict[str, Float[np.ndarray, "N *T"]]:
    """Computes every score of every target's map; that of AFLoc at each threshold, [N T].

    The maps are resized one chunk at a time, so that memory does not grow with N.
    """
    chunks = []
    size = targets[0].truth.shape
    for start in range(0, len(targets), CHUNK):
        stop = start + CHUNK
        rows = bank.index[start:stop]
        heat_BYX = grounding_metrics.upsample(bank.maps[rows], size)
        truth_BYX = np.stack([target.truth for target in targets[start:stop]])
        boxed_BYX = np.stack([_boxed_truth(parts, size) for parts in boxes[start:stop]])
        heat_BP, truth_BP = (x.reshape(len(rows), -1) for x in (heat_BYX, truth_BYX))
        cnr = grounding_metrics.contrast_to_noise(heat_BP, truth_BP)
        scores = {
            "cnr_signed": cnr,
            "cnr_abs": abs(cnr),
            "pointing": grounding_metrics.pointing(heat_BP, truth_BP),
            "pointing_box": grounding_metrics.pointing(heat_BP, boxed_BYX.reshape(truth_BP.shape)),
            "pointing_near": grounding_metrics.pointing_near(
                heat_BYX, truth_BYX, float(tolerance * max(size))
            ),
            SIDE_KEY: grounding_metrics.wrong_side(heat_BYX, truth_BYX),
        }
        for normalisation in grounding_metrics.NORMALISATIONS:
            scores[f"miou_{normalisation}"] = grounding_metrics.mean_iou(
                heat_BP, truth_BP, normalisation
            )
        scores[AFLOC_KEY] = grounding_metrics.afloc_ious(heat_BP, truth_BP)
        # For a truth of one part the CNR by box is the CNR itself.
        scores["cnr_boxes_signed"], scores["cnr_boxes_abs"] = cnr.copy(), abs(cnr)
        for row, parts in enumerate(boxes[start:stop]):
            if len(parts) > 1:
                cnr_boxes = _cnr_of_boxes(heat_BP[row], parts, size)
                scores["cnr_boxes_signed"][row] = cnr_boxes.mean()
                scores["cnr_boxes_abs"][row] = abs(cnr_boxes).mean()
        chunks.append(scores)
    return {key: np.concatenate([scores[key] for scores in chunks]) for key in chunks[0]}


def _boxed_truth(parts: Sequence[Phrase], size: tuple[int, int]) -> Bool[np.ndarray, "Y X"]:
    """Returns the union of the boxes of a truth; a part without boxes has that of its mask."""
    boxed = np.zeros(size, bool)
    for part in parts:
        if part.boxes:
            boxed |= truth_mask(replace(part, mask=None), size)
            continue
        rows, columns = (np.flatnonzero(truth_mask(part, size).any(axis)) for axis in (1, 0))
        if len(rows):
            boxed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return boxed


def _cnr_of_boxes(
    heat: Float[np.ndarray, " P"], boxes: Sequence[Phrase], size: tuple[int, int]
) -> Float[np.ndarray, " R"]:
    """Computes the signed CNR of each box of a phrase in turn.

    *BioViL's protocol for MS-CXR:* the pixels of a box do not count for the boxes after it, neither
    inside nor outside. A box that earlier boxes cover completely is omitted.
    """
    remaining = np.ones(heat.shape, bool)
    values = []
    for box in boxes:
        inside = truth_mask(box, size).ravel() & remaining
        if inside.any():
            cnr = grounding_metrics.contrast_to_noise(
                heat[None, remaining], inside[None, remaining]
            )
            values.append(cnr[0])
        remaining &= ~inside
    return np.array(values)


def _macro_means(
    scores: Mapping[str, np.ndarray], names: Sequence[str], by_finding: Sequence[str] = ()
) -> dict[str, float]:
    """Returns means over findings of means over phrases; those in `by_finding` by finding too."""
    labels, group = np.unique(names, return_inverse=True)
    metrics = {}
    for key, values in scores.items():
        if key in PARTIAL_KEYS:
            table = values.reshape(len(values), -1)  # a column for each threshold of AFLoc's
            by_threshold = [_mean_of_defined(table[group == n]) for n in range(len(labels))]
            value = float(_mean_of_defined(np.stack(by_threshold)).mean())
            means = _mean_of_defined(np.stack(by_threshold, 1))
        else:
            means = np.bincount(group, values) / np.bincount(group)
            value = float(means.mean())
        if key not in PARTIAL_KEYS or np.isfinite(value):
            metrics[key] = value
        if key in by_finding:
            for label, mean in zip(labels, means.tolist(), strict=True):
                if key not in PARTIAL_KEYS or np.isfinite(mean):
                    metrics[f"{slug(label)}/{key}"] = mean
    return metrics


def _mean_of_defined(values: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " M"]:
    """Returns the mean over the first axis of what is not NaN; NaN where nothing is."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)


def _macro_intervals(
    scores: Mapping[str, np.ndarray],
    names: Sequence[str],
    images: Sequence[int],
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Returns intervals of the means over findings; images are resampled with all their phrases.

    The phrases of one image are not independent of each other, so they stay together.
    """
    metrics: dict[str, float] = {}
    for key in PRIMARY_KEYS:
        table = _sum_by_image(scores[key], names, images)
        low, high = intervals.bootstrap_metric(table, "mean", samples, seed)
        metrics |= {f"{key}_low": low, f"{key}_high": high}
    return metrics


def _sum_by_image(
    values: Float[np.ndarray, " M"], names: Sequence[str], images: Sequence[int]
) -> Float[np.ndarray, "N 2 F"]:
    """Returns the sum and the number of the values of each image's phrases, by finding."""
    labels, group = np.unique(names, return_inverse=True)
    _, image = np.unique(images, return_inverse=True)
    sum_and_count = np.zeros((image.max() + 1, 2, len(labels)))
    np.add.at(sum_and_count[:, 0], (image, group), values)
    np.add.at(sum_and_count[:, 1], (image, group), 1)
    return sum_and_count


def _score_images(side: PhraseScores, key: str) -> ExampleScores:
    """Returns a score of each image's phrases, by finding."""
    phrases: dict[int, list[tuple[str, str]]] = {}
    for image, name, text in zip(side.images, side.names, side.texts, strict=True):
        phrases.setdefault(image, []).append((name, text))
    # With the texts: the phrases of two manifests without labels all have the finding `other`.
    examples = [f"{image} {phrases[image]}" for image in sorted(phrases)]
    return ExampleScores(examples, _sum_by_image(side.join("")[key], side.names, side.images))


def _to_phrases(
    targets: Sequence[Target], names: Sequence[str], scores: Mapping[str, np.ndarray], start: int
) -> list[ScoredPhrase]:
    return [
        ScoredPhrase(
            start + target.record_index,
            target.text,
            name,
            float(scores["cnr_signed"][row]),
            float(scores["pointing"][row]),
            target.truth.shape,
            compress_mask(target.truth),
        )
        for row, (target, name) in enumerate(zip(targets, names, strict=True))
    ]


def _prefixed(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in metrics.items()}


def _spread_over_findings(
    order: Sequence[int], phrases: Sequence[ScoredPhrase], count: int
) -> list[int]:
    """Returns `count` indices of `order`, with one of each finding before a second of any."""
    occurrences: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []
    for index in order:
        finding = phrases[index].finding
        occurrences[finding] = occurrences.get(finding, -1) + 1
        turns.append((occurrences[finding], len(turns), index))
    return [index for _, _, index in sorted(turns)[:count]]

"""Report generation: a decoder on the tower's patches, judged by words and by what it states.

After R2Gen (Chen et al., arXiv 2010.16056) by its published code, without its relational memory,
which is a method and not a harness: a Transformer of the last map's patches, cross-entropy, Adam
with AMSGrad and L2, gradients clipped by value, beam search. One image for each report (R2Gen
joins two views on IU X-ray).

Each report is scored twice. `r2gen/`: the reference loses its rare words to `<unk>` and its end, as
there, which rewards saying `<unk>` and not finishing. `strict/`: the reference whole, in real
words. `ce/`: the findings that both state, which word overlap hardly sees (a missing `no`).

Deviation: R2Gen flips training images, which swaps left and right under an unchanged report; here
none is. Ours: BatchNorm and tower as `mode` says, patience 10 instead of 50, the epoch chosen by
validation loss (`select="bleu4"` is R2Gen's). Trigram blocking: see `heads.beam_search`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from plan_jax.heads import vocabulary as report_vocabulary
from plan_jax.heads.fit import FittedHead, fit_head
from plan_jax.heads.head_on_tower import HeadOnTower, Mode, attach_head, map_chunks, require_tower
from plan_jax.heads.report_decoder import ReportDecoder, generate, token_loss
from plan_jax.heads.vocabulary import Cleaning, Vocabulary
from plan_jax.metrics import text as text_metrics
from plan_jax.types import (
    EvalData,
    Metric,
    Model,
    Record,
    ReportExample,
    Result,
    TaskContext,
    Tower,
    UserError,
)

TITLE = "Report generation"
FITS_HEAD = True


def _text_metric(key: str, label: str, meaning: str, headline: bool = False) -> tuple[str, Metric]:
    """Returns a key and its catalogue entry with the three baselines of generated reports."""
    nulls = {
        "random encoder": f"random/{key}",
        "nearest image's report": f"retrieval/{key}",
        "most frequent report": f"common/{key}",
    }
    return key, Metric(label, meaning, baselines=nulls, headline=headline)


_WORD_OVERLAP = {
    "bleu4": ("BLEU-4", "Shared word sequences of length 1 to 4, over the whole test set."),
    "bleu3": ("BLEU-3", "Shared word sequences of length 1 to 3, over the whole test set."),
    "bleu2": ("BLEU-2", "Shared words and pairs of words, over the whole test set."),
    "bleu1": ("BLEU-1", "Shared words, over the whole test set."),
    "rouge_l": ("ROUGE-L", "F1 of the longest common subsequence of words, mean over reports."),
    "cider": ("CIDEr-D", "Shared word sequences weighted by their rarity, from 0 to 10."),
    "meteor_no_synonyms": (
        "METEOR without synonyms",
        "Aligned words and stems, mean over reports.",
    ),
}
_STATED = {
    "f1": ("F1", "Harmonic mean of their precision and recall."),
    "precision": ("precision", "Share of the generated reports' findings that are true."),
    "recall": ("recall", "Share of the reference reports' findings that are generated."),
}
METRICS = dict(
    [
        _text_metric(
            f"ce/{key}_{mean}",
            f"{label} of findings, {mean}",
            f"Findings stated in generated and reference reports, {over}. {meaning}",
            headline=key == "f1",
        )
        for key, (label, meaning) in _STATED.items()
        for mean, over in (("micro", "over all statements"), ("macro", "mean over findings"))
    ]
    + [
        _text_metric(
            f"{group}/{key}",
            f"{label}, {references}",
            meaning,
            headline=group == "strict" and key in ("bleu4", "rouge_l", "cider"),
        )
        for group, references in (("strict", "whole references"), ("r2gen", "as R2Gen counts"))
        for key, (label, meaning) in _WORD_OVERLAP.items()
    ]
) | {"distinct": Metric("Distinct reports", "Share of different reports among the generated.")}
SPLITS = ("train", "val", "test")
WRITTEN = 32  # reports that are written at once
LEAST = {
    "max_length": 2,
    "width": 1,
    "feed_forward": 1,
    "heads": 1,
    "encoder_layers": 0,
    "layers": 1,
    "clip_norm": 0,
    "batch": 1,
    "epochs": 1,
    "beam": 1,
    "block": 0,
    "length_penalty": 0,
}
Labeller = Callable[[str], Mapping[str, int]]
Writer = Callable[[PyTree, PyTree, Mapping[str, PyTree]], Int[np.ndarray, "N L"]]


@dataclass(frozen=True)
class Options:
    """The constants of the protocol, with R2Gen's values for IU X-ray unless it says `ours`.

    For MIMIC-CXR R2Gen has `max_length` 100, `min_count` 10, 30 epochs, `rate_step` 1 and
    `rate_factor` 0.8: every so many epochs `learning_rate` is multiplied by it.
    `visual_learning_rate` is a tuned tower's. `block` words in a row must not come twice, although
    true reports may repeat them (0: any may, as in R2Gen's beam search). Ours: that, `cleaning`,
    `positions`, `summary`, `patience`, `select`, `mode`. `native` is that of `Tower.apply`: False
    sees images as in pre-training. The limits choose so many reports at random, 0 all of them;
    `num_examples` reports go to the page.
    """

    max_length: int = 60
    min_count: int = 3
    width: int = 512
    feed_forward: int = 512
    heads: int = 8
    encoder_layers: int = 3
    layers: int = 3
    dropout: float = 0.1
    visual_dropout: float = 0.5
    positions: bool = True
    summary: bool = False
    learning_rate: float = 1e-4
    visual_learning_rate: float = 5e-5
    rate_step: int = 50
    rate_factor: float = 0.1
    weight_decay: float = 5e-5
    clip_norm: float = 0.1
    batch: int = 16
    epochs: int = 100
    patience: int = 10
    select: Literal["loss", "bleu4"] = "loss"
    beam: int = 3
    block: int = 3
    length_penalty: float = 0.0
    cleaning: Cleaning = "fixed"
    mode: Mode = "frozen"
    native: bool = False
    max_train_records: int = 0
    max_test_records: int = 0
    num_examples: int = 6


class Split(NamedTuple):
    """Images and their cleaned reports, none empty; how many were empty and are left out."""

    images: UInt8[np.ndarray, "N Y X 1"]
    texts: list[str]
    empty: int


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is generated."""
    return ("text",)


def check(data: EvalData, options: Options) -> None:
    """See that there are reports to learn from, to choose by and to compare with.

    Raises:
      UserError: a split has no report with a word in it; an option is out of its range.
    """
    for name, low in LEAST.items():
        if (value := getattr(options, name)) < low:
            raise UserError(f"report_generation.{name} is {value}; use {low} or more")
    if options.width % options.heads:
        raise UserError(
            f"report_generation.width is {options.width}, which {options.heads} heads do not "
            "divide; use a multiple of heads"
        )
    for split in SPLITS:
        texts = [record.text for record in getattr(data, split)]
        if not any(report_vocabulary.clean_report(text, options.cleaning) for text in texts):
            raise UserError(
                f"task report_generation needs text in {split}, and none of its {len(texts)} "
                "records has any; give reports, or leave the task out"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fit a decoder to `train`, choose its epoch on `val`, and judge what it writes of `test`.

    `context.label_report(text)` reads from a report which findings it states (1) and denies (0).
    Keys: those of `text_metrics.overlap_scores` under `strict/` and `r2gen/`, those of
    `finding_scores` under `ce/`; the same under `retrieval/` for the report of the training
    image nearest by the cosine of the tower's pooled features, and under `common/` for the most
    frequent training report (the first among equals). `n_train`, `n_test`, `reports_empty` (left
    out of all splits), `vocabulary` and `words` (known; mean number written), `epochs`, `distinct`
    (share of different reports). In `context.folder` the fit is kept, so that a stopped call goes
    on. The rows are some test images.

    Raises:
      UserError: what `check` says; the model has no tower, or one whose features are not finite;
        `min_count` leaves no word.
    """
    check(data, options)
    folder, seed = context.folder, context.seed
    tower = require_tower(model)
    splits = {split: gather(getattr(data, split), split, options, seed) for split in SPLITS}
    vocabulary = report_vocabulary.build_vocabulary(splits["train"].texts, options.min_count)
    tokens = _encoded(splits, vocabulary, options.max_length)
    head, probe = _attached(
        tower, splits["train"].images, tokens["train"], vocabulary, options, seed
    )
    written, labeller = _writer(probe, head, options), cache(context.label_report)
    rows = {split: probe.examples(splits[split].images) for split in SPLITS}
    about = f"{tower.name} {options} {vocabulary.words}"
    fit = _fitted(
        probe, written, rows, tokens, splits["val"].texts, vocabulary, options, about, folder, seed
    )
    said = [vocabulary.decode(row) for row in written(fit.params, fit.stats, rows["test"])]
    truth, train = splits["test"].texts, splits["train"].texts
    near = nearest(*(_pooled(probe, rows[split]) for split in ("test", "train")))
    usual = Counter(train).most_common(1)[0][0]
    others = {"retrieval": [train[i] for i in near], "common": [usual] * len(truth)}
    values = _scored(said, truth, vocabulary, options, labeller)
    for name, texts in others.items():
        found = _scored(texts, truth, vocabulary, options, labeller)
        values |= {f"{name}/{key}": value for key, value in found.items()}
    values |= {
        "n_train": len(train),
        "n_test": len(truth),
        "vocabulary": len(vocabulary.words),
        "reports_empty": sum(part.empty for part in splits.values()),
        "epochs": len(fit.history),
        "words": np.mean([len(text.split()) for text in said]),
        "distinct": len(set(said)) / len(said),
    }
    shown = _rows(splits["test"].images, said, truth, labeller, options.num_examples, seed)
    return Result({key: float(value) for key, value in values.items()}, shown)


def gather(records: Sequence[Record], split: str, options: Options, seed: int) -> Split:
    """Take the records that have a report, at most the split's limit of them, and clean it."""
    cleaned = [report_vocabulary.clean_report(record.text, options.cleaning) for record in records]
    kept = np.flatnonzero([bool(text) for text in cleaned])
    empty = len(cleaned) - len(kept)
    limit = {"train": options.max_train_records, "test": options.max_test_records}.get(split, 0)
    if 0 < limit < len(kept):
        kept = np.sort(np.random.default_rng(seed).permutation(kept)[:limit])
    return Split(np.stack([records[i].image for i in kept]), [cleaned[i] for i in kept], empty)


def nearest(
    asked: Float[np.ndarray, "N E"], held: Float[np.ndarray, "M E"]
) -> Int[np.ndarray, " N"]:
    """Find for each row the held row of largest cosine, the first one among equals.

    >>> nearest(np.array([[0.0, 2.0]]), np.array([[9.0, 9.0], [0.0, 1.0]])).tolist()
    [1]
    """
    one, other = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (asked, held)
    )
    return (one @ other.T).argmax(1)


def optimiser(options: Options, steps: int) -> optax.GradientTransformation:
    """Make Adam with AMSGrad as torch has it: clipped by value, then L2, then scaled.

    `steps` are those of an epoch. The head has `learning_rate`, a tower that is tuned
    `visual_learning_rate`.
    """
    falls = options.epochs // options.rate_step if options.rate_step > 0 else 0
    marks = {n * options.rate_step * steps: options.rate_factor for n in range(1, falls + 1)}

    def chain(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip(options.clip_norm) if options.clip_norm else optax.identity(),
            optax.add_decayed_weights(options.weight_decay),
            optax.scale_by_amsgrad(),
            optax.scale_by_learning_rate(optax.piecewise_constant_schedule(rate, marks)),
        )

    parts = {"head": chain(options.learning_rate), "tower": chain(options.visual_learning_rate)}
    return optax.multi_transform(parts, {"head": "head", "tower": "tower"})


def _encoded(
    data: Mapping[str, Split], vocabulary: Vocabulary, most: int
) -> dict[str, Int[np.ndarray, "N T"]]:
    """Turn reports into ids, T as long as the longest with its end, but at most `most`."""
    longest = 1 + max(len(text.split()) for part in data.values() for text in part.texts)
    length = min(longest, most)
    return {
        split: np.stack([vocabulary.encode(text, length) for text in part.texts])
        for split, part in data.items()
    }


def _attached(
    tower: Tower,
    images: np.ndarray,
    tokens: np.ndarray,
    vocabulary: Vocabulary,
    options: Options,
    seed: int,
) -> tuple[ReportDecoder, HeadOnTower]:
    """Put the decoder for images [N Y X 1] and tokens [N T] on the tower."""
    head = ReportDecoder(
        len(vocabulary),
        options.max_length,
        options.width,
        options.feed_forward,
        options.heads,
        options.encoder_layers,
        options.layers,
        options.dropout,
        options.visual_dropout,
        options.positions,
        options.summary,
    )
    probe = attach_head(
        tower,
        head,
        lambda logits, rows: token_loss(logits, rows["tokens"]),
        {"image": images[:2], "tokens": tokens[:2]},
        mode=options.mode,
        native=options.native,
        select_features=lambda stages: {"map": stages.maps[-1], "pooled": stages.pooled},
        seed=seed,
    )
    return head, probe


def _writer(probe: HeadOnTower, head: ReportDecoder, options: Options) -> Writer:
    """Make what writes reports, as ids, of any number of rows."""
    how = {"beam_size": options.beam, "no_repeat_ngram": options.block}
    how["length_penalty"] = options.length_penalty

    @jax.jit
    def some(params: PyTree, stats: PyTree, rows: Mapping[str, PyTree]) -> Int[Array, "B L"]:
        return generate(head, params["head"], probe.features(params, stats, rows), **how).tokens

    return lambda params, stats, rows: map_chunks(lambda r: some(params, stats, r), rows, WRITTEN)


def _fitted(
    probe: HeadOnTower,
    written: Writer,
    rows: Mapping[str, PyTree],
    tokens: Mapping[str, np.ndarray],
    texts: Sequence[str],
    vocabulary: Vocabulary,
    options: Options,
    about: str,
    folder: Path | None,
    seed: int,
) -> FittedHead:
    """Fit to rows and tokens [N T] of `train`; `texts` are the cleaned reports of `val`."""
    cut = [vocabulary.mask_unknown(text, options.max_length - 1) for text in texts]

    def judge(params: PyTree, stats: PyTree) -> float:
        said = [vocabulary.decode(row) for row in written(params, stats, rows["val"])]
        return text_metrics.bleu(said, cut)["bleu4"]

    train, val = (rows[split] | {"tokens": tokens[split]} for split in ("train", "val"))
    count = len(train["tokens"])
    return fit_head(
        probe.loss,
        probe.params,
        probe.stats,
        train,
        val,
        optimiser(options, count // min(options.batch, count)),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        name="report_generation",
        score=judge if options.select == "bleu4" else None,
        description=about,
        folder=folder,
    )


def _pooled(probe: HeadOnTower, rows: Mapping[str, Any]) -> Float[np.ndarray, "N E"]:
    """See rows by the tower as it was before the fit: its pooled features."""
    if "features" in rows:
        return np.asarray(rows["features"]["pooled"])
    return map_chunks(lambda some: probe.features(probe.params, probe.stats, some)["pooled"], rows)


def _scored(
    said: Sequence[str],
    truth: Sequence[str],
    vocabulary: Vocabulary,
    options: Options,
    labeller: Labeller,
) -> dict[str, float]:
    """Score cleaned texts in all three ways."""
    # R2Gen's references hold one word less than may be written: the first place is the beginning.
    cut = [
        [vocabulary.mask_unknown(text, options.max_length - 1) for text in x] for x in (said, truth)
    ]
    labels = [
        [labeller(report_vocabulary.to_sentences(text)) for text in texts]
        for texts in (said, truth)
    ]
    groups = {
        "strict": text_metrics.overlap_scores(said, truth),
        "r2gen": text_metrics.overlap_scores(*cut),
        "ce": text_metrics.finding_scores(*labels),
    }
    return {
        f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()
    }


def _rows(
    images: np.ndarray,
    said: Sequence[str],
    truth: Sequence[str],
    labeller: Labeller,
    number: int,
    seed: int,
) -> list[ReportExample]:
    """Show some images [N Y X 1] at random with what was written and what is stated."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(said))[:number])
    rows = []
    for i in chosen.tolist():
        texts = [report_vocabulary.to_sentences(x[i]) for x in (truth, said)]
        there, claimed = (
            {name for name, value in labeller(text).items() if value == 1} for text in texts
        )
        lists = (there & claimed, there - claimed, claimed - there)
        rows.append(ReportExample(images[i], *texts, *(tuple(sorted(names)) for names in lists)))
    return rows

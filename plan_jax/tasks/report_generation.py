"""Report generation: a Transformer decoder on the patches of the image tower, fitted to reports.

The protocol is that of R2Gen (Chen et al., arXiv 2010.16056), by its published code, without its
relational memory, which is a method and not a protocol: a Transformer of the last map's patches,
cross-entropy, Adam with AMSGrad and L2, gradients clipped by value, beam search. One image for each
report (R2Gen joins two views on IU X-ray).

Keys of the metrics, each computed for the generated reports and for two baselines:

- `strict/...` compares with the whole reference, in real words; `r2gen/...` with the reference
  after its rare words became `<unk>` and its end was cut, as R2Gen does, which rewards `<unk>` and
  reports without an end. The names are those of `metrics.text.overlap_scores`, but `r2gen/rouge_l`
  weighs recall by COCO's beta, as R2Gen has it, and `r2gen/rouge_l_balanced` is the plain F1.
- `ce/...` compares the findings that both state, which word overlap hardly notices (a missing
  `no`). The names are those of `metrics.text.finding_scores`.
- `retrieval/...` is the report of the training image that is nearest by the cosine of the tower's
  pooled features; `common/...` is the most frequent training report (the first among equals).
- `n_train`, `n_test` and `epochs` are counts; `reports_empty` counts the reports without words,
  which are left out of all splits; `vocabulary` is the number of words that can be generated,
  `words` the mean length of the generated reports, `distinct` the share of different ones.

Deviation: R2Gen flips training images, which swaps left and right under an unchanged report; here
none is flipped. Ours: BatchNorm and tower as `mode` says, patience 10 instead of 50, the epoch
selected by validation loss (`select_by="bleu4"` is R2Gen's). For repeated trigrams see
`heads.beam_search`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from plan_jax.heads.examples import (
    ExampleFunction,
    Images,
    list_batches,
    map_chunks,
    open_images,
)
from plan_jax.heads.fit import FitResult, fit_head
from plan_jax.heads.head_on_tower import HeadOnTower, Mode, attach_head, require_tower
from plan_jax.heads.report_decoder import ReportDecoder, generate, token_loss
from plan_jax.heads.vocabulary import (
    Cleaning,
    Vocabulary,
    build_vocabulary,
    clean_report,
    to_sentences,
)
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
    check_options,
    read_column,
    select_records,
)

TITLE = "Report generation"
FITS_HEAD = True


def _text_metric(
    key: str, label: str, meaning: str, headline: bool = False, undefined: str = ""
) -> tuple[str, Metric]:
    """Returns a key and its catalogue entry, with the three baselines of generated reports."""
    baselines = {
        "random encoder": f"random/{key}",
        "nearest image's report": f"retrieval/{key}",
        "most frequent report": f"common/{key}",
    }
    return key, Metric(label, meaning, baselines=baselines, headline=headline, undefined=undefined)


_OVERLAP_METRICS = {
    "bleu4": ("BLEU-4", "Shared word sequences of length 1 to 4, over the whole test set."),
    "bleu3": ("BLEU-3", "Shared word sequences of length 1 to 3, over the whole test set."),
    "bleu2": ("BLEU-2", "Shared words and pairs of words, over the whole test set."),
    "bleu1": ("BLEU-1", "Shared words, over the whole test set."),
    "rouge_l": ("ROUGE-L", "F1 of the longest common subsequence of words, mean over reports."),
    "cider": (
        "CIDEr-D",
        "Shared word sequences, weighted by their rarity, mean over reports; 0 to 10.",
    ),
    "meteor_no_synonyms": (
        "METEOR without synonyms",
        "Aligned words and stems, with a penalty for their order, mean over reports.",
    ),
}
# What a group has besides, or calls by the same name.
_GROUP_METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "strict": {},
    "r2gen": {
        "rouge_l": (
            "ROUGE-L",
            "F of the longest common subsequence of words, recall weighed by beta 1.2 as in COCO's "
            "evaluation, mean over reports.",
        ),
        "rouge_l_balanced": ("ROUGE-L, balanced", _OVERLAP_METRICS["rouge_l"][1]),
    },
}
_FINDING_METRICS = {
    "f1": ("F1", "Harmonic mean of precision and recall of the stated findings"),
    "precision": (
        "precision",
        "Share of the findings in generated reports that the references state",
    ),
    "recall": ("recall", "Share of the findings in reference reports that are generated"),
}
METRICS = dict(
    [
        _text_metric(
            f"ce/{key}_{mean}",
            f"{label} of findings, {mean}",
            f"{meaning}, {over}.",
            headline=key == "f1",
            undefined="no generated and no reference report states a finding",
        )
        for key, (label, meaning) in _FINDING_METRICS.items()
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
        for key, (label, meaning) in (_OVERLAP_METRICS | _GROUP_METRICS[group]).items()
    ]
) | {
    "distinct": Metric(
        "Distinct reports", "Share of different reports among the generated ones; 1 is the most."
    )
}
SPLITS = ("train", "val", "test")
CHUNK_SIZE = 32  # reports that are generated at once
NEAREST_CHUNK = 1024  # images that are compared with all training images at once

Labeller = Callable[[str], Mapping[str, int]]
# generate_ids(params, stats, examples) returns the ids [N L] of a report for each example.
Generator = Callable[[PyTree, PyTree, Mapping[str, PyTree]], Int[np.ndarray, "N L"]]


@dataclass(frozen=True)
class Options:
    """The constants of the protocol: R2Gen's values for IU X-ray, except those marked as ours.

    For MIMIC-CXR R2Gen has `max_length` 100, `min_count` 10, `epochs` 30, `decay_epochs` 1 and
    `decay_factor` 0.8.

    Attributes:
      max_length: the largest number of tokens of a report, its end included.
      min_count: occurrences in training from which a word is in the vocabulary.
      width: channels of all layers; a multiple of `heads`.
      feed_forward: hidden channels of the feed-forward layers.
      heads: attention heads.
      encoder_layers: layers over the patches.
      layers: layers over the words.
      dropout: rate of dropout in the layers and of the embedded words.
      visual_dropout: rate of dropout of the embedded patches.
      positions: whether patches have positions (ours: True).
      summary: whether the tower's vector for the whole image is read as well (ours).
      learning_rate: of the decoder.
      visual_learning_rate: of the tower, in the mode `finetune`.
      decay_epochs: the learning rates are multiplied by `decay_factor` every so many epochs; 0 for
        never.
      decay_factor: see `decay_epochs`.
      weight_decay: the L2 penalty.
      clip_value: the largest absolute value of a gradient's entry; 0 for no bound. R2Gen clips by
        value, not by norm.
      batch: examples in a batch.
      epochs: the largest number of epochs.
      patience: epochs without a better validation score after which the fit stops (ours).
      select_by: the validation score that selects the epoch (ours: `loss`). `bleu4` generates all
        validation reports after every epoch.
      beam_size: beams of the search; 1 is greedy.
      no_repeat_ngram: so many words in a row are not generated twice, although true reports may
        repeat them (ours); 0 allows it, as R2Gen's beam search does.
      length_penalty: that of `heads.beam_search`.
      cleaning: that of `heads.vocabulary` (ours: `fixed`; `published_iu` and `published_mimic` are
        R2Gen's).
      mode: what is fitted, see `heads.head_on_tower` (ours: `frozen`).
      native: that of `Tower.apply`; False shows the tower images as in pre-training.
      max_train_records: so many random reports to fit to; 0 for all.
      max_test_records: so many random reports to test; 0 for all.
      num_examples: reports on the page.
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
    decay_epochs: int = 50
    decay_factor: float = 0.1
    weight_decay: float = 5e-5
    clip_value: float = 0.1
    batch: int = 16
    epochs: int = 100
    patience: int = 10
    select_by: Literal["loss", "bleu4"] = "loss"
    beam_size: int = 3
    no_repeat_ngram: int = 3
    length_penalty: float = 0.0
    cleaning: Cleaning = "fixed"
    mode: Mode = "frozen"
    native: bool = False
    max_train_records: int = 0
    max_test_records: int = 0
    num_examples: int = 6

    def __post_init__(self) -> None:
        non_negative = (
            "encoder_layers",
            "dropout",
            "visual_dropout",
            "learning_rate",
            "visual_learning_rate",
            "decay_epochs",
            "decay_factor",
            "weight_decay",
            "clip_value",
            "no_repeat_ngram",
            "length_penalty",
            "max_train_records",
            "max_test_records",
            "num_examples",
        )
        positive = (
            "min_count",
            "width",
            "feed_forward",
            "heads",
            "layers",
            "batch",
            "epochs",
            "patience",
            "beam_size",
        )
        minima = dict.fromkeys(non_negative, 0) | dict.fromkeys(positive, 1)
        # A word and its end.
        check_options("report_generation", self, minima | {"max_length": 2})
        if self.width % self.heads:
            lower = self.width // self.heads * self.heads
            nearest = " or ".join(str(width) for width in (lower, lower + self.heads) if width)
            raise UserError(
                f"config.eval.report_generation.width {self.width} is not divisible by "
                f"{self.heads} heads; use {nearest}"
            )


class ReportSplit(NamedTuple):
    """Images and their cleaned reports, none empty, and how many empty reports are left out."""

    images: Images
    texts: list[str]
    num_empty: int


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is generated."""
    return ("text",)


def check(data: EvalData, options: Options) -> None:
    """Raises UserError if no record of a split has a report with a word in it."""
    for split in SPLITS:
        texts = read_column(getattr(data, split), "text")
        if not any(clean_report(text, options.cleaning) for text in texts):
            raise UserError(
                f"task report_generation needs text in split {split}, and none of its {len(texts)} "
                "records has any; add reports, or leave report_generation out of config.eval.tasks"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fits a decoder to `data.train`, selects its epoch on `data.val`, and scores test reports.

    The examples are random test images.

    Raises:
      UserError: see `check`; `min_count` leaves no word; the model has no tower, or one whose
        features are not finite.
    """
    check(data, options)
    tower, seed = require_tower(model), context.seed
    splits = {
        "train": read_reports(data.train, options, options.max_train_records, seed),
        "val": read_reports(data.val, options, 0, seed),
        "test": read_reports(data.test, options, options.max_test_records, seed),
    }
    train_texts, test_texts = splits["train"].texts, splits["test"].texts
    vocabulary = build_vocabulary(train_texts, options.min_count)
    tokens = _encode_reports(splits, vocabulary, options.max_length)
    decoder = _build_decoder(vocabulary, options)
    attached = _attach_decoder(tower, decoder, splits["train"].images, tokens, options, seed)
    generate_ids = _generator(attached, decoder, options)
    examples = {split: attached.examples(splits[split].images) for split in SPLITS}
    description = f"{tower.name} {options} {vocabulary.words}"
    score = None
    if options.select_by == "bleu4":
        score = _bleu4_score(
            generate_ids, examples["val"], splits["val"].texts, vocabulary, options
        )
    fit_result = _fit_decoder(attached, examples, tokens, score, options, description, context)
    ids = generate_ids(fit_result.params, fit_result.stats, examples["test"])
    generated = [vocabulary.decode(row) for row in ids]
    nearest = nearest_rows(*_pooled_features(attached, examples["test"], examples["train"]))
    most_frequent = Counter(train_texts).most_common(1)[0][0]
    texts = {
        "": generated,
        "retrieval/": [train_texts[i] for i in nearest],
        "common/": [most_frequent] * len(test_texts),
    }
    if context.label_report is None:
        raise ValueError("report_generation needs TaskContext.label_report")
    # Reports repeat, and labelling is slow.
    label_report = cache(context.label_report)
    metrics: dict[str, float] = {}
    for prefix, candidates in texts.items():
        values = _report_scores(candidates, test_texts, vocabulary, options, label_report)
        metrics |= {f"{prefix}{key}": value for key, value in values.items()}
    metrics |= {
        "n_train": len(train_texts),
        "n_test": len(test_texts),
        "vocabulary": len(vocabulary.words),
        "reports_empty": sum(split.num_empty for split in splits.values()),
        "epochs": len(fit_result.history),
        "words": float(np.mean([len(text.split()) for text in generated])),
        "distinct": len(set(generated)) / len(generated),
    }
    rows = _select_examples(splits["test"], generated, label_report, options.num_examples, seed)
    return Result({key: float(value) for key, value in metrics.items()}, rows)


def read_reports(
    records: Sequence[Record], options: Options, max_records: int, seed: int
) -> ReportSplit:
    """Returns the records that have a report, cleaned; `max_records` random ones, 0 for all."""
    cleaned = [clean_report(text, options.cleaning) for text in read_column(records, "text")]
    indices = np.flatnonzero([bool(text) for text in cleaned])
    num_empty = len(cleaned) - len(indices)
    if 0 < max_records < len(indices):
        indices = np.sort(np.random.default_rng(seed).permutation(indices)[:max_records])
    rows = indices.tolist()
    images = open_images(select_records(records, rows))
    return ReportSplit(images, [cleaned[i] for i in rows], num_empty)


def nearest_rows(
    queries: Float[np.ndarray, "N E"], candidates: Float[np.ndarray, "M E"]
) -> Int[np.ndarray, " N"]:
    """Returns the candidate of largest cosine for each query, the first one among equals.

    >>> nearest_rows(np.array([[0.0, 2.0]]), np.array([[9.0, 9.0], [0.0, 1.0]])).tolist()
    [1]
    """
    # At least 1e-12: a tower may return zeros.
    queries, candidates = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (queries, candidates)
    )
    # In parts, since a table of all queries and candidates would not fit into memory.
    batches = list_batches(len(queries), NEAREST_CHUNK)
    return np.concatenate([(queries[rows] @ candidates.T).argmax(1) for rows in batches])


def build_optimiser(options: Options, steps_per_epoch: int) -> optax.GradientTransformation:
    """Builds Adam with AMSGrad as torch has it: gradients are clipped by value, then L2 is added.

    The decoder has `learning_rate`, a fitted tower `visual_learning_rate`.
    """
    num_decays = options.epochs // options.decay_epochs if options.decay_epochs else 0
    factors = {
        n * options.decay_epochs * steps_per_epoch: options.decay_factor
        for n in range(1, num_decays + 1)
    }

    def amsgrad(learning_rate: float) -> optax.GradientTransformation:
        schedule = optax.piecewise_constant_schedule(learning_rate, factors)
        return optax.chain(
            optax.clip(options.clip_value) if options.clip_value else optax.identity(),
            # Before the moments, as torch's Adam: an L2 penalty, not AdamW's decoupled decay.
            optax.add_decayed_weights(options.weight_decay),
            optax.scale_by_amsgrad(),
            optax.scale_by_learning_rate(schedule),
        )

    parts = {"head": amsgrad(options.learning_rate), "tower": amsgrad(options.visual_learning_rate)}
    return optax.multi_transform(parts, {"head": "head", "tower": "tower"})


def _encode_reports(
    splits: Mapping[str, ReportSplit], vocabulary: Vocabulary, max_length: int
) -> dict[str, Int[np.ndarray, "N T"]]:
    """Returns reports as ids; T is the length of the longest with its end, at most `max_length`."""
    longest = 1 + max(len(text.split()) for split in splits.values() for text in split.texts)
    length = min(longest, max_length)
    return {
        name: np.stack([vocabulary.encode(text, length) for text in split.texts])
        for name, split in splits.items()
    }


def _build_decoder(vocabulary: Vocabulary, options: Options) -> ReportDecoder:
    return ReportDecoder(
        vocabulary=len(vocabulary),
        length=options.max_length,
        width=options.width,
        feed_forward=options.feed_forward,
        heads=options.heads,
        encoder_layers=options.encoder_layers,
        layers=options.layers,
        dropout=options.dropout,
        visual_dropout=options.visual_dropout,
        positions=options.positions,
        summary=options.summary,
    )


def _attach_decoder(
    tower: Tower,
    decoder: ReportDecoder,
    images: Images,
    tokens: Mapping[str, Int[np.ndarray, "N T"]],
    options: Options,
    seed: int,
) -> HeadOnTower:
    return attach_head(
        tower,
        decoder,
        lambda logits, examples: token_loss(logits, examples["tokens"]),
        {"image": images[:2], "tokens": tokens["train"][:2]},
        mode=options.mode,
        native=options.native,
        select_features=lambda stages: {"map": stages.maps[-1], "pooled": stages.pooled},
        seed=seed,
    )


def _generator(attached: HeadOnTower, decoder: ReportDecoder, options: Options) -> Generator:
    """Returns a function that generates reports, as ids, for any number of examples."""

    @ExampleFunction
    def generate_chunk(
        state: tuple[PyTree, PyTree], examples: Mapping[str, PyTree]
    ) -> Int[Array, "B L"]:
        params, stats = state
        sequences = generate(
            decoder,
            params["head"],
            attached.features(params, stats, examples),
            beam_size=options.beam_size,
            no_repeat_ngram=options.no_repeat_ngram,
            length_penalty=options.length_penalty,
        )
        return sequences.tokens

    def generate_ids(
        params: PyTree, stats: PyTree, examples: Mapping[str, PyTree]
    ) -> Int[np.ndarray, "N L"]:
        return map_chunks(generate_chunk.bind((params, stats)), examples, CHUNK_SIZE)

    return generate_ids


def _bleu4_score(
    generate_ids: Generator,
    examples: Mapping[str, PyTree],
    references: Sequence[str],
    vocabulary: Vocabulary,
    options: Options,
) -> Callable[[PyTree, PyTree], float]:
    """Returns the validation score of R2Gen: BLEU-4 against its shortened references."""
    references = [vocabulary.mask_unknown(text, options.max_length - 1) for text in references]

    def score(params: PyTree, stats: PyTree) -> float:
        ids = generate_ids(params, stats, examples)
        return text_metrics.bleu([vocabulary.decode(row) for row in ids], references)["bleu4"]

    return score


def _fit_decoder(
    attached: HeadOnTower,
    examples: Mapping[str, dict[str, PyTree]],
    tokens: Mapping[str, Int[np.ndarray, "N T"]],
    score: Callable[[PyTree, PyTree], float] | None,
    options: Options,
    description: str,
    context: TaskContext,
) -> FitResult:
    train, val = (examples[split] | {"tokens": tokens[split]} for split in ("train", "val"))
    count = len(train["tokens"])
    return fit_head(
        attached.loss,
        attached.params,
        attached.stats,
        train,
        val,
        build_optimiser(options, count // min(options.batch, count)),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=context.seed,
        score=score,
        name="report_generation",
        option="config.eval.report_generation.learning_rate",
        description=description,
        folder=context.folder,
        check_stop=context.check_stop,
    )


def _pooled_features(
    attached: HeadOnTower, *splits: Mapping[str, Any]
) -> list[Float[np.ndarray, "N E"]]:
    """Returns the pooled features of the examples of splits, by the tower before the fit."""

    @ExampleFunction
    def pool(state: tuple[PyTree, PyTree], chunk: PyTree) -> Float[Array, "B E"]:
        return attached.features(*state, chunk)["pooled"]

    compute = pool.bind((attached.params, attached.stats))
    return [
        np.asarray(examples["features"]["pooled"])  # cached
        if "features" in examples
        else map_chunks(compute, examples)
        for examples in splits
    ]


def _report_scores(
    generated: Sequence[str],
    references: Sequence[str],
    vocabulary: Vocabulary,
    options: Options,
    label_report: Labeller,
) -> dict[str, float]:
    """Computes all metrics of cleaned reports."""
    # R2Gen's references hold one word less than may be generated: its first place is the beginning.
    max_words = options.max_length - 1
    shortened = (
        [vocabulary.mask_unknown(text, max_words) for text in texts]
        for texts in (generated, references)
    )
    findings = (
        [label_report(to_sentences(text)) for text in texts] for texts in (generated, references)
    )
    groups = {
        "strict": text_metrics.overlap_scores(generated, references),
        "r2gen": text_metrics.overlap_scores(*shortened),
        "ce": text_metrics.finding_scores(*findings),
    }
    # What R2Gen calls ROUGE-L is COCO's; the whole references are scored by the balanced one only.
    del groups["strict"]["rouge_l_coco"]
    groups["r2gen"]["rouge_l_balanced"] = groups["r2gen"]["rouge_l"]
    groups["r2gen"]["rouge_l"] = groups["r2gen"].pop("rouge_l_coco")
    return {
        f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()
    }


def _select_examples(
    test: ReportSplit, generated: Sequence[str], label_report: Labeller, count: int, seed: int
) -> list[ReportExample]:
    """Returns random test images with both reports, and how their findings compare."""
    indices = np.sort(np.random.default_rng(seed).permutation(len(generated))[:count])
    examples = []
    for i in indices.tolist():
        reference, text = (to_sentences(report) for report in (test.texts[i], generated[i]))
        true, stated = (
            {name for name, value in label_report(report).items() if value == 1}
            for report in (reference, text)
        )
        examples.append(
            ReportExample(
                test.images[i],
                reference,
                text,
                correct=tuple(sorted(true & stated)),
                missed=tuple(sorted(true - stated)),
                invented=tuple(sorted(stated - true)),
            )
        )
    return examples

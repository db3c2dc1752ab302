"""Retrieval: an image ranks all reports, and a report ranks all images.

There are two protocols. In both, ties count against the model.

**The own report.** A query is answered by its own report or image. Reports with the same words are
the same report, so any image that carries it is a hit, in both directions. Keys, for `i2t` (image
to report) and `t2i`:

- `i2t_r1`, `i2t_r5`, `i2t_r10`: share of queries with a hit among the first k, with a 95 %
  bootstrap interval over queries in `i2t_r5_low`, `i2t_r5_high`. `i2t_median_rank`.
- `chance/...`: the same for a random order.
- `n`: records with a report. `duplicates`: those that share their text with another.
  `without_report`: records that are left out because they have none, as under a caption rule.

**A report of the same class** (GLoRIA's CheXpert 5x200, ConVIRT's 8x200), if `Options.classes`
names classes. Keys:

- `class/i2t_p5`: precision among the first five, mean over queries. A k above the number of
  candidates is cut to it.
- `class/chance/...`: the precision of a random order, which is the share of candidates of the same
  class whatever k.
- `class/<class>/n`: candidates of a class. `class/reports`: candidates with a report.
  `class/absent`: classes without candidates, which are omitted.

False variants of the reports measure whether the model reads left, right, "no", size and place; see
`report_variants` for the keys, as `laterality_accuracy`.

Keys without a prefix use the model's global similarity, or its first kind if it has no global one;
other kinds are under `local/`, `both/`, and under `class/local/`, `class/both/`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.heads.examples import (
    count_examples,
    count_parts,
    list_batches,
    open_images,
    pad_examples,
    read_examples,
    share_items,
)
from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.metrics import retrieval as retrieval_metrics
from plan_jax.tasks import report_variants
from plan_jax.types import (
    EvalData,
    ExampleScores,
    Features,
    Metric,
    Model,
    Record,
    Result,
    RetrievalExample,
    TaskContext,
    UserError,
    check_options,
    read_column,
    select_records,
)

TITLE = "Image-text retrieval"
FITS_HEAD = False
RECALL_CUTOFFS = (1, 5, 10)
PRECISION_CUTOFFS = (1, 5, 10, 100)  # GLoRIA reports 5, 10, 100, ConVIRT 5, 10, 50
PRIMARY_KIND = "global"
EXAMPLE_TEXTS = 5  # ranked reports of an example on the page
DIRECTIONS = ("i2t", "t2i")
IMAGE_BLOCK = 512  # images that are compared with all texts at once
BLOCK_ENTRIES = 2**21  # of such a table, unless it has fewer than 32 images
KEPT_BYTES = 2**28  # larger tables of all images are computed twice


def _describe_direction(direction: str, route: str) -> dict[str, Metric]:
    """Returns the catalogue entries of one direction, for the primary and for other kinds."""
    metrics = {}
    for prefix, suffix in (("", ""), ("{similarity}/", ", {similarity} similarity")):
        for cutoff in RECALL_CUTOFFS:
            key = f"{direction}_r{cutoff}"
            metrics[f"{prefix}{key}"] = Metric(
                f"R@{cutoff}, {route}{suffix}",
                f"How often its own report, or image, is among the first {cutoff}.",
                baselines={"chance": f"chance/{key}"},
                headline=not prefix and key in ("i2t_r1", "i2t_r5", "t2i_r5"),
            )
        metrics[f"{prefix}{direction}_median_rank"] = Metric(
            f"median rank, {route}{suffix}",
            "Half of the queries are answered by this rank.",
            digits=1,
            baselines={"chance": f"chance/{direction}_median_rank"},
            higher_is_better=False,
        )
        metrics[f"class/{prefix}{direction}_p{{k}}"] = Metric(
            f"precision, {route}, k = {{k}}{suffix}",
            "Share of the first k that have the class of the query.",
            baselines={"chance": f"class/chance/{direction}_p{{k}}"},
        )
    return metrics


METRICS = {
    **_describe_direction("i2t", "image to report"),
    **_describe_direction("t2i", "report to image"),
    "n": Metric("studies", "Number of candidates.", digits=0),
    "duplicates": Metric("duplicates", "Studies that share their words with another.", digits=0),
    "without_report": Metric("without report", "Studies without a report, left out.", digits=0),
    **report_variants.METRICS,
}


@dataclass(frozen=True)
class Options:
    """The classes of the second protocol, if any, and the size of the output.

    Attributes:
      classes: findings that are the classes; () skips the second protocol.
      absent: other findings that must be 0 in a candidate, as CheXpert 5x200 asks of the eight that
        are neither its classes nor "No Finding".
      per_class: largest number of candidates of a class, drawn with the seed.
      cuts: the k of precision at k.
      variant_reports: reports that are compared with false variants, for each kind; 0 for none.
      bootstrap_samples: number of resamples of an interval.
      num_examples: number of images on the page, drawn with the seed.

    Raises:
      UserError: if a number is out of its range.
    """

    classes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    per_class: int = 200
    cuts: tuple[int, ...] = PRECISION_CUTOFFS
    variant_reports: int = 1000
    bootstrap_samples: int = 1000
    num_examples: int = 4

    def __post_init__(self) -> None:
        minima = {"per_class": 1, "variant_reports": 0, "bootstrap_samples": 2, "num_examples": 0}
        check_options("retrieval", self, minima)
        if any(cutoff < 1 for cutoff in self.cuts):
            raise UserError(f"config.eval.retrieval.cuts is {self.cuts}; use numbers of at least 1")


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is retrieved."""
    return ("text",)


def check(data: EvalData, options: Options) -> None:
    """Raises UserError if a class, or a finding in `absent`, is not a finding of the data."""
    for name in (*options.classes, *options.absent):
        if name not in data.findings:
            kind = "class" if name in options.classes else "absent finding"
            raise UserError(
                f"retrieval {kind} {name} is not in the data; use findings of "
                f"{', '.join(data.findings) or 'another dataset, as this one has none'}"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Returns the metrics of both protocols, and what some random images retrieve.

    Raises:
      UserError: see `check`; or no record has exactly one of the classes.
    """
    check(data, options)
    seed = context.seed
    # A record without a report has nothing to retrieve, and all of them would have the same words.
    all_texts = read_column(data.test, "text")
    with_report = [row for row, text in enumerate(all_texts) if text.strip()]
    records, texts = select_records(data.test, with_report), [all_texts[i] for i in with_report]
    label, num_hits = _group_texts(texts)
    images = model.encode_image(open_images(records))
    tables = SimilarityTables(model, images, model.encode_text(texts))
    ranks, example_scores = _rank(tables, label, _draw_examples(len(texts), options, seed))
    metrics = {
        "n": float(len(texts)),
        "duplicates": float((num_hits > 1).sum()),
        "without_report": float(len(all_texts) - len(texts)),
    }
    primary = _primary_kind(ranks)
    for kind, ranks_of_direction in ranks.items():
        prefix = "" if kind == primary else f"{kind}/"
        for direction, values in ranks_of_direction.items():
            recalls = _recalls(values, options.bootstrap_samples, seed)
            metrics |= {f"{prefix}{direction}_{key}": value for key, value in recalls.items()}
    for direction in DIRECTIONS:
        for k in RECALL_CUTOFFS:
            chance = retrieval_metrics.chance_recall(num_hits, len(texts), k)
            metrics[f"chance/{direction}_r{k}"] = chance
        median = retrieval_metrics.chance_median_rank(num_hits, len(texts))
        metrics[f"chance/{direction}_median_rank"] = median
    if options.variant_reports and context.find_variants:
        metrics |= report_variants.compare_variants(
            model,
            images,
            texts,
            context.find_variants,
            primary=primary,
            max_reports=options.variant_reports,
            bootstrap_samples=options.bootstrap_samples,
            seed=seed,
        )
    if options.classes:
        metrics |= class_precision(model, data.test, data.findings, options, seed)
    examples = [
        _example(records[row], texts, scores, label == label[row], ranks[primary]["i2t"][row])
        for row, scores in example_scores.items()
    ]
    return Result(metrics, examples, _score_queries(ranks[primary], texts))


def _score_queries(
    ranks: Mapping[str, Float[np.ndarray, " Q"]], texts: Sequence[str]
) -> dict[str, ExampleScores]:
    """Returns for each recall which queries are answered; a query is the image or its report."""
    names = [f"{row} {text}" for row, text in enumerate(texts)]
    return {
        f"{direction}_r{k}": ExampleScores(
            names, np.stack([values <= k, np.ones(len(values))], 1)[..., None].astype(float)
        )
        for direction, values in ranks.items()
        for k in RECALL_CUTOFFS
    }


class SimilarityTables:
    """The similarities of images and texts, a block of images at a time.

    Small tables are kept; larger ones are computed again, so that memory does not grow with the
    square of the number of records.

    Attributes:
      blocks: the rows of each block.
    """

    def __init__(self, model: Model, images: Features, texts: Features) -> None:
        """Computes nothing yet."""
        self._model, self._images, self._texts = model, images, texts
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        size = int(np.clip(BLOCK_ENTRIES // count_examples(texts), 32, IMAGE_BLOCK))
        # Blocks of nearly one size: a last one of few images would be padded to a whole one.
        count = count_examples(images)
        self._size = -(-count // max(-(-count // size), min(count, count_parts())))
        self.blocks = [
            slice(int(rows[0]), int(rows[-1]) + 1) for rows in list_batches(count, self._size)
        ]

    def read(self, blocks: Iterable[slice]) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Yields the rows of some blocks, and the table [I T] of each kind; may be repeated."""
        table_bytes = 4 * count_examples(self._texts) * count_examples(self._images)
        for rows in blocks:
            tables = self._kept.get(rows.start) or self._compute(rows)
            if len(tables) * table_bytes <= KEPT_BYTES:
                self._kept[rows.start] = tables
            yield rows, tables

    def _compute(self, rows: slice) -> dict[str, np.ndarray]:
        block = read_examples(self._images, np.arange(rows.start, rows.stop))
        if len(self.blocks) > 1:  # for blocks of one size, which are compiled once
            block = pad_examples(block, self._size)
        tables = self._model.similarity(block, self._texts)
        count = rows.stop - rows.start
        return {kind: np.asarray(table, np.float32)[:count] for kind, table in tables.items()}


def _group_texts(texts: Sequence[str]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Returns the number of each text's group of texts with the same words, and the group's size.

    Case and white space do not make two reports different.
    """
    groups: dict[str, int] = {}
    label = np.array([groups.setdefault(" ".join(t.lower().split()), len(groups)) for t in texts])
    return label, np.bincount(label)[label]


def _rank(
    tables: SimilarityTables, label: Int[np.ndarray, " N"], example_rows: Sequence[int]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[int, np.ndarray]]:
    """Returns the ranks [N] of each kind and direction, and the scores [N] of some images."""
    counters: dict[str, retrieval_metrics.RankCounter] = {}
    ranks: dict[str, dict[str, np.ndarray]] = {}
    scores_of_row: dict[int, np.ndarray] = {}

    def rank_images(blocks: Sequence[slice]) -> dict[str, Any]:
        image_ranks: dict[str, dict[str, np.ndarray]] = {}
        scores = {}
        for rows, table in tables.read(blocks):
            hits_IT = label[rows, None] == label
            for kind, scores_IT in table.items():
                part = retrieval_metrics.hit_ranks(scores_IT, hits_IT)
                image_ranks.setdefault(kind, {})[str(rows.start)] = part
                counters.setdefault(kind, retrieval_metrics.RankCounter(len(label)))
                counters[kind].find_best(scores_IT.T, hits_IT.T)
            for row in example_rows:
                if rows.start <= row < rows.stop:
                    scores[str(row)] = table[_primary_kind(table)][row - rows.start].copy()
        return {"ranks": image_ranks, "scores": scores, "counters": list_states()}

    def count_images(blocks: Sequence[slice]) -> dict[str, Any]:
        for rows, table in tables.read(blocks):
            hits_IT = label[rows, None] == label
            for kind, scores_IT in table.items():
                counters[kind].count_above(scores_IT.T, hits_IT.T)
        return {"counters": list_states()}

    def list_states() -> dict[str, dict[str, np.ndarray]]:
        return {kind: counter.state() for kind, counter in counters.items()}

    def merge_counters(parts: Sequence[Mapping[str, Any]]) -> None:
        for kind in {kind: None for part in parts for kind in part["counters"]}:
            counters.setdefault(kind, retrieval_metrics.RankCounter(len(label)))
            states = [part["counters"][kind] for part in parts if kind in part["counters"]]
            counters[kind].merge(states)

    parts = share_items(tables.blocks, rank_images)
    merge_counters(parts)
    for part in parts:
        scores_of_row |= {int(row): scores for row, scores in part["scores"].items()}
        for kind, image_ranks in part["ranks"].items():
            values = ranks.setdefault(kind, {"i2t": np.empty(len(label))})["i2t"]
            for start, block_ranks in image_ranks.items():
                values[int(start) : int(start) + len(block_ranks)] = block_ranks
    # A text's images are spread over the blocks, so its rank needs a second pass.
    merge_counters(share_items(tables.blocks, count_images))
    for kind, counter in counters.items():
        ranks[kind]["t2i"] = counter.ranks()
    return ranks, {row: scores_of_row[row] for row in example_rows}


def class_precision(
    model: Model, records: Sequence[Record], findings: Sequence[str], options: Options, seed: int
) -> dict[str, float]:
    """Computes how many of the first k retrieved reports or images have the query's class.

    *GLoRIA (ICCV 2021), CheXpert 5x200: precision@k over 5 classes of 200 images each.* Candidates
    are records in which exactly one of the classes is present, no other is unknown (-1) and the
    findings in `absent` are 0; at most `per_class` of each are drawn with the seed. An image ranks
    the candidates' reports, its own among them, as in GLoRIA's retrieval; a report ranks the
    candidates' images. A candidate without a report takes part with its image only. Without any
    report there is no direction to measure.

    Raises:
      UserError: if there are no candidates.
    """
    classes = options.classes
    columns, absent = (
        [list(findings).index(name) for name in names] for names in (classes, options.absent)
    )
    candidates, label = _class_candidates(records, columns, absent, options.per_class, seed)
    if not len(candidates):
        raise UserError(
            f"no record has exactly one of {', '.join(classes)} and none of them unknown; use "
            "fewer config.eval.retrieval.classes, or fewer findings in absent"
        )
    count = np.bincount(label, minlength=len(classes))
    candidate_texts = read_column(candidates, "text")
    has_report = np.array([bool(text.strip()) for text in candidate_texts])
    metrics = {f"class/{slug(name)}/n": float(n) for name, n in zip(classes, count, strict=True)}
    metrics["class/absent"] = float((count == 0).sum())
    metrics["class/reports"] = float(has_report.sum())
    if not has_report.any():
        return metrics
    images = model.encode_image(open_images(candidates))
    texts = [text for text in candidate_texts if text.strip()]
    tables = model.similarity(images, model.encode_text(texts))
    primary = _primary_kind(tables)
    hits_IT = label[:, None] == label[has_report][None]
    # Candidates without a report are no queries in either direction, but they can be retrieved.
    queries = {"i2t": hits_IT[has_report], "t2i": hits_IT.T}
    for direction, hits in queries.items():
        for k in options.cuts:
            metrics[f"class/chance/{direction}_p{k}"] = float(hits.mean())
            for kind, table in tables.items():
                scores_IT = np.asarray(table, np.float32)
                scores = scores_IT[has_report] if direction == "i2t" else scores_IT.T
                prefix = "class/" if kind == primary else f"class/{kind}/"
                precision = retrieval_metrics.precision_at(scores, hits, k)
                metrics[f"{prefix}{direction}_p{k}"] = precision
    return metrics


def _primary_kind(tables: Mapping[str, Any]) -> str:
    """Returns the kind of similarity whose metrics have no prefix."""
    return PRIMARY_KIND if PRIMARY_KIND in tables else next(iter(tables))


def _class_candidates(
    records: Sequence[Record],
    columns: Sequence[int],
    absent: Sequence[int],
    per_class: int,
    seed: int,
) -> tuple[Sequence[Record], Int[np.ndarray, " N"]]:
    """Draws records of exactly one class; returns them with the index of their class."""
    if not len(records):
        return [], np.array([], int)
    all_labels = np.stack(read_column(records, "labels"))
    labels = all_labels[:, columns]
    is_candidate = classification_metrics.has_single_class(labels, all_labels[:, absent])
    chosen: list[int] = []
    label: list[int] = []
    for index, column in enumerate(columns):
        rows = np.flatnonzero(is_candidate & (labels[:, index] == 1))
        # The seed includes the finding, so that a class draws the same records in any selection.
        order = np.random.default_rng([seed, column]).permutation(len(rows))[:per_class]
        chosen += rows[np.sort(order)].tolist()
        label += [index] * len(order)
    return select_records(records, chosen), np.array(label, int)


def _recalls(ranks: Float[np.ndarray, " Q"], samples: int, seed: int) -> dict[str, float]:
    """Returns the median rank, and recall at each cutoff with its interval over queries."""
    metrics = {"median_rank": float(np.median(ranks))}
    for k in RECALL_CUTOFFS:
        hits = np.where(np.isnan(ranks), np.nan, ranks <= k)
        low, high = intervals.bootstrap(hits, None, samples, seed)
        recall = retrieval_metrics.recall_at(ranks, k)
        metrics |= {f"r{k}": recall, f"r{k}_low": low, f"r{k}_high": high}
    return metrics


def _draw_examples(count: int, options: Options, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count)[: options.num_examples].tolist()


def _example(
    record: Record,
    texts: Sequence[str],
    scores: Float[np.ndarray, " T"],
    hits: Bool[np.ndarray, " T"],
    rank: float,
) -> RetrievalExample:
    """Returns the first reports of an image; a text of several records is listed once."""
    retrieved: dict[str, tuple[str, float, bool]] = {}
    for j in np.argsort(-scores, kind="stable").tolist():
        retrieved.setdefault(texts[j], (texts[j], float(scores[j]), bool(hits[j])))
        if len(retrieved) == EXAMPLE_TEXTS:
            break
    return RetrievalExample(
        image=record.image,
        text=record.text,
        retrieved=tuple(retrieved.values()),
        rank=float(rank),
        num_candidates=len(texts),
    )

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

Keys without a prefix use the model's global similarity, or its first kind if it has no global one;
other kinds are under `local/`, `both/`, and under `class/local/`, `class/both/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.metrics import retrieval as retrieval_metrics
from plan_jax.types import (
    EvalData,
    Metric,
    Model,
    Record,
    Result,
    RetrievalExample,
    TaskContext,
    UserError,
    check_options,
)

TITLE = "Image-text retrieval"
FITS_HEAD = False
RECALL_CUTOFFS = (1, 5, 10)
PRECISION_CUTOFFS = (1, 5, 10, 100)  # GLoRIA reports 5, 10, 100, ConVIRT 5, 10, 50
PRIMARY_KIND = "global"
EXAMPLE_TEXTS = 5  # ranked reports of an example on the page
DIRECTIONS = ("i2t", "t2i")


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
      bootstrap_samples: number of resamples of an interval.
      num_examples: number of images on the page, drawn with the seed.

    Raises:
      UserError: if a number is out of its range.
    """

    classes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    per_class: int = 200
    cuts: tuple[int, ...] = PRECISION_CUTOFFS
    bootstrap_samples: int = 1000
    num_examples: int = 4

    def __post_init__(self) -> None:
        minima = {"per_class": 1, "bootstrap_samples": 2, "num_examples": 0}
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
    records = [record for record in data.test if record.text.strip()]
    texts = [record.text for record in records]
    # Case and white space do not make two reports different.
    normalised = [" ".join(text.lower().split()) for text in texts]
    _, label, count = np.unique(normalised, return_inverse=True, return_counts=True)
    hits = label[:, None] == label[None]
    images = model.encode_image(np.stack([record.image for record in records]))
    tables = {
        kind: np.asarray(table, np.float32)
        for kind, table in model.similarity(images, model.encode_text(texts)).items()
    }
    primary = _primary_kind(tables)
    metrics = {
        "n": float(len(records)),
        "duplicates": float((count[label] > 1).sum()),
        "without_report": float(len(data.test) - len(records)),
    }
    for kind, table in tables.items():
        prefix = "" if kind == primary else f"{kind}/"
        for direction, scores in zip(DIRECTIONS, (table, table.T), strict=True):
            recalls = _recalls(scores, hits, options.bootstrap_samples, seed)
            metrics |= {f"{prefix}{direction}_{key}": value for key, value in recalls.items()}
    for direction in DIRECTIONS:
        for k in RECALL_CUTOFFS:
            metrics[f"chance/{direction}_r{k}"] = retrieval_metrics.chance_recall(hits, k)
        metrics[f"chance/{direction}_median_rank"] = retrieval_metrics.chance_median_rank(hits)
    if options.classes:
        metrics |= class_precision(model, data.test, data.findings, options, seed)
    examples = _examples(records, tables[primary], hits, options.num_examples, seed)
    return Result(metrics, examples)


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
    if not candidates:
        raise UserError(
            f"no record has exactly one of {', '.join(classes)} and none of them unknown; use "
            "fewer config.eval.retrieval.classes, or fewer findings in absent"
        )
    count = np.bincount(label, minlength=len(classes))
    has_report = np.array([bool(record.text.strip()) for record in candidates])
    metrics = {f"class/{slug(name)}/n": float(n) for name, n in zip(classes, count, strict=True)}
    metrics["class/absent"] = float((count == 0).sum())
    metrics["class/reports"] = float(has_report.sum())
    if not has_report.any():
        return metrics
    images = model.encode_image(np.stack([record.image for record in candidates]))
    texts = [record.text for record in candidates if record.text.strip()]
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


def _primary_kind(tables: Mapping[str, np.ndarray]) -> str:
    """Returns the kind of similarity whose metrics have no prefix."""
    return PRIMARY_KIND if PRIMARY_KIND in tables else next(iter(tables))


def _class_candidates(
    records: Sequence[Record],
    columns: Sequence[int],
    absent: Sequence[int],
    per_class: int,
    seed: int,
) -> tuple[list[Record], Int[np.ndarray, " N"]]:
    """Draws records of exactly one class; returns them with the index of their class."""
    if not records:
        return [], np.array([], int)
    all_labels = np.stack([record.labels for record in records])
    labels = all_labels[:, columns]
    is_candidate = classification_metrics.has_single_class(labels, all_labels[:, absent])
    candidates, label = [], []
    for index, column in enumerate(columns):
        rows = np.flatnonzero(is_candidate & (labels[:, index] == 1))
        # The seed includes the finding, so that a class draws the same records in any selection.
        order = np.random.default_rng([seed, column]).permutation(len(rows))[:per_class]
        candidates += [records[row] for row in rows[np.sort(order)].tolist()]
        label += [index] * len(order)
    return candidates, np.array(label, int)


def _recalls(
    scores: Float[np.ndarray, "Q N"], hits: Bool[np.ndarray, "Q N"], samples: int, seed: int
) -> dict[str, float]:
    """Returns the median rank, and recall at each cutoff with its interval over queries."""
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    metrics = {"median_rank": float(np.median(ranks))}
    for k in RECALL_CUTOFFS:

        def recall(sample: np.ndarray, k: int = k) -> float:
            return retrieval_metrics.recall_at(sample, k)

        low, high = intervals.bootstrap(ranks, recall, samples, seed)
        metrics |= {f"r{k}": recall(ranks), f"r{k}_low": low, f"r{k}_high": high}
    return metrics


def _examples(
    records: Sequence[Record],
    scores: Float[np.ndarray, "I T"],
    hits: Bool[np.ndarray, "I T"],
    count: int,
    seed: int,
) -> list[RetrievalExample]:
    """Returns the first reports of random images; a text of several records is listed once."""
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    examples = []
    for i in np.random.default_rng(seed).permutation(len(records))[:count].tolist():
        retrieved: dict[str, tuple[str, float, bool]] = {}
        for j in np.argsort(-scores[i], kind="stable").tolist():
            text = records[j].text
            retrieved.setdefault(text, (text, float(scores[i, j]), bool(hits[i, j])))
            if len(retrieved) == EXAMPLE_TEXTS:
                break
        examples.append(
            RetrievalExample(
                image=records[i].image,
                text=records[i].text,
                retrieved=tuple(retrieved.values()),
                rank=float(ranks[i]),
                num_candidates=len(records),
            )
        )
    return examples

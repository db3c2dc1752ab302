"""Retrieval: does an image find its report among all reports, and a report its image?

`evaluate` asks for the one right report. Reports with the same words are the same report: finding
any image that carries it is a hit, in both directions; `duplicates` says how many records share
their text with another. `class_evaluate` asks for a report of the right class (GLoRIA's CheXpert
5x200, ConVIRT's 8x200). In both, ties count against the model.

Keys of `class_evaluate`: `class/i2t_p5`, precision among the first five, the mean over queries;
other kinds of similarity under `class/local/`; the level of a random order, the share of same-class
candidates whatever K, under `class/chance/`; `class/<slug>/n` candidates, `class/reports` of them
with a report, `class/absent` classes without candidates, which are left out. A K above the number
of candidates is cut to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from plan_jax.metrics import intervals, slug
from plan_jax.metrics import retrieval as retrieval_metrics
from plan_jax.types import Model, Record, RetrievalExample, UserError

CUTS = (1, 5, 10)
CLASS_CUTS = (1, 5, 10, 100)  # GLoRIA reports 5, 10, 100, ConVIRT 5, 10, 50
HEADLINE = "global"


@dataclass(frozen=True)
class Options:
    """By which classes to search as well, if by any; see `class_evaluate`."""

    classes: tuple[str, ...] = ()
    per_class: int = 200
    cuts: tuple[int, ...] = CLASS_CUTS


def evaluate(
    model: Model,
    records: Sequence[Record],
    *,
    findings: Sequence[str] = (),
    options: Options | None = None,
    queries: Mapping[str, Sequence[str]] | None = None,
    show: int = 4,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, float], list[RetrievalExample]]:
    """Rank all texts for each image (`i2t`) and all images for each text (`t2i`).

    Keys: `i2t_r1`, `i2t_r5`, `i2t_r10` shares of queries with a hit among the first k, with a 95 %
    bootstrap interval over queries in `i2t_r5_low`, `..._high`; `i2t_median_rank`; the same for
    `t2i`. Names without prefix are the model's global similarity (its first kind, if it has no
    global one); other kinds stand under `local/`, `both/`; the level of a random order under
    `chance/`; `n` records, `duplicates` among them. The rows show the five reports found first for
    `show` images drawn at random. With `options.classes`, all that `class_evaluate` finds as well.
    """
    options = options or Options()
    names = [" ".join(record.text.lower().split()) for record in records]
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    hits = label[:, None] == label[None]
    seen = model.encode_image(np.stack([record.image for record in records]))
    kinds = model.similarity(seen, model.encode_text([record.text for record in records]))
    values = {"n": float(len(records)), "duplicates": float((count[label] > 1).sum())}
    headline = HEADLINE if HEADLINE in kinds else next(iter(kinds))
    for kind, table in kinds.items():
        prefix = "" if kind == headline else f"{kind}/"
        table = np.asarray(table, np.float32)
        for way, scores in (("i2t", table), ("t2i", table.T)):
            values |= _ranking(scores, hits, f"{prefix}{way}", samples, seed)
    for way in ("i2t", "t2i"):
        values |= {f"chance/{way}_r{k}": retrieval_metrics.chance_recall(hits, k) for k in CUTS}
        values[f"chance/{way}_median_rank"] = retrieval_metrics.chance_median_rank(hits)
    if options.classes:
        values |= class_evaluate(
            model,
            records,
            findings=findings,
            classes=options.classes,
            cuts=options.cuts,
            per_class=options.per_class,
            queries=queries,
            seed=seed,
        )
    return values, _rows(records, np.asarray(kinds[headline], np.float32), hits, show, seed)


def class_evaluate(
    model: Model,
    records: Sequence[Record],
    *,
    findings: Sequence[str],
    classes: Sequence[str],
    per_class: int = 200,
    cuts: Sequence[int] = CLASS_CUTS,
    queries: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure how many of the first K found are of the query's class.

    *GLoRIA (ICCV 2021), CheXpert 5x200: precision@K over 5 classes of 200 images each.* Candidates
    are records with one of `classes` present and all others absent (-1, unknown, disqualifies), at
    most `per_class` of each, drawn with the seed. `i2t`: each candidate's image ranks the
    candidates' reports, its own among them (as in GLoRIA's retrieval); `t2i`: the sentences
    `queries[class]` (*ConVIRT, arXiv 2010.00747, 8x200*), or without them the candidates' reports,
    rank the images. A candidate without report takes part with its image only; a direction without
    any text is left out.

    Raises:
        UserError: if a class is no finding, has no queries, or there is no candidate at all.
    """
    if unknown := [name for name in classes if name not in findings]:
        raise UserError(f"class {unknown[0]} is none of the findings ({', '.join(findings)})")
    held, label = _candidates(records, [list(findings).index(c) for c in classes], per_class, seed)
    if not held:
        raise UserError(
            f"no record has exactly one of {', '.join(classes)} and none of them unknown; name "
            "fewer classes"
        )
    count = np.bincount(label, minlength=len(classes))
    values = {f"class/{slug(name)}/n": float(n) for name, n in zip(classes, count, strict=True)}
    told = np.array([bool(record.text.strip()) for record in held])
    values |= {"class/absent": float((count == 0).sum()), "class/reports": float(told.sum())}
    seen = model.encode_image(np.stack([record.image for record in held]))
    texts = [record.text for record in held if record.text.strip()]
    own = label[told]
    if texts:
        kinds = model.similarity(seen, model.encode_text(texts))
        values |= _precision(kinds, "i2t", label[:, None] == own[None], told, cuts)
    if queries is not None:
        texts, own = _asked(queries, classes, count)
        kinds = model.similarity(seen, model.encode_text(texts))
    if texts:
        kinds = {kind: np.asarray(table).T for kind, table in kinds.items()}
        every = np.ones(len(texts), bool)
        values |= _precision(kinds, "t2i", own[:, None] == label[None], every, cuts)
    return values


def precision_at(scores: Float[np.ndarray, "Q N"], hits: Bool[np.ndarray, "Q N"], k: int) -> float:
    """Give the share of hits among the first `k` of N candidates, averaged over queries: 0 to 1.

    Ties count against the model: among equal scores what is wrong stands first. `k` is at most N.
    A NaN among the scores gives NaN.

    >>> precision_at(np.array([[0.9, 0.5, 0.1]]), np.array([[True, False, True]]), 2)
    0.5
    >>> precision_at(np.zeros((1, 3)), np.array([[True, False, True]]), 1)
    0.0
    """
    if np.isnan(scores).any():
        return float("nan")
    order = np.lexsort((hits, -scores), axis=1)[:, :k]
    return float(np.take_along_axis(hits, order, axis=1).mean())


def _candidates(
    records: Sequence[Record], columns: Sequence[int], per_class: int, seed: int
) -> tuple[list[Record], Int[np.ndarray, " N"]]:
    """Draw records of exactly one class, and say of which, by its place among `columns`."""
    labels = np.array([[r.labels[c] for c in columns] for r in records]).reshape(-1, len(columns))
    alone = ((labels == 1).sum(1) == 1) & (labels >= 0).all(1)
    held, label = [], []
    for i, column in enumerate(columns):
        rows = np.flatnonzero(alone & (labels[:, i] == 1))
        drawn = np.random.default_rng([seed, column]).permutation(len(rows))[:per_class]
        held += [records[row] for row in rows[np.sort(drawn)].tolist()]
        label += [i] * len(drawn)
    return held, np.array(label, int)


def _asked(
    queries: Mapping[str, Sequence[str]], classes: Sequence[str], count: Int[np.ndarray, " F"]
) -> tuple[list[str], Int[np.ndarray, " Q"]]:
    """List the sentences that ask for the classes with candidates, and for which each asks."""
    texts, label = [], []
    for i in np.flatnonzero(count).tolist():
        if not queries.get(classes[i]):
            raise UserError(f"queries have no sentence for class {classes[i]}; give at least one")
        texts += queries[classes[i]]
        label += [i] * len(queries[classes[i]])
    return texts, np.array(label, int)


def _precision(
    kinds: Mapping[str, np.ndarray],
    way: str,
    hits: Bool[np.ndarray, "Q N"],
    asked: Bool[np.ndarray, " Q"],
    cuts: Sequence[int],
) -> dict[str, float]:
    """Measure the precision of every kind of similarity over the queries `asked`."""
    headline = HEADLINE if HEADLINE in kinds else next(iter(kinds))
    values = {f"class/chance/{way}_p{k}": float(hits[asked].mean()) for k in cuts}
    for kind, table in kinds.items():
        prefix = "class/" if kind == headline else f"class/{kind}/"
        scores = np.asarray(table, np.float32)[asked]
        values |= {f"{prefix}{way}_p{k}": precision_at(scores, hits[asked], k) for k in cuts}
    return values


def _ranking(
    scores: Float[np.ndarray, "Q N"],
    hits: Bool[np.ndarray, "Q N"],
    name: str,
    samples: int,
    seed: int,
) -> dict[str, float]:
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    values = {f"{name}_median_rank": float(np.median(ranks))}
    for k in CUTS:
        low, high = intervals.bootstrap(
            ranks, lambda some, k=k: retrieval_metrics.recall_at(some, k), samples, seed
        )
        values |= {
            f"{name}_r{k}": retrieval_metrics.recall_at(ranks, k),
            f"{name}_r{k}_low": low,
            f"{name}_r{k}_high": high,
        }
    return values


def _rows(
    records: Sequence[Record], scores: np.ndarray, hits: np.ndarray, show: int, seed: int
) -> list[RetrievalExample]:
    """Show what some images find: a text that several records carry is listed once."""
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    rows = []
    for i in np.random.default_rng(seed).permutation(len(records))[:show].tolist():
        found: dict[str, tuple[str, float, bool]] = {}
        for j in np.argsort(-scores[i], kind="stable").tolist():
            text = records[j].text
            found.setdefault(text, (text, float(scores[i, j]), bool(hits[i, j])))
            if len(found) == 5:
                break
        rows.append(
            RetrievalExample(
                image=records[i].image,
                text=records[i].text,
                retrieved=tuple(found.values()),
                rank=float(ranks[i]),
                num_candidates=len(records),
            )
        )
    return rows

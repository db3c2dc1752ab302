"""Retrieval: does an image find its report among all reports, and a report its image?

Reports with the same words are the same report: finding any image that carries it is a hit, in
both directions; `duplicates` says how many records share their text with another.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from plan_jax import metrics
from plan_jax.figures import RetrievedRow
from plan_jax.types import Model, Record

CUTS = (1, 5, 10)
HEADLINE = "global"


def evaluate(
    model: Model,
    records: Sequence[Record],
    *,
    show: int = 4,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, float], list[RetrievedRow]]:
    """Rank all texts for each image (`i2t`) and all images for each text (`t2i`).

    Keys: `i2t_r1`, `i2t_r5`, `i2t_r10` shares of queries with a hit among the first k, with a 95 %
    bootstrap interval over queries in `i2t_r5_low`, `..._high`; `i2t_median_rank`; the same for
    `t2i`. Names without prefix are the model's global similarity (its first kind, if it has no
    global one); other kinds stand under `local/`, `both/`; the level of a random order under
    `chance/`; `n` records, `duplicates` among them. The rows show the five reports found first for
    `show` images drawn at random.
    """
    names = [" ".join(record.text.lower().split()) for record in records]
    _, label, count = np.unique(names, return_inverse=True, return_counts=True)
    hits = label[:, None] == label[None]
    seen = model.see(np.stack([record.image for record in records]))
    kinds = model.similarity(seen, model.read([record.text for record in records]))
    values = {"n": float(len(records)), "duplicates": float((count[label] > 1).sum())}
    headline = HEADLINE if HEADLINE in kinds else next(iter(kinds))
    for kind, table in kinds.items():
        prefix = "" if kind == headline else f"{kind}/"
        table = np.asarray(table, np.float32)
        for way, scores in (("i2t", table), ("t2i", table.T)):
            values |= _ranking(scores, hits, f"{prefix}{way}", samples, seed)
    for way in ("i2t", "t2i"):
        values |= {f"chance/{way}_r{k}": metrics.chance_recall(hits, k) for k in CUTS}
        values[f"chance/{way}_median_rank"] = metrics.chance_median_rank(hits)
    return values, _rows(records, np.asarray(kinds[headline], np.float32), hits, show, seed)


def _ranking(
    scores: Float[np.ndarray, "Q N"],
    hits: Bool[np.ndarray, "Q N"],
    name: str,
    samples: int,
    seed: int,
) -> dict[str, float]:
    ranks = metrics.hit_ranks(scores, hits)
    values = {f"{name}_median_rank": float(np.median(ranks))}
    for k in CUTS:
        low, high = metrics.bootstrap(
            ranks, lambda some, k=k: metrics.recall_at(some, k), samples, seed
        )
        values |= {
            f"{name}_r{k}": metrics.recall_at(ranks, k),
            f"{name}_r{k}_low": low,
            f"{name}_r{k}_high": high,
        }
    return values


def _rows(
    records: Sequence[Record], scores: np.ndarray, hits: np.ndarray, show: int, seed: int
) -> list[RetrievedRow]:
    """Show what some images find: a text that several records carry is listed once."""
    ranks = metrics.hit_ranks(scores, hits)
    rows = []
    for i in np.random.default_rng(seed).permutation(len(records))[:show].tolist():
        found: dict[str, tuple[str, float, bool]] = {}
        for j in np.argsort(-scores[i], kind="stable").tolist():
            text = records[j].text
            found.setdefault(text, (text, float(scores[i, j]), bool(hits[i, j])))
            if len(found) == 5:
                break
        rows.append(
            RetrievedRow(
                image=records[i].image,
                text=records[i].text,
                found=tuple(found.values()),
                rank=float(ranks[i]),
                number=len(records),
            )
        )
    return rows

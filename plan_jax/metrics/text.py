"""How near generated reports are to written ones: word overlap, and the findings both state.

All texts come tokenised: words separated by blanks, each a token as it stands (`report_texts.clean`
makes such texts); nothing is lower-cased or split further, so that all metrics see the same
tokens. One reference for each text. Word overlap is nearly blind to a missing `no`; look at the
stated findings beside it. What is not defined: no metric exists for no texts (`UserError`); a text
without words scores 0.

Deviation: published METEOR is that of Java 1.5, with synonyms and tuned weights; ours has neither
and its key says so. COCO's ROUGE-L weighs recall by beta 1.2; ours is the balanced F1.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float

from plan_jax.types import UserError

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # CIDEr-D's tolerance for a difference in length (Vedantam et al. 2015, section 4)


def scores(found: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score texts against one reference each, over the whole corpus.

    Keys: `bleu1` to `bleu4` (corpus level), `rouge_l`, `meteor_no_synonyms` (means), all from 0 to
    1, and `cider`, the mean CIDEr-D, from 0 to 10.

    Raises:
      UserError: there are no texts, or not as many references.
    """
    _check(found, references)
    values = bleu(found, references)
    values["rouge_l"] = float(rouge_l(found, references).mean())
    values["meteor_no_synonyms"] = float(meteor(found, references).mean())
    values["cider"] = float(cider(found, references).mean())
    return values


def bleu(found: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Give corpus-level BLEU-1 to BLEU-4 by sacrebleu: no tokenisation, no smoothing, 0 to 1.

    *BLEU-n = min(1, exp(1 - r / c)) (p_1 ... p_n)^(1/n)* (Papineni et al. 2002), with c, r the
    words of all texts and of all references, and p_k the share of k-grams of all texts that their
    references have, each counted at most as often as there.

    >>> values = bleu(["the the the the the the the"], ["the cat is on the mat"])
    >>> round(values["bleu1"] * 7, 6), values["bleu2"]
    (2.0, 0.0)
    """
    from sacrebleu.metrics import BLEU

    _check(found, references)
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    whole = metric.corpus_score(list(found), [list(references)])
    values = {}
    for n in range(1, ORDERS + 1):
        part = BLEU.compute_bleu(
            whole.counts[:n], whole.totals[:n], whole.sys_len, whole.ref_len, max_ngram_order=n
        )
        values[f"bleu{n}"] = min(part.score / 100, 1.0)  # of rounding
    return values


class _Blanks:
    """A tokeniser for rouge-score that splits at blanks."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(found: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Give ROUGE-L of each text by rouge-score: F1 of the longest common subsequence, 0 to 1.

    *F = 2 P R / (P + R), P = LCS / m, R = LCS / n* (Lin 2004) for m found and n reference words,
    over the whole text at once, without stemming.

    >>> rouge_l(["police kill the gunman"], ["police killed the gunman"]).tolist()
    [0.75]
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(found, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Blanks())
    pairs = zip(references, found, strict=True)
    return np.array([float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in pairs])


class _NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word: str) -> list:
        return []


@cache
def _stemmer() -> object:
    """Make a Porter stemmer that remembers: reports repeat their words."""
    from nltk.stem.porter import PorterStemmer

    class Remembering(PorterStemmer):
        stem = cache(PorterStemmer.stem)

    return Remembering()


def meteor(found: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Give METEOR of each text by nltk, with exact and stem matches and no synonyms, 0 to 1.

    *F (1 - 0.5 (chunks / matches)^3), F = P R / (0.9 P + 0.1 R)* (Banerjee and Lavie 2005 give
    10 P R / (R + 9 P), the same). A text equal to its reference of m words has one chunk and gets
    1 - 0.5 / m^3. nltk matches greedily from the end, so that a text with repeated words may be
    given more chunks than it needs.
    """
    from nltk.translate.meteor_score import single_meteor_score

    _check(found, references)
    options = {"stemmer": _stemmer(), "wordnet": _NoSynonyms()}
    pairs = zip(references, found, strict=True)
    return np.array(
        [float(single_meteor_score(true.split(), text.split(), **options)) for true, text in pairs]
    )


def cider(found: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Give CIDEr-D of each text, 0 to 10.

    *Vedantam et al. (arXiv 1411.5726), eq. 4 and section 4: 10/4 sum over n = 1..4 of
    exp(-(l - l')^2 / (2 6^2)) min(g, g') . g' / (|g| |g'|)*, where g, g' are the vectors of n-gram
    counts of text and reference, weighted by log(N / max(1, references with that n-gram)), and
    l, l' their lengths in words. The weights are those of these N references: numbers of
    different test sets do not compare, and a single text scores 0. No stemming.
    """
    _check(found, references)
    said, true = [[_grams(text) for text in texts] for texts in (found, references)]
    frequency = Counter(gram for counts in true for n in counts for gram in n)
    rarity = {gram: math.log(len(true) / count) for gram, count in frequency.items()}
    unseen = math.log(len(true))
    values = []
    for one, other, text, reference in zip(said, true, found, references, strict=True):
        total = 0.0
        for ours, theirs in zip(one, other, strict=True):
            g = {gram: count * rarity.get(gram, unseen) for gram, count in ours.items()}
            h = {gram: count * rarity[gram] for gram, count in theirs.items()}
            norms = math.hypot(*g.values()) * math.hypot(*h.values())
            shared = math.fsum(min(g[gram], h[gram]) * h[gram] for gram in g if gram in h)
            total += shared / norms if norms else 0.0
        # max: the count of word pairs, by which the public code measures, has no -1.
        gap = max(len(text.split()), 1) - max(len(reference.split()), 1)
        values.append(10 / ORDERS * total * math.exp(-(gap**2) / (2 * SIGMA**2)))
    return np.array(values)


def _grams(text: str) -> list[Counter]:
    """Count the n-grams of a text, n = 1 to 4."""
    words = text.split()
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


def stated(
    found: Sequence[Mapping[str, int]], truth: Sequence[Mapping[str, int]]
) -> dict[str, float]:
    """Score which findings texts state as present, against what their references state.

    A finding counts as stated where its value is 1; denied (0) and not mentioned are the same.
    Findings are all that either side states. Keys: `precision_micro`, `recall_micro`, `f1_micro`
    over all statements, `precision_macro`, `recall_macro`, `f1_macro` the means over findings, and
    `findings`, their number. Each is 0 to 1: *P = TP / (TP + FP), R = TP / (TP + FN),
    F1 = 2 TP / (2 TP + FP + FN)*. P is 0 where nothing is claimed, R where nothing is there; if
    no text and no reference states anything, all are NaN.

    Raises:
      UserError: there are no texts, or not as many references.
    """
    _check(found, truth)
    names = sorted({name for one in (*found, *truth) for name, value in one.items() if value == 1})
    said, true = (_present(side, names) for side in (found, truth))
    parts = {"precision": (said, said), "recall": (true, true), "f1": (said, true)}
    both, values = 2.0 * (said & true).sum(0), {}
    for key, (one, other) in parts.items():
        size = one.sum(0) + other.sum(0)
        values[f"{key}_micro"] = float(both.sum() / max(size.sum(), 1)) if names else math.nan
        values[f"{key}_macro"] = float((both / np.maximum(size, 1)).mean()) if names else math.nan
    return values | {"findings": float(len(names))}


def _present(side: Sequence[Mapping[str, int]], names: list[str]) -> Bool[np.ndarray, "N F"]:
    table = [[one.get(name) == 1 for name in names] for one in side]
    return np.array(table, bool).reshape(len(side), len(names))


def _check(found: Sequence, references: Sequence) -> None:
    if not len(found) or len(found) != len(references):
        raise UserError(
            f"texts to score are {len(found)} and references {len(references)}; give one reference"
            " for each text, and at least one"
        )

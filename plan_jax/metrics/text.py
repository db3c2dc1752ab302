"""Metrics of generated reports: word overlap, and agreement of the findings that they state.

Texts are tokenised already: words separated by blanks, each a token as it is, as
`heads.vocabulary.clean` returns them. Nothing is lower-cased or split further, so all metrics see
the same tokens. Each text has one reference. Word overlap hardly notices a missing `no`; read it
together with the agreement of findings. No metric is defined for no texts (`UserError`); a text
without words scores 0.

Deviation: published METEOR is that of Java 1.5, with synonyms and tuned weights; ours has neither
and its key says so. COCO's ROUGE-L, which R2Gen and most papers report, weighs recall by beta 1.2
(`rouge_l_coco`); `rouge_l` is the balanced F1.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float

from plan_jax.types import UserError

MAX_ORDER = 4  # n-grams of 1 to 4 words
COCO_BETA = 1.2  # of ROUGE-L: recall counts more than precision
LENGTH_SIGMA = 6.0  # CIDEr-D's tolerance for a difference in length (Vedantam et al. 2015, sec. 4)


def overlap_scores(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Computes all metrics of word overlap over a corpus, with one reference for each text.

    Returns:
      `bleu1` to `bleu4` (corpus level), `rouge_l`, `rouge_l_coco` and `meteor_no_synonyms` (means),
      all from 0 to 1, and `cider`, the mean CIDEr-D, from 0 to 10.

    Raises:
      UserError: there are no texts, or not as many references.
    """
    _check_paired(generated, references)
    values = bleu(generated, references)
    values["rouge_l"] = float(rouge_l(generated, references).mean())
    values["rouge_l_coco"] = float(rouge_l(generated, references, COCO_BETA).mean())
    values["meteor_no_synonyms"] = float(meteor(generated, references).mean())
    values["cider"] = float(cider(generated, references).mean())
    return values


def bleu(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Computes corpus-level BLEU-1 to BLEU-4 by sacrebleu: no tokenisation, no smoothing, 0 to 1.

    *BLEU-n = min(1, exp(1 - r / c)) (p_1 ... p_n)^(1/n)* (Papineni et al. 2002), with c and r the
    numbers of words of all texts and of all references, and p_k the share of the k-grams of all
    texts that occur in their references, each counted at most as often as it occurs there.

    >>> values = bleu(["the the the the the the the"], ["the cat is on the mat"])
    >>> round(values["bleu1"] * 7, 6), values["bleu2"]
    (2.0, 0.0)
    """
    from sacrebleu.metrics import BLEU

    _check_paired(generated, references)
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    corpus = metric.corpus_score(list(generated), [list(references)])
    values = {}
    for order in range(1, MAX_ORDER + 1):
        score = BLEU.compute_bleu(
            corpus.counts[:order],
            corpus.totals[:order],
            corpus.sys_len,
            corpus.ref_len,
            max_ngram_order=order,
        )
        values[f"bleu{order}"] = min(score.score / 100, 1.0)  # rounding may exceed 1
    return values


class _WhitespaceTokenizer:
    """A tokeniser for rouge-score that splits at blanks."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(
    generated: Sequence[str], references: Sequence[str], beta: float = 1.0
) -> Float[np.ndarray, " N"]:
    """Computes ROUGE-L of each text by rouge-score: the longest common subsequence, 0 to 1.

    *F = (1 + beta^2) P R / (R + beta^2 P), P = LCS / m, R = LCS / n* (Lin 2004) for a text of m
    words and a reference of n words, over the whole text at once, without stemming. With `beta` 1
    it is the harmonic mean; COCO's evaluation has 1.2.

    >>> rouge_l(["police kill the gunman"], ["police killed the gunman"]).tolist()
    [0.75]
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_paired(generated, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_WhitespaceTokenizer())
    pairs = zip(references, generated, strict=True)
    scores = [scorer.score(reference, text)["rougeL"] for reference, text in pairs]
    precision, recall = (
        np.array([getattr(score, side) for score in scores], float)
        for side in ("precision", "recall")
    )
    weighted = recall + beta**2 * precision
    return (1 + beta**2) * precision * recall / np.where(weighted == 0, 1, weighted)


class _EmptyWordNet:
    """A WordNet without any word, which switches METEOR's matching of synonyms off."""

    def synsets(self, word: str) -> list:
        return []


@cache
def _cached_stemmer() -> object:
    """Returns a Porter stemmer that remembers stems, since reports repeat their words."""
    from nltk.stem.porter import PorterStemmer

    class CachedStemmer(PorterStemmer):
        stem = cache(PorterStemmer.stem)

    return CachedStemmer()


def meteor(generated: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Computes METEOR of each text by nltk, with exact and stem matches and no synonyms, 0 to 1.

    *F (1 - 0.5 (chunks / matches)^3), F = P R / (0.9 P + 0.1 R)* (Banerjee and Lavie 2005 write
    10 P R / (R + 9 P), which is the same), with precision P and recall R of the matched words. A
    text equal to its reference of m words has one chunk and scores 1 - 0.5 / m^3. nltk matches
    greedily from the end, so a text with repeated words may count more chunks than necessary.
    """
    from nltk.translate.meteor_score import single_meteor_score

    _check_paired(generated, references)
    options = {"stemmer": _cached_stemmer(), "wordnet": _EmptyWordNet()}
    pairs = zip(references, generated, strict=True)
    return np.array(
        [
            float(single_meteor_score(reference.split(), text.split(), **options))
            for reference, text in pairs
        ]
    )


def cider(generated: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Computes CIDEr-D of each text, 0 to 10.

    *Vedantam et al. (arXiv 1411.5726), eq. 4 and section 4: 10/4 sum over n = 1..4 of
    exp(-(l - l')^2 / (2 6^2)) min(g, g') . g' / (|g| |g'|)*, where g, g' are the vectors of n-gram
    counts of text and reference, weighted by log(N / max(1, references with that n-gram)), and
    l, l' their lengths in words. The weights are those of these N references, so numbers of
    different test sets do not compare, and a single text scores 0. No stemming.
    """
    _check_paired(generated, references)
    text_counts, reference_counts = (
        [_ngram_counts(text) for text in texts] for texts in (generated, references)
    )
    frequency = Counter(
        ngram for orders in reference_counts for counts in orders for ngram in counts
    )
    max_weight = math.log(len(references))  # of an n-gram that occurs in no reference
    weights = {ngram: math.log(len(references) / count) for ngram, count in frequency.items()}
    values = []
    for text, reference, text_orders, reference_orders in zip(
        generated, references, text_counts, reference_counts, strict=True
    ):
        similarity = 0.0
        for counts, target_counts in zip(text_orders, reference_orders, strict=True):
            vector = {ngram: n * weights.get(ngram, max_weight) for ngram, n in counts.items()}
            target = {ngram: n * weights[ngram] for ngram, n in target_counts.items()}
            norms = math.hypot(*vector.values()) * math.hypot(*target.values())
            # Clipped at the reference's weight, so that repeating a word earns nothing.
            product = math.fsum(
                min(vector[ngram], target[ngram]) * target[ngram]
                for ngram in vector
                if ngram in target
            )
            similarity += product / norms if norms else 0.0
        # The public code measures length by the number of word pairs, which has no -1 for an empty
        # text: hence at least 1.
        gap = max(len(text.split()), 1) - max(len(reference.split()), 1)
        penalty = math.exp(-(gap**2) / (2 * LENGTH_SIGMA**2))
        values.append(10 / MAX_ORDER * similarity * penalty)
    return np.array(values)


def _ngram_counts(text: str) -> list[Counter]:
    """Returns the counts of the n-grams of a text, one counter for each n from 1 to 4."""
    words = text.split()
    return [
        Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
        for order in range(1, MAX_ORDER + 1)
    ]


def finding_scores(
    generated: Sequence[Mapping[str, int]], references: Sequence[Mapping[str, int]]
) -> dict[str, float]:
    """Computes precision, recall and F1 of the findings that texts state as present.

    A finding is stated where its value is 1; denied (0) and not mentioned count alike. The findings
    are all that a text or a reference states. *P = TP / (TP + FP), R = TP / (TP + FN),
    F1 = 2 TP / (2 TP + FP + FN)*, each 0 to 1. P is 0 where no text states a finding, R where no
    reference does. If no text and no reference states anything, all are NaN.

    Returns:
      `precision_micro`, `recall_micro` and `f1_micro` over all statements; `precision_macro`,
      `recall_macro` and `f1_macro`, the means over findings; `findings`, their number.

    Raises:
      UserError: there are no texts, or not as many references.
    """
    _check_paired(generated, references)
    names = sorted(
        {
            name
            for findings in (*generated, *references)
            for name, value in findings.items()
            if value == 1
        }
    )
    predicted, true = (_stated_table(side, names) for side in (generated, references))
    # All three are 2 TP / (A + B): of predictions with themselves, of the truth with itself, and of
    # both with each other.
    sides = {"precision": (predicted, predicted), "recall": (true, true), "f1": (predicted, true)}
    twice_correct = 2.0 * (predicted & true).sum(0)
    values: dict[str, float] = {}
    for key, (first, second) in sides.items():
        size = first.sum(0) + second.sum(0)
        micro = float(twice_correct.sum() / max(size.sum(), 1)) if names else math.nan
        macro = float((twice_correct / np.maximum(size, 1)).mean()) if names else math.nan
        values |= {f"{key}_micro": micro, f"{key}_macro": macro}
    return values | {"findings": float(len(names))}


def _stated_table(texts: Sequence[Mapping[str, int]], names: list[str]) -> Bool[np.ndarray, "N F"]:
    table = [[findings.get(name) == 1 for name in names] for findings in texts]
    return np.array(table, bool).reshape(len(texts), len(names))


def _check_paired(generated: Sequence, references: Sequence) -> None:
    if not len(generated) or len(generated) != len(references):
        raise UserError(
            f"there are {len(generated)} texts and {len(references)} references to compare; pass "
            "at least one text, and one reference for each"
        )

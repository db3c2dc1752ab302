"""Metrics of reports: published examples, pycocoevalcap and literal loops."""

import math
from collections import Counter

import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from plan_jax.metrics import text as text_metrics
from plan_jax.types import UserError

WORDS = ["heart", "lung", "no", "effusion", "is", "normal", "left", "small", "nodule", ".", "the"]


def random_corpus(count, seed=0, longest=14):
    """Texts and references: a text is its reference with words changed, removed and added."""
    random, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        words = random.choice(WORDS, int(random.integers(1, longest))).tolist()
        text = [w if random.random() < 0.7 else str(random.choice(WORDS)) for w in words]
        text = text[: int(random.integers(1, longest))] + ["."] * int(random.integers(2))
        pairs.append((" ".join(text), " ".join(words)))
    generated, references = zip(*pairs, strict=True)
    return list(generated), list(references)


def as_coco(texts):
    return {n: [text] for n, text in enumerate(texts)}


def literal_bleu(generated, references, max_order):
    """Papineni et al. 2002, equations of section 2, counted by loops."""
    precisions = []
    for n in range(1, max_order + 1):
        right = total = 0
        for text, true in zip(generated, references, strict=True):
            grams = [
                Counter(tuple(x.split()[i : i + n]) for i in range(len(x.split()) - n + 1))
                for x in (text, true)
            ]
            total += sum(grams[0].values())
            right += sum(min(count, grams[1][gram]) for gram, count in grams[0].items())
        precisions.append(right / total if total else 0.0)
    c, r = (sum(len(x.split()) for x in texts) for texts in (generated, references))
    if not min(precisions):
        return 0.0
    return min(1, math.exp(1 - r / c)) * math.prod(precisions) ** (1 / max_order)


def test_bleu_clips_as_in_the_paper():
    values = text_metrics.bleu(["the the the the the the the"], ["the cat is on the mat"])
    assert values["bleu1"] == pytest.approx(2 / 7)
    assert values["bleu2"] == values["bleu4"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_its_formula_and_that_of_coco(seed):
    generated, references = random_corpus(30, seed)
    values = text_metrics.bleu(generated, references)
    coco, _ = Bleu(4).compute_score(as_coco(references), as_coco(generated), verbose=0)
    for n in range(1, 5):
        assert values[f"bleu{n}"] == pytest.approx(literal_bleu(generated, references, n), abs=1e-9)
        assert values[f"bleu{n}"] == pytest.approx(coco[n - 1], abs=1e-6)


def test_bleu_penalises_short_texts_and_not_long_ones():
    values = text_metrics.bleu(["a b"], ["a b c d"])
    assert values["bleu1"] == pytest.approx(math.exp(1 - 2))
    assert text_metrics.bleu(["a b c d"], ["a b"])["bleu1"] == pytest.approx(0.5)
    assert text_metrics.bleu([""], ["a b"]) == dict.fromkeys(
        ("bleu1", "bleu2", "bleu3", "bleu4"), 0
    )


def test_bleu_keeps_tokens_as_they_are():
    assert text_metrics.bleu(["x-ray 1.5 ."], ["x ray 1 . 5 ."])["bleu1"] < 0.3
    assert text_metrics.bleu(["Heart"], ["heart"])["bleu1"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("police kill the gunman", 0.75),
        ("the gunman kill police", 0.5),
        ("the gunman police killed", 0.5),
        ("", 0),
        ("nobody", 0),
    ],
)
def test_rouge_of_the_examples_of_its_paper(text, expected):
    assert text_metrics.rouge_l([text], ["police killed the gunman"])[0] == expected


def test_rouge_is_the_longest_common_subsequence():
    generated, references = random_corpus(30)
    for value, text, true in zip(
        text_metrics.rouge_l(generated, references), generated, references, strict=True
    ):
        a, b = text.split(), true.split()
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = max(table[i, j + 1], table[i + 1, j])
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else longer
        p, r = table[-1, -1] / len(a), table[-1, -1] / len(b)
        assert value == pytest.approx(2 * p * r / (p + r) if p else 0)


def test_rouge_with_recall_weighed_is_that_of_coco():
    generated, references = random_corpus(40, 3)
    mean, each = Rouge().compute_score(as_coco(references), as_coco(generated))
    actual = text_metrics.rouge_l(generated, references, text_metrics.COCO_BETA)
    np.testing.assert_allclose(actual, each, rtol=1e-12)
    values = text_metrics.overlap_scores(generated, references)
    assert values["rouge_l_coco"] == pytest.approx(mean, rel=1e-12)
    assert abs(values["rouge_l_coco"] - values["rouge_l"]) > 1e-3


def literal_meteor(text, true):
    """Banerjee and Lavie 2005 with nltk's weights, for texts in which no stem comes twice."""
    stem = PorterStemmer().stem
    a, b = ([stem(word) for word in x.split()] for x in (text, true))
    pairs = [(i, b.index(word)) for i, word in enumerate(a) if word in b]
    if not pairs:
        return 0.0
    chunks = 1 + sum(
        (i + 1, j + 1) != after for (i, j), after in zip(pairs, pairs[1:], strict=False)
    )
    p, r = len(pairs) / len(a), len(pairs) / len(b)
    return p * r / (0.9 * p + 0.1 * r) * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def test_meteor_is_its_formula_with_stems():
    random, words = np.random.default_rng(0), "lungs clear opacities seen heart large no nodules"
    inflected = {"lungs": "lung", "opacities": "opacity", "nodules": "nodule", "seen": "seeing"}
    for _ in range(30):
        true = random.permutation(words.split())[: random.integers(1, 9)].tolist()
        text = [inflected.get(w, w) for w in random.permutation(true)[: random.integers(1, 9)]]
        text += ["device"] * int(random.integers(2))
        pair = " ".join(text), " ".join(true)
        scores = text_metrics.meteor([pair[0]], [pair[1]])
        assert scores[0] == pytest.approx(literal_meteor(*pair))


def test_meteor_of_the_example_of_nltk():
    text = "It is a guide to action which ensures that the military always obeys the commands of "
    true = "It is a guide to action that ensures that the military will forever heed Party commands"
    scores = text_metrics.meteor([text + "the party"], [true])
    assert round(scores[0], 4) == 0.6944


def test_meteor_knows_stems_and_no_synonyms():
    values = text_metrics.meteor(
        ["nodules", "doctor", "", "a b c"], ["nodule", "physician", "a"] + ["a b c"]
    )
    assert values.tolist() == pytest.approx([0.5, 0, 0, 1 - 0.5 / 27])


@pytest.mark.parametrize("seed", range(4))
def test_cider_is_that_of_coco(seed):
    generated, references = random_corpus(40, seed)
    mean, values_of_coco = Cider().compute_score(as_coco(references), as_coco(generated))
    values = text_metrics.cider(generated, references)
    assert values.mean() == pytest.approx(mean, abs=1e-9)
    np.testing.assert_allclose(values, values_of_coco, atol=1e-9)
    assert values.std() > 0.5


def test_cider_at_its_edges():
    texts = ["the heart is large .", "no small left effusion", "right lung nodule seen"]
    assert text_metrics.cider(texts, texts).tolist() == pytest.approx([10, 10, 10])
    assert text_metrics.cider(texts[:1], texts[:1]).tolist() == [0]  # no word is rare among one
    assert text_metrics.cider(["", "x"], texts[:2]).tolist() == [0, 0]
    # A word more: only the length and the norm of the longer vector change.
    longer = text_metrics.cider([texts[0], f"{texts[1]} unheard"], texts[:2])[1]
    idf = math.log(2)
    parts = [(5 - n) * idf**2 / (idf * idf * math.sqrt((6 - n) * (5 - n))) for n in (1, 2, 3, 4)]
    assert longer == pytest.approx(10 / 4 * sum(parts) * math.exp(-1 / 72))


def test_cider_clips_counts():
    references = ["nodule seen here now", "heart is quite large"]
    once, often = (
        text_metrics.cider([text, references[1]], references)[0]
        for text in ("nodule a b c", "nodule nodule nodule nodule")
    )
    assert once == pytest.approx(10 / 4 / 4)  # of four words one, in both vectors
    assert often == pytest.approx(10 / 4 / 8)  # and not 4 / 8


def test_scores_are_the_means_of_their_parts():
    generated, references = random_corpus(12)
    values = text_metrics.overlap_scores(generated, references)
    assert list(values) == [
        "bleu1",
        "bleu2",
        "bleu3",
        "bleu4",
        "rouge_l",
        "rouge_l_coco",
        "meteor_no_synonyms",
        "cider",
    ]
    for name, function in (("rouge_l", "rouge_l"), ("meteor_no_synonyms", "meteor")):
        values_of_texts = [
            getattr(text_metrics, function)([a], [b])[0]
            for a, b in zip(generated, references, strict=True)
        ]
        assert values[name] == pytest.approx(np.mean(values_of_texts))


def test_stated_findings_against_a_loop():
    random, names = np.random.default_rng(3), ("nodule", "effusion", "oedema", "never")
    table = random.choice([-1, 0, 1], (2, 25, 4))
    table[:, :, 3] = np.minimum(table[:, :, 3], 0)
    predicted, true = ([dict(zip(names, row.tolist(), strict=True)) for row in x] for x in table)
    values = text_metrics.finding_scores(predicted, true)
    counts = {}
    for name in names[:3]:
        pairs = [(a[name] == 1, b[name] == 1) for a, b in zip(predicted, true, strict=True)]
        counts[name] = [sum(p == x for p in pairs) for x in ((1, 1), (1, 0), (0, 1))]
    tp, fp, fn = (sum(column) for column in zip(*counts.values(), strict=True))
    assert values["precision_micro"] == pytest.approx(tp / (tp + fp))
    assert values["recall_micro"] == pytest.approx(tp / (tp + fn))
    assert values["f1_micro"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    f1 = [2 * a / (2 * a + b + c) for a, b, c in counts.values()]
    assert values["f1_macro"] == pytest.approx(np.mean(f1))
    precision = [a / (a + b) for a, b, _ in counts.values()]
    assert values["precision_macro"] == pytest.approx(np.mean(precision))
    assert values["findings"] == 3


def test_stated_findings_where_nothing_is_stated():
    silent, stated = {"nodule": 0}, {"nodule": 1}
    values = text_metrics.finding_scores([silent, {}], [stated, {}])
    assert [values[f"{k}_micro"] for k in ("precision", "recall", "f1")] == [0, 0, 0]
    values = text_metrics.finding_scores([stated, {}], [silent, {}])
    assert [values[f"{k}_macro"] for k in ("precision", "recall", "f1")] == [0, 0, 0]
    values = text_metrics.finding_scores([silent], [{}])
    assert values.pop("findings") == 0 and all(math.isnan(x) for x in values.values())


def test_word_overlap_hardly_notices_a_missing_no_and_findings_do():
    normal, names = "the heart size is within normal limits", ("effusion", "pneumonia", "nodule")
    places = [f"{name} on the {side} side ." for name in names for side in ("left", "right")]
    references = [f"{normal} . there is no {place}" for place in places]
    references.append(f"{normal} . there is {places[0]}")
    wrong = [text.replace(" no ", " ") for text in references]
    values = text_metrics.overlap_scores(wrong, references)
    assert values["bleu1"] > 0.9 and values["bleu4"] > 0.75 and values["rouge_l"] > 0.95

    def labeller(text):
        return {name: int(f"no {name}" not in text) for name in names if name in text}

    right, flipped = (
        text_metrics.finding_scores([labeller(t) for t in texts], [labeller(t) for t in references])
        for texts in (references, wrong)
    )
    assert right["f1_micro"] == right["f1_macro"] == 1
    assert flipped["precision_micro"] == pytest.approx(1 / 7) and flipped["f1_macro"] < 0.2


@pytest.mark.parametrize(("count", "num_references"), [(0, 0), (1, 2)])
def test_unpaired_texts_are_a_mistake(count, num_references):
    for function in (text_metrics.overlap_scores, text_metrics.finding_scores, text_metrics.cider):
        text = {"nodule": 1} if function is text_metrics.finding_scores else "a"
        message = f"there are {count} texts and {num_references} references .* pass at least one"
        with pytest.raises(UserError, match=message):
            function([text] * count, [text] * num_references)

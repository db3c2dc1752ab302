"""Published protocols of the tasks, each against a literal loop: scoring, classes, crops, boxes."""

import dataclasses
from math import exp

import numpy as np
import pytest
from task_runs import check_task, run_task

from plan_jax.tasks import retrieval, zero_shot
from plan_jax.types import Features, Model, Record, UserError

NAMES = ("normal", "Pleural Effusion", "covid-19")
PROMPTS = {
    "normal": (["clear", "healthy"], ["ill", "sick"]),
    "pleural effusion": (["fluid", "water"], ["dry", "no fluid"]),
    "covid-19": (["covid", "virus"], ["no covid", "no virus"]),
}


def record(i, labels=(), text="", **more):
    """A study whose image is its number, in grey."""
    return Record(np.full((4, 4, 1), i, np.uint8), text, str(i), np.int8(labels), **more)


def one_hot(classes):
    return [
        record(i, [int(c == k) for k in range(3)], f"report {i}") for i, c in enumerate(classes)
    ]


def make_model(score, kinds=("global",)):
    """A model that gives `score(number of the image, text)`, and its opposite as other kinds."""
    texts = []

    def features(index):
        index = np.asarray(index, np.float32).reshape(-1, 1)
        return Features(index, index[:, None], np.ones((len(index), 1), bool))

    def read(some):
        texts.extend(some)
        return features(range(len(texts) - len(some), len(texts)))

    def similarity(seen, words):
        left, right = (x.pooled[:, 0].astype(int).tolist() for x in (seen, words))
        table = np.array([[score(i, texts[t]) for t in right] for i in left], np.float64)
        return {kind: table if kind == "global" else -table for kind in kinds}

    def see(images):
        return features(images[:, 0, 0, 0])

    return Model("fake", (1, 1), 0, 4, see, read, similarity, lambda *_: None)


def random_scores(seed=0, scale=1.0):
    random, table = np.random.default_rng(seed), {}
    return lambda i, text: table.setdefault((i, text), scale * random.normal())


def classify(score, records, kinds=("global",), prompts=PROMPTS, validation=None, **choices):
    options = zero_shot.Options(validate=True, bootstrap_samples=50, **choices)
    splits = {"test": records, "prompts": prompts, "validation": validation}
    return run_task(zero_shot, make_model(score, kinds), splits, options, findings=NAMES)[0]


def softmax_pair(a, b):
    return exp(a) / (exp(a) + exp(b))


RULES = {
    "max": lambda yes, no: max(yes),
    "contrast": lambda yes, no: sum(yes) / len(yes) - sum(no) / len(no),
    "pair": lambda yes, no: sum(map(softmax_pair, yes, no)) / len(yes),
}


def literal(score, numbers, rule):
    rows = []
    for i in numbers:
        both = [[[score(i, t) for t in side] for side in sides] for sides in PROMPTS.values()]
        rows.append([RULES[rule](yes, no) for yes, no in both])
    return np.array(rows)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_a_literal_loop(rule):
    score, classes = random_scores(3, scale=3.0), np.random.default_rng(1).integers(0, 3, 40)
    records = one_hot(classes)
    values = classify(score, records, scoring=rule, kind="multiclass")
    scores = literal(score, range(40), rule)
    for k, name in enumerate(("normal", "pleural_effusion", "covid_19")):
        pairs = [(a, b) for a in scores[classes == k, k] for b in scores[classes != k, k]]
        area = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
        assert values[f"{name}/auroc"] == pytest.approx(area, abs=1e-9)
    if rule == "max":
        scores = np.stack([(c - np.mean(c)) / np.std(c) for c in scores.T], 1)
    chosen = np.array([max(range(3), key=lambda k, row=row: row[k]) for row in scores])
    assert values["accuracy"] == pytest.approx(np.mean(chosen == classes))
    f1 = []
    for k in range(3):
        both, either = np.sum((chosen == k) & (classes == k)), np.sum(chosen == k)
        f1.append(2 * both / (either + np.sum(classes == k)))
    assert values["f1_macro"] == pytest.approx(np.mean(f1))
    assert values["covid_19/f1"] == pytest.approx(f1[2])


def test_the_rules_differ_where_they_should():
    score, records = random_scores(3, scale=3.0), one_hot(np.arange(60) % 3)
    found = [classify(score, records, scoring=rule)["auroc_macro"] for rule in RULES]
    assert len(set(found)) == 3


def test_the_highest_prompt_is_standardised_over_the_images():
    # The first class is near to every image; only what is above its usual level counts.
    table = np.array([[9.0, 1.0, 0.0], [8.0, 3.0, 0.0], [8.0, 1.0, 2.0]])
    near = {text: k for k, sides in enumerate(PROMPTS.values()) for text in sides[0]}
    score = lambda i, text: table[i][near[text]] if text in near else 99.0  # noqa: E731
    lone = {name: (yes, []) for name, (yes, _) in PROMPTS.items()}
    values = classify(score, one_hot(range(3)), prompts=lone, scoring="max", kind="multiclass")
    assert values["accuracy"] == 1.0
    plain = {name: (yes, ["clear"]) for name, (yes, _) in PROMPTS.items()}
    values = classify(score, one_hot(range(3)), prompts=plain, kind="multiclass")
    assert values["accuracy"] == pytest.approx(1 / 3)
    table[:, 0] = 5.0  # a column that says nothing is 0: below what is above the mean elsewhere
    values = classify(score, one_hot(range(3)), prompts=lone, scoring="max", kind="multiclass")
    assert values["accuracy"] == 1.0


def test_unequal_sides_are_paired_each_with_each():
    score = random_scores(5, scale=3.0)
    prompts = {"normal": (["a", "b", "c"], ["d", "e"])}
    records = one_hot(np.arange(30) % 2)
    values = classify(score, records, prompts=prompts, scoring="pair")
    found = [
        np.mean([softmax_pair(score(i, p), score(i, n)) for p in "abc" for n in "de"])
        for i in range(30)
    ]
    area = np.mean([a > b for a in found[::2] for b in found[1::2]])
    assert values["normal/auroc"] == pytest.approx(area)


def test_embeddings_are_averaged_before_they_are_normalised():
    random = np.random.default_rng(0)
    texts = sorted({text for sides in PROMPTS.values() for side in sides for text in side})
    said = {t: (random.normal(size=6) * random.uniform(0.1, 9)).astype(np.float32) for t in texts}
    shown = random.normal(size=(40, 6)).astype(np.float32)

    def features(rows):
        return Features(rows, rows[:, None], np.ones((len(rows), 1), bool))

    def cosines(a, b):
        return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)

    model = Model(
        "fake",
        (1, 1),
        0,
        4,
        lambda images: features(shown[images[:, 0, 0, 0]]),
        lambda some: features(np.stack([said[t] for t in some])),
        lambda a, b: {"global": cosines(a.pooled, b.pooled), "local": cosines(a.pooled, b.pooled)},
        lambda *_: None,
    )
    classes = np.arange(40) % 3
    for rule in ("contrast", "pair", "max"):
        options = zero_shot.Options(scoring=rule, ensemble="embeddings", bootstrap_samples=20)
        splits = {"test": one_hot(classes), "prompts": PROMPTS}
        values, _ = run_task(zero_shot, model, splits, options, findings=NAMES)
        assert not any(key.startswith("local/") for key in values)
        for k, (yes, no) in enumerate(PROMPTS.values()):
            score = []
            for image in shown:
                near = []
                for side in (yes, no):
                    text = sum(said[t].astype(np.float64) for t in side) / len(side)
                    near.append(image @ text / np.linalg.norm(image) / np.linalg.norm(text))
                score.append({"max": near[0]}.get(rule, near[0] - near[1]))
            pairs = [
                (a, b)
                for i, a in enumerate(score)
                for j, b in enumerate(score)
                if classes[i] == k != classes[j]
            ]
            area = np.mean([a > b for a, b in pairs])
            key = NAMES[k].lower().replace(" ", "_").replace("-", "_")
            assert values[f"{key}/auroc"] == pytest.approx(area, abs=1e-6)


def test_precision_recall_and_thresholds_of_validation():
    score = lambda i, text: float(i) if text in ("clear", "healthy") else 0.0  # noqa: E731
    labels = {10: 0, 20: 1, 30: 0, 40: 1, 50: 1, 60: -1}
    validation = {9: 0, 15: 0, 25: 1, 26: 0, 35: 1}
    records, held = (
        [record(i, [label, 1, 0]) for i, label in some.items()] for some in (labels, validation)
    )
    values = classify(score, records, validation=held)
    # On validation: from 35 F1 2/3, from 25 4/5 (the best), from 15 2/3. On test from 25: 2 of 3.
    assert values["normal/f1"] == values["f1_macro"] == pytest.approx(2 * 2 / (3 + 3))
    assert values["normal/accuracy"] == values["accuracy_macro"] == pytest.approx(3 / 5)
    assert values["normal/auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert values["chance/auprc_macro"] == values["majority/accuracy_macro"] == pytest.approx(0.6)
    assert values["all_positive/f1_macro"] == pytest.approx(2 * 0.6 / 1.6)
    assert values["findings_scored"] == 1 and values["findings_without_threshold"] == 2
    without = classify(score, records)
    assert not any("f1" in key or "accuracy" in key for key in without)
    assert without["auroc_macro"] == values["auroc_macro"]
    one_class = [record(i, [1, 1, 0]) for i in range(3)]
    values = classify(score, records, validation=one_class)
    assert values["findings_without_threshold"] == 3 and np.isnan(values["f1_macro"])


def test_scores_that_are_not_finite_show():
    score = lambda i, text: float("nan") if i == 2 else float(i)  # noqa: E731
    records = one_hot(np.arange(9) % 3)
    values = classify(score, records, validation=records)
    assert np.isnan([values[f"{k}_macro"] for k in ("auroc", "auprc", "f1", "accuracy")]).all()
    values = classify(score, records, kind="multiclass")
    assert np.isnan([values[k] for k in ("accuracy", "f1_macro", "accuracy_low")]).all()


def test_many_classes_leave_out_what_is_not_one_of_them():
    labels = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, -1], [1, 0, 0]]
    records = [record(i, some) for i, some in enumerate(labels)]
    values = classify(lambda i, t: 0.0, records, kinds=("global", "local"), kind="multiclass")
    assert values["n"] == 3 and values["left_out"] == 3
    assert values["accuracy"] == values["chance/accuracy"] == pytest.approx(1 / 3)  # all tie
    assert values["majority/accuracy"] == pytest.approx(2 / 3)
    assert values["majority/f1_macro"] == pytest.approx((2 * 2 / (3 + 2) + 0) / 2)
    assert values["local/accuracy"] == values["accuracy"] and "local/accuracy_low" not in values
    assert values["accuracy_low"] <= values["accuracy"] <= values["accuracy_high"]
    assert "covid_19/f1" not in values and "normal/f1" in values


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scoring": "maximum"}, "scoring is 'maximum'; use contrast, max, pair"),
        ({"scoring": "max", "records": one_hot([0])}, "compares images and got 1"),
        (
            {"kind": "multiclass", "records": [record(0, [1, 1, 0])]},
            "none of 1 records has exactly",
        ),
        ({"kind": "multiclass", "prompts": {"normal": (["a"], ["b"])}}, "the one class normal"),
        ({"ensemble": "embeddings", "kinds": ("local",)}, "needs a global similarity.*local"),
        ({"scoring": "pair", "kinds": ("local",)}, "needs a global similarity"),
        ({"scoring": "pair", "prompts": {"normal": (["a"], [])}}, "normal are empty on one side"),
        ({"scoring": "max", "prompts": {"normal": ([], ["a"])}}, "normal are empty on one side"),
    ],
)
def test_zero_shot_names_the_mistake(more, said):
    records = more.pop("records", one_hot([0, 1, 2]))
    with pytest.raises(UserError, match=said):
        classify(lambda i, t: 0.0, records, **more)


def by_class(score, records, classes=("normal", "covid-19"), kinds=("global",), seed=0, **changes):
    options = retrieval.Options(classes=classes, **changes)
    check_task(retrieval, {"test": records}, options, NAMES)
    return retrieval.class_precision(make_model(score, kinds), records, NAMES, options, seed)


def test_candidates_have_exactly_one_class_and_are_drawn_by_the_seed():
    labels = [[1, 0, 0]] * 6 + [[1, 1, 0]] + [[0, 1, 1]] * 4 + [[1, 0, 1], [1, 0, -1], [0, 0, 0]]
    records = [record(i, some, f"report {i}") for i, some in enumerate(labels)]
    values = by_class(random_scores(), records)
    assert values["class/normal/n"] == 7 and values["class/covid_19/n"] == 4  # effusion: no matter
    assert values["class/absent"] == 0 and values["class/reports"] == 11
    level = (7 * 7 + 4 * 4) / 11 / 11
    for way in ("i2t", "t2i"):
        assert values[f"class/chance/{way}_p5"] == pytest.approx(level)
        assert values[f"class/{way}_p100"] == pytest.approx(level)  # K is cut to 11
    asked = []
    for seed in (0, 0, 1):
        shown = set()
        by_class(lambda i, t, s=shown: s.add(i) or 0.0, records, per_class=3, seed=seed)
        assert len(shown) == 6 and len(shown & {7, 8, 9, 10}) == 3
        asked.append(shown)
    assert asked[0] == asked[1] != asked[2]


def test_class_precision_of_an_oracle_of_silence_and_of_a_loop():
    classes = np.arange(20) % 2 * 2
    records = one_hot(classes)
    right = lambda i, text: float(classes[i] == classes[int(text.split()[1])])  # noqa: E731
    values = by_class(right, records, kinds=("global", "local"))
    for way in ("i2t", "t2i"):
        assert values[f"class/{way}_p1"] == values[f"class/{way}_p10"] == 1.0
        assert values[f"class/local/{way}_p5"] == 0.0
    assert by_class(lambda i, t: 0.0, records)["class/i2t_p10"] == 0.0
    score = random_scores()
    values = by_class(score, records)
    table = np.array([[score(i, f"report {j}") for j in range(20)] for i in range(20)])
    for way, asked in (("i2t", table), ("t2i", table.T)):
        shares = []
        for a, near in enumerate(asked.tolist()):
            first = sorted(range(20), key=near.__getitem__, reverse=True)[:5]
            shares.append(sum(classes[a] == classes[b] for b in first) / 5)
        assert values[f"class/{way}_p5"] == pytest.approx(np.mean(shares))
    options = retrieval.Options(classes=("normal", "covid-19"), cuts=(5,), bootstrap_samples=20)
    both, rows = run_task(retrieval, make_model(score), {"test": records}, options, findings=NAMES)
    assert both["class/i2t_p5"] == values["class/i2t_p5"] and "class/i2t_p1" not in both
    assert "i2t_r5" in both and len(rows) == 4


def test_a_candidate_without_a_report_is_retrieved_but_does_not_query():
    records = [record(i, [int(i < 3), 0, int(i >= 3)], "" if i else "report") for i in range(8)]
    values = by_class(lambda i, t: float(i < 3), records)
    assert values["class/reports"] == 1 and values["class/i2t_p1"] == 1.0
    assert values["class/t2i_p1"] == 1.0 and values["class/t2i_p5"] == pytest.approx(3 / 5)
    assert values["class/chance/t2i_p1"] == pytest.approx(3 / 8)
    mute = [dataclasses.replace(r, text=" ") for r in records]
    assert not any("2" in key for key in by_class(lambda i, t: 0.0, mute))
    values = by_class(lambda i, t: 0.0, records[:3])
    assert values["class/absent"] == 1 and values["class/chance/t2i_p1"] == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"classes": ("normal", "oedema")},
            "class oedema is not in the data; use findings of normal",
        ),
        ({"classes": ("Pleural Effusion",)}, "no record has exactly one of Pleural Effusion"),
        ({"per_class": 0}, "retrieval.per_class and retrieval.cuts must be >= 1; got 0"),
    ],
)
def test_retrieval_names_the_mistake(more, said):
    with pytest.raises(UserError, match=said):
        by_class(lambda i, t: 0.0, one_hot([0, 0, 2]), **more)

"""Zero-shot classification: scoring rules and decisions against literal loops over images."""

import dataclasses
from math import exp

import numpy as np
import pytest
from fake_models import (
    FINDINGS,
    make_class_records,
    make_model,
    make_numbered_model,
    make_numbered_record,
    make_random_scores,
    make_records,
)
from task_runs import run_task

from configs.eval import chexpert_5x200
from plan_jax.tasks import zero_shot
from plan_jax.types import Features, Model, UserError

PLAIN_PROMPTS = {name: ([f"there is {name}", name], [f"no {name}"]) for name in FINDINGS}
NAMES = ("normal", "Pleural Effusion", "covid-19")
PROMPTS = {
    "normal": (["clear", "healthy"], ["ill", "sick"]),
    "pleural effusion": (["fluid", "water"], ["dry", "no fluid"]),
    "covid-19": (["covid", "virus"], ["no covid", "no virus"]),
}


def evaluate(model, records, prompts=PLAIN_PROMPTS):
    splits = {"test": records, "prompts": prompts}
    return run_task(zero_shot, model, splits, zero_shot.Options(), findings=FINDINGS)[0]


def classify(score, records, kinds=("global",), prompts=PROMPTS, validation=None, **choices):
    """Returns the metrics of a model of numbered records, with validation records if given."""
    options = zero_shot.Options(validate=True, bootstrap_samples=50, **choices)
    splits = {"test": records, "prompts": prompts, "validation": validation}
    model = make_numbered_model(score, kinds)
    return run_task(zero_shot, model, splits, options, findings=NAMES)[0]


# AUROC -------------------------------------------------------------------------------------------


def test_an_oracle_and_its_opposite():
    records = make_records(40)
    labels_of = {record.image.tobytes(): record.labels for record in records}

    def score(image, text):
        finding = next(i for i, name in enumerate(FINDINGS) if name in text)
        return float(labels_of[image][finding]) * (-1 if text.startswith("no ") else 1)

    metrics = evaluate(make_model(score=score), records)
    assert metrics["auroc_macro"] == metrics["nodule/auroc"] == 1
    assert metrics["local/auroc_macro"] == metrics["local/pleural_effusion/auroc"] == 0
    assert metrics["auroc_macro_low"] == metrics["auroc_macro_high"] == 1
    assert metrics["findings_scored"] == 2 and metrics["findings_skipped"] == 0


def test_contrast_is_the_difference_of_means():
    score = make_random_scores()
    labels = [[1, 1], [0, -1], [1, 0], [0, -1], [-1, 0]]
    records = [
        dataclasses.replace(record, labels=np.int8(row))
        for record, row in zip(make_records(5), labels, strict=True)
    ]
    metrics = evaluate(make_model(score=score), records)
    for finding, name in enumerate(FINDINGS):
        contrasts = []
        for record in records:
            image = record.image.tobytes()
            positive = (score(image, f"there is {name}") + score(image, name)) / 2
            contrasts.append(positive - score(image, f"no {name}"))
        present, absent = ([i for i in range(5) if labels[i][finding] == label] for label in (1, 0))
        pairs = [float(contrasts[a] > contrasts[b]) for a in present for b in absent]
        assert metrics[f"{name.replace(' ', '_')}/auroc"] == pytest.approx(np.mean(pairs))


def test_a_finding_with_one_class_is_undefined_and_counted():
    records = [
        dataclasses.replace(record, labels=np.int8([1, i % 2]))
        for i, record in enumerate(make_records(6))
    ]
    metrics = evaluate(make_model(score=lambda *_: 0.0), records)
    assert np.isnan(metrics["nodule/auroc"]) and np.isnan(metrics["nodule/auprc"])
    assert metrics["findings_skipped"] == 1
    assert metrics["auroc_macro"] == metrics["pleural_effusion/auroc"] == 0.5


# Scoring rules -----------------------------------------------------------------------------------


def softmax_of_two(a, b):
    return exp(a) / (exp(a) + exp(b))


RULES = {
    "max": lambda positive, negative: max(positive),
    "contrast": lambda positive, negative: (
        sum(positive) / len(positive) - sum(negative) / len(negative)
    ),
    "pair": lambda positive, negative: sum(map(softmax_of_two, positive, negative)) / len(positive),
}


def loop_scores(score, numbers, rule):
    """Returns the scores of numbered images for every finding, by loops."""
    rows = []
    for i in numbers:
        sides = [[[score(i, text) for text in side] for side in pair] for pair in PROMPTS.values()]
        rows.append([RULES[rule](positive, negative) for positive, negative in sides])
    return np.array(rows)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_a_literal_loop(rule):
    score = make_random_scores(3, scale=3.0)
    classes = np.random.default_rng(1).integers(0, 3, 40)
    metrics = classify(score, make_class_records(classes), scoring=rule, kind="multiclass")
    scores = loop_scores(score, range(40), rule)
    for k, name in enumerate(("normal", "pleural_effusion", "covid_19")):
        pairs = [(a, b) for a in scores[classes == k, k] for b in scores[classes != k, k]]
        area = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
        assert metrics[f"{name}/auroc"] == pytest.approx(area, abs=1e-9)
    if rule == "max":
        scores = np.stack([(column - column.mean()) / column.std() for column in scores.T], 1)
    predicted = np.array([max(range(3), key=lambda k, row=row: row[k]) for row in scores])
    assert metrics["accuracy"] == pytest.approx(np.mean(predicted == classes))
    f1 = []
    for k in range(3):
        true_positives = np.sum((predicted == k) & (classes == k))
        f1.append(2 * true_positives / (np.sum(predicted == k) + np.sum(classes == k)))
    assert metrics["f1_macro"] == pytest.approx(np.mean(f1))
    assert metrics["covid_19/f1"] == pytest.approx(f1[2])


def test_the_rules_differ():
    score, records = make_random_scores(3, scale=3.0), make_class_records(np.arange(60) % 3)
    areas = [classify(score, records, scoring=rule)["auroc_macro"] for rule in RULES]
    assert len(set(areas)) == 3


def test_the_maximum_is_standardised_over_the_images():
    # The first class is similar to every image; only what exceeds its usual level counts.
    table = np.array([[9.0, 1.0, 0.0], [8.0, 3.0, 0.0], [8.0, 1.0, 2.0]])
    class_of = {text: k for k, pair in enumerate(PROMPTS.values()) for text in pair[0]}

    def score(i, text):
        return table[i][class_of[text]] if text in class_of else 99.0

    records = make_class_records(range(3))
    positive_only = {name: (positive, []) for name, (positive, _) in PROMPTS.items()}
    choices = {"prompts": positive_only, "scoring": "max", "kind": "multiclass"}
    assert classify(score, records, **choices)["accuracy"] == 1.0
    same_negative = {name: (positive, ["clear"]) for name, (positive, _) in PROMPTS.items()}
    metrics = classify(score, records, prompts=same_negative, kind="multiclass")
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    # A constant column is 0, which is below what exceeds the mean of other columns.
    table[:, 0] = 5.0
    assert classify(score, records, **choices)["accuracy"] == 1.0


def test_sides_of_different_length_are_paired_each_with_each():
    score = make_random_scores(5, scale=3.0)
    prompts = {"normal": (["a", "b", "c"], ["d", "e"])}
    records = make_class_records(np.arange(30) % 2)
    metrics = classify(score, records, prompts=prompts, scoring="pair")
    scores = [
        np.mean([softmax_of_two(score(i, p), score(i, n)) for p in "abc" for n in "de"])
        for i in range(30)
    ]
    area = np.mean([a > b for a in scores[::2] for b in scores[1::2]])
    assert metrics["normal/auroc"] == pytest.approx(area)


def test_embeddings_are_averaged_before_they_are_normalised():
    random = np.random.default_rng(0)
    texts = sorted({text for pair in PROMPTS.values() for side in pair for text in side})
    vectors = {
        text: (random.normal(size=6) * random.uniform(0.1, 9)).astype(np.float32) for text in texts
    }
    images = random.normal(size=(40, 6)).astype(np.float32)

    def to_features(rows):
        return Features(rows, rows[:, None], np.ones((len(rows), 1), bool))

    def similarity(a, b):
        lengths = np.linalg.norm(a.pooled, axis=1)[:, None] * np.linalg.norm(b.pooled, axis=1)
        cosines = a.pooled @ b.pooled.T / lengths
        return {"global": cosines, "local": cosines}

    model = Model(
        name="fake",
        grid=(1, 1),
        rounds=0,
        size=4,
        encode_image=lambda batch: to_features(images[batch[:, 0, 0, 0]]),
        encode_text=lambda batch: to_features(np.stack([vectors[text] for text in batch])),
        similarity=similarity,
        heatmap=lambda *_: None,
    )
    classes = np.arange(40) % 3
    for rule in ("contrast", "pair", "max"):
        options = zero_shot.Options(scoring=rule, ensemble="embeddings", bootstrap_samples=20)
        splits = {"test": make_class_records(classes), "prompts": PROMPTS}
        metrics, _ = run_task(zero_shot, model, splits, options, findings=NAMES)
        assert not any(key.startswith("local/") for key in metrics)
        for k, (name, pair) in enumerate(PROMPTS.items()):
            scores = []
            for image in images:
                cosines = []
                for side in pair:
                    mean = sum(vectors[text].astype(np.float64) for text in side) / len(side)
                    cosines.append(image @ mean / np.linalg.norm(image) / np.linalg.norm(mean))
                # The softmax of a pair orders the images as its difference does.
                scores.append(cosines[0] if rule == "max" else cosines[0] - cosines[1])
            area = np.mean(
                [
                    scores[i] > scores[j]
                    for i in range(40)
                    for j in range(40)
                    if classes[i] == k != classes[j]
                ]
            )
            key = name.replace(" ", "_").replace("-", "_")
            assert metrics[f"{key}/auroc"] == pytest.approx(area, abs=1e-6)


# Decisions ---------------------------------------------------------------------------------------


def test_average_precision_and_the_threshold_of_validation():
    score = lambda i, text: float(i) if text in ("clear", "healthy") else 0.0  # noqa: E731
    test_labels = {10: 0, 20: 1, 30: 0, 40: 1, 50: 1, 60: -1}
    val_labels = {9: 0, 15: 0, 25: 1, 26: 0, 35: 1}
    records, validation = (
        [make_numbered_record(i, [label, 1, 0]) for i, label in labels.items()]
        for labels in (test_labels, val_labels)
    )
    metrics = classify(score, records, validation=validation)
    # On validation: from 35 F1 2/3, from 25 4/5 (the best), from 15 2/3. On test from 25: 2 of 3.
    assert metrics["normal/f1"] == metrics["f1_macro"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics["normal/accuracy"] == metrics["accuracy_macro"] == pytest.approx(3 / 5)
    assert metrics["normal/auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert metrics["chance/auprc_macro"] == pytest.approx(0.6)
    assert metrics["majority/accuracy_macro"] == pytest.approx(0.6)
    assert metrics["all_positive/f1_macro"] == pytest.approx(2 * 0.6 / 1.6)
    assert metrics["findings_scored"] == 1 and metrics["findings_without_threshold"] == 2
    without = classify(score, records)
    assert not any("f1" in key or "accuracy" in key for key in without)
    assert without["auroc_macro"] == metrics["auroc_macro"]
    one_class = [make_numbered_record(i, [1, 1, 0]) for i in range(3)]
    metrics = classify(score, records, validation=one_class)
    assert metrics["findings_without_threshold"] == 3 and np.isnan(metrics["f1_macro"])


def test_scores_that_are_not_finite_give_nan():
    score = lambda i, text: float("nan") if i == 2 else float(i)  # noqa: E731
    records = make_class_records(np.arange(9) % 3)
    metrics = classify(score, records, validation=records)
    keys = [f"{name}_macro" for name in ("auroc", "auprc", "f1", "accuracy")]
    assert np.isnan([metrics[key] for key in keys]).all()
    metrics = classify(score, records, kind="multiclass")
    assert np.isnan([metrics[key] for key in ("accuracy", "f1_macro", "accuracy_low")]).all()


def test_multiclass_omits_records_without_exactly_one_class():
    labels = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, -1], [1, 0, 0]]
    records = [make_numbered_record(i, row) for i, row in enumerate(labels)]
    kinds = ("global", "local")
    metrics = classify(lambda i, text: 0.0, records, kinds=kinds, kind="multiclass")
    assert metrics["n"] == 3 and metrics["left_out"] == 3
    assert metrics["accuracy"] == metrics["chance/accuracy"] == pytest.approx(1 / 3)  # all tie
    assert metrics["majority/accuracy"] == pytest.approx(2 / 3)
    assert metrics["majority/f1_macro"] == pytest.approx((2 * 2 / (3 + 2) + 0) / 2)
    assert metrics["local/accuracy"] == metrics["accuracy"] and "local/accuracy_low" not in metrics
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert "covid_19/f1" not in metrics and "normal/f1" in metrics


def test_chexpert_5x200_takes_records_of_one_class_and_nothing_else():
    """Exactly one of five labels is 1, the other four and the eight others are 0."""
    findings = (*chexpert_5x200.CLASSES, *chexpert_5x200.ABSENT, "No Finding")
    assert len(findings) == 14 and not {*chexpert_5x200.CLASSES} & {*chexpert_5x200.ABSENT}
    options = chexpert_5x200.get_config().eval.zero_shot.to_dict()
    rows = [np.eye(14, dtype=int)[n] for n in range(14)]  # one finding each
    for column in range(14):  # atelectasis, and a second finding or a doubt
        for value in (1, -1):
            rows.append(np.eye(14, dtype=int)[0])
            rows[-1][column] = value
    # The usable ones: five classes alone, and atelectasis with itself or whatever "No Finding" is.
    usable = [*range(5), 14, 40, 41]
    records = [make_numbered_record(n, row) for n, row in enumerate(rows)]
    seen = set()
    model = make_numbered_model(lambda i, text: seen.add(i) or float(i))
    prompts = {name.lower(): ([name], []) for name in findings}  # of all fourteen
    del prompts["no finding"]
    splits = {"test": records, "prompts": prompts}
    settings = zero_shot.Options(**options, bootstrap_samples=50)
    metrics = run_task(zero_shot, model, splits, settings, findings=findings)[0]
    assert seen == {*usable}
    assert metrics["n"] == 8 and metrics["left_out"] == 34
    assert metrics["chance/accuracy"] == 1 / 5 and "pneumonia/f1" not in metrics


def test_only_the_labels_of_the_options_are_scored_in_their_order():
    labels = [[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1]]
    records = [make_numbered_record(i, row) for i, row in enumerate(labels)]
    positive = ("covid", "virus", "clear", "healthy")
    metrics = classify(
        lambda i, text: float(i) if text in positive else 0.0,
        records,
        labels=("covid_19", "normal"),
    )
    assert metrics["findings_scored"] == 2
    assert metrics["covid_19/auroc"] == 1.0 and metrics["normal/auroc"] == 0.5
    assert "pleural_effusion/auroc" not in metrics
    with pytest.raises(UserError, match="labels has 'oedema', which is none of the data's"):
        classify(lambda i, text: float(i), records, labels=("oedema",))


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"oedema": (["a"], ["b"])}, "oedema name none of the data's findings .*nodule"),
        ({}, "nothing name none"),
        ({"nodule": (["a"], [])}, "nodule are empty on one side"),
    ],
)
def test_prompts_that_do_not_fit_the_data_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        evaluate(make_model(), make_records(4), prompts)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"scoring": "maximum"}, "scoring is 'maximum'; use one of contrast, max, pair"),
        ({"scoring": "max", "records": make_class_records([0])}, "compares images and got 1"),
        (
            {"kind": "multiclass", "records": [make_numbered_record(0, [1, 1, 0])]},
            "none of 1 records has exactly",
        ),
        ({"kind": "multiclass", "prompts": {"normal": (["a"], ["b"])}}, "the one class normal"),
        (
            {"kind": "multiclass", "absent": ("oedema",)},
            "absent has 'oedema', which is none of the data's findings .*add its column",
        ),
        ({"absent": ("normal",)}, "which kind multilabel does not read; set kind to multiclass"),
        (
            {
                "kind": "multiclass",
                "absent": ("normal",),
                "records": [make_numbered_record(0, [1, 0, 0])],
            },
            "none of 1 records has exactly one of Pleural Effusion, covid-19 and none of normal",
        ),
        ({"ensemble": "embeddings", "kinds": ("local",)}, "needs a global similarity.*local"),
        ({"scoring": "pair", "kinds": ("local",)}, "needs a global similarity"),
        ({"scoring": "pair", "prompts": {"normal": (["a"], [])}}, "normal are empty on one side"),
        ({"scoring": "max", "prompts": {"normal": ([], ["a"])}}, "normal are empty on one side"),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(choices, message):
    records = choices.get("records", make_class_records([0, 1, 2]))
    choices = {name: value for name, value in choices.items() if name != "records"}
    with pytest.raises(UserError, match=message):
        classify(lambda i, text: 0.0, records, **choices)

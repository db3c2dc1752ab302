"""Retrieval: the own report against known models, and precision by class against a literal loop."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from fake_models import (
    make_class_records,
    make_model,
    make_numbered_model,
    make_numbered_record,
    make_random_scores,
    make_records,
)
from task_runs import check_task, run_task

from plan_jax.tasks import retrieval
from plan_jax.types import UserError

NAMES = ("normal", "Pleural Effusion", "covid-19")


def evaluate(model, records, **changes):
    options = retrieval.Options(**{"bootstrap_samples": 200} | changes)
    return run_task(retrieval, model, {"test": records}, options, findings=NAMES)


# The own report ----------------------------------------------------------------------------------


def test_an_oracle_retrieves_everything_and_its_opposite_nothing():
    records = make_records(40)
    text_of = {record.image.tobytes(): record.text for record in records}
    model = make_model(score=lambda image, text: float(text_of[image] == text))
    metrics, examples = evaluate(model, records, num_examples=2)
    for direction in ("i2t", "t2i"):
        assert metrics[f"{direction}_r1"] == metrics[f"{direction}_r10"] == 1
        assert metrics[f"{direction}_median_rank"] == 1
        assert metrics[f"local/{direction}_r10"] == 0
        assert metrics[f"local/{direction}_median_rank"] == 40
        assert metrics[f"chance/{direction}_r5"] == pytest.approx(5 / 40)
    assert metrics["n"] == 40 and metrics["duplicates"] == 0
    assert len(examples) == 2
    for example in examples:
        assert example.rank == 1 and example.num_candidates == 40
        assert example.retrieved[0] == (example.text, 1.0, True) and len(example.retrieved) == 5
        assert not any(is_hit for _, _, is_hit in example.retrieved[1:])


def test_images_are_compared_in_blocks_of_nearly_one_size(monkeypatch):
    monkeypatch.setattr(retrieval, "IMAGE_BLOCK", 32)
    images, sizes = np.arange(33.0), []

    def similarity(block, texts):
        sizes.append(len(block))
        return {"global": np.outer(block, texts)}

    tables = retrieval.SimilarityTables(SimpleNamespace(similarity=similarity), images, images[:2])
    whole = np.concatenate([blocks["global"] for _, blocks in tables.read(tables.blocks)])
    np.testing.assert_array_equal(whole, np.outer(images, images[:2]))
    assert sizes == [17, 17], "a last block of few images was padded to a whole one"


def test_any_report_with_the_same_words_is_a_hit():
    texts = ["Clear  lungs."] * 3 + ["clear lungs."] + [f"other {i}" for i in range(8)]
    records = [
        dataclasses.replace(record, text=text)
        for record, text in zip(make_records(12), texts, strict=True)
    ]
    order = {record.image.tobytes(): i for i, record in enumerate(records)}

    def score(image, text):
        return float(text == "clear lungs.") - 0.01 * order[image]

    metrics, examples = evaluate(make_model(score=score), records, num_examples=12)
    assert metrics["duplicates"] == 4
    assert metrics["i2t_r1"] == pytest.approx(4 / 12)
    assert metrics["t2i_r5"] == pytest.approx(5 / 12)  # every text ranks the images in their order
    assert metrics["chance/i2t_r1"] == pytest.approx((4 * 4 + 8) / 12 / 12)
    clear = [example for example in examples if example.text.lower().split() == ["clear", "lungs."]]
    assert len(clear) == 4
    assert all(example.retrieved[0][2] and example.rank == 1 for example in clear)


def test_records_without_a_report_are_left_out():
    records = make_records(10)
    records[3:5] = [dataclasses.replace(record, text=" ") for record in records[3:5]]
    text_of = {record.image.tobytes(): record.text for record in records}
    model = make_model(score=lambda image, text: float(text_of[image] == text))
    metrics, _ = evaluate(model, records)
    assert metrics["n"] == 8 and metrics["without_report"] == 2 and metrics["duplicates"] == 0
    assert metrics["i2t_r1"] == 1 and metrics["chance/i2t_r5"] == pytest.approx(5 / 8)


def test_random_scores_are_within_their_interval_of_chance():
    records, random = make_records(100), np.random.default_rng(0)
    metrics, _ = evaluate(make_model(score=lambda *_: random.random()), records)
    assert metrics["i2t_r10_low"] <= metrics["chance/i2t_r10"] <= metrics["i2t_r10_high"]
    chance_rank = metrics["chance/i2t_median_rank"]
    assert metrics["i2t_median_rank"] == pytest.approx(chance_rank, abs=20)


# A report of the same class ----------------------------------------------------------------------


def class_precision(
    score, records, classes=("normal", "covid-19"), kinds=("global",), seed=0, **changes
):
    options = retrieval.Options(classes=classes, **changes)
    check_task(retrieval, {"test": records}, options, NAMES)
    return retrieval.class_precision(
        make_numbered_model(score, kinds), records, NAMES, options, seed
    )


def test_candidates_have_no_absent_finding():
    labels = [[1, 0, 0], [0, 0, 1], [1, 1, 0], [1, -1, 0], [0, 0, 1]]
    records = [make_numbered_record(i, row, f"report {i}") for i, row in enumerate(labels)]
    metrics = class_precision(make_random_scores(), records, absent=("Pleural Effusion",))
    assert metrics["class/normal/n"] == 1 and metrics["class/covid_19/n"] == 2


def test_candidates_have_exactly_one_class_and_are_drawn_by_the_seed():
    labels = [[1, 0, 0]] * 6 + [[1, 1, 0]] + [[0, 1, 1]] * 4 + [[1, 0, 1], [1, 0, -1], [0, 0, 0]]
    records = [make_numbered_record(i, row, f"report {i}") for i, row in enumerate(labels)]
    metrics = class_precision(make_random_scores(), records)
    # Pleural effusion is not among the classes, so its labels do not matter.
    assert metrics["class/normal/n"] == 7 and metrics["class/covid_19/n"] == 4
    assert metrics["class/absent"] == 0 and metrics["class/reports"] == 11
    chance = (7 * 7 + 4 * 4) / 11 / 11
    for direction in ("i2t", "t2i"):
        assert metrics[f"class/chance/{direction}_p5"] == pytest.approx(chance)
        assert metrics[f"class/{direction}_p100"] == pytest.approx(chance)  # k is cut to 11
    drawn = []
    for seed in (0, 0, 1):
        images = set()
        score = lambda i, text, images=images: images.add(i) or 0.0  # noqa: E731
        class_precision(score, records, per_class=3, seed=seed)
        assert len(images) == 6 and len(images & {7, 8, 9, 10}) == 3
        drawn.append(images)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_oracle_of_the_class_and_a_model_with_constant_scores():
    classes = np.arange(20) % 2 * 2
    records = make_class_records(classes)
    oracle = lambda i, text: float(classes[i] == classes[int(text.split()[1])])  # noqa: E731
    metrics = class_precision(oracle, records, kinds=("global", "local"))
    for direction in ("i2t", "t2i"):
        assert metrics[f"class/{direction}_p1"] == metrics[f"class/{direction}_p10"] == 1.0
        assert metrics[f"class/local/{direction}_p5"] == 0.0
    assert class_precision(lambda i, text: 0.0, records)["class/i2t_p10"] == 0.0


def test_class_precision_is_that_of_a_literal_loop():
    classes = np.arange(20) % 2 * 2
    records, score = make_class_records(classes), make_random_scores()
    metrics = class_precision(score, records)
    table = np.array([[score(i, f"report {j}") for j in range(20)] for i in range(20)])
    for direction, queries in (("i2t", table), ("t2i", table.T)):
        shares = []
        for query, scores in enumerate(queries.tolist()):
            first = sorted(range(20), key=scores.__getitem__, reverse=True)[:5]
            shares.append(sum(classes[query] == classes[j] for j in first) / 5)
        assert metrics[f"class/{direction}_p5"] == pytest.approx(np.mean(shares))
    both, examples = evaluate(
        make_numbered_model(score), records, classes=("normal", "covid-19"), cuts=(5,)
    )
    assert both["class/i2t_p5"] == metrics["class/i2t_p5"] and "class/i2t_p1" not in both
    assert "i2t_r5" in both and len(examples) == 4


def test_a_candidate_without_a_report_is_retrieved_but_is_no_query():
    records = [
        make_numbered_record(i, [int(i < 3), 0, int(i >= 3)], "" if i else "report")
        for i in range(8)
    ]
    metrics = class_precision(lambda i, text: float(i < 3), records)
    assert metrics["class/reports"] == 1 and metrics["class/i2t_p1"] == 1.0
    assert metrics["class/t2i_p1"] == 1.0 and metrics["class/t2i_p5"] == pytest.approx(3 / 5)
    assert metrics["class/chance/t2i_p1"] == pytest.approx(3 / 8)
    metrics = class_precision(lambda i, text: 0.0, records[:3])
    assert metrics["class/absent"] == 1 and metrics["class/chance/t2i_p1"] == 1.0
    without_reports = [dataclasses.replace(record, text=" ") for record in records]
    metrics = class_precision(lambda i, text: 0.0, without_reports)
    assert metrics["class/reports"] == 0 and metrics["class/normal/n"] == 3
    assert not any("i2t" in key or "t2i" in key for key in metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("normal", "oedema")}, "class oedema is not in the data; use .*normal"),
        ({"absent": ("oedema",)}, "absent finding oedema is not in the data; use .*normal"),
        ({"classes": ("Pleural Effusion",)}, "no record has exactly one of Pleural Effusion"),
        ({"per_class": 0}, "retrieval.per_class is 0; use at least 1"),
        ({"cuts": (1, 0)}, r"retrieval.cuts is \(1, 0\); use numbers of at least 1"),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(changes, message):
    with pytest.raises(UserError, match=message):
        class_precision(lambda i, text: 0.0, make_class_records([0, 0, 2]), **changes)

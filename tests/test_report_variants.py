"""Accuracies against false variants: known readers, ties, parts, and what is left out."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from fake_models import make_model, make_records
from task_runs import run_task

from plan_jax.data.report_parser import rewriting
from plan_jax.tasks import report_variants, retrieval
from plan_jax.types import VARIANT_KINDS

REPORTS = (
    "Small effusion on the left. No nodule.",
    "There is a large nodule in the right upper zone.",
    "The lungs are clear.",
    "No effusion. Nodule in the left lower zone.",
)
KEYS = [f"{name}_accuracy" for name in report_variants._LABELS]


def evaluate(score, count=40, **options):
    records = [
        dataclasses.replace(record, text=f"{REPORTS[i % 4]} Study {i}.")
        for i, record in enumerate(make_records(count))
    ]
    text_of = {record.image.tobytes(): record.text for record in records}
    model = make_model(score=lambda image, text: score(text_of[image], text))
    options = retrieval.Options(**{"bootstrap_samples": 50} | options)
    findings = ("nodule", "pleural effusion")
    finder = partial(rewriting.find_variants, findings=findings)
    return run_task(
        retrieval, model, {"test": records}, options, findings=findings, find_variants=finder
    )[0]


def test_a_reader_is_always_right_and_its_opposite_never():
    metrics = evaluate(lambda own, text: float(own == text))
    for key in KEYS:
        assert metrics[key] == metrics[f"{key}_low"] == metrics[f"{key}_high"] == 1
        assert metrics[f"local/{key}"] == 0
        assert metrics[f"chance/{key}"] == 0.5


def test_a_model_that_does_not_read_is_at_chance():
    metrics = evaluate(lambda own, text: 0.0)
    assert [metrics[key] for key in KEYS] == [0.5] * len(KEYS)


def test_a_model_that_ignores_the_order_of_words_is_at_chance_only_where_words_are_equal():
    """Exchanging sides changes a word; this one hears no sides."""

    def score(own, text):
        deaf = {word for word in text.lower().split() if word.strip(".") not in ("left", "right")}
        return float(len(deaf & set(own.lower().split())) - len(deaf))

    metrics = evaluate(score)
    assert metrics["laterality_accuracy"] == 0.5
    assert metrics["severity_accuracy"] == 1


def test_liking_the_word_no_is_right_in_one_half_of_the_negations():
    metrics = evaluate(lambda own, text: float(text.lower().split().count("no")))
    assert metrics["negation_stated_accuracy"] == 0
    assert metrics["negation_denied_accuracy"] == 1
    assert metrics["negation_accuracy"] == 0.5


def test_reports_are_counted_and_limited():
    metrics = evaluate(lambda own, text: 0.0)
    assert metrics["laterality_n"] == 30 and metrics["negation_n"] == 30
    assert metrics["negation_stated_n"] == 30 and metrics["negation_denied_n"] == 20
    limited = evaluate(lambda own, text: 0.0, variant_reports=7)
    assert limited["laterality_n"] == limited["region_n"] == 7
    none = evaluate(lambda own, text: 0.0, variant_reports=0)
    assert not [key for key in none if "accuracy" in key]


def test_without_any_variant_there_are_no_keys():
    model = make_model(score=lambda image, text: 0.0)
    metrics = report_variants.compare_variants(
        model,
        model.encode_image(np.zeros((3, 32, 32, 1), np.uint8)),
        ["The lungs are clear."] * 3,
        rewriting.find_variants,
        primary="global",
        max_reports=10,
        bootstrap_samples=10,
        seed=0,
    )
    assert metrics == {}


def test_accuracies_equal_those_of_a_literal_loop():
    def score(own, text):
        return float(np.random.default_rng(len(own) * 1000 + sum(map(ord, text))).normal())

    metrics = evaluate(score, count=32)
    reports = [f"{REPORTS[i % 4]} Study {i}." for i in range(32)]
    for kind in VARIANT_KINDS:
        pairs = report_variants._draw_pairs(reports, kind, rewriting.find_variants, 1000, 0)
        parts = {pair.variant.part for pair in pairs}
        shares = []
        for part in parts:
            chosen = [pair for pair in pairs if pair.variant.part == part]
            right = [
                score(reports[row], reports[row]) > score(reports[row], variant.text)
                for row, variant in chosen
            ]
            shares.append(sum(right) / len(right))
        assert metrics[f"{kind}_accuracy"] == pytest.approx(np.mean(shares))

"""Scores of single examples: each metric follows from its own, and a pair of models from both."""

import numpy as np
import pytest
from fake_models import FINDINGS, make_model, make_oracle, make_random_scores, make_records

from plan_jax.metrics import intervals
from plan_jax.tasks import grounding, retrieval, zero_shot
from plan_jax.types import EvalData, TaskContext

RECORDS = make_records(24)
PROMPTS = {name: ([f"there is {name}"], [f"no {name}"]) for name in FINDINGS}
DATA = EvalData("records", FINDINGS, RECORDS, prompts=PROMPTS)
OPTIONS = {
    grounding: grounding.Options(bootstrap_samples=20),
    retrieval: retrieval.Options(bootstrap_samples=20, variant_reports=0),
    zero_shot: zero_shot.Options(bootstrap_samples=20),
}
COUNTS = {grounding: 20, retrieval: 6, zero_shot: 1}


def evaluate(task, seed=0):
    """Returns the result of a model whose answers are random, and better for a higher seed."""
    random = np.random.default_rng(seed)
    oracle = make_oracle(RECORDS)

    def heat_map(image, text, rounds):
        return seed * oracle(image, text, rounds) + random.normal(size=(8, 8))

    model = make_model(heat_map, make_random_scores(seed))
    return task.evaluate(model, DATA, OPTIONS[task], TaskContext())


@pytest.mark.parametrize("task", OPTIONS, ids=lambda task: task.TITLE)
def test_a_metric_follows_from_the_scores_of_its_examples(task):
    result = evaluate(task)
    assert len(result.scores) == COUNTS[task]
    for key, scores in result.scores.items():
        value = intervals.compute_metric(scores.table, scores.statistic)
        assert value == pytest.approx(result.metrics[key], abs=1e-6), key
        assert len(scores.names) == len(scores.table) == len(set(scores.names))


@pytest.mark.parametrize("task", OPTIONS, ids=lambda task: task.TITLE)
def test_examples_have_the_same_names_for_every_model(task):
    first, second = evaluate(task, 0), evaluate(task, 1)
    for key, scores in first.scores.items():
        assert scores.names == second.scores[key].names


def test_a_name_says_what_was_asked():
    """Phrases of findings without a name are told apart by their words."""
    sides = [grounding.PhraseScores(False) for _ in range(2)]
    for side, text in zip(sides, ("nodule", "effusion"), strict=True):
        side.names, side.texts, side.images = ["other"], [text], [0]
        side.add("", {"cnr_signed": np.ones(1)})
    names = [grounding._score_images(side, "cnr_signed").names for side in sides]
    assert names[0] != names[1]


def test_an_interval_of_a_difference_belongs_to_its_metric():
    first, second = (evaluate(grounding, seed).scores["cnr_signed"] for seed in (0, 1))
    difference = intervals.compute_metric(second.table, "mean")
    difference -= intervals.compute_metric(first.table, "mean")
    low, high = intervals.bootstrap_difference(first.table, second.table)
    assert 0 < low < difference < high


def test_models_share_their_random_phrases():
    names = [{row.name for row in evaluate(grounding, seed).rows} for seed in (0, 1)]
    assert len(names[0] & names[1]) >= OPTIONS[grounding].num_examples
    assert all(name.partition(" ")[0].isdigit() for name in names[0])

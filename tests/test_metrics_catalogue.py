"""The metrics catalogue: looking up keys, and the entries of the tasks."""

import math
import re

import pytest

from plan_jax.metrics import entries, headlines, is_number, lookup, slug
from plan_jax.tasks import CATALOGUE, TASKS, TITLES
from plan_jax.types import Metric, Task

NAN = float("nan")


def test_an_exact_key_wins_over_a_pattern_and_the_first_pattern_over_others():
    catalogue = {
        "task": {
            "{finding}/score": Metric("score of {finding}", ""),
            "round{t}/score": Metric("score of round {t}", ""),
            "micro/score": Metric("mean score", ""),
        }
    }
    assert lookup(catalogue, "task/micro/score")[2].label == "mean score"
    assert lookup(catalogue, "task/round1/score")[0] == "{finding}/score"
    assert lookup(catalogue, "task/pleural_effusion/score")[2].label == "score of pleural effusion"
    assert lookup(catalogue, "task/a/b/score") is None
    assert lookup(catalogue, "other/micro/score") is None


def test_baselines_are_filled_in_and_have_no_entry():
    catalogue = {"task": {"{group}/f1": Metric("F1", "", baselines={"chance": "chance/{group}"})}}
    catalogue["task"]["f1"] = Metric("F1", "", baselines={"random": "random/f1"}, headline=True)
    values = {"task/left/f1": 0.7, "task/chance/left": 0.5, "task/random/f1": 0.1, "task/f1": 0.3}
    values |= {"task/f1_low": 0.2, "task/f1_high": 0.4, "task/n": 3}
    values |= {"task/left/f1_low": None}  # as metrics.json holds NaN
    measured = {entry.key: entry for entry in entries(catalogue, values)}
    assert set(measured) == {"task/left/f1", "task/f1"}  # `random/f1` also fits `{group}/f1`
    assert measured["task/left/f1"].baselines == {"chance": 0.5}
    assert measured["task/left/f1"].group == ("left",)
    assert measured["task/f1"].interval == (0.2, 0.4)
    assert all(math.isnan(end) for end in measured["task/left/f1"].interval)
    assert [entry.key for entry in headlines(catalogue, values)] == ["task/f1"]


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0]])
def test_only_numbers_are_metrics(value):
    assert not is_number(value)
    assert not list(entries({"task": {"f1": Metric("F1", "")}}, {"task/f1": value}))


def test_nan_is_a_number():
    (entry,) = entries({"task": {"f1": Metric("F1", "")}}, {"task/f1": NAN})
    assert is_number(NAN) and math.isnan(entry.value)


def test_a_slug_is_a_word():
    assert slug("COVID-19") == "covid_19" and slug("No Finding ") == "no_finding"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_follows_the_protocol(name):
    task = TASKS[name]
    assert isinstance(task, Task)
    assert TITLES[name] == task.TITLE and CATALOGUE[name] is task.METRICS
    assert isinstance(task.requirements(task.Options()), tuple)


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_is_explained(name):
    metrics = TASKS[name].METRICS
    assert any(metric.headline for metric in metrics.values())
    for key, metric in metrics.items():
        placeholders = set(re.findall(r"{(\w+)}", key))
        texts = [metric.label, *metric.baselines.values()]
        assert set(re.findall(r"{(\w+)}", " ".join(texts))) <= placeholders, key
        assert metric.meaning.endswith(".") and "{" not in metric.meaning, key
        assert metric.label and metric.digits >= 0, key


def test_labels_of_a_task_are_distinct():
    for metrics in CATALOGUE.values():
        labels = [metric.label for metric in metrics.values()]
        assert len(set(labels)) == len(labels)

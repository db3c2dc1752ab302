"""The table that compares runs: values in their rows, and the baselines of one run below."""

import json

import pytest

from plan_jax import evaluate
from plan_jax.page.comparison import compare
from plan_jax.types import Metric, UserError

CATALOGUE = {
    "grounding": {"cnr": Metric("CNR", "", baselines={"lung": "lung/cnr"}, headline=True)},
    "retrieval": {"r1": Metric("R@1", "", baselines={"chance": "chance"}, headline=True)},
}
ONE = {"grounding/cnr": 1.0, "grounding/lung/cnr": 0.5, "images_per_s": 10.0, "other": 3.0}
TWO = {
    "grounding/cnr": 2.0,
    "grounding/lung/cnr": 0.5,
    "retrieval/r1": 0.25,
    "retrieval/chance": 0.1,
}


def test_every_run_has_a_row_and_every_baseline_one():
    comparison = compare({"A": [ONE], "B": [TWO]}, CATALOGUE, "method")
    assert comparison.columns == ["method", "seeds", "CNR", "R@1", "images/s"]
    assert comparison.rows == [
        ["A", "1", "1.00", "", "10.0"],
        ["B", "1", "2.00", "0.250", ""],
        ["lung", "", "0.500", "", ""],
        ["chance", "", "", "0.100", ""],
    ]


def test_seeds_are_averaged():
    comparison = compare({"A": [ONE, TWO]}, CATALOGUE)
    assert comparison.rows[0] == ["A", "2", "1.50 ± 0.71", "0.250", "10.0"]


def test_a_metric_that_is_undefined_is_an_empty_cell():
    null = {"grounding/cnr": None, "grounding/lung/cnr": 0.5, "grounding/cnr_low": None}
    assert compare({"A": [null], "B": [TWO]}, CATALOGUE).rows[0] == ["A", "1", "", ""]


def test_no_runs_are_an_empty_table():
    assert compare({}, CATALOGUE).rows == []


def test_a_notebook_shows_markdown(tmp_path):
    for name, value in (("a", 1.5), ("b", 2.5)):
        (tmp_path / name).mkdir()
        metrics = {"grounding/cnr_signed": value, "params_sha256": "f00d"}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    comparison = evaluate.compare_runs({"A": tmp_path / "a", "B": str(tmp_path / "b")})
    lines = comparison._repr_markdown_().splitlines()
    assert lines[0].startswith("| run | seeds | ") and lines[1] == "| --- | --- | --- |"
    assert lines[2:4] == ["| A | 1 | 1.50 |", "| B | 1 | 2.50 |"]
    assert str(comparison) == comparison._repr_markdown_()


@pytest.mark.parametrize("content", [None, "half {"])
def test_a_run_that_has_not_ended_is_one_sentence(tmp_path, content):
    if content:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match="metrics.json cannot be read .*; pass the folder of a run"):
        evaluate.compare_runs({"A": tmp_path})

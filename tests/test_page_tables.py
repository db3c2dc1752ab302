"""Tables of the page: baselines, intervals, pivots and the direction of a metric."""

import math

import pytest

from plan_jax import page
from plan_jax.metrics import entries, headlines
from plan_jax.page import tables
from plan_jax.types import Metric

NAN = float("nan")
NULL_MAPS = {"lung prior": "prior", "random map": "random", "mean mask": "mean_finding"}


def metric(label, pattern, headline=False, prefix="", **options):
    baselines = {name: f"{prefix}{null}/{pattern}" for name, null in NULL_MAPS.items()}
    return Metric(label, f"The meaning of {label}.", 3, baselines, headline, **options)


CATALOGUE = {
    "grounding": {
        "cnr": metric("CNR", "cnr", headline=True),
        "bare/cnr": metric("CNR, bare", "cnr", prefix="bare/"),
        "round{t}/cnr": Metric("CNR", "After a round."),
        "bare/round{t}/cnr": Metric("CNR, bare", "After a round."),
        "{finding}/cnr": metric("CNR", "{finding}/cnr"),
    },
    "retrieval": {
        "median_rank": Metric(
            "median rank",
            "Half of the queries are answered by this rank.",
            1,
            {"chance": "chance/median_rank"},
            headline=True,
            higher_is_better=False,
        )
    },
    "classification": {
        "{share}/auroc": Metric(
            "AUROC, {share} % of labels",
            "Of {share}.",
            3,
            {"random encoder": "random/{share}/auroc"},
            headline=True,
        ),
        "{share}/{finding}/auroc": Metric("AUROC, {share} % of labels", ""),
        "i2t_p{k}": Metric("precision, image to report", ""),
        "t2i_p{k}": Metric("precision, report to image", ""),
    },
}
TITLES = {"grounding": "Phrase grounding", "classification": "Classification"}
METRICS = {
    "grounding/cnr": 1.5,
    "grounding/cnr_low": 1.25,
    "grounding/cnr_high": 1.75,
    "grounding/prior/cnr": 1.1,
    "grounding/random/cnr": 0.0,
    "grounding/mean_finding/cnr": 2.4,
    "grounding/bare/cnr": 0.9,
    "grounding/bare/prior/cnr": 0.5,
    "grounding/round0/cnr": 1.2,
    "grounding/round1/cnr": 1.4,
    "grounding/bare/round1/cnr": 0.8,
    "grounding/nodule/cnr": 1.6,
    "grounding/prior/nodule/cnr": 1.7,
    "grounding/pleural_effusion/cnr": 2.6,
    "retrieval/median_rank": 12.0,
    "retrieval/chance/median_rank": 150.5,
    "classification/1/auroc": 0.7,
    "classification/random/1/auroc": 0.6,
    "classification/100/auroc": 0.9,
    "classification/100/nodule/auroc": 0.85,
    "classification/100/comment": "not a number",
    "classification/i2t_p5": 0.4,
    "classification/i2t_p5_low": 0.3,
    "classification/i2t_p5_high": 0.5,
    "classification/t2i_p5": 0.45,
    "uncatalogued/value": 3.0,
}


def entry(key, metrics=METRICS):
    (found,) = [entry for entry in entries(CATALOGUE, metrics) if entry.key == key]
    return found


def test_baselines_and_bounds_are_not_metrics_of_a_group():
    keys = [entry.key for entry in entries(CATALOGUE, METRICS)]
    # `{finding}/cnr` matches all three of these, which are baselines of `cnr`.
    assert not {"grounding/prior/cnr", "grounding/random/cnr", "grounding/mean_finding/cnr"} & set(
        keys
    )
    assert keys == [
        "grounding/cnr",
        "grounding/bare/cnr",
        "grounding/round0/cnr",
        "grounding/round1/cnr",
        "grounding/bare/round1/cnr",
        "grounding/nodule/cnr",
        "grounding/pleural_effusion/cnr",
        "retrieval/median_rank",
        "classification/1/auroc",
        "classification/100/auroc",
        "classification/100/nodule/auroc",
        "classification/i2t_p5",
        "classification/t2i_p5",
    ]


def test_a_baseline_that_the_catalogue_names_is_a_metric_too():
    catalogue = {"task": {"auroc": Metric("AUROC", "", baselines={"chance": "chance/auroc"})}}
    catalogue["task"]["chance/auroc"] = Metric("AUROC of chance", "")
    values = {"task/auroc": 0.7, "task/chance/auroc": 0.5}
    assert [entry.key for entry in entries(catalogue, values)] == list(values)


def test_baselines_belong_to_their_own_prefix():
    values = {"grounding/bare/cnr": 1.0, "grounding/bare/prior/cnr": 0.1, "grounding/prior/cnr": 2}
    assert entry("grounding/bare/cnr", values).baselines == {"lung prior": 0.1}


def test_strongest_baseline_and_direction():
    cnr, rank = entry("grounding/cnr"), entry("retrieval/median_rank")
    assert cnr.strongest_baseline() == ("mean mask", 2.4)
    assert cnr.beats(1.1) and not cnr.beats(2.4) and not cnr.beats(1.5) and not cnr.beats(NAN)
    assert rank.beats(150.5) and not rank.beats(12.0) and not rank.beats(3.0)
    values = METRICS | {"grounding/mean_finding/cnr": NAN, "grounding/prior/cnr": math.inf}
    assert entry("grounding/cnr", values).strongest_baseline() == ("random map", 0.0)
    assert entry("grounding/round0/cnr").strongest_baseline() is None


def test_verdict_names_the_nearest_baseline_on_either_side():
    assert tables.verdict(entry("grounding/cnr")) == (
        "Better than lung prior (1.10), not better than mean mask (2.40)"
    )
    assert tables.verdict(entry("retrieval/median_rank")) == "Better than chance (150)"
    assert tables.verdict(
        entry("retrieval/median_rank", METRICS | {"retrieval/median_rank": 151.0})
    ) == ("Not better than chance (150)")
    assert tables.verdict(entry("grounding/cnr", {"grounding/cnr": NAN})) == ""
    assert tables.verdict(entry("grounding/cnr", {"grounding/cnr": 1.0})) == ""


def test_strip():
    assert tables.strip_marks(NAN, {"a": 1.0}) == tables.strip_marks(1.0, {}) == ()
    marks = tables.strip_marks(2.0, {"a": 1.0, "b": NAN})
    assert [(mark.x, mark.label, mark.is_model) for mark in marks] == [
        (120.0, "a 1.00", False),
        (232.0, "model 2.00", True),
    ]
    assert [mark.x for mark in tables.strip_marks(0.0, {"a": 0.0})] == [8.0, 8.0]


def test_numbers_are_short():
    numbers = (0.5, -0.01, 0.0, NAN, "x", True, 1234.5)
    assert [tables.format_number(x) for x in numbers] == [
        "0.50",
        "-0.010",
        "0.00",
        "nan",
        "–",
        "–",
        "1234",
    ]


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_metrics_of_a_task_stand_beside_their_baselines():
    table, *_ = tables.task_tables(CATALOGUE, "grounding", METRICS)
    assert table.columns == ("metric", "model", "", "lung prior", "random map", "mean mask")
    assert texts(table) == [
        ["CNR", "1.500", "", "1.100", "0.000", "2.400"],
        ["CNR, bare", "0.900", "", "0.500", "", ""],
    ]
    label, value, strip, *baselines = table.rows[0]
    assert label.notes == (("The meaning of CNR.", "meaning"),)
    assert value.notes == (("1.25 to 1.75", "muted"),) and len(strip.marks) == 4
    assert [cell.css for cell in baselines] == ["muted", "muted", "unbeaten"]


def test_groups_become_pivot_tables():
    _, by_round, by_finding = tables.task_tables(CATALOGUE, "grounding", METRICS)
    assert (by_round.title, by_finding.title) == ("By round", "By finding")
    assert by_round.columns == ("round", "CNR", "CNR, bare")
    assert texts(by_round) == [["0", "1.200", ""], ["1", "1.400", "0.800"]]
    assert texts(by_finding) == [["nodule", "1.600"], ["pleural effusion", "2.600"]]
    assert by_finding.rows[0][1].notes == (("lung prior 1.700", "unbeaten"),)
    assert by_finding.rows[1][1].notes == ()


def test_two_placeholders_make_two_columns_of_labels():
    by_share, by_both, _ = tables.task_tables(CATALOGUE, "classification", METRICS)
    assert by_share.columns == ("share", "AUROC") and by_share.num_labels == 1
    assert texts(by_share) == [["1", "0.700"], ["100", "0.900"]]
    assert by_share.rows[0][1].notes == (("random encoder 0.600", "muted"),)
    assert by_both.title == "By share and finding" and by_both.num_labels == 2
    assert by_both.columns == ("share", "finding", "AUROC")
    assert texts(by_both) == [["100", "nodule", "0.850"]]


def test_groups_of_one_name_share_a_table():
    *_, by_depth = tables.task_tables(CATALOGUE, "classification", METRICS)
    assert by_depth.title == "By k"
    assert by_depth.columns == ("k", "precision, image to report", "precision, report to image")
    assert texts(by_depth) == [["5", "0.400", "0.450"]]


def test_a_task_without_metrics_has_no_tables():
    assert tables.task_tables(CATALOGUE, "retrieval", {"grounding/cnr": 1.0}) == []


def test_cards_show_the_first_headlines_of_each_task():
    cards = tables.headline_cards(CATALOGUE, TITLES, METRICS)
    assert [(card.title, card.value) for card in cards] == [
        ("Phrase grounding: CNR", "1.500"),
        ("retrieval: median rank", "12.0"),
        ("Classification: AUROC, 1 % of labels", "0.700"),
        ("Classification: AUROC, 100 % of labels", "0.900"),
    ]
    assert cards[0].interval == "1.25 to 1.75" and cards[0].meaning == "The meaning of CNR."
    assert cards[0].verdict.startswith("Better than lung prior") and len(cards[0].marks) == 4


def test_the_summary_has_one_row_for_each_headline():
    table = tables.summary_table(CATALOGUE, TITLES, METRICS)
    assert len(table.rows) == len(headlines(CATALOGUE, METRICS)) == 4
    assert texts(table)[2:] == [
        ["Classification", "AUROC, 1 % of labels", "random encoder 0.600", "0.700"],
        ["", "AUROC, 100 % of labels", "", "0.900"],
    ]
    assert tables.summary_table(CATALOGUE, TITLES, {"grounding/cnr": 1.0}) is None


def test_the_markdown_table_has_one_row_for_each_headline():
    assert page.markdown(METRICS, CATALOGUE, TITLES).splitlines()[2:] == [
        "| Phrase grounding | CNR | 1.500 | 1.25 to 1.75 | lung prior 1.100; random map 0.000; "
        "mean mask 2.400 |",
        "| retrieval | median rank | 12.0 |  | chance 150.5 |",
        "| Classification | AUROC, 1 % of labels | 0.700 |  | random encoder 0.600 |",
        "| Classification | AUROC, 100 % of labels | 0.900 |  |  |",
    ]
    hostile = {"classification/a|b/auroc": 0.5}
    assert "AUROC, a\\|b %" in page.markdown(hostile, CATALOGUE, TITLES)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_values_that_are_not_finite_are_shown(value):
    values = {"grounding/cnr": value, "grounding/prior/cnr": 1.0}
    table, *_ = tables.task_tables(CATALOGUE, "grounding", values)
    assert texts(table) == [["CNR", str(value), "", "1.000"]] and not table.rows[0][2].marks


def test_the_reason_of_an_undefined_metric_is_in_every_table():
    reason = "no finding has both classes"
    catalogue = {
        "zero_shot": {
            "auroc": Metric("AUROC", "...", headline=True, undefined=reason),
            "{finding}/auroc": Metric("AUROC, {finding}", "...", undefined="all labels are 0"),
        }
    }
    titles = {"zero_shot": "Zero-shot"}
    values = {"zero_shot/auroc": NAN, "zero_shot/edema/auroc": NAN, "zero_shot/mass/auroc": 0.7}
    lines = tables.markdown(values, catalogue, titles).splitlines()
    assert lines[-3:] == [
        "",
        "Zero-shot: AUROC is undefined: no finding has both classes.",
        "Zero-shot: AUROC, edema is undefined: all labels are 0.",
    ]
    (card,) = tables.headline_cards(catalogue, titles, values)
    assert card.verdict == f"Undefined: {reason}"
    plain, by_finding = tables.task_tables(catalogue, "zero_shot", values)
    assert [note.text for note in plain.rows[0][1].notes] == [reason]
    assert [[note.text for note in row[1].notes] for row in by_finding.rows] == [
        ["all labels are 0"],
        [],
    ]
    assert "undefined" not in tables.markdown({"zero_shot/auroc": 0.5}, catalogue, titles)

"""Evaluation: requirements, the random baseline, kept fits, and a task that is not built in."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from configs import testing
from plan_jax import evaluate
from plan_jax import model as models
from plan_jax.config import Config
from plan_jax.data import eval_data, schema
from plan_jax.data.dataset import Dataset
from plan_jax.page.examples import load_examples
from plan_jax.tasks import CATALOGUE, TASKS, TITLES
from plan_jax.types import (
    Metric,
    Model,
    PhraseExample,
    Record,
    ReportExample,
    Result,
    RetrievalExample,
    UserError,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def make_config(data_dir, **evaluation):
    """Returns the testing config with other fields of `eval`."""
    values = testing.get_config().to_dict()
    values["data"]["dir"] = str(data_dir)
    values["eval"].update(evaluation)
    return Config.from_dict(values)


def make_tower_model(config):
    """Returns a model that has an image tower of random weights and fails if more is used."""
    components = models.build_components(config)
    tower = models.random_tower(components, config.data.size, seed=7)

    def fail(*_, **__):
        raise AssertionError("a task that fits a head uses the tower only")

    return Model("plan", (4, 4), 0, config.data.size, fail, fail, fail, fail, config, tower)


def without_seconds(metrics):
    return {key: value for key, value in metrics.items() if not key.endswith("seconds")}


def test_a_head_is_also_fitted_to_random_weights_and_both_fits_are_kept(data_dir, tmp_path):
    options = {"fractions": [1.0], "epochs": 2, "bootstrap_samples": 20}
    config = make_config(
        data_dir, tasks=("classification",), random_baseline=True, classification=options
    )
    model = make_tower_model(config)
    result = evaluate.evaluate_model(model, config, "test", tmp_path)
    metrics = result.metrics
    assert metrics["classification/100/n_train"] == 48
    assert metrics["classification/random/100/n_train"] == 48
    assert metrics["classification/seconds"] > 0
    area = metrics["classification/100/auroc_macro"]
    assert area != metrics["classification/random/100/auroc_macro"]
    assert len(list((tmp_path / "fits").glob("*.msgpack"))) == 2
    resumed = evaluate.evaluate_model(model, config, "test", tmp_path)
    np.testing.assert_equal(without_seconds(resumed.metrics), without_seconds(metrics))
    page = evaluate.write_results(tmp_path, config, result, ())
    assert "Classification" in page.read_text()
    # A finding of one class has no AUROC.
    expected = {key: None if np.isnan(value) else value for key, value in metrics.items()}
    assert json.loads((tmp_path / "metrics.json").read_text()) == expected
    assert None in expected.values()
    assert "random encoder" in (tmp_path / "table.md").read_text()


@pytest.fixture
def images_only(monkeypatch):
    """Replaces every dataset by four images without any annotation."""
    image = np.zeros((32, 32, 1), np.uint8)
    records = [Record(image=image, text=" ", patient_id=str(i)) for i in range(4)]
    dataset = Dataset([schema.serialize(record) for record in records], ("nodule",))
    monkeypatch.setattr(eval_data.DatasetEvalData, "open", lambda self, split: dataset)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("grounding", "phrases"),
        ("retrieval", "text"),
        ("zero_shot", "labels"),
        ("classification", "labels"),
        ("segmentation", "masks"),
        ("detection", "boxes"),
        ("report_generation", "text"),
    ],
)
def test_data_without_the_field_of_a_task_are_refused(task, field, images_only, data_dir):
    config = make_config(data_dir, tasks=(task,))
    with pytest.raises(UserError, match=rf"task {task} needs .*{field}.*; (add|give|leave)"):
        evaluate.open_eval_data(config, "test")


def test_reports_that_a_caption_rule_leaves_empty_are_refused(images_only, data_dir):
    config = make_config(data_dir, tasks=("retrieval",))
    config = replace(config, data=replace(config.data, caption="mgca"))
    with pytest.raises(
        UserError, match="any under caption rule mgca; choose another config.data.c"
    ):
        evaluate.open_eval_data(config, "test")


@dataclass(frozen=True)
class FakeOptions:
    """Options of a task that is not built in."""

    scale: float = 1.0


def make_fake_task(**members):
    """Returns a task with one metric, the number of records."""

    def evaluate_task(model, data, options, context):
        count = len(data.test)
        return Result({"count": options.scale * count}, [context.seed])

    members = {"requirements": lambda options: (), "check": lambda data, options: None} | members
    metrics = {"count": Metric("number of records", "How many.", headline=True)}
    return SimpleNamespace(
        TITLE="Counting",
        FITS_HEAD=False,
        METRICS=metrics,
        Options=FakeOptions,
        evaluate=evaluate_task,
        **members,
    )


def test_a_new_task_needs_an_entry_in_tasks_alone(data_dir, tmp_path, monkeypatch):
    task = make_fake_task()
    monkeypatch.setitem(TASKS, "counting", task)
    monkeypatch.setitem(CATALOGUE, "counting", task.METRICS)
    monkeypatch.setitem(TITLES, "counting", task.TITLE)
    config = make_config(data_dir, tasks=("counting",), counting={"scale": 2.0}, limit=5)
    result = evaluate.evaluate_model(make_tower_model(config), config, "test")
    assert without_seconds(result.metrics) == {"counting/count": 10.0}
    assert result.rows == [config.seed]
    evaluate.write_results(tmp_path, config, Result(result.metrics), ())
    assert "| Counting | number of records | 10.000 |" in (tmp_path / "table.md").read_text()


def test_every_selected_task_is_checked_before_any_runs(data_dir, monkeypatch):
    def refuse(data, options):
        raise UserError(f"scale is {options.scale}; use 1")

    monkeypatch.setitem(TASKS, "counting", make_fake_task(check=refuse))
    config = make_config(data_dir, tasks=("retrieval", "counting"), counting={"scale": 3.0})
    with pytest.raises(UserError, match="scale is 3.0; use 1"):
        evaluate.evaluate_model(make_tower_model(config), config, "test")


def test_a_page_that_cannot_be_made_loses_no_metrics(data_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such backend\nand more lines")

    config = make_config(data_dir)
    result = Result({"retrieval/i2t_r5": 0.5, "zero_shot/auroc_macro": float("nan")})
    monkeypatch.setattr(evaluate.page, "write_page", fail)
    with pytest.raises(evaluate.UnwrittenResults) as error:
        evaluate.write_results(tmp_path / "new", config, result, ())
    assert str(error.value) == (
        f"{tmp_path / 'new/report.html'} could not be made (ValueError: no such backend); the "
        f"metrics are in {tmp_path / 'new/metrics.json'}"
    )
    assert error.value.metrics == result.metrics
    # Strict JSON, which has no NaN.
    content = (tmp_path / "new/metrics.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail) == {
        "retrieval/i2t_r5": 0.5,
        "zero_shot/auroc_macro": None,
    }


@pytest.mark.parametrize("name", ["metrics.json", "table.md", "figures", "report.html"])
def test_a_file_that_cannot_be_written_loses_no_metrics(name, data_dir, tmp_path):
    # A file stands where a folder is needed, or a folder where a file is.
    if name == "figures":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    result = Result({"retrieval/i2t_r5": 0.5})
    with pytest.raises(evaluate.UnwrittenResults, match=name) as error:
        evaluate.write_results(tmp_path, make_config(data_dir), result, ())
    assert error.value.metrics == result.metrics


def test_only_the_page_and_the_phrases_behind_it_hold_report_text(data_dir, tmp_path):
    image = np.zeros((8, 8, 1), np.uint8)
    secret = "Ms Zebra has <b>nodules</b>"
    rows = (
        RetrievalExample(image, secret, ((secret, 0.5, True),), 1.0, 4),
        ReportExample(image, secret, secret),
        PhraseExample("best", secret, image, np.ones((8, 8), bool), np.ones((1, 2, 2)), 1.0, 1.0),
    )
    result = Result({"retrieval/i2t_r5": 0.5}, rows)
    evaluate.write_results(tmp_path, make_config(data_dir), result, ())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if b"Zebra" in path.read_bytes()] == ["report.html"]
    # Compressed, so that its bytes do not show it: the phrases that runs are compared by.
    with np.load(tmp_path / "examples.npz") as arrays:
        assert [name for name in arrays if "Zebra" in str(arrays[name])] == ["content"]
    config, options = make_config(data_dir), load_examples(tmp_path).options
    assert set(options) == set(config.eval.tasks)
    assert (options["grounding"]["crop"], options["grounding"]["size"]) == (1, config.data.size)
    assert not any("zebra" in str(path.relative_to(tmp_path)).lower() for path in files)
    assert "<b>nodules" not in (tmp_path / "report.html").read_text()

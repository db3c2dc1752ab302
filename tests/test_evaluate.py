"""From a config to judged tasks: options, splits, what is missing, the random tower beside."""

import json

import jax
import numpy as np
import pytest

from configs import testing
from plan_jax import evaluate
from plan_jax import model as assembly
from plan_jax.config import Config
from plan_jax.data import dataset as datasets
from plan_jax.data import eval_data, schema
from plan_jax.types import Model, Record, UserError


def settings(tmp_path, **changes):
    content = testing.get_config().to_dict()
    content["data"]["dir"] = str(tmp_path)
    content["eval"].update(changes)
    return Config.from_dict(content)


def tower_only(made):
    """A model of which nothing but the tower, of random weights, can be used."""
    system = assembly.build_components(made)
    tower = assembly.random_tower(system, 32, seed=7)

    def refuse(*_, **__):
        raise AssertionError("a task that fits a head needs the tower only")

    return Model("plan", (4, 4), 0, 32, refuse, refuse, refuse, refuse, made, tower)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_head_is_fitted_beside_that_of_random_weights_and_kept(world, tmp_path):
    options = {"fractions": [1.0], "epochs": 2, "bootstrap_samples": 20}
    made = settings(world, tasks=("classification",), random_baseline=True, classification=options)
    model = tower_only(made)
    scored = evaluate.evaluate_model(model, made, "test", tmp_path)
    values = scored.metrics
    assert {"classification/100/n_train", "classification/random/100/n_train"} <= set(values)
    assert values["classification/100/n_train"] == 48 and values["classification/seconds"] > 0
    own, other = (values[f"classification/{p}100/auroc_macro"] for p in ("", "random/"))
    assert own != other
    assert len(list((tmp_path / "fits").glob("*.msgpack"))) == 2
    again = evaluate.evaluate_model(model, made, "test", tmp_path).metrics
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in values.items() if "seconds" not in k
    }
    path = evaluate.write_results(tmp_path, made, scored, ())
    assert "Classification" in path.read_text()
    assert json.loads((tmp_path / "metrics.json").read_text()) == values
    assert "random encoder" in (tmp_path / "table.md").read_text()


def test_the_random_tower_depends_on_the_seed_alone(world):
    made = settings(world)
    system = assembly.build_components(made)
    one, two, other = (assembly.random_tower(system, 32, seed) for seed in (1, 1, 2))
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 1)).astype(np.uint8)
    seen = [jax.device_get(t.apply(t.variables, images)[0].pooled) for t in (one, two, other)]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert one.name == two.name != other.name and np.abs(seen[0] - seen[2]).max() > 1e-3


def test_where_no_split_validates_training_patients_do(world, monkeypatch):
    made = settings(world, split="val", limit=8)
    truth = evaluate.open_eval_data(made, "val")
    parts = {split: getattr(truth, split) for split in ("train", "val", "test")}
    names = {split: {r.patient_id for r in some} for split, some in parts.items()}
    assert not names["train"] & names["val"] and len(parts["test"]) == 8
    assert len(parts["train"]) + len(parts["val"]) == 48
    assert 0.1 < len(parts["val"]) / 48 < 0.35
    with pytest.raises(UserError, match="eval.split is train"):
        _ = evaluate.open_eval_data(made, "train").train
    with pytest.raises(UserError, match=r"eval.split is train\[:50%\]"):
        _ = evaluate.open_eval_data(made, "train[:50%]").val
    assert evaluate.open_eval_data(made, "val[:50%]").validation is None
    assert len(evaluate.open_eval_data(made, "test").validation) == 8
    with pytest.raises(UserError, match="1 patients are too few"):
        eval_data.split_by_patient([parts["train"][0]], 0)


@pytest.fixture
def bare(monkeypatch):
    """A dataset of images alone."""
    image = np.zeros((32, 32, 1), np.uint8)
    rows = [schema.serialize(Record(image=image, text="", patient_id=str(n))) for n in range(4)]
    dataset = datasets.Dataset(rows, ("nodule",))
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
def test_a_task_without_its_truth_says_which_field_is_missing(task, field, bare, world):
    made = settings(world, tasks=(task,))
    with pytest.raises(UserError, match=rf"task {task} needs .*{field}"):
        evaluate.open_eval_data(made, "test")


def test_what_a_report_states_is_read_by_the_parser():
    read = eval_data.report_labeller(("pleural effusion", "COVID-19", "nodule"))
    assert read("Small left effusion. No nodule.") == {"pleural effusion": 1, "nodule": 0}

"""Evaluation data: which records a split is, when it is read, and how patients are divided."""

import re

import pytest

from plan_jax.data import phantom, prompts
from plan_jax.data.eval_data import DatasetEvalData, report_labeller, split_by_patient
from plan_jax.types import Record, UserError

BUILDER = {"size": 32, "train": 48, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_data(data_dir, monkeypatch):
    """Returns a function that makes the data of phantoms, and the list of splits they opened."""
    opened, open_split = [], DatasetEvalData.open

    def log_open(self, split):
        opened.append(split)
        return open_split(self, split)

    monkeypatch.setattr(DatasetEvalData, "open", log_open)

    def make(split="test", **settings):
        return DatasetEvalData(
            "phantom", split, size=32, data_dir=data_dir, builder=BUILDER, **settings
        )

    return make, opened


def patients(records):
    return {record.patient_id for record in records}


def test_a_split_is_read_when_it_is_accessed_and_once(make_data):
    make, opened = make_data
    data = make(limit=5, num_prior_records=3)
    assert opened == []
    assert len(data.test) == 5 and data.findings and data.test is data.test
    assert opened == ["test"]
    assert len(data.prior_records) == 3 and len(data.prior_records) == 3
    assert opened == ["test", "train"]
    assert len(data.validation) == 5
    assert len(data.train) == 48 and data.val is data.validation
    assert opened == ["test", "train", "val", "train"]


def test_limits_of_training_records(make_data):
    make, opened = make_data
    data = make(max_fit_records=7)
    assert len(data.train) == 7 and len(data.test) == 8
    assert data.prior_records == [] and opened == ["train", "val", "test"]


def test_training_patients_validate_where_val_is_evaluated(make_data):
    make, _ = make_data
    data = make("val", limit=8)
    assert data.validation is None and len(data.test) == 8
    assert not patients(data.train) & patients(data.val)
    assert len(data.train) + len(data.val) == 48
    assert 0.1 < len(data.val) / 48 < 0.35
    assert make("val[:50%]").validation is None


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
def test_heads_are_not_fitted_to_the_evaluated_records(split, make_data):
    make, _ = make_data
    message = f"eval.split is {re.escape(split)}, and heads are fitted to train; use val or test"
    with pytest.raises(UserError, match=message):
        _ = make(split).train


def test_prompts_are_those_of_the_set_or_of_the_dataset(make_data):
    make, _ = make_data
    assert make().prompts is phantom.PROMPTS
    name = next(iter(prompts.PROMPT_SETS))
    assert make(prompt_set=name).prompts == prompts.PROMPT_SETS[name]()
    data = make()
    data.name, data.findings = "pairs", ("mass",)
    assert data.prompts == {"mass": (["there is mass"], ["there is no mass"])}


def test_patients_are_divided_by_the_seed_and_stay_whole():
    records = [Record(None, str(i), patient_id=str(i % 10)) for i in range(30)]
    fit, select = split_by_patient(records, seed=0)
    assert len(patients(select)) == 2 and not patients(fit) & patients(select)
    assert [record.text for record in fit] == sorted((r.text for r in fit), key=int)
    assert patients(split_by_patient(records, seed=0)[1]) == patients(select)
    assert any(
        patients(split_by_patient(records, seed=seed)[1]) != patients(select)
        for seed in range(1, 4)
    )
    with pytest.raises(UserError, match="1 patients are too few .*; add a split val"):
        split_by_patient(records[:1], seed=0)


def test_reports_are_labelled_by_the_parser():
    label = report_labeller(("pleural effusion", "COVID-19", "nodule"))
    assert label("Small left effusion. No nodule.") == {"pleural effusion": 1, "nodule": 0}
    assert report_labeller(())("No nodule.")["nodule"] == 0

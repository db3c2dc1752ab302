"""The typed config: conversion, defaults, differences and evaluation-only configs."""

import copy
import dataclasses
import functools
import json

import pytest

from configs import testing
from plan_jax import config as configs
from plan_jax.config import Config
from plan_jax.tasks import TASKS
from plan_jax.types import UserError


@pytest.fixture
def content():
    return testing.get_config().to_dict()


def test_a_config_survives_json(content):
    config = Config.from_dict(content)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_fields_have_their_defaults():
    config = Config.from_dict({"method": "gloria"})
    assert config.optim.learning_rate == configs.OptimConfig.learning_rate
    assert config.hyper.__class__.__module__ == "plan_jax.methods.gloria"
    assert config.eval.options == {name: task.Options() for name, task in TASKS.items()}


def test_filled_defaults_change_nothing(content):
    assert Config.from_dict(configs.fill_defaults(content)).method == "plan"
    filled = Config.from_dict(configs.fill_defaults(content))
    assert configs.difference(filled, Config.from_dict(filled.to_dict())) == ""
    plain = Config.from_dict(content)
    assert dataclasses.replace(
        filled, vision=plain.vision, text=plain.text, data=plain.data
    ) == dataclasses.replace(plain)


def test_ints_become_floats_and_lists_tuples(content):
    content["optim"] |= {"clip_norm": 1, "freeze": ["text"]}
    config = Config.from_dict(content)
    assert isinstance(config.optim.clip_norm, float) and config.optim.freeze == ("text",)


@pytest.mark.parametrize(
    ("section", "field", "value", "remedy"),
    [
        ("optim", "b1", 1.0, "below 1"),
        ("optim", "warmup_fraction", 1.5, "use 0 to 1"),
        ("optim", "accumulate_steps", 0, "use at least 1"),
        ("data", "size", 7, "use at least 8"),
        ("data", "workers", True, "must be an int"),
        ("data", "builder", 3, "set one of its fields"),
        ("data", "caption", "mcga", "use one of mgca, gloria"),
        ("eval", "limit", 1, "use at least 2"),
        ("checkpoint", "keep", 0, "use at least 1"),
        ("checkpoint", "minutes", -1.0, "use at least 0"),
        (
            "heads",
            "text_local",
            "cubic",
            "use one of linear, norm, mlp, mlp_bn, mlp_relu, mlp_ln, shared",
        ),
        ("text", "pool", 3, "use one of cls, mean, attention"),
        ("", "ema_decay", 1.0, "below 1"),
        ("", "batch", 1, "use at least 2"),
        ("", "microbatch", -1, "use at least 0"),
        ("", "channels", 4, "use 1 to 3"),
        (
            "",
            "normalisation",
            "zscore",
            "use one of image, fixed, unit, imagenet, medclip, mrm, rad_dino, weights",
        ),
    ],
)
def test_values_out_of_range_are_refused(content, section, field, value, remedy):
    (content[section] if section else content)[field] = value
    with pytest.raises(UserError) as error:
        Config.from_dict(content)
    name = f"config.{section}.{field}" if section else f"config.{field}"
    assert str(error.value).startswith(f"{name} is {value!r}; ") and remedy in str(error.value)


def test_colours_of_imagenet_need_three_channels(content):
    content |= {"normalisation": "imagenet", "channels": 1}
    with pytest.raises(UserError, match="config.channels is 1; .* set channels to 3"):
        Config.from_dict(content)
    assert Config.from_dict(content | {"channels": 3}).normalisation == "imagenet"


@pytest.mark.parametrize(("fine_map", "rounds"), [(False, 1), (True, 0)])
def test_guided_rounds_need_rounds_on_a_finer_map(content, fine_map, rounds):
    hyper = {"guide_round_steps": 1, "rounds": rounds}
    with pytest.raises(UserError, match="config.hyper.guide_round_steps is 1; .* set fine_map"):
        Config.from_dict(content | {"method": "plan", "fine_map": fine_map, "hyper": hyper})


NONSENSE = [None, 3, "x", ["x"], [None], {}, {"a": 1}, {"name": ["x"]}, True, float("nan"), -1, 2.5]


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_any_value_of_any_field_works_or_is_refused(content, value):
    filled = configs.fill_defaults(content)
    names = {name for name, _ in configs.flatten(filled)}
    for name in sorted(names | {name.rpartition(".")[0] for name in names} - {""}):
        values = copy.deepcopy(filled)
        *path, field = name.split(".")
        functools.reduce(dict.__getitem__, path, values)[field] = value
        try:
            config = Config.from_dict(values)
        except UserError:
            continue
        # What is accepted can be stored and read again.
        assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("evaluation", [{"data": 3}, {"eval": None}, {"data": {"builder": 3}}])
def test_an_evaluation_without_sections_is_refused(content, evaluation):
    run = Config.from_dict(content).to_dict()
    with pytest.raises(UserError, match=r"config\.(data|eval|data\.builder) is "):
        Config.from_dict(configs.merge_evaluation(run, evaluation))


def test_difference_names_the_first_field_that_matters(content):
    old = Config.from_dict(content)
    content["log_every"] = 7
    content["eval"]["limit"] = 4
    assert configs.difference(old, Config.from_dict(content)) == ""
    content["optim"]["b1"] = 0.5
    new = Config.from_dict(content)
    assert configs.difference(old, new) == "config.optim.b1 0.9, not 0.5"
    assert configs.difference(old, new, ("optim",)) == ""
    # With BatchNorm it changes the statistics that normalise.
    content["optim"]["b1"], content["microbatch"] = old.optim.b1, 4
    assert configs.difference(old, Config.from_dict(content)) == "config.microbatch 0, not 4"


def pairs_config(**data):
    builder = {"manifest": "old/manifest.csv"} | data.pop("builder", {})
    return Config.from_dict({"data": {"name": "pairs", "builder": builder, **data}})


def mimic_config(**data):
    return Config.from_dict({"data": {"name": "mimic_cxr", "fingerprint": "a-b", **data}})


def test_public_data_may_be_in_another_place():
    run = mimic_config(source="old", builder={"ms_cxr": "old_ms"})
    moved = mimic_config(source="new", builder={"ms_cxr": "new_ms", "workers": 3})
    assert configs.difference(run, moved) == ""
    assert configs.difference(run, mimic_config(source="old", builder={"size": 99})) != ""
    # What a run has stored does not hide a folder that is named later, whichever way.
    stored = run.to_dict()
    for data in ({"source": "new"}, {"builder": stored["data"]["builder"] | {"source": "new"}}):
        config = Config.from_dict({"data": stored["data"] | data})
        assert config.data.builder["source"] == "new"
    with pytest.raises(UserError, match="config.data.source is 'x'; dataset phantom is not made"):
        Config.from_dict({"data": {"source": "x"}})


def test_data_of_a_fingerprint_may_be_in_another_place():
    moved = {"manifest": "new/manifest.csv", "images": "images"}
    run, config = pairs_config(fingerprint="a-b"), pairs_config(builder=moved)
    assert configs.difference(run, config) == ""
    assert configs.difference(run, pairs_config(builder=moved | {"size": 99})) != ""
    difference = configs.difference(pairs_config(), config)
    assert difference.startswith("config.data.builder.images"), "nothing proves that they are same"
    assert configs.expect_data(config, run, is_own=True).data.fingerprint == "a-b"
    pinned = pairs_config(fingerprint="c-d")
    assert configs.expect_data(pinned, run, is_own=True).data.fingerprint == "c-d"
    assert configs.expect_data(run, run, is_own=False).data.fingerprint == ""
    assert configs.expect_data(pinned, run, is_own=False).data.fingerprint == "c-d"


def test_an_evaluation_of_other_data_accepts_any():
    run = pairs_config(fingerprint="a-b").to_dict()
    other = configs.merge_evaluation(run, {"data": {"builder": {"manifest": "m.csv"}}})
    assert other["data"]["fingerprint"] == ""
    run["data"]["caption"] = "mgca"
    other = configs.merge_evaluation(run, {"data": {"name": "pairs"}})
    assert other["data"]["caption"] == "", "the caption rule of other reports"
    same = configs.merge_evaluation(run, {"data": {"cache": False}})
    assert same["data"]["fingerprint"] == "a-b"


def test_an_evaluation_changes_only_what_it_names(content):
    run = Config.from_dict(content)
    evaluation = {
        "data": {"name": "pairs", "builder": {"manifest": "m.csv"}},
        "eval": {"limit": 5, "classification": {"fractions": (0.1, 1.0)}},
    }
    assert configs.is_evaluation(evaluation) and not configs.is_evaluation(content)
    merged = Config.from_dict(configs.merge_evaluation(run.to_dict(), evaluation))
    assert merged.data.builder["manifest"] == "m.csv" and "train" not in merged.data.builder
    assert merged.data.size == 32
    assert merged.eval.limit == 5 and not merged.eval.random_baseline
    assert merged.method == run.method
    assert merged.eval.options["classification"].fractions == (0.1, 1.0)
    assert merged.eval.options["detection"] == run.eval.options["detection"]


def test_a_stored_config_of_0_1_is_refused():
    with pytest.raises(UserError, match="run was written by plan_jax 0.1 .*train it again"):
        configs.check_version({"seed": 0, "ema": 0.0}, "run")

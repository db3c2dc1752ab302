"""Addresses as gs://bucket/run where they are no use: one sentence, and no folder `gs:` appears."""

import sys
from pathlib import Path

import pytest

import plan_jax
from plan_jax import evaluate, prediction, prepare, train
from plan_jax.checkpoint import copy_repeatedly, restore_steps
from plan_jax.config import Config
from plan_jax.data import preparation
from plan_jax.export import __main__ as export
from plan_jax.export.pretrained import Pretrained
from plan_jax.prediction import films
from plan_jax.types import UserError, check_local
from tools import compare_dtypes, convert_weights

ADDRESS = "gs://bucket/run"


@pytest.mark.parametrize(
    "path",
    [
        ADDRESS,
        Path(ADDRESS),
        f"simplecache::{ADDRESS}",
        "s3://b",
        "file:///a",
        "nas:/share",
        "10.0.0.2:/runs",
    ],
)
def test_an_address_is_refused(path):
    sentence = f"^workdir {path} is an address; pass a path on a local disk, or in a bucket"
    with pytest.raises(UserError, match=sentence):
        check_local("workdir", path)


def test_a_page_is_downloaded_first():
    with pytest.raises(
        UserError, match="is an address; download it, or name a model .* owner/name"
    ):
        check_local("checkpoint", "https://x.org/owner/name")


@pytest.mark.parametrize(
    "path", ["", "runs/demo", "/runs", "./gs:/b", "C:/runs", "hub:owner/name/a.pt", "package:x"]
)
def test_a_path_is_accepted(path):
    check_local("workdir", path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, which has to stay empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


CALLS = {
    "evaluate": lambda: evaluate.evaluate_checkpoint(Config(), "phantom-plan", Path(ADDRESS)),
    "save a model": lambda: Pretrained(Config(), None, dict).save(ADDRESS),
    "save a heat map": lambda: prediction.Grounding.save(None, f"{ADDRESS}/heat.png"),
    "read a film": lambda: films.read_film(f"{ADDRESS}/film.png", 64),
    "copy steps": lambda: copy_repeatedly("run", ADDRESS).__enter__(),
    "copy steps of a bucket": lambda: copy_repeatedly(ADDRESS, "copies").__enter__(),
    "restore steps": lambda: restore_steps(ADDRESS, "run"),
    "restore steps in a bucket": lambda: restore_steps("copies", ADDRESS),
    "prepare from a bucket": lambda: preparation.check_dataset("jsrt", {"source": ADDRESS}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_library_refuses_an_address(name, folder):
    with pytest.raises(UserError, match="gs:/.* is an address; pass a path on a local disk"):
        CALLS[name]()


ACCEPTED = {
    "train": lambda address: train.train(Config(), address),
    "load": lambda address: plan_jax.load(address),
    "prepare": lambda address: preparation.prepare_dataset("phantom", address, {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (ADDRESS, f"{ADDRESS} needs gcsfs; pip install"),
        ("nil://b/run", "nil://b/run is an address of an unknown kind; pass a path"),
        ("10.0.0.2:/run", "10.0.0.2:/run is an address; pass a path on a local disk"),
        ("https://x.org/run", "https://x.org/run is an address; download it"),
    ],
)
def test_an_address_that_does_not_work_is_refused(name, address, sentence, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=sentence):
        ACCEPTED[name](address)


@pytest.mark.parametrize("name", ["train", "load"])
def test_a_path_that_was_an_address_is_one(name, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=f"{ADDRESS} needs gcsfs; pip install"):
        ACCEPTED[name](Path(ADDRESS))


COMMANDS = {
    "export": (export.run, ["phantom-plan", "--out", ADDRESS]),
    "prepare": (prepare.run, ["jsrt", "--source", ADDRESS]),
    "prepare by a field": (prepare.run, ["jsrt", "--set", f"source={ADDRESS}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_an_address_in_one_sentence(name, folder, capsys):
    run, arguments = COMMANDS[name]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{ADDRESS} is an address; pass a path" in error


TOOLS = {
    "runs": (compare_dtypes.main, ["--runs", ADDRESS]),
    "data": (compare_dtypes.main, ["--data", ADDRESS]),
    "weights": (convert_weights.main, ["x.pt", ADDRESS, "--tower", "text", "--name", "bert_tiny"]),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_refuses_an_address(name, folder, capsys):
    main, arguments = TOOLS[name]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"{ADDRESS} is an address; pass a path" in capsys.readouterr().err

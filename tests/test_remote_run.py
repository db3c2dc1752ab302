"""Commands on addresses: a run in memory is trained, resumed, evaluated, loaded and exported."""

import json
import shutil

import fsspec
import numpy as np
import pytest

import plan_jax
from plan_jax import main
from plan_jax.checkpoint import address_lock, mirror
from plan_jax.export import __main__ as export
from plan_jax.types import UserError

RUN, DATA = "memory://bucket/run", "memory://bucket/data"


def run(*arguments, steps=4):
    fields = {"steps": steps, "data.dir": DATA, "eval.tasks": "('retrieval',)"}
    return main.run([*arguments, *(f"--config.{name}={value}" for name, value in fields.items())])


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A finished run, and the folder of the host that trained it."""
    folder = tmp_path_factory.mktemp("host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAN_JAX_CACHE", str(folder))
        patch.setattr(address_lock, "SETTLE", 0.0)
        patch.chdir(tmp_path_factory.mktemp("empty"))
        assert run("--config=testing", f"--workdir={RUN}") == 0
    yield folder
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another host: another disk, on which nothing appears but copies."""
    monkeypatch.setenv("PLAN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(address_lock, "SETTLE", 0.0)
    monkeypatch.setattr(mirror, "SECONDS", 0.05)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    assert [path.name for path in (tmp_path / "here").iterdir()] in ([], ["model"])


def read_metrics(name):
    return json.loads(fsspec.filesystem("memory").cat_file(f"/bucket/run/{name}"))


def test_a_run_lies_at_its_address(remote, elsewhere):
    names = {
        path.removeprefix("/bucket/run/")
        for path in fsspec.filesystem("memory").find("/bucket/run")
    }
    assert {"config.json", "metrics.jsonl", "metrics.json", "table.md", "report.html"} <= names
    assert {"checkpoints/2/config/metadata", "checkpoints/4/config/metadata"} <= names
    assert not [name for name in names if "lock" in name or ".part" in name]


def test_the_same_command_resumes_elsewhere(remote, elsewhere, capsys):
    before = read_metrics("metrics.json")["params_sha256"]
    fsspec.filesystem("memory").rm("/bucket/run/checkpoints/4/config/metadata")
    assert run("--config=testing", f"--workdir={RUN}") == 0
    error = capsys.readouterr().err
    assert "resumed at step 2 of 4" in error and f"is copied to {RUN}" in error
    assert read_metrics("metrics.json")["params_sha256"] == before


def test_another_config_is_refused_by_the_address(remote, elsewhere, capsys):
    before = fsspec.filesystem("memory").find("/bucket/run")
    assert run("--config=testing", f"--workdir={RUN}", "--config.seed=7") == 2
    assert f"workdir {RUN} holds a run of config.seed 0, not 7; pass" in capsys.readouterr().err
    assert fsspec.filesystem("memory").find("/bucket/run") == before


def test_a_run_is_evaluated_where_it_lies(remote, elsewhere, capsys):
    assert main.run(["--mode=eval", f"--checkpoint={RUN}/checkpoints/4"]) == 0
    assert f"are copied to {RUN}/eval/test" in capsys.readouterr().err
    metrics = read_metrics("eval/test/metrics.json")
    assert metrics["params_sha256"] == read_metrics("metrics.json")["params_sha256"]
    assert main.run(["--mode=eval", f"--checkpoint={RUN}", "--workdir=memory://bucket/other"]) == 0
    found = fsspec.filesystem("memory").cat_file("/bucket/other/eval/test/metrics.json")
    assert json.loads(found)["retrieval/i2t_r5"] == metrics["retrieval/i2t_r5"]


def test_a_run_and_a_saved_model_are_loaded(remote, elsewhere):
    assert export.run([RUN, "--out", "model"]) == 0
    files = fsspec.filesystem("memory")
    files.put("model/", "/bucket/model/", recursive=True)
    shutil.rmtree("model")
    images = np.full((2, 32, 32, 1), 100, np.uint8)
    features = [
        plan_jax.load(source).encode_image(images) for source in (RUN, "memory://bucket/model")
    ]
    assert np.array_equal(features[0].pooled, features[1].pooled)
    files.rm_file("/bucket/model/model.safetensors")
    with pytest.raises(UserError, match="memory://bucket/model holds neither a run nor a saved"):
        plan_jax.load("memory://bucket/model")

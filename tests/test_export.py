"""From a run to a shared model: the command, its card, and what accepts a saved model."""

import json
import shutil

import pytest
import yaml
from saved_models import assert_equal_answers, make_config, make_model, make_variables

import plan_jax
from plan_jax import checkpoint, main
from plan_jax import model as models
from plan_jax.export import __main__ as export
from plan_jax.types import UserError

METRICS = {
    "steps": 6.0,
    "retrieval/i2t_r1": 0.4375,
    "retrieval/chance/i2t_r1": 0.125,
    "zero_shot/auroc_macro": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run of 6 steps, with its metrics."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = make_config(steps=6)
    manager = checkpoint.open_manager(folder / checkpoint.FOLDER)
    variables = make_variables(models.build_components(config))
    checkpoint.save(manager, 6, variables, {}, config.to_dict())
    checkpoint.close(manager)
    own = {"params_sha256": checkpoint.fingerprint(variables["params"])}
    (folder / "metrics.json").write_text(json.dumps(METRICS | own))
    (folder / "eval/kermany").mkdir(parents=True)
    (folder / "eval/kermany/metrics.json").write_text(json.dumps(METRICS | {"steps": 4.0}))
    (folder / "eval/again").mkdir(parents=True)  # of a run that was trained once more
    (folder / "eval/again/metrics.json").write_text(json.dumps(METRICS | {"params_sha256": "0"}))
    (folder / "eval/val").mkdir(parents=True)
    (folder / "eval/val/metrics.json").write_text(json.dumps(METRICS | {"retrieval/i2t_r1": 0.25}))
    return folder


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert export.run([str(run), "--out", str(folder)]) == 0
    return folder


def read_card(folder):
    """Returns the front matter and the text of a card."""
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def test_a_run_and_its_saved_model_compute_the_same(run, saved):
    assert_equal_answers(plan_jax.load(run), plan_jax.load(saved))
    variables = models.load_variables(saved)
    assert variables["step"] == 6 and variables["source"] == saved


def test_a_model_knows_its_hash(run, saved):
    expected = json.loads((saved / "checksums.json").read_text())["params_sha256"]
    assert models.load(run).identify() == models.load(saved).identify() == expected


def test_the_card_shows_metrics_of_these_weights_beside_their_baselines(saved):
    matter, text = read_card(saved)
    assert matter["library_name"] == "plan_jax" and matter["license"] == "apache-2.0"
    assert "Not for clinical use" in text and "arXiv 2502.18047" in text
    assert "synthetic radiographs" in text and "6 steps of 8 pairs" in text
    results = matter["model-index"][0]["results"]
    values = {r["dataset"]["config"]: r["metrics"][0]["value"] for r in results}
    assert values == {"test": 0.4375, "val": 0.25}
    lines = [line for line in text.splitlines() if "0.438" in line]
    assert len(lines) == 1 and "0.125" in lines[0]
    # Measured at step 4, on other parameters.
    assert "kermany" not in text
    assert json.loads((saved / "metrics.json").read_text()).keys() == {"test", "val"}


def test_the_command_says_what_it_wrote(run, tmp_path, capsys):
    folder = tmp_path / "half"
    options = ["--dtype", "float16", "--data-name", "Ward 7 | 2019:\n2023", "--licence", "House 1"]
    assert export.run([str(run), "--out", str(folder), *options]) == 0
    assert f"{folder}: 0." in capsys.readouterr().out
    matter, text = read_card(folder)
    assert matter["license"] == "other" and matter["license_name"] == "House 1"
    assert "- Trained on: Ward 7 | 2019: 2023\n" in text
    assert "Measured on the float32 weights, before they were rounded to float16." in text
    # What was stated once stays.
    again = tmp_path / "again"
    assert export.run([str(folder), "--out", str(again), "--data-licence", "secret"]) == 0
    matter, text = read_card(again)
    assert "- Trained on: Ward 7" in text and "- Licence of the data: secret\n" in text
    assert matter["license_name"] == "House 1" and "0.438" in text
    # Its parameters are the rounded ones, whatever they are saved as.
    assert "Measured on the float32 weights, before they were rounded to float16." in text


def test_a_saved_model_keeps_its_card_when_its_folder_is_replaced(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    model = plan_jax.load(copy)
    data = make_config().to_dict()["data"] | {"name": "pairs", "builder": {}}
    make_model(seed=1, data=data).save_pretrained(copy, data_name="Ward 7")
    model.save_pretrained(tmp_path / "other", title="a\ntitle")
    text = read_card(tmp_path / "other")[1]
    assert "synthetic radiographs" in text and "0.438" in text and "rounded" not in text
    assert "\n# a title\n" in text
    names = ("config.json", "metrics.json", "model.safetensors")
    for name in names:
        assert (tmp_path / "other" / name).read_bytes() == (saved / name).read_bytes()


def test_what_nobody_has_stated_is_said(tmp_path):
    data = make_config().to_dict()["data"] | {"name": "pairs", "builder": {}}
    matter, text = read_card(make_model(data=data).save_pretrained(tmp_path / "own"))
    assert "license" not in matter and "model-index" not in matter
    assert "- Licence of the data: not stated by the author of this model\n" in text
    assert "No evaluation of these weights was saved with them." in text


MISTAKES = {
    "no run": ("nowhere --out out", "checkpoint nowhere does not exist; pass the folder of a run"),
    "no folder": ("RUN", "arguments are required: --out; --help shows the usage"),
    "dtype": ("RUN --out out --dtype int4", "dtype is 'int4'; use one of float32, float16"),
    "a file": ("file --out out", "checkpoint file is a file; pass the folder of a run"),
    "other folder": ("RUN --out other", "folder other holds config.json and no model of plan_jax"),
    "other library": ("other --out out", "other looks like a model of transformers (BertModel)"),
    "torch": ("torch --out out", "torch looks like a checkpoint of torch (last.ckpt), not like"),
    "public": ("RUN --out out --public", "--public is for a model that is pushed; add --push"),
    "platform": ("RUN --out out --programs cpu,gpu", "platform of programs is 'gpu'; use some of"),
    "tower": ("RUN --out out --torch", "image tower resnet_tiny has widths (8, 16), stem patch4"),
    "push": ("RUN --out out --push ../x", "repository '../x' is not a name on the hub; use"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/last.ckpt").write_bytes(b"")
    (tmp_path / "file").write_text("")
    arguments, sentence = MISTAKES[name]
    assert export.run([str(run) if x == "RUN" else x for x in arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_a_saved_model_is_evaluated(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(saved, tmp_path / "copy")
    options = ["--config.eval.tasks=('retrieval',)", "--config.data.dir=data"]
    assert main.run(["--mode", "eval", "--checkpoint", "copy", *options]) == 0, capsys.readouterr()
    metrics = json.loads((tmp_path / "runs/copy/eval/test/metrics.json").read_text())
    checksums = json.loads((copy / "checksums.json").read_text())
    assert metrics["params_sha256"] == checksums["params_sha256"] and metrics["steps"] == 6
    assert (tmp_path / "runs/copy/eval/test/report.html").exists()
    argv = ["--config", "eval/all_phantom", "--checkpoint", "copy", "--workdir", "out", *options]
    assert main.run(argv) == 0, capsys.readouterr()
    assert (tmp_path / "out/eval/all_phantom/metrics.json").exists()
    assert not (copy / "eval").exists()


def test_a_model_without_parameters_cannot_be_saved(tmp_path):
    model = plan_jax.types.Model("fake", (1, 1), 0, 4, *[lambda *_: None] * 4)
    with pytest.raises(UserError, match="has no parameters of its own to save; load one"):
        model.save_pretrained(tmp_path)

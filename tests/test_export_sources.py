"""The model in the package, and what a name means."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import plan_jax
from plan_jax import model as models
from plan_jax.export import sources
from plan_jax.types import UserError

NAME = "phantom-plan"


def test_the_model_in_the_package_is_small_and_says_what_it_is():
    assert sources.list_box() == [NAME]
    folder = sources.find_model(NAME)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    # What its card shows was measured on these weights.
    fingerprint = json.loads((folder / "checksums.json").read_text())["params_sha256"]
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    assert metrics["params_sha256"] == fingerprint
    card = (folder / "README.md").read_text()
    assert f"| CNR, signed | {metrics['grounding/cnr_signed']:.2f} |" in card
    for text in ("make model", "Not for clinical use", "| Phrase grounding |", "1,800 steps"):
        assert text in card


def test_the_model_in_the_package_finds_an_effusion():
    """A bright lung base on the patient's left, in the right half of the image."""
    model = plan_jax.load(NAME)
    y, x = np.mgrid[:96, :96]
    lungs = ((x - 28) / 14) ** 2 + ((y - 46) / 30) ** 2 < 1
    lungs |= ((x - 68) / 14) ** 2 + ((y - 46) / 30) ** 2 < 1
    film = np.where(lungs, 60, 150)
    film[(x > 52) & (y > 58) & lungs] = 190
    image = film.astype(np.uint8)[None, ..., None]
    maps, weights = model.heatmap(
        model.encode_image(image), model.encode_text(["pleural effusion on the left"])
    )
    heat = (weights[0] @ maps[0]).reshape(model.grid)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert column >= heat.shape[1] / 2 and row >= heat.shape[0] / 2


def test_half_precision_changes_the_answers_of_the_model_in_the_package_by_less_than_a_hundredth(
    tmp_path,
):
    model = plan_jax.load(NAME)
    half = plan_jax.load(model.save_pretrained(tmp_path / "half", dtype="float16"))
    images = np.random.default_rng(0).integers(0, 255, (2, 96, 96, 1)).astype(np.uint8)
    texts = ["nodule in the right upper zone", "no pneumothorax"]
    answers = []
    for one in (model, half):
        image_features, text_features = one.encode_image(images), one.encode_text(texts)
        heat, weights = one.heatmap(image_features, text_features)
        tables = one.similarity(image_features, text_features)
        answers.append({"heat": heat, "weights": weights, **tables})
        for name, features in (("image", image_features), ("text", text_features)):
            pooled = np.asarray(features.pooled)
            answers[-1][name] = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    for name, expected in answers[0].items():
        # `both` is a sum of logits, which are larger than 1; the others are cosines and shares.
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            answers[1][name], expected, atol=1e-2 * scale, rtol=0, err_msg=name
        )


def test_the_model_in_the_package_is_loaded_without_a_network(tmp_path):
    """In a process of its own, in an empty folder, with sockets that connect to nothing."""
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        f"import plan_jax\nmodel = plan_jax.load({NAME!r})\n"
        "import sys\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "print(model.name, model.size)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(sources.BOX.parent.parent)}
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.stdout == "plan 96\n", process.stderr


def test_a_folder_here_comes_before_the_model_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.find_model(NAME) == sources.BOX / NAME
    plan_jax.load(NAME).save_pretrained(NAME)
    assert sources.find_model(NAME).resolve() == tmp_path / NAME
    assert models.load_config(NAME).steps == 1800


@pytest.mark.parametrize("name", ["../models/phantom-plan", "phantom-plan/..", "a" * 300, "pln"])
def test_a_name_that_means_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sources.find_model(name)
    assert str(error.value).startswith(f"checkpoint {name} does not exist; pass the folder of a")
    assert str(error.value).endswith(f"or one of {NAME}")


def test_a_step_of_a_run_is_left_to_the_checkpoints(tmp_path):
    assert sources.find_model(tmp_path / "run/checkpoints/7") is None

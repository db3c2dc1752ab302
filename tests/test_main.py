"""The command line: what is read from it, what is passed on, and the exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plan_jax import config, evaluate, main, predict, train
from plan_jax import model as assembly
from plan_jax.types import Features, Model, UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/testing.py")


@pytest.fixture(autouse=True)
def at_root(monkeypatch, tmp_path):
    """Run in an empty folder, from where configs can import each other."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def called(monkeypatch):
    """Record what training and evaluation are called with, instead of doing them."""
    calls = []
    for module, name in ((train, "train"), (evaluate, "evaluate_checkpoint")):
        monkeypatch.setattr(
            module, name, lambda *args, name=name: calls.append((name, *args)) or {}
        )
    return calls


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "7", 7),
        ("optim.rate", "1e-4", 1e-4),
        ("optim.rate", "1", 1),
        ("data.cache", "false", False),
        ("data.tokenizer", "12", "12"),
        ("eval.tasks", "grounding,retrieval", ("grounding", "retrieval")),
        ("eval.tasks", "('zero_shot',)", ("zero_shot",)),
        ("eval.tasks", "zero_shot", ("zero_shot",)),
        ("optim.freeze", "()", ()),
        ("hyper.tau", "0.2", 0.2),
        ("vision.widths", "(8, 16)", (8, 16)),
        ("text.dropout", "0.1", 0.1),
        ("data.builder.findings", "nodule", ("nodule",)),
    ],
)
def test_a_field_is_set(field, text, value, called):
    assert main.run(["--config", CONFIG, f"--config.{field}={text}"]) == 0
    assert main.run(["--config", CONFIG, f"--config.{field}", text]) == 0
    for name, given, workdir in called:
        assert (name, workdir) == ("train", "runs/testing")
        assert dict(config.flat(given))[field] == value
        assert type(dict(config.flat(given))[field]) is type(value)


def test_fields_of_the_chosen_method(called):
    argv = ["--config", CONFIG, "--config.hyper.image_to_text=0.5", "--config.method=convirt"]
    assert main.run(argv) == 2  # testing sets constants of PLAN, which ConVIRT does not have
    loaded = main.load(CONFIG) | {"hyper": {}}
    config.override(loaded, {"hyper.image_to_text": "0.5", "method": "convirt"})
    config.check(loaded)
    assert loaded["hyper"] == {"image_to_text": 0.5}


def test_the_same_run_goes_on_and_another_is_refused(called, capsys):
    Path("run").mkdir()
    held = main.load(CONFIG)
    Path("run/config.json").write_text(json.dumps(held))
    same = ["--config", CONFIG, "--workdir", "run"]
    assert main.run([*same, "--config.eval.limit=4", "--config.log_every=2"]) == 0
    assert main.run([*same, "--config.steps=9"]) == 2
    assert "holds a run of config.steps 6, not 9; give another" in capsys.readouterr().err
    assert len(called) == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("batch 3 is odd; use 4"), 2, "batch 3 is odd; use 4\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes from the last"),
    ],
)
def test_exit_codes(error, code, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train", fail)
    assert main.run(["--config", CONFIG]) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(ZeroDivisionError):
        main.run(["--config", CONFIG])


def test_help(capsys):
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--config", "--workdir", "--mode", "--checkpoint"))


def test_a_config_with_an_argument():
    Path("small.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config(steps='1'):\n    return ConfigDict({'steps': int(steps)})\n"
    )
    assert main.load("small.py") == {"steps": 1}
    assert main.load("small.py:5") == {"steps": 5}
    assert [main.default(f"x/small.py{end}") for end in ("", ":5")] == [
        "runs/small",
        "runs/small_5",
    ]


@pytest.mark.parametrize("module", ["main", "predict"])
def test_as_a_program(module):
    argv = [sys.executable, "-m", f"plan_jax.{module}", "--nothing=1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "--help shows" in done.stderr


def test_the_table_shows_what_is_beaten(capsys):
    metrics = {"grounding/cnr_signed": 1.5, "grounding/prior/cnr_signed": 1.1, "images_per_s": 99.6}
    metrics |= {"retrieval/i2t_r5": 0.5, "retrieval/chance/i2t_r5": 0.017, "params_sha256": "ab12"}
    main.show(metrics, Path("runs/x/report.html"))
    assert capsys.readouterr().out.splitlines() == [
        "grounding/cnr_signed           1.500  lung prior 1.1",
        "retrieval/i2t_r5               0.500  chance 0.017",
        "images_per_s                     100",
        "params_sha256 ab12",
        "all of it, with pictures: runs/x/report.html",
    ]
    main.show({}, Path("runs/x/report.html"))
    assert capsys.readouterr().out == ""


def test_there_is_no_such_device():
    argv = [sys.executable, "-m", "plan_jax.main", "--config=configs/testing.py", "--workdir=no"]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("JAX_PLATFORMS is tpu: Unable to initialize")
    assert not (ROOT / "no").exists()


def toy_model():
    """A model whose only warm cell is row 1, column 3 of 4 x 4, for words that are not padding."""
    grid = np.zeros((4, 4), np.float32)
    grid[1, 3] = 1
    maps = np.stack([grid.ravel(), np.full(16, 9, np.float32)])[None]

    def features(count):
        return Features(np.zeros((count, 2)), np.zeros((count, 2, 2)), np.ones((count, 2), bool))

    return Model(
        name="toy",
        grid=(4, 4),
        rounds=0,
        size=32,
        encode_image=lambda images: features(len(images)),
        encode_text=lambda texts: features(len(texts)),
        similarity=lambda images, texts: {},
        heatmap=lambda images, texts, rounds=None: (maps, np.asarray([[1.0, 0.0]])),
    )


@pytest.mark.parametrize(("shape", "top", "left"), [((64, 64), 16, 48), ((40, 80), 0, 60)])
def test_the_heat_lies_over_the_image_as_it_was_given(shape, top, left):
    heat = predict.heat_map(toy_model(), np.zeros((*shape, 1), np.uint8), "effusion")
    assert heat.shape == shape
    y, x = np.unravel_index(heat.argmax(), shape)
    cell = max(shape) // 4
    assert top <= y < top + cell and left <= x < left + cell


@pytest.mark.parametrize("name", ["heat.png", "heat.JPG"])
def test_a_phrase_is_grounded(name, monkeypatch, capsys):
    monkeypatch.setattr(assembly, "load", lambda folder: toy_model())
    Image.fromarray(np.full((50, 40), 90, np.uint8)).save("chest.png")
    argv = ["--checkpoint", "x", "--image", "chest.png", "--text", "effusion", "--out", name]
    assert predict.run(argv) == 0
    assert capsys.readouterr().out == f"{name}: highest at x 39, y 18 of 40 x 50, patient's left\n"
    with Image.open(name) as picture:
        assert picture.mode == "RGB" and picture.height / picture.width == 50 / 40

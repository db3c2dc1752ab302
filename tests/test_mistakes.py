"""A user's mistakes: each is one clear sentence on stderr, exit code 2, nothing half-written."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from plan_jax import checkpoint, config, evaluate, main, predict

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/testing.py"
BEGIN = "from configs import testing\n\n\ndef get_config():\n    config = testing.get_config()\n"
FILES = {
    "syntax.py": "def get_config(:\n",
    "name.py": BEGIN + "    config.steps = step\n    return config\n",
    "nothing.py": "steps = 3\n",
    "none.py": BEGIN,
    "extra.py": BEGIN + "    config.lr = 1e-3\n    return config\n",
    "short.py": BEGIN + "    del config.optim.rate\n    return config\n",
    "type.py": BEGIN + "    del config.optim\n    config.optim = 3\n    return config\n",
    "pairs.py": BEGIN + "    config.data.name = 'pairs'\n"
    "    config.data.builder = {}\n    return config\n",
    "column.py": BEGIN + "    config.data.name = 'pairs'\n"
    "    config.data.builder = {'manifest': 'pairs.csv', 'size': 32}\n    return config\n",
    "asg.py": BEGIN + "    config.data.name, config.method = 'pairs', 'asg'\n"
    "    config.data.builder = {'manifest': 'good.csv', 'size': 32}\n"
    "    config.hyper, config.eval.tasks = {}, ('retrieval',)\n    return config\n",
    "good.csv": "image,text,split,patient_id\n"
    + "".join(f"ok.png,No effusion.,{split},{split}\n" for split in ("train", "val", "test")),
    "pairs.csv": "image,report\nx.png,No effusion.\n",
    "text.png": "no picture",
    "file": "",
    "torn.safetensors": "\x10\0\0\0",
    "other/config.json": '{"seed": 1}',
    "broken/config.json": '{"seed"',
}

# What is typed (after `--config configs/testing.py`, where it begins with a field), what is said.
TRAIN = {
    "no arguments": ("", "nothing to do; write --config"),
    "unknown flag": ("--confg x.py", "Unknown command line flag 'confg'.* mean: config"),
    "unknown mode": ("--mode trian", "--mode=trian: value should be one of <train|eval>"),
    "no flag": ("configs/demo.py", "argument 'configs/demo.py' has no flag; write --config"),
    "no run to judge": ("--config configs/eval/kermany.py", "kermany.py evaluates a checkpoint;"),
    "no config": ("--config nowhere.py", "config file nowhere.py is not there"),
    "syntax": ("--config syntax.py", "syntax.py line 1 fails with SyntaxError: .*; correct it"),
    "name": ("--config name.py", "name.py line 6 fails with NameError: name 'step' is not"),
    "no function": ("--config nothing.py", "nothing.py fails with .* has no .*get_config"),
    "no return": ("--config none.py", "none.py returns None; let get_config.* return a ConfigDict"),
    "invented field": ("--config extra.py", "config.lr is not a field; "),
    "forgotten field": ("--config short.py", "config.optim.rate is missing; begin your config"),
    "value for section": ("--config type.py", "config.optim is a section; set one of its fields"),
    "field of a value": ("--config type.py --config.optim.rate=1", "optim.warmup is missing"),
    "other's constant": ("config.method=convirt", "is not a field of convirt; there are tau"),
    "no value": ("config.batch", "--config.batch has no value; write --config.batch=value"),
    "misspelt": ("config.optim.rte=1", "rte is not a field; did you mean config.optim.rate?"),
    "misspelt constant": ("config.hyper.tou=1", "tou is not .*; did you mean config.hyper.tau?"),
    "misspelt world": ("config.data.builder.siez=9", "siez is not .* mean .*data.builder.size?"),
    "type": ("config.batch=many", "config.batch is 'many'; it has to be an int"),
    "fraction": ("config.steps=2.5", "config.steps is 2.5; it has to be an int"),
    "not a number": ("config.optim.rate=nan", "config.optim.rate is 'nan'; it has to be a number"),
    "range": ("config.optim.rate=-1", "config.optim.rate is -1; use at least 1e-12"),
    "method": ("config.method=plam", "config.method is 'plam'; use one of convirt, gloria, "),
    "choice": ("config.hyper.negatives=tokens", "negatives is 'tokens'; use one of token, all"),
    "other choice": ("config.vision.pool=max", "vision.pool is 'max'; use one of mean, mean_max"),
    "data that is not there": ("--config asg.py", "need labels, which dataset 'pairs' .*columns="),
    "task": ("config.eval.tasks=retrievl", "retrievl.*; use some of grounding, retrieval"),
    "dataset": ("config.data.name=mimic", "config.data.name is 'mimic'; use one of phantom, pairs"),
    "tower": ("config.vision.name=vgg", "config.vision.name is 'vgg'; use one of resnet50"),
    "split": ("config.eval.split=tset", "config.eval.split is 'tset'; use one of train, val"),
    "words": ("config.data.words=500", "config.data.words is 500, more than fit in the .* pieces"),
    "implementation": ("config.parallel.implementation=xmap", "'xmap'; use one of shard_map, pmap"),
    "indivisible batch": (
        "config.batch=30",
        "batch 30 is not divisible by 8 devices; use 24 or 32",
    ),
    "devices": ("config.parallel.devices=9", "parallel.devices is 9 but there are 8; use 1 to 8"),
    "huge batch": ("config.batch=4096", "batch 4096 does not fit a dataset of .* pairs; use 1 to"),
    "finding": ("config.data.builder.findings=gout", "finding 'gout' is unknown; use some of "),
    "tokeniser": ("config.data.tokenizer=file", "vocabulary file does not begin with .PAD.; use"),
    "frozen": ("config.optim.freeze=visoin", "optim.freeze 'visoin' names no parameter; there are"),
    "frozen layers": ("config.optim.freeze=text:9", "freeze is 'text:9'; use text:1 to text:1"),
    "no weights": (
        "config.weights.text=w.safetensors",
        "weights w.safetensors do not exist; pass a folder",
    ),
    "no model": ("config.weights.vision=other", "other has neither model.safetensors nor pytorch_"),
    "folder": (
        "config.weights.vision=configs",
        "folder configs has no config.json; pass a folder with config.json",
    ),
    "torn weights": (
        "config.weights.text=torn.safetensors",
        "is not a complete safetensors file .*; download it again",
    ),
    "heads": ("config.weights.heads=torn.safetensors", "is for heads of kind mlp, and .*; set all"),
    "no package": ("config.weights.text=package:nil", "package:nil is not installed; pip install"),
    "no manifest": ("--config pairs.py", "dataset pairs has no manifest; give data.builder.manif"),
    "column": ("--config column.py", "column 'text' .*is not in the manifest"),
    "folder is a file": ("--workdir file", "workdir file is inside .*file, a file; give another"),
    "inside a file": ("--workdir file/run", "workdir file/run is inside .*file, a file; give ano"),
    "another run": ("--workdir other", "workdir other holds a run of config.* 1, not|unset, not"),
    "broken run": ("--workdir broken", "broken/config.json cannot be read; give another --workdir"),
    "resuming wrongly": ("--checkpoint run", "--checkpoint is for --mode eval; a run is resumed"),
}
JUDGE = "--config configs/eval/all_phantom.py --checkpoint run "
EVAL = {
    "other tower": (JUDGE + "config.dim=9", "checkpoint run is of config.dim 8, not 9"),
    "item": (JUDGE + "config.eval.classification.fractions=a", "each item has to be a number"),
    "no batch": (JUDGE + "config.eval.segmentation.batch=0", "batch is 0; use at least 1"),
    "no option": (
        JUDGE + "config.eval.detection.wdths=(1,)",
        "wdths is not a field; did you mean .*detection.widths",
    ),
    "no checkpoint": ("--checkpoint nowhere", "checkpoint nowhere does not exist; pass the folder"),
    "empty run": ("--checkpoint other", "checkpoint other holds no checkpoint; pass the folder"),
    "no step": ("--checkpoint run/checkpoints/7", "checkpoints has no step 7; use one of"),
    "no such task": ("--checkpoint run config.eval.tasks=x", "use some of grounding, retrieval"),
    "other model": ("--checkpoint run config.dim=65", "run is of config.dim .*, not 65; leave"),
}
GROUND = {
    "nothing given": ("", "required: --checkpoint, --image, --text; --help shows how"),
    "no image": ("--image none.png --text effusion", "--image none.png cannot be read .No such"),
    "no picture": (
        "--image text.png --text effusion",
        "--image text.png is not an image; give a PNG",
    ),
    "no word": ("--image ok.png --text ...", "--text '...' has no word; write a phrase"),
    "kind": ("--image ok.png --text effusion --out heat.pgn", "heat.pgn is no picture's name"),
    "no folder": ("--image ok.png --text effusion --out no/h.png", "a folder that is not there"),
    "no run": ("--image ok.png --text effusion --checkpoint no", "checkpoint no does not exist;"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with files that are wrong, and a checkpoint of the testing config."""
    folder = tmp_path_factory.mktemp("desk")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "configs").symlink_to(ROOT / "configs")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "ok.png")
    manager = checkpoint.open_manager(folder / "run" / checkpoint.FOLDER)
    checkpoint.save(manager, 1, {"params": {"a": jnp.ones(2)}}, {}, main.load(str(ROOT / CONFIG)))
    checkpoint.close(manager)
    return folder


def all_files(folder):
    """Names of all files under a folder, but for the data, which many runs share."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(("data", "configs"))}


def said(run, argv, desk, monkeypatch, capfd):
    """Run in the folder; check exit code, silence elsewhere, and that no file came or went."""
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(ROOT)
    before = all_files(desk)
    capfd.readouterr()
    assert run(argv) == 2
    out, err = capfd.readouterr()
    assert all_files(desk) == before
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("preparing ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def words(typed):
    """Split what is typed and write fields as flags."""
    return [f"--{word}" if word.startswith("config.") else word for word in typed.split()]


@pytest.mark.parametrize("mistake", TRAIN)
def test_training(mistake, desk, monkeypatch, capfd):
    typed, sentence = TRAIN[mistake]
    argv = words(typed)
    if typed.startswith(("config.", "--workdir", "--checkpoint")):
        argv = ["--config", CONFIG, *argv]
    assert re.search(sentence, said(main.run, argv, desk, monkeypatch, capfd))


@pytest.mark.parametrize("mistake", EVAL)
def test_evaluating(mistake, desk, monkeypatch, capfd):
    typed, sentence = EVAL[mistake]
    argv = ["--mode", "eval", *words(typed)]
    assert re.search(sentence, said(main.run, argv, desk, monkeypatch, capfd))


@pytest.mark.parametrize("mistake", GROUND)
def test_grounding(mistake, desk, monkeypatch, capfd):
    typed, sentence = GROUND[mistake]
    argv = typed.split()
    if argv and "--checkpoint" not in argv:
        argv += ["--checkpoint", "run"]
    assert re.search(sentence, said(predict.run, argv, desk, monkeypatch, capfd))


def test_the_fields_are_those_of_the_configs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    for path in sorted((ROOT / "configs").glob("*.py")):
        loaded = main.load(str(path))
        if path.name == "pairs.py":
            loaded["data"]["builder"].setdefault("manifest", "pairs.csv")
        config.check(loaded)


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "configs/eval").glob("*.py")) - {ROOT / "configs/eval/benchmark.py"}),
    ids=lambda path: path.stem,
)
def test_what_evaluations_change_are_fields(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    loaded = main.load(str(path))
    assert config.is_evaluation(loaded)
    made = config.for_evaluation(main.load(str(ROOT / "configs/demo.py")), loaded)
    config.check(made)
    for task in made["eval"]["tasks"]:
        evaluate.task_options(task, made)

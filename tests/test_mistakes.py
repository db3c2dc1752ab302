"""A user's mistake is one clear sentence on stderr and exit code 2, and leaves nothing behind.

Each case states the arguments and the parts that the sentence must contain: the thing with its
value, and the remedy.
"""

import ast
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from plan_jax import checkpoint, main, predict
from plan_jax.config import Config, is_evaluation, merge_evaluation

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/testing.py"
HEADER = "from configs import testing\n\n\ndef get_config():\n    config = testing.get_config()\n"
FILES = {
    "syntax.py": "def get_config(:\n",
    "name.py": HEADER + "    config.steps = step\n    return config\n",
    "no_function.py": "steps = 3\n",
    "no_return.py": HEADER,
    "unknown.py": HEADER + "    config.lr = 1e-3\n    return config\n",
    "section.py": HEADER + "    del config.optim\n    config.optim = 3\n    return config\n",
    "list.py": HEADER + "    config.vision = {'name': ['vgg']}\n    return config\n",
    "old.py": HEADER + "    config.optim.rate = 1e-3\n    return config\n",
    "pairs.py": HEADER + "    config.data.name = 'pairs'\n"
    "    config.data.builder = {}\n    return config\n",
    "column.py": HEADER + "    config.data.name = 'pairs'\n"
    "    config.data.builder = {'manifest': 'pairs.csv', 'size': 32}\n    return config\n",
    "asg.py": HEADER + "    config.data.name, config.method = 'pairs', 'asg'\n"
    "    config.data.builder = {'manifest': 'good.csv', 'size': 32}\n"
    "    config.hyper, config.eval.tasks = {}, ('retrieval',)\n    return config\n",
    "good.csv": "image,text,split,patient_id\n"
    + "".join(f"{split}.png,No effusion.,{split},{split}\n" for split in ("train", "val", "test")),
    "pairs.csv": "image,report\nx.png,No effusion.\n",
    "text.png": "not an image",
    "file": "",
    "torn.safetensors": "\x10\0\0\0",
    "other/config.json": '{"seed": 1}',
    "version_0_1/config.json": '{"seed": 0, "ema": 0.0, "dim": 64, "standard": "image"}',
    "broken/config.json": '{"seed"',
}

# Arguments (after `--config configs/testing.py` where they begin with a field), and the parts of
# the sentence.
TRAIN = {
    "no arguments": ("", ["--config is missing", "pass --config demo"]),
    "unknown flag": ("--confg x.py", ["'confg'", "config", "--help shows the flags"]),
    "unknown mode": ("--mode trian", ["--mode=trian", "<train|eval|compile>"]),
    "no flag": ("configs/demo.py", ["argument 'configs/demo.py'", "did you mean --config?"]),
    "evaluation without a checkpoint": (
        "--config configs/eval/kermany.py",
        ["configs/eval/kermany.py", "pass its folder as --checkpoint"],
    ),
    "checkpoint in training": ("--checkpoint run", ["--checkpoint", "resumed by its --workdir"]),
    "missing config file": ("--config nowhere.py", ["nowhere.py does not exist", "did you mean"]),
    "mistyped config": ("--config gloia:phantom", ["gloia does not exist", "did you mean gloria"]),
    "syntax error": ("--config syntax.py", ["syntax.py line 1", "SyntaxError", "correct it"]),
    "name error": ("--config name.py", ["name.py line 6", "NameError", "correct it"]),
    "no function": ("--config no_function.py", ["no_function.py", "get_config"]),
    "no return": ("--config no_return.py", ["returns None", "must return a ConfigDict"]),
    "unknown field in a file": ("--config unknown.py", ["config.lr is not a field", "use "]),
    "field of 0.1": ("--config old.py", ["config.optim.rate is not a field", "did you mean"]),
    "value for a section": (
        "--config section.py",
        ["config.optim is 3", "set one of its fields name, learning_rate"],
    ),
    "constant of another method": (
        "config.method=convirt",
        ["is not a field of convirt", "use tau, image_to_text"],
    ),
    "field of a value": ("--config section.py config.optim.b1=0", ["config.optim is 3", "b1"]),
    "list for a name": (
        "--config list.py",
        ["config.vision.name is ('vgg',)", "use one of resnet50"],
    ),
    "no value": ("config.batch", ["--config.batch has no value", "--config.batch=value"]),
    "section on the command line": ("config.optim=1", ["config.optim is a section", "set one of"]),
    "misspelt field": (
        "config.optim.learning_rte=1",
        ["config.optim.learning_rte", "did you mean config.optim.learning_rate?"],
    ),
    "misspelt constant": ("config.hyper.tou=1", ["hyper.tou", "did you mean config.hyper.tau?"]),
    "misspelt builder field": (
        "config.data.builder.siez=9",
        ["config.data.builder.siez", "did you mean config.data.builder.size?"],
    ),
    "text for an int": ("config.batch=many", ["config.batch is 'many'", "must be an int"]),
    "fraction for an int": ("config.steps=2.5", ["config.steps is '2.5'", "must be an int"]),
    "not a number": (
        "config.optim.learning_rate=nan",
        ["config.optim.learning_rate is nan", "must be a number"],
    ),
    "out of range": (
        "config.optim.learning_rate=-1",
        ["config.optim.learning_rate is -1.0", "use a number above 0"],
    ),
    "method": ("config.method=plam", ["config.method is 'plam'", "use one of convirt, gloria"]),
    "choice of a constant": ("config.hyper.negatives=tokens", ["negatives", "'tokens'", "all"]),
    "choice of a tower": ("config.vision.pool=max", ["config.vision.pool is 'max'", "mean_max"]),
    "teacher without an average": ("config.hyper.progress=ema", ["progress", "config.ema_decay"]),
    "data without labels": ("--config asg.py", ["labels", "dataset 'pairs'", "columns"]),
    "task": ("config.eval.tasks=retrievl", ["'retrievl'", "use some of grounding, retrieval"]),
    "dataset": ("config.data.name=mimic", ["config.data.name is 'mimic'", "use one of phantom"]),
    "tower": ("config.vision.name=vgg", ["config.vision.name is 'vgg'", "use one of resnet50"]),
    "split": ("config.eval.split=tset", ["config.eval.split is 'tset'", "use one of train, val"]),
    "images that would be upsampled": (
        "config.data.size=64",
        ["config.data.size is 64", "stores its images at 32", "config.data.builder.size=64"],
    ),
    "too many words": (
        "config.data.max_words=500",
        ["config.data.max_words is 500", "data.max_tokens 24", "use at most 22"],
    ),
    "implementation": (
        "config.parallel.implementation=xmap",
        ["config.parallel.implementation is 'xmap'", "use one of shard_map, pmap"],
    ),
    "indivisible batch": ("config.batch=30", ["batch 30", "8 devices", "use 24 or 32"]),
    "indivisible microbatches": (
        "config.batch=64 --config.microbatch=3",
        ["config.microbatch is 3", "the 8 pairs of each device", "use 2 or 4"],
    ),
    "devices": ("config.parallel.devices=9", ["parallel.devices is 9", "use 1 to 8"]),
    "huge batch": (
        "config.batch=4096",
        ["batch 4096 does not fit a dataset of", "pairs", "use 1 to"],
    ),
    "finding": ("config.data.builder.findings=gout", ["'gout'", "use some of"]),
    "tokenizer": (
        "config.data.tokenizer=file",
        ["vocabulary file does not begin with [PAD]", "use a BERT vocabulary"],
    ),
    "frozen path": ("config.optim.freeze=visoin", ["optim.freeze 'visoin'", "use some of vision"]),
    "frozen layers": ("config.optim.freeze=text:9", ["freeze is 'text:9'", "text:1 to text:1"]),
    "missing weights": (
        "config.weights.text=w.safetensors",
        ["weights w.safetensors do not exist", "pass a folder with"],
    ),
    "folder without weights": (
        "config.weights.vision=other",
        ["other has neither model.safetensors nor pytorch_model.bin", "pass a folder with"],
    ),
    "folder without a model": (
        "config.weights.vision=configs",
        ["folder configs has no config.json", "pass a folder with"],
    ),
    "torn weights": (
        "config.weights.text=torn.safetensors",
        ["torn.safetensors is not a complete safetensors file", "download it again"],
    ),
    "torn heads": (
        "config.weights.heads=torn.safetensors",
        ["torn.safetensors is not a complete safetensors file", "download it again"],
    ),
    "missing package": (
        "config.weights.text=package:nil",
        ["package:nil is not installed", "pip install"],
    ),
    "no manifest": ("--config pairs.py", ["manifest", "data.builder.manifest"]),
    "missing column": ("--config column.py", ["column 'text'", "manifest"]),
    "workdir is a file": ("--workdir file", ["workdir file", "pass another --workdir"]),
    "workdir in a file": ("--workdir file/run", ["workdir file/run", "pass another --workdir"]),
    "workdir of another run": (
        "--workdir other",
        ["workdir other holds a run of config.", "pass another --workdir, or delete it"],
    ),
    "workdir of an unknown kind": (
        "--workdir nil://b/run",
        ["--workdir nil://b/run is an address", "a bucket that is mounted (gcsfuse)"],
    ),
    "data of an unknown kind": (
        "config.data.dir=nil://b/data",
        ["data folder nil://b/data is an address", "gcsfuse"],
    ),
    "programs in a bucket": (
        "config.parallel.cache=gs://b/programs",
        ["config.parallel.cache gs://b/programs is an address", "gcsfuse"],
    ),
    "manifest in a bucket": (
        "--config column.py --config.data.builder.manifest=s3://b/pairs.csv",
        ["config.data.builder.manifest s3://b/pairs.csv is an address", "gcsfuse"],
    ),
    "weights at an address": (
        "config.weights.vision=https://x.org/w.safetensors",
        ["config.weights.vision https://x.org/w.safetensors is an address"],
    ),
    "figures in a bucket": (
        f"--config {CONFIG} --mode compile --workdir gs://b/run",
        ["--workdir gs://b/run is an address"],
    ),
    "workdir of 0.1": ("--workdir version_0_1", ["version_0_1", "plan_jax 0.1", "train it again"]),
    "broken workdir": ("--workdir broken", ["broken/config.json", "pass another --workdir"]),
}
ALL_TASKS = "--config configs/eval/all_phantom.py --checkpoint run "
EVAL = {
    "another model": (
        ALL_TASKS + "config.embed_dim=9",
        ["checkpoint run is of config.embed_dim 8, not 9", "leave --config.embed_dim out"],
    ),
    "item of a tuple": (
        ALL_TASKS + "config.eval.classification.fractions=a",
        ["config.eval.classification.fractions", "must be a number"],
    ),
    "option out of range": (
        ALL_TASKS + "config.eval.segmentation.batch=0",
        ["config.eval.segmentation.batch is 0", "use at least 1"],
    ),
    "head that cannot learn": (
        ALL_TASKS + "config.eval.detection.learning_rate=0",
        ["config.eval.detection.learning_rate is 0", "use a number above 0"],
    ),
    "misspelt option": (
        ALL_TASKS + "config.eval.detection.wdths=(1,)",
        ["config.eval.detection.wdths", "did you mean config.eval.detection.widths?"],
    ),
    "missing checkpoint": ("--checkpoint nowhere", ["nowhere does not exist", "pass the folder"]),
    "checkpoint of an unknown kind": (
        "--checkpoint nil://b/run",
        ["checkpoint nil://b/run is an address", "gcsfuse"],
    ),
    "checkpoint that is not there": (
        "--checkpoint memory://nowhere/run",
        ["checkpoint memory://nowhere/run does not exist", "pass the folder of a run"],
    ),
    "results of an unknown kind": (
        "--checkpoint run --workdir nil://b/run",
        ["--workdir nil://b/run is an address", "gcsfuse"],
    ),
    "empty run": ("--checkpoint other", ["other holds no checkpoint", "pass the folder"]),
    "missing step": ("--checkpoint run/checkpoints/7", ["checkpoints has no step 7", "use one of"]),
    "task": ("--checkpoint run config.eval.tasks=x", ["'x'", "use some of grounding, retrieval"]),
    "another width": (
        "--checkpoint run config.embed_dim=65",
        ["checkpoint run is of config.embed_dim 8, not 65", "leave --config.embed_dim out"],
    ),
}
PREDICT = {
    "no arguments": ("", ["--checkpoint", "--help shows the usage"]),
    "missing image": (
        "--image none.png --text effusion",
        ["none.png cannot be read", "No such file"],
    ),
    "not an image": (
        "--image text.png --text effusion",
        ["text.png is not an image", "pass a PNG"],
    ),
    "no word": ("--image ok.png --text ...", ["--text '...' has no word", "pass a phrase"]),
    "suffix": (
        "--image ok.png --text effusion --out heat.pgn",
        ["--out heat.pgn is not a PNG or JPEG", "use one of .png, .jpg, .jpeg"],
    ),
    "missing folder": (
        "--image ok.png --text effusion --out no/h.png",
        ["--out no/h.png", "create it first"],
    ),
    "missing checkpoint": (
        "--image ok.png --text effusion --checkpoint no",
        ["checkpoint no does not exist", "pass the folder"],
    ),
    "image in a bucket": (
        "--image gs://b/ok.png --text effusion",
        ["--image", "gs://b/ok.png is an address", "gcsfuse"],
    ),
    "table in a bucket": ("--csv gs://b/pairs.csv", ["--csv", "gs://b/pairs.csv is an address"]),
    "images in a bucket": (
        "--csv good.csv --images gs://b/films",
        ["--images", "gs://b/films is an address"],
    ),
    "results in a bucket": (
        "--image ok.png --text effusion --out maps.npz gs://b/heat.png",
        ["--out", "gs://b/heat.png is an address", "gcsfuse"],
    ),
    "masks in a bucket": (
        "--image ok.png --text effusion --masks gs://b/masks",
        ["--masks", "gs://b/masks is an address"],
    ),
    "checkpoint of an unknown kind": (
        "--image ok.png --text effusion --checkpoint nil://b/run",
        ["checkpoint nil://b/run is an address"],
    ),
    "negative rounds": (
        "--image ok.png --text effusion --rounds -1",
        ["--rounds is -1", "use 0 or more"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with files that are wrong, and a checkpoint of the testing config."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "configs").symlink_to(ROOT / "configs")
    # Different images: copies in two splits would be a mistake too.
    for grey, name in enumerate(("ok", "train", "val", "test")):
        film = np.full((32, 32), grey, np.uint8)
        film[8:24, 8:24] = 200  # one without contrast would be a mistake too
        Image.fromarray(film).save(folder / f"{name}.png")
    config = Config.from_dict(main.load_config_file(str(ROOT / CONFIG)))
    manager = checkpoint.open_manager(folder / "run" / checkpoint.FOLDER)
    checkpoint.save(manager, 1, {"params": {"a": jnp.ones(2)}}, {}, config.to_dict())
    checkpoint.close(manager)
    return folder


def list_files(folder):
    """Returns the names of all files under a folder, without the data that runs share."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(("data", "configs"))}


def run_and_read_error(run, arguments, folder, monkeypatch, capfd):
    """Runs in the folder, checks that nothing else happens, and returns the sentence."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT)
    files = list_files(folder)
    capfd.readouterr()
    assert run(arguments) == 2
    out, err = capfd.readouterr()
    assert list_files(folder) == files
    assert out == ""
    # What the preparation of data says is no complaint.
    summary = ("preparing ", "good.csv: ", "columns: ")
    lines = [line for line in err.splitlines() if not line.startswith(summary)]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def split_arguments(text):
    """Splits a command line, and writes fields as flags."""
    return [f"--{word}" if word.startswith("config.") else word for word in text.split()]


def assert_contains(sentence, parts):
    missing = [part for part in parts if part not in sentence]
    assert not missing, f"{missing} not in: {sentence}"


@pytest.mark.parametrize("mistake", TRAIN)
def test_training(mistake, folder, monkeypatch, capfd):
    text, parts = TRAIN[mistake]
    arguments = split_arguments(text)
    if text.startswith(("config.", "--workdir", "--checkpoint")):
        arguments = ["--config", CONFIG, *arguments]
    sentence = run_and_read_error(main.run, arguments, folder, monkeypatch, capfd)
    assert_contains(sentence, parts)


@pytest.mark.parametrize("mistake", EVAL)
def test_evaluation(mistake, folder, monkeypatch, capfd):
    text, parts = EVAL[mistake]
    arguments = ["--mode", "eval", *split_arguments(text)]
    sentence = run_and_read_error(main.run, arguments, folder, monkeypatch, capfd)
    assert_contains(sentence, parts)


@pytest.mark.parametrize("mistake", PREDICT)
def test_prediction(mistake, folder, monkeypatch, capfd):
    text, parts = PREDICT[mistake]
    arguments = text.split()
    if arguments and "--checkpoint" not in arguments:
        arguments += ["--checkpoint", "run"]
    sentence = run_and_read_error(predict.run, arguments, folder, monkeypatch, capfd)
    assert_contains(sentence, parts)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_a_config_file_is_valid(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    content = main.load_config_file(str(path))
    config = Config.from_dict(main.apply_overrides(content, {}))
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs/eval").glob("*.py")) if path.stem != "benchmark"],
    ids=lambda path: path.stem,
)
def test_an_evaluation_config_is_valid(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    content = main.load_config_file(str(path))
    assert is_evaluation(content)
    run = Config.from_dict(main.load_config_file(str(ROOT / "configs/demo.py")))
    config = Config.from_dict(merge_evaluation(run.to_dict(), content))
    assert set(config.eval.tasks) <= set(config.eval.options)
    usage = str(ast.get_docstring(ast.parse(path.read_text()))).split("\n\n")[1]
    assert usage.startswith(f"plan-jax --config eval/{path.stem} ") and "--checkpoint" in usage
    # A dataset is read from the folder that it was downloaded to.
    name = config.data.name
    if name not in ("pairs", "phantom"):
        assert "--config.data.source=" in usage
    assert name != "ms_cxr" or "--config.data.builder.images=" in usage

"""The phantom dataset is what is drawn, in one process or several, also after a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from records import are_equal

from plan_jax.data import phantom
from plan_jax.data.builders import phantom as builder
from plan_jax.data.dataset import open_dataset
from plan_jax.data.phantom import Difficulty, draw_study
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"seed": 9, "size": 48, "train": 7, "val": 4, "test": 5}


@pytest.mark.parametrize("difficulty", ["standard", "hard"])
def test_the_dataset_is_what_is_drawn(tmp_path, difficulty):
    fields = CONFIG | {"difficulty": difficulty}
    drawn = Difficulty(hard=difficulty == "hard")
    for split in phantom.SPLITS:
        dataset = open_dataset("phantom", split, data_dir=str(tmp_path), **fields)
        assert len(dataset) == CONFIG[split]
        assert dataset.findings == phantom.FINDINGS
        assert dataset.anatomy_names == dataset.region_names == phantom.ANATOMY
        for position, index in enumerate(phantom.split_range(split, CONFIG[split])):
            assert are_equal(dataset[position], draw_study(9, index, 48, drawn))


def test_several_processes_draw_the_same():
    settings, indices = (9, 48, Difficulty(hard=True)), phantom.split_range("val", 40)
    parallel = list(builder._draw_in_parallel(settings, indices, num_processes=2))
    sequential = list(builder._draw_examples(settings, indices))
    assert len(parallel) == len(sequential) == 40
    for first, second in zip(parallel, sequential, strict=True):
        assert first["image"].getvalue() == second["image"].getvalue()
        assert first["text"] == second["text"] and first["triplets"] == second["triplets"]
        assert np.array_equal(first["masks"], second["masks"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": 0}, "train count 0 leaves that split empty; use 1 or more"),
        ({"val": -1}, "val count -1 is out of range; use"),
        ({"size": 16}, "size 16 is too small .*; use 32 or more"),
        ({"seed": -1}, "seed -1 is negative; use 0 or more"),
        ({"noise": "a"}, "field 'noise' of dataset phantom is 'a'; it must be a number"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        open_dataset("phantom", "train", data_dir=str(tmp_path), **CONFIG | config)
    assert not list(tmp_path.iterdir())


def test_a_killed_preparation_does_not_count_as_complete(tmp_path):
    config = {"seed": 1, "size": 32, "train": 150, "val": 1, "test": 1}
    code = (
        "from plan_jax.data.dataset import open_dataset; "
        f"open_dataset('phantom', 'train', **{config}, data_dir={str(tmp_path)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("phantom/*/incomplete.*/*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    version = builder.Phantom.VERSION
    assert not list(tmp_path.glob(f"phantom/*/{version}/dataset_info.json"))
    dataset = open_dataset("phantom", "train", data_dir=str(tmp_path), **config)
    assert list(tmp_path.glob(f"phantom/*/{version}/dataset_info.json"))
    assert len(dataset) == 150 and are_equal(dataset[149], draw_study(1, 149, 32))

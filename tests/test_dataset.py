"""Datasets are prepared once, under a lock, and their records are read at random."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from manifests import make_image_folder, make_rows, open_pairs, write_manifest
from records import ANATOMY_NAMES, make_record

from plan_jax.data import dataset as datasets
from plan_jax.data import schema
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
NUM_RECORDS = 8


@pytest.fixture(scope="module")
def source():
    return [schema.serialize(make_record(number)) for number in range(NUM_RECORDS)]


@pytest.fixture
def folder(tmp_path):
    return make_image_folder(tmp_path)


# Access -------------------------------------------------------------------------------------


def test_records_are_read_by_index(source):
    dataset = datasets.Dataset(source, anatomy_names=ANATOMY_NAMES)
    assert dataset[-1].patient_id == f"patient {(NUM_RECORDS - 1) // 2}"
    assert list(dataset[0].anatomy) == list(ANATOMY_NAMES)
    assert len(list(dataset)) == NUM_RECORDS
    with pytest.raises(IndexError, match=f"record {NUM_RECORDS} of {NUM_RECORDS}"):
        dataset[NUM_RECORDS]


def test_a_pair_is_the_same_with_and_without_cache(source):
    expected = make_record(5)
    cached = datasets.Dataset(source, cache=True)
    for dataset in (datasets.Dataset(source), cached):
        pair = dataset.read_pair(5)
        np.testing.assert_array_equal(pair.image, expected.image)
        np.testing.assert_array_equal(pair.labels, expected.labels)
        assert pair.text == expected.text
    assert cached.read_pair(5) is cached.read_pair(5)
    with pytest.raises(ValueError, match="read-only"):
        cached.read_pair(5).image[0] = 1


def test_the_splits_of_a_dataset_are_listed(folder):
    config = {"manifest": write_manifest(folder, make_rows()), "size": 32}
    data_dir = str(folder.parent / "data")
    assert datasets.list_splits("pairs", data_dir=data_dir, **config) == ("train", "val", "test")


# Preparation --------------------------------------------------------------------------------


def test_another_configuration_or_manifest_is_another_folder(folder):
    open_pairs(folder, make_rows())
    open_pairs(folder, make_rows(), size=16)
    open_pairs(folder, make_rows(text="Different text."))
    folders = [path for path in (folder.parent / "data" / "pairs").iterdir() if path.is_dir()]
    assert len(folders) == 3
    assert open_pairs(folder, make_rows(), size=16)[0].image.shape == (12, 16, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "32"}, "field 'size' of dataset pairs is '32'; it must be an int"),
        ({"size": True}, "field 'size' of dataset pairs is True; it must be an int"),
        ({"max_bad": "a"}, "field 'max_bad' of dataset pairs is 'a'; it must be a number"),
        ({"text_optional": 1}, "field 'text_optional' .* is 1; it must be true or false"),
        ({"images": 1}, "field 'images' of dataset pairs is 1; it must be a string"),
        ({"findings": "a"}, "field 'findings' of dataset pairs is 'a'; it must be a list"),
        ({"columns": "a"}, "field 'columns' of dataset pairs is 'a'; it must be a mapping"),
        ({"sise": 2}, "field 'sise' of dataset pairs is unknown; did you mean size"),
    ],
)
def test_fields_of_the_builder_are_checked(folder, config, message):
    with pytest.raises(UserError, match=message):
        open_pairs(folder, make_rows(), **config)
    assert not (folder.parent / "data").exists()


def test_unknown_names_are_reported(folder):
    with pytest.raises(UserError, match="dataset 'phantoms' is unknown; use one of phantom, pairs"):
        datasets.open_dataset("phantoms", "train")
    message = "split 'trian' is not in dataset pairs; use one of train, val, test"
    with pytest.raises(UserError, match=message):
        open_pairs(folder, make_rows(), "trian")
    with pytest.raises(UserError, match="split 'train.:x.' cannot be read; write train or train"):
        open_pairs(folder, make_rows(), "train[:x]")
    assert len(open_pairs(folder, make_rows(), "train[:50%]")) == 4


def test_a_data_folder_that_cannot_be_written_is_named(folder):
    (folder.parent / "file").write_text("not a folder")
    with pytest.raises(UserError, match="data folder .*file.* cannot be written .*; use another"):
        datasets.open_dataset(
            "pairs",
            "train",
            data_dir=str(folder.parent / "file"),
            manifest=write_manifest(folder, make_rows()),
        )


# Prepares a dataset with a pause before each image, and prints the number of its records.
PREPARE = """
import sys, time
from plan_jax.data import dataset, images
read_image = images.read_image
def read_slowly(path, size):
    time.sleep(float(sys.argv[3]))
    return read_image(path, size)
images.read_image = read_slowly
data_dir, manifest = sys.argv[1:3]
train = dataset.open_dataset("pairs", "train", data_dir=data_dir, manifest=manifest, size=32)
print(len(train))
assert "tensorflow" not in sys.modules
"""


def start_preparation(folder, manifest, pause):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(folder.parent / "data"), manifest, str(pause)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_prepare_it_once_after_another_was_killed(folder):
    manifest, data_dir = write_manifest(folder, make_rows()), folder.parent / "data"
    victim = start_preparation(folder, manifest, pause=60)
    start = time.monotonic()
    while not list(data_dir.rglob("incomplete.*")):
        assert victim.poll() is None and time.monotonic() - start < 60
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert list(data_dir.rglob("incomplete.*"))

    processes = [start_preparation(folder, manifest, pause=0.02) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [out.strip() for out, _ in outputs] == ["8", "8"], outputs
    assert sum("preparing" in err for _, err in outputs) == 1
    assert not list(data_dir.rglob("incomplete.*"))

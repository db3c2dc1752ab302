"""Prepared data at an address: prepared once, fetched once, and never half of them."""

import errno
import os
import shutil
from pathlib import Path

import jax
import pytest
from bucket import BucketFileSystem

from plan_jax.data.dataset import open_dataset
from plan_jax.storage import place as places
from plan_jax.types import UserError

FIELDS = {"size": 32, "train": 4, "val": 2, "test": 2}


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "PAUSE", 0.0)
    monkeypatch.setattr(BucketFileSystem, "failures", [])
    monkeypatch.setenv("PLAN_JAX_CACHE", str(tmp_path / "host_1"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder at an address, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAN_JAX_CACHE", str(folder / "host_0"))
        read(f"bucket://{folder}/data")
    return folder


@pytest.fixture
def bucket(prepared, tmp_path):
    """A data folder at an address, prepared by another host."""
    return Path(shutil.copytree(prepared / "data", tmp_path / "data"))


def read(address, split="train"):
    dataset = open_dataset("phantom", split, data_dir=address, **FIELDS)
    return [dataset.read_bytes(index) for index in range(len(dataset))]


def find_records(folder):
    (path,) = folder.rglob("*train*array_record*")
    return path


def test_data_are_prepared_once_and_fetched_once(prepared, bucket, capfd, monkeypatch):
    address = f"bucket://{bucket}"
    records = read(address)
    assert len(records) == 4
    out, error = capfd.readouterr()
    assert error.count("fetching bucket://") == 1 and "preparing" not in error
    assert len(read(address, "val")) == 2 and read(address) == records
    monkeypatch.setenv("PLAN_JAX_CACHE", str(prepared / "host_0"))
    assert read(f"bucket://{prepared}/data") == records
    assert capfd.readouterr() == ("", "")


def test_an_upload_that_was_killed_counts_for_nothing(bucket, capfd):
    (info,) = bucket.rglob("dataset_info.json")
    info.unlink()
    find_records(bucket).write_bytes(b"part")
    records = read(f"bucket://{bucket}")
    error = capfd.readouterr().err
    assert "preparing phantom" in error and f"to bucket://{bucket}/phantom/" in error
    shutil.rmtree(bucket.parent / "host_1")
    assert read(f"bucket://{bucket}") == records
    assert "preparing" not in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["has another checksum", "has 9 of", "is missing"])
def test_damaged_records_are_one_sentence(bucket, fault):
    path = find_records(bucket)
    if fault == "is missing":
        path.unlink()
    elif fault == "has 9 of":
        os.truncate(path, 9)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    sentence = f"prepared records bucket://.* are damaged .* {fault}.*; delete that folder"
    with pytest.raises(UserError, match=sentence):
        read(f"bucket://{bucket}")


def test_a_local_copy_that_is_not_whole_is_fetched_again(bucket, capfd):
    address = f"bucket://{bucket}"
    records = read(address)
    find_records(bucket.parent / "host_1").write_bytes(b"part")
    assert read(address) == records
    assert capfd.readouterr().err.count("fetching") == 2


def test_a_network_that_fails_is_one_sentence(bucket):
    BucketFileSystem.failures += [OSError(errno.EIO, os.strerror(errno.EIO))] * 3
    with pytest.raises(UserError, match="cannot be read .Input/output error.; check its name"):
        read(f"bucket://{bucket}")


def test_one_host_of_several_uploads(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert len(read(f"bucket://{tmp_path}/data")) == 4
    assert not (tmp_path / "data").exists() and "copying" not in capfd.readouterr().err

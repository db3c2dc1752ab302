"""Real tables of challenges, out of the package torchxrayvision, have the published counts."""

import gzip
import hashlib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from plan_jax.data.builders import rsna_pneumonia, siim_pneumothorax, vindr_cxr
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import count_leaks

TABLES = Path(__file__).resolve().parents[2] / ".cache/public_tables/torchxrayvision/data"


def hash_ids(items, split):
    """Returns how many images a split has, and the first digits of a hash of their sorted ids."""
    ids = sorted(item.image_id for item in items if item.split == split)
    return len(ids), hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("rule", "train", "val", "test"),
    [
        (
            "mgca_compat",
            (18_678, "fdea2323542c4f7d"),
            (4_003, "6279287fa3e3d1e3"),
            (4_003, "00eda73bce215e4b"),
        ),
        (
            "mgca_compat_boxes",
            (16_010, "3941bdb6a942688b"),
            (5_337, "93e72ac638814123"),
            (5_337, "e75061d168ffcae0"),
        ),
        # The lists that BenchX publishes.
        (
            "benchx",
            (18_678, "2a0ba3e7c1647b7d"),
            (4_003, "c7f941c6106c73f9"),
            (4_003, "a31992b6120e160b"),
        ),
    ],
)
def test_rsna_pneumonia(tmp_path, rule, train, val, test):
    zipfile.ZipFile(TABLES / "kaggle_stage_2_train_labels.csv.zip").extractall(tmp_path)
    config = rsna_pneumonia.RsnaPneumoniaConfig(name="", split=rule)
    source = SourceFolder(tmp_path)
    items = list(rsna_pneumonia.read_items(source, config))
    assert not source.dropped
    assert len(items) == 26_684
    assert sum(item.labels["Pneumonia"] for item in items) == 6_012
    assert Counter(len(item.boxes) for item in items) == {
        0: 20_672,
        1: 2_614,
        2: 3_266,
        3: 119,
        4: 13,
    }
    assert max(max(box.corners) for item in items for box in item.boxes) <= 1024
    assert [hash_ids(items, split) for split in ("train", "val", "test")] == [train, val, test]
    first = {"mgca_compat": "f2698fda", "mgca_compat_boxes": "ab1131b2", "benchx": "37541ec6"}[rule]
    assert any(item.image_id.startswith(first) for item in items if item.split == "test")


@pytest.mark.parametrize("rule", ["hash", "mgca_compat"])
def test_siim_pneumothorax(tmp_path, rule):
    packed = TABLES / "siim-pneumothorax-train-rle.csv.gz"
    (tmp_path / "train-rle.csv").write_bytes(gzip.decompress(packed.read_bytes()))
    source = SourceFolder(tmp_path)
    config = siim_pneumothorax.SiimPneumothoraxConfig(name="", split=rule)
    items = list(siim_pneumothorax.read_items(source, config))
    assert not source.dropped and not source.notes
    assert len({item.patient_id for item in items}) == 12_047
    assert len({item.patient_id for item in items if item.shapes}) == 2_669
    assert sum(len(item.shapes) for item in items) == 3_576
    if rule == "hash":
        assert len(items) == 12_047
        assert sum(len(item.shapes) > 1 for item in items) == 624
    else:
        sizes = Counter(item.split for item in items)
        assert sizes == {"train": 8_578, "val": 1_910, "test": 1_903}
        leaks = count_leaks([(item.patient_id, item.split) for item in items])
        assert leaks == {"val": 161, "test": 154}


def test_vindr_cxr(tmp_path):
    packed = TABLES / "vinbigdata-train.csv.gz"
    (tmp_path / "train.csv").write_bytes(gzip.decompress(packed.read_bytes()))
    source = SourceFolder(tmp_path)
    config = vindr_cxr.VindrCxrConfig(name="", min_readers=1, fuse_boxes=False)
    items = list(vindr_cxr.read_items(source, config))
    assert not source.dropped
    assert len(items) == 15_000
    assert sum(len(item.boxes) for item in items) == 67_914 - 31_818  # rows with a finding
    counts = [sum(item.labels[name] for item in items) for name in vindr_cxr.KAGGLE_FINDINGS]
    assert counts == [
        *(3_067, 186, 452, 2_300, 353, 386, 613, 1_322, 826, 1_134, 1_032, 1_981, 96, 1_617),
        10_606,
    ]
    assert sum(bool(item.boxes) for item in items) == 4_394

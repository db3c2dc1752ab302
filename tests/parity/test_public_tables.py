"""Real tables of public datasets, out of the package torchxrayvision, have the published counts."""

import csv
import gzip
import shutil
from collections import Counter
from pathlib import Path

from plan_jax.data.builders import nih_cxr14, openi
from plan_jax.data.public.source_folder import SourceFolder

TABLES = Path(__file__).resolve().parents[2] / ".cache/public_tables/torchxrayvision/data"


def make_source(folder, *names):
    """Returns a source folder with some of the tables, without images."""
    for name in names:
        shutil.copy(TABLES / name, folder)
    return SourceFolder(folder)


def test_nih_cxr14(tmp_path):
    source = make_source(tmp_path, "Data_Entry_2017_v2020.csv.gz", "BBox_List_2017.csv.gz")
    items = list(nih_cxr14.read_items(source, nih_cxr14.NihCxr14Config(name="")))
    assert not source.dropped
    boxes = [(item, box) for item in items for box in item.boxes]
    assert nih_cxr14.FACTS.counts == {
        "images": len(items),
        "patients": len({item.patient_id for item in items}),
        "boxes": len(boxes),
    }
    assert Counter(item.view for item in items) == {"PA": 67_310, "AP": 44_810}
    counts = [sum(item.labels[name] for item in items) for name in nih_cxr14.FINDINGS]
    assert counts == [
        *(11_559, 2_776, 4_667, 2_303, 13_317, 2_516, 1_686, 227, 19_894, 5_782, 6_331, 3_385),
        *(1_431, 5_302),
    ]
    assert sum(not any(item.labels.values()) for item in items) == 60_361
    assert len({item.image_id for item, _ in boxes}) == 880
    assert Counter(box.label for _, box in boxes) == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    assert max(max(box.corners) for _, box in boxes) <= 1024


def test_openi(tmp_path):
    source = make_source(tmp_path, "NLMCXR_reports.tgz")
    items = list(openi.read_items(source, openi.OpeniConfig(name="")))
    counts = {reason: len(names) for reason, names in source.dropped.items()}
    assert counts == {
        "a report has no image": 104,
        "a report has neither findings nor impression": 25,
    }
    reports = {item.patient_id for item in items}
    assert len(reports) + sum(counts.values()) == openi.FACTS.counts["reports"]
    # The headers of all DICOM files but one, whose names differ from those in the reports.
    with gzip.open(TABLES / "nlmcxr_dicom_metadata.csv.gz", "rt") as lines:
        films = {row["imageid"] for row in csv.DictReader(lines)}
    names = {item.image_id for item in items}
    assert len(names) == len(items) == 7430
    assert len(films) == 7469 and names - films == {"CXR1000_IM-0003-1001"}
    assert len(films - names) == 40  # of the reports without text

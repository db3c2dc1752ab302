"""Real tables of public datasets, out of the package torchxrayvision, have the published counts."""

import csv
import gzip
import shutil
from collections import Counter
from pathlib import Path

from plan_jax.data.builders import chexpert, nih_cxr14, openi, padchest
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


def test_chexpert(tmp_path):
    shutil.copy(TABLES / "chexpert_train.csv.gz", tmp_path / "train.csv.gz")
    source = SourceFolder(tmp_path)
    items = list(chexpert.read_items(source, chexpert.ChexpertConfig(name="", val_fraction=0.0)))
    assert not source.dropped
    assert len(items) == 223_414
    assert len({item.patient_id for item in items}) == 64_540
    assert len({item.study_id for item in items}) == 187_641
    assert Counter(item.view for item in items) == {
        **{"AP": 161_590, "PA": 29_420, "FRONTAL": 17, "LATERAL": 32_387}
    }
    # MGCA's code, run on this table with pandas: sizes, overlap and patients that are shared.
    pools = {"Atelectasis": 1_087, "Cardiomegaly": 1_034, "Consolidation": 537, "Edema": 2_257}
    rows = list(chexpert._read_rows(source, "train", "train.csv.gz", {}))
    sizes = list(map(len, chexpert._pools(rows, chexpert.COMPETITION, ignored=("No Finding",))))
    assert sizes == [*pools.values(), 2_425]
    splits_of = chexpert._select_mgca(rows)
    val = {path for path, splits in splits_of.items() if "val" in splits}
    train = {path for path, splits in splits_of.items() if "train" in splits}
    patients = {path.split("/")[1] for path in train}
    assert (len(val), len(train), len(val & train)) == (5_000, 217_433, 4_907)
    assert sum(path.split("/")[1] in patients for path in val) == 4_990
    test = list(chexpert._select_5x200(rows))
    assert len(test) == 1_000 and len({path.split("/")[1] for path in test}) == 969
    assert sum(path.split("/")[1] in patients for path in test) == 828
    assert Counter(split for (split,) in chexpert._select_8x200(rows).values()) == {
        **{"test": 1_600, "val": 80}
    }


def test_padchest(tmp_path):
    table = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    source = make_source(tmp_path, table)
    rows = list(source.read_csv(table, ("Projection", "StudyID", "PatientID", "Labels")))
    assert padchest.FACTS.counts == {
        "images": len(rows),
        "patients": len({row["PatientID"] for row in rows}),
        "studies": len({row["StudyID"] for row in rows}),
    }
    names = Counter(
        name for row in rows for name in set(padchest.parse_list(row["Labels"])) if name
    )
    others = {"exclude", *padchest.NOT_FINDINGS}
    assert set(padchest.FINDINGS) == set(names) - others
    assert (names["normal"], names["unchanged"], names["exclude"]) == (50_616, 14_334, 1_312)
    views, depths, num_unknown = Counter[str](), Counter[int](), 0
    for item in padchest.read_items(source, padchest.PadchestConfig(name="", keep_evaluated=True)):
        views[item.view] += 1
        depths[item.bit_depth] += 1
        num_unknown += not item.labels
    assert views == {"PA": 90_915, "LATERAL": 49_251, "AP": 18_745, "OTHER": 619, "UNKNOWN": 8}
    assert depths == {12: 142_897, 10: 16_641} and num_unknown == 5_018
    assert len(source.dropped["PadChest excludes it"]) == len(rows) - views.total() == 1_323
    assert not source.notes

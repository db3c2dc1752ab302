"""Miniatures of VinDr-CXR: tables of PhysioNet and Kaggle, and films of several encodings."""

import numpy as np
from radiographs import make_dicom, make_jpeg2000_dicom

ROWS, COLUMNS = 64, 56
LOCAL = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture"),
    *("Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity"),
    *("Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"),
)
GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding")
NORMAL = "21a10246a5ec7af151081d0cd6d65dc9"
ABNORMAL = "9a5094b2563a1ef3ff50dc5c7ff71345"
SINGLE = "051132a778e61a86eb147c7c6f564dfe"
TEST = "002a34c58c5b758217ed1f584ccbcfe9"
BROKEN = "50a418190bc3fb1ef1633bf9678929b3"  # a download that was cut off
# Image -> reader -> rows (class, box or None).
READINGS = {
    NORMAL: {reader: [("No finding", None)] for reader in ("R1", "R2", "R3")},
    ABNORMAL: {
        "R8": [("Cardiomegaly", (10, 30, 40, 50)), ("Pneumonia", None)],
        "R9": [("Cardiomegaly", (12, 30, 42, 52)), ("Nodule/Mass", (2, 4, 12, 14))],
        "R10": [("Cardiomegaly", (44, 2, 54, 12)), ("Pneumonia", None)],
    },
    SINGLE: {
        "R8": [("No finding", None)],
        "R9": [("No finding", None)],
        "R17": [("ILD", (5, 5, 45, 60))],
    },
    BROKEN: {reader: [("No finding", None)] for reader in ("R1", "R2", "R3")},
}
TEST_ROWS = [("Lung Opacity", (6, 8, 26, 28)), ("Other diseases", None)]


def draw_film():
    """Returns a film of 12 bits, dark at the top."""
    return np.add.outer(np.arange(ROWS) * 40, np.arange(COLUMNS) * 20).astype(np.uint16)


def write_films(folder):
    """Writes films of several encodings: all show the same."""
    film, part = draw_film(), {"train": folder / "train", "test": folder / "test"}
    for path in part.values():
        path.mkdir(parents=True)
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12}
    implicit = "1.2.840.10008.1.2"
    files = {
        part["train"] / NORMAL: make_dicom(film, implicit, BitsStored=12),
        part["train"] / ABNORMAL: make_dicom(4095 - film, **inverted),
        part["train"] / SINGLE: make_jpeg2000_dicom(film, BitsStored=12),
        part["test"] / TEST: make_dicom(film, BitsStored=12),
        part["train"] / BROKEN: make_dicom(film, BitsStored=12)[:300],
    }
    for path, data in files.items():
        path.with_suffix(".dicom").write_bytes(data)


def write_labels(path, readers, last="Other diseases"):
    """Writes a table with a column for each finding; `readers`: image, reader, findings."""
    names = [last if name == "Other diseases" else name for name in (*LOCAL, *GLOBAL)]
    has_reader = any(reader for _, reader, _ in readers)
    lines = [",".join(["image_id", *["rad_id"] * has_reader, *names])]
    for image_id, reader, findings in readers:
        cells = [str(int(name in findings)) for name in (*LOCAL, *GLOBAL)]
        lines.append(",".join([image_id, *[reader] * has_reader, *cells]))
    path.write_text("\n".join(lines) + "\n")


def write_physionet(folder, labels=True, films=True):
    """Writes the tables of PhysioNet, and the films."""
    tables = folder / "annotations"
    tables.mkdir(parents=True)
    lines = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
    for image_id, readers in READINGS.items():
        for reader, rows in readers.items():
            for name, box in rows:
                lines.append(",".join([image_id, reader, name, *map(str, box or [""] * 4)]))
    (tables / "annotations_train.csv").write_text("\n".join(lines))
    lines = ["image_id,class_name,x_min,y_min,x_max,y_max"]
    for name, box in TEST_ROWS:
        name = "Other disease" if name == "Other diseases" else name
        lines.append(",".join([TEST, name, *map(str, box or [""] * 4)]))
    (tables / "annotations_test.csv").write_text("\n".join(lines))
    if labels:
        readers = [
            (image_id, reader, {name for name, _ in rows})
            for image_id, readings in READINGS.items()
            for reader, rows in readings.items()
        ]
        write_labels(tables / "image_labels_train.csv", readers)
        test = [(TEST, "", {name for name, _ in TEST_ROWS})]
        write_labels(tables / "image_labels_test.csv", test, "Other disease")
    if films:
        write_films(folder)


def write_kaggle(folder):
    """Writes Kaggle's table, which has the classes with boxes only."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for image_id, readers in READINGS.items():
        for reader, rows in readers.items():
            for name, box in rows:
                if name == "No finding" or box:
                    cells = map(str, map(float, box)) if box else [""] * 4
                    lines.append(",".join([image_id, name, "0", reader, *cells]))
    (folder / "train.csv").write_text("\n".join(lines))

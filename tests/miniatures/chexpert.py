"""CheXpert with ten films of six patients in train, three in valid and four in test."""

import csv
import io
import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

LABELS = [
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
]
# The files of the radiologists have Lung Lesion before Lung Opacity.
TEST_LABELS = [*LABELS[:3], "Lung Lesion", "Lung Opacity", *LABELS[5:]]
# Path, sex, age, plane, projection, labels that are not blank.
TRAIN = (
    ("train/patient00001/study1/view1_frontal.jpg", "Female", 68, "Frontal", "AP", "No Finding=1"),
    ("train/patient00002/study1/view1_frontal.jpg", "Female", 87, "Frontal", "AP", "Edema=-1"),
    ("train/patient00002/study2/view1_frontal.jpg", "Female", 87, "Frontal", "AP", "Edema=1"),
    ("train/patient00002/study2/view2_lateral.jpg", "Female", 87, "Lateral", "", "Edema=1"),
    ("train/patient00002/study2/view3_lateral.jpg", "Female", 87, "Lateral", "", "Edema=1"),
    ("train/patient00003/study1/view1_lateral.jpg", "Male", 90, "Lateral", "", "Fracture=1"),
    ("train/patient00003/study1/view2_frontal.jpg", "Male", 90, "Frontal", "PA", "Fracture=1"),
    ("train/patient00004/study1/view1_frontal.jpg", "Male", 0, "Frontal", "LL", "Edema=0"),
    (
        *("train/patient33093/study1/view1_frontal.jpg", "Unknown", 40, "Frontal", "PA"),
        "Pleural Effusion=1;Edema=0;Pneumonia=-1",
    ),
    (
        *("train/patient00005/study1/view1_frontal.jpg", "Male", 30, "Frontal", "PA"),
        "Pleural Effusion=1;Edema=0",
    ),
)
VALID = (
    ("valid/patient64541/study1/view1_frontal.jpg", "Male", 73, "Frontal", "AP", "Edema=1"),
    ("valid/patient64542/study1/view1_frontal.jpg", "Male", 70, "Frontal", "PA", "No Finding=1"),
    ("valid/patient64542/study1/view2_lateral.jpg", "Male", 70, "Lateral", "", "No Finding=1"),
)
TEST = (
    ("test/patient64741/study1/view1_frontal.jpg", "Lung Opacity=1;Atelectasis=1"),
    ("test/patient64741/study1/view2_lateral.jpg", "Lung Opacity=1;Atelectasis=1"),
    ("test/patient64742/study1/view1_lateral.jpg", "Lung Lesion=1"),
    ("test/patient64742/study1/view2_frontal.jpg", "Lung Lesion=1"),
)
MASKED = "patient64741_study1_view1_frontal"
SHAPE = (40, 48)  # rows and columns of the full images
BATCHES = {
    1: "CheXpert-v1.0 batch 1 (validate & csv)",
    2: "CheXpert-v1.0 batch 2 (train 1)",
    3: "CheXpert-v1.0 batch 3 (train 2)",
}


def write(folder, layout="small", test="groundtruth", masks=True):
    """Writes the dataset as it is downloaded, and returns its masks by film and finding.

    Args:
      folder: an empty folder.
      layout: `full`, `small` (half the size), `bare` (without the folder of the dataset),
        `inside` (train.csv in train/), `batches` (of the full download).
      test: `groundtruth` or `test_labels`, the table of labels; "": there is no test set.
      masks: whether there are those of CheXlocalize.
    """
    root = {"full": "CheXpert-v1.0", "small": "CheXpert-v1.0-small", "inside": "CheXpert-v1.0"}
    root = root.get(layout, "")
    prefix = "CheXpert-v1.0-small" if layout == "small" else "CheXpert-v1.0"
    shape = (20, 24) if layout == "small" else SHAPE
    for number, (path, *_) in enumerate((*TRAIN, *VALID)):
        if layout == "batches":
            part, _, rest = path.partition("/")
            batch = 1 if part == "valid" else 2 + number % 2
            # A patient is in one batch.
            batch = 2 if "patient00002" in path or "patient00003" in path else batch
            path = f"{BATCHES[batch]}/{path if part == 'valid' else rest}"
        draw(folder / root / path, shape)
    tables = folder / (BATCHES[1] if layout == "batches" else root)
    train = tables / "train" if layout == "inside" else tables
    _write_table(train / "train.csv", prefix, TRAIN)
    _write_table(tables / "valid.csv", prefix, VALID, blank="0.0")
    if test:
        _write_test(folder, test)
    return _write_masks(folder) if masks else {}


def draw(path, shape):
    """Writes a film with one bright half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(shape, 60, np.uint8)
    pixels[:, : shape[1] // 2] = 200
    Image.fromarray(pixels).save(path)


def _cells(labels, names, blank):
    values = dict(label.split("=") for label in labels.split(";"))
    return [f"{values[name]}.0" if name in values else blank for name in names]


def _write_table(path, prefix, rows, blank=""):
    lines = [f"Path,Sex,Age,Frontal/Lateral,AP/PA,{','.join(LABELS)}"]
    for film, sex, age, plane, projection, labels in rows:
        cells = [f"{prefix}/{film}", sex, age, plane, projection, *_cells(labels, LABELS, blank)]
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")


def _write_test(folder, table):
    """Writes the test films as CheXlocalize has them, and one of both tables of labels."""
    for path, _ in TEST:
        draw(folder / "CheXlocalize" / "CheXpert" / path, SHAPE)
    if table == "test_labels":
        lines = [["Path", *TEST_LABELS]]
        lines += [[path, *_cells(labels, TEST_LABELS, "0.0")] for path, labels in TEST]
        target = folder / "CheXlocalize/CheXpert/test_labels.csv"
    else:
        lines = [["Study", *TEST_LABELS]]
        lines += [
            [f"CheXpert-v1.0/{path.rpartition('/')[0]}", *_cells(labels, TEST_LABELS, "0.0")]
            for path, labels in TEST[::2]
        ]
        target = folder / "groundtruth.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    target.write_text(text.getvalue().rstrip("\n"))


def _write_masks(folder):
    """Writes the masks of one test film and of one of valid; those of absent findings are empty."""
    opacity, edema = (np.zeros(SHAPE, np.uint8, order="F") for _ in range(2))
    opacity[8:24, 12:36] = 1
    edema[30:38, 2:10] = 1
    masks = {
        "test": {MASKED: {"Airspace Opacity": opacity, "Edema": 0 * edema}},
        "val": {"patient64541_study1_view1_frontal": {"Edema": edema}},
    }
    (folder / "CheXlocalize").mkdir(exist_ok=True)
    for part, films in masks.items():
        content = {
            film: {name: _encode(mask) for name, mask in entry.items()}
            for film, entry in films.items()
        }
        (folder / f"CheXlocalize/gt_segmentations_{part}.json").write_text(json.dumps(content))
    return {film: entry for films in masks.values() for film, entry in films.items()}


def _encode(mask):
    runs = coco.encode(np.asfortranarray(mask))
    return {"size": runs["size"], "counts": runs["counts"].decode()}

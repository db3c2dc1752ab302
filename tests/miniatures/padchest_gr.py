"""PadChest-GR with four films of three patients, and a report that the master table lacks."""

import csv
import io
import json
import zipfile

import numpy as np
from PIL import Image

SHAPE = (64, 48)
BOX = (0.25, 0.5, 0.75, 1.0)  # bright in the first film
REPORTS = [
    {
        "StudyID": "s1",
        "ImageID": "1_a.png",
        "findings": [
            {
                "sentence_en": "Pleural effusion on the left",
                "sentence_es": "Derrame pleural izquierdo.",
                "abnormal": True,
                "boxes": [list(BOX)],
                "extra_boxes": [[0.2, 0.5, 0.75, 1.0]],
                "labels": ["pleural effusion", "loculated pleural effusion"],
                "locations": ["left"],
                "progression": None,
            },
            # A normal sentence lacks the other entries.
            {
                "sentence_en": "The heart is normal.",
                "sentence_es": "Corazon normal.",
                "abnormal": False,
            },
        ],
    },
    {
        "StudyID": "s2",
        "ImageID": "1_b.png",
        "findings": [
            {
                "sentence_en": "Nodules in both lungs.",
                "sentence_es": "Nodulos bilaterales.",
                "abnormal": True,
                "boxes": [[0.1, 0.1, 0.2, 0.2], [0.6, 0.1, 0.7, 0.2], [0.1, 0.1, None, 0.2]],
                "extra_boxes": [],
                "labels": ["nodule"],
                "locations": [],
            }
        ],
    },
    {"StudyID": "s3", "ImageID": "2_a.png", "findings": []},
    {"StudyID": "s4", "ImageID": "3_a.png", "findings": []},
    {"StudyID": "s9", "ImageID": "9_a.png", "findings": []},
]
# Study, image, patient, split, label group, projection.
ROWS = (
    ("s1", "1_a.png", "11", "test", "Pleural effusion", "PA"),
    ("s1", "1_a.png", "11", "test", "Loculated effusion", "PA"),
    ("s2", "1_b.png", "11", "test", "Nodule", "AP"),
    ("s3", "2_a.png", "22", "validation", "", "PA"),
    ("s4", "3_a.png", "33", "train", "", "PA"),
)


def write(folder, layout="unpacked", table="csv"):
    """Writes the dataset as it is downloaded.

    Args:
      folder: an empty folder.
      layout: `unpacked`, or `parts` of the archive of the images.
      table: `csv`, or `zip`.
    """
    folder.mkdir(exist_ok=True)
    (folder / "grounded_reports_20240819.json").write_text(json.dumps(REPORTS))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["StudyID", "ImageID", "PatientID", "split", "label_group", "Projection"])
    writer.writerows(ROWS)
    if table == "zip":
        with zipfile.ZipFile(folder / "master_table.csv.zip", "w") as archive:
            archive.writestr("master_table.csv", text.getvalue())
    else:
        (folder / "master_table.csv").write_text(text.getvalue())
    images = folder / "Padchest_GR_files"
    images.mkdir()
    if layout == "parts":
        for number in (1, 2):
            (images / f"PadChest_GR.zip.{number:03d}").write_bytes(b"PK")
        return
    (images / "PadChest_GR").mkdir()
    for report in REPORTS:
        draw().save(images / "PadChest_GR" / report["ImageID"])


def draw():
    """Returns a film of 16 bits, of which twelve are used, with one bright box."""
    pixels = np.full(SHAPE, 1000, np.uint16)
    pixels[32:64, 12:36] = 4000
    return Image.fromarray(pixels)

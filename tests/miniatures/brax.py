"""A miniature of BRAX 1.0.0 and 1.1.0."""

import csv

import numpy as np
from PIL import Image

LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
# patient, accession number, view, rows, columns, labels; two patients share an accession number
IMAGES = (
    ("100", "7", "PA", 40, 50, {"Cardiomegaly": "1.0", "Edema": "-1.0", "Pneumonia": "0.0"}),
    ("100", "7", "L", 40, 50, {"Cardiomegaly": "1.0"}),
    ("200", "7", "AP LLD", 40, 50, {"No Finding": "1.0"}),
    ("300", "8", "", 50, 40, {}),
    ("400", "9", "RLO", 50, 40, {}),
    ("500", "9", "PA", 190, 10, {}),  # a strip
)


def write(folder, version="1.1.0"):
    """Writes the miniature; 1.0.0 has another name of the table.

    Returns:
      The paths of the images.
    """
    header = ["", "DicomPath", "PngPath", "PatientID", "PatientSex", "PatientAge"]
    header += ["AccessionNumber", "StudyDate", *LABELS]
    header += ["ViewPosition", "Rows", "Columns", "Manufacturer"]
    paths, rows = [], [header]
    for number, (patient, accession, view, height, width, labels) in enumerate(IMAGES):
        name = f"id_{patient}/Study_1.{accession}/Series_1.{number}/image-1.2.{number}"
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((height, width), 30 * number, np.uint8)).save(path)
        cells = [number, f"Anonymized_DICOMs/{name}.dcm", f"images/{name}.png", patient, "F"]
        cells += ["85 or more", accession, "20100101"]
        cells += [labels.get(label, "") for label in LABELS]
        rows.append([*cells, view, height, width, "AGFA"])
        paths.append(f"images/{name}.png")
    suffix = "_update" if version == "1.1.0" else ""
    with (folder / f"master_spreadsheet{suffix}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return paths

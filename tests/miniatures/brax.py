"""A miniature of BRAX 1.0.0 and 1.1.0."""

import csv

import numpy as np
from PIL import Image
from radiographs import make_dicom

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


def draw(number):
    """Returns a film: a bright square on a grey that is its own."""
    _, _, _, rows, columns, _ = IMAGES[number]
    image = np.full((rows, columns), 30 * number, np.uint8)
    image[8:24, :8] = 255
    return image


def write(folder, version="1.1.0", dicom=False):
    """Writes the miniature; 1.0.0 has another name of the table, and DICOM without a suffix.

    Args:
      folder: where to.
      version: 1.0.0 or 1.1.0.
      dicom: whether the films are DICOM of 12 bits, half of them inverted, instead of PNG.

    Returns:
      The paths of the images.
    """
    header = ["", "DicomPath", "PngPath", "PatientID", "PatientSex", "PatientAge"]
    header += ["AccessionNumber", "StudyDate", *LABELS]
    header += ["ViewPosition", "Rows", "Columns", "Manufacturer"]
    paths, rows = [], [header]
    for number, (patient, accession, view, height, width, labels) in enumerate(IMAGES):
        name = f"id_{patient}/Study_1.{accession}/Series_1.{number}/image-1.2.{number}"
        suffix = ".dcm" if version == "1.1.0" else ""
        place = f"Anonymized_DICOMs/{name}{suffix}" if dicom else f"images/{name}.png"
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if dicom:
            stored = np.round(draw(number) / 255 * 4095).astype(np.uint16)
            kinds = ("MONOCHROME2", "MONOCHROME1")
            elements = {"BitsStored": 12, "PhotometricInterpretation": kinds[number % 2]}
            stored = 4095 - stored if number % 2 else stored
            path.write_bytes(make_dicom(stored, **elements))
        else:
            Image.fromarray(draw(number)).save(path)
        cells = [number, f"Anonymized_DICOMs/{name}.dcm", f"images/{name}.png", patient, "F"]
        cells += ["85 or more", accession, "20100101"]
        cells += [labels.get(label, "") for label in LABELS]
        rows.append([*cells, view, height, width, "AGFA"])
        paths.append(place)
    suffix = "_update" if version == "1.1.0" else ""
    with (folder / f"master_spreadsheet{suffix}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return paths

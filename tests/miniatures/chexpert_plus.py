"""CheXpert Plus with six films of four patients, whose texts are inventions."""

import csv
import io
import json

import numpy as np
import pydicom
from PIL import Image
from radiographs import make_dicom

COLUMNS = [
    *("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id"),
    *("patient_report_date_order", "report", "section_narrative", "section_clinical_history"),
    *("section_history", "section_comparison", "section_technique", "section_procedure_comments"),
    *("section_findings", "section_impression", "section_end_of_impression", "section_summary"),
    *("section_accession_number", "age", "sex", "race", "ethnicity", "interpreter_needed"),
    *("insurance_type", "recent_bmi", "deceased", "split"),
]
FINDINGS = "\nNO EFFUSION.\\nHEART IS NORMAL."
# Film, plane, projection, findings, impression, split. Of study1 of patient00002, the second film
# has another date in its copy of the report, and comes first in the table.
ROWS = (
    (
        "train/patient00001/study1/view1_frontal.jpg",
        "Frontal",
        "AP",
        FINDINGS,
        "1. CLEAR.",
        "train",
    ),
    (
        *("train/patient00002/study1/view2_lateral.jpg", "Lateral", ""),
        *("", "STABLE SINCE 2/2/2002.", "train"),
    ),
    (
        *("train/patient00002/study1/view1_frontal.jpg", "Frontal", "PA"),
        *("", "STABLE SINCE 1/1/2001.", "train"),
    ),
    ("train/patient00003/study2/view1_frontal.jpg", "Frontal", "AP", "EDEMA, MILD.", "", "train"),
    ("train/patient00003/study3/view1_frontal.jpg", "Frontal", "AP", "EDEMA.", "", "train"),
    ("valid/patient64541/study1/view1_frontal.jpg", "Frontal", "PA", "", "NO CHANGE.", "valid"),
)
LABELS = {
    "train/patient00001/study1/view1_frontal.jpg": {"Pleural Effusion": 0.0, "Edema": None},
    "train/patient00003/study2/view1_frontal.jpg": {"Edema": 1.0, "Pneumonia": -1.0},
}
SHAPE = (40, 48)


def write(folder, layout="png", labels=True):
    """Writes the dataset as it is downloaded.

    Args:
      folder: an empty folder.
      layout: `png`, `dcm` (some files lack HighBit) or `jpg`, those of CheXpert.
      labels: whether there are those of CheXbert.
    """
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for number, (path, plane, projection, findings, impression, split) in enumerate(ROWS):
        writer.writerow(
            {
                "path_to_image": path,
                "path_to_dcm": path.replace(".jpg", ".dcm"),
                "frontal_lateral": plane,
                "ap_pa": projection,
                "deid_patient_id": path.split("/")[1],
                "report": f"\nNARRATIVE:\n{findings}\n{impression}",
                "section_findings": findings,
                "section_impression": impression,
                "section_end_of_impression": "END",
                "section_accession_number": "12345",
                "split": split,
            }
        )
        _draw(folder, path.removesuffix(".jpg"), layout, lacks_high_bit=number % 2 == 0)
    (folder / "df_chexpert_plus_240401.csv").write_text(text.getvalue())
    if labels:
        (folder / "chexbert_labels").mkdir()
        lines = [json.dumps({"path_to_image": film, **row}) for film, row in LABELS.items()]
        (folder / "chexbert_labels/report_fixed.json").write_text("\n".join(lines))


def _draw(folder, stem, layout, lacks_high_bit):
    root = {"png": "PNG", "dcm": "DICOM/Uncompressed", "jpg": "CheXpert-v1.0"}[layout]
    path = folder / root / f"{stem}.{layout}"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(SHAPE, 60, np.uint8)
    pixels[:, : SHAPE[1] // 2] = 200
    if layout != "dcm":
        Image.fromarray(pixels).save(path)
        return
    content = make_dicom(pixels.astype(np.uint16) * 16, BitsStored=12)
    if lacks_high_bit:
        dataset = pydicom.dcmread(io.BytesIO(content))
        del dataset.HighBit
        dataset.save_as(path)
    else:
        path.write_bytes(content)
    (path.parent / ".azDownload-1.dcm").write_bytes(b"")

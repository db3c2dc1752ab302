"""ReXGradient-160K with five studies of four patients."""

import json

import numpy as np
from PIL import Image

SHAPE = (50, 40)
# Split, study, patient, names of images, their views, and the four sections.
STUDIES = (
    ("train", "S1", "GRDN01", ("1.1", "1.2"), ("PA", "LL"), ("Cough", "None", "Clear.", "Normal.")),
    ("train", "S2", "GRDN01", ("2.1",), ("POSTERO_ANTERIOR",), (None, "", "No effusion.", "")),
    ("train", "S3", "GRDN02", ("3.1", "3.2"), ("AP", None), ("", "", "", "Edema.")),
    ("valid", "S4", "GRDN03", ("4.1",), ("UNKNOWN",), ("Pain", "", "Clear.", "Normal.")),
    ("test", "S5", "GRDN04", ("5.1", "5.2"), ("LATERAL", "N/A"), ("", "", "Nodule.", "Nodule.")),
)
VIEWS = {
    "1.1": "PA",
    "1.2": "LATERAL",
    "2.1": "PA",
    "3.1": "AP",
    "3.2": "UNKNOWN",
    "4.1": "UNKNOWN",
    "5.1": "LATERAL",
    "5.2": "UNKNOWN",
}
SECTIONS = ("Indication", "Comparison", "Findings", "Impression")


def write(folder, images=True, snake_case=False, studies=STUDIES):
    """Writes the metadata and the unpacked images; keys may be spelled in two ways."""
    (folder / "metadata").mkdir()
    for split in ("train", "valid", "test"):
        content = {}
        for other, study, patient, names, views, texts in studies:
            if other != split:
                continue
            paths = [f"../deid_png/{_place(patient, study, name)}" for name in names]
            entry = {
                "PatientID": patient,
                "AccessionNumber": f"A{study}",
                "StudyInstanceUid": study,
                "PatientSex": "M",
                "PatientAge": "007Y",
                "ImagePath": paths,
                "ImageViewPosition": list(views),
                **dict(zip(SECTIONS, texts, strict=True)),
            }
            if snake_case:
                names_of = {"ImagePath": "image_path", "Findings": "findings"}
                entry = {names_of.get(key, key): value for key, value in entry.items()}
            content[study] = entry
        (folder / f"metadata/{split}_metadata_view_position.json").write_text(json.dumps(content))
        (folder / f"metadata/{split}_metadata.csv").write_text("id,Findings\n")
    for _, study, patient, names, _, _ in studies if images else ():
        for name in names:
            path = folder / "deid_png" / _place(patient, study, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(SHAPE, 60, np.uint8)).save(path)


def _place(patient, study, name):
    return f"{patient}/A{study}/studies/{study}/series/1/instances/{name}.png"

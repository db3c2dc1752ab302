"""A miniature of MIMIC-CXR-JPG 2.0.0 and 2.1.0, and of the reports of MIMIC-CXR."""

import csv
import gzip
import zipfile
from dataclasses import dataclass

import numpy as np
from PIL import Image

ROWS, COLUMNS = 60, 48
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum"),
    *("Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion"),
    *("Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
)
MS_CXR_PATIENT, GOLD_PATIENT = "12000003", "15000006"
TITLE = " " * 33 + "FINAL REPORT\n"
TWO_SECTIONS = (
    f"{TITLE} EXAMINATION:  CHEST (PA AND LAT)\n \n FINDINGS:  The left base is hazy.\n"
    " No pneumothorax.\n \n IMPRESSION:\n \n Left basal ___ opacity.\n"
)
ADDENDUM = (
    f"{TITLE} ADDENDUM:  The catheter ends in the SVC.\n _________________________\n"
    f"{TITLE} FINDINGS:  Clear lungs.\n"
)
TWO_IMPRESSIONS = f"{TITLE} IMPRESSION:  First reading.\n \n IMPRESSION:  Second reading.\n"
WITHOUT_HEADER = f"{TITLE} The heart is large.\n \n No effusion.\n"
# study -> patient, split, views of its images, its labels by name (None: no row), its report
STUDIES = {
    "50000001": (
        *("10000001", "train", ("PA", "AP", "LATERAL")),
        *({"Lung Opacity": "1.0", "Pneumonia": "-1.0", "Pneumothorax": "0.0"}, TWO_SECTIONS),
    ),
    "50000002": ("10000001", "train", ("LL",), {}, f"{TITLE} IMPRESSION:  No change.\n"),
    "50000003": ("11000002", "train", ("",), {"No Finding": "1.0"}, ADDENDUM),
    "50000004": (MS_CXR_PATIENT, "train", ("AP",), {"Edema": "1.0"}, None),
    "50000005": ("13000004", "validate", ("PA",), None, TWO_IMPRESSIONS),
    "50000006": ("14000005", "test", ("AP",), {"Cardiomegaly": "1.0"}, WITHOUT_HEADER),
    "50000007": (GOLD_PATIENT, "train", ("PA",), {"Edema": "0.0"}, f"{TITLE} FINDINGS:  Clear.\n"),
    "50000008": ("16000007", "train", ("AP",), {"Edema": "1.0"}, f"{TITLE} FINDINGS:  Wet.\n"),
    "50000009": ("17000008", "train", ("AP AXIAL",), {}, f"{TITLE} FINDINGS:  Turned.\n"),
}
TRUNCATED = "50000008"  # the study whose image is cut off


@dataclass(frozen=True)
class Film:
    """An image as the tables describe it."""

    dicom_id: str
    study_id: str
    patient_id: str
    split: str
    view: str

    @property
    def path(self):
        """Returns the path below the folder of the tables."""
        folder = f"files/p{self.patient_id[:2]}/p{self.patient_id}/s{self.study_id}"
        return f"{folder}/{self.dicom_id}.jpg"


def name_image(study_id, number):
    """Returns an id of five groups of eight hexadecimal digits."""
    return "-".join(f"{int(study_id) * (group + 3) % 2**32 + number:08x}" for group in range(5))


FILMS = tuple(
    Film(name_image(study_id, number), study_id, patient_id, split, view)
    for study_id, (patient_id, split, views, _, _) in STUDIES.items()
    for number, view in enumerate(views)
)


def draw(film):
    """Returns the pixels of a film, UInt8[60 48]: a bright square on a grey that is its own."""
    image = np.full((ROWS, COLUMNS), 40 + 8 * FILMS.index(film), np.uint8)
    image[10:30, 8:24] = 220
    return image


def write(folder, version="2.0.0", reports="tree", packed=True, below=""):
    """Writes the miniature.

    Args:
      folder: where to.
      version: 2.0.0 or 2.1.0, which has two more files.
      reports: `tree` (beside the images), `zip` (beside the tables), `none`, or a path of their
        own: an archive if it ends in .zip, else a folder.
      packed: whether tables are packed with gzip.
      below: path of the tables and images below the folder, as wget makes it.

    Returns:
      The films.
    """
    root = folder / below
    root.mkdir(parents=True, exist_ok=True)
    for film in FILMS:
        path = root / film.path
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "index.html").write_text("<html>litter</html>")
        Image.fromarray(draw(film)).save(path, quality=95)
        if film.study_id == TRUNCATED:
            path.write_bytes(path.read_bytes()[:-200])
    write_tables(root, FILMS, {study: row[3] for study, row in STUDIES.items()}, version, packed)
    texts = {
        f"p{patient[:2]}/p{patient}/s{study}.txt": text
        for study, (patient, _, _, _, text) in STUDIES.items()
        if text
    }
    if reports == "tree":
        write_texts(root / "files", texts)
    elif reports == "zip":
        write_archive(root / "mimic-cxr-reports.zip", texts)
    elif str(reports).endswith(".zip"):
        write_archive(reports, texts)
    elif reports != "none":
        write_texts(reports / "files", texts)
    return FILMS


def write_tables(root, films, labels, version="2.0.0", packed=True):
    """Writes the tables of films and of the labels of studies (None: a study without a row)."""
    header = (
        *("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription"),
        *("ViewPosition", "Rows", "Columns", "StudyDate", "StudyTime"),
        "ProcedureCodeSequence_CodeMeaning",
    )
    rows = [
        (
            *(film.dicom_id, film.patient_id, film.study_id, "CHEST (PA AND LAT)", film.view),
            *(ROWS, COLUMNS, 21800101, 80556.875, "CHEST (PA AND LAT)"),
        )
        for film in films
    ]
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv", [header, *rows], packed)
    rows = [(film.dicom_id, film.study_id, film.patient_id, film.split) for film in films]
    header = ("dicom_id", "study_id", "subject_id", "split")
    write_csv(root / "mimic-cxr-2.0.0-split.csv", [header, *rows], packed)
    patient_of = {film.study_id: film.patient_id for film in films}
    rows = [
        (patient_of[study], study, *(cells.get(name, "") for name in LABELS))
        for study, cells in labels.items()
        if cells is not None
    ]
    header = ("subject_id", "study_id", *LABELS)
    for labeller in ("chexpert", "negbio"):
        write_csv(root / f"mimic-cxr-2.0.0-{labeller}.csv", [header, *rows], packed)
    if version == "2.1.0":
        (root / "IMAGE_FILENAMES").write_text("\n".join(film.path for film in films))
        names = [("Airspace Opacity" if name == "Lung Opacity" else name) for name in LABELS]
        row = ("50000006", *("1.0" if name == "Airspace Opacity" else "0.0" for name in names))
        path = root / "mimic-cxr-2.1.0-test-set-labeled.csv"
        write_csv(path, [("study_id", *names), row], packed=False)


def write_csv(path, rows, packed=True):
    """Writes rows as CSV, or as .csv.gz."""
    if packed:
        with gzip.open(f"{path}.gz", "wt", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)


def write_texts(folder, texts):
    """Writes reports into their folders."""
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def write_archive(path, texts):
    """Writes reports into the archive that they are published as."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(f"files/{name}", text)

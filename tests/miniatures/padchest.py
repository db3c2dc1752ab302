"""PadChest with eight films of five patients: lists as text, 12 of 16 bits, damaged files."""

import csv
import io

import numpy as np
from PIL import Image

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = [
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth"),
    *("PatientSex_DICOM", "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric"),
    *("Modality_DICOM", "Manufacturer_DICOM", "PhotometricInterpretation_DICOM"),
    *("PixelRepresentation_DICOM", "PixelAspectRatio_DICOM", "SpatialResolution_DICOM"),
    *("BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM"),
    *("Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM"),
    *("ExposureTime", "RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels"),
    *("Localizations", "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS"),
]
PATIENT = "839860488694292331637988235681460987"  # more digits than a number has
# Image, folder, study, patient, projection, bits, method, labels, report.
ROWS = (
    ("1_a.png", "0", "s1", PATIENT, "PA", "12", "Physician", "['normal']", " sin hallazg ."),
    (
        *("1_b.png", "0", "s1", PATIENT, "L", "12", "Physician"),
        *("['pacemaker', ' cardiomegaly']", " marcapas . cardiomegali ."),
    ),
    ("2_a.png", "50", "s2", "22", "AP_horizontal", "10", "RNN_model", "['unchanged']", "nan"),
    ("2_b.png", "50", "s3", "22", "COSTAL", "12", "RNN_model", "['']", " cost ."),
    ("3_a.png", "54", "s4", "33", "EXCLUDE", "12", "RNN_model", "['normal']", " norm ."),
    ("3_b.png", "54", "s5", "33", "PA", "12", "RNN_model", "['exclude', 'pneumonia']", " neum ."),
    ("4_a.png", "54", "s6", "44", "UNK", "12", "Physician", "nan", " sin cambi ."),
    ("5_a.png", "54", "s7", "55", "AP", "12", "RNN_model", "[' pneumonia', 'martian']", " neum ."),
)
EMPTY = "5_a.png"  # its file has no bytes
SHAPE = (40, 32)


def write(folder, layout="folders", rows=ROWS):
    """Writes the dataset as it is downloaded.

    Args:
      folder: an empty folder.
      layout: `folders`, one for each archive; `flat`: all images in one folder; `archives`: they
        are not unpacked.
      rows: of the table, see `ROWS`.
    """
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, row in enumerate(rows):
        name, place, study, patient, projection, bits, method, labels, report = row
        cells = dict.fromkeys(COLUMNS, "None") | {
            "": number,
            "ImageID": name,
            "ImageDir": place,
            "StudyID": study,
            "PatientID": patient,
            "PatientBirth": "1930.0",
            "Projection": projection,
            "BitsStored_DICOM": bits,
            "Report": report,
            "MethodLabel": method,
            "Labels": labels,
            "labelCUIS": "['C0034069' 'C0742362']",
        }
        writer.writerow(cells[column] for column in COLUMNS)
        if layout == "archives":
            (folder / f"{place}.zip").write_bytes(b"PK")
            continue
        path = folder / ("images" if layout == "flat" else place) / name
        path.parent.mkdir(exist_ok=True)
        if name == EMPTY:
            path.write_bytes(b"")
        else:
            draw(int(bits)).save(path)
    (folder / TABLE).write_text(text.getvalue())


def draw(bits):
    """Returns a film of 16 bits, of which some are used: half black, half three quarters bright."""
    pixels = np.zeros(SHAPE, np.uint16)
    pixels[:, SHAPE[1] // 2 :] = 3 * 2 ** (bits - 2)
    return Image.fromarray(pixels)

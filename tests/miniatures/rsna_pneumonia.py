"""Miniatures of RSNA pneumonia: Kaggle's files, and the tree and annotations of rsna.org."""

import csv
import json

import numpy as np
from radiographs import make_jpeg_dicom

SIDE = 64
TREE = "mdai_rsna_project_x9N20BZa_images_2018-07-20-153330"
# Id -> NIH film, class, boxes (x, y, width, height). The first two are of one patient.
FILMS = {
    "c1f7889a-9ea9-4acb-b64c-b737c929599a": ("00000013_005.png", "Lung Opacity", [
        (4.0, 8.0, 20.0, 30.0), (36.0, 10.0, 18.0, 24.0), (10.0, 44.0, 12.0, 9.0)]),
    "00436515-870c-4b36-a041-de91049b9ab4": ("00000013_012.png", "Normal", []),
    "0a0f91dc-6015-4342-b809-d19610854a21": ("00000032_001.png",
                                             "No Lung Opacity / Not Normal", []),
    "003d8fa0-6bf1-40ed-b54c-ac657f8495c5": ("00000099_000.png", "Lung Opacity", [
        (12.0, 6.0, 40.0, 52.0)]),
    "ffda85a3-f7b6-4aeb-ba27-98c2da98b4cb": ("00030801_001.png", "Normal", []),
}  # fmt: skip
PATIENTS = {name: film[:8] for name, (film, _, _) in FILMS.items()}
BOXES = {
    name: [(x, y, x + width, y + height) for x, y, width, height in boxes]
    for name, (_, _, boxes) in FILMS.items()
}


def uid(name, level):
    """Returns the UID of a film's study, series or image."""
    number = 1 + list(FILMS).index(name)
    return f"1.2.276.0.7230010.3.1.{level}.8323329.{number}"


def draw_film(name):
    """Returns the pixels of a film: a smooth picture, brighter in its boxes."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = 40 + y + x
    for x0, y0, x1, y1 in BOXES[name]:
        pixels[int(y0) : int(y1), int(x0) : int(x1)] += 70
    return pixels.astype(np.uint8)


def write_kaggle(folder, classes=True, images=True):
    """Writes the files as Kaggle has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stage_2_train_labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patientId", "x", "y", "width", "height", "Target"])
        for name, (_, _, boxes) in FILMS.items():
            for box in boxes or [("", "", "", "")]:
                writer.writerow([name, *box, int(bool(boxes))])
    if classes:
        with (folder / "stage_2_detailed_class_info.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["patientId", "class"])
            for name, (_, kind, boxes) in FILMS.items():
                for _ in boxes or [None]:  # a row for each box
                    writer.writerow([name, kind])
    if images:
        for split in ("train", "test"):
            (folder / f"stage_2_{split}_images").mkdir(exist_ok=True)
        for name in FILMS:
            data = make_jpeg_dicom(draw_film(name), PatientID=name, PatientSex="F")
            (folder / "stage_2_train_images" / f"{name}.dcm").write_bytes(data)
        unlabelled = folder / "stage_2_test_images/0000a175-0e68-4ca4-b1af-167204a7e0bc.dcm"
        unlabelled.write_bytes(make_jpeg_dicom(draw_film(name)))


def write_rsna_org(folder):
    """Writes the tree and the annotations as rsna.org has them.

    The last film has an annotation of its study alone, and there is an image with nothing but
    administrative labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["Normal ", "No Lung Opacity / Not Normal", "Lung Opacity", "Lung Opacity (Low Prob) "]
    names += ["Question", "QA"]
    labels = [{"id": f"L_{index}", "name": name} for index, name in enumerate(names)]
    label_of = {"Normal": "L_0", "No Lung Opacity / Not Normal": "L_1", "Lung Opacity": "L_2"}
    annotations = []
    for name, (_, kind, boxes) in FILMS.items():
        place = {
            "StudyInstanceUID": uid(name, 2),
            "SeriesInstanceUID": uid(name, 3),
            "SOPInstanceUID": uid(name, 4),
        }
        path = folder / TREE / "/".join(place.values())
        path.parent.mkdir(parents=True)
        path.with_name(f"{path.name}.dcm").write_bytes(make_jpeg_dicom(draw_film(name)))
        if name == list(FILMS)[-1]:
            place = {"StudyInstanceUID": uid(name, 2)}
        for index, box in enumerate(boxes or [None]):
            corners = box and dict(zip(("x", "y", "width", "height"), box, strict=True))
            label = "L_3" if index else label_of[kind]  # the other boxes are of low probability
            annotations.append({**place, "labelId": label, "data": corners})
        annotations.append({**place, "labelId": "L_5", "data": None})
    annotations.append(
        {
            "StudyInstanceUID": "1.2.276.0.7230010.3.1.2.8323329.84",
            "SeriesInstanceUID": "1.2.276.0.7230010.3.1.3.8323329.84",
            "SOPInstanceUID": "1.2.276.0.7230010.3.1.4.8323329.84",
            "labelId": "L_4",
            "data": None,
        }
    )
    content = {"labelGroups": [{"labels": labels}], "datasets": [{"annotations": annotations}]}
    path = folder / "pneumonia-challenge-annotations-adjudicated-kaggle_2018.json"
    path.write_text(json.dumps(content))


def write_mapping(folder):
    """Writes the list of the NIH films."""
    content = [
        {
            "img_id": film,
            "subset_img_id": name,
            "StudyInstanceUID": uid(name, 2),
            "SeriesInstanceUID": uid(name, 3),
            "SOPInstanceUID": uid(name, 4),
            "subset_init_label": kind,
            "orig_labels": [],
        }
        for name, (film, kind, _) in FILMS.items()
    ]
    path = folder / "pneumonia-challenge-dataset-mappings_2018.json"
    path.write_text(json.dumps(content))

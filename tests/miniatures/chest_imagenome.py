"""A miniature of Chest ImaGenome on the films of the miniature of MIMIC-CXR."""

import csv
import json
import zipfile

from miniatures import mimic_cxr

FIRST, SECOND, AVOIDED, THIRD = (mimic_cxr.FILMS[index] for index in (0, 6, 8, 7))
LISTS = {"train": (FIRST, AVOIDED), "valid": (THIRD,), "test": (SECOND,)}
# Boxes in pixels of the image; those in the frame of 224 pixels are others.
BOXES = {
    "right lung": (4, 6, 20, 50),
    "left lung": (26, 6, 44, 50),
    "cardiac silhouette": (18, 30, 34, 50),
    "left lower lung zone": (26, 36, 44, 50),
    "carina": (24, 20, 24, 26),  # no area
    "right clavicle": (-6, 2, 18, 6),  # reaches over the left border
}
ATTRIBUTES = [
    {
        "bbox_name": "left lower lung zone",
        "phrases": ["The left base is hazy.", "No pneumothorax."],
        "attributes": [
            ["anatomicalfinding|yes|lung opacity", "nlp|yes|abnormal", "texture|yes|hazy"],
            ["anatomicalfinding|no|pneumothorax"],
        ],
    },
    {
        "bbox_name": "left lung",
        "phrases": ["The left base is hazy."],
        "attributes": [["anatomicalfinding|no|lung opacity", "disease|yes|pneumonia"]],
    },
    {"bbox_name": "left breast", "attributes": [["anatomicalfinding|yes|new finding"]]},
]


def write(folder, layout="folder", below=""):
    """Writes lists and scene graphs.

    Args:
      folder: where to.
      layout: of the scene graphs: `folder`, `nested` or `zip`.
      below: path of the dataset below the folder, as wget makes it.
    """
    silver = folder / below / "silver_dataset"
    (silver / "splits").mkdir(parents=True)
    header = ("subject_id", "study_id", "dicom_id", "path", "ViewPosition")
    for name, films in LISTS.items():
        rows = [(index, *describe(film)) for index, film in enumerate(films)]
        write_csv(silver / "splits" / f"{name}.csv", [("", *header), *rows])
    write_csv(silver / "splits" / "images_to_avoid.csv", [header, describe(AVOIDED)])
    graphs = {
        f"{film.dicom_id}_SceneGraph.json": json.dumps(make_graph(film))
        for film in (FIRST, SECOND, AVOIDED)  # THIRD has none
    }
    if layout == "zip":
        with zipfile.ZipFile(silver / "scene_graph.zip", "w") as archive:
            for name, text in graphs.items():
                archive.writestr(f"scene_graph/{name}", text)
        return
    place = silver / "scene_graph" / ("scene_graph" if layout == "nested" else "")
    place.mkdir(parents=True)
    for name, text in graphs.items():
        (place / name).write_text(text)


def describe(film):
    """Returns a film as a row of the lists, whose paths end in .dcm."""
    path = film.path.replace(".jpg", ".dcm")
    return (film.patient_id, film.study_id, film.dicom_id, path, film.view)


def make_graph(film):
    """Returns the scene graph of a film."""
    objects = [
        {
            **{"object_id": f"{film.dicom_id}_{name}", "bbox_name": name},
            **{"x1": x0 + 90, "y1": y0 + 80, "x2": x1 + 90, "y2": y1 + 80},
            **{"original_x1": x0, "original_y1": y0, "original_x2": x1, "original_y2": y1},
        }
        for name, (x0, y0, x1, y1) in BOXES.items()
    ]
    return {
        **{"image_id": film.dicom_id, "viewpoint": film.view, "patient_id": int(film.patient_id)},
        **{"study_id": int(film.study_id), "objects": objects, "attributes": ATTRIBUTES},
        "relationships": [],
    }


def write_csv(path, rows):
    """Writes rows as CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)

"""TBX11K with nine films, in the published layout and in Kaggle's."""

import csv
import json

import numpy as np
from PIL import Image

SIDE = 512
# Path -> list.
FILMS = {
    "health/h0001.png": "train",
    "health/h0002.png": "val",
    "sick/s0001.png": "train",
    "sick/s0002.png": "val",
    "tb/tb0005.png": "train",
    "tb/tb0007.png": "train",
    "tb/tb0009.png": "val",
    "tb/tb0011.png": "val",
    "tb/tb1199.png": "train",
    "test/t0001.png": "test",
}
CATEGORIES = {
    "ActiveTuberculosis": 1,
    "ObsoletePulmonaryTuberculosis": 2,
    "PulmonaryTuberculosis": 3,
}
# Path, category, x, y, width, height.
BOXES = (
    ("tb/tb0005.png", "ActiveTuberculosis", 30.5, 40.25, 100.0, 60.0),
    ("tb/tb0007.png", "ActiveTuberculosis", 300.0, 100.0, 80.0, 90.5),
    ("tb/tb0007.png", "ObsoletePulmonaryTuberculosis", 60.0, 300.0, 40.0, 40.0),
    ("tb/tb0009.png", "ObsoletePulmonaryTuberculosis", 200.0, 220.0, 30.0, 20.0),
    ("tb/tb0011.png", "PulmonaryTuberculosis", 350.0, 60.0, 50.0, 50.0),
)


def write(folder, whole=True, boxes=BOXES):
    """Writes the published layout; boxes of train and val are in one file, or in two."""
    root = folder / "TBX11K"
    for path in FILMS:
        _write_film(root / "imgs" / path)
    _write_film(root / "imgs/extra/shenzhen/CHNCXR_0001_0.png")
    lists = {word: [p for p, other in FILMS.items() if other == word] for word in ("train", "val")}
    lists["trainval"] = lists["train"] + lists["val"]
    for word, paths in lists.items():
        _write_list(root / f"lists/TBX11K_{word}.txt", paths)
        _write_list(root / f"lists/all_{word}.txt", [*paths, "extra/shenzhen/CHNCXR_0001_0.png"])
        if (word == "trainval") == whole:
            rows = [row for row in boxes if row[0] in paths]
            _write_boxes(root / f"annotations/json/TBX11K_{word}.json", paths, rows)
    # Boxes of the larger films, which are not published.
    path = root / "annotations/xml/tb0005.xml"
    path.parent.mkdir()
    path.write_text("<annotation><object><bndbox><xmin>2000</xmin></bndbox></object></annotation>")


def write_kaggle(folder):
    """Writes Kaggle's table, with a row for each box, and all films in one folder."""
    kinds = {"health": "healthy", "sick": "sick_but_no_tb", "tb": "tb"}
    words = {"ActiveTuberculosis": "active_tb", "ObsoletePulmonaryTuberculosis": "latent_tb"}
    size = ("image_height", "image_width")
    rows = [("fname", *size, "source", "bbox", "target", "tb_type", "image_type")]
    for path, source in FILMS.items():
        group, name = path.split("/")
        if source == "test":
            continue
        _write_film(folder / "images" / name)
        target = "tb" if group == "tb" else "no_tb"
        boxes = [row for row in BOXES if row[0] == path] or [(path, "", None, None, None, None)]
        for _, kind, x, y, width, height in boxes:
            box = {"xmin": x, "ymin": y, "width": width, "height": height}
            text = "none" if x is None else str(box)
            kaggles = words.get(kind, "none")
            rows.append((name, SIDE, SIDE, source, text, target, kaggles, kinds[group]))
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def _write_film(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE, 3), 30, np.uint8)).save(path)


def _write_list(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))


def _write_boxes(path, paths, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [
            {"id": number, "file_name": name, "width": SIDE, "height": SIDE}
            for number, name in enumerate(paths, start=1)
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": "Tuberculosis"}
            for name, number in CATEGORIES.items()
        ],
        "annotations": [
            {
                "id": number,
                "image_id": paths.index(name) + 1,
                "category_id": CATEGORIES[kind],
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
            for number, (name, kind, x, y, width, height) in enumerate(rows)
        ],
    }
    path.write_text(json.dumps(content))

"""Miniatures of Object-CXR: tables of train, dev and test, and their films."""

import csv

import numpy as np
from PIL import Image

ROWS, COLUMNS = 60, 48
# Table -> name, annotation, boxes of its objects.
TABLES = {
    "train": {
        "00001.jpg": (
            "0 4 6 20 16;1 24 10 44 30;2 6 30 22 34 18 56 4 50",
            [(4, 6, 20, 16), (24, 10, 44, 30), (4, 30, 22, 56)],
        ),
        "00002.jpg": ("", []),
        "00003.jpg": ("0 40 50 10 20", [(10, 20, 40, 50)]),  # from the bottom right
        "00004.jpg": ("", []),
    },
    "dev": {"08001.jpg": ("1 2 2 40 42", [(2, 2, 40, 42)]), "08002.jpg": ("", [])},
    "test": {"09001.jpg": ("2 5 5 30 5 5 40", [(5, 5, 30, 40)]), "09002.jpg": ("", [])},
}
BOXES = {
    name.removesuffix(".jpg"): boxes
    for rows in TABLES.values()
    for name, (_, boxes) in rows.items()
}


def draw_mask(name):
    """Returns the truth of film 00001, one pixel at a time: rectangle, ellipse and polygon."""
    assert name == "00001"
    mask = np.zeros((ROWS, COLUMNS), bool)
    polygon = [(6, 30), (22, 34), (18, 56), (4, 50)]
    for row in range(ROWS):
        for column in range(COLUMNS):
            x, y = column + 0.5, row + 0.5
            is_left = [
                (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
                for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True)
            ]
            mask[row, column] = (
                (4 <= x < 20 and 6 <= y < 16)
                or ((x - 34) / 10) ** 2 + ((y - 20) / 10) ** 2 <= 1
                or all(is_left)
            )
    return mask


def write(folder, tables=("train", "dev", "test")):
    """Writes tables and films; test.csv names its column image_path."""
    for table in tables:
        (folder / table).mkdir(parents=True)
        with (folder / f"{table}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path" if table == "test" else "image_name", "annotation"])
            for name, (annotation, _) in TABLES[table].items():
                writer.writerow([f"test/{name}" if table == "test" else name, annotation])
        for name in TABLES[table]:
            pixels = np.add.outer(np.arange(ROWS), np.arange(COLUMNS)).astype(np.uint8) + 50
            Image.fromarray(pixels).save(folder / table / name, quality=95)

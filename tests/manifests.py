"""A user's folder of images with a manifest, for tests of the dataset `pairs`."""

import csv
import json

import numpy as np
from PIL import Image

from plan_jax.data.dataset import open_dataset

NUM_ROWS = 12
SPLITS = ("train", "train", "train", "train", "val", "test")  # of the six patients


def make_image_folder(parent):
    """Returns a folder of twelve images of 30 x 40 pixels, each of one grey value."""
    folder = parent / "pairs"
    folder.mkdir()
    for number in range(NUM_ROWS):
        write_grey_image(folder / f"{number}.png", number * 20)
    return folder


def write_grey_image(path, value, rows=30, columns=40):
    Image.fromarray(np.full((rows, columns), value, np.uint8)).save(path)


def write_mask(path):
    """Writes a mask of 30 x 40 pixels with a rectangle (x0, y0, x1, y1) = (4, 10, 12, 20)."""
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 4:12] = 255
    Image.fromarray(mask).save(path)


def make_rows(**changes):
    """Returns twelve rows, two for each of six patients, with the same changes in every row."""
    return [
        {
            "image": f"{number}.png",
            "text": f"Finding number {number}. No effusion.",
            "patient_id": f"p{number // 2}",
            "split": SPLITS[number // 2],
            **changes,
        }
        for number in range(NUM_ROWS)
    ]


def change_first_row(**changes):
    """Returns twelve rows of which the first is changed."""
    first, *rest = make_rows()
    return [first | changes, *rest]


def write_manifest(folder, rows, name="manifest.csv"):
    """Writes rows as CSV, JSON Lines or Parquet, and returns the path."""
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def open_pairs(folder, rows, split="train", name="manifest.csv", **config):
    """Writes a manifest and opens it as a dataset, in the folder `data` next to the images."""
    config = {"manifest": write_manifest(folder, rows, name), "size": 32} | config
    return open_dataset("pairs", split, data_dir=str(folder.parent / "data"), **config)


def number_of(record):
    """Returns the number of a record's row, the last digit of its first sentence."""
    return record.text.split(".")[0][-1]

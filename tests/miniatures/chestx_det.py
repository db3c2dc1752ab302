"""Miniatures of ChestX-Det and of ChestX-Det10."""

import json

import numpy as np
from PIL import Image

SIDE = 64
# Split -> file, findings, boxes, outlines.
FILMS = {
    "train": [
        ("36199.png", [], [], []),
        (
            "36302.png",
            ["Effusion", "Effusion", "Cardiomegaly"],
            [[4, 40, 20, 60], [40, 40, 60, 60], [16, 20, 52, 44]],
            [
                [[4, 40], [20, 44], [18, 60], [6, 58]],
                [[40, 42], [60, 40], [60, 60], [44, 58]],
                [[16, 32], [34, 20], [52, 32], [34, 44]],
            ],
        ),
    ],
    "test": [("61234.png", ["Nodule"], [[10, 10, 20, 18]], [[[10, 10], [20, 10], [15, 18]]])],
}


def write(folder, generation=13, images=True):
    """Writes the lists, and the films as the archives have them."""
    folder.mkdir(parents=True, exist_ok=True)
    added = ("Cardiomegaly", "Diffuse Nodule", "Pleural Thickening")
    for split, films in FILMS.items():
        entries = []
        for name, labels, boxes, outlines in films:
            kept = [k for k, label in enumerate(labels) if generation == 13 or label not in added]
            entry = {"file_name": name}
            entry["syms"] = [labels[k] for k in kept]
            entry["boxes"] = [boxes[k] for k in kept]
            if generation == 13:
                entry["polygons"] = [outlines[k] for k in kept]
            entries.append(entry)
            if images:
                path = folder / f"{split}_data" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.add.outer(np.arange(SIDE), np.arange(SIDE)).astype(np.uint8) + 30
                Image.fromarray(pixels).save(path)
        name = f"ChestX_Det_{split}.json" if generation == 13 else f"{split}.json"
        (folder / name).write_text(json.dumps(entries))

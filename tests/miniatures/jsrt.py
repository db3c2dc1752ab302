"""JSRT with six films as raw files, SCR's masks as GIF, and the table of nodules."""

import numpy as np
from PIL import Image

SIDE = 2048
NAMES = ("JPCLN001", "JPCLN002", "JPCLN100", "JPCNN001", "JPCNN002", "JPCNN093")
# Name -> diameter in mm, middle, malignant or benign. The second nodule is near the edge.
NODULES = {
    "JPCLN001": (14.0, (1634, 692), "malignant"),
    "JPCLN002": (35.0, (60, 1000), "benign"),
    "JPCLN100": (7.0, (700, 900), "unknown"),
}
# Organ -> corners of a rectangle, in pixels of the mask; multiples of 8.
ORGANS = {
    "left lung": (560, 160, 864, 800),
    "right lung": (160, 160, 464, 800),
    "heart": (440, 480, 704, 800),
    "left clavicle": (600, 144, 904, 184),
    "right clavicle": (120, 144, 424, 184),
}


def write(
    folder, suffix=".IMG", parted=False, masks=True, table=True, has_pixels=False, merged=False
):
    """Writes the dataset as it is downloaded.

    Args:
      folder: an empty folder.
      suffix: of the films: `.IMG`, or `.png` for those that somebody has converted.
      parted: whether films with and without a nodule are in two folders.
      masks: whether SCR's masks are there.
      table: whether the table of nodules is there.
      merged: whether somebody has joined the folds of the masks.
      has_pixels: whether the raw files are whole, of 8 MiB each, or begin only.
    """
    for name in NAMES:
        part = "Nodule154images" if "LN" in name else "NonNodule93images"
        path = folder / (part if parted else "All247images") / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".IMG":
            content = draw(name).astype(">u2").tobytes() if has_pixels else b"\x03\xe8"
            path.write_bytes(content)
        else:
            Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
        for organ in ORGANS if masks else ():
            fold = "fold1" if int(name[5:]) % 2 else "fold2"
            place = (
                f"masks/{organ.replace(' ', '_')}" if merged else f"scratch/{fold}/masks/{organ}"
            )
            path = folder / place / f"{name}.gif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_organ(organ)).save(path)
    if table:
        rows = [
            f"{name}.IMG\t5\t{size:g}\t53\tmale\t{x}\t{y}\t{kind}\tl.upper lobe\tlung cancer"
            for name, (size, (x, y), kind) in NODULES.items()
        ]
        (folder / "Clinical_Information").mkdir()
        (folder / "Clinical_Information/CLNDAT_EN.txt").write_text("\r\n".join([*rows, ""]))


def draw(name):
    """Returns the numbers of a film: half is bright, half is dark, and the nodule is brightest."""
    density = np.full((SIDE, SIDE), 1000, np.uint16)
    density[:, SIDE // 2 :] = 3000
    if name in NODULES:
        size, (x, y), _ = NODULES[name]
        radius = round(size / 0.175 / 2)
        density[max(y - radius, 0) : y + radius, max(x - radius, 0) : x + radius] = 0
    return density


def draw_organ(organ):
    """Returns the mask of an organ, of half of the film's rows and columns."""
    mask = np.zeros((SIDE // 2, SIDE // 2), np.uint8)
    x0, y0, x1, y1 = ORGANS[organ]
    mask[y0:y1, x0:x1] = 255
    return mask

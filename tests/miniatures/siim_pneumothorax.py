"""Miniatures of SIIM-ACR pneumothorax: trees of DICOM, Kaggle's flat folder, and the PNG files."""

import numpy as np
from PIL import Image
from radiographs import make_jpeg_dicom

SIDE = 1024
UID = "1.2.276.0.7230010.3.1.4.8323329"
# Id -> rectangles (x0, y0, x1, y1) of its masks, one a row.
MASKS = {
    f"{UID}.6904.1517875201.850819": [],
    f"{UID}.13666.1517875247.117800": [(100, 200, 300, 260)],
    f"{UID}.11028.1517875229.983789": [(0, 0, 40, 1024), (30, 500, 90, 700), (600, 3, 640, 4)],
    f"{UID}.10366.1517875224.513204": [],
    f"{UID}.10016.1517875222.430320": [(1000, 1000, 1024, 1024)],
}
TEST = list(MASKS)[-1]  # in the tree of the test images of stage 1


def draw_mask(name):
    """Returns the union of the masks of an image."""
    mask = np.zeros((SIDE, SIDE), bool)
    for x0, y0, x1, y1 in MASKS[name]:
        mask[y0:y1, x0:x1] = True
    return mask


def draw_film(name):
    """Returns a flat film, darker where the pneumothorax is."""
    return np.where(draw_mask(name), 60, 150).astype(np.uint8)


def write_runs(box):
    """Returns the text of a filled rectangle: gaps and lengths, down the columns."""
    x0, y0, x1, y1 = box
    numbers, end = [], 0
    for x in range(x0, x1):
        start = x * SIDE + y0
        numbers += [start - end, y1 - y0]
        end = start + y1 - y0
    return " ".join(map(str, numbers))


def list_rows():
    """Returns the id and the text of each row of the table."""
    return [
        (name, text)
        for name, boxes in MASKS.items()
        for text in ([write_runs(box) for box in boxes] or ["-1"])
    ]


def kaggle_id(name):
    """Returns the id of an image in Kaggle's table of today."""
    return f"ID_{list(MASKS).index(name):09x}"


def study_of(name):
    """Returns the UID of the study of an image."""
    return name.replace(".3.1.4.", ".3.1.2.")


def write_trees(folder, blank=" ", images=True):
    """Writes the first release; `blank` stands before each cell of the second column."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["ImageId, EncodedPixels", *(f"{name},{blank}{text}" for name, text in list_rows())]
    (folder / "train-rle.csv").write_text("\n".join(rows) + "\n")
    for name in MASKS if images else ():
        tree = "dicom-images-test" if name == TEST else "dicom-images-train"
        path = folder / tree / study_of(name) / name.replace(".3.1.4.", ".3.1.3.") / f"{name}.dcm"
        path.parent.mkdir(parents=True)
        path.write_bytes(make_jpeg_dicom(draw_film(name), ViewPosition="PA"))


def write_flat(folder):
    """Writes the files as Kaggle has them today."""
    (folder / "stage_2_images").mkdir(parents=True)
    rows = [f"{kaggle_id(name)},{text}" for name, text in list_rows()]
    (folder / "stage_2_train.csv").write_text("\n".join(["ImageId,EncodedPixels", *rows]))
    for name in MASKS:
        path = folder / "stage_2_images" / f"{kaggle_id(name)}.dcm"
        path.write_bytes(make_jpeg_dicom(draw_film(name)))


def png_name(name):
    """Returns the name of an image and of its mask among the PNG files."""
    split = "test" if name == TEST else "train"
    return f"{list(MASKS).index(name)}_{split}_{int(bool(MASKS[name]))}_.png"


def write_pngs(folder):
    """Writes the PNG files, below the folder that their archive has."""
    root = folder / "siim-acr-pneumothorax"
    for kind, draw in (("png_images", draw_film), ("png_masks", draw_mask)):
        (root / kind).mkdir(parents=True)
        for name in MASKS:
            pixels = draw(name)
            pixels = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
            Image.fromarray(pixels).save(root / kind / png_name(name))
    for split in ("train", "test"):
        rows = [
            f"{png_name(name)},{name},{int(bool(MASKS[name]))},0.5"
            for name in MASKS
            if (name == TEST) == (split == "test")
        ]
        header = "new_filename,ImageId,has_pneumo,weight"
        (root / f"stage_1_{split}_images.csv").write_text("\n".join([header, *rows]))

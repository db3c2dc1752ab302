"""NIH ChestX-ray14 with nine films of six patients, in each generation of its files."""

import numpy as np
from PIL import Image

COLUMNS_OF_SIZE = "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
SIDE = 1024  # boxes are in pixels of it
# Name, labels, age, sex, view: the last two films of patient 13 are both in train_val_list.txt.
ROWS = (
    ("00000001_000.png", "Cardiomegaly", 57, "M", "PA"),
    ("00000002_000.png", "No Finding", 80, "F", "AP"),
    ("00000013_000.png", "Emphysema|Pneumothorax", 59, "M", "PA"),
    ("00000013_001.png", "Pleural_Thickening", 60, "M", "AP"),
    ("00000020_000.png", "Infiltration", 71, "F", "PA"),
    ("00000020_001.png", "Infiltration|Mass", 72, "F", "PA"),
    ("00000030_000.png", "Hernia", 33, "F", "PA"),
    ("00000031_000.png", "No Finding", 44, "M", "PA"),
    ("00000031_001.png", "Nodule", 45, "M", "PA"),
)
TEST = ("00000001_000.png", "00000020_000.png", "00000020_001.png")
# Film, name of the finding in the list, x, y, width and height.
BOXES = (
    ("00000001_000.png", "Cardiomegaly", 302.2, 409.6, 490.7, 394.1),
    ("00000020_000.png", "Infiltrate", 86.75, 100.0, 200.5, 300.25),
    ("00000020_001.png", "Infiltrate", 600.0, 100.5, 150.0, 250.0),
    ("00000020_001.png", "Mass", 610.0, 500.0, 80.0, 60.0),
)
RGBA = "00000013_000.png"


def write(folder, generation="2020", layout="flat", lists=True, boxes=BOXES, test=TEST):
    """Writes the dataset as it is downloaded.

    Args:
      folder: an empty folder.
      generation: `2020`: eleven fields; `2017`: a twelfth without a name, ages as 058Y; `sex`: a
        newer copy whose column is called `Patient Sex`.
      layout: `flat`: images/; `parts`: images_001/images/, images_002/images/ ...
      lists: whether the official lists are there. They end without a line break.
      boxes: rows of BBox_List_2017.csv.
      test: names of the films in test_list.txt.
    """
    tail, name = (",", "Data_Entry_2017.csv") if generation == "2017" else ("", "")
    sex = "Patient Sex" if generation == "sex" else "Patient Gender"
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"
    lines = [f"{header},{sex},View Position,{COLUMNS_OF_SIZE}{tail}"]
    for image, labels, age, gender, view in ROWS:
        patient, follow_up = int(image[:8]), int(image[9:12])
        shown_age = f"{age:03d}Y" if generation == "2017" else age
        row = (image, labels, follow_up, patient, shown_age, gender, view, 2682, 2749, 0.143, 0.143)
        lines.append(",".join(map(str, row)) + tail)
    (folder / (name or "Data_Entry_2017_v2020.csv")).write_text("\n".join(lines) + "\n")
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    lines += [",".join(map(str, row)) for row in boxes]
    (folder / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")
    if lists:
        train = [row[0] for row in ROWS if row[0] not in test]
        (folder / "train_val_list.txt").write_text("\n".join(train))
        (folder / "test_list.txt").write_text("\n".join(test))
    for number, (image, *_) in enumerate(ROWS):
        part = "images" if layout == "flat" else f"images_{number % 2 + 1:03d}/images"
        path = folder / part / image
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(image).save(path)


def draw(name):
    """Returns a film: black, with its boxes bright."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    for film, _, x, y, width, height in BOXES:
        if film == name:
            pixels[round(y) : round(y + height), round(x) : round(x + width)] = 200
    film = Image.fromarray(pixels)
    return film.convert("RGBA") if name == RGBA else film

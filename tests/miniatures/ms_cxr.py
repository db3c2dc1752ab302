"""A miniature of MS-CXR 0.1 and 1.1.0 on the films of the miniature of MIMIC-CXR."""

import csv
import json

from miniatures import mimic_cxr

HEADER = (
    *("dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h"),
    *("image_width", "image_height"),
)
FIRST, SECOND = mimic_cxr.FILMS[5], mimic_cxr.FILMS[7]  # of different patients
ABSENT = mimic_cxr.Film(mimic_cxr.name_image("59999999", 0), "59999999", "18000009", "train", "AP")
# film, category, words, box as x, y, width, height, split of version 1.1.0
BOXES = (
    (FIRST, "Edema", "left basal edema", (4, 10, 10, 20), "test"),
    (FIRST, "Edema", "Left basal edema ", (20, 12, 8, 6), "test"),  # one phrase of two boxes
    (FIRST, "Lung Opacity", "left basal edema", (5, 11, 9, 19), "test"),  # and of two categories
    (FIRST, "Cardiomegaly", "large heart", (0, 0, 47, 59), "test"),
    (SECOND, "Pneumothorax", "apical pneumothorax", (8, 0, 16, 12), "train"),
    (SECOND, "Pneumothorax", "line", (8, 4, 0, 12), "train"),  # no area
    (ABSENT, "Pneumonia", "right pneumonia", (1, 2, 3, 4), "val"),  # not in the tree of images
)


def write(folder, version="1.1.0", suffix="csv"):
    """Writes the table; project version 0.1 has files called v1.0.0, and no splits."""
    folder.mkdir(parents=True, exist_ok=True)
    is_new = version == "1.1.0"
    name = f"MS_CXR_Local_Alignment_v{'1.1.0' if is_new else '1.0.0'}.{suffix}"
    if suffix == "json":
        (folder / name).write_text(json.dumps(make_coco(is_new)))
        return
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*HEADER, "split") if is_new else HEADER)
        for film, category, words, box, split in BOXES:
            row = (film.dicom_id, category, words, film.path, *box)
            row += (mimic_cxr.COLUMNS, mimic_cxr.ROWS)
            writer.writerow((*row, split) if is_new else row)


def make_coco(has_splits):
    """Returns the same boxes as objects of COCO."""
    films = list(dict.fromkeys(film for film, *_ in BOXES))
    categories = list(dict.fromkeys(category for _, category, *_ in BOXES))
    shape = {"width": mimic_cxr.COLUMNS, "height": mimic_cxr.ROWS}
    return {
        "info": {"version": "1.1.0" if has_splits else "1.0.0"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
        "images": [
            {"id": i, "file_name": f"{film.dicom_id}.jpg", "path": film.path, **shape}
            for i, film in enumerate(films)
        ],
        "annotations": [
            {
                **{"id": i, "image_id": films.index(film), "label_text": words, "bbox": box},
                **{"category_id": categories.index(category), **shape},
                **({"split": split} if has_splits else {}),
            }
            for i, (film, category, words, box, split) in enumerate(BOXES)
        ],
    }

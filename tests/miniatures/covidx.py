"""Miniatures of COVIDx: lists of several versions over one folder of films."""

import numpy as np
from PIL import Image

# Lines of the lists of version 9A; the fields are patient, file, class and source.
TRAIN_9A = (
    "ANON24 1-s2.0-S1684118220300608-main.pdf-001.jpg COVID-19 cohen",
    "3 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg pneumonia cohen",
    "3 SARS-10.1148rg.242035193-g04mr34g0-Fig8b-day5.jpeg pneumonia cohen",
    "COVID 70 COVID(70).png COVID-19 sirm",
    "COVID 72 COVID(72).png COVID-19 sirm",
    "0010f549-b242-4e94-87a8-57d79de215fc 0010f549-b242-4e94-87a8-57d79de215fc.png normal rnsa",
    "412 000004.jpg COVID-19 stonybrook",
    "413 000004.png COVID-19 stonybrook",
    "500 not-in-the-folder.png normal rsna",
)
TEST_9A = (
    "abff4044-3c0a-458f-b0c7-04254be7fc0c abff4044-3c0a-458f-b0c7-04254be7fc0c.png pneumonia",
    "MIDRC-RICORD-1C-419639-000082 MIDRC-RICORD-1C-419639-000082-46647-0.png COVID-19 ricord",
)
# Versions B have two classes.
CLASSES_B = {"normal": "negative", "pneumonia": "negative", "COVID-19": "positive"}
MISSING = "not-in-the-folder.png"
RGBA = "COVID(70).png"
SHAPES = {"000004.jpg": (30, 40), "000004.png": (48, 36)}


def to_version_b(line):
    """Returns a line as the versions B write it."""
    return " ".join(CLASSES_B.get(field, field) for field in line.split(" "))


def file_of(line):
    """Returns the name of the file of a line."""
    classes = (*CLASSES_B, *CLASSES_B.values())
    fields = line.split(" ")
    return fields[next(i for i, field in enumerate(fields) if field in classes) - 1]


def write_lists(folder, version="_COVIDx9A", **lists):
    """Writes lists of lines without a header; the last line has no end."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in lists.items():
        (folder / f"{split}{version}.txt").write_text("\n".join(lines))


def write_film(path):
    """Writes a film in the format of its suffix."""
    rows, columns = SHAPES.get(path.name, (32, 32))
    pixels = np.add.outer(np.arange(rows), np.arange(columns)).astype(np.uint8) * 3
    film = Image.fromarray(pixels)
    if path.name == RGBA:
        film = film.convert("RGBA")
    film.save(path)


def write(folder):
    """Writes the lists 9A and 9B over one folder, in which one film is missing."""
    write_lists(folder, "_COVIDx9A", train=TRAIN_9A, test=TEST_9A)
    lists = {"train": map(to_version_b, TRAIN_9A), "test": map(to_version_b, TEST_9A)}
    write_lists(folder, "_COVIDx9B", **lists)
    for split, lines in (("train", TRAIN_9A), ("test", TEST_9A)):
        (folder / split).mkdir()
        for line in lines:
            if file_of(line) != MISSING:
                write_film(folder / split / file_of(line))


def write_cxr4(folder):
    """Writes CXR-4, with a list and a folder for validation."""
    lists = {"train": TRAIN_9A[:4], "val": TRAIN_9A[4:6], "test": TEST_9A}
    lists = {split: [to_version_b(line) for line in lines] for split, lines in lists.items()}
    write_lists(folder, "", **lists)
    for split, lines in lists.items():
        (folder / split).mkdir()
        for line in lines:
            write_film(folder / split / file_of(line))

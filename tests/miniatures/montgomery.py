"""The Montgomery set with four films, two of them with tuberculosis."""

import numpy as np
from PIL import Image

READINGS = {
    "MCUCXR_0001_0": "normal",
    "MCUCXR_0002_0": "normal",
    "MCUCXR_0108_1": "cavitary infiltrate in RUL;\nactive TB",
    "MCUCXR_0150_1": "pleural effusion",
}
SHAPES = ((40, 49), (49, 40))  # landscape and portrait
# Corners of the lungs; the patient's left is on the right of the image.
LUNGS = {"leftMask": (24, 8, 36, 32), "rightMask": (4, 8, 16, 32)}


def write(folder, masks=True):
    """Writes MontgomerySet, with files of a web server and of a Mac among its own."""
    root = folder / "MontgomerySet"
    for part in ("CXR_png", "ClinicalReadings"):
        (root / part).mkdir(parents=True)
    (root / "CXR_png/Thumbs.db").write_bytes(b"litter")
    (root / "CXR_png/index.html").write_text("<html></html>")
    for number, (name, reading) in enumerate(READINGS.items()):
        shape = SHAPES[number % 2]
        Image.fromarray(np.full(shape, 50, np.uint8)).save(root / f"CXR_png/{name}.png")
        text = f"Patient's Sex: F\nPatient's Age: 027Y\n{reading}\n\n"
        (root / f"ClinicalReadings/{name}.txt").write_text(text)
        for side, (x0, y0, x1, y1) in LUNGS.items() if masks else ():
            mask = np.zeros(shape, bool)
            mask[y0:y1, x0:x1] = True
            path = root / "ManualMask" / side / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)

"""The Shenzhen set with four films, Kaggle's lung masks, and masks of findings."""

import numpy as np
from PIL import Image

# Name -> the line of sex and age, and the reading.
READINGS = {
    "CHNCXR_0001_0": ("male 45yrs", "normal"),
    "CHNCXR_0002_0": ("female, 9 months", "normal"),
    "CHNCXR_0327_1": ("female 28yrs", "right PTB\nleft pleuritis"),
    "CHNCXR_0330_1": ("male 30yrs", "STB"),
}
SHAPE = (60, 58)
LUNGS = ((6, 8, 24, 48), (34, 8, 52, 48))
MASKED = ("CHNCXR_0001_0", "CHNCXR_0327_1")
# File -> corners.
FINDINGS = {
    "CHNCXR_0327_1_Small_Infiltrate_(non-linear)_1": (10, 10, 20, 20),
    "CHNCXR_0327_1_Small_Infiltrate_(non-linear)_2": (10, 30, 20, 40),
    "CHNCXR_0330_1_Pleural_Effusion_2": (36, 40, 50, 48),
}


def write(folder, lung_folder="mask/mask", findings=True):
    """Writes ChinaSet_AllFiles with what was published later beside it."""
    for part in ("CXR_png", "ClinicalReadings"):
        (folder / part).mkdir()
    for name, (patient, reading) in READINGS.items():
        film = Image.fromarray(np.full(SHAPE, 70, np.uint8)).convert("RGB")
        film.save(folder / f"CXR_png/{name}.png")
        (folder / f"ClinicalReadings/{name}.txt").write_text(f"{patient}\n{reading}")
    for name in MASKED if lung_folder else ():
        path = folder / lung_folder / f"{name}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(LUNGS).save(path)
    for name, corners in FINDINGS.items() if findings else ():
        path = folder / "Annotations-2/masks" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw([corners]).save(path)


def _draw(rectangles):
    mask = np.zeros(SHAPE, np.uint8)
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = 255
    return Image.fromarray(mask)

"""Random augmentation of training images that moves boxes, masks and regions along.

All geometric parts compose into one affine matrix, which maps a point (x, y) of the stored image to
its place in the augmented one. The image is interpolated once, and boxes and masks follow exactly.
A mirrored image comes with a text whose words left and right have changed places.

Changes of brightness and contrast do nothing under `normalisation` image, except where they clip.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageFilter

from plan_jax.data import transforms
from plan_jax.data.sections import sides
from plan_jax.types import Phrase, Record, UserError

MIN_BOX_SHARE = 0.25  # of its area that a box must keep to stay a box (ours)
WHITE = 255


@dataclass(frozen=True)
class Augmentation:
    """Ranges from which the augmentation of each image is drawn; the defaults change nothing.

    The parts are applied in this order: window, area, flip, rotate with translate and scale,
    brightness, contrast, blur. What lies outside the image is black.

    Attributes:
      name: the preset that gives the fields that are not set.
      window: side of the square that the encoder sees, as a share of the whole image's; the place
        is drawn in whole pixels. MGCA's 224 of 256 pixels are 0.875.
      area: the share of the area that a resized crop keeps is drawn from this range.
      aspect: the ratio of width to height of that crop is drawn from this range, by its logarithm.
      flip: probability of a mirrored image; needs `swap_sides`.
      swap_sides: in a mirrored image, exchange left and right in texts, regions and findings.
      rotate: largest angle in degrees.
      translate: largest translation along each axis, as a share of the side.
      scale: the factor of a zoom is drawn from this range.
      brightness: grey values are multiplied by a factor from 1 - brightness to 1 + brightness.
      contrast: the same for their distance from the image's mean.
      jitter_probability: of brightness and contrast, together.
      blur: the standard deviation of a Gaussian in pixels is drawn from this range; 0 is none.
      blur_probability: of the Gaussian.
    """

    name: str = ""
    window: float = 1.0
    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    swap_sides: bool = False
    rotate: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    jitter_probability: float = 1.0
    blur: tuple[float, float] = (0.0, 0.0)
    blur_probability: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        if self.name and self.name not in PRESETS:
            _refuse("name", self.name, f"use one of {', '.join(PRESETS)}, or '' for none")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                _refuse(name, value, f"use {low:g} to {high:g}")
        for name, (low, high) in RANGES_OF_PAIRS.items():
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                _refuse(name, (first, last), f"use two ascending numbers from {low:g} to {high:g}")
        if self.flip and not self.swap_sides:
            _refuse(
                "flip",
                self.flip,
                "a mirrored image contradicts a report that says left or right; set "
                "config.data.augment.swap_sides=True to exchange these words, or flip=0",
            )

    @property
    def is_geometric(self) -> bool:
        """True if any part moves pixels."""
        parts = (self.window, *self.area, *self.aspect, *self.scale)
        return parts != (1.0,) * len(parts) or bool(self.flip or self.rotate or self.translate)

    def whole_size(self, size: int) -> int:
        """Returns the side of the square that a whole image is fitted to, for a view of `size`.

        >>> Augmentation(window=0.875).whole_size(224)
        256
        """
        return round(size / self.window)


# A window or an area near 0 would be a few pixels, enlarged.
RANGES = {
    "window": (0.1, 1.0),
    "flip": (0.0, 1.0),
    "rotate": (0.0, 180.0),
    "translate": (0.0, 1.0),
    "brightness": (0.0, 1.0),
    "contrast": (0.0, 1.0),
    "jitter_probability": (0.0, 1.0),
    "blur_probability": (0.0, 1.0),
}
RANGES_OF_PAIRS = {
    "area": (0.01, 1.0),
    "aspect": (0.1, 10.0),
    "scale": (0.1, 10.0),
    "blur": (0.0, 100.0),
}
PRESETS = {
    # arXiv 2010.00747, section 3.4 and appendix A. The paper exchanges no words when it mirrors.
    # It does not state the aspect of a crop: this is torchvision's (ours).
    "convirt": Augmentation(
        area=(0.6, 1.0),
        aspect=(3 / 4, 4 / 3),
        flip=0.5,
        swap_sides=True,
        rotate=20.0,
        translate=0.1,
        scale=(0.95, 1.05),
        brightness=0.4,
        contrast=0.4,
        blur=(0.1, 3.0),
    ),
    # github.com/HKU-MedAI/MGCA, `DataTransforms`: 224 of 256 pixels. GLoRIA's code does the same.
    "mgca": Augmentation(window=0.875),
    # The same code, `Moco2Transform`, for linear probes on CheXpert. Its saturation, hue and grey
    # scale do not change grey images.
    "chexpert_moco": Augmentation(
        window=0.875,
        flip=0.5,
        swap_sides=True,
        brightness=0.4,
        contrast=0.4,
        jitter_probability=0.8,
        blur=(0.1, 2.0),
        blur_probability=0.5,
    ),
}
PRESETS = {name: replace(preset, name=name) for name, preset in PRESETS.items()}


AS_STORED = Augmentation()
_WORD_BREAK = re.compile(r"_|(?<=[a-z])(?=[A-Z])")  # within a name, as left_lung or LeftLung


def preset_fields(name: str) -> dict[str, object]:
    """Returns the fields of a preset, or those that change nothing for an unknown name."""
    preset = PRESETS.get(name, AS_STORED)
    return {field.name: getattr(preset, field.name) for field in fields(Augmentation)}


def _refuse(name: str, value: object, remedy: str) -> None:
    raise UserError(f"config.data.augment.{name} is {value!r}; {remedy}")


# Draws ------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The augmentation of one image.

    `matrix` maps (x, y, 1) of the stored image to (x, y) of the augmented one, in pixels whose
    borders are whole numbers. `brightness` and `contrast` are factors and `blur` is in pixels.
    """

    matrix: Float[np.ndarray, "2 3"]
    is_mirrored: bool
    brightness: float
    contrast: float
    blur: float


def draw(
    augmentation: Augmentation, shape: tuple[int, int], size: int, rng: np.random.Generator
) -> Draw:
    """Draws the augmentation of an image: a pure function of the state of `rng`.

    Args:
      augmentation: the ranges.
      shape: rows and columns of the stored image.
      size: side of the square that is returned, in pixels.
      rng: the generator of this image.
    """
    whole_size = augmentation.whole_size(size)
    matrix = _fit_matrix(shape, whole_size)
    left, top = rng.integers(0, whole_size - size + 1, 2).tolist()
    matrix = _affine(1, 0, -left, 0, 1, -top) @ matrix
    area = rng.uniform(*augmentation.area)
    aspect = math.exp(rng.uniform(*np.log(augmentation.aspect)))
    # A crop that is wider or higher than the image is cut (ours; torchvision draws again).
    width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    left, top = (rng.uniform(0, 1, 2) * [1 - width, 1 - height]).tolist()
    matrix = (
        _affine(1 / width, 0, -left * size / width, 0, 1 / height, -top * size / height) @ matrix
    )
    is_mirrored = bool(rng.uniform() < augmentation.flip)
    if is_mirrored:
        matrix = _affine(-1, 0, size, 0, 1, 0) @ matrix
    angle = math.radians(rng.uniform(-1, 1) * augmentation.rotate)
    right, down = (rng.uniform(-1, 1, 2) * augmentation.translate * size).tolist()
    matrix = _turn(size / 2, angle, rng.uniform(*augmentation.scale), right, down) @ matrix
    brightness, contrast = 1 + rng.uniform(-1, 1, 2) * [
        augmentation.brightness,
        augmentation.contrast,
    ]
    has_jitter = rng.uniform() < augmentation.jitter_probability
    blur, has_blur = rng.uniform(*augmentation.blur), rng.uniform() < augmentation.blur_probability
    return Draw(
        matrix[:2],
        is_mirrored,
        float(brightness) if has_jitter else 1.0,
        float(contrast) if has_jitter else 1.0,
        blur if has_blur else 0.0,
    )


def _fit_matrix(shape: tuple[int, int], size: int) -> Float[np.ndarray, "3 3"]:
    """Returns the matrix of `transforms.fit_image`."""
    rows, columns, top, left = transforms.content_area(shape, size)
    return _affine(columns / shape[1], 0, left, 0, rows / shape[0], top)


def _turn(
    centre: float, angle: float, scale: float, right: float, down: float
) -> Float[np.ndarray, "3 3"]:
    """Returns the matrix of a rotation and a zoom about the centre, followed by a translation."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    x, y = centre - (c - s) * centre + right, centre - (s + c) * centre + down
    return _affine(c, -s, x, s, c, y)


def _affine(*values: int | float) -> Float[np.ndarray, "3 3"]:
    return np.asarray([values[:3], values[3:], (0, 0, 1)], np.float64)


# Images, boxes and masks ------------------------------------------------------------------------


def warp_image(
    image: UInt8[np.ndarray, "Y X *C"], matrix: Float[np.ndarray, "2 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} *C"]:
    """Moves each point of an image to where `matrix` maps it; what comes from outside is black.

    Values are interpolated linearly between the centres of pixels. An image that is reduced to half
    its size or less is averaged over blocks of whole pixels first, so that nothing is skipped.
    """
    picture = Image.fromarray(image.reshape(image.shape[:2]))
    (a, b, x), (c, d, y) = _invert(matrix).tolist()
    block = int(math.sqrt(abs(a * d - b * c)))
    if block > 1:
        picture = picture.reduce(block)
        a, b, x, c, d, y = (value / block for value in (a, b, x, c, d, y))
    if (a, b, c, d) == (1, 0, 0, 1) and x.is_integer() and y.is_integer():
        pixels = np.asarray(picture.crop((int(x), int(y), int(x) + size, int(y) + size)))
    else:
        # As floats, because Pillow rounds the result of bytes down.
        warped = picture.convert("F").transform(
            (size, size),
            Image.Transform.AFFINE,
            (a, b, x, c, d, y),
            Image.Resampling.BILINEAR,
        )
        pixels = np.rint(np.asarray(warped)).astype(np.uint8)
    return pixels.reshape(size, size, *image.shape[2:])


def warp_mask(
    mask: Bool[np.ndarray, "Y X"], matrix: Float[np.ndarray, "2 3"], size: int
) -> Bool[np.ndarray, "{size} {size}"]:
    """Moves a mask as `warp_image` does; a pixel is True where at least half of it was."""
    return warp_image(mask.astype(np.uint8) * WHITE, matrix, size) > WHITE // 2


def warp_boxes(
    boxes: Float[np.ndarray, "N 4"], matrix: Float[np.ndarray, "2 3"], size: int
) -> Float[np.ndarray, "N 4"]:
    """Returns the upright hulls of moved boxes (x0, y0, x1, y1; pixels), cut at the border.

    A box that keeps less than `MIN_BOX_SHARE` of its area becomes zeros: what it names is hardly in
    the image any more.

    >>> matrix = np.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> warp_boxes(np.asarray([[0.0, 0.0, 4.0, 2.0], [7.0, 0.0, 9.0, 2.0]]), matrix, 8).tolist()
    [[2.0, 0.0, 6.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    """
    # Corners in the order of both, x first: [N 4].
    x, y = boxes[:, [0, 2, 0, 2]], boxes[:, [1, 1, 3, 3]]
    (a, b, e), (c, d, f) = matrix
    x, y = a * x + b * y + e, c * x + d * y + f
    hulls = np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], 1)
    visible = np.clip(hulls, 0, size)
    is_real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    is_kept = is_real & (_areas(visible) >= MIN_BOX_SHARE * _areas(hulls))
    return np.where(is_kept[:, None], visible, 0).astype(boxes.dtype)


def _areas(boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, " N"]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _invert(matrix: Float[np.ndarray, "2 3"]) -> Float[np.ndarray, "2 3"]:
    """Returns the inverse of an affine matrix, exact for whole translations."""
    (a, b, x), (c, d, y) = matrix.tolist()
    determinant = a * d - b * c
    a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
    return np.asarray([[a, b, -a * x - b * y], [c, d, -c * x - d * y]])


def change_grey(image: UInt8[np.ndarray, "Y X *C"], sample: Draw) -> UInt8[np.ndarray, "Y X *C"]:
    """Applies the brightness, the contrast and the blur of a draw, in this order."""
    if sample.brightness != 1 or sample.contrast != 1:
        levels = np.clip(np.arange(WHITE + 1) * sample.brightness, 0, WHITE)
        mean = levels.take(image).mean() if sample.contrast != 1 else 0.0
        levels = np.clip(mean + sample.contrast * (levels - mean), 0, WHITE)
        image = np.rint(levels).astype(np.uint8).take(image)
    if sample.blur > 0:
        picture = Image.fromarray(image.reshape(image.shape[:2]))
        blurred = picture.filter(ImageFilter.GaussianBlur(sample.blur))
        image = np.asarray(blurred).reshape(image.shape)
    return image


# Names of sides ---------------------------------------------------------------------------------


def exchange_sides(
    values: Shaped[np.ndarray, "N *C"], names: tuple[str, ...], option: str
) -> Shaped[np.ndarray, "N *C"]:
    """Returns the values of a mirrored image: those of `left lung` are those of `right lung`.

    Args:
      values: one for each name, or none at all.
      names: what the values are of.
      option: what the names are, for the error.

    Raises:
      UserError: a name of one side has no counterpart.
    """
    if not len(values):
        return values
    order = _mirror_order(names, option)
    if len(order) != len(values):
        raise ValueError(f"{len(values)} values of {len(order)} {option}")
    return values[order]


def have_sides(names: Sequence[str], option: str) -> bool:
    """Returns whether some of the names are of one side.

    Raises:
      UserError: a name of one side has no counterpart.
    """
    return bool((_mirror_order(tuple(names), option) != np.arange(len(names))).any())


@cache  # once for a dataset, not once for an image
def _mirror_order(names: tuple[str, ...], option: str) -> Int[np.ndarray, " N"]:
    """Returns where each name's counterpart on the other side is."""
    plain = [_spell_side(name) for name in names]
    places = {name: place for place, name in enumerate(plain)}
    counterparts = [sides.swap_sides(name) for name in plain]
    for name, counterpart in zip(plain, counterparts, strict=True):
        if counterpart not in places:
            raise UserError(
                f"the {option} of the dataset have {name!r} and not {counterpart!r}, so no image "
                "can be mirrored; set config.data.augment.flip=0"
            )
    return np.asarray([places[name] for name in counterparts], np.int64)


def _spell_side(name: str) -> str:
    """Returns a name as small words, in which a single L or R is spelled out.

    >>> [_spell_side(name) for name in ("LeftLung", "lung_R")]
    ['left lung', 'lung right']
    """
    words = _WORD_BREAK.sub(" ", name).casefold().split()
    return " ".join({"l": "left", "r": "right"}.get(word, word) for word in words)


# Records ----------------------------------------------------------------------------------------


def augment_record(
    record: Record,
    augmentation: Augmentation,
    size: int,
    rng: np.random.Generator,
    findings: Sequence[str],
    region_names: Sequence[str] = (),
) -> Record:
    """Returns a record as augmented for one draw of `rng`, with all of its annotations.

    A phrase keeps its words where its boxes or its mask are lost: nothing is known of its place
    then. In a mirrored image, `labels` and `regions` of two sides change places by their names.

    Args:
      record: the stored record.
      augmentation: the ranges.
      size: side of the square image, in pixels.
      rng: the generator of this record.
      findings: names of `record.labels`.
      region_names: names of `record.regions`.
    """
    sample = draw(augmentation, record.image.shape[:2], size, rng)
    matrix = sample.matrix
    moved = replace(
        record,
        image=change_grey(warp_image(record.image, matrix, size), sample),
        phrases=tuple(_move_phrase(phrase, matrix, size) for phrase in record.phrases),
        anatomy={name: warp_mask(mask, matrix, size) for name, mask in record.anatomy.items()},
        regions=warp_boxes(record.regions, matrix, size),
        geometry=None,  # no scale and offset describe a turn
    )
    return _mirror_names(moved, findings, region_names) if sample.is_mirrored else moved


def _move_phrase(phrase: Phrase, matrix: Float[np.ndarray, "2 3"], size: int) -> Phrase:
    boxes = warp_boxes(np.asarray(phrase.boxes, np.float64).reshape(-1, 4), matrix, size)
    boxes = boxes[boxes.any(axis=1)]
    mask = phrase.mask
    if mask is not None:
        # The same rule as for boxes, by the area that the whole mask would have.
        least_area = MIN_BOX_SHARE * mask.sum() * abs(np.linalg.det(matrix[:, :2]))
        mask = warp_mask(mask, matrix, size)
        mask = mask if mask.any() and mask.sum() >= least_area else None
    return replace(phrase, boxes=tuple((a, b, c, d) for a, b, c, d in boxes.tolist()), mask=mask)


def _mirror_names(record: Record, findings: Sequence[str], region_names: Sequence[str]) -> Record:
    """Exchanges left and right in all words and names of a record."""
    swap = sides.swap_sides
    order = _mirror_order(tuple(findings), "findings")
    spelt = {_spell_side(name): name for name in record.anatomy}
    anatomy = {
        spelt.get(swap(_spell_side(name)), swap(name)): mask
        for name, mask in record.anatomy.items()
    }
    phrases = tuple(
        replace(
            phrase,
            text=swap(phrase.text),
            key=swap(phrase.key),
            bare=swap(phrase.bare),
            finding=int(order[phrase.finding]) if 0 <= phrase.finding < len(order) else -1,
        )
        for phrase in record.phrases
    )
    return replace(
        record,
        text=swap(record.text),
        sections={name: swap(text) for name, text in record.sections.items()},
        phrases=phrases,
        anatomy={name: anatomy[name] for name in record.anatomy if name in anatomy} | anatomy,
        triplets=tuple((swap(region), swap(f), exists) for region, f, exists in record.triplets),
        labels=exchange_sides(record.labels, tuple(findings), "findings"),
        regions=exchange_sides(record.regions, tuple(region_names), "regions"),
    )

"""The phantom's anatomy: where the lungs, heart and diaphragm of a patient lie on a pixel grid.

Coordinates: the square image spans [-1, 1] in x (rightwards) and y (downwards). The patient's right
is on the image's left, as on a radiograph. `lateral` is the distance from the midline towards a
side. The fields of the geometry are soft masks from 0 to 1, or signed distances in those units.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32

Plane = Float32[np.ndarray, "Y X"]
Mask = Bool[np.ndarray, "Y X"]
Table = Float32[np.ndarray, " _"]
Number = int | float | np.floating

SIDES = ("right", "left")
ZONES = ("upper", "mid", "lower")
ANATOMY = ("right lung", "left lung", "heart") + tuple(
    f"{side} {zone} zone" for side in SIDES for zone in ZONES
)
SIDE_SIGNS = {"right": -1.0, "left": 1.0}
NUM_VESSEL_TREES = 32  # vessel trees that a lung is drawn from

# Borders are computed once per patient on a line over [-2, 2], then looked up for every pixel.
_LINE_LENGTH = 2048
_LINE = np.linspace(-2.0, 2.0, _LINE_LENGTH, dtype=np.float32)
_NUM_ANGLES = 1024  # entries of a table over the full angle


@dataclass(frozen=True)
class Patient:
    """The anatomy of a patient, the same in all studies; lengths in half-images."""

    width: float
    apex: float
    dome: dict[str, float]
    angle_drop: float
    mediastinum: float
    ratio: float  # cardiothoracic ratio
    heart_y: float
    heart_shape: Table  # radius over the angle, in any scale
    knob_y: float
    trachea_lean: float
    rib_start: float
    rib_gap: float
    rib_slope: float
    rib_jitter: Float32[np.ndarray, "2 2 16"]  # side; back, front; rib
    clavicle_y: float
    scapula: float
    girth: float
    breast: float
    bubble: tuple[float, float, float]
    vessels: tuple[int, int]
    texture: Float32[np.ndarray, "20 20"]


@dataclass(frozen=True)
class Chest:
    """Fields of one study on the pixel grid; soft fields run from 0 to 1 over about a pixel.

    `depth` is roughly the signed distance inside the border of a lung. `edges` are the medial and
    lateral border of a lung at each pixel's y. `height` is 0 at the apex of the lungs and 1 at the
    costophrenic angles.
    """

    patient: Patient
    pixel: float
    x: Plane
    y: Plane
    lateral: dict[str, Plane]
    lung: dict[str, Plane]
    depth: dict[str, Plane]
    edges: dict[str, tuple[Plane, Plane]]
    heart: Plane
    dome: Plane
    height: Plane


def draw_patient(rng: np.random.Generator) -> Patient:
    """Returns a random anatomy; none of its numbers depends on the size of the image."""
    # The order of these draws is part of the data: changing it changes every phantom.
    uniform = rng.uniform
    dome = uniform(0.40, 0.52)
    return Patient(
        width=uniform(0.68, 0.78),
        apex=uniform(-0.86, -0.77),
        dome={"right": dome, "left": dome + uniform(0.03, 0.09)},
        angle_drop=uniform(0.17, 0.24),
        mediastinum=uniform(0.10, 0.135),
        ratio=uniform(0.41, 0.48),
        heart_y=uniform(0.20, 0.26),
        heart_shape=_draw_heart_shape(rng),
        knob_y=uniform(-0.36, -0.27),
        trachea_lean=uniform(0.0, 0.03),
        rib_start=uniform(-0.93, -0.85),
        rib_gap=uniform(0.148, 0.170),
        rib_slope=uniform(0.20, 0.32),
        rib_jitter=rng.normal(0, 0.06, (2, 2, 16)).astype(np.float32),
        clavicle_y=uniform(-0.72, -0.64),
        scapula=uniform(0.0, 0.06),
        girth=uniform(0.92, 1.04),
        breast=uniform(0.5, 1.0) if uniform() < 0.4 else 0.0,
        bubble=(uniform(0.28, 0.45), uniform(0.10, 0.16), uniform(0.3, 1.0)),
        vessels=(int(rng.integers(NUM_VESSEL_TREES)), int(rng.integers(NUM_VESSEL_TREES))),
        texture=rng.normal(0, 1, (20, 20)).astype(np.float32),
    )


def _draw_heart_shape(rng: np.random.Generator) -> Table:
    """Returns the radius of a heart over the angle (0: image right, growing downwards).

    The shape is a tilted egg, not an ellipse: its blunt ventricle points down and to the patient's
    left, the right atrium bulges, and there is a waist below the pulmonary trunk.
    """
    angles = np.linspace(-np.pi, np.pi, _NUM_ANGLES, endpoint=False)
    tilt = rng.uniform(0.45, 0.75)
    long_axis, short_axis = 1.0, rng.uniform(0.74, 0.84)
    radius = 1 / np.sqrt(
        (np.cos(angles - tilt) / long_axis) ** 2 + (np.sin(angles - tilt) / short_axis) ** 2
    )
    bumps = (  # angle, width, height
        (rng.uniform(0.15, 0.45), 0.45, rng.uniform(0.06, 0.16)),  # left ventricle
        (rng.uniform(2.75, 3.05), 0.50, rng.uniform(0.04, 0.12)),  # right atrium
        (1.60, 0.55, rng.uniform(0.22, 0.34)),  # lower border, on the diaphragm
        (-0.95, 0.35, -rng.uniform(0.06, 0.14)),  # waist
        (-1.75, 0.50, rng.uniform(0.10, 0.22)),  # base, into the great vessels
    )
    for angle, width, height in bumps:
        # The angle of a complex number wraps the difference into (-pi, pi].
        offset = np.angle(np.exp(1j * (angles - angle)))
        radius = radius * (1 + height * np.exp(-0.5 * (offset / width) ** 2))
    return radius.astype(np.float32)


def lay_out_chest(
    patient: Patient,
    size: int,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    turn: float = 0.0,
    zoom: float = 1.0,
    ratio: float | None = None,
) -> Chest:
    """Returns the fields of a patient on `size` x `size` pixels.

    Args:
      patient: the anatomy.
      size: pixels of a side.
      shift: displacement of the patient to the right and downwards, in half-images.
      turn: rotation in radians.
      zoom: magnification.
      ratio: the cardiothoracic ratio, by default the patient's own.
    """
    column, row = _pixel_grid(size)
    cos, sin = np.float32(np.cos(turn) / zoom), np.float32(np.sin(turn) / zoom)
    x = cos * (column - np.float32(shift[0])) + sin * (row - np.float32(shift[1]))
    y = cos * (row - np.float32(shift[1])) - sin * (column - np.float32(shift[0]))
    pixel = 2.0 / size / zoom
    lateral = {side: x * np.float32(SIDE_SIGNS[side]) for side in SIDES}
    depth, edges, domes = {}, {}, {}
    for side in SIDES:
        depth[side], edges[side], domes[side] = _lung_borders(patient, side, lateral[side], y)
    dome = np.where(x < 0, domes["right"], domes["left"])
    heart = _heart_mask(patient, x, y, dome, pixel, patient.ratio if ratio is None else ratio)
    lung = {side: soft_step(depth[side], 1.6 * pixel + 0.006) * (1 - heart) for side in SIDES}
    bottom = patient.dome["right"] + patient.angle_drop
    height = (y - np.float32(patient.apex)) / np.float32(bottom - patient.apex)
    return Chest(patient, pixel, x, y, lateral, lung, depth, edges, heart, dome, height)


def clip(x: np.ndarray, low: Number, high: Number) -> np.ndarray:
    """Returns `np.clip` of any [shape], without overhead that takes a fifth of the drawing time."""
    return np.minimum(np.maximum(x, low), high)


def soft_step(distance: Plane, width: Number) -> Plane:
    """Returns a ramp from 0 to 1 as a signed distance goes from -width/2 to +width/2."""
    return clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def segment_anatomy(chest: Chest) -> dict[str, Mask]:
    """Returns the masks of `ANATOMY`: lungs without the heart, the heart, thirds of each lung."""
    masks = {f"{side} lung": chest.lung[side] > 0.5 for side in SIDES}
    masks["heart"] = chest.heart > 0.5
    third = clip((chest.height * 3).astype(np.int8), 0, 2)
    for side in SIDES:
        for number, zone in enumerate(ZONES):
            masks[f"{side} {zone} zone"] = masks[f"{side} lung"] & (third == number)
    return masks


def stretch_grid(grid: Float32[np.ndarray, "n n"], size: int) -> Plane:
    """Returns a coarse grid of random numbers stretched smoothly over F32[size size] pixels."""
    weights = _stretch_weights(grid.shape[0], size)
    return weights @ grid @ weights.T


def gaussian_bump(
    x: Plane, y: Plane, center_x: Number, center_y: Number, sigma_x: Number, sigma_y: Number
) -> Plane:
    """Returns an unnormalised Gaussian with these standard deviations."""
    x_scaled = (x - np.float32(center_x)) * np.float32(1 / sigma_x)
    y_scaled = (y - np.float32(center_y)) * np.float32(1 / sigma_y)
    return np.exp(np.float32(-0.5) * (x_scaled * x_scaled + y_scaled * y_scaled))


@lru_cache(maxsize=8)
def _pixel_grid(size: int) -> tuple[Plane, Plane]:
    """Returns the coordinates of the pixel centres, columns and rows, in [-1, 1]."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return np.meshgrid(line, line)


@lru_cache(maxsize=32)
def _stretch_weights(coarse: int, size: int) -> Float32[np.ndarray, "size coarse"]:
    """Returns the weights of coarse points for each pixel: Gaussian, close to cubic splines."""
    position = (np.arange(size) + 0.5) / size * (coarse - 1)
    offset = position[:, None] - np.arange(coarse)[None]
    weights = np.exp(-0.5 * (offset / 0.55) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _sample_line(values: Table, position: Plane) -> Plane:
    """Returns the values over [-2, 2] at the entries nearest to each position."""
    scale = np.float32((_LINE_LENGTH - 1) / 4)
    index = ((position + np.float32(2)) * scale + np.float32(0.5)).astype(np.int32)
    return values[clip(index, 0, _LINE_LENGTH - 1)]


def _lung_borders(
    patient: Patient, side: str, lateral: Plane, y: Plane
) -> tuple[Plane, tuple[Plane, Plane], Plane]:
    """Returns the depth inside a lung, its (medial, lateral) borders over y, and its diaphragm."""
    bottom = patient.dome[side] + patient.angle_drop
    descent = clip((_LINE - patient.apex) / (bottom - patient.apex), 1e-4, 1.2)
    tip = 0.50 * patient.width
    rise = (1 - (1 - clip(descent / 0.80, 0, 1)) ** 2.2) ** 0.56
    outer = tip + (patient.width - tip) * rise - 0.03 * clip(descent - 0.80, 0, 1)
    taper = (1 - (1 - clip(descent / 0.34, 0, 1)) ** 2.2) ** 0.6
    inner = tip - (tip - patient.mediastinum) * taper
    # Centre, width and height of what bulges into the lung from the mediastinum.
    bulges: tuple[tuple[float, float, float], ...]
    if side == "left":
        aortic_knob = (patient.knob_y, 0.05, 0.05)
        pulmonary_trunk = (patient.knob_y + 0.17, 0.06, 0.03)
        bulges = (aortic_knob, pulmonary_trunk)
    else:
        superior_vena_cava = (patient.knob_y + 0.10, 0.12, 0.02)
        bulges = (superior_vena_cava,)
    for center, width, height in bulges:
        inner = inner + height * np.exp(-0.5 * ((_LINE - center) / width) ** 2)
    # The diaphragm falls steeply from its crest to the wall, and gently to the midline.
    crest = 0.44 * patient.width
    to_wall = clip((_LINE - crest) / (patient.width - crest), 0, 1.3)
    to_midline = clip((crest - _LINE) / crest, 0, 2)
    dome = patient.dome[side] + patient.angle_drop * to_wall**2.2 + 0.07 * to_midline**2
    inner_edge = _sample_line(inner.astype(np.float32), y)
    outer_edge = _sample_line(outer.astype(np.float32), y)
    dome_edge = _sample_line(dome.astype(np.float32), lateral)
    depth = np.minimum(np.minimum(lateral - inner_edge, outer_edge - lateral), dome_edge - y)
    depth = np.minimum(depth, y - np.float32(patient.apex))
    return depth, (inner_edge, outer_edge), dome_edge


def _heart_mask(
    patient: Patient, x: Plane, y: Plane, dome: Plane, pixel: float, ratio: float
) -> Plane:
    """Returns the soft mask of the heart, scaled to `ratio` of the chest's inner width."""
    angles = np.linspace(-np.pi, np.pi, _NUM_ANGLES, endpoint=False)
    reach = patient.heart_shape * np.cos(angles)
    scale = ratio * 2 * (patient.width - 0.01) / (reach.max() - reach.min())
    right_part = 0.33 * ratio * 2 * patient.width  # a third of it lies right of the midline
    center_x = scale * -reach.min() - right_part
    center_y = patient.heart_y - 0.35 * (scale - 0.33)
    offset_x, offset_y = x - np.float32(center_x), y - np.float32(center_y)
    angle = np.arctan2(offset_y, offset_x) + np.float32(np.pi)
    index = (angle * np.float32(_NUM_ANGLES / 2 / np.pi)).astype(np.int32)
    radius = patient.heart_shape[clip(index, 0, _NUM_ANGLES - 1)] * np.float32(scale)
    inside = radius - np.sqrt(offset_x * offset_x + offset_y * offset_y)
    # The heart rests on the diaphragm: a little below its dome the mask ends.
    return soft_step(np.minimum(inside, dome + np.float32(0.03) - y), 2 * pixel + 0.012)

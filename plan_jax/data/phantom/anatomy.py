"""The phantom's anatomy: where one patient's lungs, heart and diaphragm lie on a pixel grid.

Coordinates: the square image spans [-1, 1] in x (rightwards) and y (downwards); the patient's right
is on the image's left, as on a radiograph. `lateral` is the distance from the midline towards a
side. Fields of the geometry are soft masks from 0 to 1, or signed distances in those units.
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
    f"{s} {z} zone" for s in SIDES for z in ZONES
)
SIGN = {"right": -1.0, "left": 1.0}
_TABLE = 2048  # entries of a table over [-2, 2]
_AXIS = np.linspace(-2.0, 2.0, _TABLE, dtype=np.float32)
_TURN = 1024  # entries of a table over the full angle
VESSELS = 32  # vessel trees to choose from


@dataclass(frozen=True)
class Patient:
    """What stays the same between two studies of one patient; lengths in half-images."""

    width: float
    apex: float
    dome: dict[str, float]
    angle_drop: float
    mediastinum: float
    ratio: float  # cardiothoracic ratio
    heart_y: float
    heart_shape: Table  # radius over the angle, free scale
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
    """Fields of one study on the pixel grid; soft fields run from 0 to 1 over about a pixel."""

    patient: Patient
    pixel: float
    x: Plane
    y: Plane
    lateral: dict[str, Plane]
    lung: dict[str, Plane]
    depth: dict[str, Plane]  # signed distance inside the lung's border, roughly
    edges: dict[str, tuple[Plane, Plane]]  # medial and lateral border at each pixel's y
    heart: Plane
    dome: Plane
    height: Plane  # 0 at the apex of the lungs, 1 at the costophrenic angles


def new_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient's anatomy; every number of it is independent of the image's size."""
    u = rng.uniform
    dome = u(0.40, 0.52)
    return Patient(
        width=u(0.68, 0.78),
        apex=u(-0.86, -0.77),
        dome={"right": dome, "left": dome + u(0.03, 0.09)},
        angle_drop=u(0.17, 0.24),
        mediastinum=u(0.10, 0.135),
        ratio=u(0.41, 0.48),
        heart_y=u(0.20, 0.26),
        heart_shape=_heart_shape(rng),
        knob_y=u(-0.36, -0.27),
        trachea_lean=u(0.0, 0.03),
        rib_start=u(-0.93, -0.85),
        rib_gap=u(0.148, 0.170),
        rib_slope=u(0.20, 0.32),
        rib_jitter=rng.normal(0, 0.06, (2, 2, 16)).astype(np.float32),
        clavicle_y=u(-0.72, -0.64),
        scapula=u(0.0, 0.06),
        girth=u(0.92, 1.04),
        breast=u(0.5, 1.0) if u() < 0.4 else 0.0,
        bubble=(u(0.28, 0.45), u(0.10, 0.16), u(0.3, 1.0)),
        vessels=(int(rng.integers(VESSELS)), int(rng.integers(VESSELS))),
        texture=rng.normal(0, 1, (20, 20)).astype(np.float32),
    )


def _heart_shape(rng: np.random.Generator) -> Table:
    """Radius of the heart over the angle (0: image right, growing downwards): no ellipse.

    A tilted egg whose blunt ventricle points down and to the patient's left, with a bulging right
    atrium and a waist below the pulmonary trunk.
    """
    a = np.linspace(-np.pi, np.pi, _TURN, endpoint=False)
    tilt = rng.uniform(0.45, 0.75)
    long, short = 1.0, rng.uniform(0.74, 0.84)
    radius = 1 / np.sqrt((np.cos(a - tilt) / long) ** 2 + (np.sin(a - tilt) / short) ** 2)
    bumps = (  # angle, width, height
        (rng.uniform(0.15, 0.45), 0.45, rng.uniform(0.06, 0.16)),  # left ventricle
        (rng.uniform(2.75, 3.05), 0.50, rng.uniform(0.04, 0.12)),  # right atrium
        (1.60, 0.55, rng.uniform(0.22, 0.34)),  # lower border, on the diaphragm
        (-0.95, 0.35, -rng.uniform(0.06, 0.14)),  # waist
        (-1.75, 0.50, rng.uniform(0.10, 0.22)),  # base, into the great vessels
    )
    for angle, width, height in bumps:
        off = np.angle(np.exp(1j * (a - angle)))
        radius = radius * (1 + height * np.exp(-0.5 * (off / width) ** 2))
    return radius.astype(np.float32)


def chest(
    patient: Patient,
    size: int,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    turn: float = 0.0,
    zoom: float = 1.0,
    ratio: float | None = None,
) -> Chest:
    """Lay a patient out on `size` x `size` pixels, shifted (half-images), turned (radians), zoomed.

    `ratio` overrides the cardiothoracic ratio.
    """
    u, v = _grid(size)
    cos, sin = np.float32(np.cos(turn) / zoom), np.float32(np.sin(turn) / zoom)
    x = cos * (u - np.float32(shift[0])) + sin * (v - np.float32(shift[1]))
    y = cos * (v - np.float32(shift[1])) - sin * (u - np.float32(shift[0]))
    pixel = 2.0 / size / zoom
    lateral = {side: x * np.float32(SIGN[side]) for side in SIDES}
    depth, edges, domes = {}, {}, {}
    for side in SIDES:
        depth[side], edges[side], domes[side] = _lung(patient, side, lateral[side], y)
    dome = np.where(x < 0, domes["right"], domes["left"])
    heart = _heart(patient, x, y, dome, pixel, patient.ratio if ratio is None else ratio)
    lung = {side: soft(depth[side], 1.6 * pixel + 0.006) * (1 - heart) for side in SIDES}
    bottom = patient.dome["right"] + patient.angle_drop
    height = (y - np.float32(patient.apex)) / np.float32(bottom - patient.apex)
    return Chest(patient, pixel, x, y, lateral, lung, depth, edges, heart, dome, height)


def clip(x: np.ndarray, low: Number, high: Number) -> np.ndarray:
    """`np.clip` of any [shape] without its overhead, which would be a fifth of the drawing time."""
    return np.minimum(np.maximum(x, low), high)


def soft(inside: Plane, width: Number) -> Plane:
    """Ramp from 0 to 1 as a signed distance goes from -width/2 to +width/2."""
    return clip(inside * np.float32(1 / width) + np.float32(0.5), 0, 1)


def anatomy_masks(made: Chest) -> dict[str, Mask]:
    """Bool masks of `ANATOMY`: lungs without the heart, the heart, and the thirds of each lung."""
    masks = {f"{side} lung": made.lung[side] > 0.5 for side in SIDES}
    masks["heart"] = made.heart > 0.5
    third = clip((made.height * 3).astype(np.int8), 0, 2)
    for side in SIDES:
        for number, zone in enumerate(ZONES):
            masks[f"{side} {zone} zone"] = masks[f"{side} lung"] & (third == number)
    return masks


def smooth_field(grid: Float32[np.ndarray, "n n"], size: int) -> Plane:
    """Stretch a coarse random grid over the image with cubic-like weights: F32[size size]."""
    weights = _stretch(grid.shape[0], size)
    return weights @ grid @ weights.T


def gauss(x: Plane, y: Plane, cx: Number, cy: Number, rx: Number, ry: Number) -> Plane:
    """Unnormalised Gaussian bump with standard deviations rx, ry."""
    a, b = (x - np.float32(cx)) * np.float32(1 / rx), (y - np.float32(cy)) * np.float32(1 / ry)
    return np.exp(np.float32(-0.5) * (a * a + b * b))


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane]:
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return np.meshgrid(line, line)


@lru_cache(maxsize=32)
def _stretch(coarse: int, size: int) -> Float32[np.ndarray, "size coarse"]:
    position = (np.arange(size) + 0.5) / size * (coarse - 1)
    off = position[:, None] - np.arange(coarse)[None]
    weights = np.exp(-0.5 * (off / 0.55) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _look(table: Table, at: Plane) -> Plane:
    """Read a table over [-2, 2] at the nearest entry."""
    index = ((at + np.float32(2)) * np.float32((_TABLE - 1) / 4) + np.float32(0.5)).astype(np.int32)
    return table[clip(index, 0, _TABLE - 1)]


def _lung(
    p: Patient, side: str, lateral: Plane, y: Plane
) -> tuple[Plane, tuple[Plane, Plane], Plane]:
    """Depth inside one lung, its (medial, lateral) borders over y, and the diaphragm over x."""
    bottom = p.dome[side] + p.angle_drop
    t = clip((_AXIS - p.apex) / (bottom - p.apex), 1e-4, 1.2)
    tip = 0.50 * p.width
    rise = (1 - (1 - clip(t / 0.80, 0, 1)) ** 2.2) ** 0.56
    outer = tip + (p.width - tip) * rise - 0.03 * clip(t - 0.80, 0, 1)
    inner = tip - (tip - p.mediastinum) * (1 - (1 - clip(t / 0.34, 0, 1)) ** 2.2) ** 0.6
    bumps = (
        ((p.knob_y, 0.05, 0.05), (p.knob_y + 0.17, 0.06, 0.03))
        if side == "left"
        else ((p.knob_y + 0.10, 0.12, 0.02),)
    )
    for centre, width, size in bumps:  # aortic knob and pulmonary trunk; superior vena cava
        inner = inner + size * np.exp(-0.5 * ((_AXIS - centre) / width) ** 2)
    top, crest = p.dome[side], 0.44 * p.width
    beyond = clip((_AXIS - crest) / (p.width - crest), 0, 1.3)
    before = clip((crest - _AXIS) / crest, 0, 2)
    dome = top + p.angle_drop * beyond**2.2 + 0.07 * before**2
    inner, outer = _look(inner.astype(np.float32), y), _look(outer.astype(np.float32), y)
    dome = _look(dome.astype(np.float32), lateral)
    depth = np.minimum(np.minimum(lateral - inner, outer - lateral), dome - y)
    return np.minimum(depth, y - np.float32(p.apex)), (inner, outer), dome


def _heart(p: Patient, x: Plane, y: Plane, dome: Plane, pixel: float, ratio: float) -> Plane:
    """Soft mask of the heart, scaled so that its width is `ratio` of the chest's inner width."""
    a = np.linspace(-np.pi, np.pi, _TURN, endpoint=False)
    across = p.heart_shape * np.cos(a)
    scale = ratio * 2 * (p.width - 0.01) / (across.max() - across.min())
    right = 0.33 * ratio * 2 * p.width  # a third of it lies right of the midline
    cx = scale * -across.min() - right
    cy = p.heart_y - 0.35 * (scale - 0.33)
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    index = ((np.arctan2(dy, dx) + np.float32(np.pi)) * np.float32(_TURN / 2 / np.pi)).astype(
        np.int32
    )
    radius = p.heart_shape[clip(index, 0, _TURN - 1)] * np.float32(scale)
    inside = radius - np.sqrt(dx * dx + dy * dy)
    return soft(np.minimum(inside, dome + np.float32(0.03) - y), 2 * pixel + 0.012)

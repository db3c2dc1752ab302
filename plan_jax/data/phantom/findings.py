"""How each finding of the phantom looks, and its exact mask.

A finding changes fields of a `Scene` before the exposure is computed: `fill` (share of the lung's
air replaced, 0 to 1), `clear` (pleural air, no lung), `add` (opacity on top). Its mask is where
that change is at least about half of its full strength, inside the organ it lies in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from plan_jax.data.phantom.anatomy import SIDES, Chest, Mask, Number, Plane, clip, gauss, soft
from plan_jax.data.phantom.cases import Finding, Shape

_HEIGHT = {"upper": (0.16, 0.26), "mid": (0.42, 0.56), "lower": (0.73, 0.84)}


@dataclass
class Scene:
    """A chest and the changes that findings made to it so far."""

    chest: Chest
    vessels: Plane  # opacity of the lungs' vessels
    texture: Plane  # zero mean, about unit variance
    fill: Plane
    add: Plane
    clear: Plane
    closed: Mask  # no further finding of the lung here (fluid, pleural air)

    def air(self, side: str) -> Mask:
        """Bool: lung of that side in which another finding can be seen; masks lie in it."""
        return (self.chest.lung[side] > 0.5) & ~self.closed

    def paintable(self, side: str) -> Mask:
        """Bool: `air` and the lung's soft border; what is drawn reaches into it."""
        return (self.chest.lung[side] > 0) & ~self.closed


def new_scene(made: Chest, vessels: Plane, texture: Plane) -> Scene:
    """A scene without findings."""
    zero = np.zeros_like(made.x)
    return Scene(made, vessels, texture, zero, zero.copy(), zero.copy(), np.zeros(zero.shape, bool))


def paint(scene: Scene, finding: Finding) -> Mask:
    """Draw one finding into the scene and return its Bool mask."""
    return _PAINT[finding.kind](scene, finding, finding.shape)


def _spot(scene: Scene, f: Finding, r: Shape, span=(0.25, 0.75)) -> tuple[float, float]:
    """Centre of a finding in its zone: a height, and a share of the lung's breadth there.

    With pleural air beside it the centre moves medially, into what is left of the lung.
    """
    made = scene.chest
    low, high = _HEIGHT[f.zone]
    if f.zone == "lower" and f.side == "left":
        span = (max(span[0], 0.45), max(span[1], 0.8))  # clear of the heart
    height = low + (high - low) * r[0]
    rows = np.abs(made.height - height) < 1.2 * made.pixel
    free = rows & scene.air(f.side)
    if not free.any():
        free = rows & (made.lung[f.side] > 0.5)
    if not free.any():
        free = made.lung[f.side] > 0.5
    s = made.lateral[f.side][free]
    share = span[0] + (span[1] - span[0]) * r[1]
    across = s.min() + (s.max() - s.min()) * share
    return float(across), float(made.y[free].mean())


def _consolidation(scene: Scene, f: Finding, r: Shape) -> Mask:
    """Patchy airspace opacity with a ragged border and air left inside."""
    made, s = scene.chest, scene.chest.lateral[f.side]
    cx, cy = _spot(scene, f, r, (0.35, 0.65))
    radius = (0.105, 0.14, 0.18)[f.level] * (0.92 + 0.16 * r[2])
    blob = np.zeros_like(s)
    for i in range(4):
        turn, far = 2 * np.pi * (i / 4 + 0.2 * r[3 + i]), (0.45 + 0.4 * r[7 + i]) * radius
        rx, ry = radius * (0.45 + 0.25 * r[11 + i]), radius * (0.40 + 0.22 * r[15 + i])
        lump = gauss(s, made.y, cx + far * np.cos(turn), cy + 0.85 * far * np.sin(turn), rx, ry)
        blob = 1 - (1 - blob) * (1 - lump)
    blob = blob * (1 + 0.20 * scene.texture)
    share = clip((blob - 0.20) / 0.45, 0, 1)
    dense = (0.62 + 0.10 * f.level) * share * scene.paintable(f.side)
    scene.fill = 1 - (1 - scene.fill) * (1 - dense)
    return (share > 0.5) & scene.air(f.side)


def _nodule(scene: Scene, f: Finding, r: Shape) -> Mask:
    """Round, sharply bordered opacity, slightly lobulated."""
    made = scene.chest
    cx, cy = _spot(scene, f, r, (0.25, 0.78))
    radius = (0.040, 0.054, 0.070)[f.level] * (0.94 + 0.12 * r[2])
    dx, dy = made.lateral[f.side] - np.float32(cx), made.y - np.float32(cy)
    distance = np.sqrt(dx * dx + dy * dy * np.float32(0.85 + 0.3 * r[3]))
    ball = clip(1 - (distance / np.float32(radius)) ** 2, 0, 1)
    seen = np.minimum(np.sqrt(ball) * 1.25, 1) * scene.paintable(f.side)
    scene.add = scene.add + np.float32(0.36 + 0.06 * r[4]) * seen
    return (distance < max(radius, 0.8 * made.pixel)) & scene.air(f.side)


def _effusion(scene: Scene, f: Finding, r: Shape) -> Mask:
    """Fluid from the diaphragm up to a meniscus that climbs the lateral wall."""
    made, s = scene.chest, scene.chest.lateral[f.side]
    p = made.patient
    level = (0.845, 0.70, 0.50)[f.level] - 0.05 * r[0] + 0.03 * r[1]
    q = clip(s * np.float32(1 / p.width), 0, 1.1)
    climb = (0.05 + 0.05 * r[2]) + (0.10, 0.13, 0.16)[f.level] * q**4
    surface = np.float32(level) - climb - 0.05 * clip(0.35 - q, 0, 1)
    below = soft(made.height - surface, 0.035 + 1.5 * made.pixel)
    fluid = below * (made.lung[f.side] > 0)
    scene.fill = 1 - (1 - scene.fill) * (1 - 0.97 * fluid)
    scene.add = scene.add + 0.20 * fluid * made.lung[f.side]
    mask = (below > 0.5) & (made.lung[f.side] > 0.5)
    scene.closed = scene.closed | (mask | (below > 0.1) & (made.lung[f.side] > 0.5))
    return mask


def _pneumothorax(scene: Scene, f: Finding, r: Shape) -> Mask:
    """Pleural air along the lateral wall and apex, a white pleural line, no vessels beyond it."""
    made, s = scene.chest, scene.chest.lateral[f.side]
    inner, outer = made.edges[f.side]
    gap = (0.12, 0.18, 0.27)[f.level] * (0.9 + 0.2 * r[0])
    h = made.height
    bow = clip(1 - 0.80 * clip(h, 0, 1.1) ** (1.2 + r[1]), 0.04, 1)
    edge = outer - np.float32(gap) * bow
    roof = np.float32((0.07, 0.11, 0.18)[f.level]) + 0.10 * ((s - 0.30) / 0.30) ** 2
    wall, top = edge - s, 1.2 * (h - roof)
    lung = -0.04 * np.logaddexp(wall * -25, top * -25)  # the smaller of the two, corner rounded
    lung_soft = soft(lung, 1.5 * made.pixel)
    outside = (1 - lung_soft) * made.lung[f.side]
    scene.clear = np.maximum(scene.clear, outside)
    half = max(0.011, 0.55 * made.pixel)
    line = clip(1.4 - np.abs(lung) / np.float32(half), 0, 1) * (made.lung[f.side] > 0.5)
    scene.add = scene.add + 0.24 * line
    scene.fill = 1 - (1 - scene.fill) * (1 - 0.10 * (1 + f.level) * lung_soft * made.lung[f.side])
    mask = (lung < 0) & (made.lung[f.side] > 0.5)
    scene.closed = scene.closed | mask | (lung < 0.03) & (made.lung[f.side] > 0.5)
    return mask


def _cardiomegaly(scene: Scene, f: Finding, r: Shape) -> Mask:
    """The heart itself, which `phantom.draw` has already laid out larger."""
    return scene.chest.heart > 0.5


def _atelectasis(scene: Scene, f: Finding, r: Shape) -> Mask:
    """A thin, slightly oblique band across part of the lung."""
    made, s = scene.chest, scene.chest.lateral[f.side]
    cx, cy = _spot(scene, f, r, (0.42, 0.58))
    half = max((0.016, 0.021, 0.028)[f.level], 0.8 * made.pixel)
    long = 0.17 + 0.05 * r[2]
    tilt = (r[3] - 0.5) * 0.7
    dx, dy = s - np.float32(cx), made.y - np.float32(cy)
    along = np.cos(tilt) * dx + np.sin(tilt) * dy
    off = np.cos(tilt) * dy - np.sin(tilt) * dx + (r[4] - 0.5) * 1.2 * along * along
    inside = np.minimum(half - np.abs(off), 0.25 * (long - np.abs(along)))
    scene.add = scene.add + 0.36 * soft(inside, half) * scene.paintable(f.side)
    return (inside > 0) & scene.air(f.side)


def _oedema(scene: Scene, f: Finding, r: Shape) -> Mask:
    """Bat-wing haze around both hila, thick vessels, short septal lines at the bases."""
    made = scene.chest
    p = made.patient
    mask = np.zeros(made.x.shape, bool)
    for side in SIDES:
        s, air = made.lateral[side], scene.air(side)
        cx, cy = p.mediastinum + 0.15 + 0.03 * r[0], p.knob_y + 0.26 + 0.04 * r[1]
        wing = gauss(s, made.y, cx, cy, 0.17, 0.24) * (1 + 0.20 * scene.texture)
        share = clip((wing - 0.18) / 0.42, 0, 1) * scene.paintable(side)
        dense = (0.34, 0.45, 0.57)[f.level] * share
        septa = np.abs(np.sin(made.y * 48)) > 0.93
        at = s > p.width - 0.13 + 0.03 * np.sin(made.y * 31)
        at &= (made.height > 0.68) & (made.height < 0.9) & air
        scene.add = scene.add + (0.06 + 0.03 * f.level) * (septa & at).astype(np.float32)
        scene.add = scene.add + 0.10 * scene.vessels * share
        scene.fill = 1 - (1 - scene.fill) * (1 - dense)
        mask |= (share > 0.5) & air
    return mask


def _pacemaker(scene: Scene, f: Finding, r: Shape) -> Mask:
    """A generator below the clavicle and its leads through the great veins into the heart."""
    made, s, y = scene.chest, scene.chest.lateral[f.side], scene.chest.y
    p = made.patient
    cx, cy = p.width * (0.66 + 0.06 * r[0]), p.clavicle_y + 0.22 + 0.04 * r[1]
    tilt = (r[2] - 0.5) * 0.6
    a = np.cos(tilt) * (s - cx) + np.sin(tilt) * (y - cy)
    b = np.cos(tilt) * (y - cy) - np.sin(tilt) * (s - cx)
    box = ((a / 0.115) ** 4 + (b / 0.10) ** 4) ** 0.25
    case = soft(0.1 * (1 - box), 0.015 + made.pixel)
    inner = soft(0.1 * (0.72 - box), 0.015 + made.pixel)
    mask = case > 0.5
    add = 0.85 * case + 0.15 * inner * (b > -0.02)
    sign = -1.0 if f.side == "right" else 1.0
    way = [
        (sign * (cx - 0.06), cy - 0.08),
        (sign * 0.36, p.clavicle_y + 0.07),
        (sign * 0.14, p.knob_y - 0.20),
        (-0.075, p.knob_y - 0.02),
        (-0.085, 0.05),
    ]
    leads = [[*way, (0.02, 0.30), (0.20 + 0.04 * r[3], 0.36 + 0.03 * r[4])]]
    if f.level:  # a second lead parts from it, to the atrium
        leads.append([*way[-2:], (-0.06, 0.16), (-0.02, 0.12 + 0.03 * r[5])])
    half = max(0.008, 0.62 * made.pixel)
    wire = np.full(s.shape, np.inf, np.float32)
    for points in leads:
        wire = np.minimum(wire, _distance(made.x, y, _curve(points)))
    lead = clip(1.5 - wire / np.float32(half), 0, 1)
    scene.add = scene.add + np.maximum(add, 0.50 * lead)
    return mask | (wire < half)


def _curve(points: list[tuple[Number, Number]]) -> Float32[np.ndarray, "n 2"]:
    """Round the corners of a polyline by cutting them twice (Chaikin 1974)."""
    line = np.array(points, np.float32)
    for _ in range(2):
        a, b = line[:-1], line[1:]
        line = np.concatenate(
            [
                line[:1],
                np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], 1).reshape(-1, 2),
                line[-1:],
            ]
        )
    return line


def _distance(x: Plane, y: Plane, line: Float32[np.ndarray, "n 2"]) -> Plane:
    """Distance of each pixel to a polyline; infinite far from its bounding box."""
    near = (x > line[:, 0].min() - 0.1) & (x < line[:, 0].max() + 0.1)
    near &= (y > line[:, 1].min() - 0.1) & (y < line[:, 1].max() + 0.1)
    point = np.stack([x[near], y[near]], 1)[:, None]
    start, step = line[:-1], np.diff(line, axis=0)
    share = ((point - start) * step).sum(-1) / ((step * step).sum(-1) + np.float32(1e-9))
    off = point - start - clip(share, 0, 1)[..., None] * step
    out = np.full(x.shape, np.inf, np.float32)
    out[near] = np.sqrt((off * off).sum(-1).min(1))
    return out


_PAINT: dict[str, Callable[[Scene, Finding, Shape], Mask]] = {
    "consolidation": _consolidation,
    "nodule": _nodule,
    "pleural effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "cardiomegaly": _cardiomegaly,
    "pacemaker": _pacemaker,
    "linear atelectasis": _atelectasis,
    "pulmonary oedema": _oedema,
}

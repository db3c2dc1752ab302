"""The appearance of each finding of a phantom, and its exact mask.

A finding changes fields of a `Scene` before the exposure is computed. Its mask is where that change
is at least about half of its full strength, inside the organ that it lies in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from plan_jax.data.phantom.anatomy import (
    SIDE_SIGNS,
    SIDES,
    Chest,
    Mask,
    Number,
    Plane,
    clip,
    gaussian_bump,
    soft_step,
)
from plan_jax.data.phantom.findings import Finding

# Heights of the centres of findings in each zone: 0 at the apex, 1 at the costophrenic angles.
_ZONE_HEIGHTS = {"upper": (0.16, 0.26), "mid": (0.42, 0.56), "lower": (0.73, 0.84)}


@dataclass
class Scene:
    """A chest and the changes that findings have made to it.

    `vessels` is the opacity of the lungs' vessels and `texture` noise of zero mean and about unit
    variance. `filled` is the share of the lung's air that is replaced, 0 to 1, `pleural_air` where
    air lies outside the lung, and `opacity` what adds to everything else. No further finding of the
    lung is drawn where it is `occupied` by fluid or pleural air.
    """

    chest: Chest
    vessels: Plane
    texture: Plane
    filled: Plane
    opacity: Plane
    pleural_air: Plane
    occupied: Mask

    def free_lung(self, side: str) -> Mask:
        """Returns where in a lung another finding can be seen; masks lie in it."""
        return (self.chest.lung[side] > 0.5) & ~self.occupied

    def free_lung_with_border(self, side: str) -> Mask:
        """Returns `free_lung` and the lung's soft border, into which findings are drawn."""
        return (self.chest.lung[side] > 0) & ~self.occupied

    def fill(self, share: Plane) -> None:
        """Replaces a share of the air that is left."""
        self.filled = 1 - (1 - self.filled) * (1 - share)


def empty_scene(chest: Chest, vessels: Plane, texture: Plane) -> Scene:
    """Returns a scene without findings."""
    zeros = np.zeros_like(chest.x)
    return Scene(
        chest, vessels, texture, zeros, zeros.copy(), zeros.copy(), np.zeros(zeros.shape, bool)
    )


def render_finding(scene: Scene, finding: Finding) -> Mask:
    """Draws a finding into the scene and returns its mask."""
    return _RENDERERS[finding.kind](scene, finding)


def _place_center(
    scene: Scene, finding: Finding, span: tuple[float, float] = (0.25, 0.75)
) -> tuple[float, float]:
    """Returns the (lateral, y) centre of a finding in its zone.

    `span` is the range of the centre within the lung's breadth, from medial to lateral. Next to
    pleural air the centre moves medially, into the lung that remains.
    """
    chest, shape, side = scene.chest, finding.shape, finding.side
    low, high = _ZONE_HEIGHTS[finding.zone]
    if finding.zone == "lower" and side == "left":
        span = (max(span[0], 0.45), max(span[1], 0.8))  # clear of the heart
    height = low + (high - low) * shape[0]
    rows = np.abs(chest.height - height) < 1.2 * chest.pixel
    # At low resolution a zone may have no free pixel at this height, or none at all.
    free = rows & scene.free_lung(side)
    if not free.any():
        free = rows & (chest.lung[side] > 0.5)
    if not free.any():
        free = chest.lung[side] > 0.5
    lateral = chest.lateral[side][free]
    share = span[0] + (span[1] - span[0]) * shape[1]
    center = lateral.min() + (lateral.max() - lateral.min()) * share
    return float(center), float(chest.y[free].mean())


def _render_consolidation(scene: Scene, finding: Finding) -> Mask:
    """Draws a patchy airspace opacity with a ragged border and air left inside."""
    chest, shape, side = scene.chest, finding.shape, finding.side
    lateral = chest.lateral[side]
    center_x, center_y = _place_center(scene, finding, (0.35, 0.65))
    radius = (0.105, 0.14, 0.18)[finding.level] * (0.92 + 0.16 * shape[2]) * finding.size
    blob = np.zeros_like(lateral)
    # Four overlapping bumps around the centre.
    for i in range(4):
        angle = 2 * np.pi * (i / 4 + 0.2 * shape[3 + i])
        distance = (0.45 + 0.4 * shape[7 + i]) * radius
        bump = gaussian_bump(
            lateral,
            chest.y,
            center_x + distance * np.cos(angle),
            center_y + 0.85 * distance * np.sin(angle),
            radius * (0.45 + 0.25 * shape[11 + i]),
            radius * (0.40 + 0.22 * shape[15 + i]),
        )
        blob = 1 - (1 - blob) * (1 - bump)
    blob = blob * (1 + 0.20 * scene.texture)
    share = clip((blob - 0.20) / 0.45, 0, 1)
    density = (0.62 + 0.10 * finding.level) * finding.contrast * share
    scene.fill(density * scene.free_lung_with_border(side))
    return (share > 0.5) & scene.free_lung(side)


def _render_nodule(scene: Scene, finding: Finding) -> Mask:
    """Draws a round, sharply bordered, slightly lobulated opacity."""
    chest, shape, side = scene.chest, finding.shape, finding.side
    center_x, center_y = _place_center(scene, finding, (0.25, 0.78))
    radius = (0.040, 0.054, 0.070)[finding.level] * (0.94 + 0.12 * shape[2]) * finding.size
    offset_x = chest.lateral[side] - np.float32(center_x)
    offset_y = chest.y - np.float32(center_y)
    aspect = np.float32(0.85 + 0.3 * shape[3])
    distance = np.sqrt(offset_x * offset_x + offset_y * offset_y * aspect)
    # The path of a ray through a ball.
    ball = clip(1 - (distance / np.float32(radius)) ** 2, 0, 1)
    strength = np.minimum(np.sqrt(ball) * 1.25, 1) * scene.free_lung_with_border(side)
    opacity = (0.36 + 0.06 * shape[4]) * finding.contrast
    scene.opacity = scene.opacity + np.float32(opacity) * strength
    return (distance < max(radius, 0.8 * chest.pixel)) & scene.free_lung(side)


def _render_effusion(scene: Scene, finding: Finding) -> Mask:
    """Draws fluid from the diaphragm up to a meniscus that climbs the lateral wall."""
    chest, shape, side = scene.chest, finding.shape, finding.side
    lung = chest.lung[side]
    level = (0.845, 0.70, 0.50)[finding.level] - 0.05 * shape[0] + 0.03 * shape[1]
    level = level + (1 - finding.size) * (1 - level)
    breadth = clip(chest.lateral[side] * np.float32(1 / chest.patient.width), 0, 1.1)
    climb = (0.05 + 0.05 * shape[2]) + (0.10, 0.13, 0.16)[finding.level] * breadth**4
    surface = np.float32(level) - climb - 0.05 * clip(0.35 - breadth, 0, 1)
    below = soft_step(chest.height - surface, 0.035 + 1.5 * chest.pixel)
    fluid = below * (lung > 0)
    scene.fill(0.97 * finding.contrast * fluid)
    scene.opacity = scene.opacity + 0.20 * finding.contrast * fluid * lung
    mask = (below > 0.5) & (lung > 0.5)
    # The soft surface is occupied too, or another finding would blur the meniscus.
    scene.occupied = scene.occupied | (mask | (below > 0.1) & (lung > 0.5))
    return mask


def _render_pneumothorax(scene: Scene, finding: Finding) -> Mask:
    """Draws pleural air along the lateral wall and apex, without vessels, and the pleural line."""
    chest, shape, side = scene.chest, finding.shape, finding.side
    lateral, height, lung = chest.lateral[side], chest.height, chest.lung[side]
    _, outer_edge = chest.edges[side]
    # The edge of the collapsed lung: far from the wall at the apex, close to it at the base.
    gap = (0.12, 0.18, 0.27)[finding.level] * (0.9 + 0.2 * shape[0]) * finding.size
    bow = clip(1 - 0.80 * clip(height, 0, 1.1) ** (1.2 + shape[1]), 0.04, 1)
    edge = outer_edge - np.float32(gap) * bow
    lowest = (0.07, 0.11, 0.18)[finding.level] * finding.size
    roof = np.float32(lowest) + 0.10 * ((lateral - 0.30) / 0.30) ** 2
    inside_wall, inside_roof = edge - lateral, 1.2 * (height - roof)
    # A smooth minimum of the two distances rounds the corner where they meet.
    depth = -0.04 * np.logaddexp(inside_wall * -25, inside_roof * -25)
    collapsed = soft_step(depth, 1.5 * chest.pixel)
    scene.pleural_air = np.maximum(scene.pleural_air, (1 - collapsed) * lung)
    line_width = max(0.011, 0.55 * chest.pixel)
    line = clip(1.4 - np.abs(depth) / np.float32(line_width), 0, 1) * (lung > 0.5)
    scene.opacity = scene.opacity + 0.24 * finding.contrast * line
    # A collapsed lung holds less air.
    scene.fill(0.10 * (1 + finding.level) * finding.contrast * collapsed * lung)
    mask = (depth < 0) & (lung > 0.5)
    scene.occupied = scene.occupied | mask | (depth < 0.03) & (lung > 0.5)
    return mask


def _render_cardiomegaly(scene: Scene, finding: Finding) -> Mask:
    """Returns the heart itself, which `draw_study` has already laid out larger."""
    return scene.chest.heart > 0.5


def _render_atelectasis(scene: Scene, finding: Finding) -> Mask:
    """Draws a thin, slightly oblique band across part of the lung."""
    chest, shape, side = scene.chest, finding.shape, finding.side
    center_x, center_y = _place_center(scene, finding, (0.42, 0.58))
    half_width = max((0.016, 0.021, 0.028)[finding.level] * finding.size, 0.8 * chest.pixel)
    length = (0.17 + 0.05 * shape[2]) * finding.size
    tilt = (shape[3] - 0.5) * 0.7
    offset_x = chest.lateral[side] - np.float32(center_x)
    offset_y = chest.y - np.float32(center_y)
    along = np.cos(tilt) * offset_x + np.sin(tilt) * offset_y
    across = np.cos(tilt) * offset_y - np.sin(tilt) * offset_x
    across = across + (shape[4] - 0.5) * 1.2 * along * along  # slightly bent
    inside = np.minimum(half_width - np.abs(across), 0.25 * (length - np.abs(along)))
    band = 0.36 * finding.contrast * soft_step(inside, half_width)
    scene.opacity = scene.opacity + band * scene.free_lung_with_border(side)
    return (inside > 0) & scene.free_lung(side)


def _render_oedema(scene: Scene, finding: Finding) -> Mask:
    """Draws bat-wing haze around both hila, thick vessels, and short septal lines at the bases."""
    chest, shape, patient = scene.chest, finding.shape, scene.chest.patient
    mask = np.zeros(chest.x.shape, bool)
    for side in SIDES:
        lateral, free = chest.lateral[side], scene.free_lung(side)
        center_x = patient.mediastinum + 0.15 + 0.03 * shape[0]
        center_y = patient.knob_y + 0.26 + 0.04 * shape[1]
        sigma_x, sigma_y = 0.17 * finding.size, 0.24 * finding.size
        wing = gaussian_bump(lateral, chest.y, center_x, center_y, sigma_x, sigma_y)
        wing = wing * (1 + 0.20 * scene.texture)
        share = clip((wing - 0.18) / 0.42, 0, 1) * scene.free_lung_with_border(side)
        density = (0.34, 0.45, 0.57)[finding.level] * finding.contrast * share
        # Kerley lines: horizontal, short, at the lateral wall of the lower zones.
        septa = np.abs(np.sin(chest.y * 48)) > 0.93
        at_wall = lateral > patient.width - 0.13 + 0.03 * np.sin(chest.y * 31)
        at_wall &= (chest.height > 0.68) & (chest.height < 0.9) & free
        lines = (0.06 + 0.03 * finding.level) * finding.contrast * (septa & at_wall)
        scene.opacity = scene.opacity + lines.astype(np.float32)
        scene.opacity = scene.opacity + 0.10 * scene.vessels * share
        scene.fill(density)
        mask |= (share > 0.5) & free
    return mask


def _render_pacemaker(scene: Scene, finding: Finding) -> Mask:
    """Draws a generator below the clavicle and its leads through the great veins to the heart."""
    chest, shape, patient = scene.chest, finding.shape, scene.chest.patient
    lateral, y = chest.lateral[finding.side], chest.y
    center_x = patient.width * (0.66 + 0.06 * shape[0])
    center_y = patient.clavicle_y + 0.22 + 0.04 * shape[1]
    tilt = (shape[2] - 0.5) * 0.6
    along = np.cos(tilt) * (lateral - center_x) + np.sin(tilt) * (y - center_y)
    across = np.cos(tilt) * (y - center_y) - np.sin(tilt) * (lateral - center_x)
    # A superellipse: a box with round corners.
    box = ((along / 0.115) ** 4 + (across / 0.10) ** 4) ** 0.25
    case = soft_step(0.1 * (1 - box), 0.015 + chest.pixel)
    battery = soft_step(0.1 * (0.72 - box), 0.015 + chest.pixel)
    mask = case > 0.5
    generator = 0.85 * case + 0.15 * battery * (across > -0.02)
    sign = SIDE_SIGNS[finding.side]
    # Through the subclavian vein to the superior vena cava, which lies right of the midline.
    veins = [
        (sign * (center_x - 0.06), center_y - 0.08),
        (sign * 0.36, patient.clavicle_y + 0.07),
        (sign * 0.14, patient.knob_y - 0.20),
        (-0.075, patient.knob_y - 0.02),
        (-0.085, 0.05),
    ]
    leads = [[*veins, (0.02, 0.30), (0.20 + 0.04 * shape[3], 0.36 + 0.03 * shape[4])]]
    if finding.level:  # a second lead branches off to the atrium
        leads.append([*veins[-2:], (-0.06, 0.16), (-0.02, 0.12 + 0.03 * shape[5])])
    wire_width = max(0.008, 0.62 * chest.pixel)
    distance = np.full(lateral.shape, np.inf, np.float32)
    for points in leads:
        distance = np.minimum(distance, distance_to_polyline(chest.x, y, round_corners(points)))
    wire = clip(1.5 - distance / np.float32(wire_width), 0, 1)
    scene.opacity = scene.opacity + np.maximum(generator, 0.50 * wire)
    return mask | (distance < wire_width)


def round_corners(points: list[tuple[Number, Number]]) -> Float32[np.ndarray, "n 2"]:
    """Returns a polyline whose corners are cut twice (Chaikin 1974)."""
    line = np.array(points, np.float32)
    for _ in range(2):
        start, end = line[:-1], line[1:]
        cuts = np.stack([0.75 * start + 0.25 * end, 0.25 * start + 0.75 * end], 1)
        line = np.concatenate([line[:1], cuts.reshape(-1, 2), line[-1:]])
    return line


def distance_to_polyline(x: Plane, y: Plane, line: Float32[np.ndarray, "n 2"]) -> Plane:
    """Returns the distance of each pixel to a polyline; infinite far from its bounding box."""
    # Only pixels near the line matter, and the distances to all segments take memory.
    near = (x > line[:, 0].min() - 0.1) & (x < line[:, 0].max() + 0.1)
    near &= (y > line[:, 1].min() - 0.1) & (y < line[:, 1].max() + 0.1)
    point = np.stack([x[near], y[near]], 1)[:, None]
    start, step = line[:-1], np.diff(line, axis=0)
    share = ((point - start) * step).sum(-1) / ((step * step).sum(-1) + np.float32(1e-9))
    offset = point - start - clip(share, 0, 1)[..., None] * step
    distance = np.full(x.shape, np.inf, np.float32)
    distance[near] = np.sqrt((offset * offset).sum(-1).min(1))
    return distance


_RENDERERS: dict[str, Callable[[Scene, Finding], Mask]] = {
    "consolidation": _render_consolidation,
    "nodule": _render_nodule,
    "pleural effusion": _render_effusion,
    "pneumothorax": _render_pneumothorax,
    "cardiomegaly": _render_cardiomegaly,
    "pacemaker": _render_pacemaker,
    "linear atelectasis": _render_atelectasis,
    "pulmonary oedema": _render_oedema,
}

"""The opacity of a healthy phantom: bones, soft tissue, airways, and the vessels of the lungs.

Opacity is in units of the chest wall's (0: air, about 1: soft tissue) and adds along the ray.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float32
from scipy.ndimage import map_coordinates

from plan_jax.data.phantom.anatomy import (
    NUM_VESSEL_TREES,
    SIDES,
    Chest,
    Patient,
    Plane,
    Table,
    clip,
    soft_step,
)

# Resolution of a vessel tree in polar coordinates.
_NUM_RADII, _NUM_ANGLES = 64, 384
_NUM_VESSELS = 34
_NUM_HILAR_VESSELS = 9  # vessels that start at the hilum itself
_GOLDEN_ANGLE = 2.399963  # successive multiples cover the circle evenly
_NUM_BACK_RIBS, _NUM_FRONT_RIBS = 10, 6


@lru_cache(maxsize=NUM_VESSEL_TREES)
def _draw_vessel_tree(number: int) -> Float32[np.ndarray, "radius angle"]:
    """Returns a tree of vessels around a hilum as a polar table F32[radius angle]."""
    rng = np.random.default_rng((271828, number))
    count = _NUM_VESSELS
    start = np.where(
        np.arange(count) < _NUM_HILAR_VESSELS,
        rng.uniform(0.0, 0.07, count),
        rng.uniform(0.09, 0.45, count),
    )
    base = (np.arange(count) * _GOLDEN_ANGLE) % (2 * np.pi) + rng.normal(0, 0.25, count)
    bend = rng.normal(0, 0.9, count)
    wobble, phase = rng.uniform(0.02, 0.07, count), rng.uniform(0, 6.3, count)
    thickness = rng.uniform(0.010, 0.019, count) * np.where(start > 0.08, 0.75, 1.15)
    radius = (np.arange(_NUM_RADII) + 0.5) / _NUM_RADII
    angle = (np.arange(_NUM_ANGLES) * (2 * np.pi / _NUM_ANGLES)).astype(np.float32)
    tree = np.zeros((_NUM_RADII, _NUM_ANGLES), np.float32)
    for i in range(count):
        path = base[i] + bend[i] * radius + wobble[i] * np.sin(9 * radius + phase[i])
        offset = angle[None] - path[:, None].astype(np.float32) % np.float32(2 * np.pi)
        # The shorter way around the circle.
        offset = np.float32(np.pi) - np.abs(np.float32(np.pi) - np.abs(offset))
        width = thickness[i] * clip(1.15 - radius, 0.25, 1)
        strength = clip(1.05 - 1.2 * radius, 0, 1) ** 0.8 * clip((radius - start[i]) * 14, 0, 1)
        # An arc of one angle grows with the radius; the vessel's width does not.
        offset *= (radius / width)[:, None].astype(np.float32)
        vessel = strength[:, None].astype(np.float32) * np.exp(-0.5 * offset * offset)
        np.maximum(tree, vessel, out=tree)
    return tree


def vessel_opacity(chest: Chest) -> Plane:
    """Returns the hilar shadows and the vessels that leave them, in both lungs."""
    patient = chest.patient
    opacity = np.zeros_like(chest.x)
    for number, side in enumerate(SIDES):
        # The left hilum lies a little higher and further from the midline.
        center_x = patient.mediastinum + (0.07 if side == "right" else 0.09)
        center_y = patient.knob_y + (0.26 if side == "right" else 0.22)
        offset_x = chest.lateral[side] - np.float32(center_x)
        offset_y = chest.y - np.float32(center_y)
        in_lung = chest.lung[side] > 0
        offset_x, offset_y = offset_x[in_lung], offset_y[in_lung]
        radius = np.sqrt(offset_x * offset_x + offset_y * offset_y)
        per_radian = np.float32(_NUM_ANGLES / 2 / np.pi)
        angle = (np.arctan2(offset_y, offset_x) * per_radian) % _NUM_ANGLES
        tree = map_coordinates(
            _draw_vessel_tree(patient.vessels[number]),
            [radius * _NUM_RADII, angle],
            order=1,
            mode="nearest",
        )
        hilum = np.exp(-0.5 * ((offset_x / 0.06) ** 2 + (offset_y / 0.12) ** 2))
        opacity[in_lung] += tree * (1 - 0.6 * hilum) + 0.75 * hilum
    return opacity


def bone_opacity(chest: Chest) -> Plane:
    """Returns the ribs, clavicles, scapulae and the spine."""
    patient, y, pixel = chest.patient, chest.y, chest.pixel
    opacity = _spine_opacity(chest)
    fade = 1 - np.float32(0.45) * soft_step(y - chest.dome, 0.1)  # below the diaphragm
    for number, side in enumerate(SIDES):
        breadth = clip(chest.lateral[side] * np.float32(1 / patient.width), 0, 1.25)
        # Back ribs rise from the spine and fall to the wall; front ribs fall to the midline.
        slope = 0.30 + patient.rib_slope
        back_y = (-0.30 * breadth + slope * breadth * breadth * breadth) * (1 + 0.25 * y)
        back = _rib_profile(
            patient,
            (y - back_y - patient.rib_start) / patient.rib_gap,
            patient.rib_jitter[number, 0],
            _NUM_BACK_RIBS,
            pixel,
        )
        front_y = patient.rib_slope + 0.02 + 0.42 * (1 - breadth) - 0.10 * (1 - breadth) ** 2
        front = _rib_profile(
            patient,
            (y - front_y - patient.rib_start) / patient.rib_gap,
            patient.rib_jitter[number, 1],
            _NUM_FRONT_RIBS,
            pixel,
        )
        in_chest = soft_step(np.float32(1.06) - breadth, 0.06)
        back = 0.10 * back * soft_step(breadth - 0.13, 0.06)
        # The cartilage of the front ribs is nearly invisible.
        front = 0.075 * front * soft_step(breadth - 0.42, 0.25)
        opacity += fade * in_chest * (back + front)
        opacity += _shoulder_opacity(chest, side)
    return opacity


def _rib_profile(patient: Patient, phase: Plane, jitter: Table, count: int, pixel: float) -> Plane:
    """Returns parallel ribs, brighter at the cortex; `phase` counts them down the chest."""
    rib = np.floor(phase + np.float32(0.5))
    number = clip(rib, 0, count - 1).astype(np.int8)
    offset = np.abs(phase - rib - jitter[number])
    half_width, blur = 0.19, 1.3 * pixel / patient.rib_gap + 0.05
    body = soft_step(half_width - offset, blur)
    cortex_distance = np.abs(offset - np.float32(half_width - 0.06))
    cortex = clip(1 - cortex_distance * np.float32(1 / 0.10), 0, 1)
    exists = (rib >= 0) & (rib < count)
    return exists * body * (np.float32(0.65) + np.float32(0.5) * cortex)


def _shoulder_opacity(chest: Chest, side: str) -> Plane:
    """Returns the clavicle, the scapula and the head of the humerus of one side."""
    patient, lateral, y = chest.patient, chest.lateral[side], chest.y
    along = lateral - np.float32(0.07)
    line = patient.clavicle_y + 0.06 - 0.30 * along + 0.16 * along * along
    line = line + 0.03 * np.sin(6.5 * along)
    half_width = 0.030 + 0.018 * clip(1 - along * 6, 0, 1)
    offset = np.abs(y - line)
    ends = soft_step(along, 0.03) * soft_step(0.86 - along, 0.05)
    cortex = (offset > 0.6 * half_width).astype(np.float32)
    clavicle = 0.13 * ends * soft_step(half_width - offset, 0.012 + 1.5 * chest.pixel)
    clavicle = clavicle * (0.75 + 0.5 * cortex)
    reach = patient.scapula
    # The scapula is a triangle: distances inside its medial, lateral and upper border.
    medial = 0.96 * (lateral - 0.64 - reach) - 0.28 * (y + 0.60)
    outer = 0.95 * (0.83 + reach - lateral) - 0.31 * (y - 0.04)
    upper = 0.99 * (y + 0.58) + 0.12 * (lateral - 0.64)
    blade = np.minimum(np.minimum(medial, outer), upper)
    plate = soft_step(blade, 0.03)
    rim = clip(1 - np.abs(blade - 0.015) * np.float32(1 / 0.022), 0, 1)
    crest = clip(1 - np.abs(y + 0.44 + 0.62 * (lateral - 0.68)) * np.float32(1 / 0.030), 0, 1)
    crest = crest * soft_step(lateral - 0.66 - reach, 0.05) * soft_step(0.98 - lateral, 0.05)
    rim = np.maximum(rim, crest)
    humerus = soft_step(0.15 - np.hypot(lateral - 1.07, y + 0.53), 0.03)
    return clavicle + 0.06 * plate + 0.05 * rim + 0.12 * humerus


def _spine_opacity(chest: Chest) -> Plane:
    """Returns vertebral bodies with discs between them, pedicles and spinous processes."""
    x, y = chest.x, chest.y
    half_width = 0.062 + 0.016 * (y + 1)
    spacing = 0.135 + 0.012 * y
    phase = y / spacing
    offset = np.abs(phase - np.floor(phase) - 0.5)  # 0 in the middle of a vertebra
    body = soft_step(half_width - np.abs(x), 0.02)
    disc = soft_step(offset - 0.40, 0.12)
    pedicle_x = (np.abs(x) - 0.7 * half_width) / 0.014
    pedicle = np.exp(-0.5 * (pedicle_x**2 + ((offset - 0.1) / 0.16) ** 2))
    process = np.exp(-0.5 * ((x / 0.012) ** 2 + ((offset - 0.2) / 0.16) ** 2))
    return 0.10 * body * (1 - 0.55 * disc) + 0.05 * pedicle + 0.05 * process


def soft_tissue_opacity(chest: Chest) -> Plane:
    """Returns the body wall, mediastinum, airway, abdomen and breasts, as if lungs were solid."""
    patient, x, y = chest.patient, chest.x, chest.y
    distance = np.abs(x)
    rim = patient.width + 0.17 * patient.girth + 0.03 * y
    axilla = 0.30 * clip(-0.15 - y, 0, 1) ** 1.5
    roof = -1.06 + 0.30 * distance**2 - 0.25 * clip(0.28 - distance, 0, 1)  # shoulders and neck
    wall = soft_step(np.minimum(rim + axilla - distance, y - roof), 0.05)
    thickness = patient.girth * (0.80 + 0.20 * clip(1 - (distance / rim) ** 2, 0, 1))
    mediastinum = soft_step(patient.mediastinum + 0.03 - distance, 0.10)
    abdomen = soft_step(y - chest.dome, 0.05)
    opacity = thickness + 0.10 * mediastinum * (1 - abdomen) + 0.16 * abdomen + 0.12 * chest.heart
    opacity -= 0.17 * _airway_lucency(chest)
    bubble_x, bubble_y, gas = patient.bubble
    bubble_y_offset = (y - patient.dome["left"] - bubble_y) / 0.07
    stomach = soft_step(1 - np.hypot((x - bubble_x) / 0.15, bubble_y_offset), 0.5)
    opacity -= 0.22 * gas * stomach * abdomen
    if patient.breast:
        breast_x = (distance - 0.42 * patient.width / 0.73) / 0.30
        breast_y = (y - 0.36) / 0.26
        opacity += 0.06 * patient.breast * soft_step(1 - np.hypot(breast_x, breast_y), 0.25)
    return opacity * wall


def _airway_lucency(chest: Chest) -> Plane:
    """Returns the air of the trachea and of the two main bronchi."""
    patient, y = chest.patient, chest.y
    carina = patient.knob_y + 0.13
    x = chest.x + np.float32(patient.trachea_lean) * (y - carina)
    trachea = soft_step(0.036 - np.abs(x), 0.03) * soft_step(carina - y, 0.05)
    below = y - np.float32(carina - 0.03)
    # The right main bronchus is the steeper of the two.
    offset = np.minimum(np.abs(x + 0.95 * below), np.abs(x - 1.25 * below))
    bronchi = soft_step(0.022 - offset * 0.7, 0.02)
    bronchi = bronchi * soft_step(below, 0.02) * soft_step(0.16 - below, 0.08)
    return np.maximum(trachea, 0.8 * bronchi)

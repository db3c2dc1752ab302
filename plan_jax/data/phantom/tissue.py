"""The healthy phantom's opacity: bones, soft tissue, airways, and the vessels of the lungs.

Opacity is in units of the chest wall's (0: air, about 1: soft tissue) and adds along the ray.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float32
from scipy.ndimage import map_coordinates

from plan_jax.data.phantom.anatomy import SIDES, VESSELS, Chest, Patient, Plane, Table, clip, soft

_RINGS, _RAYS = 64, 384  # resolution of a vessel tree


@lru_cache(maxsize=VESSELS)
def _vessel_tree(number: int) -> Float32[np.ndarray, "radius angle"]:
    """A tree of vessels around a hilum as a polar table F32[radius angle]."""
    rng = np.random.default_rng((271828, number))
    count = 34
    start = np.where(
        np.arange(count) < 9, rng.uniform(0.0, 0.07, count), rng.uniform(0.09, 0.45, count)
    )
    base = (np.arange(count) * 2.399963) % (2 * np.pi) + rng.normal(0, 0.25, count)
    bend = rng.normal(0, 0.9, count)
    wobble, phase = rng.uniform(0.02, 0.07, count), rng.uniform(0, 6.3, count)
    thick = rng.uniform(0.010, 0.019, count) * np.where(start > 0.08, 0.75, 1.15)
    r = (np.arange(_RINGS) + 0.5) / _RINGS
    angle = (np.arange(_RAYS) * (2 * np.pi / _RAYS)).astype(np.float32)
    tree = np.zeros((_RINGS, _RAYS), np.float32)
    for i in range(count):
        path = base[i] + bend[i] * r + wobble[i] * np.sin(9 * r + phase[i])
        off = angle[None] - path[:, None].astype(np.float32) % np.float32(2 * np.pi)
        off = np.float32(np.pi) - np.abs(np.float32(np.pi) - np.abs(off))  # the short way round
        width = thick[i] * clip(1.15 - r, 0.25, 1)
        strength = clip(1.05 - 1.2 * r, 0, 1) ** 0.8 * clip((r - start[i]) * 14, 0, 1)
        off *= (r / width)[:, None].astype(np.float32)
        np.maximum(tree, strength[:, None].astype(np.float32) * np.exp(-0.5 * off * off), out=tree)
    return tree


def vessels(made: Chest) -> Plane:
    """Hilar shadows and the vessels that leave them, in both lungs."""
    out = np.zeros_like(made.x)
    p = made.patient
    for number, side in enumerate(SIDES):
        cx = p.mediastinum + (0.07 if side == "right" else 0.09)
        cy = p.knob_y + (0.26 if side == "right" else 0.22)
        dx, dy = made.lateral[side] - np.float32(cx), made.y - np.float32(cy)
        here = made.lung[side] > 0
        dx, dy = dx[here], dy[here]
        r = np.sqrt(dx * dx + dy * dy)
        angle = (np.arctan2(dy, dx) * np.float32(_RAYS / 2 / np.pi)) % _RAYS
        tree = map_coordinates(
            _vessel_tree(p.vessels[number]), [r * _RINGS, angle], order=1, mode="nearest"
        )
        hilum = np.exp(-0.5 * ((dx / 0.06) ** 2 + (dy / 0.12) ** 2))
        out[here] += tree * (1 - 0.6 * hilum) + 0.75 * hilum
    return out


def bones(made: Chest) -> Plane:
    """Ribs, clavicles, scapulae and the spine."""
    p, y, px = made.patient, made.y, made.pixel
    out = _spine(made)
    fade = 1 - np.float32(0.45) * soft(y - made.dome, 0.1)
    for number, side in enumerate(SIDES):
        q = clip(made.lateral[side] * np.float32(1 / p.width), 0, 1.25)
        curve = (-0.30 * q + (0.30 + p.rib_slope) * q * q * q) * (1 + 0.25 * y)
        back = _rib_family(
            p, (y - curve - p.rib_start) / p.rib_gap, p.rib_jitter[number, 0], 10, px
        )
        drop = p.rib_slope + 0.02 + 0.42 * (1 - q) - 0.10 * (1 - q) ** 2
        front = _rib_family(p, (y - drop - p.rib_start) / p.rib_gap, p.rib_jitter[number, 1], 6, px)
        within = soft(np.float32(1.06) - q, 0.06)
        out += (
            fade
            * within
            * (0.10 * back * soft(q - 0.13, 0.06) + 0.075 * front * soft(q - 0.42, 0.25))
        )
        out += _shoulder(made, side)
    return out


def _rib_family(p: Patient, phase: Plane, jitter: Table, count: int, px: float) -> Plane:
    """Parallel ribs: `phase` counts them down the chest; brighter at the cortex than inside."""
    rib = np.floor(phase + np.float32(0.5))
    number = clip(rib, 0, count - 1).astype(np.int8)
    off = np.abs(phase - rib - jitter[number])
    half, blur = 0.19, 1.3 * px / p.rib_gap + 0.05
    body = soft(half - off, blur)
    cortex = clip(1 - np.abs(off - np.float32(half - 0.06)) * np.float32(1 / 0.10), 0, 1)
    known = (rib >= 0) & (rib < count)
    return known * body * (np.float32(0.65) + np.float32(0.5) * cortex)


def _shoulder(made: Chest, side: str) -> Plane:
    """The clavicle and the scapula of one side."""
    p, s, y = made.patient, made.lateral[side], made.y
    q = s - np.float32(0.07)
    line = p.clavicle_y + 0.06 - 0.30 * q + 0.16 * q * q + 0.03 * np.sin(6.5 * q)
    half = 0.030 + 0.018 * clip(1 - q * 6, 0, 1)
    off = np.abs(y - line)
    ends = soft(q, 0.03) * soft(0.86 - q, 0.05)
    cortex = (off > 0.6 * half).astype(np.float32)
    bone = 0.13 * ends * soft(half - off, 0.012 + 1.5 * made.pixel) * (0.75 + 0.5 * cortex)
    reach = p.scapula
    blade = np.minimum(
        np.minimum(  # medial, lateral and upper borders of a triangle
            0.96 * (s - 0.64 - reach) - 0.28 * (y + 0.60),
            0.95 * (0.83 + reach - s) - 0.31 * (y - 0.04),
        ),
        0.99 * (y + 0.58) + 0.12 * (s - 0.64),
    )
    plate = soft(blade, 0.03)
    rim = clip(1 - np.abs(blade - 0.015) * np.float32(1 / 0.022), 0, 1)
    crest = clip(1 - np.abs(y + 0.44 + 0.62 * (s - 0.68)) * np.float32(1 / 0.030), 0, 1)
    rim = np.maximum(rim, crest * soft(s - 0.66 - reach, 0.05) * soft(0.98 - s, 0.05))
    humerus = soft(0.15 - np.hypot(s - 1.07, y + 0.53), 0.03)
    return bone + 0.06 * plate + 0.05 * rim + 0.12 * humerus


def _spine(made: Chest) -> Plane:
    """Vertebral bodies with discs between, pedicles at their sides and spinous processes."""
    x, y = made.x, made.y
    half = 0.062 + 0.016 * (y + 1)
    gap = 0.135 + 0.012 * y
    phase = y / gap
    off = np.abs(phase - np.floor(phase) - 0.5)
    body = soft(half - np.abs(x), 0.02)
    disc = soft(off - 0.40, 0.12)
    pedicle = np.exp(-0.5 * (((np.abs(x) - 0.7 * half) / 0.014) ** 2 + ((off - 0.1) / 0.16) ** 2))
    process = np.exp(-0.5 * ((x / 0.012) ** 2 + ((off - 0.2) / 0.16) ** 2))
    return 0.10 * body * (1 - 0.55 * disc) + 0.05 * pedicle + 0.05 * process


def soft_tissue(made: Chest) -> Plane:
    """Body wall, mediastinum with its airway, abdomen with its gas, breasts; before the lungs."""
    p, x, y = made.patient, made.x, made.y
    away = np.abs(x)
    rim = p.width + 0.17 * p.girth + 0.03 * y
    axilla = 0.30 * clip(-0.15 - y, 0, 1) ** 1.5
    roof = -1.06 + 0.30 * away**2 - 0.25 * clip(0.28 - away, 0, 1)
    wall = soft(np.minimum(rim + axilla - away, y - roof), 0.05)
    thick = p.girth * (0.80 + 0.20 * clip(1 - (away / rim) ** 2, 0, 1))
    middle = soft(p.mediastinum + 0.03 - away, 0.10)
    belly = soft(y - made.dome, 0.05)
    out = thick + 0.10 * middle * (1 - belly) + 0.16 * belly + 0.12 * made.heart
    out -= 0.17 * _airway(made)
    bx, by, gas = p.bubble
    stomach = soft(1 - np.hypot((x - bx) / 0.15, (y - p.dome["left"] - by) / 0.07), 0.5)
    out -= 0.22 * gas * stomach * belly
    if p.breast:
        fold = (away - 0.42 * p.width / 0.73) / 0.30, (y - 0.36) / 0.26
        out += 0.06 * p.breast * soft(1 - np.hypot(*fold), 0.25)
    return out * wall


def _airway(made: Chest) -> Plane:
    """Lucency of the trachea and the two main bronchi."""
    p, y = made.patient, made.y
    carina = p.knob_y + 0.13
    x = made.x + np.float32(p.trachea_lean) * (y - carina)
    trunk = soft(0.036 - np.abs(x), 0.03) * soft(carina - y, 0.05)
    below = y - np.float32(carina - 0.03)
    off = np.minimum(np.abs(x + 0.95 * below), np.abs(x - 1.25 * below))
    fork = soft(0.022 - off * 0.7, 0.02) * soft(below, 0.02) * soft(0.16 - below, 0.08)
    return np.maximum(trunk, 0.8 * fork)

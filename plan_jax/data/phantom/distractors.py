"""Distractors of hard phantoms, which are no findings: skin folds, nipples, ECG leads, buttons.

No report mentions them and no mask covers them. All numbers are ours: shapes are roughly those on
real films, and opacities are such that a distractor can be taken for a finding.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from plan_jax.data.phantom.anatomy import SIDES, Chest, Mask, Plane, clip, soft_step
from plan_jax.data.phantom.rendering import distance_to_polyline, round_corners

# Chances of each kind of distractor on a film.
FOLD_CHANCE, NIPPLE_CHANCE, ECG_CHANCE, BUTTON_CHANCE = 0.45, 0.45, 0.3, 0.15
MAX_ATTEMPTS = 6  # places that are tried for something before it is left out
VISIBLE_OPACITY = 0.02  # below this, a distractor may fade out within a mask

Renderer = Callable[[np.random.Generator, Chest], Plane]


def draw_distractors(rng: np.random.Generator, chest: Chest, masks: Sequence[Mask]) -> Plane:
    """Returns the opacity of all distractors of a film, as an array [Y X].

    A distractor that would touch one of the `masks` of the findings is drawn elsewhere or left out,
    so that a heat map that points at it is wrong.
    """
    covered = np.zeros(chest.x.shape, bool)
    for mask in masks:
        covered |= mask
    opacity = np.zeros_like(chest.x)
    for render in _choose_renderers(rng):
        for _ in range(MAX_ATTEMPTS):
            candidate = render(rng, chest)
            if not (covered & (candidate > VISIBLE_OPACITY)).any():
                opacity = opacity + candidate
                break
    return opacity


def _choose_renderers(rng: np.random.Generator) -> list[Renderer]:
    """Returns what a film shows, one renderer for each thing."""
    fold, nipple, ecg, button = rng.random(4)
    renderers: list[Renderer] = []
    if fold < FOLD_CHANCE:
        renderers.append(_render_skin_fold)
    if nipple < NIPPLE_CHANCE:
        height, breadth, radius = (rng.random() for _ in range(3))
        # Both nipples lie about equally high; one in four is not seen.
        renderers += [
            partial(_render_nipple, side, height, breadth, radius)
            for side in SIDES
            if rng.random() < 0.75
        ]
    if ecg < ECG_CHANCE:
        places = (("right", -0.52), ("left", -0.52), ("left", 0.36), ("right", 0.36))
        renderers += [partial(_render_lead, *place) for place in places[: rng.integers(2, 5)]]
    if button < BUTTON_CHANCE:
        renderers.append(_render_button)
    return renderers


def _render_skin_fold(rng: np.random.Generator, chest: Chest) -> Plane:
    """Draws a fold: denser and denser towards a long oblique edge, where the density ends.

    A pneumothorax has a thin bright line instead, and no vessels beyond it.
    """
    lateral, y = chest.lateral[SIDES[rng.integers(2)]], chest.y
    top, bottom = rng.uniform(-0.85, -0.45), rng.uniform(0.15, 0.75)
    slope = rng.uniform(0.1, 0.6) * (1 if rng.random() < 0.7 else -1)
    offset = lateral - rng.uniform(0.36, 0.60) - slope * y - rng.uniform(-0.15, 0.15) * y * y
    density = np.exp(clip(offset / rng.uniform(0.04, 0.12), -30, 0))
    edge = soft_step(-offset, 1.5 * chest.pixel)
    ends = soft_step(y - top, 0.25) * soft_step(bottom - y, 0.25)
    return rng.uniform(0.14, 0.26) * density * edge * ends


def _render_nipple(
    side: str,
    height: float,
    breadth: float,
    radius: float,
    rng: np.random.Generator,
    chest: Chest,
) -> Plane:
    """Draws a nipple: a faint disc low over the lung; numbers from 0 to 1 say where."""
    center_x = 0.38 + 0.14 * breadth + rng.normal(0, 0.02)
    center_y = 0.20 + 0.18 * height + rng.normal(0, 0.02)
    distance = np.hypot(chest.lateral[side] - center_x, chest.y - center_y)
    size = 0.030 + 0.016 * radius
    disc = soft_step(size - distance, 0.02 + chest.pixel)
    return rng.uniform(0.12, 0.20) * disc


def _render_lead(side: str, height: float, rng: np.random.Generator, chest: Chest) -> Plane:
    """Draws an ECG electrode, a faint pad around a metal stud, and the wire that leaves it."""
    lateral, y = chest.lateral[side], chest.y
    center_x, center_y = rng.uniform(0.40, 0.80), height + rng.normal(0, 0.07)
    distance = np.hypot(lateral - center_x, y - center_y)
    stud_radius = max(0.020, 0.8 * chest.pixel)
    pad = 0.10 * soft_step(0.055 - distance, 0.01 + chest.pixel)
    stud = 0.55 * soft_step(stud_radius - distance, chest.pixel)
    # Wires leave over the shoulder, to the side or downwards, in an arc.
    exits = ((rng.uniform(0.3, 0.7), -1.2), (1.2, rng.uniform(-0.2, 0.9)), (0.55, 1.2))
    end_x, end_y = exits[rng.choice(3, p=(0.25, 0.45, 0.30))]
    middle_x = (center_x + end_x) / 2 + rng.normal(0, 0.10)
    middle_y = (center_y + end_y) / 2 + rng.normal(0, 0.10)
    line = round_corners([(center_x, center_y), (middle_x, middle_y), (end_x, end_y)])
    width = max(0.008, 0.55 * chest.pixel)
    away = distance_to_polyline(lateral, y, line)
    wire = 0.30 * clip(1.4 - away / width, 0, 1)
    return np.maximum(np.maximum(pad, stud), wire)


def _render_button(rng: np.random.Generator, chest: Chest) -> Plane:
    """Draws a button of clothing: a disc with a brighter rim."""
    center_x, center_y = rng.uniform(-0.75, 0.75), rng.uniform(-0.7, 0.7)
    distance = np.hypot(chest.x - center_x, chest.y - center_y)
    radius = rng.uniform(0.030, 0.042)
    disc = soft_step(radius - distance, chest.pixel)
    rim = disc * soft_step(distance - 0.65 * radius, chest.pixel)
    return 0.12 * disc + 0.14 * rim

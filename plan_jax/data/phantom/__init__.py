"""Phantom radiographs: procedural frontal chest radiographs with their reports and the full truth.

`draw_study(seed, index)` is a pure function of its arguments. Three successive indices are two
patients, of whom the first has two studies; the anatomy of a patient is the same in both.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from plan_jax.data.phantom import report_text, tissue
from plan_jax.data.phantom.anatomy import (
    ANATOMY,
    Mask,
    Number,
    Patient,
    clip,
    draw_patient,
    lay_out_chest,
    segment_anatomy,
    stretch_grid,
)
from plan_jax.data.phantom.distractors import draw_distractors
from plan_jax.data.phantom.findings import FINDINGS, Difficulty, Finding, sample_findings
from plan_jax.data.phantom.rendering import Scene, empty_scene, render_finding
from plan_jax.data.phantom.report_text import PROMPTS, Triplet
from plan_jax.types import Phrase, Record, UserError

__all__ = [
    "ANATOMY",
    "FINDINGS",
    "PROMPTS",
    "SPLITS",
    "Difficulty",
    "check_arguments",
    "draw_study",
    "patient_and_study",
    "split_range",
    "write_report",
]

DEFAULT_DIFFICULTY = Difficulty()
SPLITS = ("train", "val", "test")
SPLIT_SIZE = 3_000_000  # indices of a split; a multiple of 3, so that no patient is in two splits
MIN_SIZE = 32


@dataclass(frozen=True)
class Film:
    """How a film was taken; the defaults change nothing.

    Attributes:
      turn: rotation in radians, in place of the small one that every patient has.
      gamma: exponent of the grey values: below 1 the film is underexposed, as tissue is bright.
      black: added to the darkest grey value.
      contrast: the factor of the range of the grey values.
      noise: the factor of the noise.
    """

    turn: float | None = None
    gamma: float = 1.0
    black: float = 0.0
    contrast: float = 1.0
    noise: float = 1.0


STANDARD_FILM = Film()


def patient_and_study(index: int) -> tuple[int, int]:
    """Returns the patient and the study number of an index.

    >>> [patient_and_study(index) for index in (0, 1, 2)]
    [(0, 0), (0, 1), (1, 0)]
    """
    block, position = divmod(index, 3)
    return 2 * block + (position == 2), int(position == 1)


def split_range(split: str, count: int) -> range:
    """Returns the indices of a split; they do not depend on the sizes of other splits.

    Raises:
      UserError: the split is unknown, or `count` is out of range.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0 <= count <= SPLIT_SIZE:
        raise UserError(f"{split} count {count} is out of range; use 0 to {SPLIT_SIZE}")
    start = SPLITS.index(split) * SPLIT_SIZE
    return range(start, start + count)


def check_arguments(seed: int, index: int, size: int) -> None:
    """Raises UserError for a negative seed or index, or a size below 32."""
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise UserError(f"{name} {value} is negative; use 0 or more")
    if size < MIN_SIZE:
        raise UserError(f"size {size} is too small for a chest; use {MIN_SIZE} or more")


def draw_study(
    seed: int, index: int, size: int = 96, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> Record:
    """Returns study `index` of the world `seed`.

    Findings and report do not depend on `size`.

    Args:
      seed: seed of all patients and studies.
      index: number of the study.
      size: pixels of a side.
      difficulty: kinds and number of findings, noise, how the report is written, and the level.

    Returns:
      A record with the UInt8[size size 1] `image`; `labels` Int8[F] in the order of
      `difficulty.findings`; one Phrase for each finding, with its Bool[size size] mask and its
      boxes; the masks of `ANATOMY`; and as `triplets` every (region, finding, existence) that the
      report states. Existence is 1, 0 or -1 (stated with doubt, though the finding is present; a
      hard report also doubts kinds that are absent).

    Raises:
      UserError: the seed or the index is negative, or the size is below 32.
    """
    check_arguments(seed, index, size)
    number, _ = patient_and_study(index)
    rng, findings, text, triplets = write_report(seed, index, difficulty)
    patient = draw_patient(np.random.default_rng((seed, number)))
    film = STANDARD_FILM
    if difficulty.hard:
        # A generator of its own, so that nothing else is drawn of a standard phantom.
        hard_rng = np.random.default_rng((*_key_study(seed, index), 2))
        film = _draw_hard_film(hard_rng)
    scene = _position_patient(rng, patient, findings, size, film)
    masks = [render_finding(scene, finding) for finding in findings]
    if difficulty.hard:
        scene.opacity = scene.opacity + draw_distractors(hard_rng, scene.chest, masks)
    anatomy = segment_anatomy(scene.chest)
    image = _expose_film(scene, rng, difficulty.noise, film)
    kinds = difficulty.findings
    present = {finding.kind for finding in findings}
    regions = [_bounding_box(mask) if mask.any() else (0,) * 4 for mask in anatomy.values()]
    return Record(
        image=image[..., None],
        text=text,
        patient_id=f"p{number:07d}",
        labels=np.array([kind in present for kind in kinds], np.int8),
        phrases=tuple(
            _to_phrase(finding, mask, kinds) for finding, mask in zip(findings, masks, strict=True)
        ),
        anatomy=anatomy,
        triplets=triplets,
        regions=np.asarray(regions, np.float32),
    )


def write_report(
    seed: int, index: int, difficulty: Difficulty = DEFAULT_DIFFICULTY
) -> tuple[np.random.Generator, list[Finding], str, tuple[Triplet, ...]]:
    """Returns the findings of study `index`, its report and its triplets, without an image.

    The first value is the generator that `draw_study` continues with.
    """
    key = _key_study(seed, index)
    rng = np.random.default_rng(key)
    findings = sample_findings(rng, difficulty)
    # A generator of its own: the wording may change without changing the image.
    text_rng = np.random.default_rng((*key, 1))
    return rng, findings, *report_text.compose_report(text_rng, findings, difficulty)


def _key_study(seed: int, index: int) -> tuple[int, int, int]:
    """Returns the key of the generator of a study."""
    number, study = patient_and_study(index)
    return seed, number, study + 1


def _draw_hard_film(rng: np.random.Generator) -> Film:
    """Returns a film that is turned, badly exposed and noisier, as hard phantoms are; ours."""
    return Film(
        turn=rng.uniform(-0.10, 0.10),  # up to 6 degrees
        gamma=float(np.exp(rng.uniform(-0.5, 0.6))),
        black=rng.uniform(0.0, 0.15),
        contrast=rng.uniform(0.60, 0.85),
        noise=rng.uniform(1.0, 1.4),
    )


def _position_patient(
    rng: np.random.Generator,
    patient: Patient,
    findings: list[Finding],
    size: int,
    film: Film = STANDARD_FILM,
) -> Scene:
    """Returns the chest in a random position, with a larger heart if there is cardiomegaly."""
    shift = rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
    turn, zoom = rng.normal(0, 0.03), rng.uniform(0.95, 1.05)
    turn = turn if film.turn is None else film.turn
    ratio = None
    for finding in findings:
        if finding.kind == "cardiomegaly":
            # Above 0.5, the limit that radiologists use for the cardiothoracic ratio.
            ratio = 0.55 + 0.045 * finding.level + 0.03 * float(finding.shape[0])
            ratio -= 0.06 * (1 - finding.size)
    chest = lay_out_chest(patient, size, shift=shift, turn=turn, zoom=zoom, ratio=ratio)
    texture = stretch_grid(patient.texture, size) * 2.2
    return empty_scene(chest, tissue.vessel_opacity(chest), texture)


def _expose_film(
    scene: Scene, rng: np.random.Generator, noise: Number, film: Film = STANDARD_FILM
) -> UInt8[np.ndarray, "Y X"]:
    """Returns the sum of all opacities as grey values UInt8[size size], tissue bright."""
    chest = scene.chest
    size = chest.x.shape[0]
    lung = np.maximum(chest.lung["right"], chest.lung["left"])
    depth = np.maximum(chest.depth["right"], chest.depth["left"])
    # A lung is darker towards its middle, where it is thicker.
    air = (0.50 + 0.16 * clip(depth * 5, 0, 1)) * lung
    aerated = lung * (1 - 0.85 * scene.filled) * (1 - scene.pleural_air)
    opacity = tissue.soft_tissue_opacity(chest)
    opacity = opacity - air * (1 - scene.filled) * (1 + 0.24 * scene.pleural_air)
    opacity = opacity + aerated * (0.20 * scene.vessels + 0.016 * scene.texture)
    opacity = opacity + tissue.bone_opacity(chest) + scene.opacity
    # The film: a sigmoid of random contrast and brightness, uneven exposure, a gamma, noise.
    gain, level = rng.uniform(3.4, 4.4), rng.uniform(0.66, 0.80)
    uneven = stretch_grid(rng.normal(0, 0.035, (5, 5)).astype(np.float32), size)
    grey = 1 / (1 + np.exp(np.float32(-gain) * (opacity + uneven - np.float32(level))))
    black, white = rng.uniform(0.0, 0.05), rng.uniform(0.90, 1.0)
    gamma = film.gamma * rng.uniform(0.85, 1.15)
    grey = black + film.black + film.contrast * (white - black) * grey ** np.float32(gamma)
    sigma = noise * film.noise * rng.uniform(0.012, 0.034)
    grey = grey + np.float32(sigma) * rng.standard_normal(grey.shape, np.float32)
    return clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


def _to_phrase(finding: Finding, mask: Mask, kinds: tuple[str, ...]) -> Phrase:
    """Returns a finding as a phrase by its canonical name; oedema has a box for each lung."""
    if finding.kind == "pulmonary oedema":
        # The middle of the image lies in the mediastinum, whatever the shift.
        middle = mask.shape[1] // 2
        image_left, image_right = mask.copy(), mask.copy()
        image_left[:, middle:], image_right[:, :middle] = False, False
        parts = [image_left, image_right]
    else:
        parts = [mask]
    return Phrase(
        text=report_text.canonical_phrase(finding),
        finding=kinds.index(finding.kind),
        key=finding.key,
        bare=finding.kind,
        boxes=tuple(_bounding_box(part) for part in parts if part.any()),
        mask=mask,
    )


def _bounding_box(mask: Mask) -> tuple[float, float, float, float]:
    """Returns the smallest box (x0, y0, x1, y1) around a mask; x1 and y1 lie just beyond it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

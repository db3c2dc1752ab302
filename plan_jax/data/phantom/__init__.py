"""Phantom radiographs: procedural frontal chest films with their reports and the full truth.

`draw(seed, index)` is a pure function of its arguments. Three successive indices are two patients
(the first has two studies); a patient's anatomy is the same in both studies.
"""

import numpy as np
from jaxtyping import UInt8

from plan_jax.data.phantom import report_text, tissue
from plan_jax.data.phantom.anatomy import (
    ANATOMY,
    Mask,
    Number,
    Patient,
    anatomy_masks,
    chest,
    clip,
    new_patient,
    smooth_field,
)
from plan_jax.data.phantom.cases import FINDINGS, Difficulty, Finding, plan
from plan_jax.data.phantom.findings import Scene, new_scene, paint
from plan_jax.data.phantom.report_text import PROMPTS, Triplet
from plan_jax.types import Phrase, Record, UserError

__all__ = [
    "ANATOMY",
    "FINDINGS",
    "PROMPTS",
    "SPLITS",
    "Difficulty",
    "check",
    "draw",
    "patient_of",
    "report",
    "split_range",
]

DEFAULT = Difficulty()
SPLITS = ("train", "val", "test")
SPLIT_SIZE = 3_000_000  # indices reserved for each split; a multiple of 3, so no patient straddles


def patient_of(index: int) -> tuple[int, int]:
    """Patient and study number of an index: 0, 1, 2 -> (0, 0), (0, 1), (1, 0)."""
    block, place = divmod(index, 3)
    return 2 * block + (place == 2), int(place == 1)


def split_range(split: str, count: int) -> range:
    """Indices of a split; one split's images do not depend on the size of another."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0 <= count <= SPLIT_SIZE:
        raise UserError(f"{split} count {count} is out of range; use 0 to {SPLIT_SIZE}")
    start = SPLITS.index(split) * SPLIT_SIZE
    return range(start, start + count)


def check(seed: int, index: int, size: int) -> None:
    """Raise UserError for a negative seed or index, or a size below 32."""
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise UserError(f"{name} {value} is negative; use 0 or more")
    if size < 32:
        raise UserError(f"size {size} is too small for a chest; use 32 or more")


def draw(seed: int, index: int, size: int = 96, difficulty: Difficulty = DEFAULT) -> Record:
    """Draw study `index` of the world `seed` as a Record.

    `image` is UInt8[size size 1]; `labels` Int8[F] in the order of `difficulty.findings`; each
    finding is one Phrase with its Bool[size size] mask and its boxes; `anatomy` holds the masks of
    `ANATOMY`; `triplets` every (region, finding, existence) that the report states, existence 1, 0
    or -1 (stated with doubt; the finding is there all the same). What there is and what is written
    do not depend on `size`.

    Raises: UserError for a negative seed or index, or a size below 32.
    """
    check(seed, index, size)
    number, _ = patient_of(index)
    rng, findings, text, triplets = report(seed, index, difficulty)
    scene = _scene(rng, new_patient(np.random.default_rng((seed, number))), findings, size)
    masks = [paint(scene, finding) for finding in findings]
    anatomy = anatomy_masks(scene.chest)
    image = _expose(scene, rng, difficulty.noise)
    kinds = difficulty.findings
    present = {finding.kind for finding in findings}
    labels = np.array([kind in present for kind in kinds], np.int8)
    phrases = tuple(_phrase(f, mask, kinds) for f, mask in zip(findings, masks, strict=True))
    return Record(
        image[..., None],
        text,
        f"p{number:07d}",
        labels,
        phrases,
        anatomy,
        triplets,
        np.asarray(
            [_box(mask) if mask.any() else (0,) * 4 for mask in anatomy.values()], np.float32
        ),
    )


def report(
    seed: int, index: int, difficulty: Difficulty = DEFAULT
) -> tuple[np.random.Generator, list[Finding], str, tuple[Triplet, ...]]:
    """What study `index` has and what is written of it, without drawing it.

    Returns the generator that the drawing goes on with, the findings, the report, its triplets.
    """
    number, study = patient_of(index)
    rng = np.random.default_rng((seed, number, study + 1))
    findings = plan(rng, difficulty.findings, difficulty.max_findings)
    words = np.random.default_rng((seed, number, study + 1, 1))
    return rng, findings, *report_text.write(words, findings, difficulty)


def _scene(rng: np.random.Generator, patient: Patient, findings: list[Finding], size: int) -> Scene:
    """Position the patient and lay out the chest, with a larger heart if there is cardiomegaly."""
    shift = rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
    turn, zoom = rng.normal(0, 0.03), rng.uniform(0.95, 1.05)
    ratio = None
    for finding in findings:
        if finding.kind == "cardiomegaly":
            ratio = 0.55 + 0.045 * finding.level + 0.03 * float(finding.shape[0])
    made = chest(patient, size, shift=shift, turn=turn, zoom=zoom, ratio=ratio)
    return new_scene(made, tissue.vessels(made), smooth_field(patient.texture, size) * 2.2)


def _expose(scene: Scene, rng: np.random.Generator, noise: Number) -> UInt8[np.ndarray, "Y X"]:
    """Add up the opacities and turn them into grey values UInt8[size size], tissue bright."""
    made = scene.chest
    size = made.x.shape[0]
    lung = np.maximum(made.lung["right"], made.lung["left"])
    depth = np.maximum(made.depth["right"], made.depth["left"])
    air = (0.50 + 0.16 * clip(depth * 5, 0, 1)) * lung
    inside = lung * (1 - 0.85 * scene.fill) * (1 - scene.clear)
    opacity = tissue.soft_tissue(made) - air * (1 - scene.fill) * (1 + 0.24 * scene.clear)
    opacity = opacity + inside * (0.20 * scene.vessels + 0.016 * scene.texture)
    opacity = opacity + tissue.bones(made) + scene.add
    gain, level = rng.uniform(3.4, 4.4), rng.uniform(0.66, 0.80)
    uneven = smooth_field(rng.normal(0, 0.035, (5, 5)).astype(np.float32), size)
    grey = 1 / (1 + np.exp(np.float32(-gain) * (opacity + uneven - np.float32(level))))
    black, white = rng.uniform(0.0, 0.05), rng.uniform(0.90, 1.0)
    grey = black + (white - black) * grey ** np.float32(rng.uniform(0.85, 1.15))
    sigma = noise * rng.uniform(0.012, 0.034)
    grey = grey + np.float32(sigma) * rng.standard_normal(grey.shape, np.float32)
    return clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


def _phrase(finding: Finding, mask: Mask, kinds: tuple[str, ...]) -> Phrase:
    """The phrase of a finding, by its canonical name, with its truth; oedema has a box a lung."""
    if finding.kind == "pulmonary oedema":
        middle = mask.shape[1] // 2  # the mediastinum, whatever the shift
        left, right = mask.copy(), mask.copy()
        left[:, middle:], right[:, :middle] = False, False
        parts = [left, right]
    else:
        parts = [mask]
    boxes = tuple(_box(part) for part in parts if part.any())
    text, place = report_text.phrase(finding), kinds.index(finding.kind)
    return Phrase(text, place, finding.key, finding.kind, boxes, mask)


def _box(mask: Mask) -> tuple[float, float, float, float]:
    """Smallest box (x0, y0, x1, y1) in pixels around a mask; x1, y1 lie just beyond it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

"""Which findings a phantom has: kinds, sides, zones and sizes that can be seen together."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from plan_jax.data.phantom.anatomy import SIDES, ZONES, Number
from plan_jax.types import UserError

Shape = Float32[np.ndarray, "24"]  # the uniform random numbers that shape one finding
FINDINGS = (
    "consolidation",
    "nodule",
    "pleural effusion",
    "pneumothorax",
    "cardiomegaly",
    "linear atelectasis",
    "pulmonary oedema",
    "pacemaker",
)
ZONAL = {"consolidation": ZONES, "nodule": ZONES, "linear atelectasis": ("mid", "lower")}
WEIGHT = dict(zip(FINDINGS, (0.26, 0.15, 0.17, 0.13, 0.11, 0.12, 0.11, 0.08), strict=True))
ONCE = ("cardiomegaly", "pulmonary oedema", "pacemaker", "pneumothorax")  # at most once a study
_ORDER = (
    "cardiomegaly",
    "pneumothorax",
    "pleural effusion",
    "pulmonary oedema",
    "consolidation",
    "nodule",
    "linear atelectasis",
    "pacemaker",
)  # of painting


@dataclass(frozen=True)
class Difficulty:
    """What makes a phantom hard.

    `findings`: kinds that occur (labels follow this order). `max_findings`: at most, 0 to 4.
    `noise`: multiplies the image noise (0: none). `filler`: mean number of irrelevant sentences a
    report. `hedged`: share of the mildest findings that the report states with doubt. `negated`:
    mean number of absent kinds that the report rules out. `vague`: share of findings that the
    report states without their place.
    """

    findings: tuple[str, ...] = FINDINGS
    max_findings: int = 4
    noise: Number = 1.0
    filler: Number = 1.5
    hedged: Number = 0.3
    negated: Number = 1.6
    vague: Number = 0.2

    def __post_init__(self):
        for kind in self.findings:
            if kind not in FINDINGS:
                raise UserError(f"finding {kind!r} is unknown; use some of {', '.join(FINDINGS)}")
        if not self.findings:
            raise UserError("findings () is empty; name at least one kind")
        if len(set(self.findings)) < len(self.findings):
            raise UserError(f"findings {self.findings} repeats a kind; name each once")
        if not 0 <= self.max_findings <= 4:
            raise UserError(f"max_findings {self.max_findings} is out of range; use 0 to 4")
        for name in ("noise", "filler", "negated"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative; use 0 or more")
        for name in ("hedged", "vague"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is no share; use 0 to 1")


@dataclass(frozen=True)
class Finding:
    """One finding of a study: level 0 small or mild, 1 moderate, 2 large or severe."""

    kind: str
    side: str
    zone: str
    level: int
    shape: Shape

    @property
    def key(self) -> str:
        """Normalised meaning, e.g. `consolidation|left|lower`."""
        return f"{self.kind}|{self.side}|{self.zone}"


def plan(rng: np.random.Generator, kinds: tuple[str, ...], most: int) -> list[Finding]:
    """Choose 0 to `most` findings that can all be seen together, in the order of painting."""
    chances = np.array([0.17, 0.30, 0.27, 0.17, 0.09])[: most + 1]
    count = int(rng.choice(len(chances), p=chances / chances.sum()))
    limits = np.cumsum([WEIGHT[kind] for kind in kinds])
    chosen: list[Finding] = []
    for _ in range(40):
        if len(chosen) == count:
            break
        kind = kinds[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]
        side = "" if kind in ("cardiomegaly", "pulmonary oedema") else SIDES[rng.integers(2)]
        zones = ZONAL.get(kind, ("",))
        zone = zones[rng.integers(len(zones))]
        level = int(np.searchsorted((0.35, 0.75), rng.random()))
        new = Finding(kind, side, zone, level, rng.uniform(size=24).astype(np.float32))
        if all(_compatible(new, old) for old in chosen):
            chosen.append(new)
    return sorted(chosen, key=lambda f: _ORDER.index(f.kind))


def _compatible(a: Finding, b: Finding) -> bool:
    """Whether neither of two findings would hide the other, or be taken for it.

    Refused: the same key twice; one of `ONCE` twice; two zonal findings in one zone; fluid with
    pleural air on one side; whatever fluid covers, pleural air or a large heart displaces, or a
    pacemaker lies on; consolidation of a mid zone within oedema.
    """
    if a.key == b.key or (a.kind == b.kind and a.kind in ONCE):
        return False
    if a.zone and (a.side, a.zone) == (b.side, b.zone):
        return False
    return not (_hides(a, b) or _hides(b, a))


def _hides(a: Finding, b: Finding) -> bool:
    """Whether the (larger) finding a would hide or displace b."""
    if a.kind == "cardiomegaly":
        return (b.side, b.zone) == ("left", "lower")
    if a.kind == "pulmonary oedema":
        return (b.kind, b.zone) == ("consolidation", "mid")
    if a.side != b.side:
        return False
    if a.kind == "pleural effusion":
        return b.kind == "pneumothorax" or b.zone == "lower" or (b.zone == "mid" and a.level == 2)
    if a.kind == "pneumothorax":
        return (
            b.zone == "upper"
            or (b.zone != "" and a.level == 2)
            or ((b.side, b.zone) == ("left", "lower"))
        )
    return a.kind == "pacemaker" and b.zone == "upper"

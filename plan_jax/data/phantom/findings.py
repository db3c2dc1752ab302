"""Which findings a phantom has: kinds, sides, zones and sizes that can be seen together."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from plan_jax.data.phantom.anatomy import SIDES, ZONES, Number
from plan_jax.types import UserError

Shape = Float32[np.ndarray, "24"]  # the uniform random numbers that shape a finding
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
ZONES_OF_KIND = {"consolidation": ZONES, "nodule": ZONES, "linear atelectasis": ("mid", "lower")}
SIDELESS = ("cardiomegaly", "pulmonary oedema")
FREQUENCIES = dict(zip(FINDINGS, (0.26, 0.15, 0.17, 0.13, 0.11, 0.12, 0.11, 0.08), strict=True))
COUNT_FREQUENCIES = (0.17, 0.30, 0.27, 0.17, 0.09)  # of 0, 1, 2, 3 and 4 findings
MAX_FINDINGS = len(COUNT_FREQUENCIES) - 1
LEVEL_BOUNDS = (0.35, 0.75)  # uniform numbers below the first are mild, above the second severe
UNIQUE_KINDS = ("cardiomegaly", "pulmonary oedema", "pacemaker", "pneumothorax")
MAX_ATTEMPTS = 40
HARD_SIZES = (2 / 3, 1.0)  # range of the factor of a hard finding's size; ours
HARD_CONTRASTS = (0.5, 0.7)  # range of the factor of its contrast; ours

# Later findings are drawn over earlier ones: fluid and pleural air come before what lies in air.
_DRAWING_ORDER = (
    "cardiomegaly",
    "pneumothorax",
    "pleural effusion",
    "pulmonary oedema",
    "consolidation",
    "nodule",
    "linear atelectasis",
    "pacemaker",
)


@dataclass(frozen=True)
class Difficulty:
    """The settings that make a phantom hard to read.

    Attributes:
      findings: the kinds that occur; labels follow this order.
      max_findings: the largest number of findings of a study, 0 to 4.
      noise: the factor of the image noise (0: none).
      filler: the mean number of irrelevant sentences of a report.
      hedged: the share of the mildest findings that the report states with doubt.
      negated: the mean number of absent kinds that the report rules out.
      vague: the share of findings that the report states without their location.
      hard: whether films and reports are those of the hard level (ours): findings are smaller and
        fainter and may overlap; films are turned, badly exposed and noisier, and show things that
        are no finding; reports are longer, compare with earlier films and doubt more. The numbers
        above are then relative: of noise and of irrelevant sentences there is more.
    """

    findings: tuple[str, ...] = FINDINGS
    max_findings: int = MAX_FINDINGS
    noise: Number = 1.0
    filler: Number = 1.5
    hedged: Number = 0.3
    negated: Number = 1.6
    vague: Number = 0.2
    hard: bool = False

    def __post_init__(self):
        """Raises UserError if a value is out of range."""
        for kind in self.findings:
            if kind not in FINDINGS:
                raise UserError(f"finding {kind!r} is unknown; use some of {', '.join(FINDINGS)}")
        if not self.findings:
            raise UserError("findings () is empty; name at least one kind")
        if len(set(self.findings)) < len(self.findings):
            raise UserError(f"findings {self.findings} repeats a kind; name each once")
        if not 0 <= self.max_findings <= MAX_FINDINGS:
            raise UserError(
                f"max_findings {self.max_findings} is out of range; use 0 to {MAX_FINDINGS}"
            )
        for name in ("noise", "filler", "negated"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative; use 0 or more")
        for name in ("hedged", "vague"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not a share; use 0 to 1")


@dataclass(frozen=True)
class Finding:
    """A finding of a study; level 0 is small or mild, 1 moderate, 2 large or severe.

    `side` and `zone` are "" for a kind that has none. `size` and `contrast` are factors, 1 unless
    the phantom is hard.
    """

    kind: str
    side: str
    zone: str
    level: int
    shape: Shape
    size: float = 1.0
    contrast: float = 1.0

    @property
    def key(self) -> str:
        """The normalised meaning, as `consolidation|left|lower`."""
        return f"{self.kind}|{self.side}|{self.zone}"


def sample_findings(rng: np.random.Generator, difficulty: Difficulty) -> list[Finding]:
    """Returns 0 to `max_findings` findings that can all be seen together, in drawing order."""
    kinds, max_findings = difficulty.findings, difficulty.max_findings
    # The order of the draws is part of the data: changing it changes every phantom.
    chances = np.array(COUNT_FREQUENCIES)[: max_findings + 1]
    count = int(rng.choice(len(chances), p=chances / chances.sum()))
    limits = np.cumsum([FREQUENCIES[kind] for kind in kinds])
    findings: list[Finding] = []
    # With few kinds there may be no room for `count` findings, so the attempts are limited.
    for _ in range(MAX_ATTEMPTS):
        if len(findings) == count:
            break
        kind = kinds[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]
        side = "" if kind in SIDELESS else SIDES[rng.integers(2)]
        zones = ZONES_OF_KIND.get(kind, ("",))
        zone = zones[rng.integers(len(zones))]
        level = int(np.searchsorted(LEVEL_BOUNDS, rng.random()))
        candidate = Finding(kind, side, zone, level, rng.uniform(size=24).astype(np.float32))
        if difficulty.hard:
            candidate = _make_subtle(candidate)
        if all(_are_compatible(candidate, finding, difficulty.hard) for finding in findings):
            findings.append(candidate)
    return sorted(findings, key=lambda finding: _DRAWING_ORDER.index(finding.kind))


def _make_subtle(finding: Finding) -> Finding:
    """Returns a finding of a hard phantom: 2/3 to all of its size, about 0.6 of its contrast."""
    # The last two numbers of a shape, which nothing else uses.
    size, contrast = HARD_SIZES, HARD_CONTRASTS
    return replace(
        finding,
        size=size[0] + (size[1] - size[0]) * float(finding.shape[-2]),
        contrast=contrast[0] + (contrast[1] - contrast[0]) * float(finding.shape[-1]),
    )


def _are_compatible(first: Finding, second: Finding, hard: bool) -> bool:
    """Returns whether neither of two findings would hide the other, or be taken for it.

    Refused are: the same key twice; a kind of `UNIQUE_KINDS` twice; two zonal findings in one zone;
    fluid with pleural air on one side; whatever fluid covers, pleural air or a large heart
    displaces, or a pacemaker lies on; consolidation of a mid zone within oedema. In a hard phantom
    findings of one zone may overlap, and so may consolidation and oedema, and whatever a pacemaker
    lies on.
    """
    if first.key == second.key or (first.kind == second.kind and first.kind in UNIQUE_KINDS):
        return False
    if first.zone and (first.side, first.zone) == (second.side, second.zone) and not hard:
        return False
    return not (_hides(first, second, hard) or _hides(second, first, hard))


def _hides(larger: Finding, smaller: Finding, hard: bool) -> bool:
    """Returns whether the larger finding would hide or displace the smaller one."""
    zone = smaller.zone
    if larger.kind == "cardiomegaly":
        return (smaller.side, zone) == ("left", "lower")
    if larger.kind == "pulmonary oedema":
        return (smaller.kind, zone) == ("consolidation", "mid") and not hard
    if larger.side != smaller.side:
        return False
    is_severe = larger.level == 2
    if larger.kind == "pleural effusion":
        return smaller.kind == "pneumothorax" or zone == "lower" or (zone == "mid" and is_severe)
    if larger.kind == "pneumothorax":
        # The heart leaves too little of a displaced left lower zone.
        is_behind_heart = (smaller.side, zone) == ("left", "lower")
        return zone == "upper" or (zone != "" and is_severe) or is_behind_heart
    return larger.kind == "pacemaker" and zone == "upper" and not hard

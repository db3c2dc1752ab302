"""The phantom's reports: a small grammar of chest radiology in which every statement is true.

A report states each finding of the image (the mildest sometimes with doubt), rules out some absent
kinds, says that other regions are normal and adds sentences that have nothing to do with the image.
`write` also returns what was claimed, as triplets.
"""

import re

import numpy as np

from plan_jax.data.phantom.anatomy import SIDES, ZONES
from plan_jax.data.phantom.cases import Difficulty, Finding

Triplet = tuple[str, str, int]

# kind -> (name, countable) with the canonical name first
NAMES: dict[str, tuple[tuple[str, bool], ...]] = {
    "consolidation": (
        ("consolidation", False),
        ("airspace opacity", True),
        ("airspace disease", False),
        ("pneumonic change", False),
    ),
    "nodule": (
        ("nodule", True),
        ("pulmonary nodule", True),
        ("nodular opacity", True),
        ("rounded lesion", True),
    ),
    "pleural effusion": (("pleural effusion", True), ("effusion", True), ("pleural fluid", False)),
    "pneumothorax": (
        ("pneumothorax", True),
        ("pleural air", False),
        ("pleural air collection", True),
    ),
    "cardiomegaly": (
        ("cardiomegaly", False),
        ("cardiac enlargement", False),
        ("enlargement of the heart", False),
    ),
    "linear atelectasis": (
        ("linear atelectasis", False),
        ("plate atelectasis", False),
        ("band of collapse", True),
    ),
    "pulmonary oedema": (
        ("pulmonary oedema", False),
        ("interstitial oedema", False),
        ("pulmonary vascular congestion", False),
    ),
    "pacemaker": (("pacemaker", True), ("pacing device", True), ("cardiac device", True)),
}
_GRADES = (("mild", "minor"), ("moderate",), ("severe", "marked"))
_SIZES = (("small", "minor"), ("moderate", "medium sized"), ("large", "extensive"))
_AMOUNTS = ("small amount of", "moderate amount of", "large amount of")
GRADES: dict[str, tuple[tuple[str, ...], ...]] = {
    "consolidation": (
        ("mild", "subtle", "patchy"),
        ("moderate",),
        ("extensive", "dense", "severe"),
    ),
    "nodule": (("small", "tiny"), ("medium sized",), ("large", "dominant")),
    "pleural effusion": _SIZES,
    "pneumothorax": _SIZES,
    "cardiomegaly": (("mild", "borderline"), ("moderate",), ("severe", "marked")),
    "linear atelectasis": (("thin", "minor"), ("moderate",), ("thick", "broad")),
    "pulmonary oedema": _GRADES,
    "pacemaker": (("single lead",), ("dual lead",), ("dual lead",)),
}
PLACES = {
    "consolidation": ("in the {side} {zone} zone", "in the {side} {zone} lung"),
    "pleural effusion": ("on the {side}", "at the {side} base"),
    "pneumothorax": ("on the {side}", "in the {side} pleural space"),
    "cardiomegaly": ("",),
    "pulmonary oedema": ("", "in both lungs", "around both hila"),
    "pacemaker": ("over the {side} chest", "on the {side}"),
}
PLACES["nodule"] = PLACES["linear atelectasis"] = PLACES["consolidation"]
_STATED = (
    "there is {np} {place}",
    "{np} is seen {place}",
    "{np} {place} is noted",
    "{np} {place}",
    "{place} there is {np}",
    "{np} is present {place}",
)
_DOUBTED = (
    "possible {bare} {place}",
    "there may be {np} {place}",
    "{np} {place} cannot be excluded",
    "{np} {place} is suspected",
)
_ENLARGED = (
    "the {heart} is mildly enlarged",
    "the {heart} is moderately enlarged",
    "the {heart} is markedly enlarged",
    "the {heart} is enlarged",
)
_ABSENT = (
    "no {names}",
    "there is no evidence of {names}",
    "no {names} is seen",
    "there is no {names}",
)
FILLER = (
    "clinical correlation is advised",
    "comparison is made with the prior study",
    "technique is adequate",
    "degenerative change of the spine is noted",
    "the upper abdomen is unremarkable",
    "findings were discussed with the referring team",
    "follow up imaging is recommended as needed",
    "portable semi erect view",
    "indication is shortness of breath",
    "single frontal radiograph of the chest",
    "this examination was reported by the duty radiologist",
    "the bones show no significant interval change",
    "the patient has a history of cough and fever",
    "no acute fracture is identified",
    "the soft tissues are unremarkable",
    "old healed rib fractures are stable",
    "images were reviewed on a workstation",
    "the study is compared with the examination of last year",
)
_LUNG = (
    "consolidation",
    "nodule",
    "linear atelectasis",
    "pneumothorax",
    "pleural effusion",
    "pulmonary oedema",
)
# sentence, region, kinds that it contradicts (the first two are what it denies in triplets)
NORMAL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("the mediastinal contour is normal", "", ()),
    ("the trachea is central", "", ()),
    ("the bony thorax is intact", "", ()),
    ("the heart size is normal", "heart", ("cardiomegaly",)),
    ("normal cardiac silhouette", "heart", ("cardiomegaly",)),
    ("the pulmonary vasculature is normal", "both lungs", ("pulmonary oedema",)),
    ("both lungs are clear", "both lungs", _LUNG),
    ("no active disease of the lungs", "both lungs", _LUNG),
    ("the {side} lung is clear", "{side} lung", _LUNG),
    ("the {side} {zone} zone is clear", "{side} {zone} zone", _LUNG),
    ("the {side} costophrenic angle is sharp", "{side} lung", ("pleural effusion",)),
)
LONGEST = 70
_EVERYWHERE = {"cardiomegaly": "heart", "pacemaker": "chest"}


def _prompts(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    present, absent = [], []
    for name, countable in NAMES[kind]:
        present += [f"there is {_article(name, countable)}", f"{name} is seen"]
        absent += [f"no {name}", f"there is no evidence of {name}"]
    return tuple(present), tuple(absent)


def phrase(finding: Finding) -> str:
    """The finding by its canonical name and place: `consolidation in the left lower zone`."""
    return f"{finding.kind} {_place(finding, 0)}".strip()


def region(finding: Finding) -> str:
    """The region that a finding lies in, as triplets name it."""
    if finding.zone:
        return f"{finding.side} {finding.zone} zone"
    if finding.kind in ("pleural effusion", "pneumothorax"):
        return f"{finding.side} lung"
    if finding.kind == "pacemaker":
        return f"{finding.side} chest"
    return _EVERYWHERE.get(finding.kind, "both lungs")


def write(
    rng: np.random.Generator, findings: list[Finding], difficulty: Difficulty
) -> tuple[str, tuple[Triplet, ...]]:
    """Write the report of these findings; return it and the triplets that it states.

    What is not a finding is left out once the report has `LONGEST` words.
    """
    said: list[tuple[str, list[Triplet]]] = []
    absent = [k for k in difficulty.findings if all(f.kind != k for f in findings)]
    shuffled = [absent[i] for i in rng.permutation(len(absent))]
    denied = shuffled[: min(rng.poisson(difficulty.negated), 4)]
    for finding in findings:
        subtle = finding.level == 0 and finding.kind != "pacemaker"
        doubt = subtle and rng.random() < difficulty.hedged
        vague = bool(finding.side) and rng.random() < difficulty.vague
        sentence = _state(rng, finding, doubt, vague)
        where = "chest" if vague else region(finding)
        claims = [(where, finding.kind, -1 if doubt else 1)]
        if denied and not doubt and rng.random() < 0.15:
            kind = denied.pop()
            sentence += f" without {_name(rng, kind)[0]}"
            claims.append(_absence(kind))
        said.append((sentence, claims))
    optional = _deny(rng, denied) + _normal(rng, findings)
    count = min(rng.poisson(difficulty.filler), 5)
    optional += [(FILLER[i], []) for i in rng.permutation(len(FILLER))[:count]]
    for sentence, claims in optional or [(FILLER[0], [])]:
        if sum(len(s.split()) for s, _ in said) + len(sentence.split()) <= LONGEST:
            said.append((sentence, claims))
    order = rng.permutation(len(said))
    text = " ".join(f"{said[i][0][0].upper()}{said[i][0][1:]}." for i in order)
    return text, tuple(dict.fromkeys(claim for i in order for claim in said[i][1]))


def _absence(kind: str) -> Triplet:
    return _EVERYWHERE.get(kind, "both lungs"), kind, 0


def sources() -> list[str]:
    """All strings that reports, phrases and prompts are put together from, placeholders filled."""
    fixed = [
        *_STATED,
        *_DOUBTED,
        *_ABSENT,
        *_ENLARGED,
        *_AMOUNTS,
        *FILLER,
        *(line for line, _, _ in NORMAL),
    ]
    fixed += [name for names in NAMES.values() for name, _ in names] + [*NAMES]
    fixed += [word for grades in GRADES.values() for grade in grades for word in grade]
    fixed += [place for places in PLACES.values() for place in places]
    fixed += [text for both in PROMPTS.values() for prompts in both for text in prompts]
    filled = [re.sub(r"\{\w*\}", " ", text) for text in fixed]
    return [*filled, *SIDES, *ZONES, "a an or without"]


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _article(noun: str, countable: bool) -> str:
    if not countable:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(rng: np.random.Generator, kind: str) -> tuple[str, bool]:
    """A name of the kind; the canonical one half of the time."""
    return NAMES[kind][0] if rng.random() < 0.5 else _pick(rng, NAMES[kind])


def _place(finding: Finding, variant: int) -> str:
    options = PLACES[finding.kind]
    return options[variant % len(options)].format(side=finding.side, zone=finding.zone)


def _state(rng: np.random.Generator, finding: Finding, doubt: bool, vague: bool) -> str:
    """One sentence that states a finding, or doubts it; a vague one does not say where it is."""
    name, countable = _name(rng, finding.kind)
    variant = int(rng.integers(len(PLACES[finding.kind])))
    place = "" if vague else _place(finding, variant)
    graded = rng.random() < 0.75
    if graded and not countable and GRADES[finding.kind] is _SIZES:
        name, countable = f"{_AMOUNTS[finding.level]} {name}", True
    elif graded:
        name = f"{_pick(rng, GRADES[finding.kind][finding.level])} {name}"
    if finding.kind == "cardiomegaly" and not doubt and rng.random() < 0.3:
        how = _ENLARGED[finding.level] if rng.random() < 0.75 else _ENLARGED[3]
        return how.format(heart=_pick(rng, ("heart", "cardiac silhouette")))
    if finding.kind in ("pleural effusion", "pneumothorax") and place and rng.random() < 0.35:
        words = name.split(" ")  # "a small left pleural effusion"
        nouns = ("pleural", "effusion", "pneumothorax")
        at = next(i for i, word in enumerate(words) if word in nouns)
        name, place = " ".join(words[:at] + [finding.side] + words[at:]), ""
    templates = _DOUBTED if doubt else _STATED if place else _STATED[:4] + _STATED[5:]
    sentence = _pick(rng, templates).format(np=_article(name, countable), bare=name, place=place)
    return " ".join(sentence.split())


def _deny(rng: np.random.Generator, kinds: list[str]) -> list[tuple[str, list[Triplet]]]:
    """Sentences that rule the kinds out, one or two in each."""
    out, left = [], list(kinds)
    while left:
        here = [left.pop()]
        if left and rng.random() < 0.6:
            here.append(left.pop())
        names = [_name(rng, kind)[0] for kind in here]
        sentence = _pick(rng, _ABSENT).format(names=" or ".join(names))
        out.append((sentence, [_absence(kind) for kind in here]))
    return out


def _normal(rng: np.random.Generator, findings: list[Finding]) -> list[tuple[str, list[Triplet]]]:
    """Up to three statements of `NORMAL` that are true."""
    options: list[tuple[str, list[Triplet]]] = []
    for sentence, where, kinds in NORMAL:
        places = [(side, zone) for side in SIDES for zone in ZONES]
        if "{zone}" not in sentence:
            places = [(side, "") for side in SIDES] if "{side}" in sentence else [("", "")]
        for side, zone in places:
            if not any(_against(f, kinds, side, zone) for f in findings):
                claims = [(where.format(side=side, zone=zone), kind, 0) for kind in kinds[:2]]
                options.append((sentence.format(side=side, zone=zone), claims))
    count = rng.choice(4, p=(0.15, 0.4, 0.3, 0.15))
    return [options[i] for i in rng.permutation(len(options))[:count]]


def _against(finding: Finding, kinds: tuple[str, ...], side: str, zone: str) -> bool:
    """Whether a finding contradicts the absence of these kinds in that side and zone."""
    return (
        finding.kind in kinds
        and (not side or finding.side in ("", side))
        and (not zone or finding.zone in ("", zone))
    )


PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    kind: _prompts(kind) for kind in NAMES
}

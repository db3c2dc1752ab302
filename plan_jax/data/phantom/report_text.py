"""The phantom's reports: a small grammar of chest radiology in which every statement is true.

A report states each finding of the image (the mildest sometimes with doubt), rules out some absent
kinds, calls other regions normal and adds sentences that have nothing to do with the image.
`compose_report` also returns what the report claims, as triplets.

A report of the hard level is longer. It also compares findings with earlier films, repeats what an
earlier report may have said, and doubts moderate findings and kinds that are absent. The earlier
films are invented, and what is said of them contradicts nothing in this image. All of this is ours;
its words are among those of the vocabulary, whose ids therefore stay.
"""

import re

import numpy as np

from plan_jax.data.phantom.anatomy import SIDES, ZONES, Number
from plan_jax.data.phantom.findings import SIDELESS, ZONES_OF_KIND, Difficulty, Finding

Triplet = tuple[str, str, int]  # region, finding, existence
Sentence = tuple[str, list[Triplet]]  # a sentence without capital and full stop, and its claims

# The names of each kind, and whether they are countable; the canonical name comes first.
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
# Adjectives for level 0, 1 and 2 of each kind.
_SIZES = (("small", "minor"), ("moderate", "medium sized"), ("large", "extensive"))
# Used with uncountable names where the adjectives are sizes: "a small amount of pleural fluid".
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
    "pulmonary oedema": (("mild", "minor"), ("moderate",), ("severe", "marked")),
    "pacemaker": (("single lead",), ("dual lead",), ("dual lead",)),
}
LOCATIONS = {
    "consolidation": ("in the {side} {zone} zone", "in the {side} {zone} lung"),
    "pleural effusion": ("on the {side}", "at the {side} base"),
    "pneumothorax": ("on the {side}", "in the {side} pleural space"),
    "cardiomegaly": ("",),
    "pulmonary oedema": ("", "in both lungs", "around both hila"),
    "pacemaker": ("over the {side} chest", "on the {side}"),
}
LOCATIONS["nodule"] = LOCATIONS["linear atelectasis"] = LOCATIONS["consolidation"]

# Sentence templates: `np` is the name with its article, `bare` the name without.
_LOCATION_FIRST = "{place} there is {np}"
_PRESENT_TEMPLATES = (
    "there is {np} {place}",
    "{np} is seen {place}",
    "{np} {place} is noted",
    "{np} {place}",
    _LOCATION_FIRST,
    "{np} is present {place}",
)
_UNCERTAIN_TEMPLATES = (
    "possible {bare} {place}",
    "there may be {np} {place}",
    "{np} {place} cannot be excluded",
    "{np} {place} is suspected",
)
# For level 0, 1 and 2 of cardiomegaly, and without a grade.
_ENLARGED_HEART = (
    "the {heart} is mildly enlarged",
    "the {heart} is moderately enlarged",
    "the {heart} is markedly enlarged",
    "the {heart} is enlarged",
)
_ABSENT_TEMPLATES = (
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
_LUNG_KINDS = (
    "consolidation",
    "nodule",
    "linear atelectasis",
    "pneumothorax",
    "pleural effusion",
    "pulmonary oedema",
)
# Sentence, region, and the kinds that the sentence contradicts: triplets deny the first two.
NORMAL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("the mediastinal contour is normal", "", ()),
    ("the trachea is central", "", ()),
    ("the bony thorax is intact", "", ()),
    ("the heart size is normal", "heart", ("cardiomegaly",)),
    ("normal cardiac silhouette", "heart", ("cardiomegaly",)),
    ("the pulmonary vasculature is normal", "both lungs", ("pulmonary oedema",)),
    ("both lungs are clear", "both lungs", _LUNG_KINDS),
    ("no active disease of the lungs", "both lungs", _LUNG_KINDS),
    ("the {side} lung is clear", "{side} lung", _LUNG_KINDS),
    ("the {side} {zone} zone is clear", "{side} {zone} zone", _LUNG_KINDS),
    ("the {side} costophrenic angle is sharp", "{side} lung", ("pleural effusion",)),
)
MAX_WORDS = 70
MAX_NEGATED, MAX_FILLERS = 4, 5

# Reports of the hard level; all numbers are ours.
HARD_MAX_WORDS, HARD_MAX_FILLERS = 110, 9
HARD_FILLER = (
    "portable technique limits the evaluation",
    "correlate with the clinical history",
    "the thoracic aorta is unremarkable",
    "calcification of the aorta is unchanged",
    "scoliosis of the thoracic spine is stable",
    "age related change of the spine is seen",
    "recent surgical history is noted",
    "no fracture of the clavicle is identified",
    "the subcutaneous tissues are unremarkable",
    "inspiration is adequate and the patient is rotated",
    "the film is compared with the previous examination",
    "there is no significant change of the bones since the prior study",
    "follow up is recommended if symptoms are persistent",
    "the position of the patient is semi erect",
)
_FILLER_FACTOR = 2.5  # of the mean number of irrelevant sentences
_DOUBTED_FACTOR = 2  # mean number of absent kinds that are doubted, relative to `hedged`
_MAX_DOUBTED = 2
_NUM_FURTHER_NORMAL = 2  # statements that something is normal, besides those of a standard report
_COMPARED_SHARE = 0.5  # of the findings that are stated without doubt
_RESOLVED_SHARE, _COPIED_SHARE = 0.3, 0.4  # of denials, and of statements that something is normal
# Doubts of what may be absent, and more of what is present.
_DOUBT_TEMPLATES = (
    *_UNCERTAIN_TEMPLATES,
    "{np} {place} is possible",
    "appearances {place} may represent {np}",
)
_PROBABLE_TEMPLATES = (*_DOUBT_TEMPLATES, "probable {bare} {place}", "{np} {place} is likely")
# How the statement of a finding may end.
_COMPARED = (
    "unchanged from the prior study",
    "as before",
    "similar to the previous examination",
    "new since the previous study",
)
# Sentences about a finding that another sentence states; those about a device are the first three.
_COMPARISONS = (
    "the {bare} is unchanged from the prior study",
    "there is no interval change of the {bare}",
    "the {bare} is stable since the previous examination",
    "compared with the previous study the {bare} has decreased",
    "the {bare} has increased since the prior examination",
    "compared with the prior film the {bare} is less extensive",
)
_NUM_DEVICE_COMPARISONS = 3
_RESOLVED = (
    "the previous {bare} has resolved",
    "the {bare} of the prior study is not seen",
    "no new {bare} since the previous study",
)
_COPIED = ("as before {sentence}", "{sentence} as on the prior study", "again {sentence}")
_WHOLE_REGIONS = {"cardiomegaly": "heart", "pacemaker": "chest"}


def canonical_phrase(finding: Finding) -> str:
    """Returns a finding by its canonical name and location.

    For example `consolidation in the left lower zone`.
    """
    return f"{finding.kind} {_format_location(finding, 0)}".strip()


def region_of(finding: Finding) -> str:
    """Returns the region that a finding lies in, as triplets name it."""
    if finding.zone:
        return f"{finding.side} {finding.zone} zone"
    if finding.kind in ("pleural effusion", "pneumothorax"):
        return f"{finding.side} lung"
    if finding.kind == "pacemaker":
        return f"{finding.side} chest"
    return _region_of_kind(finding.kind)


def compose_report(
    rng: np.random.Generator, findings: list[Finding], difficulty: Difficulty
) -> tuple[str, tuple[Triplet, ...]]:
    """Returns a report of these findings, and the triplets that it states.

    Sentences that state no finding are left out where the report would exceed `MAX_WORDS`, or
    `HARD_MAX_WORDS` at the hard level.
    """
    # The order of the draws is part of the data: changing it changes every report.
    sentences: list[Sentence] = []
    comparisons: list[Sentence] = []
    is_hard = difficulty.hard
    max_doubted_level = 1 if is_hard else 0
    absent = [
        kind for kind in difficulty.findings if all(finding.kind != kind for finding in findings)
    ]
    shuffled = [absent[i] for i in rng.permutation(len(absent))]
    negated = shuffled[: min(rng.poisson(difficulty.negated), MAX_NEGATED)]
    unmentioned = shuffled[len(negated) :]
    for finding in findings:
        # A pacemaker is never subtle: its level is the number of its leads.
        is_subtle = finding.level <= max_doubted_level and finding.kind != "pacemaker"
        is_uncertain = bool(is_subtle and rng.random() < difficulty.hedged)
        is_vague = bool(finding.side and rng.random() < difficulty.vague)
        templates = _PROBABLE_TEMPLATES if is_hard else _UNCERTAIN_TEMPLATES
        sentence = _state_finding(rng, finding, templates if is_uncertain else (), is_vague)
        region = "chest" if is_vague else region_of(finding)
        claims = [(region, finding.kind, -1 if is_uncertain else 1)]
        if negated and not is_uncertain and rng.random() < 0.15:
            kind = negated.pop()
            sentence += f" without {_choose_name(rng, kind)[0]}"
            claims.append(_absence(kind))
        elif is_hard and not is_uncertain and rng.random() < _COMPARED_SHARE:
            if rng.random() < 0.5:
                sentence += f", {_choose(rng, _COMPARED)}"
            else:
                comparisons.append(_compare_finding(rng, finding, is_vague))
        sentences.append((sentence, claims))
    if is_hard:
        optional = comparisons + _hard_sentences(rng, findings, negated, unmentioned, difficulty)
    else:
        optional = _negative_sentences(rng, negated) + _normal_sentences(rng, findings)
        optional += _choose_fillers(rng, FILLER, difficulty.filler, MAX_FILLERS)
    max_words = HARD_MAX_WORDS if is_hard else MAX_WORDS
    for sentence, claims in optional or [(FILLER[0], [])]:  # no report is empty
        num_words = sum(len(text.split()) for text, _ in sentences)
        if num_words + len(sentence.split()) <= max_words:
            sentences.append((sentence, claims))
    order = rng.permutation(len(sentences))
    report = " ".join(f"{sentences[i][0][0].upper()}{sentences[i][0][1:]}." for i in order)
    # Two sentences may claim the same; a dict keeps the first.
    return report, tuple(dict.fromkeys(claim for i in order for claim in sentences[i][1]))


def grammar_strings() -> list[str]:
    """Returns all strings that reports, phrases and prompts consist of, without placeholders."""
    strings = [
        *_PRESENT_TEMPLATES,
        *_UNCERTAIN_TEMPLATES,
        *_ABSENT_TEMPLATES,
        *_ENLARGED_HEART,
        *_AMOUNTS,
        *FILLER,
        *HARD_FILLER,
        *_PROBABLE_TEMPLATES,
        *_COMPARED,
        *_COMPARISONS,
        *_RESOLVED,
        *_COPIED,
        *(sentence for sentence, _, _ in NORMAL),
    ]
    strings += [name for names in NAMES.values() for name, _ in names] + [*NAMES]
    strings += [word for levels in GRADES.values() for level in levels for word in level]
    strings += [location for locations in LOCATIONS.values() for location in locations]
    strings += [text for sides in PROMPTS.values() for prompts in sides for text in prompts]
    strings = [re.sub(r"\{\w*\}", " ", text) for text in strings]
    return [*strings, *SIDES, *ZONES, "a an or without"]


def _build_prompts(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the positive and the negative prompts of a kind."""
    positive, negative = [], []
    for name, is_countable in NAMES[kind]:
        positive += [f"there is {_add_article(name, is_countable)}", f"{name} is seen"]
        negative += [f"no {name}", f"there is no evidence of {name}"]
    return tuple(positive), tuple(negative)


def _region_of_kind(kind: str) -> str:
    return _WHOLE_REGIONS.get(kind, "both lungs")


def _absence(kind: str) -> Triplet:
    return _region_of_kind(kind), kind, 0


def _choose(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _choose_name(rng: np.random.Generator, kind: str) -> tuple[str, bool]:
    """Returns a name of the kind; half of the time the canonical one."""
    return NAMES[kind][0] if rng.random() < 0.5 else _choose(rng, NAMES[kind])


def _add_article(noun: str, is_countable: bool) -> str:
    if not is_countable:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _format_location(finding: Finding, variant: int) -> str:
    options = LOCATIONS[finding.kind]
    return options[variant % len(options)].format(side=finding.side, zone=finding.zone)


def _state_finding(
    rng: np.random.Generator, finding: Finding, doubts: tuple[str, ...], is_vague: bool
) -> str:
    """Returns a sentence that states a finding, or doubts it; a vague one names no location.

    `doubts` are the templates of doubt; without any the sentence states the finding.
    """
    name, is_countable = _choose_name(rng, finding.kind)
    variant = int(rng.integers(len(LOCATIONS[finding.kind])))
    place = "" if is_vague else _format_location(finding, variant)
    is_graded = rng.random() < 0.75
    if is_graded and not is_countable and GRADES[finding.kind] is _SIZES:
        name, is_countable = f"{_AMOUNTS[finding.level]} {name}", True
    elif is_graded:
        name = f"{_choose(rng, GRADES[finding.kind][finding.level])} {name}"
    if finding.kind == "cardiomegaly" and not doubts and rng.random() < 0.3:
        is_heart_graded = rng.random() < 0.75
        template = _ENLARGED_HEART[finding.level if is_heart_graded else -1]
        return template.format(heart=_choose(rng, ("heart", "cardiac silhouette")))
    if finding.kind in ("pleural effusion", "pneumothorax") and place and rng.random() < 0.35:
        name, place = _insert_side(name, finding.side), ""
    templates: tuple[str, ...] = _PRESENT_TEMPLATES
    if doubts:
        templates = doubts
    elif not place:
        templates = tuple(text for text in templates if text != _LOCATION_FIRST)
    sentence = _choose(rng, templates).format(
        np=_add_article(name, is_countable), bare=name, place=place
    )
    return " ".join(sentence.split())


def _insert_side(name: str, side: str) -> str:
    """Returns a name with the side before its noun: `small left pleural effusion`."""
    words = name.split(" ")
    nouns = ("pleural", "effusion", "pneumothorax")
    position = next(i for i, word in enumerate(words) if word in nouns)
    return " ".join(words[:position] + [side] + words[position:])


def _negative_sentences(rng: np.random.Generator, kinds: list[str]) -> list[Sentence]:
    """Returns sentences that rule the kinds out, one or two in each."""
    sentences, remaining = [], list(kinds)
    while remaining:
        group = [remaining.pop()]
        if remaining and rng.random() < 0.6:
            group.append(remaining.pop())
        names = [_choose_name(rng, kind)[0] for kind in group]
        sentence = _choose(rng, _ABSENT_TEMPLATES).format(names=" or ".join(names))
        sentences.append((sentence, [_absence(kind) for kind in group]))
    return sentences


def _normal_sentences(
    rng: np.random.Generator, findings: list[Finding], num_further: int = 0
) -> list[Sentence]:
    """Returns up to three statements of `NORMAL` that are true, and `num_further` more."""
    options: list[Sentence] = []
    for template, region, kinds in NORMAL:
        locations = [(side, zone) for side in SIDES for zone in ZONES]
        if "{zone}" not in template:
            locations = [(side, "") for side in SIDES] if "{side}" in template else [("", "")]
        for side, zone in locations:
            if not any(_contradicts(finding, kinds, side, zone) for finding in findings):
                name = region.format(side=side, zone=zone)
                claims = [(name, kind, 0) for kind in kinds[:2]]
                options.append((template.format(side=side, zone=zone), claims))
    count = rng.choice(4, p=(0.15, 0.4, 0.3, 0.15))
    return [options[i] for i in rng.permutation(len(options))[: count + num_further]]


def _choose_fillers(
    rng: np.random.Generator, fillers: tuple[str, ...], mean: Number, limit: int
) -> list[Sentence]:
    count = min(rng.poisson(mean), limit)
    return [(fillers[i], []) for i in rng.permutation(len(fillers))[:count]]


def _compare_finding(rng: np.random.Generator, finding: Finding, is_vague: bool) -> Sentence:
    """Returns a sentence that compares a finding of this image with an earlier film."""
    name, _ = _choose_name(rng, finding.kind)
    region = "chest" if finding.side else region_of(finding)
    if finding.kind in ("pleural effusion", "pneumothorax") and not is_vague:
        name, region = _insert_side(name, finding.side), region_of(finding)
    is_device = finding.kind == "pacemaker"
    templates = _COMPARISONS[:_NUM_DEVICE_COMPARISONS] if is_device else _COMPARISONS
    return _choose(rng, templates).format(bare=name), [(region, finding.kind, 1)]


def _hard_sentences(
    rng: np.random.Generator,
    findings: list[Finding],
    negated: list[str],
    unmentioned: list[str],
    difficulty: Difficulty,
) -> list[Sentence]:
    """Returns what a hard report says besides its findings.

    Args:
      rng: the generator of the report.
      findings: the findings of the image.
      negated: absent kinds that the report rules out, some of them as resolved.
      unmentioned: the other absent kinds, of which it doubts a few.
      difficulty: the settings.
    """
    # A device is neither doubted nor does it resolve.
    doubtful = [kind for kind in unmentioned if kind != "pacemaker"]
    num_doubted = min(rng.poisson(_DOUBTED_FACTOR * difficulty.hedged), _MAX_DOUBTED)
    doubted = [_draw_absent(rng, kind) for kind in doubtful[:num_doubted]]
    sentences: list[Sentence] = []
    for finding in doubted:
        is_vague = bool(finding.side and rng.random() < difficulty.vague)
        sentence = _state_finding(rng, finding, _DOUBT_TEMPLATES, is_vague)
        region = "chest" if is_vague else region_of(finding)
        sentences.append((sentence, [(region, finding.kind, -1)]))
    denied = []
    for kind in negated:
        if kind != "pacemaker" and rng.random() < _RESOLVED_SHARE:
            name, _ = _choose_name(rng, kind)
            sentences.append((_choose(rng, _RESOLVED).format(bare=name), [_absence(kind)]))
        else:
            denied.append(kind)
    sentences += _negative_sentences(rng, denied)
    # What is doubted is not called normal either.
    for sentence, claims in _normal_sentences(rng, findings + doubted, _NUM_FURTHER_NORMAL):
        if rng.random() < _COPIED_SHARE:
            sentence = _choose(rng, _COPIED).format(sentence=sentence)
        sentences.append((sentence, claims))
    mean = _FILLER_FACTOR * difficulty.filler
    return sentences + _choose_fillers(rng, FILLER + HARD_FILLER, mean, HARD_MAX_FILLERS)


def _draw_absent(rng: np.random.Generator, kind: str) -> Finding:
    """Returns a small finding that no image has, at a random place."""
    side = "" if kind in SIDELESS else SIDES[rng.integers(2)]
    zones = ZONES_OF_KIND.get(kind, ("",))
    zone = zones[rng.integers(len(zones))]
    return Finding(kind, side, zone, 0, np.zeros(24, np.float32))


def _contradicts(finding: Finding, kinds: tuple[str, ...], side: str, zone: str) -> bool:
    """Returns whether a finding contradicts the absence of these kinds in that side and zone."""
    return (
        finding.kind in kinds
        and (not side or finding.side in ("", side))
        and (not zone or finding.zone in ("", zone))
    )


PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    kind: _build_prompts(kind) for kind in NAMES
}

"""Prompt sets for zero-shot classification: texts of images with a finding and without it.

Structures are published, wordings are ours: a figure obtained with these words is not comparable
with one obtained with the original words.

`gloria` (Huang et al., ICCV 2021): each class has severities, subtypes and locations; a prompt is
one of each, in this order. The word lists are ours and are common radiological vocabulary. So are
the negative prompts: the paper has none, and scoring `max` reads none.
`chexzero` (Tiu et al., Nature BME 2022): "{}" against "no {}" for the 14 labels of CheXpert.
`biovil` (Boecking et al., arXiv 2204.09817): several phrasings of pneumonia and of its absence.
`covid`: normal, pneumonia, COVID-19; ours, because no repository publishes its prompts for these.

Deviation: an empty severity or location leaves no space behind (GLoRIA's code leaves it).
Deviation: all prompts of a class are used (GLoRIA's code draws 5 of them).
Deviation: the opposite of "no finding" is "abnormal finding" (CheXzero's template makes "no no
finding" of it).
"""

import itertools
import re
from collections.abc import Callable, Sequence

# Class -> positive prompts, negative prompts.
Prompts = dict[str, tuple[list[str], list[str]]]

CHEXPERT = (
    "no finding",
    "enlarged cardiomediastinum",
    "cardiomegaly",
    "lung lesion",
    "lung opacity",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural effusion",
    "pleural other",
    "fracture",
    "support devices",
)
_SEVERITIES = ("", "mild", "moderate", "severe")
_SIDES = ("", "on the right", "on the left", "on both sides")
_ZONES = (
    "",
    "in the right lung",
    "in the left lung",
    "in both lungs",
    "in the right lower lobe",
    "in the left lower lobe",
    "in the right upper lobe",
    "in the left upper lobe",
    "in the right middle lobe",
    "in the lingula",
)
# Class -> severities, subtypes, locations.
TAXONOMY: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "atelectasis": (
        ("", "slight", "moderate", "marked"),
        (
            "atelectasis",
            "plate-like atelectasis",
            "segmental atelectasis",
            "basal atelectasis",
            "compressive atelectasis",
            "partial collapse",
        ),
        _ZONES,
    ),
    "cardiomegaly": (
        _SEVERITIES,
        ("cardiomegaly", "enlargement of the heart", "cardiac enlargement"),
        ("", "with prominence of the left ventricle", "with a widened mediastinum"),
    ),
    "consolidation": (
        ("", "faint", "patchy", "dense"),
        (
            "consolidation",
            "airspace consolidation",
            "lobar consolidation",
            "consolidation with air bronchograms",
        ),
        _ZONES,
    ),
    "edema": (
        _SEVERITIES,
        (
            "pulmonary edema",
            "interstitial edema",
            "alveolar edema",
            "edema with vascular congestion",
        ),
        ("", "in both lungs", "around the hila", "at both bases"),
    ),
    "pleural effusion": (
        ("", "trace", "small", "moderate", "large"),
        (
            "pleural effusion",
            "layering pleural effusion",
            "loculated pleural effusion",
            "pleural fluid with a blunted angle",
        ),
        _SIDES,
    ),
    "pneumonia": (
        ("", "early", "mild", "extensive"),
        (
            "pneumonia",
            "bacterial pneumonia",
            "viral pneumonia",
            "bronchopneumonia",
            "infectious infiltrate",
        ),
        _ZONES,
    ),
}
_NEGATIVE_TEMPLATES = ("no {}", "no sign of {}", "free of {}")
_BIOVIL: Prompts = {
    "pneumonia": (
        [
            "There is pneumonia.",
            "Opacities consistent with pneumonia.",
            "Appearance suggests an infectious consolidation.",
            "New airspace disease, most likely pneumonia.",
        ],
        [
            "There is no pneumonia.",
            "No opacities to suggest pneumonia.",
            "No infectious consolidation is seen.",
            "Clear lungs without airspace disease.",
        ],
    )
}
_COVID: Prompts = {
    "normal": (
        ["normal chest radiograph", "clear lungs", "no acute disease of the lungs"],
        ["abnormal chest radiograph", "opacities in the lungs", "acute disease of the lungs"],
    ),
    "pneumonia": (
        [
            "lobar pneumonia",
            "focal consolidation of bacterial pneumonia",
            "dense opacity of a lobe",
        ],
        ["no pneumonia", "no focal consolidation", "no dense opacity"],
    ),
    "covid-19": (
        [
            "COVID-19 pneumonia",
            "peripheral hazy opacities in both lungs",
            "patchy ground glass opacities of viral pneumonia",
        ],
        ["no COVID-19 pneumonia", "no peripheral opacities", "no ground glass opacities"],
    ),
}


def combine_words(slots: Sequence[Sequence[str]]) -> list[str]:
    """Returns all combinations of one word of each slot, in order; the first slot changes slowest.

    >>> combine_words([["", "mild"], ["edema"], ["", "on the left"]])
    ['edema', 'edema on the left', 'mild edema', 'mild edema on the left']
    """
    # `filter` drops empty words, so that they leave no space.
    return [" ".join(filter(None, words)) for words in itertools.product(*slots)]


def build_gloria() -> Prompts:
    """Returns all combinations of severity, subtype and location of six classes."""
    return {
        name: (combine_words(slots), [template.format(name) for template in _NEGATIVE_TEMPLATES])
        for name, slots in TAXONOMY.items()
    }


def build_chexzero() -> Prompts:
    """Returns each of the 14 labels of CheXpert, and its negation."""
    prompts = {name: ([name], [f"no {name}"]) for name in CHEXPERT}
    return prompts | {"no finding": (["no finding"], ["abnormal finding"])}


def build_biovil() -> Prompts:
    """Returns four sentences that state pneumonia, and four that deny it."""
    return _copy_prompts(_BIOVIL)


def build_covid() -> Prompts:
    """Returns three prompts for each of normal, pneumonia and COVID-19, and three against it."""
    return _copy_prompts(_COVID)


def _copy_prompts(prompts: Prompts) -> Prompts:
    """Returns a copy, so that a caller who edits its prompts does not edit the constants."""
    return {
        name: (list(positive), list(negative)) for name, (positive, negative) in prompts.items()
    }


PROMPT_SETS: dict[str, Callable[[], Prompts]] = {
    "gloria": build_gloria,
    "chexzero": build_chexzero,
    "biovil": build_biovil,
    "covid": build_covid,
}


# Prompts of a user's own findings ---------------------------------------------------------------

# Names of images without a finding, without blanks and in lower case.
_NORMAL_NAMES = frozenset(
    (
        *("normal", "healthy", "negative", "unremarkable", "clear", "notabnormal"),
        *("nofinding", "nofindings", "withoutfinding", "withoutfindings", "nodisease"),
        *("noabnormality", "noabnormalities", "nopathology", "noacutefinding", "noacutefindings"),
        *("noacutedisease", "nosignificantfinding", "nosignificantfindings"),
        *("normalstudy", "normalchest", "normalchestxray", "normalcxr"),
    )
)
# `non-COVID` denies COVID; in `Non-small cell lung cancer` the word is part of an adjective.
_NEGATION = re.compile(
    r"(?:(?:no|without|absence of|absent)[ \-]+(?=\S)|(?:non|not)[ \-]+(?=\S+$))", re.IGNORECASE
)


def is_normal_name(name: str) -> bool:
    """Returns whether a label says that nothing is found, as `No Finding` and `normal` do.

    >>> is_normal_name("No_Finding"), is_normal_name("No pneumothorax")
    (True, False)
    """
    return re.sub(r"[^a-z]", "", name.casefold()) in _NORMAL_NAMES


def build_plain(findings: Sequence[str]) -> Prompts:
    """Returns one prompt for and one against each finding.

    A label that says that nothing is found is opposed to an abnormal finding, and one that is a
    negation to what it denies: "there is no No Finding" means nothing.

    >>> build_plain(["Edema", "No Finding"])["No Finding"]
    (['no finding'], ['abnormal finding'])
    >>> build_plain(["Pleural_Effusion"])["Pleural_Effusion"]
    (['there is Pleural Effusion'], ['there is no Pleural Effusion'])
    """
    return {name: _build_plain_pair(name) for name in findings}


def _build_plain_pair(name: str) -> tuple[list[str], list[str]]:
    words = " ".join(name.replace("_", " ").split())
    if is_normal_name(name):
        says_finding = "finding" in words.casefold()
        positive, negative = ("no", "abnormal") if says_finding else ("normal", "abnormal")
        subject = "finding" if says_finding else "chest radiograph"
        return [f"{positive} {subject}"], [f"{negative} {subject}"]
    denied_words = _NEGATION.sub("", words, count=1) if _NEGATION.match(words) else ""
    if denied_words:
        return [f"there is no {denied_words}"], [f"there is {denied_words}"]
    return [f"there is {words}"], [f"there is no {words}"]

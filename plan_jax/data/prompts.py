"""Prompt sets for zero-shot classification: what is said of an image that has a finding, or not.

Structures are published, wordings are ours: a number obtained with these words is not one obtained
with the original ones.

`gloria` (Huang et al., ICCV 2021): each class has severities, subtypes and locations; a prompt is
one of each, in this order. The word lists are ours, common radiological sense; so are the negative
prompts, of which the paper has none and scoring `max` reads none.
`chexzero` (Tiu et al., Nature BME 2022): "{}" against "no {}" for the 14 labels of CheXpert.
`biovil` (Boecking et al., arXiv 2204.09817): pneumonia in several phrasings of either side.
`covid`: normal, pneumonia, COVID-19; ours, no repository publishes its prompts for these.

Deviation: an empty severity or location leaves no space behind (GLoRIA's code leaves it).
Deviation: the opposite of "no finding" is "abnormal finding" (CheXzero's template makes "no no
finding" of it).
"""

import itertools
import random
from collections.abc import Callable, Sequence

from plan_jax.types import UserError

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
_DEGREE = ("", "mild", "moderate", "severe")
_SIDE = ("", "on the right", "on the left", "on both sides")
_ZONE = (
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
        _ZONE,
    ),
    "cardiomegaly": (
        _DEGREE,
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
        _ZONE,
    ),
    "edema": (
        _DEGREE,
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
        _SIDE,
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
        _ZONE,
    ),
}
_NEGATIVE = ("no {}", "no sign of {}", "free of {}")
BIOVIL: Prompts = {
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
COVID: Prompts = {
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


def combine(slots: Sequence[Sequence[str]]) -> list[str]:
    """Say one word of each slot, in order, in every combination; the first slot changes slowest.

    >>> combine([["", "mild"], ["edema"], ["", "on the left"]])
    ['edema', 'edema on the left', 'mild edema', 'mild edema on the left']
    """
    return [" ".join(filter(None, words)) for words in itertools.product(*slots)]


def gloria() -> Prompts:
    """Say every combination of severity, subtype and location of six classes."""
    return {
        name: (combine(slots), [form.format(name) for form in _NEGATIVE])
        for name, slots in TAXONOMY.items()
    }


def chexzero() -> Prompts:
    """Say each of the 14 labels of CheXpert, and that there is none."""
    pairs = {name: ([name], [f"no {name}"]) for name in CHEXPERT}
    return pairs | {"no finding": (["no finding"], ["abnormal finding"])}


def biovil() -> Prompts:
    """Say in four ways that there is pneumonia, and in four that there is none."""
    return {name: (list(yes), list(no)) for name, (yes, no) in BIOVIL.items()}


def covid() -> Prompts:
    """Say in three ways each of normal, pneumonia and COVID-19, and that it is not so."""
    return {name: (list(yes), list(no)) for name, (yes, no) in COVID.items()}


SETS: dict[str, Callable[[], Prompts]] = {
    "gloria": gloria,
    "chexzero": chexzero,
    "biovil": biovil,
    "covid": covid,
}


def ensemble(name: str, n: int | None = None, seed: int = 0) -> Prompts:
    """Give a set by name: for each class its positive and its negative prompts.

    With `n`, so many positive prompts of each class are drawn by the seed, without repetition
    (GLoRIA draws 5); what is drawn for a class does not depend on the others. Negative
    prompts stay.

    Raises:
        UserError: if there is no such set, or a class of it has fewer than `n` prompts.
    """
    if name not in SETS:
        raise UserError(f"prompt set {name!r} is unknown; use {', '.join(SETS)}")
    made = SETS[name]()
    if n is None:
        return made
    fewest = min(made, key=lambda key: len(made[key][0]))
    if not 1 <= n <= len(made[fewest][0]):
        raise UserError(
            f"n is {n} and {name} has {len(made[fewest][0])} prompts for {fewest}; use 1 to that "
            "many, or None for all"
        )
    return {
        key: (random.Random(f"{seed} {name} {key}").sample(yes, n), no)
        for key, (yes, no) in made.items()
    }

"""Locations in a report: from sides, zones and nouns to the regions of the phantom."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# What follows a word like `lower` if it is not a zone of the lung: "lower thoracic spine".
_NOT_LUNG = (
    r"(?! (?:limits?|abdom\w+|lumbar|thoracic|cervical|extremit\w+|normal|quadrants?|ribs?|svc"
    r"|spine|mediastin\w+|esophag\w+|neck|dorsal|chest wall|vertebra\w*|t spine|clavic\w+))"
)
SIDES: dict[str, tuple[str, ...]] = {
    "left": ("left",),
    "right": ("right",),
    "both": ("left", "right"),
    "bilateral": ("left", "right"),
    "bilaterally": ("left", "right"),
}
ZONES = {
    "upper": rf"upper{_NOT_LUNG}|apex|apical|apices|suprahilar|biapical",
    "mid": rf"mid{_NOT_LUNG}|middle{_NOT_LUNG}|midlungs?|lingula|lingular",
    "lower": rf"lower{_NOT_LUNG}|bases?|basal|basilar|bibasilar|bibasal|retrocardiac|infrahilar"
    r"|hemi ?diaphragms?",
}
# The side of words that imply one, unless the report names a side.
IMPLIED_SIDES = {"lingula": "left", "lingular": "left", "retrocardiac": "left", "middle": "right"}

# Nouns that are a location without a side; the others only extend a location.
_STANDALONE_NOUNS = (
    r"lungs|hilum|hila|hilar|perihilar|parahilar|mediastin(?:um|al)|pleural spaces?"
    r"|(?:costo ?phrenic|cp) (?:angles?|sulc[ui]s?)"
)
_NOUNS = (
    rf"{_STANDALONE_NOUNS}|lungs?|lobes?|zones?|fields?|hemi ?thorac?(?:x|es)|costo ?phrenic|cp"
    r"|angles?|sulc[ui]s?|paratracheal|cardiophrenic"
)
_CONNECTIVES = (
    r"the|of|and|or|to|sided|aspects?|portions?|regions?|areas?|segments?|medial|lateral|anterior"
    r"|posterior|/|&|inner|outer|more|chest|pulmonary|peripheral|central"
)


class Place(NamedTuple):
    """A phrase that names a location.

    `is_lung` tells a part of the lung from a mere side.
    """

    start: int
    end: int
    regions: tuple[str, ...]
    is_lung: bool


def compile_patterns(patterns: str | Iterable[str]) -> re.Pattern[str]:
    """Returns patterns of the tables as one: whole words, a space or a hyphen between them."""
    union = patterns if isinstance(patterns, str) else "|".join(patterns)
    # A space becomes "spaces or hyphens", except inside a character class like [a-z ].
    spaced = re.sub(r"(?<!\[a-z) (\??)", r"[ -]+\1", union).replace("[ -]+?", "[ -]?")
    # \b would not do: a pattern may begin or end with `?`, `/` or `.`.
    return re.compile(rf"(?:(?<!\w)|(?=\W))(?:{spaced})(?:(?!\w)|(?<=\W))")


_ZONE_PATTERNS = {zone: compile_patterns(pattern) for zone, pattern in ZONES.items()}
_SIDE_OR_ZONE = rf"{'|'.join(SIDES)}|{'|'.join(ZONES.values())}"
_PLACE_PATTERN = compile_patterns(
    rf"(?:{_SIDE_OR_ZONE}|{_STANDALONE_NOUNS})(?: (?:{_SIDE_OR_ZONE}|{_NOUNS}|{_CONNECTIVES}))*"
)
# "Bilateral effusions, left greater than right" names both lungs.
_UNEQUAL_PATTERN = compile_patterns(
    r"(?:left|right)(?: side)? (?:greater|larger|more|worse|slightly greater|bigger|smaller|less) "
    r"than(?: the)?(?: on the)? (?:left|right)"
    r"|(?:worse|greater|larger|worst|greatest) (?:on|in|at) the (?:left|right)(?: side| lung)?"
)
_WORD_PATTERN = compile_patterns(rf"{_SIDE_OR_ZONE}|{_NOUNS}|and|or")
_NOUN_PATTERN = compile_patterns(_NOUNS)


def find_places(text: str) -> list[Place]:
    """Returns the phrases of a lower-case sentence that name a location, in order.

    >>> [place.regions for place in find_places("in the left mid and lower zones, both lungs")]
    [('left mid zone', 'left lower zone'), ('both lungs',)]
    """
    places = [
        Place(match.start(), match.end(), ("both lungs",), False)
        for match in _UNEQUAL_PATTERN.finditer(text)
    ]
    for match in _PLACE_PATTERN.finditer(text):
        if any(match.start() < place.end and place.start < match.end() for place in places):
            continue
        words = list(_WORD_PATTERN.finditer(text, match.start(), match.end()))
        # "left lung and" reaches into the next phrase.
        while words[-1][0] in ("and", "or"):
            words.pop()
        groups = _split_by_side([word[0] for word in words])
        regions = tuple(dict.fromkeys(region for group in groups for region in _to_regions(group)))
        is_lung = any(_NOUN_PATTERN.fullmatch(word[0]) or _to_zone(word[0]) for word in words)
        places.append(Place(match.start(), words[-1].end(), regions, is_lung))
    return sorted(places)


def _to_zone(word: str) -> str:
    """Returns the zone that a word names, "" if it names none."""
    zones = (zone for zone, pattern in _ZONE_PATTERNS.items() if pattern.fullmatch(word))
    return next(zones, "")


def _split_by_side(words: list[str]) -> list[list[str]]:
    """Returns the words in groups of one side: `left upper`, `right lower lobe`."""
    groups: list[list[str]] = [[]]
    after_conjunction = False
    for word in words:
        if word in ("and", "or"):
            after_conjunction = True
            continue
        group = groups[-1]
        has_side = any(member in SIDES for member in group)
        has_part = any(member not in SIDES for member in group)
        # "left and right lower lobes" is one group: nothing has been named of the left yet.
        if word in SIDES and has_part and (after_conjunction or has_side):
            groups.append([])
        groups[-1].append(word)
        after_conjunction = False
    return groups


def _to_regions(group: list[str]) -> list[str]:
    """Returns the regions that the words of one side name."""
    zones = list(dict.fromkeys(zone for zone in map(_to_zone, group) if zone))
    sides = [side for word in group for side in SIDES.get(word, ())]
    if not sides:
        sides = [IMPLIED_SIDES[word] for word in group if word in IMPLIED_SIDES]
    sides = list(dict.fromkeys(sides)) or ["left", "right"]
    if group and all(word.startswith("mediastin") for word in group):
        return ["chest"]
    if zones:
        return [f"{side} {zone} zone" for side in sides for zone in zones]
    return ["both lungs"] if len(sides) == 2 else [f"{sides[0]} lung"]


def widen_regions(regions: Iterable[str], part: str) -> tuple[str, ...]:
    """Returns the whole `lung` or `chest` on the sides of the regions.

    >>> widen_regions(["left lower zone"], "lung"), widen_regions(["both lungs"], "chest")
    (('left lung',), ('chest',))
    """
    sides = {word for region in regions for word in region.split() if word in ("left", "right")}
    if len(sides) == 1 and "both lungs" not in regions:
        return (f"{sides.pop()} {part}",)
    return ("both lungs",) if part == "lung" else ("chest",)


def expand_regions(regions: Iterable[str]) -> tuple[str, ...]:
    """Returns the regions with boxes: both lungs become two, a side of the chest its lung.

    >>> expand_regions(["both lungs", "left chest", "chest", "heart"])
    ('left lung', 'right lung', 'heart')
    """
    boxes: dict[str, tuple[str, ...]] = {"both lungs": ("left lung", "right lung"), "chest": ()}
    boxes |= {f"{side} chest": (f"{side} lung",) for side in ("left", "right")}
    return tuple(dict.fromkeys(box for region in regions for box in boxes.get(region, (region,))))

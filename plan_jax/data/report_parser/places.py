"""Where in the chest a phrase of a report is: sides, zones and nouns to the phantom's regions."""

import re
from collections.abc import Iterable
from typing import NamedTuple

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
OWN_SIDE = {"lingula": "left", "lingular": "left", "retrocardiac": "left", "middle": "right"}
# A noun without a side is a place if it is one of `_ALONE`; the others only lengthen a place.
_ALONE = (
    r"lungs|hilum|hila|hilar|perihilar|parahilar|mediastin(?:um|al)|pleural spaces?"
    r"|(?:costo ?phrenic|cp) (?:angles?|sulc[ui]s?)"
)
_NOUNS = (
    rf"{_ALONE}|lungs?|lobes?|zones?|fields?|hemi ?thorac?(?:x|es)|costo ?phrenic|cp"
    r"|angles?|sulc[ui]s?|paratracheal|cardiophrenic"
)
_FILLING = (
    r"the|of|and|or|to|sided|aspects?|portions?|regions?|areas?|segments?|medial|lateral|anterior"
    r"|posterior|/|&|inner|outer|more|chest|pulmonary|peripheral|central"
)


class Place(NamedTuple):
    """A phrase that says where; `lung` if it names a part of the lung and not only a side."""

    start: int
    end: int
    regions: tuple[str, ...]
    lung: bool


def compiled(patterns: str | Iterable[str]) -> re.Pattern[str]:
    """Compile patterns of the tables into one: whole words, a space or a hyphen between them."""
    joined = patterns if isinstance(patterns, str) else "|".join(patterns)
    spaced = re.sub(r"(?<!\[a-z) (\??)", r"[ -]+\1", joined).replace("[ -]+?", "[ -]?")
    return re.compile(rf"(?:(?<!\w)|(?=\W))(?:{spaced})(?:(?!\w)|(?<=\W))")


_ZONE = {zone: compiled(pattern) for zone, pattern in ZONES.items()}
_ATOM = rf"{'|'.join(SIDES)}|{'|'.join(ZONES.values())}"
_PHRASE = compiled(rf"(?:{_ATOM}|{_ALONE})(?: (?:{_ATOM}|{_NOUNS}|{_FILLING}))*")
_UNEQUAL = compiled(
    r"(?:left|right)(?: side)? (?:greater|larger|more|worse|slightly greater|bigger|smaller|less) "
    r"than(?: the)?(?: on the)? (?:left|right)"
    r"|(?:worse|greater|larger|worst|greatest) (?:on|in|at) the (?:left|right)(?: side| lung)?"
)
_WORD = compiled(rf"{_ATOM}|{_NOUNS}|and|or")
_LUNG = compiled(_NOUNS)


def places(text: str) -> list[Place]:
    """Find the phrases of a lower-case sentence that say where, with their regions, in order.

    >>> [place.regions for place in places("in the left mid and lower zones, both lungs")]
    [('left mid zone', 'left lower zone'), ('both lungs',)]
    """
    found = [Place(m.start(), m.end(), ("both lungs",), False) for m in _UNEQUAL.finditer(text)]
    for match in _PHRASE.finditer(text):
        if any(match.start() < p.end and p.start < match.end() for p in found):
            continue
        words = list(_WORD.finditer(text, match.start(), match.end()))
        while words[-1][0] in ("and", "or"):
            words.pop()
        regions = tuple(dict.fromkeys(r for group in _groups(words, text) for r in _regions(group)))
        said = any(_LUNG.fullmatch(w[0]) or _zone(w[0]) for w in words)
        found.append(Place(match.start(), words[-1].end(), regions, said))
    return sorted(found)


def _zone(word: str) -> str:
    return next((zone for zone, pattern in _ZONE.items() if pattern.fullmatch(word)), "")


def _groups(words: list[re.Match[str]], text: str) -> list[list[str]]:
    """Cut `left upper and right lower lobe` where a new side begins a new place."""
    groups: list[list[str]] = [[]]
    joined = False
    for word in words:
        here = groups[-1]
        if word[0] in ("and", "or"):
            joined = True
            continue
        begins = word[0] in SIDES and here and (joined or any(w in SIDES for w in here))
        if begins and any(w not in SIDES for w in here):
            groups.append([])
        groups[-1].append(word[0])
        joined = False
    return groups


def _regions(group: list[str]) -> list[str]:
    zones = list(dict.fromkeys(zone for zone in map(_zone, group) if zone))
    named = [side for word in group for side in SIDES.get(word, ())]
    named += [OWN_SIDE[word] for word in group if not named and word in OWN_SIDE]
    sides = list(dict.fromkeys(named)) or ["left", "right"]
    if group and all(word.startswith("mediastin") for word in group):
        return ["chest"]
    if zones:
        return [f"{side} {zone} zone" for side in sides for zone in zones]
    return ["both lungs"] if len(sides) == 2 else [f"{sides[0]} lung"]


def whole(regions: Iterable[str], part: str) -> tuple[str, ...]:
    """Widen regions to the whole `lung` or `chest` of their sides.

    >>> whole(["left lower zone"], "lung"), whole(["both lungs"], "chest")
    (('left lung',), ('chest',))
    """
    sides = {word for region in regions for word in region.split() if word in ("left", "right")}
    if len(sides) == 1 and "both lungs" not in regions:
        return (f"{sides.pop()} {part}",)
    return ("both lungs",) if part == "lung" else ("chest",)


def expanded(regions: Iterable[str]) -> tuple[str, ...]:
    """Expand regions into those that have boxes: both lungs into two, a side's chest to its lung.

    >>> expanded(["both lungs", "left chest", "chest", "heart"])
    ('left lung', 'right lung', 'heart')
    """
    boxes = {"both lungs": ("left lung", "right lung"), "chest": ()}
    boxes |= {f"{side} chest": (f"{side} lung",) for side in ("left", "right")}
    return tuple(dict.fromkeys(box for r in regions for box in boxes.get(r, (r,))))

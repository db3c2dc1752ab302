"""The sides that a text names, so that an image can be mirrored together with its report.

Left and right are exchanged, also in `left-sided`, `leftward` and `leftmost`. So are the mirrored
pairs dextro- and levo- of a spine or a heart, and the abbreviations Lt, Rt and of lobes (LUL, RLL).

A single L or R is a side only before a part of the chest or a finding (`L base`, `R effusion`), in
`L-sided`, and in a comparison (`L > R`). L1, L-spine and R/O (rule out) are not sides.
"""

import re

# After an L or R that is a side. Other words are left out because the letter may be an initial.
_SIDED_NOUNS = (
    "sided?|lung|lungs|upper|mid|middle|lower|lobe|lobar|base|bases|basal|basilar|bibasilar|apex"
    "|apical|hilum|hilar|perihilar|suprahilar|infrahilar|paratracheal|retrocardiac|pleural"
    "|effusions?|pneumothorax|ptx|atelectasis|consolidation|opacity|opacities|hemithorax"
    "|hemidiaphragm|costophrenic|cp|ribs?|clavicle|shoulder|breast|chest|arm|axilla|axillary|ij"
    "|subclavian|picc|main|mainstem|heart"
)
# After dextro- or levo-, which also begin dextrose and levofloxacin.
_SPINE_AND_HEART = "scolio|curv|conv|rotoscolio|rotat|cardia|posit|version"
_SIDE = re.compile(
    r"\b(?:left|right)(?=\b|ward|most)"
    rf"|\b(?:dextro|levo)(?=-?(?:{_SPINE_AND_HEART}))"
    # What is abbreviated is a side only in this case: RT is radiotherapy, and &lt; is no left.
    r"|(?-i:"
    r"(?<!&)\b[LlRr]t\b"
    r"|\b[LR](?=(?:UL|ML|LL)\b)"
    rf"|(?<![\w.])[LR](?=[ -](?i:{_SIDED_NOUNS})\b|\s?[<>=]+\s?[LR]\b)"
    r"|(?<=[<>=])[LR]\b|(?<=[<>=]\s)[LR]\b"
    r")",
    re.IGNORECASE,
)
_MIRRORED = {"left": "right", "dextro": "levo", "lt": "rt", "l": "r"}
_MIRRORED |= {mirrored: side for side, mirrored in _MIRRORED.items()}


def swap_sides(text: str) -> str:
    """Returns a text in which left and right are exchanged, as after a horizontal flip.

    >>> swap_sides("Left-sided effusion, larger than on the RIGHT. LLL collapse, L > R.")
    'Right-sided effusion, larger than on the LEFT. RLL collapse, R > L.'

    Words that name no side stay, such as `bilateral` and `upright`. So does what is on one side of
    most people, such as the lingula and the middle lobe: a mirrored chest has them on the other.
    """
    return _SIDE.sub(lambda match: _mirror(match[0]), text)


def names_side(text: str) -> bool:
    """Returns whether a text names a side, so that `swap_sides` changes it.

    >>> names_side("Small left effusion."), names_side("Bilateral effusions, upright film.")
    (True, False)
    """
    return _SIDE.search(text) is not None


def _mirror(side: str) -> str:
    mirrored = _MIRRORED[side.lower()]
    if side.isupper():
        return mirrored.upper()
    return mirrored.capitalize() if side[0].isupper() else mirrored

"""The sides that a text names, so that an image can be mirrored together with its report.

Left and right are exchanged, also in `left-sided`, `leftward` and `leftmost`. So are the mirrored
pairs dextro- and levo- of a spine or a heart, the abbreviations Lt, Rt, of lobes (LUL, RLL), limbs
and quadrants (RUQ) and of jugular veins (RIJ), and `izquierdo` and `derecho` of Spanish.

A single L or R is a side only before a part of the chest or a finding (`L base`, `R effusion`), in
`L-sided`, `on the L` and `(L)`, and in a comparison (`L > R`). L1, L-spine and R/O (rule out) are
not sides, and neither are `right now`, `all right`, and what a patient or a surgeon left.
"""

import re

# After an L or R that is a side. Other words are left out because the letter may be an initial.
_SIDED_NOUNS = (
    "sided?|lung|lungs|upper|mid|middle|lower|lobe|lobar|base|bases|basal|basilar|bibasilar|apex"
    "|apical|hilum|hilar|perihilar|suprahilar|infrahilar|paratracheal|retrocardiac|pleural|pl"
    "|effusions?|pneumothorax|ptx|atelectasis|consolidation|opacity|opacities|hemithorax"
    "|hemidiaphragm|costophrenic|cp|ribs?|clavicle|shoulder|breast|chest|arm|axilla|axillary|ij"
    "|subclavian|picc|main|mainstem|heart"
)
# After dextro- or levo-, which also begin dextrose and levofloxacin.
_SPINE_AND_HEART = "e?scolio|curv|conv|rotoscolio|r?rotat|r?rotac|cardia|posit|version"
_COMPARED = r"\s+(?:greater|larger|bigger|more|worse|less|smaller)\s+than\s+"
# Where left is a verb and right is no side; in `on the right now larger` it is one.
_NO_SIDE = (
    r"\ball\s+right(?=\s*(?:[.,;:!?)]|$))"
    r"|(?<!the\s)(?<!on\s)\bright\s+now(?=\s*(?:[.,;:!?)]|$))"
    r"|\bleft\s+(?:against\s+medical|AMA\b|without\s+being\s+seen|the\s+(?:hospital|emergency"
    r"|department|clinic|ward|room|unit|floor|building|facility|icu|ed|er)\b)"
    r"|\b(?:was|were|be|been|being)\s+left\s+(?:in\s+place|in\s+situ|open|untreated|alone|behind)\b"
)
_SIDE = re.compile(
    rf"(?P<no_side>{_NO_SIDE})|"
    # An underscore is the space of names such as left_lung.
    r"(?<![^\W_])(?:left|right)(?:(?![^\W_])|(?=ward|most|sided\b))"
    rf"|\b(?:dextro|levo)(?=-?(?:{_SPINE_AND_HEART}))"
    r"|\b(?:izquierd|derech)(?=(?:[oa]s?)?\b)"
    # What is abbreviated is a side only in this case: RT is radiotherapy, and &lt; is no left.
    r"|(?-i:"
    r"(?<!&)\b[LlRr]t\b"
    r"|\b[LR](?=(?:UL|ML|LL|UQ|LQ|UE|LE|IJ)\b)"
    r"|(?<![\w.])[LR](?=(?:-|\s+)(?:\d{1,2}(?:st|nd|rd|th)\s+)?"
    rf"(?i:{_SIDED_NOUNS})\b|\s?[<>=]+\s?[LR]\b|(?i:{_COMPARED})[LR]\b)"
    r"|(?<=[<>=])[LR]\b|(?<=[<>=]\s)[LR]\b"
    r"|(?<=\bthan\s)[LR](?![\w/-])|(?<=\bon\s)[LR](?![\w/.-]\w)(?!\w)"
    r"|(?<=\bon\sthe\s)[LR](?![\w/.-]\w)(?!\w)|(?<=\()[LR](?=\))"
    r")",
    re.IGNORECASE,
)
_MIRRORED = {"left": "right", "dextro": "levo", "izquierd": "derech", "lt": "rt", "l": "r"}
_MIRRORED |= {mirrored: side for side, mirrored in _MIRRORED.items()}


def swap_sides(text: str) -> str:
    """Returns a text in which left and right are exchanged, as after a horizontal flip.

    >>> swap_sides("Left-sided effusion, larger than on the RIGHT. LLL collapse, L > R.")
    'Right-sided effusion, larger than on the LEFT. RLL collapse, R > L.'

    Words that name no side stay, such as `bilateral` and `upright`. So does what is on one side of
    most people, such as the lingula and the middle lobe: a mirrored chest has them on the other.
    """
    return _SIDE.sub(_mirror, text)


def names_side(text: str) -> bool:
    """Returns whether a text names a side, so that `swap_sides` changes it.

    >>> names_side("Small left effusion."), names_side("Bilateral effusions, upright film.")
    (True, False)
    """
    return any(match["no_side"] is None for match in _SIDE.finditer(text))


def _mirror(match: re.Match[str]) -> str:
    side = match[0]
    if match["no_side"] is not None:
        return side
    # A letter that only folds to one of ours, as a dotless i, makes no side.
    mirrored = _MIRRORED.get(side.lower())
    if mirrored is None:
        return side
    if side.isupper():
        return mirrored.upper()
    return mirrored.capitalize() if side[0].isupper() else mirrored

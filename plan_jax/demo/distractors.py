"""Phrases that contradict a phrase: a model that reads prefers the phrase in a film that has it."""

import re
from typing import NamedTuple

from plan_jax.data import report_parser
from plan_jax.data.report_parser import rewriting
from plan_jax.data.sections import sides

# What the page calls the kinds of `rewriting.find_variants`.
NAMES = {
    "negation": "the opposite",
    "laterality": "the other side",
    "region": "another zone",
    "severity": "another size",
}
_DENIAL = re.compile(r"^\s*(?:there (?:is|are) )?no\s+", re.IGNORECASE)


class Distractor(NamedTuple):
    """A phrase that is false where another one is true, and how it differs."""

    name: str
    text: str


def write_distractors(text: str) -> tuple[Distractor, ...]:
    """Returns a phrase negated, on the other side, in another zone and of another size.

    A kind that the phrase does not have is left out. Where the parser of reports knows no finding
    in the phrase, `no` before it is its opposite. The other side of what is denied, or is on both
    sides, may be true, and is left out too.

    >>> [d.text for d in write_distractors("small effusion on the left")]
    ['no small effusion on the left', 'small effusion on the right', 'large effusion on the left']
    """
    distractors = []
    # Where the parser knows a finding, it decides.
    known = report_parser.extract_triplets(text)
    for kind, name in NAMES.items():
        variants = [variant.text for variant in rewriting.find_variants(text, kind)]
        if not variants and kind == "negation" and not known:
            variants = [_negate(text)]
        is_denied = _DENIAL.match(text) is not None
        if not (variants or known or is_denied) and kind == "laterality" and find_side(text):
            variants = [sides.swap_sides(text)]
        distractors += [Distractor(name, variant) for variant in variants[:1] if variant != text]
    return tuple(distractors)


def find_side(text: str) -> str:
    """Returns the only side that a phrase names, `left` or `right`, or "".

    >>> [find_side(text) for text in ("effusion on the left", "left and right", "effusion")]
    ['left', '', '']
    """
    words = set(re.findall(r"\b(left|right)(?:-sided)?\b", text.lower()))
    return words.pop() if len(words) == 1 else ""


def _negate(text: str) -> str:
    stated = _DENIAL.sub("", text)
    return stated if stated != text else f"no {text}"

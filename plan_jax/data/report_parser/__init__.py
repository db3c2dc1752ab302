"""Turns raw English chest-radiograph reports into triplets: region, finding, existence.

ASG (arXiv 2403.09294) aligns regions with the triplets of a report. Its parser was never released,
so this one is written for this project: tables (`terms.py`, `cues.py`, `places.py`) and rules
(`sentences.py`) after NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009).

Alternatives that were tried: negspaCy has no third value for doubt. medspaCy's ConText, the nearest
fit, pins spaCy below 3.8 on Python 3.11 and thereby numpy below 2, which this package excludes.
With the same findings, both were less precise with their own cues. Neither locates a finding, nor
reads `the lungs are clear` as a denial.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8

from plan_jax.data.report_parser import terms as terms
from plan_jax.data.report_parser.sentences import find_regions, parse_sentence
from plan_jax.data.report_parser.terms import ASG_TAGS
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

__all__ = [
    "ASG_TAGS",
    "FINDINGS",
    "HEADER",
    "Statement",
    "covered_findings",
    "extract_triplets",
    "find_regions",
    "is_known_finding",
    "label_findings",
    "parse_report",
]

FINDINGS = tuple(terms.TERMS)  # canonical names, those of the phantom among them
# In capitals any words are a header; in mixed case only the usual ones, or "Note:" would be one.
HEADER = re.compile(
    r"(?:(?<=\s)|^)([A-Z][A-Z /&()-]{2,40}|(?:Findings|Impression|Indication|History|Comparison"
    r"|Technique|Conclusion|Clinical history|Examination|Exam))\s?:"
)


class Statement(NamedTuple):
    """A claim of a report: existence is 1 (stated), 0 (denied) or -1 (uncertain).

    `sentence_index` counts the sentences of `split_sentences`.
    """

    sentence_index: int
    sentence: str
    region: str
    finding: str
    existence: int


def parse_report(text: str) -> tuple[Statement, ...]:
    """Returns the claims of a report.

    In a text with headers (`FINDINGS:`), sections that are not about the image, such as the
    indication, are skipped.

    >>> report = "Heart size is normal. Small left effusion without pneumothorax."
    >>> for index, _, region, finding, existence in parse_report(report):
    ...     print(index, region, finding, existence)
    0 heart cardiomegaly 0
    1 left lung pleural effusion 1
    1 both lungs pneumothorax 0
    """
    statements: list[Statement] = []
    is_about_image, prefix = True, ""
    sentences = split_sentences(text)
    for index, sentence in enumerate(sentences):
        # "opacity ? pneumonia" is split after the mark, which belongs to what follows.
        following = "".join(sentences[index + 1 : index + 2])
        is_cut = sentence.endswith(" ?") and following[:1].islower()
        for section, piece in _split_at_headers(sentence):
            # A section goes on until the next header, over many sentences.
            if section is not None:
                is_about_image = section not in terms.IGNORED_SECTIONS
            if is_about_image:
                piece = prefix + (piece.removesuffix("?") if is_cut else piece)
                claims = parse_sentence(piece)
                statements += [Statement(index, sentence, *claim) for claim in claims]
        prefix = "? " if is_cut else ""
    return tuple(statements)


def _split_at_headers(text: str) -> list[tuple[str | None, str]]:
    """Returns (section, text) pairs; what precedes the first header has the section None."""
    headers = list(HEADER.finditer(text))
    bounds = [*(header.start() for header in headers), len(text)]
    pieces: list[tuple[str | None, str]] = [(None, text[: bounds[0]])]
    for header, end in zip(headers, bounds[1:], strict=True):
        pieces.append((_section_name(header[1]), text[header.end() : end].strip()))
    return [piece for piece in pieces if piece[1] or piece[0]] or [(None, "")]


def _section_name(header: str) -> str:
    """Returns the lower-case name of a section, one for all synonyms."""
    words = header.lower().split()
    # "FINAL REPORT INDICATION", where a line break was lost, is an indication.
    for i in range(len(words)):
        name = " ".join(words[i:])
        name = terms.SECTION_SYNONYMS.get(name, name)
        if name in terms.PARSED_SECTIONS or name in terms.IGNORED_SECTIONS:
            return name
    return " ".join(words)


def extract_triplets(text: str) -> tuple[tuple[str, str, int], ...]:
    """Returns the claims of a report as (region, finding, existence), each once, in order.

    >>> extract_triplets("No effusion or pneumothorax. Possible nodule in the right upper lobe.")
    (('both lungs', 'pleural effusion', 0), ('both lungs', 'pneumothorax', 0),
     ('right upper zone', 'nodule', -1))
    """
    return tuple(dict.fromkeys(statement[2:] for statement in parse_report(text)))


def label_findings(text: str, findings: Sequence[str]) -> Int8[np.ndarray, " F"]:
    """Returns the labels Int8[F] of a report: 1 stated, -1 uncertain, 0 denied or not mentioned.

    The strongest claim of a finding counts: 1, then -1, then 0.

    >>> names = ("atelectasis", "edema", "mass")
    >>> label_findings("Linear atelectasis. Possible edema. No mass.", names)
    array([ 1, -1,  0], dtype=int8)

    Args:
      text: a raw report.
      findings: names of `FINDINGS`, of `ASG_TAGS`, or one of a few others such as `lung opacity`,
        in any case. A name may cover several findings: `atelectasis` covers `linear atelectasis`.

    Raises:
      UserError: a finding has no known name.
    """
    values: dict[str, set[int]] = {}
    for _, finding, existence in extract_triplets(text):
        values.setdefault(finding, set()).add(existence)
    labels = np.zeros(len(findings), np.int8)
    for i, name in enumerate(findings):
        claims = set().union(*(values.get(finding, ()) for finding in covered_findings(name)))
        labels[i] = 1 if 1 in claims else -1 if -1 in claims else 0
    return labels


def is_known_finding(name: str) -> bool:
    """Returns whether `label_findings` knows a finding.

    >>> is_known_finding("Pleural effusion"), is_known_finding("COVID-19")
    (True, False)
    """
    name = " ".join(name.lower().split())
    return name in terms.COVERED_FINDINGS or name in terms.TERMS


def covered_findings(name: str) -> tuple[str, ...]:
    """Returns the members of `FINDINGS` that a name covers, see `label_findings`.

    >>> covered_findings("Lung Lesion")
    ('lesion', 'nodule', 'mass')

    Raises:
      UserError: the name is unknown.
    """
    normalised = " ".join(name.lower().split())
    if normalised in terms.COVERED_FINDINGS:
        return terms.COVERED_FINDINGS[normalised]
    if normalised in terms.TERMS:
        return (normalised,)
    names = ", ".join([*terms.TERMS, *terms.COVERED_FINDINGS])
    raise UserError(f"finding {name!r} is unknown; use one of {names}")

"""Raw English chest-radiograph reports to sentences and triplets: region, finding, existence.

ASG (arXiv 2403.09294) aligns regions with the triplets of a report; its parser was never released,
so this one is our own: tables (`report_terms.py`, `report_cues.py`, `report_places.py`) and rules
(`report_sentences.py`) after NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009).

Tried and not used: negspaCy has no third value for doubt, and medspaCy's ConText, the nearest fit,
pins spaCy below 3.8 on Python 3.11 and by it numpy below 2, which this package excludes. Given the
same findings, both were less precise with the cues that they ship with; neither says where a
finding is, nor reads `the lungs are clear` as a denial.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8

from plan_jax.data.report_parser import terms as terms
from plan_jax.data.report_parser.sentences import read, regions
from plan_jax.data.report_parser.terms import ASG_TAGS
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

__all__ = ["ASG_TAGS", "FINDINGS", "Statement", "parse", "regions", "sections", "tags", "triplets"]

FINDINGS = tuple(terms.TERMS)  # canonical names, those of the phantom among them
_HEADER = re.compile(
    r"(?:(?<=\s)|^)([A-Z][A-Z /&()-]{2,40}|(?:Findings|Impression|Indication|History|Comparison"
    r"|Technique|Conclusion|Clinical history|Examination|Exam))\s?:"
)


class Statement(NamedTuple):
    """One claim of a report: existence is 1 (stated), 0 (denied) or -1 (uncertain).

    `index` counts the sentences that `split_sentences` makes of the text.
    """

    index: int
    sentence: str
    region: str
    finding: str
    existence: int


def parse(text: str) -> tuple[Statement, ...]:
    """Parse a report into what its sentences claim.

    In a text with headers (`FINDINGS:`) the sections that are not about the image, such as the
    indication, are passed over.

    >>> for statement in parse("Heart size is normal. Small left effusion without pneumothorax."):
    ...     print(statement.index, statement.region, statement.finding, statement.existence)
    0 heart cardiomegaly 0
    1 left lung pleural effusion 1
    1 both lungs pneumothorax 0
    """
    out, about, doubt = [], True, ""
    sentences = split_sentences(text)
    for index, sentence in enumerate(sentences):
        asks = sentence.endswith(" ?") and "".join(sentences[index + 1 : index + 2])[:1].islower()
        for name, piece in _pieces(sentence):
            about = about if name is None else name not in terms.UNREAD
            if about:
                piece = doubt + (piece.removesuffix("?") if asks else piece)
                out += [Statement(index, sentence, *claim) for claim in read(piece)]
        doubt = "? " if asks else ""  # "opacity ? pneumonia" was cut behind the mark
    return tuple(out)


def _pieces(sentence: str) -> list[tuple[str | None, str]]:
    """Cut at headers; what stands before the first belongs to the section before (None)."""
    heads = list(_HEADER.finditer(sentence))
    bounds = [*(h.start() for h in heads), len(sentence)]
    pieces = [(None, sentence[: bounds[0]])]
    pieces += [
        (_section(h[1]), sentence[h.end() : end].strip())
        for h, end in zip(heads, bounds[1:], strict=True)
    ]
    return [piece for piece in pieces if piece[1] or piece[0]] or [(None, "")]


def _section(header: str) -> str:
    words = header.lower().split()
    for i in range(len(words)):  # "FINAL REPORT INDICATION" where a line break was lost
        name = terms.SAME_SECTION.get(name := " ".join(words[i:]), name)
        if name in terms.READ or name in terms.UNREAD:
            return name
    return " ".join(words)


def sections(text: str) -> dict[str, str]:
    """Cut a raw report at its headers: lower-case name -> text, "" for what precedes the first.

    >>> sections("INDICATION: Cough. FINDINGS: Clear lungs. CONCLUSION: Normal.")
    {'indication': 'Cough.', 'findings': 'Clear lungs.', 'impression': 'Normal.'}
    """
    out: dict[str, str] = {}
    for name, piece in _pieces(text):
        piece = piece.strip()
        if piece:
            out[name or ""] = "\n\n".join(filter(None, (out.get(name or ""), piece)))
    return out


def triplets(text: str) -> tuple[tuple[str, str, int], ...]:
    """List what a report claims as (region, finding, existence), each once, in order.

    >>> triplets("No effusion or pneumothorax. Possible nodule in the right upper lobe.")
    (('both lungs', 'pleural effusion', 0), ('both lungs', 'pneumothorax', 0),
     ('right upper zone', 'nodule', -1))
    """
    return tuple(dict.fromkeys(statement[2:] for statement in parse(text)))


def tags(text: str, findings: Sequence[str]) -> Int8[np.ndarray, " F"]:
    """Label a report Int8[F]: 1 stated, -1 uncertain, 0 denied or not mentioned.

    Names are those of `FINDINGS`, of `ASG_TAGS`, or a few others such as `lung opacity`, in any
    case; a name may cover several (`atelectasis` covers `linear atelectasis`). The strongest claim
    wins: 1, then -1, then 0.

    >>> tags("Linear atelectasis. Possible edema. No mass.", ("atelectasis", "edema", "mass"))
    array([ 1, -1,  0], dtype=int8)

    Raises:
      UserError: if a finding has no known name.
    """
    said: dict[str, set[int]] = {}
    for _, finding, existence in triplets(text):
        said.setdefault(finding, set()).add(existence)
    out = np.zeros(len(findings), np.int8)
    for i, name in enumerate(findings):
        found = set().union(*(said.get(covered, ()) for covered in _covered(name)))
        out[i] = 1 if 1 in found else -1 if -1 in found else 0
    return out


def is_known(name: str) -> bool:
    """Say whether `tags` has a name for a finding.

    >>> is_known("Pleural effusion"), is_known("COVID-19")
    (True, False)
    """
    plain = " ".join(name.lower().split())
    return plain in terms.COVERS or plain in terms.TERMS


def _covered(name: str) -> tuple[str, ...]:
    plain = " ".join(name.lower().split())
    if plain in terms.COVERS:
        return terms.COVERS[plain]
    if plain in terms.TERMS:
        return (plain,)
    raise UserError(
        f"finding {name!r} is unknown; use one of {', '.join([*terms.TERMS, *terms.COVERS])}"
    )

"""Caption rules: the text of a training pair, made from the sections of a report.

Papers pre-train on the same reports with different parts of them. A rule is one paper's choice. It
takes the sections of a report by name and a generator, and returns a text; "" means that the report
has no caption under that rule. Without a generator nothing is drawn at random, and a rule that
draws one sentence returns all of them.

Sentences of a caption are divided by blank lines, which `tokenizer.split_sentences` respects and no
tokenizer reads.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from plan_jax.data.sections.mimic import REPORT
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

# Raise it when a rule changes: which records have a caption is stored beside them.
RULES_VERSION = 1

DEFAULT_RULE = "findings_impression"  # of reports that have no stored text

CaptionRule = Callable[[Mapping[str, str], np.random.Generator | None], str]

_SENTENCE_BREAK = "\n\n"
# MGCA's and GLoRIA's sentences end at any full stop, also at one within a number.
# Without the look-behind, a long run of digits would be searched again from each of its digits.
_FULL_STOP = re.compile(r"(?<![0-9])[0-9]+\.|\.")
_MIN_SENTENCE_TOKENS = 2
_MIN_REPORT_TOKENS = 3  # of MGCA
# CheXzero's headers: in each row, only the first that occurs counts.
_IMPRESSION_HEADER = "IMPRESSION:"
_END_HEADERS = (
    ("RECOMMENDATION(S):", "RECOMMENDATION:", "RECOMMENDATIONS:"),
    ("NOTIFICATION:", "NOTIFICATIONS:"),
)
_NO_IMPRESSION = "NO IMPRESSION"


def make_caption(
    rule: str, sections: Mapping[str, str], rng: np.random.Generator | None = None
) -> str:
    """Returns the caption of a report; "" if it has none under the rule.

    >>> sections = {"findings": "Lungs are clear. No effusion.", "impression": "Normal chest."}
    >>> make_caption("impression", sections)
    'Normal chest.'
    >>> make_caption("convirt", sections, np.random.default_rng(0))
    'Normal chest.'
    >>> make_caption("convirt", sections).split(chr(10))
    ['Lungs are clear.', '', 'No effusion.', '', 'Normal chest.']

    Args:
      rule: a name of `CAPTIONS`.
      sections: texts by the names of `sections.mimic`, with the whole report as `report`.
      rng: generator of rules that draw or shuffle sentences (None: all of them, in order).

    Raises:
      UserError: if there is no such rule.
    """
    if rule not in CAPTIONS:
        raise UserError(f"caption rule {rule!r} is unknown; use one of {', '.join(CAPTIONS)}")
    return CAPTIONS[rule](sections, rng)


def choose_text(
    rule: str, text: str, sections: Mapping[str, str], rng: np.random.Generator | None = None
) -> str:
    """Returns the text of a record: its caption or, without a rule, the text that is stored.

    Without either, it is findings and impression.

    >>> sections = {"findings": "Lungs are clear."}
    >>> choose_text("", "", sections), choose_text("", "Stored.", sections)
    ('Lungs are clear.', 'Stored.')

    Args:
      rule: a name of `CAPTIONS`, or "".
      text: the stored text.
      sections: as in `make_caption`.
      rng: as in `make_caption`.

    Raises:
      UserError: if there is no such rule.
    """
    if rule:
        return make_caption(rule, sections, rng)
    return text or make_caption(DEFAULT_RULE, sections)


def name_text_list(split: str, rule: str) -> str:
    """Returns the name of the file that lists the records of a split without a text.

    It is next to the records: JSON [number of records, numbers of those without a text].

    >>> name_text_list("train", "mgca")
    'texts-train-mgca-1.json'
    """
    return f"texts-{split}-{rule or 'stored'}-{RULES_VERSION}.json"


def list_usable(sections: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the rules under which a report has a caption, in the order of `CAPTIONS`.

    >>> list_usable({"findings": "Lungs are clear."})
    ('mgca', 'convirt', 'biovil', 'findings', 'findings_impression')
    """
    return tuple(rule for rule in CAPTIONS if make_caption(rule, sections))


# Rules ------------------------------------------------------------------------------------------


def _choose_mgca(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns impression and findings as lower-case words, if they have at least 3.

    Sentences end at every full stop, which breaks 1.5 cm in two. Those of one word are dropped.

    Source: HKU-MedAI/MGCA, mgca/datasets/pretrain_dataset.py.
    Deviation: MGCA joins the sentences by spaces, so their bounds are lost.
    """
    del rng
    text = f"{sections.get('impression', '')} {sections.get('findings', '')}"
    sentences = _clean_sentences(text)
    if sum(len(sentence.split()) for sentence in sentences) < _MIN_REPORT_TOKENS:
        return ""
    return _join(sentences)


def _choose_gloria(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns a random sentence of the impression, as lower-case words.

    Source: marshuang80/gloria, gloria/datasets/pretraining_dataset.py.
    Deviation: GLoRIA draws from one index too many and fails if that is drawn. It also ends a
    report that reaches exactly as many words as `captions_per_image`; here no report is cut.
    """
    return _draw(_clean_sentences(sections.get("impression", "")), rng)


def _choose_convirt(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns a random sentence of findings and impression.

    Source: Zhang et al., arXiv:2010.00747, samples one sentence of a report.
    Deviation: the choice of the sections and of the ends of sentences is ours, as the paper's code
    is not published.
    """
    return _draw(_split_main_sections(sections), rng)


def _choose_biovil(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns the sentences of findings and impression, shuffled.

    Source: Boecking et al., arXiv:2204.09817, shuffle the sentences of a section.
    Deviation: the form is ours, as the training code is not published; sentences of both sections
    are shuffled together.
    """
    sentences = _split_main_sections(sections)
    if rng is not None:
        sentences = [sentences[index] for index in rng.permutation(len(sentences))]
    return _join(sentences)


def _choose_chexzero(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns what follows the last `IMPRESSION:`, up to a recommendation or a notification.

    Source: rajpurkarlab/CheXzero, data_process.py.
    Deviation: CheXzero looks for the end in the whole report, so that a recommendation above the
    impression leaves nothing, and writes NO IMPRESSION where there is none; `chexzero_compat` does
    both. Here the end is after the impression, and a report without one has no caption. A dataset
    without raw reports uses its section.
    """
    del rng
    words = sections.get(REPORT, "").split()
    if _IMPRESSION_HEADER not in words:
        words = [_IMPRESSION_HEADER, *sections.get("impression", "").split()]
    words = words[_find_last(words, _IMPRESSION_HEADER) + 1 :]
    headers = {header for alternatives in _END_HEADERS for header in alternatives}
    end = next((index for index, word in enumerate(words) if word in headers), len(words))
    return " ".join(words[:end])


def _choose_chexzero_compat(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns CheXzero's text with its faults, which need the whole report.

    Source: rajpurkarlab/CheXzero, data_process.py.
    Deviation: a text that comes out empty is no caption, where CheXzero trains on a blank.
    """
    del rng
    words = sections.get(REPORT, "").split()
    if _IMPRESSION_HEADER not in words:
        return _NO_IMPRESSION if words else ""
    ends = []
    for alternatives in _END_HEADERS:
        header = next((header for header in alternatives if header in words), None)
        # A header that is the first word of the report does not count either.
        if header is not None and words.index(header) > 0:
            ends.append(words.index(header))
    start = _find_last(words, _IMPRESSION_HEADER) + 1
    return " ".join(words[start : min(ends, default=len(words))])


def _choose_findings(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns the findings."""
    del rng
    return sections.get("findings", "").strip()


def _choose_impression(sections: Mapping[str, str], rng: np.random.Generator | None) -> str:
    """Returns the impression."""
    del rng
    return sections.get("impression", "").strip()


def _choose_findings_impression(
    sections: Mapping[str, str], rng: np.random.Generator | None
) -> str:
    """Returns findings and impression, or the one that there is."""
    return _join(filter(None, (_choose_findings(sections, rng), _choose_impression(sections, rng))))


CAPTIONS: dict[str, CaptionRule] = {
    "mgca": _choose_mgca,
    "gloria": _choose_gloria,
    "convirt": _choose_convirt,
    "biovil": _choose_biovil,
    "chexzero": _choose_chexzero,
    "chexzero_compat": _choose_chexzero_compat,
    "findings": _choose_findings,
    "impression": _choose_impression,
    "findings_impression": _choose_findings_impression,
}


# Sentences --------------------------------------------------------------------------------------


def _clean_sentences(text: str) -> list[str]:
    """Returns the sentences of MGCA and GLoRIA: lower-case ASCII words, one space between two."""
    sentences = []
    for sentence in _FULL_STOP.split(text):
        tokens = re.findall(r"\w+", sentence.lower())
        if len(tokens) >= _MIN_SENTENCE_TOKENS:
            ascii_tokens = (token.encode("ascii", "ignore").decode() for token in tokens)
            sentences.append(" ".join(filter(None, ascii_tokens)))
    return [sentence for sentence in sentences if sentence]


def _split_main_sections(sections: Mapping[str, str]) -> list[str]:
    """Returns the sentences of the findings, then those of the impression."""
    return split_sentences(_choose_findings_impression(sections, None))


def _draw(sentences: Sequence[str], rng: np.random.Generator | None) -> str:
    """Returns a random sentence, all of them without a generator, or "" if there is none."""
    if rng is None or not sentences:
        return _join(sentences)
    return sentences[int(rng.integers(len(sentences)))]


def _join(sentences: Iterable[str]) -> str:
    return _SENTENCE_BREAK.join(sentences)


def _find_last(words: Sequence[str], word: str) -> int:
    return len(words) - 1 - words[::-1].index(word)

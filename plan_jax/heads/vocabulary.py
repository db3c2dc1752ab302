"""Reports as a language model needs them: cleaned, counted into a vocabulary, encoded as ids.

After R2Gen (Chen et al., arXiv 2010.16056), by its published code: lower case, punctuation and the
numbers of lists dropped, sentences joined by ` . `, rare words read as `<unk>`.

Deviation: R2Gen deletes `1. ` anywhere, so that `of T11. No` becomes `of t1no`, joins `and/or` to
`andor`, turns 1.5 cm into 15 cm and keeps sentences without words; here numbers are dropped only as
marks of a list, and the rest does not happen. R2Gen has a cleaner for each of its two datasets:
`cleaning="published_iu"` and `"published_mimic"` do as these. Only the latter replaces line breaks,
so that the former leaves the number of a list at the start of a line.
Deviation: R2Gen has one id, 0, for padding, the beginning and the end; here each has its own, so
that padding cannot be read as an end.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32

from plan_jax.types import UserError

Cleaning = Literal["fixed", "published_iu", "published_mimic"]
PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t]*\d{1,2}[.)]\s")
_FULL_STOP = re.compile(r"\.+(?=\s|$)")
_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+(?:-[^\W_]+)*")
_SHORT_NUMBER = re.compile(r"\d{1,2}")
_PUBLISHED_QUOTES = str.maketrans("", "", "\"'/\\")
# R2Gen's pattern has the range from `:` to `[`, which also covers < = > and @.
_PUBLISHED_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():<=>@\[\]{}]")
# What R2Gen replaces by half as much, and how often: longer runs are not reduced to one.
_PUBLISHED_RUNS = {
    "published_iu": ((".", 3),),
    "published_mimic": (("_", 7), (" ", 6), (".", 6)),
}


def clean_report(text: str, cleaning: Cleaning = "fixed") -> str:
    r"""Returns a report as lower-case words, each sentence ended by ` .`; empty without words.

    `fixed` is ours, the others are R2Gen's (see the top of this file). All keep hyphens.

    >>> clean_report("1. No effusion/pneumothorax.\n2. Fracture of T11.  Nodule (1.5 cm)... ___")
    'no effusion pneumothorax . fracture of t11 . nodule 1.5 cm .'
    >>> text = "1. No effusion/pneumothorax. 2. Fracture of T11. Nodule (1.5 cm)."
    >>> clean_report(text, "published_mimic")
    'no effusionpneumothorax . fracture of t1nodule 15 cm .'
    """
    if cleaning != "fixed":
        return _clean_as_published(text, cleaning) if text.strip() else ""
    text = _LIST_NUMBER.sub("\n. ", text.lower()).replace("'", "")
    sentences = []
    for sentence in _FULL_STOP.split(text):
        words = _WORD.findall(sentence)
        # The number of a list within a line is left over as a sentence of its own.
        is_list_number = len(words) == 1 and _SHORT_NUMBER.fullmatch(words[0])
        if words and not is_list_number:
            sentences.append(" ".join([*words, "."]))
    return " ".join(sentences)


def _clean_as_published(text: str, cleaning: Cleaning) -> str:
    """Cleans as R2Gen's code does for one of its datasets, its faults included."""
    if cleaning == "published_mimic":
        text = text.replace("\n", " ")
    for character, times in _PUBLISHED_RUNS[cleaning]:
        for _ in range(times):
            text = text.replace(2 * character, character)
    text = text.replace("1. ", "")
    # One number after the other, so that a mark that a replacement makes is replaced as well.
    for prefix in (". ", " "):
        for number in range(2, 6):
            text = text.replace(f"{prefix}{number}. ", ". ")
    sentences = [
        _PUBLISHED_PUNCTUATION.sub("", part.translate(_PUBLISHED_QUOTES).strip())
        for part in text.strip().lower().split(". ")
    ]
    return " . ".join(sentences) + " ."


def to_sentences(text: str) -> str:
    """Returns a cleaned report as sentences again, for a reader or a parser.

    >>> to_sentences("heart is normal . no effusion .")
    'Heart is normal. No effusion.'
    """
    sentences = [part.strip() for part in re.split(r"(?:^|\s)\.(?=\s|$)", text)]
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in sentences if part)


@dataclass(frozen=True)
class Vocabulary:
    """The words that a decoder can generate; their ids follow those of `SPECIAL`."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        """Returns the number of ids, special ones included."""
        return len(SPECIAL) + len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: n for n, word in enumerate(self.words, len(SPECIAL))}

    def encode(self, text: str, length: int) -> Int32[np.ndarray, " {length}"]:
        """Returns a cleaned report as ids, `END` after the last, padded to `length`.

        A report of more than `length` - 1 words is cut, and has no end.
        """
        ids = [self.ids.get(word, UNKNOWN) for word in text.split()] + [END]
        row = np.full(length, PAD, np.int32)
        row[: len(ids)] = ids[:length]
        return row

    def decode(self, ids: Int[np.ndarray, " L"]) -> str:
        """Returns ids as a cleaned report: the words before the first end or padding."""
        words = []
        for index in ids.tolist():
            if index in (PAD, END):
                break
            words.append((SPECIAL + self.words)[index])
        return " ".join(words)

    def mask_unknown(self, text: str, max_words: int) -> str:
        """Returns the first words of a cleaned report, `<unk>` in place of unknown ones.

        >>> Vocabulary(("heart", "normal")).mask_unknown("heart is normal .", 3)
        'heart <unk> normal'
        """
        words = text.split()[:max_words]
        return " ".join(word if word in self.ids else SPECIAL[UNKNOWN] for word in words)


def build_vocabulary(texts: Sequence[str], min_count: int) -> Vocabulary:
    """Builds the vocabulary of words that occur `min_count` times in cleaned reports, sorted.

    Raises:
      UserError: there are none.

    >>> build_vocabulary(["no effusion .", "no nodule ."], 2).words
    ('.', 'no')
    """
    counts = Counter(word for text in texts for word in text.split())
    words = sorted(word for word, count in counts.items() if count >= min_count)
    if not words:
        raise UserError(
            f"config.eval.report_generation.min_count {min_count} leaves no word of {len(texts)} "
            "reports; lower it"
        )
    # A report may itself contain a special word; its id is the special one.
    return Vocabulary(tuple(word for word in words if word not in SPECIAL))

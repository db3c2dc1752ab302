"""Reports as a language model needs them: cleaned, counted into a vocabulary, turned into ids.

After R2Gen (Chen et al., arXiv 2010.16056), by its published code: lower case, punctuation and the
numbers of lists dropped, sentences joined by ` . `, rare words read as `<unk>`.

Deviation: R2Gen deletes `1. ` wherever it stands, so that `of T11. No` becomes `of t1no`, glues
`and/or` to `andor`, makes 15 cm of 1.5 cm and keeps sentences without words; here numbers are
dropped only as marks of a list, and none of the rest happens. `cleaning="published"` does as R2Gen.
Deviation: R2Gen has one id, 0, for padding, the beginning and the end; here each has its own, so
that a padding cannot be read as an end.
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

Cleaning = Literal["fixed", "published"]
PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_ITEM = re.compile(r"(?:^|\n)[ \t]*\d{1,2}[.)]\s")
_STOP = re.compile(r"\.+(?=\s|$)")
_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+(?:-[^\W_]+)*")
_NUMBER = re.compile(r"\d{1,2}")
_DROPPED = re.compile(r"""[.,?;*!%^&_+():<=>@\[\]{}"'/\\]""")


def clean(text: str, cleaning: Cleaning = "fixed") -> str:
    r"""Clean a report: lower-case words, each sentence ended by ` .`; empty if it has no words.

    `fixed` is ours, `published` what R2Gen does (see the top of this file). Hyphens stay in both.

    >>> clean("1. No effusion/pneumothorax.\n2. Fracture of T11.  Nodule (1.5 cm)... ___")
    'no effusion pneumothorax . fracture of t11 . nodule 1.5 cm .'
    >>> clean("1. No effusion/pneumothorax. 2. Fracture of T11. Nodule (1.5 cm).", "published")
    'no effusionpneumothorax . fracture of t1nodule 15 cm .'
    """
    if cleaning == "published":
        return _published(text) if text.strip() else ""
    text = _ITEM.sub("\n. ", text.lower()).replace("'", "")
    sentences = [_WORD.findall(sentence) for sentence in _STOP.split(text)]
    lone = [len(words) == 1 and bool(_NUMBER.fullmatch(words[0])) for words in sentences]
    kept = [words for words, one in zip(sentences, lone, strict=True) if words and not one]
    return " ".join(" ".join([*words, "."]) for words in kept)


def _published(text: str) -> str:
    """Clean as R2Gen's code does, faults and all."""
    text = text.replace("\n", " ")
    for run, one in ((r"_+", "_"), (r" +", " "), (r"\.+", ".")):
        text = re.sub(run, one, text)
    text = text.replace("1. ", "")
    for before in (". ", " "):
        text = re.sub(rf"{re.escape(before)}([2-5])\. ", ". ", text)
    sentences = [_DROPPED.sub("", part.strip()) for part in text.strip().lower().split(". ")]
    return " . ".join(sentences) + " ."


def prose(text: str) -> str:
    """Write a cleaned report as sentences again, for a reader or a parser.

    >>> prose("heart is normal . no effusion .")
    'Heart is normal. No effusion.'
    """
    sentences = [part.strip() for part in re.split(r"(?:^|\s)\.(?=\s|$)", text)]
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in sentences if part)


@dataclass(frozen=True)
class Vocabulary:
    """The words that a decoder may say; their ids begin after those of `SPECIAL`."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        """Count the ids, special ones among them."""
        return len(SPECIAL) + len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Give the id of each word."""
        return {word: n for n, word in enumerate(self.words, len(SPECIAL))}

    def encode(self, text: str, length: int) -> Int32[np.ndarray, " {length}"]:
        """Turn a cleaned report into ids, `END` after the last, padded to `length`.

        A report of more than `length` - 1 words is cut, and has no end.
        """
        found = [self.ids.get(word, UNKNOWN) for word in text.split()] + [END]
        row = np.full(length, PAD, np.int32)
        row[: len(found)] = found[:length]
        return row

    def decode(self, ids: Int[np.ndarray, " L"]) -> str:
        """Turn ids into a cleaned report: the words before the first end or padding."""
        said = []
        for one in ids.tolist():
            if one in (PAD, END):
                break
            said.append(one)
        return " ".join((SPECIAL + self.words)[one] for one in said)

    def masked(self, text: str, most: int) -> str:
        """Cut a cleaned report to `most` words and put `<unk>` for those that are not here.

        >>> Vocabulary(("heart", "normal")).masked("heart is normal .", 3)
        'heart <unk> normal'
        """
        held = self.ids
        return " ".join(word if word in held else SPECIAL[UNKNOWN] for word in text.split()[:most])


def build(texts: Sequence[str], least: int) -> Vocabulary:
    """Collect the words that occur at least `least` times in cleaned reports, in sorted order.

    Raises:
      UserError: there are none.

    >>> build(["no effusion .", "no nodule ."], 2).words
    ('.', 'no')
    """
    counts = Counter(word for text in texts for word in text.split())
    kept = sorted(word for word, count in counts.items() if count >= least)
    if not kept:
        raise UserError(f"min_count {least} leaves no word of {len(texts)} reports; lower it")
    return Vocabulary(tuple(word for word in kept if word not in SPECIAL))

"""Text to tokens: tokenisers, sentences, and which word a piece belongs to."""

import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Shaped

from plan_jax.types import TextBatch, UserError
from plan_jax.weights.sources import PACKAGE, find_in_package

WORD_HASHES = 2**20  # ids of words of several pieces lie in [size, size + WORD_HASHES)
CACHED = 2**15  # sentences and texts remembered; a report returns every epoch

_BREAK = re.compile(
    r"(?<=[.!?])\s+|(?<=[a-z)\]][.!?])(?=[A-Z])|\n[ \t\r]*\n\s*|\n(?=[ \t]*\d{1,2}[.)]\s)"
)
_NO_END = re.compile(
    r"(?:(?:^|[\s(])(?:dr|mr|mrs|ms|prof|vs|cf|fig|approx|e\.g|i\.e|resp)\.|(?:^|:\s)\d{1,2}\.)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pieces:
    """One sentence in pieces: `word` is each piece's word within it, -1 for punctuation."""

    text: str
    tokens: Int32[np.ndarray, " n"]
    word: Int32[np.ndarray, " n"]
    word_id: Int32[np.ndarray, " m"]


@dataclass
class Tokenizer:
    """A fast tokeniser and the ids that matter; 0 is padding.

    `size` is the number of pieces: an embedding needs as many rows. A table over `word_id` needs
    `size + WORD_HASHES`, or a hash of its own.
    """

    name: str
    size: int
    cls: int
    sep: int
    unknown: int
    backend: tokenizers.Tokenizer
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}

    def sentences(self, text: str) -> list[Pieces]:
        """Cut a text into sentences in pieces; what has no letter and no digit is dropped."""
        found = self._cache.get(text)
        if found is None:
            found = [p for p in map(self._pieces, split_sentences(text)) if len(p.word_id)]
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[text] = found
        return found

    def _pieces(self, sentence: str) -> Pieces:
        coded = self.backend.encode(sentence, add_special_tokens=False)
        words: dict[int, list[int]] = {}
        for token, word, (start, end) in zip(coded.ids, coded.word_ids, coded.offsets, strict=True):
            if word in words or any(c.isalnum() for c in sentence[start:end]):
                words.setdefault(word, []).append(token)
        slot = {word: i for i, word in enumerate(words)}
        return Pieces(
            sentence,
            np.asarray(coded.ids, np.int32),
            np.asarray([slot.get(word, -1) for word in coded.word_ids], np.int32),
            np.asarray([self._word_id(pieces) for pieces in words.values()], np.int32),
        )

    def _word_id(self, pieces: list[int]) -> int:
        if len(pieces) == 1:
            return pieces[0]
        return self.size + zlib.crc32(np.asarray(pieces, "<i4").tobytes()) % WORD_HASHES


def split_sentences(text: str) -> list[str]:
    """Split a report into sentences.

    A full stop within a number, after `vs.` or the number of a list's item ends nothing; a blank
    line or an item on a new line always begins a sentence, a line break alone never (reports are
    wrapped).

    >>> split_sentences("Heart is 5.2 cm, vs. 5.0 cm before. 1. No effusion.Lungs clear")
    ['Heart is 5.2 cm, vs. 5.0 cm before.', '1. No effusion.', 'Lungs clear']
    """
    found, start = [], 0
    for gap in _BREAK.finditer(text):
        before = text[start : gap.start()].strip()
        if gap.group().count("\n") < 2 and _NO_END.search(before):
            continue
        found.append(text[start : gap.start()])
        start = gap.end()
    found.append(text[start:])
    return [" ".join(sentence.split()) for sentence in found if any(map(str.isalnum, sentence))]


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokeniser: `phantom` (it ships with plan_jax), or one of BERT's kind from elsewhere.

    That is a local folder or vocab.txt, a hub id, or `package:NAME`, an installed distribution.

    Raises:
      UserError: if there is none of this name, or it is not of BERT's kind ([CLS], [SEP], padding
        0, and a fast implementation that knows words).
    """
    if name == "phantom":
        return from_vocab(str(resources.files("plan_jax.data") / "vocabulary.txt"), name)
    path = find_in_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if path.is_file():
        return from_vocab(str(path), name)
    bare = path.is_dir() and not any(
        (path / known).exists() for known in ("tokenizer.json", "tokenizer_config.json")
    )
    if bare and (path / "vocab.txt").exists():
        return from_vocab(str(path / "vocab.txt"), name)
    return _from_hub(name, path)


def from_vocab(path: str, name: str = "") -> Tokenizer:
    """Make a lower-casing WordPiece tokeniser from a vocabulary file, one piece a line."""
    pieces = Path(path).read_text("utf-8").splitlines()
    if not pieces or pieces[0] != "[PAD]":
        raise UserError(
            f"vocabulary {path} does not begin with [PAD]; give a BERT vocabulary, one piece a line"
        )
    backend = tokenizers.BertWordPieceTokenizer(path, lowercase=True)
    return _checked(name or path, backend._tokenizer, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def _from_hub(name: str, path: Path) -> Tokenizer:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is absent
    from transformers import AutoTokenizer  # 1.3 s, and only here

    try:
        loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # the hub raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"tokenizer {name!r} is no folder with tokenizer.json or vocab.txt and could not be "
            f"fetched from the hub ({reason}); give such a folder, or `phantom`"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {name!r} has no fast implementation; save it with tokenizer.json first"
        )
    backend.no_truncation()
    backend.no_padding()
    special = (loaded.cls_token, loaded.sep_token, loaded.pad_token, loaded.unk_token)
    return _checked(name, backend, *special)


def _checked(name: str, backend: tokenizers.Tokenizer, *special: str | None) -> Tokenizer:
    cls, sep, pad, unknown = (backend.token_to_id(token or "") for token in special)
    if pad != 0 or cls is None or sep is None or unknown is None:
        raise UserError(
            f"tokenizer {name!r} is not of BERT's kind (padding {pad}, [CLS] {cls}, [SEP] {sep}, "
            f"unknown {unknown}); choose a WordPiece tokenizer that pads with 0"
        )
    if set(backend.encode("no effusion", add_special_tokens=False).ids) <= {unknown}:
        raise UserError(
            f"tokenizer {name!r} knows neither `no` nor `effusion`; its vocabulary did not load"
        )
    return Tokenizer(name, backend.get_vocab_size(), cls, sep, unknown, backend)


def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    words: int,
    rng: np.random.Generator | None = None,
    row: str = "",
    flags: Callable[[str], Bool[np.ndarray, " R"]] | None = None,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Encode one text: `tokens` [L], `word_index` [L], `word_id` [W], `sentence` [W].

    Tokens are [CLS], pieces, [SEP], then 0. `word_index` is the slot of each piece's word (-1:
    special, padding, punctuation, or beyond W); `word_id` names the word: the piece's id if it is
    one piece, else a stable hash of its pieces in [size, size + WORD_HASHES), 0 is padding;
    `sentence` counts from 0 in the order taken, -1 is padding. Whole sentences are taken, in order
    or, given `rng`, shuffled, until one does not fit; if that is the first, it is cut.
    `flags(sentence)` marks what a sentence speaks of; `flagged` Bool[R W] then marks its words.

    Raises:
      UserError: if the text has no word; names `row`.
    """
    found = tokenizer.sentences(text)
    if not found:
        raise UserError(f"text {row or repr(text[:9])} has no word; leave that row out")
    if rng is not None and len(found) > 1:
        found = [found[i] for i in rng.permutation(len(found))]
    pieces = word = taken = 0
    for sentence in found:
        pieces, word = pieces + len(sentence.tokens), word + len(sentence.word_id)
        if pieces > length - 2 or word > words:
            break
        taken += 1
    chosen = found[:taken] or [_cut(found[0], length - 2, words)]
    out = _laid_out(tokenizer, chosen, length, words)
    if flags is not None:
        marked = np.stack([flags(sentence.text) for sentence in chosen], 1)
        out["flagged"] = marked[:, out["sentence"]] & (out["sentence"] >= 0)
    return out


def _cut(sentence: Pieces, room: int, words: int) -> Pieces:
    """Cut a sentence to `room` pieces, between words where possible, and to `words` slots."""
    word, kept = sentence.word, min(room, len(sentence.word))
    while 0 < kept < len(word) and word[kept] >= 0 and word[kept] == word[kept - 1]:
        kept -= 1
    kept = kept or room  # the first word alone is too long
    word = np.where(word[:kept] < words, word[:kept], -1)
    ids = sentence.word_id[: int(word.max(initial=-1)) + 1]
    return Pieces(sentence.text, sentence.tokens[:kept], word, ids)


def _laid_out(
    tokenizer: Tokenizer, chosen: list[Pieces], length: int, words: int
) -> dict[str, Int32[np.ndarray, " _"]]:
    """Lay sentences that fit one after the other."""
    counts = [len(sentence.word_id) for sentence in chosen]
    starts = np.cumsum([0, *counts[:-1]], dtype=np.int32)
    index = np.concatenate([sentence.word for sentence in chosen])
    index = np.where(index < 0, -1, index + np.repeat(starts, [len(s.word) for s in chosen]))
    end, known = len(index) + 1, sum(counts)
    out = {
        "tokens": np.zeros(length, np.int32),
        "word_index": np.full(length, -1, np.int32),
        "word_id": np.zeros(words, np.int32),
        "sentence": np.full(words, -1, np.int32),
    }
    out["tokens"][0] = tokenizer.cls
    out["tokens"][1:end] = np.concatenate([sentence.tokens for sentence in chosen])
    out["tokens"][end] = tokenizer.sep
    out["word_index"][1:end] = index
    out["word_id"][:known] = np.concatenate([sentence.word_id for sentence in chosen])
    out["sentence"][:known] = np.repeat(np.arange(len(counts)), counts)
    return out


def encode_many(tokenizer: Tokenizer, texts: Sequence[str], length: int, words: int) -> TextBatch:
    """Encode texts in order of sentences and stack: see `encode`.

    Raises:
      UserError: if a text has no word; names its place.
    """
    rows = [
        encode(tokenizer, text, length=length, words=words, row=str(i))
        for i, text in enumerate(texts)
    ]
    sizes = {"tokens": length, "word_index": length, "word_id": words, "sentence": words}
    arrays = {
        name: np.stack([row[name] for row in rows]) if rows else np.zeros((0, size), np.int32)
        for name, size in sizes.items()
    }
    return TextBatch(**arrays)

"""Tokenisation: the sentences of a report, their WordPiece tokens, and the word of each token."""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32

from plan_jax.types import TextBatch, UserError
from plan_jax.weights.sources import PACKAGE, find_in_package

# Ids of words of several pieces lie in [vocab_size, vocab_size + WORD_HASHES). With 2^20 values, a
# word among 3,000 of several pieces shares its hash with another in 0.3 % of cases.
WORD_HASHES = 2**20
# Sentences and texts to remember: a report returns every epoch.
CACHE_SIZE = 2**15

# The files of a tokenizer that was saved with a model, and how they are told from other ones.
SAVED_FILES = ("tokenizer.json", "tokenizer_config.json")
SAVED_BY = "plan_jax"

# Share of unknown pieces of texts that are still in the language of a tokenizer.
MAX_UNKNOWN = 0.3
STACKED_TEXTS = 256  # texts that are held tokenised at once

# Where a sentence may end: after . ! or ? and a space; after a full stop between a small and a
# capital letter ("effusion.Lungs", as de-identified reports have it); at a blank line; and before a
# numbered item on a new line.
_SENTENCE_BREAK = re.compile(
    r"(?<=[.!?])\s+|(?<=[a-z)\]][.!?])(?=[A-Z])|\n[ \t\r]*\n\s*|\n(?=[ \t]*\d{1,2}[.)]\s)"
)
# What ends in a full stop without ending a sentence: an abbreviation, or the number of a list item.
_NO_SENTENCE_END = re.compile(
    r"(?:(?:^|[\s(])(?:dr|mr|mrs|ms|prof|vs|cf|fig|approx|e\.g|i\.e|resp)\.|(?:^|:\s)\d{1,2}\.)$",
    re.IGNORECASE,
)
_NO_END_LENGTH = 16  # characters in which such an end and the one before it fit


# Sentences --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """A sentence of n pieces and m words.

    `word_index` is the number of each piece's word within the sentence, -1 for punctuation.
    `word_id` names each word, see `TokenizedText`.
    """

    text: str
    tokens: Int32[np.ndarray, " n"]
    word_index: Int32[np.ndarray, " n"]
    word_id: Int32[np.ndarray, " m"]


def split_sentences(text: str) -> list[str]:
    """Splits a report into sentences.

    A full stop within a number, after `vs.` or after the number of a list item ends nothing. A
    blank line, or a list item on a new line, always begins a sentence. A single line break never
    does, because reports are wrapped.

    >>> split_sentences("Heart is 5.2 cm, vs. 5.0 cm before. 1. No effusion.Lungs clear")
    ['Heart is 5.2 cm, vs. 5.0 cm before.', '1. No effusion.', 'Lungs clear']
    """
    sentences, start = [], 0
    for gap in _SENTENCE_BREAK.finditer(text):
        sentence = text[start : gap.start()].strip()
        is_blank_line = gap.group().count("\n") >= 2
        if not is_blank_line and _NO_SENTENCE_END.search(sentence[-_NO_END_LENGTH:]):
            continue
        sentences.append(text[start : gap.start()])
        start = gap.end()
    sentences.append(text[start:])
    return [" ".join(sentence.split()) for sentence in sentences if any(map(str.isalnum, sentence))]


# Tokenizers -------------------------------------------------------------------------------------


@dataclass
class Tokenizer:
    """A fast WordPiece tokenizer and the ids of its special tokens; padding is 0.

    `vocab_size` is the number of pieces, and so the number of rows that an embedding needs. A table
    over `word_id` needs `vocab_size + WORD_HASHES` rows, or a hash of its own.
    """

    name: str
    vocab_size: int
    cls_id: int
    sep_id: int
    unknown_id: int
    backend: tokenizers.Tokenizer
    _cache: dict[str, list[Sentence]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own.
        return self.__dict__ | {"_cache": {}}

    def tokenize_sentences(self, text: str) -> list[Sentence]:
        """Returns the tokenised sentences of a text; one without letters and digits is dropped."""
        sentences = self._cache.get(text)
        if sentences is None:
            tokenized = [self._tokenize_sentence(sentence) for sentence in split_sentences(text)]
            sentences = [sentence for sentence in tokenized if len(sentence.word_id)]
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            self._cache[text] = sentences
        return sentences

    def split_words(self, sentence: str) -> tuple[str, ...]:
        """Returns the words of a sentence as they are written, in the order of its word slots."""
        encoding = self.backend.encode(sentence, add_special_tokens=False)
        spans: dict[int | None, list[int]] = {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            if word in spans:
                spans[word][1] = end
            elif any(map(str.isalnum, sentence[start:end])):
                spans[word] = [start, end]
        return tuple(sentence[start:end] for start, end in spans.values())

    def _tokenize_sentence(self, sentence: str) -> Sentence:
        encoding = self.backend.encode(sentence, add_special_tokens=False)
        # The backend counts punctuation as words; here a word has at least one letter or digit.
        pieces_of_word: dict[int | None, list[int]] = {}
        for token, word, (start, end) in zip(
            encoding.ids, encoding.word_ids, encoding.offsets, strict=True
        ):
            if word in pieces_of_word or any(map(str.isalnum, sentence[start:end])):
                pieces_of_word.setdefault(word, []).append(token)
        slots = {word: slot for slot, word in enumerate(pieces_of_word)}
        return Sentence(
            text=sentence,
            tokens=np.asarray(encoding.ids, np.int32),
            word_index=np.asarray([slots.get(word, -1) for word in encoding.word_ids], np.int32),
            word_id=np.asarray([self._name_word(p) for p in pieces_of_word.values()], np.int32),
        )

    def _name_word(self, pieces: list[int]) -> int:
        """Returns the id of a word: that of its only piece, or a hash of its pieces."""
        if len(pieces) == 1:
            return pieces[0]
        # CRC-32 is the same in every process and every version of Python; `hash` is not.
        return self.vocab_size + zlib.crc32(np.asarray(pieces, "<i4").tobytes()) % WORD_HASHES


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a BERT-style WordPiece tokenizer.

    Args:
      name: `phantom` (part of plan_jax), a local folder or vocab.txt, a Hugging Face Hub id,
        `package:NAME`, an installed distribution, or the folder of a saved model.

    Raises:
      UserError: if there is none of this name, or it is not of BERT's kind ([CLS], [SEP], padding
        0, and a fast implementation that knows words).
    """
    if name == "phantom":
        return load_vocabulary(str(resources.files("plan_jax.data") / "vocabulary.txt"), name)
    path = find_in_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if path.is_file():
        return load_vocabulary(str(path), name)
    if saved := _read_saved_settings(path):
        return _load_saved(path, saved)
    # AutoTokenizer cannot tell the class of a tokenizer from a folder with nothing but vocab.txt.
    has_config = any((path / file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))
    if (path / "vocab.txt").exists() and not has_config:
        return load_vocabulary(str(path / "vocab.txt"), name)
    return _load_pretrained(name, path)


def load_vocabulary(path: str, name: str) -> Tokenizer:
    """Loads a lower-casing WordPiece tokenizer from a vocabulary file with one piece per line.

    Raises:
      UserError: if the file is not a vocabulary of BERT's kind.
    """
    pieces = _read_pieces(path)
    if not pieces or pieces[0] != "[PAD]":
        raise UserError(
            f"vocabulary {path} does not begin with [PAD]; "
            "use a BERT vocabulary with one piece per line"
        )
    if missing := [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in pieces]:
        raise UserError(
            f"vocabulary {path} has no {' and no '.join(missing)}; use a BERT vocabulary with one "
            "piece per line"
        )
    backend = tokenizers.BertWordPieceTokenizer(path, lowercase=True)
    # The class is a wrapper; only the object inside it has the interface of a loaded tokenizer.
    return _build_tokenizer(name, backend._tokenizer, "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def _read_pieces(path: str | Path) -> list[str]:
    """Returns the pieces of a vocabulary file, whose ids are the numbers of their lines.

    Raises:
      UserError: if the file is not text, or a piece is in two lines; names the lines.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"vocabulary {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    # The backend ends lines at \n alone, and drops white space at their ends.
    pieces = [line.rstrip() for line in text.removesuffix("\n").split("\n")]
    first_lines: dict[str, int] = {}
    for line, piece in enumerate(pieces, 1):
        first = first_lines.setdefault(piece, line)
        if first != line:
            # The last line of a piece gives its id, so renaming the first changes no id.
            remedy = f"rename the one in line {first}, as to [unused{first}], and all ids stay"
            if not piece:
                remedy = "delete empty lines at its end, and fill the others, as with [unused1]"
            raise UserError(
                f"vocabulary {path} has the piece {piece[:20]!r} in lines {first} and {line}; "
                f"{remedy}"
            )
    return pieces


def encode_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the files of a tokenizer, by name; `load_tokenizer` reads a folder with them.

    Nothing else is needed to tokenise, and transformers reads them too.
    """
    token = tokenizer.backend.id_to_token
    settings = {
        "saved_by": SAVED_BY,
        "name": remove_folders(tokenizer.name),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": token(tokenizer.cls_id),
        "sep_token": token(tokenizer.sep_id),
        "pad_token": token(0),
        "unk_token": token(tokenizer.unknown_id),
    }
    contents = (tokenizer.backend.to_str(pretty=False), json.dumps(settings, indent=2) + "\n")
    return dict(zip(SAVED_FILES, contents, strict=True))


def remove_folders(name: str) -> str:
    """Returns the name of a tokenizer, which may be a path, without folders of this machine.

    >>> remove_folders("../ward_7/vocab.txt"), remove_folders("owner/name")
    ('vocab.txt', 'owner/name')
    """
    # A path counts as one even if it has gone since the tokenizer was loaded.
    is_hub_id = re.fullmatch(r"(package:)?[\w-][\w.-]*(/[\w.-]+)?", name)
    if is_hub_id and not name.endswith(".txt") and not os.path.exists(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _read_saved_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a tokenizer that `encode_tokenizer` has encoded, {} for another."""
    try:
        settings = json.loads((folder / SAVED_FILES[1]).read_bytes())
    except (OSError, ValueError):
        return {}
    is_own = isinstance(settings, dict) and settings.get("saved_by") == SAVED_BY
    return settings if is_own else {}


def _load_saved(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    # Without transformers, which takes seconds to import.
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / SAVED_FILES[0]))
    except Exception as error:  # the backend raises bare exceptions
        raise UserError(
            f"{folder / SAVED_FILES[0]} is not a tokenizer ({error}); save the model again"
        ) from None
    tokens = (str(settings.get(f"{kind}_token", "")) for kind in ("cls", "sep", "pad", "unk"))
    return _build_tokenizer(str(settings.get("name", folder.name)), backend, *tokens)


def _load_pretrained(name: str, path: Path) -> Tokenizer:
    if (path / "vocab.txt").is_file() and not (path / "tokenizer.json").exists():
        _read_pieces(path / "vocab.txt")
    try:
        pretrained = _fetch_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # the hub raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"tokenizer {name!r} is not a folder with tokenizer.json or vocab.txt and could not be "
            f"fetched from the hub ({reason}); use such a folder, or `phantom`"
        ) from None
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {name!r} has no fast implementation; save it with tokenizer.json first"
        )
    # Lengths are limited here, in whole sentences.
    backend.no_truncation()
    backend.no_padding()
    return _build_tokenizer(
        name,
        backend,
        pretrained.cls_token,
        pretrained.sep_token,
        pretrained.pad_token,
        pretrained.unk_token,
    )


def _fetch_pretrained(name: str) -> Any:
    """Returns a tokenizer of transformers; code that was published beside it never runs.

    CXR-BERT names a class of its own, CXRBertTokenizer, which adds nothing to BERT's, so BERT's
    reads its files. Any other code may do something else, and its tokenizer is refused.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is absent
    from transformers import AutoTokenizer, BertTokenizer  # imported late: it takes 1.3 s

    # Without an answer, it would ask on the terminal whether to run that code.
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        pretrained = BertTokenizer.from_pretrained(name, trust_remote_code=False)
        if "BertTokenizer" not in str(pretrained.init_kwargs.get("auto_map")):
            raise
        return pretrained


def _build_tokenizer(
    name: str, backend: tokenizers.Tokenizer, *special_tokens: str | None
) -> Tokenizer:
    """Builds a tokenizer, and checks that it is of BERT's kind.

    Args:
      name: name of the tokenizer.
      backend: the fast implementation.
      *special_tokens: the tokens for the beginning, the end, padding and unknown pieces.
    """
    cls_id, sep_id, pad_id, unknown_id = (
        backend.token_to_id(token or "") for token in special_tokens
    )
    if pad_id != 0 or cls_id is None or sep_id is None or unknown_id is None:
        raise UserError(
            f"tokenizer {name!r} is not of BERT's kind (padding {pad_id}, [CLS] {cls_id}, "
            f"[SEP] {sep_id}, unknown {unknown_id}); use a WordPiece tokenizer that pads with 0"
        )
    _check_ids(name, backend)
    # A tokenizer.json without its vocabulary loads without an error, and knows nothing.
    try:
        ids = backend.encode("no effusion", add_special_tokens=False).ids
    except Exception:  # what the backend raises without [UNK]
        ids = []
    if {*ids} <= {unknown_id}:
        raise UserError(
            f"tokenizer {name!r} knows neither `no` nor `effusion`, so its vocabulary did not load;"
            " use a folder with tokenizer.json or vocab.txt"
        )
    return Tokenizer(name, backend.get_vocab_size(), cls_id, sep_id, unknown_id, backend)


def _check_ids(name: str, backend: tokenizers.Tokenizer) -> None:
    """Checks that the ids of N pieces are 0 to N - 1.

    An embedding has N rows, and the vector of an id beyond the last one would be NaN.

    Raises:
      UserError: two pieces have one id, or an id is missing below the largest.
    """
    pieces: dict[int, str] = {}
    for piece, index in backend.get_vocab().items():
        if index in pieces:
            raise UserError(
                f"tokenizer {name!r} has one id, {index}, for {pieces[index][:20]!r} and "
                f"{piece[:20]!r}; give each piece an id of its own in tokenizer.json"
            )
        pieces[index] = piece
    largest = max(pieces)
    if largest >= len(pieces):
        missing = next(index for index in range(largest) if index not in pieces)
        raise UserError(
            f"tokenizer {name!r} has {len(pieces)} pieces, but no id {missing} and an id {largest} "
            f"({pieces[largest][:20]!r}) beyond its size; add a piece such as [unused{missing}] to "
            "tokenizer.json for each missing id"
        )


# Texts ------------------------------------------------------------------------------------------


class TokenizedText(NamedTuple):
    """One text of L token positions and W word slots.

    `tokens` are [CLS], pieces, [SEP], then 0. `word_index` is the slot of each piece's word (-1:
    special, padding, punctuation, or beyond W). `word_id` names the word in each slot: the id of
    its only piece, else a stable hash of its pieces in [vocab_size, vocab_size + WORD_HASHES); 0 is
    padding. `sentence` is the number of each word's sentence in `sentence_texts`, -1 for padding.
    """

    tokens: Int32[np.ndarray, " L"]
    word_index: Int32[np.ndarray, " L"]
    word_id: Int32[np.ndarray, " W"]
    sentence: Int32[np.ndarray, " W"]
    sentence_texts: tuple[str, ...]


def tokenize(
    tokenizer: Tokenizer,
    text: str,
    *,
    max_tokens: int,
    max_words: int,
    rng: np.random.Generator | None = None,
    name: str = "",
) -> TokenizedText:
    """Tokenises one text of whole sentences.

    Sentences are added until one does not fit. If that is the first, it is truncated.

    Args:
      tokenizer: the tokenizer.
      text: the text.
      max_tokens: L, the number of token positions, [CLS] and [SEP] included.
      max_words: W, the number of word slots.
      rng: generator that shuffles the sentences (None: they stay in order).
      name: name of the text in messages.

    Raises:
      UserError: if the text has no word.
    """
    sentences = tokenizer.tokenize_sentences(text)
    if not sentences:
        raise UserError(f"text {name or f'of {len(text)} characters'} has no word; drop that row")
    if rng is not None and len(sentences) > 1:
        sentences = [sentences[index] for index in rng.permutation(len(sentences))]
    max_pieces = max_tokens - 2  # [CLS] and [SEP]
    num_pieces = num_words = num_sentences = 0
    for sentence in sentences:
        num_pieces += len(sentence.tokens)
        num_words += len(sentence.word_id)
        if num_pieces > max_pieces or num_words > max_words:
            break
        num_sentences += 1
    fitting = sentences[:num_sentences] or [_truncate(sentences[0], max_pieces, max_words)]
    return _concatenate(tokenizer, fitting, max_tokens, max_words)


def _truncate(sentence: Sentence, max_pieces: int, max_words: int) -> Sentence:
    """Truncates a sentence to `max_pieces`, between words where possible, and to `max_words`."""
    word_index = sentence.word_index
    end = min(max_pieces, len(word_index))
    # Moves the end left while it is inside a word.
    while (
        0 < end < len(word_index)
        and word_index[end] >= 0
        and (word_index[end] == word_index[end - 1])
    ):
        end -= 1
    end = end or max_pieces  # the first word alone is too long
    word_index = np.where(word_index[:end] < max_words, word_index[:end], -1)
    num_words = int(word_index.max(initial=-1)) + 1
    return Sentence(sentence.text, sentence.tokens[:end], word_index, sentence.word_id[:num_words])


def _concatenate(
    tokenizer: Tokenizer, sentences: list[Sentence], max_tokens: int, max_words: int
) -> TokenizedText:
    """Returns the text of sentences that fit together, padded."""
    words_per_sentence = [len(sentence.word_id) for sentence in sentences]
    pieces_per_sentence = [len(sentence.tokens) for sentence in sentences]
    num_words, end = sum(words_per_sentence), 1 + sum(pieces_per_sentence)

    tokens = np.zeros(max_tokens, np.int32)
    tokens[0] = tokenizer.cls_id
    tokens[1:end] = np.concatenate([sentence.tokens for sentence in sentences])
    tokens[end] = tokenizer.sep_id

    # From the word's number within its sentence to its slot in the text.
    first_slots = np.cumsum([0, *words_per_sentence[:-1]], dtype=np.int32)
    local_index = np.concatenate([sentence.word_index for sentence in sentences])
    slots = local_index + np.repeat(first_slots, pieces_per_sentence)
    word_index = np.full(max_tokens, -1, np.int32)
    word_index[1:end] = np.where(local_index < 0, -1, slots)

    word_id = np.zeros(max_words, np.int32)
    word_id[:num_words] = np.concatenate([sentence.word_id for sentence in sentences])
    sentence_number = np.full(max_words, -1, np.int32)
    sentence_number[:num_words] = np.repeat(np.arange(len(sentences)), words_per_sentence)
    texts = tuple(sentence.text for sentence in sentences)
    return TokenizedText(tokens, word_index, word_id, sentence_number, texts)


def check_known(tokenizer: Tokenizer, texts: Sequence[str], name: str, remedy: str) -> float:
    """Returns the share of the pieces of texts that the tokenizer does not know.

    Args:
      tokenizer: the tokenizer.
      texts: the texts.
      name: what the texts are, in messages.
      remedy: what to do if most pieces are unknown.

    Raises:
      UserError: if the share is more than `MAX_UNKNOWN`: then the texts are in another script.
    """
    num_pieces = num_unknown = 0
    for part_tokenizer, _, part in _split_texts(tokenizer, texts):
        for text in part:
            for sentence in part_tokenizer.tokenize_sentences(text):
                num_pieces += len(sentence.tokens)
                num_unknown += int(np.sum(sentence.tokens == tokenizer.unknown_id))
    share = num_unknown / num_pieces if num_pieces else 0.0
    if share > MAX_UNKNOWN:
        raise UserError(
            f"{share:.0%} of the pieces of {name} are unknown to tokenizer {tokenizer.name!r}; "
            f"{remedy}"
        )
    return share


def _split_texts(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[Tokenizer, int, Sequence[str]]]:
    """Yields a tokenizer, the position of the first text, and the texts, of each part of texts.

    A tokenised text takes far more memory than its row of a batch. Many texts at once are those of
    an evaluation, so they are not remembered beyond their part.
    """
    if len(texts) <= STACKED_TEXTS:
        yield tokenizer, 0, texts
        return
    for start in range(0, len(texts), STACKED_TEXTS):
        yield replace(tokenizer, _cache={}), start, texts[start : start + STACKED_TEXTS]


def tokenize_batch(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, max_words: int
) -> TextBatch:
    """Tokenises texts with their sentences in order, see `tokenize`.

    Raises:
      UserError: if a text has no word; names its position.
    """
    if not texts:
        tokens: Any = np.zeros((0, max_tokens), np.int32)
        words: Any = np.zeros((0, max_words), np.int32)
        return TextBatch(tokens=tokens, word_index=tokens, word_id=words, sentence=words)
    parts = [
        stack_texts(
            [
                tokenize(
                    part_tokenizer,
                    text,
                    max_tokens=max_tokens,
                    max_words=max_words,
                    name=str(position),
                )
                for position, text in enumerate(part, start)
            ]
        )
        for part_tokenizer, start, part in _split_texts(tokenizer, texts)
    ]
    names = [item.name for item in fields(TextBatch)]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return TextBatch(**arrays)


def stack_texts(texts: Sequence[TokenizedText]) -> TextBatch:
    """Returns at least one tokenised text as a batch."""
    names = [item.name for item in fields(TextBatch)]
    # Numpy arrays, until the batch is put on a device.
    arrays: dict[str, Any] = {
        name: np.stack([getattr(text, name) for text in texts]) for name in names
    }
    return TextBatch(**arrays)

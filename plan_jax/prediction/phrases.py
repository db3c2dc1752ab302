"""Checks of the phrases that are located."""

from typing import Any

from plan_jax.data import quoting
from plan_jax.data.tokenizer import Tokenizer, check_known, tokenize
from plan_jax.types import UserError

NAME = "the phrase"


def check_phrase(text: Any, name: str = NAME) -> None:
    """Raises UserError if a phrase is not a text, has no word, or bytes that are not text.

    Args:
      text: the phrase.
      name: what the phrase is, in messages.
    """
    if not isinstance(text, str):
        raise UserError(f"{name} is of type {type(text).__name__}; pass one text")
    if any(map(_is_surrogate, text)):
        raise UserError(f"{name} has bytes that are not UTF-8; pass the phrase as UTF-8")
    if not any(map(str.isalnum, text)):
        raise UserError(f"{name} {quoting.quote(text)} has no word; pass a phrase")


def describe_phrase(
    tokenizer: Tokenizer, text: str, max_tokens: int, max_words: int
) -> tuple[str, ...]:
    """Returns notes on a phrase: how much of it the model does not read.

    Args:
      tokenizer: the model's tokenizer.
      text: the phrase.
      max_tokens: the number of word pieces that the model reads.
      max_words: the number of words that it reads.

    Raises:
      UserError: the phrase has no word, or most of its pieces are unknown.
    """
    check_phrase(text)
    remedy = "write it in the language of the model's tokenizer"
    unknown_share = check_known(tokenizer, [text], NAME, remedy)
    sentences = tokenizer.tokenize_sentences(text)
    num_words = sum(len(sentence.word_id) for sentence in sentences)
    tokens = tokenize(tokenizer, text, max_tokens=max_tokens, max_words=max_words, name=NAME)
    num_kept = int((tokens.sentence >= 0).sum())
    notes = []
    if num_kept < num_words:
        notes.append(
            f"the phrase has {num_words} words, of which the first {num_kept} were read: the model "
            f"reads whole sentences up to {max_words} words or {max_tokens - 2} word pieces"
        )
    if unknown_share:
        notes.append(f"{unknown_share:.0%} of the pieces of the phrase are unknown to the model")
    return tuple(notes)


def _is_surrogate(character: str) -> bool:
    """Returns whether a character stands for a byte that Python could not decode."""
    return "\ud800" <= character <= "\udfff"

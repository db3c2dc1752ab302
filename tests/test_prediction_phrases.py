"""Phrases that have no word, or more than a model reads."""

import pytest

from plan_jax.data.tokenizer import load_tokenizer
from plan_jax.prediction import phrases
from plan_jax.types import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("phantom")


@pytest.mark.parametrize("text", ["", "  \t\n", "...", "\U0001fac1 \U0001f9b4", "\u2014?!"])
def test_a_phrase_without_a_word_is_refused(text, tokenizer):
    with pytest.raises(UserError, match=r"the phrase .* has no word; pass a phrase"):
        phrases.describe_phrase(tokenizer, text, 24, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edema \udcff", "bytes that are not UTF-8; pass the phrase as UTF-8"),
        ("\u80f8\u8154\u79ef\u6db2", "100% of the pieces .*; write it in the language"),
        ("effusion\U0001fac1", "100% of the pieces .* are unknown"),
    ],
)
def test_a_phrase_that_cannot_be_read_is_refused(text, message, tokenizer):
    with pytest.raises(UserError, match=message):
        phrases.describe_phrase(tokenizer, text, 24, 20)


def test_a_plain_phrase_has_no_notes(tokenizer):
    assert phrases.describe_phrase(tokenizer, "effusion on the left", 24, 20) == ()


def test_words_that_are_not_read_are_counted(tokenizer):
    text = " ".join(["effusion"] * 400)
    (note,) = phrases.describe_phrase(tokenizer, text, 24, 20)
    assert note.startswith("the phrase has 400 words, of which the first 20 were read")
    text = "Effusion on the left. " + text
    (note,) = phrases.describe_phrase(tokenizer, text, 24, 20)
    assert note.startswith("the phrase has 404 words, of which the first 4 were read")


def test_unknown_pieces_are_counted(tokenizer):
    (note,) = phrases.describe_phrase(tokenizer, "effusion on the left \U0001fac1", 24, 20)
    assert note == "20% of the pieces of the phrase are unknown to the model"


def test_a_report_is_not_quoted():
    with pytest.raises(UserError, match="a text of 7 characters|has no word"):
        phrases.check_phrase(". . . .")


def test_several_phrases_are_not_one():
    with pytest.raises(UserError, match="the phrase is of type list; pass one text"):
        phrases.check_phrase(["effusion", "nodule"])

"""The vocabulary file: generated from the grammar, knows every phantom report, spells any word."""

from importlib import resources

import pytest
from tokenizers import BertWordPieceTokenizer

from plan_jax.data import phantom, vocabulary
from plan_jax.data.phantom import report_text

PATH = resources.files("plan_jax.data") / "vocabulary.txt"


@pytest.fixture(scope="module")
def tokenizer() -> BertWordPieceTokenizer:
    return BertWordPieceTokenizer(str(PATH), lowercase=True)


def test_the_file_is_generated_from_the_grammar(tmp_path):
    count = vocabulary.write_vocabulary(tmp_path / "vocabulary.txt")
    assert (tmp_path / "vocabulary.txt").read_bytes() == PATH.read_bytes()
    assert count == len(set(PATH.read_text().splitlines()))


def test_special_tokens_come_first():
    pieces = vocabulary.build_vocabulary()
    assert tuple(pieces[:5]) == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_hard_reports_have_added_no_piece(monkeypatch):
    """So the ids are those of models that were trained before there was a hard level."""
    pieces, strings = vocabulary.build_vocabulary(), report_text.grammar_strings()
    tables = ("HARD_FILLER", "_PROBABLE_TEMPLATES", "_COMPARED", "_COMPARISONS", "_RESOLVED")
    for table in (*tables, "_COPIED"):
        monkeypatch.setattr(report_text, table, ())
    assert len(report_text.grammar_strings()) < len(strings) - 30
    assert vocabulary.build_vocabulary() == pieces


def test_reports_and_prompts_are_whole_words(tokenizer):
    reports = [phantom.write_report(3, i) for i in range(500)]
    reports += [phantom.write_report(3, i, phantom.Difficulty(hard=True)) for i in range(200)]
    texts = [text for _, _, text, _ in reports]
    texts += [
        report_text.canonical_phrase(finding)
        for _, findings, _, _ in reports
        for finding in findings
    ]
    texts += [text for sides in phantom.PROMPTS.values() for side in sides for text in side]
    for text in texts:
        pieces = tokenizer.encode(text, add_special_tokens=False).tokens
        assert "[UNK]" not in pieces, text
        assert not [piece for piece in pieces if piece.startswith("##")], text


@pytest.mark.parametrize(
    "word", ["zygomatic", "Pneumoperitoneum", "qwxzvjk", "cm2", "L1-L2", "e.g.", "(12/03)"]
)
def test_any_word_can_be_spelt(tokenizer, word):
    pieces = tokenizer.encode(word, add_special_tokens=False).tokens
    assert "[UNK]" not in pieces
    assert "".join(piece.removeprefix("##") for piece in pieces) == word.lower()

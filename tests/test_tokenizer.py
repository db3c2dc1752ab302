"""Sentences, pieces and words of a text."""

import pickle

import chex
import numpy as np
import pytest

from plan_jax.data import tokenizer as tokenization
from plan_jax.types import UserError

VOCABULARY = """[PAD] [UNK] [CLS] [SEP] [MASK] the heart is normal no effusion lungs are clear con
##sol ##id ##ation in left lower zone ground glass opacity . , - : a b ##c 5 2 cm ##a"""
REPORT = "The heart is normal. No effusion. Consolidation in left lower zone."


@pytest.fixture(scope="module")
def vocabulary_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY.split()) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary_folder):
    return tokenization.load_tokenizer(str(vocabulary_folder))


def tokenize(tokenizer, text, max_tokens=24, max_words=12, **options):
    return tokenization.tokenize(
        tokenizer, text, max_tokens=max_tokens, max_words=max_words, **options
    )


def decode_pieces(tokenizer, tokens):
    return [tokenizer.backend.id_to_token(int(token)) for token in tokens]


# Sentences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Heart 5.2 cm. Clear.", ["Heart 5.2 cm.", "Clear."]),
        ("Clear.The heart", ["Clear.", "The heart"]),
        ("Larger vs. prior\nfilm, e.g. left.", ["Larger vs. prior film, e.g. left."]),
        ("IMPRESSION: 1. Clear. 2. Heart", ["IMPRESSION: 1. Clear.", "2. Heart"]),
        ("1. Clear\n2. Heart large", ["1. Clear", "2. Heart large"]),
        ("Wrapped\nline. \n\n . ___ \n\nEnd", ["Wrapped line.", "End"]),
        ("Grade 2. No effusion", ["Grade 2.", "No effusion"]),
        ("", []),
        (" .\n", []),
    ],
)
def test_sentences(report, expected):
    assert tokenization.split_sentences(report) == expected


def test_splitting_is_linear_in_the_length_of_a_hostile_text():
    assert tokenization.split_sentences("a" + " \n \t" * 50_000 + "b" + "." * 50_000) != []


# Tokens and words ---------------------------------------------------------------------------


def test_tokens_words_and_sentences_of_a_report(tokenizer):
    text = tokenize(tokenizer, REPORT)
    assert " ".join(decode_pieces(tokenizer, text.tokens[:20])) == (
        "[CLS] the heart is normal . no effusion . con ##sol ##id ##ation in left lower zone . "
        "[SEP] [PAD]"
    )
    index = [-1, 0, 1, 2, 3, -1, 4, 5, -1, 6, 6, 6, 6, 7, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1]
    assert text.word_index.tolist() == index
    assert text.sentence.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, -1]
    assert (text.word_id > 0).tolist() == [True] * 11 + [False]
    single_pieces = [slot for slot in range(11) if slot != 6]
    assert (text.word_id[single_pieces] < tokenizer.vocab_size).all()
    hash_end = tokenizer.vocab_size + tokenization.WORD_HASHES
    assert tokenizer.vocab_size <= text.word_id[6] < hash_end
    assert all(array.dtype == np.int32 for array in text[:4])
    assert " ".join(text.sentence_texts) == REPORT


def test_no_piece_of_a_known_sentence_is_unknown(tokenizer):
    assert tokenizer.unknown_id not in tokenize(tokenizer, REPORT).tokens


def test_a_word_has_one_id_at_any_position(tokenizer):
    first = tokenize(tokenizer, "consolidation").word_id[0]
    second = tokenize(tokenizer, "The CONSOLIDATION.").word_id[1]
    assert first == second
    assert tokenize(tokenizer, "bc").word_id[0] != first


def test_a_hyphen_is_not_a_word(tokenizer):
    text = tokenize(tokenizer, "ground-glass opacity", 8, 4)
    assert text.word_index.tolist() == [-1, 0, -1, 1, 2, -1, -1, -1]


# Limits -------------------------------------------------------------------------------------


def test_whole_sentences_are_added_while_they_fit(tokenizer):
    text = tokenize(tokenizer, REPORT, max_tokens=12)
    assert decode_pieces(tokenizer, text.tokens[8:10]) == [".", "[SEP]"]
    assert text.sentence.max() == 1
    assert tokenize(tokenizer, REPORT, max_words=5).sentence.tolist() == [0, 0, 0, 0, -1]


def test_a_sentence_that_is_too_long_is_truncated_between_words(tokenizer):
    text = tokenize(tokenizer, "heart consolidation clear", 6, 4)
    assert decode_pieces(tokenizer, text.tokens) == ["[CLS]", "heart", "[SEP]"] + ["[PAD]"] * 3
    assert text.word_id.tolist()[1:] == [0, 0, 0]
    truncated_word = tokenize(tokenizer, "consolidation", 4, 4)
    pieces = decode_pieces(tokenizer, truncated_word.tokens)
    assert pieces == ["[CLS]", "con", "##sol", "[SEP]"]
    assert truncated_word.word_id[0] == tokenize(tokenizer, "consolidation", 8, 4).word_id[0]


def test_words_beyond_the_limit_have_no_slot(tokenizer):
    text = tokenize(tokenizer, "the heart is normal", 8, 2)
    assert text.word_index.tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]
    assert text.sentence.tolist() == [0, 0]


def test_shuffled_sentences_are_whole_and_follow_the_generator(tokenizer):
    def shuffle(seed, max_tokens=24):
        return tokenize(tokenizer, REPORT, max_tokens, rng=np.random.default_rng(seed))

    ordered = tokenize(tokenizer, REPORT)
    orders = {tuple(shuffle(seed).tokens) for seed in range(40)}
    assert len(orders) == 6
    for seed in range(6):
        text = shuffle(seed)
        chex.assert_trees_all_equal(text[:4], shuffle(seed)[:4])
        assert sorted(text.tokens) == sorted(ordered.tokens)
        assert sorted(text.word_id) == sorted(ordered.word_id)
        assert text.sentence[:11].tolist() == sorted(text.sentence[:11])
        assert sorted(text.sentence_texts) == sorted(ordered.sentence_texts)
    first_tokens = {int(shuffle(seed, 12).tokens[1]) for seed in range(40)}
    assert len(first_tokens) == 3


# Batches and loading ------------------------------------------------------------------------


def test_texts_are_stacked(tokenizer):
    batch = tokenization.tokenize_batch(tokenizer, [REPORT, "Clear."], 24, 12)
    assert {name: array.shape for name, array in vars(batch).items()} == {
        "tokens": (2, 24),
        "word_index": (2, 24),
        "word_id": (2, 12),
        "sentence": (2, 12),
    }
    empty = tokenization.tokenize_batch(tokenizer, [], 24, 12)
    assert {name: array.shape for name, array in vars(empty).items()} == {
        "tokens": (0, 24),
        "word_index": (0, 24),
        "word_id": (0, 12),
        "sentence": (0, 12),
    }


@pytest.mark.parametrize("wordless", ["", "  \n", ". - ,"])
def test_a_text_without_words_is_named(tokenizer, wordless):
    with pytest.raises(UserError, match="text images/7.png has no word; drop that row"):
        tokenize(tokenizer, wordless, name="images/7.png")
    with pytest.raises(UserError, match="text 1 has no word; drop that row"):
        tokenization.tokenize_batch(tokenizer, ["Clear.", wordless], 8, 4)


def test_a_pickled_tokenizer_returns_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    chex.assert_trees_all_equal(tokenize(tokenizer, REPORT)[:4], tokenize(copy, REPORT)[:4])


def test_a_folder_saved_by_transformers_returns_the_same(tokenizer, vocabulary_folder, tmp_path):
    from transformers import BertTokenizer

    BertTokenizer.from_pretrained(str(vocabulary_folder)).save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").exists()
    reloaded = tokenization.load_tokenizer(str(tmp_path))
    assert (reloaded.vocab_size, reloaded.cls_id, reloaded.sep_id) == (
        tokenizer.vocab_size,
        tokenizer.cls_id,
        tokenizer.sep_id,
    )
    chex.assert_trees_all_equal(tokenize(tokenizer, REPORT)[:4], tokenize(reloaded, REPORT)[:4])


def test_a_tokenizer_that_does_not_load_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tokenizer .*absent.* could not be fetched .*; use"):
        tokenization.load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "vocab.txt").write_text("heart\n")
    with pytest.raises(UserError, match=r"does not begin with \[PAD\]; use a BERT vocabulary"):
        tokenization.load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nheart\n")
    with pytest.raises(UserError, match="its vocabulary did not load; use a folder"):
        tokenization.load_tokenizer(str(tmp_path))

"""Sentences, pieces and words of a text."""

import pickle

import numpy as np
import pytest

from plan_jax.data import tokenizer as tokenization
from plan_jax.types import UserError

VOCABULARY = """[PAD] [UNK] [CLS] [SEP] [MASK] the heart is normal no effusion lungs are clear con
##sol ##id ##ation in left lower zone ground glass opacity . , - : a b ##c 5 2 cm ##a"""
ONE = "The heart is normal. No effusion. Consolidation in left lower zone."


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY.split()) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocab):
    return tokenization.load_tokenizer(str(vocab))


def pieces(tokenizer, tokens):
    return [tokenizer.backend.id_to_token(int(t)) for t in tokens]


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


def test_tokens_words_and_sentences_of_a_report(tokenizer):
    out = tokenization.encode(tokenizer, ONE, length=24, words=12)
    assert " ".join(pieces(tokenizer, out["tokens"][:20])) == (
        "[CLS] the heart is normal . no effusion . con ##sol ##id ##ation in left lower zone . "
        "[SEP] [PAD]"
    )
    index = [-1, 0, 1, 2, 3, -1, 4, 5, -1, 6, 6, 6, 6, 7, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1]
    assert out["word_index"].tolist() == index
    assert out["sentence"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, -1]
    assert (out["word_id"] > 0).tolist() == [True] * 11 + [False]
    one_piece = [i for i in range(11) if i != 6]
    assert (out["word_id"][one_piece] < tokenizer.size).all()
    assert tokenizer.size <= out["word_id"][6] < tokenizer.size + tokenization.WORD_HASHES
    assert all(value.dtype == np.int32 for value in out.values())


def test_no_piece_of_a_known_sentence_is_unknown(tokenizer):
    out = tokenization.encode(tokenizer, ONE, length=24, words=12)
    assert tokenizer.unknown not in out["tokens"]


def test_a_word_has_one_id_wherever_it_stands(tokenizer):
    first = tokenization.encode(tokenizer, "consolidation", length=8, words=4)["word_id"][0]
    second = tokenization.encode(tokenizer, "The CONSOLIDATION.", length=8, words=4)["word_id"][1]
    assert first == second
    other = tokenization.encode(tokenizer, "bc", length=8, words=4)["word_id"][0]
    assert other != first


def test_hyphen_is_no_word(tokenizer):
    out = tokenization.encode(tokenizer, "ground-glass opacity", length=8, words=4)
    assert out["word_index"].tolist() == [-1, 0, -1, 1, 2, -1, -1, -1]


def test_whole_sentences_are_kept_while_they_fit(tokenizer):
    out = tokenization.encode(tokenizer, ONE, length=12, words=12)
    assert pieces(tokenizer, out["tokens"][8:10]) == [".", "[SEP]"]
    assert out["sentence"].max() == 1
    few = tokenization.encode(tokenizer, ONE, length=24, words=5)
    assert few["sentence"].tolist() == [0, 0, 0, 0, -1]


def test_a_sentence_that_is_too_long_is_cut_between_words(tokenizer):
    out = tokenization.encode(tokenizer, "heart consolidation clear", length=6, words=4)
    assert pieces(tokenizer, out["tokens"]) == ["[CLS]", "heart", "[SEP]"] + ["[PAD]"] * 3
    assert out["word_id"].tolist()[1:] == [0, 0, 0]
    alone = tokenization.encode(tokenizer, "consolidation", length=4, words=4)
    assert pieces(tokenizer, alone["tokens"]) == ["[CLS]", "con", "##sol", "[SEP]"]
    whole = tokenization.encode(tokenizer, "consolidation", length=8, words=4)
    assert alone["word_id"][0] == whole["word_id"][0]


def test_words_beyond_the_limit_have_no_slot(tokenizer):
    out = tokenization.encode(tokenizer, "the heart is normal", length=8, words=2)
    assert out["word_index"].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]
    assert out["sentence"].tolist() == [0, 0]


def test_shuffled_sentences_are_whole_and_follow_the_generator(tokenizer):
    def shuffled(seed, length=24):
        rng = np.random.default_rng(seed)
        return tokenization.encode(tokenizer, ONE, length=length, words=12, rng=rng)

    plain = tokenization.encode(tokenizer, ONE, length=24, words=12)
    seen = {tuple(shuffled(seed)["tokens"]) for seed in range(40)}
    assert len(seen) == 6
    for seed in range(6):
        again, out = shuffled(seed), shuffled(seed)
        assert all((again[k] == out[k]).all() for k in out)
        assert sorted(out["tokens"]) == sorted(plain["tokens"])
        assert sorted(out["word_id"]) == sorted(plain["word_id"])
        assert out["sentence"][:11].tolist() == sorted(out["sentence"][:11])
    firsts = {int(shuffled(seed, 12)["tokens"][1]) for seed in range(40)}
    assert len(firsts) == 3


def test_texts_are_stacked(tokenizer):
    out = tokenization.encode_many(tokenizer, [ONE, "Clear."], 24, 12)
    assert {k: v.shape for k, v in vars(out).items()} == {
        "tokens": (2, 24),
        "word_index": (2, 24),
        "word_id": (2, 12),
        "sentence": (2, 12),
    }
    assert tokenization.encode_many(tokenizer, [], 24, 12).tokens.shape == (0, 24)


@pytest.mark.parametrize("empty", ["", "  \n", ". - ,"])
def test_a_text_without_words_is_named(tokenizer, empty):
    with pytest.raises(UserError, match="text images/7.png has no word"):
        tokenization.encode(tokenizer, empty, length=8, words=4, row="images/7.png")
    with pytest.raises(UserError, match="text 1 has no word"):
        tokenization.encode_many(tokenizer, ["Clear.", empty], 8, 4)


def test_a_pickled_tokenizer_says_the_same(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    ours = tokenization.encode(tokenizer, ONE, length=24, words=12)
    theirs = tokenization.encode(other, ONE, length=24, words=12)
    assert all((ours[k] == theirs[k]).all() for k in ours)


def test_a_folder_saved_by_transformers_says_the_same(tokenizer, vocab, tmp_path):
    from transformers import BertTokenizer

    BertTokenizer.from_pretrained(str(vocab)).save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").exists()
    other = tokenization.load_tokenizer(str(tmp_path))
    assert (other.size, other.cls, other.sep) == (tokenizer.size, tokenizer.cls, tokenizer.sep)
    ours = tokenization.encode(tokenizer, ONE, length=24, words=12)
    theirs = tokenization.encode(other, ONE, length=24, words=12)
    assert all((ours[k] == theirs[k]).all() for k in ours)


def test_a_tokenizer_that_is_nowhere_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tokenizer .*absent.* could not be fetched"):
        tokenization.load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "vocab.txt").write_text("heart\n")
    with pytest.raises(UserError, match=r"does not begin with \[PAD\]"):
        tokenization.load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nheart\n")
    with pytest.raises(UserError, match="its vocabulary did not load"):
        tokenization.load_tokenizer(str(tmp_path))

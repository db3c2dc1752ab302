"""Sentences, pieces and words of a text."""

import json
import pickle
import shutil

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

    saved = BertTokenizer.from_pretrained(str(vocabulary_folder), do_lower_case=True)
    saved.save_pretrained(str(tmp_path))
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


def test_code_beside_a_tokenizer_does_not_run(tokenizer, vocabulary_folder, tmp_path, monkeypatch):
    """CXR-BERT's files name a class in a file beside them, which is BERT's under another name."""
    folder = shutil.copytree(vocabulary_folder, tmp_path / "cxr_bert")
    config = {
        "do_lower_case": True,
        "tokenizer_class": "CXRBertTokenizer",
        "auto_map": {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "cxr-bert", "auto_map": {"AutoConfig": "configuration_cxrbert.Config"}}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "configuration_cxrbert.py").write_text("raise SystemExit('this code ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on the terminal"))
    reloaded = tokenization.load_tokenizer(str(folder))
    assert reloaded.vocab_size == tokenizer.vocab_size
    chex.assert_trees_all_equal(tokenize(tokenizer, REPORT)[:4], tokenize(reloaded, REPORT)[:4])
    config["auto_map"] = {"AutoTokenizer": ["configuration_cxrbert.OtherTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains custom code"):
        tokenization.load_tokenizer(str(folder))


# Vocabularies whose ids are not 0 to N - 1: the embedding of an id beyond N would be NaN ----------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pieces: [*pieces, "heart"], r"piece 'heart' in lines 7 and 37; rename .* line 7"),
        (lambda pieces: [*pieces, "heart  "], "piece 'heart' in lines 7 and 37"),
        (lambda pieces: [*pieces, "[UNK]"], r"piece '\[UNK\]' in lines 2 and 37"),
        (lambda pieces: [*pieces[:9], "", *pieces[9:], ""], "piece '' in lines 10 and 38; delete"),
        (lambda pieces: [*pieces, *["##x" * 20] * 2], r"'##x##x##x##x##x##x##' in lines 37 and 38"),
    ],
)
def test_a_piece_in_two_lines_is_named(change, message, tmp_path):
    text = "\n".join(change(VOCABULARY.split())) + "\n"
    (tmp_path / "vocab.txt").write_text(text)
    for source in (tmp_path, tmp_path / "vocab.txt"):
        with pytest.raises(UserError, match=message):
            tokenization.load_tokenizer(str(source))
    # With a config beside it, the file is read by another library, and no less wrong.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UserError, match=message):
        tokenization.load_tokenizer(str(tmp_path))


def test_line_ends_and_rare_separators_are_no_repeated_pieces(tmp_path):
    """Windows' line ends, a last line without an end, and separators that end no line of a file."""
    pieces = [*VOCABULARY.split(), "\u2028", "\x0bx", "\x85y"]
    for end in ("\r\n", "\n"):
        (tmp_path / "vocab.txt").write_bytes(end.join(pieces).encode())
        loaded = tokenization.load_tokenizer(str(tmp_path))
        assert sorted(loaded.backend.get_vocab().values()) == list(range(loaded.vocab_size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\r".join(VOCABULARY.split()), r"does not begin with \[PAD\]; .*one piece per line"),
        ("[PAD]\n[UNK]\nno\neffusion\n", r"has no \[CLS\] and no \[SEP\]; use a BERT vocabulary"),
        ("", r"does not begin with \[PAD\]"),
    ],
)
def test_a_vocabulary_without_special_pieces_is_named(text, message, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    with pytest.raises(UserError, match=message):
        tokenization.load_tokenizer(str(tmp_path))


def test_a_vocabulary_in_another_encoding_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n[UNK]\n\xe4hnlich\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 12\); save it as UTF-8"):
        tokenization.load_tokenizer(str(tmp_path))


def save_backend(content, folder):
    """Writes a tokenizer.json, and the config that transformers wants beside it."""
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "sep", "pad", "unk")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heart": 50}, r"36 pieces, but no id 6 and an id 50 \('heart'\) .*add .* \[unused6\]"),
        ({"##a": 36}, r"no id 35 and an id 36 \('##a'\)"),
        # Older versions of tokenizers keep one of the two pieces, so that an id is missing.
        ({"heart": 5}, "has one id, 5, for '(the|heart)' and '(the|heart)'|no id 6 and an id 35"),
    ],
)
def test_ids_with_a_gap_or_twice_are_named(tokenizer, change, message, tmp_path):
    content = json.loads(tokenizer.backend.to_str())
    content["model"]["vocab"] |= change
    with pytest.raises(UserError, match=message):
        tokenization.load_tokenizer(save_backend(content, tmp_path))


def test_a_tokenizer_without_its_vocabulary_is_named(tokenizer, tmp_path):
    content = json.loads(tokenizer.backend.to_str())
    content["model"]["vocab"] = {}
    with pytest.raises(UserError, match="so its vocabulary did not load; use a folder"):
        tokenization.load_tokenizer(save_backend(content, tmp_path))


def test_the_id_of_an_added_piece_is_below_the_size(tokenizer, tmp_path):
    """Whatever id a file gives to an added piece, the library may number it itself."""
    content = json.loads(tokenizer.backend.to_str())
    piece = content["added_tokens"][0] | {"id": 99, "content": "[NEW]", "special": False}
    content["added_tokens"].append(piece)
    loaded = tokenization.load_tokenizer(save_backend(content, tmp_path))
    assert loaded.backend.token_to_id("[NEW]") == loaded.vocab_size - 1 == 36


def test_texts_in_another_script_are_refused_by_their_share_of_unknown_pieces():
    phantom = tokenization.load_tokenizer("phantom")
    remedy = "set config.data.tokenizer"

    def measure(*texts):
        return tokenization.check_known(phantom, texts, "the texts", remedy)

    assert measure("There is a small effusion on the left.") == 0.0 and measure() == 0.0
    assert 0 < measure("Kein Erguss. Das Herz ist vergr\u00f6\u00dfert.") < 0.1
    for text in ("\u5de6\u4fa7\u80f8\u8154\u79ef\u6db2\u3002", "\u0627\u0644\u0635\u062f\u0631"):
        with pytest.raises(
            UserError, match="100% of the pieces of the texts are unknown .*phantom"
        ):
            measure(text)
        with pytest.raises(UserError, match=f"; {remedy}"):
            measure("Effusion.", text)
        assert measure(*["There is a small effusion on the left."] * 9, text) < 0.2


def test_many_texts_are_tokenised_in_parts_that_are_not_remembered(tokenizer, monkeypatch):
    texts = [f"No effusion in zone {number}." for number in range(7)]
    whole = tokenization.tokenize_batch(tokenizer, texts, 16, 12)
    remembered = len(tokenizer._cache)
    monkeypatch.setattr(tokenization, "STACKED_TEXTS", 3)
    others = [text.replace("zone", "area") for text in texts]
    assert tokenization.check_known(tokenizer, others, "texts", "") < 0.3
    assert len(tokenization.tokenize_batch(tokenizer, others, 16, 12).tokens) == 7
    assert len(tokenizer._cache) == remembered
    parts = tokenization.tokenize_batch(tokenizer, texts, 16, 12)
    for name in ("tokens", "word_index", "word_id", "sentence"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    with pytest.raises(UserError, match="text 5 has no word"):
        tokenization.tokenize_batch(tokenizer, [*texts[:5], "...", texts[6]], 16, 12)


def test_words_are_returned_as_they_are_written(tokenizer):
    sentence = "Small LEFT-sided effusion, 1.5 cm."
    words = tokenizer.split_words(sentence)
    assert words == ("Small", "LEFT", "sided", "effusion", "1", "5", "cm")
    assert len(words) == len(tokenizer.tokenize_sentences(sentence)[0].word_id)

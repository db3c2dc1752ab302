"""Reports as ids: how they are cleaned, counted, encoded and decoded."""

import pytest

from plan_jax.heads.vocabulary import (
    END,
    PAD,
    UNKNOWN,
    build_vocabulary,
    clean_report,
    to_sentences,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("...  ___ 1.", ""),
        ("No acute-on-chronic 'change'; T1-T2.", "no acute-on-chronic change t1-t2 ."),
        ("1) Clear.\n 2) Stable", "clear . stable ."),
        ("Seen in 2. Then 10 more.", "seen in 2 . then 10 more ."),
        ("Up to 3.2cm.Left", "up to 3.2 cm left ."),
    ],
)
def test_reports_are_cleaned(text, expected):
    assert clean_report(text) == expected
    assert clean_report(expected) == expected


@pytest.mark.parametrize(
    ("text", "iu", "mimic"),
    [
        # Text, and what the code of R2Gen makes of it for each of its two datasets.
        (
            "1. Heart, large.. 2. ___ in\nL1. No effusion/oedema (2.5 cm) x-ray",
            "heart large .  in\nlno effusionoedema 25 cm x-ray .",
            "heart large .  in lno effusionoedema 25 cm x-ray .",
        ),
        # The number of a list after a line break, and one mark that another replacement makes.
        (
            "1. Clear.\n2. Stable. 3. 4. Done.",
            "clear\n2 . stable . done .",
            "clear . stable . done .",
        ),
        ("A. . B.", "a .  . b .", "a .  . b ."),  # a sentence without words is kept
        ("a" + 9 * "." + " b", "a . b .", "a . b ."),
        ("5. 6. x", "5 . 6 . x .", "5 . 6 . x ."),
        (" 2. 2. x", " . x .", " . x ."),
        ('" No "edge" <5 @ [x]', "no edge 5  x .", "no edge 5  x ."),
        (" ", "", ""),
    ],
)
def test_reports_are_cleaned_as_published(text, iu, mimic):
    assert clean_report(text, "published_iu") == iu
    assert clean_report(text, "published_mimic") == mimic


def test_decoding_inverts_encoding():
    vocabulary = build_vocabulary(["no nodule .", "no <unk> nodule ."], 2)
    assert vocabulary.words == (".", "no", "nodule") and len(vocabulary) == 7
    ids = vocabulary.encode("no big nodule .", 7)
    assert ids.tolist() == [5, UNKNOWN, 6, 4, END, PAD, PAD]
    assert vocabulary.decode(ids) == "no <unk> nodule ."
    cut = vocabulary.encode("no big nodule .", 4)
    assert END not in cut and vocabulary.decode(cut) == "no <unk> nodule ."
    assert vocabulary.mask_unknown("no big nodule .", 2) == "no <unk>"
    assert to_sentences("no nodule . <unk> . .") == "No nodule. <unk>."

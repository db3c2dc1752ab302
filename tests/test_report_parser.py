"""Raw reports to triplets: denial, doubt, lists, sides, zones, sections, labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data import report_parser
from plan_jax.data.phantom import Difficulty, write_report
from plan_jax.data.phantom.anatomy import ANATOMY
from plan_jax.data.phantom.report_text import NAMES
from plan_jax.data.report_parser import (
    extract_triplets,
    find_regions,
    label_findings,
    parse_report,
)
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

SIDED_REGIONS = {f"{side} {part}" for side in ("left", "right") for part in ("lung", "chest")}
REGIONS = {*ANATOMY, *SIDED_REGIONS, "both lungs", "chest"}


FULL_NAMES = {"effusion": "pleural effusion", "oedema": "pulmonary oedema"}


def existence_of_findings(text):
    """Returns the existence of each finding, by the last claim about it."""
    return {finding: value for _, finding, value in extract_triplets(text)}


def parse_expected(line):
    """Returns `effusion 0 nodule 1` as full names and values."""
    words = line.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {FULL_NAMES.get(name, name): int(value) for name, value in pairs}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion, nodule or oedema.", "effusion 0 nodule 0 oedema 0"),
        ("There is no evidence of pneumothorax.", "pneumothorax 0"),
        ("Negative for pneumothorax, effusion, or edema.", "pneumothorax 0 effusion 0 oedema 0"),
        ("Lungs are free of consolidation.", "consolidation 0"),
        ("Effusion has resolved.", "effusion 0"),
        ("Effusion has nearly completely resolved.", "effusion 1"),
        ("Previously seen effusion is no longer seen.", "effusion 0"),
        ("A nodule is not identified.", "nodule 0"),
        ("Pneumonia is unlikely.", "pneumonia 0"),
        ("Heart is not enlarged.", "cardiomegaly 0"),
        ("No focal opacity to suggest pneumonia.", "opacity 0 pneumonia 0"),
        ("No definite or suspicious nodule.", "nodule 0"),
        ("Cardiomegaly without edema.", "cardiomegaly 1 oedema 0"),
        ("No pneumothorax but small effusion.", "pneumothorax 0 effusion 1"),
        ("No nodule; effusion on the left.", "nodule 0 effusion 1"),
        ("No effusion is seen, and the mass is stable.", "effusion 0 mass 1"),
        ("No edema, however there is a nodule.", "oedema 0 nodule 1"),
        ("Mass, no nodule.", "mass 1 nodule 0"),
    ],
)
def test_denial(text, expected):
    assert existence_of_findings(text) == parse_expected(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Possible nodule.", "nodule -1"),
        ("Probable edema, definite effusion without doubt.", "oedema -1 effusion -1"),
        (
            "Opacity may represent atelectasis or pneumonia.",
            "opacity 1 atelectasis -1 pneumonia -1",
        ),
        ("Pneumonia cannot be excluded.", "pneumonia -1"),
        ("We cannot exclude a small pneumothorax.", "pneumothorax -1"),
        ("There is a nodule, and effusion cannot be excluded.", "nodule 1 effusion -1"),
        ("Fracture is suspected.", "fracture -1"),
        ("Questionable scar.", "scar -1"),
        ("Opacity suggestive of edema.", "opacity 1 oedema -1"),
        ("Opacity ?pneumonia.", "opacity 1 pneumonia -1"),
        ("Opacity ? pneumonia.", "opacity 1 pneumonia -1"),
        ("Pneumonia?", "pneumonia -1"),
        ("Atelectasis versus infiltrate.", "atelectasis -1 infiltration -1"),
        ("Scar or atelectasis.", "scar -1 atelectasis -1"),
        ("Scar and/or atelectasis.", "scar 1 atelectasis 1"),
    ],
)
def test_doubt(text, expected):
    assert existence_of_findings(text) == parse_expected(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No change in the effusion.", "effusion 1"),
        ("No significant interval increase in the nodule.", "nodule 1"),
        ("Not only effusion but also pneumothorax.", "effusion 1 pneumothorax 1"),
        ("Mass without significant change.", "mass 1"),
        ("History of pneumonia.", ""),
        ("Evaluate for pneumothorax.", ""),
        ("Midline trachea, bone density preserved.", ""),
        ("Consolidation. Enlarged heart.", "consolidation 1 cardiomegaly 1"),
        ("Borderline cardiomegaly.", "cardiomegaly 1"),
        ("Subcutaneous emphysema.", ""),
    ],
)
def test_expressions_that_only_resemble_denials_or_findings(text, expected):
    assert existence_of_findings(text) == parse_expected(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart size is normal.", [("heart", "cardiomegaly", 0)]),
        ("Normal cardiac silhouette.", [("heart", "cardiomegaly", 0)]),
        ("The lungs are not clear.", []),
        ("The heart is upper limits of normal in size.", []),
        (
            "Left mid zone is clear.",
            [
                ("left mid zone", "consolidation", 0),
                ("left mid zone", "nodule", 0),
            ],
        ),
        (
            "Heart is large, lungs are clear.",
            [
                ("heart", "cardiomegaly", 1),
                *(("both lungs", k, 0) for k in ("consolidation", "nodule")),
            ],
        ),
        ("The right costophrenic angle is sharp.", [("right lung", "pleural effusion", 0)]),
        (
            "Normal heart size and pulmonary vascularity.",
            [
                ("heart", "cardiomegaly", 0),
                ("both lungs", "pulmonary oedema", 0),
            ],
        ),
    ],
)
def test_normality_is_a_denial(text, expected):
    assert list(extract_triplets(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Effusion at the left base.", ["left lung"]),
        ("Left lower lobe consolidation.", ["left lower zone"]),
        ("Retrocardiac opacity.", ["left lower zone"]),
        ("Nodule in the lingula.", ["left mid zone"]),
        ("Right middle lobe mass.", ["right mid zone"]),
        ("Right midlung mass.", ["right mid zone"]),
        ("Mass in the apex of the left lung.", ["left upper zone"]),
        ("Bibasilar atelectasis.", ["left lower zone", "right lower zone"]),
        (
            "Opacity in the left upper and right lower lobes.",
            ["left upper zone", "right lower zone"],
        ),
        ("Scar in the right mid and lower zones.", ["right mid zone", "right lower zone"]),
        ("Bilateral effusions, left greater than right.", ["both lungs"]),
        ("Left effusion and scar.", ["left lung", "left lung"]),
        ("Scar and mass in the left lower zone.", ["left lower zone", "left lower zone"]),
        ("Scar in the left base with right effusion.", ["left lower zone", "right lung"]),
        ("Scar in the left base without nodule.", ["left lower zone", "both lungs"]),
        ("Right lung scar and left lower lobe nodule.", ["right lung", "left lower zone"]),
        ("In the right upper zone there is a mass.", ["right upper zone"]),
        ("Left-sided pacemaker.", ["left chest"]),
        ("A nodule.", ["chest"]),
        ("Oedema.", ["both lungs"]),
        ("Marked left-sided cardiac enlargement.", ["heart"]),
        ("Mediastinal calcification.", ["chest"]),
    ],
)
def test_sides_and_zones(text, expected):
    assert [region for region, _, _ in extract_triplets(text)] == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Both lungs are clear.", ("left lung", "right lung")),
        ("Left base opacity, normal cardiac silhouette.", ("left lower zone", "heart")),
        ("Cardiomegaly.", ("heart",)),
        ("The left hilum is prominent.", ("left lung",)),
        ("The mediastinum is normal.", ("left lung", "right lung")),
        ("Right costophrenic angle is sharp.", ("right lung",)),
        ("Left effusion.", ("left lung",)),
        ("A nodule.", ("left lung", "right lung")),
        ("Pacemaker over the left chest.", ("left lung",)),
        ("No acute fracture. Clinical correlation is advised.", ()),
        ("The upper abdomen and lower thoracic spine are unremarkable.", ()),
        ("", ()),
    ],
)
def test_regions_of_a_sentence(sentence, expected):
    assert find_regions(sentence) == expected


RAW_REPORT = """FINAL REPORT
 INDICATION:  Cough, evaluate ?pneumonia. Prior effusion.

 FINDINGS:  The lungs are clear. Left
 effusion is small.

 IMPRESSION:
 1. No pneumothorax."""


def test_sections_that_are_not_about_the_image_are_skipped():
    statements = parse_report(RAW_REPORT)
    assert {statement.finding: statement.existence for statement in statements} == {
        "consolidation": 0,
        "nodule": 0,
        "pleural effusion": 1,
        "pneumothorax": 0,
    }
    sentences = split_sentences(RAW_REPORT)
    assert all(
        sentences[statement.sentence_index] == statement.sentence for statement in statements
    )
    text = "CONCLUSION: Mass. REASON FOR EXAM: Nodule. OPINION: Effusion."
    assert existence_of_findings(text) == {"mass": 1, "pleural effusion": 1}


def test_labels_follow_the_given_names_and_the_strongest_claim():
    text = "Interstitial oedema. No mass. Possible mass. Plate atelectasis. No nodule. Nodule?"
    names = ("edema", "pulmonary oedema", "Edema", "mass", "atelectasis", "nodule", "hernia")
    labels = label_findings(text, names)
    assert labels.dtype == np.int8 and labels.tolist() == [1, 1, 1, -1, 1, -1, 0]
    assert label_findings("Possible nodule. Nodule. No nodule.", ("nodule",)).tolist() == [1]
    assert label_findings("Mass.", ()).shape == (0,)
    with pytest.raises(UserError, match="'gout' is unknown; use one of consolidation, nodule"):
        label_findings("Mass.", ("gout",))


def test_every_asg_tag_and_every_name_of_the_phantom_is_known():
    assert len(set(report_parser.ASG_TAGS)) == 40
    for name in report_parser.ASG_TAGS:
        assert label_findings(f"There is {name}.", (name,)).tolist() == [1], name
    for kind, names in NAMES.items():
        for name, _ in names:
            assert label_findings(f"{name} is seen.", (kind,)).tolist() == [1], name


@pytest.mark.parametrize("text", ["", "\n \t", "...", "___", "\U0001f600 \u0130\u00df", "5.2 cm"])
def test_texts_without_words_of_the_field_claim_nothing(text):
    assert parse_report(text) == () and extract_triplets(text) == ()
    assert not label_findings(text, ("nodule",)).any()


def test_unicode_dashes_case_and_line_breaks_do_not_matter():
    text = "LEFT\u2010SIDED\n  EFFUSION"
    assert extract_triplets(text) == (("left lung", "pleural effusion", 1),)


def test_a_very_long_sentence_is_parsed_in_parts():
    text = "no nodule, but effusion on the left; " * 300 + "x" * 5_000
    expected = {("both lungs", "nodule", 0), ("left lung", "pleural effusion", 1)}
    assert expected <= set(extract_triplets(text))
    assert set(find_regions(text)) <= set(ANATOMY)


@given(st.lists(st.sampled_from(range(60)), min_size=1, max_size=3), st.randoms())
def test_the_order_of_sentences_does_not_change_the_claims(indices, rng):
    sentences = [
        sentence for index in indices for sentence in split_sentences(write_report(3, index)[2])
    ]
    shuffled = rng.sample(sentences, len(sentences))
    claims = [set(extract_triplets(" ".join(order))) for order in (sentences, shuffled)]
    assert claims[0] == claims[1]


@given(st.text(alphabet="no, left;lung? effusion. and\n", max_size=80))
def test_any_text_gives_known_regions_findings_and_values(text):
    for statement in parse_report(text):
        assert statement.region in REGIONS and statement.finding in report_parser.FINDINGS
        assert statement.existence in (-1, 0, 1)
    assert set(find_regions(text)) <= set(ANATOMY)


@pytest.mark.parametrize(("hard", "count"), [(False, 150), (True, 80)], ids=("standard", "hard"))
def test_reports_of_phantoms_are_parsed_almost_without_error(hard, count):
    num_correct = num_extracted = num_stated = 0
    for index in range(count):
        *_, text, triplets = write_report(11, index, Difficulty(hard=hard))
        stated = set(triplets)
        extracted = {triplet for triplet in extract_triplets(text) if triplet[1] in NAMES}
        num_correct += len(extracted & stated)
        num_extracted += len(extracted)
        num_stated += len(stated)
    assert num_correct >= 0.99 * num_extracted and num_correct >= 0.99 * num_stated
    assert num_stated > 500

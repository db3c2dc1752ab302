"""Raw reports to triplets: denial, doubt, lists, sides, zones, sections, tags, and a bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data import report_parser
from plan_jax.data.phantom import write_report
from plan_jax.data.phantom.anatomy import ANATOMY
from plan_jax.data.phantom.report_text import NAMES
from plan_jax.data.report_parser import parse, regions, sections, tags, triplets
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

SIDED = {f"{side} {part}" for side in ("left", "right") for part in ("lung", "chest")}
REGIONS = {*ANATOMY, *SIDED, "both lungs", "chest"}


def existence(text):
    """Each finding's existence, the last that is said of it."""
    return {finding: value for _, finding, value in triplets(text)}


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
    assert existence(text) == named(expected)


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
    assert existence(text) == named(expected)


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
def test_what_only_looks_like_denial_or_finding(text, expected):
    assert existence(text) == named(expected)


def named(line):
    """`effusion 0 nodule 1` -> canonical names and values."""
    words = line.split()
    long = {"effusion": "pleural effusion", "oedema": "pulmonary oedema"}
    return {long.get(n, n): int(v) for n, v in zip(words[::2], words[1::2], strict=True)}


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
def test_what_is_normal_denies(text, expected):
    assert list(triplets(text)) == expected


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
    assert [region for region, _, _ in triplets(text)] == expected


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
    assert regions(sentence) == expected


RAW = """FINAL REPORT
 INDICATION:  Cough, evaluate ?pneumonia. Prior effusion.

 FINDINGS:  The lungs are clear. Left
 effusion is small.

 IMPRESSION:
 1. No pneumothorax."""


def test_sections_and_what_is_not_about_the_image():
    found = sections(RAW)
    assert list(found) == ["", "indication", "findings", "impression"]
    assert found[""] == "FINAL REPORT"
    assert found["impression"] == "1. No pneumothorax."
    assert {s.finding: s.existence for s in parse(RAW)} == {
        "consolidation": 0,
        "nodule": 0,
        "pleural effusion": 1,
        "pneumothorax": 0,
    }
    sentences = split_sentences(RAW)
    assert all(sentences[s.index] == s.sentence for s in parse(RAW))
    assert sections("No header at all.") == {"": "No header at all."}
    assert sections("Findings: Mass. CONCLUSION: Mass. OPINION: Scar.") == {
        "findings": "Mass.",
        "impression": "Mass.\n\nScar.",
    }


def test_tags_follow_the_names_asked_for_and_the_strongest_claim():
    text = "Interstitial oedema. No mass. Possible mass. Plate atelectasis. No nodule. Nodule?"
    names = ("edema", "pulmonary oedema", "Edema", "mass", "atelectasis", "nodule", "hernia")
    found = tags(text, names)
    assert found.dtype == np.int8 and found.tolist() == [1, 1, 1, -1, 1, -1, 0]
    assert tags("Possible nodule. Nodule. No nodule.", ("nodule",)).tolist() == [1]
    assert tags("Mass.", ()).shape == (0,)
    with pytest.raises(UserError, match="'gout' is unknown"):
        tags("Mass.", ("gout",))


def test_every_asg_tag_and_every_kind_of_the_phantom_has_words():
    assert len(set(report_parser.ASG_TAGS)) == 40
    for name in report_parser.ASG_TAGS:
        assert tags(f"There is {name}.", (name,)).tolist() == [1], name
    for kind, names in NAMES.items():
        for name, _ in names:
            assert tags(f"{name} is seen.", (kind,)).tolist() == [1], name


@pytest.mark.parametrize("text", ["", "\n \t", "...", "___", "\U0001f600 \u0130\u00df", "5.2 cm"])
def test_what_claims_nothing(text):
    assert parse(text) == () and triplets(text) == () and not tags(text, ("nodule",)).any()


def test_unicode_dashes_case_and_wrapping_do_not_matter():
    assert triplets("LEFT\u2010SIDED\n  EFFUSION") == (("left lung", "pleural effusion", 1),)


def test_a_very_long_sentence_is_read_in_pieces():
    text = "no nodule, but effusion on the left; " * 300 + "x" * 5_000
    assert {("both lungs", "nodule", 0), ("left lung", "pleural effusion", 1)} <= set(
        triplets(text)
    )
    assert set(regions(text)) <= set(ANATOMY)


@given(st.lists(st.sampled_from(range(60)), min_size=1, max_size=3), st.randoms())
def test_the_order_of_sentences_does_not_change_what_is_claimed(indices, rng):
    sentences = [s for i in indices for s in split_sentences(write_report(3, i)[2])]
    shuffled = rng.sample(sentences, len(sentences))
    assert set(triplets(" ".join(sentences))) == set(triplets(" ".join(shuffled)))


@given(st.text(alphabet="no, left;lung? effusion. and\n", max_size=80))
def test_any_text_gives_known_regions_findings_and_values(text):
    for statement in parse(text):
        assert statement.region in REGIONS and statement.finding in report_parser.FINDINGS
        assert statement.existence in (-1, 0, 1)
    assert set(regions(text)) <= set(ANATOMY)


def test_phantoms_are_read_as_they_were_written():
    right = ours = theirs = 0
    for index in range(150):
        *_, text, claims = write_report(11, index)
        found = {t for t in triplets(text) if t[1] in NAMES}
        right += len(found & set(claims))
        ours, theirs = ours + len(found), theirs + len(set(claims))
    assert right >= 0.99 * ours and right >= 0.99 * theirs and theirs > 500

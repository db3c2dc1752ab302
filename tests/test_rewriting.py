"""False variants of reports: what they change, and that on phantoms each of them is false."""

import pytest

from plan_jax.data import phantom, report_parser
from plan_jax.data.phantom import report_text
from plan_jax.data.phantom.findings import FINDINGS
from plan_jax.data.report_parser import rewriting
from plan_jax.data.report_parser.places import expand_regions
from plan_jax.types import VARIANT_KINDS

NUM_STUDIES = 150


def variants(text, kind):
    return [variant.text for variant in rewriting.find_variants(text, kind)]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("laterality", "Small left effusion. No nodule.", ["Small right effusion. No nodule."]),
        ("laterality", "Right-sided effusion.", ["Left-sided effusion."]),
        ("laterality", "Right nodule. Left nodule.", []),
        ("laterality", "No effusion on the left.", []),  # its mirror image may be true too
        ("negation", "The heart is enlarged.", ["The heart is not enlarged."]),
        ("negation", "There is a nodule.", ["There is no nodule."]),
        ("negation", "A nodule is seen.", ["A nodule is not seen."]),
        ("negation", "Effusion with a nodule.", ["No effusion with a nodule."]),
        ("negation", "No evidence of effusion.", ["Effusion."]),
        ("negation", "No effusion or nodule is seen.", ["Effusion and nodule is seen."]),
        ("negation", "No right effusion. Left effusion.", ["No right effusion. No left effusion."]),
        ("negation", "FINDINGS: Large mass.", ["FINDINGS: No large mass."]),
        ("negation", "INDICATION: Pneumonia. FINDINGS: Mass.", None),
        ("negation", "Lungs are clear.", []),
        ("negation", "Possible nodule.", []),
        ("severity", "A small effusion.", ["A large effusion."]),
        ("severity", "A large effusion.", ["A small effusion."]),
        ("severity", "A minor effusion.", ["An extensive effusion."]),
        ("severity", "AN EXTENSIVE EFFUSION.", ["A MINOR EFFUSION."]),
        ("severity", "The heart is mildly enlarged.", ["The heart is markedly enlarged."]),
        ("severity", "No large effusion.", []),  # nor is there a small one, perhaps
        ("severity", "Large patient, nodule.", []),
        ("severity", "A moderate effusion.", []),
        ("region", "Nodule in the left upper zone.", ["Nodule in the left lower zone."]),
        ("region", "Atelectasis at both bases.", ["Atelectasis at both apices."]),
        ("region", "Nodule in the left upper zone. Nodule in the left lower zone.", []),
        ("region", "Effusion at the left base.", []),  # wherever an effusion is, it is in the lung
    ],
)
def test_a_variant_differs_in_one_claim(kind, text, expected):
    found = variants(text, kind)
    if expected is None:
        assert found and all(variant.startswith("INDICATION: Pneumonia.") for variant in found)
    else:
        assert found == expected


def test_white_space_and_other_sentences_stay_as_they_are():
    text = "Lungs  are\nclear.\n\nSmall effusion\n on the left.  Stable."
    assert variants(text, "severity") == [
        "Lungs  are\nclear.\n\nLarge effusion\n on the left.  Stable."
    ]


@pytest.mark.parametrize("text", ["", "   ", "nan", "?", "\n\n", "Ünïcödé ☃ 日本語.", "no no no"])
@pytest.mark.parametrize("kind", VARIANT_KINDS)
def test_a_text_without_claims_has_no_variant(text, kind):
    assert rewriting.find_variants(text, kind) == ()


def test_only_findings_of_the_dataset_count():
    text = "No fracture. No nodule."
    assert len(rewriting.find_variants(text, "negation")) == 2
    assert len(rewriting.find_variants(text, "negation", ("COVID-19",))) == 2
    (variant,) = rewriting.find_variants(text, "negation", ("Nodule", "COVID-19"))
    assert variant.text == "No fracture. Nodule."


def test_an_unknown_kind_is_an_error():
    with pytest.raises(KeyError):
        rewriting.find_variants("Nodule.", "colour")


def claims_of(text):
    return set(report_parser.extract_triplets(text))


def is_true(claim, findings):
    """Returns whether a phantom with these findings has what a stated claim says."""
    region, kind, _ = claim
    for finding in findings:
        own = report_text.region_of(finding)
        if finding.kind == kind and (
            region == "chest" or set(expand_regions([region])) <= set(expand_regions([own]))
        ):
            return True
        # A report may name the whole lung of a finding of one zone.
        if finding.kind == kind and region == f"{finding.side} lung":
            return True
    return False


def test_every_variant_of_a_phantom_is_false_of_it():
    """The findings that were drawn decide, not the report that was written about them."""
    counts = dict.fromkeys(("laterality", "stated", "denied", "severity", "region"), 0)
    for index in range(NUM_STUDIES):
        _, findings, text, _ = phantom.write_report(3, index)
        present = {finding.kind for finding in findings}
        for kind in VARIANT_KINDS:
            for variant in rewriting.find_variants(text, kind, FINDINGS):
                counts[variant.part] += 1
                changed = claims_of(variant.text) - claims_of(text)
                if variant.part in ("laterality", "region"):
                    stated = [claim for claim in changed if claim[2] == 1]
                    assert any(not is_true(claim, findings) for claim in stated), variant.text
                elif variant.part == "stated":
                    assert set(variant.findings) <= present, variant.text
                    assert all(claim[2] == 0 for claim in changed), variant.text
                elif variant.part == "denied":
                    assert not set(variant.findings) & present, variant.text
                else:
                    assert not changed
                    assert any(not is_grade_true(variant, text, f) for f in findings), variant.text
    assert min(counts.values()) > 20, counts


def is_grade_true(variant, text, finding):
    """Returns whether a variant's new word of size is one of the finding's own level."""
    if finding.kind not in variant.findings:
        return True
    old, new = (report.lower().split() for report in (text, variant.text))
    words = {b.strip(".,") for a, b in zip(old, new, strict=True) if a != b} - {"a", "an"}
    own = report_text.GRADES[finding.kind][finding.level]
    own_words = {word for grade in own for word in grade.split()}
    heart = ("mildly", "moderately", "markedly")[finding.level]
    return words <= own_words | {heart}

"""The rules by which a MIMIC-CXR report is split into sections, each by literal reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data.sections import mimic
from plan_jax.data.sections.mimic import HAND_LISTED_STUDIES, normalise_name, split_report

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.

 COMPARISON:  ___.

 FINDINGS:

 The lungs are clear.  No effusion:
 none was there before.

 IMPRESSION:

 1. No acute disease.
"""


def split(text, **options):
    """Returns the sections of a report but for the report itself."""
    sections = split_report(text, **options)
    assert sections.pop("report") == text
    return sections


def test_a_report_is_split_into_its_sections():
    assert split(REPORT) == {
        "preamble": "FINAL REPORT",
        "examination": "CHEST (PA AND LAT)",
        "indication": "___ year old woman with cough.",
        "comparison": "___.",
        "findings": "The lungs are clear.  No effusion:\n none was there before.",
        "impression": "1. No acute disease.",
    }


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("\n NOTE: Text.", "note"),
        ("\n  NOTE : Text.", "note"),  # more spaces are part of the name, which is stripped
        ("\n A (B), C/D-E: Text.", "a (b), c/d-e"),
        ("\n NOTE:\tText.", "note"),
        ("\n NOTE:\nText.", "note"),
        ("\nNOTE: Text.", None),  # no space
        ("\n\tNOTE: Text.", None),
        ("\n NOTE:Text.", None),  # nothing after the colon
        ("\n Note: Text.", None),
        ("\n NOTE 2: Text.", None),
        ("\n : Text.", None),
        (" NOTE: Text.", None),  # no line before it
    ],
)
def test_what_is_a_header(line, name):
    sections = split(f"Before.{line}")
    if name is None:
        assert sections == {"full report": f"Before.{line}".strip()}
    else:
        assert sections == {"preamble": "Before.", name: "Text."}


def test_a_header_right_after_a_lone_header_is_swallowed():
    assert split("a\n HISTORY:\n DATE: today\n NOTE: b") == {
        "preamble": "a",
        "history": "DATE: today",
        "note": "b",
    }
    # With text on its own line, the next line's header counts.
    assert split("a\n HISTORY: \n DATE: today") == {"preamble": "a", "date": "today"}
    # Without any later line break, the search begins at the section's text, and finds nothing.
    assert split("a\n HISTORY: b") == {"preamble": "a", "history": "b"}


@pytest.mark.parametrize(
    ("header", "name"),
    [
        # By the table.
        ("Conclusion", "impression"),
        ("FINDINGS/ IMPRESSION", "impression"),
        (" CHEST, TWO VIEWS ", "findings"),
        ("REFERENCE EXAM", "comparison"),
        ("IDICATION", "indication"),
        ("NDICATION", "impression"),
        ("PFI", "history"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("WETREAD", "wet read"),
        ("EXAM", "examination"),
        # By a word in it, the first of them that fits.
        ("FINDINGS AND IMPRESSIONS", "impression"),
        ("HISTORY OF FINDINGS", "findings"),
        ("HISTORY, COMPARISON", "history"),
        ("SECOND ADDENDUM", "addendum"),
        # By a title of a study.
        ("PORTABLE AP", "findings"),
        ("CHEST (PA AND LAT)", "findings"),
        ("RIGHT RIBS", "findings"),
        # By nothing.
        ("NOTE", "note"),
    ],
)
def test_names_of_sections_are_normalised(header, name):
    assert normalise_name(header) == name


def test_the_last_section_of_a_name_counts():
    text = "a\n IMPRESSION: One.\n FINDINGS: Two.\n CONCLUSION: Three.\n FINDINGS:\n"
    assert split(text) == {"preamble": "a", "impression": "Three.", "findings": "Two."}
    # Of other names the last one counts even if it is empty.
    assert split("a\n DATE: One.\n DATE: \n FINDINGS: b") == {"preamble": "a", "findings": "b"}


def test_without_findings_and_impression_the_last_section_is_cut():
    text = "a\n COMPARISON: None.\n \n The lungs are clear.\n \n No effusion.\n"
    assert split(text) == {
        "preamble": "a",
        "comparison": "None.",
        "last_paragraph": "The lungs are clear.\n \n No effusion.",
    }
    # An empty impression is none, and the section before it is the last one.
    assert split("a\n DATE: x\n \n b\n IMPRESSION:\n") == {
        "preamble": "a",
        "date": "x",
        "last_paragraph": "b",
    }
    assert split("One.\n \n Two.") == {"full report": "One.", "last_paragraph": "Two."}
    # A blank line without a space does not end a paragraph.
    assert split("One.\n\n Two.") == {"full report": "One.\n\n Two."}
    assert split("a\n FINDINGS: b\n \n c") == {"preamble": "a", "findings": "b\n \n c"}


def test_hand_listed_studies_are_an_option():
    assert len(HAND_LISTED_STUDIES) == 54
    text = "a\n TECHNIQUE: Old.\n TECHNIQUE: Lungs are clear.\n FINDINGS: None.\n"
    by_rule = {"preamble": "a", "technique": "Lungs are clear.", "findings": "None."}
    assert split(text, study_id="s59279892") == by_rule
    assert split(text, study_id="s50000000", hand_listed=True) == by_rule
    assert split(text, study_id="s59279892", hand_listed=True) == {
        "preamble": "a",
        "technique": "Lungs are clear.",
        "impression": "Lungs are clear.",
    }
    digits = "".join(chr(ord("a") + index % 26) for index in range(400))
    by_span = split_report(digits, "s51410602", hand_listed=True)
    assert by_span["impression"] == digits[47:320]
    # Eight of them report nothing.
    nothing = split("a\n FINDINGS: See below.\n", study_id="s58235663", hand_listed=True)
    assert nothing == {"preamble": "a"}


def test_line_breaks_of_any_kind_are_one_character():
    for line_break in ("\r\n", "\r"):
        assert split_report(REPORT.replace("\n", line_break)) == split_report(REPORT)


def test_a_header_named_report_does_not_hide_the_report():
    text = "a\n REPORT: b\n"
    assert split_report(text) == {"preamble": "a", "report": text}


@given(
    st.lists(
        st.sampled_from(
            ["\n IMPRESSION: ", "\n DATE:\n", "\n \n", "\n", " ", "Clear.", "\n CHEST: "]
        )
    )
)
def test_no_sentence_of_a_report_is_lost(pieces):
    text = "".join(pieces)
    sections = mimic._find_sections(text)
    assert sum(section.count("Clear.") for _, section in sections) == text.count("Clear.")

"""Caption rules, each by literal sections."""

import time

import numpy as np
import pytest

from plan_jax.data.sections.captions import CAPTIONS, list_usable, make_caption
from plan_jax.data.sections.mimic import split_report
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import UserError

SECTIONS = {
    "comparison": "None.",
    "findings": "The nodule is 1.5 cm.\nClear. Na\u00efve caf\u00e9 sign",
    "impression": "1. No effusion.\n 2. Stable nodule.",
    "last_paragraph": "Never used.",
}


def draw(rule, sections):
    """Returns the captions of many draws."""
    rng = np.random.default_rng(0)
    return {make_caption(rule, sections, rng) for _ in range(60)}


def test_mgca_cleans_impression_and_findings():
    caption = make_caption("mgca", SECTIONS)
    assert caption.split("\n\n") == [
        "no effusion",
        "stable nodule",
        "the nodule is",  # 1. is taken as the number of an item
        "5 cm",
        "nave caf sign",
    ]
    assert split_sentences(caption) == caption.split("\n\n")
    assert draw("mgca", SECTIONS) == {caption}
    assert make_caption("mgca", {"findings": "Clear lungs."}) == ""
    assert make_caption("mgca", {"findings": "No effusion seen"}) == "no effusion seen"
    # Three words, but each sentence has one.
    assert make_caption("mgca", {"findings": "One. Two. Three."}) == ""
    # Words are counted before letters outside ASCII are dropped, and the rest after it.
    assert make_caption("mgca", {"findings": "\u03b1 \u03b2. a b"}) == ""


def test_gloria_draws_a_sentence_of_the_impression():
    assert draw("gloria", SECTIONS) == {"no effusion", "stable nodule"}
    assert make_caption("gloria", SECTIONS) == "no effusion\n\nstable nodule"
    assert make_caption("gloria", {"impression": "Clear lungs."}) == "clear lungs"
    assert make_caption("gloria", {"findings": "Clear lungs."}) == ""


def test_convirt_draws_a_sentence_of_the_report():
    sentences = [
        "The nodule is 1.5 cm.",
        "Clear.",
        "Na\u00efve caf\u00e9 sign",
        "1. No effusion.",
        "2. Stable nodule.",
    ]
    assert draw("convirt", SECTIONS) == set(sentences)
    assert make_caption("convirt", SECTIONS).split("\n\n") == sentences


def test_biovil_shuffles_sentences():
    whole = make_caption("biovil", SECTIONS)
    assert whole == make_caption("convirt", SECTIONS)
    orders = draw("biovil", SECTIONS)
    assert len(orders) > 20
    assert {tuple(sorted(order.split("\n\n"))) for order in orders} == {
        tuple(sorted(whole.split("\n\n")))
    }


RAW = "x\n IMPRESSION: Old. \n IMPRESSION: New.\n nodule. \n {} Call.\n {} Dr told.\n"


@pytest.mark.parametrize(
    ("headers", "caption"),
    [
        (("RECOMMENDATION(S):", "NOTIFICATION:"), "New. nodule."),
        (("NOTIFICATIONS:", "RECOMMENDATIONS:"), "New. nodule."),
        (("RECOMMENDATION:", "NOTE:"), "New. nodule."),
        (("NOTE:", "NOTIFICATION:"), "New. nodule. NOTE: Call."),
        (("NOTE:", "Notification:"), "New. nodule. NOTE: Call. Notification: Dr told."),
    ],
)
def test_chexzero_ends_at_recommendation_or_notification(headers, caption):
    sections = split_report(RAW.format(*headers))
    assert make_caption("chexzero", sections) == caption
    assert make_caption("chexzero_compat", sections) == caption


def test_chexzero_looks_for_the_end_after_the_impression():
    sections = {"report": "a RECOMMENDATION: b IMPRESSION: Clear. NOTIFICATION: c"}
    assert make_caption("chexzero", sections) == "Clear."
    assert make_caption("chexzero_compat", sections) == ""
    # The published code prefers one spelling to an earlier one, and misses the first word.
    sections = {"report": "IMPRESSION: a RECOMMENDATIONS: b RECOMMENDATION(S): c"}
    assert make_caption("chexzero", sections) == "a"
    assert make_caption("chexzero_compat", sections) == "a RECOMMENDATIONS: b"
    sections = {"report": "NOTIFICATION: a IMPRESSION: b"}
    assert make_caption("chexzero_compat", sections) == "b"


def test_chexzero_without_an_impression():
    assert make_caption("chexzero", {"report": "FINDINGS: a"}) == ""
    assert make_caption("chexzero_compat", {"report": "FINDINGS: a"}) == "NO IMPRESSION"
    # Open-I has sections, but no raw report.
    sections = {"impression": "Clear.\n RECOMMENDATION: CT."}
    assert make_caption("chexzero", sections) == "Clear."
    assert make_caption("chexzero_compat", sections) == ""


def test_sections_as_they_are():
    assert make_caption("findings", SECTIONS) == SECTIONS["findings"]
    assert make_caption("impression", SECTIONS) == SECTIONS["impression"]
    both = make_caption("findings_impression", SECTIONS)
    assert both == f"{SECTIONS['findings']}\n\n{SECTIONS['impression']}"
    assert make_caption("findings_impression", {"impression": " a "}) == "a"
    assert make_caption("findings_impression", {"impression": " "}) == ""


@pytest.mark.parametrize("rule", list(CAPTIONS))
def test_a_report_without_text_has_no_caption(rule):
    for sections in ({}, {"last_paragraph": "Lungs are clear."}, {"impression": "\n"}):
        assert make_caption(rule, sections) == ""
        assert make_caption(rule, sections, np.random.default_rng(0)) == ""


@pytest.mark.parametrize("text", ["1" * 100_000, "Dr. " * 25_000, "1. " * 33_000, "\n " * 50_000])
def test_long_reports_are_read_in_linear_time(text):
    start = time.process_time()
    for rule in CAPTIONS:
        make_caption(rule, {"findings": text, "impression": text, "report": text})
    assert time.process_time() - start < 5


def test_usable_rules_are_listed():
    assert list_usable({}) == ()
    assert list_usable({"impression": "Clear."}) == (
        "convirt",
        "biovil",
        "chexzero",
        "impression",
        "findings_impression",
    )
    assert list_usable(SECTIONS | {"report": "IMPRESSION: x"}) == tuple(CAPTIONS)


def test_an_unknown_rule_is_named():
    with pytest.raises(UserError, match="caption rule 'plan' is unknown; use one of mgca, gloria"):
        make_caption("plan", SECTIONS)

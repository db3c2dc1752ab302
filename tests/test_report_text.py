"""The phantom's reports: what is written and what is claimed agree, by rules written anew here."""

import re

import numpy as np
import pytest

from plan_jax.data import phantom
from plan_jax.data.phantom import Difficulty, report_text
from plan_jax.data.phantom.anatomy import SIDES, ZONES

NORMAL_MEANINGS = {
    "heart size is normal": ("cardiomegaly",),
    "normal cardiac silhouette": ("cardiomegaly",),
    "pulmonary vasculature is normal": ("pulmonary oedema",),
    "clear": ("consolidation", "nodule"),
    "no active disease of the lungs": ("consolidation", "nodule"),
    "costophrenic angle is sharp": ("pleural effusion",),
}
WORDS_OF_DOUBT = ("possible", "may be", "cannot be excluded", "suspected")
WHOLE_REGIONS = {"cardiomegaly": "heart", "pacemaker": "chest"}


@pytest.fixture(scope="module")
def reports():
    """The findings, report and triplets of 100 studies."""
    return [phantom.write_report(11, index)[1:] for index in range(100)]


def find_kinds(text: str) -> list[str]:
    """Returns the kinds that a part of a sentence names, the longest synonym first."""
    kinds = []
    names = [(name, kind) for kind, synonyms in report_text.NAMES.items() for name, _ in synonyms]
    for name, kind in sorted(names, key=lambda pair: -len(pair[0])):
        if re.search(rf"\b{name}\b", text):
            kinds.append(kind)
            text = re.sub(rf"\b{name}\b", "", text)
    return kinds


def find_claims(sentence: str) -> set[tuple[str, str, int]]:
    """Returns the triplets that one sentence of a report states."""
    sentence = sentence.lower().rstrip(".")
    side = next((s for s in SIDES if f" {s} " in f" {sentence} "), "")
    zone = next((z for z in ZONES if f" {z} " in f" {sentence} "), "")
    for words, kinds in NORMAL_MEANINGS.items():
        if words in sentence:
            region = f"{side} {zone} zone" if zone else f"{side} lung" if side else "both lungs"
            return {(WHOLE_REGIONS.get(kind, region), kind, 0) for kind in kinds}
    positive, _, negative = sentence.partition(" without ")
    absent = find_kinds(negative)
    if re.match(r"(no|there is no|there are no)\b", positive):
        positive, absent = "", absent + find_kinds(positive)
    claims = {(WHOLE_REGIONS.get(kind, "both lungs"), kind, 0) for kind in absent}
    if "enlarged" in positive:
        claims.add(("heart", "cardiomegaly", 1))
    # Without the side between its words, "left pleural effusion" is one name.
    names = positive.replace("both lungs", "").replace("pleural effusion", "effusion")
    names = re.sub(rf"\b({side or 'x'}) (?=pleural|effusion)", "", names)
    for kind in find_kinds(names):
        default = "both lungs" if kind == "pulmonary oedema" else "chest"
        region = WHOLE_REGIONS.get(kind, f"{side} lung" if side else default)
        if kind == "pacemaker":
            region = f"{side} chest".strip()
        region = f"{side} {zone} zone" if zone else region
        is_uncertain = any(word in positive for word in WORDS_OF_DOUBT)
        claims.add((region, kind, -1 if is_uncertain else 1))
    return claims


def test_triplets_are_exactly_what_the_report_states(reports):
    for _, text, triplets in reports:
        claims = [find_claims(sentence) for sentence in re.split(r"(?<=\.) ", text)]
        assert set().union(*claims) == set(triplets), text
        assert len(set(triplets)) == len(triplets)


def test_reports_state_what_is_present_and_deny_only_what_is_absent(reports):
    for findings, text, triplets in reports:
        stated = [kind for _, kind, existence in triplets if existence]
        assert sorted(stated) == sorted(finding.kind for finding in findings), text
        for region, kind, existence in triplets:
            present = [finding for finding in findings if finding.kind == kind]
            if existence == 0 and region in ("both lungs", "heart", "chest"):
                assert not present
            elif existence == 0:
                side, zone = region.split()[:2]
                zone = "" if zone == "lung" else zone
                contradictions = (f"{kind}|{side}|{zone}", f"{kind}||")
                assert not [finding for finding in present if finding.key in contradictions]


def test_hard_reports_contradict_neither_the_image_nor_themselves():
    counts = {-1: 0, 0: 0, 1: 0}
    num_priors = num_doubted_absent = 0
    for index in range(200):
        _, findings, text, triplets = phantom.write_report(11, index, Difficulty(hard=True))
        present = {finding.kind for finding in findings}
        mentioned = {(region, kind) for region, kind, existence in triplets if existence}
        stated = {kind for _, kind, existence in triplets if existence == 1}
        assert stated <= present <= {kind for _, kind in mentioned}, text
        doubted_absent = {kind for _, kind in mentioned} - present
        num_doubted_absent += len(doubted_absent)
        assert "pacemaker" not in doubted_absent
        for region, kind, existence in triplets:
            counts[existence] += 1
            side, zone = (region.split() + [""])[:2]
            for other_region, other in mentioned if existence == 0 else ():
                overlaps = (
                    other_region == region
                    or side not in SIDES  # the absence holds everywhere
                    or other_region in ("both lungs", f"{side} lung")
                    or (zone == "lung" and other_region.startswith(side))
                )
                assert other != kind or not overlaps, text
        num_priors += bool(re.search(r"\b(?:prior|previous|before|new since)\b", text))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | [.,]|[{}]", text.lower()), text
        for sentence in re.split(r"(?<=\.) ", text):
            assert re.fullmatch(r"[A-Z][a-z ]+(?:, [a-z ]+)?\.", sentence), text
    assert min(counts.values()) > 100 and num_priors > 150 and num_doubted_absent > 50


def test_hard_reports_obey_the_settings():
    plain = Difficulty(hard=True, filler=0, negated=0, hedged=0, vague=0)
    for index in range(60):
        _, findings, text, triplets = phantom.write_report(2, index, plain)
        assert not re.search("|".join(report_text.HARD_FILLER), text.lower())
        assert all(existence >= 0 for _, _, existence in triplets)
        located = {region for region, _, existence in triplets if existence == 1}
        assert located >= {report_text.region_of(finding) for finding in findings}


def test_reports_are_grammatical_and_of_plausible_length():
    reports = [phantom.write_report(4, index)[2:] for index in range(600)]
    num_words = [len(text.split()) for text, _ in reports]
    assert 30 <= np.mean(num_words) <= 40 and max(num_words) <= 70 and min(num_words) >= 3
    assert len({text for text, _ in reports}) > 580
    for text, _ in reports:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | \.|[{}]", text.lower()), text
        for sentence in re.split(r"(?<=\.) ", text):
            assert re.fullmatch(r"[A-Z][a-z ]+\.", sentence), text
    existence = [value for _, triplets in reports for _, _, value in triplets if value]
    assert 0.05 < np.mean(np.array(existence) == -1) < 0.15


def test_hedged_is_the_share_of_mild_findings_that_are_doubted():
    for index in range(60):
        _, findings, _, triplets = phantom.write_report(2, index, Difficulty(hedged=1))
        mild = [f.kind for f in findings if f.level == 0 and f.kind != "pacemaker"]
        assert sorted(mild) == sorted(kind for _, kind, existence in triplets if existence == -1)


@pytest.mark.parametrize("share", [0, 1])
def test_vague_is_the_share_of_findings_without_a_location(share):
    for index in range(60):
        _, findings, _, triplets = phantom.write_report(2, index, Difficulty(vague=share))
        num_sided = sum(bool(finding.side) for finding in findings)
        regions = [region for region, _, existence in triplets if existence]
        num_located = sum(region.split()[0] in SIDES for region in regions)
        assert num_located == (0 if share else num_sided)

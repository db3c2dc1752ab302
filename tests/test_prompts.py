"""Prompt sets: their structure, and that they are what zero-shot classification needs."""

import itertools

import pytest

from plan_jax.data import prompts

CHEXPERT_COMPETITION = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "pleural effusion",
)


@pytest.mark.parametrize("name", prompts.PROMPT_SETS)
def test_a_set_has_clean_and_different_texts_on_both_sides(name):
    prompt_set = prompts.PROMPT_SETS[name]()
    assert prompt_set
    for finding, (positive, negative) in prompt_set.items():
        assert finding == finding.lower() and positive and negative
        assert len(set(positive)) == len(positive) and len(set(negative)) == len(negative)
        assert not set(positive) & set(negative)
        for text in positive + negative:
            assert text and " ".join(text.split()) == text and "{" not in text


def test_gloria_is_the_product_of_its_slots_in_order():
    prompt_set = prompts.build_gloria()
    assert set(prompt_set) == {*CHEXPERT_COMPETITION, "pneumonia"}
    for name, (severities, subtypes, locations) in prompts.TAXONOMY.items():
        expected = []
        for severity in severities:
            for subtype in subtypes:
                for location in locations:
                    words = [word for word in (severity, subtype, location) if word != ""]
                    expected.append(" ".join(words))
        assert prompt_set[name][0] == expected
        assert len(expected) == len(severities) * len(subtypes) * len(locations)
        assert "" in severities and "" in locations and "" not in subtypes


def test_chexzero_is_a_pair_for_each_label_of_chexpert():
    prompt_set = prompts.build_chexzero()
    assert len(prompt_set) == 14 and set(CHEXPERT_COMPETITION) < set(prompt_set)
    assert prompt_set["pleural effusion"] == (["pleural effusion"], ["no pleural effusion"])
    assert prompt_set["no finding"] == (["no finding"], ["abnormal finding"])


def test_biovil_states_and_denies_pneumonia_in_four_sentences():
    ((positive, negative),) = prompts.build_biovil().values()
    assert len(positive) == len(negative) == 4
    assert all("no" in text.lower() or "without" in text for text in negative)


def test_covid_has_three_classes_without_common_prompts():
    prompt_set = prompts.build_covid()
    assert list(prompt_set) == ["normal", "pneumonia", "covid-19"]
    for first, second in itertools.combinations(prompt_set.values(), 2):
        assert not set(first[0]) & set(second[0])


def test_a_caller_may_edit_its_copy():
    prompts.build_biovil()["pneumonia"][0].clear()
    prompts.build_covid()["normal"][1].append("x")
    assert len(prompts.build_biovil()["pneumonia"][0]) == 4
    assert len(prompts.build_covid()["normal"][1]) == 3


@pytest.mark.parametrize(
    ("finding", "positive", "negative"),
    [
        ("Edema", "there is Edema", "there is no Edema"),
        ("Pleural_Effusion", "there is Pleural Effusion", "there is no Pleural Effusion"),
        ("No Finding", "no finding", "abnormal finding"),
        ("no_findings", "no finding", "abnormal finding"),
        ("NoFinding", "no finding", "abnormal finding"),
        ("Normal", "normal chest radiograph", "abnormal chest radiograph"),
        ("healthy", "normal chest radiograph", "abnormal chest radiograph"),
        ("No pneumothorax", "there is no pneumothorax", "there is pneumothorax"),
        ("non-COVID", "there is no COVID", "there is COVID"),
        *(
            (name, f"there is {name}", f"there is no {name}")
            for name in ("Non-small cell lung cancer", "Non-displaced fracture")
        ),
        ("Nodule", "there is Nodule", "there is no Nodule"),
    ],
)
def test_no_prompt_of_an_own_finding_denies_a_denial(finding, positive, negative):
    assert prompts.build_plain([finding]) == {finding: ([positive], [negative])}

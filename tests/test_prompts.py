"""Prompt sets: their structure, their draws, and that they are what the task wants."""

import itertools

import pytest

from plan_jax.data import prompts
from plan_jax.types import UserError

COMPETITION = ("atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion")


@pytest.mark.parametrize("name", prompts.SETS)
def test_a_set_is_sides_of_clean_and_different_texts(name):
    made = prompts.ensemble(name)
    assert made == prompts.SETS[name]() and made
    for key, (yes, no) in made.items():
        assert key == key.lower() and yes and no
        assert len(set(yes)) == len(yes) and len(set(no)) == len(no)
        assert not set(yes) & set(no)
        for text in yes + no:
            assert text and " ".join(text.split()) == text and "{" not in text


def test_gloria_is_the_product_of_its_slots_in_order():
    made = prompts.ensemble("gloria")
    assert set(made) == {*COMPETITION, "pneumonia"}
    for name, slots in prompts.TAXONOMY.items():
        expected = []
        for severity in slots[0]:
            for subtype in slots[1]:
                for place in slots[2]:
                    words = [word for word in (severity, subtype, place) if word != ""]
                    expected.append(" ".join(words))
        assert made[name][0] == expected
        assert len(expected) == len(slots[0]) * len(slots[1]) * len(slots[2])
        assert "" in slots[0] and "" in slots[2] and "" not in slots[1]


def test_a_draw_is_of_the_set_repeats_nothing_and_follows_the_seed():
    every = prompts.ensemble("gloria")
    some = prompts.ensemble("gloria", 5, seed=3)
    for name, (yes, no) in some.items():
        assert len(set(yes)) == 5 and set(yes) <= set(every[name][0])
        assert no == every[name][1]
    assert some == prompts.ensemble("gloria", 5, seed=3)
    assert some != prompts.ensemble("gloria", 5, seed=4)
    draws = [prompts.ensemble("gloria", 1, seed)["edema"][0][0] for seed in range(60)]
    assert len(set(draws)) > 30
    # All classes are drawn by themselves: equal places in two lists of one length are chance.
    places = {n: [every[n][0].index(t) for t in some[n][0]] for n in ("edema", "pleural effusion")}
    assert places["edema"] != places["pleural effusion"]


def test_chexzero_is_a_pair_for_each_label_of_chexpert():
    made = prompts.ensemble("chexzero")
    assert len(made) == 14 and set(COMPETITION) < set(made)
    assert made["pleural effusion"] == (["pleural effusion"], ["no pleural effusion"])
    assert made["no finding"] == (["no finding"], ["abnormal finding"])


def test_the_other_sets():
    ((yes, no),) = prompts.ensemble("biovil").values()
    assert len(yes) == len(no) == 4 and all("no" in t.lower() or "without" in t for t in no)
    covid = prompts.ensemble("covid")
    assert list(covid) == ["normal", "pneumonia", "covid-19"]
    for a, b in itertools.combinations(covid.values(), 2):
        assert not set(a[0]) & set(b[0])


def test_a_caller_may_change_what_it_got():
    prompts.ensemble("biovil")["pneumonia"][0].clear()
    prompts.ensemble("covid")["normal"][1].append("x")
    assert len(prompts.ensemble("biovil")["pneumonia"][0]) == 4
    assert len(prompts.ensemble("covid")["normal"][1]) == 3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("medclip",), "prompt set 'medclip' is unknown; use gloria, chexzero, biovil, covid"),
        (("biovil", 5), "n is 5 and biovil has 4 prompts for pneumonia; use 1 to that many"),
        (("gloria", 0), "n is 0 and gloria has 36 prompts for cardiomegaly"),
    ],
)
def test_mistakes_are_named(asked, said):
    with pytest.raises(UserError, match=said):
        prompts.ensemble(*asked)

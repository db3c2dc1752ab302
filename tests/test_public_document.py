"""docs/datasets.md is what the builders' facts say, and every dataset has the facts it needs."""

from pathlib import Path

import pytest

from plan_jax import prepare
from plan_jax.data import preparation
from plan_jax.data.public.document import describe_datasets
from plan_jax.data.public.facts import BY_HASH, Facts

ROOT = Path(__file__).resolve().parent.parent
ALL_FACTS = preparation.list_facts()


def test_the_page_is_made_from_the_facts(capsys):
    assert prepare.run(["--document"]) == 0
    page = (ROOT / "docs/datasets.md").read_text("utf-8")
    assert capsys.readouterr().out == page, "run plan-jax-prepare --document > docs/datasets.md"


@pytest.mark.parametrize("facts", ALL_FACTS, ids=lambda facts: facts.name)
def test_a_dataset_has_all_facts(facts):
    builder_class, config_class = preparation.BUILDERS[facts.name]
    assert builder_class.facts is config_class.facts is facts
    assert builder_class.name == facts.name  # of the folder that TFDS writes
    assert all((facts.title, facts.content, facts.page, facts.licence, facts.citation, facts.files))
    assert facts.provides and facts.splits and facts.counts and facts.patients
    known = {"reports", "labels", "boxes", "masks", "regions", "anatomy"}
    assert set(facts.provides) <= known
    assert set(facts.leaks) <= set(facts.split_rules)
    assert "://" not in facts.page and "|" not in facts.content


def test_a_dataset_is_described():
    facts = Facts(
        name="films",
        title="Films",
        content="1,200 films | drawn",
        page="example.org",
        licence="none",
        citation="Nobody, 2026",
        files="films.csv",
        provides=("labels",),
        patients="the column `id` is that of an image",
        splits={"official": "the column `split`", "leaky": "by row"},
        is_split_by_image=True,
        leaks={"leaky": "7 of 10 test images"},
        defects=("labels are noisy",),
        counts={"images": 1200},
    )
    page = describe_datasets([facts])
    assert (
        "| [`films`](#films) | Films: 1,200 films \\| drawn | labels | official, by image |" in page
    )
    assert "- **Published counts.** 1,200 images." in page
    assert "- **Split `official`** (default). The column `split`." in page
    assert "- **Split `leaky`**. By row.\n  **Leak.** 7 of 10 test images." in page
    assert "- **Known fault.** Labels are noisy." in page
    assert f"`{BY_HASH}`" in page

"""The documentation against the source: fields of the config, blocks of code, the navigation."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from code_blocks import list_blocks

from plan_jax import config
from plan_jax.methods import METHODS
from plan_jax.tasks import TASKS
from tools import config_reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows():
    """The rows of the page of all fields: (type, default, meaning) by dotted name."""
    cells = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in config_reference.write_page().splitlines()
        if line.startswith("| `")
    ]
    table = {}
    for name, kind, default, meaning in cells:
        table.setdefault(name.strip("`"), []).append((kind.strip("`"), default.strip("`"), meaning))
    return table


def test_the_page_has_every_field_of_every_choice(rows):
    names = set()
    for method in METHODS:
        names |= set(dict(config.flatten(config.fill_defaults({"method": method}))))
    for vision in ("resnet_small", "vit_tiny"):
        values = config.fill_defaults({"vision": {"name": vision}, "data": {"name": "pairs"}})
        names |= set(dict(config.flatten(values)))
    # `name` of an encoder is explained above its table.
    missing = sorted(names - set(rows) - {"vision.name", "text.name"})
    assert not missing


def test_defaults_on_the_page_are_those_of_the_config(rows):
    defaults = dict(config.flatten(config.fill_defaults({})))
    compared = 0
    for name, value in defaults.items():
        section = name.partition(".")[0]
        if section in ("hyper", "vision", "text") or name.startswith("data.builder"):
            continue
        ((_, default, _),) = rows[name]
        if "/" not in default:  # `tolerance` is a quotient
            assert ast.literal_eval(default) == value, name
            compared += 1
    assert compared > 80


def test_every_field_has_a_meaning(rows):
    for name, (*_, (_, _, meaning)) in rows.items():
        assert meaning, f"config.{name} has no comment"


def test_the_page_names_the_methods_and_tasks_that_there_are():
    assert set(config_reference.METHODS) == set(METHODS)
    page = config_reference.write_page()
    assert all(f"### `eval.{task}`" in page for task in TASKS)


def test_every_block_of_code_is_run_or_says_why_not(capsys):
    blocks = list_blocks()
    for block in blocks:
        assert block.is_run or block.reason, f"docs/{block.page}.md, block {block.number}: no mark"
        print(f"{block.page} {block.number}: {block.mark}")
    for page in {block.page for block in blocks}:
        # `list_blocks` knows the first two.
        text = (ROOT / f"docs/{page}.md").read_text("utf-8")
        fences = re.findall(r"^[ >]*```(\w+)", text, re.M)
        assert set(fences) <= {"sh", "python", "json"}, page
        count = sum(block.page == page for block in blocks)
        assert len(fences) - fences.count("json") == count, page
    run = [block for block in blocks if block.is_run]
    assert {block.page for block in run} >= {"tutorial", "own_data", "predict", "sharing"}
    assert len(run) >= 10
    # Whoever runs pytest with -rP reads which blocks are not run, and why.
    assert capsys.readouterr().out.count("not run") == len(blocks) - len(run)


def test_every_page_is_in_the_navigation_once():
    content = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def walk(item):
        if isinstance(item, list | dict):
            for part in item.values() if isinstance(item, dict) else item:
                yield from walk(part)
        else:
            yield item

    pages = [page for page in walk(content["nav"]) if page.endswith(".md")]
    assert len(pages) == len(set(pages))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(pages) - written == {"contributing.md", "changelog.md"} and not written - set(pages)

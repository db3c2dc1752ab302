"""Blocks of code in the documentation, and whether a test runs them.

A comment right above a block says so: `<!-- run -->`, or `<!-- not run: reason -->`.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Later pages use the runs of earlier ones; all others follow.
FIRST_PAGES = ("tutorial", "own_data", "predict", "sharing")
GENERATED_PAGES = ("datasets",)  # by `plan-jax-prepare --document`, which has no films to read
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>.*?) -->\n(?P=indent))?"
    r"```(?P<language>sh|python)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


class Block(NamedTuple):
    """A block of code: the page, its number there, and the mark above it."""

    page: str
    number: int
    language: str
    code: str
    mark: str

    @property
    def is_run(self) -> bool:
        """Returns whether the block is to be run."""
        return self.mark == "run"

    @property
    def reason(self) -> str:
        """Returns why the block is not run, "" if that is not said."""
        match = re.fullmatch(r"not run: (.+)", self.mark)
        return match[1] if match else ""


def list_blocks() -> list[Block]:
    """Returns the blocks of all pages."""
    written = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    others = [page for page in written if page not in (*FIRST_PAGES, *GENERATED_PAGES)]
    return [
        Block(page, number, match["language"], textwrap.dedent(match["code"]), match["mark"] or "")
        for page in (*FIRST_PAGES, *others)
        for number, match in enumerate(
            _BLOCK.finditer((ROOT / f"docs/{page}.md").read_text("utf-8")), 1
        )
    ]

"""An extension of griffe, which reads docstrings for the documentation.

Doctests become blocks of code; as Markdown, `>>>` would begin a quotation. The comments beside the
fields of a class become the section `Attributes` of its docstring, unless it has one.
"""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.config_reference import read_field_comments  # noqa: E402

_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fences doctests, and describes the fields of a class."""
        docstring = obj.docstring
        if not docstring:
            return
        docstring.value = fence_doctests(docstring.value)
        is_top_level = obj.parent is not None and obj.parent.is_module
        if obj.is_class and is_top_level and "Attributes:" not in docstring.value:
            comments = read_field_comments(Path(str(obj.filepath)), obj.name)
            lines = "".join(f"\n    {name}: {comment}" for name, comment in comments.items())
            docstring.value += f"\n\nAttributes:{lines}" if lines else ""


def fence_doctests(docstring: str) -> str:
    """Returns a docstring whose doctests are fenced blocks of code.

    >>> fence_doctests("Adds.\\n\\n>>> add(1, 2)\\n3")
    'Adds.\\n\\n```pycon\\n>>> add(1, 2)\\n3\\n```'
    """
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", docstring)

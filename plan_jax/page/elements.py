"""The elements a page is made of: escaped tags, tables of values, the strip of a value."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from plan_jax.page import figures

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID = ("img", "meta")


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""


def tag(name: str, /, *inside: str | None, **attributes: str) -> Html:
    """Make an element; whatever goes in is escaped, except other elements.

    >>> tag("p", "a < b", tag("b", "!"), class_="x")
    '<p class="x">a &lt; b<b>!</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    content = "".join(x if isinstance(x, Html) else html.escape(x) for x in inside if x)
    return Html(f"<{name}{given}>" + ("" if name in VOID else f"{content}</{name}>"))


def document(title: str, *inside: str | None) -> str:
    """Make a whole page that runs no script and may ask for no other document."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag("body", tag("main", *inside))
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def section(title: str, *inside: str | None) -> Html:
    """Make a part of the page under its own title."""
    return tag("section", tag("h2", title), *inside)


def folded(title: str, content: Mapping[str, Any]) -> Html:
    """Show a tree of values as text that opens when its title is clicked."""
    text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
    return tag("details", tag("summary", title), tag("pre", text))


def picture(pixels: UInt8[ndarray, "V U 3"], alt: str) -> Html:
    """Put a picture [V U 3] into the page itself."""
    data = base64.b64encode(figures.encode(pixels, "JPEG")).decode()
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt)


def table(names: Sequence[str], rows: Sequence[Sequence[Html]]) -> Html:
    """Make a table; all columns but the first hold numbers."""
    head = [tag("th", name, class_="n" if i else "") for i, name in enumerate(names)]
    body = [tag("tr", *row) for row in rows]
    return tag("div", tag("table", tag("tr", *head), *body), class_="wide")


def number(value: Any, digits: int | None = None) -> str:
    """Write a number so that three figures of it can be read; a dash for none, `nan` for NaN.

    >>> number(1.2345), number(0.01234), number(153.2), number(None)
    ('1.23', '0.012', '153', '–')
    """
    if not is_number(value):
        return "–"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 or not value else 3
    return f"{value:.{digits}f}"


def is_number(value: Any) -> bool:
    """Say whether a value is a plain number, NaN included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any, kind: str = "", digits: int | None = None, small: str = "") -> Html:
    """Make a table cell of a number, with a small remark below it."""
    note = tag("small", small) if small else None
    return tag("td", number(value, digits), note, class_=f"n {kind}".strip())


def strip(value: float, nulls: Mapping[str, float]) -> Html:
    """Draw a value (filled) among what it has to beat (hollow) on one line."""
    marks = {name: x for name, x in nulls.items() if is_number(x) and math.isfinite(x)}
    if not marks or not math.isfinite(value):
        return Html("")
    low, high = min(0.0, value, *marks.values()), max(value, *marks.values())

    def dot(x: float, r: str, kind: str, *inside: str) -> Html:
        place = 8 + 224 * (x - low) / ((high - low) or 1)
        return tag("circle", *inside, cx=f"{place:.1f}", cy="11", r=r, class_=kind)

    hollow = [dot(x, "5", "null", tag("title", f"{n} {number(x)}")) for n, x in marks.items()]
    own = dot(value, "7", "own", tag("title", f"model {number(value)}"))
    axis = tag("line", x1="8", x2="232", y1="11", y2="11")
    return tag("svg", axis, *hollow, own, class_="strip", viewBox="0 0 240 22", role="img")

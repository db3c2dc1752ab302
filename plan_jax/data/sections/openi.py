"""Reads the XML reports of Open-I, the chest radiographs of Indiana University."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any, NamedTuple

SECTIONS = ("comparison", "indication", "findings", "impression")
# Traces of HTML within the text of a few reports.
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class OpenIReport(NamedTuple):
    """A report of Open-I.

    `uid` is also the patient as far as one is known. `sections` has the names of `SECTIONS` that
    are not empty. `images` maps the id of each image to its caption, in order; there is no tag of
    the view. MeSH terms are `Term/qualifier/...`: those that a person chose, and those that a
    program found.
    """

    uid: str
    sections: dict[str, str]
    mesh_major: tuple[str, ...]
    mesh_automatic: tuple[str, ...]
    licence: str
    images: dict[str, str]


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree of a document without definitions of its own."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> Any:
        """Refuses a document type: entities that it defines can expand to any size."""
        raise ValueError("it declares a document type, which reports of Open-I do not have")


def read_report(content: bytes) -> OpenIReport:
    """Reads a report of Open-I from the content of its XML file.

    Raises:
      ValueError: if the content is not such a report; names what is wrong, and no text of it.
    """
    parser = ElementTree.XMLParser(target=_Builder())
    try:
        root = ElementTree.fromstring(content, parser)
    except ElementTree.ParseError as error:
        line, column = error.position
        raise ValueError(f"it is not XML (line {line}, column {column + 1})") from None
    except LookupError:
        raise ValueError("it is not XML in a known encoding") from None
    uid = root.find("uId")
    if uid is None or not uid.get("id"):
        raise ValueError("it has no <uId id=...>, so it is not a report of Open-I")
    sections: dict[str, str] = {}
    for element in root.iter("AbstractText"):
        name = element.get("Label", "").strip().lower()
        if name not in SECTIONS:
            raise ValueError(f"its sections are not {', '.join(SECTIONS)}")
        if text := _read_text(element):
            sections[name] = text
    images = {
        element.get("id", ""): " ".join((element.findtext("caption") or "").split())
        for element in root.iter("parentImage")
    }
    if "" in images:
        raise ValueError("it has an image without an id")
    return OpenIReport(
        uid=uid.get("id", ""),
        sections=sections,
        mesh_major=_read_terms(root, "major"),
        mesh_automatic=_read_terms(root, "automatic"),
        licence=(root.findtext("licenseURL") or "").strip(),
        images=images,
    )


def _read_text(element: ElementTree.Element) -> str:
    """Returns the text of a section, with line breaks in place of `<BR>` and one space per gap."""
    lines = _LINE_BREAK.split("".join(element.itertext()))
    return "\n".join(filter(None, (" ".join(line.split()) for line in lines)))


def _read_terms(root: ElementTree.Element, kind: str) -> tuple[str, ...]:
    terms = (" ".join((element.text or "").split()) for element in root.iter(kind))
    return tuple(filter(None, terms))

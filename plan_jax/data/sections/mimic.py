"""Splits a MIMIC-CXR report into sections, as the dataset's own parser does.

Reports of MIMIC-CXR are plain text. MIMIC-CXR's maintainers publish a parser whose output is the
text of nearly every paper on the dataset; the output itself is not published.

Source: MIT-LCP/mimic-cxr, txt/section_parser.py and txt/create_section_files.py (MIT licence). The
rules, the names and the study ids are theirs, including the oddities that are named below.
"""

import re

# The untouched text of a report, stored beside its sections.
REPORT = "report"

# The text before the first header, and the text of a report without any.
_PREAMBLE, _HEADERLESS = "preamble", "full report"

# A header begins a line after exactly one space, is in capitals and ends in a colon.
_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_PARAGRAPH_BREAK = "\n \n"

# Spellings of a header -> name of the section.
_SYNONYMS = {
    "impression": (
        "conclusion",
        "findings and impression",
        "findings/impression",
        "findings/ impression",
        "impresson",
        "imprression",
        "imoression",
        "impressoin",
        "imprssion",
        "impresion",
        "imperssion",
        "mpression",
        "impession",
        # More likely an indication, but the source reads it so; it occurs once.
        "ndication",
    ),
    "findings": (
        "chest, two views",
        "finding",
        "findins",
        "findindgs",
        "findgings",
        "findngs",
        "findnings",
        "finidngs",
        "reference findings",
    ),
    "comparison": (
        "comparisons",
        "reference exam",
        "comparison exam",
        "comparison film",
        "comparision",
        "comparsion",
        "comparrison",
        "comparisions",
    ),
    "indication": (
        "reason for examination",
        "reason for exam",
        "clinical indication",
        "idication",
    ),
    "examination": ("exam", "type of examination"),
    "history": ("clinical history", "clinical information", "patient history", "pfi"),
    "recommendations": ("recommendation(s)", "recommendation"),
    "wet read": ("wetread",),
    "technique": (),
    "preamble": (),
    "notification": (),
    "addendum": (),
    "date": (),
    "comment": (),
}
_NAMES = {spelling: name for name, synonyms in _SYNONYMS.items() for spelling in (name, *synonyms)}
# A header that contains one of these words is that section; the first that fits counts.
_CONTAINED_NAMES = ("impression", "findings", "history", "comparison", "addendum")
# A header that contains one of these is the title of a study, whose text is its findings.
_STUDY_TITLES = (
    "chest",
    "portable",
    "pa and lateral",
    "lateral and pa",
    "ap and lateral",
    "lateral and ap",
    "frontal and",
    "two views",
    "frontal view",
    "pa view",
    "ap view",
    "one view",
    "lateral view",
    "bone window",
    "frontal upright",
    "frontal semi-upright",
    "ribs",
    "pa and lat",
)

# Studies whose conclusion stands under the header of another section.
_CONCLUSION_SECTIONS = {
    "s50913680": "recommendations",
    "s59363654": "examination",
    "s59279892": "technique",
    "s59768032": "recommendations",
    "s57936451": "indication",
    "s50058765": "indication",
    "s53356173": "examination",
    "s53202765": "technique",
    "s50808053": "technique",
    "s51966317": "indication",
    "s50743547": "examination",
    "s56451190": "note",
    "s59067458": "recommendations",
    "s59215320": "examination",
    "s55124749": "indication",
    "s54365831": "indication",
    "s59087630": "recommendations",
    "s58157373": "recommendations",
    "s56482935": "recommendations",
    "s58375018": "recommendations",
    "s54654948": "indication",
    "s55157853": "examination",
    "s51491012": "history",
}
# Studies whose conclusion is a span of the text: first character, and the one after the last.
_CONCLUSION_SPANS = {
    "s50525523": (201, 349),
    "s57564132": (233, 554),
    "s59982525": (313, 717),
    "s53488209": (149, 475),
    "s54875119": (234, 988),
    "s50196495": (59, 399),
    "s56579911": (59, 218),
    "s52648681": (292, 631),
    "s59889364": (172, 453),
    "s53514462": (73, 377),
    "s59505494": (59, 450),
    "s53182247": (59, 412),
    "s51410602": (47, 320),
    "s56412866": (522, 822),
    "s54986978": (59, 306),
    "s59003148": (262, 505),
    "s57150433": (61, 394),
    "s56760320": (219, 457),
    "s59562049": (158, 348),
    "s52674888": (145, 296),
    "s55258338": (192, 568),
    "s59330497": (140, 655),
    "s52119491": (179, 454),
    # These report no finding at all.
    "s58235663": (0, 0),
    "s50798377": (0, 0),
    "s54168089": (0, 0),
    "s53071062": (0, 0),
    "s56724958": (0, 0),
    "s54231141": (0, 0),
    "s53607029": (0, 0),
    "s52035334": (0, 0),
}
# Study ids that have no row in the source's table of sections, and so none in MGCA's captions.
HAND_LISTED_STUDIES = frozenset((*_CONCLUSION_SECTIONS, *_CONCLUSION_SPANS))
# What the conclusion of a hand-listed study stands for.
_CONCLUSION_NAMES = ("impression", "findings", "last_paragraph")


def split_report(text: str, study_id: str = "", *, hand_listed: bool = False) -> dict[str, str]:
    r"""Returns the sections of a MIMIC-CXR report by name, without those that are empty.

    >>> text = "FINAL REPORT\n COMPARISONS:  None.\n \n CHEST, AP VIEW:  Clear lungs.\n"
    >>> sections = split_report(text)
    >>> sections["comparison"], sections["findings"], sections["report"] == text
    ('None.', 'Clear lungs.', True)

    Names are normalised, and of several sections of a name the last one counts, even if it is
    empty. The exception are impression and findings, of which the last one with text counts. If a
    report has neither, its last section is cut after its first paragraph, and what follows is
    `last_paragraph`.

    A header that stands alone on its line hides a header on the very next line, which is read as
    text. The source has this fault; a repair would change the text of published models.

    Args:
      text: the report, as in its file.
      study_id: `s` and eight digits; only used with `hand_listed`.
      hand_listed: correct the studies of `HAND_LISTED_STUDIES`, in which the rules do not find the
        conclusion: it becomes `impression`, in place of findings and `last_paragraph`. The source
        does so in its file with one text per study, and leaves these studies out of its table.

    Returns:
      Stripped texts by name, and the untouched text as `report`.
    """
    # Spans of characters count a line break as one, as Python's text files do.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    sections = _find_sections(text)
    by_name = {name: section.strip() for name, section in sections}
    if hand_listed and study_id in HAND_LISTED_STUDIES:
        conclusion = _find_conclusion(text, study_id, by_name)
        for name in _CONCLUSION_NAMES:
            by_name.pop(name, None)
        by_name["impression"] = conclusion
    return {name: section for name, section in by_name.items() if section} | {REPORT: text}


def normalise_name(header: str) -> str:
    """Returns the name of the section under a header.

    >>> [normalise_name(header) for header in ("CONCLUSION", "PORTABLE AP CHEST", "NOTE")]
    ['impression', 'findings', 'note']
    """
    header = header.lower().strip()
    if header in _NAMES:
        return _NAMES[header]
    for name in _CONTAINED_NAMES:
        if name in header:
            return name
    return "findings" if any(title in header for title in _STUDY_TITLES) else header


def _find_sections(text: str) -> list[tuple[str, str]]:
    """Returns (name, text) of the sections of a report, in order."""
    header = _HEADER.search(text)
    if header is None:
        sections = [(_HEADERLESS, text)]
    else:
        sections = [(_PREAMBLE, text[: header.start()])]
        while header:
            name, start = normalise_name(header[1]), header.end()
            # The search goes on at the first line break after the header. If the header ended in
            # a line break, that is the next one, so a header on the next line is not found.
            line_break = text.find("\n", start)
            header = _HEADER.search(text, start if line_break < 0 else line_break)
            sections.append((name, text[start : header.start() if header else len(text)]))
    main_names = ("impression", "findings")
    sections = [(name, part) for name, part in sections if name not in main_names or part.strip()]
    if not any(name in main_names for name, _ in sections):
        name, last = sections[-1]
        first_paragraph, is_cut, rest = last.partition(_PARAGRAPH_BREAK)
        if is_cut:
            sections[-1:] = [(name, first_paragraph), ("last_paragraph", rest)]
    return sections


def _find_conclusion(text: str, study_id: str, sections: dict[str, str]) -> str:
    """Returns the conclusion of a hand-listed study; "" if it has none."""
    if study_id in _CONCLUSION_SPANS:
        start, end = _CONCLUSION_SPANS[study_id]
        return text[start:end].strip()
    return sections.get(_CONCLUSION_SECTIONS[study_id], "")

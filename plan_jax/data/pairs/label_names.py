"""Names of findings over a whole column of labels: what divides them, and how they are spelled."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.annotations import DEFAULT_SEPARATOR, LABEL_WORDS
from plan_jax.data.pairs.cells import fold_name, is_missing, normalise_name, to_number
from plan_jax.types import UserError

_VALUE_IN_NAME = re.compile(
    r"(.*?)\s*[:=]\s*(?:(-?[01](?:\.0)?|true|false|yes|no)|(-?[\d.]+|[IVX]+)\w?)", re.IGNORECASE
)
_DIGITS = re.compile(r"[-+\d\s.,:/]*\d[-+\d\s.,:/]*")
# What may divide two findings, and may as well be part of the name of one.
_AMBIGUOUS_SEPARATORS = ("/", "+", "&", " and ", " ")
MAX_NAMES = 12  # of a list in a message
MIN_TEXTS = 5  # that may be reports in place of names
MAX_COMPARED = 60  # names, all pairs of which are compared
MIN_RATIO = 0.8  # of letters that two spellings of one name have in common


def choose_separator(
    cells: Sequence[Any], separator: str = "", findings: Sequence[str] = ()
) -> re.Pattern[str]:
    """Returns the pattern that divides the names of a column of labels.

    A comma divides names if each of its parts stands alone somewhere or is the first of a list. In
    lists whose order is free, a part of several lists is a name too: `left` of `Nodule, left` and
    `Mass, left` is none.

    >>> choose_separator(["Edema, Effusion", "Edema", "Effusion"]).split("a,b")
    ['a', 'b']

    Args:
      cells: all cells of the column.
      separator: the separator that the user has named, or "".
      findings: names that are one finding, whatever they contain.

    Raises:
      UserError: if a cell may be one finding or several.
    """
    if separator:
        return re.compile(re.escape(separator.strip() or separator))
    texts = [
        cell
        for cell in cells
        if isinstance(cell, str) and not cell.startswith(("[", "{", "array(", "('", '("'))
    ]
    names = Counter(
        normalise_name(name)
        for text in texts
        for name in DEFAULT_SEPARATOR.split(text)
        if not is_missing(name)
    )
    known_keys = {fold_name(name) for name in findings}
    commas = re.compile("[,，]")
    own_mark = "|" if any("|" in text for text in texts) else ";"
    lists = [
        name
        for name in names
        if commas.search(name) and fold_name(name) not in known_keys and not _DIGITS.fullmatch(name)
    ]
    if lists:
        parts_of_list = [[fold_name(part) for part in commas.split(name)] for name in lists]
        first_parts = {parts[0] for parts in parts_of_list}
        later_parts = Counter(part for parts in parts_of_list for part in {*parts[1:]})
        known_keys |= {fold_name(name) for name in {*names} - {*lists}} | first_parts
        if first_parts & {*later_parts}:  # the order is free
            known_keys |= {part for part, count in later_parts.items() if count > 1}
        if not {*later_parts} <= known_keys:
            raise UserError(
                f"labels contain commas, as {quoting.quote(lists[0])}; set "
                "data.builder.label_separator to ',' if a comma divides findings, else to "
                f"{own_mark!r}"
            )
        return re.compile(f"{DEFAULT_SEPARATOR.pattern}|{commas.pattern}")
    single = known_keys | {fold_name(name) for name in names}
    for name in names:
        for mark in _AMBIGUOUS_SEPARATORS:
            pieces = [fold_name(piece) for piece in name.split(mark)]
            if len(pieces) > 1 and fold_name(name) not in known_keys and set(pieces) <= single:
                raise UserError(
                    f"label {quoting.quote(name)} may be one finding or {len(pieces)}; set "
                    f"data.builder.label_separator to {mark!r} if it divides findings, else to "
                    f"{own_mark!r}"
                )
    return DEFAULT_SEPARATOR


def match_names(
    counts: Mapping[str, int], findings: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Returns the finding of each name that is a label, and notes for the user.

    Spellings that differ in case, `_`, `-`, blanks or the composition of accents are one finding:
    that of `findings`, else the most frequent spelling.

    >>> match_names({"Edema": 3, "edema": 1})
    ({'Edema': 'Edema', 'edema': 'Edema'}, ["'edema' (1) is read as 'Edema' (3)"])

    Args:
      counts: name -> number of rows.
      findings: the names of the findings that the user wants; () for all.

    Raises:
      UserError: if the names are numbers or words as `yes`, or if none is in `findings`.
    """
    finding_of_key = {fold_name(name): str(name) for name in findings}
    if len(finding_of_key) < len(findings):
        raise UserError(f"findings {list_names(findings)} has one name twice; name it once")
    _check_values(counts, finding_of_key)
    _check_values_in_names(counts, finding_of_key)
    _check_texts(counts, finding_of_key)
    spellings: dict[str, list[str]] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        spellings.setdefault(fold_name(name), []).append(name)
    matches: dict[str, str] = {}
    notes = []
    for key, group in spellings.items():
        if finding_of_key and key not in finding_of_key:
            continue
        finding = finding_of_key.get(key, group[0])
        matches |= dict.fromkeys(group, finding)
        variants = [f"{quoting.quote(n)} ({counts[n]})" for n in group if n != finding]
        if variants:
            count = f" ({counts[finding]})" if finding in counts else ""
            verb = "is" if len(variants) == 1 else "are"
            notes.append(f"{', '.join(variants)} {verb} read as {quoting.quote(finding)}{count}")
    if finding_of_key and counts and not matches:
        raise UserError(
            f"none of the findings {list_names(findings)} is a label; the labels are "
            f"{list_names(list(counts), counts)}: correct data.builder.findings"
        )
    unmatched_names = [name for name in counts if name not in matches]
    if unmatched_names:
        notes.append(f"labels that are not in findings: {list_names(unmatched_names, counts)}")
    notes += [
        f"labels {quoting.quote(first)} and {quoting.quote(second)} look alike; if they "
        "are one, write them in one way"
        for first, second in _find_similar(sorted(set(matches.values())))
    ]
    denials = {fold_name(name): name for name in matches.values()}
    notes += [
        f"label {quoting.quote(name)} denies {quoting.quote(denials[key[3:]])}; write the latter "
        "as 0"
        for key, name in denials.items()
        if key.startswith("no ") and key[3:] in denials
    ]
    if counts and (absent_findings := [name for name in findings if name not in matches.values()]):
        notes.append(f"findings that no row names: {list_names(absent_findings)}")
    return matches, notes


def _check_values(counts: Mapping[str, int], finding_of_key: Mapping[str, str]) -> None:
    """Raises UserError if the names are the values of one label."""
    names = [name for name in counts if fold_name(name) not in finding_of_key]
    # A number, or the digits of one column for each finding, as `0 1 0`.
    values = [name for name in names if to_number(name) is not None or _DIGITS.fullmatch(name)]
    if names and all(name.casefold() in LABEL_WORDS for name in names):
        values = names
    if not values:
        return
    is_one_label = all(to_number(name) in (None, 0, 1, -1) for name in values)
    remedy = (
        "rename their column after its finding and list it in data.builder.label_columns"
        if is_one_label
        else "write the names of the classes in their place"
    )
    raise UserError(
        f"labels are the values {list_names(sorted(values))}, not names of findings; {remedy}"
    )


def _check_values_in_names(counts: Mapping[str, int], finding_of_key: Mapping[str, str]) -> None:
    """Raises UserError for names as `Edema: 1`, unless they are grades, as `BI-RADS: 1` to 5."""
    matches = {
        name: match
        for name in counts
        if fold_name(name) not in finding_of_key and (match := _VALUE_IN_NAME.fullmatch(name))
    }
    graded_names = {match[1] for match in matches.values() if match[3]}
    for name, match in matches.items():
        if match[2] and match[1] not in graded_names:
            raise UserError(
                f'label {quoting.quote(name)} contains its value; write JSON, as {{"Edema": 1}}, '
                "or list it in data.builder.findings if it is a name"
            )


def _check_texts(counts: Mapping[str, int], finding_of_key: Mapping[str, str]) -> None:
    """Raises UserError if most names are sentences, each of one row."""
    names = [name for name in counts if fold_name(name) not in finding_of_key]
    texts = [n for n in names if counts[n] <= 1 and len(n.split()) > quoting.MAX_WORDS]
    if len(texts) >= MIN_TEXTS and len(texts) > len(names) / 2:
        raise UserError(
            f"labels are {len(texts)} different texts in one row each, not names of findings; name "
            "the column of labels with data.builder.columns={'labels': '...'}, or list the names "
            "in data.builder.findings"
        )


def _find_similar(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of names that may be one finding, as `Infiltrate` and `Infiltration`."""
    if len(names) > MAX_COMPARED:
        return []
    return [
        (first, second)
        for first, second in itertools.combinations(names, 2)
        if difflib.SequenceMatcher(None, fold_name(first), fold_name(second)).ratio() > MIN_RATIO
        # `Grade 1` and `Grade 2`, or `left lung` and `right lung`, are not spellings of one name.
        and re.sub(r"\d+", "", first) != re.sub(r"\d+", "", second)
    ]


def list_names(names: Sequence[str], counts: Mapping[str, int] | None = None) -> str:
    """Returns names in a line for a message, with their counts, the most frequent ones first."""
    names = sorted(names, key=lambda name: -counts[name]) if counts else list(names)
    items = [
        f"{quoting.quote_name(name, counts[name])} {counts[name]}"
        if counts
        else quoting.shorten(str(name))
        for name in names[:MAX_NAMES]
    ]
    num_hidden = len(names) - len(items)
    return ", ".join(items) + (f" and {num_hidden} more" if num_hidden else "")

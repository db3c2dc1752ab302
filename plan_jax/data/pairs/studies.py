"""Studies: parsed rows of a manifest, and the merging of rows that describe one image."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs.annotations import Labels
from plan_jax.data.pairs.boxes import Box
from plan_jax.data.prompts import is_normal_name
from plan_jax.types import UserError

DUPLICATES = ("merge", "any", "majority", "by_text", "separate")


@dataclasses.dataclass(frozen=True)
class Study:
    """A parsed row of the manifest whose images are not read yet; `number` counts from 1.

    `reader` is who has labelled the row, or "".
    """

    number: int
    path: str
    split: str
    patient_id: str
    text: str
    labels: Labels
    boxes: list[dict[str, Any]]
    masks: dict[str, str]
    regions: dict[str, Box]
    anatomy: dict[str, str]
    reader: str = ""


def merge_duplicates(studies: Sequence[Study], policy: str) -> list[Study]:
    """Returns one study for each image: rows of one image are one row a finding.

    Args:
      studies: all studies, in order.
      policy: `merge` joins rows that do not contradict each other. `any` and `majority` decide on
        contradictory labels, `majority` among the readers; boxes of an absent finding are dropped.
        `by_text` is `merge` among rows of one text, and keeps different texts apart. `separate`
        merges nothing.

    Raises:
      UserError: if rows of an image contradict each other, or are in two splits.
    """
    groups: dict[str, list[Study]] = {}
    for study in studies:
        groups.setdefault(study.path, []).append(study)
    for group in groups.values():
        _check_equal("split", [row.split for row in group], group)
        _check_equal("patient", [row.patient_id for row in group], group)
    if policy == "separate":
        return list(studies)
    if policy == "by_text":
        groups_of_text: dict[tuple[str, ...], list[Study]] = {}
        for study in studies:
            groups_of_text.setdefault((study.path, *study.text.split()), []).append(study)
        rows_to_merge, policy = list(groups_of_text.values()), "merge"
    else:
        rows_to_merge = list(groups.values())
    return [group[0] if len(group) == 1 else _merge_rows(group, policy) for group in rows_to_merge]


def count_split_texts(studies: Sequence[Study]) -> int:
    """Returns the number of rows with boxes whose image and text another row with boxes has too."""
    counts = Counter((study.path, *study.text.split()) for study in studies if study.boxes)
    return sum(count for count in counts.values() if count > 1)


def _merge_rows(rows: Sequence[Study], policy: str) -> Study:
    texts = {" ".join(row.text.split()): row.text for row in rows if row.text}
    if len(texts) > 1:
        _refuse(
            rows, "with different texts", "set data.builder.duplicates to 'by_text' to keep them"
        )
    text = next(iter(texts.values()), "")
    rows = [_respell_text(row, text) for row in rows]
    labels = _merge_labels(rows, policy)
    boxes: list[dict[str, Any]] = []
    for row in rows:
        # The boxes of a finding that the readers have voted down go with it.
        boxes += [
            box for box in row.boxes if box not in boxes and labels.values.get(box["label"], 1) != 0
        ]
    return dataclasses.replace(
        rows[0],
        text=text,
        labels=labels,
        boxes=boxes,
        masks=_merge_mappings("masks", rows),
        regions=_merge_mappings("regions", rows),
        anatomy=_merge_mappings("anatomy", rows),
    )


def _respell_text(row: Study, text: str) -> Study:
    """Returns a row whose boxes and masks of the whole text have that text for a phrase."""
    if not row.text or row.text == text:
        return row
    boxes = [box | {"phrase": text} if box["phrase"] == row.text else box for box in row.boxes]
    masks = {text if name == row.text else name: path for name, path in row.masks.items()}
    return dataclasses.replace(row, boxes=boxes, masks=masks)


def _check_equal(name: str, values: Sequence[str], rows: Sequence[Study]) -> None:
    distinct_values = list(dict.fromkeys(values))
    if len(distinct_values) > 1:
        examples = " and ".join(quoting.quote(value) for value in distinct_values[:2])
        _refuse(rows, f"of {name} {examples}", "put all of its rows into one")


def _merge_mappings(name: str, rows: Sequence[Study]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for row in rows:
        for key, value in getattr(row, name).items():
            if merged.setdefault(key, value) != value:
                remedy = "save their union as one mask" if name == "masks" else "leave one of them"
                _refuse(rows, f"with different {name}", remedy)
    return merged


def _refuse(rows: Sequence[Study], fault: str, remedy: str) -> None:
    numbers = ", ".join(str(row.number) for row in rows[:3])
    more = ", ..." if len(rows) > 3 else ""
    raise UserError(
        f"image {quoting.quote_path(rows[0].path)} is in rows {numbers}{more} {fault}; {remedy}"
    )


# Labels ---------------------------------------------------------------------------------------


def _merge_labels(rows: Sequence[Study], policy: str) -> Labels:
    """Returns the labels of one image: within a reader those of any row, then among readers."""
    is_list = any(row.labels.default == 0 for row in rows)
    if policy == "majority" and is_list and not all(row.reader for row in rows):
        raise UserError(
            "duplicates 'majority' counts readers, and rows with lists of labels name none; map "
            "their column with data.builder.columns={'reader': '...'}"
        )
    by_reader: dict[str, list[Labels]] = {}
    for position, row in enumerate(rows):
        # Without readers, each row of values is a vote of its own.
        is_vote = not row.reader and policy == "majority"
        by_reader.setdefault(f"row {position}" if is_vote else row.reader, []).append(row.labels)
    opinions = [_join_labels(labels, rows, policy) for labels in by_reader.values()]
    if len(opinions) == 1:
        return opinions[0]
    names = list(dict.fromkeys(name for opinion in opinions for name in opinion.values))
    default = max(opinion.default for opinion in opinions)
    values = {}
    for name in names:
        votes = [opinion.values.get(name, opinion.default) for opinion in opinions]
        values[name] = _decide(name, votes, rows, policy)
    return Labels(values, default)


def _join_labels(labels: Sequence[Labels], rows: Sequence[Study], policy: str) -> Labels:
    """Returns the labels of rows that complete each other, as one row a finding does.

    A list says that the names of other rows are absent from it; here it is one of several lists of
    one image, so a name is present if any list has it.
    """
    names = list(dict.fromkeys(name for item in labels for name in item.values))
    values = {}
    for name in names:
        votes = [item.values[name] for item in labels if name in item.values]
        values[name] = _decide(name, votes, rows, policy)
    present_names = [name for name, value in values.items() if value == 1]
    normal_names = [name for name in present_names if is_normal_name(name)]
    if normal_names and len(normal_names) < len(present_names):
        if policy == "merge":
            finding = next(name for name in present_names if name not in normal_names)
            _refuse_labels(rows, f"{quoting.quote(normal_names[0])} and {quoting.quote(finding)}")
        values |= dict.fromkeys(normal_names, 0)
    return Labels(values, max(item.default for item in labels))


def _decide(name: str, votes: Sequence[int], rows: Sequence[Study], policy: str) -> int:
    """Returns the value of a label: the known one, or what the policy makes of several."""
    known_votes = [vote for vote in votes if vote >= 0]
    if not known_votes:
        return -1
    if len(set(known_votes)) == 1:
        return known_votes[0]
    if policy == "merge":
        _refuse_labels(rows, f"{quoting.quote(name)} is 1 and 0")
    if policy == "majority":
        return int(sum(known_votes) > len(known_votes) / 2)
    # Any reader who sees a finding decides; a normal image is one that all call normal.
    return min(known_votes) if is_normal_name(name) else max(known_votes)


def _refuse_labels(rows: Sequence[Study], fault: str) -> None:
    _refuse(
        rows,
        f"with contradictory labels ({fault})",
        "set data.builder.duplicates to 'any', 'majority' or 'separate', or correct them",
    )

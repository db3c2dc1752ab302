"""Decisions over all studies of a manifest: the format of boxes, the spelling of findings."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax.data import quoting
from plan_jax.data.pairs import boxes, label_names, manifest
from plan_jax.data.pairs.annotations import Labels
from plan_jax.data.pairs.cells import fold_name
from plan_jax.data.pairs.studies import Study
from plan_jax.data.prompts import is_normal_name
from plan_jax.types import UserError

# Boxes --------------------------------------------------------------------------------------


def filter_boxes(
    studies: Sequence[Study], conditions: Mapping[str, Any]
) -> tuple[list[Study], int]:
    """Returns studies with the boxes that fulfil `box_where`, and the number of boxes of zeros.

    A box of zeros is none: tables write it for images without a box.

    Raises:
      UserError: for a condition on a field that does not exist, or of the wrong form.
    """
    all_boxes = [box for study in studies for box in study.boxes]
    manifest.check_conditions(conditions, all_boxes, "box_where")
    num_zero = sum(not any(box["box"]) for box in all_boxes)
    filtered_studies = []
    for study in studies:
        fulfilling_boxes = [
            box for box in manifest.filter_rows(study.boxes, conditions) if any(box["box"])
        ]
        filtered_studies.append(dataclasses.replace(study, boxes=fulfilling_boxes))
    return filtered_studies, num_zero


def choose_box_formats(
    studies: Sequence[Study], box_format: str, region_format: str
) -> tuple[list[Study], list[str], str]:
    """Returns studies whose boxes all name their format, the formats, and that of regions.

    Args:
      studies: all studies.
      box_format: the format of boxes that the user has named, or "".
      region_format: the format of regions that the user has named, or "".

    Raises:
      UserError: if the numbers of a column cannot have its format, see `boxes.choose_format`.
    """
    all_boxes = [box for study in studies for box in study.boxes]
    formats = {
        stated: boxes.choose_format(
            [box["box"] for box in all_boxes if box.get("box_format", "") == stated],
            "boxes",
            box_format,
            stated,
        )
        for stated in ("", *boxes.FORMATS)
    }
    regions = [box for study in studies for box in study.regions.values()]
    chosen_region_format = boxes.choose_format(regions, "regions", region_format)
    named_studies = [
        dataclasses.replace(
            study,
            boxes=[box | {"box_format": formats[box.get("box_format", "")]} for box in study.boxes],
        )
        for study in studies
    ]
    occurring_formats = dict.fromkeys(
        box["box_format"] for study in named_studies for box in study.boxes
    )
    return named_studies, list(occurring_formats), chosen_region_format


# Findings -----------------------------------------------------------------------------------


def match_findings(
    studies: Sequence[Study], findings: Sequence[str]
) -> tuple[list[Study], list[str]]:
    """Returns studies whose labels have one spelling for each finding, and notes for the user.

    That goes for the labels of boxes too.

    Args:
      studies: all studies.
      findings: names of the findings that the user wants; () for all.

    Raises:
      UserError: if labels are no names or none is in `findings`, see `label_names.match_names`, or
        if two spellings contradict each other in one row.
    """
    counts = Counter(
        name for study in studies for name, value in study.labels.values.items() if value != -1
    )
    counts.update({name: 0 for study in studies for name in study.labels.values})
    matches, notes = label_names.match_names(counts, findings)
    box_counts = Counter(box["label"] for study in studies for box in study.boxes if box["label"])
    spellings = {fold_name(name): name for name in (*matches.values(), *findings)}
    foreign_names = [name for name in sorted(box_counts) if fold_name(name) not in spellings]
    if findings and foreign_names:
        name_list = label_names.list_names(foreign_names, box_counts)
        notes.append(f"labels of boxes that are not in findings: {name_list}")
    for name in foreign_names:
        spellings.setdefault(fold_name(name), name)
    matched_studies = [
        dataclasses.replace(
            study,
            labels=_rename_labels(study, matches),
            boxes=[
                box | {"label": spellings.get(fold_name(box["label"]), "")} for box in study.boxes
            ],
        )
        for study in studies
    ]
    return matched_studies, notes + _remark_normal(matched_studies)


def _rename_labels(study: Study, matches: Mapping[str, str]) -> Labels:
    """Returns the labels of a study by the names of findings, without those that have none."""
    values: dict[str, int] = {}
    for name, value in study.labels.values.items():
        if name not in matches:
            continue
        finding = matches[name]
        earlier = values.get(finding, -1)
        if min(earlier, value) >= 0 and earlier != value:
            raise UserError(
                f"row {study.number} says 1 and 0 of {quoting.quote(finding)}, in two spellings; "
                "correct it"
            )
        values[finding] = max(earlier, value)
    return Labels(values, study.labels.default)


def _remark_normal(studies: Sequence[Study]) -> list[str]:
    """Returns a note on rows that say that nothing is found, and name a finding."""
    count = 0
    for study in studies:
        present_names = [name for name, value in study.labels.values.items() if value == 1]
        num_normal = sum(map(is_normal_name, present_names))
        count += 0 < num_normal < len(present_names)
    if not count:
        return []
    return [f"rows that say that nothing is found and name a finding too: {count}"]

"""VinDr-CXR: 18,000 frontal films, labels and boxes of 28 findings by three readers each."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeAlias

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Box, Corners, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash, hold_out
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture"),
    *("Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity"),
    *("Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"),
    *("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"),
)
NO_FINDING = "No finding"
KAGGLE_FINDINGS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD"),
    *("Infiltration", "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", NO_FINDING),
)
SPELLINGS = {"Other disease": "Other diseases"}  # of the table of test -> of the others
CORNERS = ("x_min", "y_min", "x_max", "y_max")
KAGGLE_TABLE = "train.csv"
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
MIN_IOU = 0.5  # of boxes that are fused
NUM_TRAIN = 15_000

# Image -> reader -> names of findings.
Readings: TypeAlias = dict[str, dict[str, set[str]]]

FACTS = Facts(
    name="vindr_cxr",
    title="VinDr-CXR",
    content="18,000 frontal films, 28 labels, boxes of 22 of them; each film of train by three "
    "readers, each of test by consensus",
    page="physionet.org/content/vindr-cxr/1.0.0",
    licence="PhysioNet Credentialed Health Data License 1.5.0; on Kaggle, terms of the competition",
    citation="Nguyen et al., Scientific Data 2022",
    files="train/, test/ and annotations/ as on PhysioNet; or train/ and train.csv of "
    "kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection",
    provides=("labels", "boxes"),
    patients="no patients are known; each image counts as one",
    is_split_by_image=True,
    splits={
        "official": "test/ is test; of train/, a hash puts `val_fraction` into val. Kaggle's test "
        "has no labels, so there all are divided by hash",
        "benchx": "BenchX: of train/ 12,000 are train and 3,000 val, stratified by whether any "
        "reader has a finding; test/ is test",
    },
    defects=(
        "readers of a film disagree",
        "the tables of test spell `Other disease`, and have no reader",
        "Kaggle has 15 of the 28 labels",
        "films of 10 to 16 bits, some MONOCHROME1, a third JPEG 2000",
    ),
    counts={"images": 18_000},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class VindrCxrConfig(PublicConfig):
    """Where VinDr-CXR was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # How many of three readers make a finding present (1: any; BenchX). Boxes of findings that are
    # not present are left out.
    min_readers: int = 2
    # Whether boxes of one finding that overlap (IoU >= 0.5) become their mean; if not, the boxes of
    # every reader are kept.
    fuse_boxes: bool = True

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        if not 1 <= self.min_readers <= 3:
            raise UserError(
                f"min_readers {self.min_readers} of dataset vindr_cxr is not 1, 2 or 3; a film has "
                "three readers"
            )


def read_items(source: SourceFolder, config: VindrCxrConfig) -> Iterator[Item]:
    """Yields the films, with the labels that enough readers give, and their boxes."""
    is_kaggle = not source.find("annotations_train.csv")
    if is_kaggle:
        source.require("annotations_train.csv", KAGGLE_TABLE)
        if config.split_rule == "benchx":
            raise UserError(
                "split rule benchx divides the films of annotations_train.csv, which "
                f"{source.root} does not have; use split {BY_HASH}, or PhysioNet's tables"
            )
        source.note("Kaggle's films of test have no labels, so films are divided by hash")
    for part in ("train",) if is_kaggle else ("train", "test"):
        table = KAGGLE_TABLE if is_kaggle else f"annotations_{part}.csv"
        # The readers of test agree on one opinion.
        reader = ("rad_id",) if part == "train" else ()
        box_readings, boxes = _read_annotations(source, source.require(table), reader)
        label_readings = (
            {} if is_kaggle else _read_labels(source, f"image_labels_{part}.csv", reader)
        )
        names = KAGGLE_FINDINGS if is_kaggle else FINDINGS
        readings = label_readings or box_readings
        for image_id in sorted(box_readings.keys() - readings.keys()):
            source.drop("annotations of a film that the table of labels does not have", image_id)
        splits = {} if is_kaggle else _assign_splits(source, config, part, readings, box_readings)
        folder = source.find_folder(part) or part
        # Copies in other formats are reduced, and then the boxes are not theirs.
        place_of = {
            name.rpartition(".")[0]: name
            for name in source.list_names(folder)
            if name.lower().endswith((".dicom", ".dcm"))
        }
        num_boxes = 0
        for image_id in sorted(readings):
            labels = _count_readers(readings[image_id], names, config.min_readers)
            marks = {
                label: group
                for label, group in boxes.get(image_id, {}).items()
                if labels.get(label, 1) == 1
            }
            num_boxes += sum(map(len, marks.values()))
            yield Item(
                image_id=image_id,
                image=f"{folder}/{place_of.get(image_id, f'{image_id}.dicom')}",
                patient_id=image_id,
                split=splits.get(image_id, ""),
                labels=labels,
                boxes=[
                    Box(corners, label)
                    for label, group in marks.items()
                    for corners in (fuse(group) if config.fuse_boxes else group)
                ],
            )
        total = sum(len(group) for groups in boxes.values() for group in groups.values())
        if num_boxes < total:
            source.note(
                f"{total - num_boxes} of {total} boxes of {part} are left out, as fewer than "
                f"{config.min_readers} readers gave their finding"
            )


def _read_annotations(
    source: SourceFolder, table: str, reader: Sequence[str]
) -> tuple[Readings, dict[str, dict[str, list[Corners]]]]:
    """Returns the findings that each reader drew or noted, and the boxes of each finding."""
    readings: Readings = {}
    boxes: dict[str, dict[str, list[Corners]]] = {}
    columns = ("image_id", "class_name", *CORNERS, *reader)
    for row in source.read_csv(table, columns):
        image_id = row["image_id"]
        label = SPELLINGS.get(row["class_name"], row["class_name"])
        if label not in FINDINGS:
            raise UserError(
                f"class {quoting.quote(label)} of {image_id} in {table} is none of VinDr's findings"
            )
        readings.setdefault(image_id, {}).setdefault(row.get("rad_id", ""), set()).add(label)
        cells = [row[column] for column in CORNERS]
        if not any(cells):  # without a finding, or one of the whole film
            continue
        corners = parse_numbers(cells)
        if corners is None:
            source.drop("a box has no four numbers", image_id)
            continue
        x0, y0, x1, y1 = corners
        if x1 <= x0 or y1 <= y0:
            source.drop("a box has no area", image_id)
            continue
        boxes.setdefault(image_id, {}).setdefault(label, []).append((x0, y0, x1, y1))
    return readings, boxes


def _read_labels(source: SourceFolder, name: str, reader: Sequence[str]) -> Readings:
    """Returns the findings by image and reader out of a table with a column for each finding."""
    table = source.find(name)
    if not table:
        source.note(f"there is no {name}, so labels are those of the annotations")
        return {}
    readings: Readings = {}
    columns = [finding for finding in FINDINGS if finding not in SPELLINGS.values()]
    spellings = [*SPELLINGS, *SPELLINGS.values()]
    for row in source.read_csv(table, ["image_id", *reader, *columns], optional=spellings):
        present = set()
        for finding in (*columns, *(name for name in spellings if row[name])):
            if row[finding] not in LABELS:
                raise UserError(
                    f"label {quoting.quote(row[finding])} of {finding} of {row['image_id']} in "
                    f"{table} is not 0 or 1; correct it"
                )
            if LABELS[row[finding]]:
                present.add(SPELLINGS.get(finding, finding))
        readings.setdefault(row["image_id"], {})[row.get("rad_id", "")] = present
    return readings


def _count_readers(
    findings_of: Mapping[str, set[str]], names: Sequence[str], min_readers: int
) -> dict[str, int]:
    """Returns for each finding whether enough readers give it; all of them, if they are fewer."""
    needed = min(min_readers, len(findings_of))
    return {
        name: int(sum(name in findings for findings in findings_of.values()) >= needed)
        for name in names
    }


def _assign_splits(
    source: SourceFolder,
    config: VindrCxrConfig,
    part: str,
    names: Iterable[str],
    box_readings: Readings,
) -> dict[str, str]:
    """Returns the splits of the films of a part of PhysioNet."""
    names = sorted(names)
    if part == "test":
        return dict.fromkeys(names, "test")
    if config.split_rule != "benchx":
        return {name: assign_by_hash(name, config.val_fraction, 0.0) for name in names}
    if len(names) != NUM_TRAIN:
        source.note(
            f"benchx divides {NUM_TRAIN:,} films, and the tables of train have {len(names):,}, so "
            "the splits are not the published ones"
        )
    has_finding = [
        int(any(findings - {NO_FINDING} for findings in box_readings.get(name, {}).values()))
        for name in names
    ]
    _, val = hold_out(len(names), len(names) // 5, 42, has_finding)
    return dict.fromkeys(names, "train") | {names[index]: "val" for index in val}


def fuse(boxes: Iterable[Corners]) -> list[Corners]:
    """Returns boxes of one finding, of which those that overlap are replaced by their mean.

    Each box joins the group whose mean it overlaps most, if the IoU is 0.5 or more. This is
    weighted box fusion with equal weights.

    >>> fuse([(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 8.0), (20.0, 0.0, 30.0, 10.0)])
    [(0.0, 0.0, 10.0, 9.0), (20.0, 0.0, 30.0, 10.0)]
    """
    groups: list[list[Corners]] = []
    means: list[Corners] = []
    for box in boxes:
        overlaps = [_compute_iou(box, mean) for mean in means]
        best = max(range(len(groups)), key=overlaps.__getitem__, default=-1)
        if best < 0 or overlaps[best] < MIN_IOU:
            groups.append([])
            means.append(box)
            best = len(groups) - 1
        groups[best].append(box)
        x0, y0, x1, y1 = (sum(side) / len(groups[best]) for side in zip(*groups[best], strict=True))
        means[best] = (x0, y0, x1, y1)
    return means


def _compute_iou(first: Corners, second: Corners) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first, second))
    return width * height / (areas - width * height)


class VindrCxr(PublicBuilder):
    """Builds VinDr-CXR."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: VindrCxrConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films with labels and boxes."""
        return read_items(source, self.builder_config)

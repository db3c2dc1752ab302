"""ChestX-Det: 3,578 films of NIH ChestX-ray14 with outlines of 13 findings; and ChestX-Det10."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Box, Item, Shape
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "Diffuse Nodule"),
    *("Effusion", "Emphysema", "Fibrosis", "Fracture", "Mass", "Nodule", "Pleural Thickening"),
    "Pneumothorax",
)
ADDED = ("Cardiomegaly", "Diffuse Nodule", "Pleural Thickening")  # findings that Det10 lacks
TABLES = "ChestX_Det_{split}.json"
TABLES_10 = "{split}.json"
FOLDERS = ("{split}_data/{split}", "{split}_data", "{split}", "images")

FACTS = Facts(
    name="chestx_det",
    title="ChestX-Det",
    content="3,578 films of NIH with boxes and outlines of 13 findings by radiologists; or "
    "ChestX-Det10: 3,543 films with boxes of 10 of them",
    page="github.com/Deepwise-AILab/ChestX-Det-Dataset",
    licence="Apache-2.0 (lists); films under the terms of NIH ChestX-ray14",
    citation="Lian et al., IEEE Transactions on Medical Imaging 2021",
    files="ChestX_Det_train.json, ChestX_Det_test.json, train_data/ and test_data/; or train.json "
    "and test.json of ChestX-Det10",
    provides=("labels", "boxes", "masks"),
    patients="films of NIH with new numbers, which do not tell patients; each image counts as one",
    is_split_by_image=True,
    splits={
        "official": "the list of test is test; of the list of train, a hash puts `val_fraction` "
        "into val",
    },
    leaks={"official": "how many is unknown; patients of NIH may be in train, test and other sets"},
    defects=(
        "films are renumbered, and no official list names their NIH films",
        "ChestX-Det10 is a part of ChestX-Det without outlines and without three findings",
    ),
    counts={"images": 3_578, "boxes": 9_639},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class ChestxDetConfig(PublicConfig):
    """Where ChestX-Det was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films of both lists, with a box and an outline for each finding."""
    pattern = TABLES if source.find(TABLES.format(split="train")) else TABLES_10
    source.require(TABLES.format(split="train"), TABLES_10.format(split="train"))
    for split in ("train", "test"):
        table = source.require(pattern.format(split=split))
        place_of = {
            name: f"{folder}/{name}"
            for place in FOLDERS
            if (folder := source.find_folder(place.format(split=split)))
            for name in source.list_names(folder)
        }
        entries = _read_entries(source, table)
        # ChestX-Det10 says nothing of the findings that were added later.
        categories = [
            name
            for name in FINDINGS
            if name not in ADDED or any(entry["polygons"] is not None for entry in entries)
        ]
        for entry in entries:
            name = entry["file_name"]
            labels, boxes = entry["syms"], entry["boxes"]
            outlines = entry["polygons"]
            if outlines is None:
                outlines = [None] * len(boxes)
            if not len(labels) == len(boxes) == len(outlines):
                source.drop("lists of findings, boxes and outlines of different lengths", name)
                continue
            yield Item(
                image_id=name.rpartition(".")[0],
                image=place_of.get(name, f"{split}_data/{name}"),
                patient_id=name.rpartition(".")[0],
                split=assign_by_hash(name, config.val_fraction, 0.0) if split == "train" else split,
                labels={finding: int(finding in labels) for finding in categories},
                boxes=list(_read_boxes(source, name, labels, boxes)),
                shapes=list(_read_outlines(source, name, labels, outlines)),
            )


def _read_entries(source: SourceFolder, table: str) -> list[dict[str, Any]]:
    """Returns the entries of a list, whose fields exist and whose findings are known."""
    try:
        entries: list[dict[str, Any]] = [
            {
                "file_name": str(entry["file_name"]),
                "syms": list(entry["syms"]),
                "boxes": list(entry["boxes"]),
                "polygons": list(entry["polygons"]) if "polygons" in entry else None,
            }
            for entry in source.read_json(table)
        ]
    except (KeyError, TypeError):
        raise UserError(
            f"{table} in {source.root} is not a list of objects with file_name, syms and boxes; "
            f"download it again from {source.page}"
        ) from None
    for entry in entries:
        if unknown := [name for name in entry["syms"] if name not in FINDINGS]:
            raise UserError(
                f"finding {quoting.quote(unknown[0])} of {entry['file_name']} in {table} is none "
                "of ChestX-Det's"
            )
    return entries


def _read_boxes(
    source: SourceFolder, name: str, labels: Sequence[str], boxes: Sequence[Any]
) -> Iterator[Box]:
    for label, box in zip(labels, boxes, strict=True):
        corners = parse_numbers(map(str, box)) if isinstance(box, list) else None
        if corners is None or len(corners) != 4:
            source.drop("a box has no four numbers", name)
            continue
        x0, y0, x1, y1 = corners
        if x1 <= x0 or y1 <= y0:
            source.drop("a box has no area", name)
            continue
        yield Box((x0, y0, x1, y1), label)


def _read_outlines(
    source: SourceFolder, name: str, labels: Sequence[str], outlines: Sequence[Any]
) -> Iterator[Shape]:
    for label, points in zip(labels, outlines, strict=True):
        if points is None:
            continue
        if not isinstance(points, list) or len(points) < 3 or not all(map(_is_point, points)):
            source.drop("an outline has no three points", name)
            continue
        yield Shape("polygons", [points], label)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and bool(parse_numbers(map(str, point)))


class ChestxDet(PublicBuilder):
    """Builds ChestX-Det."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ChestxDetConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of both lists."""
        return read_items(source, self.builder_config)

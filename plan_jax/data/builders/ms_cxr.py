"""MS-CXR: 1,162 phrases with 1,448 boxes on 1,047 films of MIMIC-CXR."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, ClassVar

from plan_jax.data.public import mimic_tree
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.facts import PHYSIONET_LICENCE, Facts
from plan_jax.data.public.items import SPLITS, Box, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Lung Opacity"),
    *("Pleural Effusion", "Pneumonia", "Pneumothorax"),
)
# Version 0.1 of the project holds files that are called v1.0.0.
TABLES = tuple(
    f"MS_CXR_Local_Alignment_v{version}.{suffix}"
    for version in ("1.1.0", "1.0.0")
    for suffix in ("csv", "json")
)
BOX_COLUMNS = ("x", "y", "w", "h")
SHAPE_COLUMNS = ("image_height", "image_width")
COLUMNS = ("category_name", "label_text", "path", "dicom_id", *BOX_COLUMNS, *SHAPE_COLUMNS)

FACTS = Facts(
    name="ms_cxr",
    title="MS-CXR",
    content="1,162 phrases of 8 findings with 1,448 boxes on 1,047 frontal films of 851 patients",
    page="physionet.org/content/ms-cxr",
    licence=PHYSIONET_LICENCE,
    citation="Boecking et al., ECCV 2022",
    files="MS_CXR_Local_Alignment_v1.1.0.csv or .json (or v1.0.0, of project version 0.1); and the "
    "folder of MIMIC-CXR-JPG as `images`",
    provides=("labels", "boxes"),
    patients="the subject of MIMIC-CXR, from the path of the image",
    splits={
        "evaluation": "all films are test, as grounding without training is evaluated",
        "official": "the column `split` of version 1.1.0",
    },
    leaks={
        "evaluation": "no image; but all 851 patients are patients of MIMIC-CXR, whose training "
        "split leaves them out only if `mimic_cxr` is told where MS-CXR is"
    },
    defects=(
        "project version 0.1 holds files called v1.0.0",
        "a phrase may be repeated in another case, and under two categories",
        "boxes are in pixels of the full-size JPG",
    ),
    counts={"images": 1047, "patients": 851, "phrases": 1162, "boxes": 1448},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class MsCxrConfig(mimic_tree.MimicConfig):
    """Where MS-CXR was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS
    places: ClassVar[tuple[str, ...]] = ("images",)

    # Folder of MIMIC-CXR-JPG ("": the source folder).
    images: str = ""


def read_items(source: SourceFolder, config: MsCxrConfig) -> Iterator[Item]:
    """Yields the films of the table with their phrases and boxes."""
    images = mimic_tree.open_images(source, config.images)
    films: dict[str, list[dict[str, str]]] = {}
    for row in _read_rows(source, source.require(*TABLES)):
        films.setdefault(row["dicom_id"], []).append(row)
    if config.split_rule == "official" and not all(row["split"] for row, *_ in films.values()):
        raise UserError(
            f"the table of MS-CXR in {source.root} has no split of every film; download version "
            f"1.1.0 from {FACTS.page}, or leave data.builder.split empty"
        )
    num_shared = 0
    for dicom_id, rows in films.items():
        ids = mimic_tree.parse_image_path(rows[0]["path"])
        if ids is None or ids[2] != dicom_id:
            source.drop("a path does not name its image", dicom_id)
            continue
        shape = parse_numbers(rows[0][column] for column in SHAPE_COLUMNS)
        boxes, is_shared = _read_boxes(source, rows)
        num_shared += is_shared
        split = {"evaluation": "test", "official": rows[0]["split"]}.get(config.split_rule, "")
        if split not in (*SPLITS, ""):
            raise UserError(
                f"split {split!r} of {dicom_id} in MS-CXR's table is none of {', '.join(SPLITS)}"
            )
        yield Item(
            image_id=dicom_id,
            image=images.locate(*ids),
            patient_id=ids[0],
            study_id=ids[1],
            split=split,
            view="FRONTAL",
            labels={row["category_name"]: 1 for row in rows},
            boxes=boxes,
            shape=(int(shape[0]), int(shape[1])) if shape else None,
        )
    if num_shared:
        source.note(
            f"phrases that are listed under two categories, and count for the first: {num_shared}"
        )


def _read_rows(source: SourceFolder, table: str) -> Iterator[dict[str, str]]:
    """Yields one row a box, whether the table is CSV or the objects of COCO."""
    if ".json" not in os.path.basename(table):
        yield from source.read_csv(table, COLUMNS, optional=("split",))
        return
    content = source.read_json(table)
    try:
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        films = {entry["id"]: entry for entry in content["images"]}
        for entry in content["annotations"]:
            yield _flatten(entry, films[entry["image_id"]], categories[entry["category_id"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{table} in {source.root} lacks {error} of COCO's format; download it again from "
            f"{FACTS.page}"
        ) from None


def _flatten(entry: dict[str, Any], film: dict[str, Any], category: str) -> dict[str, str]:
    """Returns a box of COCO as a row of the CSV table."""
    path = film["path"]
    ids = mimic_tree.parse_image_path(path)
    return {
        "category_name": category,
        "label_text": entry["label_text"].strip(),
        "path": path,
        "dicom_id": ids[2] if ids else path,
        **dict(zip(BOX_COLUMNS, map(str, entry["bbox"]), strict=True)),
        "image_height": str(film["height"]),
        "image_width": str(film["width"]),
        "split": entry.get("split", ""),
    }


def _read_boxes(source: SourceFolder, rows: list[dict[str, str]]) -> tuple[list[Box], int]:
    """Returns the boxes of a film, and how many of its phrases have two categories.

    Rows of the same words, whatever their case, are one phrase.
    """
    boxes: list[Box] = []
    first_of: dict[str, dict[str, str]] = {}
    shared: set[str] = set()
    for row in rows:
        words = row["label_text"].lower()
        first = first_of.setdefault(words, row)
        if first["category_name"] != row["category_name"]:
            shared.add(words)
        numbers = parse_numbers(row[column] for column in BOX_COLUMNS)
        if numbers is None or numbers[2] <= 0 or numbers[3] <= 0:
            source.drop("a box has no area", row["dicom_id"])
            continue
        x, y, width, height = numbers
        corners = (x, y, x + width, y + height)
        boxes.append(Box(corners, first["category_name"], first["label_text"]))
    return boxes, len(shared)


def find_patients(source: SourceFolder, path: str) -> frozenset[str]:
    """Returns the patients of MS-CXR, which no model that it evaluates may train on.

    Args:
      source: the folder that is searched, and that gets a note if there is no MS-CXR.
      path: the folder or the table of MS-CXR; "" searches the source folder.
    """

    def read(folder: SourceFolder, table: str) -> frozenset[str]:
        paths = (row["path"] for row in _read_rows(folder, table))
        patients = frozenset(ids[0] for ids in map(mimic_tree.parse_image_path, paths) if ids)
        mimic_tree.check_evaluated(folder, table, patients)
        return patients

    return mimic_tree.find_evaluated(source, path, FACTS, TABLES, read)


class MsCxr(PublicBuilder):
    """Builds MS-CXR."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: MsCxrConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the table."""
        return read_items(source, self.builder_config)

"""SIIM-ACR pneumothorax: 12,047 films of NIH ChestX-ray14 with masks of pneumothoraces."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Item, Shape
from plan_jax.data.public.shapes import parse_relative_runs
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import hold_out
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

PNEUMOTHORAX = "Pneumothorax"
RUN_TABLES = ("train-rle.csv", "stage_2_train.csv")
PNG_TABLES = ("stage_1_train_images.csv", "stage_1_test_images.csv")
TREES = ("dicom-images-train", "dicom-images-test")  # of the first release
FOLDER = "stage_2_images"  # of Kaggle today, flat
FRAME = (1024, 1024)  # that the runs are counted in
NO_MASK = "-1"
NUM_ROWS = 12_954  # of the table of runs
NUM_PNGS = 12_047

FACTS = Facts(
    name="siim_pneumothorax",
    title="SIIM-ACR pneumothorax",
    content="12,047 frontal films of NIH, 2,669 with masks of pneumothoraces",
    page="kaggle.com/c/siim-acr-pneumothorax-segmentation",
    licence="terms of the competition; the lists may not be passed on",
    citation="SIIM-ACR Pneumothorax Segmentation, Kaggle 2019",
    files="train-rle.csv, dicom-images-train/ and dicom-images-test/; or stage_2_train.csv and "
    "stage_2_images/; or stage_1_train_images.csv, stage_1_test_images.csv, png_images/ and "
    "png_masks/ as of kaggle.com/datasets/vbookshelf/pneumothorax-chest-xray-images-and-masks",
    provides=("labels", "masks"),
    patients="no patients are known; each image counts as one, and images are divided",
    is_split_by_image=True,
    splits={
        BY_HASH: "images are divided by hash",
        "mgca_compat": "MGCA and GLoRIA: rows of the table of runs 70 / 15 / 15; an image whose "
        "rows are divided is in several splits, with a part of its mask in each",
        "benchx": "BenchX: the PNG files of stage 1, 9,303 / 1,372 / 1,372, stratified by label",
    },
    leaks={
        "mgca_compat": "154 of 1,903 test images are in train too, with other masks",
        "benchx": "how many is unknown, as patients are not told apart",
    },
    defects=(
        "a blank before the name of the second column, and before -1 in some copies",
        "one row for each mask of an image, up to 10",
        "ids that begin with ID_ in Kaggle's table of today do not match older lists",
        "several images may be of one patient, and patients of NIH, RSNA and SIIM overlap",
    ),
    counts={"images": NUM_PNGS},
    findings=(PNEUMOTHORAX,),
)


@dataclasses.dataclass(eq=False)
class SiimPneumothoraxConfig(PublicConfig):
    """Where SIIM-ACR pneumothorax was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the images of the table of runs, or of the PNG files, with their masks."""
    rule = config.split_rule
    if source.require(*RUN_TABLES, PNG_TABLES[0]) == source.find(*RUN_TABLES):
        if rule == "benchx":
            raise UserError(
                f"split rule benchx divides the PNG files of {PNG_TABLES[0]}, which {source.root} "
                f"does not have; use split {BY_HASH}, or the PNG files"
            )
        return _read_runs(source, rule)
    if rule == "mgca_compat":
        raise UserError(
            f"split rule mgca_compat divides the rows of {RUN_TABLES[0]}, which {source.root} does "
            f"not have; use split {BY_HASH}, or add the table"
        )
    return _read_pngs(source, rule)


# DICOM and runs -----------------------------------------------------------------------------------


def _read_runs(source: SourceFolder, rule: str) -> Iterator[Item]:
    """Yields the images of the table of runs; by `mgca_compat`, once for each split of an image."""
    table = source.require(*RUN_TABLES)
    rows = list(source.read_csv(table, ("ImageId", "EncodedPixels")))
    splits = _divide_rows(source, table, len(rows)) if rule == "mgca_compat" else [""] * len(rows)
    texts: dict[str, dict[str, list[str]]] = {}
    for row, split in zip(rows, splits, strict=True):
        texts.setdefault(row["ImageId"], {}).setdefault(split, []).append(row["EncodedPixels"])
    place_of = _list_images(source)
    for name, parts in texts.items():
        if len({text == NO_MASK for part in parts.values() for text in part}) > 1:
            source.drop("an image with a mask and without one", name)
            continue
        folder = TREES[0] if RUN_TABLES[0] in table else FOLDER
        place = place_of.get(name, f"{folder}/{name}.dcm")
        for split, part in parts.items():
            try:
                shapes = [_make_mask(text) for text in part if text != NO_MASK]
            except ValueError as error:
                source.drop(f"a mask that cannot be drawn: {error}", name)
                continue
            yield Item(
                image_id=name if len(parts) == 1 else f"{name}-{split}",
                image=place,
                patient_id=name,
                study_id=place.split("/")[-3] if place.count("/") >= 3 else "",
                split=split,
                labels={PNEUMOTHORAX: int(bool(shapes))},
                shapes=shapes,
            )


def _make_mask(text: str) -> Shape:
    """Returns the mask of a row. An empty cell is not -1, which says that there is none."""
    return Shape("runs", parse_relative_runs(text, FRAME), PNEUMOTHORAX, size=FRAME)


def _list_images(source: SourceFolder) -> dict[str, str]:
    """Returns the path of each image, in the trees of studies and series or in a flat folder."""
    places: dict[str, str] = {}
    for name in (*TREES, FOLDER):
        folders = [folder] if (folder := source.find_folder(name)) else []
        for _ in range(3):  # the folder itself, its studies, their series
            below = []
            for folder in folders:
                for entry in source.list_names(folder):
                    if entry.lower().endswith(".dcm"):
                        places[entry[: -len(".dcm")]] = f"{folder}/{entry}"
                    else:
                        below.append(f"{folder}/{entry}")
            folders = below
    return places


def _divide_rows(source: SourceFolder, table: str, num_rows: int) -> list[str]:
    """Returns the split of each row as MGCA's code divides them."""
    if RUN_TABLES[0] not in table:
        source.note(
            f"mgca_compat divides the rows of {RUN_TABLES[0]}; {table} may have another order, and "
            "then the splits are not the published ones"
        )
    if num_rows != NUM_ROWS:
        source.note(
            f"mgca_compat divides {NUM_ROWS:,} rows, and the table of runs has {num_rows:,}, so "
            "the splits are not the published ones"
        )
    _, rest = hold_out(num_rows, 0.3, 0)
    test, val = hold_out(len(rest), 0.5, 0)  # MGCA takes the first half as test
    splits = ["train"] * num_rows
    for split, indices in (("val", val), ("test", test)):
        for index in indices:
            splits[rest[index]] = split
    return splits


# PNG ----------------------------------------------------------------------------------------------


def _read_pngs(source: SourceFolder, rule: str) -> Iterator[Item]:
    """Yields the PNG files, whose names say `<number>_<train|test>_<0|1>_.png`."""
    images, masks = source.find_folder("png_images"), source.find_folder("png_masks")
    rows = [
        row
        for table in PNG_TABLES
        for row in source.read_csv(source.require(table), ("new_filename", "ImageId", "has_pneumo"))
    ]
    names = [row["new_filename"] for row in rows]
    split_of = _divide_names(source, names) if rule == "benchx" else {}
    num_missing = 0
    for row in rows:
        name, flag = row["new_filename"], row["has_pneumo"].removesuffix(".0")
        mask = f"{masks or 'png_masks'}/{name}"
        if flag not in ("0", "1") or f"_{flag}_." not in name:
            source.drop("a label that contradicts the name of the file", name)
            continue
        has_mask = source.has(mask)
        num_missing += flag == "1" and not has_mask
        yield Item(
            image_id=row["ImageId"],
            image=f"{images or 'png_images'}/{name}",
            patient_id=row["ImageId"],
            split=split_of.get(name, ""),
            labels={PNEUMOTHORAX: int(flag)},
            # The mask of a film without a pneumothorax is black, or the labels contradict it.
            shapes=[Shape("file", mask, PNEUMOTHORAX)] if has_mask or flag == "1" else (),
        )
    if num_missing:
        source.note(
            f"{quoting.count(num_missing, 'film')} with a pneumothorax cannot be used without a "
            "mask; complete the download"
        )


def _divide_names(source: SourceFolder, names: Sequence[str]) -> Mapping[str, str]:
    """Returns the split of each file as BenchX's code divides them."""
    if len(names) != NUM_PNGS:
        source.note(
            f"benchx divides {NUM_PNGS:,} files, and the tables have {len(names):,}, so the splits "
            "are not the published ones"
        )
    test = [name for name in names if "test" in name]
    present, absent = (sorted(n for n in names if f"train_{flag}" in n) for flag in (1, 0))
    rest = [*present, *absent]
    labels = [1] * len(present) + [0] * len(absent)
    _, val = hold_out(len(rest), len(test), 42, labels)
    splits = dict.fromkeys(rest, "train") | dict.fromkeys(test, "test")
    return splits | {rest[index]: "val" for index in val}


class SiimPneumothorax(PublicBuilder):
    """Builds SIIM-ACR pneumothorax."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: SiimPneumothoraxConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the images with their masks."""
        return read_items(source, self.builder_config)

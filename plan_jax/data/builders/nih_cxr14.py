"""NIH ChestX-ray14: 112,120 frontal films, labels from reports, and boxes of eight findings."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Box, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
    *("Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"),
    *("Pneumonia", "Pneumothorax"),
)
NO_FINDING = "No Finding"
VIEWS = ("PA", "AP")
BOX_NAMES = {"Infiltrate": "Infiltration"}  # spelling of the list of boxes -> of the labels
IMAGE_FOLDERS = ("images", *(f"images_{number:03d}/images" for number in range(1, 13)))
ARCHIVES = ("images_001.tar.gz", "images_01.tar.gz")  # the first of twelve
BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")

FACTS = Facts(
    name="nih_cxr14",
    title="NIH ChestX-ray14",
    content="112,120 frontal films of 30,805 patients, 14 labels, 984 boxes on 880 films",
    page="nihcc.app.box.com/v/ChestXray-NIHCC",
    licence="free to use with attribution, no registration",
    citation="Wang et al., CVPR 2017",
    files="Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), BBox_List_2017.csv, "
    "train_val_list.txt and test_list.txt, and images/ or images_001/ to images_012/",
    provides=("labels", "boxes"),
    patients="the column `Patient ID`",
    splits={
        "official": "test_list.txt is test; of the patients of train_val_list.txt, a hash puts "
        "`val_fraction` into val. Without the lists, patients are divided by hash",
    },
    defects=(
        "labels are mined from reports and noisy",
        "the 2017 table has ages up to 412 and a column without a name",
        "the list of boxes calls Infiltration `Infiltrate`",
    ),
    counts={"images": 112_120, "patients": 30_805, "boxes": 984},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class NihCxr14Config(PublicConfig):
    """Where NIH ChestX-ray14 was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films of the table, with the boxes of the list of boxes."""
    table = source.require("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    boxes = _read_boxes(source)
    lists = _read_lists(source) if config.split_rule == "official" else {}
    folders = [folder for folder in IMAGE_FOLDERS if source.find_folder(folder)]
    place_of = {
        name: f"{path}/{name}"
        for folder in folders
        for path in (source.find_folder(folder),)
        for name in source.list_names(path)
        if name.endswith(".png")
    }
    if not place_of and (archive := source.find(*ARCHIVES)):
        source.note(
            f"the images are not unpacked; in the folder of {archive}, run "
            "for part in images_*.tar.gz; do tar -xzf $part; done"
        )
    columns = ("Image Index", "Finding Labels", "Patient ID", "View Position")
    list_of: dict[str, str] = {}
    num_trained = 0
    for row in source.read_csv(table, columns):
        name, patient_id = row["Image Index"], row["Patient ID"]
        names = row["Finding Labels"].split("|")
        if unknown := [label for label in names if label not in (*FINDINGS, NO_FINDING)]:
            raise UserError(f"label {unknown[0]!r} of {name} in {table} is none of NIH's findings")
        if not patient_id:
            source.drop("a row has no patient id", name)
            continue
        split = lists.get(name, "")
        if lists and not split:
            source.drop("in neither of the official lists", name)
            continue
        # A patient in both lists would be trained and tested on.
        if list_of.setdefault(patient_id, split) != split:
            raise UserError(
                f"patient {patient_id} has films in both official lists of {source.root}; download "
                f"train_val_list.txt and test_list.txt again from {FACTS.page}"
            )
        num_trained += split == "train" and name in boxes
        if split == "train":
            split = assign_by_hash(patient_id, config.val_fraction, 0.0)
        yield Item(
            image_id=name,
            image=place_of.get(name, f"images/{name}"),
            patient_id=patient_id,
            split=split,
            view=view if (view := row["View Position"].upper()) in VIEWS else "UNKNOWN",
            labels={finding: int(finding in names) for finding in FINDINGS},
            boxes=boxes.pop(name, ()),
        )
    for name in boxes:
        source.drop("boxes of a film that the table does not have", name)
    if num_trained:
        source.note(
            f"{quoting.count(num_trained, 'film')} with boxes in train_val_list.txt; do not test "
            "boxes on what was trained on"
        )


def _read_boxes(source: SourceFolder) -> dict[str, list[Box]]:
    """Returns the boxes of each film. The header names them as one list: `Bbox [x,y,w,h]`."""
    boxes: dict[str, list[Box]] = {}
    table = source.find("BBox_List_2017.csv")
    if not table:
        source.note("there is no BBox_List_2017.csv, so no film has boxes")
        return boxes
    for row in source.read_csv(table, ("Image Index", "Finding Label", *BOX_COLUMNS)):
        label = BOX_NAMES.get(row["Finding Label"], row["Finding Label"])
        numbers = parse_numbers(row[column] for column in BOX_COLUMNS)
        if numbers is None:
            source.drop("a box has no four numbers", row["Image Index"])
            continue
        x, y, width, height = numbers
        if min(width, height) <= 0:
            source.drop("a box has no area", row["Image Index"])
            continue
        corners = (x, y, x + width, y + height)
        boxes.setdefault(row["Image Index"], []).append(Box(corners, label))
    return boxes


def _read_lists(source: SourceFolder) -> dict[str, str]:
    """Returns train or test for each film of the official lists; nothing if there are none."""
    paths = {"train": source.find("train_val_list.txt"), "test": source.find("test_list.txt")}
    if not all(paths.values()):
        source.note("the official lists are not there, so patients are divided by hash")
        return {}
    lists: dict[str, str] = {}
    for split, path in paths.items():
        names = list(source.read_lines(path))
        if not names:
            raise UserError(
                f"{path} in {source.root} is empty; download it again from {FACTS.page}"
            )
        if both := next((name for name in names if name in lists), ""):
            raise UserError(
                f"{both} is in both official lists of {source.root}; download train_val_list.txt "
                f"and test_list.txt again from {FACTS.page}"
            )
        lists |= dict.fromkeys(names, split)
    return lists


class NihCxr14(PublicBuilder):
    """Builds NIH ChestX-ray14."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: NihCxr14Config

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the table."""
        return read_items(source, self.builder_config)

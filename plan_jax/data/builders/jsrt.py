"""JSRT: 247 films on 12-bit raw files, with and without a nodule, and SCR's masks of organs."""

import dataclasses
import itertools
import posixpath
from collections.abc import Iterator, Mapping
from typing import ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Box, Item, Shape
from plan_jax.data.public.pixels import JSRT_SIDE
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

SCR = "scr"
NODULE, MALIGNANT = "Nodule", "Malignant nodule"
LABEL_OF_KIND = {"JPCLN": 1, "JPCNN": 0}  # first letters of a name -> whether there is a nodule
IMAGE_FOLDERS = (
    *("All247images", "All247images/All247images", "Nodule154images", "NonNodule93images"),
    *("images", "Images", ""),
)
ORGANS = ("left lung", "right lung", "heart", "left clavicle", "right clavicle")
MASK_FOLDERS = ("fold1/masks", "fold2/masks", "masks", "Masks")
MASK_SUFFIXES = (".gif", ".png")
COPY_SUFFIXES = (".png", ".bmp", ".dcm", ".tif", ".jpg")  # of films that somebody has converted
CLINICAL_TABLE = "CLNDAT_EN.txt"
NUM_CELLS = 8  # of a row that is read: up to malignant or benign
MM_PER_PIXEL = 0.175

FACTS = Facts(
    name="jsrt",
    title="JSRT with SCR",
    content="247 films, 154 of them with a nodule; masks of lungs, heart and clavicles",
    page="db.jsrt.or.jp/eng.php (films) and zenodo.org/records/7056076 (SCR's masks)",
    licence="free for research; the films ask for a registration",
    citation="Shiraishi et al., AJR 2000; van Ginneken et al., Medical Image Analysis 2006",
    files="JPCLN001.IMG and its like in All247images/, or Nodule154images/ and NonNodule93images/; "
    "SCR's fold1/masks/ and fold2/masks/, or masks/; CLNDAT_EN.txt for the places of nodules",
    provides=("labels", "boxes", "anatomy"),
    patients="the name of the film, as each is of another patient",
    splits={
        BY_HASH: "by a hash of the film",
        SCR: "SCR's first fold, of odd numbers, is train and val, and its second is test: 124 / "
        "123 films",
    },
    leaks={SCR: "none"},
    defects=(
        "the raw files have no header: 16 bits with the high byte first, high numbers dark",
        "SCR's masks have half of the films' rows and columns",
        "a nodule is given by its middle and diameter, so its box is a square",
    ),
    counts={"images": 247, "nodules": 154},
    findings=(NODULE, MALIGNANT),
)


@dataclasses.dataclass(eq=False)
class JsrtConfig(PublicConfig):
    """Where JSRT was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films, with the masks and the nodules that are there."""
    images = _list_images(source)
    if not images:
        raise UserError(
            f"{source.root} has no film like JPCLN001.IMG in {IMAGE_FOLDERS[0]}; download them "
            f"from {FACTS.page}"
        )
    masks = _list_masks(source)
    nodules = _read_nodules(source)
    for name in sorted({*masks, *nodules} - images.keys()):
        source.drop("a film with masks or a nodule is not there", name)
    for name, path in images.items():
        has_nodule = LABEL_OF_KIND[name[:5]]
        box, is_malignant = nodules.get(name, (None, -1))
        split = ""
        if config.split_rule == SCR:
            is_test = int(name[5:]) % 2 == 0
            split = "test" if is_test else assign_by_hash(name, config.val_fraction, 0.0)
        is_raw = path.lower().endswith(".img")
        yield Item(
            image_id=name,
            image=path,
            patient_id=name,
            split=split,
            labels={NODULE: has_nodule, MALIGNANT: is_malignant if has_nodule else 0},
            boxes=[box] if box else [],
            anatomy=masks.get(name, {}),
            pixels="jsrt" if is_raw else "",
            shape=(JSRT_SIDE, JSRT_SIDE) if is_raw else None,
        )


def _list_images(source: SourceFolder) -> dict[str, str]:
    """Returns the path of each film: the raw file, or a copy of another format."""
    images: dict[str, str] = {}
    for folder in [folder for folder in map(source.find_folder, IMAGE_FOLDERS) if folder] + [""]:
        for file in source.list_names(folder):
            stem, suffix = posixpath.splitext(file)
            name = stem.upper()
            if name[:5] not in LABEL_OF_KIND or not name[5:].isdecimal():
                continue
            is_raw = suffix.lower() == ".img"
            if is_raw or (suffix.lower() in COPY_SUFFIXES and name not in images):
                images[name] = posixpath.join(folder, file)
    return dict(sorted(images.items()))


def _list_masks(source: SourceFolder) -> dict[str, Mapping[str, list[Shape]]]:
    """Returns the masks of organs of each film."""
    masks: dict[str, dict[str, list[Shape]]] = {}
    folds = dict.fromkeys(filter(None, map(source.find_folder, MASK_FOLDERS)))
    for fold, organ in itertools.product(folds, ORGANS):
        for folder_name in (organ, organ.replace(" ", "_")):
            folder = posixpath.join(fold, folder_name)
            for file in source.list_names(folder):
                name, suffix = posixpath.splitext(file)
                if suffix.lower() in MASK_SUFFIXES:
                    shape = Shape("file", posixpath.join(folder, file))
                    masks.setdefault(name.upper(), {})[organ] = [shape]
    if not masks:
        source.note("SCR's masks are not there, so no film has anatomy")
    return {
        name: {organ: organs[organ] for organ in ORGANS if organ in organs}
        for name, organs in masks.items()
    }


def _read_nodules(source: SourceFolder) -> dict[str, tuple[Box | None, int]]:
    """Returns the box of each nodule, and whether it is malignant.

    A row of the table, which has no header, is: name, subtlety, diameter in mm, age, sex, x, y,
    malignant or benign, place, diagnosis.
    """
    path = source.find(CLINICAL_TABLE, CLINICAL_TABLE.replace(".txt", ".TXT"))
    if not path:
        source.note(f"there is no {CLINICAL_TABLE}, so no nodule has a box")
        return {}
    source.tables[path] = None
    nodules: dict[str, tuple[Box | None, int]] = {}
    text = (source.read_bytes(path) or b"").decode("latin-1")  # all that is read is ASCII
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells):
            continue
        numbers = parse_numbers([cells[2], *cells[5:7]]) if len(cells) >= NUM_CELLS else None
        if numbers is None or numbers[0] <= 0:
            source.drop("a nodule has no place and diameter", cells[0])
            continue
        diameter, x, y = numbers
        radius = diameter / MM_PER_PIXEL / 2
        # The table is of pixels of the film, whose edge a large nodule may reach.
        corners = (
            max(x - radius, 0.0),
            max(y - radius, 0.0),
            min(x + radius, float(JSRT_SIDE)),
            min(y + radius, float(JSRT_SIDE)),
        )
        is_malignant = {"malignant": 1, "benign": 0}.get(cells[7].lower(), -1)
        name = posixpath.splitext(cells[0])[0].upper()
        nodules[name] = (Box(corners, NODULE), is_malignant)
    return nodules


class Jsrt(PublicBuilder):
    """Builds JSRT."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: JsrtConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films."""
        return read_items(source, self.builder_config)

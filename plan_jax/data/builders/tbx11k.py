"""TBX11K: films of tuberculosis, of other disease and of healthy people, with boxes."""

import dataclasses
import posixpath
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Box, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

OFFICIAL = "official"
TUBERCULOSIS, OTHER = "Tuberculosis", "Other disease"
ACTIVE, LATENT = "Active tuberculosis", "Latent tuberculosis"
FINDINGS = (TUBERCULOSIS, ACTIVE, LATENT, OTHER)
# Names of categories in the files -> ours. The third is that of boxes of an unclear kind.
KINDS = {
    "ActiveTuberculosis": ACTIVE,
    "ObsoletePulmonaryTuberculosis": LATENT,
    "PulmonaryTuberculosis": TUBERCULOSIS,
    "active_tb": ACTIVE,
    "latent_tb": LATENT,
}
GROUPS = {"health": "healthy", "sick": "sick_but_no_tb", "tb": "tb"}  # folder -> Kaggle's word
LISTS = {"train": "TBX11K_train.txt", "val": "TBX11K_val.txt"}
BOX_FILES = ("TBX11K_trainval.json", "TBX11K_train.json", "TBX11K_val.json")
KAGGLE_COLUMNS = ("fname", "source", "bbox", "tb_type", "image_type")
_BOX_ENTRY = re.compile(r"['\"](xmin|ymin|width|height)['\"]\s*:\s*([-+.\deE]+)")

FACTS = Facts(
    name="tbx11k",
    title="TBX11K",
    content="8,400 films with labels, 799 of them with boxes of tuberculosis; 3,302 without labels",
    page="github.com/yun-liu/Tuberculosis (or kaggle.com/datasets/vbookshelf/tbx11k-simplified)",
    licence="CC BY-NC-SA 4.0, no registration",
    citation="Liu et al., CVPR 2020",
    files="imgs/{health,sick,tb}/, lists/TBX11K_train.txt and TBX11K_val.txt, "
    "annotations/json/TBX11K_train.json and TBX11K_val.json; or Kaggle's data.csv and images/",
    provides=("labels", "boxes"),
    patients="there is none; the name of the film stands for it",
    is_split_by_image=True,
    splits={
        OFFICIAL: "the published val list is test, because the labels of the published test list "
        "are withheld; of the train list, a hash puts `val_fraction` into val",
    },
    defects=(
        "the boxes in annotations/xml belong to larger films than those that are published, and "
        "are not read",
        "tb1199 lies among the films of tuberculosis and has no box",
        "imgs/extra holds the Montgomery, Shenzhen, DA and DB sets, and is not read",
    ),
    counts={"images": 8400, "train": 6600, "test": 1800},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class Tbx11kConfig(PublicConfig):
    """Where TBX11K was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


@dataclasses.dataclass
class _Film:
    """A film as the files describe it: its place, its list, its group, and its boxes."""

    path: str
    source_list: str
    group: str
    boxes: list[Box] = dataclasses.field(default_factory=list)


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films with labels, of the published layout or of Kaggle's."""
    folder = source.find_folder("imgs")
    films = _read_published(source, folder) if folder else _read_kaggle(source)
    for name, film in films.items():
        split = ""
        if config.split_rule == OFFICIAL:
            is_test = film.source_list == "val"
            split = "test" if is_test else assign_by_hash(name, config.val_fraction, 0.0)
        yield Item(
            image_id=name,
            image=film.path,
            patient_id=name,
            split=split,
            labels=_find_labels(film),
            boxes=film.boxes,
        )


def _find_labels(film: _Film) -> dict[str, int]:
    """Returns the labels of a film: of its group, and of its boxes where it has tuberculosis."""
    is_sick = int(film.group == "sick")
    if film.group != "tb":
        return {TUBERCULOSIS: 0, ACTIVE: 0, LATENT: 0, OTHER: is_sick}
    kinds = {box.label for box in film.boxes}
    # Without a box, or with one of an unclear kind, the kind of tuberculosis is not known.
    unknown = -1 if TUBERCULOSIS in kinds or not kinds else 0
    return {
        TUBERCULOSIS: 1,
        ACTIVE: 1 if ACTIVE in kinds else unknown,
        LATENT: 1 if LATENT in kinds else unknown,
        OTHER: -1,
    }


# Published layout ---------------------------------------------------------------------------------


def _read_published(source: SourceFolder, folder: str) -> dict[str, _Film]:
    """Returns the films of the lists, whose lines are like `tb/tb0005.png`."""
    films: dict[str, _Film] = {}
    for source_list, name in LISTS.items():
        path = source.require(posixpath.join("lists", name), name)
        for line in source.read_lines(path):
            place = line.split()[0].removeprefix("imgs/")
            group = posixpath.dirname(place)
            if group not in GROUPS:
                source.drop(f"a film of {path} is not in {', '.join(GROUPS)}", place)
                continue
            stem = _stem(place)
            if stem in films and films[stem].source_list != source_list:
                raise UserError(
                    f"{quoting.quote_path(place)} is in both lists of {source.root}; download them "
                    f"again from {FACTS.page}"
                )
            films[stem] = _Film(posixpath.join(folder, place), source_list, group)
    whole, *parts = (_find_boxes(source, name) for name in BOX_FILES)
    paths = [whole] if whole else list(filter(None, parts))
    if not paths:
        source.note(f"there is no {BOX_FILES[0]}, so no film has boxes")
    for path in paths:
        _add_boxes(source, path, films)
    return films


def _find_boxes(source: SourceFolder, name: str) -> str:
    return source.find(posixpath.join("annotations/json", name), name)


def _add_boxes(source: SourceFolder, path: str, films: dict[str, _Film]) -> None:
    """Adds the boxes of a file in COCO's form: corner, width and height in pixels."""
    content = source.read_json(path)
    try:
        kinds = {entry["id"]: KINDS[entry["name"]] for entry in content["categories"]}
        names = {entry["id"]: _stem(entry["file_name"]) for entry in content["images"]}
        boxes = [
            (names[entry["image_id"]], kinds[entry["category_id"]], entry["bbox"])
            for entry in content["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} in {source.root} is not a file of boxes of TBX11K "
            f"({quoting.shorten(str(error))} is missing or unknown); download it again from "
            f"{FACTS.page}"
        ) from None
    for name, kind, numbers in boxes:
        if name not in films:
            source.drop("boxes of a film that the lists do not have", name)
        elif box := _make_box(numbers, kind):
            films[name].boxes.append(box)
        else:
            source.drop("a box has no four numbers, or no area", name)


# Kaggle -------------------------------------------------------------------------------------------


def _read_kaggle(source: SourceFolder) -> dict[str, _Film]:
    """Returns the films of Kaggle's table, which has one row for each box."""
    table = source.find("data.csv")
    if not table:
        raise UserError(
            f"{source.root} has neither a folder imgs nor Kaggle's data.csv; download TBX11K from "
            f"{FACTS.page}"
        )
    folder = posixpath.join(posixpath.dirname(table), "images")
    group_of = {word: group for group, word in GROUPS.items()}
    films: dict[str, _Film] = {}
    for row in source.read_csv(table, KAGGLE_COLUMNS):
        name = _stem(row["fname"])
        if row["image_type"] not in group_of or row["source"] not in LISTS:
            source.drop("a film has no group or list", name)
            continue
        path = posixpath.join(folder, row["fname"])
        film = films.setdefault(name, _Film(path, row["source"], group_of[row["image_type"]]))
        if "xmin" not in row["bbox"]:
            continue  # `none`
        numbers = dict(_BOX_ENTRY.findall(row["bbox"]))
        corners = [numbers.get(key, "") for key in ("xmin", "ymin", "width", "height")]
        if box := _make_box(corners, KINDS.get(row["tb_type"], TUBERCULOSIS)):
            film.boxes.append(box)
        else:
            source.drop("a box has no four numbers, or no area", name)
    return films


def _make_box(numbers: Any, kind: str) -> Box | None:
    """Returns a box of corner, width and height; None if they are not numbers of one."""
    values = parse_numbers(map(str, numbers))
    if values is None or len(values) != 4 or min(values[2:]) <= 0:
        return None
    x, y, width, height = values
    return Box((x, y, x + width, y + height), kind)


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


class Tbx11k(PublicBuilder):
    """Builds TBX11K."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: Tbx11kConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films."""
        return read_items(source, self.builder_config)

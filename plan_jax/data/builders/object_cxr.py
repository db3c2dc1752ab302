"""Object-CXR: 10,000 frontal films, half of them with outlined foreign objects."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import UNUSED, Box, Item, Shape
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash, hold_out
from plan_jax.data.tfds import tfds

FINDING = "Foreign object"
KINDS = {0: "rectangle", 1: "ellipse", 2: "polygons"}  # number of a kind in the tables
TABLES = ("train", "dev", "test")
NUM_TRAIN = 8000  # rows of train.csv, which the published rules divide

FACTS = Facts(
    name="object_cxr",
    title="Object-CXR",
    content="10,000 frontal films, half of them with foreign objects as rectangles, ellipses and "
    "polygons; the labels of 1,000 are published apart",
    page="archive.org/download/object-CXR",
    licence="CC BY-NC 4.0, as stated by others; not verified",
    citation="JF Healthcare, Object-CXR challenge of MIDL 2020",
    files="train.csv, dev.csv, train/ and dev/; test.csv and test/, of "
    "kaggle.com/datasets/raddar/foreign-objects-in-chest-xrays, if they are there",
    provides=("labels", "boxes", "masks"),
    patients="no patients are known; each image counts as one",
    is_split_by_image=True,
    splits={
        "official": "train.csv is train, dev.csv is val, test.csv is test, as in BenchX. Without "
        "test.csv, dev.csv is test, and a hash puts `val_fraction` of train.csv into val",
        "mgca_compat": "MGCA: of train.csv 7,200 are train and 800 val; dev.csv is test",
    },
    defects=(
        "test.csv calls its column image_path, the others image_name",
        "whether corners are ordered is not stated, so they are sorted here",
    ),
    counts={"images": 10_000},
    findings=(FINDING,),
)


@dataclasses.dataclass(eq=False)
class ObjectCxrConfig(PublicConfig):
    """Where Object-CXR was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films of the tables, with a box and a shape for each object."""
    rows = {name: list(_read_rows(source, name)) for name in TABLES}
    train = [path for path, _ in rows["train"]]
    has_test = bool(rows["test"])
    split_of_table = {"train": "train", "dev": "val", "test": "test"}
    val = set[str]()
    if config.split_rule == "mgca_compat":
        if len(train) != NUM_TRAIN:
            source.note(
                f"mgca_compat divides {NUM_TRAIN:,} rows, and train.csv has {len(train):,}, so the "
                "splits are not the published ones"
            )
        _, held_out = hold_out(len(train), 0.1, 0)
        val = {train[index] for index in held_out}
        split_of_table = {"train": "train", "dev": "test", "test": UNUSED}
    elif not has_test and config.split_rule != BY_HASH:
        source.note("there is no test.csv, so dev.csv is test")
        val = {
            path for path in train if assign_by_hash(_name(path), config.val_fraction, 0.0) == "val"
        }
        split_of_table = {"train": "train", "dev": "test"}
    for table, parts in rows.items():
        for path, annotation in parts:
            boxes, shapes = _read_objects(source, path, annotation)
            yield Item(
                image_id=_name(path),
                image=path,
                patient_id=_name(path),
                split="val" if path in val else split_of_table[table],
                labels={FINDING: int(bool(annotation))},
                boxes=boxes,
                shapes=shapes,
            )


def _name(path: str) -> str:
    """Returns the name of a film without folder and suffix."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _read_rows(source: SourceFolder, name: str) -> Iterator[tuple[str, str]]:
    """Yields the path of each film of a table, and the text of its objects."""
    table = source.find(f"{name}.csv") if name == "test" else source.require(f"{name}.csv")
    if not table:
        return
    folder = source.find_folder(name) or name
    columns = ("image_name", "image_path")
    for number, row in enumerate(source.read_csv(table, ("annotation",), optional=columns), 1):
        film = (row["image_name"] or row["image_path"]).rpartition("/")[2]
        if not film:
            source.drop("a row without image_name or image_path", f"{table}:{number}")
            continue
        annotation = row["annotation"]
        yield f"{folder}/{film}", "" if annotation.casefold() == "nan" else annotation


def _read_objects(
    source: SourceFolder, path: str, annotation: str
) -> tuple[list[Box], list[Shape]]:
    """Returns a box and a shape for each object: its kind and its points, divided by `;`."""
    boxes, shapes = [], []
    for text in filter(None, map(str.strip, annotation.split(";"))):
        numbers = parse_numbers(text.split())
        if not numbers or numbers[0] not in KINDS:
            source.drop("an object of unknown kind", path)
            continue
        kind, x, y = KINDS[int(numbers[0])], numbers[1::2], numbers[2::2]
        if len(x) != len(y) or (len(x) < 3 if kind == "polygons" else len(x) != 2):
            source.drop("an object whose number of points its kind cannot have", path)
            continue
        corners = (min(x), min(y), max(x), max(y))
        if corners[0] == corners[2] or corners[1] == corners[3]:
            source.drop("an object without area", path)
            continue
        boxes.append(Box(corners, FINDING))
        points = [list(map(list, zip(x, y, strict=True)))]
        content = points if kind == "polygons" else list(corners)
        shapes.append(Shape(kind, content, FINDING))
    return boxes, shapes


class ObjectCxr(PublicBuilder):
    """Builds Object-CXR."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ObjectCxrConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the tables."""
        return read_items(source, self.builder_config)

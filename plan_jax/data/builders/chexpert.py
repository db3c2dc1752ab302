"""CheXpert: 224,316 films, 14 labels; radiologists labelled 500 test studies and outlined findings.

Published protocols are rules of the splits:

- `mgca_compat`: MGCA's code (`preprocess/chexpert.py`) draws 5,000 rows by their place in a table
  that lacks the rows of 5x200, and drops from training those whose place in the whole table is the
  same: 4,907 of them are trained on as well. Their records are in both splits.
- `5x200` (GLoRIA, ICCV 2021): 200 frontal films of each of five labels, drawn as MGCA draws them.
  GLoRIA's own draw has no seed, so its list cannot be had by a rule.
- `8x200` (ConVIRT, arXiv 2010.00747): ten queries and 200 candidates of each of eight labels. Its
  lists were never published; the draw is ours.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.chexpert_labels import check_blank, read_labels
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import FRONTAL_VIEWS, UNUSED, Item, Shape
from plan_jax.data.public.shapes import parse_coco_runs
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CONVIRT = (
    *("No Finding", "Cardiomegaly", "Edema", "Pneumonia", "Atelectasis", "Pneumothorax"),
    *("Pleural Effusion", "Fracture"),
)
CLASS_SIZE = 200  # films of a class in 5x200, candidates of one in 8x200
NUM_QUERIES = 10  # of a class in 8x200
MGCA_NUM_VAL = 5000  # rows

PART_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
PART_TABLES = {
    "train": ("train.csv",),
    "valid": ("valid.csv", "val_labels.csv"),
    "test": ("test_labels.csv", "groundtruth.csv"),
}
# Of the full download, unpacked: these hold the patients of train without a folder `train`.
BATCHES = tuple(f"CheXpert-v1.0 batch {number + 1} (train {number})" for number in (1, 2, 3))
OUTLINES = {"valid": "gt_segmentations_val.json", "test": "gt_segmentations_test.json"}
OUTLINE_NAMES = {"Airspace Opacity": "Lung Opacity"}  # name of CheXlocalize -> of CheXpert
BLANK = -2  # value of a label that is not mentioned, until `label_blank` says what it means

FACTS = Facts(
    name="chexpert",
    title="CheXpert",
    content="223,648 films of 64,740 patients with 14 labels from reports; 668 test films of 500 "
    "patients with labels of radiologists; masks of ten findings on 686 films of valid and test "
    "(CheXlocalize)",
    page="stanfordaimi.azurewebsites.net/datasets/8cbd9ed4-2eb9-4565-affc-111cf4f7ebe2",
    licence="Stanford's research use agreement, after registration; redistribution is forbidden",
    citation="Irvin et al., AAAI 2019; masks: Saporta et al., Nature MI 2022",
    files="CheXpert-v1.0/ or CheXpert-v1.0-small/ with train.csv, valid.csv, train/ and valid/ (or "
    "the batches of the full download, unpacked side by side); for test: test/ with "
    "test_labels.csv of CheXlocalize (/datasets/23c56a0d-15de-405b-87c8-99c30138950c of the same "
    "site), or groundtruth.csv of cheXpert-test-set-labels; for masks: gt_segmentations_val.json "
    "and gt_segmentations_test.json of CheXlocalize",
    provides=("labels", "masks"),
    patients="the folder patientNNNNN",
    splits={
        "official": "as published: train.csv is train, valid.csv is val, the radiologists' test "
        "set is test. Without the test set, as `valid_is_test`",
        "valid_is_test": "the official valid.csv is test; a hash puts `val_fraction` of the "
        "patients of train.csv into val",
        "mgca_compat": "MGCA's 5,000 rows of train.csv are val, those that its code keeps are "
        "train, valid.csv is test",
        "5x200": "for zero-shot classification: test has 200 frontal films of train.csv for each "
        "of Atelectasis, Cardiomegaly, Consolidation, Edema and Pleural Effusion, with that label "
        "1 and all others but No Finding 0 (blank is 0), drawn with seed 0 as MGCA does. The rest "
        "is unused",
        "8x200": "for retrieval of images: test has 200 and val ten frontal films of train.csv "
        "for each of ConVIRT's eight labels, with that label 1 and all others 0 (blank is 0), the "
        "first by hash, one a patient. The rest is unused. The draw is ours",
    },
    leaks={
        "mgca_compat": "4,990 of the 5,000 rows of val share a patient with train, and 4,907 are "
        "in train themselves (of the 4,284 frontal ones 4,272 and 4,203); test shares none",
        "5x200": "nothing is train. Of MGCA's own training set, 828 of the 1,000 films share a "
        "patient",
    },
    defects=(
        "labels of train are mined from reports, -1 is uncertain and a blank is unmentioned",
        "the film view1 of a study is not always frontal, and a study can have three films",
        "age is 0 in three rows, and sex is Unknown in one",
        "of the test labels, groundtruth.csv has a row a study, test_labels.csv a row a film",
        "the radiologists' files order the columns otherwise",
    ),
    counts={"images": 223_648, "patients": 64_740},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class ChexpertConfig(PublicConfig):
    """Where CheXpert was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Value of a blank label; work on CheXpert usually reads it as 0, as `5x200` and `8x200` do.
    label_blank: int = -1
    # Use only the film view1 of a study, as CheXzero does of the test set (views must be `all`).
    first_view: bool = False

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        check_blank(self.label_blank, FACTS.name)


class Row(NamedTuple):
    """A row of a table; values are in the order of `FINDINGS`."""

    path: str  # from `train`, `valid` or `test` on
    view: str
    values: tuple[int, ...]

    @property
    def patient_id(self) -> str:
        """Returns the name of the patient's folder."""
        return self.path.split("/")[1]


def read_items(source: SourceFolder, config: ChexpertConfig) -> Iterator[Item]:
    """Yields the films of train, of valid and of test, as far as they are there."""
    tables = {part: source.find(*names) for part, names in PART_TABLES.items()}
    if not any(tables.values()) or config.split_rule in SELECTIONS:
        tables["train"] = source.require("train.csv")
    folders = {part: source.find_folder(*names) for part, names in PART_FOLDERS.items()}
    if tables["test"] and not folders["test"]:
        source.note(
            f"{tables['test']} labels test films that are not there; they come with CheXlocalize"
        )
        tables["test"] = ""
    rule = config.split_rule
    if rule == "official" and not tables["test"]:
        source.note("the radiologists' test set is not there, so valid.csv is test")
        rule = "valid_is_test"
    blank = 0 if rule in ("5x200", "8x200") else config.label_blank
    batches = {} if folders["train"] else _list_batches(source)
    for part, table in tables.items():
        if not table:
            continue
        rows: Iterable[Row] = _read_rows(source, part, table, folders)
        splits_of = {}
        if rule in SELECTIONS and part == "train":
            rows = list(rows)
            splits_of = SELECTIONS[rule](rows)
            _note_size(source, rule, splits_of)
        shapes_of = _read_outlines(source, part)
        for row in rows:
            _, patient_id, study, film = row.path.split("/")
            stem = row.path.rpartition(".")[0]
            shapes = shapes_of.pop("_".join(stem.split("/")[1:]), ())
            if config.first_view and not film.startswith("view1_"):
                source.drop("not the first view of its study", stem)
                continue
            folder = batches.get(patient_id) or folders[part] or part
            item = Item(
                image_id=stem,
                image="/".join([folder, *row.path.split("/")[1:]]),
                patient_id=patient_id,
                study_id=f"{patient_id}/{study}",
                view=row.view,
                labels={
                    finding: blank if value == BLANK else value
                    for finding, value in zip(FINDINGS, row.values, strict=True)
                },
                shapes=shapes,
            )
            splits = splits_of.get(row.path) or [_assign_split(row, part, rule, config)]
            for copy, split in enumerate(splits):
                # A protocol that trains on what it validates on has a film in both splits.
                image_id = f"{stem}#{split}" if copy else stem
                yield dataclasses.replace(item, image_id=image_id, split=split)
        for name in shapes_of:
            source.drop("masks of a film that the table does not have", name)


def _note_size(source: SourceFolder, rule: str, splits_of: Mapping[str, Sequence[str]]) -> None:
    size = {
        "5x200": CLASS_SIZE * len(COMPETITION),
        "8x200": (CLASS_SIZE + NUM_QUERIES) * len(CONVIRT),
    }.get(rule, len(splits_of))
    if len(splits_of) != size:
        source.note(
            f"{rule} has {quoting.count(len(splits_of), 'film')} instead of {size:,}, as train.csv "
            "has no more"
        )


def _assign_split(row: Row, part: str, rule: str, config: ChexpertConfig) -> str:
    """Returns the split of a film that no selection names."""
    if rule == BY_HASH:
        return ""
    if rule == "official":
        return {"train": "train", "valid": "val", "test": "test"}[part]
    if part == "valid" and rule in ("valid_is_test", "mgca_compat"):
        return "test"
    if part == "train" and rule == "valid_is_test":
        return assign_by_hash(row.patient_id, config.val_fraction, 0.0)
    return UNUSED


# Tables ------------------------------------------------------------------------------------------


def _read_rows(
    source: SourceFolder, part: str, table: str, folders: dict[str, str]
) -> Iterator[Row]:
    """Yields the rows of a table; a row of groundtruth.csv stands for all films of its study."""
    is_study = table.rpartition("/")[2].startswith("groundtruth")
    column = "Study" if is_study else "Path"
    for row in source.read_csv(table, (column, *FINDINGS), optional=("Frontal/Lateral", "AP/PA")):
        # The folder of the dataset comes first, or not; val of CheXlocalize is valid of CheXpert.
        names = row[column].rstrip("/").split("/")[-3 if is_study else -4 :]
        if len(names) != (3 if is_study else 4) or names[0] not in PART_FOLDERS[part]:
            source.drop("a path is not that of a film", row[column])
            continue
        path = "/".join([part, *names[1:]])
        values = read_labels(row, FINDINGS, BLANK, f"{path} in {table}")
        if not is_study:
            yield Row(path, name_view(row["AP/PA"], row["Frontal/Lateral"] or path), values)
            continue
        films = source.list_names("/".join([folders[part], *names[1:]]))
        if not films:
            source.drop("a labelled study has no films", path)
        for film in films:
            yield Row(f"{path}/{film}", name_view("", film), values)


def name_view(projection: str, plane: str) -> str:
    """Returns the view of a film. Some films are frontal, and have the projection LL."""
    if projection in ("AP", "PA"):
        return projection
    names = {"frontal": "FRONTAL", "lateral": "LATERAL"}
    return next((view for name, view in names.items() if name in plane.lower()), "UNKNOWN")


def _list_batches(source: SourceFolder) -> dict[str, str]:
    """Returns for each patient of the full download the folder of its batch."""
    folders = filter(None, (source.find_folder(name) for name in BATCHES))
    return {
        patient_id: f"{folder}/{patient_id}".rpartition("/")[0]
        for folder in folders
        for patient_id in source.list_names(folder)
    }


def _read_outlines(source: SourceFolder, part: str) -> dict[str, list[Shape]]:
    """Returns the masks of CheXlocalize by film, as patientNNNNN_studyN_viewN_frontal.

    A finding that is absent has a mask without pixels.

    Raises:
      UserError: the file is not one of masks by film and finding.
    """
    path = source.find(OUTLINES[part]) if part in OUTLINES else ""
    shapes_of: dict[str, list[Shape]] = {}
    if not path:
        return shapes_of
    content = source.read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(masks, dict) for masks in content.values()
    ):
        raise UserError(
            f"{path} in {source.root} has no masks by film and finding; download it again"
        )
    for film, masks in content.items():
        for name, mask in masks.items():
            label = OUTLINE_NAMES.get(name, name)
            try:
                rows, columns = map(int, mask["size"])
                runs = parse_coco_runs(mask["counts"], (rows, columns))
            except (KeyError, TypeError, ValueError):
                source.drop("a mask is not one of COCO's", film)
                continue
            if label not in FINDINGS:
                source.drop("a mask is of none of the findings", film)
            elif runs:
                shape = Shape("runs", runs, label=label, size=(rows, columns))
                shapes_of.setdefault(film, []).append(shape)
    return shapes_of


# Published selections of train.csv ----------------------------------------------------------------


def _select_mgca(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the splits of MGCA's training and validation rows, which overlap."""
    left_out = set(_draw_5x200(rows))
    rest = [index for index in range(len(rows)) if index not in left_out]
    number = min(MGCA_NUM_VAL, len(rest))
    places = np.random.RandomState(0).choice(len(rest), number, replace=False).tolist()
    val = {rest[place] for place in places}
    # The code reads the places as indices of the whole table.
    train = set(rest).difference(places)
    splits: dict[str, list[str]] = {}
    for index in rest:
        names = ["train"] * (index in train) + ["val"] * (index in val)
        splits[rows[index].path] = names or [UNUSED]
    return splits


def _select_5x200(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the test split of 5x200."""
    return {rows[index].path: ["test"] for index in _draw_5x200(rows)}


def _draw_5x200(rows: Sequence[Row]) -> list[int]:
    """Returns the indices of the rows of 5x200, class by class."""
    indices: list[int] = []
    for pool in _pools(rows, COMPETITION, ignored=("No Finding",)):
        number = min(CLASS_SIZE, len(pool))
        places = np.random.RandomState(0).choice(len(pool), number, replace=False)
        indices += [pool[place] for place in places.tolist()]
    return indices


def _select_8x200(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the test split (candidates) and the val split (queries) of 8x200.

    The films of a class come in the order of the hash of their path. One whose patient has a film
    in the set already is left out.
    """
    splits: dict[str, list[str]] = {}
    patients: set[str] = set()
    for pool in _pools(rows, CONVIRT):
        num_films = 0
        for path in sorted((rows[index].path for index in pool), key=_hash_path):
            patient_id = path.split("/")[1]
            if num_films == CLASS_SIZE + NUM_QUERIES:
                break
            if patient_id in patients:
                continue
            patients.add(patient_id)
            splits[path] = ["test" if num_films < CLASS_SIZE else "val"]
            num_films += 1
    return splits


def _hash_path(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def _pools(
    rows: Sequence[Row], classes: Sequence[str], ignored: Sequence[str] = ()
) -> list[list[int]]:
    """Returns for each class the indices of frontal films with that label alone.

    Other labels are 0 or blank, so an uncertain one leaves a film out; `ignored` ones may be any.
    """
    columns = [(name, FINDINGS.index(name)) for name in FINDINGS if name not in ignored]
    pools: dict[str, list[int]] = {name: [] for name in classes}
    for index, row in enumerate(rows):
        if row.view not in FRONTAL_VIEWS:
            continue
        values = [(name, row.values[column]) for name, column in columns]
        present = [(name, value) for name, value in values if value not in (0, BLANK)]
        for name in classes:
            if present == [(name, 1)]:
                pools[name].append(index)
    return list(pools.values())


SELECTIONS = {"mgca_compat": _select_mgca, "5x200": _select_5x200, "8x200": _select_8x200}


class Chexpert(PublicBuilder):
    """Builds CheXpert."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ChexpertConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of train, of valid and of test, as far as they are there."""
        return read_items(source, self.builder_config)

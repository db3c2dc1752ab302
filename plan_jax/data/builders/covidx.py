"""COVIDx: films of several collections, normal, with pneumonia or with COVID-19, by lists."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash, hold_out
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = ("Normal", "Pneumonia", "COVID-19")
# Class of a list -> what it says of the findings. A list of two classes says nothing of the others.
LABELS: Mapping[str, Mapping[str, int]] = {
    "normal": {"Normal": 1, "Pneumonia": 0, "COVID-19": 0},
    "pneumonia": {"Normal": 0, "Pneumonia": 1, "COVID-19": 0},
    "COVID-19": {"Normal": 0, "Pneumonia": 0, "COVID-19": 1},
    "negative": {"COVID-19": 0},
    "positive": {"COVID-19": 1},
}
# Versions of COVID-Net's lists; `kaggle` is train.txt, val.txt and test.txt of CXR-2 to CXR-4.
VERSIONS = ("9A", "9B", "8A", "8B", "7A", "7B", "6", "5", "4", "3", "kaggle")
SPLIT_LISTS = ("train", "val", "test")
NUM_TRAIN = 30_130  # lines of train in 9A, which MGCA divides

FACTS = Facts(
    name="covidx",
    title="COVIDx",
    content="30,530 films of 16,802 patients (9A): normal, pneumonia or COVID-19; or with and "
    "without COVID-19 (versions 6, B and CXR-2 to CXR-4)",
    page="kaggle.com/datasets/andyczhao/covidx-cxr2",
    licence="each source of films has its own licence; the lists have the terms of COVID-Net",
    citation="Wang et al., Scientific Reports 2020",
    files="train/, test/ and val/ of films; train.txt, test.txt and val.txt, or "
    "train_COVIDx9A.txt and test_COVIDx9A.txt, or those of another version, of "
    "github.com/lindawangg/COVID-Net",
    provides=("labels",),
    patients="the first field of a list, which is an image for the films of RSNA",
    splits={
        "official": "test list, and val list if there is one; else a hash puts `val_fraction` of "
        "the patients of the train list into val. A training film of a patient of val or test is "
        "left out",
        "mgca_compat": "MGCA: the official test list, and 20 % of the films of train as val",
    },
    leaks={
        "official": "in 9A and 9B, 129 of the 200 test films without COVID-19 share an NIH patient "
        "with train",
        "mgca_compat": "as the official lists; and 3,036 of the 6,026 films of val (9A) share a "
        "patient with train",
    },
    defects=(
        "lines of 3 to 6 fields, since a patient or a source may have blanks or be absent",
        "the list 9A names films that the folder of Kaggle does not have",
        "films that differ in their suffix only",
        "patient ANON191 is in train and test of the versions 6 and 7B",
        "films of NIH from RSNA, whose patients are not told apart",
    ),
    counts={"images": 30_530, "patients": 16_802},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class CovidxConfig(PublicConfig):
    """Where COVIDx was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Version of the lists, as 9A or kaggle ("": the one that is there).
    lists: str = ""

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        if self.lists and self.lists not in VERSIONS:
            raise UserError(
                f"lists {self.lists!r} of dataset covidx is unknown; use one of "
                f"{', '.join(VERSIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a list, its fields and the split of its list."""

    patient_id: str
    name: str
    kind: str
    split: str
    path: str


def read_items(source: SourceFolder, config: CovidxConfig) -> Iterator[Item]:
    """Yields the films of the lists."""
    lists = _find_lists(source, config.lists)
    folders = {split: source.find_folder(split) or split for split in SPLIT_LISTS}
    names = {split: set(source.list_names(folder)) for split, folder in folders.items()}
    lines = [
        line
        for split, table in lists.items()
        for line in _read_list(source, table, split, folders, names)
    ]
    if config.split_rule == BY_HASH:
        splits = [line.split for line in lines]
    elif config.split_rule == "mgca_compat":
        splits = _divide_train(source, lines)
    else:
        splits = _keep_patients_apart(source, lines, config, has_val="val" in lists)
    for line, split in zip(lines, splits, strict=True):
        if split:
            yield Item(
                image_id=line.name,
                image=line.path,
                patient_id=line.patient_id,
                split=split,
                labels=LABELS[line.kind],
            )


def _find_lists(source: SourceFolder, version: str) -> dict[str, str]:
    """Returns the path of each list of the version that is there, or that is named."""
    stem_of = {name: "" if name == "kaggle" else f"_COVIDx{name}" for name in VERSIONS}
    versions = [version] if version else VERSIONS
    present_versions = [name for name in versions if source.find(f"train{stem_of[name]}.txt")]
    if len(present_versions) > 1:
        names = ", ".join(present_versions)
        raise UserError(
            f"{source.root} has the lists of the versions {names}; choose one by the field lists, "
            f"as lists={present_versions[0]}"
        )
    stem = stem_of[(present_versions or versions)[0]]
    lists = {split: source.require(f"{split}{stem}.txt") for split in ("train", "test")}
    # COVID-Net's own lists have no validation films.
    if val := source.find(f"val{stem}.txt"):
        lists = {"train": lists["train"], "val": val, "test": lists["test"]}
    return lists


def _read_list(
    source: SourceFolder,
    table: str,
    split: str,
    folders: Mapping[str, str],
    names: Mapping[str, set[str]],
) -> Iterator[_Line]:
    """Yields the lines of a list: patient, file, class and source, the last not in all lines."""
    for number, text in enumerate(source.read_lines(table), start=1):
        fields = text.split()
        if fields[-1] not in LABELS:
            fields.pop()  # the source
        # From the right, since a patient's id may have blanks.
        if len(fields) < 3 or fields[-1] not in LABELS:
            reason = "a line of a list without patient, file and class"
            source.drop(reason, f"{table}:{number}")
            continue
        kind = fields.pop()
        start, folder = _find_file(fields, split, names)
        yield _Line(
            patient_id=" ".join(fields[:start]),
            name=" ".join(fields[start:]),
            kind=kind,
            split=split,
            path=f"{folders[folder]}/{' '.join(fields[start:])}",
        )


def _find_file(fields: list[str], split: str, names: Mapping[str, set[str]]) -> tuple[int, str]:
    """Returns where the name of the file begins in some fields, and the split of its folder.

    It is the last field, unless only a longer name exists. A film may be in the folder of another
    split than its list's, as those of older versions are.
    """
    for start in range(len(fields) - 1, 0, -1):
        name = " ".join(fields[start:])
        for folder in (split, *SPLIT_LISTS):
            if name in names[folder]:
                return start, folder
    return len(fields) - 1, split


def _keep_patients_apart(
    source: SourceFolder, lines: list[_Line], config: CovidxConfig, *, has_val: bool
) -> list[str]:
    """Returns the split of each line, "" for films of train whose patient is held out."""
    later = {
        "train": {line.patient_id for line in lines if line.split != "train"},
        "val": {line.patient_id for line in lines if line.split == "test"},
        "test": set[str](),
    }
    splits = []
    for line in lines:
        split = line.split
        if line.patient_id in later[split]:
            source.drop("a film of a patient of a later list", line.name)
            split = ""
        elif split == "train" and not has_val:
            split = assign_by_hash(line.patient_id, config.val_fraction, 0.0)
        splits.append(split)
    return splits


def _divide_train(source: SourceFolder, lines: list[_Line]) -> list[str]:
    """Returns the split of each line as MGCA's code divides them."""
    splits = [line.split for line in lines]
    train = [index for index, split in enumerate(splits) if split == "train"]
    if len(train) != NUM_TRAIN:
        source.note(
            f"mgca_compat divides the {NUM_TRAIN:,} films of train_COVIDx9A.txt, and the list of "
            f"train has {len(train):,}, so the splits are not the published ones"
        )
    _, val = hold_out(len(train), len(train) - math.floor(0.8 * len(train)), 0)
    for index in val:
        splits[train[index]] = "val"
    return splits


class Covidx(PublicBuilder):
    """Builds COVIDx."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: CovidxConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the lists."""
        return read_items(source, self.builder_config)

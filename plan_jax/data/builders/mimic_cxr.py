"""MIMIC-CXR: 377,110 films of 65,379 patients with reports, and labels from them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from plan_jax.data.builders import chest_imagenome, ms_cxr
from plan_jax.data.public import mimic_tree
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.chexpert_labels import check_blank, read_labels
from plan_jax.data.public.facts import BY_HASH, PHYSIONET_LICENCE, Facts
from plan_jax.data.public.items import UNUSED, Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.sections import mimic
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum"),
    *("Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion"),
    *("Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
)
# The radiologists' table of the test split spells one finding differently.
_RADIOLOGIST_NAMES = {"Lung Opacity": "Airspace Opacity"}
# The names keep 2.0.0 in version 2.1.0.
METADATA = "mimic-cxr-2.0.0-metadata.csv"
LABELLERS = {
    "chexpert": "mimic-cxr-2.0.0-chexpert.csv",
    "negbio": "mimic-cxr-2.0.0-negbio.csv",
    "radiologists": "mimic-cxr-2.1.0-test-set-labeled.csv",
}
VIEWS = {
    **{"AP": "AP", "PA": "PA", "": "UNKNOWN"},
    **{"LATERAL": "LATERAL", "LL": "LATERAL", "XTABLE LATERAL": "LATERAL"},
}

# The set of 5 x 200 films: a class is present, the other four and these are absent.
CLASSES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
OTHERS = tuple(name for name in FINDINGS if name not in (*CLASSES, "No Finding"))
PER_CLASS = 200
EVALUATED = "patient of MS-CXR or of Chest ImaGenome's gold annotations, left out of train"

FACTS = Facts(
    name="mimic_cxr",
    title="MIMIC-CXR-JPG",
    content="377,110 films and 227,835 reports of 65,379 patients, 14 labels from the reports",
    page=mimic_tree.IMAGES_PAGE,
    licence=PHYSIONET_LICENCE,
    citation="Johnson et al., Scientific Data 2019",
    files="mimic-cxr-2.0.0-{split,metadata,chexpert}.csv.gz and files/ of MIMIC-CXR-JPG 2.0.0 or "
    f"2.1.0; the reports of MIMIC-CXR ({mimic_tree.REPORTS_PAGE}) beside the images, as "
    f"{mimic_tree.REPORTS_ARCHIVE}, or elsewhere as `reports`",
    provides=("reports", "labels"),
    patients="the column `subject_id`",
    splits={
        "official": "the column `split`, validate as val; patients of MS-CXR and of Chest "
        "ImaGenome's gold annotations are left out of train if their lists are there",
        "mgca_compat": "MGCA's: validate and test are val, and there is no test; 54 studies that "
        "its table of sections lacks are left out",
        "chexzero_compat": "CheXzero's: everything is train",
        "5x200": "test: 200 frontal films of each of five classes from the official training "
        "split, drawn by the rule of CheXpert 5x200 with MGCA's seed, 0; other films of their "
        "patients and the official test split are left out; else as official",
    },
    leaks={
        "mgca_compat": "no image; models are selected on the official test split",
        "chexzero_compat": "the 5,159 images of the official test split are in train",
        "5x200": "no image; but a model trained under another rule may have seen these images",
    },
    defects=(
        "images are equalised already: do not window or invert them again",
        "about 0.1 % of views are wrong, and 15,769 images have none",
        "22,043 AP images are under procedures called PA and lateral",
        "the names of tables say 2.0.0 in version 2.1.0",
        "8 studies have no labels, and 2,414 have none but blank ones",
        "reports are apart from the images, and the table of their sections is not published",
    ),
    counts={
        **{"images": 377_110, "studies": 227_835, "patients": 65_379},
        **{"train": 368_960, "val": 2991, "test": 5159},
    },
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class MimicCxrConfig(mimic_tree.MimicConfig):
    """Where MIMIC-CXR was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS
    places: ClassVar[tuple[str, ...]] = ("reports", "ms_cxr", "chest_imagenome")

    # Folder or archive of the reports ("": the source folder).
    reports: str = ""
    # Folder or table of MS-CXR, whose patients are left out of train ("": the source folder).
    ms_cxr: str = ""
    # Folder of Chest ImaGenome, or its images_to_avoid.csv, whose patients are left out of train.
    chest_imagenome: str = ""
    # Whether the conclusion of 54 reports is taken from MIMIC-CXR's list, made by hand.
    hand_listed: bool = False
    # Whether train has the patients of MS-CXR and of Chest ImaGenome's gold annotations.
    keep_evaluated: bool = False
    # Whose labels: `chexpert`, `negbio`, or the `radiologists` of version 2.1.0 (test only).
    labeller: str = "chexpert"
    # Value of a label that the report does not mention: -1 (unknown) or 0 (absent), as in `5x200`.
    label_blank: int = -1

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        check_blank(self.label_blank, FACTS.name)
        if self.labeller not in LABELLERS:
            raise UserError(
                f"labeller {self.labeller!r} of dataset {FACTS.name} is unknown; use one of "
                f"{', '.join(LABELLERS)}"
            )


def read_items(source: SourceFolder, config: MimicCxrConfig) -> Iterator[Item]:
    """Yields the films of the metadata, with their study's report and labels."""
    metadata = source.require(METADATA)
    is_new = source.find("mimic-cxr-2.1.0-test-set-labeled.csv", "IMAGE_FILENAMES")
    source.note(f"version {'2.1.0' if is_new else '2.0.0'} of MIMIC-CXR-JPG")
    images = mimic_tree.ImageFolder(source, metadata)
    labels = _find_labels(source, config)
    splits = _Splits(source, config, metadata)
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    unlabelled: set[str] = set()
    opened = mimic_tree.open_reports(source, images, config.reports, config.hand_listed)
    with opened as reports:
        for row in source.read_csv(metadata, columns):
            dicom_id, subject_id, study_id, view = (row[column] for column in columns)
            if (split := splits.assign(dicom_id, subject_id, study_id)) is None:
                continue
            if study_id not in labels:
                unlabelled.add(study_id)
            yield Item(
                image_id=dicom_id,
                image=images.locate(subject_id, study_id, dicom_id),
                patient_id=subject_id,
                study_id=study_id,
                split=split,
                view=VIEWS.get(view, "OTHER"),
                labels=dict(zip(FINDINGS, labels.get(study_id, ()), strict=False)),
                sections=reports.read(subject_id, study_id),
            )
    if labels and unlabelled:
        source.note(f"studies that the table of labels does not list: {len(unlabelled)}")
    splits.report_rest()


def _find_labels(source: SourceFolder, config: MimicCxrConfig) -> dict[str, tuple[int, ...]]:
    """Returns the labels of each study by the labeller; nothing if there are no labels at all."""
    name = LABELLERS[config.labeller]
    table = source.find(name) if config.labeller == "chexpert" else source.require(name)
    if not table:
        source.note(f"there is no {name}, so no image has labels")
        return {}
    is_radiologists = config.labeller == "radiologists"
    columns = [_RADIOLOGIST_NAMES.get(f, f) if is_radiologists else f for f in FINDINGS]
    blank = 0 if config.split_rule == "5x200" else config.label_blank
    labels = _read_labels(source, table, columns, blank)
    if not labels:
        source.note(f"{table} lists no study, so no image has labels")
    return labels


class _Splits:
    """The split of each image under the rule of a configuration."""

    def __init__(self, source: SourceFolder, config: MimicCxrConfig, metadata: str):
        self._source = source
        self._config = config
        self._rule = config.split_rule
        needs_table = self._rule in ("official", "mgca_compat", "5x200")
        self._official = mimic_tree.read_splits(source) if needs_table else {}
        self._test_images: dict[str, str] = {}
        if self._rule == "5x200":
            self._test_images = _draw_classes(source, metadata, self._official)
        self._test_patients = frozenset(self._test_images.values())
        self._left_out = frozenset[str]()
        if not config.keep_evaluated and not self._rule.endswith("_compat"):
            self._left_out = _find_left_out(source, config)

    def assign(self, dicom_id: str, subject_id: str, study_id: str) -> str | None:
        """Returns the split of an image; None if it is left out, which is then counted."""
        if self._rule == "chexzero_compat":
            return "train"
        if self._rule == BY_HASH:
            config = self._config
            split = assign_by_hash(subject_id, config.val_fraction, config.test_fraction)
        elif dicom_id in self._official:
            split = self._official.pop(dicom_id)
        else:
            self._source.drop("the table of splits does not list an image", dicom_id)
            return None
        if self._rule == "mgca_compat":
            if f"s{study_id}" in mimic.HAND_LISTED_STUDIES:
                return UNUSED
            return "train" if split == "train" else "val"
        if self._rule == "5x200":
            if dicom_id in self._test_images:
                return "test"
            if split == "test" or subject_id in self._test_patients:
                return UNUSED
        if split == "train" and subject_id in self._left_out:
            self._source.drop(EVALUATED, dicom_id)
            return None
        return split

    def report_rest(self) -> None:
        """Drops the images of the official table that have no metadata."""
        for dicom_id in self._official:
            self._source.drop("the metadata do not list an image", dicom_id)


def _draw_classes(
    source: SourceFolder, metadata: str, official: Mapping[str, str]
) -> dict[str, str]:
    """Returns image -> patient of the 5 x 200 films: frontal, of the official training split.

    The rule is that of CheXpert 5x200: one of `CLASSES` is 1, the other four and `OTHERS` are 0 or
    blank; `PER_CLASS` of each are drawn. Images are sorted by id first, so that the order of the
    table does not matter.
    """
    labels = _read_labels(source, source.require(LABELLERS["chexpert"]), FINDINGS, blank=0)
    pools: dict[str, list[tuple[str, str]]] = {name: [] for name in CLASSES}
    for row in source.read_csv(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        values = dict(zip(FINDINGS, labels.get(row["study_id"], ()), strict=False))
        present = [name for name in (*CLASSES, *OTHERS) if values.get(name)]
        is_frontal = row["ViewPosition"] in ("AP", "PA")
        if not is_frontal or len(present) != 1 or official.get(row["dicom_id"]) != "train":
            continue
        if present[0] in CLASSES and values[present[0]] == 1:
            pools[present[0]].append((row["dicom_id"], row["subject_id"]))
    test_images: dict[str, str] = {}
    for name, pool in pools.items():
        pool.sort()
        count = min(PER_CLASS, len(pool))
        if count < PER_CLASS:
            source.note(f"5x200 has only {count} films of {name}")
        for index in np.random.RandomState(0).choice(len(pool), count, replace=False).tolist():
            dicom_id, subject_id = pool[index]
            test_images[dicom_id] = subject_id
    return test_images


def _find_left_out(source: SourceFolder, config: MimicCxrConfig) -> frozenset[str]:
    """Returns the patients on whom grounding methods are compared, so that none trains on them."""
    gold = chest_imagenome.find_gold_patients(source, config.chest_imagenome)
    return gold | ms_cxr.find_patients(source, config.ms_cxr)


def _read_labels(
    source: SourceFolder, table: str, columns: Sequence[str], blank: int
) -> dict[str, tuple[int, ...]]:
    """Returns the labels of each study in the order of the columns."""
    labels: dict[str, tuple[int, ...]] = {}
    shared_values: dict[tuple[int, ...], tuple[int, ...]] = {}  # most studies share their labels
    for row in source.read_csv(table, ("study_id", *columns)):
        study_id = row["study_id"]
        values = read_labels(row, columns, blank, f"study {study_id} of {table}")
        labels[study_id] = shared_values.setdefault(values, values)
    return labels


class MimicCxr(PublicBuilder):
    """Builds MIMIC-CXR-JPG with the reports of MIMIC-CXR."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: MimicCxrConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the metadata."""
        return read_items(source, self.builder_config)

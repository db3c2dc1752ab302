"""BRAX: 40,967 films of a Brazilian hospital, labels from Portuguese reports."""

import dataclasses
import os
from collections.abc import Iterator
from typing import ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.chexpert_labels import check_blank, read_labels
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, PHYSIONET_LICENCE, Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.tfds import tfds

FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
# A decubitus film is taken from the front; readers of BRAX count AP LLD among the frontal ones.
VIEWS = {"PA": "PA", "AP": "AP", "AP LLD": "AP", "L": "LATERAL", "RL": "LATERAL", "": "UNKNOWN"}
MAX_ASPECT = 10.0  # of a radiograph; twelve images are strips of 19:1 and more
COLUMNS = ("PngPath", "PatientID", "AccessionNumber", "ViewPosition", *FINDINGS)

FACTS = Facts(
    name="brax",
    title="BRAX",
    content="40,967 films of 19,351 patients, 14 labels from Portuguese reports",
    page="physionet.org/content/brax/1.1.0",
    licence=PHYSIONET_LICENCE,
    citation="Reis et al., Scientific Data 2022",
    files="master_spreadsheet_update.csv (1.0.0: master_spreadsheet.csv), and images/ or "
    "Anonymized_DICOMs/",
    provides=("labels",),
    patients="the column `PatientID`",
    splits={BY_HASH: "patients are divided by hash; there is no official split"},
    defects=(
        "12 images are strips and no radiographs",
        "a quarter of the images has no view",
        "an accession number may be of two patients",
        "DICOM files of 1.0.0 have no suffix",
    ),
    counts={"images": 40_967, "patients": 19_351},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class BraxConfig(PublicConfig):
    """Where BRAX was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Value of a label that the report does not mention: -1 (unknown) or 0 (absent).
    label_blank: int = -1

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        check_blank(self.label_blank, FACTS.name)


def read_items(source: SourceFolder, config: BraxConfig) -> Iterator[Item]:
    """Yields the films of the table."""
    table = source.require("master_spreadsheet_update.csv", "master_spreadsheet.csv")
    base = os.path.dirname(table)
    has_dicom_only = not source.find_folder("images") and source.find_folder("Anonymized_DICOMs")
    optional = ("DicomPath", "Rows", "Columns")
    for row in source.read_csv(table, COLUMNS, optional=optional):
        path = row["PngPath"]
        name = os.path.splitext(path)[0].removeprefix("images/")
        if not row["PatientID"]:
            source.drop("a row has no patient id", name)
            continue
        shape = parse_numbers((row["Rows"], row["Columns"]))
        if shape and max(shape) > MAX_ASPECT * min(shape):
            source.drop("an image is a strip", name)
            continue
        yield Item(
            image_id=name,
            image=(
                _find_dicom(source, os.path.join(base, row["DicomPath"]))
                if has_dicom_only
                else os.path.join(base, path)
            ),
            patient_id=row["PatientID"],
            study_id=f"{row['PatientID']}/{row['AccessionNumber']}",
            view=VIEWS.get(row["ViewPosition"], "OTHER"),
            labels=dict(
                zip(FINDINGS, read_labels(row, FINDINGS, config.label_blank, name), strict=True)
            ),
        )


def _find_dicom(source: SourceFolder, path: str) -> str:
    """Returns the path of a DICOM file, with or without the suffix that the table has."""
    stem = path.removesuffix(".dcm")
    return next(filter(source.has, (path, stem, f"{stem}.dcm")), path)


class Brax(PublicBuilder):
    """Builds BRAX."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: BraxConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the table."""
        return read_items(source, self.builder_config)

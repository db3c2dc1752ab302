"""CheXpert Plus: the films of CheXpert with the reports that its labels were mined from."""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import ClassVar

from plan_jax.data import quoting
from plan_jax.data.builders.chexpert import FINDINGS, name_view
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.chexpert_labels import check_blank, read_labels
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

TABLE = "df_chexpert_plus_240401.csv"
OFFICIAL = "official"
SPLITS = ("train", "valid")  # values of the column split
# Sections of the table; the number of the examination and closing remarks are left out.
SECTIONS = (
    *("narrative", "clinical_history", "history", "comparison", "technique"),
    *("procedure_comments", "findings", "impression"),
)
REQUIRED_SECTIONS = ("findings", "impression")
LABELLED_TEXTS = ("report", "findings", "impression")
MAX_SEARCHED = 100  # films that are looked for until the folder of all is known

FACTS = Facts(
    name="chexpert_plus",
    title="CheXpert Plus",
    content="223,462 films of CheXpert with their reports by sections; labels by CheXbert",
    page="stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1",
    licence="Stanford's research use agreement, after registration; redistribution is forbidden",
    citation="Chambon et al., arXiv:2405.19538, 2024",
    files=f"{TABLE}; PNG/ with the unpacked chunks, or DICOM/, or the films of CheXpert; for "
    "labels chexbert_labels/report_fixed.json",
    provides=("reports", "labels"),
    patients="the column deid_patient_id",
    splits={
        OFFICIAL: "by the column split: valid is test, as in ReXrank; a hash puts `val_fraction` "
        "of the patients of train into val"
    },
    defects=(
        "the table names .jpg files, and the download has .png files",
        "films of one study have copies of the report with other replacements of names and dates; "
        "the copy of the first film is used for all",
        "many reports have no findings section; all are in capitals",
        "the labels are lines of JSON in files that end in .json",
        "about 5 % of the DICOM files lack HighBit",
    ),
    counts={"images": 223_462},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class ChexpertPlusConfig(PublicConfig):
    """Where CheXpert Plus was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Text that the labels were mined from: `report`, `findings` or `impression`.
    labelled_text: str = "report"
    # Value of a finding that the text does not mention; other work usually reads it as 0.
    label_blank: int = -1

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        check_blank(self.label_blank, FACTS.name)
        if self.labelled_text not in LABELLED_TEXTS:
            raise UserError(
                f"labelled_text {self.labelled_text!r} of dataset {FACTS.name} is unknown; use one "
                f"of {', '.join(LABELLED_TEXTS)}"
            )


def read_items(source: SourceFolder, config: ChexpertPlusConfig) -> Iterator[Item]:
    """Yields the films of the table; those of one study have the report of its first film."""
    table = source.require(TABLE)
    first_film_of, has_several = _list_studies(source, table)
    prefix, suffix, column = _find_images(source, table)
    labels_of = _read_labels(source, config)
    sections_of = _read_first_reports(source, table, first_film_of, has_several)
    num_different = 0
    for row in _read_rows(source, table):
        path, study = row["path_to_image"], _name_study(row)
        if row["split"] not in SPLITS:
            raise UserError(
                f"split {quoting.quote(row['split'])} of {quoting.quote_path(path)} in {table} is "
                f"none of {', '.join(SPLITS)}; correct it"
            )
        split = "test" if row["split"] == "valid" else ""
        if config.split_rule == OFFICIAL and not split:
            split = assign_by_hash(row["deid_patient_id"], config.val_fraction, 0.0)
        sections = _read_sections(row)
        first_sections = sections_of.get(study, sections)
        num_different += sections != first_sections
        stem = path.rpartition(".")[0]
        yield Item(
            image_id=stem,
            image=f"{prefix}{row[column].rpartition('.')[0]}{suffix}",
            patient_id=row["deid_patient_id"],
            study_id=study.partition("/")[2],
            split=split if config.split_rule == OFFICIAL else "",
            view=name_view(row["ap_pa"], row["frontal_lateral"] or path),
            labels=dict(zip(FINDINGS, labels_of.pop(stem, ()), strict=False)),
            sections=first_sections,
        )
    if num_different:
        source.note(
            f"{quoting.count(num_different, 'film')} had another copy of the report than the first "
            "film of the study, whose copy is used"
        )


def _read_rows(source: SourceFolder, table: str) -> Iterator[dict[str, str]]:
    columns = ("path_to_image", "deid_patient_id", "frontal_lateral", "ap_pa", "split", "report")
    required = [f"section_{name}" for name in REQUIRED_SECTIONS]
    optional = [f"section_{name}" for name in SECTIONS if name not in REQUIRED_SECTIONS]
    return source.read_csv(table, (*columns, *required), optional=("path_to_dcm", *optional))


def _read_first_reports(
    source: SourceFolder, table: str, first_film_of: Mapping[str, str], studies: Set[str]
) -> dict[str, dict[str, str]]:
    """Returns the sections of the first film of some studies; all of them would be too many."""
    texts = ["report", *(f"section_{name}" for name in SECTIONS)]
    return {
        study: _read_sections(row)
        for row in source.read_csv(table, ("path_to_image",), optional=texts)
        for study in (_name_study(row),)
        if study in studies and row["path_to_image"] == first_film_of[study]
    }


def _name_study(row: Mapping[str, str]) -> str:
    """Returns the folders of a film: train, patientNNNNN and studyN."""
    return row["path_to_image"].rpartition("/")[0]


def _list_studies(source: SourceFolder, table: str) -> tuple[dict[str, str], set[str]]:
    """Returns the first film of each study by its path, and the studies of several films."""
    first_film_of: dict[str, str] = {}
    has_several = set[str]()
    for row in source.read_csv(table, ("path_to_image",)):
        path, study = row["path_to_image"], _name_study(row)
        if study in first_film_of:
            has_several.add(study)
        first_film_of[study] = min(path, first_film_of.get(study, path))
    return first_film_of, has_several


def _read_sections(row: Mapping[str, str]) -> dict[str, str]:
    """Returns the sections of a report that are not empty, and the whole of it."""
    texts = {name: row[f"section_{name}"] for name in SECTIONS} | {"report": row["report"]}
    # A line break may be written as a backslash and an n.
    cleaned = {name: text.replace("\\n", "\n").strip() for name, text in texts.items()}
    return {name: text for name, text in cleaned.items() if text}


def _read_labels(source: SourceFolder, config: ChexpertPlusConfig) -> dict[str, tuple[int, ...]]:
    """Returns the labels of each film, by its path without suffix."""
    name = f"{config.labelled_text}_fixed.json"
    path = source.find(f"chexbert_labels/{name}", name)
    if not path:
        source.note(f"there is no chexbert_labels/{name}, so no film has labels")
        return {}
    labels_of = {}
    for content in source.read_json_lines(path):
        film = str(content.get("path_to_image", ""))
        cells = {
            finding: "" if value is None or value != value else str(value)  # JSON may say NaN
            for finding, value in ((finding, content.get(finding)) for finding in FINDINGS)
        }
        labels = read_labels(cells, FINDINGS, config.label_blank, f"{film} in {path}")
        labels_of[film.rpartition(".")[0]] = labels
    return labels_of


def _find_images(source: SourceFolder, table: str) -> tuple[str, str, str]:
    """Returns what comes before and after the path of a film, and the column of that path."""
    columns = ("path_to_image", ".png"), ("path_to_dcm", ".dcm"), ("path_to_image", ".jpg")
    rows = source.read_csv(table, ("path_to_image",), optional=("path_to_dcm",))
    for row, _ in zip(rows, range(MAX_SEARCHED), strict=False):
        for column, suffix in columns:
            stem = row[column].rpartition(".")[0]
            if stem and (path := source.find(f"{stem}{suffix}")):
                return path.removesuffix(f"{stem}{suffix}"), suffix, column
    source.note("no film was found as .png, .dcm or .jpg, so those of PNG/ are missing")
    return "PNG/", ".png", "path_to_image"


class ChexpertPlus(PublicBuilder):
    """Builds CheXpert Plus."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ChexpertPlusConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the table."""
        return read_items(source, self.builder_config)

"""PadChest-GR: 4,555 films with reports sentence by sentence, in two languages, with boxes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from plan_jax.data import quoting
from plan_jax.data.public import mimic_tree
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Box, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

REPORTS = "grounded_reports_20240819.json"
TABLE = "master_table.csv"
ARCHIVE = "PadChest_GR.zip"
OFFICIAL = "official"
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # their word -> ours
LANGUAGES = ("en", "es")
# The column Projection of PadChest -> view.
VIEWS = {
    **{"PA": "PA", "AP": "AP", "AP_horizontal": "AP"},
    **{"L": "LATERAL", "COSTAL": "OTHER", "UNK": "UNKNOWN"},
}
MAX_SEARCHED = 20  # images that are looked for until the folder of all is known

FACTS = Facts(
    name="padchest_gr",
    title="PadChest-GR",
    content="4,555 frontal films of PadChest, their reports as sentences in English and Spanish, "
    "boxes of each positive sentence",
    page="bimcv.cipf.es/bimcv-projects/padchest-gr",
    licence="research use, after a request; redistribution is forbidden",
    citation="Castro et al., arXiv:2411.05085, 2024",
    files=f"{REPORTS}, {TABLE} (or its .zip) and the images, unpacked from {ARCHIVE}.001 to .037",
    provides=("reports", "labels", "boxes"),
    patients="the column PatientID of the master table",
    splits={OFFICIAL: "the column split of the master table, which divides patients"},
    defects=(
        "normal sentences lack entries that abnormal ones have",
        "corners of boxes are fractions of the image",
        "its films are among those of PadChest, whose train lacks the patients of val and test",
        "`extra_boxes` are those of a second reader, and only some sentences have them",
    ),
    counts={"images": 4_555},
)


@dataclasses.dataclass(eq=False)
class PadchestGrConfig(PublicConfig):
    """Where PadChest-GR was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Language of the phrases and of the section `findings`: `en` or `es`.
    language: str = "en"
    # Use the second reader's boxes as well as the first one's.
    extra_boxes: bool = False

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        if self.language not in LANGUAGES:
            raise UserError(
                f"language {self.language!r} of dataset {FACTS.name} is unknown; use one of "
                f"{', '.join(LANGUAGES)}"
            )


def read_items(source: SourceFolder, config: PadchestGrConfig) -> Iterator[Item]:
    """Yields the films of the reports that the master table has.

    A finding is present if an abnormal sentence has its label, and absent otherwise.
    """
    path = source.require(REPORTS)
    reports = source.read_json(path)
    if not isinstance(reports, list):
        raise UserError(f"{path} in {source.root} is not a list of reports; download it again")
    studies = _read_studies(source)
    reports = [report for report in reports if _has_ids(source, report)]
    folder = _find_images(source, [report["ImageID"] for report in reports])
    findings = sorted({label for report in reports for label in _list_labels(report)})
    other = next(language for language in LANGUAGES if language != config.language)
    for report in reports:
        name, study_id = report["ImageID"], report["StudyID"]
        row = studies.get(study_id)
        if row is None:
            source.drop("a report of a study that the master table does not have", name)
            continue
        labels = _list_labels(report)
        bits = row["BitsStored_DICOM"]
        yield Item(
            image_id=name,
            image=f"{folder}/{name}" if folder else name,
            patient_id=row["PatientID"],
            study_id=study_id,
            split=SPLITS[row["split"]] if config.split_rule == OFFICIAL else "",
            view=VIEWS.get(row["Projection"], "FRONTAL"),
            labels={finding: int(finding in labels) for finding in findings},
            sections={
                "findings": _join_sentences(report, config.language),
                f"findings_{other}": _join_sentences(report, other),
            },
            boxes=list(_read_boxes(source, report, config)),
            bit_depth=int(bits) if bits.isdecimal() and 8 <= int(bits) <= 16 else 0,
        )


def find_evaluated_patients(source: SourceFolder, path: str) -> frozenset[str]:
    """Returns the patients of val and test, which no model that is evaluated may train on.

    Args:
      source: the folder that is searched, and that gets a note if there is no PadChest-GR.
      path: the folder or the master table of PadChest-GR; "" searches the source folder.
    """

    def read(folder: SourceFolder, table: str) -> frozenset[str]:
        rows = folder.read_csv(table, ("PatientID", "split"))
        return frozenset(row["PatientID"] for row in rows if row["split"] != "train")

    return mimic_tree.find_evaluated(source, path, FACTS, (TABLE,), read)


def _has_ids(source: SourceFolder, report: Any) -> bool:
    if isinstance(report, dict) and all(
        isinstance(report.get(key), str) and report[key] for key in ("ImageID", "StudyID")
    ):
        return True
    source.drop("a report has no ids of image and study", REPORTS)
    return False


def _list_sentences(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sentences = report.get("findings") or []
    return [sentence for sentence in sentences if isinstance(sentence, dict)]


def _list_labels(report: Mapping[str, Any]) -> list[str]:
    """Returns the labels of the abnormal sentences."""
    return [
        str(label).strip()
        for sentence in _list_sentences(report)
        if sentence.get("abnormal")
        for label in sentence.get("labels") or ()
    ]


def _join_sentences(report: Mapping[str, Any], language: str) -> str:
    """Returns the sentences as one text."""
    texts = [
        str(sentence.get(f"sentence_{language}") or "").strip()
        for sentence in _list_sentences(report)
    ]
    closed = [text if text.endswith((".", "!", "?")) else f"{text}." for text in texts if text]
    return " ".join(closed)


def _read_boxes(
    source: SourceFolder, report: Mapping[str, Any], config: PadchestGrConfig
) -> Iterator[Box]:
    """Yields the boxes of all sentences; the sentence is the phrase that they locate."""
    keys = ("boxes", "extra_boxes") if config.extra_boxes else ("boxes",)
    for sentence in _list_sentences(report):
        label = str((sentence.get("labels") or ("",))[0]).strip()
        for corners in (corners for key in keys for corners in sentence.get(key) or ()):
            numbers = parse_numbers(map(str, corners)) if isinstance(corners, list) else None
            if numbers is None or len(numbers) != 4:
                source.drop("a box has no four numbers", report["ImageID"])
                continue
            x0, y0, x1, y1 = numbers
            yield Box(
                (x0, y0, x1, y1),
                label=label,
                phrase=str(sentence.get(f"sentence_{config.language}") or "").strip(),
                is_normalised=True,
            )


def _read_studies(source: SourceFolder) -> dict[str, dict[str, str]]:
    """Returns for each study of the master table one of its rows, of which each is for a label."""
    table = source.require(TABLE)
    studies: dict[str, dict[str, str]] = {}
    columns = ("StudyID", "PatientID", "split")
    for row in source.read_csv(table, columns, optional=("Projection", "BitsStored_DICOM")):
        if row["split"] not in SPLITS:
            raise UserError(
                f"split {quoting.quote(row['split'])} of study "
                f"{quoting.quote_path(row['StudyID'])} in {table} is none of {', '.join(SPLITS)}; "
                "correct it"
            )
        first = studies.setdefault(row["StudyID"], row)
        if first["split"] != row["split"]:
            raise UserError(
                f"study {row['StudyID']} of {table} is in the splits {first['split']} and "
                f"{row['split']}; download it again"
            )
    return studies


def _find_images(source: SourceFolder, names: list[str]) -> str:
    """Returns the folder of the images, "" if it is the source folder or unknown.

    Raises:
      UserError: the archive of the images is there and not unpacked.
    """
    for name in names[:MAX_SEARCHED]:
        if path := source.find(name):
            return path.rpartition("/")[0]
    if source.find(ARCHIVE, f"{ARCHIVE}.001"):
        raise UserError(
            f"the images of {source.root} are not unpacked; join the parts with cat {ARCHIVE}.* > "
            f"{ARCHIVE} and unpack that"
        )
    return ""


class PadchestGr(PublicBuilder):
    """Builds PadChest-GR."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: PadchestGrConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the reports."""
        return read_items(source, self.builder_config)

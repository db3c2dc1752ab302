"""Open-I, the chest radiographs of Indiana University: reports with their films."""

import dataclasses
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import SPLITS, UNUSED, Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.sections import openi
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

R2GEN = "r2gen"
REPORTS, REPORTS_ARCHIVE = "ecgen-radiology", "NLMCXR_reports.tgz"
KAGGLE_REPORTS, KAGGLE_VIEWS = "indiana_reports.csv", "indiana_projections.csv"
ANNOTATION = "annotation.json"
IMAGE_FOLDERS = ("NLMCXR_png", "NLMCXR_dcm", "images/images_normalized", "images", "")
VIEWS = {"Frontal": "FRONTAL", "Lateral": "LATERAL"}
# Finding -> the first parts of the MeSH terms that name it.
TERMS = {
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Consolidation": ("Consolidation",),
    "Edema": ("Pulmonary Edema",),
    "Effusion": ("Pleural Effusion",),
    "Emphysema": ("Emphysema", "Pulmonary Emphysema"),
    "Fibrosis": ("Pulmonary Fibrosis",),
    "Fracture": ("Fractures, Bone",),
    "Granuloma": ("Granuloma", "Calcified Granuloma"),
    "Hernia": ("Hernia, Hiatal",),
    "Infiltration": ("Infiltrate",),
    "Mass": ("Mass",),
    "Nodule": ("Nodule",),
    "Opacity": ("Opacity",),
    "Pneumonia": ("Pneumonia",),
    "Pneumothorax": ("Pneumothorax",),
}
NOT_INDEXED = "No Indexing"  # a report that nobody has read for its terms
_IMAGE_ID = re.compile(r"(?:CXR)?(?P<uid>\d+)(?:_(?P=uid))?_(?P<rest>IM-.+)")

FACTS = Facts(
    name="openi",
    title="Open-I (Indiana University, IU X-ray)",
    content="3,955 reports with 7,470 films, frontal and lateral",
    page="openi.nlm.nih.gov/faq (NLMCXR_reports.tgz and NLMCXR_png.tgz or NLMCXR_dcm.tgz)",
    licence="CC BY-NC-ND 4.0, no registration",
    citation="Demner-Fushman et al., JAMIA 2016",
    files="ecgen-radiology/ or NLMCXR_reports.tgz, with the images as PNG or DICOM; or Kaggle's "
    "indiana_reports.csv, indiana_projections.csv and images/; or R2Gen's annotation.json and "
    "images/",
    provides=("reports", "labels"),
    patients="the number of the report, because no other id is published",
    splits={
        BY_HASH: "by a hash of the number of the report",
        R2GEN: "the lists of R2Gen's annotation.json, 2,069 / 296 / 590 reports; others are left "
        "out",
    },
    leaks={R2GEN: "none is known: no report is in two lists"},
    defects=(
        "104 reports have no image, and 28 neither findings nor impression",
        "XXXX stands for what was removed, and has removed findings too",
        "768 texts are copies of another one, so retrieval has several right answers",
        "the NLM's files do not say which film is lateral; Kaggle's indiana_projections.csv does, "
        "and is used where it is beside them",
    ),
    counts={"reports": 3955, "images": 7470},
    findings=tuple(TERMS),
)


@dataclasses.dataclass(eq=False)
class OpeniConfig(PublicConfig):
    """Where Open-I was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS

    # Keep only the first image of a report, as if a report had one; laterals do not count if
    # `views` leaves them out and the tables tell them apart.
    first_only: bool = False


class _Report(NamedTuple):
    """A report, and the paths of its images by their ids."""

    uid: str
    sections: Mapping[str, str]
    labels: Mapping[str, int]
    images: Mapping[str, str]


def read_items(source: SourceFolder, config: OpeniConfig) -> Iterator[Item]:
    """Yields the images of the reports, in whichever layout they are."""
    splits = _read_splits(source) if config.split_rule == R2GEN else {}
    views = _read_views(source)
    if not views:
        source.note("no table tells frontal from lateral films, so all of them are kept")
    for report in _read_reports(source):
        if not report.images:
            source.drop("a report has no image", report.uid)
            continue
        if not report.sections.keys() & {"findings", "impression"}:
            source.drop("a report has neither findings nor impression", report.uid)
            continue
        names = list(report.images)
        if config.first_only:
            is_left_out = config.views == "frontal"
            names.sort(key=lambda name: is_left_out and views.get(name) == "LATERAL")
            names = names[:1]
        for name in names:
            yield Item(
                image_id=name,
                image=report.images[name],
                patient_id=report.uid,
                study_id=report.uid,
                split=splits.get(report.uid, UNUSED) if splits else "",
                view=views.get(name, "UNKNOWN") if views else "",
                labels=report.labels,
                sections=report.sections,
            )


def _read_reports(source: SourceFolder) -> Iterator[_Report]:
    """Yields all reports of the first layout that is there: the NLM's, Kaggle's, or R2Gen's."""
    if source.find_folder(REPORTS) or source.find(REPORTS_ARCHIVE):
        return _read_nlm(source)
    if source.find(KAGGLE_REPORTS):
        return _read_kaggle(source)
    if source.find(ANNOTATION):
        return _read_r2gen(source)
    raise UserError(
        f"{source.root} has no {REPORTS}, {REPORTS_ARCHIVE}, {KAGGLE_REPORTS} or {ANNOTATION}; "
        f"download the reports from {FACTS.page}"
    )


# Layouts ------------------------------------------------------------------------------------------


def _read_nlm(source: SourceFolder) -> Iterator[_Report]:
    """Yields the reports of the NLM's XML files, as a folder or as the archive."""
    folders = [folder for folder in map(source.find_folder, IMAGE_FOLDERS) if folder] + [""]
    for name, content in _read_xml(source):
        try:
            report = openi.read_report(content)
        except ValueError:
            source.drop("a report cannot be read", name)
            continue
        paths = {_name_image(image): image for image in report.images}
        yield _Report(
            report.uid,
            report.sections,
            _find_labels(report.mesh_major),
            {name: _place_image(source, folders, name, image) for name, image in paths.items()},
        )


def _read_xml(source: SourceFolder) -> Iterator[tuple[str, bytes]]:
    """Yields the names and contents of the XML files."""
    folder = source.find_folder(REPORTS)
    if not folder:
        yield from source.read_tar(source.find(REPORTS_ARCHIVE), ".xml")
        return
    source.tables[folder] = None
    for name in source.list_names(folder):
        if not name.endswith(".xml"):
            continue
        path = posixpath.join(folder, name)
        source.tables[path] = None
        if (content := source.read_bytes(path)) is None:
            source.drop("a report cannot be read", path)
        else:
            yield path, content


def _place_image(source: SourceFolder, folders: Sequence[str], name: str, image: str) -> str:
    """Returns the path of an image of the NLM: DICOM files are in one folder for each report."""
    uid, _, rest = name.removeprefix("CXR").partition("_")
    files = (f"{image}.png", f"{name}.png", f"{uid}/{uid}_{rest}.dcm", f"{uid}_{rest}.dcm")
    paths = [posixpath.join(folder, file) for folder in folders for file in files]
    return next(filter(source.has, paths), paths[0])


def _read_kaggle(source: SourceFolder) -> Iterator[_Report]:
    """Yields the reports of Kaggle's pair of tables."""
    table, films = source.find(KAGGLE_REPORTS), source.require(KAGGLE_VIEWS)
    folder = source.find_folder("images/images_normalized", "images_normalized", "images")
    images: dict[str, dict[str, str]] = {}
    for row in source.read_csv(films, ("uid", "filename")):
        path = posixpath.join(folder, row["filename"])
        images.setdefault(row["uid"], {})[_name_image(row["filename"])] = path
    extra = ("MeSH", "comparison", "indication")
    for row in source.read_csv(table, ("uid", "findings", "impression"), optional=extra):
        sections = {name: row[name] for name in openi.SECTIONS if row[name]}
        yield _Report(
            f"CXR{row['uid']}",
            sections,
            _find_labels(list(filter(None, row["MeSH"].split(";")))),
            images.pop(row["uid"], {}),
        )
    for uid in images:
        source.drop("images of a report that the table does not have", f"CXR{uid}")


def _read_r2gen(source: SourceFolder) -> Iterator[_Report]:
    """Yields the reports of annotation.json, which are the findings of cleaned reports."""
    path = source.find(ANNOTATION)
    folder = posixpath.join(posixpath.dirname(path), "images")
    for entry in _list_entries(source, path):
        sections = {"findings": entry.text} if entry.text else {}
        images = {
            f"{entry.study_id}-{index}": posixpath.join(folder, image)
            for index, image in enumerate(entry.images)
        }
        yield _Report(entry.uid, sections, {}, images)


# Tables -------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A report of annotation.json."""

    uid: str
    study_id: str
    split: str
    text: str
    images: Sequence[str]


def _list_entries(source: SourceFolder, path: str) -> Iterator[_Entry]:
    """Yields the reports of annotation.json.

    Raises:
      UserError: it has another form.
    """
    content = source.read_json(path)
    try:
        for split in SPLITS:
            for entry in content[split]:
                study_id, images = str(entry["id"]), entry["image_path"]
                text = str(entry["report"]).strip()
                uid = study_id.partition("_")[0]
                yield _Entry(uid, study_id, split, text, [str(image) for image in images])
    except (KeyError, TypeError):
        raise UserError(
            f"{path} in {source.root} is not R2Gen's annotation.json: it needs the lists "
            f"{', '.join(SPLITS)} of objects with id, report and image_path"
        ) from None


def _read_splits(source: SourceFolder) -> dict[str, str]:
    """Returns the split of each report of R2Gen's lists."""
    path = source.require(ANNOTATION)
    splits: dict[str, str] = {}
    for entry in _list_entries(source, path):
        if splits.setdefault(entry.uid, entry.split) != entry.split:
            raise UserError(
                f"report {entry.uid} is in two lists of {path} in {source.root}; download R2Gen's "
                "annotation.json again"
            )
    if not splits:
        raise UserError(f"{path} in {source.root} lists no report; download it again")
    return splits


def _read_views(source: SourceFolder) -> dict[str, str]:
    """Returns the view of each film in Kaggle's table; nothing if it is not there."""
    path = source.find(KAGGLE_VIEWS)
    if not path:
        return {}
    return {
        _name_image(row["filename"]): VIEWS.get(row["projection"].capitalize(), "UNKNOWN")
        for row in source.read_csv(path, ("filename", "projection"))
    }


def _name_image(name: str) -> str:
    """Returns the id of an image, which layouts spell in different ways.

    >>> _name_image("CXR1_1_IM-0001-3001"), _name_image("1_IM-0001-3001.dcm.png")
    ('CXR1_IM-0001-3001', 'CXR1_IM-0001-3001')
    """
    stem = name.removesuffix(".png").removesuffix(".dcm")
    match = _IMAGE_ID.fullmatch(stem)
    return f"CXR{match['uid']}_{match['rest']}" if match else stem


def _find_labels(terms: Sequence[str]) -> dict[str, int]:
    """Returns the labels of a report's MeSH terms; none if nobody has chosen terms for it."""
    heads = {term.partition("/")[0].strip() for term in terms}
    if not heads or NOT_INDEXED in heads:
        return {}
    return {finding: int(not heads.isdisjoint(names)) for finding, names in TERMS.items()}


class Openi(PublicBuilder):
    """Builds Open-I."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: OpeniConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the images of the reports."""
        return read_items(source, self.builder_config)

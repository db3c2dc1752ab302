"""The folders of MIMIC-CXR, where its derived datasets find images and reports by their ids."""

import contextlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.sections import mimic
from plan_jax.types import UserError

IMAGES_PAGE = "physionet.org/content/mimic-cxr-jpg/2.1.0"
REPORTS_PAGE = "physionet.org/content/mimic-cxr/2.1.0"
REPORTS_ARCHIVE = "mimic-cxr-reports.zip"
SPLIT_TABLE = "mimic-cxr-2.0.0-split.csv"
_SPLITS = {"train": "train", "validate": "val", "test": "test"}
# Folders that the project of the reports is unpacked to; "" is the project of the images.
_REPORTS_FOLDERS = ("mimic-cxr-reports", "mimic-cxr/2.1.0", "mimic-cxr/2.0.0", "mimic-cxr")
_PATIENT_FOLDERS = tuple(f"p{number}" for number in range(10, 20))
_IMAGE_PATH = re.compile(r"\bp(\d{8})/s(\d{8})/([\w-]+)\.\w+$")

# Returns the text of a path below p10 to p19, or None if there is no such file.
_ReadText = Callable[[str], str | None]
UNPACK_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


class MimicConfig(PublicConfig):
    """Options of MIMIC-CXR and of the datasets on its images, which are where `images` says."""

    @property
    def image_root(self) -> Path:
        """Returns the folder that the paths of images are relative to."""
        images = getattr(self, "images", "")
        return Path(os.path.abspath(os.path.expanduser(images))) if images else self.root


def open_place(source: SourceFolder, path: str, option: str) -> tuple[SourceFolder, str]:
    """Returns the folder that an option names, and a file's name if the option names a file.

    What is dropped there counts for the source folder.

    Raises:
      UserError: the path does not exist.
    """
    place = Path(os.path.abspath(os.path.expanduser(path)))
    if not place.exists():
        raise UserError(f"{place} does not exist; correct data.builder.{option}")
    folder = SourceFolder(place.parent if place.is_file() else place)
    folder.dropped, folder.notes = source.dropped, source.notes
    return folder, place.name if place.is_file() else ""


def parse_image_path(path: str) -> tuple[str, str, str] | None:
    """Returns patient, study and image of a path; None if it is not one of MIMIC-CXR.

    >>> parse_image_path("files/p10/p10000032/s50414267/02aa804e.dcm")
    ('10000032', '50414267', '02aa804e')
    """
    match = _IMAGE_PATH.search(path)
    return (match[1], match[2], match[3]) if match else None


def read_splits(source: SourceFolder) -> dict[str, str]:
    """Returns the official split of each image.

    Raises:
      UserError: the table is not there, or has another value.
    """
    table = source.require(SPLIT_TABLE)
    splits = {}
    for row in source.read_csv(table, ("dicom_id", "split")):
        if row["split"] not in _SPLITS:
            raise UserError(
                f"split {row['split']!r} of {row['dicom_id']} in {table} is none of "
                f"{', '.join(_SPLITS)}; download the table again"
            )
        splits[row["dicom_id"]] = _SPLITS[row["split"]]
    return splits


def find_evaluated(
    source: SourceFolder,
    path: str,
    facts: Facts,
    tables: Sequence[str],
    read_patients: Callable[[SourceFolder, str], frozenset[str]],
) -> frozenset[str]:
    """Returns the patients of a dataset that evaluates models of MIMIC-CXR.

    Args:
      source: the folder that is searched, and that gets a note if there is no table.
      path: the folder or table of that dataset; "" searches the source folder.
      facts: facts about that dataset; an option of its name sets `path`.
      tables: names of its table.
      read_patients: reads the patients of a table in a folder.

    Raises:
      UserError: `path` does not exist, or has no such table.
    """
    folder, table = open_place(source, path, facts.name) if path else (source, "")
    if path and not table:
        table = folder.require(*tables)
    if table := table or source.find(*tables):
        return read_patients(folder, table)
    source.note(
        f"{tables[0]} is not there, so train may have patients of the evaluation set {facts.name}: "
        f"download it from {facts.page} and name its folder with data.builder.{facts.name}"
    )
    return frozenset()


def check_evaluated(source: SourceFolder, table: str, patients: Collection[str]) -> None:
    """Raises UserError if a table of patients who are left out of train names none.

    Such a table would leave all of them in train, and nothing would say so.
    """
    if not patients:
        raise UserError(f"{table} in {source.root} names no patient; download it again")


class ImageFolder:
    """The images of MIMIC-CXR-JPG.

    Downloads with wget leave index.html in every folder, so images are never searched for: their
    paths follow from their ids.

    Attributes:
      source: the folder of MIMIC-CXR-JPG, or one above it.
      patients: path in it of the folder that holds p10 to p19; "" if there is none.
    """

    def __init__(self, source: SourceFolder, beside: str = ""):
        """Initialises the images.

        Args:
          source: the folder of MIMIC-CXR-JPG, or one above it.
          beside: path of a table of it, beside which the images are expected.
        """
        self.source = source
        self.patients = _find_patients(source, os.path.dirname(beside))

    def locate(self, subject_id: str, study_id: str, dicom_id: str) -> str:
        """Returns the path of an image in the folder, whether it exists or not."""
        folder = f"p{subject_id[:2]}/p{subject_id}/s{study_id}"
        return os.path.join(self.patients or "files", folder, f"{dicom_id}.jpg")


def open_images(source: SourceFolder, images: str) -> ImageFolder:
    """Returns the images for a dataset that is downloaded without them.

    Args:
      source: the folder of the dataset.
      images: the folder of MIMIC-CXR-JPG; "" looks for it in the source folder.

    Raises:
      UserError: they are not there.
    """
    folder = ImageFolder(open_place(source, images, "images")[0] if images else source)
    if not folder.patients:
        raise UserError(
            f"{folder.source.root} has no folder files/p10 to files/p19 of images; download "
            f"MIMIC-CXR-JPG from {IMAGES_PAGE} and name its folder with data.builder.images"
        )
    return folder


def _find_patients(source: SourceFolder, base: str = "") -> str:
    """Returns the path of the folder that holds p10 to p19; "" if there is none."""
    for folder in (os.path.join(base, "files"), base):
        if set(source.list_names(folder)) & set(_PATIENT_FOLDERS):
            return folder or "."
    for name in _PATIENT_FOLDERS:
        if path := source.find_folder(f"files/{name}"):
            return os.path.dirname(path)
    return ""


# Reports ----------------------------------------------------------------------------------------


class Reports:
    """The reports of studies, from whichever folders and archives there are.

    Attributes:
      absent: studies without a report.
    """

    def __init__(self, source: SourceFolder, places: list[_ReadText], hand_listed: bool):
        """Initialises the reports; see `open_reports`."""
        self.absent: dict[str, None] = {}
        self._hand_listed = hand_listed
        self._source = source
        self._places = places
        self._last: tuple[str, dict[str, str]] = ("", {})

    def read(self, subject_id: str, study_id: str) -> dict[str, str]:
        """Returns the sections of a study's report; {} if there is none."""
        # The images of a study follow one another in the tables.
        if self._last[0] != study_id:
            self._last = (study_id, self._read(subject_id, study_id))
        return dict(self._last[1])

    def _read(self, subject_id: str, study_id: str) -> dict[str, str]:
        path = f"p{subject_id[:2]}/p{subject_id}/s{study_id}.txt"
        try:
            text = next((text for read in self._places if (text := read(path)) is not None), None)
        except ValueError:
            self._source.drop("a report is not UTF-8", f"s{study_id}")
            return {}
        except UNPACK_ERRORS:
            self._source.drop("a report cannot be unpacked", f"s{study_id}")
            return {}
        if text is None:
            self.absent[study_id] = None
            return {}
        return mimic.split_report(text, f"s{study_id}", hand_listed=self._hand_listed)


@contextlib.contextmanager
def open_reports(
    source: SourceFolder, images: ImageFolder, reports: str, hand_listed: bool = False
) -> Iterator[Reports]:
    """Opens the reports, and notes at the end how many studies have none.

    Args:
      source: the folder of the dataset.
      images: the images, where reports may lie beside the folders of studies.
      reports: another folder or archive that has the reports; "" searches the folder of the images.
      hand_listed: correct the reports whose conclusion was found by hand, see `sections.mimic`.

    Raises:
      UserError: `reports` does not exist, or an archive is damaged.
    """
    with contextlib.ExitStack() as stack:
        places: list[_ReadText] = []
        if reports:
            folder, name = open_place(source, reports, "reports")
            archive = name or folder.find(REPORTS_ARCHIVE)
            if archive:
                places.append(_read_archive(stack.enter_context(folder.open_zip(archive))))
            if not name:
                places.append(_read_folder(folder, _find_patients(folder)))
        else:
            folder = images.source
            places.append(_read_folder(folder, images.patients))
            if archive := folder.find(REPORTS_ARCHIVE):
                places.append(_read_archive(stack.enter_context(folder.open_zip(archive))))
            for name in _REPORTS_FOLDERS:
                if path := folder.find_folder(f"{name}/files"):
                    places.append(_read_folder(folder, path))
        opened = Reports(source, places, hand_listed)
        yield opened
        if opened.absent:
            source.note(
                f"studies without a report: {len(opened.absent)}; if reports are missing, download "
                f"{REPORTS_ARCHIVE} from {REPORTS_PAGE} and name it with data.builder.reports"
            )


def _read_folder(source: SourceFolder, patients: str) -> _ReadText:
    def read(path: str) -> str | None:
        return source.read_text(os.path.join(patients, path))

    return read


def _read_archive(archive: zipfile.ZipFile) -> _ReadText:
    # Members are `files/p10/p10000032/s50414267.txt`, which may be below another folder.
    members = {"/".join(name.split("/")[-3:]): name for name in archive.namelist()}

    def read(path: str) -> str | None:
        return archive.read(members[path]).decode("utf-8-sig") if path in members else None

    return read

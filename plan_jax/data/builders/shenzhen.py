"""Shenzhen: 662 films of a hospital, half of them with tuberculosis; masks by two later groups."""

import dataclasses
import posixpath
import re
from collections.abc import Iterator
from typing import ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Item, Shape
from plan_jax.data.public.nlm_films import ABSENT, TUBERCULOSIS, list_films, read_reading
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.tfds import tfds

LUNGS = "lungs"
LUNG_FOLDERS = ("mask/mask", "mask", "masks")  # Kaggle's shcxr-lung-mask, and copies of it
FINDING_FOLDER = "Annotations-2/masks"
_NAME = re.compile(r"CHNCXR_\d+_[01]")
_FINDING_NAME = re.compile(r"(?P<film>CHNCXR_\d+_[01])_(?P<finding>.+?)_\d+")
_AGE = r"\d+\s*(?:y(?:ea)?rs?(?:\s+old)?|months?|days?|[ymd])\b"
# Sex and age, which begin a reading, and what divides them from it.
_PATIENT = re.compile(rf"\A(?:(?:(?:fe)?male(?![a-z])|{_AGE})[\s,.;:]*)+", re.IGNORECASE)

FACTS = Facts(
    name="shenzhen",
    title="Shenzhen hospital chest X-ray set",
    content="662 frontal films, 336 of them with tuberculosis; a reading of each; by later groups, "
    "lung masks of 566 and masks of findings",
    page="data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/"
    "Shenzhen-Hospital-CXR-Set/ChinaSet_AllFiles.zip",
    licence="public, with attribution, no registration; Kaggle's lung masks CC BY-NC-SA",
    citation="Jaeger et al., Quantitative Imaging in Medicine and Surgery 2014",
    files="CXR_png/ and ClinicalReadings/ of ChinaSet_AllFiles; Kaggle's mask/ (yoctoman/"
    "shcxr-lung-mask) and the NLM's Annotations-2/masks/ where they are wanted",
    provides=("reports", "labels", "masks", "anatomy"),
    patients="the name of the film, as each is of another patient",
    splits={BY_HASH: "by a hash of the film"},
    defects=(
        "the set comes without lung masks; those of Kaggle cover 566 films",
        "TBX11K has the same films in its folder extra",
    ),
    counts={"images": 662, "tuberculosis": 336},
    findings=(TUBERCULOSIS,),
)


@dataclasses.dataclass(eq=False)
class ShenzhenConfig(PublicConfig):
    """Where the Shenzhen set was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder) -> Iterator[Item]:
    """Yields the films with their readings and masks."""
    films = list_films(source, _NAME, "CHNCXR_0001_0.png", FACTS)
    readings = source.find_folder("ClinicalReadings")
    lungs, findings = _list_lungs(source), _list_findings(source)
    read = {posixpath.splitext(file)[0] for file in source.list_names(readings)} if readings else ()
    for name in sorted({*read, *lungs, *findings}):
        if _NAME.fullmatch(name) and name not in films:
            source.drop(ABSENT, name)
    for name, path in films.items():
        reading = _read_reading(source, posixpath.join(readings, f"{name}.txt")) if readings else ""
        yield Item(
            image_id=name,
            image=path,
            patient_id=name,
            labels={TUBERCULOSIS: int(name[-1])},
            sections={"findings": reading} if reading else {},
            shapes=findings.get(name, []),
            anatomy={LUNGS: [Shape("file", lungs[name])]} if name in lungs else {},
        )


def _list_lungs(source: SourceFolder) -> dict[str, str]:
    """Returns the path of the lung mask of each film that has one."""
    ending = "_mask.png"
    for folder in filter(None, map(source.find_folder, LUNG_FOLDERS)):
        files = [name for name in source.list_names(folder) if name.endswith(ending)]
        if files:
            return {file.removesuffix(ending): posixpath.join(folder, file) for file in files}
    source.note("the lung masks of Kaggle's shcxr-lung-mask are not there")
    return {}


def _list_findings(source: SourceFolder) -> dict[str, list[Shape]]:
    """Returns the masks of findings on each film; a mask is named after film, finding, number."""
    shapes: dict[str, list[Shape]] = {}
    folder = source.find_folder(FINDING_FOLDER)
    for file in source.list_names(folder) if folder else []:
        if match := _FINDING_NAME.fullmatch(file.removesuffix(".png")):
            phrase = match["finding"].replace("_", " ").strip().lower()
            path = posixpath.join(folder, file)
            shapes.setdefault(match["film"], []).append(Shape("file", path, TUBERCULOSIS, phrase))
    return shapes


def _read_reading(source: SourceFolder, path: str) -> str:
    """Returns a radiologist's reading, without the sex and age above it or before it."""
    lines = list(filter(None, map(str.strip, read_reading(source, path))))
    lines[:1] = (_PATIENT.sub("", line) for line in lines[:1])
    return "\n".join(filter(None, lines))


class Shenzhen(PublicBuilder):
    """Builds the Shenzhen set."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ShenzhenConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films."""
        return read_items(source)

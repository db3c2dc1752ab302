"""Montgomery County: 138 films of a tuberculosis screening, with masks of both lungs."""

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

MASK_FOLDERS = {"left lung": "ManualMask/leftMask", "right lung": "ManualMask/rightMask"}
_NAME = re.compile(r"MCUCXR_\d+_[01]")
_PATIENT_LINE = re.compile(r"patient'?s (?:sex|age)", re.IGNORECASE)

FACTS = Facts(
    name="montgomery",
    title="Montgomery County chest X-ray set",
    content="138 frontal films, 58 of them with tuberculosis; a reading and lung masks of each",
    page="data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/"
    "Montgomery-County-CXR-Set/MontgomerySet.zip",
    licence="public, with attribution, no registration",
    citation="Jaeger et al., Quantitative Imaging in Medicine and Surgery 2014",
    files="CXR_png/, ClinicalReadings/ and ManualMask/{leftMask,rightMask}/ of MontgomerySet",
    provides=("reports", "labels", "anatomy"),
    patients="the name of the film, as each is of another patient",
    splits={BY_HASH: "by a hash of the film"},
    defects=(
        "films have 4892 x 4020 pixels, or these turned by a right angle",
        "TBX11K has the same films in its folder extra",
    ),
    counts={"images": 138, "tuberculosis": 58},
    findings=(TUBERCULOSIS,),
)


@dataclasses.dataclass(eq=False)
class MontgomeryConfig(PublicConfig):
    """Where the Montgomery set was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder) -> Iterator[Item]:
    """Yields the films with their readings and the masks of their lungs."""
    films = list_films(source, _NAME, "MCUCXR_0001_0.png", FACTS)
    readings = source.find_folder("ClinicalReadings")
    masks = {
        organ: _list_stems(source, path)
        for organ, name in MASK_FOLDERS.items()
        for path in (source.find_folder(name),)
        if path
    }
    if len(masks) < len(MASK_FOLDERS):
        source.note("ManualMask is not there, so no film has masks of both lungs")
    described = list(masks.values())
    described += [_list_stems(source, readings)] if readings else []
    for name in sorted({name for names in described for name in names if _NAME.fullmatch(name)}):
        if name not in films:
            source.drop(ABSENT, name)
    for name, path in films.items():
        reading = _read_reading(source, posixpath.join(readings, f"{name}.txt")) if readings else ""
        yield Item(
            image_id=name,
            image=path,
            patient_id=name,
            labels={TUBERCULOSIS: int(name[-1])},
            sections={"findings": reading} if reading else {},
            anatomy={
                organ: [Shape("file", paths[name])]
                for organ, paths in masks.items()
                if name in paths
            },
        )


def _list_stems(source: SourceFolder, folder: str) -> dict[str, str]:
    """Returns the path of each file of a folder by its name without a suffix."""
    files = source.list_names(folder)
    return {posixpath.splitext(file)[0]: posixpath.join(folder, file) for file in files}


def _read_reading(source: SourceFolder, path: str) -> str:
    """Returns a radiologist's reading, without the lines of sex and age above it."""
    lines = (line.strip() for line in read_reading(source, path) if not _is_about_patient(line))
    return "\n".join(filter(None, lines))


def _is_about_patient(line: str) -> bool:
    return _PATIENT_LINE.match(line.strip().replace("\u2019", "'")) is not None


class Montgomery(PublicBuilder):
    """Builds the Montgomery set."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: MontgomeryConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films."""
        return read_items(source)

"""ReXGradient-160K: 160,000 studies with reports, of 109,487 patients."""

import dataclasses
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

OFFICIAL = "official"
SPLITS = {"train": "train", "valid": "val", "test": "test"}  # their word -> ours
SECTIONS = ("indication", "comparison", "findings", "impression")
ENDINGS = ("_view_position.json", ".json")  # of the files of a split; the second has no views
IMAGES = "deid_png"
EMPTY = ("", "none", "n/a", "nan")
VIEWS = {
    "PA": "PA",
    "POSTERO_ANTERIOR": "PA",
    "AP": "AP",
    "ANTERO_POSTERIOR": "AP",
    "AP AXIAL": "AP",
    "LATERAL": "LATERAL",
    "LL": "LATERAL",
    "RL": "LATERAL",
}

FACTS = Facts(
    name="rexgradient",
    title="ReXGradient-160K",
    content="273,004 films of 160,000 studies and 109,487 patients, with reports",
    page="huggingface.co/datasets/rajpurkarlab/ReXGradient-160K",
    licence="non-commercial, with a form to accept",
    citation="Zhang et al., arXiv:2505.00228, 2025",
    files="metadata/{train,valid,test}_metadata_view_position.json (or _metadata.json, without "
    "views), and deid_png/, unpacked from deid_png.part00 to part09",
    provides=("reports",),
    patients="the entry PatientID, which is also the first folder of an image",
    splits={OFFICIAL: "the three published files"},
    defects=(
        "the tables of type CSV have no paths of images; the JSON files have",
        "about 2 % of the films have no view",
        "the films have a quarter of their original rows and columns",
    ),
    counts={"studies": 160_000, "patients": 109_487, "images": 273_004},
)


@dataclasses.dataclass(eq=False)
class RexgradientConfig(PublicConfig):
    """Where ReXGradient-160K was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the films of the studies with their reports."""
    paths = {
        word: source.require(
            *(
                f"{folder}{word}_metadata{ending}"
                for ending in ENDINGS
                for folder in ("metadata/", "")
            )
        )
        for word in SPLITS
    }
    folder = source.find_folder(IMAGES)
    if not folder:
        if source.find(f"{IMAGES}.part00"):
            raise UserError(
                f"{source.root} has {IMAGES} in parts; unpack them there by "
                f"cat {IMAGES}.part* | tar --zstd -xf -"
            )
        source.note(f"there is no folder {IMAGES}, so no image is found")
        folder = IMAGES
    for word, path in paths.items():
        content = source.read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} in {source.root} is not an object of studies")
        split = SPLITS[word] if config.split_rule == OFFICIAL else ""
        for study_id, entry in content.items():
            yield from _read_study(source, folder, split, study_id, path, entry)


def _read_study(
    source: SourceFolder, folder: str, split: str, study_id: str, table: str, entry: Any
) -> Iterator[Item]:
    """Yields the films of a study."""
    if not isinstance(entry, dict):
        source.drop("a study is not an object of JSON", study_id)
        return
    # Spellings like image_path occur beside ImagePath.
    fields = {re.sub("[^a-z]", "", key.lower()): value for key, value in entry.items()}
    if "imagepath" not in fields:
        raise UserError(
            f"study {study_id} of {table} in {source.root} has no ImagePath; its entries are "
            f"{', '.join(sorted(entry))}"
        )
    sections = {name: text for name in SECTIONS if (text := _read_text(fields, name))}
    images = _list(fields["imagepath"])
    if not images:
        source.drop("a study has no image", study_id)
    elif not sections.keys() & {"findings", "impression"}:
        source.drop("a study has neither findings nor impression", study_id)
        return
    has_views = "imageviewposition" in fields
    views = _list(fields.get("imageviewposition"))
    for index, image in enumerate(images):
        # Paths are those from the folder metadata: ../deid_png/<patient>/<study>/...
        below = str(image).replace("\\", "/").rpartition(f"{IMAGES}/")[2]
        view = str(views[index] or "").strip().upper() if index < len(views) else ""
        yield Item(
            image_id=posixpath.splitext(posixpath.basename(below))[0],
            image=posixpath.join(folder, below),
            patient_id=str(fields.get("patientid") or below.partition("/")[0]),
            study_id=study_id,
            split=split,
            view=VIEWS.get(view, "UNKNOWN") if has_views else "",
            sections=sections,
        )


def _list(value: Any) -> list[Any]:
    """Returns an entry as a list: that of a study with one film may be no list."""
    return value if isinstance(value, list) else [value] if value else []


def _read_text(fields: Mapping[str, Any], name: str) -> str:
    text = str(fields.get(name) or "").strip()
    return "" if text.lower() in EMPTY else text


class Rexgradient(PublicBuilder):
    """Builds ReXGradient-160K."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: RexgradientConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films."""
        return read_items(source, self.builder_config)

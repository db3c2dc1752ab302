"""Chest ImaGenome: boxes of 36 regions and what reports say of them, on films of MIMIC-CXR."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from plan_jax.data.builders import ms_cxr
from plan_jax.data.public import mimic_tree
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.facts import BY_HASH, PHYSIONET_LICENCE, Facts
from plan_jax.data.public.items import FRONTAL_VIEWS, Corners, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

# Name of a region here -> in the files. The first nine are called as the report parser calls them,
# so that the sentences about a region are found.
REGIONS = {
    "right lung": "right lung",
    "left lung": "left lung",
    "heart": "cardiac silhouette",
    **{
        f"{side} {zone} zone": f"{side} {zone} lung zone"
        for side in ("right", "left")
        for zone in ("upper", "mid", "lower")
    },
    **{
        name: name
        for side in ("right", "left")
        for name in (
            *(f"{side} apical zone", f"{side} hilar structures", f"{side} hemidiaphragm"),
            *(f"{side} costophrenic angle", f"{side} cardiophrenic angle", f"{side} clavicle"),
            *(f"{side} cardiac silhouette", f"{side} upper abdomen"),
        )
    },
    **{
        name: name
        for name in (
            *("mediastinum", "upper mediastinum", "trachea", "carina", "aortic arch"),
            *("descending aorta", "svc", "right atrium", "cavoatrial junction", "spine", "abdomen"),
        )
    },
}
_NAMES = {name: region for region, name in REGIONS.items()}
FINDINGS = (
    # `anatomicalfinding`
    *("lung opacity", "airspace opacity", "consolidation", "infiltration", "atelectasis"),
    *("linear/patchy atelectasis", "lobar/segmental collapse", "pulmonary edema/hazy opacity"),
    *("vascular congestion", "vascular redistribution", "vascular calcification"),
    *(
        "increased reticular markings/ild pattern",
        "pleural effusion",
        "costophrenic angle blunting",
    ),
    *("pleural/parenchymal scarring", "bronchiectasis", "enlarged cardiac silhouette"),
    *("mediastinal displacement", "mediastinal widening", "superior mediastinal mass/enlargement"),
    *("enlarged hilum", "tortuous aorta", "pneumomediastinum", "pneumothorax", "hydropneumothorax"),
    *("lung lesion", "mass/nodule (not otherwise specified)", "multiple masses/nodules"),
    *("calcified nodule", "cyst/bullae", "hyperaeration", "elevated hemidiaphragm"),
    *("diaphragmatic eventration (benign)", "sub-diaphragmatic air", "subcutaneous air", "hernia"),
    *("rib fracture", "clavicle fracture", "spinal fracture", "bone lesion", "scoliosis"),
    *("spinal degenerative changes", "shoulder osteoarthritis"),
    # `disease`
    *("pneumonia", "fluid overload/heart failure", "copd/emphysema", "granulomatous disease"),
    *("interstitial lung disease", "goiter", "lung cancer", "aspiration", "alveolar hemorrhage"),
    "pericardial effusion",
)
_KINDS = ("anatomicalfinding", "disease")  # of attributes; others are devices, textures, changes
_EXISTENCE = {"yes": 1, "no": 0}
_LISTS = {"train": "train", "valid": "val", "test": "test"}
# All images of the patients with gold annotations.
GOLD_TABLES = (
    *("silver_dataset/splits/images_to_avoid.csv", "splits/images_to_avoid.csv"),
    "images_to_avoid.csv",
)
_ORIGINAL = ("original_x1", "original_y1", "original_x2", "original_y2")
GOLD = "patient of the gold annotations, left out of train and val"
EVALUATED = "patient of MS-CXR, left out of train"
# Reads the scene graph of an image; None if there is none.
_ReadGraph = Callable[[str], str | None]

FACTS = Facts(
    name="chest_imagenome",
    title="Chest ImaGenome",
    content="boxes of 36 anatomical regions, and findings of each region from the report, on "
    "237,867 frontal films of MIMIC-CXR",
    page="physionet.org/content/chest-imagenome/1.0.0",
    licence=PHYSIONET_LICENCE,
    citation="Wu et al., NeurIPS Datasets and Benchmarks 2021",
    files="silver_dataset/splits/*.csv and silver_dataset/scene_graph.zip, packed or not; the "
    "folder of MIMIC-CXR-JPG as `images`; its reports there or as `reports`",
    provides=("reports", "labels", "regions"),
    patients="the subject of MIMIC-CXR",
    splits={
        "official": "the lists train.csv, valid.csv and test.csv; patients of the gold "
        "annotations are left out of train and val, and those of MS-CXR of train if its table is "
        "there",
        "mimic": "the official split of MIMIC-CXR, with the same patients left out",
    },
    leaks={
        "official": "no image; but its test images and its 500 gold patients are in the training "
        "split of MIMIC-CXR"
    },
    defects=(
        "boxes are found by a detector; some are negative, outside the image or without an area",
        "boxes are given twice: original_x1 .. in the image, x1 .. in a padded frame of 224 pixels",
        "24 images are no radiographs and have no scene graph",
        "not every image has all 36 regions",
    ),
    counts={
        **{"images": 237_867, "train": 166_521, "val": 23_953, "test": 47_393},
        "regions": 36,
    },
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class ChestImagenomeConfig(mimic_tree.MimicConfig):
    """Where Chest ImaGenome was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS
    places: ClassVar[tuple[str, ...]] = ("images", "reports", "ms_cxr")

    # Folder of MIMIC-CXR-JPG ("": the source folder).
    images: str = ""
    # Folder or archive of the reports of MIMIC-CXR ("": the folder of the images).
    reports: str = ""
    # Folder or table of MS-CXR, whose patients are left out of train ("": that of the images).
    ms_cxr: str = ""
    # Whether train has the patients of MS-CXR.
    keep_evaluated: bool = False


def read_items(source: SourceFolder, config: ChestImagenomeConfig) -> Iterator[Item]:
    """Yields the films of the lists with their regions, triplets and reports."""
    images = mimic_tree.open_images(source, config.images)
    gold = _read_gold_patients(source, source.require(*GOLD_TABLES))
    evaluated = frozenset[str]()
    if not config.keep_evaluated:
        evaluated = ms_cxr.find_patients(images.source, config.ms_cxr)
    mimic_splits = mimic_tree.read_splits(images.source) if config.split_rule == "mimic" else {}
    columns = ("subject_id", "study_id", "dicom_id", "ViewPosition")
    unknown: set[str] = set()
    with (
        _open_graphs(source) as read_graph,
        mimic_tree.open_reports(source, images, config.reports) as reports,
    ):
        for name, split in _LISTS.items():
            table = source.require(f"silver_dataset/splits/{name}.csv", f"splits/{name}.csv")
            for row in source.read_csv(table, columns):
                subject_id, study_id, dicom_id, view = (row[column] for column in columns)
                graph = _parse_graph(source, dicom_id, read_graph)
                if graph is None:
                    continue
                if config.split_rule == "mimic":
                    if dicom_id not in mimic_splits:
                        source.drop("MIMIC-CXR's table of splits does not list an image", dicom_id)
                        continue
                    split = mimic_splits[dicom_id]
                elif config.split_rule == BY_HASH:
                    split = assign_by_hash(subject_id, config.val_fraction, config.test_fraction)
                if subject_id in gold and split != "test":
                    source.drop(GOLD, dicom_id)
                    continue
                if subject_id in evaluated and split == "train":
                    source.drop(EVALUATED, dicom_id)
                    continue
                triplets = _read_triplets(graph)
                unknown |= {finding for _, finding, _ in triplets} - set(FINDINGS)
                yield Item(
                    image_id=dicom_id,
                    image=images.locate(subject_id, study_id, dicom_id),
                    patient_id=subject_id,
                    study_id=study_id,
                    split=split,
                    view=view if view in FRONTAL_VIEWS else "FRONTAL",  # none is lateral
                    labels=_label(triplets),
                    sections=reports.read(subject_id, study_id),
                    regions=_read_regions(source, dicom_id, graph),
                    triplets=triplets,
                )
    if unknown:
        source.note(f"findings of triplets that are no labels: {', '.join(sorted(unknown))}")


def find_gold_patients(source: SourceFolder, path: str) -> frozenset[str]:
    """Returns the patients of the gold annotations, on whom methods are compared.

    Args:
      source: the folder that is searched, and that gets a note if there is no Chest ImaGenome.
      path: the folder of Chest ImaGenome or its list; "" searches the source folder.
    """
    return mimic_tree.find_evaluated(source, path, FACTS, GOLD_TABLES, _read_gold_patients)


def _read_gold_patients(source: SourceFolder, table: str) -> frozenset[str]:
    patients = frozenset(row["subject_id"] for row in source.read_csv(table, ("subject_id",)))
    mimic_tree.check_evaluated(source, table, patients)
    return patients


@contextlib.contextmanager
def _open_graphs(source: SourceFolder) -> Iterator[_ReadGraph]:
    """Opens the scene graphs, which may be packed, or unpacked into one folder or two."""
    folders = [
        path
        for name in ("scene_graph/scene_graph", "scene_graph")
        if (path := source.find_folder(f"silver_dataset/{name}", name))
    ]
    archive_path = source.find("silver_dataset/scene_graph.zip", "scene_graph.zip")
    if not folders and not archive_path:
        raise UserError(
            f"{source.root} has no silver_dataset/scene_graph.zip or folder silver_dataset/"
            f"scene_graph; download it from {FACTS.page}"
        )
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(source.open_zip(archive_path)) if archive_path else None
        members = {name.rpartition("/")[2]: name for name in archive.namelist()} if archive else {}

        def read(dicom_id: str) -> str | None:
            name = f"{dicom_id}_SceneGraph.json"
            for folder in folders:
                if (text := source.read_text(f"{folder}/{name}")) is not None:
                    return text
            if archive is None or name not in members:
                return None
            return archive.read(members[name]).decode("utf-8-sig")

        yield read


def _parse_graph(
    source: SourceFolder, dicom_id: str, read_graph: _ReadGraph
) -> Mapping[str, Any] | None:
    """Returns the scene graph of an image; None, and a dropped image, if it has none."""
    try:
        text = read_graph(dicom_id)
        graph = json.loads(text) if text is not None else None
    except (ValueError, *mimic_tree.UNPACK_ERRORS):
        source.drop("a scene graph is damaged", dicom_id)
        return None
    if graph is None:
        source.drop("an image has no scene graph", dicom_id)
        return None
    parts = (graph.get("objects"), graph.get("attributes")) if isinstance(graph, dict) else (None,)
    if not all(
        isinstance(part, list) and all(isinstance(entry, dict) for entry in part) for part in parts
    ):
        source.drop("a scene graph is damaged", dicom_id)
        return None
    return graph


def _read_regions(
    source: SourceFolder, dicom_id: str, graph: Mapping[str, Any]
) -> dict[str, Corners]:
    """Returns the boxes of regions in pixels of the image, cut at its upper left borders."""
    regions: dict[str, Corners] = {}
    for entry in graph["objects"]:
        region = _NAMES.get(str(entry.get("bbox_name")))
        if region is None:  # parts of the body without a box, as the left breast
            continue
        numbers = parse_numbers(str(entry.get(name, "")) for name in _ORIGINAL)
        if numbers is None:
            source.drop("a region has no four numbers", dicom_id)
            continue
        x0, y0, x1, y1 = (max(number, 0.0) for number in numbers)
        if x0 >= x1 or y0 >= y1:
            source.drop("a region has no area in the image", dicom_id)
            continue
        regions[region] = (x0, y0, x1, y1)
    return regions


def _read_triplets(graph: Mapping[str, Any]) -> tuple[tuple[str, str, int], ...]:
    """Returns what the report says of each region, each statement once, in the order of the file.

    An attribute is `kind|yes or no|name`, in one list for each sentence about the region.
    """
    triplets: dict[tuple[str, str, int], None] = {}
    for entry in graph["attributes"]:
        name = str(entry.get("bbox_name"))
        sentences = entry.get("attributes")
        for sentence in sentences if isinstance(sentences, list) else ():
            for attribute in sentence if isinstance(sentence, list) else (sentence,):
                kind, _, rest = str(attribute).partition("|")
                existence, _, finding = rest.partition("|")
                if kind in _KINDS and existence in _EXISTENCE:
                    triplets[_NAMES.get(name, name), finding, _EXISTENCE[existence]] = None
    return tuple(triplets)


def _label(triplets: tuple[tuple[str, str, int], ...]) -> dict[str, int]:
    """Returns 1 for findings that a region has, 0 for those that are only denied."""
    labels: dict[str, int] = {}
    for _, finding, existence in triplets:
        if finding in FINDINGS:
            labels[finding] = max(existence, labels.get(finding, 0))
    return labels


class ChestImagenome(PublicBuilder):
    """Builds Chest ImaGenome."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ChestImagenomeConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the lists."""
        return read_items(source, self.builder_config)

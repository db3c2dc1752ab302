"""RSNA pneumonia: 26,684 frontal films of NIH ChestX-ray14 with boxes of lung opacities."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from plan_jax.data import quoting
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Box, Item
from plan_jax.data.public.source_folder import SourceFolder, parse_numbers
from plan_jax.data.public.splits import hold_out
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

PNEUMONIA, NORMAL = "Pneumonia", "Normal"
OPACITY, NOT_NORMAL = "Lung Opacity", "No Lung Opacity / Not Normal"  # classes of the tables
CORNERS = ("x", "y", "width", "height")
LABELS = "stage_2_train_labels.csv"
CLASSES = "stage_2_detailed_class_info.csv"
ANNOTATIONS = "pneumonia-challenge-annotations-adjudicated-kaggle_2018.json"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
FOLDER = "stage_2_train_images"
TREE = "mdai_rsna_project_x9N20BZa_images_2018-07-20-153330"
SIDE = 1024  # rows and columns of every image
NUM_IMAGES = 26_684  # of the table that the published rules divide
PATIENT_DIGITS = 8  # of the name of an NIH film, as 00000013_005.png
# Rule -> fraction of images that are held out.
MGCA_FRACTIONS: Mapping[str, float | int] = {"mgca_compat": 0.3, "mgca_compat_boxes": 10_674}

FACTS = Facts(
    name="rsna_pneumonia",
    title="RSNA pneumonia (stage 2)",
    content="26,684 frontal films of 11,439 NIH patients, 6,012 with pneumonia, 9,555 boxes",
    page="kaggle.com/c/rsna-pneumonia-detection-challenge",
    licence="terms of the challenge; may be passed on with attribution to RSNA and NIH",
    citation="Shih et al., Radiology: Artificial Intelligence 2019",
    files=f"{LABELS}, {CLASSES} and {FOLDER}/; or {ANNOTATIONS} and {TREE}/ of rsna.org "
    f"(AI challenge of 2018); {MAPPING} of rsna.org names the NIH film of each image",
    provides=("labels", "boxes"),
    patients=f"`patientId` is an image; {MAPPING} names the NIH patient of each image",
    is_split_by_image=True,
    splits={
        BY_HASH: "patients are divided by hash",
        "mgca_compat": "MGCA's classification: images 70 / 15 / 15, 18,678 / 4,003 / 4,003",
        "mgca_compat_boxes": "MGCA's detection and segmentation: 16,010 / 5,337 / 5,337 images",
        "benchx": "BenchX: images 70 / 15 / 15, stratified by label, 18,678 / 4,003 / 4,003",
    },
    leaks={
        "mgca_compat": "2,749 of 4,003 test images share an NIH patient with train",
        "mgca_compat_boxes": "3,579 of 5,337 test images share an NIH patient with train",
        "benchx": "2,728 of 4,003 test images share an NIH patient with train",
    },
    defects=(
        "`patientId` and the PatientID of the DICOM files name an image, not a patient",
        "the table of classes repeats a row for each box",
        "of rsna.org's 30,000 images, 84 have administrative labels only",
        "names of rsna.org's labels end in blanks; opacities of low probability count as present",
        "ages of 148 years and more in the DICOM files",
    ),
    counts={"images": NUM_IMAGES, "patients": 11_439, "boxes": 9_555},
    findings=(PNEUMONIA, NORMAL),
)


@dataclasses.dataclass(eq=False)
class RsnaPneumoniaConfig(PublicConfig):
    """Where RSNA pneumonia was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS


def read_items(source: SourceFolder, config: PublicConfig) -> Iterator[Item]:
    """Yields the images that are annotated, with the boxes of their opacities."""
    films = _read_mapping(source)
    is_kaggle = LABELS in source.require(LABELS, ANNOTATIONS)
    items = _read_kaggle(source) if is_kaggle else _read_rsna_org(source, films)
    if config.split_rule != BY_HASH:
        items = _assign_splits(source, config.split_rule, items, is_kaggle)
    patient_of = {
        film[key]: film["img_id"][:PATIENT_DIGITS]
        for film in films
        for key in ("subset_img_id", "SOPInstanceUID")
    }
    for item in items:
        if films and item.image_id not in patient_of:
            source.drop("an image that the mapping to NIH does not have", item.image_id)
            continue
        patient_id = patient_of.get(item.image_id, item.image_id)
        yield dataclasses.replace(item, patient_id=patient_id)


def _read_kaggle(source: SourceFolder) -> list[Item]:
    """Returns the images of Kaggle's table, ordered by their id."""
    boxes: dict[str, list[Box]] = {}
    targets: dict[str, int] = {}
    table = source.require(LABELS)
    for row in source.read_csv(table, ("patientId", "Target", *CORNERS)):
        name = row["patientId"]
        if row["Target"] not in ("0", "1"):
            source.drop("Target is not 0 or 1", name)
            continue
        target = int(row["Target"])
        if targets.setdefault(name, target) != target:
            source.drop("a row that contradicts an earlier one of its image", name)
        elif target:
            _add_box(source, boxes, name, [row[column] for column in CORNERS])
    classes = _read_classes(source, targets)
    folder = source.find_folder(FOLDER)
    # Copies of the images in other formats have the same names; DICOM comes first.
    place_of = {name.rpartition(".")[0]: name for name in reversed(source.list_names(folder))}
    items = []
    for name, target in sorted(targets.items()):
        place = place_of.get(name, f"{name}.dcm")
        marks = boxes.get(name, [])
        items.append(
            Item(
                image_id=name,
                image=f"{folder or FOLDER}/{place}",
                labels={PNEUMONIA: target, NORMAL: classes.get(name, 0 if target else -1)},
                boxes=marks if place.endswith(".dcm") else [_normalise(box) for box in marks],
            )
        )
    return items


def _normalise(box: Box) -> Box:
    """Returns a box as fractions of the original, of which a copy may be reduced."""
    x0, y0, x1, y1 = (corner / SIDE for corner in box.corners)
    return Box((x0, y0, x1, y1), box.label, is_normalised=True)


def _read_classes(source: SourceFolder, targets: Mapping[str, int]) -> dict[str, int]:
    """Returns for each image whether it is normal. The table repeats an image for each box."""
    classes: dict[str, int] = {}
    table = source.find(CLASSES)
    if not table:
        source.note(f"there is no {CLASSES}, so images without pneumonia may be normal or not")
        return classes
    for row in source.read_csv(table, ("patientId", "class")):
        name, kind = row["patientId"], row["class"]
        if name not in targets or (kind == OPACITY) != targets[name]:
            source.drop("a class that contradicts the table of labels", name)
        elif kind in (OPACITY, NORMAL, NOT_NORMAL):
            classes[name] = int(kind == NORMAL)
        else:
            raise UserError(
                f"class {quoting.quote(kind)} of {name} in {table} is none of RSNA's classes"
            )
    return classes


def _read_rsna_org(source: SourceFolder, films: Sequence[Mapping[str, str]]) -> list[Item]:
    """Returns the images of rsna.org's annotations, which may be of an image or of its study."""
    table = source.require(ANNOTATIONS)
    tree = source.find_folder(TREE)
    places = {
        film["StudyInstanceUID"]: (film["SeriesInstanceUID"], film["SOPInstanceUID"])
        for film in films
    }
    boxes: dict[str, list[Box]] = {}
    kinds: dict[str, set[str]] = {}
    path_of: dict[str, str] = {}
    for kind, annotation in _read_annotations(source, table):
        study = str(annotation.get("StudyInstanceUID") or "")
        series = str(annotation.get("SeriesInstanceUID") or "")
        name = str(annotation.get("SOPInstanceUID") or "")
        if not name and study in places:
            series, name = places[study]
        elif not name:
            series, name = _find_only_image(source, f"{tree or TREE}/{study}")
        if not name:
            source.drop("an annotation of a study whose image is not known", study)
            continue
        kinds.setdefault(name, set()).add(kind)
        path_of[name] = f"{study}/{series}/{name}.dcm"
        if kind == OPACITY:
            corners = annotation.get("data") or {}
            _add_box(source, boxes, name, [str(corners.get(column)) for column in CORNERS])
    items = []
    for name, path in sorted(path_of.items()):
        if not (classes := kinds[name] - {""}):
            source.drop("an image with administrative labels only", name)
            continue
        labels = {PNEUMONIA: int(OPACITY in classes), NORMAL: int(classes == {NORMAL})}
        items.append(
            Item(
                image_id=name,
                image=f"{tree or TREE}/{path}",
                study_id=path.split("/")[0],
                labels=labels,
                boxes=boxes.get(name, ()),
            )
        )
    return items


def _read_annotations(source: SourceFolder, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the class and the content of each annotation; "" is an administrative label."""
    content = source.read_json(table)
    try:
        names = {
            label["id"]: label["name"].strip()  # some end in a blank
            for group in content["labelGroups"]
            for label in group["labels"]
        }
        annotations = [
            (names[annotation["labelId"]], dict(annotation))
            for part in content["datasets"]
            for annotation in part["annotations"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{table} in {source.root} is not laid out as RSNA's annotations; download it again "
            f"from {source.page}"
        ) from None
    for name, annotation in annotations:
        if name.startswith(OPACITY):  # of high, medium or low probability
            yield OPACITY, annotation
        else:
            yield name if name in (NORMAL, NOT_NORMAL) else "", annotation


def _find_only_image(source: SourceFolder, folder: str) -> tuple[str, str]:
    """Returns series and name of the image of a study, or two "" if there is not just one."""
    images = [
        (series, name.removesuffix(".dcm"))
        for series in source.list_names(folder)
        for name in source.list_names(f"{folder}/{series}")
        if name.endswith(".dcm")
    ]
    return images[0] if len(images) == 1 else ("", "")


def _add_box(
    source: SourceFolder, boxes: dict[str, list[Box]], name: str, cells: Sequence[str]
) -> None:
    numbers = parse_numbers(cells)
    if numbers is None:
        source.drop("a box has no four numbers", name)
        return
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        source.drop("a box has no area", name)
        return
    boxes.setdefault(name, []).append(Box((x, y, x + width, y + height), PNEUMONIA))


def _read_mapping(source: SourceFolder) -> list[dict[str, str]]:
    """Returns the NIH film and the ids of each image; nothing if the mapping is not there."""
    table = source.find(MAPPING)
    if not table:
        source.note(f"there is no {MAPPING}, so images are divided, not patients")
        return []
    keys = ("img_id", "subset_img_id", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    try:
        films = [{key: str(film[key]) for key in keys} for film in source.read_json(table)]
    except (KeyError, TypeError):
        raise UserError(
            f"{table} in {source.root} is not a list of objects with {', '.join(keys)}; download "
            f"it again from {source.page}"
        ) from None
    source.note(f"patients are those of NIH, by {table}")
    return films


def _assign_splits(
    source: SourceFolder, rule: str, items: Sequence[Item], is_kaggle: bool
) -> list[Item]:
    """Returns the images, ordered by id, with the splits of a published rule."""
    if not is_kaggle:
        raise UserError(
            f"split rule {rule} divides the images of {LABELS}, which {source.root} does not have; "
            f"use split {BY_HASH}, or add the table"
        )
    if len(items) != NUM_IMAGES:
        source.note(
            f"{rule} divides {NUM_IMAGES:,} images, and the table has {len(items):,}, so the "
            "splits are not the published ones"
        )
    labels = [item.labels[PNEUMONIA] for item in items]
    if rule == "benchx":
        _, rest = hold_out(len(items), 0.3, 42, labels)
        val, test = hold_out(len(rest), 0.5, 42, [labels[index] for index in rest])
    else:
        _, rest = hold_out(len(items), MGCA_FRACTIONS[rule], 0)
        test, val = hold_out(len(rest), 0.5, 0)  # MGCA takes the first half as test
    split_of = {rest[index]: "val" for index in val} | {rest[index]: "test" for index in test}
    return [
        dataclasses.replace(item, split=split_of.get(index, "train"))
        for index, item in enumerate(items)
    ]


class RsnaPneumonia(PublicBuilder):
    """Builds RSNA pneumonia."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: RsnaPneumoniaConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the images that are annotated."""
        return read_items(source, self.builder_config)

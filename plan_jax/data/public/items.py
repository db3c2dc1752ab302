"""One image of a public dataset, as its tables describe it; its pixels are not read yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

Corners: TypeAlias = tuple[float, float, float, float]

# How a film was taken. UNKNOWN is a film whose table has no view; "" is that of a dataset whose
# tables have no views at all.
FRONTAL_VIEWS = ("PA", "AP", "FRONTAL")
VIEWS = (*FRONTAL_VIEWS, "LATERAL", "OTHER", "UNKNOWN", "")
SPLITS = ("train", "val", "test")
UNUSED = "unused"  # the split of an image that a protocol leaves out
SHAPE_KINDS = ("file", "runs", "polygons", "ellipse", "rectangle")
LABELS = (-1, 0, 1)


@dataclass(frozen=True)
class Box:
    """A box of an image: corners x0, y0, x1, y1 from the top left.

    Attributes:
      corners: in pixels of the original, upright image; fractions of it if `is_normalised`.
      label: the finding that it shows, or "".
      phrase: the words that it locates; "" stands for the label.
      is_normalised: whether the corners are fractions of the image.
    """

    corners: Corners
    label: str = ""
    phrase: str = ""
    is_normalised: bool = False


@dataclass(frozen=True)
class Shape:
    """A mask of an image, or a part of one: shapes of one phrase are united.

    Attributes:
      kind: what `content` is. `file`: the path of a mask, whose size may differ from the image's;
        `runs`: pairs (start, length) of pixels, counted down the columns of `size`; `polygons`:
        lists of points (x, y); `ellipse` and `rectangle`: the corners of the box around it.
      content: made of lists, numbers and strings only.
      label: the finding that it shows, or "".
      phrase: the words that it locates; "" stands for the label.
      size: rows and columns of the frame that runs, points and corners refer to; None: the image.
    """

    kind: str
    content: Any
    label: str = ""
    phrase: str = ""
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Item:
    """One image with all that the tables of its dataset say of it.

    Attributes:
      image_id: names the image within the dataset, whatever folder and suffix it has.
      image: path of the file below the source folder.
      patient_id: "" if the dataset does not tell patients apart.
      study_id: the examination, of which there may be several images; "" if there is no such id.
      split: one of SPLITS; UNUSED if a protocol leaves it out; "": a hash of the patient decides.
      view: one of VIEWS.
      labels: finding -> 1 present, 0 absent, -1 unknown or uncertain; other findings are unknown.
      sections: name -> text of a report's sections, and `report`, the whole of it.
      boxes: boxes of findings.
      shapes: masks of findings.
      regions: name -> corners of an anatomical region, in pixels.
      anatomy: organ -> its mask, of one shape or more.
      triplets: (region, finding, existence) as in `types.Record`.
      pixels: name of a reader in `public.pixels`; "" reads any usual format.
      bit_depth: bits of an image of more than 8 that does not say it; 0: guessed.
      shape: rows and columns that the tables state; an image of another size is dropped.
    """

    image_id: str
    image: str
    patient_id: str = ""
    study_id: str = ""
    split: str = ""
    view: str = ""
    labels: Mapping[str, int] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    boxes: Sequence[Box] = ()
    shapes: Sequence[Shape] = ()
    regions: Mapping[str, Corners] = field(default_factory=dict)
    anatomy: Mapping[str, Sequence[Shape]] = field(default_factory=dict)
    triplets: Sequence[tuple[str, str, int]] = ()
    pixels: str = ""
    bit_depth: int = 0
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if a builder has set a field to what it cannot be."""
        values = set(self.labels.values())
        for name, value, choices in (
            ("view", self.view, VIEWS),
            ("split", self.split, (*SPLITS, UNUSED, "")),
            *(("label", label, LABELS) for label in sorted(values)),
            *(("kind", shape.kind, SHAPE_KINDS) for shape in self.shapes),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} of {self.image_id} is not one of {choices}")


def to_json(item: Item) -> dict[str, Any]:
    """Returns an item as an object of JSON, without fields that have their default."""
    content: dict[str, Any] = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        if entry.name in ("boxes", "shapes"):
            value = [vars(part) for part in value]
        elif entry.name == "anatomy":
            value = {name: [vars(part) for part in parts] for name, parts in value.items()}
        elif isinstance(value, Mapping):
            value = dict(value)
        if value or entry.name == "image_id":
            content[entry.name] = value
    return content


def from_json(content: Mapping[str, Any]) -> Item:
    """Inverts `to_json`."""
    values = dict(content)
    values["boxes"] = [
        Box(**{**part, "corners": tuple(part["corners"])}) for part in values.get("boxes", ())
    ]
    values["shapes"] = [_restore_shape(part) for part in values.get("shapes", ())]
    values["anatomy"] = {
        name: [_restore_shape(part) for part in parts]
        for name, parts in values.get("anatomy", {}).items()
    }
    values["triplets"] = [tuple(triplet) for triplet in values.get("triplets", ())]
    if "shape" in values:
        values["shape"] = tuple(values["shape"])
    return Item(**values)


def _restore_shape(content: Mapping[str, Any]) -> Shape:
    """Returns a shape whose size is a tuple again; JSON has lists only."""
    size = content["size"]
    return Shape(**{**content, "size": None if size is None else tuple(size)})


def list_files(item: Item) -> list[str]:
    """Returns the paths of an item's image and of its masks."""
    parts = [*item.shapes, *(part for organ in item.anatomy.values() for part in organ)]
    return [item.image, *(part.content for part in parts if part.kind == "file")]

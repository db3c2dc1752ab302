"""Records of public datasets: an image is read, and all that is known of it is moved along."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int8
from PIL import Image, UnidentifiedImageError

from plan_jax.data import faults, images, quoting
from plan_jax.data.pairs import annotations, boxes
from plan_jax.data.public import shapes
from plan_jax.data.public.items import Item, Shape
from plan_jax.data.public.pixels import READERS
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import Geometry, Phrase, Record

MAX_ASPECT_ERROR = 0.02  # of a mask whose size differs from its image's
NO_NUMBER = "a box with a corner that is not a number"
NO_AREA = "a box without area"
OUTSIDE = "a box outside of its image"
TINY = "a box under a pixel after resizing"
EMPTY_MASK = "a mask without a pixel"
DENIED = "a mask of a finding that its labels call absent"
# Part of a decoder's words that differs between all files with one fault.
_UNREAD_BYTES = re.compile(r" \(\d+( bytes not processed\)?| ?$)")


@dataclass
class Reader:
    """Reads the records of items.

    Attributes:
      folder: the folder of the images.
      size: longer side of a stored image, in pixels.
      findings, regions, anatomy: names in the order in which records have them.
      faults: reason -> ids of images with a fault that does not prevent their use.
      notes: what `images.read_image` noted -> ids of the images.
    """

    folder: SourceFolder
    size: int
    findings: Sequence[str] = ()
    regions: Sequence[str] = ()
    anatomy: Sequence[str] = ()
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str | int, list[str]] = field(default_factory=dict)

    def read(self, item: Item) -> Record | str:
        """Returns the record of an item, or the reason why its image cannot be used.

        Raises:
          UserError: a file may be readable later.
        """
        try:
            return self._read(item)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and faults.is_passing(error):
                raise faults.name_unreadable(error, self.folder.root, item.image) from None
            reason = getattr(error, "strerror", None) or str(error)
            return _UNREAD_BYTES.sub("", reason.splitlines()[0]) if reason else type(error).__name__

    def _read(self, item: Item) -> Record:
        path, notes = self.folder.resolve(item.image), set[str | int]()
        if item.pixels:
            image, shape = READERS[item.pixels](path, self.size)
        else:
            image, shape = images.read_image(
                path, self.size, item.bit_depth, notes, Image.Resampling.BOX
            )
        if item.shape and tuple(item.shape) != shape:
            raise ValueError("image has another size than its table states")
        for note in notes:
            self.notes.setdefault(note, []).append(quoting.quote_path(item.image))
        masks = {
            phrase: self._draw(parts, shape, image.shape)
            for phrase, parts in _group(item.shapes).items()
        }
        label_of = {shape.phrase or shape.label: shape.label for shape in item.shapes}
        masks = self._check_masks(item, masks, label_of)
        return Record(
            image=image,
            text="",
            patient_id=item.patient_id,
            labels=self._order_labels(item),
            phrases=self._build_phrases(item, masks, label_of, shape, image.shape),
            regions=self._order_regions(item, shape, image.shape),
            anatomy=self._draw_anatomy(item, shape, image.shape),
            triplets=tuple(item.triplets),
            record_id=item.image_id,
            study_id=item.study_id,
            view=item.view,
            sections=dict(item.sections),
            geometry=Geometry(shape),
        )

    def _check_masks(
        self, item: Item, masks: Mapping[str, Bool[np.ndarray, "Y X"]], label_of: Mapping[str, str]
    ) -> dict[str, Bool[np.ndarray, "Y X"]]:
        """Returns the masks that have pixels; notes those that contradict the labels."""
        vector_parts = {part.phrase or part.label for part in item.shapes if part.kind != "file"}
        for phrase, mask in masks.items():
            is_absent = item.labels.get(label_of[phrase]) == 0
            if mask.any() and is_absent:
                self.note_fault(DENIED, item.image_id)
            # The file of an absent finding is black.
            elif not mask.any() and not (is_absent and phrase not in vector_parts):
                self.note_fault(EMPTY_MASK, item.image_id)
        return {phrase: mask for phrase, mask in masks.items() if mask.any()}

    def _order_labels(self, item: Item) -> Int8[np.ndarray, " F"]:
        return np.asarray([item.labels.get(name, -1) for name in self.findings], np.int8)

    def _build_phrases(
        self,
        item: Item,
        masks: Mapping[str, Bool[np.ndarray, "Y X"]],
        label_of: Mapping[str, str],
        shape: tuple[int, int],
        new_shape: tuple[int, int],
    ) -> tuple[Phrase, ...]:
        """Returns phrases with their boxes and masks; boxes that cannot be are noted."""
        box_fields = []
        for box in item.boxes:
            x0, y0, x1, y1 = map(float, box.corners)
            if box.is_normalised:
                x0, y0, x1, y1 = x0 * shape[1], y0 * shape[0], x1 * shape[1], y1 * shape[0]
            if not self._has_area((x0, y0, x1, y1), item.image_id, shape, new_shape):
                continue
            box_fields.append(
                {
                    "box": (x0, y0, x1, y1),
                    "label": box.label,
                    "phrase": box.phrase or box.label,
                }
            )
        phrases = annotations.build_phrases(box_fields, masks, self.findings, shape, new_shape)
        return tuple(self._name(phrase, label_of) for phrase in phrases)

    def _name(self, phrase: Phrase, label_of: Mapping[str, str]) -> Phrase:
        """Returns a phrase with the finding of its mask, if no box says what it is."""
        label = label_of.get(phrase.text, "")
        if phrase.finding >= 0 or label not in self.findings:
            return phrase
        return Phrase(
            text=phrase.text,
            finding=list(self.findings).index(label),
            key=phrase.key,
            bare=phrase.bare or label,
            boxes=phrase.boxes,
            mask=phrase.mask,
        )

    def _has_area(
        self,
        corners: tuple[float, float, float, float],
        name: str,
        shape: tuple[int, int],
        new_shape: tuple[int, int],
    ) -> bool:
        """Returns whether a box has an area inside its image; notes what is odd about it."""
        x0, y0, x1, y1 = corners
        if not all(map(math.isfinite, corners)):
            self.note_fault(NO_NUMBER, name)
            return False
        if x1 <= x0 or y1 <= y0:
            self.note_fault(NO_AREA, name)
            return False
        if x1 <= 0 or y1 <= 0 or x0 >= shape[1] or y0 >= shape[0]:
            self.note_fault(OUTSIDE, name)
            return False
        scaled = boxes.scale_box(corners, shape, new_shape)
        if scaled[2] - scaled[0] < 1 or scaled[3] - scaled[1] < 1:
            self.note_fault(TINY, name)
        return True

    def note_fault(self, fault: str, name: str) -> None:
        """Counts a fault of an image that is used nevertheless."""
        self.faults.setdefault(fault, []).append(name)

    def _order_regions(
        self, item: Item, shape: tuple[int, int], new_shape: tuple[int, int]
    ) -> np.ndarray:
        """Returns the boxes Float32[R 4] of regions; zeros where a region is not known."""
        rows = np.zeros((len(self.regions), 4), np.float32)
        for index, name in enumerate(self.regions):
            if name not in item.regions:
                continue
            x0, y0, x1, y1 = map(float, item.regions[name])
            if self._has_area((x0, y0, x1, y1), item.image_id, shape, new_shape):
                rows[index] = boxes.scale_box((x0, y0, x1, y1), shape, new_shape)
        return rows

    def _draw_anatomy(
        self, item: Item, shape: tuple[int, int], new_shape: tuple[int, int]
    ) -> dict[str, Bool[np.ndarray, "Y X"]]:
        """Returns the masks of all organs, or none: stored masks have no names but their order."""
        if not item.anatomy:
            return {}
        if any(name not in item.anatomy for name in self.anatomy):
            self.note_fault("masks of some organs only, which are left out", item.image_id)
            return {}
        return {name: self._draw(item.anatomy[name], shape, new_shape) for name in self.anatomy}

    def _draw(
        self, parts: Sequence[Shape], shape: tuple[int, int], new_shape: tuple[int, int]
    ) -> Bool[np.ndarray, "Y X"]:
        """Returns the union of shapes, resized like their image."""
        rows, columns = new_shape
        mask = np.zeros((rows, columns), bool)
        vector_parts = [part for part in parts if part.kind != "file"]
        if vector_parts:
            mask |= shapes.draw_mask(vector_parts, shape, rows, columns)
        for part in parts:
            if part.kind == "file":
                mask |= self._read_mask(part.content, shape, rows, columns)
        return mask

    def _read_mask(
        self, name: str, shape: tuple[int, int], rows: int, columns: int
    ) -> Bool[np.ndarray, "{rows} {columns}"]:
        """Reads a mask whose size may differ from its image's, if the aspect is the same."""
        path = self.folder.resolve(name)
        try:
            with Image.open(path, formats=images.FORMATS) as mask:
                own_shape = mask.height, mask.width
        except FileNotFoundError:
            raise ValueError("mask is missing") from None
        except (UnidentifiedImageError, Image.DecompressionBombError):
            raise ValueError("mask cannot be read") from None
        ratio = (own_shape[0] / own_shape[1]) / (shape[0] / shape[1])
        if abs(ratio - 1) > MAX_ASPECT_ERROR:
            raise ValueError("mask has another aspect than its image")
        try:
            return images.read_mask(path, own_shape, rows, columns)
        except ValueError as error:  # a reason is the same for all masks, so it names none
            raise ValueError(
                str(error).replace(f" {quoting.quote_path(path.name)}", "", 1)
            ) from None


def _group(parts: Sequence[Shape]) -> dict[str, list[Shape]]:
    """Returns the shapes of each phrase."""
    groups: dict[str, list[Shape]] = {}
    for part in parts:
        groups.setdefault(part.phrase or part.label, []).append(part)
    return groups


def open_folder(path: str | Path) -> SourceFolder:
    """Returns the folder of the images."""
    return SourceFolder(Path(path))

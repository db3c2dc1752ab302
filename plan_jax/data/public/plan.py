"""The plan of a preparation: which images become records, in which split and order."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from plan_jax.data import quoting
from plan_jax.data.pairs.cells import is_missing
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH
from plan_jax.data.public.items import (
    FRONTAL_VIEWS,
    SPLITS,
    UNUSED,
    Item,
    from_json,
    to_json,
)
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash, count_leaks
from plan_jax.types import UserError

ITEMS_FILE = "items.jsonl"
MISSING = "image is missing or empty"
NO_ID = "has no id"
DUPLICATE = "id occurs more than once"
NOT_UNICODE = "has a text that is not Unicode"
LATERAL = "not a frontal film, or of unknown view"


@dataclass
class Plan:
    """The images of a dataset by split, in the order of the records; the images are on disk.

    Attributes:
      path: file with one item a line.
      offsets: split -> where the line of each of its items begins.
      sizes: split -> number of images, patients and studies.
      leaks: val and test -> number of their images of patients that train has too.
      labels, regions, anatomy: names that occur.
      missing: paths of images that do not exist or are empty.
      digest: hash of all items.
    """

    path: Path
    offsets: Mapping[str, Sequence[int]]
    sizes: Mapping[str, Mapping[str, int]]
    leaks: Mapping[str, int]
    labels: Sequence[str] = ()
    regions: Sequence[str] = ()
    anatomy: Sequence[str] = ()
    missing: Sequence[str] = ()
    digest: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.offsets.values()))

    def read_items(self, split: str) -> Iterator[Item]:
        """Yields the items of a split in the order of the records."""
        with self.path.open("rb") as lines:
            yield from (read_item(lines, offset) for offset in self.offsets[split])


@dataclass
class _Columns:
    """Columns of the items that are kept in memory."""

    keys: list[bytes] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    studies: list[str] = field(default_factory=list)


def read_item(lines, offset: int) -> Item:
    """Returns the item whose line begins at an offset of a file."""
    lines.seek(offset)
    return from_json(json.loads(lines.readline()))


def make_plan(
    items: Iterable[Item],
    source: SourceFolder,
    config: PublicConfig,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
    *,
    needs_images: bool = True,
) -> Plan:
    """Writes the items that become records into a folder, and orders them.

    A record's place in its split is that of a hash of its id, so the first records of a split are a
    random part of it, and they are the same in every preparation.

    Args:
      items: all images that the tables list.
      source: receives what is dropped, by reason.
      config: the options of the builder.
      folder: an existing folder for the items.
      advance: called after each item.
      needs_images: whether images that do not exist are dropped.

    Raises:
      UserError: nothing remains, or a patient is in two splits by a rule that promises otherwise.
    """
    columns, seen, missing = _Columns(), set[str](), list[str]()
    names: dict[str, Counter[str]] = {
        "labels": Counter(),
        "regions": Counter(),
        "anatomy": Counter(),
    }
    images = SourceFolder(config.image_root)
    digest = hashlib.sha256()
    path = folder / ITEMS_FILE
    with _open_items(path) as lines:
        for listed in items:
            advance()
            if reason := _find_reason(listed, config, seen):
                source.drop(reason, listed.image_id or listed.image)
                continue
            try:
                item = _complete(listed, config)
                line = json.dumps(to_json(item), ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can spell
                source.drop(NOT_UNICODE, listed.image_id)
                continue
            seen.add(listed.image_id)
            if not images.has(listed.image):
                missing.append(listed.image)
                if needs_images:
                    source.drop(MISSING, listed.image)
                    continue
            columns.keys.append(hashlib.sha256(item.image_id.encode()).digest())
            columns.splits.append(item.split)
            columns.offsets.append(lines.tell())
            columns.patients.append(item.patient_id)
            columns.studies.append(item.study_id or item.image_id)
            for name, counter in names.items():
                counter.update(list(getattr(item, name)))
            names["labels"].update(box.label for box in item.boxes if box.label)
            names["labels"].update(shape.label for shape in item.shapes if shape.label)
            digest.update(line)
            lines.write(line)
    _check_missing(missing, len(columns.keys), source, config, needs_images)
    leaks = count_leaks(zip(columns.patients, columns.splits, strict=True))
    _check_leaks(columns, leaks, config)
    return Plan(
        path=path,
        offsets=_sort(columns),
        sizes=_count(columns),
        leaks=leaks,
        labels=sorted(names["labels"]),
        regions=sorted(names["regions"]),
        anatomy=sorted(names["anatomy"]),
        missing=missing,
        digest=digest.hexdigest(),
    )


@contextlib.contextmanager
def _open_items(path: Path) -> Iterator[BinaryIO]:
    """Opens the file of the items; a file of that name is replaced when all are written."""
    # Renamed at the end: a worker of a killed preparation may still read the old file.
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        with temporary.open("wb") as lines:
            yield lines
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs the space


def _find_reason(item: Item, config: PublicConfig, seen: set[str]) -> str:
    """Returns why an item does not become a record, or ""."""
    if is_missing(item.image_id) or not item.image:
        return NO_ID
    if item.image_id in seen:
        return DUPLICATE
    if config.views == "frontal" and item.view not in (*FRONTAL_VIEWS, ""):
        return LATERAL
    if item.split == UNUSED and config.split_rule != BY_HASH:
        return f"left out by the split rule {config.split_rule}"
    return ""


def _complete(item: Item, config: PublicConfig) -> Item:
    """Returns an item with its patient and split, and without sections that say nothing."""
    # A table that pandas has written says `nan` where there is no id, and no text.
    patient_id = item.image_id if is_missing(item.patient_id) else item.patient_id
    split = "" if config.split_rule == BY_HASH else item.split
    return replace(
        item,
        patient_id=patient_id,
        study_id="" if is_missing(item.study_id) else item.study_id,
        split=split or assign_by_hash(patient_id, config.val_fraction, config.test_fraction),
        sections={name: text for name, text in item.sections.items() if not is_missing(text)},
    )


def _check_missing(
    missing: Sequence[str],
    num_found: int,
    source: SourceFolder,
    config: PublicConfig,
    needs_images: bool,
) -> None:
    total = num_found + len(missing) if needs_images else num_found
    place = f"of dataset {config.facts.name} in {config.image_root}"
    if not num_found and (not missing or len(missing) <= config.max_bad * total):
        reasons = ", ".join(f"{reason}: {len(names)}" for reason, names in source.dropped.items())
        raise UserError(f"no image {place} can be used ({reasons or 'the tables list none'})")
    if needs_images and len(missing) > config.max_bad * total:
        raise UserError(
            f"{len(missing)} of {total} images {place} are missing or empty, as "
            f"{quoting.quote_path(missing[0])}, more than the fraction max_bad "
            f"{config.max_bad:g}; complete the download or raise max_bad"
        )


def _check_leaks(columns: _Columns, leaks: Mapping[str, int], config: PublicConfig) -> None:
    """Raises UserError if the default rule, or a hash, has put a patient into two splits."""
    if config.split_rule not in (config.facts.default_split, BY_HASH) or not any(leaks.values()):
        return
    trained = {
        patient
        for patient, split in zip(columns.patients, columns.splits, strict=True)
        if split == "train"
    }
    patient, split = next(
        (patient, split)
        for patient, split in zip(columns.patients, columns.splits, strict=True)
        if split != "train" and patient in trained
    )
    raise UserError(
        f"patient {quoting.quote(patient)} of dataset {config.facts.name} is in train and in "
        f"{split} by the rule {config.split_rule!r}; the lists are not those that were published, "
        f"so use the split rule {BY_HASH!r}"
    )


def _sort(columns: _Columns) -> dict[str, list[int]]:
    """Returns the offsets of each split that has items, by the hash of their ids."""
    order = sorted(range(len(columns.keys)), key=columns.keys.__getitem__)
    offsets = {
        split: [columns.offsets[index] for index in order if columns.splits[index] == split]
        for split in SPLITS
    }
    return {split: part for split, part in offsets.items() if part}


def _count(columns: _Columns) -> dict[str, dict[str, int]]:
    """Returns the number of images, patients and studies of each split."""
    sizes = {}
    for split in SPLITS:
        rows = [index for index, name in enumerate(columns.splits) if name == split]
        if rows:
            sizes[split] = {
                "images": len(rows),
                "patients": len({columns.patients[index] for index in rows}),
                "studies": len({columns.studies[index] for index in rows}),
            }
    return sizes


def find_size(path: Path) -> int:
    """Returns the size of a file in bytes, -1 if it does not exist."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1

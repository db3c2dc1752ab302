"""A user's own image-text pairs: a manifest and a folder of images, as a TFDS dataset."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from plan_jax.data import images, schema
from plan_jax.data.pairs import annotations, manifest
from plan_jax.types import Record, UserError

ROLES = ("image", "text", "split", "patient_id", "labels", "boxes", "mask", "regions", "anatomy")
NAMED = 5  # rows named of those that are left out; a file beside the data names all
CHUNK = 256  # rows read ahead


@dataclasses.dataclass(eq=False)
class PairsConfig(tfds.core.BuilderConfig):
    """Where the pairs are and how to read them.

    `images` is the folder that image paths start from (by default the manifest's) and may not
    leave; the longer side of an image becomes `size` pixels. `columns` says which column plays
    which of ROLES where it has another name. `filters` choose rows, `box_where` boxes by their
    fields: {column: {"in": [..]}} or {"not": [..]}. Rows of fewer than `min_words` words are passed
    over; with `text_optional` a row, or the manifest, need have no text, which is enough to
    classify, segment and detect. Without a column of splits, shares of `val_fraction` and
    `test_fraction` of the patients are held out. `findings` name the labels (by default all that
    occur, sorted); besides the column of labels, `label_columns` are columns that each hold one of
    them (1, 0, -1), an empty cell meaning `label_blank` (CheXpert's readers take 0). More than
    `max_bad`, the share of rows that cannot be used, is an error.
    """

    manifest: str = ""
    images: str = ""
    size: int = 224
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    box_where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_words: int = 0
    text_optional: bool = False
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    findings: Sequence[str] = ()
    label_columns: Sequence[str] = ()
    label_blank: int = -1
    max_bad: float = 0.1

    def __post_init__(self):
        if not self.manifest:
            raise UserError("dataset pairs has no manifest; give data.builder.manifest")
        if self.size < 8:
            raise UserError(
                f"size {self.size} of dataset pairs is too small; use at least 8 pixels"
            )
        for name in ("val_fraction", "test_fraction", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is no share; use 0 to 1")

    @property
    def root(self) -> Path:
        """The folder that no image path may leave."""
        return Path(os.path.abspath(Path(self.images or Path(self.manifest).parent).expanduser()))

    def identity(self) -> dict[str, Any]:
        """What the records depend on: each field, and the manifest's content rather than its name.

        Raises:
          UserError: if the manifest or the folder does not exist.
        """
        path = Path(self.manifest).expanduser()
        if not path.is_file():
            raise UserError(f"manifest {path} does not exist; give the path of a file")
        if not self.root.is_dir():
            raise UserError(f"images folder {self.root} does not exist; give a folder")
        inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        return {k: _plain(v) for k, v in fields.items() if k not in inherited} | {
            "manifest": content + path.suffix,
            "images": str(self.root),
        }


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A row of the manifest, read but for its images."""

    number: int
    path: str
    split: str
    patient: str
    text: str
    labels: annotations.Labels
    boxes: list[dict[str, Any]]
    masks: dict[str, str]
    regions: dict[str, tuple[float, ...]]
    anatomy: dict[str, str]


class Pairs(tfds.core.GeneratorBasedBuilder):
    """Builds `schema.feature_dict()` examples from a manifest; see `PairsConfig`."""

    VERSION = tfds.core.Version("1.2.0")
    builder_config: PairsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Image-text pairs of a user's own manifest.",
            features=schema.feature_dict(),
            metadata=tfds.core.MetadataDict({"findings": [], "anatomy": [], "regions": []}),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = self.builder_config
        entries = self._entries()
        self._check_bad()
        manifest.check_leaks((entry.patient, entry.split) for entry in entries)
        boxes = [box for entry in entries for box in entry.boxes]
        manifest.check_columns(config.box_where, boxes, "box_where")
        for entry in entries:
            entry.boxes[:] = manifest.where(entry.boxes, config.box_where)
        self._labelled = {name for entry in entries for name in entry.labels.values}
        named = self._labelled | {b["label"] for e in entries for b in e.boxes if b["label"]}
        self._findings = tuple(config.findings) or tuple(sorted(named))
        self.info.metadata["findings"] = list(self._findings)
        self._regions = tuple(sorted({name for entry in entries for name in entry.regions}))
        self.info.metadata["regions"] = list(self._regions)
        self._anatomy = tuple(sorted({name for entry in entries for name in entry.anatomy}))
        self.info.metadata["anatomy"] = list(self._anatomy)
        splits = {s: [e for e in entries if e.split == s] for s in manifest.SPLITS}
        return {s: self._generate_examples(rows, s) for s, rows in splits.items() if rows}

    def _entries(self) -> list[_Entry]:
        """Read the rows that are asked for."""
        config = self.builder_config
        rows = manifest.read(Path(config.manifest).expanduser())
        numbers = {id(row): number for number, row in enumerate(rows, 1)}
        required = ("image",) if config.text_optional else ("image", "text")
        columns = manifest.pick_columns(rows, config.columns, required, ROLES)
        self._organ = annotations.organ_of(columns["anatomy"] or "")
        manifest.check_columns(config.filters, rows, "filters")
        manifest.check_columns({name: [] for name in config.label_columns}, rows, "label_columns")
        rows = [
            row
            for row in manifest.where(rows, config.filters)
            if len(str(manifest.cell(row, columns["text"]) or "").split()) >= config.min_words
        ]
        if not rows:
            raise UserError(
                f"manifest {config.manifest} has no row left; loosen filters or min_words"
            )
        self._bad: list[str] = []
        self._total = len(rows)
        read = (self._entry(row, numbers[id(row)], columns) for row in rows)
        return [entry for entry in read if entry is not None]

    def _generate_examples(
        self, entries: list[_Entry], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        made = 0
        with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock alone
            for start in range(0, len(entries), CHUNK):
                chunk = entries[start : start + CHUNK]
                for entry, found in zip(chunk, pool.map(self._record, chunk), strict=True):
                    if isinstance(found, Record):
                        made += 1
                        yield f"{entry.number:09d}", schema.to_example(found)
                    else:
                        self._bad.append(f"{entry.path} ({found})")
                self._check_bad()
        if not made:
            raise UserError(f"split {split!r} has no usable row: {self._bad_named()}")
        if self._bad:
            (Path(self.data_dir) / "left_out.txt").write_text("\n".join(self._bad) + "\n")
            self.notes = [f"left out {len(self._bad)} of {self._total} rows: {self._bad_named()}"]

    def _entry(
        self, row: manifest.RowDict, number: int, columns: Mapping[str, str | None]
    ) -> _Entry | None:
        """Read a row; None, and counted as bad, if it cannot be used."""
        cells = {role: manifest.cell(row, column) for role, column in columns.items()}
        path, text = str(cells["image"] or ""), str(cells["text"] or "")
        patient = str(path if cells["patient_id"] is None else cells["patient_id"])
        try:
            full = self._inside(path, number)
            if not (self.builder_config.text_optional or any(map(str.isalnum, text))):
                raise ValueError("its text is empty")
            if not full.is_file():
                raise ValueError("does not exist")
            boxes = annotations.read_boxes(cells["boxes"], text)
            return _Entry(
                number=number,
                path=path,
                split=self._split(cells["split"], columns["split"], patient, number),
                patient=patient,
                text=text,
                labels=annotations.read_labels(
                    cells["labels"],
                    {name: manifest.cell(row, name) for name in self.builder_config.label_columns},
                    self.builder_config.label_blank,
                ),
                boxes=boxes,
                masks=annotations.read_masks(cells["mask"], [b["phrase"] for b in boxes], text),
                regions=annotations.read_regions(cells["regions"]),
                anatomy=annotations.read_masks(cells["anatomy"], [self._organ], ""),
            )
        except ValueError as error:
            self._bad.append(f"{path or f'row {number}'} ({error})")
            return None

    def _split(self, given: Any, column: str | None, patient: str, number: int) -> str:
        config = self.builder_config
        if column is not None and given is None:
            raise UserError(
                f"row {number} has no split in column {column!r}; fill it or drop the column"
            )
        return manifest.split_of(given, patient, (config.val_fraction, config.test_fraction))

    def _inside(self, path: str, number: int) -> Path:
        """Return the full path of an image or a mask, which has to lie within the root."""
        root = self.builder_config.root
        if not path:
            raise ValueError("names no image")
        full = Path(os.path.abspath(root / path))
        if not full.is_relative_to(root):
            raise UserError(
                f"path {path!r} of row {number} leaves the images folder {root}; move it inside"
            )
        return full

    def _record(self, entry: _Entry) -> Record | str:
        """Read the images of a row; what is wrong, if one cannot be used."""
        try:
            full = self._inside(entry.path, entry.number)
            pixels, shape = images.read_image(full, self.builder_config.size)

            def drawn(paths: Mapping[str, str]) -> dict[str, np.ndarray]:
                inside = {name: self._inside(path, entry.number) for name, path in paths.items()}
                return {n: images.read_mask(p, shape, *pixels.shape) for n, p in inside.items()}

            masks, anatomy = drawn(entry.masks), drawn(entry.anatomy)
            if anatomy and len(anatomy) < len(self._anatomy):
                lacks = ", ".join(sorted({*self._anatomy} - {*anatomy}))
                raise ValueError(f"has masks of anatomy, but none of {lacks}")
            phrases = annotations.make_phrases(
                entry.boxes, masks, self._findings, shape, pixels.shape
            )
            regions = [
                annotations.scale_box(entry.regions[name], shape, pixels.shape)
                if name in entry.regions
                else (0.0,) * 4
                for name in self._regions
            ]
        except (OSError, ValueError) as error:
            return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        rest = {name: entry.labels.rest for name in self._labelled}
        labels = rest | dict(entry.labels.values)
        return Record(
            image=pixels,
            text=entry.text,
            patient_id=entry.patient,
            labels=np.asarray([labels.get(name, -1) for name in self._findings], np.int8),
            phrases=tuple(phrases),
            regions=np.asarray(regions, np.float32).reshape(-1, 4),
            anatomy={name: anatomy[name] for name in self._anatomy if anatomy},
        )

    def _bad_named(self) -> str:
        more = len(self._bad) - NAMED
        return ", ".join(self._bad[:NAMED]) + (f" and {more} more" if more > 0 else "")

    def _check_bad(self) -> None:
        limit = self.builder_config.max_bad
        if len(self._bad) > limit * self._total:
            raise UserError(
                f"{len(self._bad)} of {self._total} rows cannot be used, more than the share "
                f"max_bad {limit:g}: {self._bad_named()}; mend them or raise max_bad"
            )


def _plain(value: Any) -> Any:
    """Turn nested mappings and sequences of any kind into dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value

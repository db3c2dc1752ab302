"""TFDS builder of a user's own image-text pairs: a manifest and a folder of images."""

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool

from plan_jax.data import images, schema
from plan_jax.data.pairs import annotations, manifest
from plan_jax.data.sources import MESSAGES_FILE, SourceFiles
from plan_jax.types import Record, UserError

# What a column can contain.
ROLES = ("image", "text", "split", "patient_id", "labels", "boxes", "mask", "regions", "anatomy")
MAX_REPORTED_ROWS = 5  # in a message; SKIPPED_FILE, next to the data, lists all
SKIPPED_FILE = "skipped_rows.txt"
CHUNK_SIZE = 256  # rows whose images are decoded at a time, so that memory stays bounded


@dataclasses.dataclass(eq=False)  # compared by identity, like the class of TFDS
class PairsConfig(tfds.core.BuilderConfig):
    """Where a user's pairs are and how to read them.

    Conditions (`filters`, `box_where`) are {column: {"in": [..]}} or {column: {"not": [..]}}.
    """

    # Path of the manifest: .csv, .jsonl or .parquet.
    manifest: str = ""
    # Folder that image paths start from and must not leave ("": the manifest's folder).
    images: str = ""
    # Longer side of a stored image, in pixels.
    size: int = 224
    # Bits of an image of more than 8 that does not say it (0: guessed from each, see `data.grey`).
    bit_depth: int = 0
    # Role (see ROLES) -> column, where the column is not called like its role.
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Conditions on columns: only rows that fulfil them are used.
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Conditions on the fields of a box: only boxes that fulfil them are used.
    box_where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Rows with fewer words of text are ignored.
    min_words: int = 0
    # Accept rows, or a manifest, without text: enough to classify, segment and detect.
    text_optional: bool = False
    # Fraction of patients in val, if there is no column of splits.
    val_fraction: float = 0.1
    # Fraction of patients in test, if there is no column of splits.
    test_fraction: float = 0.1
    # Names of the labels, in order (empty: all that occur, sorted).
    findings: Sequence[str] = ()
    # Columns that contain one label each (1, 0, -1), in addition to the column of labels.
    label_columns: Sequence[str] = ()
    # Value of an empty cell of `label_columns`; work on CheXpert usually reads it as 0.
    label_blank: int = -1
    # Largest fraction of rows that cannot be used; more than that is an error.
    max_bad: float = 0.1

    def __post_init__(self):
        """Raises UserError if a value is out of range."""
        if not self.manifest:
            raise UserError("dataset pairs has no manifest; give data.builder.manifest")
        if self.size < 8:
            raise UserError(
                f"size {self.size} of dataset pairs is too small; use at least 8 pixels"
            )
        if self.bit_depth not in (0, *range(8, 17)):
            raise UserError(
                f"bit_depth {self.bit_depth} of dataset pairs is none of images; use 8 to 16, or 0"
            )
        for name in ("val_fraction", "test_fraction", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not a fraction; use 0 to 1")

    @property
    def root(self) -> Path:
        """Returns the absolute path of the folder that no image path may leave."""
        folder = Path(self.images or Path(self.manifest).parent)
        return Path(os.path.abspath(folder.expanduser()))

    def identity(self) -> dict[str, Any]:
        """Returns all that the records depend on, beside the content of images and masks.

        That is every field; for the manifest its content, because its name may stay the same when
        its content changes. Where the folder is does not matter: data can be moved.

        Raises:
          UserError: if the manifest or the folder does not exist.
        """
        path = Path(self.manifest).expanduser()
        if not path.is_file():
            raise UserError(f"manifest {path} does not exist; give the path of a file")
        if not self.root.is_dir():
            raise UserError(f"images folder {self.root} does not exist; give a folder")
        inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        values = {
            field.name: _to_builtin(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in inherited
        }
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return values | {"manifest": digest + path.suffix, "images": ""}


def _to_builtin(value: Any) -> Any:
    """Returns nested mappings and sequences of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _to_builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_builtin(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class _Study:
    """A parsed row of the manifest whose images are not read yet; `number` counts from 1."""

    number: int
    path: str
    split: str
    patient_id: str
    text: str
    labels: annotations.Labels
    boxes: list[dict[str, Any]]
    masks: dict[str, str]
    regions: dict[str, annotations.Box]
    anatomy: dict[str, str]


class Pairs(tfds.core.GeneratorBasedBuilder):
    """Builds a dataset from a manifest, see `PairsConfig`.

    Rows that cannot be used are skipped and reported in `messages`.
    """

    VERSION = tfds.core.Version("1.4.0")
    builder_config: PairsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        # The names are known only after the manifest is read: `_split_generators` fills them in.
        return tfds.core.DatasetInfo(
            builder=self,
            description="Image-text pairs of a user's own manifest.",
            features=schema.record_features(),
            metadata=tfds.core.MetadataDict({"findings": [], "anatomy": [], "regions": []}),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        self._skipped: list[str] = []
        self._sources = SourceFiles()
        # What was noted of images and masks -> their names; filled by several threads.
        self._notes: dict[str | int, list[str]] = defaultdict(list)
        studies = self._read_studies()
        self._check_skipped()
        manifest.check_patient_leaks((study.patient_id, study.split) for study in studies)
        studies = self._filter_boxes(studies)
        self._collect_names(studies)
        generators = {}
        for split in manifest.SPLITS:
            # TFDS refuses a split without examples, so one without rows does not exist.
            if split_studies := [study for study in studies if study.split == split]:
                generators[split] = self._generate_examples(split_studies, split)
        return generators

    # Rows -------------------------------------------------------------------------------------

    def _read_studies(self) -> list[_Study]:
        """Reads the manifest, filters its rows, and parses their cells."""
        config = self.builder_config
        all_rows = manifest.read_manifest(Path(config.manifest).expanduser())
        required = ("image",) if config.text_optional else ("image", "text")
        columns = manifest.match_columns(all_rows, config.columns, required, ROLES)
        manifest.check_conditions(config.filters, all_rows, "filters")
        label_conditions: dict[str, Any] = {name: [] for name in config.label_columns}
        manifest.check_conditions(label_conditions, all_rows, "label_columns")

        def count_words(row: manifest.Row) -> int:
            return len(str(manifest.get_cell(row, columns["text"]) or "").split())

        rows = manifest.filter_rows(all_rows, config.filters)
        rows = [row for row in rows if count_words(row) >= config.min_words]
        if not rows:
            raise UserError(
                f"manifest {config.manifest} has no row left; loosen filters or min_words"
            )
        self._num_rows = len(rows)
        # Messages and keys use the number in the manifest, which filtering must not change.
        numbers = {id(row): number for number, row in enumerate(all_rows, 1)}
        studies = (self._parse_row(row, numbers[id(row)], columns) for row in rows)
        return [study for study in studies if study is not None]

    def _parse_row(
        self, row: manifest.Row, number: int, columns: Mapping[str, str | None]
    ) -> _Study | None:
        """Parses a row; returns None, and reports the row, if it cannot be used."""
        config = self.builder_config
        cells = {role: manifest.get_cell(row, column) for role, column in columns.items()}
        path, text = str(cells["image"] or ""), str(cells["text"] or "")
        # Without a column of patients, every image is a patient.
        patient_id = str(path if cells["patient_id"] is None else cells["patient_id"])
        try:
            full_path = self._resolve_path(path, number)
            if not (config.text_optional or any(map(str.isalnum, text))):
                raise ValueError("its text is empty")
            if not full_path.is_file():
                self._sources.add(config.root, full_path)  # it may exist later
                raise ValueError("does not exist")
            boxes = annotations.parse_boxes(cells["boxes"], text)
            label_cells = {name: manifest.get_cell(row, name) for name in config.label_columns}
            phrases = [box["phrase"] for box in boxes]
            organ = annotations.organ_from_column(columns["anatomy"] or "")
            return _Study(
                number=number,
                path=path,
                split=self._assign_split(cells["split"], columns["split"], patient_id, number),
                patient_id=patient_id,
                text=text,
                labels=annotations.parse_labels(cells["labels"], label_cells, config.label_blank),
                boxes=boxes,
                masks=annotations.parse_masks(cells["mask"], phrases, text),
                regions=annotations.parse_regions(cells["regions"]),
                anatomy=annotations.parse_masks(cells["anatomy"], [organ], ""),
            )
        except ValueError as error:
            self._skipped.append(f"{path or f'row {number}'} ({error})")
            return None

    def _assign_split(self, split: Any, column: str | None, patient_id: str, number: int) -> str:
        config = self.builder_config
        # Assigning only the rows without a split could put one patient into two.
        if column is not None and split is None:
            raise UserError(
                f"row {number} has no split in column {column!r}; fill it or drop the column"
            )
        fractions = (config.val_fraction, config.test_fraction)
        return manifest.assign_split(split, patient_id, fractions)

    def _resolve_path(self, path: str, number: int) -> Path:
        """Returns the full path of an image or a mask, which must be inside the root.

        A manifest may come from somebody else: it must not make this process read other files.
        """
        root = self.builder_config.root
        if not path:
            raise ValueError("names no image")
        full_path = Path(os.path.abspath(root / path))
        if not full_path.is_relative_to(root):
            raise UserError(
                f"path {path!r} of row {number} leaves the images folder {root}; move it inside"
            )
        return full_path

    def _filter_boxes(self, studies: list[_Study]) -> list[_Study]:
        conditions = self.builder_config.box_where
        all_boxes = [box for study in studies for box in study.boxes]
        manifest.check_conditions(conditions, all_boxes, "box_where")
        return [
            dataclasses.replace(study, boxes=manifest.filter_rows(study.boxes, conditions))
            for study in studies
        ]

    def _collect_names(self, studies: list[_Study]) -> None:
        """Stores the names of findings, regions and anatomy, also in the dataset's metadata."""
        self._label_names = {name for study in studies for name in study.labels.values}
        box_labels = {box["label"] for study in studies for box in study.boxes if box["label"]}
        occurring = sorted(self._label_names | box_labels)
        self._findings = tuple(self.builder_config.findings or occurring)
        self._region_names = tuple(sorted({name for study in studies for name in study.regions}))
        self._anatomy_names = tuple(sorted({name for study in studies for name in study.anatomy}))
        self.info.metadata["findings"] = list(self._findings)
        self.info.metadata["regions"] = list(self._region_names)
        self.info.metadata["anatomy"] = list(self._anatomy_names)

    # Records ----------------------------------------------------------------------------------

    def _generate_examples(
        self, studies: list[_Study], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        num_examples = 0
        with ThreadPoolExecutor() as pool:  # decoders release Python's lock
            for start in range(0, len(studies), CHUNK_SIZE):
                chunk = studies[start : start + CHUNK_SIZE]
                records = pool.map(self._read_record, chunk)
                for study, record in zip(chunk, records, strict=True):
                    if isinstance(record, Record):
                        num_examples += 1
                        yield f"{study.number:09d}", schema.to_example(record)
                    else:
                        self._skipped.append(f"{study.path} ({record})")
                # After each chunk, so that a folder of broken images fails early.
                self._check_skipped()
        if not num_examples:
            raise UserError(
                f"split {split!r} has no usable row: {self._list_skipped()}; fix one of them"
            )
        self._write_reports(Path(self.data_dir))

    def _read_record(self, study: _Study) -> Record | str:
        """Returns the record of a study, or the reason why it cannot be used."""
        try:
            path = self._resolve_path(study.path, study.number)
            self._sources.add(self.builder_config.root, path)
            config, notes = self.builder_config, set[str | int]()
            image, shape = images.read_image(path, config.size, config.bit_depth, notes)
            masks = self._read_masks(study.masks, study.number, shape, image.shape)
            anatomy = self._read_masks(study.anatomy, study.number, shape, image.shape)
            # Stored masks have no names but their order, so a study has all of them or none.
            if anatomy and (missing := sorted({*self._anatomy_names} - {*anatomy})):
                raise ValueError(f"has masks of anatomy, but not of {', '.join(missing)}")
            phrases = annotations.build_phrases(
                study.boxes, masks, self._findings, shape, image.shape
            )
            unknown_region = (0.0,) * 4
            regions = [
                annotations.scale_box(study.regions[name], shape, image.shape)
                if name in study.regions
                else unknown_region
                for name in self._region_names
            ]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return reason.splitlines()[0]
        for note in notes:
            self._notes[note].append(study.path)
        return Record(
            image=image,
            text=study.text,
            patient_id=study.patient_id,
            labels=self._order_labels(study.labels),
            phrases=tuple(phrases),
            regions=np.asarray(regions, np.float32).reshape(-1, 4),
            anatomy={name: anatomy[name] for name in self._anatomy_names if anatomy},
        )

    def _read_masks(
        self,
        paths: Mapping[str, str],
        number: int,
        shape: tuple[int, int],
        new_shape: tuple[int, int],
    ) -> dict[str, Bool[np.ndarray, "Y X"]]:
        """Reads the masks of a row by name, resized as its image."""
        full_paths = {name: self._resolve_path(path, number) for name, path in paths.items()}
        for path in full_paths.values():
            self._sources.add(self.builder_config.root, path)
        masks = {
            name: images.read_mask(path, shape, *new_shape) for name, path in full_paths.items()
        }
        for name, mask in masks.items():
            if mask.all() or not mask.any():
                self._notes[images.FULL if mask.any() else images.EMPTY].append(paths[name])
        return masks

    def _order_labels(self, labels: annotations.Labels) -> np.ndarray:
        """Returns labels Int8[F] in the order of the findings.

        The default of a list of labels holds only for names that are labels somewhere. A finding
        that is only the label of boxes, or only in `findings`, is unknown.
        """
        values = {name: labels.default for name in self._label_names} | dict(labels.values)
        return np.asarray([values.get(name, -1) for name in self._findings], np.int8)

    # Report -----------------------------------------------------------------------------------

    def _write_reports(self, folder: Path) -> None:
        """Writes what later runs need to know: files, skipped rows and messages.

        Splits are generated one after the other; the last one writes the complete lists.
        """
        self._sources.save(folder)
        self.messages = images.summarise_notes(self._notes, self.builder_config.size)
        if self._skipped:
            (folder / SKIPPED_FILE).write_text("\n".join(self._skipped) + "\n")
            self.messages.append(
                f"skipped {len(self._skipped)} of {self._num_rows} rows: {self._list_skipped()}"
            )
        if self.messages:
            (folder / MESSAGES_FILE).write_text("\n".join(self.messages) + "\n")

    def _list_skipped(self) -> str:
        num_hidden = len(self._skipped) - MAX_REPORTED_ROWS
        suffix = f" and {num_hidden} more" if num_hidden > 0 else ""
        return ", ".join(self._skipped[:MAX_REPORTED_ROWS]) + suffix

    def _check_skipped(self) -> None:
        """Raises UserError if more rows than `max_bad` cannot be used."""
        limit = self.builder_config.max_bad
        if len(self._skipped) > limit * self._num_rows:
            raise UserError(
                f"{len(self._skipped)} of {self._num_rows} rows cannot be used, more than the "
                f"fraction max_bad {limit:g}: {self._list_skipped()}; fix them or raise max_bad"
            )

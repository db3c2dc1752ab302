"""TFDS builder of a user's own image-text pairs: a manifest and a folder of images."""

import dataclasses
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from plan_jax.data import faults, images, quoting, schema
from plan_jax.data.pairs import (
    annotations,
    boxes,
    cells,
    columns,
    decisions,
    label_names,
    manifest,
    paths,
    patients,
    summary,
)
from plan_jax.data.pairs.studies import DUPLICATES, Study, count_split_texts, merge_duplicates
from plan_jax.data.sources import MESSAGES_FILE, SourceFiles
from plan_jax.data.tfds import tfds
from plan_jax.types import Geometry, Phrase, Record, UserError

# What a column can contain. `reader` is who has labelled the row, if several have.
ROLES = (
    *("image", "text", "split", "patient_id", "labels", "boxes", "mask", "regions", "anatomy"),
    "reader",
)
MAX_REPORTED_ROWS = 5  # in a message; SKIPPED_FILE, next to the data, lists all
SKIPPED_FILE = "skipped_rows.txt"
NOTED_FILE = "noted_boxes.txt"  # images whose boxes are suspicious; they are used
MAX_OVERHANG = 0.02  # of an image's longer side, by which a box may reach beyond it
CHUNK_SIZE = 256  # rows whose images are decoded at a time, so that memory stays bounded


@dataclasses.dataclass(eq=False)  # compared by identity, like the class of TFDS
class PairsConfig(tfds.core.BuilderConfig):
    """Where a user's pairs are and how to read them.

    Conditions (`filters`, `box_where`) are {column: {"in": [..]}} or {column: {"not": [..]}}.
    """

    # Path of the manifest: .csv, .tsv, .jsonl, .json or .parquet.
    manifest: str = ""
    # Folder that image paths start from and must not leave ("": the manifest's folder).
    images: str = ""
    # Suffix that image names lack, as ".dcm".
    image_suffix: str = ""
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
    # A text that is a list is one report: its items are joined.
    join_text: bool = False
    # Sections of a text that is an object, in the order in which they are joined.
    text_sections: Sequence[str] = ()
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
    # What divides the names of a cell of labels ("": `;`, `|`, or a comma where that is certain).
    label_separator: str = ""
    # Four columns that contain the coordinates of one box; ("x", "y", "width", "height") and other
    # usual names are recognised.
    box_columns: Sequence[str] = ()
    # Format of boxes, see `boxes.FORMATS` ("": corners in pixels, unless the numbers deny it).
    box_format: str = ""
    # Format of `regions`, likewise.
    region_format: str = ""
    # What becomes of several rows of one image, see `studies.merge_duplicates`.
    duplicates: str = "merge"
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
                f"bit_depth {self.bit_depth} of dataset pairs is not a depth of images; use 8 to "
                "16, or 0 to guess it"
            )
        for name in ("val_fraction", "test_fraction", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not a fraction; use 0 to 1")
        if self.val_fraction + self.test_fraction > 1:
            raise UserError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} are more "
                "than all patients; lower one of them"
            )
        boxes.check_format("box_format", self.box_format)
        boxes.check_format("region_format", self.region_format)
        if self.duplicates not in DUPLICATES:
            raise UserError(
                f"duplicates {quoting.quote(self.duplicates)} is unknown; use one of "
                f"{', '.join(DUPLICATES)}"
            )
        if len(self.box_columns) not in (0, 4):
            raise UserError(
                f"box_columns names {len(self.box_columns)} columns; name the four of a box"
            )

    @property
    def root(self) -> Path:
        """Returns the absolute path of the folder that no image path may leave."""
        folder = Path(self.images or Path(self.manifest).parent)
        # `Path.expanduser` raises RuntimeError for a user that does not exist.
        return Path(os.path.abspath(os.path.expanduser(folder)))

    def identity(self) -> dict[str, Any]:
        """Returns all that the records depend on, beside the content of images and masks.

        That is every field; for the manifest its content, because its name may stay the same when
        its content changes. Where the folder is does not matter: data can be moved.

        Raises:
          UserError: if the manifest or the folder does not exist or cannot be read.
        """
        path = Path(os.path.expanduser(self.manifest))
        try:
            content = path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise UserError(
                f"manifest {path} cannot be read ({error.strerror}); correct that, and repeat the "
                "command"
            ) from None
        if content is None:
            raise UserError(
                f"manifest {path} does not exist; give the path of a file as "
                "config.data.builder.manifest"
            )
        try:
            is_folder = self.root.is_dir()
        except OSError as error:
            raise UserError(
                f"images folder {self.root} cannot be read ({error.strerror}); correct that, and "
                "repeat the command"
            ) from None
        if not is_folder:
            raise UserError(
                f"images folder {self.root} does not exist; give a folder as "
                "config.data.builder.images"
            )
        inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        values = {
            field.name: _to_builtin(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in inherited
        }
        digest = hashlib.sha256(content).hexdigest()
        return values | {"manifest": digest + path.suffix, "images": ""}

    def digest(self) -> str:
        """Returns a hash of the manifest's content.

        Raises:
          UserError: as `identity`.
        """
        return self.identity()["manifest"][:12]


def _to_builtin(value: Any) -> Any:
    """Returns nested mappings and sequences of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _to_builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_builtin(item) for item in value]
    return value


class Pairs(tfds.core.GeneratorBasedBuilder):
    """Builds a dataset from a manifest, see `PairsConfig`.

    Rows that cannot be used are skipped and reported in `messages`.
    """

    VERSION = tfds.core.Version("1.6.0")
    builder_config: PairsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        # The names are known only after the manifest is read: `_split_generators` fills them in.
        return tfds.core.DatasetInfo(
            builder=self,
            description="Image-text pairs of a user's own manifest.",
            features=schema.record_features(),
            metadata=tfds.core.MetadataDict(
                {
                    "findings": [],
                    "anatomy": [],
                    "regions": [],
                    "num_patients": 0,
                    "split_column": "",
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        self._skipped: list[str] = []
        self._sources = SourceFiles()
        # What was noted of images and masks -> their names; filled by several threads.
        self._notes: dict[str | int, list[str]] = defaultdict(list)
        self._root = self.builder_config.root
        self._path_hint = ""
        self._num_missing_images = 0
        # Names of images with such boxes; filled by several threads.
        self._tiny_boxes: list[str] = []
        self._cut_boxes: list[str] = []
        self._num_with_boxes = 0
        self._has_corner_proof = False
        studies = self._read_studies()
        self._check_skipped()
        studies = self._apply_decisions(studies)
        manifest.check_patient_leaks((study.patient_id, study.split) for study in studies)
        self._collect_names(studies)
        self.messages = self._summary.describe(studies, self._findings)
        self.info.metadata["num_patients"] = len({study.patient_id for study in studies})
        self.info.metadata["split_column"] = self._summary.columns.get("split", "")
        self._split_of = {study.path: study.split for study in studies}
        generators = {}
        for split in manifest.SPLITS:
            # TFDS refuses a split without examples, so one without rows does not exist.
            if split_studies := [study for study in studies if study.split == split]:
                generators[split] = self._generate_examples(split_studies, split)
        return generators

    def _apply_decisions(self, studies: list[Study]) -> list[Study]:
        """Returns one study for each image, after decisions over whole columns."""
        config, all_boxes = self.builder_config, [box for study in studies for box in study.boxes]
        # Boxes of named coordinates say what they are.
        self._has_unnamed_boxes = any("box_format" not in box for box in all_boxes)
        studies, self._summary.num_zero_boxes = decisions.filter_boxes(studies, config.box_where)
        num_fulfilling = len(manifest.filter_rows(all_boxes, config.box_where))
        box_notes = manifest.remark_conditions(
            config.box_where, all_boxes, num_fulfilling, "box_where", "box"
        )
        studies, self._summary.box_formats, self._region_format = decisions.choose_box_formats(
            studies, config.box_format, config.region_format
        )
        studies, notes = decisions.match_findings(studies, config.findings)
        merged_studies = merge_duplicates(studies, config.duplicates)
        self._summary.num_merged = len(studies) - len(merged_studies)
        num_split = count_split_texts(studies) if config.duplicates == "separate" else 0
        if num_split:
            notes.append(
                f"{num_split} rows of boxes share their image and text and stay apart, each with "
                "some of the boxes; data.builder.duplicates='by_text' joins them"
            )
        text_notes = columns.remark_texts([study.text for study in merged_studies])
        self._summary.notes = [*self._filter_notes, *box_notes, *notes, *text_notes]
        return merged_studies

    # Rows -------------------------------------------------------------------------------------

    def _read_studies(self) -> list[Study]:
        """Reads the manifest, filters its rows, looks at its columns, and parses its cells."""
        config = self.builder_config
        path = Path(os.path.expanduser(config.manifest))
        all_rows = manifest.read_manifest(path)
        required = ("image",) if config.text_optional else ("image", "text")
        label_columns = [cells.normalise_name(name) for name in config.label_columns]
        named_columns = {role: cells.normalise_name(name) for role, name in config.columns.items()}
        column_of = manifest.match_columns(all_rows, named_columns, required, ROLES)
        if column_of["labels"] in label_columns:  # a column of one finding that is called `labels`
            column_of["labels"] = None
        self._match_box_columns(all_rows, column_of)
        filters = {cells.normalise_name(name): rule for name, rule in config.filters.items()}
        manifest.check_conditions(filters, all_rows, "filters")
        label_conditions: dict[str, Any] = {name: [] for name in label_columns}
        manifest.check_conditions(label_conditions, all_rows, "label_columns")

        rows = manifest.filter_rows(all_rows, filters)
        cells_of = {
            role: [cells.get_cell(row, column) for row in rows]
            for role, column in column_of.items()
        }
        self._filter_notes = manifest.remark_conditions(
            filters, all_rows, len(rows), "filters", "row"
        )
        columns.check_order(cells_of["image"], cells_of["text"])
        columns.check_images(
            cells_of["image"], column_of["image"] or "", config.max_bad, config.image_suffix
        )
        if column_of["text"] and column_of["text"] == column_of["labels"]:
            raise UserError(
                f"column {quoting.quote(column_of['text'])} is mapped to text and to labels; "
                "leave one of them out of data.builder.columns"
            )
        if column_of["text"]:
            columns.check_texts(
                cells_of["text"], column_of["text"], config.join_text, config.text_sections
            )
        patient_ids = patients.fill_ids(
            patients.match_ids(cells_of["patient_id"]), cells_of["image"]
        )
        readers = patients.match_ids(cells_of["reader"], "reader")
        separator = label_names.choose_separator(
            cells_of["labels"], config.label_separator, config.findings
        )
        self._summary = summary.Summary(
            manifest=path.name,
            columns={role: name for role, name in column_of.items() if name},
            label_columns=label_columns,
            box_columns=self._box_columns,
            unused=self._list_unused(all_rows, column_of, label_columns),
            num_missing={
                role: sum(cell is None for cell in column_cells)
                for role, column_cells in (cells_of | {"patient_id": patient_ids}).items()
                if column_of[role]
            },
            separator=config.label_separator or ("," if separator.fullmatch(",") else ""),
        )
        # Messages and keys use the number in the manifest, which filtering must not change.
        numbers = {id(row): number for number, row in enumerate(all_rows, 1)}
        self._num_rows = 0
        studies, num_short_texts = [], 0
        for position, row in enumerate(rows):
            row_cells = {role: cells_of[role][position] for role in ROLES}
            row_cells |= {"patient_id": patient_ids[position], "reader": readers[position]}
            if config.min_words and self._count_words(row_cells["text"]) < config.min_words:
                num_short_texts += 1
                continue
            self._num_rows += 1
            label_cells = {name: cells.get_cell(row, name) for name in label_columns}
            box_cells = [cells.get_cell(row, name) for name in self._box_columns]
            study = self._parse_row(
                row_cells, numbers[id(row)], column_of, label_cells, box_cells, separator
            )
            if study is not None:
                studies.append(study)
        if num_short_texts:
            row_count = quoting.count(num_short_texts, "row")
            self._filter_notes.append(f"min_words leaves out {row_count}")
        if not self._num_rows:
            causes = f" ({', '.join(self._filter_notes)})" if self._filter_notes else ""
            raise UserError(
                f"manifest {config.manifest} has no row left{causes}; loosen filters or min_words"
            )
        return studies

    def _match_box_columns(
        self, rows: Sequence[manifest.Row], column_of: Mapping[str, str | None]
    ) -> None:
        """Finds the columns of coordinates: the named ones, or those with usual names."""
        config = self.builder_config
        self._box_columns: list[str] = [cells.normalise_name(n) for n in config.box_columns]
        manifest.check_conditions({name: [] for name in self._box_columns}, rows, "box_columns")
        is_without_boxes = column_of["boxes"] is None and "boxes" not in config.columns
        if not self._box_columns and is_without_boxes:
            match = boxes.match_coordinates(
                list(dict.fromkeys(name for row in rows for name in row))
            )
            self._box_columns = list(match[0]) if match else []

    def _list_unused(
        self,
        rows: Sequence[manifest.Row],
        column_of: Mapping[str, str | None],
        label_columns: Sequence[str],
    ) -> list[str]:
        names = dict.fromkeys(name for row in rows for name in row)
        used_names = {*column_of.values(), *label_columns, *self._box_columns}
        return [
            name
            for name in names
            if name and name not in {*used_names, *self.builder_config.filters}
        ]

    def _count_words(self, cell: Any) -> int:
        try:
            return len(self._read_text(cell).split())
        except (ValueError, RecursionError):
            return 0  # a mistake of the row, which its parsing names

    def _read_text(self, cell: Any) -> str:
        return columns.read_text(
            cell, self.builder_config.join_text, self.builder_config.text_sections
        )

    def _parse_row(
        self,
        row: Mapping[str, Any],
        number: int,
        column_of: Mapping[str, str | None],
        label_cells: Mapping[str, Any],
        box_cells: Sequence[Any],
        separator: re.Pattern[str],
    ) -> Study | None:
        """Parses a row; returns None, and reports the row, if it cannot be used.

        Args:
          row: role -> cell.
          number: number of the row in the manifest, from 1.
          column_of: role -> column.
          label_cells: name -> cell of the columns of one label each.
          box_cells: the coordinates of the row's box.
          separator: what divides the names of a cell of labels.
        """
        config = self.builder_config
        path = ""
        try:
            path = paths.read_image_name(row["image"], config.image_suffix)
            full_path = self._resolve_path(path, number)
            if not full_path.is_file():
                self._add_absent(path)
                # A hint looks into folders, so only a few rows ask for one.
                if not self._path_hint and self._num_missing_images < MAX_REPORTED_ROWS:
                    self._path_hint = paths.suggest_folder(self._root, path)
                self._num_missing_images += 1
                raise ValueError("does not exist")
            path = full_path.relative_to(self._root).as_posix()
            # Without a column of patients, every image is a patient.
            patient_id = row["patient_id"] or path
            text = self._read_text(row["text"])
            if not (config.text_optional or any(map(str.isalnum, text))):
                raise ValueError("its text is empty")
            labels = annotations.parse_labels(
                row["labels"], label_cells, config.label_blank, separator
            )
            present_names = [name for name, value in labels.values.items() if value == 1]
            all_boxes = annotations.parse_boxes(row["boxes"], text)
            if box_cells and not all(cell is None for cell in box_cells):
                label = present_names[0] if len(present_names) == 1 else ""
                item = {"box": dict(zip(self._box_columns, box_cells, strict=True)), "label": label}
                if boxes.match_coordinates(self._box_columns) is None:
                    item["box"] = list(box_cells)
                all_boxes += annotations.parse_boxes([item], label or text)
            organ = annotations.organ_from_column(column_of["anatomy"] or "")
            return Study(
                number=number,
                path=path,
                split=self._assign_split(row["split"], column_of["split"], patient_id, number),
                patient_id=patient_id,
                text=text,
                labels=labels,
                boxes=all_boxes,
                masks=annotations.parse_masks(
                    row["mask"], [box["phrase"] for box in all_boxes], text
                ),
                regions=annotations.parse_regions(row["regions"], config.region_format),
                anatomy=annotations.parse_masks(row["anatomy"], [organ], ""),
                reader=row["reader"] or "",
            )
        except (OverflowError, RecursionError):
            error = ValueError("has a cell that is too large to be read")
        except ValueError as cause:
            error = cause
        self._skipped.append(f"{quoting.quote_path(path) if path else f'row {number}'} ({error})")
        return None

    def _resolve_path(self, path: str, number: int) -> Path:
        """Returns the full path of an image or a mask, see `paths.resolve_path`."""
        try:
            return paths.resolve_path(self._root, path, number)
        except ValueError:
            self._add_absent(path)
            raise

    def _add_absent(self, path: str) -> None:
        """Adds the files that a path may mean to the sources: one of them may exist later."""
        for candidate in paths.list_candidates(self._root, path):
            self._sources.add(self._root, candidate)

    def _assign_split(self, split: Any, column: str | None, patient_id: str, number: int) -> str:
        config = self.builder_config
        # Assigning only the rows without a split could put one patient into two.
        if column is not None and split is None:
            raise UserError(
                f"row {number} has no split in column {column!r}; fill it or drop the column"
            )
        fractions = (config.val_fraction, config.test_fraction)
        return manifest.assign_split(split, patient_id, fractions)

    def _collect_names(self, studies: list[Study]) -> None:
        """Stores the names of findings, regions and anatomy, also in the dataset's metadata."""
        self._label_names = {name for study in studies for name in study.labels.values}
        box_labels = {box["label"] for study in studies for box in study.boxes if box["label"]}
        occurring_names = sorted(self._label_names | box_labels)
        self._findings = tuple(self.builder_config.findings or occurring_names)
        self._region_names = tuple(sorted({name for study in studies for name in study.regions}))
        self._anatomy_names = tuple(sorted({name for study in studies for name in study.anatomy}))
        self.info.metadata["findings"] = list(self._findings)
        self.info.metadata["regions"] = list(self._region_names)
        self.info.metadata["anatomy"] = list(self._anatomy_names)

    # Records ----------------------------------------------------------------------------------

    def _generate_examples(
        self, studies: list[Study], split: str
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
                        self._skipped.append(f"{quoting.quote_path(study.path)} ({record})")
                # After each chunk, so that a folder of broken images fails early.
                self._check_skipped()
                self._num_with_boxes += sum(bool(study.boxes) for study in chunk)
                self._check_cut_boxes()
        if not num_examples:
            raise UserError(
                f"split {split!r} has no usable row: {self._list_skipped()}; fix one of them"
            )
        self._write_reports(Path(self.data_dir))

    def _read_record(self, study: Study) -> Record | str:
        """Returns the record of a study, or the reason why it cannot be used."""
        try:
            path = self._resolve_path(study.path, study.number)
            self._sources.add(self._root, path)
            config, notes = self.builder_config, set[str | int]()
            image, shape = images.read_image(path, config.size, config.bit_depth, notes)
            masks = self._read_masks(study.masks, study.number, shape, image.shape)
            anatomy = self._read_masks(study.anatomy, study.number, shape, image.shape)
            # Stored masks have no names but their order, so a study has all of them or none.
            if anatomy and (missing := sorted({*self._anatomy_names} - {*anatomy})):
                names = ", ".join(quoting.quote(name) for name in missing[:MAX_REPORTED_ROWS])
                raise ValueError(f"has masks of anatomy, but not of {names}")
            corners = [
                box | {"box": boxes.to_corners(box["box"], box["box_format"], shape)}
                for box in study.boxes
            ]
            phrases = annotations.build_phrases(corners, masks, self._findings, shape, image.shape)
            self._check_boxes(study, corners, phrases, shape)
            unknown_region = (0.0,) * 4
            regions = [
                boxes.scale_box(
                    boxes.to_corners(study.regions[name], self._region_format, shape),
                    shape,
                    image.shape,
                )
                if name in study.regions
                else unknown_region
                for name in self._region_names
            ]
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and faults.is_passing(error):
                # The row would be missing for good, and its file may be readable later.
                place = error.filename or self._root / study.path
                path_below = os.path.relpath(place, self._root)
                raise faults.name_unreadable(error, self._root, path_below) from None
            reason = getattr(error, "strerror", None) or str(error)
            return reason.splitlines()[0]
        for note in notes:
            self._notes[note].append(quoting.quote_path(study.path))
        return Record(
            image=image,
            text=study.text,
            patient_id=study.patient_id,
            labels=self._order_labels(study.labels),
            phrases=tuple(phrases),
            regions=np.asarray(regions, np.float32).reshape(-1, 4),
            anatomy={name: anatomy[name] for name in self._anatomy_names if anatomy},
            record_id=study.path,
            geometry=Geometry(shape),
        )

    def _read_masks(
        self,
        mask_paths: Mapping[str, str],
        number: int,
        shape: tuple[int, int],
        new_shape: tuple[int, int],
    ) -> dict[str, Bool[np.ndarray, "Y X"]]:
        """Reads the masks of a row by name, resized as its image."""
        masks = {}
        for name, path in mask_paths.items():
            full_path = self._resolve_path(path, number)
            if full_path.is_file():
                self._sources.add(self._root, full_path)
            else:
                self._add_absent(path)
            masks[name] = images.read_mask(full_path, shape, *new_shape)
            if note := images.describe_mask(masks[name]):
                self._notes[note].append(quoting.quote_path(path))
        return masks

    def _check_boxes(
        self,
        study: Study,
        corners: Sequence[Mapping[str, Any]],
        phrases: Sequence[Phrase],
        shape: tuple[int, int],
    ) -> None:
        """Notes boxes that are under a pixel after resizing, or that reach beyond their image."""
        name = quoting.quote_path(study.path)
        scaled = [box for phrase in phrases for box in phrase.boxes]
        if any(x1 - x0 < 1 or y1 - y0 < 1 for x0, y0, x1, y1 in scaled):
            self._tiny_boxes.append(name)
        # More than a rounding of coordinates: they may be of another size of the image.
        margin = max(2, MAX_OVERHANG * max(shape))
        if any(
            max(-x0, -y0, x1 - shape[1], y1 - shape[0]) > margin
            for x0, y0, x1, y1 in (item["box"] for item in corners)
        ):
            self._cut_boxes.append(name)
        if any(boxes.proves_corners(item["box"], shape) for item in corners):
            self._has_corner_proof = True

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
        if self._skipped:
            content = "\n".join(self._skipped) + "\n"
            (folder / SKIPPED_FILE).write_text(content, encoding="utf-8")
        self.messages = [
            *self._summary.lines,
            *self._describe_copies(),
            *images.summarise_notes(self._notes, self.builder_config.size),
        ]
        is_guess = self._has_unnamed_boxes and not self.builder_config.box_format
        if is_guess and not self._has_corner_proof:
            self.messages.append(
                "boxes are read as x0, y0, x1, y1, but would fit as x, y, width, height too: "
                f"set data.builder.box_format to {boxes.CORNERS} or {boxes.CORNER_AND_SIZE}"
            )
        noted_images: list[str] = []
        for names, fault in (
            (self._tiny_boxes, f"a box under a pixel at size {self.builder_config.size}"),
            (self._cut_boxes, "a box that reaches beyond the image and is cut"),
        ):
            if names:
                examples = ", ".join(sorted(names)[:MAX_REPORTED_ROWS])
                more = ", ..." if len(names) > MAX_REPORTED_ROWS else ""
                noted_images += [f"{name} ({fault})" for name in sorted(names)]
                verb = "has" if len(names) == 1 else "have"
                number = quoting.count(len(names), "image")
                self.messages.append(f"{number} {verb} {fault}: {examples}{more}")
        if noted_images:
            (folder / NOTED_FILE).write_text("\n".join(noted_images) + "\n", encoding="utf-8")
        if self._skipped:
            self.messages.append(
                f"skipped {len(self._skipped)} of {self._num_rows} rows: {self._list_skipped()}"
            )
        content = "\n".join(self.messages) + "\n"
        (folder / MESSAGES_FILE).write_text(content, encoding="utf-8")

    def _describe_copies(self) -> list[str]:
        """Returns a line on images of the same content under several names."""
        groups = self._sources.find_copies(self._split_of)
        if not groups:
            return []
        num_copies = sum(len(group) - 1 for group in groups)
        num_leaks = sum(len({self._split_of[path] for path in group}) > 1 for group in groups)
        first, second = (quoting.quote_path(path) for path in groups[0][:2])
        verb = "is a copy of another" if num_copies == 1 else "are copies of others"
        leaks = f"; {num_leaks} in two splits: keep one of them" if num_leaks else ""
        return [f"{quoting.count(num_copies, 'image')} {verb}, as {second} of {first}{leaks}"]

    def _list_skipped(self) -> str:
        num_hidden = len(self._skipped) - MAX_REPORTED_ROWS
        suffix = f" and {num_hidden} more" if num_hidden > 0 else ""
        return ", ".join(self._skipped[:MAX_REPORTED_ROWS]) + suffix

    def _check_cut_boxes(self) -> None:
        """Raises UserError if most boxes reach beyond their images."""
        num_cut = len(self._cut_boxes)
        if num_cut > max(2, self._num_with_boxes / 2):
            raise UserError(
                f"boxes reach beyond {num_cut} of {self._num_with_boxes} images, as "
                f"{min(self._cut_boxes)}; give boxes in pixels of these images, or name their "
                "format with data.builder.box_format"
            )

    def _check_skipped(self) -> None:
        """Raises UserError if more rows than `max_bad` cannot be used."""
        limit = self.builder_config.max_bad
        if len(self._skipped) > limit * self._num_rows:
            hint = f"; {self._path_hint}" if self._path_hint else ""
            raise UserError(
                f"{len(self._skipped)} of {self._num_rows} rows cannot be used, more than the "
                f"fraction max_bad {limit:g}: {self._list_skipped()}{hint}; fix them or raise "
                "max_bad"
            )

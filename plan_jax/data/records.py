"""Records of a split as evaluation reads them: decoded when they are accessed, and not kept."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from plan_jax.data import augmentation, transforms
from plan_jax.data.augmentation import Augmentation, Draw
from plan_jax.data.dataset import Dataset
from plan_jax.data.sections import sides
from plan_jax.types import Record, StoredRecords, UserError


class DatasetRecords(StoredRecords):
    """Some records of a split, fitted to a square."""

    def __init__(self, dataset: Dataset, size: int, indices: Sequence[int]) -> None:
        """Notes where the records are; nothing is read yet.

        Args:
          dataset: the split.
          size: side of the square that images and annotations are fitted to, in pixels.
          indices: those of the records in the split.
        """
        self.dataset = dataset
        self.size = size
        self.indices = indices
        self.shape = (size, size)
        self._columns: dict[str, list[Any]] = {}
        self._digest = ""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        return transforms.fit_record(self.dataset[self.indices[index]], self.size)

    def read_column(self, name: str) -> list[Any]:
        """Returns `labels` or a text of all records; decodes nothing else, and keeps it."""
        if name not in self._columns:
            self._columns[name] = [self.dataset.read_field(i, name) for i in self.indices]
        return self._columns[name]

    def read_image(self, index: int) -> UInt8[np.ndarray, "Y X 1"]:
        """Returns the image [Y X 1] of a record; decodes nothing else."""
        return transforms.fit_image(self.dataset.read_image(self.indices[index]), self.size)

    def read_annotations(self, index: int) -> Record:
        """Returns a record with a black image of the same shape, and decodes no image."""
        record = self.dataset.read_annotations(self.indices[index])
        return transforms.fit_record(record, self.size)

    def select(self, indices: Sequence[int]) -> "DatasetRecords":
        """Returns the records at some indices."""
        selection = DatasetRecords(self.dataset, self.size, [self.indices[i] for i in indices])
        for name, values in self._columns.items():
            selection._columns[name] = [values[i] for i in indices]
        return selection

    def augment(self, preset: str, draws: int, seed: int) -> "AugmentedRecords":
        """Returns all records `draws` times, one copy after the other, each image by its own draw.

        Raises:
          UserError: images are mirrored, and a finding has no counterpart on the other side.
        """
        rows = range(draws * len(self))
        return AugmentedRecords(self, augmentation.PRESETS[preset], seed, rows)

    def identify(self) -> str:
        """Returns a digest of the stored bytes of all records."""
        if not self._digest:
            digest = hashlib.blake2b(f"{self.size}".encode(), digest_size=16)
            for index in self.indices:
                digest.update(hashlib.blake2b(self.dataset.read_bytes(index)).digest())
            self._digest = digest.hexdigest()
        return self._digest


class AugmentedRecords(StoredRecords):
    """Augmented copies of records: a pure function of the seed, the record and the copy."""

    def __init__(
        self, records: DatasetRecords, augment: Augmentation, seed: int, rows: Sequence[int]
    ) -> None:
        """Notes what is to be augmented; nothing is read yet.

        Args:
          records: the N records.
          augment: the ranges of the draws.
          seed: seed of the draws.
          rows: row r is copy r // N of record r % N.

        Raises:
          UserError: images are mirrored, and a finding has no counterpart on the other side.
        """
        findings = records.dataset.findings
        self._has_sides = bool(augment.flip) and augmentation.have_sides(findings, "findings")
        self.records = records
        self.rows = rows
        self.shape = records.shape
        self._augment, self._seed = augment, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        return self._augment_record(self.records.dataset[self._index(index)], index)

    def read_column(self, name: str) -> list[Any]:
        """Returns `labels` or a text of all records, as they are of mirrored images."""
        column = self.records.read_column(name)
        values = [column[row % len(self.records)] for row in self.rows]
        if not (self._augment.flip if name == "text" else self._has_sides and name == "labels"):
            return values
        return [
            self._exchange_sides(value) if self._draw(index, (1, 1)).is_mirrored else value
            for index, value in enumerate(values)
        ]

    def read_image(self, index: int) -> UInt8[np.ndarray, "Y X 1"]:
        """Returns the augmented image [Y X 1] of a record; decodes nothing else."""
        image = self.records.dataset.read_image(self._index(index))
        sample = self._draw(index, image.shape[:2])
        return augmentation.change_grey(
            augmentation.warp_image(image, sample.matrix, self.records.size), sample
        )

    def read_annotations(self, index: int) -> Record:
        """Returns a record with a black image of the same shape, and decodes no image."""
        record = self.records.dataset.read_annotations(self._index(index))
        return self._augment_record(record, index)

    def select(self, indices: Sequence[int]) -> "AugmentedRecords":
        """Returns the records at some indices."""
        rows = [self.rows[index] for index in indices]
        return AugmentedRecords(self.records, self._augment, self._seed, rows)

    def augment(self, preset: str, draws: int, seed: int) -> "AugmentedRecords":
        """Raises ValueError: one draw is not made of another."""
        raise ValueError(f"{preset} of records that are augmented already")

    def identify(self) -> str:
        """Returns a digest of the stored bytes of all records and of how they are augmented."""
        return f"{self.records.identify()} {self._augment} {self._seed} {self.rows}"

    def _index(self, index: int) -> int:
        """Returns the place in the split of the record at an index."""
        return self.records.indices[self.rows[index] % len(self.records)]

    def _make_rng(self, index: int) -> np.random.Generator:
        copy = self.rows[index] // len(self.records)
        return np.random.default_rng((self._seed, self._index(index), copy))

    def _draw(self, index: int, shape: tuple[int, int]) -> Draw:
        """Returns the draw at an index; whether it is mirrored does not depend on the shape."""
        return augmentation.draw(self._augment, shape, self.records.size, self._make_rng(index))

    def _augment_record(self, record: Record, index: int) -> Record:
        dataset, rng = self.records.dataset, self._make_rng(index)
        return augmentation.augment_record(
            record, self._augment, self.records.size, rng, dataset.findings, dataset.region_names
        )

    def _exchange_sides(self, value: Any) -> Any:
        if isinstance(value, str):
            return sides.swap_sides(value)
        return augmentation.exchange_sides(value, self.records.dataset.findings, "findings")


def open_records(dataset: Dataset, limit: int | None, size: int) -> DatasetRecords:
    """Returns the first `limit` records of a split, fitted to a square of `size` pixels.

    Args:
      dataset: the split.
      limit: number of records (None: all).
      size: side of the square.

    Raises:
      UserError: if there are none.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 1:
        raise UserError(f"{count} records are too few to evaluate; raise the limit to at least 1")
    return DatasetRecords(dataset, size, range(count))

"""Records of a split as evaluation reads them: decoded when they are accessed, and not kept."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from plan_jax.data import transforms
from plan_jax.data.dataset import Dataset
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

    def identify(self) -> str:
        """Returns a digest of the stored bytes of all records."""
        if not self._digest:
            digest = hashlib.blake2b(f"{self.size}".encode(), digest_size=16)
            for index in self.indices:
                digest.update(hashlib.blake2b(self.dataset.read_bytes(index)).digest())
            self._digest = digest.hexdigest()
        return self._digest


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

"""Examples of heads: trees of arrays with one leading axis, in memory or on disk.

A leaf of `StoredRows` is read when it is indexed, a batch ahead of its use, and not kept. Functions
of examples run on the devices that `parallel.use_devices` has chosen.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int, PyTree, Shaped, UInt8

from plan_jax import parallel
from plan_jax.parallel import ExampleFunction as ExampleFunction
from plan_jax.parallel import count_parts as count_parts
from plan_jax.parallel import share_items as share_items
from plan_jax.types import Record, StoredRecords

CHUNK_SIZE = 64  # images that pass through an encoder at once
NUM_READERS = min(4, os.cpu_count() or 1)  # threads that decode; each reads a batch of its own

Item = TypeVar("Item")
Value = TypeVar("Value")


class StoredRows:
    """An array [N ...] on disk: `rows[indices]` reads those rows into memory, and keeps none.

    Attributes:
      shape: that of the array.
      dtype: that of the array.
      identify: returns a digest of the rows, without decoding them.
    """

    def __init__(
        self,
        read_row: Callable[[int], np.ndarray],
        indices: Sequence[int],
        shape: tuple[int, ...],
        dtype: Any,
        identify: Callable[[], str],
    ) -> None:
        """Notes where the rows are; nothing is read yet.

        Args:
          read_row: returns the row of an index, an array of shape [*shape].
          indices: those of the rows.
          shape: of a row.
          dtype: of a row.
          identify: returns a digest of all rows that `read_row` can read.
        """
        self.shape = (len(indices), *shape)
        self.dtype = np.dtype(dtype)
        self._read_row, self._indices, self._identify = read_row, indices, identify

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, indices: Any) -> Shaped[np.ndarray, "..."]:
        if isinstance(indices, int | np.integer):
            return self._read_row(self._indices[int(indices)])
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        for position, index in enumerate(indices):
            rows[position] = self._read_row(self._indices[int(index)])
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype)

    def select(self, indices: Sequence[int] | Int[np.ndarray, " M"]) -> "StoredRows":
        """Returns the rows at some indices, without reading them."""
        selection = [self._indices[int(index)] for index in indices]
        return StoredRows(self._read_row, selection, self.shape[1:], self.dtype, self._identify)

    def identify(self) -> str:
        """Returns a digest of the rows, without decoding them."""
        return f"{self._identify()} {list(self._indices)}"

    def identify_rows(self) -> list[str]:
        """Returns a text for each row that no other row has, without decoding them."""
        identity = self._identify()
        return [f"{identity} {index}" for index in self._indices]


Images = UInt8[np.ndarray, "N Y X 1"] | StoredRows


def open_images(records: Sequence[Record]) -> Images:
    """Returns the images of records [N Y X 1], on disk if the records are."""
    if not isinstance(records, StoredRecords):
        return np.stack([record.image for record in records])
    indices = range(len(records))
    return StoredRows(records.read_image, indices, (*records.shape, 1), np.uint8, records.identify)


def count_examples(examples: PyTree) -> int:
    """Returns the number of examples: the length of every array of a tree."""
    return len(jax.tree.leaves(examples)[0])


def take_examples(examples: PyTree, indices: Int[np.ndarray, " M"]) -> PyTree:
    """Returns the examples at `indices`; what is on disk stays there."""

    def take(leaf: Any) -> Any:
        return leaf.select(indices) if isinstance(leaf, StoredRows) else leaf[indices]

    return jax.tree.map(take, examples)


def read_examples(examples: PyTree, indices: Int[np.ndarray, " M"]) -> PyTree:
    """Returns the examples at `indices` in memory."""
    return jax.tree.map(lambda leaf: leaf[indices], examples)


def pad_examples(examples: PyTree, size: int) -> PyTree:
    """Returns `size` examples: those of a tree in memory, then copies of the last one."""
    count = count_examples(examples)
    if count == size:
        return examples
    return read_examples(examples, np.minimum(np.arange(size), count - 1))


def is_stored(examples: PyTree) -> bool:
    """Returns whether a part of the examples is on disk."""
    return any(isinstance(leaf, StoredRows) for leaf in jax.tree.leaves(examples))


def read_batches(examples: PyTree, batches: Sequence[Int[np.ndarray, " _"]]) -> Iterator[PyTree]:
    """Yields the examples of each batch of indices; what is on disk is read ahead by threads."""
    if is_stored(examples):
        return read_ahead(lambda indices: read_examples(examples, indices), batches)
    return (read_examples(examples, indices) for indices in batches)


def read_ahead(read: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
    """Yields `read(item)` of all items in order, while threads read the next ones."""
    if len(items) == 1:
        yield read(items[0])
        return
    readers = ThreadPoolExecutor(NUM_READERS)
    pending: deque[Future[Value]] = deque()
    try:
        for item in items:
            pending.append(readers.submit(read, item))
            if len(pending) > NUM_READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)


def list_batches(count: int, size: int) -> list[Int[np.ndarray, " _"]]:
    """Returns the indices of `count` examples in batches of `size`; the last one may be smaller.

    >>> [batch.tolist() for batch in list_batches(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def map_chunks(
    function: Callable[[PyTree], PyTree], examples: PyTree, size: int = CHUNK_SIZE
) -> PyTree:
    """Applies a function to examples in chunks, padding the last one, and joins the results.

    All chunks have the same size, so a jitted function is compiled once for any number of examples.
    On D devices a chunk has `size` examples for each of them, or `size` in all where there are
    fewer than D such chunks: at most two sizes. Each of several hosts takes its part of the
    examples, and all get all results.

    Args:
      function: of a chunk, as `ExampleFunction.bind` returns it.
      examples: the examples.
      size: that of a chunk on one device.
    """
    num_examples, num_devices = count_examples(examples), parallel.num_devices_in_use()
    own = parallel.own_examples(num_examples)
    if len(own) < num_devices * size:
        size, num_units = -(-size // num_devices) * num_devices, 1
    else:
        num_units = num_devices
    # Each unit is read by a thread, whatever the number of devices.
    units = list_batches(len(own), size)
    reader = read_batches(examples, [own[unit] for unit in units])
    results: PyTree = None
    for first in range(0, len(units), num_units):
        parts = list(islice(reader, num_units))
        chunk = parts[0] if len(parts) == 1 else jax.tree.map(_join, *parts)
        values = jax.device_get(function(pad_examples(chunk, num_units * size)))
        if results is None:
            # Filled in place: joining a list of chunks would hold everything twice.
            results = jax.tree.map(
                lambda part: np.empty((len(own), *part.shape[1:]), part.dtype), values
            )
        start, count = first * size, count_examples(chunk)
        for array, part in zip(jax.tree.leaves(results), jax.tree.leaves(values), strict=True):
            array[start : start + count] = part[:count]
    return parallel.join_examples(results, num_examples)


def _join(*parts: Any) -> Any:
    return np.concatenate(parts)


def share_batches(
    compute: Callable[[Int[np.ndarray, " _"]], Any], count: int, size: int
) -> list[Any]:
    """Returns `compute(indices)` of batches of `count` examples, which hosts share.

    Args:
      compute: returns a tree of dicts and lists with arrays, numbers, texts and bytes.
      count: the number of examples.
      size: the largest size of a batch; several hosts take smaller ones where some would have none.
    """
    batches = list_batches(count, max(1, min(size, -(-count // count_parts()))))
    if count_parts() == 1:
        return [compute(batch) for batch in batches]
    numbers = range(len(batches))
    by_host = share_items(numbers, lambda own: {str(n): compute(batches[n]) for n in own})
    results = {int(name): result for part in by_host for name, result in part.items()}
    return [results[n] for n in numbers]

"""Examples on disk: which rows are read, when, and how many are in memory."""

import weakref

import numpy as np
import pytest

from plan_jax.heads import examples
from plan_jax.types import UserError

COUNT = 50


@pytest.fixture
def rows():
    """Returns rows on disk, row n holding n, and the list of indices that were read."""
    read = []

    def read_row(index):
        read.append(index)
        return np.full((2, 3), index, np.uint8)

    stored = examples.StoredRows(read_row, range(COUNT), (2, 3), np.uint8, lambda: "rows")
    return stored, read


def test_rows_are_read_when_they_are_indexed(rows):
    stored, read = rows
    assert stored.shape == (COUNT, 2, 3) and stored.dtype == np.uint8 and len(stored) == COUNT
    assert stored[7].tolist() == [[7] * 3] * 2
    assert stored[np.array([4, 2])][:, 0, 0].tolist() == [4, 2]
    assert stored[:3].shape == (3, 2, 3) and stored[:0].shape == (0, 2, 3)
    assert read == [7, 4, 2, 0, 1, 2]
    part = stored.select(np.array([9, 8, 8])).select([2, 0])
    assert read == [7, 4, 2, 0, 1, 2]
    assert np.asarray(part)[:, 0, 0].tolist() == [8, 9]
    assert np.asarray(part, np.float32).dtype == np.float32
    assert part.identify() != stored.select([9, 8]).identify()


def test_a_selection_of_a_tree_stays_on_disk(rows):
    stored, read = rows
    tree = {"image": stored, "label": np.arange(COUNT), "none": None}
    assert examples.is_stored(tree) and not examples.is_stored({"label": tree["label"]})
    part = examples.take_examples(tree, np.array([5, 6]))
    assert isinstance(part["image"], examples.StoredRows) and read == []
    batch = examples.read_examples(part, np.array([1]))
    assert batch["image"][0, 0, 0] == batch["label"][0] == 6 and read == [6]
    padded = examples.pad_examples(batch, 3)
    assert padded["label"].tolist() == [6] * 3 and read == [6]


def test_batches_are_read_ahead_in_order_and_no_further(rows):
    stored, read = rows
    batches = examples.list_batches(COUNT, 4)
    for number, batch in enumerate(examples.read_batches({"image": stored}, batches)):
        np.testing.assert_array_equal(batch["image"][:, 0, 0], batches[number])
        ahead = number + 1 + examples.NUM_READERS
        assert len(read) <= 4 * ahead, f"{len(read)} rows are read before batch {number}"
    assert sorted(read) == list(range(COUNT))


def test_chunks_on_disk_give_what_arrays_give_and_are_not_kept(rows):
    stored, read = rows
    live: list[weakref.ref] = []
    most = []

    def function(chunk):
        assert chunk.shape == (8, 2, 3)
        live.append(weakref.ref(chunk))
        most.append(sum(reference() is not None for reference in live))
        return {"sum": chunk.sum((1, 2), dtype=np.int64), "first": chunk[:, 0].astype(np.float32)}

    results = examples.map_chunks(function, stored, 8)
    assert sorted(read) == list(range(COUNT))
    assert max(most) <= 2  # the one that is processed, and the one before
    expected = examples.map_chunks(function, np.asarray(stored), 8)
    assert results.keys() == expected.keys()
    for name, array in results.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def test_a_row_that_cannot_be_read_ends_the_batches():
    def read_row(index):
        if index == 9:
            raise UserError("record 9 is damaged")
        return np.zeros(1, np.uint8)

    stored = examples.StoredRows(read_row, range(COUNT), (1,), np.uint8, lambda: "")
    with pytest.raises(UserError, match="record 9 is damaged"):
        list(examples.read_batches(stored, examples.list_batches(COUNT, 4)))

"""Records on disk: tasks get the results of lists from them, and hold few images at a time."""

import threading
import weakref

import numpy as np
import pytest
from fake_models import FINDINGS, SIZE, make_model, make_oracle, make_random_scores, make_records
from fitted_heads import make_tower
from records import ANATOMY_NAMES, are_equal, make_record

from plan_jax.data import schema
from plan_jax.data.dataset import Dataset
from plan_jax.data.records import DatasetRecords, open_records
from plan_jax.heads import examples
from plan_jax.tasks import classification, grounding, retrieval, segmentation, zero_shot
from plan_jax.types import (
    EvalData,
    Features,
    Model,
    Record,
    TaskContext,
    UserError,
    read_annotations,
    read_column,
    select_records,
)

BLOCK = 16
# A batch for each thread that reads ahead, one in use, and one that has just been used.
MOST_IMAGES = BLOCK + 2 * examples.NUM_READERS


class CountingDataset(Dataset):
    """Counts the decoded images that are in memory, and the largest number of them.

    `decoded` are those that were read alone: the type checker of the tests reads whole records.
    """

    live = most = decoded = 0
    lock = threading.Lock()

    def _count(self, image):
        with self.lock:
            self.live += 1
            self.most = max(self.most, self.live)
        # A view may be gone while the pixels are still in use.
        weakref.finalize(image if image.base is None else image.base, self._forget)

    def _forget(self):
        with self.lock:
            self.live -= 1

    def __getitem__(self, index):
        record = super().__getitem__(index)
        self._count(record.image)
        return record

    def read_image(self, index):
        image = super().read_image(index)
        self._count(image)
        self.decoded += 1
        return image


def store(records, anatomy_names=("lung",), size=SIZE):
    """Returns the records as if they were on disk."""
    serialised = [schema.serialize(record) for record in records]
    dataset = CountingDataset(serialised, FINDINGS, anatomy_names)
    return open_records(dataset, None, size)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(grounding, "RECORD_BLOCK", BLOCK)
    monkeypatch.setattr(retrieval, "IMAGE_BLOCK", BLOCK)
    monkeypatch.setattr(zero_shot, "IMAGE_BLOCK", BLOCK)


def make_block_model(score):
    """Returns `fake_models.make_model` reading images a batch at a time, as a real model does."""
    model = make_model(score=score)
    codes = {}

    def encode_batch(images):
        index = [codes.setdefault(image.tobytes(), len(codes)) for image in images]
        return Features(np.float32(index)[:, None], np.zeros((len(index), 1, 1)), None)

    def encode_image(images):
        return examples.map_chunks(encode_batch, images, 4)

    def similarity(images, texts):
        names = list(codes)
        real = model.encode_image(
            np.stack([_decode(names[int(i)]) for i in images.pooled[:, 0].tolist()])
        )
        return model.similarity(real, texts)

    return Model("fake", model.grid, 0, SIZE, encode_image, model.encode_text, similarity, None)


def _decode(content):
    return np.frombuffer(content, np.uint8).reshape(SIZE, SIZE, 1)


# Records --------------------------------------------------------------------------------------


def test_a_stored_record_is_the_record_and_its_annotations_need_no_image():
    expected = [make_record(number) for number in range(4)]
    records = store(expected, ANATOMY_NAMES, size=32)
    assert records.shape == (32, 32) and len(records) == 4
    record = records[2]
    assert record.image.shape == (32, 32, 1) and record.phrases[0].mask.shape == (32, 32)
    np.testing.assert_array_equal(records.read_image(2), record.image)
    assert records.dataset.decoded == 1
    (*_, annotations, _) = read_annotations(records)
    assert not annotations.image.any() and annotations.image.shape == (32, 32, 1)
    blank = Record(**{**vars(record), "image": annotations.image})
    assert are_equal(annotations, blank) and annotations.geometry == record.geometry
    assert read_column(records, "text") == [record.text for record in expected]
    assert read_column(records, "patient_id") == [record.patient_id for record in expected]
    labels = np.stack(read_column(records, "labels"))
    np.testing.assert_array_equal(labels, [record.labels for record in expected])
    assert labels.dtype == np.int8 and records.dataset.decoded == 1


def test_a_selection_of_stored_records():
    records = store([make_record(number) for number in range(6)], ANATOMY_NAMES)
    patients = read_column(records, "patient_id")
    part = select_records(select_records(records, [5, 1, 0]), [0, 2])
    assert isinstance(part, DatasetRecords) and len(part) == 2
    assert read_column(part, "patient_id") == [patients[5], patients[0]]
    assert part[0].labels.tolist() == records[5].labels.tolist()
    assert [record.patient_id for record in part] == [patients[5], patients[0]]
    assert records.dataset.live == 0
    assert part.identify() != records.identify() == records.select(range(6)).identify()
    with pytest.raises(UserError, match="0 records are too few .*; raise the limit"):
        open_records(records.dataset, 0, SIZE)
    assert len(open_records(records.dataset, 4, SIZE)) == 4


# Tasks ----------------------------------------------------------------------------------------


def run(task, model, records, options, **splits):
    data = EvalData(findings=FINDINGS, test=records, **splits)
    return task.evaluate(model, data, options, TaskContext(seed=3))


def test_retrieval_holds_few_images_and_ranks_as_from_lists(small_blocks, monkeypatch):
    records = make_records(70)
    score, options = make_random_scores(), retrieval.Options(bootstrap_samples=4)
    expected = run(retrieval, make_model(score=score), records, options)
    for kept_bytes in (2**20, 0):  # with tables that are kept, and with those computed twice
        monkeypatch.setattr(retrieval, "KEPT_BYTES", kept_bytes)
        stored = store(records)
        result = run(retrieval, make_block_model(score), stored, options)
        assert result.metrics == expected.metrics
        assert [row.retrieved for row in result.rows] == [row.retrieved for row in expected.rows]
        del result
        assert stored.dataset.most <= MOST_IMAGES and stored.dataset.live == 0
        assert stored.dataset.decoded == 70


def test_zero_shot_holds_few_images_and_scores_as_from_lists(small_blocks):
    records = make_records(70)
    prompts = {name: ([f"{name}", f"a {name}"], [f"no {name}"]) for name in FINDINGS}
    score, options = make_random_scores(), zero_shot.Options(bootstrap_samples=4, validate=True)
    splits = {"prompts": prompts, "validation": records[:40]}
    expected = run(zero_shot, make_model(score=score), records, options, **splits)
    stored = store(records)
    splits["validation"] = stored.select(range(40))
    result = run(zero_shot, make_block_model(score), stored, options, **splits)
    assert result.metrics == expected.metrics and "f1_macro" in result.metrics
    assert stored.dataset.most <= MOST_IMAGES
    assert stored.dataset.decoded == 70 + 40


def test_grounding_holds_a_block_of_records_and_scores_as_from_lists(small_blocks):
    records, training = make_records(60), make_records(20, seed=1)
    model, options = make_model(make_oracle(records)), grounding.Options(bootstrap_samples=4)
    expected = run(grounding, model, records, options, prior_records=training)
    stored = store(records)
    result = run(grounding, model, stored, options, prior_records=store(training))
    assert result.metrics == expected.metrics and "mean_phrase/pointing" in result.metrics
    for row, reference in zip(result.rows, expected.rows, strict=True):
        np.testing.assert_array_equal(row.truth, reference.truth)
        np.testing.assert_array_equal(row.image, reference.image)
    # Its block, the next one while it is read, and the examples.
    assert stored.dataset.most <= 2 * BLOCK + MOST_IMAGES


def test_classification_holds_few_images_and_fits_as_from_lists():
    random = np.random.default_rng(0)
    records = []
    for number in range(200):
        labels = random.integers(0, 2, 2)
        image = random.integers(0, 120, (4, 4, 1)).astype(np.uint8) + 100 * labels[0]
        records.append(Record(image.astype(np.uint8), "", str(number), labels.astype(np.int8)))
    options = classification.Options(fractions=(1.0,), epochs=2, batch=8, bootstrap_samples=4)
    model = Model("net", (2, 2), 0, 4, None, None, None, None, tower=make_tower())
    splits = {"train": records[:120], "val": records[120:150]}
    expected = run(classification, model, records[150:], options, **splits)
    stored = store(records, size=4)
    splits = {"train": stored.select(range(120)), "val": stored.select(range(120, 150))}
    result = run(classification, model, stored.select(range(150, 200)), options, **splits)
    assert result.metrics == expected.metrics
    # Decoded images are copied into a batch at once.
    assert stored.dataset.most <= MOST_IMAGES
    assert stored.dataset.decoded == 200 + 2  # two more for the shapes of the head


def test_masks_on_disk_are_those_of_lists():
    records = make_records(9)
    targets = ("lungs", "findings", FINDINGS[1])
    expected = segmentation.open_masks(records, targets, FINDINGS)
    stored = store(records)
    split = segmentation.open_masks(stored, targets, FINDINGS)
    np.testing.assert_array_equal(np.asarray(split.masks), expected.masks)
    assert stored.dataset.decoded == 0
    np.testing.assert_array_equal(np.asarray(split.images), expected.images)

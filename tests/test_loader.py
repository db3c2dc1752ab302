"""Records to disk and back, and batches as a pure function of (seed, step)."""

import json
import time

import chex
import grain
import jax
import numpy as np
import pytest

from plan_jax.data import dataset as datasets
from plan_jax.data import loader, schema
from plan_jax.data import tokenizer as tokenization
from plan_jax.types import Phrase, Record, UserError

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] . no effusion heart is normal lungs are clear a b c d e f"
SENTENCES = ("No effusion.", "Heart is normal.", "Lungs are clear.")
REGIONS = ("left lung", "heart", "right lung")
COUNT, BATCH = 26, 4


def record(i, y=20, x=24):
    image = np.full((y, x, 1), i, np.uint8)
    mask = np.zeros((y, x), bool)
    mask[2:5, 3 : 9 + i % 5] = True
    return Record(
        image=image,
        text=" ".join(SENTENCES),
        patient_id=f"patient {i // 2}",
        labels=np.asarray([i % 2, -1], np.int8),
        phrases=(
            Phrase("no effusion", 0, "effusion|", "effusion", ((1.0, 2.0, 3.5, 4.0),), mask),
            Phrase("heart", boxes=((0.0, 0.0, 4.0, 4.0), (2.0, 2.0, 8.0, 8.0))),
        ),
        anatomy={"lung": mask, "heart": ~mask},
        triplets=(("left lung", "effusion", 0), ("", "é", 1)),
        regions=np.asarray([[12, 2, 20, 18], [8, 9, 16, 17], [0, 0, 0, 0]], np.float32),
    )


@pytest.fixture(scope="module")
def dataset():
    source = [schema.serialize(record(i)) for i in range(COUNT)]
    return datasets.Dataset(source, ("effusion", "oedema"), ("lung", "heart"), REGIONS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY.split()) + "\n")
    return tokenization.load_tokenizer(str(path))


@pytest.fixture
def batches(dataset, tokenizer):
    made = []

    def make(**changed):
        options = dict(batch=BATCH, size=24, length=16, words=10, seed=3, extra=("labels",))
        made.append(loader.train_batches(dataset, tokenizer, **options | changed))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def same(ours, theirs):
    chex.assert_trees_all_equal(ours, theirs)


def studies(batch):
    """The images of `record` are all of one grey, their number."""
    return [int(image[12, 12, 0]) for image in batch.image]


def test_a_record_comes_back_as_it_was(dataset):
    for i in (0, 7, -1):
        ours, theirs = record(i % COUNT), dataset[i]
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert theirs.labels.dtype == np.int8
        assert (ours.text, ours.patient_id, ours.triplets) == (
            theirs.text,
            theirs.patient_id,
            theirs.triplets,
        )
        for p, q in zip(ours.phrases, theirs.phrases, strict=True):
            assert (p.text, p.finding, p.key, p.bare) == (q.text, q.finding, q.key, q.bare)
            assert p.boxes == q.boxes
        np.testing.assert_array_equal(ours.phrases[0].mask, theirs.phrases[0].mask)
        assert theirs.phrases[1].mask is None
        assert list(theirs.anatomy) == ["lung", "heart"]
        np.testing.assert_array_equal(ours.anatomy["heart"], theirs.anatomy["heart"])
        np.testing.assert_array_equal(ours.regions, theirs.regions)


def test_a_record_of_which_nothing_is_known_comes_back():
    bare = Record(np.zeros((3, 5), np.uint8), "x")
    found = datasets.Dataset([schema.serialize(bare)], (), ("lung",))[0]
    assert found.image.shape == (3, 5, 1)
    assert (found.phrases, found.anatomy, found.triplets) == ((), {}, ())
    assert (found.labels.shape, found.regions.shape) == ((0,), (0, 4))


def test_training_reads_image_text_and_labels_only(dataset):
    kept = datasets.Dataset(dataset.source, keep=True)
    for each in (dataset, kept):
        row, whole = each.image_text(5), dataset[5]
        np.testing.assert_array_equal(row.image, whole.image)
        np.testing.assert_array_equal(row.labels, whole.labels)
        assert row.text == whole.text
    assert kept.image_text(5) is kept.image_text(5)
    with pytest.raises(ValueError, match="read-only"):
        kept.image_text(5).image[0] = 1


def test_a_record_beyond_the_end_is_named(dataset):
    with pytest.raises(IndexError, match=f"record {COUNT} of {COUNT}"):
        dataset[COUNT]
    assert len(list(dataset)) == COUNT


def test_a_batch_has_the_fields_of_the_step(batches):
    batch = next(batches())
    extra = batch.extra
    arrays = {"image": batch.image, **vars(batch.text), **extra}
    kinds = {name: (value.shape, value.dtype.name) for name, value in arrays.items()}
    assert kinds == {
        "image": ((4, 24, 24, 1), "uint8"),
        "tokens": ((4, 16), "int32"),
        "word_index": ((4, 16), "int32"),
        "word_id": ((4, 10), "int32"),
        "sentence": ((4, 10), "int32"),
        "labels": ((4, 2), "int8"),
    }
    assert next(batches(extra=())).extra == {}
    np.testing.assert_array_equal(extra["labels"][:, 0], np.asarray(studies(batch)) % 2)


def test_regions_follow_the_image_and_their_words_the_sentences(batches, dataset):
    batch = next(batches(extra=("regions", "region_words"), shift=2))
    boxes, said = batch.extra["regions"] * 24, batch.extra["region_words"]
    given = dataset[0].regions[:2] + np.asarray([0, 2, 0, 2])  # a row of 20 x 24, padded to 24 x 24
    shifts = boxes[:, :2] - given
    np.testing.assert_allclose(shifts, shifts.round(), atol=1e-4)
    assert np.abs(shifts).max() <= 2 and len(np.unique(shifts[:, 0].round(), axis=0)) > 1
    np.testing.assert_allclose(shifts[:, 0], shifts[:, 1], atol=1e-4)
    assert (boxes[:, 2, 2] <= boxes[:, 2, 0]).all(), "an unknown region has become a box"
    vocabulary = VOCABULARY.split()
    for b in range(BATCH):
        for word, *marked in zip(batch.text.word_id[b], *said[b], strict=True):
            about = {"heart": {1}, "is": {1}, "normal": {1}}.get(vocabulary[word], {0, 2})
            assert set(np.flatnonzero(marked)) == (about if word else set())


def test_an_epoch_is_a_permutation_without_repeats(batches):
    iterator = batches()
    whole = COUNT // BATCH
    epochs = [sum((studies(next(iterator)) for _ in range(whole)), []) for _ in range(6)]
    for epoch in epochs:
        assert len(set(epoch)) == whole * BATCH
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(COUNT))


def test_shards_are_disjoint_and_cover_the_epoch_of_one_process(batches):
    one = batches(batch=13)
    halves = [batches(batch=1, shard=(k, 13)) for k in range(13)]
    for _ in range(4):
        whole = next(one)
        parts = [next(half) for half in halves]
        assert studies(whole) == [study for part in parts for study in studies(part)]
        same(whole, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))
    everyone = studies(next(one)) + studies(next(one))
    assert sorted(everyone) == list(range(COUNT))


def test_the_seed_decides(batches):
    first, again, other = next(batches()), next(batches()), next(batches(seed=4))
    same(first, again)
    assert studies(first) != studies(other)


def test_a_study_is_moved_and_its_sentences_shuffled_anew_each_epoch(dataset, tokenizer):
    one = datasets.Dataset(dataset.source[:1])
    iterator = loader.train_batches(
        one, tokenizer, batch=1, size=24, length=16, words=10, seed=0, shift=2
    )
    seen = [next(iterator) for _ in range(20)]
    assert len({batch.text.tokens.tobytes() for batch in seen}) > 3
    iterator.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(batches, workers):
    alone, apart = batches(), batches(workers=workers)
    for _ in range(workers):
        next(alone)
    apart.set_state(json.loads(json.dumps(alone.get_state())))
    for _ in range(8):  # into the second epoch
        same(next(alone), next(apart))
    assert apart.get_state() == alone.get_state()


def test_the_state_continues_in_the_middle_of_an_epoch(batches):
    iterator = batches()
    for _ in range(8):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(5)]
    for fresh in (batches(), iterator):
        fresh.set_state(state)
        fresh.start_prefetch()
        for batch in expected:
            same(batch, next(fresh))
    assert fresh.get_state()["step"] == 13


def test_the_state_holds_for_another_number_of_processes(batches):
    whole = batches(batch=8)
    next(whole)
    half = batches(batch=4, shard=(1, 2))
    half.set_state(whole.get_state())
    assert studies(next(half)) == studies(next(whole))[1::2]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"batch": 5}])
def test_a_state_of_other_data_is_refused(batches, changed):
    (name,) = changed
    with pytest.raises(UserError, match=f"trained with {name}"):
        batches(**changed).set_state(batches().get_state())


def test_it_is_an_iterator_of_grain(batches):
    iterator = batches()
    assert isinstance(iterator, grain.DatasetIterator)
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 27}, "batch 27 does not fit a dataset of 26 pairs"),
        ({"batch": 14, "shard": (0, 2)}, "batch 28 does not fit"),
        ({"batch": 0}, "batch 0 does not fit"),
        ({"extra": ("boxes",)}, "extra 'boxes' is unknown; the data can add labels, regions"),
        ({"length": 2}, "length 2"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_mistakes_are_named(batches, changed, message):
    with pytest.raises(UserError, match=message):
        batches(**changed)


def test_a_text_without_words_names_its_study(dataset, tokenizer):
    odd = datasets.Dataset([schema.serialize(Record(np.zeros((8, 8), np.uint8), "..."))])
    iterator = loader.train_batches(odd, tokenizer, batch=1, size=8, length=8, words=4, seed=0)
    with pytest.raises(UserError, match="text 0 has no word"):
        next(iterator)


def test_records_are_read_for_evaluation(dataset):
    found = loader.records(dataset, 3, size=32)
    assert [r.image.shape for r in found] == [(32, 32, 1)] * 3
    assert found[0].phrases[0].mask.shape == (32, 32)
    assert len(loader.records(dataset)) == COUNT
    with pytest.raises(UserError, match="0 records"):
        loader.records(dataset, 0)


def test_the_step_hardly_waits(dataset, tokenizer):
    """A kept batch of 32 at 96 px costs the consumer's thread far less than 5 ms of CPU."""
    source = [schema.serialize(record(i, 96, 96)) for i in range(64)]
    kept = datasets.Dataset(source, keep=True)
    iterator = loader.train_batches(kept, tokenizer, batch=32, size=96, length=64, words=48, seed=0)
    for _ in range(4):
        next(iterator)
    spent = []
    for _ in range(10):
        start = time.thread_time()
        next(iterator)
        spent.append(time.thread_time() - start)
    iterator.close()
    assert min(spent) < 5e-3

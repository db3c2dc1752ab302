"""Training batches as a pure function of (seed, step), and records for evaluation."""

import dataclasses
import json
import time

import chex
import grain
import jax
import numpy as np
import pytest
from records import ANATOMY_NAMES, FINDINGS, REGION_NAMES, make_record

from plan_jax.data import loader, schema
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.augmentation import PRESETS
from plan_jax.data.dataset import Dataset
from plan_jax.types import Record, UserError

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] . no effusion heart is normal lungs are clear a b c d e f"
NUM_RECORDS, BATCH_SIZE = 26, 4


@pytest.fixture(scope="module")
def dataset():
    source = [schema.serialize(make_record(number)) for number in range(NUM_RECORDS)]
    return Dataset(source, FINDINGS, ANATOMY_NAMES, REGION_NAMES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY.split()) + "\n")
    return tokenization.load_tokenizer(str(path))


@pytest.fixture
def make_batches(dataset, tokenizer):
    iterators = []

    def make(**changes):
        options = dict(
            batch_size=BATCH_SIZE, size=24, max_tokens=16, max_words=10, seed=3, extra=("labels",)
        )
        iterators.append(loader.train_batches(dataset, tokenizer, **options | changes))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def study_numbers(batch):
    """Returns the numbers of a batch's records, which are the grey values of their images."""
    return [int(image[12, 12, 0]) for image in batch.image]


# Content of a batch -------------------------------------------------------------------------


def test_texts_that_are_cut_are_counted(dataset, tokenizer):
    texts = [dataset.read_text(index) for index in range(NUM_RECORDS)]
    sentences = [tokenizer.tokenize_sentences(text) for text in texts]
    num_words = [sum(len(sentence.word_id) for sentence in text) for text in sentences]
    num_pieces = [sum(len(sentence.tokens) for sentence in text) for text in sentences]
    longest, most = max(num_words), max(num_pieces) + 2
    assert loader.describe_lengths(dataset, tokenizer, most, longest) == []
    for limits in ((most, longest - 1), (most - 1, longest)):
        (sentence,) = loader.describe_lengths(dataset, tokenizer, *limits)
        count = sum(
            pieces + 2 > limits[0] or words > limits[1]
            for pieces, words in zip(num_pieces, num_words, strict=True)
        )
        assert sentence.startswith(f"{count} of {NUM_RECORDS} sampled texts exceed") and count > 0


def test_a_batch_has_the_fields_of_the_step(make_batches):
    batch = next(make_batches())
    extra = batch.extra
    arrays = {"image": batch.image, **vars(batch.text), **extra}
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    assert shapes == {
        "image": ((4, 24, 24, 1), "uint8"),
        "tokens": ((4, 16), "int32"),
        "word_index": ((4, 16), "int32"),
        "word_id": ((4, 10), "int32"),
        "sentence": ((4, 10), "int32"),
        "labels": ((4, 2), "int8"),
    }
    assert next(make_batches(extra=())).extra == {}
    np.testing.assert_array_equal(extra["labels"][:, 0], np.asarray(study_numbers(batch)) % 2)


def test_regions_follow_the_image_and_their_words_the_sentences(make_batches, dataset):
    batch = next(make_batches(extra=("regions", "region_words"), max_shift=2))
    boxes, region_words = batch.extra["regions"] * 24, batch.extra["region_words"]
    # An image of 20 x 24 pixels is padded by 2 rows to 24 x 24.
    unshifted = dataset[0].regions[:2] + np.asarray([0, 2, 0, 2])
    shifts = boxes[:, :2] - unshifted
    np.testing.assert_allclose(shifts, shifts.round(), atol=1e-4)
    assert np.abs(shifts).max() <= 2 and len(np.unique(shifts[:, 0].round(), axis=0)) > 1
    np.testing.assert_allclose(shifts[:, 0], shifts[:, 1], atol=1e-4)
    assert (boxes[:, 2, 2] <= boxes[:, 2, 0]).all(), "an unknown region has become a box"
    vocabulary = VOCABULARY.split()
    for b in range(BATCH_SIZE):
        for word, *marks in zip(batch.text.word_id[b], *region_words[b], strict=True):
            regions = {"heart": {1}, "is": {1}, "normal": {1}}.get(vocabulary[word], {0, 2})
            assert set(np.flatnonzero(marks)) == (regions if word else set())


def test_a_caption_rule_draws_by_position(tokenizer):
    sections = {"findings": "No effusion. Heart is normal.", "impression": "Lungs are clear."}
    record = dataclasses.replace(make_record(0), sections=sections)
    captioned = Dataset([schema.serialize(record)] * 4, caption="convirt")
    options = dict(batch_size=4, size=24, max_tokens=16, max_words=10)
    first, again = (loader.train_batches(captioned, tokenizer, seed=1, **options) for _ in range(2))
    batches = [next(first) for _ in range(6)]
    assert all(batch.text.sentence.max() == 0 for batch in batches), "more than one sentence"
    drawn = {tuple(row) for batch in batches for row in batch.text.tokens.tolist()}
    assert len(drawn) == 3
    chex.assert_trees_all_equal(batches, [next(again) for _ in range(6)])
    for iterator in (first, again):
        iterator.close()


# Order --------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_without_repeats(make_batches):
    iterator = make_batches()
    num_batches = NUM_RECORDS // BATCH_SIZE
    epochs = [
        sum((study_numbers(next(iterator)) for _ in range(num_batches)), []) for _ in range(6)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == num_batches * BATCH_SIZE
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(NUM_RECORDS))


def test_shards_are_disjoint_and_cover_the_epoch_of_one_process(make_batches):
    single_process = make_batches(batch_size=13)
    processes = [make_batches(batch_size=1, shard=(index, 13)) for index in range(13)]
    for _ in range(4):
        expected = next(single_process)
        parts = [next(process) for process in processes]
        numbers = [number for part in parts for number in study_numbers(part)]
        assert study_numbers(expected) == numbers
        joint = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        chex.assert_trees_all_equal(expected, joint)
    epoch = study_numbers(next(single_process)) + study_numbers(next(single_process))
    assert sorted(epoch) == list(range(NUM_RECORDS))


def test_the_seed_decides(make_batches):
    first, again = next(make_batches()), next(make_batches())
    different_seed = next(make_batches(seed=4))
    chex.assert_trees_all_equal(first, again)
    assert study_numbers(first) != study_numbers(different_seed)


def test_shifts_and_sentence_orders_differ_between_epochs(dataset, tokenizer):
    single_study = Dataset(dataset.source[:1])
    iterator = loader.train_batches(
        single_study,
        tokenizer,
        batch_size=1,
        size=24,
        max_tokens=16,
        max_words=10,
        seed=0,
        max_shift=2,
    )
    batches = [next(iterator) for _ in range(20)]
    assert len({batch.text.tokens.tobytes() for batch in batches}) > 3
    iterator.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make_batches, workers):
    without_workers = make_batches(augment=PRESETS["convirt"])
    with_workers = make_batches(augment=PRESETS["convirt"], workers=workers)
    for _ in range(workers):
        next(without_workers)
    with_workers.set_state(json.loads(json.dumps(without_workers.get_state())))
    for _ in range(8):  # into the second epoch
        chex.assert_trees_all_equal(next(without_workers), next(with_workers))
    assert with_workers.get_state() == without_workers.get_state()


# State --------------------------------------------------------------------------------------


def test_the_state_continues_in_the_middle_of_an_epoch(make_batches):
    iterator = make_batches()
    for _ in range(8):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(5)]
    for resumed in (make_batches(), iterator):
        resumed.set_state(state)
        resumed.start_prefetch()
        for batch in expected:
            chex.assert_trees_all_equal(batch, next(resumed))
    assert resumed.get_state()["step"] == 13


def test_the_state_is_valid_for_another_number_of_processes(make_batches):
    single_process = make_batches(batch_size=8)
    next(single_process)
    second_of_two = make_batches(batch_size=4, shard=(1, 2))
    second_of_two.set_state(single_process.get_state())
    assert study_numbers(next(second_of_two)) == study_numbers(next(single_process))[1::2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "trained with seed 3, now it is 4; .*new workdir"),
        ({"batch_size": 5}, "trained with batch 4, now it is 5; .*new workdir"),
    ],
)
def test_a_state_of_another_order_is_refused(make_batches, changes, message):
    with pytest.raises(UserError, match=message):
        make_batches(**changes).set_state(make_batches().get_state())


def test_it_is_an_iterator_of_grain(make_batches):
    iterator = make_batches()
    assert isinstance(iterator, grain.DatasetIterator)
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


# Mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 27}, "batch 27 does not fit a dataset of 26 pairs; use 1 to 26"),
        ({"batch_size": 14, "shard": (0, 2)}, "batch 28 does not fit .*; use 1 to 26 over all"),
        ({"batch_size": 0}, "batch 0 does not fit .*; use 1 to 26"),
        ({"extra": ("boxes",)}, "field 'boxes' is unknown; use labels, regions, region_words"),
        ({"max_tokens": 2}, "data.max_tokens must be >= 3, .* got 2, 10 and 3"),
        ({"max_words": 0}, "data.max_words >= 1 .* got 16, 0 and 3"),
        ({"seed": -1}, "seed >= 0; got 16, 10 and -1"),
    ],
)
def test_mistakes_are_named(make_batches, changes, message):
    with pytest.raises(UserError, match=message):
        make_batches(**changes)


def test_a_split_of_one_pair_needs_rows(dataset, tokenizer):
    options = dict(batch_size=4, size=24, max_tokens=16, max_words=10, seed=3)
    with pytest.raises(UserError, match="batch 4 does not fit a dataset of 1 pair; add rows"):
        loader.train_batches(Dataset(dataset.source[:1]), tokenizer, **options)


def test_a_missing_annotation_names_its_column(dataset, tokenizer):
    bare = Dataset(dataset.source, name="pairs")
    for name, column in (("labels", "labels"), ("region_words", "regions")):
        message = f"batches need {name}, which dataset 'pairs' does not .*columns=.*'{column}'"
        with pytest.raises(UserError, match=message):
            loader.train_batches(
                bare,
                tokenizer,
                batch_size=1,
                size=24,
                max_tokens=16,
                max_words=10,
                seed=0,
                extra=(name,),
            )


def test_a_text_without_words_names_its_study(tokenizer):
    wordless = Dataset([schema.serialize(Record(np.zeros((8, 8), np.uint8), "..."))])
    iterator = loader.train_batches(
        wordless, tokenizer, batch_size=1, size=8, max_tokens=8, max_words=4, seed=0
    )
    with pytest.raises(UserError, match="text 0 has no word; drop that row"):
        next(iterator)


# Records and speed --------------------------------------------------------------------------


def test_texts_that_the_tokenizer_does_not_know_are_refused_before_training(tokenizer):
    record = dataclasses.replace(make_record(1), text="\u80f8\u8154\u79ef\u6db2\u3002")
    foreign = Dataset([schema.serialize(record)] * 2, name="pairs")
    with pytest.raises(
        UserError, match="100% .* dataset 'pairs' are unknown to .*data.tokenizer to"
    ):
        loader.check_texts(foreign, tokenizer)
    known = Dataset([schema.serialize(make_record(number)) for number in range(3)])
    assert loader.check_texts(known, tokenizer) < 0.3


def test_the_step_hardly_waits(tokenizer):
    """A cached batch of 32 at 96 px costs the consumer's thread far less than 5 ms of CPU."""
    source = [schema.serialize(make_record(number, 96, 96)) for number in range(64)]
    cached = Dataset(source, cache=True)
    iterator = loader.train_batches(
        cached, tokenizer, batch_size=32, size=96, max_tokens=64, max_words=48, seed=0
    )
    for _ in range(4):
        next(iterator)
    seconds = []
    for _ in range(10):
        start = time.thread_time()
        next(iterator)
        seconds.append(time.thread_time() - start)
    iterator.close()
    assert min(seconds) < 5e-3

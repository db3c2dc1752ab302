"""Records survive serialisation, whatever annotations they have."""

import numpy as np
import pytest
from PIL import Image
from records import ANATOMY_NAMES, make_record

from plan_jax.data import schema
from plan_jax.types import Record


@pytest.mark.parametrize("number", [0, 7, 25])
def test_a_record_survives_serialisation(number):
    expected = make_record(number)
    actual = schema.deserialize(schema.serialize(expected), ANATOMY_NAMES)
    np.testing.assert_array_equal(actual.image, expected.image)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    assert actual.labels.dtype == np.int8
    assert (actual.text, actual.patient_id, actual.triplets) == (
        expected.text,
        expected.patient_id,
        expected.triplets,
    )
    for phrase, reference in zip(actual.phrases, expected.phrases, strict=True):
        assert (phrase.text, phrase.finding, phrase.key, phrase.bare, phrase.boxes) == (
            reference.text,
            reference.finding,
            reference.key,
            reference.bare,
            reference.boxes,
        )
    np.testing.assert_array_equal(actual.phrases[0].mask, expected.phrases[0].mask)
    assert actual.phrases[1].mask is None
    assert list(actual.anatomy) == ["lung", "heart"]
    np.testing.assert_array_equal(actual.anatomy["heart"], expected.anatomy["heart"])
    np.testing.assert_array_equal(actual.regions, expected.regions)


def test_a_record_without_annotations_survives_serialisation():
    bare = Record(np.zeros((3, 5), np.uint8), "x")
    actual = schema.deserialize(schema.serialize(bare), ("lung",))
    assert actual.image.shape == (3, 5, 1)
    assert (actual.phrases, actual.anatomy, actual.triplets) == ((), {}, ())
    assert (actual.labels.shape, actual.regions.shape) == ((0,), (0, 4))


def test_a_pair_is_the_part_of_a_record_that_training_reads():
    record = make_record(5)
    pair = schema.deserialize_pair(schema.serialize(record))
    np.testing.assert_array_equal(pair.image, record.image)
    np.testing.assert_array_equal(pair.labels, record.labels)
    np.testing.assert_array_equal(pair.regions, record.regions)
    assert pair.text == record.text


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (31, 40)])
def test_a_stored_image_is_what_it_was(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    encoded = schema.encode_png(image)
    with Image.open(encoded) as picture:
        picture.verify()
    with Image.open(encoded) as picture:
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), image)

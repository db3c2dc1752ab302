"""Targets of grounding: truths, merged phrases, mean masks and null maps."""

import numpy as np
import pytest

from plan_jax.tasks.grounding_targets import (
    Target,
    collect_targets,
    fit_priors,
    null_maps,
    truth_mask,
)
from plan_jax.types import Phrase, Record


def make_mask(*pixels, size=(4, 4)):
    """Returns a mask that is true at these (row, column) pixels."""
    mask = np.zeros(size, bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


def make_record(*phrases, anatomy=None):
    return Record(np.zeros((4, 4, 1), np.uint8), "", phrases=phrases, anatomy=anatomy or {})


def test_the_truth_of_boxes_is_their_union_by_pixel_centres():
    phrase = Phrase("x", boxes=((0, 0, 2, 1), (1.4, 0, 2.6, 1.6), (3, 3, 9, 9), (2, 2, 2, 2)))
    expected = make_mask((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (3, 3))
    np.testing.assert_array_equal(truth_mask(phrase, (4, 4)), expected)


def test_a_mask_takes_precedence_over_boxes_and_has_the_size_of_the_image():
    phrase = Phrase("x", boxes=((0, 0, 4, 4),), mask=make_mask((1, 1)).astype(np.uint8))
    np.testing.assert_array_equal(truth_mask(phrase, (4, 4)), make_mask((1, 1)))
    with pytest.raises(ValueError, match=r"phrase 'x' is \(4, 4\) on an image of \(8, 8\); fit"):
        truth_mask(phrase, (8, 8))


def test_phrases_with_the_same_words_are_one_target_and_unusable_truths_are_counted():
    left, right = make_mask((0, 3)), make_mask((0, 0))
    everywhere = np.ones((4, 4), bool)
    targets, skipped = collect_targets(
        [
            make_record(Phrase("Fluid  left", 0, mask=left), Phrase("fluid left", 0, mask=right)),
            make_record(Phrase("nowhere", 0), Phrase("all over", 0, mask=everywhere)),
            make_record(Phrase("fluid left", 1, mask=left)),
        ]
    )
    assert [(target.record_index, target.finding) for target in targets] == [(0, 0), (2, 1)]
    np.testing.assert_array_equal(targets[0].truth, left | right)
    assert skipped == 2


def test_a_bare_phrase_is_true_wherever_its_finding_is():
    left, right, centre = make_mask((0, 3)), make_mask((0, 0)), make_mask((2, 2))
    base = make_mask((3, 3))
    phrases = (
        Phrase("fluid left", 0, bare="fluid", mask=left),
        Phrase("fluid right", 0, bare="Fluid", mask=right),
        Phrase("water at the base", 0, bare="water", mask=base),
        Phrase("nodule", 1, bare="nodule", mask=centre),
        Phrase("something", 2, mask=centre),
    )
    targets, skipped = collect_targets([make_record(*phrases)], bare=True)
    assert [target.text.lower() for target in targets] == ["fluid", "water", "nodule"]
    for target in targets[:2]:
        np.testing.assert_array_equal(target.truth, left | right | base)
    np.testing.assert_array_equal(targets[2].truth, centre)
    assert skipped == 0


def test_priors_are_means_of_training_masks():
    anatomy = {
        "right lung": make_mask((1, 0)),
        "left lung": make_mask((1, 3)),
        "heart": make_mask((2, 2)),
    }
    priors = fit_priors(
        [
            make_record(
                Phrase("fluid left", 0, "fluid|left", mask=make_mask((0, 3))),
                Phrase("fluid right", 0, "fluid|right", mask=make_mask((0, 0))),
                anatomy=anatomy,
            ),
            make_record(Phrase("left fluid", 0, "fluid|left", mask=make_mask((0, 2)))),
        ]
    )
    np.testing.assert_array_equal(priors.lung, make_mask((1, 0), (1, 3)))
    mean_left = (make_mask((0, 3)) / 2 + make_mask((0, 2)) / 2).astype(np.float32)
    np.testing.assert_array_equal(priors.phrase["fluid|left"], mean_left)
    np.testing.assert_array_equal(priors.phrase["fluid|right"], make_mask((0, 0)))
    np.testing.assert_array_equal(priors.finding[0], mean_left + make_mask((0, 0)) / 2)


def test_a_phrase_without_a_key_has_no_mean_mask():
    priors = fit_priors([make_record(Phrase("fluid", 0, mask=make_mask((0, 0))))])
    assert not priors.phrase and list(priors.finding) == [0] and priors.lung is None


def test_null_maps_fall_back_from_phrase_to_finding_to_lungs_to_centre():
    anatomy = {"lungs": make_mask((1, 0))}
    phrase = Phrase("a", 0, "a|left", mask=make_mask((0, 3)))
    priors = fit_priors([make_record(phrase, anatomy=anatomy)])
    truth = make_mask((0, 0))
    targets = [Target(0, "a", 0, key, truth) for key in ("a|left", "a|right")]
    targets += [Target(0, "b", 1, "b|left", truth)]
    sizes = {"size": (4, 4), "grid": (2, 2)}
    banks = null_maps(targets, priors, **sizes)
    maps = {name: bank.maps[bank.index] for name, bank in banks.items()}
    assert list(maps) == ["random", "centre", "prior", "mean_finding", "mean_phrase"]
    assert maps["random"].shape == (3, 2, 2)
    expected = [make_mask((0, 3)), make_mask((0, 3)), make_mask((1, 0))]
    np.testing.assert_array_equal(maps["mean_phrase"], expected)
    np.testing.assert_array_equal(maps["mean_finding"], expected)
    np.testing.assert_array_equal(maps["prior"], [make_mask((1, 0))] * 3)
    centre = maps["centre"][0]
    np.testing.assert_allclose(centre, centre[::-1, ::-1])
    assert centre[1, 1] == centre.max()
    assert list(null_maps(targets, None, **sizes)) == ["random", "centre"]
    assert "mean_phrase" not in null_maps(targets, priors, **sizes, bare=True)
    without_lungs = null_maps(targets, fit_priors([make_record()]), **sizes)
    assert "prior" not in without_lungs
    np.testing.assert_array_equal(without_lungs["mean_finding"].maps[0], centre)

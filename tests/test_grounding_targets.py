"""Where phrases are true, what is asked, and the maps that know less."""

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


def mask(*pixels, size=(4, 4)):
    """A mask that is true at the given (row, column) places."""
    drawn = np.zeros(size, bool)
    for place in pixels:
        drawn[place] = True
    return drawn


def record(*phrases, anatomy=None):
    return Record(np.zeros((4, 4, 1), np.uint8), "", phrases=phrases, anatomy=anatomy or {})


def test_boxes_are_drawn_as_their_union_by_pixel_centres():
    phrase = Phrase("x", boxes=((0, 0, 2, 1), (1.4, 0, 2.6, 1.6), (3, 3, 9, 9), (2, 2, 2, 2)))
    expected = mask((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (3, 3))
    expected[1, 0] = False
    np.testing.assert_array_equal(truth_mask(phrase, (4, 4)), expected)


def test_a_mask_goes_before_boxes_and_has_the_size_of_the_image():
    phrase = Phrase("x", boxes=((0, 0, 4, 4),), mask=mask((1, 1)).astype(np.uint8))
    np.testing.assert_array_equal(truth_mask(phrase, (4, 4)), mask((1, 1)))
    with pytest.raises(ValueError, match=r"mask of phrase 'x' is \(4, 4\) on an image of \(8, 8\)"):
        truth_mask(phrase, (8, 8))


def test_same_words_are_one_phrase_and_unusable_truths_are_counted():
    left, right = mask((0, 3)), mask((0, 0))
    asked, skipped = collect_targets(
        [
            record(Phrase("Fluid  left", 0, mask=left), Phrase("fluid left", 0, mask=right)),
            record(Phrase("nowhere", 0), Phrase("all over", 0, mask=np.ones((4, 4), bool))),
            record(Phrase("fluid left", 1, mask=left)),
        ]
    )
    assert [(t.record_index, t.finding) for t in asked] == [(0, 0), (2, 1)]
    np.testing.assert_array_equal(asked[0].truth, left | right)
    assert skipped == 2


def test_a_bare_phrase_is_true_wherever_its_finding_is():
    left, right, other = mask((0, 3)), mask((0, 0)), mask((2, 2))
    phrases = (
        Phrase("fluid left", 0, bare="fluid", mask=left),
        Phrase("fluid right", 0, bare="Fluid", mask=right),
        Phrase("water at the base", 0, bare="water", mask=mask((3, 3))),
        Phrase("nodule", 1, bare="nodule", mask=other),
        Phrase("something", 2, mask=other),
    )
    asked, skipped = collect_targets([record(*phrases)], bare=True)
    assert [t.text.lower() for t in asked] == ["fluid", "water", "nodule"]
    for target in asked[:2]:
        np.testing.assert_array_equal(target.truth, left | right | mask((3, 3)))
    np.testing.assert_array_equal(asked[2].truth, other)
    assert skipped == 0


def test_priors_are_means_of_training():
    lungs = {"right lung": mask((1, 0)), "left lung": mask((1, 3)), "heart": mask((2, 2))}
    priors = fit_priors(
        [
            record(
                Phrase("fluid left", 0, "fluid|left", mask=mask((0, 3))),
                Phrase("fluid right", 0, "fluid|right", mask=mask((0, 0))),
                anatomy=lungs,
            ),
            record(Phrase("left fluid", 0, "fluid|left", mask=mask((0, 2)))),
        ]
    )
    np.testing.assert_array_equal(priors.lung, mask((1, 0), (1, 3)))
    half = (mask((0, 3)) / 2 + mask((0, 2)) / 2).astype(np.float32)
    np.testing.assert_array_equal(priors.phrase["fluid|left"], half)
    np.testing.assert_array_equal(priors.phrase["fluid|right"], mask((0, 0)))
    np.testing.assert_array_equal(priors.finding[0], half + mask((0, 0)) / 2)


def test_null_maps_fall_back_from_phrase_to_finding_to_lungs_to_centre():
    lungs = {"lungs": mask((1, 0))}
    train = [record(Phrase("a", 0, "a|left", mask=mask((0, 3))), anatomy=lungs)]
    truth = mask((0, 0))
    asked = [Target(0, "a", 0, key, truth) for key in ("a|left", "a|right")]
    asked += [Target(0, "b", 1, "b|left", truth)]
    size = {"size": (4, 4), "grid": (2, 2)}
    nulls = null_maps(asked, fit_priors(train), **size)
    maps = {name: m.maps[m.index] for name, m in nulls.items()}
    assert list(maps) == ["random", "centre", "prior", "mean_finding", "mean_phrase"]
    assert maps["random"].shape == (3, 2, 2)
    expected = [mask((0, 3)), mask((0, 3)), mask((1, 0))]
    np.testing.assert_array_equal(maps["mean_phrase"], expected)
    np.testing.assert_array_equal(maps["mean_finding"], expected)
    np.testing.assert_array_equal(maps["prior"], [mask((1, 0))] * 3)
    centre = maps["centre"][0]
    np.testing.assert_allclose(centre, centre[::-1, ::-1])
    assert centre[1, 1] == centre.max()
    assert list(null_maps(asked, None, **size)) == ["random", "centre"]
    assert "mean_phrase" not in null_maps(asked, fit_priors(train), **size, bare=True)
    without = null_maps(asked, fit_priors([record()]), **size)
    assert "prior" not in without
    np.testing.assert_array_equal(without["mean_finding"].maps[0], centre)

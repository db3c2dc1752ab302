"""Grounding by BioViL's protocol: crop, several boxes, smoothing; each against literal loops."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.tasks import grounding
from plan_jax.types import Features, Model, Phrase, Record, UserError

SIZE, GRID = 32, (8, 8)
FINDINGS = ("nodule", "pleural effusion")
BIOVIL = grounding.Options(crop=448 / 512, smooth=1.5)
CROP = grounding.Options(crop=0.75)  # rows and columns 4 to 27


def make_model(seen=None, rounds=0):
    """A model whose map is the brightness of what it sees, in blocks of 4 x 4 pixels."""

    def see(images):
        if seen is not None:
            seen.append(images)
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(flat, flat[:, None], np.ones((len(flat), 1), bool))

    def read(texts):
        return Features(np.zeros((len(texts), 1), np.float32), np.zeros((len(texts), 1, 1)), None)

    def heatmap(shown, words, rounds=None):
        maps = shown.pooled.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 1, 64)
        return maps * (1 if rounds is None else 1 + rounds), np.ones((len(maps), 1), np.float32)

    return Model("fake", GRID, rounds, SIZE, see, read, None, heatmap)


def record(*phrases, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 1), np.uint8)
    return Record(image, "report", str(seed), phrases=phrases)


def inside_box(box):
    drawn = np.zeros((SIZE, SIZE), bool)
    for y in range(SIZE):
        for x in range(SIZE):
            drawn[y, x] = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
    return drawn


def cnr(heat, truth):
    """Signed CNR of a map; pixels that are NaN count on neither side."""
    a, b = heat[truth], heat[~truth]
    return (np.nanmean(a) - np.nanmean(b)) / np.sqrt(np.nanvar(a) + np.nanvar(b))


def brightness(image, side=SIZE):
    small = image.reshape(8, 4, 8, 4).astype(np.float64).mean((1, 3))
    return grounding_metrics.upsample(small[None], (side, side))[0].astype(np.float64)


def test_each_box_is_scored_without_the_pixels_of_those_before():
    boxes = ((2, 2, 12, 12), (8, 8, 20, 14), (3, 3, 7, 7), (22, 18, 30, 30))  # the third is covered
    mask = np.zeros((SIZE, SIZE), bool)
    mask[24:30, 2:14] = True
    one = record(
        Phrase("Two  spots", 0, boxes=boxes[:3]),
        Phrase("two spots", 0, boxes=boxes[3:]),
        Phrase("two spots", 0, mask=mask),
        Phrase("two spots", 1, boxes=((0, 0, 5, 5),)),
    )
    values, _ = grounding.score_phrases(make_model(), [one], findings=FINDINGS)
    heat, found, union = brightness(one.image), [], np.zeros((SIZE, SIZE), bool)
    for part in [*map(inside_box, boxes), mask]:
        union |= part
        if np.isfinite(heat[part]).any():
            found.append(cnr(heat, part))
        heat[part] = np.nan
    assert len(found) == 4 and min(found) < 0 < max(found)
    assert values["nodule/cnr_boxes_signed"] == pytest.approx(np.mean(found), abs=1e-4)
    assert values["nodule/cnr_boxes_abs"] == pytest.approx(np.mean(np.abs(found)), abs=1e-4)
    whole = cnr(brightness(one.image), union)
    assert values["nodule/cnr_signed"] == pytest.approx(whole, abs=1e-4)
    assert abs(whole - np.mean(found)) > 1e-2
    other = "pleural_effusion/cnr"
    assert values[f"{other}_boxes_signed"] == pytest.approx(values[f"{other}_signed"])
    macro = (values["nodule/cnr_boxes_abs"] + values[f"{other}_boxes_abs"]) / 2
    assert values["cnr_boxes_abs"] == pytest.approx(macro)
    assert "random/cnr_boxes_abs" in values and "random/nodule/cnr_boxes_abs" not in values


def test_bare_phrases_have_the_boxes_of_their_finding():
    boxes = ((2, 2, 12, 12), (18, 16, 30, 30))
    one = record(*(Phrase(f"spot {i}", 0, bare="spot", boxes=(b,)) for i, b in enumerate(boxes)))
    values, _ = grounding.score_phrases(make_model(), [one], findings=FINDINGS)
    heat = brightness(one.image)
    first = cnr(heat, inside_box(boxes[0]))
    heat[inside_box(boxes[0])] = np.nan
    found = [first, cnr(heat, inside_box(boxes[1]))]
    assert values["bare/n"] == 1 and values["n"] == 2
    assert values["bare/cnr_boxes_signed"] == pytest.approx(np.mean(found), abs=1e-4)
    assert values["cnr_boxes_signed"] == pytest.approx(values["cnr_signed"])


def test_every_category_has_every_score():
    phrases = Phrase("a", 0, boxes=((2, 2, 12, 12),)), Phrase("b", 0, boxes=((9, 9, 30, 20),))
    records = [record(*phrases), record(Phrase("c", 1, boxes=((16, 3, 28, 19),)), seed=1)]
    values, _ = grounding.score_phrases(make_model(rounds=1), records, findings=FINDINGS)
    for key in ("cnr_abs", "miou_raw", "miou_minmax", "miou_z", "cnr_signed", "pointing"):
        two = values[f"nodule/{key}"], values[f"pleural_effusion/{key}"]
        assert values[key] == pytest.approx(np.mean(two))
        assert values[f"micro/{key}"] == pytest.approx(np.average(two, weights=(2, 1)))
    signed = [cnr(brightness(records[0].image), inside_box(p.boxes[0])) for p in phrases]
    assert values["nodule/cnr_abs"] == pytest.approx(np.mean(np.abs(signed)), abs=1e-4)
    assert np.isfinite(list(values.values())).all()


def test_a_crop_is_what_one_does_by_hand():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[0:14, 20:32] = True
    phrases = (
        Phrase("partly", 0, bare="x", boxes=((0, 0, 14, 12), (10, 9, 20.6, 15))),
        Phrase("masked", 1, bare="y", mask=mask),
        Phrase("away", 0, bare="x", boxes=((0, 0, 4, 32), (5, 28.4, 30, 32))),
        Phrase("filling", 1, bare="y", boxes=((3, 3, 29, 29),)),
        Phrase("nowhere", 1, bare="z"),
    )
    records, seen = [record(*phrases, seed=s) for s in (0, 1)], []
    values, cases = grounding.score_phrases(
        make_model(seen), records, findings=FINDINGS, options=CROP
    )
    assert values["n"] == 4 and values["outside"] == 2 and values["skipped"] == 4
    assert values["bare/outside"] == 0  # their finding is seen elsewhere
    found = {"partly": [], "masked": []}
    for one, given in zip(records, seen[0], strict=True):
        part = Image.fromarray(one.image[4:28, 4:28, 0]).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(given[..., 0], np.asarray(part))
        heat = brightness(np.asarray(part), side=24)
        truth = inside_box(phrases[0].boxes[0]) | inside_box(phrases[0].boxes[1])
        found["partly"].append(cnr(heat, truth[4:28, 4:28]))
        found["masked"].append(cnr(heat, mask[4:28, 4:28]))
    for name, some in found.items():
        assert [c.cnr for c in cases if c.text == name] == pytest.approx(some, abs=1e-4)
    assert values["nodule/cnr_signed"] == pytest.approx(np.mean(found["partly"]), abs=1e-4)
    assert {case.truth.shape for case in cases} == {(24, 24)}
    rows = grounding.illustrate(
        make_model(), records, cases, options=dataclasses.replace(CROP, num_examples=2)
    )
    assert len(rows) == 4
    for row in rows:
        assert row.image.shape == (24, 24, 1) and row.truth.shape == (24, 24)
        large = grounding_metrics.upsample(row.heat_maps[:1], (24, 24))[0]
        assert row.cnr == pytest.approx(cnr(large.astype(np.float64), row.truth), abs=1e-4)


def test_a_model_that_looks_at_the_centre_of_what_it_sees():
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    image[12:20, 12:20] = 200
    phrase = Phrase("spot", 0, boxes=((12, 12, 20, 20),))
    one = Record(image, "", phrases=(phrase,))
    for share in (1.0, 0.5):
        options = grounding.Options(crop=share)
        values, cases = grounding.score_phrases(
            make_model(), [one], findings=FINDINGS, options=options
        )
        assert values["pointing"] == 1 and values["cnr_signed"] > 2
        assert values["centre/pointing"] == 1 and cases[0].truth.sum() == 64
    corner = Phrase("spot", 0, boxes=((0, 0, 3, 3),))
    values, cases = grounding.score_phrases(
        make_model(), [Record(image, "", phrases=(corner,))], findings=FINDINGS, options=CROP
    )
    assert not cases and values == {
        f"{prefix}{key}": float(key == "outside" and not prefix)
        for prefix in ("", "bare/")
        for key in ("n", "skipped", "outside")
    }


def test_priors_are_cut_as_the_images_are():
    known = np.random.default_rng(5).random((SIZE, SIZE)).astype(np.float32)
    priors = grounding.Priors(known, {0: known**2}, {"k": known**3})
    one = record(Phrase("a", 0, "k", boxes=((6, 6, 15, 20),)))
    values, _ = grounding.score_phrases(
        make_model(), [one], findings=FINDINGS, priors=priors, options=CROP
    )
    truth = inside_box((6, 6, 15, 20))[4:28, 4:28]
    for null, power in (("prior", 1), ("mean_finding", 2), ("mean_phrase", 3)):
        expected = cnr((known**power)[4:28, 4:28].astype(np.float64), truth)
        assert values[f"{null}/cnr_signed"] == pytest.approx(expected, abs=1e-4)


def smoothed(heat, sigma):
    """A Gaussian of four sigma on either side, the map mirrored at its border."""
    reach = int(4 * sigma + 0.5)
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight /= weight.sum()
    wide, out = np.pad(heat, reach, mode="symmetric"), np.zeros(heat.shape)
    for y in range(heat.shape[0]):
        for x in range(heat.shape[1]):
            part = wide[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            out[y, x] = weight @ part @ weight
    return out


def test_maps_and_noise_are_smoothed_on_the_grid():
    one = record(Phrase("a", 0, boxes=((6, 6, 15, 20),)))
    truth = inside_box((6, 6, 15, 20))
    options = grounding.Options(smooth=1.5)
    values, cases = grounding.score_phrases(
        make_model(rounds=1), [one], findings=FINDINGS, options=options, seed=3
    )
    small = one.image.reshape(8, 4, 8, 4).astype(np.float64).mean((1, 3))
    noise = np.random.default_rng(3).random((1, *GRID), np.float32)[0]
    heats = {"": small, "round1/": 2 * small, "random/": noise.astype(np.float64)}
    for prefix, heat in heats.items():
        large = grounding_metrics.upsample(smoothed(heat, 1.5)[None], (SIZE, SIZE))[0]
        assert values[f"{prefix}cnr_signed"] == pytest.approx(cnr(large, truth), abs=1e-3)
    row = grounding.illustrate(make_model(), [one], cases, options=options)[0]
    np.testing.assert_allclose(row.heat_maps[0], smoothed(small, 1.5), rtol=1e-4)


def test_what_is_not_finite_shows_through_boxes_and_smoothing():
    one = record(Phrase("a", 0, boxes=((2, 2, 9, 9), (12, 12, 20, 20))))
    model = make_model()
    nothing = lambda shown, words, rounds=None: (  # noqa: E731
        np.full((len(shown.pooled), 1, 64), np.nan),
        np.ones((len(shown.pooled), 1)),
    )
    broken = Model("fake", GRID, 0, SIZE, model.encode_image, model.encode_text, None, nothing)
    values, _ = grounding.score_phrases(broken, [one], findings=FINDINGS, options=BIOVIL)
    assert np.isnan([values[k] for k in ("cnr_boxes_signed", "cnr_boxes_abs", "miou_z")]).all()


def test_options_out_of_range_are_refused():
    for wrong in ({"crop": 0.0}, {"crop": 1.1}, {"smooth": -1.0}, {"smooth": float("nan")}):
        with pytest.raises(
            UserError, match="crop must be above 0 and at most 1, and grounding.smooth at least 0"
        ):
            grounding.Options(**wrong)

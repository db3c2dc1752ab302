"""Phrase grounding: known models, a literal loop, and BioViL's crop, boxes and smoothing."""

import dataclasses

import numpy as np
import pytest
from fake_models import FINDINGS, GRID, SIZE, make_model, make_oracle, make_records
from PIL import Image
from task_runs import run_task

from configs.eval import ms_cxr_grounding
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.tasks import grounding
from plan_jax.tasks.grounding_targets import Priors, fit_priors
from plan_jax.types import EvalData, Features, Model, Phrase, Record, TaskContext, UserError

CROP = grounding.Options(crop=0.75)  # rows and columns 4 to 27
BIOVIL = grounding.Options(crop=480 / 512, smooth=1.5)


# Known models ------------------------------------------------------------------------------------


def test_an_oracle_is_above_every_null_map():
    records = make_records(60)
    priors = fit_priors(make_records(80, seed=1))
    metrics, phrases = grounding.score_phrases(
        make_model(make_oracle(records)), records, FINDINGS, priors=priors
    )
    for prefix in ("", "bare/"):
        assert metrics[f"{prefix}cnr_signed"] > 3
        assert metrics[f"{prefix}pointing"] > 0.95
        assert metrics[f"{prefix}miou_z"] > 0.5
        for null in ("random", "centre", "prior", "mean_finding"):
            for key in ("cnr_signed", "pointing", "miou_z", "miou_minmax"):
                assert metrics[f"{prefix}{null}/{key}"] < metrics[prefix + key]
    assert metrics["miou_raw"] == pytest.approx(metrics["miou_minmax"], abs=0.05)
    nulls = [metrics[f"{null}/cnr_signed"] for null in ("random", "mean_finding", "mean_phrase")]
    assert nulls == sorted(nulls)
    assert "bare/mean_phrase/cnr_signed" not in metrics
    assert len(phrases) == metrics["n"] == sum(len(record.phrases) for record in records)
    assert metrics["cnr_signed_low"] < metrics["cnr_signed"] < metrics["cnr_signed_high"]
    assert np.isfinite(list(metrics.values())).all()


def test_noise_scores_as_chance():
    records, random = make_records(200), np.random.default_rng(0)
    model = make_model(lambda *_: random.normal(size=GRID))
    metrics, phrases = grounding.score_phrases(model, records, FINDINGS)
    share = np.mean([phrase.truth.mean() for phrase in phrases])
    assert abs(metrics["cnr_signed"]) < 0.12 < metrics["cnr_abs"]
    assert metrics["pointing"] == pytest.approx(share, abs=0.04)
    assert metrics["random/cnr_signed"] == pytest.approx(0, abs=0.12)


def test_constant_maps_score_zero_and_point_at_the_truths_share():
    records = make_records(20)
    model = make_model(lambda *_: np.full(GRID, 0.3))
    metrics, phrases = grounding.score_phrases(model, records, FINDINGS)
    assert metrics["cnr_signed"] == metrics["miou_z"] == metrics["miou_minmax"] == 0
    share = np.mean([phrase.truth.mean() for phrase in phrases])
    assert metrics["micro/pointing"] == pytest.approx(share)
    assert metrics["cnr_signed_low"] == metrics["cnr_signed_high"] == 0


def test_metrics_are_those_of_a_literal_loop():
    records, random = make_records(30), np.random.default_rng(1)
    maps = {}

    def noise(image, text, rounds):
        return maps.setdefault((image, text), random.normal(size=GRID))

    metrics, phrases = grounding.score_phrases(make_model(noise), records, FINDINGS)
    cnr_of = {name: [] for name in FINDINGS}
    for record in records:
        for phrase in record.phrases:
            small = maps[record.image.tobytes(), phrase.text].astype(np.float32)
            large = grounding_metrics.upsample(small[None], (SIZE, SIZE))[0]
            inside, outside = large[phrase.mask], large[~phrase.mask]
            cnr = (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
            cnr_of[FINDINGS[phrase.finding]].append(cnr)
    for name in FINDINGS:
        key = name.replace(" ", "_")
        assert metrics[f"{key}/cnr_signed"] == pytest.approx(np.mean(cnr_of[name]), abs=1e-4)
    macro = np.mean([np.mean(values) for values in cnr_of.values()])
    assert metrics["cnr_signed"] == pytest.approx(macro, abs=1e-4)
    all_cnr = sum(cnr_of.values(), [])
    assert metrics["micro/cnr_signed"] == pytest.approx(np.mean(all_cnr), abs=1e-4)
    np.testing.assert_allclose(sorted(phrase.cnr for phrase in phrases), sorted(all_cnr), atol=1e-4)


def test_every_round_is_scored():
    records = make_records(30)
    truth, random = make_oracle(records), np.random.default_rng(0)

    def heat_map(image, text, rounds):
        noise = {0: 2.0, 1: 0.5, 2: 0.0, None: 0.0}[rounds]
        return truth(image, text, rounds) + noise * random.normal(size=GRID)

    metrics, _ = grounding.score_phrases(make_model(heat_map, rounds=2), records, FINDINGS)
    for prefix in ("", "bare/"):
        rounds = [metrics[f"{prefix}round{t}/cnr_signed"] for t in range(3)]
        assert rounds[0] < rounds[1] < rounds[2]
        assert rounds[2] == pytest.approx(metrics[f"{prefix}cnr_signed"])


def test_chunks_have_one_size_and_a_text_is_encoded_once():
    records, log = make_records(150), []
    model = make_model(make_oracle(records), log=log)
    metrics, _ = grounding.score_phrases(model, records, FINDINGS)
    assert metrics["n"] > grounding.CHUNK
    assert {content for call, content in log if call == "heatmap"} == {grounding.CHUNK}
    encoded = [texts for call, texts in log if call == "encode_text"]
    assert encoded and all(len(texts) == len(set(texts)) for texts in encoded)


def test_a_model_that_diverged_scores_nan():
    model = make_model(lambda *_: np.full(GRID, np.nan))
    metrics, _ = grounding.score_phrases(model, make_records(10), FINDINGS)
    assert np.isnan([metrics["cnr_signed"], metrics["pointing"], metrics["miou_z"]]).all()


def test_a_map_that_is_not_finite_is_counted():
    records = make_records(10)
    finite = make_oracle(records)

    lost = records[0].phrases[0].text

    def heatmap(image, text, rounds):
        return np.full(GRID, np.nan) if text == lost else finite(image, text, rounds)

    metrics, phrases = grounding.score_phrases(make_model(heatmap), records, FINDINGS)
    num_lost = sum(phrase.text == lost for phrase in phrases)
    assert metrics["not_finite"] == num_lost > 0 and np.isnan(metrics["pointing"])
    assert np.isfinite(metrics["wrong_side"]) and "bare/not_finite" not in metrics


def test_records_without_phrases_have_counts_only():
    records = make_records(3)
    model = make_model(make_oracle(records))
    records = [dataclasses.replace(record, phrases=()) for record in records]
    metrics, examples = run_task(
        grounding, model, {"test": records}, grounding.Options(), findings=FINDINGS
    )
    # The table says why there is no value.
    assert np.isnan([metrics.pop("cnr_signed"), metrics.pop("pointing")]).all()
    assert metrics == {"n": 0, "skipped": 0, "bare/n": 0, "bare/skipped": 0}
    assert examples == []


def test_images_of_different_sizes_are_refused():
    records = make_records(3)
    small = dataclasses.replace(records[0], image=np.zeros((8, 8, 1), np.uint8))
    for test, message in (
        ([small, *records], r"one size and got \[\(8, 8\), \(32, 32\)\]; resize them"),
        ([], "got none"),
    ):
        with pytest.raises(UserError, match=message):
            grounding.check(EvalData(test=test), grounding.Options())
        with pytest.raises(UserError, match=message):
            run_task(grounding, make_model(), {"test": test}, grounding.Options())


def test_unknown_findings_form_a_group():
    phrase = Phrase("opacity", boxes=((2, 2, 9, 9), (20, 20, 28, 28)))
    record = Record(np.zeros((SIZE, SIZE, 1), np.uint8), "opacity", phrases=(phrase,))
    metrics, phrases = grounding.score_phrases(make_model(make_oracle([record])), [record], ())
    assert metrics["other/cnr_signed"] == metrics["cnr_signed"] > 2
    assert phrases[0].finding == "other" and phrases[0].truth.sum() == 7 * 7 + 8 * 8


def test_examples_are_best_random_and_worst_without_repetition():
    records, random = make_records(40), np.random.default_rng(0)
    truth = make_oracle(records)
    noisy = lambda *inputs: truth(*inputs) + random.normal(size=GRID)  # noqa: E731
    model, options = make_model(noisy, rounds=2), grounding.Options(num_examples=3)
    _, phrases = grounding.score_phrases(model, records, FINDINGS)
    examples = grounding.illustrate(model, records, phrases, options=options)
    assert [row.kind for row in examples] == ["best"] * 3 + ["random"] * 3 + ["worst"] * 3
    assert len({(row.phrase, row.image.tobytes()) for row in examples}) == 9
    assert examples[0].cnr == max(phrase.cnr for phrase in phrases)
    assert min(phrase.cnr for phrase in phrases) in [row.cnr for row in examples[6:]]
    assert all(row.heat_maps.shape == (3, *GRID) for row in examples)
    best_findings = [row.phrase.split(" ", 1)[1] for row in examples[:2]]
    assert sorted(best_findings) == sorted(FINDINGS)
    assert len(grounding.illustrate(model, records, phrases[:2], options=options)) == 2


def test_the_task_reads_its_priors_from_the_data():
    records, training = make_records(12), make_records(20, seed=1)
    model, options = make_model(make_oracle(records)), grounding.Options(num_examples=1)
    data = EvalData(findings=FINDINGS, test=records, prior_records=training)
    result = grounding.evaluate(model, data, options, TaskContext(seed=3))
    expected, _ = grounding.score_phrases(
        model, records, FINDINGS, priors=fit_priors(training), options=options, seed=3
    )
    assert result.metrics == expected and "prior/cnr_signed" in expected
    assert [row.kind for row in result.rows] == ["best", "random", "worst"]
    without = grounding.evaluate(
        model, dataclasses.replace(data, prior_records=()), options, TaskContext(seed=3)
    )
    assert "prior/cnr_signed" not in without.metrics


# BioViL's protocol -------------------------------------------------------------------------------


def make_bright_model(log=None, rounds=0):
    """Returns a model whose map is the brightness of its input, in blocks of 4 x 4 pixels."""

    def encode_image(images):
        if log is not None:
            log.append(images)
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(flat, flat[:, None], np.ones((len(flat), 1), bool))

    def encode_text(texts):
        count = len(texts)
        return Features(np.zeros((count, 1), np.float32), np.zeros((count, 1, 1)), None)

    def heatmap(images, words, rounds=None):
        maps = images.pooled.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 1, 64)
        scale = 1 if rounds is None else 1 + rounds
        return maps * scale, np.ones((len(maps), 1), np.float32)

    return Model("fake", GRID, rounds, SIZE, encode_image, encode_text, None, heatmap)


def make_record(*phrases, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 1), np.uint8)
    return Record(image, "report", str(seed), phrases=phrases)


def loop_box_mask(box):
    mask = np.zeros((SIZE, SIZE), bool)
    for y in range(SIZE):
        for x in range(SIZE):
            mask[y, x] = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
    return mask


def loop_cnr(heat, truth):
    """Returns the signed CNR of a map; pixels that are NaN count on neither side."""
    inside, outside = heat[truth], heat[~truth]
    spread = np.sqrt(np.nanvar(inside) + np.nanvar(outside))
    return (np.nanmean(inside) - np.nanmean(outside)) / spread


def brightness(image, side=SIZE):
    """Returns the map of the bright model for an image of 32 pixels, resized to `side`."""
    small = image.reshape(8, 4, 8, 4).astype(np.float64).mean((1, 3))
    return grounding_metrics.upsample(small[None], (side, side))[0].astype(np.float64)


def test_the_pixels_of_a_box_do_not_count_for_later_boxes():
    # The third box is covered by the first.
    boxes = ((2, 2, 12, 12), (8, 8, 20, 14), (3, 3, 7, 7), (22, 18, 30, 30))
    mask = np.zeros((SIZE, SIZE), bool)
    mask[24:30, 2:14] = True
    record = make_record(
        Phrase("Two  spots", 0, boxes=boxes[:3]),
        Phrase("two spots", 0, boxes=boxes[3:]),
        Phrase("two spots", 0, mask=mask),
        Phrase("two spots", 1, boxes=((0, 0, 5, 5),)),
    )
    metrics, _ = grounding.score_phrases(make_bright_model(), [record], FINDINGS)
    heat, cnr_of_boxes = brightness(record.image), []
    union = np.zeros((SIZE, SIZE), bool)
    for part in [*map(loop_box_mask, boxes), mask]:
        union |= part
        if np.isfinite(heat[part]).any():
            cnr_of_boxes.append(loop_cnr(heat, part))
        heat[part] = np.nan
    assert len(cnr_of_boxes) == 4 and min(cnr_of_boxes) < 0 < max(cnr_of_boxes)
    mean, mean_abs = np.mean(cnr_of_boxes), np.mean(np.abs(cnr_of_boxes))
    assert metrics["nodule/cnr_boxes_signed"] == pytest.approx(mean, abs=1e-4)
    assert metrics["nodule/cnr_boxes_abs"] == pytest.approx(mean_abs, abs=1e-4)
    cnr_of_union = loop_cnr(brightness(record.image), union)
    assert metrics["nodule/cnr_signed"] == pytest.approx(cnr_of_union, abs=1e-4)
    assert abs(cnr_of_union - mean) > 1e-2
    # A truth of one box has the same CNR in both ways.
    single = metrics["pleural_effusion/cnr_signed"]
    assert metrics["pleural_effusion/cnr_boxes_signed"] == pytest.approx(single)
    macro = (metrics["nodule/cnr_boxes_abs"] + metrics["pleural_effusion/cnr_boxes_abs"]) / 2
    assert metrics["cnr_boxes_abs"] == pytest.approx(macro)
    assert "random/cnr_boxes_abs" in metrics and "random/nodule/cnr_boxes_abs" not in metrics


def test_bare_phrases_have_the_boxes_of_their_finding():
    boxes = ((2, 2, 12, 12), (18, 16, 30, 30))
    record = make_record(
        *(Phrase(f"spot {i}", 0, bare="spot", boxes=(box,)) for i, box in enumerate(boxes))
    )
    metrics, _ = grounding.score_phrases(make_bright_model(), [record], FINDINGS)
    heat = brightness(record.image)
    first = loop_cnr(heat, loop_box_mask(boxes[0]))
    heat[loop_box_mask(boxes[0])] = np.nan
    second = loop_cnr(heat, loop_box_mask(boxes[1]))
    assert metrics["bare/n"] == 1 and metrics["n"] == 2
    assert metrics["bare/cnr_boxes_signed"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert metrics["cnr_boxes_signed"] == pytest.approx(metrics["cnr_signed"])


def test_every_category_has_every_score():
    phrases = Phrase("a", 0, boxes=((2, 2, 12, 12),)), Phrase("b", 0, boxes=((9, 9, 30, 20),))
    records = [
        make_record(*phrases),
        make_record(Phrase("c", 1, boxes=((16, 3, 28, 19),)), seed=1),
    ]
    metrics, _ = grounding.score_phrases(make_bright_model(rounds=1), records, FINDINGS)
    for key in ("cnr_abs", "miou_raw", "miou_minmax", "miou_z", "cnr_signed", "pointing"):
        by_finding = metrics[f"nodule/{key}"], metrics[f"pleural_effusion/{key}"]
        assert metrics[key] == pytest.approx(np.mean(by_finding))
        assert metrics[f"micro/{key}"] == pytest.approx(np.average(by_finding, weights=(2, 1)))
    heat = brightness(records[0].image)
    cnr = [loop_cnr(heat, loop_box_mask(phrase.boxes[0])) for phrase in phrases]
    assert metrics["nodule/cnr_abs"] == pytest.approx(np.mean(np.abs(cnr)), abs=1e-4)
    assert np.isfinite(list(metrics.values())).all()


def test_the_miou_of_afloc_averages_thresholds_of_findings_of_defined_phrases():
    phrases = Phrase("a", 0, boxes=((2, 2, 12, 12),)), Phrase("b", 0, boxes=((9, 9, 30, 20),))
    records = [
        make_record(*phrases),
        make_record(Phrase("c", 1, boxes=((16, 3, 28, 19),)), seed=1),
    ]
    metrics, _ = grounding.score_phrases(make_bright_model(), records, FINDINGS)
    ious = [
        grounding_metrics.afloc_ious(
            brightness(record.image).reshape(1, -1), loop_box_mask(phrase.boxes[0]).reshape(1, -1)
        )[0]
        for record in records
        for phrase in record.phrases
    ]
    by_finding = np.stack([np.mean(ious[:2], 0), ious[2]])
    assert metrics["miou_afloc"] == pytest.approx(by_finding.mean(0).mean(), abs=1e-6)
    assert metrics["nodule/miou_afloc"] == pytest.approx(by_finding[0].mean(), abs=1e-6)
    assert metrics["micro/miou_afloc"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert "random/miou_afloc" in metrics and abs(metrics["miou_afloc"] - metrics["miou_z"]) > 1e-3


def test_flat_maps_have_no_miou_of_afloc():
    scores = {grounding.AFLOC_KEY: np.full((3, 5), np.nan), "pointing": np.zeros(3)}
    scores[grounding.AFLOC_KEY][0] = 0.5
    metrics = grounding._macro_means(scores, ["a", "b", "b"], by_finding=tuple(scores))
    # Finding b has no defined map, so the mean is that of a.
    assert metrics["miou_afloc"] == metrics["a/miou_afloc"] == 0.5 and "b/miou_afloc" not in metrics
    scores[grounding.AFLOC_KEY][0, 4] = np.nan  # no map of any finding exceeds the last threshold
    assert "miou_afloc" not in grounding._macro_means(scores, ["a", "b", "b"])


def test_the_crops_of_published_protocols():
    """BioViL sees 480 of 512 pixels, BioViL-T and AFLoc see 448."""
    crops = {
        name: ms_cxr_grounding.get_config(name).eval.grounding.crop * 512
        for name in ("biovil", "biovil_t", "afloc")
    }
    assert crops == {"biovil": 480, "biovil_t": 448, "afloc": 448}
    assert ms_cxr_grounding.get_config().eval.grounding.crop == 480 / 512
    with pytest.raises(ValueError, match="protocol 'gloria' is unknown; use one of biovil"):
        ms_cxr_grounding.get_config("gloria")


def test_a_crop_is_a_crop_by_hand():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[0:14, 20:32] = True
    phrases = (
        Phrase("partly", 0, bare="x", boxes=((0, 0, 14, 12), (10, 9, 20.6, 15))),
        Phrase("masked", 1, bare="y", mask=mask),
        Phrase("away", 0, bare="x", boxes=((0, 0, 4, 32), (5, 28.4, 30, 32))),
        Phrase("filling", 1, bare="y", boxes=((3, 3, 29, 29),)),
        Phrase("nowhere", 1, bare="z"),
    )
    records, log = [make_record(*phrases, seed=seed) for seed in (0, 1)], []
    metrics, scored = grounding.score_phrases(
        make_bright_model(log), records, FINDINGS, options=CROP
    )
    assert metrics["n"] == 4 and metrics["outside"] == 2 and metrics["skipped"] == 4
    assert metrics["bare/outside"] == 0  # their finding is also inside the crop
    expected = {"partly": [], "masked": []}
    for record, model_input in zip(records, log[0], strict=True):
        part = Image.fromarray(record.image[4:28, 4:28, 0])
        part = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(model_input[..., 0], part)
        heat = brightness(part, side=24)
        truth = loop_box_mask(phrases[0].boxes[0]) | loop_box_mask(phrases[0].boxes[1])
        expected["partly"].append(loop_cnr(heat, truth[4:28, 4:28]))
        expected["masked"].append(loop_cnr(heat, mask[4:28, 4:28]))
    for text, cnr in expected.items():
        assert [p.cnr for p in scored if p.text == text] == pytest.approx(cnr, abs=1e-4)
    partly = np.mean(expected["partly"])
    assert metrics["nodule/cnr_signed"] == pytest.approx(partly, abs=1e-4)
    assert {phrase.truth.shape for phrase in scored} == {(24, 24)}
    options = dataclasses.replace(CROP, num_examples=2)
    examples = grounding.illustrate(make_bright_model(), records, scored, options=options)
    assert len(examples) == 4
    for example in examples:
        assert example.image.shape == (24, 24, 1) and example.truth.shape == (24, 24)
        large = grounding_metrics.upsample(example.heat_maps[:1], (24, 24))[0]
        cnr = loop_cnr(large.astype(np.float64), example.truth)
        assert example.cnr == pytest.approx(cnr, abs=1e-4)


def test_a_bright_centre_is_found_in_any_crop():
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    image[12:20, 12:20] = 200
    phrase = Phrase("spot", 0, boxes=((12, 12, 20, 20),))
    record = Record(image, "", phrases=(phrase,))
    for share in (1.0, 0.5):
        options = grounding.Options(crop=share)
        metrics, phrases = grounding.score_phrases(
            make_bright_model(), [record], FINDINGS, options=options
        )
        assert metrics["pointing"] == 1 and metrics["cnr_signed"] > 2
        assert metrics["centre/pointing"] == 1 and phrases[0].truth.sum() == 64


def test_a_phrase_outside_the_crop_is_counted():
    corner = Phrase("spot", 0, boxes=((0, 0, 3, 3),))
    metrics, phrases = grounding.score_phrases(
        make_bright_model(), [make_record(corner)], FINDINGS, options=CROP
    )
    counts = {"n": 0, "skipped": 0, "outside": 1}
    assert np.isnan([metrics.pop("cnr_signed"), metrics.pop("pointing")]).all()
    assert metrics == counts | {"bare/n": 0, "bare/skipped": 0, "bare/outside": 0}
    assert not phrases


def test_priors_are_cropped_as_the_images_are():
    mean = np.random.default_rng(5).random((SIZE, SIZE)).astype(np.float32)
    priors = Priors(mean, {0: mean**2}, {"k": mean**3})
    record = make_record(Phrase("a", 0, "k", boxes=((6, 6, 15, 20),)))
    metrics, _ = grounding.score_phrases(
        make_bright_model(), [record], FINDINGS, priors=priors, options=CROP
    )
    truth = loop_box_mask((6, 6, 15, 20))[4:28, 4:28]
    for null, power in (("prior", 1), ("mean_finding", 2), ("mean_phrase", 3)):
        expected = loop_cnr((mean**power)[4:28, 4:28].astype(np.float64), truth)
        assert metrics[f"{null}/cnr_signed"] == pytest.approx(expected, abs=1e-4)


def loop_smooth(heat, sigma):
    """Returns a map under a Gaussian of four sigma on either side, reflected at its border."""
    reach = int(4 * sigma + 0.5)
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight /= weight.sum()
    padded, smooth = np.pad(heat, reach, mode="symmetric"), np.zeros(heat.shape)
    for y in range(heat.shape[0]):
        for x in range(heat.shape[1]):
            part = padded[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            smooth[y, x] = weight @ part @ weight
    return smooth


def test_maps_and_noise_are_smoothed_on_the_grid():
    record = make_record(Phrase("a", 0, boxes=((6, 6, 15, 20),)))
    truth = loop_box_mask((6, 6, 15, 20))
    options = grounding.Options(smooth=1.5)
    metrics, phrases = grounding.score_phrases(
        make_bright_model(rounds=1), [record], FINDINGS, options=options, seed=3
    )
    small = record.image.reshape(8, 4, 8, 4).astype(np.float64).mean((1, 3))
    noise = np.random.default_rng(3).random((1, *GRID), np.float32)[0].astype(np.float64)
    for prefix, heat in {"": small, "round1/": 2 * small, "random/": noise}.items():
        large = grounding_metrics.upsample(loop_smooth(heat, 1.5)[None], (SIZE, SIZE))[0]
        expected = loop_cnr(large, truth)
        assert metrics[f"{prefix}cnr_signed"] == pytest.approx(expected, abs=1e-3)
    examples = grounding.illustrate(make_bright_model(), [record], phrases, options=options)
    np.testing.assert_allclose(examples[0].heat_maps[0], loop_smooth(small, 1.5), rtol=1e-4)
    (other,) = grounding.illustrate(make_bright_model(), [record], phrases)
    assert examples[0].name != other.name, "pages would show them as one example"


def test_maps_that_are_not_finite_give_nan_through_boxes_and_smoothing():
    record = make_record(Phrase("a", 0, boxes=((2, 2, 9, 9), (12, 12, 20, 20))))

    def heatmap(images, words, rounds=None):
        count = len(images.pooled)
        return np.full((count, 1, 64), np.nan), np.ones((count, 1))

    model = dataclasses.replace(make_bright_model(), heatmap=heatmap)
    metrics, _ = grounding.score_phrases(model, [record], FINDINGS, options=BIOVIL)
    assert np.isnan([metrics[key] for key in ("cnr_boxes_signed", "cnr_boxes_abs", "miou_z")]).all()


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("crop", 0.0, "use a number above 0, at most 1"),
        ("crop", 1.1, "use a number above 0, at most 1"),
        ("smooth", -1.0, "use 0 or more"),
        ("smooth", float("nan"), "use 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(option, value, remedy):
    with pytest.raises(UserError, match=f"config.eval.grounding.{option} is {value}; {remedy}"):
        grounding.Options(**{option: value})


# Boxes, tolerance and sides ----------------------------------------------------------------------


def evaluate_one(phrases, peak, **options):
    """Returns the metrics of one image [32 32], on whose map [8 8] a single cell is hot."""
    heat = np.zeros(GRID, np.float32)
    heat[peak] = 1
    record = Record(np.zeros((SIZE, SIZE, 1), np.uint8), "", phrases=phrases)
    model = make_model(lambda *_: heat)
    options = grounding.Options(**{"bootstrap_samples": 2} | options)
    return grounding.score_phrases(model, [record], FINDINGS, options=options)[0]


def frame():
    """Returns a square ring of 12 pixels, whose middle is not part of it."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[2:14, 2:14] = True
    mask[4:12, 4:12] = False
    return mask


def test_a_peak_inside_the_box_but_not_the_mask_is_a_hit_of_the_box_only():
    phrase = Phrase("right nodule", 0, "nodule|right", "nodule", mask=frame())
    metrics = evaluate_one((phrase,), (1, 1), tolerance=0.0)  # pixels 4 to 7
    assert (metrics["pointing"], metrics["pointing_box"], metrics["pointing_near"]) == (0, 1, 0)
    assert evaluate_one((phrase,), (1, 1), tolerance=3 / 32)["pointing_near"] == 1
    boxed = dataclasses.replace(phrase, boxes=((20.0, 20.0, 30.0, 30.0),))
    assert evaluate_one((boxed,), (1, 1))["pointing_box"] == 0, "the phrase names its own box"


def test_any_box_of_a_phrase_counts():
    boxes = ((0.0, 0.0, 8.0, 8.0), (24.0, 24.0, 32.0, 32.0))
    phrase = Phrase("nodule", 0, "nodule", "nodule", boxes=boxes)
    for peak, hit in (((0, 0), 1), ((7, 7), 1), ((0, 7), 0)):
        assert evaluate_one((phrase,), peak)["pointing_box"] == hit


def test_the_wrong_side_is_that_without_the_truth():
    phrase = Phrase("right nodule", 0, "nodule|right", "nodule", mask=frame())
    assert evaluate_one((phrase,), (1, 1))["wrong_side"] == 0
    assert evaluate_one((phrase,), (1, 6))["wrong_side"] == 1
    middle = np.zeros((SIZE, SIZE), bool)
    middle[10:20, 10:22] = True
    both = dataclasses.replace(phrase, mask=middle, finding=1)
    assert "wrong_side" not in evaluate_one((both,), (1, 1))
    metrics = evaluate_one((phrase, both), (1, 6))
    assert metrics["wrong_side"] == metrics["nodule/wrong_side"] == 1
    assert "pleural_effusion/wrong_side" not in metrics

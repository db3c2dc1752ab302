"""Detection: the true boxes of records, the baseline, and a head that learns to detect."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_runs import check_task, run_task

from plan_jax.heads import anchors as anchor_boxes
from plan_jax.heads import fit
from plan_jax.heads.head_on_tower import HeadOnTower
from plan_jax.metrics.boxes import DetectedBoxes, TrueBoxes
from plan_jax.tasks import detection
from plan_jax.types import Model, Phrase, Record, Stages, Tower, UserError

SIDE = 48
FINDINGS = ("bright spot", "dark spot", "absent finding")
QUICK = {"widths": (32, 16, 16), "learning_rate": 5e-3, "patience": 100, "bootstrap_samples": 20}


def make_records(count, seed):
    """Grey images with up to two rectangles, each brighter or darker than the rest."""
    random, records = np.random.default_rng(seed), []
    for n in range(count):
        image = random.integers(100, 150, (SIDE, SIDE, 1), np.uint8)
        phrases = []
        for _ in range(random.integers(0, 3)):
            finding = int(random.integers(2))
            width, height = random.integers(10, 22, 2)
            x, y = random.integers(0, SIDE - width), random.integers(0, SIDE - height)
            image[y : y + height, x : x + width] = (240, 10)[finding]
            box = tuple(map(float, (x, y, x + width, y + height)))
            phrases.append(Phrase(FINDINGS[finding], finding, boxes=(box,)))
        records.append(Record(image, "", str(n), phrases=tuple(phrases)))
    return records


def apply(variables, images, train=False, native=False):
    """A tower without parameters: three maps, each of 4 x 4 means of pixels in every cell."""
    x, maps = images.astype(jnp.float32) / 64 - 2, []
    for cell in (4, 8, 16):
        grid, block = SIDE // cell, cell // 4
        pooled = x.reshape(-1, grid, 4, block, grid, 4, block).mean((3, 6))
        maps.append(pooled.transpose(0, 1, 3, 2, 4).reshape(-1, grid, grid, 16))
    return Stages(maps[-1].mean((1, 2)), tuple(maps)), variables["batch_stats"]


TOWER = Tower("patches", {"params": {}, "batch_stats": {}}, apply)
MODEL = Model("fake", (3, 3), 0, SIDE, None, None, None, None, tower=TOWER)
NO_TOWER = dataclasses.replace(MODEL, tower=None)
SPLITS = {"train": make_records(160, 0), "val": make_records(32, 1), "test": make_records(32, 2)}


def test_a_head_learns_to_detect_boxes_of_two_classes(monkeypatch):
    initial_scores = []

    def recording_fit_head(loss, params, stats, *args, score, **settings):
        initial_scores.append(score(params, stats))
        return fit.fit_head(loss, params, stats, *args, score=score, **settings)

    monkeypatch.setattr(detection, "fit_head", recording_fit_head)
    options = detection.Options(classes="each", epochs=12, **QUICK)
    values, examples = run_task(detection, MODEL, SPLITS, options, findings=FINDINGS)
    assert initial_scores[0] < 0.05
    assert values["map_strict"] > 0.3 > 5 * values["prior/map_strict"]
    assert values["map_strict_low"] < values["map_strict"] < values["map_strict_high"]
    assert values["map_mgca"] > 0.2 and values["coco/ap50"] > 0.4 > values["coco/ap75"] > 0
    finding_values = [values["bright_spot/ap50"], values["dark_spot/ap50"]]
    assert np.mean(finding_values) == pytest.approx(values["coco/ap50"], abs=1e-6)
    assert (values["findings_scored"], values["findings_skipped"]) == (2, 1)
    assert (values["n_train"], values["n_test"], values["boxes_dropped"]) == (160, 32, 0)
    assert values["epochs"] == 12
    assert len(examples) == 6 and all(len(example.truth) for example in examples)
    best_scores = [example.scores[0] for example in examples]
    assert best_scores == sorted(best_scores, reverse=True)
    for example in examples:
        assert (np.diff(example.scores) <= 0).all() and len(example.predicted) <= 5


def record_of(*phrases, size=(20, 30)):
    return Record(np.zeros((*size, 1), np.uint8), "", phrases=phrases)


def test_true_boxes_are_clipped_counted_and_unique():
    mask = np.zeros((20, 30), bool)
    mask[3:7, 10:15] = mask[12, 20] = True
    record = record_of(
        Phrase("a", 1, boxes=((-5, 2, 10, 40), (40, 2, 50, 4), (1, 1, 1, 5))),
        Phrase("b", 1, boxes=((-9, 2, 10, 20),)),  # equal to the first after clipping
        Phrase("c", 0, mask=mask),
        Phrase("d", 0, mask=np.zeros((20, 30), bool)),
        Phrase("e", 2, mask=mask, boxes=((0, 2, 10, 20), (float("nan"), 0, 9, 9))),
        Phrase("f", -1, boxes=((4, 4, 8, 8),)),
        Phrase("g", 0),
    )
    truth, num_dropped = detection.true_boxes(record, detection.Options(classes="each"), FINDINGS)
    expected = [(0, 2, 10, 20, 1), (10, 3, 21, 13, 0), (0, 2, 10, 20, 2)]
    rows = [(*box, k) for box, k in zip(truth.boxes.tolist(), truth.classes, strict=True)]
    assert rows == expected
    assert num_dropped == 5  # outside, flat, empty mask, NaN, no finding
    truth, num_dropped = detection.true_boxes(record, detection.Options(), FINDINGS)
    assert truth.boxes.tolist() == [[0, 2, 10, 20], [10, 3, 21, 13], [4, 4, 8, 8]]
    assert not truth.classes.any() and num_dropped == 4


def test_padding_is_masked():
    truth = [
        TrueBoxes(np.float32([[1, 2, 3, 4]]), np.int32([2])),
        TrueBoxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32)),
    ]
    arrays = detection.pad_boxes(truth, 2)
    assert arrays["boxes"].tolist() == [[[1, 2, 3, 4], [0] * 4], [[0] * 4] * 2]
    assert arrays["mask"].tolist() == [[True, False], [False, False]]
    assert arrays["classes"].tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("records", [[], [record_of()]])
def test_a_split_without_boxes_is_refused_before_any_fit(split, records):
    message = f"needs boxes or masks of phrases, and split {split} has none; add some"
    for run in (partial(check_task, detection), partial(run_task, detection, NO_TOWER)):
        with pytest.raises(UserError, match=message):
            run(SPLITS | {split: records}, detection.Options(), findings=FINDINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 4)}, r"detection.widths is \(8, 4\); give three widths"),
        ({"patience": 0}, "detection.patience is 0; use at least 1"),
        ({"nms_iou": -0.1}, "detection.nms_iou is -0.1; use at least 0"),
        ({"select_by": "map"}, "detection.select_by is 'map'; use one of map_strict, map_mgca, l"),
    ],
)
def test_options_check_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        detection.Options(**options)


def test_too_few_training_records_are_a_mistake():
    splits = SPLITS | {"train": [record_of()] * 50 + SPLITS["train"][:2]}
    options = detection.Options(max_train_records=1)
    message = "detection.max_train_records 1 leaves no box to learn from; use more records"
    with pytest.raises(UserError, match=message):
        run_task(detection, NO_TOWER, splits, options, findings=FINDINGS)


def test_training_records_are_selected_by_the_seed_and_stay_in_order():
    records = SPLITS["train"]
    patients, other_patients = (
        [int(record.patient_id) for record in detection.draw_records(records, 20, seed)]
        for seed in (0, 1)
    )
    assert len(set(patients)) == 20 and patients == sorted(patients)
    assert patients == [int(r.patient_id) for r in detection.draw_records(records, 20, 0)]
    assert patients != other_patients
    assert all(detection.draw_records(records, n, 0) is records for n in (0, 160, 999))


def test_typical_boxes_come_first():
    typical, rare = (0, 0, 10, 10), (20, 20, 30, 30)
    boxes = [(typical, 0), (rare, 0), ((0, 0, 10, 9), 0), (typical, 1)]
    truth = [TrueBoxes(np.float32([box]), np.int32([k])) for box, k in boxes]
    baseline = detection.typical_boxes(truth)
    assert baseline.boxes.tolist() == [list(typical), list(rare), list(typical)]
    assert baseline.scores.tolist() == [0.5, 0.25, 0.25]
    assert baseline.classes.tolist() == [0, 0, 1]


def fake_head(**functions):
    """A head on a tower of which only the given functions are called."""
    unused = dict.fromkeys(("examples", "loss", "features", "compute_features", "predict"))
    return HeadOnTower(**{"params": {}, "stats": {}} | unused | functions)


def test_the_boxes_of_an_image_do_not_depend_on_the_number_of_images(monkeypatch):
    monkeypatch.setattr(detection, "CHUNK_SIZE", 3)
    random = np.random.default_rng(0)
    maps = tuple(random.normal(size=(6, n, n, 3, 6)).astype(np.float32) for n in (1, 2, 3))
    options = detection.Options(min_score=0.6, num_candidates=20)
    head = fake_head(predict=lambda params, stats, examples: examples["maps"])
    detected = detection._detector(head, (24, 24), options)({}, {}, {"maps": maps})
    assert len(detected) == 6
    anchors = anchor_boxes.anchors_for_size((24, 24))
    sizes = {"size": (24, 24), "min_score": 0.6, "num_candidates": 20}
    detect_single = jax.jit(partial(anchor_boxes.detect, **sizes))
    for n, image in enumerate(detected):
        single = detect_single(tuple(x[n] for x in maps), anchors)
        mask = np.asarray(single.mask)
        expected = np.asarray(single.boxes)[mask]
        np.testing.assert_allclose(image.boxes, expected, rtol=1e-5, atol=1e-4)
        assert len(image.boxes) == mask.sum() and (image.scores >= 0.6).all()


def test_the_loss_selects_the_epoch_while_nothing_is_detected():
    truth = [TrueBoxes(np.float32([[0, 0, 9, 9]]), np.int32([0]))] * 5
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    correct = np.float32([[0, 0, 9, 9]]), np.float32([0.3]), np.int32([0])

    def detect_boxes(params, stats, examples):
        return [DetectedBoxes(*(correct if params["detects"] else none))] * 5

    def loss(params, stats, examples, key, train):
        return examples["x"].mean() * params["scale"], stats

    examples = {"x": np.arange(5, dtype=np.float32)}
    scores = {}
    for metric in ("map_strict", "map_mgca"):
        options = detection.Options(select_by=metric, batch=2)
        score = detection._selection_score(
            fake_head(loss=loss), detect_boxes, examples, truth, options
        )
        scores[metric] = [score({"detects": n, "scale": jnp.float32(1 + n)}, {}) for n in (0, 1)]
    assert scores["map_strict"] == pytest.approx([-2, 1])
    assert scores["map_mgca"] == pytest.approx([-2, -4])  # no box reaches MGCA's minimum score
    options = detection.Options(select_by="loss")
    assert detection._selection_score(fake_head(), detect_boxes, examples, truth, options) is None

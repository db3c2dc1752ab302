"""The detection task: what its truth is, what it asks for, and that it learns to find boxes."""

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
from plan_jax.metrics.boxes import TrueBoxes
from plan_jax.tasks import detection
from plan_jax.types import Model, Phrase, Record, Stages, Tower, UserError

SIDE = 48
FINDINGS = ("bright spot", "dark spot", "nothing like it")
QUICK = {"widths": (32, 16, 16), "learning_rate": 5e-3, "patience": 100, "bootstrap_samples": 20}


def make_records(number, seed):
    """Grey images with up to two rectangles, each brighter or darker than the rest."""
    random, records = np.random.default_rng(seed), []
    for n in range(number):
        image = random.integers(100, 150, (SIDE, SIDE, 1), np.uint8)
        phrases = []
        for _ in range(random.integers(0, 3)):
            finding = int(random.integers(2))
            wide, high = random.integers(10, 22, 2)
            x, y = random.integers(0, SIDE - wide), random.integers(0, SIDE - high)
            image[y : y + high, x : x + wide] = (240, 10)[finding]
            box = tuple(map(float, (x, y, x + wide, y + high)))
            phrases.append(Phrase(FINDINGS[finding], finding, boxes=(box,)))
        records.append(Record(image, "", str(n), phrases=tuple(phrases)))
    return records


def apply(variables, images, train=False, native=False):
    """A tower without parameters: pixels averaged to three sizes, 4x4 of them in every cell."""
    x, maps = images.astype(jnp.float32) / 64 - 2, []
    for cell in (4, 8, 16):
        grid, part = SIDE // cell, cell // 4
        small = x.reshape(-1, grid, 4, part, grid, 4, part).mean((3, 6))
        maps.append(small.transpose(0, 1, 3, 2, 4).reshape(-1, grid, grid, 16))
    return Stages(maps[-1].mean((1, 2)), tuple(maps)), variables["batch_stats"]


TOWER = Tower("patches", {"params": {}, "batch_stats": {}}, apply)
MODEL = Model("fake", (3, 3), 0, SIDE, None, None, None, None, tower=TOWER)
BLIND = dataclasses.replace(MODEL, tower=None)  # nothing can be fitted to it
SPLITS = {"train": make_records(160, 0), "val": make_records(32, 1), "test": make_records(32, 2)}


def test_a_head_learns_to_find_boxes_of_two_classes(monkeypatch):
    before = []

    def fit_head(loss, params, stats, *rest, score, **settings):
        before.append(score(params, stats))
        return fit.fit_head(loss, params, stats, *rest, score=score, **settings)

    monkeypatch.setattr(detection, "fit_head", fit_head)
    options = detection.Options(classes="each", epochs=12, **QUICK)
    values, rows = run_task(detection, MODEL, SPLITS, options, findings=FINDINGS)
    assert before[0] < 0.05
    assert values["map_strict"] > 0.3 > 5 * values["prior/map_strict"]
    assert values["map_strict_low"] < values["map_strict"] < values["map_strict_high"]
    assert values["map_mgca"] > 0.2 and values["coco/ap50"] > 0.4 > values["coco/ap75"] > 0
    each = [values["bright_spot/ap50"], values["dark_spot/ap50"]]
    assert np.mean(each) == pytest.approx(values["coco/ap50"], abs=1e-6)
    assert (values["findings_scored"], values["findings_skipped"]) == (2, 1)
    assert (values["n_train"], values["n_test"], values["boxes_dropped"]) == (160, 32, 0)
    assert values["epochs"] == 12
    assert len(rows) == 6 and all(len(row.truth) for row in rows)
    best = [row.scores[0] for row in rows]
    assert best == sorted(best, reverse=True)
    assert all((np.diff(row.scores) <= 0).all() and len(row.predicted) <= 5 for row in rows)


def record_of(*phrases, image=(20, 30)):
    return Record(np.zeros((*image, 1), np.uint8), "", phrases=phrases)


def test_true_boxes_are_cut_counted_and_not_said_twice():
    mask = np.zeros((20, 30), bool)
    mask[3:7, 10:15] = mask[12, 20] = True
    record = record_of(
        Phrase("a", 1, boxes=((-5, 2, 10, 40), (40, 2, 50, 4), (1, 1, 1, 5))),
        Phrase("b", 1, boxes=((-9, 2, 10, 20),)),  # the same, once it is cut
        Phrase("c", 0, mask=mask),
        Phrase("d", 0, mask=np.zeros((20, 30), bool)),
        Phrase("e", 2, mask=mask, boxes=((0, 2, 10, 20), (float("nan"), 0, 9, 9))),
        Phrase("f", -1, boxes=((4, 4, 8, 8),)),
        Phrase("g", 0),
    )
    truth, dropped = detection.true_boxes(record, detection.Options(classes="each"), FINDINGS)
    right = [(0, 2, 10, 20, 1), (10, 3, 21, 13, 0), (0, 2, 10, 20, 2)]
    assert [(*b, k) for b, k in zip(truth.boxes.tolist(), truth.classes, strict=True)] == right
    assert dropped == 5  # outside, flat, empty mask, not a number, no finding
    truth, dropped = detection.true_boxes(record, detection.Options(), FINDINGS)
    assert truth.boxes.tolist() == [[0, 2, 10, 20], [10, 3, 21, 13], [4, 4, 8, 8]]
    assert not truth.classes.any() and dropped == 4


def test_padding_is_said_to_be_padding():
    truth = [
        TrueBoxes(np.float32([[1, 2, 3, 4]]), np.int32([2])),
        TrueBoxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32)),
    ]
    rows = detection.padded(truth, 2)
    assert rows["boxes"].tolist() == [[[1, 2, 3, 4], [0] * 4], [[0] * 4] * 2]
    assert rows["mask"].tolist() == [[True, False], [False, False]]
    assert rows["classes"].tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("there", [True, False])
def test_a_split_without_boxes_is_named_before_anything_is_fitted(split, there):
    splits = SPLITS | {split: [record_of()] if there else []}
    with pytest.raises(UserError, match=f"detection needs boxes .* the {split} split has none"):
        run_task(detection, BLIND, splits, detection.Options(), findings=FINDINGS)


def test_a_head_of_other_than_three_widths_is_refused():
    with pytest.raises(UserError, match="widths of detection are .8, 4.; give three"):
        check_task(detection, SPLITS, detection.Options(widths=(8, 4)), FINDINGS)


def test_too_few_training_images_are_named():
    train = [record_of()] * 50 + SPLITS["train"][:2]
    with pytest.raises(UserError, match="max_train_records 1 leaves no box to learn"):
        options = detection.Options(max_train_records=1)
        run_task(detection, BLIND, SPLITS | {"train": train}, options, findings=FINDINGS)


def test_training_records_are_drawn_by_the_seed_and_kept_in_order():
    records = SPLITS["train"]
    some, other = (detection._drawn(records, 20, seed) for seed in (0, 1))
    places = [int(record.patient_id) for record in some]
    assert len(set(places)) == 20 and places == sorted(places)
    assert places == [int(r.patient_id) for r in detection._drawn(records, 20, 0)]
    assert places != [int(r.patient_id) for r in other]
    assert all(detection._drawn(records, n, 0) is records for n in (0, 160, 999))


def test_the_prior_gives_the_usual_boxes_first():
    usual, rare = (0, 0, 10, 10), (20, 20, 30, 30)
    rows = [(usual, 0), (rare, 0), ((0, 0, 10, 9), 0), (usual, 1)]
    truth = [TrueBoxes(np.float32([box]), np.int32([kind])) for box, kind in rows]
    found = detection.prior(truth)
    assert found.boxes.tolist() == [list(usual), list(rare), list(usual)]
    assert found.scores.tolist() == [0.5, 0.25, 0.25] and found.classes.tolist() == [0, 0, 1]


def fake_probe(**changes):
    given = {
        "params": {},
        "stats": {},
        "examples": None,
        "loss": None,
        "features": None,
        "predict": None,
    }
    return HeadOnTower(**given | changes)


def test_boxes_are_those_of_each_image_alone_however_many_there_are(monkeypatch):
    monkeypatch.setattr(detection, "PART", 3)
    random = np.random.default_rng(0)
    maps = tuple(random.normal(size=(6, n, n, 3, 6)).astype(np.float32) for n in (1, 2, 3))
    options = detection.Options(score_floor=0.6, candidates=20)
    probe = fake_probe(predict=lambda params, stats, rows: rows["maps"])
    found = detection._finder(probe, (24, 24), options)({}, {}, {"maps": maps})
    assert len(found) == 6
    anchors = anchor_boxes.anchors_for_size((24, 24))
    alone = jax.jit(partial(anchor_boxes.detect, size=(24, 24), min_score=0.6, num_candidates=20))
    for n, one in enumerate(found):
        seen = alone(tuple(m[n] for m in maps), anchors)
        keep = np.asarray(seen.mask)
        np.testing.assert_allclose(one.boxes, np.asarray(seen.boxes)[keep], rtol=1e-5, atol=1e-4)
        assert len(one.boxes) == keep.sum() and (one.scores >= 0.6).all()


def test_while_nothing_is_found_the_loss_says_which_epoch_is_better():
    truth = [TrueBoxes(np.float32([[0, 0, 9, 9]]), np.int32([0]))] * 5
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    right = np.float32([[0, 0, 9, 9]]), np.float32([0.3]), np.int32([0])

    def find(params, stats, rows):
        return [detection.DetectedBoxes(*(right if params["found"] else nothing))] * 5

    def loss(params, stats, rows, key, train):
        return rows["x"].mean() * params["scale"], stats

    rows = {"x": np.arange(5, dtype=np.float32)}
    values = {}
    for kind in ("map_strict", "map_mgca"):
        options = detection.Options(judge=kind, batch=2)
        judge = detection._judge(fake_probe(loss=loss), find, rows, truth, options)
        values[kind] = [judge({"found": n, "scale": jnp.float32(1 + n)}, {}) for n in (0, 1)]
    assert values["map_strict"] == pytest.approx([-2, 1])
    assert values["map_mgca"] == pytest.approx([-2, -4])  # no box is sure enough
    assert (
        detection._judge(fake_probe(), find, rows, truth, detection.Options(judge="loss")) is None
    )

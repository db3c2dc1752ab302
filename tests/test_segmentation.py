"""Segmentation: the loss, the masks of targets, and small fits that learn them."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from task_runs import check_task, run_task

from plan_jax.tasks import segmentation
from plan_jax.tasks.segmentation import Options, mixed_loss, target_mask
from plan_jax.types import Model, Phrase, Record, Stages, Tower, UserError

SIZE = 32
FINDINGS = ("nodule", "effusion")
SMALL = {
    "unet_widths": (16, 8),
    "setr_widths": (16, 8),
    "learning_rate": 1e-2,
    "batch": 8,
    "bootstrap_samples": 100,
}


def disc(y, x, radius):
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def make_records(count, seed=0):
    """Studies with two grey lungs, and in two of three images a bright nodule."""
    random, records = np.random.default_rng(seed), []
    for n in range(count):
        image = random.normal(40, 8, (SIZE, SIZE))
        left, right = np.zeros((2, SIZE, SIZE), bool)
        top = random.integers(3, 8)
        right[top:28, 3:14], left[top:28, 18:29] = True, True
        image[left | right] += 60
        phrases = ()
        if n % 3:
            mask = disc(*random.integers(9, 23, 2), random.uniform(4, 8))
            image[mask] += 120
            phrases = (Phrase("a nodule", 0, "nodule", "nodule", mask=mask),)
        image = np.clip(image, 0, 255).astype(np.uint8)[..., None]
        anatomy = {"right lung": right, "left lung": left, "heart": disc(20, 16, 5)}
        records.append(Record(image, "", str(n), np.int8([n % 3 > 0, 0]), phrases, anatomy))
    return records


def make_splits(train=48, val=12, test=18):
    return {
        "train": make_records(train, 1),
        "val": make_records(val, 2),
        "test": make_records(test, 3),
    }


def pooled_tower(factors=(2, 4)):
    """A tower without parameters: means of squares, their second and third powers."""

    def apply(variables, images, train=False, native=False):
        x, maps = images.astype(jnp.float32) / 128 - 1, []
        for factor in factors:
            grid = SIZE // factor
            pooled = x.reshape(-1, grid, factor, grid, factor).mean((2, 4))[..., None]
            maps.append(jnp.concatenate([pooled, pooled**2, pooled**3], -1))
        return Stages(maps[-1].mean((1, 2)), tuple(maps)), variables["batch_stats"]

    return Tower(f"pooled{factors}", {"params": {}, "batch_stats": {}}, apply)


class PatchNet(nn.Module):
    """Patches of 4 x 4 pixels, a dense layer, BatchNorm."""

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(-1, SIZE // 4, 4, SIZE // 4, 4).swapaxes(2, 3)
        x = nn.Dense(6)(x.reshape(*x.shape[:3], 16).astype(jnp.float32) / 255)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))


def norm_tower():
    """A tower with BatchNorm."""
    module = PatchNet()
    variables = jax.jit(module.init, static_argnums=2)(
        jax.random.key(0), jnp.zeros((2, SIZE, SIZE, 1)), False
    )

    def apply(variables, images, train=False, native=False):
        maps, changed = module.apply(variables, images, train, mutable=["batch_stats"])
        return Stages(maps.mean((1, 2)), (maps,)), changed["batch_stats"]

    return Tower("norm", variables, apply)


def make_model(tower):
    return Model("fake", (8, 8), 0, SIZE, None, None, None, None, tower=tower)


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_that_of_a_literal_loop(soft):
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(3, 4, 5, 2)).astype(np.float32)
    masks = random.random(logits.shape).astype(np.float32)
    masks = masks if soft else masks < 0.3
    focal_terms, dice = [], []
    for k in range(2):
        intersection = total = 0.0
        for x, t in zip(
            logits[..., k].ravel().tolist(), masks[..., k].ravel().tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-x))
            entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
            focal_terms.append((1 / (1 + math.exp(x * (2 * t - 1)))) ** 2 * entropy)
            intersection, total = intersection + p * t, total + p + t
        dice.append((2 * intersection + 1) / (total + 1))
    focal = sum(focal_terms) / len(focal_terms)
    expected = 10 * focal - sum(map(math.log, dice)) / 2
    order, loss = random.permutation(3), jax.jit(mixed_loss, static_argnames="focal_weight")
    assert float(loss(logits, masks)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(logits[order], masks[order])) == pytest.approx(expected, rel=1e-5)
    weighted = float(loss(logits, masks, focal_weight=15.0))
    assert weighted == pytest.approx(expected + 5 * focal, rel=1e-5)


def test_the_loss_is_finite_for_extreme_logits():
    loss = jax.jit(jax.value_and_grad(mixed_loss))
    for value in (-200.0, 200.0):
        for truth in (0.0, 1.0):
            arrays = jnp.full((1, 2, 2, 1), value), jnp.full((1, 2, 2, 1), truth)
            chex.assert_tree_all_finite(loss(*arrays))


def test_the_mask_of_a_target():
    anatomy = {"left lung": disc(10, 5, 4), "right lung": disc(10, 25, 4), "heart": disc(20, 15, 3)}
    phrases = (
        Phrase("a", 0, mask=disc(8, 8, 3)),
        Phrase("b", 0, boxes=((20.0, 20.0, 24.0, 26.0), (0.0, 0.0, 2.0, 2.0))),
        Phrase("c", 1, boxes=((5.0, 25.0, 9.0, 29.0),)),
        Phrase("d", -1, mask=disc(28, 28, 3)),
    )
    record = Record(np.zeros((SIZE, SIZE, 1), np.uint8), "", phrases=phrases, anatomy=anatomy)
    nodule_boxes, effusion_boxes = np.zeros((2, SIZE, SIZE), bool)
    nodule_boxes[20:26, 20:24] = nodule_boxes[:2, :2] = effusion_boxes[25:29, 5:9] = True
    nodule = disc(8, 8, 3) | nodule_boxes
    for target, expected in {
        "lungs": anatomy["left lung"] | anatomy["right lung"],
        "heart": anatomy["heart"],
        "left lung": anatomy["left lung"],
        "nodule": nodule,
        "effusion": effusion_boxes,
        "findings": nodule | effusion_boxes | disc(28, 28, 3),
    }.items():
        mask = target_mask(record, target, FINDINGS)
        assert mask.dtype == bool and (mask == expected).all(), target
    anatomy["left lung"] = anatomy["left lung"] * np.float32(0.25)
    assert set(np.unique(target_mask(record, "lungs", FINDINGS)).tolist()) == {0.0, 0.25, 1.0}


@pytest.mark.parametrize(
    ("change", "targets", "message"),
    [
        (
            {},
            ("spleen",),
            "segmentation.targets names 'spleen'; choose from lungs, findings, nodule, effusion, r",
        ),
        ({"train": []}, ("lungs",), "no records in split train; add some"),
        ({}, ("effusion",), "needs masks or boxes of 'effusion', and no training record has any"),
        (
            {"train": {"anatomy": {}}},
            ("lungs",),
            "needs masks of 'lungs', and no training record has one; add some, or drop 'lungs'",
        ),
        (
            {"test": {"anatomy": {}}},
            ("heart",),
            r"record 0 of split test \(patient '0'\) has no mask of 'heart'.*; add the mask",
        ),
    ],
)
def test_data_that_cannot_be_segmented_are_refused(change, targets, message):
    splits = make_splits(3, 2, 2)
    for split, fields in change.items():
        records = splits[split] if fields else []
        splits[split] = [dataclasses.replace(record, **fields) for record in records]
    with pytest.raises(UserError, match=message):
        check_task(segmentation, splits, Options(targets=targets), FINDINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ()}, r"segmentation.targets is \(\); name at least one target, and each once"),
        ({"targets": ("heart", "Heart")}, "name at least one target, and each once"),
        ({"threshold": 1.0}, "segmentation.threshold is 1.0; use a number between 0 and 1"),
        ({"batch": 0}, "segmentation.batch is 0; use at least 1"),
        ({"decoder": "fpn"}, "segmentation.decoder is 'fpn'; use one of auto, unet, setr"),
    ],
)
def test_options_check_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_training_examples_are_balanced_then_limited():
    positive = np.arange(20) % 4 == 0
    draw_training = segmentation.draw_training
    indices = draw_training(positive, Options(balance=True), 0)
    assert positive[indices].sum() == 5 and len(set(indices.tolist())) == 10
    limited = Options(balance=True, max_train_records=4)
    assert len(draw_training(positive, limited, 0)) == 4
    assert len(draw_training(~positive, Options(balance=True), 0)) == 20
    assert draw_training(positive, Options(balance=True), 1).tolist() != indices.tolist()
    records = make_records(3)[::-1]
    splits = make_splits(4, 2, 2) | {"train": [records[-1]] * 40 + records[:1]}
    options = Options(targets=("nodule",), max_train_records=1)
    message = "no training record has a mask of 'nodule' with config.eval.segmentation.max_train"
    with pytest.raises(UserError, match=message):
        run_task(segmentation, make_model(pooled_tower()), splits, options, findings=FINDINGS)


def test_examples_are_the_best_random_and_worst():
    dice = np.linspace(0, 1, 30)
    indices = segmentation.select_examples(dice, dice < 0.9, 6, 0)
    assert indices[:2] == [26, 25] and indices[-2:] == [1, 0] and len(set(indices)) == 6
    assert indices == sorted(indices, reverse=True)
    assert segmentation.select_examples(dice[:4], np.zeros(4, bool), 6, 0) == [3, 2, 1, 0]
    assert segmentation.select_examples(dice, dice < 2, 0, 0) == []


def test_discs_are_learned_and_a_saved_fit_is_not_repeated(tmp_path, capfd, monkeypatch):
    options = Options(targets=("lungs", "nodule"), epochs=14, **SMALL)
    splits, model = make_splits(), make_model(pooled_tower())
    context = {"options": options, "findings": FINDINGS, "folder": tmp_path}
    values, examples = run_task(segmentation, model, splits, **context)
    assert values["lungs/dice"] > 0.9 and values["nodule/dice_positive"] > 0.8
    assert values["nodule/dice"] > 0.8 > values["mean_mask/nodule/dice"] + 0.2
    # The mean mask of the nodule is empty, which is right in a third of the images.
    assert values["mean_mask/nodule/dice"] == pytest.approx(1 / 3)
    for target in ("lungs", "nodule"):
        low, high = (values[f"{target}/dice_{end}"] for end in ("low", "high"))
        assert low < values[f"{target}/dice"] < high
        assert values[f"{target}/iou"] < values[f"{target}/dice"]
    assert values["n_train"] == 48 and values["n_test"] == 18
    assert [example.name for example in examples] == ["lungs"] * 6 + ["nodule"] * 6
    assert all(example.truth.any() for example in examples)
    dice = [
        2 * (x.truth & x.predicted).sum() / (x.truth.sum() + x.predicted.sum()) for x in examples
    ]
    np.testing.assert_allclose([example.dice for example in examples], dice)
    capfd.readouterr()
    # An image is segmented alike in any order of the images and size of the chunks.
    monkeypatch.setattr(segmentation, "CHUNK_SIZE", 4)
    reversed_splits = splits | {"test": splits["test"][::-1]}
    reversed_values, reversed_examples = run_task(segmentation, model, reversed_splits, **context)
    assert "14/14" in capfd.readouterr().err  # no epoch was fitted again
    # Intervals resample images by their position.
    ends = ("_low", "_high")
    expected = {key: value for key, value in values.items() if not key.endswith(ends)}
    assert {key: reversed_values[key] for key in expected} == pytest.approx(expected)
    masks = {(x.name, x.image.tobytes()): x.predicted for x in reversed_examples}
    pairs = [
        (x.predicted, masks[x.name, x.image.tobytes()])
        for x in examples
        if (x.name, x.image.tobytes()) in masks
    ]
    assert len(pairs) >= 6 and all((a == b).all() for a, b in pairs)


@pytest.mark.parametrize("mode", ["frozen", "frozen_train_norm", "finetune"])
def test_patches_are_decoded_by_setr_and_the_mode_says_what_changes(mode, monkeypatch):
    fits, fit_head, tower = [], segmentation.fit_head, norm_tower()

    def recording_fit_head(*args, **options):
        fits.append(fit_head(*args, **options))
        return fits[-1]

    monkeypatch.setattr(segmentation, "fit_head", recording_fit_head)
    epochs = 14 if mode == "frozen" else 1
    options = Options(targets=("lungs",), epochs=epochs, mode=mode, **SMALL | {"setr_widths": (8,)})
    splits = make_splits(24, 4, 6)
    values, _ = run_task(segmentation, make_model(tower), splits, options, findings=FINDINGS)
    assert "tokens" in fits[0].params["head"]
    assert values["lungs/dice"] > (0.8 if mode == "frozen" else 0)

    def differ(first, second):
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)

    assert differ(tower.variables["batch_stats"], fits[0].stats["tower"]) == (mode != "frozen")
    if mode == "finetune":
        assert differ(tower.variables["params"], fits[0].params["tower"])
    else:
        assert not jax.tree.leaves(fits[0].params["tower"])

"""Segmentation: decoders against slow loops, the loss, the truth, and small fits that learn."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from task_runs import check_task, run_task

from plan_jax.heads import setr, unet
from plan_jax.layers.resize import double_align_corners, resize_align_corners
from plan_jax.tasks import segmentation
from plan_jax.tasks.segmentation import Options, mask_of, mixed_loss
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


def make_records(number, seed=0):
    """Studies with two grey lungs, and in two of three images a bright nodule."""
    random, records = np.random.default_rng(seed), []
    for n in range(number):
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


def splits_of(train=48, val=12, test=18):
    return {
        "train": make_records(train, 1),
        "val": make_records(val, 2),
        "test": make_records(test, 3),
    }


def pooled_tower(factors=(2, 4)):
    """A tower without parameters: grey values, averaged over squares, and their squares."""

    def apply(variables, images, train=False, native=False):
        grey, maps = images.astype(jnp.float32) / 128 - 1, []
        for f in factors:
            small = grey.reshape(-1, SIZE // f, f, SIZE // f, f).mean((2, 4))[..., None]
            maps.append(jnp.concatenate([small, small**2, small**3], -1))
        return Stages(maps[-1].mean((1, 2)), tuple(maps)), variables["batch_stats"]

    return Tower(f"pooled{factors}", {"params": {}, "batch_stats": {}}, apply)


class Patches(nn.Module):
    """Squares of 4 pixels, linearly, with BatchNorm."""

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(-1, SIZE // 4, 4, SIZE // 4, 4).swapaxes(2, 3)
        x = nn.Dense(6)(x.reshape(*x.shape[:3], 16).astype(jnp.float32) / 255)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))


def norm_tower():
    """A tower with BatchNorm."""
    module = Patches()
    made = jax.jit(module.init, static_argnums=2)(
        jax.random.key(0), jnp.zeros((2, SIZE, SIZE, 1)), False
    )

    def apply(variables, images, train=False, native=False):
        seen, changed = module.apply(variables, images, train, mutable=["batch_stats"])
        return Stages(seen.mean((1, 2)), (seen,)), changed["batch_stats"]

    return Tower("norm", made, apply)


def model_of(tower):
    return Model("fake", (8, 8), 0, SIZE, None, None, None, None, tower=tower)


def maps_of(*sizes, batch=2):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(batch, n, n, c)), jnp.float32) for n, c in sizes)


def shapes(net, maps):
    """Shapes of a decoder's parameters and logits; nothing is computed."""
    made = jax.eval_shape(net.init, jax.random.key(0), maps)
    return made["params"], jax.eval_shape(net.apply, made, maps).shape


def literal_conv(x, kernel):
    """3x3, zeros around: one pixel and one tap at a time."""
    batch, rows, columns, _ = x.shape
    out = np.zeros((batch, rows, columns, kernel.shape[-1]))
    for y in range(rows):
        for c in range(columns):
            for i in range(3):
                for j in range(3):
                    v, u = y + i - 1, c + j - 1
                    if 0 <= v < rows and 0 <= u < columns:
                        out[:, y, c] += x[:, v, u] @ kernel[i, j]
    return out


def test_unet_on_the_stages_of_a_resnet50():
    maps = maps_of((32, 4), (16, 6), (8, 8), (4, 10), (2, 12))
    made, logits = shapes(unet.UNet(3, (64, 64), (20, 16, 12, 8, 5)), maps)
    assert logits == (2, 64, 64, 3)
    found = [made[f"block{n}"]["kernel1"].shape[2:] for n in range(1, 6)]
    assert found == [(12 + 10, 20), (20 + 8, 16), (16 + 6, 12), (12 + 4, 8), (8, 5)]
    assert set(made["block1"]) == {"kernel1", "norm1", "kernel2", "norm2"}
    assert "bias" in made["classes"]


def test_unet_takes_the_last_map_of_a_size_and_the_last_widths():
    maps = maps_of((8, 3), (8, 4), (4, 6))
    made, logits = shapes(unet.UNet(1, (32, 32)), maps)
    assert logits == (2, 32, 32, 1)
    found = [made[f"block{n}"]["kernel1"].shape[2:] for n in range(1, 4)]
    assert found == [(6 + 4, 64), (64, 32), (32, 16)]
    with pytest.raises(
        UserError, match="unet_widths has 2 widths, and this tower needs 3 blocks; give 3"
    ):
        shapes(unet.UNet(1, (32, 32), (8, 4)), maps)


def test_every_map_is_seen():
    maps = maps_of((8, 3), (8, 4), (4, 6))
    net = unet.UNet(1, (16, 16), (6, 4))
    made = jax.jit(net.init)(jax.random.key(0), maps)
    slopes = jax.jit(jax.grad(lambda maps: (net.apply(made, maps) ** 2).sum()))(maps)
    assert [bool(abs(slope).max() > 0) for slope in slopes] == [False, True, True]


@pytest.mark.parametrize(
    "sizes, image, steps",
    [
        ((14, 7, 4), 28, [7, 14, 28]),  # 7 is 4 doubled, less one
        ((8, 2), 16, [4, 8, 16]),  # a step without a map
        ((12, 8), 24, [12, 24]),  # two maps that are not a doubling apart
        ((14, 7), 32, [14, 28]),  # 28 is resized to 32
        ((16,), 16, []),
    ],
)
def test_unet_reaches_the_image_from_any_sizes(sizes, image, steps):
    found = unet.block_sizes([(n, n) for n in sizes[::-1]], (image, image))
    assert [step[0] for step in found] == steps
    maps = maps_of(*((n, 2) for n in sizes))
    assert shapes(unet.UNet(1, (image, image), (4, 4, 4)), maps)[1] == (2, image, image, 1)


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
@pytest.mark.parametrize("width", [0, 2])
def test_the_folded_convolution_is_that_of_the_doubled_map(size, width):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 4, 3, 5)), random.normal(size=(3, 3, 5 + width, 3))
    skip = random.normal(size=(2, *size, width)) if width else None
    large = np.kron(x, np.ones((1, 2, 2, 1)))[:, : size[0], : size[1]]
    wanted = literal_conv(large if skip is None else np.concatenate([large, skip], -1), kernel)
    parts = [None if part is None else jnp.asarray(part, jnp.float32) for part in (x, skip, kernel)]
    np.testing.assert_allclose(unet.convolve_upsampled(*parts, size), wanted, atol=2e-5)


def test_setr_has_a_block_for_each_doubling():
    net = setr.SETR(2, (32, 32), (12, 10, 8, 6))
    for patch, blocks in ((16, 4), (8, 3), (4, 2), (1, 0)):
        made, logits = shapes(net, maps_of((32 // patch, 5)))
        assert logits == (2, 32, 32, 2)
        assert sum(name.startswith("conv") for name in made) == blocks
        assert made["tokens"]["kernel"].shape == (5, 5)
    for grid in (1, 3):  # of 32 and 10.7 pixels a patch: the rest is resized
        assert shapes(net, maps_of((grid, 5)))[1] == (2, 32, 32, 2)


def test_maps_are_doubled_with_their_corners_kept():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)

    def line(values, count):
        return np.interp(np.linspace(0, len(values) - 1, count), np.arange(len(values)), values)

    def wanted(rows, columns):
        return np.apply_along_axis(line, 2, np.apply_along_axis(line, 1, x, rows), columns)

    np.testing.assert_allclose(jax.jit(double_align_corners)(x), wanted(6, 8), atol=1e-5)
    stretched = jax.jit(resize_align_corners, static_argnums=1)(x, (7, 5))
    np.testing.assert_allclose(stretched, wanted(7, 5), atol=1e-5)
    one = jax.jit(double_align_corners)(np.ones((1, 1, 1, 3)))
    np.testing.assert_array_equal(one, np.ones((1, 2, 2, 3)))


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_that_of_a_literal_loop(soft):
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(3, 4, 5, 2)).astype(np.float32)
    masks = random.random(logits.shape).astype(np.float32)
    masks = masks if soft else masks < 0.3
    focal, dices = [], []
    for k in range(2):
        both = total = 0.0
        for x, t in zip(
            logits[..., k].ravel().tolist(), masks[..., k].ravel().tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-x))
            entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
            focal.append((1 / (1 + math.exp(x * (2 * t - 1)))) ** 2 * entropy)
            both, total = both + p * t, total + p + t
        dices.append((2 * both + 1) / (total + 1))
    wanted = 10 * sum(focal) / len(focal) - sum(map(math.log, dices)) / 2
    order, loss = random.permutation(3), jax.jit(mixed_loss, static_argnames="focal")
    assert float(loss(logits, masks)) == pytest.approx(wanted, rel=1e-5)
    assert float(loss(logits[order], masks[order])) == pytest.approx(wanted, rel=1e-5)
    weighted = wanted + 5 * sum(focal) / len(focal)
    assert float(loss(logits, masks, focal=15.0)) == pytest.approx(weighted, rel=1e-5)


def test_the_loss_stays_finite_at_the_ends():
    judged = jax.jit(jax.value_and_grad(mixed_loss))
    for value in (-200.0, 200.0):
        for truth in (0.0, 1.0):
            loss, slope = judged(jnp.full((1, 2, 2, 1), value), jnp.full((1, 2, 2, 1), truth))
            assert jnp.isfinite(loss) and jnp.isfinite(slope).all()


def test_the_truth_of_a_target():
    lungs = {"left lung": disc(10, 5, 4), "right lung": disc(10, 25, 4), "heart": disc(20, 15, 3)}
    phrases = (
        Phrase("a", 0, mask=disc(8, 8, 3)),
        Phrase("b", 0, boxes=((20.0, 20.0, 24.0, 26.0), (0.0, 0.0, 2.0, 2.0))),
        Phrase("c", 1, boxes=((5.0, 25.0, 9.0, 29.0),)),
        Phrase("d", -1, mask=disc(28, 28, 3)),
    )
    record = Record(np.zeros((SIZE, SIZE, 1), np.uint8), "", phrases=phrases, anatomy=lungs)
    box = np.zeros((3, SIZE, SIZE), bool)
    box[0, 20:26, 20:24] = box[0, :2, :2] = box[1, 25:29, 5:9] = True
    nodule = disc(8, 8, 3) | box[0]
    for target, wanted in {
        "lungs": lungs["left lung"] | lungs["right lung"],
        "heart": lungs["heart"],
        "left lung": lungs["left lung"],
        "nodule": nodule,
        "effusion": box[1],
        "findings": nodule | box[1] | disc(28, 28, 3),
    }.items():
        found = mask_of(record, target, FINDINGS)
        assert found.dtype == bool and (found == wanted).all(), target
    lungs["left lung"] = lungs["left lung"] * np.float32(0.25)
    assert set(np.unique(mask_of(record, "lungs", FINDINGS)).tolist()) == {0.0, 0.25, 1.0}


@pytest.mark.parametrize(
    "change, targets, said",
    [
        ({}, (), "name at least one"),
        ({}, ("heart", "Heart"), "each once"),
        ({}, ("spleen",), "'spleen'; use some of lungs, findings, nodule, effusion, right lung"),
        ({"train": []}, ("lungs",), "records in train, which has none"),
        ({}, ("effusion",), "needs masks or boxes of 'effusion', and no train record"),
        ({"train": {"anatomy": {}}}, ("lungs",), "needs masks of 'lungs', and no train record"),
        ({"test": {"anatomy": {}}}, ("heart",), r"record 0 of test \(patient '0'\) has no mask"),
    ],
)
def test_what_cannot_be_segmented_is_said_early(change, targets, said):
    splits = splits_of(3, 2, 2)
    for split, what in change.items():
        splits[split] = [dataclasses.replace(one, **what) for one in splits[split]] if what else []
    with pytest.raises(UserError, match=said):
        check_task(segmentation, splits, Options(targets=targets), FINDINGS)


def test_training_rows_are_balanced_then_limited():
    positive = np.arange(20) % 4 == 0
    chosen = segmentation.draw(positive, Options(balance=True), 0)
    assert positive[chosen].sum() == 5 and len(set(chosen.tolist())) == 10
    assert len(segmentation.draw(positive, Options(balance=True, max_train_records=4), 0)) == 4
    assert len(segmentation.draw(~positive, Options(balance=True), 0)) == 20
    other = segmentation.draw(positive, Options(balance=True), 1)
    assert other.tolist() != chosen.tolist()
    with pytest.raises(UserError, match="no mask of 'nodule' to learn from"):
        few = splits_of(4, 2, 2) | {"train": make_records(3)[::-1]}
        few["train"] = [few["train"][-1]] * 40 + few["train"][:1]
        options = Options(targets=("nodule",), max_train_records=1)
        run_task(segmentation, model_of(pooled_tower()), few, options, findings=FINDINGS)


def test_rows_are_the_best_random_and_worst():
    dice = np.linspace(0, 1, 30)
    shown = segmentation.pick_rows(dice, dice < 0.9, 6, 0)
    assert shown[:2] == [26, 25] and shown[-2:] == [1, 0] and len(set(shown)) == 6
    assert shown == sorted(shown, reverse=True)
    assert segmentation.pick_rows(dice[:4], np.zeros(4, bool), 6, 0) == [3, 2, 1, 0]
    assert segmentation.pick_rows(dice, dice < 2, 0, 0) == []


def test_discs_are_learned_and_a_fit_is_kept(tmp_path, capfd, monkeypatch):
    options = Options(targets=("lungs", "nodule"), epochs=14, **SMALL)
    splits, model = splits_of(), model_of(pooled_tower())
    ask = {"options": options, "findings": FINDINGS, "folder": tmp_path}
    values, rows = run_task(segmentation, model, splits, **ask)
    assert values["lungs/dice"] > 0.9 and values["nodule/dice_positive"] > 0.8
    assert values["nodule/dice"] > 0.8 > values["mean_mask/nodule/dice"] + 0.2
    assert values["mean_mask/nodule/dice"] == pytest.approx(1 / 3)  # nothing, in a third right
    for target in ("lungs", "nodule"):
        low, high = (values[f"{target}/dice_{end}"] for end in ("low", "high"))
        assert low < values[f"{target}/dice"] < high
        assert values[f"{target}/iou"] < values[f"{target}/dice"]
    assert values["n_train"] == 48 and values["n_test"] == 18
    assert [row.name for row in rows] == ["lungs"] * 6 + ["nodule"] * 6
    assert all(row.truth.any() for row in rows)
    overlap = [
        2 * (r.truth & r.predicted).sum() / (r.truth.sum() + r.predicted.sum()) for r in rows
    ]
    np.testing.assert_allclose([row.dice for row in rows], overlap)
    capfd.readouterr()
    # In another order and in other company every image is segmented as before.
    monkeypatch.setattr(segmentation, "PART", 4)
    turned = splits | {"test": splits["test"][::-1]}
    again, others = run_task(segmentation, model, turned, **ask)
    assert "14/14" in capfd.readouterr().err  # nothing was left to fit
    ends = ("_low", "_high")  # drawn in another order
    kept = {key: value for key, value in values.items() if not key.endswith(ends)}
    assert {key: again[key] for key in kept} == pytest.approx(kept)
    table = {(row.name, row.image.tobytes()): row.predicted for row in others}
    keys = [(row.name, row.image.tobytes()) for row in rows]
    both = [
        (row.predicted, table[key]) for row, key in zip(rows, keys, strict=True) if key in table
    ]
    assert len(both) >= 6 and all((a == b).all() for a, b in both)


@pytest.mark.parametrize("mode", ["frozen", "frozen_train_norm", "finetune"])
def test_patches_are_decoded_by_setr_and_only_a_tower_in_training_mode_moves(mode, monkeypatch):
    fits, real, tower = [], segmentation.fit_head, norm_tower()

    def fitted(*arguments, **options):
        fits.append(real(*arguments, **options))
        return fits[-1]

    monkeypatch.setattr(segmentation, "fit_head", fitted)
    epochs = 14 if mode == "frozen" else 1
    options = Options(targets=("lungs",), epochs=epochs, mode=mode, **SMALL | {"setr_widths": (8,)})
    values, _ = run_task(
        segmentation, model_of(tower), splits_of(24, 4, 6), options, findings=FINDINGS
    )
    assert "tokens" in fits[0].params["head"]
    assert values["lungs/dice"] > (0.8 if mode == "frozen" else 0)

    def moved(before, after):
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)

    assert moved(tower.variables["batch_stats"], fits[0].stats["tower"]) == (mode != "frozen")
    if mode == "finetune":
        assert moved(tower.variables["params"], fits[0].params["tower"])
    else:
        assert not jax.tree.leaves(fits[0].params["tower"])

"""ASG's equations against literal loops, and the regions of cropped images."""

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import l2_normalise, softmax

from plan_jax.data import transforms
from plan_jax.methods import asg

HYPER = asg.Hyper(num_layers=1, num_heads=2, hidden_dim=8, dropout_rate=0.0)
KEY = jax.random.key(1)
LOSS = jax.jit(asg.loss, static_argnames="hyper")


def literal_roi_align(image, box, aligned):
    """Computes RoIAlign of one box (in cells) to one cell, sample by sample as torchvision does."""
    rows, columns, _ = image.shape
    x0, y0, x1, y1 = box
    offset = 0.5 if aligned else 0.0
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    across, down = max(int(np.ceil(width)), 1), max(int(np.ceil(height)), 1)
    total = np.zeros(image.shape[-1])
    for i in range(down):
        for j in range(across):
            y = y0 - offset + (i + 0.5) * height / down
            x = x0 - offset + (j + 0.5) * width / across
            if y < -1 or y > rows or x < -1 or x > columns:
                continue
            y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
            y_low, x_low = int(y), int(x)
            y_high, x_high = min(y_low + 1, rows - 1), min(x_low + 1, columns - 1)
            a, b = y - y_low, x - x_low
            total += (1 - a) * ((1 - b) * image[y_low, x_low] + b * image[y_low, x_high])
            total += a * ((1 - b) * image[y_high, x_low] + b * image[y_high, x_high])
    return total / (across * down)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_the_mean_of_bilinear_samples(aligned):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(5, 7, 3)).astype(np.float32)
    corner = rng.uniform(0, 0.7, (9, 2))
    boxes = np.concatenate([corner, np.minimum(corner + rng.uniform(0.01, 0.6, (9, 2)), 1)], -1)
    boxes[0], boxes[1] = (0, 0, 1, 1), (0.5, 0.5, 0.52, 0.52)
    actual = asg.roi_align(jnp.asarray(image.reshape(35, 3)), jnp.asarray(boxes), (5, 7), aligned)
    for region, box in zip(actual, boxes, strict=True):
        expected = literal_roi_align(image, box * np.array([7, 5, 7, 5]), aligned)
        np.testing.assert_allclose(region, expected, rtol=1e-4, atol=1e-5)


def test_roi_align_of_a_box_of_whole_cells_is_their_mean():
    image = jnp.arange(16.0).reshape(16, 1)
    actual = asg.roi_align(image, jnp.array([[0.25, 0.5, 0.75, 1.0]]), (4, 4), True)
    np.testing.assert_allclose(actual, [[(9 + 10 + 13 + 14) / 4]], rtol=1e-6)
    shifted = asg.roi_align(image, jnp.array([[0.25, 0.5, 0.75, 1.0]]), (4, 4), False)
    assert float(shifted[0, 0]) > float(actual[0, 0]), "unaligned boxes lie half a cell further on"


def literal_region_loss(images, texts, extra, hyper):
    """Computes the region loss, image by image and region by region."""
    total, count = 0.0, 0
    for b in range(len(texts.mask)):
        pixels = l2_normalise(np.asarray(images.local[b])).reshape(*images.grid, -1)
        words = l2_normalise(np.asarray(texts.local[b]))
        rho, sigma = [], []  # of the regions that have both a box and words
        for box, region_words in zip(extra["regions"][b], extra["region_words"][b], strict=True):
            if box[2] > box[0] and region_words.any():
                scale = np.array([images.grid[1], images.grid[0]] * 2)
                rho.append(literal_roi_align(pixels, np.asarray(box) * scale, hyper.aligned))
                sigma.append(words[np.asarray(region_words)].mean(0))
        for table in (np.array(rho) @ np.array(sigma).T, np.array(sigma) @ np.array(rho).T):
            for r in range(len(rho)):
                total -= np.log(softmax(table[r] / hyper.tau)[r])
        count += len(rho)
    return total / max(count, 1)


def literal_pair_losses(images, texts, labels, hyper):
    """Computes the losses of whole images and reports: with hard and with soft targets."""
    x, y = (l2_normalise(np.asarray(side.pooled)) for side in (images, texts))
    scores = x @ y.T / hyper.tau
    size, soft_loss, hard_loss = len(scores), 0.0, 0.0
    tags = [row / max(np.sqrt(row.sum()), 1e-6) for row in (np.asarray(labels) > 0).astype(float)]
    for table in (scores, scores.T):
        for i in range(size):
            target = np.array(
                [
                    (1 - hyper.soft_share) * (i == j)
                    + hyper.soft_share * tags[i] @ tags[j]
                    + hyper.target_smoothing
                    for j in range(size)
                ]
            )
            target, p = target / target.sum(), softmax(table[i])
            divergence = sum(target * np.log(target / p)) + sum(p * np.log(p / target))
            soft_loss += divergence / 2 / size / 2
            hard_loss -= np.log(p[i]) / size
    return hard_loss, soft_loss


@pytest.mark.parametrize("pairs", [2, 6])
def test_each_term_is_the_literal_loop(pairs):
    images, texts = features.draw_features(pairs=pairs)
    extra = features.draw_extra(texts)
    params, memory = asg.init(KEY, features.make_context(), HYPER)
    loss, (metrics, _) = LOSS(
        params, memory, images, texts, extra, key=KEY, step=jnp.array(0), hyper=HYPER
    )
    hard_loss, soft_loss = literal_pair_losses(images, texts, extra["labels"], HYPER)
    np.testing.assert_allclose(metrics["loss_global"], hard_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_soft"], soft_loss, rtol=1e-3)
    region_loss = literal_region_loss(images, texts, extra, HYPER)
    np.testing.assert_allclose(metrics["loss_region"], region_loss, rtol=1e-4)
    assert pairs == 2 or region_loss > 0
    total = hard_loss + region_loss + 5 * metrics["loss_tags"] + soft_loss
    np.testing.assert_allclose(loss, total, rtol=1e-4)


def test_tags_are_predicted_for_each_image_and_unknown_counts_as_absent():
    images, texts = features.draw_features(pairs=3)
    labels = features.draw_extra(texts)["labels"].at[0, 0].set(-1)
    params, memory = asg.init(KEY, features.make_context(), HYPER)
    actual = asg.tag_losses(params["decoder"], memory["tags"], images.raw, labels, KEY, HYPER, None)
    for b in range(3):
        logits = asg.build_decoder(HYPER).apply(
            {"params": params["decoder"]}, memory["tags"], images.raw[b], False
        )
        truth, p = np.asarray(labels[b]) > 0, 1 / (1 + np.exp(-np.asarray(logits)))
        expected = -np.mean(np.where(truth, np.log(p), np.log(1 - p)))
        np.testing.assert_allclose(actual[b], expected, rtol=1e-4)


def test_the_decoder_is_a_literal_pre_norm_transformer():
    tags, pixels = features.make_context().tags, jax.random.normal(KEY, (5, 12))
    params = asg.build_decoder(HYPER).init(KEY, tags, pixels, False)["params"]
    assert "project" not in params, "equal widths need no projection"
    arrays = jax.tree.map(np.asarray, params)
    layer = arrays["layer0"]

    def norm(x, affine):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * affine["scale"] + affine["bias"]

    def dense(x, affine):
        return x @ affine["kernel"] + affine["bias"]

    def attend(x, y, name):
        q, k, v = (
            dense(z, layer[name][part]).reshape(len(z), HYPER.num_heads, -1)
            for z, part in ((x, "query"), (y, "key"), (y, "value"))
        )
        out = np.zeros_like(q)
        for head in range(HYPER.num_heads):
            for n in range(len(q)):
                weights = softmax(k[:, head] @ q[n, head] / np.sqrt(q.shape[-1]))
                out[n, head] = weights @ v[:, head]
        return dense(out.reshape(len(out), -1), layer[name]["out"])

    x = np.asarray(tags)
    y = norm(x, layer["norm1"])
    x = x + attend(y, y, "attention")
    x = x + attend(norm(x, layer["norm_cross"]), np.asarray(pixels), "cross")
    y = dense(norm(x, layer["norm2"]), layer["fc1"])
    x = x + dense(np.maximum(y, 0), layer["fc2"])
    expected = dense(norm(x, arrays["norm"]), arrays["logit"])
    actual = asg.build_decoder(HYPER).apply({"params": params}, tags, pixels, False)
    np.testing.assert_allclose(actual, expected[:, 0], rtol=1e-3, atol=1e-4)


def test_dropout_differs_between_images_and_keys():
    images, texts = features.draw_features(pairs=4)
    hyper = asg.Hyper(num_layers=1, num_heads=2, hidden_dim=8, dropout_rate=0.5)
    params, memory = asg.init(KEY, features.make_context(), hyper)
    labels = features.draw_extra(texts)["labels"]

    def losses(key):
        return asg.tag_losses(
            params["decoder"], memory["tags"], images.raw, labels, key, hyper, None
        )

    copies = images.raw[:1].repeat(4, 0), labels[:1].repeat(4, 0)
    copy_losses = asg.tag_losses(params["decoder"], memory["tags"], *copies, KEY, hyper, None)
    assert len(set(np.asarray(copy_losses).round(6).tolist())) > 1, "all images drop the same"
    assert not np.allclose(losses(KEY), losses(jax.random.key(2)))


def test_soft_targets_sum_to_one_and_follow_the_tags():
    labels = jnp.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, -1]], jnp.int8)
    target, transposed = asg.soft_targets(labels, asg.Hyper())
    np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(transposed, target.T, rtol=1e-6)
    assert target[0, 1] > 1000 * target[0, 2]
    np.testing.assert_allclose(target[0, :2], [1 / 1.2, 0.2 / 1.2], rtol=1e-4)
    # A study without tags resembles no other study, not even another one without tags.
    np.testing.assert_allclose(target[3, 3], 1, rtol=1e-4)


def test_regions_without_box_or_without_words_do_not_count():
    images, texts = features.draw_features(pairs=3)
    extra = features.draw_extra(texts)
    params, memory = asg.init(KEY, features.make_context(), HYPER)

    def region_loss(extra):
        options = {"key": KEY, "step": jnp.array(0), "hyper": HYPER}
        return LOSS(params, memory, images, texts, extra, **options)[1][0]["loss_region"]

    extended = {
        "labels": extra["labels"],
        "regions": jnp.pad(extra["regions"], ((0, 0), (0, 1), (0, 0)), constant_values=0.3),
        "region_words": jnp.pad(extra["region_words"], ((0, 0), (0, 1), (0, 0))),
    }
    np.testing.assert_allclose(region_loss(extended), region_loss(extra), rtol=1e-5)
    extended["region_words"] = extended["region_words"].at[:, -1, 0].set(True)  # words, but no box
    np.testing.assert_allclose(region_loss(extended), region_loss(extra), rtol=1e-5)


def test_images_without_any_region_give_zero_and_no_nan():
    images, texts = features.draw_features(pairs=3)
    extra = features.draw_extra(texts)
    extra["regions"] = jnp.zeros_like(extra["regions"])
    params, memory = asg.init(KEY, features.make_context(), HYPER)

    def loss(images):
        options = {"key": KEY, "step": jnp.array(0), "hyper": HYPER}
        return asg.loss(params, memory, images, texts, extra, **options)

    grads, (metrics, _) = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))(images)
    assert metrics["loss_region"] == 0
    assert np.isfinite(grads.local).all() and (np.asarray(grads.local) == 0).all()


def test_a_moved_image_moves_its_regions():
    """A region keeps its content when the image is shifted; one outside the image gets no box."""
    image = np.zeros((16, 16, 1), np.uint8)
    image[4:8, 8:12] = 200
    boxes = np.array([[8, 4, 12, 8], [0, 12, 3, 16]], np.float32)
    for down, right in ((0, 0), (4, -4), (-4, 4)):
        moved = transforms.shift_image(image, down, right)
        relative_boxes = transforms.shift_boxes(boxes, down, right, 16) / 16
        pixels = jnp.asarray(moved.reshape(256, 1), jnp.float32)
        region = asg.roi_align(pixels, jnp.asarray(relative_boxes), (16, 16), True)
        np.testing.assert_allclose(region[0], 200)
        x0, y0, x1, y1 = relative_boxes[1]
        is_empty = x1 <= x0 or y1 <= y0
        assert is_empty == ((down, right) == (4, -4))

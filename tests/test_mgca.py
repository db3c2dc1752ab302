"""MGCA's equations against literal loops, each deviation by itself, and several devices."""

from dataclasses import replace

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import l2_normalise, softmax
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import mgca
from plan_jax.types import UserError

KEY = jax.random.key(0)
FREEZE = 10
HYPER = mgca.Hyper(
    num_prototypes=4,
    freeze_prototype_steps=FREEZE,
    tile_size=2,
    weight_token=0.7,
    weight_prototype=0.5,
)


def draw_features(pairs=16, has_image_attention=True, **sizes):
    """Returns ragged features; without image attention they are those of a ResNet."""
    images, texts = features.draw_features(pairs=pairs, fine=False, **sizes)
    return images if has_image_attention else images.replace(attention=None), texts


def init_params(hyper):
    """Returns MGCA's own parameters."""
    return mgca.init(KEY, features.make_context(), hyper)[0]


def compute_loss(params, images, texts, step, hyper, axis=None):
    """Returns the loss with its parts and the memory, as `mgca.loss` does."""
    return mgca.loss(params, {}, images, texts, {}, key=KEY, step=step, hyper=hyper, axis=axis)


GRADIENT = jax.value_and_grad(compute_loss, (0, 1, 2), has_aux=True, allow_int=True)
JITTED_GRADIENT = jax.jit(GRADIENT, static_argnums=4)
TOKENS = jax.jit(mgca.token_losses, static_argnums=2)
WEIGHT = jax.jit(mgca.word_attention_weights, static_argnums=1)
CODES = jax.jit(mgca.sinkhorn_codes, static_argnums=1)


def loss_and_gradients(images, texts, step=FREEZE):
    """Returns the loss at a step, and its gradients (prototypes, images, texts)."""
    params = init_params(HYPER)
    (loss, _), gradients = JITTED_GRADIENT(params, images, texts, jnp.array(step), HYPER)
    return loss, gradients


def slice_rows(tree, start, stop):
    """Returns the rows from `start` to `stop` of every leaf."""
    return jax.tree.map(lambda x: x[start:stop], tree)


def cross_entropy(row, true):
    """Returns the cross-entropy of one row of logits; `true` is the index of the right class."""
    return -np.log(softmax(row)[true])


def literal_weights(attention):
    """Returns the weights of one text or image: zeros dropped, the rest clipped, sum 1."""
    low, high = np.percentile([a for a in attention if a > 0], [10, 90])
    clipped = np.array([min(max(a, low), high) if a > 0 else 0.0 for a in attention])
    return clipped / clipped.sum()


def literal_contrast(items, contexts, weights):
    """Computes half of the weighted sum of both cross-entropies, item by item."""
    logits, total = items @ contexts.T / 0.1, 0.0
    for i, weight in enumerate(weights):
        if weight > 0:
            total += weight * (cross_entropy(logits[i], i) + cross_entropy(logits[:, i], i))
    return total / 2


def literal_token_losses(images, texts, normalise_contexts=True, padded_negatives=False):
    """Computes the token contrast, pair by pair, word by word and patch by patch.

    With `padded_negatives` padded words are candidates too, with weight 0.
    """
    losses = []
    for b, mask in enumerate(np.asarray(texts.mask)):
        patches, words = (l2_normalise(np.asarray(x.local[b], np.float64)) for x in (images, texts))
        word_weights = literal_weights(np.asarray(texts.attention[b], np.float64))
        real_words = words[mask]
        items, weights = real_words, word_weights[mask]
        if padded_negatives:
            items, weights = words, word_weights
        regions = [softmax(patches @ word / 0.1) @ patches for word in items]
        loss = literal_contrast(items, l2_normalise(np.stack(regions)), weights)
        contexts = np.stack([softmax(real_words @ patch / 0.1) @ real_words for patch in patches])
        contexts = l2_normalise(contexts) if normalise_contexts else contexts
        weights = np.full(len(patches), 1 / len(patches))
        if images.attention is not None:
            weights = literal_weights(np.asarray(images.attention[b], np.float64))
        losses.append(loss + literal_contrast(patches, contexts, weights))
    return np.array(losses)


def literal_codes(scores):
    """Computes Sinkhorn's codes as published: on exp, with the divisions by K and B."""
    q = np.exp(scores / 0.05).T
    q = q / q.sum()
    for _ in range(3):
        for k in range(len(q)):
            q[k] = q[k] / q[k].sum() / len(q)
        for b in range(q.shape[1]):
            q[:, b] = q[:, b] / q[:, b].sum() / q.shape[1]
    return (q * q.shape[1]).T


def literal_batch_losses(images, texts, prototypes):
    """Computes the contrast of reports and that of prototypes, row by row."""
    v, t = (l2_normalise(np.asarray(x.pooled, np.float64)) for x in (images, texts))
    c, table = l2_normalise(np.asarray(prototypes, np.float64)), v @ t.T / 0.07
    report = sum(np.mean([cross_entropy(x[i], i) for i in range(len(x))]) for x in (table, table.T))
    sides = v @ c.T, t @ c.T
    total = 0.0
    for source, predicted in (sides, sides[::-1]):
        target = literal_codes(source)
        for b in range(len(v)):
            total -= sum(target[b] * np.log(softmax(predicted[b] / 0.2))) / len(v) / 2
    return report, total


@pytest.mark.parametrize("pairs", [2, 16])
def test_the_loss_is_the_literal_formula(pairs):
    images, texts = draw_features(pairs)
    params = init_params(HYPER)
    (loss, (metrics, memory)), _ = JITTED_GRADIENT(params, images, texts, jnp.array(FREEZE), HYPER)
    report, prototype = literal_batch_losses(images, texts, params["prototypes"])
    token = literal_token_losses(images, texts).mean()
    np.testing.assert_allclose(metrics["loss_global"], report, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_token"], token, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_prototype"], prototype, rtol=1e-5)
    np.testing.assert_allclose(loss, report + 0.7 * token + 0.5 * prototype, rtol=1e-5)
    assert memory == {}


def test_the_constants_are_the_published_ones():
    hyper = mgca.Hyper()
    assert (hyper.tau, hyper.tau_token, hyper.tau_prototype) == (0.07, 0.1, 0.2)
    assert (hyper.num_prototypes, hyper.epsilon, hyper.sinkhorn_iterations) == (500, 0.05, 3)
    assert (hyper.weight_global, hyper.weight_token, hyper.weight_prototype) == (1.0, 1.0, 1.0)
    prototypes = init_params(hyper)["prototypes"]
    assert prototypes.shape == (500, 8)
    np.testing.assert_allclose(jnp.linalg.norm(prototypes, axis=-1), 1.0, rtol=1e-5)


def test_attention_is_clipped_to_its_own_percentiles():
    """The 10th and 90th percentiles of .01 to .11 are .02 and .10; zeros do not count."""
    attention = jnp.asarray([*np.arange(1, 12) / 100, 0.0, 0.0])[None]
    actual = jax.jit(mgca.clip_attention)(attention, jnp.ones(attention.shape, bool))[0]
    expected = np.array([2, *range(2, 11), 10, 0, 0]) / 66
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_weights_belong_to_real_words_only_and_have_no_gradient():
    """[CLS] and [SEP] are not words here, so no weight is lost to them."""
    images, texts = draw_features()
    weight = np.asarray(WEIGHT(texts, HYPER))
    np.testing.assert_allclose(weight.sum(1), 1.0, rtol=1e-5)
    assert (weight[~np.asarray(texts.mask)] == 0).all() and (weight[0] > 0).all()
    _, (_, *sides) = loss_and_gradients(images, texts)
    assert all((np.asarray(side.attention) == 0).all() for side in sides)
    empty_weights = np.asarray(WEIGHT(texts.replace(mask=texts.mask & False), HYPER))
    assert (empty_weights == 0).all()


def test_without_attention_all_words_have_the_same_weight():
    _, texts = draw_features()
    actual = WEIGHT(texts.replace(attention=None), HYPER)
    expected = np.asarray(texts.mask) / np.asarray(texts.mask).sum(1, keepdims=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_the_option_weighs_a_word_by_the_pieces_after_its_own():
    """.1 .2 .3 has the 10th percentile .12; the pieces after them have .2 .3 .05 and .08."""
    mask = jnp.arange(5)[None] < 3
    own, after = (
        jnp.pad(jnp.array([row]), ((0, 0), (0, 2))) for row in ([0.1, 0.2, 0.3], [0.2, 0.3, 0.05])
    )
    texts = slice_rows(draw_features()[1], 0, 1)
    texts = texts.replace(attention=own, next_attention=after, mask=mask)
    actual = WEIGHT(texts, HYPER)[0]
    np.testing.assert_allclose(actual, np.array([0.12, 0.2, 0.28, 0, 0]) / 0.6, rtol=1e-5)
    actual = WEIGHT(texts, replace(HYPER, shift_word_weights=True))[0]
    np.testing.assert_allclose(actual, np.array([0.2, 0.28, 0.08, 0, 0]) / 0.56, rtol=1e-5)


def test_weights_of_words_without_attention_to_pieces_cannot_be_shifted():
    texts = draw_features()[1]
    assert texts.attention is not None and texts.next_attention is None
    with pytest.raises(UserError, match="True, .*; use config.text.pool cls"):
        mgca.word_attention_weights(texts, replace(HYPER, shift_word_weights=True))


def test_padded_words_are_negatives_with_the_option_only():
    images, texts = draw_features()
    hyper, padded_texts = replace(HYPER, padded_negatives=True), features.append_padding(texts)
    expected = literal_token_losses(images, padded_texts, padded_negatives=True)
    np.testing.assert_allclose(TOKENS(images, padded_texts, hyper), expected, rtol=1e-5)
    assert np.abs(expected - literal_token_losses(images, padded_texts)).min() > 1e-3


def test_the_option_keeps_contexts_of_a_vit_raw_but_not_those_of_a_resnet():
    hyper = replace(HYPER, normalise_patch_context=False)
    images, texts = draw_features()
    expected = literal_token_losses(images, texts, normalise_contexts=False)
    np.testing.assert_allclose(TOKENS(images, texts, hyper), expected, rtol=1e-5)
    assert np.abs(expected - literal_token_losses(images, texts)).max() > 1e-3
    resnet, _ = draw_features(has_image_attention=False)
    expected = literal_token_losses(resnet, texts)
    np.testing.assert_allclose(TOKENS(resnet, texts, hyper), expected, rtol=1e-5)


def test_a_caption_that_fills_every_slot_keeps_its_last_word():
    images, texts = draw_features()
    assert texts.mask[0].all()
    assert np.abs(loss_and_gradients(images, texts)[1][2].local[0, -1]).max() > 0


def test_padding_changes_neither_the_loss_nor_its_gradients():
    images, texts = draw_features()
    num_words = texts.mask.shape[1]
    expected_loss, (_, *expected) = loss_and_gradients(images, texts)
    actual_loss, (_, *actual) = loss_and_gradients(images, features.append_padding(texts))
    np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-5)
    image_gradient, text_gradient = (np.asarray(side.local) for side in actual)
    np.testing.assert_allclose(image_gradient, expected[0].local, rtol=1e-3, atol=1e-6)
    real_gradient, padding_gradient = np.split(text_gradient, [num_words], 1)
    np.testing.assert_allclose(real_gradient, expected[1].local, rtol=1e-3, atol=1e-6)
    assert (padding_gradient == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_texts_of_one_word_or_none_are_finite(count):
    images, texts = draw_features()
    mask = jnp.broadcast_to(jnp.arange(texts.mask.shape[1]) < count, texts.mask.shape)
    short_texts = texts.replace(
        mask=mask, local=texts.local * mask[..., None], attention=texts.attention * mask
    )
    loss, gradients = loss_and_gradients(images, short_texts)
    assert np.isfinite(loss)
    for side in gradients[1:]:
        assert np.isfinite(side.local).all() and np.isfinite(side.pooled).all()


@pytest.mark.parametrize(("num_items", "num_prototypes"), [(2, 16), (64, 8)])
def test_codes_sum_to_one_and_use_all_prototypes_alike(num_items, num_prototypes):
    rng = np.random.default_rng(3)
    items, prototypes = (
        l2_normalise(rng.normal(size=(count, 24))) for count in (num_items, num_prototypes)
    )
    scores = items @ prototypes.T
    hyper = replace(HYPER, num_prototypes=num_prototypes)
    actual = np.asarray(CODES(jnp.asarray(scores, jnp.float32), hyper))
    np.testing.assert_allclose(actual, literal_codes(scores), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(actual.sum(1), 1.0, rtol=1e-5)
    if num_items > num_prototypes:
        # Without any iteration, with three of them and with ten.
        softmax_codes = np.stack([softmax(row / 0.05) for row in scores])
        converged = CODES(jnp.asarray(scores, jnp.float32), replace(hyper, sinkhorn_iterations=10))
        bias = [
            np.abs(codes.mean(0) * num_prototypes - 1).max()
            for codes in (softmax_codes, actual, np.asarray(converged))
        ]
        assert bias[1] < bias[0] / 2 and bias[2] < bias[1] / 5


def test_codes_are_finite_where_exp_overflows():
    scores = jnp.array([[50.0, -50.0, 0.0], [49.0, 0.0, -50.0]])
    assert np.isfinite(CODES(scores, HYPER)).all()


def test_prototypes_move_only_after_the_freeze_without_recompiling():
    images, texts = draw_features()
    _, trained = loss_and_gradients(images, texts, FREEZE)
    num_programs = JITTED_GRADIENT._cache_size()
    _, frozen = loss_and_gradients(images, texts, FREEZE - 1)
    assert JITTED_GRADIENT._cache_size() == num_programs
    assert (np.asarray(frozen[0]["prototypes"]) == 0).all()
    assert (np.abs(trained[0]["prototypes"]).max(1) > 0).all()
    for side in (1, 2):
        np.testing.assert_allclose(frozen[side].pooled, trained[side].pooled, rtol=1e-6)


def test_frozen_prototypes_train_both_towers():
    images, texts = draw_features()

    def prototype_loss(images, texts):
        return mgca.prototype_loss(
            init_params(HYPER)["prototypes"], images, texts, jnp.array(0), HYPER
        )

    for gradient in jax.jit(jax.grad(prototype_loss, (0, 1)))(images.pooled, texts.pooled):
        assert (np.abs(gradient).max(1) > 0).all()


def test_only_the_direction_of_a_prototype_matters():
    """So its gradient is tangential to the sphere."""
    images, texts = draw_features()
    params = init_params(HYPER)
    scaled = {"prototypes": params["prototypes"] * jnp.arange(1.0, 5.0)[:, None]}
    loss, gradients = loss_and_gradients(images, texts)
    (scaled_loss, _), _ = JITTED_GRADIENT(scaled, images, texts, jnp.array(FREEZE), HYPER)
    np.testing.assert_allclose(scaled_loss, loss, rtol=1e-5)
    radial = jnp.sum(gradients[0]["prototypes"] * params["prototypes"], -1)
    np.testing.assert_allclose(radial, 0.0, atol=1e-6)


def test_prototypes_are_the_only_parameters():
    assert set(init_params(HYPER)) == {"prototypes"}


def test_maps_are_cosines_and_words_weigh_as_in_the_loss():
    images, texts = draw_features()
    maps, weight = jax.jit(mgca.heatmap, static_argnums=4)({}, {}, images, texts, HYPER)
    words, pixels = (l2_normalise(np.asarray(side.local[0])) for side in (texts, images))
    expected = words @ pixels.T
    np.testing.assert_allclose(maps[0], expected, rtol=1e-4, atol=1e-6)
    assert (np.asarray(maps)[~np.asarray(texts.mask)] == 0).all()
    expected = [literal_weights(np.asarray(row)) for row in texts.attention]
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


def feature_gradients(gradients):
    """Returns the gradients of the images' and texts' `pooled` and `local`: [b ...] each."""
    return [x for side in gradients[1:] for x in (side.pooled, side.local)]


def run_on_eight_devices(hyper, images, texts):
    """Returns the losses and the gradients of eight devices, averaged as in a training step."""
    sharded, replicated = PartitionSpec(parallel.AXIS), PartitionSpec()

    def device_step(params, images, texts):
        step = jnp.array(FREEZE)
        (loss, _), gradients = GRADIENT(params, images, texts, step, hyper, parallel.AXIS)
        local_gradients = jax.tree.map(lambda g: g / 8, feature_gradients(gradients))
        return loss[None], jax.lax.pmean(gradients[0], parallel.AXIS), local_gradients

    mapped = jax.shard_map(
        device_step,
        mesh=parallel.make_mesh(8),
        in_specs=(replicated, sharded, sharded),
        out_specs=(sharded, replicated, sharded),
        check_vma=False,
    )
    return jax.jit(mapped)(init_params(hyper), images, texts)


@pytest.mark.parametrize("per_device", [False, True])
def test_eight_devices_equal_one_or_the_mean_of_their_parts(per_device):
    images, texts = draw_features()
    hyper = replace(HYPER, per_device=per_device)
    losses, own_gradients, local_gradients = run_on_eight_devices(hyper, images, texts)
    loss, gradients = loss_and_gradients(images, texts)
    expected_prototypes, expected_local = gradients[0]["prototypes"], feature_gradients(gradients)
    if per_device:
        slices = [slice_rows((images, texts), n, n + 2) for n in range(0, 16, 2)]
        parts = [loss_and_gradients(*sides) for sides in slices]
        mean_loss = np.mean([part_loss for part_loss, _ in parts])
        assert abs(mean_loss - loss) > 1e-2
        loss = mean_loss
        expected_prototypes = np.mean([part[0]["prototypes"] for _, part in parts], 0)
        expected_local = [feature_gradients(part) for _, part in parts]
        expected_local = jax.tree.map(lambda *rows: np.concatenate(rows) / 8, *expected_local)
    np.testing.assert_allclose(losses, np.full(8, loss), rtol=1e-5)
    actual_prototypes = own_gradients["prototypes"]
    np.testing.assert_allclose(actual_prototypes, expected_prototypes, rtol=1e-3, atol=1e-5)
    for actual, expected in zip(local_gradients, expected_local, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_tiles_change_nothing():
    images, texts = draw_features()
    actual = TOKENS(images, texts, replace(HYPER, tile_size=3))  # does not divide the pairs
    np.testing.assert_allclose(actual, literal_token_losses(images, texts), rtol=1e-5)


def test_memory_of_the_token_loss_is_at_most_linear_in_the_batch():
    """The compiled gradient needs less temporary memory than the batch's tables [P P] would."""
    sizes = {}
    gradient = jax.grad(
        lambda *sides: mgca.token_losses(*sides, HYPER).sum(), (0, 1), allow_int=True
    )
    for pairs in (16, 64):
        lowered = jax.jit(gradient).lower(*draw_features(pairs=pairs, words=24, grid=(10, 10)))
        sizes[pairs] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert sizes[64] <= 4 * sizes[16] * 1.1, sizes
    assert sizes[64] < 64 * (10 * 10) ** 2 * 4, sizes

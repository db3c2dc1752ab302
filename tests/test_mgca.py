"""MGCA's equations against slow literal loops, its departures one by one, and its devices."""

from dataclasses import replace

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import mgca

KEY = jax.random.key(0)
FREEZE = 10
HYPER = mgca.Hyper(
    num_prototypes=4,
    freeze_prototype_steps=FREEZE,
    tile_size=2,
    weight_token=0.7,
    weight_prototype=0.5,
)


def make(pairs=16, vit=True, **sizes):
    """Ragged features with the attention of both summaries, or of the text's alone (ResNet)."""
    images, texts = features.make(pairs=pairs, fine=False, **sizes)
    return images if vit else images.replace(attention=None), texts


def params_of(hyper):
    return mgca.init(KEY, features.make_context(), hyper)[0]


def apply(params, images, texts, step, hyper, axis=None):
    return mgca.loss(params, {}, images, texts, {}, key=KEY, step=step, hyper=hyper, axis=axis)


GRADIENT = jax.value_and_grad(apply, (0, 1, 2), has_aux=True, allow_int=True)
RUN = jax.jit(GRADIENT, static_argnums=4)
TOKENS = jax.jit(mgca.token_losses, static_argnums=2)
WEIGHT = jax.jit(mgca.word_attention_weights, static_argnums=1)
CODES = jax.jit(mgca.sinkhorn_codes, static_argnums=1)


def run(images, texts, step=FREEZE):
    """Value and gradients (prototypes, images, texts) at a step; compiled once for each shape."""
    (value, _), grads = RUN(params_of(HYPER), images, texts, jnp.array(step), HYPER)
    return value, grads


def take(tree, *rows):
    return jax.tree.map(lambda x: x[slice(*rows)], tree)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def miss(row, true):
    """Cross-entropy of one row of logits."""
    return -np.log(softmax(row)[true])


def slow_weights(attention):
    """Drop zeros, clip the rest to its own percentiles, sum 1: one text or image."""
    low, high = np.percentile([a for a in attention if a > 0], [10, 90])
    clipped = np.array([min(max(a, low), high) if a > 0 else 0.0 for a in attention])
    return clipped / clipped.sum()


def slow_side(items, contexts, weights):
    """Half of the weighted sum of both cross-entropies, item by item."""
    logits, total = items @ contexts.T / 0.1, 0.0
    for i, weight in enumerate(weights):
        if weight > 0:
            total += weight * (miss(logits[i], i) + miss(logits[:, i], i))
    return total / 2


def slow_tokens(images, texts, scale=True, columns=False):
    """Both sides of the token contrast, pair by pair, word by word and patch by patch."""
    values = []
    for b, mask in enumerate(np.asarray(texts.mask)):
        z, u = (unit(np.asarray(x.local[b], np.float64)) for x in (images, texts))
        weights = slow_weights(np.asarray(texts.attention[b], np.float64))
        u_, weights = (u, weights) if columns else (u[mask], weights[mask])
        regions = np.stack([unit(softmax(z @ word / 0.1) @ z) for word in u_])
        value = slow_side(u_, regions, weights)
        contexts = np.stack([softmax(u[mask] @ patch / 0.1) @ u[mask] for patch in z])
        weights = np.full(len(z), 1 / len(z))
        if images.attention is not None:
            weights = slow_weights(np.asarray(images.attention[b], np.float64))
        values.append(value + slow_side(z, unit(contexts) if scale else contexts, weights))
    return np.array(values)


def slow_codes(scores):
    """Sinkhorn as published: on exp, with the divisions by K and B."""
    q = np.exp(scores / 0.05).T
    q = q / q.sum()
    for _ in range(3):
        for k in range(len(q)):
            q[k] = q[k] / q[k].sum() / len(q)
        for b in range(q.shape[1]):
            q[:, b] = q[:, b] / q[:, b].sum() / q.shape[1]
    return (q * q.shape[1]).T


def slow_batch(images, texts, prototypes):
    """Report and prototype contrast of a batch."""
    v, t = (unit(np.asarray(x.pooled, np.float64)) for x in (images, texts))
    c, table = unit(np.asarray(prototypes, np.float64)), v @ t.T / 0.07
    report = sum(np.mean([miss(x[i], i) for i in range(len(x))]) for x in (table, table.T))
    sides = v @ c.T, t @ c.T
    total = 0.0
    for source, goal in (sides, sides[::-1]):
        target = slow_codes(source)
        for b in range(len(v)):
            total -= sum(target[b] * np.log(softmax(goal[b] / 0.2))) / len(v) / 2
    return report, total


@pytest.mark.parametrize("pairs", [2, 16])
def test_the_loss_is_the_literal_formula(pairs):
    images, texts = make(pairs)
    params = params_of(HYPER)
    (value, (metrics, memory)), _ = RUN(params, images, texts, jnp.array(FREEZE), HYPER)
    report, prototype = slow_batch(images, texts, params["prototypes"])
    token = slow_tokens(images, texts).mean()
    np.testing.assert_allclose(metrics["loss_global"], report, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_token"], token, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_prototype"], prototype, rtol=1e-5)
    np.testing.assert_allclose(value, report + 0.7 * token + 0.5 * prototype, rtol=1e-5)
    assert memory == {}


def test_the_constants_are_the_published_ones():
    hyper = mgca.Hyper()
    assert (hyper.tau, hyper.tau_token, hyper.tau_prototype) == (0.07, 0.1, 0.2)
    assert (hyper.num_prototypes, hyper.epsilon, hyper.sinkhorn_iterations) == (500, 0.05, 3)
    assert (hyper.weight_global, hyper.weight_token, hyper.weight_prototype) == (1.0, 1.0, 1.0)
    made = params_of(hyper)["prototypes"]
    assert made.shape == (500, 8)
    np.testing.assert_allclose(jnp.linalg.norm(made, axis=-1), 1.0, rtol=1e-5)


def test_attention_is_clipped_to_its_own_percentiles():
    """Of .01 .. .11 the tenth is .02 and the ninetieth .10; zeros are not counted among them."""
    paid = jnp.asarray([*np.arange(1, 12) / 100, 0.0, 0.0])[None]
    got = jax.jit(mgca.clip_attention)(paid, jnp.ones(paid.shape, bool))[0]
    want = np.array([2, *range(2, 11), 10, 0, 0]) / 66
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_weights_are_of_real_words_alone_and_take_no_gradient():
    """No share is lost to [CLS] or [SEP], which are no words here."""
    images, texts = make()
    weight = np.asarray(WEIGHT(texts, HYPER))
    np.testing.assert_allclose(weight.sum(1), 1.0, rtol=1e-5)
    assert (weight[~np.asarray(texts.mask)] == 0).all() and (weight[0] > 0).all()
    assert all((np.asarray(side.attention) == 0).all() for side in run(images, texts)[1][1:])
    nothing = np.asarray(WEIGHT(texts.replace(mask=texts.mask & False), HYPER))
    assert (nothing == 0).all()


def test_a_tower_without_attention_weighs_words_alike():
    _, texts = make()
    got = WEIGHT(texts.replace(attention=None), HYPER)
    want = np.asarray(texts.mask) / np.asarray(texts.mask).sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_shifted_word_takes_the_weight_of_the_next():
    """.1 .2 .3 becomes .2 .3 .3, of which the tenth percentile is .22; the last keeps its own."""
    paid, mask = jnp.array([[0.1, 0.2, 0.3, 0.0, 0.0]]), jnp.arange(5)[None] < 3
    texts = take(make()[1], 1).replace(attention=paid, mask=mask)
    got = WEIGHT(texts, replace(HYPER, shift_word_weights=True))[0]
    np.testing.assert_allclose(got, np.array([0.22, 0.3, 0.3, 0, 0]) / 0.82, rtol=1e-5)
    got = WEIGHT(texts, HYPER)[0]
    np.testing.assert_allclose(got, np.array([0.12, 0.2, 0.28, 0, 0]) / 0.6, rtol=1e-5)


def test_padded_words_are_columns_only_if_asked():
    images, texts = make()
    hyper, wide = replace(HYPER, padded_negatives=True), features.pad(texts)
    want = slow_tokens(images, wide, columns=True)
    np.testing.assert_allclose(TOKENS(images, wide, hyper), want, rtol=1e-5)
    assert np.abs(want - slow_tokens(images, wide)).min() > 1e-3


def test_a_vits_contexts_are_left_raw_only_if_asked_and_never_a_resnets():
    hyper = replace(HYPER, normalise_patch_context=False)
    images, texts = make()
    want = slow_tokens(images, texts, scale=False)
    np.testing.assert_allclose(TOKENS(images, texts, hyper), want, rtol=1e-5)
    assert np.abs(want - slow_tokens(images, texts)).max() > 1e-3
    resnet, _ = make(vit=False)
    want = slow_tokens(resnet, texts)
    np.testing.assert_allclose(TOKENS(resnet, texts, hyper), want, rtol=1e-5)


def test_a_caption_that_fills_every_slot_keeps_its_last_word():
    images, texts = make()
    assert texts.mask[0].all()
    assert np.abs(run(images, texts)[1][2].local[0, -1]).max() > 0


def test_padding_changes_neither_the_loss_nor_its_gradients():
    images, texts = make()
    words = texts.mask.shape[1]
    (value, narrow), (value_, wide) = run(images, texts), run(images, features.pad(texts))
    np.testing.assert_allclose(value_, value, rtol=1e-5)
    np.testing.assert_allclose(wide[1].local, narrow[1].local, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(wide[2].local[:, :words], narrow[2].local, rtol=1e-3, atol=1e-6)
    assert (np.asarray(wide[2].local)[:, words:] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_texts_of_one_word_or_none_are_finite(count):
    images, texts = make()
    mask = jnp.broadcast_to(jnp.arange(texts.mask.shape[1]) < count, texts.mask.shape)
    few = texts.replace(
        mask=mask, local=texts.local * mask[..., None], attention=texts.attention * mask
    )
    value, grads = run(images, few)
    assert np.isfinite(value)
    for side in grads[1:]:
        assert np.isfinite(side.local).all() and np.isfinite(side.pooled).all()


@pytest.mark.parametrize("items,prototypes", [(2, 16), (64, 8)])
def test_codes_sum_to_one_and_use_all_prototypes_alike(items, prototypes):
    rng = np.random.default_rng(3)
    scores = unit(rng.normal(size=(items, 24))) @ unit(rng.normal(size=(prototypes, 24))).T
    hyper = replace(HYPER, num_prototypes=prototypes)
    got = np.asarray(CODES(jnp.asarray(scores, jnp.float32), hyper))
    np.testing.assert_allclose(got, slow_codes(scores), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1.0, rtol=1e-5)
    if items > prototypes:
        rough = np.stack([softmax(row / 0.05) for row in scores])
        more = CODES(jnp.asarray(scores, jnp.float32), replace(hyper, sinkhorn_iterations=10))
        bias = [np.abs(x.mean(0) * prototypes - 1).max() for x in (rough, got, np.asarray(more))]
        assert bias[1] < bias[0] / 2 and bias[2] < bias[1] / 5


def test_codes_are_finite_where_exp_is_not():
    scores = jnp.array([[50.0, -50.0, 0.0], [49.0, 0.0, -50.0]])
    assert np.isfinite(CODES(scores, HYPER)).all()


def test_prototypes_move_only_after_the_freeze_without_recompiling():
    images, texts = make()
    free, compiled = run(images, texts, FREEZE)[1], RUN._cache_size()
    frozen = run(images, texts, FREEZE - 1)[1]
    assert RUN._cache_size() == compiled
    assert (np.asarray(frozen[0]["prototypes"]) == 0).all()
    assert (np.abs(free[0]["prototypes"]).max(1) > 0).all()
    for side in (1, 2):
        np.testing.assert_allclose(frozen[side].pooled, free[side].pooled, rtol=1e-6)


def test_prototypes_teach_both_towers_while_they_are_held():
    images, texts = make()

    def prototype_loss(images, texts):
        return mgca.prototype_loss(
            params_of(HYPER)["prototypes"], images, texts, jnp.array(0), HYPER
        )

    for grad in jax.jit(jax.grad(prototype_loss, (0, 1)))(images.pooled, texts.pooled):
        assert (np.abs(grad).max(1) > 0).all()


def test_prototypes_count_by_their_direction_and_move_along_the_sphere():
    images, texts = make()
    params = params_of(HYPER)
    longer = {"prototypes": params["prototypes"] * jnp.arange(1.0, 5.0)[:, None]}
    value, grads = run(images, texts)
    moved = RUN(longer, images, texts, jnp.array(FREEZE), HYPER)[0][0]
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    radial = jnp.sum(grads[0]["prototypes"] * params["prototypes"], -1)
    np.testing.assert_allclose(radial, 0.0, atol=1e-6)


def test_no_other_attention_has_parameters():
    assert set(params_of(HYPER)) == {"prototypes"}


def test_maps_are_cosines_and_words_weigh_as_in_the_loss():
    images, texts = make()
    maps, weight = jax.jit(mgca.heatmap, static_argnums=4)({}, {}, images, texts, HYPER)
    want = unit(np.asarray(texts.local[0])) @ unit(np.asarray(images.local[0])).T
    np.testing.assert_allclose(maps[0], want, rtol=1e-4, atol=1e-6)
    assert (np.asarray(maps)[~np.asarray(texts.mask)] == 0).all()
    want = [slow_weights(np.asarray(row)) for row in texts.attention]
    np.testing.assert_allclose(weight, want, rtol=1e-4)


def moving(grads):
    """The gradients of features that are trained: [b ...] each."""
    return [x for side in grads[1:] for x in (side.pooled, side.local)]


def spread(hyper, images, texts):
    """Values and gradients of eight devices, as the training step takes their mean."""
    cut, whole = PartitionSpec(parallel.AXIS), PartitionSpec()

    def part(params, images, texts):
        step = jnp.array(FREEZE)
        (value, _), grads = GRADIENT(params, images, texts, step, hyper, parallel.AXIS)
        own = jax.tree.map(lambda g: g / 8, moving(grads))
        return value[None], jax.lax.pmean(grads[0], parallel.AXIS), own

    mapped = jax.shard_map(
        part,
        mesh=parallel.make_mesh(8),
        in_specs=(whole, cut, cut),
        out_specs=(cut, whole, cut),
        check_vma=False,
    )
    return jax.jit(mapped)(params_of(hyper), images, texts)


@pytest.mark.parametrize("per_device", [False, True])
def test_eight_devices_equal_one_or_the_mean_of_their_parts(per_device):
    images, texts = make()
    got, moved, own = spread(replace(HYPER, per_device=per_device), images, texts)
    want, grads = run(images, texts)
    if per_device:
        parts = [run(*take((images, texts), n, n + 2)) for n in range(0, 16, 2)]
        whole, want = want, np.mean([value for value, _ in parts])
        assert abs(want - whole) > 1e-2
        prototypes = np.mean([g[0]["prototypes"] for _, g in parts], 0)
        rest = [moving(g) for _, g in parts]
        rest = jax.tree.map(lambda *g: np.concatenate(g) / 8, *rest)
    else:
        prototypes, rest = grads[0]["prototypes"], moving(grads)
    np.testing.assert_allclose(got, np.full(8, want), rtol=1e-5)
    np.testing.assert_allclose(moved["prototypes"], prototypes, rtol=1e-3, atol=1e-5)
    for actual, expected in zip(own, rest, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_tiles_change_nothing():
    images, texts = make()
    got = TOKENS(images, texts, replace(HYPER, tile_size=3))  # which does not divide the pairs
    np.testing.assert_allclose(got, slow_tokens(images, texts), rtol=1e-5)


def test_memory_of_the_token_loss_is_at_most_linear_in_the_batch():
    """Temporary memory of the compiled gradient: less than the batch's tables [P P] would take."""
    sizes = {}
    gradient = jax.grad(
        lambda *sides: mgca.token_losses(*sides, HYPER).sum(), (0, 1), allow_int=True
    )
    for pairs in (16, 64):
        lowered = jax.jit(gradient).lower(*make(pairs=pairs, words=24, grid=(10, 10)))
        sizes[pairs] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert sizes[64] <= 4 * sizes[16] * 1.1, sizes
    assert sizes[64] < 64 * (10 * 10) ** 2 * 4, sizes

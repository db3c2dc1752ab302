"""PLACE's equations against literal loops, and what its decoder must not depend on."""

from dataclasses import replace

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import info_nce, l2_normalise, softmax
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import place
from plan_jax.types import MethodContext, UserError

HYPER = place.Hyper(num_queries=4, num_heads=2, tile_size=2)
MATCHES = ("max", "soft", "attn")
ATTENTION_HYPER = replace(HYPER, match="attn", num_decoder_blocks=0)
KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
PARAMS, _ = jax.jit(place.init, static_argnums=(1, 2))(KEY, MethodContext(8), HYPER)
SIMILARITY = jax.jit(place.similarity, static_argnums=4)
HEATMAP = jax.jit(place.heatmap, static_argnums=4)
EXTRACT = jax.jit(place.extract_observations, static_argnums=2)
SCORES = jax.jit(place.late_interaction, static_argnums=3)
SAMPLE_MASK = jax.jit(place.sample_patch_mask, static_argnums=(1, 2, 3))
POSITIONS = jax.jit(place.sinusoidal_positions, static_argnums=(0, 1))
DECODE = jax.jit(lambda hyper, *inputs: place.Decoder(hyper).apply(*inputs), static_argnums=0)


def draw_normal(*shape):
    """Returns standard normal numbers as Float32[shape]."""
    return RNG.normal(size=shape).astype(np.float32)


def draw_batch(pairs=16, raw=True):
    """Returns ragged features; with `raw`, the encoder's pixels have 5 channels."""
    images, texts = features.draw_features(pairs=pairs, fine=False)
    return images.replace(raw=jnp.asarray(draw_normal(pairs, 9, 5)) if raw else None), texts


def compute_loss(params, images, texts, axis=None, hyper=HYPER):
    """Returns the loss of a batch and its parts."""
    loss, (metrics, _) = place.loss(
        params, {}, images, texts, {}, key=KEY, step=jnp.array(0), hyper=hyper, axis=axis
    )
    return loss, metrics


LOSS = jax.jit(compute_loss, static_argnames=("axis", "hyper"))
LOSS_AND_GRADIENT = jax.value_and_grad(compute_loss, (0, 1, 2), has_aux=True, allow_int=True)
GRADIENT = jax.jit(LOSS_AND_GRADIENT, static_argnames=("axis", "hyper"))


def literal_sentences(texts, hyper):
    """Computes equation 2: a list of unit vectors, one for each sentence, for each text."""
    head = {name: np.asarray(x) for name, x in PARAMS["sentence"].items()}
    sentences_of_texts = []
    for local, sentence in zip(np.asarray(texts.local), np.asarray(texts.sentence), strict=True):
        sentences = []
        for m in range(hyper.max_sentences):
            words = [local[n] for n in range(len(local)) if sentence[n] == m]
            if words:
                sentences.append(l2_normalise(np.mean(words, 0) @ head["kernel"] + head["bias"]))
        sentences_of_texts.append(sentences)
    return sentences_of_texts


def literal_score(observations, sentences, hyper):
    """Computes equation 3 for one image and one text."""
    scores = []
    for t in sentences:
        table = np.array([t @ o for o in observations])
        if hyper.match == "attn":
            scores.append(t @ l2_normalise(softmax(table / hyper.tau_match) @ observations))
        elif hyper.match == "soft":
            scores.append(hyper.tau_match * np.log(np.mean(np.exp(table / hyper.tau_match))))
        else:
            scores.append(table.max())
    return np.mean(scores)


def literal_correlations(tokens):
    """Computes equation 6, pair by pair."""
    scores = (tokens - tokens.mean(0)) / tokens.std(0)
    return np.array([[l2_normalise(p) @ l2_normalise(q) for q in scores] for p in scores])


def literal_loss(images, texts, hyper):
    """Computes equations 4-10 with loops over pairs, sentences and patches.

    Observations and the decoder's predictions come from the modules themselves.
    """
    observations = np.asarray(EXTRACT(PARAMS, images.local, HYPER)[0])
    sentences, size = literal_sentences(texts, hyper), len(observations)
    pixels = images.local.shape[1]
    x, y = l2_normalise(np.asarray(images.pooled)), l2_normalise(np.asarray(texts.pooled))
    total = info_nce(x @ y.T / hyper.tau) + info_nce(y @ x.T / hyper.tau)
    if hyper.match == "attn":
        items = [(i, t) for i in range(size) for t in sentences[i]]
        mixtures = [
            l2_normalise(softmax(observations[i] @ t / hyper.tau_match) @ observations[i])
            for i, t in items
        ]
        table = np.array([[t @ v for v in mixtures] for _, t in items]) / hyper.tau_local
    else:
        table = (
            np.array([[literal_score(o, t, hyper) for t in sentences] for o in observations])
            / hyper.tau_local
        )
    total += info_nce(table) + info_nce(table.T)
    hidden = np.asarray(SAMPLE_MASK(KEY, size, pixels, HYPER))
    code = POSITIONS(images.grid, x.shape[1])
    tokens = images.local if images.raw is None else images.raw
    variables = {"params": PARAMS["decoder"]}
    predictions = DECODE(hyper, variables, images.local, hidden, texts.local, texts.mask, code)
    for i in range(size):
        overlaps = [
            o @ p
            for k, o in enumerate(observations[i])
            for n, p in enumerate(observations[i])
            if k != n
        ]
        total += hyper.weight_variety * np.mean(np.square(overlaps)) / size
        true = literal_correlations(np.asarray(tokens[i]))
        predicted = l2_normalise(np.asarray(predictions[i]) - np.asarray(predictions[i]).mean(0))
        errors = [
            (predicted[p] @ predicted[q] - true[p, q]) ** 2
            for p in range(pixels)
            for q in range(pixels)
            if p != q and hidden[i, [p, q]].any()
        ]
        total += np.mean(errors) / size
    return total


@pytest.mark.parametrize("pairs, match", [(2, "max"), *((16, match) for match in MATCHES)])
def test_scores_are_the_literal_loop(pairs, match):
    images, texts = draw_batch(pairs)
    hyper = replace(HYPER, match=match)
    observations = np.asarray(EXTRACT(PARAMS, images.local, HYPER)[0])
    expected = [
        [literal_score(o, t, hyper) for t in literal_sentences(texts, hyper)] for o in observations
    ]
    actual = SIMILARITY(PARAMS, {}, images, texts, hyper)
    np.testing.assert_allclose(actual["local"], expected, rtol=1e-4, atol=1e-5)
    cosines = l2_normalise(np.asarray(images.pooled)) @ l2_normalise(np.asarray(texts.pooled)).T
    expected_sum = cosines / hyper.tau + np.array(expected) / hyper.tau_local
    np.testing.assert_allclose(actual["both"], expected_sum, rtol=1e-4, atol=1e-4)


def test_late_interaction_of_a_small_example():
    observations = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    sentences = jnp.array([[[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]])
    real = jnp.array([[True, True, False]])
    np.testing.assert_allclose(
        SCORES(observations, sentences, real, HYPER), [[(0.8 + 1.0) / 2]], rtol=1e-5
    )


@pytest.mark.parametrize(
    "pairs, hyper", [(16, HYPER), (16, ATTENTION_HYPER), (2, replace(HYPER, match="soft"))]
)
def test_loss_is_the_literal_loop(pairs, hyper):
    images, texts = draw_batch(pairs, raw=pairs > 2)
    if pairs == 2:
        actual, metrics = LOSS(PARAMS, images, texts, hyper=hyper)
    else:
        (actual, metrics), _ = GRADIENT(PARAMS, images, texts, hyper=hyper)
    np.testing.assert_allclose(actual, literal_loss(images, texts, hyper), rtol=1e-3)
    assert set(metrics) == {"loss_global", "loss_pcma", "loss_cce", "loss_variety"}


def test_sentences_beyond_the_maximum_are_left_out():
    images, texts = draw_batch()
    hyper = replace(HYPER, max_sentences=1)
    is_first = texts.sentence == 0
    first_sentences = texts.replace(mask=is_first, sentence=jnp.where(is_first, 0, -1))
    expected = SIMILARITY(PARAMS, {}, images, first_sentences, HYPER)["local"]
    actual = SIMILARITY(PARAMS, {}, images, texts, hyper)["local"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    maps, weight = HEATMAP(PARAMS, {}, images, texts, hyper)
    assert (np.asarray(weight) == np.asarray(is_first)).all()
    assert (np.asarray(maps)[~np.asarray(is_first)] == 0).all()


@pytest.mark.parametrize("match", MATCHES)
def test_the_order_of_sentences_does_not_matter(match):
    images, texts = draw_batch()
    hyper = replace(HYPER, match=match)
    last = texts.sentence.max(1, keepdims=True)
    reordered = texts.replace(sentence=jnp.where(texts.mask, last - texts.sentence, -1))
    sides = texts, reordered
    expected, actual = (SIMILARITY(PARAMS, {}, images, side, hyper)["local"] for side in sides)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    expected, actual = (HEATMAP(PARAMS, {}, images, side, HYPER)[0] for side in sides)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_permuting_queries_permutes_observations_and_changes_no_score():
    images, texts = draw_batch()
    hyper, order = replace(HYPER, num_blocks=2), np.array([2, 0, 3, 1])
    extractor = PARAMS["extractor"] | {"block1": PARAMS["extractor"]["block0"]}
    permuted = extractor | {"queries": extractor["queries"][order]}
    expected, expected_attention = EXTRACT({"extractor": extractor}, images.local, hyper)
    actual, actual_attention = EXTRACT({"extractor": permuted}, images.local, hyper)
    np.testing.assert_allclose(actual, expected[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual_attention, expected_attention[:, order], rtol=1e-4, atol=1e-5)
    sentences, mask = l2_normalise(draw_normal(16, 2, 8)), np.ones((16, 2), bool)
    for match in MATCHES:
        hyper = replace(HYPER, match=match)
        actual_scores = SCORES(actual, sentences, mask, hyper)
        expected_scores = SCORES(expected, sentences, mask, hyper)
        np.testing.assert_allclose(actual_scores, expected_scores, rtol=1e-4, atol=1e-5)


def test_attention_sums_to_one_over_the_pixels_and_permutes_with_them():
    images, _ = draw_batch()
    order = RNG.permutation(9)
    expected, expected_attention = EXTRACT(PARAMS, images.local, HYPER)
    actual, actual_attention = EXTRACT(PARAMS, images.local[:, order], HYPER)
    expected_attention = expected_attention[..., order]
    np.testing.assert_allclose(actual_attention.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual_attention, expected_attention, rtol=1e-4, atol=1e-5)


def test_overlap_is_0_for_orthogonal_and_1_for_equal_observations():
    orthogonal, _ = np.linalg.qr(draw_normal(4, 4))
    equal = np.repeat(l2_normalise(draw_normal(1, 4)), 4, 0)
    paired = orthogonal[[0, 0, 1, 1]]
    actual = place.observation_overlap(jnp.asarray(np.stack([orthogonal, equal, paired])))
    np.testing.assert_allclose(actual, [0, 1, 4 / 12], atol=1e-5)
    assert place.observation_overlap(jnp.ones((1, 1, 4))) == 0


def test_correlations_are_symmetric_positive_and_1_with_themselves():
    tokens = draw_normal(9, 5) * np.array([1, 9, 0.1, 3, 1], np.float32) + 4
    actual = np.asarray(jax.jit(place.patch_correlations)(tokens))
    np.testing.assert_allclose(actual, literal_correlations(tokens), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(actual, actual.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(actual), 1.0, rtol=1e-5)
    assert np.linalg.eigvalsh(actual.astype(float)).min() > -1e-5


def test_correlation_error_counts_only_pairs_that_touch_a_hidden_patch():
    true, hidden = jnp.asarray(draw_normal(4, 4)), jnp.array([True, False, False, False])
    correlation_error = jax.jit(place.correlation_error)
    assert correlation_error(true, true, hidden) == 0
    # A patch with itself, and a pair of visible patches.
    difference = jnp.zeros((4, 4)).at[(0, 1), (0, 2)].set(9.0)
    assert correlation_error(true + difference, true, hidden) == 0
    difference = jnp.zeros((4, 4)).at[0, 1].set(3.0)
    np.testing.assert_allclose(correlation_error(true + difference, true, hidden), 9 / 6, rtol=1e-5)


@pytest.mark.parametrize(("mask_ratio", "count"), [(0.5, 4), (0.0, 1), (1.0, 9)])
def test_images_have_equally_many_hidden_patches_but_not_the_same(mask_ratio, count):
    hyper = replace(HYPER, mask_ratio=mask_ratio)
    hidden = np.asarray(SAMPLE_MASK(KEY, 16, 9, hyper))
    assert (hidden.sum(1) == count).all()
    assert len({tuple(row) for row in hidden}) > 1 or mask_ratio == 1.0
    hidden_with_new_key = np.asarray(SAMPLE_MASK(jax.random.key(1), 16, 9, hyper))
    assert (hidden != hidden_with_new_key).any() or mask_ratio == 1.0


def test_the_decoder_does_not_depend_on_hidden_patches():
    images, texts = draw_batch(2)
    hidden, code = SAMPLE_MASK(KEY, 2, 9, HYPER), POSITIONS(images.grid, 8)

    def total(pixels, words):
        variables = {"params": PARAMS["decoder"]}
        y = place.Decoder(HYPER).apply(variables, pixels, hidden, words, texts.mask, code)
        return jnp.sum(jnp.sin(y))

    pixels, words = jax.jit(jax.grad(total, (0, 1)))(images.local, texts.local)
    assert ((np.abs(pixels).max(-1) > 0) == ~np.asarray(hidden)).all()
    assert ((np.abs(words).max(-1) > 0) == np.asarray(texts.mask)).all()


def test_the_target_of_cce_has_no_gradient_even_where_it_is_the_decoders_input():
    images, texts = draw_batch(2, raw=False)
    hidden = SAMPLE_MASK(KEY, 2, 9, HYPER)

    def total(local):
        return place.correlation_losses(
            PARAMS, images.replace(local=local), texts, hidden, HYPER
        ).sum()

    grads = jax.jit(jax.grad(total))(images.local)
    assert ((np.abs(grads).max(-1) > 0) == ~np.asarray(hidden)).all()


def test_all_patches_have_different_position_codes():
    code = np.asarray(POSITIONS((3, 4), 8))
    assert code.shape == (12, 8) and len(np.unique(code.round(4), axis=0)) == 12
    np.testing.assert_allclose(code[5], [*np.sin([1, 0.01] * 2), *np.cos([1, 0.01] * 2)], rtol=1e-5)
    assert POSITIONS((3, 3), 6).shape == (9, 6)


@pytest.mark.parametrize("hyper", [HYPER, ATTENTION_HYPER])
def test_padded_words_change_nothing(hyper):
    images, texts = draw_batch()
    padded = features.append_padding(texts)
    (expected, _), _ = GRADIENT(PARAMS, images, texts, hyper=hyper)
    actual, _ = LOSS(PARAMS, images, padded, hyper=hyper)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    maps, weight = HEATMAP(PARAMS, {}, images, texts, HYPER)
    padded_maps, padded_weight = HEATMAP(PARAMS, {}, images, padded, HYPER)
    np.testing.assert_allclose(padded_maps[:, :5], maps, rtol=1e-4, atol=1e-5)
    assert (np.asarray(weight) == np.asarray(texts.mask)).all()
    assert (np.asarray(padded_weight) == np.asarray(padded.mask)).all()


def test_the_map_of_a_word_is_the_attention_of_its_sentence():
    images, texts = draw_batch()
    observations, attention = (np.asarray(x) for x in EXTRACT(PARAMS, images.local, HYPER))
    maps, _ = HEATMAP(PARAMS, {}, images, texts, HYPER)
    for i, sentences in enumerate(literal_sentences(texts, HYPER)):
        for n, m in enumerate(np.asarray(texts.sentence)[i]):
            if m < 0:  # padding
                attention_of_word = np.zeros_like(attention[i, 0])
            else:
                query_weights = softmax(observations[i] @ sentences[m] / 0.1)
                attention_of_word = query_weights @ attention[i] * 9  # 1 if uniform
            expected = attention_of_word / (1 + attention_of_word)
            np.testing.assert_allclose(maps[i, n], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hyper", [HYPER, ATTENTION_HYPER])
def test_all_but_the_target_and_padding_have_a_gradient(hyper):
    images, texts = draw_batch()
    _, (params, image_gradients, text_gradients) = GRADIENT(PARAMS, images, texts, hyper=hyper)
    if hyper == ATTENTION_HYPER:  # its decoder has no blocks, which alone attend to words
        used_names = ("token", "norm_out", "out")
        params["decoder"] = {name: params["decoder"][name] for name in used_names}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path
    for side in (image_gradients, text_gradients):
        assert np.abs(side.pooled).max() > 0 and np.isfinite(side.local).all()
    assert (np.abs(image_gradients.local).max(-1) > 0).all()
    assert (np.asarray(image_gradients.raw) == 0).all()
    assert ((np.abs(text_gradients.local).max(-1) > 0) == np.asarray(texts.mask)).all()


@pytest.mark.parametrize("hyper", [HYPER, ATTENTION_HYPER])
def test_empty_texts_stay_finite(hyper):
    images, texts = draw_batch()
    texts = texts.replace(mask=jnp.zeros_like(texts.mask), sentence=-jnp.ones_like(texts.sentence))
    for leaf in jax.tree.leaves(GRADIENT(PARAMS, images, texts, hyper=hyper)):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()


# The default is tested on eight devices together with the other methods.
@pytest.mark.parametrize("hyper", [ATTENTION_HYPER])
def test_eight_devices_equal_one(hyper):
    images, texts = draw_batch()
    sharded, replicated = PartitionSpec(parallel.AXIS), PartitionSpec()

    def device_step(params, images, texts):
        (loss, _), (params_gradient, *sides) = LOSS_AND_GRADIENT(
            params, images, texts, axis=parallel.AXIS, hyper=hyper
        )
        params_gradient = parallel.mean(params_gradient, parallel.AXIS)
        return loss[None], params_gradient, [(side.pooled / 8, side.local / 8) for side in sides]

    mapped = jax.shard_map(
        device_step,
        mesh=parallel.make_mesh(8),
        in_specs=(replicated, sharded, sharded),
        out_specs=(sharded, replicated, sharded),
        check_vma=False,
    )
    losses, *actual = jax.jit(mapped)(PARAMS, images, texts)
    (loss, _), (params_gradient, *sides) = GRADIENT(PARAMS, images, texts, hyper=hyper)
    np.testing.assert_allclose(losses, np.full(8, loss), rtol=1e-5)
    expected = params_gradient, [(side.pooled, side.local) for side in sides]
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        UserError, match="hyper.num_heads is 3.*config.embed_dim 8; use a divisor of 8"
    ):
        place.init(KEY, MethodContext(8), place.Hyper(num_heads=3))

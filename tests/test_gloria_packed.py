"""Packed words: their slots, and that their scores and gradients equal those of padded words."""

from dataclasses import replace

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.methods import contrastive, gloria, gloria_packed

HYPER = gloria.Hyper(tile_size=2)  # the smallest blocks: as many slots as the longest text has


def dense_scores(pixels, words, mask, hyper, kind="sum"):
    """Computes the same scores by their definition: dense tables [W P], automatic gradients."""

    def score(pixels, text):
        words, mask = text
        if hyper.normalise_attention:
            pixels, words = contrastive.l2_normalise(pixels), contrastive.l2_normalise(words)
        logits = jnp.where(mask[:, None], words @ pixels.T, contrastive.MASKED_LOGIT)
        # Two softmaxes: each pixel over the words, then each word over the pixels.
        word_attention = jax.nn.softmax(logits, 0)
        regions = jax.nn.softmax(word_attention * hyper.attention_sharpness, -1) @ pixels
        word_scores = hyper.word_sharpness * jnp.sum(
            contrastive.l2_normalise(words) * contrastive.l2_normalise(regions), -1
        )
        if kind == "max":
            return jnp.max(jnp.where(mask, word_scores, contrastive.MASKED_LOGIT))
        return contrastive.masked_logsumexp(word_scores, mask)

    return contrastive.score_all_pairs(score, pixels, (words, mask), 3)


def compare_with_dense(images, texts, hyper, kind="sum"):
    """Compares packed with dense scores, and the gradients of a weighted sum of the scores."""
    sizes = len(images.local), len(texts.local)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=sizes), jnp.float32)
    results = []
    for local_scores in (gloria.local_scores, dense_scores):

        def weighted_total(pixels, words, local_scores=local_scores):
            table = local_scores(pixels, words, texts.mask, hyper, kind)
            return jnp.sum(weight * table), table

        gradient = jax.jit(
            jax.grad(weighted_total, (0, 1), has_aux=True), compiler_options=features.OPTIMISED
        )
        results.append(gradient(images.local, texts.local))
    (actual_gradients, table), (expected_gradients, dense_table) = results
    # A score is a sum of terms of both signs, so it is compared by the size of the largest.
    pairs = zip((table, *actual_gradients), (dense_table, *expected_gradients), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("tile", [2, 7, 64])
def test_packed_words_score_as_padded_ones(tile, normalise):
    """Blocks of 2 (raised to the longest text) or 7 slots: several; of 64 slots: one for all."""
    images, texts = features.draw_features(pairs=7, dim=12)
    hyper = replace(HYPER, tile_size=tile, normalise_attention=normalise)
    compare_with_dense(images, texts, hyper)


def test_the_maximum_over_packed_words_is_that_over_padded_ones():
    compare_with_dense(*features.draw_features(pairs=5), HYPER, "max")


def test_repeated_words_do_not_multiply_the_gradient_of_the_maximum():
    """Comparing each word's score with the maximum would count repeated words several times."""
    images, texts = features.draw_features(pairs=4, words=4)
    mask = jnp.ones_like(texts.mask)
    repeated = jnp.repeat(texts.local[:, :1], 4, 1)

    def total(words):
        return gloria.local_scores(images.local, words, mask, HYPER, "max").sum()

    def dense_total(words):
        return dense_scores(images.local, words, mask, HYPER, "max").sum()

    # Which of several equal words gets the gradient does not matter, so only the sum is compared.
    totals = total, dense_total
    actual, expected = (jax.jit(jax.grad(function))(repeated).sum(1) for function in totals)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_more_pixels_than_dimensions_and_texts_than_images():
    images, texts = features.draw_features(pairs=9, dim=4, grid=(5, 5))
    compare_with_dense(features.permute(images, np.arange(4)), texts, HYPER)


def test_real_words_may_follow_padding():
    images, texts = features.draw_features()
    reversed_texts = texts.replace(mask=texts.mask[:, ::-1], local=texts.local + 1.0)
    compare_with_dense(images, reversed_texts, HYPER)


def test_large_logits_neither_overflow_nor_vanish():
    """Logits reach the hundreds, and the texts of one block differ in scale by far."""
    images, texts = features.draw_features()
    scale = jnp.array([1.0, 300.0, 0.01, 50.0, 5.0, 100.0])[:, None, None]
    scaled_texts = texts.replace(local=texts.local * scale)
    compare_with_dense(images, scaled_texts, replace(HYPER, tile_size=64))


def test_texts_without_words_and_vectors_of_zeros_have_finite_gradients():
    images, texts = features.draw_features()
    mask = texts.mask.at[3].set(False)
    words, pixels = texts.local.at[2].set(0.0), images.local.at[1].set(0.0)

    def contrast(pixels, words):
        return contrastive.info_nce(gloria.local_scores(pixels, words, mask, HYPER))[0]

    loss, gradients = jax.jit(jax.value_and_grad(contrast, (0, 1)))(pixels, words)
    assert np.isfinite(loss) and all(np.isfinite(gradient).all() for gradient in gradients)
    assert (np.asarray(gradients[1])[3] == 0).all()


PACK = jax.jit(gloria_packed.pack_words, static_argnums=1)


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9), st.sampled_from([1, 8, 13, 100]))
def test_every_real_word_lies_in_one_slot_and_no_text_in_two_blocks(lengths, slots):
    lengths = np.array(lengths)
    mask = np.arange(6) < lengths[:, None]
    packed = jax.tree.map(np.asarray, PACK(jnp.asarray(mask), slots))
    is_real = packed.word < mask.size
    np.testing.assert_array_equal(np.sort(packed.word[is_real]), np.flatnonzero(mask))
    np.testing.assert_array_equal(packed.text[is_real], packed.word[is_real] // 6)
    assert (packed.text[~is_real] == 9).all() and not is_real[packed.num_blocks :].any()
    assert is_real[: packed.num_blocks].any(1).all()
    for text in np.flatnonzero(lengths):
        block, slot = np.nonzero(packed.text == text)
        assert (block == packed.block[text]).all()
        np.testing.assert_array_equal(slot, packed.start[text] + np.arange(lengths[text]))
        assert (packed.first_slot[block, slot] == packed.start[text]).all()


def test_the_work_grows_with_the_real_words_only():
    """At most a tenth of the slots in use is empty; 48 texts of 97 slots have 8 to 40 words."""
    lengths = np.random.default_rng(0).integers(8, 41, 48)
    packed = PACK(jnp.asarray(np.arange(97) < lengths[:, None]), 128)
    assert lengths.sum() / (int(packed.num_blocks) * 128) > 0.9
    assert packed.word.size <= 2 * 48 * 97

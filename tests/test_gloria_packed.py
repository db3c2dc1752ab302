"""Packed words: where they lie, and that their scores and gradients are those of padded words."""

from dataclasses import replace

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.methods import contrastive, gloria, gloria_packed

HYPER = gloria.Hyper(tile_size=2)  # the smallest blocks: as many slots as the longest text may fill


def padded(pixels, words, mask, hyper, kind="sum"):
    """The same scores with every table [W P] made, and derived by JAX: the definition."""

    def score(pixels, text):
        words, mask = text
        if hyper.normalise_attention:
            pixels, words = contrastive.l2_normalise(pixels), contrastive.l2_normalise(words)
        products = jnp.where(mask[:, None], words @ pixels.T, contrastive.MASKED_LOGIT)
        shares = jax.nn.softmax(products, 0)
        regions = jax.nn.softmax(shares * hyper.attention_sharpness, -1) @ pixels
        match = hyper.word_sharpness * jnp.sum(
            contrastive.l2_normalise(words) * contrastive.l2_normalise(regions), -1
        )
        if kind == "max":
            return jnp.max(jnp.where(mask, match, contrastive.MASKED_LOGIT))
        return contrastive.masked_logsumexp(match, mask)

    return contrastive.score_all_pairs(score, pixels, (words, mask), 3)


def compare(images, texts, hyper, kind="sum"):
    """Values, and gradients of a random weighting of the table of scores."""
    sizes = len(images.local), len(texts.local)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=sizes), jnp.float32)
    results = []
    for function in (gloria.local_scores, padded):

        def total(pixels, words, function=function):
            table = function(pixels, words, texts.mask, hyper, kind)
            return jnp.sum(weight * table), table

        run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
        results.append(run(images.local, texts.local))
    (got, table), (want, table_) = results
    np.testing.assert_allclose(table, table_, rtol=1e-5)
    for actual, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("tile", [2, 7, 64])
def test_packed_words_score_as_padded_ones(tile, normalise):
    """Ragged texts, one full, one of a single word; more blocks than one, and all in one."""
    images, texts = features.make(pairs=7, dim=12)
    compare(images, texts, replace(HYPER, tile_size=tile, normalise_attention=normalise))


def test_the_largest_of_packed_words_is_that_of_padded_ones():
    compare(*features.make(pairs=5), HYPER, "max")


def test_repeated_words_do_not_multiply_the_gradient_of_the_largest():
    """A float that is compared with its maximum lets every repeated word pass; only one is it."""
    images, texts = features.make(pairs=4, words=4)
    mask = jnp.ones_like(texts.mask)
    repeated = jnp.repeat(texts.local[:, :1], 4, 1)

    def total(words):
        return gloria.local_scores(images.local, words, mask, HYPER, "max").sum()

    def plain_total(words):
        return padded(images.local, words, mask, HYPER, "max").sum()

    # Where all words of a text are equal, they move the score together whichever of them it is.
    actual, expected = (jax.jit(jax.grad(f))(repeated).sum(1) for f in (total, plain_total))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_more_pixels_than_dimensions_and_texts_than_images():
    images, texts = features.make(pairs=9, dim=4, grid=(5, 5))
    compare(features.permute(images, np.arange(4)), texts, HYPER)


def test_words_need_not_stand_at_the_start():
    images, texts = features.make()
    compare(images, texts.replace(mask=texts.mask[:, ::-1], local=texts.local + 1.0), HYPER)


def test_great_products_neither_overflow_nor_vanish():
    """Products of words and pixels in the hundreds, far apart between the texts of a block."""
    images, texts = features.make()
    scale = jnp.array([1.0, 300.0, 0.01, 50.0, 5.0, 100.0])[:, None, None]
    compare(images, texts.replace(local=texts.local * scale), replace(HYPER, tile_size=64))


def test_texts_without_words_and_vectors_of_zeros_have_finite_gradients():
    images, texts = features.make()
    mask = texts.mask.at[3].set(False)
    words, pixels = texts.local.at[2].set(0.0), images.local.at[1].set(0.0)

    def total(pixels, words):
        return contrastive.info_nce(gloria.local_scores(pixels, words, mask, HYPER))[0]

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(pixels, words)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    assert (np.asarray(grads[1])[3] == 0).all()


PACK = jax.jit(gloria_packed.pack_words, static_argnums=1)


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9), st.sampled_from([1, 8, 13, 100]))
def test_every_real_word_lies_in_one_slot_and_no_text_in_two_blocks(lengths, slots):
    lengths = np.array(lengths)
    mask = np.arange(6) < lengths[:, None]
    packed = jax.tree.map(np.asarray, PACK(jnp.asarray(mask), slots))
    real = packed.word < mask.size
    np.testing.assert_array_equal(np.sort(packed.word[real]), np.flatnonzero(mask))
    np.testing.assert_array_equal(packed.text[real], packed.word[real] // 6)
    assert (packed.text[~real] == 9).all() and not real[packed.num_blocks :].any()
    assert real[: packed.num_blocks].any(1).all()
    for text in np.flatnonzero(lengths):
        block, slot = np.nonzero(packed.text == text)
        assert (block == packed.block[text]).all()
        np.testing.assert_array_equal(slot, packed.start[text] + np.arange(lengths[text]))
        assert (packed.first_slot[block, slot] == packed.start[text]).all()


def test_the_work_is_that_of_the_real_words():
    """48 texts of 97 slots with 8 to 40 words: at most a tenth of the slots in use is empty."""
    lengths = np.random.default_rng(0).integers(8, 41, 48)
    packed = PACK(jnp.asarray(np.arange(97) < lengths[:, None]), 128)
    assert lengths.sum() / (int(packed.num_blocks) * 128) > 0.9
    assert packed.word.size <= 2 * 48 * 97

"""The algebra that methods share, against literal loops, with masks and ragged sizes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import contrastive

RNG = np.random.default_rng(0)


def draw_normal(*shape):
    """Returns standard normal numbers as Float32[shape]."""
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_l2_normalise_gives_length_one_and_a_finite_gradient_at_zero():
    x = jnp.concatenate([draw_normal(3, 5), jnp.zeros((1, 5))])
    actual = contrastive.l2_normalise(x)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=-1), [1, 1, 1, 0], atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: contrastive.l2_normalise(x)[..., 0].sum())(x)).all()


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_soft_maximum_is_a_log_mean_exp(tau):
    x, mask = draw_normal(4, 6), jnp.asarray(RNG.random((4, 6)) < 0.6).at[0].set(False)
    for row, row_mask, actual in zip(x, mask, contrastive.soft_maximum(x, tau, mask), strict=True):
        exponentials = [np.exp(entry / tau) for entry in row[row_mask]]
        expected = tau * np.log(sum(exponentials) / len(exponentials)) if exponentials else 0.0
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(contrastive.soft_maximum(x, 1e4), x.mean(-1), atol=1e-2)
    np.testing.assert_allclose(contrastive.soft_maximum(x, 1e-3), x.max(-1), atol=1e-2)


def test_info_nce_is_the_literal_formula():
    logits = draw_normal(5, 5)
    forward = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(5)])
    backward = np.mean([np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(5)])
    np.testing.assert_allclose(contrastive.info_nce(logits), (forward, backward), rtol=1e-5)


def score_pair(image, text):
    """Returns scores of one pair that are not symmetric in the image and the text."""
    return {"sum": jnp.sum(image @ text.T), "rows": (image @ text.T).max(0)}


@pytest.mark.parametrize("tile", [1, 2, 3, 99])
def test_all_pairs_is_the_double_loop_for_any_tile(tile):
    images, texts = draw_normal(4, 3, 2), draw_normal(5, 6, 2)
    score_all = jax.jit(lambda i, t: contrastive.score_all_pairs(score_pair, i, t, tile))
    actual = score_all(images, texts)
    for i in range(4):
        for j in range(5):
            expected = score_pair(images[i], texts[j])
            np.testing.assert_allclose(actual["rows"][i, j], expected["rows"], 1e-5)
            np.testing.assert_allclose(actual["sum"][i, j], expected["sum"], 1e-4, 1e-5)


def test_tiles_do_not_change_the_gradient():
    images, texts = draw_normal(4, 3, 2), draw_normal(4, 6, 2)
    dense = jax.vmap(jax.vmap(score_pair, (None, 0)), (0, None))

    def score_in_tiles(images, texts):
        return contrastive.score_all_pairs(score_pair, images, texts, 3)

    def total(images, texts, score_tables):
        return jnp.sum(jnp.tanh(score_tables(images, texts)["sum"]))

    expected = jax.grad(total, (0, 1))(images, texts, dense)
    actual = jax.grad(total, (0, 1))(images, texts, score_in_tiles)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)

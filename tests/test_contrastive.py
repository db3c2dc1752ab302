"""Alignment algebra against literal loops, with masks and ragged sizes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import contrastive

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_unit_has_length_one_and_a_finite_gradient_at_zero():
    x = jnp.concatenate([draw(3, 5), jnp.zeros((1, 5))])
    got = contrastive.l2_normalise(x)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), [1, 1, 1, 0], atol=1e-5)
    assert np.isfinite(jax.grad(lambda x: contrastive.l2_normalise(x)[..., 0].sum())(x)).all()


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_soft_max_is_a_log_mean_exp(tau):
    x, mask = draw(4, 6), jnp.asarray(RNG.random((4, 6)) < 0.6).at[0].set(False)
    for row, real, got in zip(x, mask, contrastive.soft_maximum(x, tau, mask), strict=True):
        kept = [np.exp(value / tau) for value, keep in zip(row, real, strict=True) if keep]
        want = tau * np.log(sum(kept) / len(kept)) if kept else 0.0
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(contrastive.soft_maximum(x, 1e4), x.mean(-1), atol=1e-2)
    np.testing.assert_allclose(contrastive.soft_maximum(x, 1e-3), x.max(-1), atol=1e-2)


def test_info_nce_is_the_literal_formula():
    logits = draw(5, 5)
    forward = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(5)])
    backward = np.mean([np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(5)])
    np.testing.assert_allclose(contrastive.info_nce(logits), (forward, backward), rtol=1e-5)


def pair(image, text):
    """A score of one pair that is not symmetric."""
    return {"sum": jnp.sum(image @ text.T), "rows": (image @ text.T).max(0)}


@pytest.mark.parametrize("tile", [1, 2, 3, 99])
def test_all_pairs_is_the_double_loop_for_any_tile(tile):
    images, texts = draw(4, 3, 2), draw(5, 6, 2)
    got = jax.jit(lambda i, t: contrastive.score_all_pairs(pair, i, t, tile))(images, texts)
    for i in range(4):
        for j in range(5):
            np.testing.assert_allclose(got["rows"][i, j], pair(images[i], texts[j])["rows"], 1e-5)
            np.testing.assert_allclose(
                got["sum"][i, j], pair(images[i], texts[j])["sum"], 1e-4, 1e-5
            )


def test_tiles_have_the_gradient_of_the_whole():
    images, texts = draw(4, 3, 2), draw(4, 6, 2)
    dense = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))

    def value(images, texts, how):
        return jnp.sum(jnp.tanh(how(images, texts)["sum"]))

    want = jax.grad(value, (0, 1))(images, texts, dense)
    got = jax.grad(value, (0, 1))(
        images, texts, lambda i, t: contrastive.score_all_pairs(pair, i, t, 3)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

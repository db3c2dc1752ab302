"""PLAN's pairs over candidates against literal loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import plan_contrast

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def pair(image, text):
    """A score of one pair that is not symmetric."""
    return {"sum": jnp.sum(image @ text.T), "rows": (image @ text.T).max(0)}


@pytest.mark.parametrize(("candidates", "tile", "first"), [(1, 8, 0), (3, 2, 0), (5, 3, 2)])
def test_near_pairs_walk_back_from_the_own_text(candidates, tile, first):
    images, texts = draw(3, 3, 2), draw(5, 6, 2)
    got = plan_contrast.score_nearby_pairs(
        pair, images, texts, num_candidates=candidates, first=first, tile_size=tile
    )
    for i in range(3):
        for r in range(candidates):
            want = pair(images[i], texts[(first + i - r) % 5])["rows"]
            np.testing.assert_allclose(got["rows"][i, r], want, 1e-5)


def test_tiles_of_nearby_pairs_have_the_gradient_of_the_whole():
    images, texts = draw(4, 3, 2), draw(4, 6, 2)
    dense = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))

    def score(images, texts):
        return plan_contrast.score_nearby_pairs(pair, images, texts, num_candidates=4, tile_size=2)

    def value(images, texts, function):
        return jnp.sum(jnp.tanh(function(images, texts)["sum"]))

    want = jax.grad(value, (0, 1))(images, texts, dense)
    got = jax.grad(value, (0, 1))(images, texts, score)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

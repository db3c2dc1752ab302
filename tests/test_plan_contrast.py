"""PLAN's pairs over candidates against literal loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import plan_contrast

RNG = np.random.default_rng(0)


def draw_normal(*shape):
    """Returns standard normal numbers as Float32[shape]."""
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def score_pair(image, text):
    """Returns scores of one pair that are not symmetric in the image and the text."""
    return {"sum": jnp.sum(image @ text.T), "rows": (image @ text.T).max(0)}


@pytest.mark.parametrize(("num_candidates", "tile", "first"), [(1, 8, 0), (3, 2, 0), (5, 3, 2)])
def test_an_image_is_scored_with_its_own_text_and_those_before(num_candidates, tile, first):
    images, texts = draw_normal(3, 3, 2), draw_normal(5, 6, 2)
    actual = plan_contrast.score_nearby_pairs(
        score_pair, images, texts, num_candidates=num_candidates, first=first, tile_size=tile
    )
    for i in range(3):
        for r in range(num_candidates):
            expected = score_pair(images[i], texts[(first + i - r) % 5])["rows"]
            np.testing.assert_allclose(actual["rows"][i, r], expected, 1e-5)


def test_tiles_do_not_change_the_gradient_of_nearby_pairs():
    images, texts = draw_normal(4, 3, 2), draw_normal(4, 6, 2)
    dense = jax.vmap(jax.vmap(score_pair, (None, 0)), (0, None))

    def score_in_tiles(images, texts):
        options = {"num_candidates": 4, "tile_size": 2}
        return plan_contrast.score_nearby_pairs(score_pair, images, texts, **options)

    def total(images, texts, score_tables):
        return jnp.sum(jnp.tanh(score_tables(images, texts)["sum"]))

    expected = jax.grad(total, (0, 1))(images, texts, dense)
    actual = jax.grad(total, (0, 1))(images, texts, score_in_tiles)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)

"""The memory of each method's compiled gradient."""

import features
import jax
import jax.numpy as jnp
import pytest
from test_methods import KEY, MEMORY_HYPERS, initialise

from plan_jax.methods import METHODS


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"convirt"}))
def test_the_memory_of_the_local_loss_is_at_most_linear_in_the_batch(name):
    """Compares the temporary memory of the compiled gradient at B = 16 and B = 128.

    The maps are as large as the papers' (19 x 19), where tables [B B] of scores do not matter.
    ConVIRT is left out, because it has only such a table.
    """
    method, hyper, params, memory = initialise(name, 128, **MEMORY_HYPERS.get(name, {}))
    sizes = {}
    for pairs in (16, 128):
        images, texts = features.draw_features(pairs, words=24, dim=128, grid=(19, 19), fine=False)
        extra = features.draw_extra(texts)

        def objective(images, texts, extra=extra):
            return method.loss(
                params, memory, images, texts, extra, key=KEY, step=jnp.array(9), hyper=hyper
            )[0]

        gradient = jax.jit(jax.grad(objective, (0, 1), allow_int=True))
        analysis = gradient.lower(images, texts).compile().memory_analysis()
        sizes[pairs] = analysis.temp_size_in_bytes
    assert sizes[128] <= 8.1 * sizes[16], sizes  # buffers are rounded up

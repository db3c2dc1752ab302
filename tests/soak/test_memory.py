"""The memory of each method's compiled gradient."""

import jax
import pytest
from test_methods import make_gradient

from plan_jax.methods import METHODS


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"convirt"}))
def test_the_memory_of_the_local_loss_is_at_most_linear_in_the_batch(name):
    """Compares the temporary memory of the compiled gradient at B = 16 and B = 128.

    The maps are as large as the papers' (19 x 19), where tables [B B] of scores do not matter.
    ConVIRT is left out, because it has only such a table.
    """
    sizes = {}
    for pairs in (16, 128):
        gradient, sides = make_gradient(name, pairs, 128)
        analysis = jax.jit(gradient).lower(*sides).compile().memory_analysis()
        sizes[pairs] = analysis.temp_size_in_bytes
    assert sizes[128] <= 8.1 * sizes[16], sizes  # buffers are rounded up

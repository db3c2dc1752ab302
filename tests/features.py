"""Small random features for the tests of methods: ragged texts, one full, one of a single word."""

import jax
import jax.numpy as jnp
import numpy as np

from plan_jax.types import Features


def make(pairs=6, words=5, dim=8, grid=(3, 3), seed=0, fine=True):
    """Make `pairs` images and texts; text 0 fills every slot, text 1 has one word."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    count = rng.integers(2, words + 1, pairs)
    count[:2] = words, 1
    mask = np.arange(words) < count[:, None]
    word_id = jnp.asarray(rng.integers(1, 9, (pairs, words)) * mask, jnp.int32)
    sentence = jnp.where(mask, jnp.arange(words) // 3, -1).astype(jnp.int32)
    pixels = grid[0] * grid[1]
    large = (2 * grid[0], 2 * grid[1])
    images = Features(
        draw(pairs, dim), draw(pairs, pixels, dim), jnp.ones((pairs, pixels), bool), grid=grid,
        fine=draw(pairs, 4 * pixels, dim) if fine else None, fine_grid=large if fine else None,
    )  # fmt: skip
    local = draw(pairs, words, dim) * mask[..., None]
    return images, Features(draw(pairs, dim), local, jnp.asarray(mask), word_id, sentence)


def permute(tree, order):
    """Reorder the items of features."""
    return jax.tree.map(lambda x: x[order], tree)


def pad(texts, more=3, noise=7.0):
    """Append padded words filled with noise."""
    wide = ((0, 0), (0, more))
    return texts.replace(
        local=jnp.pad(texts.local, (*wide, (0, 0)), constant_values=noise),
        mask=jnp.pad(texts.mask, wide),
        word_id=jnp.pad(texts.word_id, wide),
        sentence=jnp.pad(texts.sentence, wide, constant_values=-1),
    )

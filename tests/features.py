"""Small random features for the tests of methods: ragged texts, one full, one of a single word."""

import jax
import jax.numpy as jnp
import numpy as np

from plan_jax.types import Features, MethodContext

WIDTH = 10  # of what an encoder gives before its heads


def make(pairs=6, words=5, dim=8, grid=(3, 3), seed=0, fine=True):
    """Returns `pairs` images and texts; text 0 fills every slot, text 1 has one word."""
    rng = np.random.default_rng(seed)

    def sample(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    count = rng.integers(2, words + 1, pairs)
    count[:2] = words, 1
    mask = np.arange(words) < count[:, None]
    word_id = jnp.asarray(rng.integers(1, 9, (pairs, words)) * mask, jnp.int32)
    sentence = jnp.where(mask, jnp.arange(words) // 3, -1).astype(jnp.int32)
    pixels = grid[0] * grid[1]
    large = (2 * grid[0], 2 * grid[1])
    images = Features(
        sample(pairs, dim),
        sample(pairs, pixels, dim),
        jnp.ones((pairs, pixels), bool),
        grid=grid,
        fine=sample(pairs, 4 * pixels, dim) if fine else None,
        fine_grid=large if fine else None,
        raw=sample(pairs, pixels, WIDTH),
        attention=jax.nn.softmax(sample(pairs, pixels)),
    )
    local = sample(pairs, words, dim) * mask[..., None]
    attention = jax.nn.softmax(sample(pairs, words)) * mask
    raw = sample(pairs, words, WIDTH)
    return images, Features(
        sample(pairs, dim),
        local,
        jnp.asarray(mask),
        word_id,
        sentence,
        raw=raw,
        attention=attention,
    )


def make_context(dim=8):
    """Returns the context of a method at its start: F = 4 tags, an averaged model."""
    return MethodContext(dim, WIDTH, jax.random.normal(jax.random.key(9), (4, 12)), 0.9)


def make_extra(texts, regions=3, seed=0):
    """Returns labels, boxes of regions and their words; pair 0 lacks region 0, pair 1 has none."""
    rng = np.random.default_rng(seed)
    pairs, words = texts.mask.shape
    low, size = rng.uniform(0, 0.5, (pairs, regions, 2)), rng.uniform(0.2, 0.5, (pairs, regions, 2))
    boxes = np.concatenate([low, low + size], -1).astype(np.float32)
    boxes[0, 0], boxes[1] = 0, 0
    region_words = rng.random((pairs, regions, words)) < 0.7
    return {
        "labels": jnp.asarray(rng.integers(-1, 2, (pairs, 4)), jnp.int8),
        "regions": jnp.asarray(boxes),
        "region_words": jnp.asarray(region_words) & texts.mask[:, None],
    }


def permute(tree, order):
    """Returns the items of features in another order."""
    return jax.tree.map(lambda x: x[order], tree)


def pad(texts, count=3, noise=7.0):
    """Returns texts with padded words of noise appended."""
    wide = ((0, 0), (0, count))
    return texts.replace(
        local=jnp.pad(texts.local, (*wide, (0, 0)), constant_values=noise),
        raw=jnp.pad(texts.raw, (*wide, (0, 0)), constant_values=noise),
        attention=jnp.pad(texts.attention, wide),
        mask=jnp.pad(texts.mask, wide),
        word_id=jnp.pad(texts.word_id, wide),
        sentence=jnp.pad(texts.sentence, wide, constant_values=-1),
    )

"""Random features, extras and contexts for the tests of methods.

Texts are ragged: the first one fills all word slots, the second one has a single word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from plan_jax.types import Features, MethodContext

# Programs of tests are not optimised. There two ways of computing round more often, and may differ
# by more than a tolerance; these options of the compiler are for such tests.
OPTIMISED = {"xla_backend_optimization_level": 1}
ENCODER_WIDTH = 10  # channels of the encoder's output, before the projection heads


def draw_features(pairs=6, words=5, dim=8, grid=(3, 3), seed=0, fine=True):
    """Returns random features of `pairs` images and of as many texts with at most `words` words.

    The grid of `fine` is twice `grid`. A sentence is three words long.
    """
    rng = np.random.default_rng(seed)

    def draw_normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    num_words = rng.integers(2, words + 1, pairs)
    num_words[:2] = words, 1
    mask = np.arange(words) < num_words[:, None]
    word_id = jnp.asarray(rng.integers(1, 9, (pairs, words)) * mask, jnp.int32)
    sentence = jnp.where(mask, jnp.arange(words) // 3, -1).astype(jnp.int32)
    pixels = grid[0] * grid[1]
    fine_grid_shape = (2 * grid[0], 2 * grid[1])
    # Of its own, so that other arrays do not depend on it.
    grey = np.random.default_rng([seed, 1]).normal(size=(pairs, 4 * pixels, 2))
    images = Features(
        draw_normal(pairs, dim),
        draw_normal(pairs, pixels, dim),
        jnp.ones((pairs, pixels), bool),
        grid=grid,
        fine=draw_normal(pairs, 4 * pixels, dim) if fine else None,
        fine_grid=fine_grid_shape if fine else None,
        raw=draw_normal(pairs, pixels, ENCODER_WIDTH),
        attention=jax.nn.softmax(draw_normal(pairs, pixels)),
        guide=jnp.asarray(grey, jnp.float32) if fine else None,
    )
    local = draw_normal(pairs, words, dim) * mask[..., None]
    attention = jax.nn.softmax(draw_normal(pairs, words)) * mask
    raw = draw_normal(pairs, words, ENCODER_WIDTH)
    return images, Features(
        draw_normal(pairs, dim),
        local,
        jnp.asarray(mask),
        word_id,
        sentence,
        raw=raw,
        attention=attention,
    )


def list_array_sizes(program):
    """Yields the number of entries of each array that a program of JAX (a jaxpr) computes."""
    for equation in program.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # of a closed program
            if hasattr(inner, "eqns"):
                yield from list_array_sizes(inner)


def make_context(dim=8):
    """Returns a `MethodContext` with F = 4 tags of width 12 and an averaged model."""
    return MethodContext(dim, ENCODER_WIDTH, jax.random.normal(jax.random.key(9), (4, 12)), 0.9)


def draw_extra(texts, regions=3, seed=0):
    """Returns random labels of 4 findings, boxes of `regions` regions and the words of each region.

    Pair 0 has no box for region 0, and pair 1 has no box at all.
    """
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
    """Returns features whose items are reordered: item n is the former item `order[n]`."""
    return jax.tree.map(lambda x: x[order], tree)


def append_padding(texts, num_words=3, fill_value=7.0):
    """Returns texts with `num_words` padded words appended, whose features are `fill_value`."""
    padding = ((0, 0), (0, num_words))
    return texts.replace(
        local=jnp.pad(texts.local, (*padding, (0, 0)), constant_values=fill_value),
        raw=jnp.pad(texts.raw, (*padding, (0, 0)), constant_values=fill_value),
        attention=jnp.pad(texts.attention, padding),
        mask=jnp.pad(texts.mask, padding),
        word_id=jnp.pad(texts.word_id, padding),
        sentence=jnp.pad(texts.sentence, padding, constant_values=-1),
    )

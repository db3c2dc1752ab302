"""Contrastive algebra shared by the methods: one equation a function, for masks and devices.

`axis` names the mapped device axis (None: one device). A method may import `types`, `layers`, this
file and its own parts only, so the one collective that a contrastive loss needs, `all_gather`,
lives here. `parallel.py` alone decides which devices there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from plan_jax.types import Features

MASKED_LOGIT = -1e9  # minus infinity in masked logits; finite, so that no gradient becomes NaN


def l2_normalise(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
    """Returns each vector scaled to length 1; a zero vector stays zero, with a finite gradient.

    >>> l2_normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    # eps is inside the root: sqrt has an infinite derivative at 0.
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps * eps)


def all_gather(tree: PyTree, axis: str | None) -> PyTree:
    """Joins the leading axis of every leaf over all devices, in device order: [b ...] -> [B ...].

    The gradient of a gathered leaf is summed over devices and returned to its owner.
    """
    if axis is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), tree)


def global_indices(count: int, axis: str | None) -> Int[Array, " b"]:
    """Returns the indices of this device's `count` items in the order of `all_gather`.

    >>> global_indices(3, None).tolist()
    [0, 1, 2]
    """
    return jnp.arange(count) + (0 if axis is None else lax.axis_index(axis) * count)


def masked_mean(
    x: Float[Array, "*N"], mask: Float[Array, "*#N"] | Bool[Array, "*#N"], axis: int | None = None
) -> Float[Array, "*M"]:
    """Computes the mean of x with weights `mask` (a mask or non-negative weights).

    The mean is 0 where the weights are all 0.

    >>> masked_mean(jnp.array([1.0, 5.0, 9.0]), jnp.array([True, True, False])).item()
    3.0
    """
    weight = jnp.broadcast_to(mask.astype(jnp.float32), x.shape)
    return jnp.sum(x * weight, axis) / jnp.maximum(jnp.sum(weight, axis), 1e-6)


def masked_logsumexp(
    x: Float[Array, "*N"], mask: Bool[Array, "*#N"], axis: int = -1
) -> Float[Array, "*M"]:
    """Computes log-sum-exp over the real entries; about -1e9 where nothing is real."""
    return jax.nn.logsumexp(jnp.where(mask, x, MASKED_LOGIT), axis)


def soft_maximum(
    x: Float[Array, "*N"], tau: float, mask: Bool[Array, "*#N"] | None = None, axis: int = -1
) -> Float[Array, "*M"]:
    """Computes the soft maximum `tau log mean exp(x / tau)` over an axis.

    It tends to the mean for tau -> inf and to the maximum for tau -> 0. Over nothing real it is 0.
    """
    if mask is None:
        return tau * (jax.nn.logsumexp(x / tau, axis) - jnp.log(x.shape[axis]))
    count = jnp.sum(mask, axis).astype(jnp.float32)
    value = tau * (masked_logsumexp(x / tau, mask, axis) - jnp.log(jnp.maximum(count, 1.0)))
    return jnp.where(count > 0, value, 0.0)


def info_nce(logits: Float[Array, "I T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes InfoNCE with the pairs on the diagonal: (image to text, text to image), each a mean.

    *van den Oord et al., arXiv 1807.03748, eq. 4, in both directions:*
    `-mean_i log softmax_j(logits_ij)[i]` and the same down the columns.
    """
    target = jnp.arange(logits.shape[0])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, target).mean(), cross_entropy(logits.T, target).mean()


def cosine_similarity(x: Float[Array, "I D"], y: Float[Array, "T D"]) -> Float[Array, "I T"]:
    """Computes the cosine of every x with every y, in [-1, 1]."""
    return l2_normalise(x) @ l2_normalise(y).T


def word_pixel_maps(texts: Features, images: Features) -> Float[Array, "B W P"]:
    """Computes the cosine of each word with each pixel of its own image; 0 for padding."""
    maps_BWP = jnp.einsum("bwd,bpd->bwp", l2_normalise(texts.local), l2_normalise(images.local))
    return maps_BWP * texts.mask[..., None]


def map_tiles(function: Callable[[PyTree], PyTree], items: PyTree, tile_size: int) -> PyTree:
    """Applies a function of several items to `tile_size` items at a time: [B ...] to [B ...].

    >>> map_tiles(lambda x: 2 * x, jnp.arange(3.0), 2).tolist()
    [0.0, 2.0, 4.0]
    """
    count = jax.tree.leaves(items)[0].shape[0]
    tile_size = min(tile_size, count)
    padding = -count % tile_size

    def split(x: Array) -> Array:
        # The last tile is padded with copies of the first item, not with zeros: a real item cannot
        # cause a NaN that the gradient of the cut below would let through.
        x = jnp.concatenate([x, jnp.repeat(x[:1], padding, 0)]) if padding else x
        return x.reshape(-1, tile_size, *x.shape[1:])

    # The backward pass recomputes a tile instead of storing its intermediate values, so memory
    # holds those of one tile whatever the batch.
    tiles = lax.map(jax.checkpoint(function), jax.tree.map(split, items))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tiles)


def score_all_pairs(
    score: Callable[[PyTree, PyTree], PyTree], images: PyTree, texts: PyTree, tile_size: int = 4
) -> PyTree:
    """Computes the score of every image with every text: leaves [I T ...].

    `score(image, text)` is written for one pair. Memory holds the intermediate values of
    I x tile_size pairs, never of I x T.
    """

    def score_tile(texts: PyTree) -> PyTree:
        score_images = jax.vmap(score, (0, None))
        return jax.vmap(score_images, (None, 0))(images, texts)

    scores_TI = map_tiles(score_tile, texts, tile_size)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), scores_TI)

"""Alignment algebra shared by the methods: one equation a function, written for masks and devices.

`axis` names the mapped device axis (None: one device). Methods may import this file, `packing`
and `types` only, so the one collective that a contrastive loss needs, `all_gather`, lives here;
which devices there are is the business of `parallel.py` alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from plan_jax.layers.resize import resize_bilinear
from plan_jax.types import Features

NEG = -1e9  # stands for minus infinity in masked logits: finite, so that no gradient is NaN


def l2_normalise(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
    """Scale each vector to length 1; a zero vector stays zero and has a finite gradient.

    >>> l2_normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + eps * eps)


def all_gather(tree: PyTree, axis: str | None) -> PyTree:
    """Join the leading axis of every leaf over all devices, in device order: [b ...] -> [B ...]."""
    if axis is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), tree)


def global_indices(here: int, axis: str | None) -> Int[Array, " b"]:
    """Number this device's `here` items among those of all devices, in the order of `all_gather`.

    >>> global_indices(3, None).tolist()
    [0, 1, 2]
    """
    return jnp.arange(here) + (0 if axis is None else lax.axis_index(axis) * here)


def masked_mean(
    x: Float[Array, "*N"], mask: Float[Array, "*#N"] | Bool[Array, "*#N"], axis: int | None = None
) -> Float[Array, "*M"]:
    """Average x with weights `mask` (a mask or non-negative weights); 0 where nothing is real.

    >>> masked_mean(jnp.array([1.0, 5.0, 9.0]), jnp.array([True, True, False])).item()
    3.0
    """
    weight = jnp.broadcast_to(mask.astype(jnp.float32), x.shape)
    return jnp.sum(x * weight, axis) / jnp.maximum(jnp.sum(weight, axis), 1e-6)


def masked_logsumexp(
    x: Float[Array, "*N"], mask: Bool[Array, "*#N"], axis: int = -1
) -> Float[Array, "*M"]:
    """Log-sum-exp over the real entries; about -1e9 where nothing is real."""
    return jax.nn.logsumexp(jnp.where(mask, x, NEG), axis)


def soft_maximum(
    x: Float[Array, "*N"], tau: float, mask: Bool[Array, "*#N"] | None = None, axis: int = -1
) -> Float[Array, "*M"]:
    """Soft maximum `tau log mean exp(x / tau)`: the mean for tau -> inf, the maximum for tau -> 0.

    Over nothing real it is 0.
    """
    if mask is None:
        return tau * (jax.nn.logsumexp(x / tau, axis) - jnp.log(x.shape[axis]))
    count = jnp.sum(mask, axis).astype(jnp.float32)
    value = tau * (masked_logsumexp(x / tau, mask, axis) - jnp.log(jnp.maximum(count, 1.0)))
    return jnp.where(count > 0, value, 0.0)


def gate(x: Float[Array, "*N"], mask: Bool[Array, "*N"], kappa: float) -> Float[Array, "*N"]:
    """Soft gate `sigmoid((x - mean x) / (kappa std x))` over the last axis, in (0, 1); 0 if masked.

    Standardising frees the gate of the scale of x; kappa -> inf gives 0.5 everywhere.
    """
    mean = masked_mean(x, mask, -1)[..., None]
    std = jnp.sqrt(masked_mean((x - mean) ** 2, mask, -1)[..., None] + 1e-8)
    return jax.nn.sigmoid((x - mean) / (kappa * std)) * mask


def cross_entropy(
    logits: Float[Array, "*N K"], target: Int[Array, "*N"], mask: Bool[Array, "*N K"] | None = None
) -> Float[Array, "*N"]:
    """Cross-entropy of each row with the index of its true column; masked columns do not count."""
    if mask is not None:
        logits = jnp.where(mask, logits, NEG)
    true = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - true


def info_nce(logits: Float[Array, "I T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE with the pairs on the diagonal: (image to text, text to image), each a mean.

    *van den Oord et al., arXiv 1807.03748, eq. 4, in both directions:*
    `-mean_i log softmax_j(logits_ij)[i]` and the same down the columns.
    """
    target = jnp.arange(logits.shape[0])
    return cross_entropy(logits, target).mean(), cross_entropy(logits.T, target).mean()


def logit_scale(log_scale: Float[Array, ""], most: float = 50.0) -> Float[Array, ""]:
    """Give the learned factor on cosines, 1 / temperature: at most `most`.

    *Radford et al., arXiv 2103.00020, section 2.5*, with a bound of our own.
    """
    return jnp.exp(jnp.minimum(log_scale, jnp.log(most)))


def cosine_similarity(x: Float[Array, "I D"], y: Float[Array, "T D"]) -> Float[Array, "I T"]:
    """Cosine of every x with every y, in [-1, 1]."""
    return l2_normalise(x) @ l2_normalise(y).T


def word_pixel_maps(texts: Features, images: Features) -> Float[Array, "B W P"]:
    """Map the cosine of each word with each pixel of its own image; 0 for padding."""
    maps = jnp.einsum("bwd,bpd->bwp", l2_normalise(texts.local), l2_normalise(images.local))
    return maps * texts.mask[..., None]


def map_tiles(function: Callable[[PyTree], PyTree], items: PyTree, tile: int) -> PyTree:
    """Apply a function of several items to `tile` of them at a time: [B ...] to [B ...].

    What it makes in between is computed again in the backward pass (`jax.checkpoint`), so memory
    holds that of one tile. The last tile is filled up with copies of the first item.

    >>> map_tiles(lambda x: 2 * x, jnp.arange(3.0), 2).tolist()
    [0.0, 2.0, 4.0]
    """
    count = jax.tree.leaves(items)[0].shape[0]
    tile = min(tile, count)
    pad = -count % tile

    def split(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.repeat(x[:1], pad, 0)]) if pad else x
        return x.reshape(-1, tile, *x.shape[1:])

    blocks = lax.map(jax.checkpoint(function), jax.tree.map(split, items))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], blocks)


def score_all_pairs(
    score: Callable[[PyTree, PyTree], PyTree], images: PyTree, texts: PyTree, tile: int = 4
) -> PyTree:
    """Score every image with every text, `tile` texts at a time: leaves [I T ...].

    `score(image, text)` is written for one pair; memory holds I x tile pairs and never I x T.
    """

    def block(part: PyTree) -> PyTree:
        by_image = jax.vmap(score, (0, None))
        return jax.vmap(by_image, (None, 0))(images, part)

    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), map_tiles(block, texts, tile))


def score_nearby_pairs(
    score: Callable[[PyTree, PyTree], PyTree],
    images: PyTree,
    texts: PyTree,
    *,
    candidates: int,
    first: Int[Array, ""] | int = 0,
    tile: int = 8,
) -> PyTree:
    """Score each image with its own text and the texts before it: leaves [b candidates ...].

    Image i is number first + i of the batch; entry r is its score with text (first + i - r) mod T,
    so entry 0 is its own. Linear in the batch where `score_all_pairs` is quadratic.
    """
    count = jax.tree.leaves(texts)[0].shape[0]
    size = jax.tree.leaves(images)[0].shape[0]
    number = first + jnp.arange(size)[:, None] - jnp.arange(candidates)[None, :]

    def block(part: tuple[PyTree, Array]) -> PyTree:
        some, which = part
        theirs = jax.tree.map(lambda x: x[which], texts)
        return jax.vmap(jax.vmap(score, (None, 0)))(some, theirs)

    return map_tiles(block, (images, number % count), tile)


def upsample_maps(
    maps: Float[Array, "K P"], grid: tuple[int, int], fine_grid: tuple[int, int]
) -> Float[Array, "K Q"]:
    """Resize maps bilinearly from one grid to a finer one."""
    fine_maps = resize_bilinear(maps.reshape(-1, *grid, 1), fine_grid)
    return fine_maps.reshape(len(maps), -1)


def sample_without_replacement(
    weight: Float[Array, "B W"], key: PRNGKeyArray, count: int
) -> Int[Array, "B {count}"]:
    """Draw `count` places of each row without replacement, likelier the more they weigh.

    By Gumbel's trick (*Kool et al., arXiv 1903.06059*); places of weight 0 come last.
    """
    noisy = jnp.log(jnp.maximum(weight, 1e-9)) + jax.random.gumbel(key, weight.shape)
    return lax.top_k(jnp.where(weight > 0, noisy, NEG), count)[1]


def by_text(near: PyTree) -> PyTree:
    """Reorders `score_nearby_pairs` of all images by text: entry [j, r] is text j with image j + r.

    >>> by_text(jnp.array([[0, 2], [1, 0], [2, 1]])).tolist()  # entry [i, r] was text i - r
    [[0, 0], [1, 1], [2, 2]]
    """
    size, count = jax.tree.leaves(near)[0].shape[:2]
    place, back = jnp.arange(size)[:, None], jnp.arange(count)[None, :]
    return jax.tree.map(lambda x: x[(place + back) % size, back], near)


def contrast_near(
    logits: Float[Array, "T C K N"], allowed: Bool[Array, "T C K"], part: Float[Array, "T K"]
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Contrast texts, and each of their words, over C candidate images: (texts, words), N rounds.

    Candidate r of text j is image j + r (modulo T), so its own is the first. A text's score is the
    sum of its words' logits with weights `part`; texts are contrasted both ways (the sum of two
    means), a word over those of its candidates that are allowed.
    """
    size, count = logits.shape[:2]
    text = jnp.einsum("tckn,tk->ntc", logits, part)
    place, back = jnp.arange(size)[:, None], jnp.arange(count)[None, :]
    image = text[:, (place - back) % size, back]  # image i is candidate r of text i - r
    first = jnp.zeros(text.shape[:2], jnp.int32)
    texts = cross_entropy(text, first).mean(1) + cross_entropy(image, first).mean(1)
    total = masked_logsumexp(logits, allowed[..., None], 1)
    return texts, jnp.einsum("tkn,tk->n", total - logits[:, 0], part) / size

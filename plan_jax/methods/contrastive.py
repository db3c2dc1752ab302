"""Contrastive algebra shared by the methods: one equation a function, for masks and devices.

`axis` names the mapped device axis (None: one device). A method may import `types`, `layers`, this
file and its own parts only, so the collectives that a contrastive loss needs live here.
`parallel` alone decides which devices there are.

A loss is computed in blocks: a device compares its own b images with the texts of all devices
[b T], and only texts travel. The loss itself is the same number on every device. The collectives
here have exact transposes, so that gradients are sums over the losses of all N devices, and the
mean of a parameter's gradient over devices, which the step takes, is that of one loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from plan_jax.types import Features, Params

MASKED_LOGIT = -1e9  # minus infinity in masked logits; finite, so that no gradient becomes NaN
SIGMOID_TILE = 256  # texts that are compared with a device's images at a time


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


def total(x: Float[Array, "*N"], axis: str | None) -> Float[Array, "*N"]:
    """Computes the sum of x over all devices."""
    return x if axis is None else lax.psum(x, axis)


def mean(x: Float[Array, "b *N"], axis: str | None) -> Float[Array, "*N"]:
    """Computes the mean over the items of all devices, which hold b each.

    >>> mean(jnp.array([1.0, 3.0]), None).item()
    2.0
    """
    return x.mean(0) if axis is None else lax.pmean(x.mean(0), axis)


def logsumexp_over_devices(x: Float[Array, "*N"], axis: str | None) -> Float[Array, "*N"]:
    """Computes `log sum exp x` over the devices, of the log-sum-exps x that each of them holds.

    Two numbers an entry are exchanged, and one for the gradient, whatever the number of devices.
    """
    if axis is None:
        return x
    # The largest one is a constant: it cancels in the value, hence also in the gradient.
    largest = lax.pmax(lax.stop_gradient(x), axis)
    return largest + jnp.log(lax.psum(jnp.exp(x - largest), axis))


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


def logsumexp_of_columns(
    logits: Float[Array, "b T"], axis: str | None = None, mask: Bool[Array, " b"] | None = None
) -> Float[Array, " T"]:
    """Computes log-sum-exp down the columns of a table whose rows are divided over the devices.

    Rows where `mask` is False do not count.
    """
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, MASKED_LOGIT)
    return logsumexp_over_devices(jax.nn.logsumexp(logits, 0), axis)


def own_entries(table: Float[Array, "b T"], axis: str | None = None) -> Float[Array, " b"]:
    """Returns the entries of this device's pairs: of each row, that of its index in the batch."""
    index = global_indices(len(table), axis)
    return jnp.take_along_axis(table, index[:, None], 1)[:, 0]


def pair_cross_entropies(
    logits: Float[Array, "b T"],
    axis: str | None = None,
    row_mask: Bool[Array, " b"] | None = None,
    column_mask: Bool[Array, " T"] | None = None,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Computes the cross-entropies of this device's pairs: (along the row, down the column).

    Row i of the whole table, which has the rows of all devices in their order, belongs with
    column i: `-log softmax_j(logits_ij)[i]` and `-log softmax_k(logits_ki)[i]`.

    Args:
      logits: this device's rows with all T columns.
      axis: the mapped device axis.
      row_mask, column_mask: which rows and columns are candidates; None: all.
    """
    positives = own_entries(logits, axis)
    by_row = logits if column_mask is None else jnp.where(column_mask, logits, MASKED_LOGIT)
    columns = logsumexp_of_columns(logits, axis, row_mask)
    own_columns = columns[global_indices(len(logits), axis)]
    return jax.nn.logsumexp(by_row, 1) - positives, own_columns - positives


def info_nce(
    logits: Float[Array, "b T"], axis: str | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes InfoNCE with the pairs on the diagonal: (image to text, text to image), each a mean.

    *van den Oord et al., arXiv 1807.03748, eq. 4, in both directions:*
    `-mean_i log softmax_j(logits_ij)[i]` and the same down the columns. A device passes the rows of
    its own images; of the columns, one number each is exchanged instead of the table.
    """
    rows, columns = pair_cross_entropies(logits, axis)
    return mean(rows, axis), mean(columns, axis)


def init_sigmoid(contrast: str) -> Params:
    """Returns the parameters of `sigmoid_loss`, log t' = log 10 and b = -10; none for softmax."""
    if contrast == "softmax":
        return {}
    return {"log_scale": jnp.log(10.0), "bias": jnp.array(-10.0)}


def sigmoid_loss(
    images: Float[Array, "b D"], texts: Float[Array, "b D"], params: Params, axis: str | None = None
) -> Float[Array, ""]:
    """Computes the sigmoid loss of the pairs of all devices.

    *Zhai et al., arXiv 2303.15343, section 3.1 and algorithm 1:*
    `- 1/B sum_ij log sigmoid(z_ij (t <x_i, y_j> + b))`, x and y unit vectors of images and texts,
    z_ij = 1 for a pair and -1 otherwise, `t = exp(log_scale)` and b the `bias`, both learned.

    *Section 3.3:* texts travel around the ring of devices. Each device compares its own images with
    the texts of one device at a time, `SIGMOID_TILE` of them at once. The backward pass recomputes
    these tables, so none of all pairs exists on any device. For it, a device stores the texts that
    have passed, B D numbers in all.
    """
    images, texts = l2_normalise(images), l2_normalise(texts)
    scale, bias = jnp.exp(params["log_scale"]), params["bias"]
    num_pairs = len(images)
    own_index = global_indices(num_pairs, axis)

    def sum_tile(tile: tuple[Array, Array]) -> Array:
        texts, index = tile
        logits_bt = scale * images @ texts.T + bias
        sign_bt = jnp.where(own_index[:, None] == index, 1.0, -1.0)
        return jax.nn.softplus(-sign_bt * logits_bt).sum(0)

    def sum_chunk(texts: Array, index: Array) -> Array:
        return map_tiles(jax.checkpoint(sum_tile), (texts, index), SIGMOID_TILE).sum()

    value = sum_chunk(texts, own_index)
    if axis is None:
        return value / num_pairs
    num_devices = lax.axis_size(axis)
    ring = [(device, (device + 1) % num_devices) for device in range(num_devices)]

    def pass_on(carry: tuple[Array, Array], distance: Array) -> tuple[tuple, None]:
        value, texts = carry
        texts = lax.ppermute(texts, axis, ring)
        index = (own_index - distance * num_pairs) % (num_devices * num_pairs)
        return (value + sum_chunk(texts, index), texts), None

    (value, _), _ = lax.scan(pass_on, (value, texts), jnp.arange(1, num_devices))
    return total(value, axis) / (num_devices * num_pairs)


def cosine_similarity(x: Float[Array, "*I D"], y: Float[Array, "T D"]) -> Float[Array, "*I T"]:
    """Computes the cosine of every x with every y, in [-1, 1]."""
    return l2_normalise(x) @ l2_normalise(y).T


def word_pixel_maps(texts: Features, images: Features) -> Float[Array, "B W P"]:
    """Computes the cosine of each word with each pixel of its own image; 0 for padding."""
    maps_BWP = jnp.einsum("bwd,bpd->bwp", l2_normalise(texts.local), l2_normalise(images.local))
    return maps_BWP * texts.mask[..., None]


def map_tiles(function: Callable[[PyTree], PyTree], items: PyTree, tile_size: int) -> PyTree:
    """Applies a function of several items to `tile_size` items at a time: [B ...] to [B ...].

    The number of tiles is the least for this size; they are then as equal as can be.

    >>> map_tiles(lambda x: 2 * x, jnp.arange(3.0), 2).tolist()
    [0.0, 2.0, 4.0]
    """
    count = jax.tree.leaves(items)[0].shape[0]
    if count <= tile_size:
        return function(items)
    num_tiles = -(-count // tile_size)
    tile_size = -(-count // num_tiles)
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

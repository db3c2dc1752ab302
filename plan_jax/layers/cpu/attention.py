"""Attention in fewer passes over memory, with the same values as `jax.nn.dot_product_attention`.

XLA's CPU backend writes the table of all attention weights of a batch to memory and reads it again,
three times forward and backward, and it runs a product over heads (a batch of small matrices) on
one core. On a CPU a table of some size is therefore computed for a few items at a time, which fits
the cache, and computed again for the gradient from two numbers kept for each query: the maximum of
its logits and the sum of their exponentials (Dao et al., arXiv 2205.14135, keep one).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from plan_jax.layers.cpu import dispatch, is_enabled

# Smaller tables (weights of one item, over all heads) of a whole batch stay in the cache anyway.
MIN_TABLE_SIZE = 40_000
# From this size on, the table of a single head fills the cache: each head is an item of its own.
MIN_HEAD_SIZE = 500_000
# Items side by side, each a chain of products of its own; an odd batch goes one by one.
CHUNK = 2
# What jax.nn.dot_product_attention replaces masked logits by.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    query: Float[Array, "*B N H C"],
    key: Float[Array, "*B M H C"],
    value: Float[Array, "*B M H C"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "*B N H C"]:
    """Computes `softmax(q k' / sqrt(C)) v` for each head; logits and softmax in float32.

    Args:
      mask: which query attends to which key, broadcast to [*B H N M]. A query whose mask is False
        everywhere gets the mean of all values.
    """
    batch, (num_queries, num_heads, _) = query.shape[:-3], query.shape[-3:]
    is_small = num_queries * key.shape[-3] * num_heads < MIN_TABLE_SIZE
    if not is_enabled() or is_small or not batch:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = jnp.broadcast_to(mask, (*batch, *mask.shape[1:]))
    return _attend(query, key, value, mask)


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    return _attend_forward(query, key, value, mask)[0]


def _attend_forward(
    query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, tuple]:
    def plain(query: Array, key: Array, value: Array, mask: Array | None) -> tuple:
        # Both branches have to return the same shapes; the plain backward pass reads no statistics.
        unused = 0 * query[..., 0].swapaxes(1, 2).astype(jnp.float32)
        output = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return output, unused, unused

    output, *statistics = dispatch(_cpu_forward, plain, query, key, value, mask)
    return output, (query, key, value, mask, output, *statistics)


def _attend_backward(residuals: tuple, cotangent: Array) -> tuple:
    def plain(query: Array, key: Array, value: Array, mask: Array | None, *rest: Array) -> tuple:
        def attention(query: Array, key: Array, value: Array) -> Array:
            return jax.nn.dot_product_attention(query, key, value, mask=mask)

        return jax.vjp(attention, query, key, value)[1](rest[-1])

    return *dispatch(_cpu_backward, plain, *residuals, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _cpu_forward(
    query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Float[Array, "B N H C"], Float[Array, "B H N"], Float[Array, "B H N"]]:
    """Returns the output and, of each query, its largest `q k'` and 1 / the sum of exponentials."""
    batch, num_queries, num_heads, channels = query.shape
    if num_heads > 1 and num_queries * key.shape[1] >= MIN_HEAD_SIZE:
        if mask is not None:
            mask = jnp.broadcast_to(mask, (batch, num_heads, *mask.shape[2:]))
            mask = mask.reshape(-1, 1, *mask.shape[2:])
        query, key, value = (
            x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, channels) for x in (query, key, value)
        )
        output, largest, inverse = _cpu_forward(query, key, value, mask)
        shape = batch, num_heads, num_queries
        output = output.reshape(*shape, channels).swapaxes(1, 2)
        return output, largest.reshape(shape), inverse.reshape(shape)

    def attend_item(query: Array, key: Array, value: Array, mask: Array | None) -> tuple:
        query, key, value = _swap_heads(query, key, value)
        logits_HNM = _mask(_contract_channels(query, key), mask)
        largest_HN = logits_HNM.max(-1)
        weights_HNM = jnp.exp((logits_HNM - largest_HN[..., None]) * query.shape[-1] ** -0.5)
        inverse_HN = 1 / weights_HNM.sum(-1)
        # Normalising the output [H N C] costs less than normalising the table.
        output = _multiply(weights_HNM.astype(value.dtype), value) * inverse_HN[..., None]
        return output.swapaxes(0, 1).astype(value.dtype), largest_HN, inverse_HN

    return _map_chunks(attend_item, (query, key, value, mask))


def _cpu_backward(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    output: Array,
    largest: Array,
    inverse: Array,
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of queries, keys and values.

    With weights `w = softmax(s)` and cotangent g of the output o, the gradient of the logits is
    `w (g v' - g . o)`. Tables are [H M N], the transposed of the forward pass, and the cotangent is
    scaled by 1 / the sum of exponentials instead of them.
    """

    def differentiate_item(
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        output: Array,
        largest_HN: Array,
        inverse_HN: Array,
        cotangent: Array,
    ) -> tuple:
        scale = query.shape[-1] ** -0.5
        cotangent = (cotangent * inverse_HN.T[..., None]).astype(cotangent.dtype)
        projection_HN = (cotangent.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1).T
        query, key, value, cotangent = _swap_heads(query, key, value, cotangent)
        mask = None if mask is None else mask.swapaxes(1, 2)
        logits_HMN = _mask(_contract_channels(key, query), mask)
        weights_HMN = jnp.exp((logits_HMN - largest_HN[:, None]) * scale)
        grads_HMN = weights_HMN * (_contract_channels(value, cotangent) - projection_HN[:, None])
        # A query that may attend to nothing has equal weights, but its logits are constants.
        grads_HMN = grads_HMN if mask is None else jnp.where(mask, grads_HMN, 0)
        grads_HMN = grads_HMN.astype(query.dtype)
        query_grad = _multiply(grads_HMN.swapaxes(1, 2), key) * scale
        key_grad = _multiply(grads_HMN, query) * scale
        value_grad = _multiply(weights_HMN.astype(cotangent.dtype), cotangent)
        grads = _swap_heads(query_grad, key_grad, value_grad)
        return tuple(
            grad.astype(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)
        )

    arrays = (query, key, value, mask, output, largest, inverse, cotangent)
    return _map_chunks(differentiate_item, arrays)


def _map_chunks(function: Callable[..., Any], arrays: tuple) -> Any:
    """Applies a function to every item of arrays [B ...], a chunk of items side by side."""
    batch = len(arrays[0])
    size = CHUNK if batch % CHUNK == 0 else 1

    def map_chunk(chunk: tuple) -> Any:
        outputs = [function(*jax.tree.map(lambda x, n=n: x[n], chunk)) for n in range(size)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), lax.map(map_chunk, chunks))


def _mask(logits: Float[Array, "H N M"], mask: Array | None) -> Float[Array, "H N M"]:
    return logits if mask is None else jnp.where(mask, logits, MASKED_LOGIT)


def _swap_heads(*arrays: Float[Array, "_ _ C"]) -> list[Float[Array, "_ _ C"]]:
    """Moves heads before positions, or back."""
    return [x.swapaxes(0, 1) for x in arrays]


def _contract_channels(a: Float[Array, "H N C"], b: Float[Array, "H M C"]) -> Float[Array, "H N M"]:
    return jnp.einsum("hnc,hmc->hnm", a, b, preferred_element_type=jnp.float32)


def _multiply(a: Float[Array, "H N M"], b: Float[Array, "H M C"]) -> Float[Array, "H N C"]:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)

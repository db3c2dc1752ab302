"""Attention with a gradient of its own: fewer passes over memory, the same values.

XLA's CPU backend writes the table of all attention weights of a batch out and reads it again, three
times forward and backward. On a CPU a table of some size is therefore made for a few items at a
time, in the cache, and made again for the gradient from two numbers kept for each query, the
maximum of its logits and the sum of their exponentials (Dao et al., arXiv 2205.14135, keep one).
Each of these items is a chain of its own, since XLA runs a product over heads on one core.
Everywhere else the call is `jax.nn.dot_product_attention`, which has kernels of its own. The
platform is chosen where the program is lowered, as in `convolution.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LARGE = 40_000  # weights of an item from which on a CPU takes a few items at a time
FEW = 2  # items at a time; an odd batch is taken one by one
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # as jax.nn.dot_product_attention has it


def attend(
    q: Float[Array, "B N H C"],
    k: Float[Array, "B M H C"],
    v: Float[Array, "B M H C"],
    mask: Bool[Array, "B 1 N M"] | None = None,
) -> Float[Array, "B N H C"]:
    """Attend: *softmax(q k' / sqrt(C)) v* for each head; logits and softmax in float32.

    Where `mask` is False the weight is 0; a query that may look at nothing gets the mean of v.
    """
    if q.shape[1] * k.shape[1] * q.shape[2] < LARGE:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    return _attend(q, k, v, mask)


def _by_few(one: Callable[..., Any], items: tuple) -> Any:
    """Apply `one` to every item of some arrays [B ...], a few of them side by side."""
    batch = len(items[0])
    few = FEW if batch % FEW == 0 else 1

    def each(items: tuple) -> Any:
        made = [one(*jax.tree.map(lambda x, n=n: x[n], items)) for n in range(few)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *made)

    items = jax.tree.map(lambda x: x.reshape(-1, few, *x.shape[1:]), items)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), lax.map(each, items))


def _swapped(*arrays: Float[Array, "_ _ C"]) -> list[Float[Array, "_ _ C"]]:
    """Put heads before places, or after them again."""
    return [x.swapaxes(0, 1) for x in arrays]


def _products(a: Float[Array, "H N C"], b: Float[Array, "H M C"]) -> Float[Array, "H N M"]:
    return jnp.einsum("hnc,hmc->hnm", a, b, preferred_element_type=jnp.float32)


def _matmul(a: Float[Array, "H N M"], b: Float[Array, "H M C"]) -> Float[Array, "H N C"]:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward_cpu(
    q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Float[Array, "B N H C"], Float[Array, "B H N"], Float[Array, "B H N"]]:
    """Give the result, and for each query its largest *q k'* and 1 / the sum of exponentials."""

    def one(q: Array, k: Array, v: Array, mask: Array | None) -> tuple:
        q, k, v = _swapped(q, k, v)
        logits = _products(q, k)
        logits = logits if mask is None else jnp.where(mask, logits, HIDDEN)
        largest = logits.max(-1)
        weights = jnp.exp((logits - largest[..., None]) * q.shape[-1] ** -0.5)
        inverse = 1 / weights.sum(-1)
        seen = _matmul(weights.astype(v.dtype), v) * inverse[..., None]
        return seen.swapaxes(0, 1).astype(v.dtype), largest, inverse

    return _by_few(one, (q, k, v, mask))


def _backward_cpu(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    seen: Array,
    largest: Array,
    inverse: Array,
    given: Array,
) -> tuple[Array, Array, Array]:
    """Give the gradients; tables are [H M N], and `given` is scaled instead of them."""

    def one(
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        seen: Array,
        largest: Array,
        inverse: Array,
        given: Array,
    ) -> tuple:
        scale = q.shape[-1] ** -0.5
        given = (given * inverse.T[..., None]).astype(given.dtype)
        along = (given.astype(jnp.float32) * seen.astype(jnp.float32)).sum(-1).T
        q, k, v, given = _swapped(q, k, v, given)
        mask = None if mask is None else mask.swapaxes(1, 2)
        logits = _products(k, q)
        logits = logits if mask is None else jnp.where(mask, logits, HIDDEN)
        weights = jnp.exp((logits - largest[:, None]) * scale)
        moved = weights * (_products(v, given) - along[:, None])
        moved = moved if mask is None else jnp.where(mask, moved, 0)
        moved = moved.astype(q.dtype)
        to_q, to_k = _matmul(moved.swapaxes(1, 2), k) * scale, _matmul(moved, q) * scale
        to_v = _matmul(weights.astype(given.dtype), given)
        each = zip(_swapped(to_q, to_k, to_v), (q, k, v), strict=True)
        return tuple(slope.astype(x.dtype) for slope, x in each)

    return _by_few(one, (q, k, v, mask, seen, largest, inverse, given))


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    def default(q: Array, k: Array, v: Array, mask: Array | None) -> tuple:
        unused = 0 * q[..., 0].swapaxes(1, 2).astype(jnp.float32)
        return jax.nn.dot_product_attention(q, k, v, mask=mask), unused, unused

    kept = lax.platform_dependent(q, k, v, mask, cpu=_forward_cpu, default=default)
    return kept[0], (q, k, v, mask, *kept)


def _backward(saved: tuple, given: Array) -> tuple:
    def default(q: Array, k: Array, v: Array, mask: Array | None, *others: Array) -> tuple:
        def plain(q: Array, k: Array, v: Array) -> Array:
            return jax.nn.dot_product_attention(q, k, v, mask=mask)

        return jax.vjp(plain, q, k, v)[1](others[-1])

    grads = lax.platform_dependent(*saved, given, cpu=_backward_cpu, default=default)
    return *grads, None


_attend.defvjp(_forward, _backward)

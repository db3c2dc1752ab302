"""Attention and GELU with gradients of their own: fewer passes over memory, the same values.

XLA's CPU backend writes the table of all attention weights of a batch out and reads it again, three
times forward and backward. On a CPU a table of some size is therefore made for one item at a time,
in the cache, and made again for the gradient instead of kept; everywhere else the call is
`jax.nn.dot_product_attention`, which has kernels of its own. The platform is chosen where the
program is lowered, as in `convolution.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LARGE = 40_000  # weights of an item from which on a CPU takes them one by one
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # as jax.nn.dot_product_attention has it


def attend(
    q: Float[Array, "B N H C"], k: Float[Array, "B M H C"], v: Float[Array, "B M H C"],
    mask: Bool[Array, "B 1 N M"] | None = None,
) -> Float[Array, "B N H C"]:  # fmt: skip
    """Attend: *softmax(q k' / sqrt(C)) v* for each head; logits and softmax in float32.

    Where `mask` is False the weight is 0; a query that may look at nothing gets the mean of v.
    """
    if q.shape[1] * k.shape[1] * q.shape[2] < LARGE:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    return _attend(q, k, v, mask)


def _default(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _weights(q: Array, k: Array, mask: Array | None) -> Float[Array, "H N M"]:
    """Give the weights of one item, heads first."""
    logits = jnp.einsum("hnc,hmc->hnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, HIDDEN), -1)


def _cpu(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    def one(item: tuple) -> Array:
        q, k, v, mask = item
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        return (_weights(q, k, mask).astype(v.dtype) @ v).swapaxes(0, 1)

    return lax.map(one, (q, k, v, mask))


def _cpu_gradients(
    q: Array, k: Array, v: Array, mask: Array | None, given: Array
) -> tuple[Array, Array, Array]:
    def one(item: tuple) -> tuple:
        q, k, v, mask, given = item
        q, k, v, given = (x.swapaxes(0, 1) for x in (q, k, v, given))
        weights = _weights(q, k, mask)
        to_v = weights.astype(v.dtype).swapaxes(1, 2) @ given
        moved = jnp.einsum("hnc,hmc->hnm", given, v, preferred_element_type=jnp.float32)
        moved = weights * (moved - (moved * weights).sum(-1, keepdims=True))
        moved = moved if mask is None else jnp.where(mask, moved, 0)
        moved = (moved * q.shape[-1] ** -0.5).astype(q.dtype)
        return tuple(x.swapaxes(0, 1) for x in (moved @ k, moved.swapaxes(1, 2) @ q, to_v))

    return lax.map(one, (q, k, v, mask, given))


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return lax.platform_dependent(q, k, v, mask, cpu=_cpu, default=_default)


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    return _attend(q, k, v, mask), (q, k, v, mask)


def _backward(saved: tuple, given: Array) -> tuple:
    def default(q: Array, k: Array, v: Array, mask: Array | None, given: Array) -> tuple:
        return jax.vjp(lambda q, k, v: _default(q, k, v, mask), q, k, v)[1](given)

    grads = lax.platform_dependent(*saved, given, cpu=_cpu_gradients, default=default)
    return *grads, None


_attend.defvjp(_forward, _backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Apply the exact GELU, *x Phi(x)* (Hendrycks and Gimpel, arXiv 1606.08415).

    Only x is kept for the gradient, *Phi(x) + x phi(x)*.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, given: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    below = 0.5 * (1 + lax.erf(wide * 2**-0.5))
    slope = below + wide * jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    return ((given * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

"""Sparsemax: a softmax whose small shares are exactly 0.

Source: Martins and Astudillo, arXiv 1602.02068.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_jvp
def sparsemax(x: Float[Array, "*B P"]) -> Float[Array, "*B P"]:
    """Computes sparsemax over the last axis: *proposition 1*.

        sparsemax(x)_p = max(x_p - t, 0),  with t such that they sum to 1

    The threshold t is found without sorting, which is slow on a CPU. Newton's steps
    t <- (sum_{p: x_p > t} x_p - 1) / |{p: x_p > t}|, from max x - 1 on, never pass it. They are
    exact once the set stays as it is (*Michelot, JOTA 1986*).

    >>> sparsemax(jnp.array([0.5, 0.0, -1.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    # Around the largest entry, so that a common offset costs no digits.
    x = x - x.max(-1, keepdims=True)

    def shrink(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        threshold, size, _ = carry
        inside = x > threshold
        new_size = inside.sum(-1, keepdims=True)
        step = (jnp.sum(x * inside, -1, keepdims=True) - 1) / new_size
        # Rounding must not lower it, or rows could take turns for ever.
        return jnp.maximum(threshold, step), new_size, jnp.any(new_size < size)

    start = jnp.full(x.shape[:-1] + (1,), -1.0, x.dtype)
    size = jnp.full(start.shape, x.shape[-1] + 1)
    threshold, *_ = lax.while_loop(lambda carry: carry[2], shrink, (start, size, jnp.array(True)))
    return jnp.maximum(x - threshold, 0)


@sparsemax.defjvp
def _sparsemax_jvp(
    primals: tuple[Float[Array, "*B P"]], tangents: tuple[Float[Array, "*B P"]]
) -> tuple[Float[Array, "*B P"], Float[Array, "*B P"]]:
    """Computes sparsemax and its derivative, which centres the entries with a share."""
    share = sparsemax(primals[0])
    inside = share > 0
    mean = jnp.sum(tangents[0] * inside, -1, keepdims=True) / inside.sum(-1, keepdims=True)
    return share, (tangents[0] - mean) * inside

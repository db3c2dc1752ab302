"""LayerNorm with a gradient in few passes over memory.

Source: Ba et al., arXiv 1607.06450.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from plan_jax.layers.cpu import dispatch, is_enabled


def normalise(
    x: Float[Array, "*B E"],
    scale: Float[Array | np.ndarray, " E"],
    bias: Float[Array | np.ndarray, " E"],
    epsilon: float,
) -> Float[Array, "*B E"]:
    """Scales each row to mean 0 and variance 1, then by `scale`, and adds `bias`, in float32."""
    x, scale, bias = (jnp.asarray(leaf, jnp.float32) for leaf in (x, scale, bias))
    return (_normalise if is_enabled() else _xla_normalise)(x, scale, bias, epsilon)


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns the mean and 1 / the deviation of each row."""
    mean = x.mean(-1, keepdims=True)
    # Flax's form. XLA compiles a second pass over the differences much worse.
    variance = jnp.maximum(0.0, (x * x).mean(-1, keepdims=True) - mean * mean)
    return mean, lax.rsqrt(variance + epsilon)


def _xla_normalise(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    mean, inverse = _moments(x, epsilon)
    return (x - mean) * (inverse * scale) + bias


_normalise = jax.custom_vjp(_xla_normalise, nondiff_argnums=(3,))


def _forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple]:
    mean, inverse = _moments(x, epsilon)
    return (x - mean) * (inverse * scale) + bias, (x, scale, bias, mean, inverse)


def _backward(epsilon: float, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    functions = (partial(gradients, epsilon) for gradients in (_cpu_gradients, _xla_gradients))
    return dispatch(*functions, residuals, cotangent)


_normalise.defvjp(_forward, _backward)


def _xla_gradients(
    epsilon: float, residuals: tuple, cotangent: Array
) -> tuple[Array, Array, Array]:
    return jax.vjp(partial(_xla_normalise, epsilon=epsilon), *residuals[:3])[1](cotangent)


def _cpu_gradients(
    epsilon: float, residuals: tuple, cotangent: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of x, the scale and the bias."""
    x, scale, _, mean, inverse = residuals
    normal = (x - mean) * inverse
    slopes = cotangent * scale
    along = (slopes * normal).mean(-1, keepdims=True)
    x_grad = inverse * (slopes - slopes.mean(-1, keepdims=True) - normal * along)
    rows = cotangent.reshape(-1, x.shape[-1])
    return x_grad, (rows * normal.reshape(rows.shape)).sum(0), rows.sum(0)

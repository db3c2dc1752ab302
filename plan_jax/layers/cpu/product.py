"""The matrix product of a linear layer, with gradients that need no transposed copies.

XLA differentiates a product [B N C] [C E] into one that sums over two axes. For that its CPU
backend first transposes the cotangent in memory, and then multiplies two matrices whose rows both
lie in the direction of the sum. Here batch and positions are one axis, so nothing is transposed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from plan_jax.layers.cpu import dispatch, is_enabled


def multiply(x: Float[Array, "*B C"], kernel: Float[Array, "C E"]) -> Float[Array, "*B E"]:
    """Computes the product of the last axis of x with a kernel, in their type."""
    return (_multiply if is_enabled() else _xla_multiply)(x, kernel)


def _xla_multiply(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


_multiply = jax.custom_vjp(_xla_multiply)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _xla_multiply(x, kernel), (x, kernel)


def _backward(inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return dispatch(_cpu_gradients, _xla_gradients, *inputs, cotangent)


_multiply.defvjp(_forward, _backward)


def _xla_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(_xla_multiply, x, kernel)[1](cotangent)


def _cpu_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Returns the gradients of x and the kernel, which is summed in float32."""
    rows, slopes = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    kernel_grad = jnp.matmul(rows.T, slopes, preferred_element_type=jnp.float32)
    return (slopes @ kernel.T).reshape(x.shape), kernel_grad.astype(kernel.dtype)

"""The matrix product of a linear layer, with gradients that need no transposed copies.

XLA differentiates a product [B N C] [C E] into one that sums over two axes. For that its CPU
backend first transposes the cotangent in memory, and then multiplies two matrices whose rows both
lie in the direction of the sum. Here batch and positions are one axis, so nothing is transposed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from plan_jax.layers.cpu import dispatch, is_enabled


def dot_general(
    x: Array,
    kernel: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Computes `lax.dot_general`, also as the option of that name of a flax layer.

    Products of [... C] and [C E] without other options have the gradients of this module.
    """
    is_plain = precision is None and preferred_element_type is None
    contracts_last = dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    if is_enabled() and is_plain and contracts_last and kernel.ndim == 2:
        return _multiply(x, kernel)
    return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)


def _xla_multiply(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


_multiply = jax.custom_vjp(_xla_multiply)


def _multiply_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _xla_multiply(x, kernel), (x, kernel)


def _multiply_backward(inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return dispatch(_cpu_gradients, _xla_gradients, *inputs, cotangent)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _xla_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(_xla_multiply, x, kernel)[1](cotangent)


def _cpu_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Returns the gradients of x and the kernel, which is summed in float32."""
    rows, slopes = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
    kernel_grad = multiply(rows.T, slopes).astype(kernel.dtype)
    return (slopes @ kernel.T).reshape(x.shape), kernel_grad

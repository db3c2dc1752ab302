"""Linear layers and learned offsets of a half-precision tower, with gradients summed in float32.

The gradient of a parameter that is added to every pixel or word is a sum over all of them. In
bfloat16, which has 8 digits in base 2, such a sum stops growing at 256 equal terms, unless the
device adds in float32 on its own account. Products of matrices are added in float32 everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from plan_jax.layers.cpu.product import multiply


def add_parameter(
    x: Float[Array, "*B E"], parameter: Float[Array | np.ndarray, "..."]
) -> Float[Array, "*B E"]:
    """Computes `x + parameter` in float32, and returns it in x's type."""
    return (x.astype(jnp.float32) + parameter).astype(x.dtype)


def scale_by_parameter(
    x: Float[Array, "*B E"], scale: Float[Array | np.ndarray, " E"]
) -> Float[Array, "*B E"]:
    """Computes `x scale` for each channel in float32, and returns it in x's type."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class Dense(nn.Module):
    """A linear layer `x W + b`: the product in `dtype`, the bias in float32.

    Parameters, their initial values and, in float32, all results are those of `flax.linen.Dense`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B E"]:
        """Returns the layer's output in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = (jnp.asarray(leaf, self.dtype) for leaf in (x, kernel))
        y = multiply(x, kernel)
        if not self.use_bias:
            return y
        return add_parameter(y, self.param("bias", nn.initializers.zeros, (self.features,)))

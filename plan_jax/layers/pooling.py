"""Pooling of the pixels of feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def max_pixel(x: Float[Array, "B Y X C"]) -> Float[Array, "B C"]:
    """Returns the largest value of each channel; its gradient goes to the first such pixel.

    The gradient of `jnp.max` divides by the number of pixels that equal the maximum. A compiler may
    compute the pixels once more for the comparison and round them differently. Then none is equal,
    and the gradient is 0 / 0.

    >>> max_pixel(jnp.array([1.0, 3.0, 2.0, 3.0]).reshape(1, 2, 2, 1)).tolist()
    [[3.0]]
    """
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    is_largest = jax.nn.one_hot(pixels.argmax(1), pixels.shape[1], axis=1, dtype=bool)
    return jnp.where(is_largest, pixels, 0).sum(1)


def mean_cells(x: Float[Array, "B y x C"], grid: tuple[int, int]) -> Float[Array, "B Y X C"]:
    """Returns the mean of each cell of a grid (Y, X) that divides the maps into equal parts.

    A pixel that lies in several cells counts in each by its share.

    >>> mean_cells(jnp.array([0.0, 3.0, 6.0]).reshape(1, 3, 1, 1), (2, 1))[0, :, 0, 0].tolist()
    [1.0, 5.0]
    """

    def shares(count: int, cells: int) -> Float[np.ndarray, "{cells} {count}"]:
        edges = np.arange(cells + 1) * count / cells
        low, high = edges[:-1, None], edges[1:, None]
        pixel = np.arange(count)
        overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
        return np.maximum(overlap, 0).astype(np.float32) * np.float32(cells / count)

    rows, columns = (shares(*pair) for pair in zip(x.shape[1:3], grid, strict=True))
    return jnp.einsum("Yy,Xx,byxc->bYXc", rows, columns, x, precision=lax.Precision.HIGHEST)

"""Resizing of feature maps, under jit: bilinear with corner pixels kept, and nearest neighbour."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def resize_align_corners(
    x: Float[Array, "B y x C"], size: tuple[int, int]
) -> Float[Array, "B Y X C"]:
    """Resizes maps bilinearly to `size` (Y, X); corners stay corners (torch's align_corners=True).

    >>> maps = jnp.arange(2.0).reshape(1, 2, 1, 1)
    >>> resize_align_corners(maps, (3, 1)).ravel().tolist()
    [0.0, 0.5, 1.0]
    """

    def weights(count: int, goal: int) -> Float[Array, "goal count"]:
        positions = jnp.linspace(0, count - 1, goal)[:, None]
        return jnp.maximum(0, 1 - abs(positions - jnp.arange(count))).astype(x.dtype)

    (_, rows, columns, _), (goal_y, goal_x) = x.shape, size
    return jnp.einsum("sy,tx,byxc->bstc", weights(rows, goal_y), weights(columns, goal_x), x)


def double_align_corners(x: Float[Array, "B y x C"]) -> Float[Array, "B Y X C"]:
    """Doubles maps bilinearly, corner pixels kept: n samples lie at 0, (n-1)/(2n-1), ...

    The result is that of `resize_align_corners`. Every sample lies between two neighbours,
    *out[2k] = x[k] + (x[k-1] - x[k]) k / (2n-1)* and
    *out[2k+1] = x[k] + (x[k+1] - x[k]) (n-1-k) / (2n-1)*, so shifts and sums replace the product
    with a matrix of weights.

    >>> double_align_corners(jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1))[0, 0, :, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    for axis in (1, 2):
        x = jnp.moveaxis(x, axis, 1)
        count = x.shape[1]
        k = jnp.arange(count, dtype=x.dtype)[:, None, None]
        previous = jnp.concatenate([x[:, :1], x[:, :-1]], 1)
        following = jnp.concatenate([x[:, 1:], x[:, -1:]], 1)
        even = x + (previous - x) * (k / (2 * count - 1))
        odd = x + (following - x) * ((count - 1 - k) / (2 * count - 1))
        x = jnp.stack([even, odd], 2).reshape(len(x), 2 * count, *x.shape[2:])
        x = jnp.moveaxis(x, 1, axis)
    return x


def resize_nearest(x: Float[Array, "B y x C"], size: tuple[int, int]) -> Float[Array, "B Y X C"]:
    """Resizes maps to `size` (Y, X) by nearest neighbour.

    Where an axis grows by a whole factor, less at most the last incomplete pixel, pixels are
    repeated and the result is cut at the far edges; other ratios are resized about pixel centres.

    >>> resize_nearest(jnp.arange(2.0).reshape(1, 1, 2, 1), (2, 3))[0, :, :, 0].tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """
    factors = [-(-goal // count) for count, goal in zip(x.shape[1:3], size, strict=True)]
    excess = [n * m - goal for n, m, goal in zip(factors, x.shape[1:3], size, strict=True)]
    if all(pixels < factor for pixels, factor in zip(excess, factors, strict=True)):
        return x.repeat(factors[0], 1).repeat(factors[1], 2)[:, : size[0], : size[1]]
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), "nearest")

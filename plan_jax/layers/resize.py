"""Resizing of feature maps [B Y X C] under jit: bilinear (two conventions), nearest, bicubic."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def resize_bilinear(x: Float[Array, "B y x C"], size: tuple[int, int]) -> Float[Array, "B Y X C"]:
    """Resizes maps bilinearly to `size` (Y, X) between pixel centres (align_corners=False).

    >>> maps = jnp.arange(2.0).reshape(1, 2, 1, 1)
    >>> resize_bilinear(maps, (4, 1)).ravel().tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")


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
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "nearest")


def resize_align_corners(
    x: Float[Array, "B y x C"], size: tuple[int, int]
) -> Float[Array, "B Y X C"]:
    """Resizes maps bilinearly to `size` (Y, X), in float32; corner pixels stay corners.

    >>> maps = jnp.arange(2.0).reshape(1, 2, 1, 1)
    >>> resize_align_corners(maps, (3, 1)).ravel().tolist()
    [0.0, 0.5, 1.0]
    """

    def interpolation_matrix(old: int, new: int) -> Float[Array, "{new} {old}"]:
        positions = jnp.linspace(0, old - 1, new)[:, None]
        return jnp.maximum(0, 1 - abs(positions - jnp.arange(old)))

    rows, columns = (interpolation_matrix(*pair) for pair in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("Yy,Xx,byxc->bYXc", rows, columns, x).astype(x.dtype)


def double_align_corners(x: Float[Array, "B y x C"]) -> Float[Array, "B Y X C"]:
    """Doubles maps bilinearly; corner pixels stay corners: n samples lie at 0, (n-1)/(2n-1), ...

    The same values as `resize_align_corners`. Every sample lies between two neighbours,
    `out[2k] = x[k] + (x[k-1] - x[k]) k / (2n-1)` and
    `out[2k+1] = x[k] + (x[k+1] - x[k]) (n-1-k) / (2n-1)`: shifts and sums instead of products with
    matrices, whose cost grows with the size of the map.

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
        x = jnp.stack([even, odd], 2).reshape(x.shape[0], 2 * count, *x.shape[2:])
        x = jnp.moveaxis(x, 1, axis)
    return x


def resize_bicubic(
    x: Float[Array, "B y x C"], size: tuple[int, int], antialias: bool = False
) -> Float[Array, "B Y X C"]:
    """Resizes maps to `size` (Y, X) by the matrices of `bicubic_matrix`, in float32.

    >>> resize_bicubic(jnp.ones((1, 2, 2, 1)), (1, 3), antialias=True)[0, 0, :, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    rows, columns = (
        jnp.asarray(bicubic_matrix(*pair, antialias=antialias), jnp.float32)
        for pair in zip(x.shape[1:3], size, strict=True)
    )
    # Positions are small numbers that add up: a TPU would round them to bfloat16 otherwise.
    y = jnp.einsum("Yy,Xx,byxc->bYXc", rows, columns, x, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def bicubic_matrix(
    old: int, new: int, *, antialias: bool = False, offset: float = 0.0
) -> Float[np.ndarray, "{new} {old}"]:
    """Returns the weights of torch's bicubic interpolation from `old` to `new` samples.

    Corners are not aligned: sample n of the result lies at `(n + 1/2) old / (new + offset) - 1/2`.
    The weight of a sample at distance t is `k(t)`, the kernel of Keys (1981),

        k(t) = (a + 2) t^3 - (a + 3) t^2 + 1     for t <= 1
        k(t) = a t^3 - 5 a t^2 + 8 a t - 4 a     for 1 < t < 2, else 0.

    Args:
      old: number of samples.
      new: number of samples of the result.
      antialias: False is a = -0.75, and edge samples are repeated. True is a = -0.5, the kernel is
        widened by `old / new` where samples become fewer, and weights are scaled to a sum of 1.
      offset: added to `new` in the scale, as DINOv2's code does; not with `antialias`.
    """
    scale = old / (new + offset)
    positions = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if antialias:
        weights = _keys_kernel(np.abs(np.arange(old) - positions) / max(scale, 1.0), -0.5)
        return weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    neighbours = np.floor(positions) + np.arange(-1, 3)
    weights = _keys_kernel(np.abs(positions - neighbours), -0.75)
    index = np.clip(neighbours, 0, old - 1).astype(int)
    # `add.at`, since neighbours beyond the edge fall onto the same index.
    np.add.at(matrix, (np.arange(new)[:, None], index), weights)
    return matrix


def _keys_kernel(t: Float[np.ndarray, "N M"], a: float) -> Float[np.ndarray, "N M"]:
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

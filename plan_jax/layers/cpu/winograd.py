"""3x3 convolutions by Winograd's F(2x2, 3x3), and their gradients: 16 products instead of 36.

Source: Lavin and Gray, arXiv 1509.09308. An output tile of 2x2 pixels and its input tile of 4x4
are transformed along rows and columns, so that the convolution becomes one matrix product for each
of 16 frequencies. The transforms are sums of two or three numbers, and rounding stays below 1e-6
of the largest entry (tiles of 4x4 would save little more and exceed 1e-5). The gradients are the
adjoints of the same steps. In shapes, t and u count tiles.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Table = list[list[Array]]  # arrays by frequency, or by position in a tile: row, column


# The transforms of one axis (B', G and A' of the paper) and their adjoints -----------------------


def _transform_input(d: list) -> list:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_input_adjoint(v: list) -> list:
    return [v[0], v[1] - v[2] + v[3], v[1] + v[2] - v[0], -v[3]]


def _transform_kernel(k: list) -> list:
    outer, inner = 0.5 * (k[0] + k[2]), 0.5 * k[1]
    return [k[0], outer + inner, outer - inner, k[2]]


def _transform_kernel_adjoint(u: list) -> list:
    outer = 0.5 * (u[1] + u[2])
    return [u[0] + outer, 0.5 * (u[1] - u[2]), u[3] + outer]


def _transform_output(m: list) -> list:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _transform_output_adjoint(y: list) -> list:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


# Tables of arrays --------------------------------------------------------------------------------


def _transpose(table: Table) -> Table:
    return [list(column) for column in zip(*table, strict=True)]


def _transform_both_axes(transform: Callable[[list], list], table: Table) -> Table:
    """Transforms along columns, then along rows."""
    rows = [transform(row) for row in table]
    return _transpose([transform(column) for column in _transpose(rows)])


def _zip_tables(function: Callable[[Array, Array], Array], first: Table, second: Table) -> Table:
    """Applies a function of two arrays entry by entry."""
    return [
        [function(a, b) for a, b in zip(*rows, strict=True)]
        for rows in zip(first, second, strict=True)
    ]


def _input_frequencies(x: Float[Array, "B Y X C"]) -> Table:
    """Returns the 4x4 frequencies [B t u C] of the input's tiles, which overlap by two pixels."""
    batch, height, width, channels = x.shape
    t, u = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * t + 1 - height), (1, 2 * u + 1 - width), (0, 0)))
    x = x.reshape(batch, t + 1, 2, u + 1, 2, channels)
    tiles = [
        [x[:, p // 2 : p // 2 + t, p % 2, q // 2 : q // 2 + u, q % 2] for q in range(4)]
        for p in range(4)
    ]
    return _transform_both_axes(_transform_input, tiles)


def _kernel_frequencies(kernel: Float[Array, "3 3 C E"]) -> Table:
    """Returns the 4x4 frequencies [C E] of a kernel."""
    taps = [[kernel[i, j] for j in range(3)] for i in range(3)]
    return _transform_both_axes(_transform_kernel, taps)


def interleave(planes: Table, height: int, width: int) -> Float[Array, "B Y X C"]:
    """Interleaves planes [B t u C], one for each position in a tile, and crops to the size."""
    if len(planes) == 1:
        return planes[0][0][:, :height, :width]
    x = jnp.stack([jnp.stack(row, 3) for row in planes], 2)
    batch, t, rows, u, columns, channels = x.shape
    return x.reshape(batch, t * rows, u * columns, channels)[:, :height, :width]


# The convolution and its gradients ---------------------------------------------------------------


def convolve(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"]
) -> Float[Array, "B Y X E"]:
    """Convolves with stride 1 and zero padding 1."""
    products = _zip_tables(jnp.matmul, _input_frequencies(x), _kernel_frequencies(kernel))
    return interleave(_transform_both_axes(_transform_output, products), *x.shape[1:3])


def gradients(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"], cotangent: Float[Array, "B Y X E"]
) -> tuple[Float[Array, "B Y X C"], Float[Array, "3 3 C E"]]:
    """Returns the gradients of `convolve` with respect to its input and its kernel."""
    batch, height, width, features = cotangent.shape
    t, u = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (0, 2 * t - height), (0, 2 * u - width), (0, 0))
    pairs = jnp.pad(cotangent, padding).reshape(batch, t, 2, u, 2, features)
    tiles = [[pairs[:, :, i, :, j] for j in range(2)] for i in range(2)]
    product_grads = _transform_both_axes(_transform_output_adjoint, tiles)
    kernel_grads = _zip_tables(
        lambda v, m: v.reshape(-1, v.shape[-1]).T @ m.reshape(-1, features),
        _input_frequencies(x),
        product_grads,
    )
    kernel_taps = _transform_both_axes(_transform_kernel_adjoint, kernel_grads)
    input_grads = _zip_tables(lambda m, k: m @ k.T, product_grads, _kernel_frequencies(kernel))
    tile_grads = _transform_both_axes(_transform_input_adjoint, input_grads)
    # Tiles of 4 that overlap by 2 become planes of 2, first along rows, then along columns.
    planes = [_add_overlaps(row, axis=2) for row in tile_grads]
    planes = _transpose([_add_overlaps(column, axis=1) for column in _transpose(planes)])
    return interleave(planes, height, width), jnp.stack([jnp.stack(row) for row in kernel_taps])


def _add_overlaps(tile: list, axis: int) -> list:
    """Adds up tiles of four that overlap by two; the first and last pixel are padding."""
    return [tile[1] + _shift(tile[3], axis, 1), tile[2] + _shift(tile[0], axis, -1)]


def _shift(x: Float[Array, "B t u C"], axis: int, offset: int) -> Float[Array, "B t u C"]:
    """Returns the tile `offset` before each tile (-1: the one after) along an axis, else zero."""
    padding = [(offset, -offset, 0) if n == axis else (0, 0, 0) for n in range(4)]
    return lax.pad(x, jnp.zeros((), x.dtype), padding)

"""3x3 convolutions by Winograd's F(2x2, 3x3) with their gradients: 16 products where 36 would be.

Source: Lavin and Gray, arXiv 1509.09308. An output tile of 2x2 pixels and its input tile of 4x4
are transformed along rows and columns, so that the convolution becomes one matrix product for each
of 16 frequencies. The transforms are sums of two or three numbers, and rounding stays below 1e-6
of the largest entry (tiles of 4x4 would save little more and exceed 1e-5). The gradients are the
adjoints of the same steps. In the letters below t, u count tiles.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Table = list[list[Array]]  # arrays by frequency, or by place in a tile: row, column


def _input(d: list) -> list:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _input_adjoint(v: list) -> list:
    return [v[0], v[1] - v[2] + v[3], v[1] + v[2] - v[0], -v[3]]


def _kernel(k: list) -> list:
    outer, inner = 0.5 * (k[0] + k[2]), 0.5 * k[1]
    return [k[0], outer + inner, outer - inner, k[2]]


def _kernel_adjoint(u: list) -> list:
    outer = 0.5 * (u[1] + u[2])
    return [u[0] + outer, 0.5 * (u[1] - u[2]), u[3] + outer]


def _output(m: list) -> list:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_adjoint(y: list) -> list:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both(transform: Callable[[list], list], table: Table) -> Table:
    """Transform along columns, then along rows."""
    rows = [transform(row) for row in table]
    columns = [transform(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _zip(function: Callable[[Array, Array], Array], one: Table, other: Table) -> Table:
    """Apply a function of two arrays place by place."""
    return [
        [function(a, b) for a, b in zip(*rows, strict=True)]
        for rows in zip(one, other, strict=True)
    ]


def _frequencies(x: Float[Array, "B Y X C"]) -> Table:
    """Give the 4x4 frequencies [B t u C] of the input's tiles, which overlap by two pixels."""
    batch, height, width, channels = x.shape
    t, u = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * t + 1 - height), (1, 2 * u + 1 - width), (0, 0)))
    x = x.reshape(batch, t + 1, 2, u + 1, 2, channels)
    each = [
        [x[:, p // 2 : p // 2 + t, p % 2, q // 2 : q // 2 + u, q % 2] for q in range(4)]
        for p in range(4)
    ]
    return _both(_input, each)


def _kernels(kernel: Float[Array, "3 3 C E"]) -> Table:
    """Give the 4x4 frequencies [C E] of a kernel."""
    return _both(_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])


def merge(planes: Table, height: int, width: int) -> Float[Array, "B Y X C"]:
    """Interleave planes [B t u C], one for each place in a tile, and crop to the size."""
    if len(planes) == 1:
        return planes[0][0][:, :height, :width]
    x = jnp.stack([jnp.stack(row, 3) for row in planes], 2)
    batch, t, rows, u, columns, channels = x.shape
    return x.reshape(batch, t * rows, u * columns, channels)[:, :height, :width]


def convolve(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"]
) -> Float[Array, "B Y X E"]:
    """Convolve with stride 1 and zero padding 1."""
    products = _zip(jnp.matmul, _frequencies(x), _kernels(kernel))
    return merge(_both(_output, products), *x.shape[1:3])


def _moved(x: Float[Array, "B t u C"], axis: int, by: int) -> Float[Array, "B t u C"]:
    """Take the neighbour `by` tiles before (1) or after (-1) along an axis, zero at the edge."""
    places = [(by, -by, 0) if n == axis else (0, 0, 0) for n in range(4)]
    return lax.pad(x, jnp.zeros((), x.dtype), places)


def _folded(d: list, axis: int) -> list:
    """Add up tiles of four that overlap by two; the first and last pixel are padding."""
    return [d[1] + _moved(d[3], axis, 1), d[2] + _moved(d[0], axis, -1)]


def gradients(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"], dy: Float[Array, "B Y X E"]
) -> tuple[Float[Array, "B Y X C"], Float[Array, "3 3 C E"]]:
    """Give the gradients of `convolve` with respect to its input and its kernel."""
    batch, height, width, out = dy.shape
    t, u = -(-height // 2), -(-width // 2)
    dy = jnp.pad(dy, ((0, 0), (0, 2 * t - height), (0, 2 * u - width), (0, 0)))
    dy = dy.reshape(batch, t, 2, u, 2, out)
    tiles = [[dy[:, :, i, :, j] for j in range(2)] for i in range(2)]
    products = _both(_output_adjoint, tiles)
    dkernel = _zip(
        lambda v, m: v.reshape(-1, v.shape[-1]).T @ m.reshape(-1, out), _frequencies(x), products
    )
    dkernel = jnp.stack([jnp.stack(row) for row in _both(_kernel_adjoint, dkernel)])
    dtiles = _zip(lambda m, k: m @ k.T, products, _kernels(kernel))
    columns = [_folded(row, 2) for row in _both(_input_adjoint, dtiles)]
    planes = [_folded(list(column), 1) for column in zip(*columns, strict=True)]
    planes = [list(row) for row in zip(*planes, strict=True)]
    return merge(planes, height, width), dkernel

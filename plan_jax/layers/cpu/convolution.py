"""Convolutions and max-pooling whose gradients are as fast on a CPU as their forward passes.

XLA's CPU backend has a good forward convolution and a good matrix product, but differentiates
convolutions into dilated ones (some ten times slower) and pooling into select_and_scatter. Here
the gradients are written out of those two good pieces: 1x1 is a matrix product; 3x3 at stride 1 is
Winograd's; otherwise the input's gradient is a forward convolution of each phase of the stride and
the kernel's gradient one matrix product for each tap. Everywhere else XLA's own are used.

The platform is asked for by `lax.platform_dependent`, when a program is lowered for its devices:
unlike `jax.default_backend()` it is right also for a CPU next to an accelerator, and with a single
platform it leaves no branch in the program.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from plan_jax.layers.cpu import winograd

NARROW = 32  # Winograd's sums cost more than they save with fewer channels
FEW = 8  # with no more channels, products for single taps would be too thin
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """How a window moves, in pixels, and the `pad` pixels around the image."""

    stride: int
    pad: int
    dilation: int = 1


def conv2d(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "H W C E"],
    stride: int = 1,
    pad: int = 0,
    dilation: int = 1,
) -> Float[Array, "B V U E"]:
    """Convolve with zero padding of `pad` pixels on every side (torch's convention), no bias.

    bfloat16 is added up in float32 inside of a product; the result has the type of x.
    """
    height, width, _, out = kernel.shape
    if height == width == stride and not pad and dilation == 1:  # no overlap: one product
        rows, cols = x.shape[1] // stride, x.shape[2] // stride
        x = x[:, : rows * stride, : cols * stride]
        x = rearrange(x, "b (v h) (u w) c -> b v u (h w c)", h=height, w=width)
        return product(x, kernel.reshape(-1, out))
    single = height == width == 1 and not pad
    if dilation > 1 or (stride > min(height, width) and not single):
        return _lax_conv(x, kernel, Geometry(stride, pad, dilation))
    return _conv(x, kernel, Geometry(stride, pad))


def max_pool(
    x: Float[Array, "B Y X C"], size: int, stride: int, pad: int
) -> Float[Array, "B V U C"]:
    """Take the maximum of windows of size x size pixels, padded with -inf (torch's convention).

    The gradient goes to the first of equal maxima, row by row.
    """
    return _max_pool(x, size, Geometry(stride, pad))


def _lax_conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    stride, pad, dilation = geometry
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 2,
        [(pad, pad)] * 2,
        rhs_dilation=(dilation,) * 2,
        dimension_numbers=LAYOUT,
    )


def _kernel_product(x: Array, dy: Array) -> Array:
    """Give the gradient [C E] of a kernel from [... C] and [... E], as fast as it can be had.

    XLA's product on a CPU is up to twice as fast if its result is wider than high, and a barrier
    has to keep XLA from turning it round again.
    """
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
    if x.shape[1] > dy.shape[1]:
        return lax.optimization_barrier(multiply(dy.T, x)).T
    return multiply(x.T, dy)


@jax.custom_vjp
def product(x: Float[Array, "*B C"], kernel: Float[Array, "C E"]) -> Float[Array, "*B E"]:
    """Multiply; on a CPU the kernel's gradient is taken the way round that is faster."""
    return x @ kernel


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    def default(x: Array, dy: Array) -> Array:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)

    x, kernel = saved
    dkernel = lax.platform_dependent(x, dy, cpu=_kernel_product, default=default)
    return dy @ kernel.T, dkernel.astype(kernel.dtype)


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def _fits_winograd(x: Array, kernel: Array, geometry: Geometry) -> bool:
    fits = kernel.shape[:2] == (3, 3) and geometry == (1, 1, 1) and x.dtype == jnp.float32
    return fits and min(kernel.shape[2:]) >= NARROW


def _cpu_conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    if kernel.shape[:2] == (1, 1) and not geometry.pad:
        return x[:, :: geometry.stride, :: geometry.stride] @ kernel[0, 0]
    if _fits_winograd(x, kernel, geometry):
        return winograd.convolve(x, kernel)
    return _lax_conv(x, kernel, geometry)


def _cpu_gradients(x: Array, kernel: Array, dy: Array, geometry: Geometry) -> tuple[Array, Array]:
    if kernel.shape[:2] == (1, 1) and not geometry.pad:
        seen = x[:, :: geometry.stride, :: geometry.stride]
        dkernel = _kernel_product(seen, dy)[None, None].astype(kernel.dtype)
        return _spread(dy @ kernel[0, 0].T, x.shape, geometry.stride), dkernel
    if _fits_winograd(x, kernel, geometry):
        return winograd.gradients(x, kernel, dy)
    kernel_gradient = _row_gradient if x.shape[-1] <= FEW else _tap_gradient
    dkernel = kernel_gradient(x, kernel, dy, geometry).astype(kernel.dtype)
    return _input_gradient(x, kernel, dy, geometry), dkernel


def _spread(x: Array, shape: tuple[int, ...], stride: int) -> Array:
    """Put pixels back to every `stride`-th place of a map of the given shape, zero elsewhere."""
    if stride == 1:
        return x
    places = [
        (0, a - (b - 1) * stride - 1, stride - 1) for a, b in zip(shape, x.shape, strict=True)
    ][1:3]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *places, (0, 0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """Convolve: `geometry` is static."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_cpu_conv, geometry=geometry),
        default=partial(_lax_conv, geometry=geometry),
    )


def _conv_forward(x: Array, kernel: Array, geometry: Geometry) -> tuple[Array, tuple]:
    return _conv(x, kernel, geometry), (x, kernel)


def _conv_backward(geometry: Geometry, saved: tuple[Array, Array], dy: Array) -> tuple:
    def default(x: Array, kernel: Array, dy: Array) -> tuple:
        return jax.vjp(partial(_lax_conv, geometry=geometry), x, kernel)[1](dy)

    cpu = partial(_cpu_gradients, geometry=geometry)
    return lax.platform_dependent(*saved, dy, cpu=cpu, default=default)


_conv.defvjp(_conv_forward, _conv_backward)


def _phase(phase: int, size: int, geometry: Geometry) -> tuple[range, int]:
    """Tell which windows see the pixels of one phase, along one axis.

    Pixel stride * m + phase is tap `taps[n]` of window m + ahead - n. Returns: taps, ahead.
    """
    first = (phase + geometry.pad) % geometry.stride
    return range(first, size, geometry.stride), (phase + geometry.pad) // geometry.stride


def _input_gradient(x: Array, kernel: Array, dy: Array, geometry: Geometry) -> Array:
    """Convolve dy with the taps that meet each phase of the stride, then interleave the phases."""
    size, stride = x.shape[1:3], geometry.stride
    planes = [[None] * stride for _ in range(stride)]
    turned = kernel.swapaxes(2, 3)
    for row in range(stride):
        for column in range(stride):
            pads, part = [], turned
            for axis, phase in enumerate((row, column)):
                taps, ahead = _phase(phase, kernel.shape[axis], geometry)
                part = jnp.flip(lax.slice_in_dim(part, taps.start, None, stride, axis), axis)
                count = -(-size[axis] // stride)
                pads.append((len(taps) - 1 - ahead, count - dy.shape[1 + axis] + ahead))
            planes[row][column] = lax.conv_general_dilated(
                dy, part, (1, 1), pads, dimension_numbers=LAYOUT
            )
    return winograd.merge(planes, *size)


def _tap_gradient(x: Array, kernel: Array, dy: Array, geometry: Geometry) -> Array:
    """Give the kernel's gradient: one product for each tap."""
    (height, width), stride, pad = kernel.shape[:2], geometry.stride, geometry.pad
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = (stride * (n - 1) + 1 for n in dy.shape[1:3])
    return jnp.stack(
        [
            jnp.stack(
                [
                    _kernel_product(x[:, i : i + rows : stride, j : j + columns : stride], dy)
                    for j in range(width)
                ]
            )
            for i in range(height)
        ]
    )


def _row_gradient(x: Array, kernel: Array, dy: Array, geometry: Geometry) -> Array:
    """Give the kernel's gradient where channels are few: one product for each row of taps.

    Squares of stride x stride pixels become channels first, so that windows move by one square.
    Image by image, so that what is gathered for the products stays in the cache.
    """
    (height, width, channels, out), (stride, pad, _) = kernel.shape, geometry
    taps = -(-height // stride), -(-width // stride)
    squares = [n + m - 1 for n, m in zip(dy.shape[1:3], taps, strict=True)]
    places = [(pad, stride * n - m - pad, 0) for n, m in zip(squares, x.shape[1:3], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *places, (0, 0, 0)])
    x = rearrange(x, "b (y h) (x w) c -> b y x (h w c)", h=stride, w=stride)

    def add(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        seen, slope = image
        seen = jnp.concatenate([seen[:, j : j + dy.shape[2]] for j in range(taps[1])], -1)
        seen = lax.optimization_barrier(seen)
        rows = [_kernel_product(seen[i : i + dy.shape[1]], slope) for i in range(taps[0])]
        return total + jnp.stack(rows), None

    zero = jnp.zeros((taps[0], taps[1] * stride**2 * channels, out), jnp.float32)
    dkernel = lax.scan(add, zero, (x, dy))[0]
    dkernel = rearrange(
        dkernel, "i (j h w c) e -> (i h) (j w) c e", j=taps[1], h=stride, w=stride, c=channels
    )
    return dkernel[:height, :width]


def _lax_pool(x: Array, size: int, geometry: Geometry) -> Array:
    window, strides = (1, size, size, 1), (1, geometry.stride, geometry.stride, 1)
    places = [(0, 0), (geometry.pad,) * 2, (geometry.pad,) * 2, (0, 0)]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, places)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Array, size: int, geometry: Geometry) -> Array:
    """Take the maximum: `size` and `geometry` are static."""
    return _lax_pool(x, size, geometry)


def _pool_forward(x: Array, size: int, geometry: Geometry) -> tuple[Array, tuple]:
    y = _lax_pool(x, size, geometry)
    return y, (x, y)


def _pool_backward(size: int, geometry: Geometry, saved: tuple[Array, Array], dy: Array) -> tuple:
    def default(x: Array, y: Array, dy: Array) -> Array:
        return jax.vjp(lambda x: _lax_pool(x, size, geometry), x)[1](dy)[0]

    cpu = partial(_pool_gradient, size=size, geometry=geometry)
    return (lax.platform_dependent(*saved, dy, cpu=cpu, default=default),)


_max_pool.defvjp(_pool_forward, _pool_backward)


def _pool_gradient(x: Array, y: Array, dy: Array, size: int, geometry: Geometry) -> Array:
    """Send dy to the first pixel of each window that has its maximum."""
    stride, pad = geometry.stride, geometry.pad
    zero = jnp.zeros((), dy.dtype)
    rows, columns = (stride * (n - 1) + 1 for n in dy.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-jnp.inf)
    first = jnp.full(y.shape, size * size, jnp.uint8)
    for tap in reversed(range(size * size)):
        i, j = divmod(tap, size)
        seen = padded[:, i : i + rows : stride, j : j + columns : stride]
        first = jnp.where(seen == y, jnp.uint8(tap), first)
    first = lax.optimization_barrier(first)
    count = [-(-n // stride) for n in x.shape[1:3]]
    planes = [[zero] * stride for _ in range(stride)]
    for tap in range(size * size):
        places, plane = [], []
        for axis, index in enumerate(divmod(tap, size)):
            phase = (index - pad) % stride
            late = (index - pad) // stride  # pixel stride * m + phase is in window m - late
            places.append((late, count[axis] - dy.shape[1 + axis] - late, 0))
            plane.append(phase)
        part = lax.pad(jnp.where(first == tap, dy, zero), zero, [(0, 0, 0), *places, (0, 0, 0)])
        planes[plane[0]][plane[1]] += part
    return winograd.merge(planes, *x.shape[1:3])

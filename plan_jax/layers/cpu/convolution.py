"""Convolutions whose gradients are as fast on a CPU as their forward passes.

XLA's CPU backend has a good forward convolution and a good matrix product, but differentiates
convolutions into dilated ones, which are about ten times slower. Here the gradients are composed of
those two good pieces:

1. Patches (the kernel is as large as the stride) and 1x1 kernels are matrix products.
2. 3x3 kernels at stride 1 are Winograd's, see `winograd.py`.
3. Otherwise the forward pass is XLA's, the gradient of the input is a forward convolution for each
   phase of the stride, and the gradient of the kernel is a matrix product for each tap (element of
   the window).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from plan_jax.layers.cpu import dispatch, is_enabled, winograd

# With fewer channels, the sums of Winograd's transforms cost more than its products save.
MIN_WINOGRAD_CHANNELS = 32
# With no more channels, the product for a single tap is too thin: one for a row of taps is faster.
MAX_ROW_CHANNELS = 8
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """How a window moves, in pixels, and the `padding` pixels of zeros around the image."""

    stride: int
    padding: int
    dilation: int = 1


def conv2d(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "H W C E"],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Float[Array, "B V U E"]:
    """Convolves with `padding` pixels of zeros on every side (torch's convention), without bias.

    The result has the type of x; products of bfloat16 are summed in float32.
    """
    geometry = Geometry(stride, padding, dilation)
    size = min(kernel.shape[:2])
    # The kernels cover neither dilation nor windows that leave out pixels; 1x1 may leave them out.
    skips_pixels = stride > size and not _is_pointwise(kernel, geometry)
    if not is_enabled() or dilation > 1 or skips_pixels:
        return _xla_conv(x, kernel, geometry)
    return _conv(x, kernel, geometry)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    cpu_kernel = partial(_cpu_conv, geometry=geometry)
    return dispatch(cpu_kernel, partial(_xla_conv, geometry=geometry), x, kernel)


def _conv_forward(x: Array, kernel: Array, geometry: Geometry) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, geometry), (x, kernel)


def _conv_backward(
    geometry: Geometry, inputs: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    cpu_kernel = partial(_cpu_gradients, geometry=geometry)
    return dispatch(cpu_kernel, partial(_xla_gradients, geometry=geometry), *inputs, cotangent)


_conv.defvjp(_conv_forward, _conv_backward)


def _xla_conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(geometry.stride,) * 2,
        padding=[(geometry.padding,) * 2] * 2,
        rhs_dilation=(geometry.dilation,) * 2,
        dimension_numbers=LAYOUT,
    )


def _xla_gradients(
    x: Array, kernel: Array, cotangent: Array, geometry: Geometry
) -> tuple[Array, Array]:
    return jax.vjp(partial(_xla_conv, geometry=geometry), x, kernel)[1](cotangent)


# Choice of the algorithm -------------------------------------------------------------------------


def _is_pointwise(kernel: Array, geometry: Geometry) -> bool:
    return kernel.shape[:2] == (1, 1) and not geometry.padding


def _is_patches(kernel: Array, geometry: Geometry) -> bool:
    return kernel.shape[:2] == (geometry.stride,) * 2 and not geometry.padding


def _is_winograd(x: Array, kernel: Array, geometry: Geometry) -> bool:
    fits = kernel.shape[:2] == (3, 3) and geometry == (1, 1, 1)
    # Its transforms lose digits that bfloat16 has not got.
    return fits and x.dtype == jnp.float32 and min(kernel.shape[2:]) >= MIN_WINOGRAD_CHANNELS


def _cpu_conv(x: Array, kernel: Array, geometry: Geometry) -> Array:
    if _is_pointwise(kernel, geometry):
        return x[:, :: geometry.stride, :: geometry.stride] @ kernel[0, 0]
    if _is_patches(kernel, geometry):
        return _patch_conv(x, kernel)
    if _is_winograd(x, kernel, geometry):
        return winograd.convolve(x, kernel)
    return _xla_conv(x, kernel, geometry)


def _cpu_gradients(
    x: Array, kernel: Array, cotangent: Array, geometry: Geometry
) -> tuple[Array, Array]:
    """Returns the gradients of x and the kernel."""
    if _is_pointwise(kernel, geometry):
        pixels = x[:, :: geometry.stride, :: geometry.stride]
        kernel_grad = _kernel_product(pixels, cotangent)[None, None]
        x_grad = _undo_stride(cotangent @ kernel[0, 0].T, x.shape, geometry.stride)
        return x_grad, kernel_grad.astype(kernel.dtype)
    if _is_patches(kernel, geometry):
        return jax.vjp(_patch_conv, x, kernel)[1](cotangent)
    if _is_winograd(x, kernel, geometry):
        return winograd.gradients(x, kernel, cotangent)
    kernel_gradient = _row_gradient if x.shape[-1] <= MAX_ROW_CHANNELS else _tap_gradient
    kernel_grad = kernel_gradient(x, kernel, cotangent, geometry)
    return _input_gradient(x, kernel, cotangent, geometry), kernel_grad.astype(kernel.dtype)


# Products ----------------------------------------------------------------------------------------


def _kernel_product(x: Float[Array, "*B C"], cotangent: Float[Array, "*B E"]) -> Array:
    """Returns `sum_b x_bc cotangent_be`, the gradient [C E] of a kernel, in float32.

    XLA's product on a CPU is up to twice as fast if its result is wider than high, and without the
    barrier XLA would transpose it back.
    """
    x, cotangent = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
    if x.shape[1] > cotangent.shape[1]:
        return lax.optimization_barrier(multiply(cotangent.T, x)).T
    return multiply(x.T, cotangent)


def _patch_conv(x: Array, kernel: Array) -> Array:
    """Convolves windows that do not overlap as one product; incomplete ones are cut."""
    size = len(kernel)
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : columns * size]
    patches = rearrange(x, "b (v h) (u w) c -> b v u (h w c)", h=size, w=size)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _undo_stride(x: Array, shape: tuple[int, ...], stride: int) -> Array:
    """Returns a map [B Y X C] of the given shape with x at every `stride`-th pixel, else zero."""
    if stride == 1:
        return x
    padding = [
        (0, large - (small - 1) * stride - 1, stride - 1)
        for large, small in zip(shape[1:3], x.shape[1:3], strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])


# Gradients of other windows ----------------------------------------------------------------------


def _phase_taps(phase: int, size: int, geometry: Geometry) -> tuple[range, int]:
    """Returns which taps meet the pixels of one phase along one axis, and the first's window.

    A phase is a pixel's position modulo the stride. Pixel stride * m + phase is tap `taps[n]` of
    window m + offset - n. Returns taps and offset.
    """
    first = (phase + geometry.padding) % geometry.stride
    return range(first, size, geometry.stride), (phase + geometry.padding) // geometry.stride


def _input_gradient(x: Array, kernel: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Convolves the cotangent with the taps that meet each phase, then interleaves the phases."""
    size, stride = x.shape[1:3], geometry.stride
    transposed = kernel.swapaxes(2, 3)
    planes: list[list[Array]] = []
    for row_phase in range(stride):
        planes.append([])
        for column_phase in range(stride):
            padding, taps_HWEC = [], transposed
            for axis, phase in enumerate((row_phase, column_phase)):
                taps, offset = _phase_taps(phase, kernel.shape[axis], geometry)
                taps_HWEC = lax.slice_in_dim(taps_HWEC, taps.start, None, stride, axis)
                taps_HWEC = jnp.flip(taps_HWEC, axis)
                num_pixels = -(-size[axis] // stride)
                after = num_pixels - cotangent.shape[1 + axis] + offset
                padding.append((len(taps) - 1 - offset, after))
            planes[-1].append(
                lax.conv_general_dilated(
                    cotangent, taps_HWEC, (1, 1), padding, dimension_numbers=LAYOUT
                )
            )
    return winograd.interleave(planes, *size)


def _tap_gradient(x: Array, kernel: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Returns the gradient of the kernel: one product for each tap."""
    (height, width), stride, pad = kernel.shape[:2], geometry.stride, geometry.padding
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = (stride * (n - 1) + 1 for n in cotangent.shape[1:3])
    products = [
        _kernel_product(x[:, i : i + rows : stride, j : j + columns : stride], cotangent)
        for i in range(height)
        for j in range(width)
    ]
    return jnp.stack(products).reshape(kernel.shape)


def _row_gradient(x: Array, kernel: Array, cotangent: Array, geometry: Geometry) -> Array:
    """Returns the gradient of a kernel of few channels: one product for each row of taps.

    Squares of stride x stride pixels become channels first, so that windows move by one square.
    """
    (height, width, channels, features), (stride, pad, _) = kernel.shape, geometry
    num_taps = -(-height // stride), -(-width // stride)
    num_squares = [n + m - 1 for n, m in zip(cotangent.shape[1:3], num_taps, strict=True)]
    padding = [
        (pad, stride * squares - pixels - pad, 0)
        for squares, pixels in zip(num_squares, x.shape[1:3], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    x = rearrange(x, "b (y h) (x w) c -> b y x (h w c)", h=stride, w=stride)
    out_rows, out_columns = cotangent.shape[1:3]

    # Image by image, so that the gathered windows stay in the cache.
    def add_image(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        squares, slopes = image
        windows = [squares[:, j : j + out_columns] for j in range(num_taps[1])]
        # Without the barrier XLA gathers the windows once more for every row of taps.
        windows = lax.optimization_barrier(jnp.concatenate(windows, -1))
        rows = [_kernel_product(windows[i : i + out_rows], slopes) for i in range(num_taps[0])]
        return total + jnp.stack(rows), None

    zeros = jnp.zeros((num_taps[0], num_taps[1] * stride**2 * channels, features), jnp.float32)
    kernel_grad = lax.scan(add_image, zeros, (x, cotangent))[0]
    kernel_grad = rearrange(
        kernel_grad,
        "i (j h w c) e -> (i h) (j w) c e",
        j=num_taps[1],
        h=stride,
        w=stride,
        c=channels,
    )
    return kernel_grad[:height, :width]

"""The U-Net decoder, against slow loops, for maps of many sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_shapes import parameter_shapes, random_maps

from plan_jax.heads import unet
from plan_jax.types import UserError


def first_kernels(params, count):
    """Input and output channels of the first convolution of each block of a U-Net."""
    return [params[f"block{n}"]["kernel1"].shape[2:] for n in range(1, count + 1)]


def literal_conv(x, kernel):
    """A 3x3 convolution with zeros around the map: one pixel and one tap at a time."""
    batch, rows, columns, _ = x.shape
    outputs = np.zeros((batch, rows, columns, kernel.shape[-1]))
    for y in range(rows):
        for c in range(columns):
            for i in range(3):
                for j in range(3):
                    v, u = y + i - 1, c + j - 1
                    if 0 <= v < rows and 0 <= u < columns:
                        outputs[:, y, c] += x[:, v, u] @ kernel[i, j]
    return outputs


def test_unet_on_the_stages_of_a_resnet50():
    maps = random_maps((32, 4), (16, 6), (8, 8), (4, 10), (2, 12))
    params, logits = parameter_shapes(unet.UNet(3, (64, 64), (20, 16, 12, 8, 5)), maps)
    assert logits == (2, 64, 64, 3)
    expected = [(12 + 10, 20), (20 + 8, 16), (16 + 6, 12), (12 + 4, 8), (8, 5)]
    assert first_kernels(params, 5) == expected
    assert set(params["block1"]) == {"kernel1", "norm1", "kernel2", "norm2"}
    assert "bias" in params["classes"]


def test_unet_uses_the_last_map_of_a_size_and_the_last_widths():
    maps = random_maps((8, 3), (8, 4), (4, 6))
    params, logits = parameter_shapes(unet.UNet(1, (32, 32)), maps)
    assert logits == (2, 32, 32, 1)
    assert first_kernels(params, 3) == [(6 + 4, 64), (64, 32), (32, 16)]
    message = "unet_widths has 2 widths, and this tower needs 3 blocks; give 3 widths"
    with pytest.raises(UserError, match=message):
        parameter_shapes(unet.UNet(1, (32, 32), (8, 4)), maps)


def test_parameters_may_be_numpy_arrays():
    maps, decoder = random_maps((8, 4), (4, 6)), unet.UNet(1, (16, 16), (6, 4))
    variables = jax.jit(decoder.init)(jax.random.key(0), maps)
    actual = decoder.apply(jax.tree.map(np.asarray, variables), maps)
    np.testing.assert_allclose(actual, decoder.apply(variables, maps), rtol=1e-6, atol=1e-6)


def test_the_last_map_of_each_size_is_read():
    maps = random_maps((8, 3), (8, 4), (4, 6))
    decoder = unet.UNet(1, (16, 16), (6, 4))
    variables = jax.jit(decoder.init)(jax.random.key(0), maps)
    gradients = jax.jit(jax.grad(lambda x: (decoder.apply(variables, x) ** 2).sum()))(maps)
    assert [bool(abs(gradient).max() > 0) for gradient in gradients] == [False, True, True]


@pytest.mark.parametrize(
    ("sizes", "image", "expected"),
    [
        ((14, 7, 4), 28, [7, 14, 28]),  # 7 is 4 doubled, less one
        ((8, 2), 16, [4, 8, 16]),  # a block without a map
        ((12, 8), 24, [12, 24]),  # two maps whose ratio is not 2
        ((14, 7), 32, [14, 28]),  # 28 is resized to 32
        ((16,), 16, []),
    ],
)
def test_unet_reaches_the_image_from_any_sizes(sizes, image, expected):
    block_sizes = unet.block_sizes([(n, n) for n in sizes[::-1]], (image, image))
    assert [size[0] for size in block_sizes] == expected
    maps = random_maps(*((n, 2) for n in sizes))
    decoder = unet.UNet(1, (image, image), (4, 4, 4))
    assert parameter_shapes(decoder, maps)[1] == (2, image, image, 1)


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
@pytest.mark.parametrize("width", [0, 2])
def test_the_folded_convolution_equals_that_of_the_doubled_map(size, width):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 4, 3, 5)), random.normal(size=(3, 3, 5 + width, 3))
    skip = random.normal(size=(2, *size, width)) if width else None
    doubled = np.kron(x, np.ones((1, 2, 2, 1)))[:, : size[0], : size[1]]
    joined = doubled if skip is None else np.concatenate([doubled, skip], -1)
    arrays = [None if x is None else jnp.asarray(x, jnp.float32) for x in (x, skip, kernel)]
    outputs = unet.convolve_upsampled(*arrays, size)
    np.testing.assert_allclose(outputs, literal_conv(joined, kernel), atol=2e-5)

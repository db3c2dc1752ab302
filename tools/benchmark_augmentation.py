"""Measures augmentation on the CPU against a compiled batch: `tools/benchmark.py augment`.

One thread decodes stored images of 256 pixels and augments them to 224, as a process of the loader
does. The same parts as a JAX program take a batch of decoded images at once. All times are CPU
times, summed over threads.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from plan_jax.data import augmentation, phantom, schema, transforms
from plan_jax.data.augmentation import PRESETS, Draw

STORED_SIZE, SIZE = 256, 224
BATCH = 64
HEADER = "| preset | part | CPU ms an image, min / median | images/s of a core |\n|---|---|---|---|"


def draw_images(count: int) -> UInt8[np.ndarray, "B Y X"]:
    """Returns phantom images [B Y X] of the stored size."""
    studies = [phantom.draw_study(0, index, STORED_SIZE) for index in range(count)]
    return np.stack([study.image.reshape(STORED_SIZE, STORED_SIZE) for study in studies])


def shift_randomly(
    image: UInt8[np.ndarray, "Y X"], rng: np.random.Generator
) -> UInt8[np.ndarray, "size size"]:
    """Returns what the loader makes of an image [Y X] without a preset."""
    down, right = transforms.draw_shift(rng, SIZE // 16)
    return transforms.shift_image(transforms.fit_image(image[..., None], SIZE), down, right)[..., 0]


def augment_randomly(
    image: UInt8[np.ndarray, "Y X"], name: str, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size"]:
    """Returns what the loader makes of an image [Y X] with a preset."""
    sample = augmentation.draw(PRESETS[name], image.shape, SIZE, rng)
    return augmentation.change_grey(augmentation.warp_image(image, sample.matrix, SIZE), sample)


def warp_on_device(
    image: UInt8[Array, "Y X"], inverse: Float[Array, "2 3"]
) -> Float[Array, "size size"]:
    """Returns what `augmentation.warp_image` does to an image [Y X], as gathers of four pixels."""
    rows, columns = jnp.mgrid[:SIZE, :SIZE] + 0.5
    x, y = jnp.einsum("ij,jyx->iyx", inverse, jnp.stack([columns, rows, jnp.ones_like(rows)]))
    is_inside = (x >= 0) & (x < image.shape[1]) & (y >= 0) & (y < image.shape[0])
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    warped = jnp.zeros((SIZE, SIZE))
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = (1 - jnp.abs(x - 0.5 - column)) * (1 - jnp.abs(y - 0.5 - row))
        i = jnp.clip(row, 0, image.shape[0] - 1).astype(jnp.int32)
        j = jnp.clip(column, 0, image.shape[1] - 1).astype(jnp.int32)
        warped += weight * image[i, j]
    return jnp.where(is_inside, warped, 0)


def augment_on_device(
    image: UInt8[Array, "Y X"],
    inverse: Float[Array, "2 3"],
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    blur: Float[Array, ""],
) -> UInt8[Array, "size size"]:
    """Returns an image [Y X] as augmented: warp, brightness, contrast and a Gaussian."""
    warped = jnp.clip(warp_on_device(image, inverse) * brightness, 0, 255)
    warped = jnp.clip(warped.mean() + contrast * (warped - warped.mean()), 0, 255)
    # As two products with a band matrix: convolutions with a kernel for each image are slower.
    offsets = jnp.arange(SIZE)[:, None] - jnp.arange(SIZE)
    band = jnp.exp(-0.5 * (offsets / jnp.maximum(blur, 1e-3)) ** 2)
    band /= band.sum(1, keepdims=True)
    return jnp.rint(band @ warped @ band.T).astype(jnp.uint8)


def stack_draws(draws: Sequence[Draw]) -> tuple[Array, ...]:
    """Returns the arguments of `augment_on_device` for a batch, from [2 3] on."""
    matrices = [np.vstack([sample.matrix, [0, 0, 1]]) for sample in draws]
    inverses = np.linalg.inv(np.stack(matrices))[:, :2]
    factors = [[sample.brightness, sample.contrast, sample.blur] for sample in draws]
    columns = np.moveaxis(np.asarray(factors, np.float32), 1, 0)
    return jnp.asarray(inverses, jnp.float32), *map(jnp.asarray, columns)


def print_row(name: str, part: str, run: Callable[[], object], repeats: int) -> None:
    """Prints the CPU time of an image, and images per second at the median, of a whole batch."""
    run()  # warms up
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append((time.process_time() - start) / BATCH)
    median = statistics.median(seconds)
    print(f"| {name} | {part} | {1e3 * min(seconds):.2f} / {1e3 * median:.2f} | {1 / median:.0f} |")


def main(repeats: int) -> None:
    """Prints the table."""
    images = draw_images(BATCH)
    files = [schema.encode_png(image).getvalue() for image in images]
    rng = np.random.default_rng(0)
    print(HEADER)
    print_row("", "decode", lambda: [schema.decode_png(data) for data in files], repeats)
    print_row("none", "shift", lambda: [shift_randomly(x, rng) for x in images], repeats)
    for name in PRESETS:

        def augment_all(name: str = name) -> list[np.ndarray]:
            return [augment_randomly(image, name, rng) for image in images]

        print_row(name, "augment", augment_all, repeats)
    augment_batch = jax.jit(jax.vmap(augment_on_device))
    warp_batch = jax.jit(jax.vmap(warp_on_device))
    convirt = PRESETS["convirt"]
    shape = (STORED_SIZE, STORED_SIZE)
    arguments = stack_draws([augmentation.draw(convirt, shape, SIZE, rng) for _ in range(BATCH)])
    on_device = jnp.asarray(images)

    def run_batch() -> None:
        jax.block_until_ready(augment_batch(on_device, *arguments))

    def run_warp() -> None:
        jax.block_until_ready(warp_batch(on_device, arguments[0]))

    print_row("convirt", f"JAX, warp only, batch {BATCH}", run_warp, repeats)
    print_row("convirt", f"JAX, batch {BATCH}", run_batch, repeats)

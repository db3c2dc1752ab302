"""The pyramid of three maps, and its layer of convolution and BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np

from plan_jax.heads import pyramid
from plan_jax.heads.yolo import SLOPE


def test_a_single_map_becomes_finer_by_a_transposed_convolution_and_coarser_by_the_maximum():
    x = jnp.array(np.random.default_rng(7).normal(size=(2, 3, 3, 4)), jnp.float32)
    module = pyramid.Pyramid()
    variables = module.init(jax.random.key(0), [x])
    finer, unchanged, coarser = module.apply(variables, [x])
    kernel = variables["params"]["above"]["kernel"].reshape(4, 2, 2, 2)
    kernel = kernel.transpose(1, 2, 0, 3)[::-1, ::-1]
    expected = jax.lax.conv_transpose(x, kernel, (2, 2), "VALID")
    np.testing.assert_allclose(finer, expected, atol=1e-5)
    assert unchanged is x and coarser.shape == (2, 2, 2, 4)
    np.testing.assert_array_equal(coarser[:, 0, 0], x[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(coarser[:, 1, 1], x[:, 2, 2])


def test_training_updates_the_running_statistics_and_evaluation_does_not():
    x = jnp.array(np.random.default_rng(8).normal(size=(8, 4, 4, 3)) + 2, jnp.float32)
    block = pyramid.ConvNorm(5, 3, slope=SLOPE)
    variables = block.init(jax.random.key(0), x)
    outputs, unchanged = block.apply(variables, x, False, mutable=["batch_stats"])
    assert (unchanged["batch_stats"]["norm"]["mean"] == 0).all() and (outputs < 0).any()
    outputs, updated = block.apply(variables, x, True, mutable=["batch_stats"])
    normalised = np.where(outputs > 0, outputs, outputs / SLOPE)
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=1e-3)
    raw = jax.lax.conv(
        x.transpose(0, 3, 1, 2),
        jnp.transpose(variables["params"]["conv"]["kernel"], (3, 2, 0, 1)),
        (1, 1),
        "SAME",
    )
    expected = 0.1 * np.asarray(raw).mean((0, 2, 3))
    mean = updated["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)


def test_a_large_mean_does_not_cancel_in_the_statistics():
    """The mean of squares minus the square of the mean loses all digits of a variance here."""
    x = jnp.asarray(np.random.default_rng(9).normal(3000, 1, (4, 5, 5, 3)), jnp.float32)
    block = pyramid.ConvNorm(3, 1, slope=1.0)
    variables = block.init(jax.random.key(0), x)
    variables["params"]["conv"]["kernel"] = jnp.eye(3)[None, None]
    outputs, updated = block.apply(variables, x, True, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    np.testing.assert_allclose(outputs, (exact - mean) / np.sqrt(var + 1e-5), atol=2e-3)
    # As torch has it, the running variance is the unbiased one.
    running = 0.9 + 0.1 * var * 100 / 99
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["var"], running, rtol=1e-4)

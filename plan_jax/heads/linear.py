"""One linear layer on a feature of each image: the head of linear probing, and its losses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float


class Linear(nn.Module):
    """Map each image's feature to `outputs` logits: *z = W (x - mean) / spread + b*, in float32.

    W and b begin uniform in ±1/sqrt(E), as torch's `Linear`, which MGCA's code uses. `mean` and
    `spread` Float[E] are no parameters: they are kept in `batch_stats`, begin at 0 and 1, and stay
    what they are; to standardise the features, write `statistics` there.
    """

    outputs: int

    @nn.compact
    def __call__(
        self, seen: Float[Array, "B E"], rows: Mapping[str, Any], train: bool = False
    ) -> Float[Array, "B F"]:
        """Give the logits of every image; neither `rows` nor `train` changes them."""
        width = seen.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        spread = self.variable("batch_stats", "spread", jnp.ones, (width,))

        def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

        level = (seen.astype(jnp.float32) - mean.value) / spread.value
        return nn.Dense(self.outputs, kernel_init=start, bias_init=start)(level)


def statistics(seen: Float[np.ndarray, "N E"]) -> dict[str, Float[np.ndarray, " E"]]:
    """Give the `mean` and `spread` (standard deviation, ddof 0) of features, for the head.

    A feature that does not vary keeps its scale: its spread is 1.
    """
    spread = seen.std(0, dtype=np.float64)
    varies = spread > 1e-6 * np.abs(seen).max(0)
    found = {"mean": seen.mean(0, dtype=np.float64), "spread": np.where(varies, spread, 1)}
    return {name: value.astype(np.float32) for name, value in found.items()}


def binary_loss(logits: Float[Array, "B F"], rows: Mapping[str, Any]) -> Float[Array, ""]:
    """Average the cross-entropy of yes and no over the labels that are known.

    *-y log s(z) - (1 - y) log(1 - s(z))*, s the sigmoid, y = `rows["truth"]`, where
    `rows["known"]`, both Bool[B F]; every known label weighs the same. 0 if none is known.
    """
    each = optax.sigmoid_binary_cross_entropy(logits, jnp.float32(rows["truth"]))
    return jnp.where(rows["known"], each, 0).sum() / jnp.maximum(rows["known"].sum(), 1)


def exclusive_loss(logits: Float[Array, "B F"], rows: Mapping[str, Any]) -> Float[Array, ""]:
    """Average *-log softmax(z)_y* over images, y the one class that is True in `rows["truth"]`."""
    return optax.softmax_cross_entropy(logits, jnp.float32(rows["truth"])).mean()


LOSSES: dict[str, Callable] = {"multilabel": binary_loss, "multiclass": exclusive_loss}

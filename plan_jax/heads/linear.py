"""One linear layer on a feature of each image: the head of linear probing, and its losses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

COLUMN_BLOCK = 64  # features whose statistics are computed at once


class Linear(nn.Module):
    """Maps each image's feature to `outputs` logits: *z = W (x - mean) / std + b*, in float32.

    W and b are initialised uniformly in ±1/sqrt(E), as torch's `Linear`, which MGCA's code uses.
    `mean` and `std` Float[E] are not parameters: they live in `batch_stats`, start at 0 and 1, and
    do not change during a fit. To standardise the features, write `feature_statistics` there.
    """

    outputs: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "B E"], examples: Mapping[str, Any], train: bool = False
    ) -> Float[Array, "B F"]:
        """Returns the logits of each image. `examples` and `train` are unused."""
        width = features.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        std = self.variable("batch_stats", "std", jnp.ones, (width,))

        def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

        standardised = (features.astype(jnp.float32) - mean.value) / std.value
        return nn.Dense(self.outputs, kernel_init=uniform, bias_init=uniform)(standardised)


def feature_statistics(features: Float[np.ndarray, "N E"]) -> dict[str, Float[np.ndarray, " E"]]:
    """Computes the `mean` and `std` (standard deviation, ddof 0) of features, for the head.

    A feature that does not vary keeps its scale: its `std` is 1.
    """
    means, deviations = [], []
    # Some columns at a time: copies of all features in float64 would not fit into memory.
    for start in range(0, features.shape[1], COLUMN_BLOCK):
        columns = features[:, start : start + COLUMN_BLOCK]
        std = columns.std(0, dtype=np.float64)
        # Relative to its size: a large constant has a tiny deviation from rounding alone.
        varies = std > 1e-6 * np.abs(columns).max(0)
        means.append(columns.mean(0, dtype=np.float64))
        deviations.append(np.where(varies, std, 1))
    values = {"mean": means, "std": deviations}
    return {name: np.concatenate(parts).astype(np.float32) for name, parts in values.items()}


def multilabel_loss(logits: Float[Array, "B F"], examples: Mapping[str, Any]) -> Float[Array, ""]:
    """Computes the mean binary cross-entropy over the labels that are known.

    *-y log s(z) - (1 - y) log(1 - s(z))*, s the sigmoid, y = `examples["labels"]`, where
    `examples["mask"]` is True, both Bool[B F]; every known label has the same weight. 0 if none is
    known.
    """
    labels = jnp.float32(examples["labels"])
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    num_labels = jnp.maximum(examples["mask"].sum(), 1)
    return jnp.where(examples["mask"], losses, 0).sum() / num_labels


def multiclass_loss(logits: Float[Array, "B F"], examples: Mapping[str, Any]) -> Float[Array, ""]:
    """Computes the mean of *-log softmax(z)_y*, y the class that is True in `examples["labels"]`.

    `labels` is Bool[B F] with one True in each row.
    """
    return optax.softmax_cross_entropy(logits, jnp.float32(examples["labels"])).mean()


LOSSES: dict[str, Callable] = {"multilabel": multilabel_loss, "multiclass": multiclass_loss}

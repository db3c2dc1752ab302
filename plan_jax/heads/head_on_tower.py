"""A head on a vision tower: what downstream tasks fit, with features computed once if they can be.

Three modes. `frozen`: the tower is fixed, BatchNorm as in evaluation. `finetune`: everything
learns. `frozen_train_norm`: parameters are fixed while BatchNorm stays in training mode, its
running statistics drifting, as MGCA's code for segmentation and detection leaves it (a fault,
kept for published numbers).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, UInt8

from plan_jax.types import Model, Stages, Tower, UserError

Mode = Literal["frozen", "finetune", "frozen_train_norm"]
CACHE = 2**31  # bytes of features that are kept; above, they are computed batch by batch
CHUNK = 64  # images that go through the tower at once


@dataclass(frozen=True)
class HeadOnTower:
    """A head and its tower, ready for `optim.fit_head`.

    `params` are what is fitted and `stats` what goes along (BatchNorm); `rows(images)` turns
    UInt8[N Y X 1] into rows: cached features (`seen`), or the images themselves (`image`).
    `loss(params, stats, rows, key, train)` is that of `fit_head`; `see(params, stats, rows)` gives
    what the head reads, `predict(params, stats, rows)` what it says of any number of rows.
    """

    params: PyTree
    stats: PyTree
    rows: Callable[[UInt8[np.ndarray, "N Y X 1"]], dict[str, PyTree]]
    loss: Callable[..., tuple[Float[Array, ""], PyTree]]
    see: Callable[[PyTree, PyTree, Mapping[str, PyTree]], PyTree]
    predict: Callable[[PyTree, PyTree, Mapping[str, PyTree]], PyTree]


def tower_of(model: Model) -> Tower:
    """Give a model's vision tower.

    Raises:
      UserError: it has none.
    """
    if model.tower is None:
        raise UserError(f"model {model.name} has no vision tower to fit a head on; load another")
    return model.tower


def attach(
    tower: Tower,
    head: nn.Module,
    criterion: Callable[[Any, Mapping[str, Any]], Float[Array, ""]],
    example: Mapping[str, PyTree],
    *,
    pick: Callable[[Stages], PyTree],
    mode: Mode = "frozen",
    native: bool = True,
    seed: int = 0,
    limit: int = CACHE,
) -> HeadOnTower:
    """Put a head on a tower.

    `head(seen, rows, train)` is a flax module; `seen` is what `pick` takes of the tower's stages,
    `rows` all that belongs to the examples. `criterion(outputs, rows)` is the loss. `example` are
    two rows as they will come, with their `image`, to make the head's parameters from `seed`.
    `native` is that of `Tower.apply`; features of more than `limit` bytes are not cached.
    """
    look = _looker(tower, pick, mode, native)

    def loss(params, stats, rows, key, train):
        seen, changed = look(params, stats, rows, train)
        variables = {"params": params["head"], "batch_stats": stats["head"]}
        outputs, new = head.apply(
            variables, seen, rows, train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        stats = {"head": new.get("batch_stats", stats["head"]), "tower": changed}
        return criterion(outputs, rows), stats

    @jax.jit
    def see(params, stats, rows):
        return look(params, stats, rows, False)[0]

    @jax.jit
    def say(params, stats, rows):
        seen = look(params, stats, rows, False)[0]
        return head.apply({"params": params["head"], "batch_stats": stats["head"]}, seen, rows)

    held = jax.tree.map(jnp.asarray, dict(tower.variables))
    params = {"tower": held["params"] if mode == "finetune" else {}}
    stats = {"head": {}, "tower": held.get("batch_stats", {})}
    seen = see(params, stats, {"image": example["image"]})
    made = jax.jit(head.init)(jax.random.key(seed), seen, example)
    bytes_each = sum(leaf.nbytes for leaf in jax.tree.leaves(seen)) // len(example["image"])

    def rows_of(images: UInt8[np.ndarray, "N Y X 1"]) -> dict[str, PyTree]:
        if mode != "frozen" or bytes_each * len(images) > limit:
            return {"image": images}
        return {"seen": finite(chunked(lambda rows: see(params, stats, rows), {"image": images}))}

    return HeadOnTower(
        params | {"head": made["params"]},
        stats | {"head": made.get("batch_stats", {})},
        rows_of,
        loss,
        see,
        lambda p, s, rows: chunked(lambda some: say(p, s, some), rows),
    )


def _looker(tower: Tower, pick: Callable[[Stages], PyTree], mode: Mode, native: bool) -> Callable:
    """Make what gives the features of some rows, kept or computed, and BatchNorm's statistics."""
    tuned = mode == "finetune"
    fixed = jax.tree.map(jnp.asarray, tower.variables["params"])

    def look(params: PyTree, stats: PyTree, rows: Mapping, train: bool) -> tuple[Any, PyTree]:
        if "seen" in rows:
            return rows["seen"], stats["tower"]
        held = {"params": params["tower"] if tuned else fixed, "batch_stats": stats["tower"]}
        stages, changed = tower.apply(held, rows["image"], train and mode != "frozen", native)
        seen = pick(stages)
        return (seen if tuned else jax.lax.stop_gradient(seen)), changed

    return look


def chunked(function: Callable[[PyTree], PyTree], rows: PyTree, size: int = CHUNK) -> PyTree:
    """Apply a function to rows in chunks of one size, padding the last, and join the results.

    The size never changes, so that a jitted function is compiled once for any number of rows.
    """
    count, parts = len(jax.tree.leaves(rows)[0]), []
    for start in range(0, count, size):
        some = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(jax.device_get(function(jax.tree.map(lambda x, some=some: x[some], rows))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def finite(features: PyTree) -> PyTree:
    """Give features back, having seen that they are numbers.

    Raises:
      UserError: some are NaN or infinite.
    """
    for leaf in jax.tree.leaves(features):
        right = np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if not right.all():
            raise UserError(
                f"features of {int((~right).sum())} of {len(leaf)} images are not finite (the first"
                f" is image {int(np.argmin(right))}); use another checkpoint"
            )
    return features

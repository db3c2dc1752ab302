"""A head on an image tower, as downstream tasks fit it; features are cached where possible.

There are three modes. `frozen`: the tower is fixed and BatchNorm is in evaluation mode. `finetune`:
all parameters are fitted. `frozen_train_norm`: the parameters are fixed, but BatchNorm stays in
training mode and its running statistics drift, as MGCA's code leaves it for segmentation and
detection (a fault, reproduced for published numbers).
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree, UInt32

from plan_jax.heads.examples import ExampleFunction, Images, StoredRows, map_chunks
from plan_jax.types import Model, Stages, Tower, UserError

Mode = Literal["frozen", "finetune", "frozen_train_norm"]
CACHE_BYTES = 2**31  # larger features are not cached but computed batch by batch


@dataclass(frozen=True)
class HeadOnTower:
    """A head and its tower as pure functions, ready for `heads.fit.fit_head`.

    Examples are a mapping of arrays with one leading axis: either `features` (cached) with their
    `source`, or `image`, and whatever the loss reads besides. `source` is a digest of the image and
    of the tower, since the last bits of features depend on the devices that compute them.

    Attributes:
      params: the initial parameters, of the head and, with `finetune`, of the tower.
      stats: the initial statistics of BatchNorm, of both.
      examples: `examples(images)` returns UInt8[N Y X 1] images as examples. Features are computed
        once; images on disk are not held.
      loss: `loss(params, stats, examples, key, train)`, as `fit_head` calls it.
      features: `features(params, stats, examples)` returns the input of the head.
      compute_features: the same for any number of examples, in numpy.
      predict: `predict(params, stats, examples)` returns the head's output for any number of
        examples.
    """

    params: PyTree
    stats: PyTree
    examples: Callable[[Images], dict[str, PyTree]]
    loss: Callable[..., tuple[Float[Array, ""], PyTree]]
    features: Callable[[PyTree, PyTree, Mapping[str, PyTree]], PyTree]
    compute_features: Callable[[PyTree, PyTree, Mapping[str, PyTree]], PyTree]
    predict: Callable[[PyTree, PyTree, Mapping[str, PyTree]], PyTree]


def require_tower(model: Model) -> Tower:
    """Returns the image tower of a model.

    Raises:
      UserError: the model has none.
    """
    if model.tower is None:
        raise UserError(
            f"model {model.name} has no image tower to fit a head to; load a model that has one"
        )
    return model.tower


def attach_head(
    tower: Tower,
    head: nn.Module,
    criterion: Callable[[Any, Mapping[str, Any]], Float[Array, ""]],
    example: Mapping[str, PyTree],
    *,
    select_features: Callable[[Stages], PyTree],
    mode: Mode = "frozen",
    native: bool = True,
    seed: int = 0,
    cache_bytes: int = CACHE_BYTES,
) -> HeadOnTower:
    """Initialises a head on a tower.

    Args:
      tower: the image tower.
      head: a flax module, called as `head(features, examples, train)`.
      criterion: `criterion(outputs, examples)` returns the mean loss.
      example: two examples with their `image`, to derive the shapes of the head's parameters.
      select_features: returns the input of the head from the stages of the tower.
      mode: what is fitted; see the top of this file.
      native: that of `Tower.apply`.
      seed: of the head's parameters.
      cache_bytes: features of more bytes in all are not cached.
    """
    apply_tower = _tower_function(tower, select_features, mode, native)

    def loss(params, stats, examples, key, train):
        features, tower_stats = apply_tower(params, stats, examples, train)
        variables = {"params": params["head"], "batch_stats": stats["head"]}
        outputs, changed = head.apply(
            variables, features, examples, train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        # A head without BatchNorm returns no statistics.
        head_stats = changed.get("batch_stats", stats["head"])
        return criterion(outputs, examples), {"head": head_stats, "tower": tower_stats}

    @jax.jit
    def features_of(params, stats, examples):
        return apply_tower(params, stats, examples, False)[0]

    @ExampleFunction
    def apply_features(state, examples):
        return apply_tower(*state, examples, False)[0]

    @ExampleFunction
    def compute_outputs(state, examples):
        params, stats = state
        features = apply_tower(params, stats, examples, False)[0]
        variables = {"params": params["head"], "batch_stats": stats["head"]}
        return head.apply(variables, features, examples)

    tower_variables = jax.tree.map(jnp.asarray, dict(tower.variables))
    params = {"tower": tower_variables["params"] if mode == "finetune" else {}}
    stats = {"head": {}, "tower": tower_variables.get("batch_stats", {})}
    features = features_of(params, stats, {"image": example["image"]})
    head_variables = jax.jit(head.init)(jax.random.key(seed), features, example)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(features))
    bytes_per_image = num_bytes // len(example["image"])

    def compute_features(params, stats, examples):
        return map_chunks(apply_features.bind((params, stats)), examples)

    def examples_of(images: Images) -> dict[str, PyTree]:
        # Only a frozen tower gives an image the same features in every epoch.
        if mode != "frozen" or bytes_per_image * len(images) > cache_bytes:
            return {"image": images}

        return {
            "features": require_finite(compute_features(params, stats, {"image": images})),
            "source": _identify_rows(
                images,
                lambda *x: select_features(tower.apply(*x, False, native)[0]),
                tower_variables,
            ),
        }

    return HeadOnTower(
        params | {"head": head_variables["params"]},
        stats | {"head": head_variables.get("batch_stats", {})},
        examples_of,
        loss,
        features_of,
        compute_features,
        lambda p, s, examples: map_chunks(compute_outputs.bind((p, s)), examples),
    )


def _tower_function(
    tower: Tower, select_features: Callable[[Stages], PyTree], mode: Mode, native: bool
) -> Callable:
    """Returns a function from examples to their features and the tower's new statistics."""
    finetune = mode == "finetune"
    fixed_params = jax.tree.map(jnp.asarray, tower.variables["params"])

    def apply_tower(
        params: PyTree, stats: PyTree, examples: Mapping, train: bool
    ) -> tuple[Any, PyTree]:
        if "features" in examples:  # cached
            return examples["features"], stats["tower"]
        tower_params = params["tower"] if finetune else fixed_params
        variables = {"params": tower_params, "batch_stats": stats["tower"]}
        train_norm = train and mode != "frozen"
        stages, tower_stats = tower.apply(variables, examples["image"], train_norm, native)
        features = select_features(stages)
        return (features if finetune else jax.lax.stop_gradient(features)), tower_stats

    return apply_tower


def _identify_rows(
    images: Images, function: Callable[[PyTree, Array], PyTree], variables: PyTree
) -> UInt32[np.ndarray, "N 4"]:
    """Returns a digest of what `function(variables, images)` computes features of an image from."""
    # The program, with its constants: a tower of the same weights may have another precision.
    shape = jax.ShapeDtypeStruct((2, *images.shape[1:]), np.uint8)
    program = jax.make_jaxpr(function)(variables, shape)
    tower = hashlib.blake2b(re.sub("0x[0-9a-f]+", "", str(program)).encode())
    for leaf in jax.tree.leaves((program.consts, variables)):
        tower.update(np.ascontiguousarray(leaf).tobytes())
    rows = (
        [row.encode() for row in images.identify_rows()]
        if isinstance(images, StoredRows)
        else (image.tobytes() for image in images)
    )
    digests = (hashlib.blake2b(tower.digest() + row, digest_size=16).digest() for row in rows)
    return np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 4)


def require_finite(features: PyTree) -> PyTree:
    """Returns features unchanged if all of them are finite.

    Raises:
      UserError: some are NaN or infinite.
    """
    for leaf in jax.tree.leaves(features):
        is_finite = np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if not is_finite.all():
            raise UserError(
                f"features of {int((~is_finite).sum())} of {len(leaf)} images are not finite (the "
                f"first is image {int(np.argmin(is_finite))}); use another checkpoint"
            )
    return features

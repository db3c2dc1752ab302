"""Each method's loss and gradients on eight devices, against one device."""

import functools

import chex
import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import METHODS

PAIRS, DEVICES = 16, 8
KEY = jax.random.key(0)
HYPERS = {
    "convirt": {},
    "gloria": {"tile_size": 8},
    "mgca": {"num_prototypes": 4, "freeze_prototype_steps": 0, "tile_size": 2},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "place": {"num_queries": 3},
    "plan": {"num_sampled_words": 4, "tile_size": 2, "num_candidates": 3, "rounds": 2, "eta": 0.5},
}
VARIANTS = {
    **{name: (name, {}) for name in HYPERS},
    "gloria_blocks": ("gloria", {"tile_size": 0}),
    "place_attn": ("place", {"match": "attn"}),
    "plan_ema": ("plan", {"progress": "ema", "ema_ramp_steps": 1}),
    **{f"{name}_sigmoid": (name, {"contrast": "sigmoid"}) for name in HYPERS},
    "plan_all": ("plan", {"negatives": "all", "num_candidates": 99}),
}


def make_objective(name, changes, axis):
    """Returns a method's loss as a function of (parameters, sides), and both of these."""
    method, hyper = METHODS[name], METHODS[name].Hyper(**HYPERS[name] | changes)
    params, memory = method.init(KEY, features.make_context(), hyper)
    if name == "plan":  # a history, so that words have different weights
        margin = jnp.linspace(-1, 1, hyper.history_size)
        memory = {"similarity_margin": margin, "count": jnp.ones(hyper.history_size)}
    images, texts = features.draw_features(PAIRS)
    sides = images.select(method.IMAGE_FEATURES), texts.select(method.TEXT_FEATURES)
    extra = features.draw_extra(texts)
    extra = {name: extra[name] for name in method.REQUIRES}
    extra["teacher"] = features.draw_features(PAIRS, seed=5)

    def objective(params, sides, extra):
        return method.loss(
            params, memory, *sides, extra, key=KEY, step=jnp.array(9), hyper=hyper, axis=axis
        )

    return functools.partial(jax.value_and_grad, has_aux=True, allow_int=True)(objective, (0, 1)), (
        params,
        sides,
        extra,
    )


def split_floats(tree):
    """Returns the leaves of real numbers; gradients of integers have no values."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]


def compute_on_eight(name, changes):
    """Returns values of all devices [8 ...], and the gradients as the training step takes them."""
    gradient, arguments = make_objective(name, changes, parallel.AXIS)

    def compute(params, sides, extra):
        (loss, aux), (params_gradient, sides_gradient) = gradient(params, sides, extra)
        params_gradient = parallel.mean(params_gradient)
        # The gradient of a feature has the loss of every device in it.
        sides_gradient = [leaf / DEVICES for leaf in split_floats(sides_gradient)]
        values = jax.tree.map(lambda x: jnp.asarray(x)[None], (loss, aux))
        return values, params_gradient, sides_gradient

    sharded, replicated = PartitionSpec(parallel.AXIS), PartitionSpec()
    mapped = jax.shard_map(
        compute,
        mesh=parallel.make_mesh(DEVICES),
        in_specs=(replicated, sharded, sharded),
        out_specs=(sharded, replicated, sharded),
        check_vma=False,
    )
    return jax.jit(mapped)(*arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_devices_have_the_loss_and_gradients_of_one(variant):
    name, changes = VARIANTS[variant]
    gradient, arguments = make_objective(name, changes, None)
    expected, (params_gradient, sides_gradient) = jax.jit(gradient)(*arguments)
    values, params_gradient_8, sides_gradient_8 = compute_on_eight(name, changes)
    for device in range(DEVICES):  # all metrics and the memory are the same on every device
        actual = jax.tree.map(lambda x, device=device: x[device], values)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    pairs = [
        (params_gradient_8, params_gradient),
        (sides_gradient_8, split_floats(sides_gradient)),
    ]
    for actual, reference in pairs:
        leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(reference), strict=True)
        for leaf, expected_leaf in leaves:
            scale = np.linalg.norm(expected_leaf)
            assert np.linalg.norm(leaf - expected_leaf) <= 1e-5 * max(scale, 1e-2), variant

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
    "gloria": {},
    "mgca": {"num_prototypes": 4, "freeze_prototype_steps": 0, "tile_size": 2},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "place": {"num_queries": 3},
    "plan": {
        "num_sampled_words": 4,
        "tile_size": 2,
        "num_candidates": 3,
        "rounds": 2,
        "eta": 0.5,
        "progress": "ema",
        "ema_ramp_steps": 1,
    },
}
VARIANTS = {
    **{name: (name, {}) for name in HYPERS},
    "convirt_sigmoid": ("convirt", {"contrast": "sigmoid"}),
    "place_attn": ("place", {"match": "attn", "num_decoder_blocks": 0}),
    # Not with the rounds and the pull above, which amplify rounding beyond the tolerance.
    "plan_guided": ("plan", {"guide_round_steps": 1, "rounds": 1, "eta": 0.0}),
    "plan_journal": (
        "plan",
        {
            "regions": "sparsemax",
            "pixel_dropout": 0.3,
            "concise_start_step": 9,
            "report_negatives": "unlike",
            "report_alike": 0.3,
        },
    ),
}


def clear_words(texts, rows):
    """Returns features whose texts of some rows have no words."""
    keep_B1 = jnp.ones((PAIRS, 1), bool).at[jnp.array(rows)].set(False)
    return texts.replace(
        local=texts.local * keep_B1[..., None],
        mask=texts.mask & keep_B1,
        word_id=texts.word_id * keep_B1,
        sentence=jnp.where(keep_B1, texts.sentence, -1),
        attention=texts.attention * keep_B1,
    )


def make_arguments(name, changes):
    """Returns a method's constants, and (parameters, memory, sides, extra) for its loss."""
    method, hyper = METHODS[name], METHODS[name].Hyper(**HYPERS[name] | changes)
    init = jax.jit(functools.partial(method.init, context=features.make_context(), hyper=hyper))
    params, memory = init(KEY)
    if name == "plan":  # a history, so that words have different weights
        margin = jnp.linspace(-1, 1, hyper.history_size)
        memory = {"similarity_margin": margin, "count": jnp.ones(hyper.history_size)}
    images, texts = features.draw_features(PAIRS)
    if name != "gloria":  # whose score of a text without words is -1e9
        texts = clear_words(texts, range(2, 4))  # all of the second device
    sides = images.select(method.IMAGE_FEATURES), texts.select(method.TEXT_FEATURES)
    extra = features.draw_extra(texts)
    extra = {name: extra[name] for name in method.REQUIRES}
    extra["teacher"] = features.draw_features(PAIRS, seed=5)
    extra["concise"] = features.draw_features(PAIRS, seed=6)[1]
    return hyper, (params, memory, sides, extra)


def make_gradient(name, hyper, axis):
    """Returns a function of these: ((loss, rest), (gradients of parameters, of sides))."""

    def objective(params, sides, memory, extra):
        return METHODS[name].loss(
            params, memory, *sides, extra, key=KEY, step=jnp.array(9), hyper=hyper, axis=axis
        )

    gradient = jax.value_and_grad(objective, (0, 1), has_aux=True, allow_int=True)
    return lambda params, memory, sides, extra: gradient(params, sides, memory, extra)


def split_floats(tree):
    """Returns the leaves of real numbers; gradients of integers have no values."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]


def compute_on_eight(name, hyper, arguments):
    """Returns values of all devices [8 ...], and the gradients as the training step takes them."""
    gradient = make_gradient(name, hyper, parallel.AXIS)

    def compute(*arguments):
        values, (params_gradient, sides_gradient) = gradient(*arguments)
        params_gradient = parallel.mean(params_gradient)
        # The gradient of a feature has the loss of every device in it.
        sides_gradient = [leaf / DEVICES for leaf in split_floats(sides_gradient)]
        values = jax.tree.map(lambda x: jnp.asarray(x)[None], values)
        return values, params_gradient, sides_gradient

    sharded, replicated = PartitionSpec(parallel.AXIS), PartitionSpec()
    mapped = jax.shard_map(
        compute,
        mesh=parallel.make_mesh(DEVICES),
        in_specs=(replicated, replicated, sharded, sharded),
        out_specs=(sharded, replicated, sharded),
        check_vma=False,
    )
    return jax.jit(mapped, compiler_options=features.OPTIMISED)(*arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_devices_have_the_loss_and_gradients_of_one(variant):
    name, changes = VARIANTS[variant]
    hyper, arguments = make_arguments(name, changes)
    whole = jax.jit(make_gradient(name, hyper, None), compiler_options=features.OPTIMISED)
    expected, (params_gradient, sides_gradient) = whole(*arguments)
    values, params_gradient_8, sides_gradient_8 = compute_on_eight(name, hyper, arguments)
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

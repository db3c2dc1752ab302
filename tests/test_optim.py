"""The optimiser: schedule, clipping, decay and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plan_jax import optim
from plan_jax.types import UserError

SETTINGS = {
    "learning_rate": 1e-3,
    "warmup_fraction": 0.1,
    "end_lr_factor": 0.1,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.98,
    "clip_norm": 0.0,
    "accumulate_steps": 1,
    "freeze": (),
}


def test_gradients_are_clipped_by_their_norm():
    params = {"w": jnp.ones((2, 2))}
    grads = [{"w": jnp.full((2, 2), value)} for value in (1.0, 100.0, 1.0)]
    updates = []
    for clip_norm in (1.0, 0.0):
        optimiser = optim.make_optimiser(params, steps=10, **SETTINGS | {"clip_norm": clip_norm})
        state = optimiser.init(params)
        for grad in grads:
            update, state = optimiser.update(grad, state, params)
        updates.append(float(jnp.abs(update["w"]).max()))
    # Clipped, the outlier weighs no more than others in Adam's second moment.
    assert updates[0] > 1.1 * updates[1]


def test_only_matrices_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "log_scale": jnp.ones(())}
    assert optim.is_decayed(params) == {"kernel": True, "bias": False, "log_scale": False}


def test_frozen_parameters_stay_and_carry_no_state():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "ab": {"kernel": jnp.ones((2, 2))}}
    optimiser = optim.make_optimiser(params, steps=10, **SETTINGS | {"freeze": ("a",)})
    update, _ = optimiser.update(params, optimiser.init(params), params)
    assert not update["a"]["kernel"].any()
    # A prefix is a whole path segment: `a` does not freeze `ab`.
    assert optim.label_frozen(params, ("a",)) == {
        "a": {"kernel": "frozen"},
        "ab": {"kernel": "train"},
    }


def test_a_path_that_names_no_parameter_is_refused():
    params = {"encoders": {"image_global_head": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(UserError) as error:
        optim.label_frozen(params, ("visoin",))
    assert "'visoin'" in str(error.value) and "encoders/image_global_head" in str(error.value)


def test_adamw_is_that_of_optax():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    settings = SETTINGS | {"weight_decay": 0.1}
    ours = optim.make_optimiser(params, steps=10, **settings)
    schedule = optim.make_schedule(1e-3, 10, 0.1, 0.1)
    theirs = optax.adamw(schedule, 0.9, 0.98, weight_decay=0.1, mask=optim.is_decayed)
    states = ours.init(params), theirs.init(params)
    # The nesting is part of every saved run.
    assert jax.tree.structure(states[0][1]) == jax.tree.structure(states[1])
    for seed in range(3):
        grads = jax.tree.map(
            lambda x, s=seed: jax.random.normal(jax.random.key(s), x.shape), params
        )
        update, first = ours.update(grads, states[0], params)
        expected, second = theirs.update(grads, states[1], params)
        states = first, second
        for name in params:
            np.testing.assert_array_equal(update[name], expected[name])


def test_muon_evens_out_the_singular_values_of_kernels():
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(16)},
        "token": {"embedding": jnp.zeros((32, 16))},
        "pool": {"kernel": jnp.zeros((64, 1))},  # too narrow
    }
    kinds = {"conv": {"kernel": "muon", "bias": "adam"}, "token": {"embedding": "adam"}}
    assert optim.label_muon(params) == kinds | {"pool": {"kernel": "adam"}}

    def draw(x):
        # Singular values from 1 to 1e-1, as gradients have them.
        flat = rng.normal(size=(x.size // x.shape[-1], x.shape[-1]))
        flat *= np.logspace(0, -1, x.shape[-1])
        return jnp.asarray(flat.reshape(x.shape), jnp.float32)

    grads = [jax.tree.map(draw, params) for _ in range(4)]
    settings = SETTINGS | {"learning_rate": 1.0, "warmup_fraction": 0.0, "end_lr_factor": 1.0}
    optimisers = [
        optim.make_optimiser(params, steps=100, **settings | {"name": name})
        for name in ("muon", "adamw")
    ]
    states = [optimiser.init(params) for optimiser in optimisers]
    mean = np.zeros((72, 16))
    for count, grad in enumerate(grads, 1):
        updates = []
        for n, optimiser in enumerate(optimisers):
            update, states[n] = optimiser.update(grad, states[n], params)
            updates.append(update)
        # Muon's equation, by hand: Nesterov's mean without bias, its singular values set to 1.
        gradient = np.asarray(grad["conv"]["kernel"]).reshape(72, 16)
        mean = 0.95 * mean + 0.05 * gradient
        ahead = 0.95 * mean / (1 - 0.95 ** (count + 1)) + 0.05 * gradient / (1 - 0.95**count)
        left, _, right = np.linalg.svd(ahead, full_matrices=False)
        if count == 1:
            continue  # the first step has a learning rate of 0
        ours = -np.asarray(updates[0]["conv"]["kernel"]).reshape(72, 16)
        in_basis = left.T @ ours @ right.T / (0.2 * np.sqrt(72))
        np.testing.assert_allclose(in_basis - np.diag(np.diag(in_basis)), 0, atol=0.02)
        # Five iterations of Newton and Schulz bring a singular value near 1, not to it.
        assert (np.diag(in_basis) > 0.5).all() and (np.diag(in_basis) < 1.4).all()
        for other in (("conv", "bias"), ("token", "embedding"), ("pool", "kernel")):
            first, second = (update[other[0]][other[1]] for update in updates)
            np.testing.assert_array_equal(first, second)


def test_muon_leaves_frozen_parameters():
    params = {"a": {"kernel": jnp.ones((9, 9))}, "b": {"kernel": jnp.ones((9, 9))}}
    settings = SETTINGS | {"name": "muon", "freeze": ("a",), "accumulate_steps": 2}
    optimiser = optim.make_optimiser(params, steps=10, **settings)
    state = optimiser.init(params)
    for _ in range(4):
        update, state = optimiser.update(params, state, params)
    assert not update["a"]["kernel"].any() and update["b"]["kernel"].any()

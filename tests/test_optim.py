"""The optimiser: schedule, clipping, decay and frozen parameters."""

import jax.numpy as jnp
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

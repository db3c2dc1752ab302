"""Training by `jax.pmap` equals that by `shard_map`: a method with BatchNorm, on eight devices."""

import jax
import numpy as np
import pytest
from test_train import make_config, random_batch

from plan_jax import parallel
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step

STEPS = 3


def train(implementation, microbatch):
    """Returns the losses of a few steps, and the states after the first and the last of them."""
    config, mesh = make_config(), parallel.make_mesh(8)
    components = build_components(config, parallel.AXIS)
    state, optimiser = init_state(components, config, random_batch(32))
    step = make_step(components, optimiser, 0.0, parallel.AXIS, microbatch)
    step = parallel.parallelise(step, mesh, implementation=implementation)
    state, losses, states = parallel.replicate(state, mesh), [], []
    for seed in range(STEPS):
        state, metrics = step(state, parallel.shard(random_batch(32, seed), mesh))
        losses.append(float(metrics["loss"]))
        states.append(parallel.to_host(state))
    return np.array(losses), states[0], states[-1]


def distance(a, b):
    """Returns the norm of the difference of two trees relative to the norm of the first."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def first_moments(state):
    """Returns Adam's first moments, after one step a multiple of the clipped gradients."""
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    return [leaf for path, leaf in leaves if "mu" in str(path)]


@pytest.fixture(scope="module", params=[0, 2], ids=["whole", "microbatches"])
def runs(request):
    """Returns what `train` does for each implementation; a device has four pairs."""
    return {name: train(name, request.param) for name in parallel.IMPLEMENTATIONS}


def test_losses_agree(runs):
    (a, *_), (b, *_) = runs.values()
    assert len(set(a.tolist())) == STEPS
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_gradients_agree(runs):
    a, b = (first_moments(first) for _, first, _ in runs.values())
    assert len(a) and max(np.abs(x).max() for x in a) > 0
    assert distance(a, b) <= 1e-5


@pytest.mark.parametrize("name", ["params", "batch_stats", "opt_state"])
def test_states_agree_after_several_steps(runs, name):
    a, b = (getattr(last, name) for *_, last in runs.values())
    start = getattr(next(iter(runs.values()))[1], name)
    assert distance(start, a) > 1e-4
    assert distance(a, b) <= 1e-5

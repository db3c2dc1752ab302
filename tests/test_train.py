"""The training step with its optimiser and average; tests/soak/test_steps.py has every method."""

import chex
import jax
import numpy as np
import pytest

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step
from plan_jax.train import ThroughputMeter
from plan_jax.types import Batch, TextBatch, UserError

# ConVIRT compiles soonest.
CONVIRT = {"method": "convirt", "hyper": {}, "fine_map": False}


def random_batch(pairs=16, seed=0, size=32, max_tokens=12, max_words=10):
    rng = np.random.default_rng(seed)
    position, slot = np.arange(max_tokens), np.arange(max_words)
    count = rng.integers(3, max_words + 1, (pairs, 1))
    pieces = rng.integers(5, 99, (pairs, max_tokens))
    words = rng.integers(5, 40, (pairs, max_words))
    image = rng.integers(0, 255, (pairs, size, size, 1), dtype=np.uint8)
    text = TextBatch(
        tokens=np.where(position < count + 2, pieces, 0),
        word_index=np.where((position >= 1) & (position <= count), position - 1, -1),
        word_id=np.where(slot < count, words, 0),
        sentence=np.where(slot < count, slot // 4, -1),
    )
    return Batch(image, text)


def make_config(changes=None, ema_decay=0.0, **optim):
    content = testing.get_config().to_dict() | (changes or CONVIRT) | {"ema_decay": ema_decay}
    content["optim"] |= {"learning_rate": 1e-3, **optim}
    return Config.from_dict(content | {"steps": 50})


def init(config, devices=1):
    """Returns the replicated state, the parallelised step and the mesh of a config."""
    mesh = parallel.make_mesh(devices)
    components = build_components(config, parallel.AXIS)
    state, optimiser = init_state(components, config, random_batch())
    step = make_step(components, optimiser, config.ema_decay, parallel.AXIS)
    return parallel.replicate(state, mesh), parallel.parallelise(step, mesh), mesh


def largest_difference(a, b):
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(x).max() + 1e-6)) for x, y in pairs)


def test_accumulation_updates_every_second_step():
    state, step, mesh = init(make_config(accumulate_steps=2))
    params = [parallel.to_host(state.params)]
    for seed in range(4):
        state, _ = step(state, parallel.shard(random_batch(seed=seed), mesh))
        params.append(parallel.to_host(state.params))
    updated = [largest_difference(a, b) > 0 for a, b in zip(params, params[1:], strict=False)]
    # The warm-up begins at a learning rate of 0, so the first update may change nothing.
    assert updated in ([False, True, False, True], [False, False, False, True])


def test_the_average_follows_the_parameters_and_teaches():
    hyper = {"num_sampled_words": 4, "tile_size": 2, "rounds": 0}
    changes = {"hyper": hyper | {"progress": "ema", "ema_ramp_steps": 1}}
    state, step, mesh = init(make_config(changes, ema_decay=0.9))
    start = parallel.to_host(state.ema_params)
    state, _ = step(state, parallel.shard(random_batch(), mesh))
    ema_params, params = parallel.to_host((state.ema_params, state.params))
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, params)
    assert largest_difference(expected, ema_params) < 1e-5


def test_the_step_is_traced_once():
    config = make_config()
    components = build_components(config, parallel.AXIS)
    state, optimiser = init_state(components, config, random_batch())
    step = chex.assert_max_traces(make_step(components, optimiser, 0.0, parallel.AXIS), n=1)
    mesh = parallel.make_mesh(1)
    parallel_step = parallel.parallelise(step, mesh)
    state = parallel.replicate(state, mesh)
    for seed in range(3):
        state, metrics = parallel_step(state, parallel.shard(random_batch(seed=seed), mesh))
    chex.assert_tree_all_finite(parallel.to_host(metrics))


def test_a_teacher_without_an_average_is_refused():
    config = make_config({"hyper": {"num_sampled_words": 4, "tile_size": 2, "progress": "ema"}})
    with pytest.raises(UserError, match="ema_decay"):
        init_state(build_components(config), config, random_batch())


def test_the_rate_leaves_out_the_first_step():
    meter = ThroughputMeter(8)
    assert meter.measure(1) == {}
    assert meter.measure(3)["images_per_s"] > 0
    assert meter.measure(3) == {}
